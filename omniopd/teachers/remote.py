"""A teacher behind HTTP, whatever its dialect: exact counts, exact bills, nothing used before it is written down.

Spends money. What is asked and how an answer reads is in `plan`; what is retried in `retry`; how fast in `limiter`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omniopd.errors import (
    OmniOPDError,
    TeacherAuthError,
    TeacherConnectionError,
    TeacherError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.teachers.base import ContinuationRequest, Order, Reply, TeacherAnswer, Till
from omniopd.teachers.cards import ModelPrice
from omniopd.teachers.dialects.base import Parsed
from omniopd.teachers.limiter import Limiter, Slot
from omniopd.teachers.plan import Plan, priced
from omniopd.teachers.repair import used_up_by_thinking
from omniopd.teachers.retry import (
    MAX_SERVER_WAIT_S,
    FaultKind,
    RequestFault,
    Sleep,
    fault_of_status,
    with_retries,
)
from omniopd.teachers.spec import is_loopback
from omniopd.teachers.wire import HttpClient, HttpReply
from omniopd.types import Continuation, Message, Missing, Usage

MAX_HEADROOM_TOKENS = 16_384
"""The most room that is given to a model that thinks."""
SHORT_ANSWERS = 3
"""So many answers in a row with a single sample, and no complete one, show that a server ignores `n`."""
MIN_KEY_LENGTH = 12
"""Shorter keys are made up, and would be found in innocent text."""
_CHARACTERS_PER_TOKEN = 3
"""For the rate limit, which is about what is likely; budgets use a bound."""


@dataclass(slots=True)
class _Wanted:
    """A request that is really asked: the first of those that are identical, with the largest n of them."""

    request: ContinuationRequest
    position: int
    cuts: tuple[int, ...] = ()
    """Where shorter prefixes of the same answer end."""
    samples: dict[int, Continuation] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Flight:
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


class _Stopped(Exception):
    """Raised where a request was to be sent after its call was over."""


class RemoteTeacher:
    """Ask a server for continuations.

    The bill of an HTTP request lies with the first of the requests it answered; the sum over the answers is exact.
    Connections are made lazily, for each running event loop, so the teacher may be used from several `asyncio.run`
    calls; close it in each.

    Args:
        plan: how the teacher is asked.
        api_key: never shown; None for servers that ask for none.
        limiter: shared by all who use the same endpoint with the same key.
        price: None when unknown; the cost is then None too, unless the server reports it.
        timeout_s: for one attempt.
        deadline_s: for one HTTP request with all its attempts and waits.
        sleep: replaces the pause between attempts in tests.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        api_key: str | None,
        limiter: Limiter,
        price: ModelPrice | None = None,
        timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        max_attempts: int = 5,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.plan = plan
        self._api_key = api_key
        self._limiter = limiter
        self._price = price
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._headers = plan.dialect.headers(plan.card, api_key)
        # A proxy from the environment has no business with a server on this machine.
        self._client = HttpClient(trust_env=not is_loopback(plan.base_url))
        self._was_reached = False
        self._flights: set[_Flight] = set()
        self._largest_n = plan.largest_n
        self._short_answers = 0
        """Answers in a row with one sample where several were asked for."""
        self._honors_n = False
        self._headroom_tokens = plan.card.thinking.headroom_tokens

    def __repr__(self) -> str:
        return f"RemoteTeacher({self.id!r}, base_url={self.plan.base_url!r}, transport={self.plan.transport!r})"

    @property
    def id(self) -> str:
        """`provider:model`"""
        return self.plan.teacher_id

    @property
    def exact_samples(self) -> bool:
        """Whether sample i of a request is reproducible from its seed, so that asking again gives the same text."""
        return self.plan.card.can.prompt_seeds

    @property
    def reads_token_ids(self) -> bool:
        """Whether the student's token ids are what is sent."""
        return self.plan.transport == "tokens"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that shapes an answer besides the request, for the ledger's key."""
        return self.plan.fingerprint

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]:
        """Answer every request, in order; identical ones are asked once.

        Every attempt is ordered from `till` before it is sent and settled before its samples are used. Raises
        TeacherAuthError, TeacherRateLimitError (a quota is used up), TeacherResponseError (no such model),
        TeacherConnectionError (never reached) and what the till raises; any other failure becomes a continuation with
        a reason.
        """
        wanted: dict[tuple[object, ...], _Wanted] = {}
        for position, request in enumerate(requests):
            first = wanted.setdefault(self._identity(request), _Wanted(request, position))
            first.request = max(first.request, request, key=lambda r: r.n)
        flight = _Flight(till)
        self._flights.add(flight)
        try:
            await _all(self._ask_in_turn(chain, flight) for chain in self._chains(list(wanted.values())))
        finally:
            self._flights.discard(flight)
        if flight.fatal is not None:
            raise flight.fatal
        answers = []
        for position, request in enumerate(requests):
            asked = wanted[self._identity(request)]
            answers.append(
                TeacherAnswer(
                    continuations=tuple(asked.samples[i] for i in range(request.n)),
                    usage=asked.usage if asked.position == position else Usage(),
                    seconds=asked.seconds,
                )
            )
        return answers

    async def aclose(self) -> None:
        """Close the connections of the running event loop. Safe to call twice; a later request opens new ones."""
        await self._client.aclose()

    def _identity(self, request: ContinuationRequest) -> tuple[object, ...]:
        ids = request.token_ids if self.reads_token_ids else None
        return (request.messages, request.prefix, request.max_tokens, request.seed, request.sample_numbers, ids)

    def _chains(self, wanted: list[_Wanted]) -> list[list[list[list[_Wanted]]]]:
        """Return what is sent in which order: chains side by side, the stages of a chain in turn, each stage at once.

        A stage is a list of groups, and a group shares one HTTP request. There are several stages where the provider's
        prompt cache is worth the wait. An automatic cache knows every head of what it has read, so the longest prefix
        of an answer goes first and the shorter ones after it. One that has to be told knows the marked ends alone, so
        the prefixes go in the order in which they grow.
        """
        if self.plan.transport == "completions" and self.plan.card.can.batch_prompts > 1:
            return [[[group]] for group in self._groups(wanted)]
        cache = self.plan.card.prompt_cache
        is_cached = cache.mode == "automatic" or (cache.mode == "explicit" and self.plan.transport == "prefill")
        chains: list[list[list[list[_Wanted]]]] = []
        families: dict[tuple[Message, ...], list[list[_Wanted]]] = {}
        for one in sorted(wanted, key=lambda w: -len(w.request.prefix)):
            if not is_cached or _likely_tokens(one.request) < cache.min_tokens:
                chains.append([[[one]]])
                continue
            same = families.setdefault(one.request.messages, [])
            family = next((f for f in same if f[0].request.prefix.startswith(one.request.prefix)), None)
            if family is None:
                same.append([one])
            else:
                family.append(one)
        for longest, *shorter in (family for same in families.values() for family in same):
            if cache.mode == "automatic":
                chains.append([[[longest]], [[one] for one in shorter]] if shorter else [[[longest]]])
                continue
            growing = [*reversed(shorter), longest] if shorter else []
            ends = [len(one.request.prefix.rstrip()) for one in growing[:-1]]
            for i, one in enumerate(growing):
                one.cuts = tuple(ends[: i + 1])  # Its own end too, where a longer one will go on from it.
            chains.append([[[one]] for one in growing] if growing else [[[longest]]])
        return chains

    def _groups(self, wanted: list[_Wanted]) -> list[list[_Wanted]]:
        """Pack raw prompts of equal n and limit (and seed, unless each has one) into shared HTTP requests."""
        card = self.plan.card
        alike: dict[tuple[object, ...], list[_Wanted]] = {}
        for one in wanted:
            request = one.request
            shared_seed = None if card.can.prompt_seeds and request.seed is not None else (request.seed,)
            alike.setdefault((request.n, request.max_tokens, shared_seed), []).append(one)
        size = card.can.batch_prompts
        return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]

    async def _ask_in_turn(self, chain: list[list[list[_Wanted]]], flight: _Flight) -> None:
        for stage in chain:
            await _all([self._ask(group, flight) for group in stage])

    async def _ask(self, group: list[_Wanted], flight: _Flight) -> None:
        n = group[0].request.n
        size = n if self.plan.is_greedy else min(n, self._largest_n)
        if n == 1 or size > 1:
            jobs = [self._send(group, min(size, n - first), first, flight) for first in range(0, n, size)]
            was_rejected = any(await _all(jobs))
            if was_rejected and len(group) > 1:
                # One prompt that is too long must not take the others with it.
                await _all(self._ask([one], flight) for one in group)
                return
        else:
            was_rejected = False
        deficit = [(one, i) for one in group for i in range(n) if i not in one.samples]
        if deficit and group[0].cuts:
            # The first writes the provider's cache, the others read it.
            (one, i), *deficit = deficit
            await self._send([one], 1, i, flight)
        if flight.fatal is None and deficit:
            await _all(self._send([one], 1, i, flight) for one, i in deficit)
        if was_rejected and any(c.text is not None for one in group for c in one.samples.values()):
            self._largest_n = 1  # It was `n` that the server refused.

    async def _send(
        self, group: list[_Wanted], n: int, first: int, flight: _Flight, *, is_second_thought: bool = False
    ) -> bool:
        """Get `n` samples of each, the first being number `first`, and file what comes back.

        Returns whether the server rejected a request for several samples, which may then be asked for one by one.
        """
        if flight.fatal is not None:
            return False
        sending = _Sending(self, group, n, first, flight, is_second_thought)
        # The deadline counts from here: what waits for its turn has not begun.
        slot = await sending.wait_for_turn()
        if slot is None:
            return False
        try:
            sending.begin(slot)
            was_rejected = await self._send_admitted(sending)
        finally:
            slot.release(was_unused=True)  # Only if no attempt got so far as to release it.
        if sending.thought_too_long and flight.fatal is None:
            await _all(self._send([one], 1, i, flight, is_second_thought=True) for one, i in sending.thought_too_long)
        return was_rejected

    async def _send_admitted(self, sending: _Sending) -> bool:
        group, flight = sending.group, sending.flight
        start = time.perf_counter()
        try:
            await with_retries(
                sending.attempt, max_attempts=self._max_attempts, deadline_s=self._deadline_s, sleep=self._sleep
            )
        except RequestFault as fault:
            self._was_reached = self._was_reached or fault.answered
            if fault.kind is FaultKind.REJECTED and len(group) * sending.samples_asked > 1:
                return True
            if fatal := self._fatal(fault):
                # What stops one call stops all that are under way: they would only be refused the same.
                for other in [flight, *self._flights]:
                    other.stop(fatal)
            reason = Missing.TIMEOUT if fault.kind is FaultKind.TIMEOUT else Missing.FAILED
            detail = f"{fault.detail} ({fault.attempts} attempt{'s' * (fault.attempts > 1)})"
            for one in group:
                for i in sending.numbers:
                    one.samples.setdefault(i, Continuation(text=None, missing=reason, detail=detail))
        except _Stopped:
            pass
        except OmniOPDError as error:
            # The till refused, or could not write: nothing more is bought.
            flight.stop(error)
        finally:
            for one in group:
                one.seconds = max(one.seconds, time.perf_counter() - start)
        return False

    def _note_count(self, count: int, asked: int) -> None:
        """Stop asking for several samples at once where the server keeps sending one."""
        self._short_answers = self._short_answers + 1 if count == 1 else 0
        if count == asked:
            self._honors_n = True
        if self._short_answers >= SHORT_ANSWERS and not self._honors_n:
            self._largest_n = 1

    def _fatal(self, fault: RequestFault) -> TeacherError | None:
        """Return the error that no further request would survive, if the fault is one."""
        plan = self.plan
        at = f"{self.id} at {plan.base_url}"
        if fault.kind is FaultKind.AUTH:
            if plan.card.api_key_env is None:
                advice = "this card has no key; write one into ./teachers/ with api_key_env: NAME"
            elif self._api_key is None:
                advice = f"{plan.card.api_key_env} is not set; set it with: export {plan.card.api_key_env}=..."
            else:
                advice = f"check the key in {plan.card.api_key_env} and its permissions"
            return TeacherAuthError(f"the teacher {at} refuses access ({fault.detail}); {advice}")
        if fault.kind is FaultKind.QUOTA:
            return TeacherRateLimitError(
                f"the quota at the teacher {at} is used up ({fault.detail}); add credit, then run the same again "
                "(train: with --resume)"
            )
        if fault.kind is FaultKind.NO_MODEL:
            return TeacherResponseError(
                f"the teacher {at} has no model {plan.model!r} or no such endpoint ({fault.detail}); check the "
                f"model's name, the base_url and that it offers continuation: {plan.transport}"
            )
        if fault.kind is FaultKind.BUSY and (fault.wait_s or 0.0) > MAX_SERVER_WAIT_S:
            return TeacherRateLimitError(
                f"the teacher {at} asks to wait {fault.wait_s:.0f} s ({fault.detail}); run the same again after that "
                "(train: with --resume)"
            )
        if fault.kind is FaultKind.UNREACHABLE and not self._was_reached:
            return TeacherConnectionError(
                f"the teacher {at} cannot be reached after {fault.attempts} attempts; {plan.card.start_hint}"
            )
        return None


