"""What a dialect is: one provider's way to write a request and to word its answer. Pure data in, pure data out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from omniopd.teachers.cards import Card, Transport
from omniopd.types import Message, Usage, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(Value):
    """One HTTP request for samples, before it is put into a provider's words."""

    model: str
    transport: Transport
    n: int
    """Samples of each prompt."""
    max_tokens: int
    """Of each sample; where a model thinks first, its thinking included."""
    messages: tuple[Message, ...] = ()
    """The conversation as it is sent; instructions of the chat transports included, an open answer not."""
    prefix: str = ""
    """`prefill`: the open answer, without trailing whitespace. Empty: the model begins the answer."""
    cuts: tuple[int, ...] = ()
    """`prefill`: where shorter prefixes of the same answer end, ascending, and the end of this one if longer ones will
    go on from it. A prompt cache that has to be told is told of the last."""
    prompts: tuple[str, ...] = ()
    """`completions`: the raw texts; more than one only where the card's `batch_prompts` allows it."""
    prompt_ids: tuple[int, ...] = ()
    """`tokens`: the one raw prompt."""
    temperature: float | None = None
    """None leaves it to the server."""
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    """One for each prompt, or one for the conversation; empty where there is none."""
    schema: Mapping[str, Any] | None = None
    """`structured`: the JSON schema of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall(Value):
    """A POST request: where below the base URL, and what."""

    path: str
    """With a leading slash."""
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Value):
    """One sample as the server words it."""

    index: int
    """0..n*prompts-1 in the order of the prompts, then of the samples."""
    text: str
    """Empty when there is none; hidden thinking is never part of it."""
    finish_reason: str | None = None
    """`stop`, `length` or `content_filter` where the server says the like; else its own word."""
    refusal: str | None = None
    """What the server says where it declines in a field of its own; may be empty text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed(Value):
    """One HTTP answer."""

    choices: tuple[Choice, ...]
    """Sorted by index."""
    usage: Usage | None
    """requests=1 and the tokens; `cost_usd` only where the server itself says what it cost. None when it says nothing
    of tokens either."""


class Dialect(Protocol):
    """One provider's wording."""

    @property
    def name(self) -> str:
        """As cards call it."""
        ...

    def headers(self, card: Card, api_key: str | None) -> dict[str, str]:
        """Return the headers of every request, the key among them."""
        ...

    def call(self, ask: Ask, card: Card) -> HttpCall:
        """Write the request, the card's own body fields included. `extra_body` is added by the caller.

        Raises TeacherCapabilityError for a transport that the dialect does not have.
        """
        ...

    def read(self, answer: Any, ask: Ask) -> Parsed:
        """Read the decoded JSON of a 200 answer. Raises ValueError when it is no completion."""
        ...
