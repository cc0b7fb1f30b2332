"""What a run writes down of every step, and how it is read back.

Numbers are taken from the values that did the work: rollouts, audits, the update, the usage. Steps count finished
updates: step 1 is the first, and a row with step s belongs to the checkpoint `step-00000s`. Nothing here draws.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.errors import DataError, RunError
from omniopd.run_folder import RunFolder, write_text_atomic
from omniopd.types import Audit, Author, FinishReason, Rollout, TokenSignal, Update, Usage

if TYPE_CHECKING:
    from omniopd.trackers import Tracker

Metrics = dict[str, float | None]
"""Metric name to value; None where there was nothing to measure."""

_BILL = frozenset({"teacher/requests", "teacher/cached", "teacher/input_tokens", "teacher/output_tokens", "cost/usd"})
_UNREPRODUCIBLE = _BILL | {"time", "seconds", "rollout/tokens_per_s"}
_ROLLOUT_FILE = re.compile(r"step-(\d{6,})\.jsonl")


class Records:
    """The records of one run, open for writing. One process writes at a time."""

    def __init__(self, folder: RunFolder, trackers: Sequence[Tracker] = (), *, record_every: int = 1) -> None:
        if record_every < 1:
            raise DataError(f"record_every is {record_every}, expected 1 or more")
        self._folder = folder
        self._trackers = tuple(trackers)
        self._record_every = record_every

    def step(
        self,
        update: Update,
        signals: Sequence[TokenSignal],
        timings: Mapping[str, float],
        usage: Usage,
        extra: Mapping[str, float | None] | None = None,
    ) -> Metrics:
        """Write down one step and return its metrics.

        Args:
            update: What the learner did; `update.step` counts from 1.
            signals: What the learner was fed.
            timings: Seconds by phase, e.g. `{"generate": 1.5, "step": 4.0}` becomes `time/generate_s`, `time/step_s`.
            usage: What the step's teacher calls cost.
            extra: Further metrics under their full names.

        Raises DataError on a number that is not finite or a name that is taken, RunError when the disk refuses.
        """
        metrics = compose_metrics(update, signals, timings, usage, extra or {})
        if update.step % self._record_every == 0:
            lines = "".join(_line(signal.to_json()) for signal in signals)
            write_text_atomic(self._folder.rollouts_of(update.step), lines)
        self._append(self._folder.metrics, {"step": update.step, "time": time.time(), **metrics})
        for tracker in self._trackers:
            tracker.log(update.step, _measured(metrics))
        return metrics

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Write down one evaluation; it replaces an earlier one of the same `step` and `when`.

        So a run that is resumed right before an evaluation it had already made does not hold it twice.
        """
        key = (row["step"], row["when"])
        kept = [other for other in read_evals(self._folder.evals) if (other["step"], other["when"]) != key]
        write_text_atomic(self._folder.evals, "".join(_line(r) for r in [*kept, dict(row)]))
        numbers = {f"eval/{name}": v for name, v in row.items() if _is_number(v) and name not in ("step", "seconds")}
        for tracker in self._trackers:
            tracker.log(row["step"], numbers)

    def diagnostics(self, row: Mapping[str, Any]) -> None:
        """Write down what a step's diagnostics say beyond its metrics. Raises RunError when the disk refuses."""
        self._append(diagnostics_of(self._folder), row)

    def truncate_after(self, step: int) -> None:
        """Drop all that was recorded beyond `step`, and a torn last line: what a resumed run starts from."""
        for path in (self._folder.metrics, self._folder.evals, diagnostics_of(self._folder)):
            if path.is_file():
                write_text_atomic(path, "".join(_line(r) for r in _read_rows(path) if r["step"] <= step))
        for number, path in rollout_files(self._folder):
            if number > step:
                path.unlink()

    def close(self) -> None:
        """Close the trackers. Safe to call twice."""
        trackers, self._trackers = self._trackers, ()
        for tracker in trackers:
            tracker.close()

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        try:
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(_line(row))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def compose_metrics(
    update: Update,
    signals: Sequence[TokenSignal],
    timings: Mapping[str, float],
    usage: Usage,
    extra: Mapping[str, float | None],
) -> Metrics:
    """Compute the metrics of a step from its values; see `Records.step` for the arguments.

    `rollout/*` counts what the student wrote, each rollout once. A chunk counts as audited when it has a score.
    """
    rollouts = list({s.rollout.id: s.rollout for s in signals if s.rollout.author is Author.STUDENT}.values())
    audits = [audit for signal in signals for audit in signal.audits]
    parts: tuple[Mapping[str, float | None], ...] = (
        _rollout_metrics(rollouts, timings.get("generate")),
        _teacher_metrics(audits, usage),
        _scoring_metrics(signals),
        _score_metrics(audits),
        {
            "optim/loss": update.loss,
            "optim/grad_norm": update.grad_norm,
            "optim/learning_rate": update.learning_rate,
        },
        update.metrics,
        {f"time/{phase}_s": seconds for phase, seconds in timings.items()},
        extra,
    )
    metrics: Metrics = {}
    for part in parts:
        for name, value in part.items():
            if name in metrics:
                raise DataError(f"two things of step {update.step} are called {name}; rename one")
            if value is not None and not math.isfinite(value):
                raise DataError(f"metric {name} of step {update.step} is {value}, expected a finite number or None")
            metrics[name] = value
    return metrics


