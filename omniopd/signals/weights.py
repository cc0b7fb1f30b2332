"""Token weightings: how much each token counts within its stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omniopd.errors import ConfigError, ScoringError
from omniopd.types import SoftTarget, StepContext, TokenSignal


@dataclass(frozen=True)
class WeightByEntropy:
    """Weight supervised tokens by (entropy / mean entropy of the rollout) ** power. Neutral at power 0.

    Forks count more than tokens that were never in doubt. The anchor is not weighted: it holds everything.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if self.power < 0:
            raise ConfigError(f"power must be 0 or more, got {self.power}")

    def __call__(self, signals: Sequence[TokenSignal], ctx: StepContext) -> list[TokenSignal]:
        return [self._weigh(signal) for signal in signals]

    def _weigh(self, signal: TokenSignal) -> TokenSignal:
        entropies = signal.rollout.entropies
        if entropies is None:
            raise ScoringError(
                f"rollout {signal.rollout.id} carries no entropies, so weight_by_entropy cannot weigh it"
            )
        mean = sum(entropies) / max(1, len(entropies))
        factors = [1.0 if self.power == 0 or mean == 0 else (h / mean) ** self.power for h in entropies]
        return _weighted(signal, factors)


@dataclass(frozen=True)
class WeightByPosition:
    """Let supervision fade with length: weight `half_life` tokens into the completion is one half, then one quarter.

    A teacher's view of the student's text gets less reliable the further the text is from its own (arXiv 2605.30833
    reports the decay). The anchor is not weighted.
    """

    half_life: float

    def __post_init__(self) -> None:
        if self.half_life <= 0:
            raise ConfigError(f"half_life must be positive, got {self.half_life}")

    def __call__(self, signals: Sequence[TokenSignal], ctx: StepContext) -> list[TokenSignal]:
        return [
            _weighted(signal, [0.5 ** (t / self.half_life) for t in range(signal.rollout.num_tokens)])
            for signal in signals
        ]


def _weighted(signal: TokenSignal, factors: Sequence[float]) -> TokenSignal:
    """Multiply every supervised stream by one factor a token; the anchor stays."""
    changes: dict[str, Any] = {
        name: tuple(w * f for w, f in zip(getattr(signal, name), factors, strict=True))
        for name in ("pg_weights", "kl_weights", "ce_weights")
        if getattr(signal, name) is not None
    }
    if signal.soft_targets is not None:
        changes["soft_targets"] = tuple(_weighted_target(t, factors[t.position]) for t in signal.soft_targets)
    return dataclasses.replace(signal, **changes)


def _weighted_target(target: SoftTarget, factor: float) -> SoftTarget:
    # The gradient of a soft target is P - target; giving the student's own P the rest of the mass makes it
    # factor * (P - target), while the shares still add up to 1.
    return dataclasses.replace(
        target,
        probs=tuple(p * factor for p in target.probs),
        self_weight=target.self_weight + (1.0 - factor) * (1.0 - target.self_weight),
    )
