"""One thread that writes to one SQLite database: what waits together is committed together.

A commit costs a disk's flush; with many answers arriving at once they share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from omniopd.errors import OmniOPDError

Item = TypeVar("Item")
T = TypeVar("T")
_MOST_AT_ONCE = 512
GATHER_S = 0.002
"""How long the first answer waits for others that may share its commit."""
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@dataclass(frozen=True, slots=True, eq=False)
class Kind(Generic[Item, T]):
    """Writes that are done together, in few statements: each statement hands the interpreter to the other threads."""

    run: Callable[[sqlite3.Connection, Sequence[Item]], Sequence[T | OmniOPDError]]
    """Do them in the order they came; one that is refused must not have written anything."""
    rank: int
    """Among neighbors in the queue, lower ranks go first."""
    is_durable: bool = False
    after: Callable[[Sequence[Item]], None] | None = None
    """Called with the items once they are committed, in the writer's thread."""


@dataclass(frozen=True, slots=True, eq=False)
class _Write:
    kind: Kind[Any, Any] | None
    """None: `item` is a function of the connection, run in its place."""
    item: Any
    is_durable: bool
    future: asyncio.Future[Any] | Future[Any] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    """Where the future lives; None for a concurrent one, or when nobody waits."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    write: _Write
    value: Any
    """An exception if it failed."""

    def deliver(self) -> None:
        future = self.write.future
        if future is None or future.done():  # Done: whoever waited was cancelled.
            return
        if isinstance(self.value, Exception):
            future.set_exception(self.value)
        else:
            future.set_result(self.value)


class GroupCommit:
    """Write to a database, much in one transaction, and answer each writer once it is committed.

    One that is refused with an OmniOPDError must not have written anything: the others are committed all the same. Any
    other error undoes the transaction, and each is tried alone.

    Args:
        db: in autocommit mode; used by this object's thread alone, apart from the lock's other holders.
        lock: held during a transaction.
        explain: makes what a waiter gets of an error of SQLite.
        on_rollback: forgets what was read in a transaction that was undone.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        lock: threading.Lock,
        *,
        explain: Callable[[sqlite3.Error], Exception],
        on_rollback: Callable[[], None],
    ) -> None:
        self.commits = 0
        """Transactions so far."""
        self.flushes = 0
        """Of these, those that waited for the disk."""
        self._db = db
        self._lock = lock
        self._explain = explain
        self._on_rollback = on_rollback
        self._level = ""
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="omniopd-ledger", daemon=True)
        self._thread.start()

    def write(self, kind: Kind[Item, T], item: Item) -> asyncio.Future[T]:
        """Queue an item; the future is done once it is committed, and on the disk if durable.

        What is queued is done also when whoever waits is cancelled.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Write(kind, item, kind.is_durable, future, loop))
        return future

    def write_now(self, kind: Kind[Item, T], item: Item) -> Future[T]:
        """Queue an item, for a thread without an event loop."""
        future: Future[T] = Future()
        self._queue.put(_Write(kind, item, kind.is_durable, future))
        return future

    def write_later(self, kind: Kind[Item, T], item: Item) -> None:
        """Queue an item for which nobody waits."""
        self._queue.put(_Write(kind, item, kind.is_durable))

    def run_later(self, run: Callable[[sqlite3.Connection], object], *, is_durable: bool = False) -> None:
        """Queue a function for which nobody waits: after all that was queued before, and before all that will be."""
        self._queue.put(_Write(None, run, is_durable))

    def close(self) -> None:
        """Write what is queued, then end the thread. Nothing may be queued afterwards."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        is_open = True
        while is_open:
            waiting = [self._queue.get()]
            if waiting[0] is not None and waiting[0].is_durable:
                # More answers are about to come; each commit costs as much as several of them.
                time.sleep(GATHER_S)
            with contextlib.suppress(queue.Empty):
                while len(waiting) < _MOST_AT_ONCE:
                    waiting.append(self._queue.get_nowait())
            is_open = None not in waiting
            if writes := [write for write in waiting if write is not None]:
                self._commit(writes)

    def _commit(self, writes: Sequence[_Write]) -> None:
        try:
            outcomes = self._transact(writes)
        except Exception as error:  # The thread's boundary: nothing is swallowed, the waiters get it.
            if len(writes) > 1 and getattr(error, "sqlite_errorcode", 0) & 0xFF not in _BUSY:
                for write in writes:
                    self._commit([write])
                return
            outcomes = [_Outcome(write, self._explained(error)) for write in writes]
        else:
            for kind in {write.kind for write in writes if write.kind is not None}:
                if kind.after is not None:
                    kind.after([write.item for write in writes if write.kind is kind])
        by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
        for outcome in outcomes:
            if outcome.write.loop is None:
                outcome.deliver()
            else:
                by_loop.setdefault(outcome.write.loop, []).append(outcome)
        for loop, ready in by_loop.items():
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                loop.call_soon_threadsafe(_deliver, ready)

    def _transact(self, writes: Sequence[_Write]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        level = "FULL" if any(write.is_durable for write in writes) else "NORMAL"
        with self._lock:
            if level != self._level:
                self._db.execute(f"PRAGMA synchronous={level}")
                self._level = level
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for kind, group in _grouped(writes):
                    if kind is None:
                        values: Sequence[Any] = [write.item(self._db) for write in group]
                    else:
                        values = kind.run(self._db, [write.item for write in group])
                    outcomes += map(_Outcome, group, values)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._on_rollback()
                raise
        self.commits += 1
        self.flushes += level == "FULL"
        return outcomes

    def _explained(self, error: Exception) -> Exception:
        if not isinstance(error, sqlite3.Error):
            return error
        explained = self._explain(error)
        explained.__cause__ = error
        return explained


def _grouped(writes: Sequence[_Write]) -> Iterator[tuple[Kind[Any, Any] | None, list[_Write]]]:
    span: list[_Write] = []
    for write in (*writes, None):
        if write is not None and write.kind is not None:
            span.append(write)
            continue
        span.sort(key=lambda w: w.kind.rank if w.kind else 0)
        for kind, group in itertools.groupby(span, key=lambda w: w.kind):
            yield kind, list(group)
        span = []
        if write is not None:
            yield None, [write]


def _deliver(outcomes: Sequence[_Outcome]) -> None:
    for outcome in outcomes:
        outcome.deliver()
