"""A frozen teacher off the device or in few bits: the same numbers where the weights are the same."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from omniopd.errors import ConfigError, MissingExtraError
from omniopd.learner.policy import LanguageModel
from omniopd.logits.loading import load_frozen_model, offload_map
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 9, 4, 11, 22, 7, 5, 1]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model", tied=request.param)


def logprobs(model: PreTrainedModel) -> Tensor:
    """Return log-softmax [T, V] through the split that the learner and the fused kernels use."""
    split = LanguageModel(model, compute_dtype=model.dtype)
    with torch.no_grad(), split.autocast():
        return split.logprobs(split.hidden(IDS, torch.ones_like(IDS))[0])


def layer_devices(model: PreTrainedModel) -> set[str]:
    return {p.device.type for p in model.base_model.layers.parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_on_disk_give_the_same_logprobs_bit_for_bit(folder: Path, tmp_path: Path, dtype: str) -> None:
    plain = load_frozen_model(str(folder), device="cpu", dtype=dtype)
    away = load_frozen_model(str(folder), device="cpu", dtype=dtype, offload="disk", offload_folder=tmp_path / "away")
    assert (layer_devices(plain), layer_devices(away)) == ({"cpu"}, {"meta"})
    expected = logprobs(plain)
    assert torch.equal(logprobs(away), expected)
    # The layers went back to disk, and come again.
    assert layer_devices(away) == {"meta"}
    assert torch.equal(logprobs(away), expected)


def test_the_head_and_the_embedding_stay_where_the_kernels_read_them(folder: Path, tmp_path: Path) -> None:
    away = load_frozen_model(str(folder), device="cpu", dtype="float32", offload="disk", offload_folder=tmp_path / "a")
    head, embedding = away.get_output_embeddings().weight, away.get_input_embeddings().weight
    assert head.device == embedding.device == away.device == CPU
    plain = load_frozen_model(str(folder), device="cpu", dtype="float32")
    assert torch.equal(head, plain.get_output_embeddings().weight)
    assert (head is embedding) == plain.config.tie_word_embeddings
    kept = LanguageModel(away, compute_dtype=torch.float32).plain_head
    assert kept is not None and kept.weight_VH is head
    # A head that waits elsewhere itself has nothing to read.
    away.get_output_embeddings()._hf_hook.offload = True
    split = LanguageModel.__new__(LanguageModel)
    split.head, split._softcap = away.get_output_embeddings(), None
    assert split.plain_head is None


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_frozen_model_has_no_gradients_and_no_dropout(folder: Path, tmp_path: Path, offload: str) -> None:
    model = load_frozen_model(
        str(folder),
        device="cpu",
        dtype="float32",
        offload=offload,  # type: ignore[arg-type]
        offload_folder=tmp_path / "away",
    )
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_that_are_no_safetensors_are_copied_to_the_offload_folder(tmp_path: Path) -> None:
    network = tiny.model(dtype=torch.float32)
    folder, away = tmp_path / "model", tmp_path / "away"
    network.config.save_pretrained(folder)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    expected = logprobs(network)
    model = load_frozen_model(str(folder), device="cpu", dtype="float32", offload="disk", offload_folder=away)
    assert layer_devices(model) == {"meta"}
    assert torch.equal(logprobs(model), expected)
    assert any(away.iterdir())


def reset_peak() -> None:
    """Have the kernel forget the peak of this process; skip where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak memory of a process cannot be reset here")


