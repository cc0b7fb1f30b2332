"""What looks at finished steps: records, the display, evaluation, checkpoints."""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from omniopd.progress import RunProgress
from omniopd.prompts import LearnsFromRollouts, PromptSource
from omniopd.records import Records
from omniopd.teachers.metered import MeteredTeacher
from omniopd.timing import StepTimer
from omniopd.types import StepContext, TokenSignal, Update, Usage

if TYPE_CHECKING:
    from omniopd.checkpoint import Checkpoints
    from omniopd.evaluation import EvalResult
    from omniopd.logits.vllm_scores import ScoringUsage


@dataclass(frozen=True, kw_only=True)
class PromptFeedback:
    """Tells a prompt source that learns how its prompts went."""

    prompts: PromptSource

    def after_step(self, update: Update, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
        if isinstance(self.prompts, LearnsFromRollouts):
            self.prompts.observe([signal.rollout for signal in signals])


class ScoringTeacher(Protocol):
    """An open-weight teacher that is asked for log-probs over a wire."""

    def take_usage(self) -> ScoringUsage:
        """Return what scoring took since this was last asked."""
        ...


class Diagnostics(Protocol):
    """Measures a step beside its losses, before the step is recorded."""

    def take(self) -> tuple[Mapping[str, float], Mapping[str, Any] | None]:
        """Return the step's metrics, and what is too large for a metric as one row, if there is any."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepRecorder:
    """Writes each step down and shows it."""

    records: Records
    progress: RunProgress
    timer: StepTimer
    teachers: Sequence[MeteredTeacher]
    scorers: Sequence[ScoringTeacher] = ()
    diagnostics: Diagnostics | None = None

    def after_step(self, update: Update, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
        usage = sum((teacher.take() for teacher in self.teachers), Usage())
        extra: dict[str, float | None] = {"memory/peak_rss_mb": peak_rss_mb()}
        if self.scorers:
            used = [scorer.take_usage() for scorer in self.scorers]
            extra["teacher/scoring_requests"] = sum(of.requests for of in used)
            extra["teacher/scored_tokens"] = sum(of.prompt_tokens for of in used)
        if self.diagnostics is not None:
            metrics, row = self.diagnostics.take()
            extra |= metrics
            if row is not None:
                self.records.diagnostics({"step": update.step, **row})
        self.progress.step(self.records.step(update, signals, self.timer.take(), usage, extra))


@dataclass(frozen=True, kw_only=True)
class PeriodicEvaluation:
    """Evaluates every `every` steps; the last step is left to the evaluation after the run."""

    every: int
    evaluate: Callable[[int, str], EvalResult]
    timer: StepTimer

    def after_step(self, update: Update, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
        done = ctx.step + 1
        if self.every and done % self.every == 0 and done < ctx.num_steps:
            self.evaluate(done, "during")
            self.timer.restart()


@dataclass(kw_only=True)
class PeriodicCheckpoint:
    """Saves every `every` steps and after the last one; also on request, when a run stops early."""

    every: int
    checkpoints: Checkpoints
    state: Callable[[], dict[str, Any]]
    prompts: PromptSource
    completed: int = 0
    """Steps that are done and recorded."""
    _prompts_state: dict[str, Any] | None = None

    def after_step(self, update: Update, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
        self.begin(ctx.step + 1)
        if self.completed % self.every == 0 or self.completed == ctx.num_steps:
            self.save()

    def begin(self, completed: int) -> None:
        """Take note of what is done. Drawing the prompts of the next step must not change what is saved."""
        self.completed = completed
        if isinstance(self.prompts, LearnsFromRollouts):
            self._prompts_state = copy.deepcopy(self.prompts.state_dict())

    def save(self) -> None:
        """Save the state after the completed steps."""
        self.checkpoints.save(self.completed, {**self.state(), "prompts": self._prompts_state})


def peak_rss_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
