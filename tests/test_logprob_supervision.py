"""Supervision by an open-weight teacher's log-probs: what is asked, what the learner is told, and what is missing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from omniopd.errors import DataError, TeacherResponseError
from omniopd.learner.policy import LanguageModel
from omniopd.logits.alignment import Alignment, Spread, align_ends, group_logprobs
from omniopd.logits.model_scores import ModelScores
from omniopd.logits.reading import ForeignVocabulary, Read, SameVocabulary
from omniopd.logits.scores import Reading, Scored, TokenScores
from omniopd.supervision.combined import SummedSupervision
from omniopd.supervision.logprob import (
    Divergence,
    LogprobSupervision,
    MiniLLM,
    Objective,
    SampledTokens,
    Wanted,
    discounted_returns,
)
from omniopd.supervision.verified import VerifiedSupervision
from omniopd.types import Author, Missing, Rollout, StepContext, TokenSignal
from test_foreign_learning import characters, pairs, segments

CTX = StepContext(step=4, num_steps=9)
LOG_P = (-1.0, -0.5, -2.0)
LOG_Q = (0.0, 1.5, 1.0)
"""Chosen for rewards log Q - log P = 1, 2, 3; no real teacher has such logprobs."""
SINGLE_STEP = MiniLLM(discount=1.0, length_normalize=False)


class Scripted:
    """Says the same of every completion and remembers what it was asked; some completions it fails."""

    id = "scripted:q"

    def __init__(
        self, logprobs: Sequence[float] = LOG_Q, *, failures: Mapping[tuple[int, ...], Scored] | None = None
    ) -> None:
        self._logprobs = logprobs
        self._failures = failures or {}
        self.asked: list[tuple[list[Reading], int]] = []

    async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
        self.asked.append((list(readings), top_k))
        return [self._failures.get(r.token_ids) or Scored(scores=self._scores(r, top_k)) for r in readings]

    def _scores(self, reading: Reading, top_k: int) -> TokenScores:
        of = np.array(self._logprobs[: reading.num_tokens])
        if top_k == 0 and reading.requested_TK is None:
            return TokenScores(logprobs_T=of)
        ids = reading.requested_TK if reading.requested_TK is not None else np.tile(np.arange(top_k), (len(of), 1))
        return TokenScores(
            logprobs_T=of,
            known="teacher_top_k" if reading.requested_TK is None else "requested",
            ids_TK=ids,
            logprobs_TK=np.full(ids.shape, -1.0),
        )

    async def aclose(self) -> None: ...


class Measured:
    """The student's side, which remembers whom it measured."""

    def __init__(self, logprobs: Sequence[float] = LOG_P) -> None:
        self._logprobs = tuple(logprobs)
        self.of: list[str] = []

    def __call__(self, rollouts: Sequence[Rollout]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        self.of += [r.id for r in rollouts]
        return [(self._logprobs[: r.num_tokens], (0.0,) * r.num_tokens) for r in rollouts]


def forbidden(*_: Any) -> Any:
    raise AssertionError("nobody needs this")


def build(objective: Objective, **settings: Any) -> LogprobSupervision:
    return LogprobSupervision(**{"objective": objective, "reader": SameVocabulary("student"), **settings})


def signals(supervision: Any, *rollouts: Rollout) -> list[TokenSignal]:
    return asyncio.run(supervision.signals(rollouts, CTX))


def sampled(rollouts: Sequence[Rollout], objective: Objective, **settings: Any) -> list[TokenSignal]:
    return signals(build(objective, **{"teacher": Scripted(), "student": Measured(), **settings}), *rollouts)


def three(*, failed: Missing = Missing.TIMEOUT) -> tuple[list[Rollout], Scripted]:
    """Return three rollouts and a teacher that cannot score the second."""
    rollouts = [tiny.rollout(text, name=f"p0/{i}") for i, text in enumerate(("12", "3", "45"))]
    lost = Scored(missing=failed, detail="the server took 60 s")
    return rollouts, Scripted(failures={rollouts[1].token_ids: lost})


# Advantages


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (SampledTokens(), (1, 2, 3)),
        # 1 + 5, 2 + 3, 3
        (SampledTokens(discount=1.0), (6, 5, 3)),
        # 1 + (2 + 3/2)/2, 2 + 3/2, 3
        (SampledTokens(discount=0.5), (2.75, 3.5, 3)),
        (MiniLLM(length_normalize=False, single_step=False), (6, 5, 3)),
        # Over the 3, 2, 1 tokens that are left.
        (MiniLLM(single_step=False), (2, 2.5, 3)),
        (MiniLLM(discount=0.0, single_step=False), (1, 2, 3)),
        # 2.75 / 1.75, 3.5 / 1.5, 3
        (MiniLLM(discount=0.5, single_step=False), (2.75 / 1.75, 3.5 / 1.5, 3)),
        # The own reward is the exact single step's; the last token leads to nothing.
        (MiniLLM(length_normalize=False), (5, 3, 0)),
        (MiniLLM(), (2.5, 3, 0)),
    ],
)
def test_advantages_from_the_teachers_logprobs_by_hand(objective: Objective, expected: tuple[float, ...]) -> None:
    (signal,) = sampled([tiny.rollout("12")], objective)
    assert signal.advantages == pytest.approx(expected)
    assert signal.pg_weights == (1.0,) * 3
    single_step = isinstance(objective, MiniLLM) and objective.single_step
    assert signal.kl_weights == ((1.0,) * 3 if single_step else None)
    (doubled,) = sampled([tiny.rollout("12")], objective, weight=2.0)
    assert doubled.advantages == pytest.approx([2 * a for a in expected])
    assert doubled.kl_weights == ((2.0,) * 3 if single_step else None)


