"""A teacher behind a ledger: what is stored is not asked again, what is asked is stored, and the budget holds."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from omniopd.errors import ConfigError
from omniopd.teachers.base import Bound, ContinuationRequest, RecordedTeacher, Reply, TeacherAnswer
from omniopd.teachers.budget import UNLIMITED, Budget
from omniopd.teachers.cards import ModelPrice
from omniopd.teachers.ledger import PATIENCE_S, Ledger, fingerprint_text
from omniopd.teachers.ledger_entries import Claimed, Ordered
from omniopd.teachers.ledger_queries import Samples
from omniopd.types import Continuation, Missing, Usage

# These say that nothing was answered; every other reason is an answer that was paid for.
UNANSWERED = frozenset({Missing.FAILED, Missing.TIMEOUT, Missing.BUDGET})
_FIRST_POLL_S, _LONGEST_POLL_S = 0.02, 0.5


class Ledgered:
    """Put a ledger, and a budget if there is one, in front of a teacher.

    What the ledger holds is not asked again; what is missing is asked for alone. A teacher with exact samples is asked
    for the whole request again and gives the same text; any other gets a seed of its own for the rest. A request that
    is under way already, here or in another process that shares the file, is waited for; if it fails there, it is
    asked here. Failed samples are not stored. Before each HTTP request its bound is reserved, so the budget holds.

    Args:
        teacher: who answers.
        ledger: its file is closed with the teacher.
        price: needed with a budget in USD.
        budget: for all calls in the ledger together, earlier runs included.
        max_wait_s: how long a request may wait for others to turn out cheaper than their bounds before the budget
            refuses it. 0 for a teacher that orders everything before it sends anything: it would wait for itself.
        remembers: note what the answers depend on, so that they can be replayed.

    Raises:
        ConfigError: a budget in USD, and a price or a bill that is unknown.
    """

    def __init__(
        self,
        teacher: RecordedTeacher,
        ledger: Ledger,
        *,
        price: ModelPrice | None = None,
        budget: Budget = UNLIMITED,
        max_wait_s: float = PATIENCE_S,
        remembers: bool = True,
    ) -> None:
        if budget.usd is not None and price is None:
            raise ConfigError(
                f"budget_usd is {budget.usd} but the price of {teacher.id} is unknown; give it "
                "(train: teacher.price, score: --price), or limit tokens or calls instead"
            )
        if budget.usd is not None and ledger.possible()[0] is None:
            raise ConfigError(
                f"budget_usd is {budget.usd} but the ledger {ledger.path} holds calls of unknown cost; use a new ledger"
            )
        self._teacher = teacher
        self._ledger = ledger
        self._budget = budget
        self._max_wait_s = max_wait_s
        self._flights = _Flights()
        self._remembers = remembers
        self._remembered = ""

    @property
    def id(self) -> str:
        """The teacher's."""
        return self._teacher.id

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        """Answer every request, in order, from the ledger where it can.

        The bill of a request is on its first answer; all others are marked as cached. Raises what the teacher raises,
        TeacherBudgetError where a call could exceed the budget, and RunError when the ledger cannot be written.
        """
        marks = fingerprint_text(self._teacher.fingerprint)
        reads_token_ids = self._teacher.reads_token_ids
        keys = [request_key(marks, request, reads_token_ids=reads_token_ids) for request in requests]
        wanted: dict[str, ContinuationRequest] = {}
        for key, request in zip(keys, requests, strict=True):
            wanted[key] = max(wanted.get(key, request), request, key=lambda r: r.n)
        known = self._ledger.find(list(wanted))
        gaps = self._gaps(wanted, known)
        if gaps and self._remembers and marks != self._remembered:
            self._ledger.remember_teacher(self.id, self._teacher.fingerprint, reads_token_ids=reads_token_ids)
            self._remembered = marks
        bought = await self._fill(wanted, known, gaps) if gaps else {}
        answers = []
        for key, request in zip(keys, requests, strict=True):
            paid = bought.pop(key, None)
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
        try:
            await self._teacher.aclose()
        finally:
            self._ledger.close()

    def _gaps(self, wanted: Mapping[str, ContinuationRequest], known: Samples) -> list[_Gap]:
        exact = self._teacher.exact_samples
        found = (_Gap.of(key, request, known.get(key, {}), exact) for key, request in wanted.items())
        return [gap for gap in found if gap is not None]

    async def _fill(
        self, wanted: Mapping[str, ContinuationRequest], known: Samples, gaps: list[_Gap]
    ) -> dict[str, TeacherAnswer]:
        """Complete `known`; return the answers that were bought for it."""
        bought: dict[str, TeacherAnswer] = {}
        poll_s = _FIRST_POLL_S
        while gaps:
            mine, others = self._flights.take_off([gap.key for gap in gaps])
            claimed = Claimed()
            try:
                if mine:
                    claimed = await self._ledger.claim(mine)
                _merge(known, claimed.found)
                asked = self._gaps({key: wanted[key] for key in mine if key in claimed.granted}, known)
                for gap, answer in zip(asked, await self._ask(asked), strict=True):
                    bought[gap.key] = answer
                    _merge(known, {gap.key: gap.numbered(answer.continuations)})
            finally:
                self._ledger.release(claimed.granted)
                self._flights.land(mine)
            rest = {gap.key: wanted[gap.key] for gap in gaps if gap.key not in claimed.granted}
            if rest:
                is_elsewhere = len(claimed.granted) < len(mine)
                await _wait(others, poll_s, polls=is_elsewhere)
                poll_s = min(2 * poll_s, _LONGEST_POLL_S) if is_elsewhere else _FIRST_POLL_S
                _merge(known, self._ledger.find(list(rest)))
            gaps = self._gaps(rest, known)
        return bought

    async def _ask(self, gaps: Sequence[_Gap]) -> list[TeacherAnswer]:
        if not gaps:
            return []
        order = partial(self._ledger.order, teacher_id=self.id, budget=self._budget, max_wait_s=self._max_wait_s)
        till = _LedgerTill(self._ledger, order, gaps)
        try:
            return await self._teacher.continuations([gap.request for gap in gaps], till=till)
        finally:
            till.close()


