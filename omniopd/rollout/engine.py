"""What a rollout engine is: token ids in, token ids out, and weights that arrive under a version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from omniopd.types import Prompt, Rollout


class RolloutEngine(Protocol):
    """Draws completions from the student."""

    @property
    def policy_version(self) -> int:
        """The version of the weights that the next rollout is drawn with."""
        ...

    async def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, seeds: Sequence[int], tag: str
    ) -> list[Rollout]:
        """Draw `group_size` rollouts of each prompt, group by group, stamped with the policy version.

        `tag` goes into the rollout ids. Raises RolloutError.
        """
        ...

    async def push_weights(self, version: int) -> None:
        """Take over the learner's weights as `version`. Returns when the next rollout is sure to use them."""
        ...

    async def aclose(self) -> None:
        """Free what the engine holds. Safe to call twice."""
        ...