def test_the_end_of_a_long_answer_is_its_own_reward_alone() -> None:
    rewards = [0.1 * t for t in range(50)]
    assert discounted_returns(rewards, 0.9)[-1] == rewards[-1]
    assert discounted_returns(rewards, 1.0)[0] == pytest.approx(sum(rewards))
    assert discounted_returns([], 0.5) == [] == MiniLLM().advantages([])


def test_text_of_others_has_no_advantages_and_nobody_is_asked_about_it() -> None:
    mine = tiny.rollout("12")
    theirs = tiny.rollout("1212", name="p0/1", author=Author.TEACHER)
    given = tiny.rollout("2", name="p0/2", author=Author.DATASET)
    teacher, student = Scripted(), Measured()
    made = sampled([theirs, mine, given], SampledTokens(), teacher=teacher, student=student)
    assert [s.pg_weights for s in made] == [(0.0,) * 5, (1.0,) * 3, (0.0,) * 2]
    assert [s.rollout for s in made] == [theirs, mine, given]
    assert all(s.unscored is None and s.notes == () for s in made)
    assert [[r.token_ids for r in readings] for readings, _ in teacher.asked] == [[mine.token_ids]]
    assert student.of == [mine.id]
    (alone,) = sampled([theirs], SampledTokens(), teacher=None, student=forbidden)
    assert alone.advantages == (0.0,) * 5


def test_a_measure_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match="p0/0 has 3 tokens, but 3 logprobs of the student and 2 of the teacher"):
        sampled([tiny.rollout("12")], SampledTokens(), teacher=Scripted(LOG_Q[:2]))


