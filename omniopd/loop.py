"""The training loop. It moves values from one seam to the next and knows no method by name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from omniopd.behavior.base import Behavior
from omniopd.prompts import PromptSource
from omniopd.rollout.engine import RolloutEngine
from omniopd.supervision.base import SignalTransform, Supervision
from omniopd.timing import StepTimer
from omniopd.types import StepContext, TokenSignal, Update


class Optimizer(Protocol):
    """The learner, as the loop sees it."""

    def update(self, step: int, signals: Sequence[TokenSignal]) -> Update:
        """Take one optimiser step."""
        ...


class Observer(Protocol):
    """Looks at finished steps: records, evaluation, checkpoints, diagnostics."""

    def after_step(self, update: Update, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
        """Called once a step, in the order of the run's observers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, put together. `omniopd.run` does that."""

    num_steps: int
    prompts_per_step: int
    group_size: int
    seed: int
    prompts: PromptSource
    behavior: Behavior
    supervision: Supervision
    transforms: Sequence[SignalTransform]
    learner: Optimizer
    engine: RolloutEngine
    observers: Sequence[Observer]
    timer: StepTimer


async def train(run: Run, *, start_step: int = 0) -> None:
    """Take the steps start_step..num_steps-1, each on fresh rollouts of the current weights."""
    for step in range(start_step, run.num_steps):
        ctx = StepContext(step=step, num_steps=run.num_steps, seed=run.seed)
        prompts = run.prompts.draw(step, run.prompts_per_step)
        rollouts = await run.behavior.rollouts(prompts, ctx, group_size=run.group_size)
        signals = await run.supervision.signals(rollouts, ctx)
        for transform in run.transforms:
            signals = transform(signals, ctx)
        update = run.learner.update(step + 1, signals)
        with run.timer("sync"):
            await run.engine.push_weights(update.policy_version)
        for observer in run.observers:
            observer.after_step(update, signals, ctx)
        # Where nothing else waits, this is where Ctrl-C arrives: between two steps.
        await asyncio.sleep(0)
