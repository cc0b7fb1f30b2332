"""Supervision without a teacher's audits: verifier, imitation, and sums of several."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

import tiny
from omniopd.errors import ConfigError
from omniopd.logits.reading import SameVocabulary
from omniopd.supervision.combined import SummedSupervision
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


def test_teacher_and_verifier_add_up() -> None:
    right, wrong = group("a", True, False)
    both = SummedSupervision(
        (
            (1.0, _Fixed((1.0, 2.0, 3.0))),
            (0.5, VerifiedSupervision()),
        )
    )
    signals = asyncio.run(both.signals([right, wrong], CTX))
    # Mean 1/2, standard deviation 1/2: +1 and -1, half of each.
    assert [s.advantages for s in signals] == [(1.5, 2.5), (0.5, 1.5, 2.5)]
    assert [s.pg_weights for s in signals] == [(1.0,) * 2, (1.0,) * 3]
    # Without spread the verifier says nothing and the teacher goes on.
    alike = asyncio.run(both.signals(group("b", True, True), CTX))
    assert [s.advantages for s in alike] == [(1.0, 2.0), (1.0, 2.0, 3.0)]


def test_a_divergence_stands_beside_the_verifier() -> None:
    rollouts = group("a", True, True, False)
    divergence = LogprobSupervision(reader=SameVocabulary("student"), weight=0.5)
    both = SummedSupervision(((1.0, divergence), (2.0, VerifiedSupervision(normalize_std=False))))
    signals = asyncio.run(both.signals(rollouts, CTX))
    assert [s.kl_weights for s in signals] == [(0.5,) * r.num_tokens for r in rollouts]
    # 2 (1 - 2/3) and 2 (0 - 2/3)
    assert [(s.advantages or ())[0] for s in signals] == pytest.approx([2 / 3, 2 / 3, -4 / 3])
    twice = SummedSupervision(((1.0, divergence), (1.0, divergence)))
    with pytest.raises(ConfigError, match="two supervisions of one run use kl_weights"):
        asyncio.run(twice.signals(rollouts, CTX))
    alone = asyncio.run(SummedSupervision(((1.0, divergence),)).signals(rollouts, CTX))
    assert [s.advantages for s in alone] == [None] * 3


class _Fixed:
    """The same advantages for every rollout."""

    def __init__(self, advantages: tuple[float, ...]) -> None:
        self._advantages = advantages

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        return [
            TokenSignal(rollout=r, advantages=self._advantages[: r.num_tokens], pg_weights=(1.0,) * r.num_tokens)
            for r in rollouts
        ]


def test_the_verifier_rewards_only_what_the_student_drew() -> None:
    right, wrong = group("a", True, False)
    theirs = tiny.rollout("12", name="a/7", of=right.prompt, author=Author.TEACHER, is_correct=True)
    given = tiny.rollout("12", name="a/8", of=right.prompt, author=Author.DATASET, is_correct=None)
    signals = verified([theirs, right, wrong, given])
    # The group is the two of the student.
    assert [(s.advantages or ())[0] for s in signals] == [0.0, 1.0, -1.0, 0.0]
    assert [set(s.pg_weights or ()) for s in signals] == [{0.0}, {1.0}, {1.0}, {0.0}]


def test_imitation_reads_only_what_the_teacher_wrote() -> None:
    mine = tiny.rollout("12")
    theirs = tiny.rollout("12", name="p0/1", author=Author.TEACHER)
    signals = asyncio.run(ImitationSupervision().signals([mine, theirs], CTX))
    assert [s.ce_weights for s in signals] == [(0.0,) * 3, (1.0,) * 3]
