"""What `omniopd cache` does: look into a ledger, clear samples out of it, write it out as text."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omniopd.errors import ConfigError, RunError
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.ledger_schema import connect, connect_read_only
from omniopd.teachers.owners import live_owners
from omniopd.types import Usage, Value

T = TypeVar("T")
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStats(Value):
    """What a ledger holds of one teacher."""

    teacher: str
    samples: int
    calls: int
    cost_usd: float | None
    """None when one of its bills is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats(Value):
    """What a ledger holds."""

    path: str
    size_bytes: int
    """On the disk, with the write-ahead log."""
    keys: int
    """Different requests that can be answered from it, at least in part."""
    samples: int
    by_reason: tuple[tuple[str, int], ...]
    """Samples by what they are, the most frequent first: `usable`, or why there is no text."""
    calls: int
    """HTTP requests and what else was booked."""
    teachers: tuple[TeacherStats, ...]
    spent: Usage
    possible_usd: float | None
    """What may have been billed besides, at most, for requests without an answer; None when nobody can bound it."""
    possible_tokens: int
    in_flight: int
    """Requests under way of processes that still run."""
    oldest: float | None
    newest: float | None
    """When the first and the last call was booked, in seconds since 1970; None without any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared(Value):
    """What `gc` did, or would do."""

    samples: int
    kept: int
    freed_bytes: int
    is_dry_run: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Value):
    """What `export` wrote."""

    path: str
    samples: int
    calls: int
    """Different bills among them."""


def stats(path: Path | str) -> Stats:
    """Sum up a ledger. A file of an older version is brought up to date.

    Raises RunError when it cannot be read.
    """
    _check(path)
    ledger = Ledger(path)
    try:
        spent, (usd, tokens) = ledger.spent(), ledger.possible()
        alive = [order for order in ledger.in_flight() if order.is_alive]
    finally:
        ledger.close()

    def count(db: sqlite3.Connection) -> Stats:
        keys, samples = db.execute("SELECT COUNT(DISTINCT key), COUNT(*) FROM samples").fetchone()
        calls, oldest, newest = db.execute("SELECT COUNT(*), MIN(time), MAX(time) FROM calls").fetchone()
        return Stats(
            path=str(path),
            size_bytes=_size(path),
            keys=keys,
            samples=samples,
            by_reason=tuple(db.execute(_BY_REASON).fetchall()),
            calls=calls,
            teachers=tuple(
                TeacherStats(teacher=teacher, samples=int(own), calls=called, cost_usd=None if unknown else cost)
                for teacher, own, called, cost, unknown in db.execute(_BY_TEACHER)
            ),
            spent=spent,
            possible_usd=usd,
            possible_tokens=tokens,
            in_flight=len(alive),
            oldest=oldest,
            newest=newest,
        )

    return _read(path, count)


def gc(
    path: Path | str,
    *,
    older_than_days: float | None = None,
    teacher: str | None = None,
    unusable: bool = False,
    dry_run: bool = False,
) -> Cleared:
    """Delete the samples that all the given conditions fit, and give their space back. Bills stay.

    Without a condition nothing is deleted, and the file is only packed.

    Args:
        older_than_days: paid longer ago than that.
        teacher: of this teacher's id alone.
        unusable: only what came without a usable text.
        dry_run: only count.

    Raises:
        ConfigError: a negative age, or a teacher that the ledger does not know.
        RunError: somebody has the ledger open, or it cannot be written.
    """
    if older_than_days is not None and not older_than_days >= 0:
        raise ConfigError(f"older_than_days is {older_than_days}; expected 0 or more")
    _check(path)
    if not dry_run and (owners := live_owners(path)):
        raise RunError(
            f"{len(owners)} process(es) have the ledger {path} open; wait until they are done, or look with --dry-run"
        )
    conditions: list[str] = []
    values: list[object] = []
    if older_than_days is not None:
        conditions.append("call IN (SELECT id FROM calls WHERE time < ?)")
        values.append(time.time() - older_than_days * _DAY_S)
    if teacher is not None:
        conditions.append("call IN (SELECT id FROM calls WHERE teacher = ?)")
        values.append(teacher)
    if unusable:
        conditions.append("json_extract(continuation, '$.missing') IS NOT NULL")
    where = " AND ".join(conditions) or "0"
    before = _size(path)
    try:
        with closing(connect(str(path))) as db:
            known = [name for (name,) in db.execute("SELECT DISTINCT teacher FROM calls ORDER BY 1")]
            if teacher is not None and teacher not in known:
                raise ConfigError(
                    f"the ledger {path} holds nothing of {teacher!r}; it has {', '.join(known) or 'none'}"
                )
            (fitting,) = db.execute(f"SELECT COUNT(*) FROM samples WHERE {where}", values).fetchone()
            if not dry_run:
                db.execute(f"DELETE FROM samples WHERE {where}", values)
                db.execute("VACUUM")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            (left,) = db.execute("SELECT COUNT(*) FROM samples").fetchone()
    except sqlite3.Error as error:
        raise RunError(f"cannot clear the ledger {path}: {error}; free the disk and run it again") from error
    kept = left - fitting if dry_run else left
    return Cleared(samples=fitting, kept=kept, freed_bytes=max(0, before - _size(path)), is_dry_run=dry_run)


def export(path: Path | str, out: Path | str) -> Exported:
    """Write one JSON line for each sample, with the bill of the call that brought it.

    Several samples may share a call, and then its bill: count it once for each `call`. The file is there whole or not
    at all. Raises RunError when the ledger cannot be read or the file cannot be written.
    """
    _check(path)
    target = Path(out)
    unfinished = target.with_name(f".{target.name}.part")

    def write(db: sqlite3.Connection) -> Exported:
        samples, calls = 0, set()
        with unfinished.open("w", encoding="utf-8") as file:
            for row in db.execute(_EXPORT):
                line = _line(*row)
                file.write(json.dumps(line) + "\n")
                samples += 1
                calls.add(line["call"])
        return Exported(path=str(target), samples=samples, calls=len(calls))

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        exported = _read(path, write)
        os.replace(unfinished, target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}; choose another file or free the disk") from error
    finally:
        with contextlib.suppress(OSError):  # Renamed, or never there.
            unfinished.unlink()
    return exported


def _line(key: str, sample: int, raw: str, continuation: str, call: int, *bill: Any) -> dict[str, Any]:
    teacher, at, seconds, *amounts = bill
    return {
        "key": key,
        "sample": sample,
        "teacher": teacher,
        "time": at,
        "raw": raw,
        "continuation": json.loads(continuation),
        "seconds": seconds,
        "call": call,
        "bill": dict(zip(_BILL, amounts, strict=True)),
    }


def _check(path: Path | str) -> None:
    if not Path(path).is_file():
        raise RunError(f"there is no ledger {path}; expected a file such as runs/x/ledger.sqlite")


def _read(path: Path | str, run: Callable[[sqlite3.Connection], T]) -> T:
    try:
        with closing(connect_read_only(path)) as db:
            return run(db)
    except sqlite3.Error as error:
        raise RunError(f"cannot read the ledger {path}: {error}; is it a ledger?") from error


def _size(path: Path | str) -> int:
    files = (Path(f"{path}{end}") for end in ("", "-wal"))
    return sum(file.stat().st_size for file in files if file.is_file())


_BILL = (
    *("requests", "input_tokens", "output_tokens", "cached_input_tokens", "cache_write_tokens"),
    *("reasoning_tokens", "cost_usd"),
)
_BY_REASON = (
    "SELECT ifnull(json_extract(continuation, '$.missing'), 'usable') AS reason, COUNT(*) AS number FROM samples "
    "GROUP BY reason ORDER BY number DESC, reason"
)
_BY_TEACHER = (
    "SELECT teacher, TOTAL(number), COUNT(*), SUM(cost_usd), TOTAL(cost_usd IS NULL AND requests > unanswered) > 0 "
    "FROM calls LEFT JOIN (SELECT call, COUNT(*) AS number FROM samples GROUP BY call) ON call = id "
    "GROUP BY teacher ORDER BY teacher"
)
_EXPORT = (
    "SELECT key, sample, raw, continuation, call, teacher, time, seconds, " + ", ".join(_BILL) + " FROM samples "
    "JOIN calls ON calls.id = call ORDER BY call, key, sample"
)