def usage_of(rows: Iterable[Mapping[str, Any]]) -> Usage:
    """Add up what the steps in `rows` (lines of metrics.jsonl) cost.

    Steps that were lost and made again are not in it; the ledger knows all that was ever paid.
    """
    total = Usage()
    for row in rows:
        total += Usage(
            requests=int(row.get("teacher/requests") or 0),
            input_tokens=int(row.get("teacher/input_tokens") or 0),
            output_tokens=int(row.get("teacher/output_tokens") or 0),
            cost_usd=row.get("cost/usd"),
            cached_requests=int(row.get("teacher/cached") or 0),
        )
    return total


def is_reproducible(name: str) -> bool:
    """Tell whether a metric depends on seeds and settings alone.

    Clock times and memory do not. Neither does a step's bill once a run is resumed: the ledger answers for nothing
    what the interrupted process had already paid for.
    """
    return name not in _UNREPRODUCIBLE and not name.startswith(("time/", "memory/"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a torn last line is left out, a missing file is empty.

    Raises DataError on any other line that is not a row.
    """
    return _read_rows(path)


def read_evals(path: Path) -> list[dict[str, Any]]:
    """Read evals.jsonl, as `read_metrics` does."""
    return _read_rows(path)


def diagnostics_of(folder: RunFolder) -> Path:
    """Name the file of a run's diagnostics."""
    return folder.path / "diagnostics.jsonl"


def read_diagnostics(path: Path) -> list[dict[str, Any]]:
    """Read diagnostics.jsonl, as `read_metrics` does."""
    return _read_rows(path)


def read_signals(path: Path) -> list[TokenSignal]:
    """Read the rollouts of one step with their audits and signals. Raises DataError on a line that is not one."""
    if not path.is_file():
        raise RunError(f"{path} does not exist; the steps recorded are the files next to it")
    return [parse_signal(line, f"{path}:{i}") for i, line in enumerate(_text(path).splitlines(), start=1)]


def parse_signal(line: str, where: str) -> TokenSignal:
    """Read one line of a rollout file. Raises DataError that names `where`."""
    try:
        return TokenSignal.from_json(json.loads(line))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is not a recorded rollout: {error}") from error


def rollout_files(folder: RunFolder) -> list[tuple[int, Path]]:
    """List the rollout files as (step, path), by step."""
    if not folder.rollouts.is_dir():
        return []
    matches = ((_ROLLOUT_FILE.fullmatch(path.name), path) for path in folder.rollouts.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _rollout_metrics(rollouts: Sequence[Rollout], generate_s: float | None) -> Metrics:
    verdicts = [r.is_correct for r in rollouts if r.is_correct is not None]
    entropies = [h for r in rollouts for h in r.entropies or ()]
    num_tokens = sum(r.num_tokens for r in rollouts)
    return {
        "rollout/count": len(rollouts),
        "rollout/accuracy": _mean(verdicts),
        "rollout/length_mean": _mean([r.num_tokens for r in rollouts]),
        "rollout/truncated": _mean([r.finish_reason is FinishReason.LENGTH for r in rollouts]),
        "rollout/entropy_mean": _mean(entropies),
        "rollout/tokens_per_s": num_tokens / generate_s if generate_s else None,
    }


def _teacher_metrics(audits: Sequence[Audit], usage: Usage) -> Metrics:
    reasons = Counter(reason for audit in audits for reason in audit.continuations.missing_reasons)
    return {
        "teacher/requests": usage.requests,
        "teacher/cached": usage.cached_requests,
        "teacher/input_tokens": usage.input_tokens,
        "teacher/output_tokens": usage.output_tokens,
        "teacher/continuations": sum(len(audit.continuations.continuations) for audit in audits),
        "teacher/missing": reasons.total(),
        **{f"teacher/missing/{reason.value}": count for reason, count in sorted(reasons.items())},
        "cost/usd": usage.cost_usd if usage.requests else 0.0,
    }


def _scoring_metrics(signals: Sequence[TokenSignal]) -> Metrics:
    """Count what an open-weight teacher could not score; nothing where there is none."""
    reasons = Counter(signal.unscored for signal in signals if signal.unscored is not None)
    return {f"teacher/unscored/{reason.value}": count for reason, count in sorted(reasons.items())}


def _score_metrics(audits: Sequence[Audit]) -> Metrics:
    scores = [audit.score.value for audit in audits if audit.score.value is not None]
    weights = [audit.weight for audit in audits if audit.weight is not None]
    return {
        "score/mean": _mean(scores),
        "score/audited_chunks": len(scores),
        "score/unaudited_chunks": len(audits) - len(scores),
        "signal/weight_mean": _mean(weights),
        "signal/weight_std": statistics.pstdev(weights) if weights else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _measured(metrics: Metrics) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(row: Mapping[str, Any]) -> str:
    """One record. U+2028 and its like stay escaped: readers that split on them would tear the line."""
    return json.dumps(row, allow_nan=False) + "\n"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    # What follows the last newline is nothing, unless the process died while writing.
    lines = _text(path).split("\n")[:-1]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}:{number} is not a record: expected an object with an integer `step`")
        rows.append(row)
    return rows
