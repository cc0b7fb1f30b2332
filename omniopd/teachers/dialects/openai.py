"""OpenAI's wording, which most servers understand: chat completions, and completions of a raw prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from omniopd.errors import TeacherCapabilityError
from omniopd.teachers.cards import Card
from omniopd.teachers.dialects.base import Ask, Choice, HttpCall, Parsed
from omniopd.teachers.dialects.shapes import (
    answer_object,
    as_list,
    as_object,
    bearer,
    chat_turns,
    count,
    dollars,
    make_usage,
    object_or_empty,
    positions,
    sampling_fields,
    text_of,
    text_or_none,
    with_card_fields,
)
from omniopd.types import Usage

_RAW = ("tokens", "completions")
# Together ends with `eos`; Mistral calls a full context `model_length`.
_FINISH = {"eos": "stop", "model_length": "length"}


class OpenAIDialect:
    """OpenAI and the servers that are compatible with it."""

    name: Final = "openai"

    def headers(self, card: Card, api_key: str | None) -> dict[str, str]:
        """Return the key's header, if there is a key."""
        return bearer(card, api_key)

    def call(self, ask: Ask, card: Card) -> HttpCall:
        """Write the request."""
        if ask.transport in _RAW:
            path, body = "/completions", self._raw(ask)
        else:
            path, body = "/chat/completions", self._chat(ask, card)
        if ask.n > 1:
            body["n"] = ask.n
        if ask.stop and card.can.stop:
            body["stop"] = list(ask.stop)
        body |= sampling_fields(ask, card) | _seed(ask, card)
        return HttpCall(path=path, body=with_card_fields(body, ask, card))

    def read(self, answer: Any, ask: Ask) -> Parsed:
        """Read the answer. Choices are numbered prompt by prompt, as servers do."""
        whole = answer_object(answer)
        items = [as_object(item, "a choice") for item in as_list(whole.get("choices"), "choices")]
        indices = positions(items, ask.n * max(1, len(ask.prompts)))
        read = _read_text if ask.transport in _RAW else _read_message
        choices = [read(item, index) for item, index in zip(items, indices, strict=True)]
        return Parsed(choices=tuple(sorted(choices, key=lambda c: c.index)), usage=_usage(whole.get("usage")))

    def _raw(self, ask: Ask) -> dict[str, Any]:
        prompt: Any
        if ask.transport == "tokens":
            prompt = list(ask.prompt_ids)
        else:
            prompt = list(ask.prompts) if len(ask.prompts) > 1 else ask.prompts[0]
        return {"model": ask.model, "prompt": prompt, "max_tokens": ask.max_tokens}

    def _chat(self, ask: Ask, card: Card) -> dict[str, Any]:
        body = {
            "model": ask.model,
            "messages": chat_turns(ask, card),
            card.output_limit_field or "max_tokens": ask.max_tokens,
        }
        if ask.transport == "structured" and ask.schema is not None:
            schema = {"name": "continuation", "strict": True, "schema": dict(ask.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def _seed(ask: Ask, card: Card) -> dict[str, Any]:
    if not ask.seeds or not card.can.seed:
        return {}
    if len(ask.prompts) > 1 and card.can.prompt_seeds and len(ask.seeds) == len(ask.prompts):
        return {"seeds": list(ask.seeds)}
    if len(set(ask.seeds)) > 1:
        raise TeacherCapabilityError(
            f"{len(ask.seeds)} prompts with different seeds share one request, and the teacher {card.id} takes one "
            "seed for all of them; ask prompts of different seeds one by one"
        )
    return {"seed": ask.seeds[0]}


def _read_text(item: Mapping[str, Any], index: int) -> Choice:
    if "text" not in item:
        raise ValueError("a choice has no text")
    return Choice(index=index, text=text_of(item["text"], "a choice's text"), finish_reason=_finish(item))


def _read_message(item: Mapping[str, Any], index: int) -> Choice:
    # `reasoning_content` and `reasoning` are hidden thinking: no part of the answer.
    message = as_object(item.get("message"), "a choice's message")
    return Choice(
        index=index,
        text=text_of(message.get("content"), "a message's content"),
        finish_reason=_finish(item),
        refusal=text_or_none(message.get("refusal")),
    )


def _finish(item: Mapping[str, Any]) -> str | None:
    reason = text_or_none(item.get("finish_reason"))
    return _FINISH.get(reason, reason) if reason else None


def _usage(value: Any) -> Usage | None:
    usage = object_or_empty(value)
    prompt = object_or_empty(usage.get("prompt_tokens_details"))
    completion = object_or_empty(usage.get("completion_tokens_details"))
    cached = count(prompt.get("cached_tokens"))
    return make_usage(
        count(usage.get("prompt_tokens")),
        count(usage.get("completion_tokens")),
        # DeepSeek has a field of its own.
        cached=count(usage.get("prompt_cache_hit_tokens")) if cached is None else cached,
        written=count(prompt.get("cache_write_tokens")),
        reasoning=count(completion.get("reasoning_tokens")),
        # OpenRouter's bill, in dollars.
        cost_usd=dollars(usage.get("cost")),
    )
