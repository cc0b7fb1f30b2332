"""What the text diagnostics share: exact cuts of rollouts, requests that are asked once, means over prompts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from omniopd.bootstrap import mean_interval
from omniopd.errors import ConfigError, TeacherResponseError
from omniopd.teachers.base import ContinuationRequest, Teacher, TeacherAnswer
from omniopd.types import Author, FinishReason, Rollout, Value

Progress = Callable[[int, int], None]
"""(requests answered, requests in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMean(Value):
    """A mean over prompts with a 95% bootstrap interval over prompts: rollouts of one prompt are alike."""

    value: float
    low: float | None
    """None with a single prompt, which carries no information on the spread."""
    high: float | None
    num_prompts: int
    num_rollouts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeCost(Value):
    """What a probe can cost at most."""

    num_requests: int
    """A teacher that has no `n` sends `num_answers` HTTP requests instead."""
    num_answers: int
    max_output_tokens: int
    """In the teacher's tokens."""


def cost_of(num_requests: int, *, answers_per_request: int, tokens_per_answer: int) -> ProbeCost:
    """Return the cost of so many requests."""
    return ProbeCost(
        num_requests=num_requests,
        num_answers=num_requests * answers_per_request,
        max_output_tokens=num_requests * answers_per_request * tokens_per_answer,
    )


def is_students_own(rollout: Rollout) -> bool:
    """Tell whether the student wrote the rollout to its end or its length limit."""
    return rollout.author is Author.STUDENT and rollout.finish_reason is not FinishReason.ABORT


def cut_at(rollout: Rollout, position: int) -> tuple[int, str]:
    """Return (tokens before the cut, their exact text) for the last cut at or before `position` that splits nothing.

    Tokens that share a character stay together. 0 <= position <= T.
    """
    end = len(rollout.text)
    char = rollout.char_starts[position] if position < rollout.num_tokens else end
    return bisect_left(rollout.char_starts, char), rollout.text[:char]


def num_text_tokens(rollout: Rollout) -> int:
    """Return how many tokens stand before the end of the text; the end token does not."""
    return bisect_left(rollout.char_starts, len(rollout.text))


def mean_over_prompts(values: Sequence[tuple[str, float]], *, seed: int = 0) -> PromptMean | None:
    """Return the mean over prompts of each prompt's mean, with a 95% interval over prompts; None without a value.

    Args:
        values: (prompt id, value of one rollout)
        seed: Of the resampling.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt_id, value in values:
        by_prompt.setdefault(prompt_id, []).append(value)
    if not by_prompt:
        return None
    means = [math.fsum(of_prompt) / len(of_prompt) for of_prompt in by_prompt.values()]
    interval = mean_interval(means, seed=seed) if len(means) > 1 else None
    return PromptMean(
        value=math.fsum(means) / len(means),
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        num_prompts=len(means),
        num_rollouts=len(values),
    )


async def ask_once(
    teacher: Teacher,
    requests: Iterable[ContinuationRequest],
    *,
    per_call: int | None,
    progress: Progress | None = None,
) -> dict[ContinuationRequest, TeacherAnswer]:
    """Ask each distinct request once, `per_call` at a time in the order given; None asks all in one call."""
    distinct = list(dict.fromkeys(requests))
    answers: dict[ContinuationRequest, TeacherAnswer] = {}
    size = per_call or max(1, len(distinct))
    for first in range(0, len(distinct), size):
        asked = distinct[first : first + size]
        got = await teacher.continuations(asked)
        if [len(a.continuations) for a in got] != [r.n for r in asked]:
            raise TeacherResponseError(
                f"{teacher.id} gave {len(got)} answers with {sum(len(a.continuations) for a in got)} samples to "
                f"{len(asked)} requests for {sum(r.n for r in asked)}; expected each sample, or a reason in its place"
            )
        answers |= dict(zip(asked, got, strict=True))
        if progress is not None:
            progress(len(answers), len(distinct))
    return answers


def require_positive(**settings: int) -> None:
    """Raise ConfigError for the first setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")
