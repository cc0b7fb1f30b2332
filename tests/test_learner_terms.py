"""Terms of a step in the real learner: teachers with another vocabulary, several teachers, hidden states on disk."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import tiny
from omniopd.config import LearnerConfig
from omniopd.errors import DataError, LearnerError
from omniopd.learner.foreign import match_vocabularies
from omniopd.learner.foreign_losses import ForeignDivergence, HybridMatching, UniversalLogitDistillation
from omniopd.learner.learner import FUSED_VOCABULARY, Learner
from omniopd.learner.losses import build_losses
from omniopd.learner.policy import LanguageModel
from omniopd.learner.teachers import ForeignTeacher, LiveTeacher, StoredTeacher, TeacherModel
from omniopd.logits.foreign import MatchedVocabulary
from omniopd.logits.reading import ForeignVocabulary, Read
from omniopd.logits.scores import Reading
from omniopd.logits.stored_states import StoredStates, write_states
from omniopd.logits.token_bytes import TokenBytes
from omniopd.supervision.logprob import Divergence, LogprobSupervision
from omniopd.types import Missing, Rollout, StepContext, TokenSignal
from test_foreign_learning import characters, pairs

CTX = StepContext(step=0, num_steps=1)
Step = tuple[float, dict[str, Tensor]]
WIDE = len(pairs())
"""123: pairs of digits are tokens of the teacher's."""
ULD = {"type": "uld"}
HYBRID = {"type": "hybrid", "merge": "bayesian", "temperature": 1.3}
KINDS = [ULD, {"type": "uld", "merge": "bayesian", "temperature": 0.7}, {"type": "hybrid"}, HYBRID]


def network(phase: float = 1.0, vocabulary: int = WIDE) -> Any:
    return tiny.model(vocabulary=vocabulary, phase=phase)


def matched() -> MatchedVocabulary:
    ours, theirs = TokenBytes(characters()), TokenBytes(pairs())
    return match_vocabularies(
        ours, theirs, student_size=tiny.VOCABULARY, teacher_size=WIDE, kept=[(tiny.EOS, pairs().eos_token_id)]
    )


def foreign(of: Any, *, is_matched: bool = True) -> ForeignTeacher:
    made = LanguageModel(of, compute_dtype=torch.float64)
    return ForeignTeacher(made, matched=matched() if is_matched else None)


def rollouts() -> list[Rollout]:
    """Return texts of unlike lengths with groups of 1 to 1 and of 2 to 1, one of them cut off."""
    texts = (("12+34=46;#46", True), ("7", True), ("10+3=13", False), ("2+4=6;#6", True))
    return [
        tiny.rollout(text, name=f"p{i}/0", ended=ended, of=tiny.prompt(f"p{i}", f"Q:12+{i}?"))
        for i, (text, ended) in enumerate(texts)
    ]


