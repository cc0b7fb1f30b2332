"""The seam that every method plugs into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from omniopd.logits.scores import Floats, Ids
from omniopd.types import Rollout, StepContext, TokenSignal


class Supervision(Protocol):
    """Turns rollouts into token signals."""

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Return one signal for each rollout, in order. May spend money."""
        ...


class SignalTransform(Protocol):
    """Adjusts the signals of a step: a filter, a token weighting, a refinement."""

    def __call__(self, signals: Sequence[TokenSignal], ctx: StepContext) -> list[TokenSignal]:
        """Return as many signals as came in, in order. Weights stay >= 0."""
        ...


class StudentMeasure(Protocol):
    """Tells the student's own view of a rollout."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Return logprobs [T] and full-vocabulary entropies [T] at temperature 1 for each rollout, in nats."""
        ...


class StudentCandidates(Protocol):
    """Tells which tokens the student finds likeliest."""

    def __call__(self, rollouts: Sequence[Rollout], k: int) -> list[tuple[Ids, Floats]]:
        """Return ids [T, k], the likeliest first, and their logprobs [T, k] at temperature 1 for each rollout."""
        ...
