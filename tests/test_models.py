"""Finding models, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from omniopd.errors import ConfigError
from omniopd.models import load_model, load_tokenizer, pick_device, pick_dtype, resolve_model
from omniopd.worlds.mini_math import model_path


def test_names_and_folders_are_resolved(tmp_path: Path) -> None:
    assert resolve_model("mini-math:student") == str(model_path("student"))
    assert resolve_model("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/models") == str(tmp_path / "models")


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="mini-math has the models student and teacher, not 'pupil'"):
        resolve_model("mini-math:pupil")
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no model folder"):
            resolve_model(name)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="'gpu' is no device; use auto, cpu or cuda:N"):
        pick_device("gpu")


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"'cuda:1' but torch .* sees no CUDA"):
        pick_device("cuda:1")


def test_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16: has)
        assert pick_dtype("auto", cuda) == expected


def test_a_model_folder_loads_ready_to_read(tmp_path: Path) -> None:
    folder = str(tiny.save(tmp_path / "m"))
    loaded = load_model(folder, device="cpu", dtype="float64")
    assert next(loaded.parameters()).dtype == torch.float64
    assert not loaded.training
    assert load_tokenizer(folder).decode(tiny.encode("12=3")) == "12=3"


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the model .*; give a folder with config\.json"):
        load_model(str(tmp_path), device="cpu")


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer \(no tokenizer.json\)"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))
