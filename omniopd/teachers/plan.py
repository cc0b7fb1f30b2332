"""How one teacher is asked: everything about a request and its answer but the network.

ContinuationRequest -> Ask -> HttpCall ... Parsed -> Reply
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omniopd.errors import ConfigError, TeacherCapabilityError
from omniopd.teachers.base import Bound, ContinuationRequest, Reply
from omniopd.teachers.cards import Card, ModelPrice, Transport
from omniopd.teachers.continuation import (
    ASKED,
    INSTRUCTION_VERSION,
    STRUCTURED_SCHEMA,
    continuation_messages,
    sent_prefix,
    stop_sequences,
)
from omniopd.teachers.dialects.base import Ask, Choice, Dialect, HttpCall, Parsed
from omniopd.teachers.dialects.shapes import merged
from omniopd.teachers.repair import clean_continuation
from omniopd.types import Message, Usage

Render = Callable[[Sequence[Message]], str]
"""Writes a conversation as the text that the model reads, up to where its answer begins."""

# What has its own setting must not also come in through extra_body: one of the two would be a lie.
RESERVED = frozenset(
    {"model", "messages", "contents", "prompt", "system", "systemInstruction", "n", "seed", "seeds", "stream"}
    | {"temperature", "top_p", "max_tokens", "max_completion_tokens", "max_output_tokens", "stop", "stop_sequences"}
    | {"raw", "format", "response_format", "best_of", "echo", "candidateCount"}
)
_RESERVED_BELOW = {
    "generationConfig": frozenset(
        {"maxOutputTokens", "candidateCount", "temperature", "topP", "seed", "stopSequences"}
    ),
    "options": frozenset({"num_predict", "temperature", "top_p", "seed", "stop"}),
}
"""The same in the objects that some dialects put it into. Whatever raises the bill must be seen by the bound."""
_FRAME_TOKENS = 256
"""Room for a chat template's own tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What shapes every request to one teacher.

    Raises ConfigError when the transport lacks what it needs, or `extra_body` holds what has a setting of its own.
    """

    teacher_id: str
    model: str
    base_url: str
    card: Card
    """As it holds for this model: `Card.for_model`."""
    dialect: Dialect
    transport: Transport
    render: Render | None = None
    """Needed by `completions`."""
    temperature: float | None = 1.0
    top_p: float | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None
    """What the ledger knows the server by, if not its base URL: what it serves, where the run itself started it."""

    def __post_init__(self) -> None:
        if self.transport == "completions" and self.render is None:
            raise ConfigError(
                f"the teacher {self.teacher_id} takes raw prompts (continuation: completions) and nothing says how to "
                "write a conversation as text; give the folder of its tokenizer, or use another continuation"
            )
        if clash := sorted(_clashes(self.extra_body)):
            raise ConfigError(f"extra_body holds {', '.join(clash)}, which has a setting of its own; use that")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that shapes an answer besides the request, for the ledger's key."""
        marks: dict[str, Any] = {
            "teacher": self.teacher_id,
            "base_url": self.address or self.base_url,
            "transport": self.transport,
            "body": merged(self.card.body.of(self.transport), self.extra_body),
        }
        if self.transport == "prefill":
            # An empty prefix is sent as a plain chat.
            marks["chat_body"] = merged(self.card.body.of("chat"), self.extra_body)
            marks["prefill_message"] = self.card.body.prefill_message
        if self.card.can.sampling:
            given = {"temperature": self.temperature, "top_p": self.top_p}
            marks |= {name: value for name, value in given.items() if value is not None}
        if self.transport in ASKED:
            marks["instruction"] = INSTRUCTION_VERSION
        if self.render is not None:
            probe = self.render([Message(role="user", content="?")])
            marks["template"] = hashlib.sha256(probe.encode()).hexdigest()[:16]
        return marks

    @property
    def is_greedy(self) -> bool:
        """Whether all samples of a request are the same text, which is then bought once."""
        return self.temperature == 0 and self.card.can.sampling

    @property
    def largest_n(self) -> int:
        """How many samples one HTTP request may ask for."""
        return (self.card.can.max_n or 1_000_000) if self.card.can.n else 1

    def asks(self, request: ContinuationRequest) -> list[tuple[Ask, tuple[int, ...]]]:
        """Split one request into HTTP requests, each with the numbers of the samples it asks for."""
        size = request.n if self.is_greedy else min(self.largest_n, request.n)
        parts = [tuple(range(i, min(i + size, request.n))) for i in range(0, request.n, size)]
        headroom = self.card.thinking.headroom_tokens
        return [(self.ask([request], n=len(part), first=part[0], headroom_tokens=headroom), part) for part in parts]

    def ask(
        self,
        requests: Sequence[ContinuationRequest],
        *,
        n: int,
        first: int = 0,
        headroom_tokens: int = 0,
        cuts: Sequence[int] = (),
    ) -> Ask:
        """Word `n` samples of each request, the first being number `first`.

        Several requests share one only as raw prompts with the same limit. `headroom_tokens` go on top of the limit,
        for hidden thinking; `cuts` are where prefixes of the same answer end, see `Ask`.
        """
        request = requests[0]
        prefix = sent_prefix(request.prefix)
        shared: dict[str, Any] = {
            "model": self.model,
            "transport": self.transport,
            "n": 1 if self.is_greedy else n,
            "max_tokens": request.max_tokens + headroom_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seeds": self._seeds(requests, first),
        }
        if self.transport == "tokens":
            if request.token_ids is None:
                raise TeacherCapabilityError(
                    f"the teacher {self.teacher_id} is asked with token ids (continuation: tokens) and the request has "
                    "none; only a run whose student has the teacher's vocabulary gives them; use another continuation"
                )
            return Ask(prompt_ids=request.token_ids, **shared)
        if self.transport == "completions":
            assert self.render is not None
            prompts = tuple(self.render(r.messages) + sent_prefix(r.prefix) for r in requests)
            return Ask(prompts=prompts, **shared)
        if self.transport == "prefill":
            fitting = tuple(sorted({cut for cut in cuts if 0 < cut <= len(prefix)}))
            return Ask(messages=request.messages, prefix=prefix, cuts=fitting, **shared)
        asked = continuation_messages(
            request.messages, request.prefix, max_tokens=request.max_tokens, transport=self.transport
        )
        is_plain = not prefix  # Then nothing is quoted and no form is asked for.
        return Ask(
            messages=asked,
            stop=() if is_plain else stop_sequences(self.transport, request.prefix),
            schema=STRUCTURED_SCHEMA if self.transport == "structured" and not is_plain else None,
            **shared,
        )

    def call(self, ask: Ask) -> HttpCall:
        """Write the HTTP request. Fields of the user's extra_body win over the card's."""
        call = self.dialect.call(ask, self.card)
        return HttpCall(path=call.path, body=merged(call.body, self.extra_body)) if self.extra_body else call

    def bound(self, ask: Ask, price: ModelPrice | None) -> Bound:
        """Return the most that the request can cost: a token for each byte sent, every sample at full length.

        The prompt counts once for all samples, as servers that take `n` bill it.
        """
        sent = sum(len(m.content.encode("utf-8", "replace")) + 8 for m in ask.messages)
        sent += len(ask.prefix.encode("utf-8", "replace")) + len(ask.prompt_ids)
        sent += sum(len(prompt.encode("utf-8", "replace")) for prompt in ask.prompts)
        inputs = sent + _FRAME_TOKENS
        outputs = ask.max_tokens * ask.n * max(1, len(ask.prompts))
        usd = None if price is None else price.highest_cost_usd(inputs, outputs)
        return Bound(tokens=inputs + outputs, usd=usd)

    def reply(self, position: int, request: ContinuationRequest, sample: int, choice: Choice, usage: Usage) -> Reply:
        """Make a sample of what the server wrote."""
        continuation = clean_continuation(
            request.prefix,
            choice.text,
            transport=self.transport,
            finish_reason=choice.finish_reason,
            refusal=choice.refusal,
            echoes_prefix=True if self.transport == "prefill" and self.card.echoes_prefix else None,
            reasoning_tokens=usage.reasoning_tokens,
        )
        return Reply(position=position, sample=sample, raw=choice.text, continuation=continuation)

    def replies(
        self, position: int, request: ContinuationRequest, samples: Sequence[int], parsed: Parsed
    ) -> list[Reply]:
        """Make samples of one answer to one request; choices beyond those asked for are dropped."""
        usage = parsed.usage or Usage()
        choices = parsed.choices[:1] * len(samples) if self.is_greedy else parsed.choices
        return [
            self.reply(position, request, sample, choice, usage)
            for sample, choice in zip(samples, choices, strict=False)
        ]

    def _seeds(self, requests: Sequence[ContinuationRequest], first: int) -> tuple[int, ...]:
        if not self.card.can.seed:
            return ()
        seeds: list[int] = []
        for request in requests:
            if request.seed is None:
                return ()
            number = request.sample_numbers[first] if request.sample_numbers else first
            seeds.append(request.seed if number == 0 else derived_seed(request.seed, number))
        # Some servers take no more than 31 bits.
        return tuple(seeds) if self.card.can.prompt_seeds else (seeds[0] % 2**31,)


def _clashes(extra_body: Mapping[str, Any]) -> set[str]:
    found = set(RESERVED & set(extra_body))
    for place, names in _RESERVED_BELOW.items():
        below = extra_body.get(place)
        found |= {f"{place}.{name}" for name in names if isinstance(below, Mapping) and name in below}
    return found


def priced(usage: Usage, price: ModelPrice | None) -> Usage:
    """Return the usage with its cost: what the server says, else the tokens at this price, else None."""
    import dataclasses

    if usage.cost_usd is not None or price is None:
        return usage
    cost = price.cost_usd(
        usage.input_tokens,
        usage.output_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )
    return dataclasses.replace(usage, cost_usd=cost)


def derived_seed(seed: int | None, sample: int) -> int:
    """Return the seed of a sample that is asked for alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{sample}".encode()).digest()[:4], "big") >> 1
