"""The ledger: every paid answer on disk before it is used, never paid twice, and never more spent than allowed.

SQLite in WAL mode; several processes may share a file. Prompts are stored as hashes only, answers in full, keys never.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omniopd.errors import OmniOPDError, RunError
from omniopd.teachers.base import Bound, Reply
from omniopd.teachers.budget import UNLIMITED, Budget
from omniopd.teachers.group_commit import GroupCommit, Kind
from omniopd.teachers.ledger_entries import Bill, Claim, Claimed, InFlight, Ordered, Wish
from omniopd.teachers.ledger_queries import (
    INSERT_CALLS,
    INSERT_CLAIMS,
    INSERT_ORDERS,
    INSERT_SAMPLES,
    POSSIBLE,
    SPENT,
    RunningSums,
    Samples,
    bury,
    delete_claims,
    delete_orders,
    find_samples,
    insert_lost,
    insert_rows,
)
from omniopd.teachers.ledger_schema import connect
from omniopd.teachers.order_notes import Note, OrderNotes, noting_owners, read_notes, take_notes
from omniopd.teachers.owners import Owner, is_alive, live_owners, owners_folder
from omniopd.types import Usage

T = TypeVar("T")
_COUNTS = (
    *("requests", "unanswered_requests", "input_tokens", "output_tokens"),
    *("cached_input_tokens", "cache_write_tokens", "reasoning_tokens"),
)
PATIENCE_S = 600.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.005, 0.25


class Ledger:
    """The store of answers and bills.

    `:memory:` keeps it for the life of the object. A closed file is opened again by the next call. Calls may come from
    several threads and event loops. All writes go through one thread, which commits together what arrives together:
    an answer is acknowledged once it is on the disk. Raises RunError when the file is no ledger, cannot be written, or
    is locked by another process for a minute.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self._gate = threading.Lock()
        self._read_lock = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._writer: GroupCommit | None = None
        self._writer_db: sqlite3.Connection | None = None
        self._owner: Owner | None = None
        self._notes: OrderNotes | None = None
        self._numbers = itertools.count(1)
        self._held: set[str] = set()
        self._billed: set[int] = set()
        """Orders whose bills are in the transaction that is being written."""
        self._funds = RunningSums()
        # What was settled or released counts before anything else is claimed or ordered.
        self._releases = Kind(self._release, rank=0)
        self._bills = Kind(self._settle, rank=1, is_durable=True, after=self._strike)
        self._claims = Kind(self._claim, rank=2)
        self._orders = Kind(self._reserve, rank=3)
        with self._read_lock:
            self._open_reader()

    # Reading.

    def find(self, keys: Sequence[str]) -> Samples:
        """Return the stored samples of each key, by sample number; keys without any are left out."""
        return self._read(lambda db: find_samples(db, keys)) if keys else {}

    def spent(self) -> Usage:
        """Sum the bills of all calls. The cost is None as soon as one of them is unknown.

        Requests that were never answered are counted and cost nothing here: see `possible`.
        """
        row = self._read(lambda db: db.execute(SPENT).fetchone())
        *counts, cost, is_unknown = row
        counted = {name: int(count) for name, count in zip(_COUNTS, counts, strict=True)}
        return Usage(**counted, cost_usd=None if is_unknown else cost)

    def possible(self) -> tuple[float | None, int]:
        """Return the USD and tokens that may have been billed besides, at most, for requests that were never answered.

        The USD are None when nobody can bound them: a price was unknown.
        """
        usd, tokens, is_unknown = self._read(lambda db: db.execute(POSSIBLE).fetchone())
        lost = [order.bound for order in self.in_flight() if not order.is_alive]
        is_unknown = is_unknown or any(bound.usd is None for bound in lost)
        tokens = int(tokens) + sum(bound.tokens for bound in lost)
        return None if is_unknown else usd + sum(bound.usd or 0.0 for bound in lost), tokens

    def in_flight(self) -> list[InFlight]:
        """Return the requests under way of all processes, and those of dead ones that nobody has tidied up yet."""
        rows = self._read(lambda db: db.execute("SELECT owner, teacher, time, tokens, usd FROM orders").fetchall())
        noted: dict[str, Iterable[Note]] = {}
        if self._folder is not None:
            noted = {owner: read_notes(self._folder, owner) for owner in noting_owners(self._folder)}
        if self._owner is not None and self._notes is not None:
            noted[self._owner.id] = list(self._notes.open.values())
        rows += [(owner, *note[1:]) for owner, notes in noted.items() for note in notes]
        alive = {owner: self._knows_alive(owner) for owner in {row[0] for row in rows}}
        return [
            InFlight(owner=owner, teacher=teacher, time=at, bound=Bound(tokens=tokens, usd=usd), is_alive=alive[owner])
            for owner, teacher, at, tokens, usd in sorted(rows, key=lambda row: row[2])
        ]

    @property
    def commits(self) -> int:
        """Transactions that were written since the file was opened."""
        return self._writer.commits if self._writer else 0

    @property
    def flushes(self) -> int:
        """Of these, those that waited for the disk."""
        return self._writer.flushes if self._writer else 0

    # Writing.

    async def claim(self, keys: Sequence[str]) -> Claimed:
        """Claim keys to ask for, those that no live owner holds; release them afterwards.

        A key is held once, also within this process. What is granted is looked up again, so that an answer that came
        in before the claim is not bought again.
        """
        claim = Claim(tuple(keys))
        try:
            return await self._start().write(self._claims, claim)
        except BaseException:
            # Cancelled, it may be granted by now or soon; the writer fills it in before it gets to the release.
            self._start().run_later(lambda db: self._release(db, [claim.granted]))
            raise

    def release(self, keys: Iterable[str]) -> None:
        """Give granted claims up. Does not wait."""
        if keys := list(keys):
            self._start().write_later(self._releases, keys)

    async def order(
        self, bound: Bound, *, teacher_id: str, budget: Budget = UNLIMITED, max_wait_s: float = PATIENCE_S
    ) -> Ordered:
        """Reserve the bound for one HTTP request, against all that was ever spent and all that others have reserved.

        Without a limit there is nothing to reserve: the request is noted as under way, and counts once it is settled.
        Waits for a while if the budget covers what is spent but not what is under way besides: bounds are high, and
        most answers turn out cheaper.

        Raises:
            TeacherBudgetError: the budget does not cover it.
            ConfigError: a budget in USD, and a price or a bill that is unknown.
        """
        order = Ordered(next(self._numbers), teacher_id, bound)
        if not budget.is_limited:
            # Nothing can refuse it, so nobody has to wait for a transaction.
            self._start()
            self._known_notes().add(order)
            return order
        wait_s, deadline = _FIRST_WAIT_S, time.monotonic() + max_wait_s
        try:
            while not await self._start().write(self._orders, Wish(order, budget, deadline)):
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        except asyncio.CancelledError:
            # It may be reserved already; it was certainly not sent.
            self._start().run_later(lambda db: delete_orders(db, self._known_owner().id, [order.id]))
            raise
        return order

    async def settle(
        self, order: Ordered, samples: Sequence[tuple[str, int, Reply]], usage: Usage, seconds: float
    ) -> None:
        """Write one bill and its samples, by key and sample number; they are on the disk when this returns.

        A sample that is there already stays as it is; the bill counts all the same. It is written also when the wait
        for it is cancelled.
        """
        await self._start().write(self._bills, Bill.of(order, samples, usage, seconds))

    def give_up(self, order: Ordered) -> None:
        """Settle a request whose answer nobody will see: its bound counts as possibly spent. Does not wait."""
        usage = Usage(requests=1, unanswered_requests=1, cost_usd=None if order.bound.usd is None else 0.0)
        self._start().write_later(self._bills, Bill.of(order, (), usage, 0.0))

    def add(self, teacher_id: str, samples: Sequence[tuple[str, int, Reply]], usage: Usage, seconds: float) -> None:
        """Write a bill that had no order, and its samples. Blocks until they are on the disk."""
        bill = Bill.of(Ordered(0, teacher_id, Bound(tokens=0)), samples, usage, seconds)
        self._start().write_now(self._bills, bill).result()

    def remember_teacher(self, teacher_id: str, fingerprint: Mapping[str, Any], *, reads_token_ids: bool) -> None:
        """Write down what answers from this ledger depend on, so that they can be replayed. Does not wait."""
        row = (teacher_id, fingerprint_text(fingerprint), reads_token_ids)
        self._start().run_later(lambda db: db.execute("INSERT OR REPLACE INTO teachers VALUES (?, ?, ?)", row))

    def close(self) -> None:
        """Write what is queued and close the file. Safe to call twice."""
        with self._gate:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.run_later(self._bury_own, is_durable=True)
                writer.close()
                self._known_notes().close()
                self._known_owner().close()
                if self._writer_db is not None and self.path != ":memory:":
                    self._writer_db.close()
            self._owner = self._notes = self._writer_db = None
            self._held.clear()
            self._funds = RunningSums()
        with self._read_lock:
            if self._reader is not None and self.path != ":memory:":
                self._reader.close()
                self._reader = None

    # In the writer's thread, within a transaction.

    def _claim(self, db: sqlite3.Connection, claims: Sequence[Claim]) -> list[Claimed]:
        owner = self._known_owner()
        for claim in claims:
            self._held.difference_update(claim.granted)  # Of a transaction that was undone.
            claim.granted.clear()
        rows = [(key, owner.id) for claim in claims for key in claim.keys]
        taken = {key for (key,) in insert_rows(db, INSERT_CLAIMS, rows, "RETURNING key")}
        for claim in claims:
            for key in claim.keys:
                if key not in self._held and (key in taken or self._take(key, owner, db)):
                    claim.granted.append(key)
                    self._held.add(key)
        found = find_samples(db, [key for claim in claims for key in claim.granted])
        return [
            Claimed(granted=frozenset(c.granted), found={key: found[key] for key in c.granted if key in found})
            for c in claims
        ]

    def _take(self, key: str, owner: Owner, db: sqlite3.Connection) -> bool:
        """Take a key that nobody alive holds."""
        while not insert_rows(db, INSERT_CLAIMS, [(key, owner.id)], "RETURNING key"):
            (other,) = db.execute("SELECT owner FROM claims WHERE key = ?", (key,)).fetchone()
            if other == owner.id:
                return True  # Nobody here holds it: its release could not be written.
            if owner.knows_alive(other):
                return False
            self._bury(db, other)
        return True

    def _release(self, db: sqlite3.Connection, released: Sequence[Sequence[str]]) -> list[None]:
        keys = [key for part in released for key in part]
        self._held.difference_update(keys)
        delete_claims(db, self._known_owner().id, keys)
        return [None] * len(released)

    def _reserve(self, db: sqlite3.Connection, wishes: Sequence[Wish]) -> list[bool | OmniOPDError]:
        is_covered: list[bool | OmniOPDError] = []
        rows: list[tuple[Any, ...]] = []
        for wish in wishes:
            order = wish.order
            try:
                insert_rows(db, INSERT_ORDERS, rows)  # Those before it are under way as well.
                rows.clear()
                is_covered.append(self._covers(wish, db))
            except OmniOPDError as error:
                is_covered.append(error)
            if is_covered[-1] is True:
                bound = order.bound
                rows.append((self._known_owner().id, order.id, order.teacher_id, time.time(), bound.tokens, bound.usd))
        insert_rows(db, INSERT_ORDERS, rows)
        return is_covered

    def _covers(self, wish: Wish, db: sqlite3.Connection) -> bool:
        covers = partial(wish.budget.covers, wish.order.bound, teacher_id=wish.order.teacher_id)
        may_wait = time.monotonic() < wish.deadline
        if covers(self._funds.read(db), may_wait=may_wait):
            return True
        self._bury_the_dead(db)  # Theirs is not under way, and nothing to wait for.
        return covers(self._funds.read(db), may_wait=may_wait)

    def _settle(self, db: sqlite3.Connection, bills: Sequence[Bill]) -> list[None]:
        noted = self._known_notes().open
        self._billed.update(bill.order for bill in bills)
        delete_orders(db, self._known_owner().id, [bill.order for bill in bills if bill.order not in noted])
        (last,) = db.execute("SELECT ifnull(MAX(id), 0) FROM calls").fetchone()
        numbered = list(enumerate(bills, start=last + 1))
        insert_rows(db, INSERT_CALLS, [(call, *bill.amounts) for call, bill in numbered])
        samples = [(key, i, call, *texts) for call, bill in numbered for key, i, *texts in bill.samples]
        insert_rows(db, INSERT_SAMPLES, samples)
        return [None] * len(bills)

    def _strike(self, bills: Sequence[Bill]) -> None:
        self._known_notes().strike(bill.order for bill in bills)
        self._billed.clear()

    def _bury(self, db: sqlite3.Connection, owner: str) -> None:
        """Tidy up after an owner that is gone."""
        if self._folder is not None:
            insert_lost(db, take_notes(self._folder, owner))
        bury(db, owner)

    def _bury_own(self, db: sqlite3.Connection) -> None:
        notes = self._known_notes().open.values()
        insert_lost(db, [note for note in notes if note[0] not in self._billed])
        bury(db, self._known_owner().id)

    def _bury_the_dead(self, db: sqlite3.Connection) -> None:
        owner = self._known_owner()
        for other in noting_owners(self._folder) if self._folder is not None else ():
            if not owner.knows_alive(other):
                self._bury(db, other)
        for (other,) in db.execute("SELECT owner FROM orders UNION SELECT owner FROM claims").fetchall():
            if not owner.knows_alive(other):
                self._bury(db, other)

    # Connections.

    def _start(self) -> GroupCommit:
        with self._gate:
            if self._writer is None:
                if self.path == ":memory:":
                    db, lock = self._open_reader(), self._read_lock
                else:
                    db, lock = self._connect(), threading.Lock()
                try:
                    self._owner = Owner(None if self.path == ":memory:" else self.path)
                    self._notes = OrderNotes(self._folder, self._owner.id)
                    live_owners(self.path)  # Removes what the dead left.
                except OSError as error:
                    db.close()
                    raise RunError(f"cannot lock the ledger {self.path}: {error}; is the disk full?") from error
                self._writer_db = db
                self._writer = GroupCommit(db, lock, explain=self._explain, on_rollback=self._forget)
                self._writer.run_later(self._bury_the_dead)
            return self._writer

    def _read(self, run: Callable[[sqlite3.Connection], T]) -> T:
        with self._read_lock:
            try:
                return run(self._open_reader())
            except sqlite3.Error as error:
                raise RunError(f"cannot read the ledger {self.path}: {error}; is the disk in order?") from error

    def _open_reader(self) -> sqlite3.Connection:
        if self._reader is None:
            self._reader = self._connect()
        return self._reader

    def _connect(self) -> sqlite3.Connection:
        try:
            return connect(self.path)
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"cannot open the ledger {self.path}: {error}; is it a ledger, and is the disk full?"
            ) from error

    @property
    def _folder(self) -> Path | None:
        return None if self.path == ":memory:" else owners_folder(self.path)

    def _known_notes(self) -> OrderNotes:
        assert self._notes is not None, "the writer runs only while the owner is known"
        return self._notes

    def _known_owner(self) -> Owner:
        assert self._owner is not None, "the writer runs only while the owner is known"
        return self._owner

    def _knows_alive(self, owner: str) -> bool:
        if self._owner is not None:
            return self._owner.knows_alive(owner)
        return self.path != ":memory:" and is_alive(owners_folder(self.path), owner)

    def _forget(self) -> None:
        self._billed.clear()
        self._funds = RunningSums()

    def _explain(self, error: sqlite3.Error) -> RunError:
        return RunError(f"cannot write to the ledger {self.path}: {error}; free the disk, then --resume")


def fingerprint_text(fingerprint: Mapping[str, Any]) -> str:
    """Return the canonical JSON of a teacher's fingerprint."""
    return json.dumps(fingerprint, sort_keys=True)
