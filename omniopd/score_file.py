"""Score a JSONL file of prompts and responses. Restarts where it stopped.

The output is its own state; beside it lies `OUTPUT.settings.json`, which says how it was scored.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from omniopd.api import ChunkRewarder, ChunkRewards, as_messages, progress_bar
from omniopd.chunking import num_words
from omniopd.errors import ConfigError, DataError, RunError, TeacherConnectionError
from omniopd.types import Missing, Usage, Value

ROWS_PER_BATCH = 32
"""Rows scored, written and flushed together: what a crash can cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary(Value):
    """What `score_file` did."""

    rows: int
    """In the output now."""
    rows_resumed: int
    """Found complete in the output, not scored again."""
    chunks: int
    """Of the rows scored by this call, like all that follows."""
    missing: Mapping[str, int]
    """Chunks without a score, by reason."""
    mean_score: float | None
    """Over the chunks that have one."""
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0


def score_file(
    input: Path, output: Path, rewarder: ChunkRewarder, *, resume: bool = True, progress: bool = True
) -> ScoreSummary:
    """Write every row of `input` with its scored chunks to `output`, in order. Spends money at a paid teacher.

    An input row has `prompt` (text or messages), `response` (text) and optionally `entropies` (one number for each
    word). The output row is the input row plus `chunks`: objects with `start` and `end` (characters), `text`, `score`
    (null when missing), `num_continuations` and `missing` (the reason or null). Rows are appended as they are done, so
    after a crash the same call goes on; a torn last line is dropped.

    Args:
        input: JSON lines; all are checked before the teacher is asked. Blank lines are skipped.
        output: JSON lines.
        rewarder: Has the teacher and the settings.
        resume: Keep the rows of an existing output; they must be those of the input and scored with the same settings.
            False starts afresh.
        progress: Draw a bar on a terminal.

    Raises:
        DataError: a row that cannot be used, named by file and line; an output that belongs to another input or was
            scored with other settings.
        ConfigError: `output` is `input`.
        TeacherError: as the teacher raises it, or because it failed on a whole batch; what was done until then is kept.
        RunError: the output cannot be written.
    """
    started = time.monotonic()
    if input.resolve() == output.resolve():
        raise ConfigError(f"input and output are both {input}; expected two files")
    rows = _read_rows(input)
    done = _completed_rows(output, rows, input) if resume else 0
    settings = output.with_name(f"{output.name}.settings.json")
    if done:
        _check_settings(settings, rewarder)
    scored: list[ChunkRewards] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8"):
            pass
        settings.write_text(json.dumps(rewarder.settings, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror}; give another output file") from error
    with (
        output.open("a" if done else "w", encoding="utf-8", newline="\n") as sink,
        progress_bar("scoring rows", len(rows), show=progress, done=done) as advance,
    ):
        for batch in _batches(rows[done:]):
            rewards = _score_batch(rewarder, batch)
            _check_outage(rewards, output)
            for row, row_rewards in zip(batch, rewards, strict=True):
                sink.write(_line({**row, "chunks": _chunk_objects(row_rewards)}))
            sink.flush()
            os.fsync(sink.fileno())
            scored += rewards
            advance(len(batch))
    chunks = [chunk for rewards in scored for chunk in rewards.chunks]
    scores = [chunk.score for chunk in chunks if chunk.score is not None]
    return ScoreSummary(
        rows=len(rows),
        rows_resumed=done,
        chunks=len(chunks),
        missing=dict(Counter(chunk.missing.value for chunk in chunks if chunk.missing is not None)),
        mean_score=sum(scores) / len(scores) if scores else None,
        usage=sum((rewards.usage for rewards in scored), Usage()),
        seconds=time.monotonic() - started,
    )


def _score_batch(rewarder: ChunkRewarder, rows: Sequence[Mapping[str, Any]]) -> list[ChunkRewards]:
    """Score rows that all have entropies or all have none."""
    entropies = [row["entropies"] for row in rows] if _has_entropies(rows[0]) else None
    return rewarder.score([row["prompt"] for row in rows], [row["response"] for row in rows], entropies=entropies)


def _check_outage(rewards: Sequence[ChunkRewards], output: Path) -> None:
    """Stop when the teacher answered nothing at all: rows on file as failed would not be asked again."""
    chunks = [chunk for row in rewards for chunk in row.chunks]
    if chunks and all(chunk.missing in (Missing.FAILED, Missing.TIMEOUT) for chunk in chunks):
        raise TeacherConnectionError(
            f"the teacher failed on all {len(chunks)} chunks of {len(rewards)} rows in a row, the first with: "
            f"{chunks[0].detail or 'no detail'}; the rows before are kept in {output}, run the "
            "same command again to go on"
        )


def _batches(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    batches: list[list[dict[str, Any]]] = []
    for row in rows:
        fits = batches and len(batches[-1]) < ROWS_PER_BATCH
        if fits and _has_entropies(batches[-1][0]) == _has_entropies(row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _has_entropies(row: Mapping[str, Any]) -> bool:
    return row.get("entropies") is not None


def _chunk_objects(rewards: ChunkRewards) -> list[dict[str, Any]]:
    names = ("start", "end", "text", "score", "num_continuations", "missing")
    return [{name: value for name, value in chunk.to_json().items() if name in names} for chunk in rewards.chunks]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read and check every row."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected a file of JSON lines") from error
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: bytes, where: str) -> dict[str, Any]:
    row = _parse(line, where)
    for name in ("prompt", "response"):
        if name not in row:
            raise DataError(f"{where}: the row has no {name!r}; it has {', '.join(sorted(row)) or 'nothing'}")
    if "chunks" in row:
        raise DataError(f"{where}: the row has 'chunks' already, which scoring would overwrite; rename or remove it")
    if not isinstance(row["response"], str):
        raise DataError(f"{where}: 'response' is {type(row['response']).__name__}; expected text")
    try:
        as_messages(row["prompt"])
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error
    if _has_entropies(row):
        _check_entropies(row["entropies"], num_words(row["response"]), where)
    try:
        _line(row).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair at character {error.start}; expected valid Unicode"
        ) from error
    return row


