"""A prefix probe in words: a table that a terminal and a report can print, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from omniopd.diagnosis.evidence import PromptMean
from omniopd.diagnosis.prefix_probe import PrefixPoint, PrefixReport

FEW_PROMPTS = 20
"""With fewer prompts the advice is a hint. Where n prompts all agree the interval has no width, although up to 3/n of
all prompts may differ."""

WORTH = 0.05
"""The smallest advantage worth paying a teacher for. Ours, as are the limits below."""
NO_ROOM = 0.95
"""A student that succeeds so often leaves a teacher nothing to add."""
MANY_MISSING = 0.2
MANY_TRUNCATED = 0.1
"""Of the student's rollouts."""


def summary_lines(report: PrefixReport, *, worth: float = WORTH) -> tuple[str, ...]:
    """Return the table and the advice of a probe, a line each, in plain ASCII."""
    told = report.settings
    skipped = f", {report.num_skipped} skipped (no verdict, aborted or not the student's)" if report.num_skipped else ""
    rows = [
        f"prefix probe of {report.teacher_id}: {report.num_rollouts} rollouts{skipped}; "
        f"{told.num_continuations} answers of up to {told.max_tokens} tokens from each prefix",
        f"{'prefix':>8} {'teacher':>8} {'student':>8} {'advantage (95%)':>24} {'recovers':>9} {'spoils':>7} "
        f"{'prompts':>8} {'answers':>8} {'cut':>5}  left out",
        *(_row(point) for point in report.points),
        "recovers: wrong rollouts that the teacher ends right; spoils: right ones that it ends wrong",
    ]
    return (*rows, *advice(report, worth=worth))


def _row(point: PrefixPoint) -> str:
    left_out = [f"{count} {reason}" for reason, count in point.missing.items()]
    left_out += [f"{point.num_too_short} too short"] if point.num_too_short else []
    return (
        f"{point.label:>8} {_rate(point.teacher):>8} {_rate(point.student):>8} {_signed(point.advantage):>24} "
        f"{_rate(point.recovery):>9} {_rate(point.spoiling):>7} "
        f"{point.advantage.num_prompts if point.advantage else 0:>8} {point.num_answers:>8} {point.num_truncated:>5}  "
        f"{', '.join(left_out) or '-'}"
    )


def _rate(mean: PromptMean | None) -> str:
    return "-" if mean is None else f"{mean.value:.2f}"


def _signed(mean: PromptMean | None) -> str:
    if mean is None:
        return "-"
    spread = "unknown" if mean.low is None or mean.high is None else f"{mean.low:+.2f} to {mean.high:+.2f}"
    return f"{mean.value:+.2f} ({spread})"


def advice(report: PrefixReport, *, worth: float = WORTH) -> tuple[str, ...]:
    """Return what the numbers recommend, one sentence or two a line, and what speaks against trusting them.

    A cut where the interval of the advantage lies above 0 helps, one below 0 harms. One in between shows nothing; it
    rules help out only where the interval ends below `worth`. Cuts at fractions and at positions are judged apart.
    """
    lines: list[str] = []
    for is_position in (False, True):
        track = [p for p in report.points if p.label.endswith("t") is is_position and _is_judged(p)]
        if track:
            lines += _judged(track, worth)
    if not lines:
        lines.append("no advice: no cut has usable answers for two prompts or more; probe more prompts")
    return (*dict.fromkeys(lines), *_doubts(report, worth))


def _is_judged(point: PrefixPoint) -> bool:
    return point.advantage is not None and point.advantage.low is not None


def _bounds(point: PrefixPoint) -> tuple[float, float]:
    assert point.advantage is not None and point.advantage.low is not None and point.advantage.high is not None
    return point.advantage.low, point.advantage.high


