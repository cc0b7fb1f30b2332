"""From a request to what is written back for it: keys, limits, faults, samples. Knows nothing of sockets."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from .anthropic_wire import AnthropicWire
from .asked import Answer, Asked, RejectedError, Wire
from .faults import ON_THE_WIRE, Settings, applies, draw_fault, make_samples
from .gemini_wire import GeminiWire
from .log import Entry, Log, Window
from .openai_wire import OpenAIWire
from .world import identity_of

_CHAT_HEADS = {"": "openai", "/vllm": "vllm", "/openrouter": "openrouter", "/mistral": "mistral", "/beta": "deepseek"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do about a request."""

    entry: Entry
    answer: Answer | None
    """None: never answer."""
    delay_s: float = 0.0
    breaks: str | None = None
    """`reset`, `reset-mid` or `truncated`."""


@dataclass(kw_only=True)
class Teaching:
    """The server behind the socket."""

    settings: Settings
    log: Log
    _requests: Window = field(default_factory=Window)
    _tokens: Window = field(default_factory=Window)
    _given: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._openai = {name: OpenAIWire(name) for name in _CHAT_HEADS.values()}
        self._anthropic = AnthropicWire()
        self._gemini = GeminiWire()

    def reset(self) -> None:
        """Forget all requests. The settings stay."""
        self.log.clear()
        self._requests, self._tokens = Window(), Window()
        self._given.clear()
        self._anthropic = AnthropicWire()

    def wire(self, path: str) -> Wire | None:
        """Return who answers at a path; None: nobody."""
        if path == "/v1/messages" or path.startswith("/v1/messages/batches"):
            return self._anthropic
        if path.startswith("/v1beta/models/") and path.endswith(":generateContent"):
            return self._gemini
        for ending in ("/chat/completions", "/completions", "/files", "/batches"):
            if path.endswith(ending):
                head = path.removesuffix(ending).removesuffix("/v1")
                return self._openai.get(_CHAT_HEADS.get(head, ""))
        return self._openai["openai"] if path.startswith(("/v1/files/", "/v1/batches/")) else None

    def is_known(self, wire: Wire, headers: Mapping[str, str], query: Mapping[str, str]) -> bool:
        """Whether the request carries the right key."""
        settings = self.settings
        return settings.mode != "auth" and (settings.key is None or wire.key(headers, query) == settings.key)

    def plan(self, wire: Wire, path: str, headers: Mapping[str, str], query: Mapping[str, str], content: bytes) -> Plan:
        """Decide what a request for samples gets, and note it."""
        settings = self.settings
        body_hash = blake2b(path.encode() + b"\n" + content, digest_size=8).hexdigest()
        entry = self.log.begin(path, wire.name, body_hash)
        if not self.is_known(wire, headers, query):
            return self._refused(entry, "auth", wire.fail("auth"))
        try:
            asked = self.read(wire, content, path, headers)
        except RejectedError as error:
            return self._refused(entry, "rejected", wire.reject(error))
        self._note(entry, asked)
        if settings.mode == "quota":
            return self._refused(entry, "quota", wire.fail("quota"))
        limits = self._limits(wire, asked)
        if isinstance(limits, float):
            self.log.violations += 1
            self.log.wait_before(body_hash, limits)
            return self._refused(entry, "limit", wire.fail("rate", retry_after_s=limits))
        fault = draw_fault(settings, body_hash, entry.times_seen)
        fault = fault if applies(fault, asked) else None
        return self._answered(wire, asked, entry, fault, limits)

    def _answered(self, wire: Wire, asked: Asked, entry: Entry, fault: str | None, headers: Mapping[str, str]) -> Plan:
        settings = self.settings
        entry.decision = fault or "served"
        if fault == "hang":
            return Plan(entry=entry, answer=None)
        if fault == "429":
            # The wait is counted from when the client reads of it.
            self.log.wait_before(entry.body_hash, settings.latency_s + settings.retry_after_s)
        if fault in ("429", "429-bare", "500", "503", "529"):
            kind = "rate" if fault.startswith("429") else fault
            wait = settings.retry_after_s if fault == "429" else None
            answer = wire.fail(kind, retry_after_s=wait)
            entry.status = answer.status
            return Plan(entry=entry, answer=answer, delay_s=settings.latency_s)
        entry.status = 200
        delay = settings.latency_s + (settings.slow_s if fault == "slow" else 0.0)
        body = self.complete(wire, asked, entry, fault)
        return Plan(
            entry=entry,
            answer=Answer(status=200, body=body, headers=headers),
            delay_s=delay,
            breaks=fault if fault in ON_THE_WIRE else None,
        )

    def read(self, wire: Wire, content: bytes, path: str, headers: Mapping[str, str]) -> Asked:
        """Read a request and check what holds for all dialects. Raises RejectedError."""
        try:
            body = json.loads(content)
        except ValueError:
            raise RejectedError("We could not parse the JSON body of your request.") from None
        asked = wire.read(body, path, headers)
        if not isinstance(asked.model, str) or asked.model.startswith("missing"):
            raise RejectedError(
                f"The model '{asked.model}' does not exist or you do not have access to it.",
                status=404,
                code="model_not_found",
            )
        most = self.settings.max_context_tokens
        if most is not None and asked.input_tokens + (asked.max_tokens or 0) > most:
            raise RejectedError(
                f"This model's maximum context length is {most} tokens, however you requested "
                f"{asked.input_tokens + (asked.max_tokens or 0)} tokens.",
                code="context_length_exceeded",
            )
        return asked

    def complete(
        self, wire: Wire, asked: Asked, entry: Entry, fault: str | None, *, price_factor: float = 1.0
    ) -> dict[str, Any]:
        """Write the answer and note what it costs."""
        settings = self.settings
        self._note(entry, asked)
        first = 0
        if settings.repeats == "fresh":
            first = self._given[entry.identities[0]]
            self._given[entry.identities[0]] += asked.n if asked.honors_n and settings.honors_n else 1
        samples = make_samples(asked, settings, fault, first)
        entry.choices = len(samples)
        entry.input_tokens = asked.input_tokens
        entry.output_tokens = sum(sample.tokens + sample.thinking_tokens for sample in samples)
        price = entry.input_tokens * settings.input_usd_per_mtok + entry.output_tokens * settings.output_usd_per_mtok
        entry.usd = price_factor * price / 1e6
        return wire.answer(asked, samples, entry.number)

    def _note(self, entry: Entry, asked: Asked) -> None:
        entry.identities = tuple(identity_of(handed.turns, handed.sent) for handed in asked.prompts)
        entry.how = asked.prompts[0].how
        entry.n, entry.seeds = asked.n, asked.seeds

    def _refused(self, entry: Entry, decision: str, answer: Answer) -> Plan:
        entry.decision, entry.status = decision, answer.status
        return Plan(entry=entry, answer=answer)

    def _limits(self, wire: Wire, asked: Asked) -> dict[str, str] | float:
        """Let a request in and return the headers that say so, or return how long it has to wait."""
        settings, now = self.settings, time.monotonic()
        if settings.max_in_flight is not None and self.log.in_flight > settings.max_in_flight:
            return settings.retry_after_s
        headers: dict[str, str] = {}
        share = settings.window_s / 60
        cost = asked.input_tokens + asked.n * len(asked.prompts) * (asked.max_tokens or 0)
        self._requests.expire(now, settings.window_s)
        self._tokens.expire(now, settings.window_s)
        if settings.tokens_per_minute is not None and self._tokens.used + cost > settings.tokens_per_minute * share:
            return max(0.001, self._tokens.wait_s(now, settings.window_s))
        if settings.requests_per_minute is not None:
            most = int(settings.requests_per_minute * share)
            wait = self._requests.wait_s(now, settings.window_s)
            if self._requests.used >= most:
                return max(0.001, wait)
            left = most - self._requests.used - 1
            headers = wire.limits(settings.requests_per_minute, left, wait or settings.window_s)
            self._requests.add(now, 1)
        if settings.tokens_per_minute is not None:
            self._tokens.add(now, cost)
        return headers
