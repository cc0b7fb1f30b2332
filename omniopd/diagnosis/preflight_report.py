"""What a check before a run found, as values and in words."""

from __future__ import annotations

from dataclasses import dataclass

from omniopd.diagnosis.evidence import require_positive
from omniopd.diagnosis.logit_match import LogitMatchReport, match_lines
from omniopd.diagnosis.prefix_probe import PrefixReport
from omniopd.diagnosis.prefix_summary import summary_lines
from omniopd.diagnosis.text_match import TextMatchReport
from omniopd.diagnosis.verdict import Verdict
from omniopd.progress import format_seconds, format_usd
from omniopd.types import Usage, Value

NOT_ASKED = "text: --no-text was given, so the teacher was not asked"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightSettings(Value):
    """How much is looked at."""

    num_prompts: int = 64
    num_rollouts: int = 4
    """Of each prompt."""
    asks_for_text: bool = True
    """False: text teachers are not asked, so nothing is paid."""

    def __post_init__(self) -> None:
        require_positive(prompts=self.num_prompts, rollouts=self.num_rollouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCheck(Value):
    """What was found out about one teacher."""

    name: str
    spec: str
    reads: tuple[str, ...]
    """A question as both sides read it."""
    num_rollouts: int
    """Those of the prompts that go to this teacher."""
    logits: LogitMatchReport | None = None
    prefix: PrefixReport | None = None
    text: TextMatchReport | None = None
    usage: Usage | None = None
    """What asking it for text cost, the answers of the ledger included as `cached_requests`."""
    left_out: tuple[str, ...] = ()
    """What could not be checked, with the reason."""
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport(Value):
    """The whole check. Without the numbers: of a method that has no teacher, for which nothing was done."""

    name: str
    student: str
    settings: PreflightSettings
    num_prompts: int = 0
    """Those that were there to be drawn."""
    num_rollouts: int = 0
    accuracy: float | None = None
    """Of the rollouts that have a verdict."""
    mean_tokens: float = 0.0
    truncated: float = 0.0
    """Share of the rollouts that hit the length limit."""
    teachers: tuple[TeacherCheck, ...] = ()
    seconds: float = 0.0


def describe_preflight(report: PreflightReport) -> str:
    """Return the check for a person: tables, verdicts, next steps."""
    if not report.teachers:
        return f"{report.name}: nothing to check, because the method has no teacher"
    right = "no answers to judge by" if report.accuracy is None else f"{report.accuracy:.1%} right"
    lines = [
        f"{report.name}: {report.student}, {report.num_rollouts} rollouts of {report.num_prompts} prompts, {right}, "
        f"{report.mean_tokens:.0f} tokens on average, {report.truncated:.1%} cut off ({format_seconds(report.seconds)})"
    ]
    for teacher in report.teachers:
        lines += ["", f"{teacher.name} ({teacher.spec}), {teacher.num_rollouts} rollouts", *teacher.reads]
        lines += match_lines(teacher.logits) if teacher.logits is not None else ()
        lines += summary_lines(teacher.prefix) if teacher.prefix is not None else ()
        lines += teacher.text.summary_lines() if teacher.text is not None else ()
        lines += [f"not checked: {reason}" for reason in teacher.left_out]
        lines += [_told_usage(teacher.usage)] if teacher.usage is not None else []
        for verdict in teacher.verdicts:
            lines += verdict.lines()
        if not teacher.verdicts and NOT_ASKED in teacher.left_out:
            lines.append("next: run it without --no-text")
    is_judged = any(teacher.verdicts for teacher in report.teachers)
    last = "All thresholds are ours; the" if is_judged else "The"
    return "\n".join([*lines, "", f"{last} prompts and rollouts are the run's first ones."])


def _told_usage(usage: Usage) -> str:
    cost = format_usd(usage.cost_usd) if usage.requests else "$0.00"
    return (
        f"asked: {usage.requests:,} requests ({usage.cached_requests:,} more from the ledger), {usage.input_tokens:,} "
        f"tokens in, {usage.output_tokens:,} out, cost {cost}"
    )
