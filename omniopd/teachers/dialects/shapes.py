"""What the dialects share: a card's fields put into a body, a conversation cut into turns, JSON of any shape read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omniopd.errors import ConfigError, TeacherCapabilityError
from omniopd.teachers.cards import Card, Transport
from omniopd.teachers.dialects.base import Ask
from omniopd.types import Usage

# What only the dialect may say: a card that said it too would ask for something else than what is then read.
_WRITTEN_HERE = frozenset({"model", "messages", "contents", "prompt", "n", "stream", "raw"})
_SAFE_CODE = re.compile(r"[\w.-]{1,40}")


def with_card_fields(body: Mapping[str, Any], ask: Ask, card: Card) -> dict[str, Any]:
    """Return the body with the card's own fields for this way of asking merged in, nested ones too.

    A prefill without text is an ordinary chat request. Raises ConfigError when the card sets what is written here.
    """
    transport: Transport = "chat" if ask.transport == "prefill" and not ask.prefix else ask.transport
    fields = card.body.of(transport)
    if clash := sorted(_WRITTEN_HERE & set(fields)):
        raise ConfigError(
            f"the body of the teacher card {card.id} sets {', '.join(clash)}, which omniopd writes itself; "
            "take it out of the card"
        )
    return merged(body, fields)


def sampling_fields(ask: Ask, card: Card, *, top_p: str = "top_p") -> dict[str, float]:
    """Return temperature and top_p, where they are set and the server takes them."""
    if not card.can.sampling:
        return {}
    given = {"temperature": ask.temperature, top_p: ask.top_p}
    return {name: value for name, value in given.items() if value is not None}


def check_ask(ask: Ask, dialect: str, transports: Sequence[Transport], *, takes_n: bool) -> None:
    """Raise TeacherCapabilityError for what the dialect has no words for."""
    if ask.transport not in transports:
        raise TeacherCapabilityError(
            f"the {dialect} API cannot be handed a partial answer as continuation: {ask.transport}; "
            f"use {', '.join(transports)}"
        )
    if ask.n > 1 and not takes_n:
        raise TeacherCapabilityError(
            f"the {dialect} API gives one sample for each request and {ask.n} were asked for; set can.n: false in the "
            "card, then they are asked for one by one"
        )


def bearer(card: Card, api_key: str | None) -> dict[str, str]:
    """Return the key's header: the card's own, or the usual one; nothing without a key."""
    if api_key is None:
        return {}
    return {card.key_header: api_key} if card.key_header else {"Authorization": f"Bearer {api_key}"}


def chat_turns(ask: Ask, card: Card) -> list[dict[str, Any]]:
    """Return the conversation as OpenAI words it, with the open answer of a prefill as its last turn."""
    turns: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in ask.messages]
    if ask.transport == "prefill" and ask.prefix:
        turns.append({"role": "assistant", "content": ask.prefix, **card.body.prefill_message})
    return turns


def split_system(ask: Ask, dialect: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the system text and the user's and assistant's turns, for APIs that keep the two apart.

    Consecutive messages of one role become one turn, with a blank line between them.
    """
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    for message in ask.messages:
        if message.role in ("system", "developer"):
            system.append(message.content)
        elif message.role not in ("user", "assistant"):
            raise TeacherCapabilityError(
                f"a message has the role {message.role!r}; the {dialect} API is sent system, user and assistant only"
            )
        elif turns and turns[-1][0] == message.role:
            turns[-1] = (message.role, f"{turns[-1][1]}\n\n{message.content}")
        else:
            turns.append((message.role, message.content))
    if not turns:
        raise TeacherCapabilityError(
            f"the conversation has no user message; the {dialect} API needs one besides the system text"
        )
    return "\n\n".join(system), turns


def answer_object(answer: Any) -> Mapping[str, Any]:
    """Return the answer if it may be a completion. Raises ValueError; an error's own words may hold a key."""
    whole = as_object(answer, "the answer")
    if error := whole.get("error"):
        codes = [error.get("code"), error.get("type"), error.get("status")] if isinstance(error, Mapping) else []
        code = next((str(c) for c in codes if isinstance(c, int | str) and _SAFE_CODE.fullmatch(str(c))), "no code")
        raise ValueError(f"the answer is an error ({code})")
    return whole


def as_object(value: Any, what: str) -> Mapping[str, Any]:
    """Return a JSON object. Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {_kind(value)}, expected an object")
    return value


def as_list(value: Any, what: str) -> list[Any]:
    """Return a JSON list. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is {_kind(value)}, expected a list")
    return value


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def text_of(content: Any, what: str) -> str:
    """Return the text of a message: a string, or a list of typed parts; null is no text. Raises ValueError."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [as_object(part, f"a part of {what}") for part in as_list(content, what)]
    return "".join(text_of(part.get("text"), what) for part in parts if part.get("type", "text") == "text")


def positions(items: Sequence[Mapping[str, Any]], limit: int) -> list[int]:
    """Return the index of each sample: what the items say where that makes sense, else their order."""
    # Where zeros are left out of the JSON, the first item says nothing.
    said = [item.get("index") or 0 for item in items]
    makes_sense = all(count(i) is not None and i < limit for i in said) and len(set(map(str, said))) == len(said)
    return said if makes_sense else list(range(len(items)))


def count(value: Any) -> int | None:
    """Return a number of tokens; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def dollars(value: Any) -> float | None:
    """Return an amount of money; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value >= 0 else None


def make_usage(
    inputs: int | None,
    outputs: int | None,
    *,
    cached: int | None = None,
    written: int | None = None,
    reasoning: int | None = None,
    cost_usd: float | None = None,
) -> Usage | None:
    """Return the bill of one request; None when it does not say what was used, which is not nothing."""
    if inputs is None or outputs is None:
        return None if cost_usd is None else Usage(requests=1, cost_usd=cost_usd)
    cached = min(cached or 0, inputs)
    return Usage(
        requests=1,
        input_tokens=inputs,
        output_tokens=outputs,
        cost_usd=cost_usd,
        cached_input_tokens=cached,
        cache_write_tokens=min(written or 0, inputs - cached),
        reasoning_tokens=min(reasoning or 0, outputs),
    )


def object_or_empty(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(first)
    for name, value in second.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _kind(value: Any) -> str:
    names: dict[type, str] = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), "a number")
