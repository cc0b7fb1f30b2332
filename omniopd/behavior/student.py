"""The on-policy behavior: the student writes its own rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniopd.behavior.base import Verifier, group_seeds, judge
from omniopd.rollout.engine import RolloutEngine
from omniopd.timing import StepTimer
from omniopd.types import Prompt, Rollout, StepContext


@dataclass(frozen=True)
class StudentBehavior:
    """Let the engine draw every token."""

    engine: RolloutEngine
    timer: StepTimer
    verifier: Verifier | None = None

    async def rollouts(self, prompts: Sequence[Prompt], ctx: StepContext, *, group_size: int) -> list[Rollout]:
        seeds = group_seeds(ctx, prompts)
        with self.timer("generate"):
            drawn = await self.engine.generate(prompts, group_size=group_size, seeds=seeds, tag=f"{ctx.step + 1:06d}")
        with self.timer("verify"):
            return judge(drawn, self.verifier)