def test_advantages_are_the_differences_of_two_real_models() -> None:
    student, network = tiny.model(), tiny.model(phase=1.0)
    rollouts = [tiny.rollout("1+2=3;#3"), tiny.rollout("12", name="p0/1")]

    def logprobs_of(of: Any, rollout: Rollout) -> list[float]:
        with torch.no_grad():
            logprobs_TV = tiny.naive_logprobs(of, rollout)
        return [float(row[i]) for row, i in zip(logprobs_TV, rollout.token_ids, strict=True)]

    made = sampled(
        rollouts,
        SampledTokens(),
        teacher=ModelScores(LanguageModel(network, compute_dtype=torch.float64), id="hf:tiny"),
        student=lambda rs: [(tuple(logprobs_of(student, r)), (0.0,) * r.num_tokens) for r in rs],
    )
    for signal in made:
        q, p = (logprobs_of(of, signal.rollout) for of in (network, student))
        assert signal.advantages == pytest.approx([a - b for a, b in zip(q, p, strict=True)], abs=1e-10)
    assert max(map(abs, made[0].advantages or ())) > 0.1


# What is missing


@pytest.mark.parametrize("objective", [SampledTokens(), SINGLE_STEP, SampledTokens(discount=1.0)], ids=repr)
def test_a_missing_record_is_no_reward_of_zero(objective: Objective) -> None:
    rollouts, teacher = three()
    student = Measured()
    made = sampled(rollouts, objective, teacher=teacher, student=student, name="big")
    lost = made[1]
    assert (lost.unscored, lost.notes) == (Missing.TIMEOUT, ("not scored: the server took 60 s",))
    assert (lost.advantages, lost.pg_weights) == ((0.0, 0.0), (0.0, 0.0))
    assert student.of == ["p0/0", "p0/2"]
    expected = tuple(objective.advantages([1.0, 2.0, 3.0]))
    for signal in (made[0], made[2]):
        assert (signal.advantages, signal.pg_weights) == (expected, (1.0,) * 3)
        assert (signal.unscored, signal.notes) == (None, ())
    weights = [s.kl_weights for s in made]
    assert weights == ([(1.0,) * 3, (0.0,) * 2, (1.0,) * 3] if objective.uses_divergence else [None] * 3)
    assert {s.kl_teacher for s in made} == {"big"}


def test_a_missing_record_moves_no_weight_of_the_student() -> None:
    rollouts, teacher = three()
    made = sampled(rollouts, SampledTokens(), teacher=teacher)

    def gradient(of: Sequence[TokenSignal]) -> dict[str, torch.Tensor]:
        # Mean over tokens: a reward of 0 would be counted among them.
        learner = tiny.learner(aggregation="token_mean")
        learner.update(1, of)
        return tiny.gradients(learner.policy.model)

    assert tiny.largest_gap(gradient(made), gradient([made[0], made[2]])) < 1e-12


@pytest.mark.parametrize("objective", [Divergence(), SampledTokens(), SINGLE_STEP], ids=repr)
def test_a_completion_that_nobody_can_read_is_missing(objective: Objective) -> None:
    read, unread = tiny.rollout("12"), tiny.rollout("", name="p0/1", ended=False)
    made = sampled([read, unread], objective)
    assert [s.unscored for s in made] == [None, Missing.FAILED]
    assert made[1].notes == ("not scored: the completion has no tokens that the teacher could read",)
    assert made[1].kl_evidence is None


def test_too_many_missing_stop_the_run_and_say_why() -> None:
    rollouts, _ = three()
    lost = {
        rollouts[0].token_ids: Scored(missing=Missing.FAILED, detail="HTTP 500"),
        rollouts[1].token_ids: Scored(missing=Missing.TIMEOUT, detail="60 s"),
        rollouts[2].token_ids: Scored(missing=Missing.TIMEOUT, detail="61 s"),
    }
    with pytest.raises(TeacherResponseError) as caught:
        sampled(rollouts, SampledTokens(), teacher=Scripted(failures=lost), student=forbidden)
    assert str(caught.value) == (
        "step 5: 3 of 3 rollouts could not be scored by scripted:q (2 timeout, 1 failed), more than "
        "teacher.max_missing_fraction 0.5; the first says: HTTP 500"
    )
    allowed = sampled(
        rollouts, SampledTokens(), teacher=Scripted(failures=lost), student=forbidden, max_missing_fraction=1.0
    )
    assert [s.unscored for s in allowed] == [Missing.FAILED, Missing.TIMEOUT, Missing.TIMEOUT]


