"""Off-policy supervision: imitate whole answers that the teacher wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniopd.types import Author, Rollout, StepContext, TokenSignal


@dataclass(frozen=True)
class ImitationSupervision:
    """Cross-entropy on teacher-written rollouts (`behavior: {type: teacher}`): SFT on teacher samples.

    Student-written rollouts get no weight: raising one's own samples teaches nothing.
    """

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        return [
            TokenSignal(rollout=r, ce_weights=(1.0 if r.author == Author.TEACHER else 0.0,) * r.num_tokens)
            for r in rollouts
        ]
