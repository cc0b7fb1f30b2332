"""What adjusts signals on their way to the learner."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import tiny
from omniopd.errors import ConfigError, ScoringError
from omniopd.signals.filters import DropTruncated, DropUnaudited
from omniopd.signals.weights import WeightByEntropy, WeightByPosition
from omniopd.types import (
    Audit,
    Chunk,
    ChunkScore,
    FinishReason,
    Missing,
    SoftTarget,
    StepContext,
    TeacherContinuations,
    TokenSignal,
)

CTX = StepContext(step=0, num_steps=1)


def audit(value: float | None) -> Audit:
    chunk = Chunk(rollout_id="p0/0", index=0, start=0, end=1, prefix="", text="1")
    return Audit(
        chunk=chunk,
        continuations=TeacherContinuations(chunk=chunk, continuations=(), teacher_id="t"),
        score=ChunkScore(
            chunk=chunk,
            value=value,
            similarities=() if value is None else (value,),
            scorer_id="edit",
            missing=Missing.TIMEOUT if value is None else None,
        ),
    )


def signal(*, ended: bool = True, audits: tuple[Audit, ...] = (), entropies: Any = (1.0, 3.0, 2.0)) -> TokenSignal:
    return TokenSignal(
        rollout=tiny.rollout("12" if ended else "123", ended=ended, entropies=entropies),
        advantages=(0.5, -0.5, 0.0),
        pg_weights=(1.0, 1.0, 0.0),
        anchor_weights=(0.0, 0.0, 0.1),
        ce_weights=(1.0, 2.0, 0.0),
        kl_weights=(1.0, 1.0, 1.0),
        soft_targets=(SoftTarget(position=1, token_ids=(4, 5), probs=(0.5, 0.3), self_weight=0.2),),
        audits=audits,
        notes=("earlier note",),
    )


def is_silent(found: TokenSignal) -> bool:
    streams = (found.pg_weights, found.anchor_weights, found.kl_weights, found.ce_weights)
    return all(set(s or ()) == {0.0} for s in streams) and found.soft_targets == ()


def test_truncated_rollouts_are_silenced_and_say_why() -> None:
    whole, cut = signal(), signal(ended=False)
    kept, dropped = DropTruncated()([whole, cut], CTX)
    assert kept is whole
    assert is_silent(dropped)
    assert dropped.notes == ("earlier note", "dropped: hit the length limit")
    # What was measured stays on record.
    assert (dropped.rollout, dropped.advantages, dropped.audits) == (cut.rollout, cut.advantages, cut.audits)
    assert dropped.rollout.finish_reason == FinishReason.LENGTH


def test_rollouts_without_a_usable_audit_are_silenced() -> None:
    signals = [signal(audits=(audit(None), audit(0.0))), signal(audits=(audit(None),)), signal()]
    found = DropUnaudited()(signals, CTX)
    # A similarity of 0 is evidence, None is none.
    assert [is_silent(s) for s in found] == [False, True, True]
    assert found[1].notes[-1] == "dropped: no usable audit"


def test_unused_streams_stay_unused() -> None:
    bare = TokenSignal(rollout=tiny.rollout("1", ended=False), anchor_weights=(0.1,))
    [dropped] = DropTruncated()([bare], CTX)
    assert (dropped.pg_weights, dropped.kl_weights, dropped.ce_weights, dropped.soft_targets) == (None,) * 4
    assert dropped.anchor_weights == (0.0,)


def test_weight_by_entropy_by_hand() -> None:
    [found] = WeightByEntropy()([signal()], CTX)
    # The mean entropy is 2, so the factors are .5, 1.5 and 1.
    assert found.pg_weights == (0.5, 1.5, 0.0)
    assert found.ce_weights == (0.5, 3.0, 0.0)
    assert found.kl_weights == (0.5, 1.5, 1.0)
    assert found.anchor_weights == (0.0, 0.0, 0.1)
    assert found.advantages == (0.5, -0.5, 0.0)


def test_weight_by_entropy_power() -> None:
    assert WeightByEntropy(power=2.0)([signal()], CTX)[0].kl_weights == (0.25, 2.25, 1.0)
    assert WeightByEntropy(power=0.0)([signal()], CTX) == [signal()]
    with pytest.raises(ConfigError, match="power must be 0 or more, got -1"):
        WeightByEntropy(power=-1)


def test_a_rollout_that_was_never_in_doubt_keeps_its_weights() -> None:
    certain = signal(entropies=(0.0, 0.0, 0.0))
    assert WeightByEntropy()([certain], CTX) == [certain]


def test_weight_by_entropy_needs_entropies() -> None:
    with pytest.raises(ScoringError, match="rollout p0/0 carries no entropies"):
        WeightByEntropy()([signal(entropies=None)], CTX)


def test_weight_by_position_halves() -> None:
    [found] = WeightByPosition(half_life=1.0)([signal()], CTX)
    assert found.kl_weights == (1.0, 0.5, 0.25)
    assert found.ce_weights == (1.0, 1.0, 0.0)
    assert found.anchor_weights == (0.0, 0.0, 0.1)
    # Four tokens to one half: 2 ** (-1/4)
    assert WeightByPosition(half_life=4.0)([signal()], CTX)[0].kl_weights == pytest.approx((1.0, 0.840896, 0.707107))
    with pytest.raises(ConfigError, match="half_life must be positive, got 0"):
        WeightByPosition(half_life=0)


@pytest.mark.parametrize(
    ("weighting", "factor"),
    [(WeightByEntropy(), 1.5), (WeightByPosition(half_life=1.0), 0.5)],
    ids=["entropy", "position"],
)
def test_soft_targets_are_weighted_through_the_students_own_share(weighting: Any, factor: float) -> None:
    [found] = weighting([signal()], CTX)
    [target] = found.soft_targets or ()
    assert target.probs == pytest.approx((0.5 * factor, 0.3 * factor))
    # The gradient P - target is scaled by the factor when all shares still add up to one.
    assert sum(target.probs) + target.self_weight == pytest.approx(1)


def test_weighted_soft_targets_scale_the_gradient_exactly() -> None:
    made = tiny.learner()
    rollout = tiny.rollout("12", entropies=(1.0, 3.0, 2.0))
    plain = TokenSignal(rollout=rollout, soft_targets=signal().soft_targets)
    [weighted] = WeightByEntropy()([plain], CTX)
    made.update(1, [plain])
    before = tiny.gradients(made.policy.model)
    again = tiny.learner()
    again.update(1, [weighted])
    after = tiny.gradients(again.policy.model)
    assert tiny.largest_gap(after, {name: 1.5 * gradient for name, gradient in before.items()}) < 1e-12


@pytest.mark.parametrize(
    "transform", [DropTruncated(), DropUnaudited(), WeightByEntropy(), WeightByPosition(half_life=2)]
)
def test_transforms_keep_number_and_order_and_signs(transform: Any) -> None:
    signals = [
        dataclasses.replace(signal(ended=bool(i % 2)), notes=(str(i),), audits=(audit(0.5 if i % 3 else None),))
        for i in range(6)
    ]
    found = transform(signals, CTX)
    assert [s.notes[0] for s in found] == [str(i) for i in range(6)]
    assert all(w >= 0 for s in found for w in (*(s.pg_weights or ()), *(s.kl_weights or ())))
    assert transform([], CTX) == []


def test_drop_unaudited_leaves_what_nobody_audits() -> None:
    rollout = tiny.rollout_of([4, 9], name="a/0")
    scored = TokenSignal(rollout=rollout, kl_weights=(1.0, 1.0), kl_teacher="open")
    verified = TokenSignal(rollout=rollout, advantages=(1.0, 1.0), pg_weights=(1.0, 1.0))
    anchored = TokenSignal(rollout=rollout, anchor_weights=(0.1, 0.1))
    *kept, dropped = DropUnaudited()([scored, verified, anchored], StepContext(step=0, num_steps=1))
    assert kept == [scored, verified]
    assert dropped.anchor_weights == (0.0, 0.0) and dropped.notes == ("dropped: no usable audit",)