def kl_signals(
    of: Sequence[Rollout], *, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> list[TokenSignal]:
    """Return what supervision makes of the rollouts."""
    reader = ForeignVocabulary(characters(), tokenizer or pairs())
    supervision = LogprobSupervision(objective=Divergence(), reader=reader, **settings)
    return asyncio.run(supervision.signals(of, CTX))


def with_advantages(signals: Sequence[TokenSignal]) -> list[TokenSignal]:
    """Add a policy gradient on some tokens of every rollout."""
    return [
        dataclasses.replace(
            s,
            advantages=tuple(0.3 * (t % 5) - 0.5 for t in range(s.rollout.num_tokens)),
            pg_weights=tuple(float((t + i) % 3 > 0) for t in range(s.rollout.num_tokens)),
        )
        for i, s in enumerate(signals)
    ]


def build(
    teachers: Mapping[str, TeacherModel],
    kl: dict[str, Any],
    *,
    fused_from: int = FUSED_VOCABULARY,
    **settings: Any,
) -> Learner:
    config = LearnerConfig(**{"learning_rate": 1e-3, "max_grad_norm": 1e9, "losses": {"kl": kl}, **settings})
    return Learner(
        tiny.policy(), config, num_steps=40, max_steps_off_policy=100, teachers=teachers, fused_from=fused_from
    )


def step(signals: Sequence[TokenSignal], teachers: Mapping[str, TeacherModel], kl: dict[str, Any], **more: Any) -> Step:
    learner = build(teachers, kl, **more)
    return learner.update(1, signals).loss, tiny.gradients(learner.policy.model)


def written_out(
    signals: Sequence[TokenSignal],
    networks: Mapping[str | None, Any],
    kl: dict[str, Any],
    *,
    aggregation: str = "sequence_mean_token_sum",
) -> Step:
    """Return the same step rollout by rollout and group by group, from the models' own logits."""
    student = tiny.model()
    loss: Any = build_losses({"kl": kl})["kl"]
    assert isinstance(loss, ForeignDivergence)
    sums = {"kl": torch.zeros((), dtype=torch.float64), "pg": torch.zeros((), dtype=torch.float64)}
    counts = {"kl": 0, "pg": 0}
    for s in signals:
        p_TV = tiny.naive_logprobs(student, s.rollout)
        ids_T = torch.tensor(s.rollout.token_ids)
        for t, weight in enumerate(s.pg_weights or ()):
            assert s.advantages is not None
            sums["pg"] = sums["pg"] - weight * s.advantages[t] * p_TV[t, ids_T[t]]
            counts["pg"] += weight > 0
        counts["kl"] += sum(w > 0 for w in s.kl_weights or ())
        if not isinstance(s.kl_evidence, Read) or s.kl_weights is None:
            continue
        reading, alignment = s.kl_evidence.reading, s.kl_evidence.alignment
        assert reading is not None and alignment is not None
        with torch.no_grad():
            other_ids = torch.tensor([reading.prompt_ids + reading.token_ids])
            logits = networks[s.kl_teacher](input_ids=other_ids).logits[0]
            q_UW = logits[len(reading.prompt_ids) - 1 : -1].log_softmax(-1)
        for g in alignment.groups:
            # Without special tokens inside, groups count the tokens themselves.
            p_1V = loss.distributions(p_TV, ids_T, [(g.student_start, g.student_end)])
            q_1W = loss.distributions(q_UW, torch.tensor(reading.token_ids), [(g.teacher_start, g.teacher_end)])
            weight = sum(s.kl_weights[g.student_start : g.student_end])
            sums["kl"] = sums["kl"] + weight * loss(p_1V, q_1W, matched()).sum()
    by_rollout = aggregation == "sequence_mean_token_sum"
    total = torch.zeros((), dtype=torch.float64)
    for stream, value in sums.items():
        total = total + value / (len(signals) if by_rollout else counts[stream] or 1)
    total.backward()  # type: ignore[no-untyped-call]
    return float(total.detach()), tiny.gradients(student)


def assert_same(ours: Step, theirs: Step, *, within: float = 1e-10) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=within)
    assert tiny.largest_gap(ours[1], theirs[1]) < within


# Another vocabulary


@pytest.mark.parametrize("spread", ["share", "whole"])
@pytest.mark.parametrize("kl", KINDS, ids=str)
def test_loss_and_gradient_are_those_of_all_groups(kl: dict[str, Any], spread: Any) -> None:
    of = network()
    # Tokens without weight stand before others that have some, alone and inside a group.
    masked = frozenset(tiny.encode("+2"))
    signals = kl_signals(rollouts(), spread=spread, weight=0.7, masked_ids=masked)
    assert {type(s.kl_evidence) for s in signals} == {Read}
    ours = step(signals, {"teacher": foreign(of)}, kl, logits_slice_tokens=5)
    assert_same(ours, written_out(signals, {None: of}, kl))
    assert ours[0] > 0.01