class _LedgerTill:
    """Orders of one call of a teacher."""

    def __init__(self, ledger: Ledger, order: Callable[[Bound], Awaitable[Ordered]], gaps: Sequence[_Gap]) -> None:
        self.ledger = ledger
        self.gaps = gaps
        self.open: dict[int, Ordered] = {}
        self.is_closed = False
        self._order = order

    async def order(self, bound: Bound) -> _LedgerOrder:
        ordered = await self._order(bound)
        self.open[ordered.id] = ordered
        return _LedgerOrder(self, ordered)

    def close(self) -> None:
        """Settle what the teacher left open, e.g. because it was cancelled: nobody knows what became of it."""
        for ordered in self.open.values():
            self.ledger.give_up(ordered)
        self.open.clear()
        self.is_closed = True


class _LedgerOrder:
    def __init__(self, till: _LedgerTill, ordered: Ordered) -> None:
        self._till = till
        self._ordered = ordered

    async def settle(self, replies: Sequence[Reply], usage: Usage, seconds: float) -> None:
        is_open = self._till.open.pop(self._ordered.id, None) is not None
        # Late, it counts twice: as possibly spent since the call ended, and as what it was. But no answer is lost.
        assert is_open or self._till.is_closed, "an order is settled once"
        samples = []
        for reply in replies:
            gap = self._till.gaps[reply.position]
            number = gap.number_of(reply.sample)
            if number is not None and reply.continuation.missing not in UNANSWERED:
                samples.append((gap.key, number, reply))
        await self._till.ledger.settle(self._ordered, samples, usage, seconds)


class _Flights:
    """Requests under way in this process, so that a second one need not poll for the first. Any thread, any loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._landings: dict[str, Future[None]] = {}

    def take_off(self, keys: Iterable[str]) -> tuple[list[str], list[Future[None]]]:
        """Return the keys that were free and are now under way, and the landings of the others."""
        mine, others = [], []
        with self._lock:
            for key in keys:
                landing = self._landings.get(key)
                if landing is None:
                    self._landings[key] = Future()
                    mine.append(key)
                else:
                    others.append(landing)
        return mine, others

    def land(self, keys: Iterable[str]) -> None:
        """Wake whoever waits for the keys, whatever became of them."""
        with self._lock:
            landings = [self._landings.pop(key) for key in keys]
        for landing in landings:
            # A waiter that was cancelled may have cancelled it; then nobody else may learn of it, and they poll.
            if landing.set_running_or_notify_cancel():
                landing.set_result(None)


async def _wait(landings: Sequence[Future[None]], poll_s: float, *, polls: bool) -> None:
    """Wait for the landings, and no longer than until the next poll if there is one."""
    if not landings:
        await asyncio.sleep(poll_s)
    else:
        # `wait` leaves what it waits for alone when it is cancelled itself.
        await asyncio.wait([asyncio.wrap_future(f) for f in landings], timeout=poll_s if polls else None)


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
        # Their seeds follow from their numbers, so that an interrupted request ends as it would have.
        return cls(key, replace(request, n=len(missing), sample_numbers=missing), missing, False)

    def number_of(self, sample: int) -> int | None:
        """Return the number in the ledger of a sample of `request`; None when it is there already."""
        if not self.is_whole:
            return self.missing[sample]
        return sample if sample in self.missing else None

    def numbered(self, continuations: Sequence[Continuation]) -> dict[int, Continuation]:
        """Return the samples that were missing, by their number in the ledger."""
        numbers = (self.number_of(i) for i in range(len(continuations)))
        return {n: c for n, c in zip(numbers, continuations, strict=True) if n is not None}


def _merge(known: Samples, new: Samples) -> None:
    for key, samples in new.items():
        for number, continuation in samples.items():
            known.setdefault(key, {}).setdefault(number, continuation)


def request_key(marks: str, request: ContinuationRequest, *, reads_token_ids: bool) -> str:
    """Hash what a sample depends on: the teacher's fingerprint and the request.

    The number of samples is not part of it: each has its own row. Token ids are, for a teacher that reads them.
    """
    asked = {
        "messages": [{"content": m.content, "role": m.role} for m in request.messages],
        "prefix": request.prefix,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }
    if reads_token_ids and request.token_ids is not None:
        asked["token_ids"] = request.token_ids
    canonical = json.dumps([marks, asked], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
