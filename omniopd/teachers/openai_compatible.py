"""A teacher behind an OpenAI-compatible API: three ways to hand over a partial answer, exact counts, exact bills.

Spends money. What is retried, and how long it waits, is decided in `retry`; the SDK's own retries are off.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omniopd.errors import (
    ConfigError,
    OmniOPDError,
    TeacherAuthError,
    TeacherConnectionError,
    TeacherError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.cards import Card, ModelPrice, Transport
from omniopd.teachers.continuation import INSTRUCTION_VERSION, clean_continuation, continuation_messages, sent_prefix
from omniopd.teachers.ledger import Record, Reply
from omniopd.teachers.retry import FaultKind, RequestFault, Sleep, classify, with_retries
from omniopd.teachers.spec import is_loopback
from omniopd.types import Continuation, Message, Missing, Usage

if TYPE_CHECKING:
    import openai

Render = Callable[[Sequence[Message]], str]
"""Writes a conversation as the text that the model reads, up to where its answer begins."""

# What has its own argument must not also come in through extra_body: one of the two would be a lie.
_RESERVED = frozenset(
    {"model", "messages", "prompt", "n", "seed", "seeds", "stream", "temperature", "top_p"}
    | {"max_tokens", "max_completion_tokens"}
)


@dataclass(slots=True)
class _Ask:
    """A request that is really sent: the first of those that are identical, with the largest n of them."""

    request: ContinuationRequest
    position: int
    samples: dict[int, Continuation] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0


@dataclass(slots=True)
class _Flight:
    """One call of `continuations`."""

    record: Record | None
    fatal: TeacherError | None = None
    """Once set, nothing more is sent; what is under way may still arrive and be recorded."""
    is_unrecorded: bool = False
    """An answer could not be written down. Nothing more is bought then."""

    @property
    def is_over(self) -> bool:
        return self.fatal is not None or self.is_unrecorded


@dataclass(frozen=True, slots=True)
class _Session:
    """What belongs to one event loop."""

    client: openai.AsyncOpenAI
    slots: asyncio.Semaphore


class OpenAITeacher:
    """Ask any OpenAI-compatible server for continuations.

    The bill of an HTTP request lies with the first of the requests it answered; the sum over the answers is exact. A
    request that timed out may have been billed all the same, which nobody can know here. Clients are made lazily, one
    for each running event loop, so the teacher may be used from several `asyncio.run` calls; close it in each.

    Args:
        id: `provider:model`, for records.
        model: the name that the server knows.
        base_url: up to and including `/v1`.
        api_key: never shown; None for servers that ask for none.
        card: what the server can do.
        transport: how the partial answer is handed over.
        render: needed by `completions`.
        price: None when unknown; the cost is then None too, unless the server reports it.
        sleep: replaces the pause between attempts in tests.
    """

    def __init__(
        self,
        *,
        id: str,
        model: str,
        base_url: str,
        api_key: str | None,
        card: Card,
        transport: Transport,
        render: Render | None = None,
        price: ModelPrice | None = None,
        temperature: float | None = 1.0,
        top_p: float | None = None,
        max_concurrency: int = 16,
        timeout_s: float = 60.0,
        max_attempts: int = 5,
        extra_body: Mapping[str, Any] | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        if transport == "completions" and render is None:
            raise ConfigError(
                f"the teacher {id} takes raw prompts (continuation: completions) and nothing says how to write a "
                "conversation as text; give the folder of its tokenizer, or use continuation: prefill or chat"
            )
        if clash := sorted(_RESERVED & set(extra_body or {})):
            raise ConfigError(f"extra_body holds {', '.join(clash)}, which has a setting of its own; use that")
        self._id = id
        self._model = model
        self._base_url = base_url
        self._api_key = api_key
        self._card = card
        self._transport: Transport = transport
        self._render = render
        self._price = price
        sampling = {"temperature": temperature, "top_p": top_p}
        self._sampling = {name: value for name, value in sampling.items() if value is not None}
        self._extra_body = dict(extra_body or {})
        self._max_concurrency = min(max_concurrency, card.limits.max_in_flight or max_concurrency)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Session] = weakref.WeakKeyDictionary()
        self._was_reached = False
        self._honors_n = card.can.n

    def __repr__(self) -> str:
        return f"OpenAITeacher({self._id!r}, base_url={self._base_url!r}, transport={self._transport!r})"

    @property
    def id(self) -> str:
        """`provider:model`"""
        return self._id

    @property
    def exact_samples(self) -> bool:
        """Whether sample i of a request is reproducible from its seed, so that asking again gives the same text."""
        return self._card.can.prompt_seeds

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that shapes an answer besides the request, for the ledger's key."""
        marks: dict[str, Any] = {
            "teacher": self._id,
            "base_url": _stable_url(self._base_url),
            "transport": self._transport,
            "body": {**self._card.body.all, **getattr(self._card.body, self._transport), **self._extra_body},
            **self._sampling,
        }
        if self._transport == "chat":
            marks["instruction"] = INSTRUCTION_VERSION
        if self._render is not None:
            probe = self._render([Message(role="user", content="?")])
            marks["template"] = hashlib.sha256(probe.encode()).hexdigest()[:16]
        return marks

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, record: Record | None = None
    ) -> list[TeacherAnswer]:
        """Answer every request, in order; identical ones are asked once.

        `record` is called with the samples and the bill of each HTTP response as soon as it is there. Raises
        TeacherAuthError, TeacherRateLimitError (a quota is used up), TeacherResponseError (no such model) and
        TeacherConnectionError (never reached); any other failure becomes a continuation with a reason.
        """
        asks: dict[tuple[object, ...], _Ask] = {}
        for position, request in enumerate(requests):
            ask = asks.setdefault(_identity(request), _Ask(request, position))
            ask.request = max(ask.request, request, key=lambda r: r.n)
        flight = _Flight(record)
        await _all(self._ask(group, flight) for group in self._groups(list(asks.values())))
        if flight.fatal is not None:
            raise flight.fatal
        answers = []
        for position, request in enumerate(requests):
            ask = asks[_identity(request)]
            samples = tuple(ask.samples[i] for i in range(request.n))
            is_first = ask.position == position
            answers.append(
                TeacherAnswer(
                    continuations=samples,
                    usage=ask.usage if is_first else Usage(),
                    seconds=ask.seconds,
                )
            )
        return answers

    async def aclose(self) -> None:
        """Close the connections of the running event loop. Safe to call twice; a later request opens new ones."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.client.close()

    def _groups(self, asks: list[_Ask]) -> list[list[_Ask]]:
        """Pack what may share one HTTP request: raw prompts of equal n and limit (and seed, unless each has one)."""
        if self._transport != "completions" or self._card.can.batch_prompts == 1:
            return [[ask] for ask in asks]
        alike: dict[tuple[object, ...], list[_Ask]] = {}
        for ask in asks:
            request = ask.request
            shared_seed = None if self._card.can.prompt_seeds and request.seed is not None else (request.seed,)
            alike.setdefault((request.n, request.max_tokens, shared_seed), []).append(ask)
        size = self._card.can.batch_prompts
        return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]

    async def _ask(self, group: list[_Ask], flight: _Flight) -> None:
        n = group[0].request.n
        if n == 1 or self._honors_n:
            was_rejected = await self._send(group, n, 0, flight)
            if was_rejected:
                # One prompt that is too long must not take the others with it.
                await _all(self._ask([ask], flight) for ask in group)
                return
        deficit = [(ask, i) for ask in group for i in range(n) if i not in ask.samples]
        if not flight.is_over:
            await _all(self._send([ask], 1, i, flight) for ask, i in deficit)

    async def _send(self, group: list[_Ask], n: int, first: int, flight: _Flight) -> bool:
        """Send one HTTP request for `n` samples of each, the first being number `first`, and file what comes back.

        Returns whether the server rejected a group of several, which may then be asked one by one.
        """
        session = self._session()
        async with session.slots:
            if flight.is_over:
                return False
            body = self._body(group, n, first)
            start = time.perf_counter()
            try:
                response, attempts = await with_retries(
                    lambda: self._attempt(session.client, body), max_attempts=self._max_attempts, sleep=self._sleep
                )
            except RequestFault as fault:
                self._was_reached = self._was_reached or fault.answered
                if fault.kind is FaultKind.REJECTED and len(group) > 1:
                    self._file(group, [], Usage(requests=1, cost_usd=self._no_cost), start, flight)
                    return True
                flight.fatal = flight.fatal or self._fatal(fault)
                self._file_fault(group, n, first, fault, start, flight)
                return False
        self._was_reached = True
        choices = sorted(response.choices, key=lambda choice: choice.index or 0)
        if len(group) == 1:
            if n > 1 and len(choices) == 1:
                self._honors_n = False
            owners = [(group[0], first + i) for i in range(n)]
        elif len(choices) == n * len(group):
            owners = [(ask, i) for ask in group for i in range(n)]
        else:
            owners = []  # Nobody can tell whose they are; each is asked on its own.
        replies = [self._reply(ask, i, choice) for (ask, i), choice in zip(owners, choices, strict=False)]
        if n == 1 and len(group) == 1 and not replies:
            lost = Continuation(text=None, missing=Missing.FAILED, detail="the server sent no choice")
            group[0].samples[first] = lost
        self._file(group, replies, self._usage(response, attempts), start, flight)
        return False

    def _file(
        self,
        group: list[_Ask],
        replies: list[tuple[_Ask, Reply]],
        usage: Usage,
        start: float,
        flight: _Flight,
    ) -> None:
        seconds = time.perf_counter() - start
        if flight.record is not None:
            try:
                flight.record([reply for _, reply in replies], usage, seconds)
            except OmniOPDError:
                flight.is_unrecorded = True
                raise
        for ask, reply in replies:
            ask.samples[reply.sample] = reply.continuation
        group[0].usage += usage
        for ask in group:
            ask.seconds = max(ask.seconds, seconds)

    def _file_fault(
        self, group: list[_Ask], n: int, first: int, fault: RequestFault, start: float, flight: _Flight
    ) -> None:
        reason = Missing.TIMEOUT if fault.kind is FaultKind.TIMEOUT else Missing.FAILED
        detail = f"{fault.detail} ({fault.attempts} attempt{'s' * (fault.attempts > 1)})"
        for ask in group:
            for i in range(first, first + n):
                ask.samples[i] = Continuation(text=None, missing=reason, detail=detail)
        self._file(group, [], Usage(requests=fault.attempts, cost_usd=self._no_cost), start, flight)

    def _reply(self, ask: _Ask, sample: int, choice: Any) -> tuple[_Ask, Reply]:
        message = getattr(choice, "message", None)
        raw = choice.text if message is None else message.content
        raw = raw if isinstance(raw, str) else ""
        continuation = clean_continuation(
            ask.request.prefix,
            raw,
            transport=self._transport,
            finish_reason=choice.finish_reason,
            refusal=getattr(message, "refusal", None),
            echoes_prefix=True if self._transport == "prefill" and self._card.echoes_prefix else None,
        )
        return ask, Reply(position=ask.position, sample=sample, raw=raw, continuation=continuation)

    def _body(self, group: list[_Ask], n: int, first: int) -> dict[str, Any]:
        """Return the JSON body. Fields of the user's extra_body win over the card's."""
        request, can = group[0].request, self._card.can
        body: dict[str, Any] = {"model": self._model, **self._sampling, **self._card.body.all}
        limit = "max_tokens" if self._transport == "completions" else self._card.output_limit_field
        body[limit] = request.max_tokens
        if n > 1:
            body["n"] = n
        if can.seed and request.seed is not None:
            seeds = [ask.request.seed if first == 0 else _derived_seed(ask.request.seed, first) for ask in group]
            body |= {"seeds": seeds} if len(seeds) > 1 and can.prompt_seeds else {"seed": seeds[0]}
        prefix = sent_prefix(request.prefix)
        if self._transport == "completions":
            assert self._render is not None
            prompts = [self._render(ask.request.messages) + sent_prefix(ask.request.prefix) for ask in group]
            body["prompt"] = prompts if len(prompts) > 1 else prompts[0]
            body |= self._card.body.completions
        elif self._transport == "prefill":
            turns = [message.to_json() for message in request.messages]
            if prefix:
                turns.append({"role": "assistant", "content": prefix, **self._card.body.prefill_message})
                body |= self._card.body.prefill
            body["messages"] = turns
        else:
            asked = continuation_messages(request.messages, request.prefix, max_tokens=request.max_tokens)
            body["messages"] = [message.to_json() for message in asked]
            body |= self._card.body.chat
        return body | self._extra_body

    async def _attempt(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> Any:
        import openai

        try:
            async with asyncio.timeout(self._timeout_s):
                if self._transport == "completions":
                    response: Any = await client.completions.create(
                        model=self._model, prompt=body["prompt"], extra_body=body
                    )
                else:
                    response = await client.chat.completions.create(
                        model=self._model, messages=body["messages"], extra_body=body
                    )
        except (openai.APIError, TimeoutError, ValueError) as error:
            raise classify(error, secret=self._api_key) from None
        if not isinstance(getattr(response, "choices", None), list):
            raise RequestFault(FaultKind.NONSENSE, "the answer has no list of choices", answered=True)
        return response

    def _fatal(self, fault: RequestFault) -> TeacherError | None:
        """Return the error that no further request would survive, if the fault is one."""
        at = f"{self._id} at {self._base_url}"
        if fault.kind is FaultKind.AUTH:
            key = f"the key in {self._card.api_key_env}" if self._card.api_key_env else "the server"
            return TeacherAuthError(
                f"the teacher {at} refuses access ({fault.detail}); check {key} and its permissions"
            )
        if fault.kind is FaultKind.QUOTA:
            return TeacherRateLimitError(
                f"the quota at the teacher {at} is used up ({fault.detail}); add credit, then run again with --resume"
            )
        if fault.kind is FaultKind.NO_MODEL:
            return TeacherResponseError(
                f"the teacher {at} has no model {self._model!r} or no such endpoint ({fault.detail}); check the "
                f"model's name, the base_url and that it offers continuation: {self._transport}"
            )
        if fault.kind is FaultKind.UNREACHABLE and not self._was_reached:
            return TeacherConnectionError(
                f"the teacher {at} cannot be reached after {fault.attempts} attempts; {self._card.start_hint}"
            )
        return None

    @property
    def _no_cost(self) -> float | None:
        return None if self._price is None else 0.0

    def _usage(self, response: Any, attempts: int) -> Usage:
        usage = response.usage
        inputs = getattr(usage, "prompt_tokens", None) or 0
        outputs = getattr(usage, "completion_tokens", None) or 0
        # OpenRouter and others say what a request cost; that beats any price list.
        cost = getattr(usage, "cost", None)
        if not isinstance(cost, int | float):
            cost = self._price.cost_usd(inputs, outputs) if self._price is not None and usage is not None else None
        return Usage(requests=attempts, input_tokens=inputs, output_tokens=outputs, cost_usd=cost)

    def _session(self) -> _Session:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            self._sessions[loop] = _Session(self._new_client(), asyncio.Semaphore(self._max_concurrency))
        return self._sessions[loop]

    def _new_client(self) -> openai.AsyncOpenAI:
        import openai

        # A redirect could carry the prompt to another host, and turns POST into GET anyway. A proxy from the
        # environment has no business with a server on this machine.
        options = {"follow_redirects": False, "trust_env": not is_loopback(self._base_url), "timeout": self._timeout_s}
        has_aiohttp = importlib.util.find_spec("aiohttp") is not None
        transport = openai.DefaultAioHttpClient if has_aiohttp else openai.DefaultAsyncHttpxClient
        return openai.AsyncOpenAI(
            # The SDK insists on some key and would else take OPENAI_API_KEY from the environment.
            api_key=self._api_key or "none",
            base_url=self._base_url,
            max_retries=0,
            timeout=self._timeout_s,
            http_client=transport(**options),  # type: ignore[arg-type]
        )


def _identity(request: ContinuationRequest) -> tuple[object, ...]:
    return (request.messages, request.prefix, request.max_tokens, request.seed)


def _stable_url(base_url: str) -> str:
    # A run's own teacher server comes back on another port; its answers are the same.
    return "loopback" if is_loopback(base_url) else base_url


def _derived_seed(seed: int | None, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{sample}".encode()).digest()[:4], "big") >> 1


async def _all(work: Any) -> None:
    """Await all, then raise the first error: what is under way has been paid for and is recorded first."""
    jobs: list[Coroutine[Any, Any, object]] = list(work)
    for result in await asyncio.gather(*jobs, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
