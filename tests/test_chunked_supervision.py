"""Black-box supervision with a scripted teacher: what is asked, and what each token gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import tiny
from omniopd.chunking import EntropyChunker
from omniopd.errors import ConfigError, TeacherResponseError
from omniopd.scoring.chunk_score import ChunkScorer
from omniopd.signals.credit import CenteredTarget, SmoothedTarget, TeacherText
from omniopd.supervision.chunked import ChunkedSupervision, request_seed
from omniopd.teachers.base import ContinuationRequest
from omniopd.timing import StepTimer
from omniopd.types import Continuation, Missing, Rollout, StepContext, TokenSignal

CTX = StepContext(step=4, num_steps=10)
TIMEOUT = Continuation(text=None, missing=Missing.TIMEOUT, detail="no answer in 60 s")
REFUSED = Continuation(text=None, missing=Missing.REFUSED)

# Nine tokens; with C = 2 and M = 2 the chunks are [2, 4) and [5, 7).
ENTROPIES = (0.1, 0.2, 0.9, 0.3, 0.1, 0.8, 0.2, 0.1, 0.0)
ROLLOUT = tiny.rollout("1+2=3;#3")
AUDITED = {2, 3, 5, 6}


def measure(rollouts: Sequence[Rollout]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    return [((-0.5,) * r.num_tokens, ENTROPIES[: r.num_tokens]) for r in rollouts]


def text(of: str, finish_reason: str = "length") -> Continuation:
    return Continuation(text=of, finish_reason=finish_reason)


def supervise(
    write: Callable[[ContinuationRequest], Sequence[Continuation]],
    rollouts: Sequence[Rollout] = (ROLLOUT,),
    **settings: Any,
) -> tuple[list[TokenSignal], list[ContinuationRequest]]:
    made, teacher = supervision(write, **settings)
    return asyncio.run(made.signals(rollouts, CTX)), teacher.asked


def supervision(
    write: Callable[[ContinuationRequest], Sequence[Continuation]], **settings: Any
) -> tuple[ChunkedSupervision, tiny.ScriptedTeacher]:
    teacher = tiny.ScriptedTeacher(write)
    defaults: dict[str, Any] = {
        "chunker": EntropyChunker(chunk_tokens=2, max_chunks=2),
        "scorer": ChunkScorer(similarity="exact"),
        "credit": SmoothedTarget(),
        "vocabulary": tiny.Vocabulary(),
        "measure": measure,
        "timer": StepTimer(),
        "num_continuations": 2,
        "anchor_beta": 0.1,
    }
    return ChunkedSupervision(teacher=teacher, **(defaults | settings)), teacher


def agree(request: ContinuationRequest) -> list[Continuation]:
    """Continue with what the student wrote."""
    start = len(request.prefix)
    return [text(ROLLOUT.text[start : start + request.max_tokens])] * request.n


def test_one_request_for_each_chunk_with_its_exact_prefix() -> None:
    _, asked = supervise(agree, num_continuations=3, seed=7)
    assert [r.prefix for r in asked] == ["1+", "1+2=3"]
    assert [(r.n, r.max_tokens, r.messages) for r in asked] == [(3, 2, ROLLOUT.prompt.messages)] * 2
    assert [r.seed for r in asked] == [request_seed(7, "p0", "1+"), request_seed(7, "p0", "1+2=3")]


def test_continuation_tokens_override_the_chunk_length() -> None:
    _, asked = supervise(agree, continuation_tokens=9)
    assert {r.max_tokens for r in asked} == {9}


def test_the_same_prefix_is_the_same_question() -> None:
    twin = tiny.rollout("1+3=4;#4", name="p0/1")
    other = tiny.rollout("1+2=3;#3", name="p1/0", of=tiny.prompt("p1"))
    _, asked = supervise(agree, [ROLLOUT, twin, other])
    seeds = [r.seed for r in asked]
    # Both rollouts of p0 begin with "1+", and differ later; another prompt is another question.
    assert seeds[0] == seeds[2]
    assert len(set(seeds)) == 5


def test_request_seeds() -> None:
    assert request_seed(0, "p0", "1+") == request_seed(0, "p0", "1+")
    assert len({request_seed(s, p, x) for s in (0, 1) for p in ("p0", "p1") for x in ("", "1", "1+")}) == 12
    # Every provider takes 32 to 53 bits.
    assert all(0 <= request_seed(0, "p", str(i)) < 2**53 for i in range(100))


def test_tokens_of_a_chunk_get_its_target_and_all_others_the_anchor() -> None:
    [signal], _ = supervise(lambda r: agree(r) if r.prefix == "1+" else [text("zz"), text("zz")])
    b = 0.606531  # exp(-.5)
    # Both agree: (2 + b)/3; none agrees: b/3.
    assert signal.advantages == pytest.approx([0, 0, (2 + b) / 3, (2 + b) / 3, 0, b / 3, b / 3, 0, 0], abs=1e-6)
    assert signal.pg_weights == tuple(float(t in AUDITED) for t in range(9))
    assert signal.anchor_weights == tuple(0.0 if t in AUDITED else 0.1 for t in range(9))
    assert signal.soft_targets is None
    assert [a.weight for a in signal.audits] == [pytest.approx((2 + b) / 3, abs=1e-6), pytest.approx(b / 3, abs=1e-6)]
    assert signal.rollout.entropies == ENTROPIES
    assert [a.continuations.teacher_id for a in signal.audits] == ["scripted:tiny"] * 2
    assert signal.audits[0].continuations.usage.output_tokens == 4


def test_a_chunk_without_evidence_is_anchored_and_not_punished() -> None:
    [signal], _ = supervise(lambda r: agree(r) if r.prefix == "1+" else [TIMEOUT, REFUSED])
    assert signal.pg_weights == (0, 0, 1, 1, 0, 0, 0, 0, 0)
    assert signal.anchor_weights == (0.1, 0.1, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.1)
    unaudited = signal.audits[1]
    assert (unaudited.weight, unaudited.score.value) == (None, None)
    assert unaudited.score.missing in (Missing.TIMEOUT, Missing.REFUSED)


def test_no_evidence_at_all_leaves_the_anchor_alone() -> None:
    [signal], _ = supervise(lambda r: [TIMEOUT] * r.n, max_missing_fraction=1.0)
    assert (signal.advantages, signal.pg_weights, signal.soft_targets) == (None, None, None)
    assert signal.anchor_weights == (0.1,) * 9


def test_lost_continuations_do_not_count_as_disagreement() -> None:
    [signal], _ = supervise(lambda r: [*agree(r)[:1], TIMEOUT, TIMEOUT], num_continuations=3, max_missing_fraction=0.7)
    # k = 1 of n = 1: (1 + b)/2, not (1 + b)/4
    assert signal.advantages is not None
    assert signal.advantages[2] == pytest.approx((1 + 0.606531) / 2, abs=1e-6)


def test_too_many_missing_continuations_stop_the_run_with_the_reasons() -> None:
    def write(request: ContinuationRequest) -> list[Continuation]:
        return [TIMEOUT, TIMEOUT, REFUSED, text("2=")]

    with pytest.raises(TeacherResponseError) as caught:
        supervise(write, num_continuations=4)
    told = str(caught.value)
    assert "step 5: 6 of 8 continuations of scripted:tiny are unusable (4 timeout, 2 refused)" in told
    assert "more than teacher.max_missing_fraction 0.5; the first says: no answer in 60 s" in told
    assert "omniopd teachers check scripted:tiny" in told
    # Exactly the allowed share is fine.
    supervise(write, num_continuations=4, max_missing_fraction=0.75)


def test_the_first_step_without_a_chunk_names_both_lengths() -> None:
    with pytest.raises(
        ConfigError, match=r"chunk_tokens is 50, but the longest of the 1 rollouts has 9 tokens; set it to 3"
    ):
        supervise(agree, chunker=EntropyChunker(chunk_tokens=50))


def test_a_later_step_without_a_chunk_is_anchored() -> None:
    made, teacher = supervision(agree, chunker=EntropyChunker(chunk_tokens=5))
    asyncio.run(made.signals([ROLLOUT], CTX))
    asked = len(teacher.asked)
    [signal] = asyncio.run(made.signals([tiny.rollout("12")], CTX))
    assert len(teacher.asked) == asked > 0
    assert (signal.pg_weights, signal.anchor_weights, signal.audits) == (None, (0.1,) * 3, ())


def test_short_rollouts_beside_long_ones_are_anchored() -> None:
    short = tiny.rollout("1", name="p0/1", ended=False)
    signals, _ = supervise(agree, [short, ROLLOUT])
    assert [s.rollout.id for s in signals] == ["p0/1", "p0/0"]
    assert signals[0].anchor_weights == (0.1,)
    assert signals[1].pg_weights is not None


def test_soft_targets_are_anchored_only_where_there_is_none() -> None:
    # In the first chunk the only continuation leaves at the first token, so the second has no evidence.
    [signal], _ = supervise(
        lambda r: [text("9=")] if r.prefix == "1+" else [text(";#")], credit=TeacherText(), num_continuations=1
    )
    assert [t.position for t in signal.soft_targets or ()] == [2, 5, 6]
    assert signal.anchor_weights == (0.1, 0.1, 0, 0.1, 0.1, 0, 0, 0.1, 0.1)
    assert (signal.advantages, signal.pg_weights) == (None, None)


def test_without_beta_there_is_no_anchor_stream() -> None:
    [signal], _ = supervise(agree, anchor_beta=0.0)
    assert signal.anchor_weights is None


def test_a_zero_weight_is_still_a_signal() -> None:
    """A centered weight can be exactly 0: the chunk is audited and must not be anchored."""
    signals, _ = supervise(agree, [ROLLOUT, tiny.rollout(name="p0/1")], credit=CenteredTarget())
    for signal in signals:
        assert signal.advantages == (0.0,) * 9
        assert signal.pg_weights == tuple(float(t in AUDITED) for t in range(9))
        assert signal.anchor_weights == tuple(0.0 if t in AUDITED else 0.1 for t in range(9))


def test_every_token_has_exactly_one_kind_of_signal() -> None:
    def write(request: ContinuationRequest) -> list[Continuation]:
        return [text("2-"), TIMEOUT] if request.prefix == "1+" else [TIMEOUT, TIMEOUT]

    for credit in (SmoothedTarget(), TeacherText(), CenteredTarget()):
        signals, _ = supervise(write, [ROLLOUT, tiny.rollout(name="p0/1")], credit=credit, max_missing_fraction=1.0)
        for signal in signals:
            soft = {t.position for t in signal.soft_targets or ()}
            for t in range(9):
                kinds = [
                    bool(signal.pg_weights and signal.pg_weights[t]),
                    t in soft,
                    bool(signal.anchor_weights and signal.anchor_weights[t]),
                ]
                assert sum(kinds) == 1


def test_phases_are_timed() -> None:
    timer = StepTimer()
    supervise(agree, timer=timer)
    assert set(timer.take()) == {"measure", "teacher", "score", "step"}


def test_no_rollouts_no_request() -> None:
    made, teacher = supervision(agree)
    asyncio.run(made.signals([ROLLOUT], CTX))
    before = len(teacher.asked)
    assert asyncio.run(made.signals([], CTX)) == []
    assert len(teacher.asked) == before
