"""Google's wording: generateContent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

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
    positions,
    sampling_fields,
    split_system,
    text_of,
    text_or_none,
    with_card_fields,
)
from omniopd.types import Usage

_FILTERED = frozenset({"SAFETY", "PROHIBITED_CONTENT", "RECITATION", "BLOCKLIST", "SPII"})
_FINISH = {"STOP": "stop", "MAX_TOKENS": "length", **dict.fromkeys(_FILTERED, "content_filter")}


class GeminiDialect:
    """Gemini models, by Google's own API."""

    name: Final = "gemini"

    def headers(self, card: Card, api_key: str | None) -> dict[str, str]:
        """Return the key's header, if there is a key."""
        return {} if api_key is None else {card.key_header or "x-goog-api-key": api_key}

    def call(self, ask: Ask, card: Card) -> HttpCall:
        """Write the request. The model's name is part of the path."""
        check_ask(ask, self.name, ("prefill", "chat-turn", "chat", "structured"), takes_n=True)
        system, said = split_system(ask, self.name)
        contents = [_turn("model" if role == "assistant" else "user", text) for role, text in said]
        if ask.transport == "prefill" and ask.prefix:
            contents.append(_turn("model", ask.prefix))
        body: dict[str, Any] = {"contents": contents, "generationConfig": _config(ask, card)}
        if system:
            body["systemInstruction"] = {"parts": [{"text": system}]}
        model = ask.model if "/" in ask.model else f"models/{ask.model}"
        return HttpCall(path=f"/{quote(model)}:generateContent", body=with_card_fields(body, ask, card))

    def read(self, answer: Any, ask: Ask) -> Parsed:
        """Read the answer. A prompt that was blocked is every sample refused."""
        whole = answer_object(answer)
        usage = _usage(whole.get("usageMetadata"))
        if not whole.get("candidates"):
            blocked = text_or_none(object_or_empty(whole.get("promptFeedback")).get("blockReason"))
            if blocked is None and usage is None:
                raise ValueError("the answer has neither candidates nor a reason why not")
            count_refused = 0 if blocked is None else ask.n
            refused = [
                Choice(index=i, text="", finish_reason="content_filter", refusal=blocked) for i in range(count_refused)
            ]
            return Parsed(choices=tuple(refused), usage=usage)
        items = [as_object(item, "a candidate") for item in as_list(whole["candidates"], "candidates")]
        choices = [_choice(item, index) for item, index in zip(items, positions(items, ask.n), strict=True)]
        return Parsed(choices=tuple(sorted(choices, key=lambda c: c.index)), usage=usage)


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


def _config(ask: Ask, card: Card) -> dict[str, Any]:
    config: dict[str, Any] = {card.output_limit_field or "maxOutputTokens": ask.max_tokens}
    config |= sampling_fields(ask, card, top_p="topP")
    if ask.n > 1:
        config["candidateCount"] = ask.n
    if ask.seeds and card.can.seed:
        config["seed"] = ask.seeds[0]
    if ask.stop and card.can.stop:
        config["stopSequences"] = list(ask.stop)
    if ask.transport == "structured" and ask.schema is not None:
        config |= {"responseMimeType": "application/json", "responseJsonSchema": dict(ask.schema)}
    return config


def _choice(item: Mapping[str, Any], index: int) -> Choice:
    reason = text_or_none(item.get("finishReason"))
    parts = as_list(object_or_empty(item.get("content")).get("parts", []), "a candidate's parts")
    texts = [
        text_of(part.get("text"), "a part's text")
        for part in (as_object(part, "a part") for part in parts)
        if part.get("thought") is not True
    ]
    return Choice(
        index=index,
        text="".join(texts),
        finish_reason=_FINISH.get(reason, reason) if reason else None,
        refusal=text_or_none(item.get("finishMessage")) if reason in _FILTERED else None,
    )


def _usage(value: Any) -> Usage | None:
    usage = object_or_empty(value)
    thoughts = count(usage.get("thoughtsTokenCount")) or 0
    return make_usage(
        count(usage.get("promptTokenCount")),
        # Zeros are left out of this JSON.
        (count(usage.get("candidatesTokenCount")) or 0) + thoughts,
        cached=count(usage.get("cachedContentTokenCount")),
        reasoning=thoughts,
    )