@pytest.mark.parametrize(("fraction", "stops"), [(0.34, False), (1 / 3, False), (0.33, True), (0.0, True)])
def test_the_missing_share_is_of_all_rollouts(fraction: float, stops: bool) -> None:
    rollouts, teacher = three()
    if stops:
        with pytest.raises(TeacherResponseError, match=r"1 of 3 rollouts .* \(1 timeout\)"):
            sampled(rollouts, SampledTokens(), teacher=teacher, max_missing_fraction=fraction)
    else:
        assert sampled(rollouts, SampledTokens(), teacher=teacher, max_missing_fraction=fraction)


def test_a_reader_can_fail_without_a_teacher() -> None:
    empty = [tiny.rollout("", name=f"p0/{i}", ended=False) for i in range(2)]
    with pytest.raises(TeacherResponseError, match=r"2 of 2 rollouts could not be scored by the teacher \(2 failed\)"):
        signals(build(Divergence()), *empty)


# What is asked, and what the learner is told


def test_a_live_divergence_asks_nobody() -> None:
    rollouts = [tiny.rollout("1"), tiny.rollout("12", name="p0/1", author=Author.DATASET)]
    teacher = Scripted()
    made = signals(build(Divergence(), weight=0.5, teacher=teacher, student=forbidden), *rollouts)
    assert teacher.asked == []
    assert [s.kl_weights for s in made] == [(0.5,) * 2, (0.5,) * 3]
    assert [s.rollout for s in made] == rollouts
    assert all(s.kl_evidence is None and s.kl_teacher is None for s in made)
    assert all(s.advantages is None and s.pg_weights is None and s.anchor_weights is None for s in made)


def candidates(rollouts: Sequence[Rollout], k: int) -> list[tuple[Any, Any]]:
    return [(np.arange(r.num_tokens * k).reshape(-1, k), np.zeros((r.num_tokens, k))) for r in rollouts]


@pytest.mark.parametrize(
    ("wanted", "top_k", "requested"),
    [(Wanted(), 0, None), (Wanted(top_k=5), 5, None), (Wanted(candidates=2), 0, [[0, 1], [2, 3], [4, 5]])],
)
def test_a_teacher_without_weights_here_is_asked_for_what_the_loss_reads(
    wanted: Wanted, top_k: int, requested: list[list[int]] | None
) -> None:
    mine, theirs = tiny.rollout("12"), tiny.rollout("45", name="p0/1", author=Author.TEACHER)
    teacher = Scripted()
    is_list = requested is not None
    made = signals(
        build(Divergence(), teacher=teacher, wanted=wanted, candidates=candidates if is_list else forbidden),
        mine,
        theirs,
    )
    ((readings, asked_top_k),) = teacher.asked
    # A divergence teaches on anybody's text.
    assert [r.token_ids for r in readings] == [mine.token_ids, theirs.token_ids]
    assert [r.prompt_ids for r in readings] == [mine.prompt.token_ids] * 2
    assert asked_top_k == top_k
    for reading, signal in zip(readings, made, strict=True):
        assert (None if reading.requested_TK is None else reading.requested_TK.tolist()) == requested
        record = signal.kl_evidence
        assert isinstance(record, TokenScores)
        assert record.logprobs_T.tolist() == list(LOG_Q)
        width = None if record.ids_TK is None else record.ids_TK.shape[1]
        assert width == (top_k or (2 if is_list else None))
        assert signal.kl_weights == (1.0,) * 3


