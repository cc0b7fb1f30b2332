"""The ledger: every paid answer on disk before it is used, never paid twice, and never more spent than allowed.

SQLite in WAL mode; several processes may share a file. Prompts are stored as hashes only, answers in full, keys never.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from omniopd.errors import ConfigError, RunError, TeacherBudgetError
from omniopd.teachers.base import ContinuationRequest, Teacher, TeacherAnswer
from omniopd.teachers.cards import ModelPrice
from omniopd.types import Continuation, Missing, Usage

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    seconds REAL NOT NULL,
    teacher TEXT NOT NULL,
    requests INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cost_usd REAL
);
CREATE TABLE IF NOT EXISTS samples (
    key TEXT NOT NULL,
    sample INTEGER NOT NULL,
    call INTEGER NOT NULL REFERENCES calls (id),
    raw TEXT NOT NULL,
    continuation TEXT NOT NULL,
    PRIMARY KEY (key, sample)
) WITHOUT ROWID;
"""
_VERSION = 1
_KEYS_PER_QUERY = 500
# These say that nothing was answered; every other reason is an answer that was paid for.
_UNANSWERED = frozenset({Missing.FAILED, Missing.TIMEOUT, Missing.BUDGET})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One sample as it came off the wire, and what was made of it."""

    position: int
    """Which of the requests of the call."""
    sample: int
    """0..n-1 of that request."""
    raw: str
    continuation: Continuation


Record = Callable[[Sequence[Reply], Usage, float], None]
"""Called once for each HTTP response (or final failure) with its samples, its bill and its seconds."""


class RecordedTeacher(Teacher, Protocol):
    """A teacher that reports each response as it arrives."""

    @property
    def exact_samples(self) -> bool:
        """Whether asking the same request again gives the same samples."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """All that shapes an answer besides the request."""
        ...

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, record: Record | None = None
    ) -> list[TeacherAnswer]: ...


class Ledger:
    """The store of answers and bills.

    `:memory:` keeps it for the life of the object. A closed file is opened again by the next call. Calls may come from
    different threads, one at a time. Raises RunError when the file is no ledger or cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self._open: sqlite3.Connection | None = None
        self._connect()

    def _connect(self) -> sqlite3.Connection:
        if self._open is not None:
            return self._open
        try:
            if self.path != ":memory:":
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"cannot open the ledger {self.path}: {error}; is it a ledger, and is the disk full?"
            ) from error
        self._open = db
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA journal_mode=WAL")
        # An answer must survive a power cut, not just a crash of the process: it was paid for.
        db.execute("PRAGMA synchronous=FULL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise RunError(
                f"the ledger {self.path} has version {version}, this omniopd reads {_VERSION}; use a new file"
            )
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT;")

    def find(self, keys: Sequence[str]) -> dict[str, dict[int, Continuation]]:
        """Return the stored samples of each key, by sample number; keys without any are left out."""
        found: dict[str, dict[int, Continuation]] = {}
        db = self._connect()
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            rows = db.execute(f"SELECT key, sample, continuation FROM samples WHERE key IN ({marks})", part)
            for key, sample, stored in rows:
                found.setdefault(key, {})[sample] = Continuation.from_json(json.loads(stored))
        return found

    def add(self, teacher_id: str, samples: Sequence[tuple[str, int, Reply]], usage: Usage, seconds: float) -> None:
        """Write one response, bill and samples together, and return once it is on disk.

        A sample that is there already stays as it is; the bill counts all the same.
        """
        db = self._connect()
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                call = db.execute(
                    "INSERT INTO calls (time, seconds, teacher, requests, input_tokens, output_tokens, cost_usd) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        time.time(),
                        seconds,
                        teacher_id,
                        usage.requests,
                        usage.input_tokens,
                        usage.output_tokens,
                        usage.cost_usd,
                    ),
                ).lastrowid
                db.executemany(
                    "INSERT OR IGNORE INTO samples (key, sample, call, raw, continuation) VALUES (?, ?, ?, ?, ?)",
                    [(key, i, call, r.raw, json.dumps(r.continuation.to_json())) for key, i, r in samples],
                )
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise RunError(f"cannot write to the ledger {self.path}: {error}; free the disk, then --resume") from error

    def spent(self) -> Usage:
        """Sum the bills of all calls. The cost is None as soon as one of them is unknown."""
        requests, inputs, outputs, cost, unknown = (
            self._connect()
            .execute(
                "SELECT TOTAL(requests), TOTAL(input_tokens), TOTAL(output_tokens), SUM(cost_usd), "
                "TOTAL(cost_usd IS NULL AND requests > 0) FROM calls"
            )
            .fetchone()
        )
        return Usage(
            requests=int(requests),
            input_tokens=int(inputs),
            output_tokens=int(outputs),
            cost_usd=None if unknown else cost,
        )

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._open is not None and self.path != ":memory:":
            self._open.close()
            self._open = None


