"""`replay:PATH[#TEACHER]`: the answers that a ledger holds, and nothing else. No key, no network, no writing."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omniopd.errors import ConfigError, RunError
from omniopd.teachers.base import Bound, ContinuationRequest, Reply, TeacherAnswer, Till
from omniopd.teachers.ledger_queries import Samples, find_samples
from omniopd.teachers.ledger_schema import connect_read_only
from omniopd.teachers.ledgered import request_key
from omniopd.types import Continuation, Missing, Usage

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Recorded:
    id: str
    marks: str
    reads_token_ids: bool

    @property
    def name(self) -> str:
        """The id with the head of the fingerprint's hash, for an id that was used with several settings."""
        return f"{self.id}#{hashlib.sha256(self.marks.encode()).hexdigest()[:8]}"


class ReplayTeacher:
    """Answer from a ledger alone, as the teacher did that it was written for.

    Its id and fingerprint are the recorded teacher's, so the same run gives the same records. A sample that is not
    there is missing, with a reason. Nothing is billed.

    Args:
        path: a ledger, never written to.
        teacher_id: which teacher, where the ledger holds answers of several: its id, or `ID#HASH` as the error lists
            them where one id was used with several settings.

    Raises:
        ConfigError: the ledger does not tell which teacher is meant.
        RunError: the file cannot be read.
    """

    def __init__(self, path: Path | str, *, teacher_id: str | None = None) -> None:
        self.source = f"replay:{path}"
        """Where the answers come from."""
        self.misses = 0
        """Samples that were asked for and are not recorded."""
        self._path = Path(path)
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        try:
            self._recorded = self._choose(teacher_id)
        except BaseException:
            self._close()
            raise

    @property
    def id(self) -> str:
        """The recorded teacher's."""
        return self._recorded.id

    @property
    def exact_samples(self) -> bool:
        return True

    @property
    def reads_token_ids(self) -> bool:
        return self._recorded.reads_token_ids

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The recorded teacher's."""
        fingerprint: dict[str, Any] = json.loads(self._recorded.marks)
        return fingerprint

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]:
        """Answer every request, in order. With a till, what is found is written to the till's ledger too, unbilled."""
        reads = self.reads_token_ids
        keys = [request_key(self._recorded.marks, request, reads_token_ids=reads) for request in requests]
        found: Samples = self._read(lambda db: find_samples(db, list(dict.fromkeys(keys))))
        usage = Usage(cached_requests=1, cost_usd=0.0)
        answers = []
        for position, (key, request) in enumerate(zip(keys, requests, strict=True)):
            samples = found.get(key, {})
            continuations = tuple(samples.get(i) or self._missing() for i in range(request.n))
            self.misses += sum(i not in samples for i in range(request.n))
            if till is not None:
                replies = [
                    Reply(position=position, sample=i, raw=c.text or "", continuation=c)
                    for i, c in enumerate(continuations)
                ]
                order = await till.order(Bound(tokens=0, usd=0.0))
                await order.settle(replies, usage, 0.0)
            answers.append(TeacherAnswer(continuations=continuations, usage=usage))
        return answers

    async def aclose(self) -> None:
        """Close the file. Safe to call twice; a later request opens it."""
        self._close()

    def _missing(self) -> Continuation:
        detail = f"no recorded answer of {self.id} in {self._path} for this request"
        return Continuation(text=None, missing=Missing.FAILED, detail=detail)

    def _choose(self, wanted: str | None) -> _Recorded:
        rows = self._read(
            lambda db: db.execute("SELECT id, fingerprint, reads_token_ids FROM teachers ORDER BY 1, 2").fetchall()
        )
        recorded = [_Recorded(teacher, marks, bool(reads)) for teacher, marks, reads in rows]
        if not recorded:
            raise ConfigError(
                f"the ledger {self._path} names no teacher, so nothing of it can be replayed; record a run with this "
                "version of omniopd first"
            )
        fitting = [teacher for teacher in recorded if wanted in (None, teacher.id, teacher.name)]
        if len(fitting) == 1:
            return fitting[0]
        lines = "".join(f"\n  {teacher.name}  {teacher.marks}" for teacher in recorded)
        problem = f"no answers of {wanted!r}" if not fitting else "answers of several teachers"
        raise ConfigError(
            f"the ledger {self._path} holds {problem}; write replay:{self._path}#NAME with one of these:{lines}"
        )

    def _read(self, run: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                if self._db is None:
                    self._db = connect_read_only(self._path)
                return run(self._db)
            except sqlite3.Error as error:
                raise RunError(f"cannot read the ledger {self._path}: {error}; is the disk in order?") from error

    def _close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None