def _check_entropies(entropies: Any, words: int, where: str) -> None:
    if not isinstance(entropies, list) or not all(type(value) in (int, float) for value in entropies):
        raise DataError(f"{where}: 'entropies' is not a list of numbers")
    if len(entropies) != words:
        raise DataError(f"{where}: {len(entropies)} entropies for a response of {words} words; expected one for each")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON in UTF-8: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: the line holds {type(row).__name__}; expected an object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    """Refuse a number like 1e999, which would read as infinity and could not be written again."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is beyond the finite numbers")
    return number


def _completed_rows(output: Path, rows: Sequence[Mapping[str, Any]], source: Path) -> int:
    """Return how many rows of the output are complete, after checking that they are the first rows of the input.

    Cuts a torn last line off the file.
    """
    if not output.exists():
        return 0
    content = output.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    lines = complete.split(b"\n")[:-1]
    if len(lines) > len(rows):
        raise DataError(_changed(f"{output} has {len(lines)} rows and {source} has {len(rows)}"))
    for number, (line, row) in enumerate(zip(lines, rows, strict=False), 1):
        written = _parse(line, f"{output}:{number}")
        if written.pop("chunks", None) is None or written != row:
            raise DataError(_changed(f"{output}:{number} is not row {number} of {source} with chunks"))
    if len(complete) < len(content):
        os.truncate(output, len(complete))
    return len(lines)


def _check_settings(path: Path, rewarder: ChunkRewarder) -> None:
    """Refuse to go on with another teacher or similarity: one file holds one kind of score."""
    if not path.is_file():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), rewarder.settings
    changes = [f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in {**before, **now} if before.get(k) != now.get(k)]
    if changes:
        raise DataError(
            f"the rows that are there were scored with other settings ({', '.join(changes)}; see {path}); use these, "
            "give another output file, or start afresh without resume"
        )


def _changed(what: str) -> str:
    return f"{what}: the input has changed since; give another output file, or start afresh without resume"
