"""Verifiable-reward supervision: group-relative advantages from right and wrong answers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from omniopd.errors import ConfigError
from omniopd.types import Author, Rollout, StepContext, TokenSignal

MIN_STD = 1e-6


@dataclass(frozen=True)
class VerifiedSupervision:
    """GRPO: reward 1 for a right answer, advantage = (reward - group mean) / group standard deviation.

    Source: arXiv 2402.03300. Differs: one gradient step on fresh samples, so no ratio and no clipping. A group without
    spread has no signal, and what the student did not draw has none either.
    """

    normalize_std: bool = True
    """False leaves out the division, which favors neither easy nor hard prompts (arXiv 2503.20783)."""

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Raise ConfigError when a rollout has no verdict."""
        groups: dict[str, list[float]] = defaultdict(list)
        for rollout in rollouts:
            if rollout.author is not Author.STUDENT:
                continue
            if rollout.is_correct is None:
                raise ConfigError(
                    f"method.supervision.type verifier needs an answer for every prompt; prompt {rollout.prompt.id} "
                    "has none or data.verifier is none"
                )
            groups[rollout.prompt.id].append(float(rollout.is_correct))
        signals = []
        for rollout in rollouts:
            if rollout.author is not Author.STUDENT:
                zeros = (0.0,) * rollout.num_tokens
                signals.append(TokenSignal(rollout=rollout, advantages=zeros, pg_weights=zeros))
                continue
            rewards = groups[rollout.prompt.id]
            spread = statistics.pstdev(rewards) if self.normalize_std else 1.0
            advantage = float(bool(rollout.is_correct)) - statistics.fmean(rewards)
            advantage = advantage / spread if spread > MIN_STD else 0.0
            weight = 1.0 if advantage != 0.0 else 0.0
            signals.append(
                TokenSignal(
                    rollout=rollout,
                    advantages=(advantage,) * rollout.num_tokens,
                    pg_weights=(weight,) * rollout.num_tokens,
                )
            )
        return signals
