"""Supervision without a text teacher's audits: verifier, logits, imitation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

import tiny
from omniopd.errors import ConfigError
from omniopd.supervision.imitation import ImitationSupervision
from omniopd.supervision.logprob import LogprobSupervision
from omniopd.supervision.verified import VerifiedSupervision
from omniopd.types import Author, Rollout, StepContext, TokenSignal

CTX = StepContext(step=0, num_steps=1)


def group(name: str, *verdicts: bool | None) -> list[Rollout]:
    prompt = tiny.prompt(name)
    return [
        tiny.rollout("12" if i % 2 else "1", name=f"{name}/{i}", of=prompt, is_correct=verdict)
        for i, verdict in enumerate(verdicts)
    ]


def verified(rollouts: Sequence[Rollout], *, normalize_std: bool = True) -> list[TokenSignal]:
    return asyncio.run(VerifiedSupervision(normalize_std=normalize_std).signals(rollouts, CTX))


def test_group_relative_advantages_by_hand() -> None:
    signals = verified(group("a", True, False, False, False))
    # Mean 1/4, standard deviation sqrt(1/4 * 3/4) = .433013: (1 - 1/4)/.433013 and -(1/4)/.433013
    expected = [1.732051, -0.577350, -0.577350, -0.577350]
    assert [s.advantages[0] for s in signals if s.advantages] == pytest.approx(expected, abs=1e-6)
    for signal in signals:
        length = signal.rollout.num_tokens
        assert signal.advantages is not None and len(set(signal.advantages)) == 1
        assert signal.pg_weights == (1.0,) * length
        assert signal.anchor_weights is None


def test_without_the_standard_deviation() -> None:
    signals = verified(group("a", True, False, False, False), normalize_std=False)
    assert [s.advantages[0] for s in signals if s.advantages] == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("verdict", [True, False])
def test_a_group_without_spread_has_no_signal(verdict: bool, normalize_std: bool) -> None:
    for signal in verified(group("a", verdict, verdict, verdict), normalize_std=normalize_std):
        assert set(signal.advantages or ()) == {0.0}
        # Weight 0: the tokens are not counted either.
        assert set(signal.pg_weights or ()) == {0.0}


def test_groups_are_told_apart_by_prompt_even_when_mixed() -> None:
    a, b = group("a", True, False), group("b", False, False)
    signals = verified([a[0], b[0], a[1], b[1]])
    assert [s.rollout.id for s in signals] == ["a/0", "b/0", "a/1", "b/1"]
    # Mean 1/2 and standard deviation 1/2 in group a.
    assert [s.advantages[0] for s in signals if s.advantages] == [1.0, 0.0, -1.0, 0.0]


def test_a_rollout_without_a_verdict_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt a has none or data\.verifier is none"):
        verified(group("a", True, None))


def test_logprob_supervision_weighs_every_token() -> None:
    rollouts = group("a", None, None)
    signals = asyncio.run(LogprobSupervision(weight=0.5).signals(rollouts, CTX))
    assert [s.kl_weights for s in signals] == [(0.5,) * 2, (0.5,) * 3]
    assert [s.rollout for s in signals] == rollouts
    assert all(s.anchor_weights is None and s.pg_weights is None for s in signals)


def test_imitation_reads_only_what_the_teacher_wrote() -> None:
    mine = tiny.rollout("12")
    theirs = tiny.rollout("12", name="p0/1", author=Author.TEACHER)
    signals = asyncio.run(ImitationSupervision().signals([mine, theirs], CTX))
    assert [s.ce_weights for s in signals] == [(0.0,) * 3, (1.0,) * 3]
