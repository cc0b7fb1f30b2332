"""From the records of a run to `report.html`: numbers are read and passed on, drawing is left to the page.

The page holds its data as JSON and makes every node from text, so nothing a model wrote can become markup.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omniopd.errors import RunError
from omniopd.estimate import Estimate
from omniopd.progress import format_seconds, format_usd
from omniopd.records import parse_signal, read_evals, read_metrics, rollout_files, usage_of
from omniopd.report.diagnostics import collect_diagnostics
from omniopd.report.objective import describe_objective
from omniopd.run_folder import RunFolder, TeacherFiles, read_json, write_text_atomic
from omniopd.types import Audit, TokenSignal, Usage

MAX_POINTS = 600
"""Longer curves show every n-th step."""

MAX_SAMPLE_TOKENS = 300_000
"""The page stays light enough to open: samples beyond this many tokens are left out."""


def build_report(run: Path, *, max_samples: int = 60) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path.

    At most `max_samples` rollouts are shown, spread evenly over the recorded steps. Raises RunError when `run` is not
    the folder of a run.
    """
    folder = RunFolder(Path(run))
    if not folder.path.is_dir():
        raise RunError(f"{run} is not a folder; give the folder of a run, e.g. runs/my-run")
    data = collect(folder, max_samples=max_samples)
    write_text_atomic(folder.report, render_page(data))
    return folder.report


def collect(folder: RunFolder, *, max_samples: int) -> dict[str, Any]:
    """Read all that the page shows, as plain JSON values."""
    config = folder.read_resolved()
    rows = read_metrics(folder.metrics)
    evals = read_evals(folder.evals)
    summary = read_json(folder.summary) if folder.summary.is_file() else None
    samples, recorded = sample_rollouts(folder, max_samples)
    spent = _spent(folder, rows)
    return {
        "name": str(config.get("name", folder.path.name)),
        "verdict": describe_verdict(config, rows, evals, summary, spent),
        "objective": describe_objective(config),
        "metrics": _columns(rows),
        "every": _stride(len(rows)),
        "evals": evals,
        "diagnostics": collect_diagnostics(folder, rows),
        "costs": _costs(rows, spent) + _expected(folder, rows),
        "config": folder.resolved.read_text(encoding="utf-8"),
        "environment": read_json(folder.environment) if folder.environment.is_file() else None,
        "samples": samples,
        "recorded": recorded,
    }


def render_page(data: Mapping[str, Any]) -> str:
    """Put the data into the page. `<` is escaped inside the JSON, so that no text can end the script element."""
    here = files("omniopd.report")
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "{{title}}": html.escape(f"{data['name']} - omniopd"),
        "{{verdict}}": html.escape(f"{data['verdict']['headline']}. {data['verdict']['detail']}"),
        "{{style}}": (here / "template.css").read_text(encoding="utf-8"),
        "{{script}}": "".join((here / name).read_text(encoding="utf-8") for name in ("diagnostics.js", "template.js")),
        "{{data}}": payload,
    }
    page = (here / "template.html").read_text(encoding="utf-8")
    # Split at the marks instead of replacing one after the other: a rollout may contain a mark's text.
    for mark in parts:
        if page.count(mark) != 1:
            raise RunError(f"the report template holds {mark} {page.count(mark)} times, expected once")
    pieces = [page]
    for mark, text in parts.items():
        at = next(i for i, piece in enumerate(pieces) if i % 2 == 0 and mark in piece)
        before, after = pieces[at].split(mark)
        pieces[at : at + 1] = [before, text, after]
    return "".join(pieces)