def _judged(track: Sequence[PrefixPoint], worth: float) -> list[str]:
    helping = [i for i, p in enumerate(track) if _bounds(p)[0] > 0]
    if not helping:
        return [_no_help(track, worth), *_harm(track)]
    last = track[helping[-1]]
    beyond = track[helping[-1] + 1 :]
    unshown = [p for i, p in enumerate(track[: helping[-1]]) if i not in helping]
    lines = []
    if beyond:
        may = any(_bounds(p)[1] >= worth for p in beyond)
        lines.append(
            f"the teacher is ahead up to the prefix {_told([last])}; beyond, no advantage is shown ({_told(beyond)}): "
            f"audit only before {beyond[0].label}, or shorten the completions"
            + (f" (an advantage of {worth:g} is not ruled out; more prompts would tell)" if may else "")
        )
    else:
        lines.append(f"the teacher is ahead as far as was probed (last prefix {_told([last])}): audit anywhere")
    if unshown:
        lines.append(f"no advantage is shown at {_told(unshown)}, although one is at {last.label}")
    return [*lines, *_harm(track)]


def _no_help(track: Sequence[PrefixPoint], worth: float) -> str:
    first = track[0]
    if first.student is not None and first.student.value >= NO_ROOM:
        return (
            f"the student is right in {first.student.value:.0%} of its rollouts: little is left to teach on these "
            "prompts; choose harder ones"
        )
    ruled_out = [p for p in track if _bounds(p)[1] < worth]
    if len(ruled_out) == len(track):
        return (
            f"this teacher cannot teach this student on these prompts: it is nowhere ahead, and an advantage of "
            f"{worth:g} is ruled out ({_told(track)}); take a better teacher, or start with supervised fine-tuning"
        )
    return (
        f"no advantage is shown at any prefix ({_told(track)}), but {worth:g} is not ruled out; probe more prompts "
        "before you pay for this teacher"
    )


def _harm(track: Sequence[PrefixPoint]) -> list[str]:
    worse = [p for p in track if _bounds(p)[1] < 0]
    if not worse:
        return []
    # See the module docstring of prefix_probe: a cut by length favors the student.
    hindsight = "" if worse[0].label.endswith("t") else "; cuts at fractions favor the student, so probe positions, too"
    return [f"the teacher does worse than the student at {_told(worse)}: do not audit there{hindsight}"]


def _told(points: Sequence[PrefixPoint]) -> str:
    return "; ".join(f"{p.label}: {_signed(p.advantage)}" for p in points)


def _doubts(report: PrefixReport, worth: float) -> list[str]:
    lines = []
    points = report.points
    if report.num_truncated_rollouts > MANY_TRUNCATED * report.num_rollouts:
        lines.append(
            f"{report.num_truncated_rollouts} of {report.num_rollouts} rollouts hit the student's length limit, and "
            f"the teacher had {report.settings.max_tokens} tokens more: part of its advantage may be room alone"
        )
    counts = [p.advantage.num_prompts for p in points if p.advantage is not None]
    if counts and min(counts) < FEW_PROMPTS:
        lines.append(
            f"only {min(counts)} prompts at the least: a hint, no finding; intervals of so few prompts are too narrow"
        )
    for p in points:
        asked = p.num_answers + sum(p.missing.values())
        gain = 0.0 if p.advantage is None else (p.advantage_if_finished or 0.0) - p.advantage.value
        if gain >= worth:
            lines.append(
                f"{p.label}: {p.num_truncated_wrong} of {p.num_answers} answers were cut by max_tokens and count as "
                f"wrong; had all ended right, the advantage would be {p.advantage_if_finished:+.2f}; raise max_tokens"
            )
        if asked and sum(p.missing.values()) > MANY_MISSING * asked:
            lines.append(
                f"{p.label}: {sum(p.missing.values())} of {asked} answers are missing and left out; if those are the "
                "hard ones, the teacher looks better than it is"
            )
    asked_to = sum(p.num_asked_to for p in points)
    if asked_to:
        lines.append(
            f"{asked_to} of {sum(p.num_answers for p in points)} answers come from a chat model that was asked to go "
            "on; one that stops early counts as wrong, so the teacher may be better than its numbers after a prefix"
        )
    return lines
