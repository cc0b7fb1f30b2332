"""White-box supervision: an open-weight teacher's distribution at every token, or its logprob of what was written.

Rewards and advantages are in nats, higher = do it more. P is the student that drew the rollout, Q the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from omniopd.errors import ConfigError, DataError
from omniopd.supervision.base import StudentMeasure, TeacherMeasure
from omniopd.types import Author, Rollout, StepContext, TokenSignal


class Objective(Protocol):
    """What the teacher's logprobs are used for. A part of `method.supervision.objective`."""

    @property
    def uses_divergence(self) -> bool:
        """Whether every token also gets the learner's loss of the `kl` stream."""
        ...

    @property
    def uses_samples(self) -> bool:
        """Whether the student's own samples get advantages; then nobody else's text teaches anything."""
        ...

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        """Turn the rewards log Q(y_t) - log P(y_t) [T] of a rollout into advantages [T]."""
        ...


@dataclass(frozen=True)
class Divergence:
    """The learner's `kl` loss at every token, over the whole vocabulary. Source: arXiv 2306.13649."""

    uses_divergence: ClassVar[bool] = True
    uses_samples: ClassVar[bool] = False

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        raise AssertionError("a divergence has no advantages")


@dataclass(frozen=True)
class SampledTokens:
    """advantage_t = sum over s >= t of discount ** (s - t) (log Q(y_s) - log P(y_s)), through the policy gradient.

    Minus the estimator k1 of the reverse KL. At discount 0 its expected gradient is that of the full-vocabulary reverse
    KL at the visited positions, at discount 1 that of the reverse KL of whole sequences, with more variance.
    Source: Thinking Machines, "On-policy distillation" (2025), with discount 0 as there. Differs: one gradient step on
    fresh samples, so no ratio.
    """

    uses_divergence: ClassVar[bool] = False
    uses_samples: ClassVar[bool] = True
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Only k1 = log P - log Q works as an advantage."""
    discount: float = 0.0

    def __post_init__(self) -> None:
        _check_discount(self.discount)
        if self.estimator == "k2":
            raise ConfigError(
                "estimator is k2: as an advantage its square punishes tokens that the teacher likes more as much as "
                "those it likes less, and the gradient is not that of a KL; use estimator: k1, or back-propagate k2 "
                "with objective: divergence and learner.losses.kl={type: sampled_token, estimator: k2}"
            )
        if self.estimator == "k3":
            raise ConfigError(
                "estimator is k3: as an advantage its expected gradient is that of the reverse KL minus that of the "
                "forward KL, which almost cancel near the teacher; use estimator: k1"
            )

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        return discounted_returns(rewards, self.discount)


@dataclass(frozen=True)
class MiniLLM:
    """Reverse KL of whole sequences by policy gradient, its single-step part computed exactly. arXiv 2306.08543.

    advantage_t = sum over s > t of discount ** (s - t - 1) (log Q(y_s) - log P(y_s)): what the token leads to. What the
    token itself costs is the full-vocabulary reverse KL at t, which needs no sampling (`single_step`); without it the
    sum begins at s = t. `length_normalize` divides by the sum of the discounts, at discount 1 the number of tokens that
    are left. Differs: no samples of a teacher-student mixture, no ratio clipping, no language-model loss.
    """

    uses_samples: ClassVar[bool] = True
    discount: float = 1.0
    length_normalize: bool = True
    single_step: bool = True

    def __post_init__(self) -> None:
        _check_discount(self.discount)

    @property
    def uses_divergence(self) -> bool:
        return self.single_step

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        returns = discounted_returns(rewards, self.discount)
        if self.length_normalize:
            weights = discounted_returns([1.0] * len(rewards), self.discount)
            returns = [r / w for r, w in zip(returns, weights, strict=True)]
        return [*returns[1:], 0.0][: len(returns)] if self.single_step else returns


def discounted_returns(rewards: Sequence[float], discount: float) -> list[float]:
    """Return for each place the sum of its own and all later rewards, each later one discounted once more."""
    returns: list[float] = []
    total = 0.0
    for reward in reversed(rewards):
        total = reward + discount * total
        returns.append(total)
    return returns[::-1]


@dataclass(frozen=True, kw_only=True)
class LogprobSupervision:
    """Ask the learner for a divergence to the teacher at every token, or reinforce by the teacher's logprobs, or both.

    Which divergence is the learner's loss of the `kl` stream; full-vocabulary reverse KL by default. Advantages go to
    the student's own rollouts only: for text of others there is no P that drew it.
    """

    objective: Objective = Divergence()
    weight: float = 1.0
    """Factor of the divergence and of the advantages."""
    student: StudentMeasure | None = None
    teacher: TeacherMeasure | None = None
    """Both are needed by objectives that use samples."""

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Raise DataError when a measure returns another number of tokens than a rollout has."""
        advantages = self._advantages(rollouts) if self.objective.uses_samples else {}
        return [
            TokenSignal(
                rollout=r,
                advantages=advantages.get(r.id, (0.0,) * r.num_tokens) if self.objective.uses_samples else None,
                pg_weights=(1.0 if r.id in advantages else 0.0,) * r.num_tokens
                if self.objective.uses_samples
                else None,
                kl_weights=(self.weight,) * r.num_tokens if self.objective.uses_divergence else None,
            )
            for r in rollouts
        ]

    def _advantages(self, rollouts: Sequence[Rollout]) -> dict[str, tuple[float, ...]]:
        assert self.student is not None and self.teacher is not None
        own = [r for r in rollouts if r.author is Author.STUDENT and r.num_tokens > 0]
        if not own:
            return {}
        found = {}
        for r, (student, _), teacher in zip(own, self.student(own), self.teacher(own), strict=True):
            if not len(student) == len(teacher) == r.num_tokens:
                raise DataError(
                    f"rollout {r.id} has {r.num_tokens} tokens, but {len(student)} logprobs of the student and "
                    f"{len(teacher)} of the teacher"
                )
            rewards = [q - p for p, q in zip(student, teacher, strict=True)]
            found[r.id] = tuple(self.weight * a for a in self.objective.advantages(rewards))
        return found


def _check_discount(discount: float) -> None:
    if not 0.0 <= discount <= 1.0:
        raise ConfigError(f"discount must be in [0, 1], got {discount}")