def describe_verdict(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any] | None,
    spent: Usage,
) -> dict[str, Any]:
    """Say in one headline and a few facts what the run came to."""
    done = rows[-1]["step"] if rows else 0
    planned = config.get("steps", done)
    finished = summary is not None
    gain = (summary or {}).get("avg_at_k") or None
    verdict: dict[str, Any] = {
        "finished": finished,
        "steps": done,
        "planned": planned,
        "avg_at_k": gain,
        "greedy": (summary or {}).get("greedy"),
        "teacher_tokens": {"read": spent.input_tokens, "written": spent.output_tokens},
        "teacher_requests": spent.requests,
        "cost": format_usd(spent.cost_usd) if spent.requests else "none",
        "seconds": _seconds(rows, summary),
    }
    before = next((row for row in evals if row.get("when") == "before"), None)
    if gain is not None and gain.get("after") is not None:
        headline, detail = _gain_words(gain)
    elif before is not None:
        headline = f"Started at avg@{before['k']} {_percent(before['avg_at_k'])}"
        detail = "The closing evaluation has not been made."
    else:
        headline = "Not evaluated"
        detail = "The run has no held-out problems; the curves are all there is to judge by."
    if not finished:
        detail = f"Unfinished: {done} of {planned} steps are recorded. {detail}"
    return {**verdict, "headline": headline, "detail": detail}


def render_summary(summary: Mapping[str, Any]) -> str:
    """Write the last lines of a run from its summary.json; what was gained stands in the very last one.

    Example:
        >>> print(render_summary({"teacher_tokens": 1200, "teacher_requests": 9, "cost_usd": None,
        ...     "train_seconds": 61, "avg_at_k": {"k": 16, "before": 0.301, "after": 0.479, "gain": 0.178,
        ...     "ci95": [0.156, 0.2]}}))
        teacher tokens 1,200  requests 9  cost $?  time 1m 01s
        avg@16 30.1% -> 47.9%  (+17.8 points, 95% interval 15.6 to 20.0)
    """
    lines = []
    greedy = summary.get("greedy")
    if greedy and greedy.get("before") is not None and greedy.get("after") is not None:
        lines.append(f"greedy {_percent(greedy['before'])} -> {_percent(greedy['after'])}")
    facts = [f"teacher tokens {summary.get('teacher_tokens', 0):,}", f"requests {summary.get('teacher_requests', 0):,}"]
    facts.append(f"cost {format_usd(summary.get('cost_usd'))}")
    if summary.get("train_seconds") is not None:
        facts.append(f"time {format_seconds(summary['train_seconds'])}")
    lines.append("  ".join(facts))
    gain = summary.get("avg_at_k")
    if gain and gain.get("after") is not None:
        lines.append(_gain_line(gain))
    return "\n".join(lines)


def sample_rollouts(folder: RunFolder, max_samples: int) -> tuple[list[dict[str, Any]], int]:
    """Choose rollouts evenly over the recorded steps and within them; the same folder gives the same choice.

    Returns the samples and how many rollouts are recorded in all.
    """
    steps = [(step, path, _count_lines(path)) for step, path in rollout_files(folder)]
    steps = [entry for entry in steps if entry[2]]
    recorded = sum(size for _, _, size in steps)
    chosen = _spread(len(steps), max_samples)
    samples: list[dict[str, Any]] = []
    num_tokens = 0
    for rank, index in enumerate(chosen):
        step, path, size = steps[index]
        quota = max_samples // len(chosen) + (rank < max_samples % len(chosen))
        for number, line in _lines(path, _spread(size, quota)):
            signal = parse_signal(line, f"{path}:{number + 1}")
            num_tokens += signal.rollout.num_tokens
            if samples and num_tokens > MAX_SAMPLE_TOKENS:
                return samples, recorded
            samples.append(_sample(step, signal))
    return samples, recorded


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _lines(path: Path, wanted: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield the wanted lines, counted from 0. A step's file can be larger than memory should hold at once."""
    with path.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file) if number in wanted)


