"""What every dialect boils down to: who is asked for how many samples of what, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .world import Handed


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A valid request."""

    model: str
    prompts: tuple[Handed, ...]
    """One; several in a raw completion request only."""
    n: int = 1
    """Samples of each that the client asks for."""
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seeds: tuple[int | None, ...] = (None,)
    """One for each prompt."""
    is_greedy: bool = False
    thinks: bool = True
    """Hidden thinking is not switched off; matters only where the server is set to think."""
    schema_field: str | None = None
    """The answer must be JSON with the text in this field."""
    input_tokens: int = 0
    honors_n: bool = True
    """Without: one choice comes back, whatever `n` says."""
    echoes: bool = False
    """Every answer begins with the prefix."""
    cache_key: tuple[tuple[str, int, bool], ...] = ()
    """Anthropic: (hash of all up to here, tokens up to here, is marked) for each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One choice."""

    text: str
    tokens: int
    finish: str = "stop"
    """`stop`, `length`, `sequence` (a stop sequence) or `content_filter`."""
    refusal: str | None = None
    thinking_tokens: int = 0
    stop_sequence: str | None = None


class RejectedError(Exception):
    """The request is not what the provider takes."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)


class Wire(Protocol):
    """One provider's wording."""

    name: str

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        """Return the key that the request carries."""
        ...

    def read(self, body: Any, path: str, headers: Mapping[str, str]) -> Asked:
        """Read a request. Raises RejectedError."""
        ...

    def answer(self, asked: Asked, samples: list[Sample], number: int) -> dict[str, Any]:
        """Word the samples."""
        ...

    def reject(self, error: RejectedError) -> Answer:
        """Word a request that is not taken."""
        ...

    def fail(self, kind: str, *, retry_after_s: float | None = None) -> Answer:
        """Word a failure: `auth`, `quota`, `rate`, `500`, `503` or `529`."""
        ...

    def limits(self, limit: int, remaining: int, reset_s: float) -> dict[str, str]:
        """Word the state of the request limit as headers."""
        ...


def names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def require(body: Mapping[str, Any], *fields: str) -> None:
    """Raise RejectedError for a field that is missing."""
    for name in fields:
        if name not in body:
            raise RejectedError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def number(body: Mapping[str, Any], name: str, low: float, high: float, *, whole: bool = False) -> Any:
    """Return a number within its range, or None. Raises RejectedError."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise RejectedError(f"Invalid type for '{name}': got {value!r}.", param=name, code="invalid_type")
    if not low <= value <= high:
        raise RejectedError(
            f"Invalid '{name}': {value!r} is not between {low} and {high}.", param=name, code="invalid_value"
        )
    return value


def stops(value: Any, *, most: int = 4, name: str = "stop") -> tuple[str, ...]:
    """Return stop sequences given as text, list or None. Raises RejectedError."""
    found = (value,) if isinstance(value, str) else tuple(value or ())
    if len(found) > most or not all(isinstance(text, str) and text for text in found):
        raise RejectedError(f"Invalid '{name}': {value!r}.", param=name, code="invalid_value")
    return found


def text_of(content: Any, where: str) -> str:
    """Return the text of a message: a string, or a list of text blocks. Raises RejectedError."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(b, dict) and isinstance(b.get("text"), str) for b in content):
        return "".join(block["text"] for block in content)
    raise RejectedError(f"Invalid type for '{where}': got {type(content).__name__}.", param=where, code="invalid_type")


def schema_field(schema: Any) -> str:
    """Return the first text field of a JSON schema. Raises RejectedError."""
    fields = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(fields, dict) or not fields:
        raise RejectedError("Invalid schema: it has no properties.", param="schema", code="invalid_value")
    return str(next(iter(fields)))


def estimate(texts: int, characters: int) -> int:
    """Count tokens: four characters each, and three for each message."""
    return 3 * texts + (characters + 3) // 4
