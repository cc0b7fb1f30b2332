"""Anthropic's wording: the messages endpoint."""

from __future__ import annotations

from typing import Any, Final

from omniopd.teachers.cards import Card
from omniopd.teachers.dialects.base import Ask, Choice, HttpCall, Parsed
from omniopd.teachers.dialects.shapes import (
    answer_object,
    as_list,
    as_object,
    check_ask,
    count,
    make_usage,
    object_or_empty,
    sampling_fields,
    split_system,
    text_of,
    text_or_none,
    with_card_fields,
)
from omniopd.types import Usage

_VERSION = "2023-06-01"
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}


class AnthropicDialect:
    """Claude models. No seeds, and one sample for each request."""

    name: Final = "anthropic"

    def headers(self, card: Card, api_key: str | None) -> dict[str, str]:
        """Return the API's version and the key's header, if there is a key."""
        version = {"anthropic-version": _VERSION}
        return version if api_key is None else {**version, card.key_header or "x-api-key": api_key}

    def call(self, ask: Ask, card: Card) -> HttpCall:
        """Write the request."""
        check_ask(ask, self.name, ("prefill", "chat-turn", "chat"), takes_n=False)
        system, said = split_system(ask, self.name)
        turns: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
        if ask.transport == "prefill" and ask.prefix:
            turns.append({"role": "assistant", "content": _open_answer(ask, card)})
        body: dict[str, Any] = {
            "model": ask.model,
            "messages": turns,
            card.output_limit_field or "max_tokens": ask.max_tokens,
        }
        if system:
            body["system"] = system
        # A stop sequence of whitespace alone is refused.
        if card.can.stop and (stop := [text for text in ask.stop if text.strip()]):
            body["stop_sequences"] = stop
        body |= sampling_fields(ask, card)
        return HttpCall(path="/messages", body=with_card_fields(body, ask, card))

    def read(self, answer: Any, ask: Ask) -> Parsed:
        """Read the answer. Thinking blocks are no part of the text."""
        whole = answer_object(answer)
        blocks = [as_object(block, "a content block") for block in as_list(whole.get("content"), "content")]
        texts = [text_of(block.get("text"), "a text block") for block in blocks if block.get("type") == "text"]
        reason = text_or_none(whole.get("stop_reason"))
        refusal = None
        if reason == "refusal":
            details = object_or_empty(whole.get("stop_details"))
            refusal = text_or_none(details.get("explanation")) or text_or_none(details.get("category")) or ""
        choice = Choice(
            index=0,
            text="".join(texts),
            finish_reason=_FINISH.get(reason, reason) if reason else None,
            refusal=refusal,
        )
        return Parsed(choices=(choice,), usage=_usage(whole.get("usage")))


def _open_answer(ask: Ask, card: Card) -> str | list[dict[str, Any]]:
    """Return the partial answer; cut into blocks where that lets the prompt cache know the next longer one.

    The cache holds whole blocks up to a mark, so a text that grows within one block would never be found again.
    """
    cuts = [cut for cut in ask.cuts if 0 < cut <= len(ask.prefix)]
    if card.prompt_cache.mode != "explicit" or not cuts:
        return ask.prefix
    blocks: list[dict[str, Any]] = []
    start = marked = 0
    for end in sorted({*cuts, len(ask.prefix)}):
        # A block of whitespace alone is refused; it becomes the head of the next one.
        if (text := ask.prefix[start:end]).strip():
            blocks.append({"type": "text", "text": text})
            start = end
        if end == cuts[-1]:
            marked = len(blocks) - 1
    # Up to the mark it is read if it is there, and written, which costs more, if it is not: so never past the last end
    # that another request will share.
    blocks[max(0, marked)]["cache_control"] = {"type": "ephemeral"}
    return blocks


def _usage(value: Any) -> Usage | None:
    usage = object_or_empty(value)
    plain = count(usage.get("input_tokens"))
    read = count(usage.get("cache_read_input_tokens")) or 0
    written = count(usage.get("cache_creation_input_tokens")) or 0
    return make_usage(
        # What came from or went into the cache is counted apart here; everywhere else it is part of the input.
        None if plain is None else plain + read + written,
        count(usage.get("output_tokens")),
        cached=read,
        written=written,
        reasoning=count(object_or_empty(usage.get("output_tokens_details")).get("thinking_tokens")),
    )