def test_a_wanted_record_that_is_missing_has_no_weight() -> None:
    rollouts, teacher = three(failed=Missing.REFUSED)
    made = signals(build(Divergence(), teacher=teacher, wanted=Wanted(top_k=3), weight=2.0), *rollouts)
    assert [s.unscored for s in made] == [None, Missing.REFUSED, None]
    assert [s.kl_weights for s in made] == [(2.0,) * 3, (0.0,) * 2, (2.0,) * 3]
    assert made[1].kl_evidence is None


@pytest.mark.parametrize("wanted", [None, Wanted(top_k=4)])
def test_both_sides_of_minillm_ask_once(wanted: Wanted | None) -> None:
    teacher, student = Scripted(), Measured()
    rollouts = [tiny.rollout("12"), tiny.rollout("45", name="p0/1")]
    made = signals(build(SINGLE_STEP, teacher=teacher, student=student, wanted=wanted), *rollouts)
    ((readings, top_k),) = teacher.asked
    assert (len(readings), top_k) == (2, 4 if wanted else 0)
    assert student.of == ["p0/0", "p0/1"]
    for signal in made:
        # 2 + 3, 3, and nothing after the end.
        assert signal.advantages == (5.0, 3.0, 0.0)
        assert signal.kl_weights == (1.0,) * 3
        assert isinstance(signal.kl_evidence, TokenScores) == (wanted is not None)


def test_a_teacher_with_its_own_chat_format_is_told_to_the_learner() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q:{{ m.content }};{% endfor %}"
    reader = SameVocabulary("teacher", tokenizer)
    rollout = tiny.rollout("12", of=tiny.prompt(text="1+2?"))
    teacher = Scripted()
    (live,) = signals(build(SINGLE_STEP, reader=reader, teacher=teacher, student=Measured()), rollout)
    (asked,) = teacher.asked[0][0]
    assert asked.prompt_ids == tuple(tiny.encode("Q:1+2?;"))
    assert asked.token_ids == rollout.token_ids
    # The learner's teacher reads what the scoring one read.
    assert isinstance(live.kl_evidence, Reading)
    assert (live.kl_evidence.prompt_ids, live.kl_evidence.token_ids) == (asked.prompt_ids, asked.token_ids)


# Another vocabulary

ANSWER = "12+3=15"
"""The teacher has the pairs 12 and 15: student 1 2 + 3 = 1 5 <eos>, teacher 12 + 3 = 15 <eos>."""
P = (-1.0, -0.5, -0.25, -2.0, -0.125, -1.5, -0.75, -0.0625)
Q = (-0.5, -1.0, -1.0, -0.5, -0.25, -1.0625)
"""Differences: (12) -.5 + 1.5 = 1; (+) -1 + .25 = -.75; (3) -1 + 2 = 1; (=) -.5 + .125 = -.375;
(15) -.25 + 2.25 = 2; (end) -1.0625 + .0625 = -1."""


def foreign_reader() -> ForeignVocabulary:
    return ForeignVocabulary(characters(), pairs())


def foreign(objective: Objective, *rollouts: Rollout, **settings: Any) -> list[TokenSignal]:
    settings = {"reader": foreign_reader(), "teacher": Scripted(Q), "student": Measured(P), **settings}
    return signals(build(objective, **settings), *rollouts)


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        ("share", (0.5, 0.5, -0.75, 1.0, -0.375, 1.0, 1.0, -1.0)),
        ("whole", (1.0, 1.0, -0.75, 1.0, -0.375, 2.0, 2.0, -1.0)),
    ],
)
def test_advantages_of_groups_by_hand(spread: Spread, expected: tuple[float, ...]) -> None:
    rollout = tiny.rollout(ANSWER)
    teacher = Scripted(Q)
    (signal,) = foreign(SampledTokens(), rollout, spread=spread, teacher=teacher)
    (reading,) = teacher.asked[0][0]
    assert pairs().convert_ids_to_tokens(list(reading.token_ids)) == ["12", "+", "3", "=", "15", "<eos>"]
    assert signal.advantages == expected
    assert signal.pg_weights == (1.0,) * 8
    assert (signal.kl_weights, signal.kl_evidence) == (None, None)
    alignment = foreign_reader().read(rollout).alignment
    assert alignment is not None
    assert signal.advantages == group_logprobs(alignment, P, Q, spread=spread).advantages
    # Its own and all later ones.
    (summed,) = foreign(SampledTokens(discount=1.0), rollout, spread=spread)
    assert (summed.advantages or ())[0] == math.fsum(expected)


