"""Filters: turn the weights of unusable rollouts to zero and say how many and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omniopd.types import FinishReason, StepContext, TokenSignal


def silence(signal: TokenSignal, reason: str) -> TokenSignal:
    """Return the signal with every weight at zero and the reason among its notes; the rollout stays on record."""
    zeros = (0.0,) * signal.rollout.num_tokens
    streams = ("pg_weights", "anchor_weights", "kl_weights", "ce_weights")
    changes: dict[str, Any] = {name: zeros for name in streams if getattr(signal, name) is not None}
    return dataclasses.replace(
        signal,
        **changes,
        soft_targets=() if signal.soft_targets is not None else None,
        notes=(*signal.notes, f"dropped: {reason}"),
    )


@dataclass(frozen=True)
class DropTruncated:
    """Leave out rollouts that hit the length limit: their end is not the student's choice."""

    def __call__(self, signals: Sequence[TokenSignal], ctx: StepContext) -> list[TokenSignal]:
        return [
            silence(s, "hit the length limit") if s.rollout.finish_reason == FinishReason.LENGTH else s for s in signals
        ]


@dataclass(frozen=True)
class DropUnaudited:
    """Leave out rollouts without one usable audit, so that their anchor does not outvote the evidence of the others.

    What nobody audits, such as the rollouts of an open-weight teacher or of a verifier, stays.
    """

    def __call__(self, signals: Sequence[TokenSignal], ctx: StepContext) -> list[TokenSignal]:
        return [
            silence(s, "no usable audit")
            if (s.audits or s.anchor_weights is not None) and all(a.score.value is None for a in s.audits)
            else s
            for s in signals
        ]
