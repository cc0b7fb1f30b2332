"""Hidden states on disk: the divergence they give is that of the live model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from omniopd.errors import ConfigError, DataError
from omniopd.kernels import chunked_divergence
from omniopd.learner.policy import LanguageModel
from omniopd.logits.score_folder import FolderWriter, Manifest, WriteCounts
from omniopd.logits.scores import Reading
from omniopd.logits.stored_scores import StoredScores
from omniopd.logits.stored_states import StoredHead, StoredStates, write_states

WIDTH = 32
READINGS = tuple(
    Reading(
        prompt_ids=tuple(range(3, 3 + prompt)), token_ids=tuple((7 * i + prompt) % tiny.VOCABULARY for i in range(size))
    )
    for prompt, size in ((2, 5), (1, 1), (4, 9), (3, 3), (1, 6))
)


def live(dtype: torch.dtype = torch.float32, *, phase: float = 0.0) -> LanguageModel:
    return LanguageModel(tiny.model(dtype=dtype, phase=phase), compute_dtype=dtype)


def head_of(model: LanguageModel, *, bias: Tensor | None = None, softcap: float | None = None) -> StoredHead:
    return StoredHead(weight_VH=model.head.weight.detach(), bias_V=bias, softcap=softcap)  # type: ignore[arg-type]


def write(folder: Path, model: Any, readings: Sequence[Reading] = READINGS, **settings: Any) -> WriteCounts:
    head = settings.pop("head", None) or head_of(model)
    return write_states(folder, model, head, readings, **{"teacher": "tiny", "batch": 2, **settings})


def live_logprobs(model: LanguageModel, reading: Reading) -> Tensor:
    """Return log-softmax [T, V] from the model's own logits, unpadded and without the head of ours."""
    ids = torch.tensor([reading.prompt_ids + reading.token_ids])
    start = len(reading.prompt_ids) - 1
    with torch.no_grad():
        logits_TV = model.model(input_ids=ids).logits[0, start : start + len(reading.token_ids)]
    return torch.log_softmax(logits_TV.double(), dim=-1)


def live_kl(student_logprobs_TV: Tensor, teacher_logprobs_TV: Tensor) -> Tensor:
    return (teacher_logprobs_TV.exp() * (teacher_logprobs_TV - student_logprobs_TV)).sum(-1)


def worst_gap(folder: Path, teacher: LanguageModel) -> float:
    """Return the largest difference, in nats, of the forward KL from disk and that from the live logits."""
    student = live(phase=1.0)
    stored = StoredStates(folder)
    head = stored.head
    gap = 0.0
    for reading, states_TH in zip(READINGS, stored.hidden(READINGS), strict=True):
        ids = torch.tensor([reading.prompt_ids + reading.token_ids])
        start = len(reading.prompt_ids) - 1
        with torch.no_grad():
            student_TH = student.hidden(ids, torch.ones_like(ids))[0, start : start + len(reading.token_ids)]
            ours = chunked_divergence(
                student_TH,
                student.head.weight,
                states_TH,
                head.weight_VH,
                teacher_bias=head.bias_V,
                teacher_softcap=head.softcap,
            )
        theirs = live_kl(live_logprobs(student, reading), live_logprobs(teacher, reading))
        assert theirs.mean() > 0.01  # Two models that differ: a KL of nothing would show nothing.
        gap = max(gap, float((ours.double() - theirs).abs().max()))
    return gap