@pytest.mark.parametrize(
    ("spread", "expected"), [("share", (0.2, 0.2, 0.4, 0.4, 0.4, 0.2, 0.2, 0.4)), ("whole", (0.4,) * 8)]
)
def test_weights_of_a_group_add_up(spread: Spread, expected: tuple[float, ...]) -> None:
    rollout = tiny.rollout(ANSWER)
    (signal,) = foreign(Divergence(), rollout, spread=spread, weight=0.4, teacher=None, student=forbidden, name="big")
    assert signal.kl_weights == expected
    assert signal.kl_teacher == "big"
    read = signal.kl_evidence
    assert isinstance(read, Read) and read.reading is not None and read.alignment is not None
    assert read.num_tokens == 6
    for group in read.alignment.groups:
        size = group.student_end - group.student_start
        total = math.fsum(signal.kl_weights[group.student_start : group.student_end])
        assert total == pytest.approx(0.4 if spread == "share" else 0.4 * size)


class Cut:
    """Reads four tokens of a student in three of its own: 2 to 1, 1 to 1, and 1 to 1 that do not end alike."""

    def read(self, rollout: Rollout) -> Read:
        student, teacher = segments((1, 3, 4, 6)), segments((3, 4, 7))
        alignment = Alignment(student=student, teacher=teacher, groups=align_ends(student.ends, teacher.ends, limit=5))
        assert [g.is_exact for g in alignment.groups] == [True, True, False]
        return Read(reading=Reading(prompt_ids=(1,), token_ids=(7, 8, 9)), alignment=alignment)


def test_leftovers_have_no_weight_and_no_advantage() -> None:
    settings = {"reader": Cut(), "teacher": Scripted((-0.5, -1.0, -9.0)), "student": Measured(P[:4])}
    (signal,) = foreign(SampledTokens(discount=1.0), tiny.rollout("123"), **settings)
    # -.5 + 1.5 = 1 in two shares, -1 + .25 = -.75, and the rest says nothing: sums .5 + .5 - .75, .5 - .75, -.75, 0.
    assert signal.advantages == (0.25, -0.25, -0.75, 0.0)
    assert signal.pg_weights == (1.0, 1.0, 1.0, 0.0)
    (live,) = foreign(Divergence(), tiny.rollout("123"), spread="whole", **settings)
    assert live.kl_weights == (1.0, 1.0, 1.0, 0.0)


def test_a_special_token_inside_has_no_weight_and_a_cut_answer_no_end() -> None:
    # The teacher never sees <pad>.
    ids = (*tiny.encode("12"), tiny.PAD, tiny.EOS)
    odd = tiny.rollout("12", token_ids=ids, char_starts=(0, 1, 2, 2))
    teacher = Scripted((-0.5, -1.0))
    (signal,) = foreign(MiniLLM(length_normalize=False), odd, teacher=teacher, student=Measured(P[:4]))
    assert signal.kl_weights == (0.5, 0.5, 0.0, 1.0)
    assert signal.pg_weights == (1.0, 1.0, 0.0, 1.0)
    # .5 + (-1 + 2) after the first token, then 1, 1, and nothing after the end.
    assert signal.advantages == (1.5, 1.0, 1.0, 0.0)
    cut = tiny.rollout("12", ended=False)
    (short,) = foreign(SampledTokens(), cut, teacher=teacher, student=Measured(P[:2]))
    assert teacher.asked[-1][0][0].num_tokens == 1
    assert short.advantages == (0.5, 0.5)


