"""Several behaviors in one run, one of them drawn for each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from omniopd.behavior.base import Behavior
from omniopd.errors import ConfigError
from omniopd.types import Prompt, Rollout, StepContext


@dataclass(frozen=True)
class MixedBehavior:
    """Draw who writes the batch, by shares. Source: arXiv 2306.13649 (GKD), whose lambda is the student's share.

    The draw depends on the seed and the step alone, so a resumed run makes the same ones. Every rollout keeps its
    author.
    """

    parts: tuple[tuple[float, Behavior], ...]
    """(share, behavior); the shares add up to 1."""

    def __post_init__(self) -> None:
        total = sum(share for share, _ in self.parts)
        if abs(total - 1.0) > 1e-9 or any(share <= 0 for share, _ in self.parts):
            raise ConfigError(f"the shares must be positive and add up to 1, got {[s for s, _ in self.parts]}")

    async def rollouts(self, prompts: Sequence[Prompt], ctx: StepContext, *, group_size: int) -> list[Rollout]:
        return await self.pick(ctx).rollouts(prompts, ctx, group_size=group_size)

    def pick(self, ctx: StepContext) -> Behavior:
        """Return who writes at a step."""
        digest = hashlib.blake2b(f"author\0{ctx.seed}\0{ctx.step}".encode(), digest_size=6).digest()
        left = int.from_bytes(digest, "big") / 2**48
        for share, behavior in self.parts:
            left -= share
            if left < 0:
                return behavior
        return self.parts[-1][1]