class EchoTrunk:
    """States that say where they were computed: [token, position, row of the batch, length of the row]."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        self.shapes.append(tuple(input_ids_BL.shape))
        b, size = input_ids_BL.shape
        columns = (
            input_ids_BL,
            torch.arange(size).expand(b, size),
            torch.arange(b)[:, None].expand(b, size),
            attention_mask_BL.sum(-1, keepdim=True).expand(b, size),
        )
        return torch.stack(columns, dim=-1).float()


FOUR = StoredHead(weight_VH=torch.eye(23, 4), bias_V=None, softcap=None)


# What is read back


def test_the_divergence_from_float32_states_is_that_of_the_live_model(tmp_path: Path) -> None:
    teacher = live()
    write(tmp_path, teacher)
    assert worst_gap(tmp_path, teacher) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    # 1.0e-4 and 7.4e-4 nats were measured, of a KL of 0.08 on average.
    [("float16", 1e-5, 3e-4), ("bfloat16", 1e-4, 2e-3)],
)
def test_narrower_states_cost_a_little_of_the_divergence(tmp_path: Path, dtype: Any, least: float, most: float) -> None:
    teacher = live()
    write(tmp_path, teacher, dtype=dtype)
    assert least < worst_gap(tmp_path, teacher) < most


def test_a_capped_head_with_a_bias_comes_back_whole(tmp_path: Path) -> None:
    teacher = live()
    bias_V = torch.linspace(-1.0, 1.0, tiny.VOCABULARY)
    write(tmp_path, teacher, head=head_of(teacher, bias=bias_V, softcap=2.5))
    stored = StoredStates(tmp_path)
    assert stored.head.softcap == 2.5 and stored.head.bias_V is not None
    assert torch.equal(stored.head.weight_VH, teacher.head.weight) and torch.equal(stored.head.bias_V, bias_V)
    reading = READINGS[2]
    ids = torch.tensor([reading.prompt_ids + reading.token_ids])
    with torch.no_grad():
        live_TH = teacher.hidden(ids, torch.ones_like(ids))[0, len(reading.prompt_ids) - 1 : -1].double()
    logits_TV = 2.5 * torch.tanh((live_TH @ teacher.head.weight.double().T + bias_V.double()) / 2.5)
    ours_T = chunked_divergence(
        torch.zeros(9, 1),
        torch.zeros(tiny.VOCABULARY, 1),
        stored.states(reading),
        stored.head.weight_VH,
        teacher_bias=stored.head.bias_V,
        teacher_softcap=stored.head.softcap,
    )
    # A student that knows nothing: KL(T || uniform).
    uniform_TV = torch.full((9, tiny.VOCABULARY), 1 / tiny.VOCABULARY, dtype=torch.float64).log()
    expected_T = live_kl(uniform_TV, torch.log_softmax(logits_TV, dim=-1))
    assert (ours_T.double() - expected_T).abs().max() < 1e-6 and expected_T.min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_in_the_dtype_of_the_model_lose_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = live(dtype)
    write(tmp_path, teacher, batch=1)
    stored = StoredStates(tmp_path)
    assert stored.manifest.dtype == str(dtype).removeprefix("torch.")
    for reading in READINGS:
        ids = torch.tensor([reading.prompt_ids + reading.token_ids[:-1]])
        with torch.no_grad():
            states_TH = teacher.hidden(ids, torch.ones_like(ids))[0, len(reading.prompt_ids) - 1 :]
        assert stored.states(reading).dtype == dtype and torch.equal(stored.states(reading), states_TH)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), max_size=7),
    batch=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_row_t_is_the_state_before_token_t_at_any_raggedness(
    sizes: list[tuple[int, int]], batch: int, dtype: Any
) -> None:
    readings = [
        Reading(prompt_ids=(i, *range(1, prompt)), token_ids=tuple(range(10, 10 + size)))
        for i, (prompt, size) in enumerate(sizes)
    ]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), EchoTrunk(), readings, head=FOUR, batch=batch, dtype=dtype)
        stored = StoredStates(folder)
        for reading, states_TH in zip(readings, stored.hidden(readings), strict=True):
            # Small whole numbers are exact in every dtype.
            ids = (reading.prompt_ids + reading.token_ids)[len(reading.prompt_ids) - 1 : -1]
            first = len(reading.prompt_ids) - 1
            expected = [[ids[t], first + t] for t in range(len(reading.token_ids))]
            assert states_TH[:, :2].tolist() == expected
            assert states_TH.shape == (len(expected), 4) and states_TH.dtype == torch.float32
            # What was computed for: the prompt and all tokens but the last.
            assert set(states_TH[:, 3].tolist()) <= {first + len(reading.token_ids)}


def test_completions_of_one_length_share_a_pass_the_longest_first(tmp_path: Path) -> None:
    trunk = EchoTrunk()
    seen: list[tuple[int, int]] = []
    write(tmp_path, trunk, head=FOUR, progress=lambda done, total: seen.append((done, total)))
    # Prompt and all tokens but the last: 12, 6, 6, 5, 1.
    assert trunk.shapes == [(2, 12), (2, 6), (1, 1)]
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_token_takes_the_bytes_of_its_state(tmp_path: Path) -> None:
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        folder = tmp_path / dtype
        write(folder, live(), dtype=dtype, batch=8)
        [shard] = folder.glob("part-*.safetensors")
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        # 5 + 1 + 9 + 3 + 6 = 24 tokens of 32 numbers.
        assert shard.stat().st_size - header == 24 * WIDTH * itemsize


def test_states_and_head_come_in_the_wider_dtype_of_the_two(tmp_path: Path) -> None:
    teacher = live(torch.bfloat16)
    write(tmp_path, teacher, dtype="float32")
    stored = StoredStates(tmp_path)
    assert {stored.head.weight_VH.dtype, stored.states(READINGS[0]).dtype} == {torch.float32}
    assert torch.equal(stored.head.weight_VH, teacher.head.weight.float())


def test_a_state_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    write(tmp_path, live())
    stored = StoredStates(tmp_path)
    before = stored.states(READINGS[0]).clone()
    stored.states(READINGS[0]).zero_()
    assert torch.equal(stored.states(READINGS[0]), before) and before.abs().sum() > 1


# Writing


def test_only_what_is_not_there_is_computed(tmp_path: Path) -> None:
    trunk = EchoTrunk()
    assert write(tmp_path, trunk, READINGS[:3], head=FOUR) == WriteCounts(written=3, already_there=0)
    trunk.shapes.clear()
    assert write(tmp_path, trunk, [*READINGS, READINGS[4]], head=FOUR) == WriteCounts(written=2, already_there=4)
    assert trunk.shapes == [(2, 6)]
    stored = StoredStates(tmp_path)
    assert stored.id == "tiny" and all(reading in stored for reading in READINGS)


def test_a_kill_before_the_index_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(writer: FolderWriter, lines: bytes) -> None:
        if lines:
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderWriter, "_append", die)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, EchoTrunk(), head=FOUR)
    monkeypatch.undo()
    assert READINGS[2] not in StoredStates(tmp_path)
    trunk = EchoTrunk()
    assert write(tmp_path, trunk, head=FOUR) == WriteCounts(written=3, already_there=2)
    assert (2, 12) not in trunk.shapes
    assert StoredStates(tmp_path).states(READINGS[2])[:, 1].tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_folder_is_of_one_head_and_dtype(tmp_path: Path) -> None:
    teacher = live()
    write(tmp_path, teacher, identity="a")
    digest = Manifest.read(tmp_path).head
    with pytest.raises(ConfigError, match=f"head '{digest}', asked for '[0-9a-f]{{32}}'"):
        write(tmp_path, live(phase=0.5), identity="a")
    with pytest.raises(ConfigError, match=r"softcap None, asked for 30\.0"):
        write(tmp_path, teacher, identity="a", head=head_of(teacher, softcap=30.0))
    with pytest.raises(ConfigError, match="dtype 'float32', asked for 'float16'"):
        write(tmp_path, teacher, identity="a", dtype="float16")
    with pytest.raises(ConfigError, match="identity 'a', asked for ''"):
        write(tmp_path, teacher)


def test_a_head_with_another_bias_is_another_head(tmp_path: Path) -> None:
    teacher = live()
    write(tmp_path, teacher, head=head_of(teacher, bias=torch.zeros(23)))
    with pytest.raises(ConfigError, match="head"):
        write(tmp_path, teacher, head=head_of(teacher, bias=torch.ones(23)))


def test_a_head_of_the_same_bytes_in_another_dtype_is_another_head(tmp_path: Path) -> None:
    half = StoredHead(weight_VH=torch.eye(23, 4, dtype=torch.float16), bias_V=None, softcap=None)
    brain = StoredHead(weight_VH=half.weight_VH.view(torch.bfloat16), bias_V=None, softcap=None)
    write(tmp_path, EchoTrunk(), head=half, dtype="float32")
    with pytest.raises(ConfigError, match=r"written with head '[0-9a-f]{32}', asked for"):
        write(tmp_path, EchoTrunk(), head=brain, dtype="float32")


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ids 1 to 23, but tiny has 23 tokens"):
        write(tmp_path, live(), [Reading(prompt_ids=(1,), token_ids=(23,))])


def test_a_state_too_large_for_float16_is_told(tmp_path: Path) -> None:
    class Loud(EchoTrunk):
        def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
            return super().hidden(input_ids_BL, attention_mask_BL) * 1e5

    with pytest.raises(DataError, match="no finite number in float16; store bfloat16 or float32"):
        write(tmp_path, Loud(), head=FOUR, dtype="float16")
    assert READINGS[0] not in StoredStates(tmp_path)


@pytest.mark.parametrize(("wrong", "told"), [({"dtype": "float64"}, "stored in float64"), ({"batch": 0}, "batch is 0")])
def test_settings_that_cannot_be_used_are_refused(tmp_path: Path, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        write(tmp_path, EchoTrunk(), head=FOUR, **wrong)


# What is not there


def test_completions_that_are_not_there_are_counted(tmp_path: Path) -> None:
    write(tmp_path, live(), READINGS[:2])
    stored = StoredStates(tmp_path)
    with pytest.raises(DataError, match=r"3 of 5 completions are not in the folder .*`omniopd scores write`"):
        stored.hidden(READINGS)


def test_another_kind_or_teacher_is_refused(tmp_path: Path) -> None:
    write(tmp_path, live(), identity="a")
    with pytest.raises(ConfigError, match="holds states, expected scores"):
        StoredScores(tmp_path)
    with pytest.raises(ConfigError, match="identity 'a', expected 'b'"):
        StoredStates(tmp_path, identity="b")


def test_a_folder_without_its_head_is_told_and_mended(tmp_path: Path) -> None:
    write(tmp_path, live())
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(DataError, match=r"head.safetensors cannot be read: it is not there"):
        StoredStates(tmp_path).states(READINGS[0])
    write(tmp_path, live())
    assert torch.equal(StoredStates(tmp_path).head.weight_VH, live().head.weight)