def test_masked_tokens_say_nothing_and_pass_nothing_on() -> None:
    rollout = tiny.rollout("12")
    masked = frozenset(tiny.encode("2"))
    (signal,) = sampled([rollout], SampledTokens(discount=1.0), masked_ids=masked, weight=2.0)
    # Rewards 1, -, 3: the token in between is skipped, and what follows it is not lost.
    assert signal.advantages == (8.0, 6.0, 6.0)
    assert signal.pg_weights == (1.0, 0.0, 1.0)
    (live,) = signals(build(Divergence(), masked_ids=masked, weight=0.5), rollout)
    assert live.kl_weights == (0.5, 0.0, 0.5)
    # Masked inside a group: the rest of the group keeps its share.
    (grouped,) = foreign(Divergence(), tiny.rollout(ANSWER), masked_ids=masked)
    assert grouped.kl_weights == (0.5, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0)
    (advantages,) = foreign(SampledTokens(), tiny.rollout(ANSWER), masked_ids=masked)
    assert (advantages.pg_weights or ())[:3] == (1.0, 0.0, 1.0)
    assert (advantages.advantages or ())[:3] == (0.5, 0.0, -0.75)


def test_text_that_the_other_tokenizer_cannot_align_is_missing() -> None:
    # Whole words only, which the teacher has none of.
    wordy = pairs()
    wordy.backend_tokenizer.pre_tokenizer = None
    reader = ForeignVocabulary(characters(), wordy)
    (signal,) = foreign(SINGLE_STEP, tiny.rollout(ANSWER), reader=reader, max_missing_fraction=1.0)
    assert signal.unscored is Missing.FAILED
    assert signal.kl_weights == signal.pg_weights == (0.0,) * 8
    assert "cannot be aligned" in signal.notes[0]


# With a verifier


def test_a_verifier_beside_it_keeps_what_belongs_to_the_divergence() -> None:
    rollouts, teacher = three()
    verdicts = (True, True, False)
    rollouts = [
        tiny.rollout(r.text, name=r.id, is_correct=verdict) for r, verdict in zip(rollouts, verdicts, strict=True)
    ]
    part = build(SINGLE_STEP, teacher=teacher, student=Measured(), wanted=Wanted(top_k=2), name="big")
    both = SummedSupervision(((1.0, part), (0.5, VerifiedSupervision(normalize_std=False))))
    made = signals(both, *rollouts)
    # Mean 2/3: half of 1/3, 1/3 and -2/3 on every token, also where the teacher says nothing.
    sixth = 1 / 6
    assert made[0].advantages == pytest.approx((5 + sixth, 3 + sixth, sixth))
    assert made[1].advantages == pytest.approx((sixth, sixth))
    assert made[2].advantages == pytest.approx((5 - 2 * sixth, 3 - 2 * sixth, -2 * sixth))
    assert [s.pg_weights for s in made] == [(1.0,) * 3, (1.0,) * 2, (1.0,) * 3]
    assert [s.kl_weights for s in made] == [(1.0,) * 3, (0.0,) * 2, (1.0,) * 3]
    assert [s.unscored for s in made] == [None, Missing.TIMEOUT, None]
    assert made[1].notes == ("not scored: the server took 60 s",)
    assert {s.kl_teacher for s in made} == {"big"}
    assert [type(s.kl_evidence) for s in made] == [TokenScores, type(None), TokenScores]
    reverse = SummedSupervision(((0.5, VerifiedSupervision(normalize_std=False)), (1.0, part)))
    for ours, theirs in zip(signals(reverse, *rollouts), made, strict=True):
        assert ours.advantages == pytest.approx(theirs.advantages)
        assert (ours.kl_teacher, ours.unscored, ours.notes) == (theirs.kl_teacher, theirs.unscored, theirs.notes)
        assert type(ours.kl_evidence) is type(theirs.kl_evidence)
