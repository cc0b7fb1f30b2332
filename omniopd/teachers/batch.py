"""A teacher behind a half-price batch endpoint: the same answers, hours later.

For offline scoring, where waiting is acceptable. Give it all requests in one call: each call waits for its batches.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from omniopd.concurrency import all_done
from omniopd.errors import ConfigError, TeacherCapabilityError
from omniopd.teachers.base import Bound, ContinuationRequest, Order, Reply, TeacherAnswer, Till
from omniopd.teachers.batch_endpoints import AnthropicBatches, BatchEndpoint, OpenAIBatches, Outcome
from omniopd.teachers.batch_journal import Intent, Journal
from omniopd.teachers.batch_waiting import EndedBatch, PatientEndpoint, Progress, Sleep
from omniopd.teachers.cards import Card, ModelPrice, Transport
from omniopd.teachers.dialects.base import Ask, Dialect, HttpCall, Parsed
from omniopd.teachers.plan import priced
from omniopd.types import Continuation, Missing, Usage

_ENDPOINTS: Mapping[str, type[OpenAIBatches] | type[AnthropicBatches]] = {
    "openai": OpenAIBatches,
    "anthropic": AnthropicBatches,
}


class Planner(Protocol):
    """How one teacher is asked (`plan.Plan` is one)."""

    @property
    def teacher_id(self) -> str: ...
    @property
    def base_url(self) -> str: ...
    @property
    def card(self) -> Card: ...
    @property
    def dialect(self) -> Dialect: ...
    @property
    def transport(self) -> Transport: ...
    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def asks(self, request: ContinuationRequest) -> list[tuple[Ask, tuple[int, ...]]]:
        """Return the HTTP requests, each with the numbers of the samples that it brings."""
        ...

    def call(self, ask: Ask) -> HttpCall:
        """Word one of them."""
        ...

    def bound(self, ask: Ask, price: ModelPrice | None) -> Bound:
        """Return the most that it can cost."""
        ...

    def replies(
        self, position: int, request: ContinuationRequest, samples: tuple[int, ...], parsed: Parsed
    ) -> list[Reply]:
        """Make samples of its answer. Choices that did not come back have no reply."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One HTTP request of a batch."""

    id: str
    """The same in every process that asks the same."""
    ask: Ask
    samples: tuple[int, ...]
    call: HttpCall