def memory(field: str) -> float:
    """Return VmHWM, the peak, or VmRSS, in MB of 2^20 bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def test_layers_on_disk_take_less_memory(tmp_path: Path) -> None:
    # 8 layers of (4 x 256 x 256 + 3 x 256 x 3072) numbers of 4 bytes are 80 MB of 2^20 bytes, one layer is 10.
    config = Qwen3Config(
        vocab_size=100,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=3072,
    )
    folder = tmp_path / "model"
    Qwen3ForCausalLM(config).save_pretrained(folder, max_shard_size="12MB")
    peaks = {}
    for offload in ("disk", "none"):
        reset_peak()
        before = memory("VmRSS")
        model = load_frozen_model(
            str(folder), device="cpu", dtype="float32", offload=offload, offload_folder=tmp_path / "away"
        )
        with torch.no_grad():
            model(input_ids=torch.arange(16)[None])
        peaks[offload] = memory("VmHWM") - before
        del model
        gc.collect()
    assert peaks["none"] > 70
    assert peaks["disk"] < 0.5 * peaks["none"]


def test_only_the_layers_go_away_and_everything_else_has_a_place() -> None:
    network = tiny.model(layers=3)
    places = offload_map(network, device=torch.device("cuda:0"), offload="cpu")
    assert places == {
        "model.layers.0": "cpu",
        "model.layers.1": "cpu",
        "model.layers.2": "cpu",
        "model.embed_tokens": "cuda:0",
        "model.norm": "cuda:0",
        "model.rotary_emb": "cuda:0",
        "lm_head": "cuda:0",
    }
    for name, _ in network.named_parameters():
        assert any(name.startswith(f"{place}.") for place in places)


def test_lists_inside_a_layer_belong_to_it() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(2, 2)
            self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    network = nn.Module()
    network.layers = nn.ModuleList([Experts(), Experts()])
    network.head = nn.Linear(2, 2)
    places = offload_map(network, device=CPU, offload="disk")
    assert places == {"layers.0": "disk", "layers.1": "disk", "head": "cpu"}


def test_a_model_without_layers_cannot_be_offloaded() -> None:
    with pytest.raises(ConfigError, match="Linear has no list of layers"):
        offload_map(nn.Linear(2, 2), device=CPU, offload="disk")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "gpu"}, "offload is 'gpu'; it can be none, cpu or disk"),
        ({"quantization": "2bit"}, "quantization is '2bit'; it can be none, 8bit or 4bit"),
        ({"offload": "disk", "quantization": "8bit", "offload_folder": "x"}, "exclude each other"),
        ({"offload": "cpu"}, "the teacher runs on the cpu and its weights are there"),
        ({"offload": "disk"}, "there is no offload_folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_frozen_model(str(tmp_path), device="cpu", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"offload": "disk", "offload_folder": "away"}])
def test_a_folder_without_a_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_frozen_model(str(tmp_path), device="cpu", **settings)  # type: ignore[arg-type]


def test_a_model_without_weights_is_named(tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_frozen_model(str(tmp_path), device="cpu", offload="disk", offload_folder=tmp_path / "away")


@pytest.mark.parametrize(
    ("package", "settings", "line"),
    [
        ("bitsandbytes", {"quantization": "8bit"}, r"pip install 'omniopd\[quantized\]'"),
        ("accelerate", {"offload": "disk", "offload_folder": "away"}, r"pip install 'omniopd\[train\]'"),
    ],
)
def test_a_package_that_is_absent_is_named_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, settings: dict[str, str], line: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(MissingExtraError, match=line):
        load_frozen_model(str(tmp_path), device="cpu", **settings)  # type: ignore[arg-type]


def wide(folder: Path, *, tied: bool) -> Path:
    """Save a model whose linear maps are 64 wide or more, the blocks of 4 bits."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        tie_word_embeddings=tied,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("quantization", "largest"), [("8bit", 0.02), ("4bit", 0.2)])
def test_layers_in_few_bits_are_near_and_the_head_is_untouched(
    tmp_path: Path, quantization: str, largest: float, tied: bool
) -> None:
    folder = wide(tmp_path / "model", tied=tied)
    plain = load_frozen_model(str(folder), device="cpu", dtype="float32")
    model = load_frozen_model(
        str(folder),
        device="cpu",
        dtype="float32",
        quantization=quantization,  # type: ignore[arg-type]
    )
    bits = {type(m).__name__ for name, m in model.named_modules() if name.endswith("_proj")}
    assert bits == {"Linear8bitLt" if quantization == "8bit" else "Linear4bit"}
    assert torch.equal(model.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    assert not any(p.requires_grad for p in model.parameters())
    gap = (logprobs(model) - logprobs(plain)).abs().max().item()
    assert 0 < gap < largest