def _sample(step: int, signal: TokenSignal) -> dict[str, Any]:
    """One rollout as the page needs it. Tokens travel as text: browsers count characters differently."""
    rollout = signal.rollout
    return {
        "step": step,
        "id": rollout.id,
        "prompt": [message.to_json() for message in rollout.prompt.messages],
        "answer": rollout.prompt.answer,
        "correct": rollout.is_correct,
        "finish": rollout.finish_reason.value,
        "author": rollout.author.value,
        "tokens": [rollout.text_between(i, i + 1) for i in range(rollout.num_tokens)],
        "entropies": _rounded(rollout.entropies),
        "advantages": _rounded(signal.advantages),
        "notes": list(signal.notes),
        "chunks": [_chunk(audit) for audit in signal.audits],
    }


def _chunk(audit: Audit) -> dict[str, Any]:
    answers = audit.continuations.continuations
    usable = sum(answer.text is not None for answer in answers)
    similarities = iter(audit.score.similarities if usable == audit.score.num_continuations else ())
    return {
        "start": audit.chunk.start,
        "end": audit.chunk.end,
        "text": audit.chunk.text,
        "score": audit.score.value,
        "missing": audit.score.missing,
        "detail": audit.score.detail,
        "weight": audit.weight,
        "scorer": audit.score.scorer_id,
        "teacher": audit.continuations.teacher_id,
        "continuations": [
            {
                "text": answer.text,
                "similarity": next(similarities, None) if answer.text is not None else None,
                "missing": answer.missing,
                "detail": answer.detail,
            }
            for answer in answers
        ],
    }


def _spread(size: int, wanted: int) -> list[int]:
    """Choose `wanted` of `size` positions evenly, with the first and the last."""
    if wanted >= size:
        return list(range(size))
    if wanted <= 1:
        return [size - 1][:wanted]
    return [round(i * (size - 1) / (wanted - 1)) for i in range(wanted)]


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [round(value, 3) for value in values]