@pytest.mark.parametrize("aggregation", ["sequence_mean_token_sum", "token_mean"])
@pytest.mark.parametrize("kl", [ULD, HYBRID], ids=str)
def test_other_streams_stand_beside_it(kl: dict[str, Any], aggregation: Any) -> None:
    of = network()
    signals = with_advantages(kl_signals(rollouts()))
    # One that the teacher could not read is still reinforced.
    signals[1] = dataclasses.replace(
        signals[1], kl_weights=(0.0,) * 2, kl_evidence=None, unscored=Missing.FAILED, pg_weights=(1.0, 1.0)
    )
    expected = written_out(signals, {None: of}, kl, aggregation=aggregation)
    for fused_from in (FUSED_VOCABULARY, 1):
        ours = step(signals, {"teacher": foreign(of)}, kl, aggregation=aggregation, fused_from=fused_from)
        assert_same(ours, expected)
    # Both streams reach the weights.
    for stream in ("kl_weights", "pg_weights"):
        silent = [dataclasses.replace(s, **{stream: (0.0,) * s.rollout.num_tokens}) for s in signals]
        alone = step(silent, {"teacher": foreign(of)}, kl, aggregation=aggregation)
        assert tiny.largest_gap(alone[1], expected[1]) > 1e-3


@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.parametrize("kl", [ULD, HYBRID], ids=str)
def test_a_step_does_not_depend_on_how_it_is_cut(kl: dict[str, Any], is_together: bool) -> None:
    of = network()
    signals = kl_signals(rollouts())
    signals = with_advantages(signals) if is_together else signals
    expected = step(signals, {"teacher": foreign(of)}, kl, micro_batch_size=1, logits_slice_tokens=1000)
    for size in (2, 3, 4):
        ours = step(signals, {"teacher": foreign(of)}, kl, micro_batch_size=size, logits_slice_tokens=size)
        assert_same(ours, expected)
    assert_same(step(signals[::-1], {"teacher": foreign(of)}, kl), expected)


def test_metrics_name_the_streams() -> None:
    signals = with_advantages(kl_signals(rollouts()))
    update = build({"teacher": foreign(network())}, ULD).update(1, signals)
    # 12 + 1, 1 + 1, 7 and 8 + 1 tokens.
    assert update.metrics["tokens/kl"] == 31
    assert update.loss == pytest.approx(update.metrics["loss/kl"] + update.metrics["loss/pg"])


class Watched(ForeignTeacher):
    """Remembers what it read."""

    def __init__(self, of: Any) -> None:
        super().__init__(LanguageModel(of, compute_dtype=torch.float64))
        self.read: list[tuple[int, ...]] = []

    def states(self, readings: Sequence[Reading]) -> list[Tensor]:
        self.read += [r.token_ids for r in readings]
        return super().states(readings)


def test_rollouts_without_weight_are_not_read() -> None:
    signals = with_advantages(kl_signals(rollouts()))
    for i in (0, 2):
        signals[i] = dataclasses.replace(signals[i], kl_weights=(0.0,) * signals[i].rollout.num_tokens)
    teacher = Watched(network())
    ours = step(signals, {"teacher": teacher}, ULD)
    assert len(teacher.read) == 2
    assert_same(ours, written_out(signals, {None: network()}, ULD))


def test_two_foreign_teachers_by_name() -> None:
    networks = {"a": network(1.0), "b": network(2.0)}
    signals = with_advantages(kl_signals(rollouts()))
    signals = [dataclasses.replace(s, kl_teacher="ab"[i % 2]) for i, s in enumerate(signals)]
    teachers = {name: foreign(of) for name, of in networks.items()}
    for size in (1, 4):
        assert_same(step(signals, teachers, HYBRID, micro_batch_size=size), written_out(signals, networks, HYBRID))
    exchanged = {"a": networks["b"], "b": networks["a"]}
    assert written_out(signals, networks, HYBRID)[0] != pytest.approx(written_out(signals, exchanged, HYBRID)[0])


