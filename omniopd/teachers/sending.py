"""One HTTP request on its way: its turn, its order, its attempts, and what comes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omniopd.errors import OmniOPDError
from omniopd.teachers.base import ContinuationRequest, Order, Reply, Till
from omniopd.teachers.cards import ModelPrice
from omniopd.teachers.dialects.base import Ask, Parsed
from omniopd.teachers.limiter import Limiter, Slot
from omniopd.teachers.plan import Plan, priced
from omniopd.teachers.repair import used_up_by_thinking
from omniopd.teachers.retry import MAX_SERVER_WAIT_S, FaultKind, RequestFault, fault_of_status
from omniopd.teachers.spec import is_loopback
from omniopd.teachers.wire import HttpClient, HttpReply
from omniopd.types import Continuation, Missing, Usage

MAX_HEADROOM_TOKENS = 16_384
"""The most room that is given to a model that thinks."""
SHORT_ANSWERS = 3
"""So many answers in a row with a single sample, and no complete one, show that a server ignores `n`."""
MIN_KEY_LENGTH = 12
"""Shorter keys are made up, and would be found in innocent text."""
_CHARACTERS_PER_TOKEN = 3
"""For the rate limit, which is about what is likely; budgets use a bound."""


@dataclass(slots=True)
class Wanted:
    """A request that is really asked: the first of those that are identical, with the largest n of them."""

    request: ContinuationRequest
    position: int
    cuts: tuple[int, ...] = ()
    """Where shorter prefixes of the same answer end."""
    samples: dict[int, Continuation] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Flight:
    """One call of `continuations`."""

    till: Till | None
    fatal: OmniOPDError | None = None
    """Once set, nothing more is sent; what is under way may still arrive and is written down."""
    waiting: set[asyncio.Task[Any]] = field(default_factory=set)
    """Those whose turn has not come."""

    def stop(self, error: OmniOPDError) -> None:
        """Let nothing more be sent, and nobody wait for the right to."""
        if self.fatal is None:
            self.fatal = error
            for task in self.waiting:
                task.cancel()


class Stopped(Exception):
    """Raised where a request was to be sent after its call was over."""


class Endpoint:
    """One server as it is known by now: how to reach it, and what it turned out to do. Shared by all requests to it.

    Args:
        plan: how it is asked.
        api_key: never shown; None for servers that ask for none.
        limiter: shared by all who use the same address with the same key.
        price: None when unknown; the cost is then None too, unless the server reports it.
        timeout_s: for one attempt.
    """

    def __init__(
        self, plan: Plan, *, api_key: str | None, limiter: Limiter, price: ModelPrice | None, timeout_s: float
    ) -> None:
        self.plan = plan
        self.limiter = limiter
        self.price = price
        self.has_key = api_key is not None
        self.was_reached = False
        self.largest_n = plan.largest_n
        """How many samples one request may ask for, as far as is known."""
        self.headroom_tokens = plan.card.thinking.headroom_tokens
        """Added to the limit for what the model thinks."""
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._headers = plan.dialect.headers(plan.card, api_key)
        # A proxy from the environment has no business with a server on this machine.
        self._client = HttpClient(trust_env=not is_loopback(plan.base_url))
        self._short_answers = 0
        self._honors_n = False

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._client.aclose()

    def note_count(self, count: int, asked: int) -> None:
        """Stop asking for several samples at once where the server keeps sending one."""
        self._short_answers = self._short_answers + 1 if count == 1 else 0
        if count == asked:
            self._honors_n = True
        if self._short_answers >= SHORT_ANSWERS and not self._honors_n:
            self.largest_n = 1

    def make_room(self, had: int, thought: int) -> None:
        """Learn how long the model thinks: all that it spent, and half as much again; at least double what it had."""
        wanted = min(MAX_HEADROOM_TOKENS, max(2 * had, thought * 3 // 2 + 256))
        self.headroom_tokens = max(self.headroom_tokens, wanted)

    async def exchange(self, path: str, body: bytes, ask: Ask) -> Parsed:
        """Send one request and read its answer. Raises RequestFault."""
        reply = await self._client.post(
            self.plan.base_url + path, headers=self._headers, body=body, timeout_s=self._timeout_s
        )
        self.limiter.learn(reply.headers)
        if reply.status != 200:
            raise self._refused(reply)
        text, key = reply.body, (self._api_key or "").encode()
        if len(key) >= MIN_KEY_LENGTH and key in text:
            # What comes next is written to disk, whatever the server put into it.
            text = text.replace(key, b"[key]")
        try:
            answer = json.loads(text)
            if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
                raise self._refused(reply)  # Some gateways send their errors with status 200.
            parsed = self.plan.dialect.read(answer, ask)
        except ValueError as error:
            # It came with status 200, so it was most likely billed.
            words = "the answer is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise RequestFault(FaultKind.NONSENSE, words, answered=True, was_sent=True) from None
        self.limiter.succeeded()
        self.was_reached = True
        return parsed

    def _refused(self, reply: HttpReply) -> RequestFault:
        fault = fault_of_status(reply.status, reply.headers, reply.body, secret=self._api_key)
        if reply.status in (429, 529) or (fault.kind is FaultKind.BUSY and fault.wait_s):
            # A pause too long to be waited for stops the call; it must not hold up whoever comes next.
            is_waited_for = (fault.wait_s or 0.0) <= MAX_SERVER_WAIT_S
            self.limiter.throttled(fault.wait_s if is_waited_for else None)
        return fault


class Sending:
    """One HTTP request and its attempts."""

    def __init__(
        self,
        endpoint: Endpoint,
        group: list[Wanted],
        n: int,
        first: int,
        flight: Flight,
        is_second_thought: bool,
    ) -> None:
        self.group = group
        self.flight = flight
        self.numbers = range(first, first + n)
        """Of the samples, for each request of the group."""
        self.thought_too_long: list[tuple[Wanted, int]] = []
        self._endpoint = endpoint
        self._is_second_thought = is_second_thought
        self._slot: Slot | None = None

    @property
    def samples_asked(self) -> int:
        """Of each request, in words that the server sees."""
        return self._ask.n

    @property
    def likely_tokens(self) -> int:
        """What the rate limit is told: what is read, and all that may be written."""
        limit = self.group[0].request.max_tokens + self._endpoint.headroom_tokens
        return sum(likely_tokens(one.request) + limit * len(self.numbers) for one in self.group)

    def begin(self, slot: Slot) -> None:
        """Word the request, now that its turn has come; the first attempt goes out on this slot."""
        endpoint = self._endpoint
        self._slot = slot
        self._ask = endpoint.plan.ask(
            [one.request for one in self.group],
            n=len(self.numbers),
            first=self.numbers.start,
            headroom_tokens=endpoint.headroom_tokens,
            cuts=self.group[0].cuts,
        )
        call = endpoint.plan.call(self._ask)
        self._path = call.path
        self._body = json.dumps(call.body).encode()
        self._bound = endpoint.plan.bound(self._ask, endpoint.price)

    async def wait_for_turn(self, *, is_retry: bool = False) -> Slot | None:
        """Wait for the right to send; None when the call was over before that came."""
        task = asyncio.current_task()
        assert task is not None
        self.flight.waiting.add(task)
        try:
            slot = await self._endpoint.limiter.acquire(self.likely_tokens, is_retry=is_retry)
        except asyncio.CancelledError:
            if self.flight.fatal is None or task.uncancel() > 0:
                raise  # Somebody else's.
            return None
        finally:
            self.flight.waiting.discard(task)
        if self.flight.fatal is not None:
            slot.release(was_unused=True)
            return None
        return slot

    async def attempt(self) -> None:
        """Order, send, read, settle, file. Raises RequestFault, what the till raises, and Stopped."""
        slot = self._slot or await self.wait_for_turn(is_retry=True)
        self._slot = None
        if slot is None:
            raise Stopped
        try:
            if self.flight.fatal is not None:
                slot.release(was_unused=True)
                raise Stopped
            await self._buy(slot)
        finally:
            slot.release()

    async def _buy(self, slot: Slot) -> None:
        till = self.flight.till
        try:
            order = await till.order(self._bound) if till is not None else None
        except BaseException:
            slot.release(was_unused=True)
            raise
        start = time.perf_counter()
        try:
            parsed = await self._endpoint.exchange(self._path, self._body, self._ask)
        except RequestFault as fault:
            if not fault.may_be_billed:
                slot.release(used_tokens=0)
            lost = Usage(requests=1, unanswered_requests=int(fault.may_be_billed))
            await self._settle(order, [], lost, start)
            raise
        except BaseException:
            # Cancelled while the server was at work: it may bill what nobody will read.
            await asyncio.shield(self._settle(order, [], Usage(requests=1, unanswered_requests=1), start))
            raise
        if parsed.usage is not None:
            usage = priced(parsed.usage, self._endpoint.price)
            slot.release(used_tokens=usage.input_tokens + usage.output_tokens)
        else:
            # A server that does not say what it billed is counted by the bound.
            usage = Usage(requests=1, unanswered_requests=1)
            slot.release()
        replies = self._replies(parsed, usage)
        await asyncio.shield(self._settle(order, [reply for _, reply in replies], usage, start))
        for wanted, reply in replies:
            wanted.samples[reply.sample] = reply.continuation
        if not parsed.choices and len(self.numbers) == 1 and len(self.group) == 1:
            nothing = Continuation(text=None, missing=Missing.FAILED, detail="the server sent no choice")
            self.group[0].samples[self.numbers.start] = nothing

    def _replies(self, parsed: Parsed, usage: Usage) -> list[tuple[Wanted, Reply]]:
        """Give each choice its owner and its number."""
        group, choices = self.group, list(parsed.choices)
        if self._endpoint.plan.is_greedy:
            choices = [choice for choice in choices for _ in self.numbers]
        count = len(choices)
        if len(group) == 1:
            if self._ask.n > 1:
                self._endpoint.note_count(count, len(self.numbers))
            owners = [(group[0], i) for i in self.numbers]
        elif count == len(self.numbers) * len(group):
            owners = [(one, i) for one in group for i in self.numbers]
        else:
            owners = []  # Nobody can tell whose they are; each is asked on its own.
        replies = []
        for (one, sample), choice in zip(owners, choices, strict=False):
            reply = self._endpoint.plan.reply(one.position, one.request, sample, choice, usage)
            if used_up_by_thinking(reply.continuation) and not self._is_second_thought:
                had = self._ask.max_tokens - one.request.max_tokens
                each = usage.reasoning_tokens // (len(self.numbers) * len(self.group))
                self._endpoint.make_room(had, each or self._ask.max_tokens)
                self.thought_too_long.append((one, sample))
            else:
                replies.append((one, reply))
        return replies

    async def _settle(self, order: Order | None, replies: Sequence[Reply], usage: Usage, start: float) -> None:
        is_unbilled = not usage.unanswered_requests and not usage.input_tokens and not usage.output_tokens
        if usage.cost_usd is None and (is_unbilled or (self._endpoint.price is not None and not usage.input_tokens)):
            # Refused requests are not billed; what was never answered is counted by its bound.
            usage = Usage(requests=usage.requests, unanswered_requests=usage.unanswered_requests, cost_usd=0.0)
        if order is not None:
            await order.settle(replies, usage, time.perf_counter() - start)
        self.group[0].usage += usage


def likely_tokens(request: ContinuationRequest) -> int:
    """Estimate what a request makes the model read."""
    characters = sum(len(m.content) for m in request.messages) + len(request.prefix)
    return characters // _CHARACTERS_PER_TOKEN