@dataclass(slots=True, kw_only=True)
class _Job:
    """One request for continuations on its way."""

    key: str
    position: int
    request: ContinuationRequest
    items: tuple[_Item, ...]
    orders: dict[str, Order] = field(default_factory=dict)
    """By item, those that are not settled yet."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    answer: TeacherAnswer | None = None


class BatchTeacher:
    """Send what is asked through a batch endpoint and wait for it.

    Nothing is lost and nothing is paid twice: before a batch is submitted its intent is on disk, with a random token
    that the server keeps (in OpenAI's metadata, in each custom id). A process that finds an intent without a batch id
    looks for the token at the server and adopts the batch. At Anthropic only results show the custom ids: there a
    running batch of the same age and size has to end before it is known whose it is. For this to hold, the next process
    must ask the same requests; a ledger that lacks them does.

    Money: the bounds of all requests of a call are ordered before the first submit, so a call that the budget does not
    cover buys nothing. The samples of a request are settled together when its last result is read: after a crash the
    ledger has all of them or none. When a call ends early, what it ordered is released although the batch runs on; the
    next call orders it again before it reads a result. Failed and expired requests are not billed by either provider
    and cost 0 here.

    A sample whose request failed, or expired after 24 hours, is FAILED with the server's reason; asking again buys it
    anew. One process at a time may use a state file.

    Args:
        plan: how the teacher is asked; its card has the dialect `openai` or `anthropic` and `can.batch_api`.
        api_key: never shown or written.
        ledger: submitted batches are kept beside it, in `LEDGER.batches.jsonl`.
        price: without the discount; its `batch_factor` is applied here. None: unknown.
        max_batch_requests: for smaller batches than the server allows, where an account may queue less.
        progress: called after each poll.
        sleep: replaces the pause between polls in tests.
        timeout_s: for one HTTP exchange with the endpoint; uploads and downloads may be large.

    Raises:
        TeacherCapabilityError: the card has no batch endpoint that is known here, at construction.
    """

    def __init__(
        self,
        plan: Planner,
        *,
        api_key: str | None,
        ledger: Path,
        price: ModelPrice | None = None,
        max_batch_requests: int | None = None,
        progress: Progress | None = None,
        sleep: Sleep = asyncio.sleep,
        timeout_s: float = 600.0,
    ) -> None:
        card = plan.card
        if not card.can.batch_api or card.dialect not in _ENDPOINTS:
            raise TeacherCapabilityError(
                f"the teacher {plan.teacher_id} has no batch endpoint (card {card.id}: dialect {card.dialect}, "
                f"can.batch_api {card.can.batch_api}); expected can.batch_api and the dialect "
                f"{' or '.join(_ENDPOINTS)}; ask it without batches"
            )
        if max_batch_requests is not None and max_batch_requests < 1:
            raise ConfigError(f"max_batch_requests is {max_batch_requests}; expected at least 1")
        self._plan = plan
        self._api_key = api_key
        self._price = None if price is None else discounted(price)
        self._max_batch_requests = max_batch_requests
        self._progress = progress or (lambda done, total: None)
        self._sleep = sleep
        self._timeout_s = timeout_s
        self._service = f"{card.dialect}:{plan.base_url}"
        self._journal = Journal(ledger.with_name(f"{ledger.name}.batches.jsonl"))
        self._claimed: set[str] = set()
        # Two calls that submit at once could both find a third one's intent without an id.
        self._submits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"BatchTeacher({self.id!r}, base_url={self._plan.base_url!r}, state={str(self._journal.path)!r})"

    @property
    def id(self) -> str:
        """`provider:model`"""
        return self._plan.teacher_id

    @property
    def exact_samples(self) -> bool:
        """False: no batch endpoint promises the same samples for the same request."""
        return False

    @property
    def reads_token_ids(self) -> bool:
        """Whether the student's token ids are what is sent."""
        return self._plan.transport == "tokens"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The plan's: what a batch answered is not asked again without one, and the other way round."""
        return self._plan.fingerprint

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]:
        """Answer every request, in order, when its batch has ended. Identical requests share their samples.

        Raises TeacherBudgetError before anything is submitted, and TeacherAuthError, TeacherRateLimitError (a quota is
        used up), TeacherConnectionError, TeacherTimeoutError and RunError with submitted batches kept: the same call
        goes on waiting for them.
        """
        if not requests:
            return []
        self._journal.open()
        wanted: dict[ContinuationRequest, tuple[int, ContinuationRequest]] = {}
        for position, request in enumerate(requests):
            first, largest = wanted.get(self._identity(request), (position, request))
            wanted[self._identity(request)] = (first, max(largest, request, key=lambda r: r.n))
        marks = json.dumps([self._service, self.fingerprint], sort_keys=True)
        jobs = {same: self._job(marks, same, *first) for same, first in wanted.items()}
        try:
            await self._answer(list(jobs.values()), till)
        finally:
            self._claimed.difference_update(item.id for job in jobs.values() for item in job.items)
        return [
            _answer_of(jobs[self._identity(request)], position, request) for position, request in enumerate(requests)
        ]

    async def aclose(self) -> None:
        """Give the state file back. Safe to call twice; batches run on at the server."""
        self._journal.close()

    def _identity(self, request: ContinuationRequest) -> ContinuationRequest:
        return replace(request, n=1, token_ids=request.token_ids if self.reads_token_ids else None)

    def _job(self, marks: str, same: ContinuationRequest, position: int, request: ContinuationRequest) -> _Job:
        name = json.dumps([marks, same.to_json(), request.n], sort_keys=True)
        key = hashlib.sha256(name.encode()).hexdigest()
        items = tuple(
            _Item(id=self._claim(f"{key} {samples}"), ask=ask, samples=samples, call=self._plan.call(ask))
            for ask, samples in self._plan.asks(request)
        )
        return _Job(key=key, position=position, request=request, items=items)

    def _claim(self, name: str) -> str:
        """Return the item's id. A call that asks the same at the same time gets another one, and its own samples."""
        occurrence = 0
        while True:
            # 40 + 1 + 16 of the token: Anthropic takes 64 characters.
            id = hashlib.sha256(f"{name} {occurrence}".encode()).hexdigest()[:40]
            if id not in self._claimed:
                self._claimed.add(id)
                return id
            occurrence += 1

    async def _answer(self, jobs: Sequence[_Job], till: Till | None) -> None:
        card = self._plan.card
        endpoint = _ENDPOINTS[card.dialect](
            base_url=self._plan.base_url,
            headers=self._plan.dialect.headers(card, self._api_key),
            api_key=self._api_key,
            timeout_s=self._timeout_s,
        )
        patient = PatientEndpoint(
            endpoint=endpoint,
            journal=self._journal,
            base_url=self._plan.base_url,
            sleep=self._sleep,
            progress=self._progress,
        )
        try:
            if till is not None:
                await all_done(self._order(job, item, till) for job in jobs for item in job.items)
            async with endpoint:
                async with self._submits.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
                    for intent in self._batches(jobs):
                        if intent.batch_id is None:
                            await patient.adopt(intent)
                    await self._submit(patient, jobs)
                async with aclosing(patient.ended(self._batches(jobs))) as batches:
                    async for batch in batches:
                        await self._deliver(jobs, batch)
        finally:
            await all_done(order.settle((), Usage(cost_usd=0.0), 0.0) for job in jobs for order in job.orders.values())

    async def _order(self, job: _Job, item: _Item, till: Till) -> None:
        job.orders[item.id] = await till.order(self._plan.bound(item.ask, self._price))

    def _batches(self, jobs: Sequence[_Job]) -> list[Intent]:
        found = (self._journal.batch_of(item.id) for job in jobs for item in job.items)
        return list({intent.token: intent for intent in found if intent is not None}.values())

    async def _submit(self, patient: PatientEndpoint, jobs: Sequence[_Job]) -> None:
        """Submit what no batch holds yet."""
        keys = {item.id: job.key for job in jobs for item in job.items}
        fresh = [item for job in jobs for item in job.items if self._journal.batch_of(item.id) is None]
        for items in self._split(patient.endpoint, fresh):
            intent = Intent(
                token=secrets.token_hex(8),
                time=time.time(),
                service=self._service,
                path=items[0].call.path,
                items={item.id: {"key": keys[item.id], "samples": list(item.samples)} for item in items},
            )
            lines = [patient.endpoint.line(intent.custom_id(i.id), i.call.path, i.call.body) for i in items]
            await patient.submit(intent, lines)

    def _split(self, endpoint: BatchEndpoint, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        """Cut into batches of one path each, within the endpoint's limits."""
        most = min(endpoint.max_requests, self._max_batch_requests or endpoint.max_requests)
        for path in dict.fromkeys(item.call.path for item in items):
            batch: list[_Item] = []
            size = 0
            for item in (item for item in items if item.call.path == path):
                # 64 for the custom id, 64 for the comma, the brackets and the like around all of them.
                length = len(endpoint.line("x" * 64, path, item.call.body)) + 64
                if batch and (len(batch) == most or size + length > endpoint.max_bytes):
                    yield batch
                    batch, size = [], 0
                batch.append(item)
                size += length
            if batch:
                yield batch

    async def _deliver(self, jobs: Sequence[_Job], batch: EndedBatch) -> None:
        """Settle the requests whose last results these are."""
        intent = batch.intent
        complete = []
        for job in jobs:
            for item in job.items:
                # An item that failed before is in an older batch too.
                if (newest := self._journal.batch_of(item.id)) is not None and newest.token == intent.token:
                    failed = Outcome(failure=batch.reason)
                    job.outcomes[item.id] = batch.outcomes.get(intent.custom_id(item.id), failed)
            if job.answer is None and len(job.outcomes) == len(job.items):
                complete.append(job)
        seconds = max(0.0, time.time() - intent.time)
        try:
            await all_done(self._settle(job, seconds) for job in complete)
        finally:
            self._journal.settled([item.id for job in complete if job.answer is not None for item in job.items])

    async def _settle(self, job: _Job, seconds: float) -> None:
        replies: list[Reply] = []
        bills: list[Usage] = []
        failures: dict[int, str] = {}
        for item in job.items:
            got, billed, failure = self._read(job, item)
            replies += got
            bills.append(billed)
            failures |= dict.fromkeys(item.samples, failure)
        orders, job.orders = job.orders, {}
        # All samples with the first bill: a crash between two bills must not leave half a request to be asked anew.
        await all_done(
            orders[item.id].settle(replies if item is job.items[0] else (), bill, seconds)
            for item, bill in zip(job.items, bills, strict=True)
            if orders
        )
        texts = {reply.sample: reply.continuation for reply in replies}
        job.answer = TeacherAnswer(
            continuations=tuple(
                texts.get(i) or Continuation(text=None, missing=Missing.FAILED, detail=failures.get(i, "not asked for"))
                for i in range(job.request.n)
            ),
            usage=sum(bills, Usage()),
            seconds=seconds,
        )

    def _read(self, job: _Job, item: _Item) -> tuple[list[Reply], Usage, str]:
        """Return the samples, the bill, and what to say of samples that did not come."""
        outcome = job.outcomes[item.id]
        if outcome.body is None:
            return [], Usage(requests=1, cost_usd=0.0), outcome.failure
        try:
            parsed = self._plan.dialect.read(outcome.body, item.ask)
        except ValueError as error:
            return [], Usage(requests=1), f"the answer is no completion: {error}"
        replies = self._plan.replies(job.position, job.request, item.samples, parsed)
        lacking = f"the server gave {len(replies)} of {len(item.samples)} samples"
        return replies, self._billed(parsed.usage), lacking

    def _billed(self, usage: Usage | None) -> Usage:
        return Usage(requests=1) if usage is None else priced(usage, self._price)


def discounted(price: ModelPrice) -> ModelPrice:
    """Return what a batch pays.

    Example:
        >>> discounted(ModelPrice(input_usd_per_mtok=2.0, output_usd_per_mtok=8.0)).output_usd_per_mtok
        4.0
    """
    factor = price.batch_factor
    full = price.model_dump(exclude={"batch_factor"})
    paid = {name: None if usd is None else usd * factor for name, usd in full.items()}
    return ModelPrice.model_validate({**paid, "batch_factor": 1.0})


def _answer_of(job: _Job, position: int, request: ContinuationRequest) -> TeacherAnswer:
    assert job.answer is not None
    # The bill lies with the first of those that share the samples.
    usage = job.answer.usage if position == job.position else Usage()
    return replace(job.answer, continuations=job.answer.continuations[: request.n], usage=usage)
