"""What is asked of the ledger's tables, and written into them; each function within a transaction of its caller."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from omniopd.teachers.budget import Amount, Funds
from omniopd.types import Continuation, Missing

Samples = dict[str, dict[int, Continuation]]
"""By key and sample number."""

_KEYS_PER_QUERY = 500

INSERT_CALLS = (
    "INSERT INTO calls (id, time, seconds, teacher, requests, unanswered, input_tokens, output_tokens, "
    "cached_input_tokens, cache_write_tokens, reasoning_tokens, cost_usd, possible_usd, possible_tokens)"
)
INSERT_SAMPLES = "INSERT OR IGNORE INTO samples (key, sample, call, raw, continuation)"
INSERT_ORDERS = "INSERT INTO orders (owner, id, teacher, time, tokens, usd)"
INSERT_CLAIMS = "INSERT OR IGNORE INTO claims (key, owner)"
# So few that their statements stay prepared.
_ROWS_PER_STATEMENT = (64, 16, 4, 1)
SPENT = (
    "SELECT TOTAL(requests), TOTAL(unanswered), TOTAL(input_tokens), TOTAL(output_tokens), "
    "TOTAL(cached_input_tokens), TOTAL(cache_write_tokens), TOTAL(reasoning_tokens), "
    "SUM(cost_usd), TOTAL(cost_usd IS NULL AND requests > unanswered) FROM calls"
)
POSSIBLE = "SELECT TOTAL(possible_usd), TOTAL(possible_tokens), TOTAL(possible_usd IS NULL AND requests > 0) FROM calls"


class RunningSums:
    """The sums of all calls, kept up to date by reading only the new ones: bills are never changed or deleted."""

    def __init__(self) -> None:
        self._last = 0
        self._spent = Amount()
        self._possible = Amount()
        self._unbounded = 0

    def read(self, db: sqlite3.Connection) -> Funds:
        """Return where the ledger stands within the present transaction."""
        last, usd, tokens, calls, possible_usd, possible_tokens, unbounded = db.execute(
            "SELECT MAX(id), TOTAL(cost_usd), TOTAL(input_tokens + output_tokens), TOTAL(requests), "
            "TOTAL(possible_usd), TOTAL(possible_tokens), "
            "TOTAL(possible_usd IS NULL AND requests > 0) FROM calls WHERE id > ?",
            (self._last,),
        ).fetchone()
        if last is not None:
            self._last = last
            self._spent = self._spent.plus(Amount(usd, tokens, calls))
            self._possible = self._possible.plus(Amount(possible_usd, possible_tokens))
            self._unbounded += int(unbounded)
        under_way = db.execute("SELECT TOTAL(usd), TOTAL(tokens), COUNT(*), TOTAL(usd IS NULL) FROM orders").fetchone()
        return Funds(
            spent=self._spent,
            possible=self._possible,
            under_way=Amount(*under_way[:3]),
            unbounded_calls=self._unbounded + int(under_way[3]),
        )


def find_samples(db: sqlite3.Connection, keys: Sequence[str]) -> Samples:
    found: Samples = {}
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        part = keys[start : start + _KEYS_PER_QUERY]
        marks = ",".join("?" * len(part))
        for key, sample, stored in db.execute(
            f"SELECT key, sample, continuation FROM samples WHERE key IN ({marks})", part
        ):
            found.setdefault(key, {})[sample] = read_continuation(stored)
    return found


def insert_rows(
    db: sqlite3.Connection, insert: str, rows: Sequence[Sequence[Any]], returning: str = ""
) -> list[tuple[Any, ...]]:
    """Insert rows, many with a statement; return what it returns."""
    returned: list[tuple[Any, ...]] = []
    start = 0
    while start < len(rows):
        size = next(size for size in _ROWS_PER_STATEMENT if size <= len(rows) - start)
        part = rows[start : start + size]
        marks = "(" + ",".join("?" * len(part[0])) + ")"
        statement = f"{insert} VALUES {','.join([marks] * size)} {returning}"
        returned += db.execute(statement, [value for row in part for value in row]).fetchall()
        start += size
    return returned


def delete_orders(db: sqlite3.Connection, owner: str, ids: Sequence[int]) -> None:
    """Delete orders that are settled, or were never sent."""
    listed = json.dumps(ids)
    db.execute("DELETE FROM orders WHERE owner = ? AND id IN (SELECT value FROM json_each(?))", (owner, listed))


def delete_claims(db: sqlite3.Connection, owner: str, keys: Sequence[str]) -> None:
    """Delete claims of an owner."""
    listed = json.dumps(keys)
    db.execute("DELETE FROM claims WHERE key IN (SELECT value FROM json_each(?)) AND owner = ?", (listed, owner))


def bury(db: sqlite3.Connection, owner: str) -> None:
    """Void the claims of an owner that is gone. Nobody will learn what became of its orders: possibly spent."""
    db.execute(
        "INSERT INTO calls (time, seconds, teacher, requests, unanswered, input_tokens, output_tokens, cost_usd, "
        "possible_usd, possible_tokens) "
        "SELECT time, 0, teacher, 1, 1, 0, 0, CASE WHEN usd IS NULL THEN NULL ELSE 0.0 END, usd, tokens "
        "FROM orders WHERE owner = ? ORDER BY id",
        (owner,),
    )
    db.execute("DELETE FROM orders WHERE owner = ?", (owner,))
    db.execute("DELETE FROM claims WHERE owner = ?", (owner,))


def insert_lost(db: sqlite3.Connection, notes: Sequence[tuple[int, str, float, int, float | None]]) -> None:
    """Book noted orders of which nobody will learn what became: possibly spent."""
    db.executemany(
        "INSERT INTO calls (time, seconds, teacher, requests, unanswered, input_tokens, output_tokens, cost_usd, "
        "possible_usd, possible_tokens) VALUES (?, 0, ?, 1, 1, 0, 0, ?, ?, ?)",
        [(at, teacher, None if usd is None else 0.0, usd, tokens) for _, teacher, at, tokens, usd in notes],
    )


def storable(text: str) -> str:
    """Return text that SQLite takes: half a surrogate pair is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_continuation(continuation: Continuation) -> str:
    """Return what the ledger stores of a continuation: its JSON."""
    # By hand: the general `to_json` and `from_json` cost as much as all the rest of writing an answer.
    return json.dumps(
        {
            "text": continuation.text,
            "finish_reason": continuation.finish_reason,
            "missing": None if continuation.missing is None else continuation.missing.value,
            "detail": continuation.detail,
            "is_exact": continuation.is_exact,
        }
    )


def read_continuation(stored: str) -> Continuation:
    """Return the continuation that the ledger stored."""
    data = json.loads(stored)
    missing = data.pop("missing", None)
    return Continuation(missing=None if missing is None else Missing(missing), **data)