def test_the_teacher_may_cut_as_the_student_does() -> None:
    # The same vocabulary read as if it were another one: one token a group, everything matched but padding and <unk>.
    of = tiny.model()
    own = TokenBytes(characters())
    pairing = match_vocabularies(
        own, own, student_size=tiny.VOCABULARY, teacher_size=tiny.VOCABULARY, kept=[(tiny.EOS, tiny.EOS)]
    )
    itself = ForeignTeacher(LanguageModel(of, compute_dtype=torch.float64), matched=pairing)
    signals = kl_signals(rollouts(), tokenizer=characters())
    loss, gradients = step(signals, {"teacher": itself}, {"type": "hybrid"})
    # The teacher is the student.
    assert loss == pytest.approx(0.0, abs=1e-12)
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-12


def test_the_learner_lowers_the_loss() -> None:
    signals = kl_signals(rollouts())
    learner = build({"teacher": foreign(network())}, ULD, learning_rate=3e-3)
    losses = [learner.update(i, signals).loss for i in range(1, 13)]
    # Measured 0.83; the teacher is sharp where the student is flat, and one step does most of it.
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("teachers", "name", "told"),
    [
        ({}, None, "a signal asks for an open-weight teacher, but none is loaded"),
        ({"a": 1.0}, "b", "asks for the open-weight teacher 'b', but only 'a' are loaded"),
        ({"a": 1.0, "b": 2.0}, None, "asks for an open-weight teacher, but only 'a', 'b' are loaded"),
    ],
)
def test_a_foreign_teacher_that_is_not_there(teachers: dict[str, float], name: str | None, told: str) -> None:
    signals = kl_signals(rollouts(), name=name)
    with pytest.raises(LearnerError, match=told):
        step(signals, {n: foreign(network(phase)) for n, phase in teachers.items()}, ULD)


def test_a_teacher_of_the_students_vocabulary_is_no_foreign_one() -> None:
    live = LiveTeacher(LanguageModel(tiny.model(phase=1.0), compute_dtype=torch.float64))
    with pytest.raises(LearnerError, match=r"compares vocabularies, but the teacher has the student's"):
        step(kl_signals(rollouts()), {"teacher": live}, ULD)


def test_a_signal_that_does_not_say_how_the_teacher_reads_is_an_error() -> None:
    # Left out in silence, its tokens would be counted and never compared.
    (signal, *others) = kl_signals(rollouts())
    same = Reading(prompt_ids=signal.rollout.prompt.token_ids, token_ids=signal.rollout.token_ids)
    for evidence in (None, same, Read(reading=same)):
        odd = dataclasses.replace(signal, kl_evidence=evidence)
        with pytest.raises(LearnerError, match=r"rollout p0/0: .*set method\.supervision\.alignment: groups"):
            step([odd, *others], {"teacher": foreign(network())}, ULD)


def test_hybrid_needs_to_know_what_is_matched() -> None:
    with pytest.raises(DataError, match="no matched vocabulary"):
        step(kl_signals(rollouts()), {"teacher": foreign(network(), is_matched=False)}, HYBRID)
    assert build_losses({"kl": ULD})["kl"] == UniversalLogitDistillation()
    assert isinstance(build_losses({"kl": HYBRID})["kl"], HybridMatching)
    step(kl_signals(rollouts()), {"teacher": foreign(network(), is_matched=False)}, ULD)


# Hidden states on disk


def weighted(of: Sequence[Rollout], **fields: Any) -> list[TokenSignal]:
    return [
        TokenSignal(rollout=r, kl_weights=tuple(0.5 + 0.25 * (t % 3) for t in range(r.num_tokens)), **fields)
        for r in of
    ]


def own_reading(rollout: Rollout) -> Reading:
    return Reading(prompt_ids=rollout.prompt.token_ids, token_ids=rollout.token_ids)


def stored(folder: Path, model: LanguageModel, readings: Sequence[Reading]) -> StoredTeacher:
    assert model.plain_head is not None
    write_states(folder, model, model.plain_head, readings, teacher="tiny", dtype="float32", batch=3)
    return StoredTeacher(StoredStates(folder))


