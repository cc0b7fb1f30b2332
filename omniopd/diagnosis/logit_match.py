"""How an open-weight teacher's next-token distributions compare with the student's on its own rollouts, in numbers.

The numbers of each token come from `learner.matching`; here they become means over prompts, by position and by verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omniopd.diagnosis.evidence import PromptMean, mean_over_prompts
from omniopd.errors import DataError
from omniopd.logits.diagnostics import by_correctness, by_position
from omniopd.types import Rollout, Value

TENTHS = 10
LOG_RATIO = "log_ratio"
"""log Q - log P of the tokens that the student drew, in nats: minus its mean estimates KL(student || teacher)."""
OVERLAP = "overlap_ratio"
SHOWN = (
    OVERLAP,
    LOG_RATIO,
    "overlap_advantage",
    "entropy_gap_signed",
    "sampled_outside_top_k",
    "student_mass_on_teacher_top_k",
    "teacher_mass_on_teacher_top_k",
)
"""What the table shows; the report holds all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMatch(Value):
    """One number over all rollouts."""

    mean: PromptMean
    """Over prompts, of the mean over a prompt's rollouts, of the mean over a rollout's tokens."""
    tenths: tuple[float | None, ...]
    """Token means in each tenth of the rollouts; None without a token."""
    by_verdict: Mapping[str, float | None]
    """Token means over `correct`, `wrong` and `unverified` rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMatchReport(Value):
    """All that the distributions tell. What has no evidence has no entry."""

    teacher_id: str
    top_k: int
    """Size of the sets of likeliest tokens that are compared."""
    vocabulary: int
    """Of the student. Sets of unrelated models share top_k / vocabulary of their tokens."""
    num_rollouts: int
    """Those that the teacher could read and score."""
    num_tokens: int
    numbers: Mapping[str, LogitMatch]
    """By the names and signs of `learner.matching.match`, which a run's metrics have, too."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """Rollouts that are no evidence, by reason."""


def summarize_match(
    rollouts: Sequence[Rollout],
    diagnostics: Sequence[Mapping[str, Sequence[float]]],
    *,
    teacher_id: str,
    top_k: int,
    vocabulary: int,
    masked_ids: frozenset[int] = frozenset(),
    missing: Mapping[str, int] | None = None,
) -> LogitMatchReport:
    """Return the means of what `learner.matching.match` found, token by token. Deterministic.

    Args:
        rollouts: Those that were compared.
        diagnostics: One for each: name -> [T], nan where there is no evidence.
        teacher_id: For records.
        top_k: Size of the sets that were compared.
        vocabulary: Of the student.
        masked_ids: Tokens that the run leaves out.
        missing: Rollouts that could not be compared, by reason.

    Raises DataError when the two differ in length.
    """
    if len(rollouts) != len(diagnostics):
        raise DataError(f"{len(rollouts)} rollouts with the diagnostics of {len(diagnostics)}")
    names = dict.fromkeys(name for found in diagnostics for name in found if name != "top_k")
    numbers = {}
    for name in names:
        values = [_kept(r, found.get(name, ()), masked_ids) for r, found in zip(rollouts, diagnostics, strict=True)]
        if (number := _number(rollouts, values)) is not None:
            numbers[name] = number
    return LogitMatchReport(
        teacher_id=teacher_id,
        top_k=top_k,
        vocabulary=vocabulary,
        num_rollouts=len(rollouts),
        num_tokens=sum(r.num_tokens for r in rollouts),
        numbers=numbers,
        missing=dict(missing or {}),
    )


def _kept(rollout: Rollout, values: Sequence[float], masked_ids: frozenset[int]) -> list[float]:
    if not values:
        return []
    return [
        math.nan if token_id in masked_ids else value for token_id, value in zip(rollout.token_ids, values, strict=True)
    ]


def _number(rollouts: Sequence[Rollout], values: Sequence[Sequence[float]]) -> LogitMatch | None:
    means = []
    for rollout, of in zip(rollouts, values, strict=True):
        known = [v for v in of if not math.isnan(v)]
        if known:
            means.append((rollout.prompt.id, math.fsum(known) / len(known)))
    mean = mean_over_prompts(means)
    if mean is None:
        return None
    return LogitMatch(
        mean=mean,
        tenths=by_position(values, bins=TENTHS),
        by_verdict=by_correctness(values, [r.is_correct for r in rollouts]),
    )


def match_lines(report: LogitMatchReport) -> tuple[str, ...]:
    """Return the table, a line each, in plain ASCII."""
    missing = ", ".join(f"{count} {reason}" for reason, count in report.missing.items()) or "none"
    shown = [name for name in SHOWN if name in report.numbers]
    lines = [
        f"distributions of {report.teacher_id}: {report.num_rollouts} rollouts, {report.num_tokens:,} tokens, the "
        f"{report.top_k} likeliest of {report.vocabulary:,} tokens; missing: {missing}",
        f"{'':<30} {'mean (95%)':>30} {'right':>8} {'wrong':>8}",
    ]
    for name in shown:
        number = report.numbers[name]
        verdicts = [_figure(number.by_verdict.get(verdict)) for verdict in ("correct", "wrong")]
        lines.append(f"{name:<30} {told_mean(number.mean):>30} {verdicts[0]:>8} {verdicts[1]:>8}")
    lines.append(
        f"{LOG_RATIO}: teacher minus student on the student's own tokens, in nats; minus its mean estimates the "
        "reverse KL"
    )
    lines.append("by tenth of the rollout, from its start:")
    for name in (OVERLAP, LOG_RATIO):
        if name in report.numbers:
            lines.append(f"{name:<16}" + "".join(f"{_figure(value):>8}" for value in report.numbers[name].tenths))
    return tuple(lines)


def told_mean(mean: PromptMean) -> str:
    """Write a mean with its interval."""
    spread = "one prompt" if mean.low is None or mean.high is None else f"{mean.low:.3f} to {mean.high:.3f}"
    return f"{mean.value:.3f} ({spread})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