def _stride(size: int) -> int:
    return max(1, -(-size // MAX_POINTS))


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Turn rows into one list for each metric, `step` among them; every n-th row counted from the last."""
    shown = rows[::-1][:: _stride(len(rows))][::-1]
    names = sorted({name for row in shown for name in row} - {"time"})
    return {name: [row.get(name) for row in shown] for name in names}


def _costs(rows: Sequence[Mapping[str, Any]], spent: Usage) -> list[tuple[str, str]]:
    """The table of what the run took, as (what, how much)."""
    reasons: Counter[str] = Counter()
    unscored: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    for row in rows:
        for name, value in row.items():
            if name.startswith("teacher/missing/"):
                reasons[name.removeprefix("teacher/missing/")] += value
            if name.startswith("teacher/unscored/"):
                unscored[name.removeprefix("teacher/unscored/")] += value or 0
            if name.startswith("time/") and value is not None:
                phases[name.removeprefix("time/").removesuffix("_s")] += value
    asked = sum(row.get("teacher/continuations") or 0 for row in rows)
    missing = sum(row.get("teacher/missing") or 0 for row in rows)
    num_rollouts = sum(row.get("rollout/count") or 0 for row in rows)
    table = [
        ("Teacher requests", f"{spent.requests:,}"),
        ("answered from the ledger besides", f"{usage_of(rows).cached_requests:,}"),
        ("Teacher input tokens", f"{spent.input_tokens:,}"),
        ("Teacher output tokens", f"{spent.output_tokens:,}"),
        ("Teacher cost", _cost_words(spent)),
    ]
    if spent.requests and spent.cost_usd is not None and rows:
        table.append(("per step", format_usd(spent.cost_usd / len(rows))))
        if num_rollouts:
            table.append(("per 1,000 rollouts", format_usd(1000 * spent.cost_usd / num_rollouts)))
    table.append(("Continuations asked for", f"{asked:,}"))
    if asked:
        table.append(("without usable text", _lost(missing, asked, reasons)))
    if unscored and num_rollouts:
        table.append(("Rollouts that the teacher did not score", _lost(unscored.total(), num_rollouts, unscored)))
    table += [(f"Time: {phase}", format_seconds(seconds)) for phase, seconds in phases.items() if phase != "step"]
    if "step" in phases:
        table.append(("Time: all steps", format_seconds(phases["step"])))
    return table


def _lost(count: int, of: int, reasons: Counter[str]) -> str:
    why = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common())
    return f"{count:,} ({_percent(count / of)}){': ' + why if why else ''}"


def _expected(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Compare what was expected before the run with what was billed, teacher by teacher, as (what, how much)."""
    table = []
    for kept in folder.teachers:
        if kept.estimate.is_file():
            expected = Estimate.from_json(read_json(kept.estimate))
            whose = "" if kept.path == folder.path else f"{kept.path.name}: "
            table += _expected_of(expected, _spent_of(kept) or usage_of(rows), whose)
    return table


def _expected_of(expected: Estimate, spent: Usage, whose: str) -> list[tuple[str, str]]:
    low, high = expected.low, expected.high

    def row(what: str, billed: str, ends: tuple[str, str]) -> tuple[str, str]:
        return f"{whose}{what}: expected, then billed", f"{ends[0]} to {ends[1]}, then {billed}"

    table = [
        row("Requests", f"{spent.requests:,}", (f"{low.requests:,}", f"{high.requests:,}")),
        row("Output tokens", f"{spent.output_tokens:,}", (f"{low.output_tokens:,}", f"{high.output_tokens:,}")),
        row("Input tokens", f"{spent.input_tokens:,}", (f"{low.input_tokens:,}", f"{high.input_tokens:,}")),
    ]
    if expected.usd is not None and spent.requests:
        ends = (format_usd(expected.usd[0]), format_usd(expected.usd[1]))
        table.append(row("Cost", _cost_words(spent), ends))
    if spent.unanswered_requests:
        table.append((f"{whose}Requests never answered, perhaps billed", f"{spent.unanswered_requests:,}"))
    return table


def _spent(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> Usage:
    """All that was ever paid: the ledgers also know of steps that were lost and made again."""
    found = [spent for kept in folder.teachers if (spent := _spent_of(kept)) is not None]
    return sum(found, Usage()) if found else usage_of(rows)


def _spent_of(kept: TeacherFiles) -> Usage | None:
    if not kept.ledger.is_file():
        return None
    from omniopd.teachers.ledger import Ledger

    ledger = Ledger(kept.ledger)
    try:
        return ledger.spent()
    finally:
        ledger.close()


def _cost_words(usage: Usage) -> str:
    if not usage.requests:
        return "nothing was asked"
    return "price unknown" if usage.cost_usd is None else format_usd(usage.cost_usd)


def _seconds(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> str | None:
    if summary is not None and summary.get("train_seconds") is not None:
        return format_seconds(summary["train_seconds"])
    steps = [row["time/step_s"] for row in rows if row.get("time/step_s") is not None]
    return format_seconds(sum(steps)) if steps else None


def _gain_words(gain: Mapping[str, Any]) -> tuple[str, str]:
    headline = f"avg@{gain['k']} {_percent(gain['before'])} to {_percent(gain['after'])}"
    points = f"{100 * gain['gain']:+.1f} points"
    if not gain.get("ci95"):
        return headline, f"{points}, without an interval."
    low, high = gain["ci95"]
    if low > 0:
        words = "The student improved"
    elif high < 0:
        words = "The student got worse"
    else:
        words = "No change that the evaluation could tell from chance"
    return headline, f"{words}: {points}, 95% interval {100 * low:.1f} to {100 * high:.1f}."


def _gain_line(gain: Mapping[str, Any]) -> str:
    interval = f", 95% interval {100 * gain['ci95'][0]:.1f} to {100 * gain['ci95'][1]:.1f}" if gain.get("ci95") else ""
    change = f"{100 * gain['gain']:+.1f} points{interval}"
    return f"avg@{gain['k']} {_percent(gain['before'])} -> {_percent(gain['after'])}  ({change})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