class Ledgered:
    """Put a ledger, and a budget if there is one, in front of a teacher.

    What the ledger holds is not asked again; what is missing is asked for alone. A teacher with exact samples is asked
    for the whole request again and gives the same text; any other gets a seed of its own for the rest. Failed samples
    are not stored. The budget is checked before anything is sent, with the highest price that the call can have.

    Args:
        teacher: who answers.
        ledger: its file is closed with the teacher.
        price: needed with a budget.
        budget_usd: for all calls in the ledger together, earlier runs included.
    """

    def __init__(
        self,
        teacher: RecordedTeacher,
        ledger: Ledger,
        *,
        price: ModelPrice | None = None,
        budget_usd: float | None = None,
    ) -> None:
        if budget_usd is not None and price is None:
            raise ConfigError(
                f"budget_usd is {budget_usd} but the price of {teacher.id} is unknown; put price.as_of and "
                f"price.models into ./teachers/{teacher.id.partition(':')[0]}.yaml, or leave the budget out"
            )
        if budget_usd is not None and ledger.spent().cost_usd is None and ledger.spent().requests:
            raise ConfigError(
                f"budget_usd is {budget_usd} but the ledger {ledger.path} holds calls of unknown cost; use a new ledger"
            )
        self._teacher = teacher
        self._ledger = ledger
        self._price = price
        self._budget_usd = budget_usd
        self._reserved_usd = 0.0

    @property
    def id(self) -> str:
        """The teacher's."""
        return self._teacher.id

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        """Answer every request, in order, from the ledger where it can.

        Raises what the teacher raises, and TeacherBudgetError before a call that could exceed the budget.
        """
        marks = json.dumps(self._teacher.fingerprint, sort_keys=True)
        keys = [request_key(marks, request) for request in requests]
        wanted: dict[str, ContinuationRequest] = {}
        for key, request in zip(keys, requests, strict=True):
            wanted[key] = max(wanted.get(key, request), request, key=lambda r: r.n)
        known = self._ledger.find(list(wanted))
        is_exact = self._teacher.exact_samples
        plan = [_Gap.of(key, request, known.get(key, {}), is_exact) for key, request in wanted.items()]
        gaps = [gap for gap in plan if gap is not None]
        asked = await self._ask(gaps) if gaps else []
        fresh: dict[str, TeacherAnswer] = {}
        for gap, answer in zip(gaps, asked, strict=True):
            fresh[gap.key] = answer
            samples = known.setdefault(gap.key, {})
            for i, continuation in enumerate(answer.continuations):
                if (index := gap.index_of(i)) is not None:
                    samples.setdefault(index, continuation)
        answers = []
        for key, request in zip(keys, requests, strict=True):
            paid = fresh.pop(key, None)
            answers.append(
                TeacherAnswer(
                    continuations=tuple(known[key][i] for i in range(request.n)),
                    usage=paid.usage if paid else Usage(cached_requests=1),
                    seconds=paid.seconds if paid else 0.0,
                )
            )
        return answers

    async def aclose(self) -> None:
        """Close the teacher's connections and the ledger's file. Safe to call twice; a later request opens them."""
        self._ledger.close()
        await self._teacher.aclose()

    async def _ask(self, gaps: list[_Gap]) -> list[TeacherAnswer]:
        def record(replies: Sequence[Reply], usage: Usage, seconds: float) -> None:
            rows = []
            for reply in replies:
                gap = gaps[reply.position]
                index = gap.index_of(reply.sample)
                if index is not None and reply.continuation.missing not in _UNANSWERED:
                    rows.append((gap.key, index, reply))
            self._ledger.add(self.id, rows, usage, seconds)

        estimate = self._reserve([gap.request for gap in gaps])
        try:
            return await self._teacher.continuations([gap.request for gap in gaps], record=record)
        finally:
            self._reserved_usd -= estimate

    def _reserve(self, requests: list[ContinuationRequest]) -> float:
        if self._budget_usd is None or self._price is None:
            return 0.0
        estimate = sum(highest_cost_usd(request, self._price) for request in requests)
        spent = self._ledger.spent().cost_usd or 0.0
        if spent + self._reserved_usd + estimate > self._budget_usd:
            raise TeacherBudgetError(
                f"the budget of {self._budget_usd:.4f} USD does not cover the next {len(requests)} requests to "
                f"{self.id}: spent {spent:.4f}, under way {self._reserved_usd:.4f}, these may cost {estimate:.4f}; "
                "raise teacher.budget_usd and run again with --resume"
            )
        self._reserved_usd += estimate
        return estimate


@dataclass(frozen=True, slots=True)
class _Gap:
    """What the ledger lacks of one request, and the request that fetches it."""

    key: str
    request: ContinuationRequest
    missing: tuple[int, ...]
    is_whole: bool
    """`request` asks for all samples, not only for the missing ones."""

    @classmethod
    def of(
        cls, key: str, request: ContinuationRequest, known: Mapping[int, Continuation], is_exact: bool
    ) -> Self | None:
        missing = tuple(i for i in range(request.n) if i not in known)
        if not missing:
            return None
        if is_exact or len(missing) == request.n:
            return cls(key, request, missing, True)
        # With the same seed a server would give the samples again that are there already.
        seed = None if request.seed is None else (request.seed * 1_000_003 + missing[0]) % 2**31
        return cls(key, replace(request, n=len(missing), seed=seed), missing, False)

    def index_of(self, sample: int) -> int | None:
        """Return the sample number in the ledger of a sample of `request`; None when it is there already."""
        if not self.is_whole:
            return self.missing[sample]
        return sample if sample in self.missing else None


def request_key(fingerprint: str, request: ContinuationRequest) -> str:
    """Hash what a sample depends on. The number of samples is not part of it: each has its own row."""
    asked = {k: v for k, v in request.to_json().items() if k != "n"}
    canonical = json.dumps([fingerprint, asked], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def highest_cost_usd(request: ContinuationRequest, price: ModelPrice) -> float:
    """Bound what a request can cost from above: a token for each byte sent, all samples at full length.

    Samples are priced as if each paid for the prompt, which is so where a server has no `n`.
    """
    sent = sum(len(m.content.encode("utf-8", "replace")) + 8 for m in request.messages)
    sent += len(request.prefix.encode("utf-8", "replace")) + _INSTRUCTION_TOKENS
    return price.cost_usd(sent * request.n, request.max_tokens * request.n)


_INSTRUCTION_TOKENS = 256
"""Room for a chat template and the instruction of the chat transport."""
