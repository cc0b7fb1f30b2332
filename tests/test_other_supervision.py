"""Supervision without a text teacher's audits: verifier, logits, imitation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

import tiny
from omniopd.errors import ConfigError, DataError
from omniopd.supervision.combined import SummedSupervision
from omniopd.supervision.imitation import ImitationSupervision
from omniopd.supervision.logprob import LogprobSupervision, MiniLLM, Objective, SampledTokens, discounted_returns
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


LOG_P = (-1.0, -0.5, -2.0)
LOG_Q = (0.0, 1.5, 1.0)
"""Chosen for rewards log Q - log P = 1, 2, 3; no real teacher has such logprobs."""


def sampled(rollouts: Sequence[Rollout], objective: Objective, *, weight: float = 1.0) -> list[TokenSignal]:
    supervision = LogprobSupervision(
        objective=objective,
        weight=weight,
        student=lambda rs: [(LOG_P[: r.num_tokens], (0.0,) * r.num_tokens) for r in rs],
        teacher=lambda rs: [LOG_Q[: r.num_tokens] for r in rs],
    )
    return asyncio.run(supervision.signals(rollouts, CTX))


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


def test_text_of_others_has_no_advantages_and_is_not_measured() -> None:
    mine = tiny.rollout("12")
    theirs = tiny.rollout("1212", name="p0/1", author=Author.TEACHER)
    given = tiny.rollout("2", name="p0/2", author=Author.DATASET)
    signals = sampled([theirs, mine, given], SampledTokens())
    assert [s.pg_weights for s in signals] == [(0.0,) * 5, (1.0,) * 3, (0.0,) * 2]
    assert [s.rollout for s in signals] == [theirs, mine, given]
    assert sampled([theirs], SampledTokens())[0].advantages == (0.0,) * 5


def test_a_measure_of_another_length_is_refused() -> None:
    supervision = LogprobSupervision(
        objective=SampledTokens(),
        student=lambda rs: [(LOG_P, LOG_P) for _ in rs],
        teacher=lambda rs: [LOG_Q[:2] for _ in rs],
    )
    with pytest.raises(DataError, match="p0/0 has 3 tokens, but 3 logprobs of the student and 2 of the teacher"):
        asyncio.run(supervision.signals([tiny.rollout("12")], CTX))


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
    both = SummedSupervision(((1.0, LogprobSupervision(weight=0.5)), (2.0, VerifiedSupervision(normalize_std=False))))
    signals = asyncio.run(both.signals(rollouts, CTX))
    assert [s.kl_weights for s in signals] == [(0.5,) * r.num_tokens for r in rollouts]
    # 2 (1 - 2/3) and 2 (0 - 2/3)
    assert [(s.advantages or ())[0] for s in signals] == pytest.approx([2 / 3, 2 / 3, -4 / 3])
    twice = SummedSupervision(((1.0, LogprobSupervision()), (1.0, LogprobSupervision())))
    with pytest.raises(ConfigError, match="two supervisions of one run use kl_weights"):
        asyncio.run(twice.signals(rollouts, CTX))
    alone = asyncio.run(SummedSupervision(((1.0, LogprobSupervision()),)).signals(rollouts, CTX))
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