class _Sending:
    """One HTTP request and its attempts."""

    def __init__(
        self,
        teacher: RemoteTeacher,
        group: list[_Wanted],
        n: int,
        first: int,
        flight: _Flight,
        is_second_thought: bool,
    ) -> None:
        self.group = group
        self.flight = flight
        self.numbers = range(first, first + n)
        """Of the samples, for each request of the group."""
        self.thought_too_long: list[tuple[_Wanted, int]] = []
        self._teacher = teacher
        self._is_second_thought = is_second_thought
        self._slot: Slot | None = None

    @property
    def samples_asked(self) -> int:
        """Of each request, in words that the server sees."""
        return self._ask.n

    @property
    def likely_tokens(self) -> int:
        """What the rate limit is told: what is read, and all that may be written."""
        limit = self.group[0].request.max_tokens + self._teacher._headroom_tokens
        return sum(_likely_tokens(one.request) + limit * len(self.numbers) for one in self.group)

    def begin(self, slot: Slot) -> None:
        """Word the request, now that its turn has come; the first attempt goes out on this slot."""
        teacher = self._teacher
        self._slot = slot
        self._ask = teacher.plan.ask(
            [one.request for one in self.group],
            n=len(self.numbers),
            first=self.numbers.start,
            headroom_tokens=teacher._headroom_tokens,
            cuts=self.group[0].cuts,
        )
        call = teacher.plan.call(self._ask)
        self._url = teacher.plan.base_url + call.path
        self._body = json.dumps(call.body).encode()
        self._bound = teacher.plan.bound(self._ask, teacher._price)

    async def wait_for_turn(self, *, is_retry: bool = False) -> Slot | None:
        """Wait for the right to send; None when the call was over before that came."""
        task = asyncio.current_task()
        assert task is not None
        self.flight.waiting.add(task)
        try:
            slot = await self._teacher._limiter.acquire(self.likely_tokens, is_retry=is_retry)
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
        """Order, send, read, settle, file. Raises RequestFault, what the till raises, and _Stopped."""
        slot = self._slot or await self.wait_for_turn(is_retry=True)
        self._slot = None
        if slot is None:
            raise _Stopped
        try:
            if self.flight.fatal is not None:
                slot.release(was_unused=True)
                raise _Stopped
            await self._buy(slot)
        finally:
            slot.release()

    async def _buy(self, slot: Slot) -> None:
        teacher, till = self._teacher, self.flight.till
        try:
            order = await till.order(self._bound) if till is not None else None
        except BaseException:
            slot.release(was_unused=True)
            raise
        start = time.perf_counter()
        try:
            parsed = await self._exchange()
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
            usage = priced(parsed.usage, teacher._price)
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

    async def _exchange(self) -> Parsed:
        teacher = self._teacher
        reply = await teacher._client.post(
            self._url, headers=teacher._headers, body=self._body, timeout_s=teacher._timeout_s
        )
        teacher._limiter.learn(reply.headers)
        if reply.status != 200:
            raise self._refused(reply)
        text, key = reply.body, (teacher._api_key or "").encode()
        if len(key) >= MIN_KEY_LENGTH and key in text:
            # What comes next is written to disk, whatever the server put into it.
            text = text.replace(key, b"[key]")
        try:
            answer = json.loads(text)
            if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
                raise self._refused(reply)  # Some gateways send their errors with status 200.
            parsed = teacher.plan.dialect.read(answer, self._ask)
        except ValueError as error:
            # It came with status 200, so it was most likely billed.
            words = "the answer is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise RequestFault(FaultKind.NONSENSE, words, answered=True, was_sent=True) from None
        teacher._limiter.succeeded()
        teacher._was_reached = True
        return parsed

    def _refused(self, reply: HttpReply) -> RequestFault:
        fault = fault_of_status(reply.status, reply.headers, reply.body, secret=self._teacher._api_key)
        if reply.status in (429, 529) or (fault.kind is FaultKind.BUSY and fault.wait_s):
            # A pause too long to be waited for stops the call; it must not hold up whoever comes next.
            is_waited_for = (fault.wait_s or 0.0) <= MAX_SERVER_WAIT_S
            self._teacher._limiter.throttled(fault.wait_s if is_waited_for else None)
        return fault

    def _replies(self, parsed: Parsed, usage: Usage) -> list[tuple[_Wanted, Reply]]:
        """Give each choice its owner and its number."""
        group, choices = self.group, list(parsed.choices)
        if self._teacher.plan.is_greedy:
            choices = [choice for choice in choices for _ in self.numbers]
        count = len(choices)
        if len(group) == 1:
            if self._ask.n > 1:
                self._teacher._note_count(count, len(self.numbers))
            owners = [(group[0], i) for i in self.numbers]
        elif count == len(self.numbers) * len(group):
            owners = [(one, i) for one in group for i in self.numbers]
        else:
            owners = []  # Nobody can tell whose they are; each is asked on its own.
        replies = []
        for (one, sample), choice in zip(owners, choices, strict=False):
            reply = self._teacher.plan.reply(one.position, one.request, sample, choice, usage)
            if used_up_by_thinking(reply.continuation) and not self._is_second_thought:
                self._raise_headroom(usage)
                self.thought_too_long.append((one, sample))
            else:
                replies.append((one, reply))
        return replies

    def _raise_headroom(self, usage: Usage) -> None:
        """Learn how long the model thinks: all that it spent, and half as much again; at least double what it had."""
        teacher, had = self._teacher, self._ask.max_tokens - self.group[0].request.max_tokens
        thought = usage.reasoning_tokens // (len(self.numbers) * len(self.group)) or self._ask.max_tokens
        wanted = min(MAX_HEADROOM_TOKENS, max(2 * had, thought * 3 // 2 + 256))
        teacher._headroom_tokens = max(teacher._headroom_tokens, wanted)

    async def _settle(self, order: Order | None, replies: Sequence[Reply], usage: Usage, start: float) -> None:
        is_unbilled = not usage.unanswered_requests and not usage.input_tokens and not usage.output_tokens
        if usage.cost_usd is None and (is_unbilled or (self._teacher._price is not None and not usage.input_tokens)):
            # Refused requests are not billed; what was never answered is counted by its bound.
            usage = Usage(requests=usage.requests, unanswered_requests=usage.unanswered_requests, cost_usd=0.0)
        if order is not None:
            await order.settle(replies, usage, time.perf_counter() - start)
        self.group[0].usage += usage


def _likely_tokens(request: ContinuationRequest) -> int:
    characters = sum(len(m.content) for m in request.messages) + len(request.prefix)
    return characters // _CHARACTERS_PER_TOKEN


async def _all(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await all, then raise the first error: what is under way has been paid for and is written down first."""
    results = await asyncio.gather(*list(work), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