def single() -> LanguageModel:
    """Make a teacher in float32, whose states a folder holds bit for bit."""
    return LanguageModel(tiny.model(phase=1.0, dtype=torch.float32), compute_dtype=torch.float32)


@pytest.mark.parametrize("fused_from", [FUSED_VOCABULARY, 1])
@pytest.mark.parametrize("kl", [{"type": "reverse_kl"}, {"type": "forward_kl"}, {"type": "jsd"}], ids=str)
def test_states_on_disk_give_the_live_loss(tmp_path: Path, kl: dict[str, Any], fused_from: int) -> None:
    model, signals = single(), weighted(rollouts())
    on_disk = stored(tmp_path / "states", model, [own_reading(s.rollout) for s in signals])
    assert on_disk.vocabulary == tiny.VOCABULARY
    settings = {"fused_from": fused_from, "micro_batch_size": 3, "logits_slice_tokens": 4}
    live = step(signals, {"teacher": LiveTeacher(model)}, kl, **settings)
    # Both round in float32; batches of another shape round elsewhere.
    assert_same(step(signals, {"teacher": on_disk}, kl, **settings), live, within=1e-5)
    assert live[0] > 0.1


def test_states_of_another_prompt_are_those_that_were_read(tmp_path: Path) -> None:
    model, of = single(), rollouts()
    readings = [Reading(prompt_ids=tuple(tiny.encode("Q:?;")), token_ids=r.token_ids) for r in of]
    on_disk = stored(tmp_path / "states", model, readings)
    signals = [dataclasses.replace(s, kl_evidence=reading) for s, reading in zip(weighted(of), readings, strict=True)]
    kl = {"type": "reverse_kl"}
    live = step(signals, {"teacher": LiveTeacher(model)}, kl)
    assert_same(step(signals, {"teacher": on_disk}, kl), live, within=1e-5)
    # After the student's own prompt they are other states, and not in the folder.
    assert step(weighted(of), {"teacher": LiveTeacher(model)}, kl)[0] != pytest.approx(live[0], rel=1e-3)
    with pytest.raises(DataError, match="are not in the folder"):
        step(weighted(of), {"teacher": on_disk}, kl)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_live_and_a_stored_teacher_by_name(tmp_path: Path, micro_batch_size: int) -> None:
    of = rollouts()
    a, b = single(), LanguageModel(tiny.model(phase=2.0, dtype=torch.float32), compute_dtype=torch.float32)
    signals = [
        dataclasses.replace(s, kl_teacher=name) for s, name in zip(weighted(of), ("a", "b", "b", "a"), strict=True)
    ]
    mine = [own_reading(s.rollout) for s in signals if s.kl_teacher == "b"]
    kl, size = {"type": "reverse_kl"}, {"micro_batch_size": micro_batch_size}
    live = step(signals, {"a": LiveTeacher(a), "b": LiveTeacher(b)}, kl, **size)
    on_disk = stored(tmp_path / "states", b, mine)
    assert_same(step(signals, {"a": LiveTeacher(a), "b": on_disk}, kl, **size), live, within=1e-5)
    exchanged = step(signals, {"a": LiveTeacher(b), "b": LiveTeacher(a)}, kl, **size)
    assert exchanged[0] != pytest.approx(live[0], rel=1e-3)
    # The step is the sum of what each of both does to its own rollouts.
    parts = []
    for name, model in (("a", a), ("b", b)):
        silent = [
            s if s.kl_teacher == name else dataclasses.replace(s, kl_weights=(0.0,) * s.rollout.num_tokens)
            for s in signals
        ]
        parts.append(step(silent, {name: LiveTeacher(model)}, kl, **size))
    added = {key: parts[0][1][key] + parts[1][1][key] for key in parts[0][1]}
    assert_same((parts[0][0] + parts[1][0], added), live, within=1e-5)
