"""White-box supervision: an open-weight teacher's distribution at every student token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniopd.types import Rollout, StepContext, TokenSignal


@dataclass(frozen=True)
class LogprobSupervision:
    """Ask the learner for a divergence to the teacher at every token of the student's rollouts.

    Which divergence is the learner's loss of the `kl` stream; full-vocabulary reverse KL by default (arXiv 2306.13649).
    """

    weight: float = 1.0

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        return [TokenSignal(rollout=r, kl_weights=(self.weight,) * r.num_tokens) for r in rollouts]
