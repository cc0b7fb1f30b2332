"""Score a JSONL file of prompts and responses. Restarts where it stopped.

The output is its own state; beside it lies `OUTPUT.settings.json`, which says how it was scored.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from omniopd.api import ChunkRewarder, progress_display
from omniopd.chunking import num_words
from omniopd.errors import ConfigError, DataError, RunError, TeacherConnectionError, TeacherError
from omniopd.responses import as_messages
from omniopd.rewards import ChunkRewards
from omniopd.run_folder import write_json_atomic, write_text_atomic
from omniopd.teachers.shaping import SHAPING_OPTIONS, lasting_spec
from omniopd.types import Missing, Usage, Value

OUTAGE_ROWS = 32
"""So many rows in a row without one answer are an outage: rows on file as failed would not be asked again."""
LOST = (Missing.FAILED, Missing.TIMEOUT)
"""Why a chunk has no score although the same request may have an answer tomorrow."""
LAST_ROWS = 3
"""So many at the end are an outage too; fewer may be rows that no teacher can answer."""


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
    """`requests` counts HTTP requests; `cost_usd` is None when a price is unknown."""
    seconds: float = 0.0


def score_file(
    input: Path,
    output: Path,
    rewarder: ChunkRewarder,
    *,
    resume: bool = True,
    progress: bool = True,
    keep_continuations: bool = False,
    retry_failed: bool = False,
) -> ScoreSummary:
    """Write every row of `input` with its scored chunks to `output`, in order. Spends money at a paid teacher.

    An input row has `prompt` (text or messages), `response` (text) and optionally `entropies` (one number for each
    word). The output row is the input row plus `chunks`: objects with `start` and `end` (characters), `text`, `score`
    (null when missing), `num_continuations`, `missing` (the reason or null) and `detail` (why, and what was repaired in
    the teacher's replies).

    Many rows are worked on at once. A row is appended, and is safe on disk, as soon as it and all rows before it are
    finished, so after a crash, an interrupt or an error the same call goes on; a torn last line is dropped. What was
    answered for rows that are not written yet is paid again, unless the rewarder's teacher has a ledger.

    Args:
        input: JSON lines; all are checked before the teacher is asked. Blank lines are skipped.
        output: JSON lines.
        rewarder: Has the teacher and the settings.
        resume: Keep the rows of an existing output; they must be those of the input and scored with the same settings.
            False starts afresh.
        progress: Draw a bar on a terminal; elsewhere write a line now and then, to standard error.
        retry_failed: Ask again for the rows of an existing output that lack a score because a request failed.
        keep_continuations: Give each chunk `continuations`, too: the texts of the teacher that the score rests on.

    Raises:
        DataError: a row that cannot be used, named by file and line; an output that belongs to another input or was
            scored with other settings.
        ConfigError: `output` is `input`.
        TeacherError: as the teacher raises it, or because it failed on 32 rows in a row, or on all there were; the
            finished rows before are kept, and the message says how many.
        RunError: the output cannot be written.
    """
    started = time.monotonic()
    if input.resolve() == output.resolve():
        raise ConfigError(f"input and output are both {input}; expected two files")
    rows = _read_rows(input)
    if output.exists() and not output.is_file():
        raise ConfigError(f"the output {output} is no regular file; expected a file that can be read again")
    done = _completed_rows(output, rows, input) if resume else 0
    settings = output.with_name(f"{output.name}.settings.json")
    wanted = {**rewarder.settings, "keep_continuations": keep_continuations}
    if done:
        _check_settings(settings, wanted)
    if done and retry_failed:
        _retry_failed(output, rewarder, keep_continuations=keep_continuations)
    tally = _Tally()
    with (
        _writing(output, settings, wanted, is_new=not done) as file,
        progress_display(show=progress, done_before=done) as tell,
    ):
        sink = _Sink(file, output, rows, done, tally, keep_continuations)
        rest = rows[done:]
        groups = rewarder.stream(
            [row["prompt"] for row in rest],
            [row["response"] for row in rest],
            entropies=[row.get("entropies") for row in rest],
            tell=tell,
        )
        try:
            with closing(groups):
                for group in groups:
                    sink.add(group)
            sink.finish()
        except TeacherError as error:
            # Callers tell a spent budget from a refused key by the class.
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == TeacherError.__module__)
            raise kind(f"{error}; {sink.whereabouts}") from error
    return ScoreSummary(
        rows=len(rows),
        rows_resumed=done,
        chunks=tally.chunks,
        missing=dict(tally.missing),
        mean_score=tally.mean_score,
        usage=tally.usage,
        seconds=time.monotonic() - started,
    )


@dataclass(slots=True)
class _Tally:
    """What the rows that were written come to."""

    chunks: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    scores: int = 0
    total: float = 0.0
    usage: Usage = field(default_factory=Usage)

    def add(self, rewards: ChunkRewards) -> None:
        self.chunks += len(rewards.chunks)
        self.missing.update(chunk.missing.value for chunk in rewards.chunks if chunk.missing is not None)
        scores = [chunk.score for chunk in rewards.chunks if chunk.score is not None]
        self.scores += len(scores)
        self.total += math.fsum(scores)
        self.usage += rewards.usage

    @property
    def mean_score(self) -> float | None:
        return self.total / self.scores if self.scores else None


class _Sink:
    """Appends finished rows to the output. Holds rows back on which the teacher failed, until it answers again."""

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        rows: Sequence[Mapping[str, Any]],
        done: int,
        tally: _Tally,
        keep_continuations: bool,
    ) -> None:
        self._file = file
        self._path = path
        self._rows = rows
        self._written = done
        self._tally = tally
        self._keep_continuations = keep_continuations
        self._held: list[ChunkRewards] = []
        self._failed_rows = 0
        """Of those held back; the others have no chunks."""
        self._has_answers = False

    @property
    def whereabouts(self) -> str:
        """Say how far the output is and how to go on."""
        total = len(self._rows)
        return f"{self._written} of {total} rows are in {self._path}; run the same command again to go on from there"

    def add(self, group: Sequence[ChunkRewards]) -> None:
        """Write the rewards of the next rows, in one piece. Raises TeacherConnectionError in an outage."""
        ready: list[ChunkRewards] = []
        for rewards in group:
            self._held.append(rewards)
            if _failed(rewards):
                self._failed_rows += 1
                if self._failed_rows == OUTAGE_ROWS:
                    break
            elif rewards.chunks or not self._failed_rows:
                self._has_answers = self._has_answers or bool(rewards.chunks)
                ready += self._held
                self._held, self._failed_rows = [], 0
        self._append(ready)
        if self._failed_rows == OUTAGE_ROWS:
            self._raise_outage()

    def finish(self) -> None:
        """Write the rows that are held back. Raises TeacherConnectionError when the teacher seems to be gone."""
        if self._held and (not self._has_answers or self._failed_rows >= LAST_ROWS):
            self._raise_outage()
        self._append(self._held)

    def _append(self, ready: Sequence[ChunkRewards]) -> None:
        if not ready:
            return
        rows = self._rows[self._written : self._written + len(ready)]
        lines = [
            _line({**row, "chunks": _chunk_objects(rewards, self._keep_continuations)})
            for row, rewards in zip(rows, ready, strict=True)
        ]
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; {self.whereabouts}") from error
        self._written += len(ready)
        for rewards in ready:
            self._tally.add(rewards)

    def _raise_outage(self) -> NoReturn:
        chunks = [chunk for rewards in self._held for chunk in rewards.chunks]
        raise TeacherConnectionError(
            f"the teacher failed on all {len(chunks)} chunks of {self._failed_rows} rows in a row, the "
            f"first with: {chunks[0].detail or 'no detail'}"
        )


def _chunk_objects(rewards: ChunkRewards, keep_continuations: bool) -> list[dict[str, Any]]:
    objects = [chunk.to_json() for chunk in rewards.chunks]
    for values in objects:
        if not keep_continuations:
            del values["continuations"]
    return objects


def _retry_failed(output: Path, rewarder: ChunkRewarder, *, keep_continuations: bool) -> None:
    """Score the rows again in which a request failed, and put the file back as a whole."""
    lines = output.read_bytes().split(b"\n")[:-1]
    written = [_parse(line, f"{output}:{number}") for number, line in enumerate(lines, 1)]
    again = [i for i, row in enumerate(written) if any(chunk["missing"] in LOST for chunk in row["chunks"])]
    rows = [written[i] for i in again]
    rewards = rewarder.score(
        [row["prompt"] for row in rows],
        [row["response"] for row in rows],
        entropies=[row.get("entropies") for row in rows],
    )
    for i, row, new in zip(again, rows, rewards, strict=True):
        lines[i] = _line({**row, "chunks": _chunk_objects(new, keep_continuations)}).encode().rstrip(b"\n")
    write_text_atomic(output, b"".join(line + b"\n" for line in lines).decode())


def _failed(rewards: ChunkRewards) -> bool:
    """Say whether not one answer came. A row without chunks says nothing either way."""
    return bool(rewards.chunks) and all(chunk.missing in LOST for chunk in rewards.chunks)


@contextmanager
def _writing(output: Path, settings: Path, wanted: Mapping[str, Any], *, is_new: bool) -> Iterator[BinaryIO]:
    """Open the output and write down beside it how it is scored. Raises RunError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("ab")
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror}; give another output file") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is writing {output}; wait for it, or give another output file") from error
        try:
            if is_new:
                file.truncate(0)
        except OSError as error:
            raise RunError(f"cannot write {output}: {error.strerror}; give another output file") from error
        write_json_atomic(settings, dict(wanted))
        yield file


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
    if row.get("entropies") is not None:
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


def _check_settings(path: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on with another teacher or similarity: one file holds one kind of score."""
    if not path.is_file():
        return
    unwritten = {f"teacher_options.{name}": value for name, value in SHAPING_OPTIONS.items()}
    before = {**unwritten, "keep_continuations": False, **json.loads(path.read_text(encoding="utf-8"))}
    with suppress(ConfigError):  # The id of a teacher object need be no spec.
        before["teacher"] = lasting_spec(before["teacher"])
    changes = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in now.items() if str(before.get(k)) != str(v)]
    if changes:
        raise DataError(
            f"the rows that are there were scored with other settings ({', '.join(changes)}; see {path}); use these, "
            "give another output file, or start afresh without resume"
        )


def _changed(what: str) -> str:
    return f"{what}: the input has changed since; give another output file, or start afresh without resume"
