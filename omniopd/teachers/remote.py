"""A teacher behind HTTP, whatever its dialect: exact counts, exact bills, nothing used before it is written down.

Spends money. What is asked and how an answer reads is in `plan`; one request on its way in `sending`; what is retried
in `retry`; how fast in `limiter`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from omniopd.concurrency import all_done
from omniopd.errors import (
    OmniOPDError,
    TeacherAuthError,
    TeacherConnectionError,
    TeacherError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer, Till
from omniopd.teachers.cards import ModelPrice
from omniopd.teachers.limiter import Limiter
from omniopd.teachers.plan import Plan
from omniopd.teachers.retry import MAX_SERVER_WAIT_S, FaultKind, RequestFault, Sleep, with_retries
from omniopd.teachers.sending import Endpoint, Flight, Sending, Stopped, Wanted, likely_tokens
from omniopd.types import Continuation, Message, Missing, Usage


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
        self._endpoint = Endpoint(plan, api_key=api_key, limiter=limiter, price=price, timeout_s=timeout_s)
        self._deadline_s = deadline_s
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._flights: set[Flight] = set()

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
        wanted: dict[tuple[object, ...], Wanted] = {}
        for position, request in enumerate(requests):
            first = wanted.setdefault(self._identity(request), Wanted(request, position))
            first.request = max(first.request, request, key=lambda r: r.n)
        flight = Flight(till)
        self._flights.add(flight)
        try:
            await all_done(self._ask_in_turn(chain, flight) for chain in self._chains(list(wanted.values())))
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
        await self._endpoint.aclose()

    def _identity(self, request: ContinuationRequest) -> tuple[object, ...]:
        ids = request.token_ids if self.reads_token_ids else None
        return (request.messages, request.prefix, request.max_tokens, request.seed, request.sample_numbers, ids)

    def _chains(self, wanted: list[Wanted]) -> list[list[list[list[Wanted]]]]:
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
        chains: list[list[list[list[Wanted]]]] = []
        families: dict[tuple[Message, ...], list[list[Wanted]]] = {}
        for one in sorted(wanted, key=lambda w: -len(w.request.prefix)):
            if not is_cached or likely_tokens(one.request) < cache.min_tokens:
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

    def _groups(self, wanted: list[Wanted]) -> list[list[Wanted]]:
        """Pack raw prompts of equal n and limit (and seed, unless each has one) into shared HTTP requests."""
        card = self.plan.card
        alike: dict[tuple[object, ...], list[Wanted]] = {}
        for one in wanted:
            request = one.request
            shared_seed = None if card.can.prompt_seeds and request.seed is not None else (request.seed,)
            alike.setdefault((request.n, request.max_tokens, shared_seed), []).append(one)
        size = card.can.batch_prompts
        return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]

    async def _ask_in_turn(self, chain: list[list[list[Wanted]]], flight: Flight) -> None:
        for stage in chain:
            await all_done([self._ask(group, flight) for group in stage])

    async def _ask(self, group: list[Wanted], flight: Flight) -> None:
        n = group[0].request.n
        size = n if self.plan.is_greedy else min(n, self._endpoint.largest_n)
        if n == 1 or size > 1:
            jobs = [self._send(group, min(size, n - first), first, flight) for first in range(0, n, size)]
            was_rejected = any(await all_done(jobs))
            if was_rejected and len(group) > 1:
                # One prompt that is too long must not take the others with it.
                await all_done(self._ask([one], flight) for one in group)
                return
        else:
            was_rejected = False
        deficit = [(one, i) for one in group for i in range(n) if i not in one.samples]
        if deficit and group[0].cuts:
            # The first writes the provider's cache, the others read it.
            (one, i), *deficit = deficit
            await self._send([one], 1, i, flight)
        if flight.fatal is None and deficit:
            await all_done(self._send([one], 1, i, flight) for one, i in deficit)
        if was_rejected and any(c.text is not None for one in group for c in one.samples.values()):
            self._endpoint.largest_n = 1  # It was `n` that the server refused.

    async def _send(
        self, group: list[Wanted], n: int, first: int, flight: Flight, *, is_second_thought: bool = False
    ) -> bool:
        """Get `n` samples of each, the first being number `first`, and file what comes back.

        Returns whether the server rejected a request for several samples, which may then be asked for one by one.
        """
        if flight.fatal is not None:
            return False
        sending = Sending(self._endpoint, group, n, first, flight, is_second_thought)
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
            await all_done(
                self._send([one], 1, i, flight, is_second_thought=True) for one, i in sending.thought_too_long
            )
        return was_rejected

    async def _send_admitted(self, sending: Sending) -> bool:
        group, flight = sending.group, sending.flight
        start = time.perf_counter()
        try:
            await with_retries(
                sending.attempt, max_attempts=self._max_attempts, deadline_s=self._deadline_s, sleep=self._sleep
            )
        except RequestFault as fault:
            self._endpoint.was_reached = self._endpoint.was_reached or fault.answered
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
        except Stopped:
            pass
        except OmniOPDError as error:
            # The till refused, or could not write: nothing more is bought.
            flight.stop(error)
        finally:
            for one in group:
                one.seconds = max(one.seconds, time.perf_counter() - start)
        return False

    def _fatal(self, fault: RequestFault) -> TeacherError | None:
        """Return the error that no further request would survive, if the fault is one."""
        plan = self.plan
        at = f"{self.id} at {plan.base_url}"
        if fault.kind is FaultKind.AUTH:
            if plan.card.api_key_env is None:
                advice = "this card has no key; write one into ./teachers/ with api_key_env: NAME"
            elif not self._endpoint.has_key:
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
        if fault.kind is FaultKind.UNREACHABLE and not self._endpoint.was_reached:
            return TeacherConnectionError(
                f"the teacher {at} cannot be reached after {fault.attempts} attempts; {plan.card.start_hint}"
            )
        return None
