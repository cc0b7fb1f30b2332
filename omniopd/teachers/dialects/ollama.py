"""Ollama's own wording, which can take a raw prompt and switch thinking off."""

from __future__ import annotations

from typing import Any, Final

from omniopd.errors import TeacherCapabilityError
from omniopd.teachers.cards import Card
from omniopd.teachers.dialects.base import Ask, Choice, HttpCall, Parsed
from omniopd.teachers.dialects.shapes import (
    answer_object,
    as_object,
    bearer,
    chat_turns,
    check_ask,
    count,
    make_usage,
    sampling_fields,
    text_of,
    text_or_none,
    with_card_fields,
)


class OllamaDialect:
    """An Ollama server. One sample for each request."""

    name: Final = "ollama"

    def headers(self, card: Card, api_key: str | None) -> dict[str, str]:
        """Return the key's header, if there is a key; a server on this machine asks for none."""
        return bearer(card, api_key)

    def call(self, ask: Ask, card: Card) -> HttpCall:
        """Write the request."""
        check_ask(ask, self.name, ("completions", "prefill", "chat-turn", "chat", "structured"), takes_n=False)
        body: dict[str, Any] = {"model": ask.model, "stream": False, "options": _options(ask, card)}
        if ask.transport == "completions":
            if len(ask.prompts) != 1:
                raise TeacherCapabilityError(
                    f"the ollama API takes one prompt in each request and {len(ask.prompts)} were given; "
                    "set can.batch_prompts: 1 in the card"
                )
            body |= {"prompt": ask.prompts[0], "raw": True}
            return HttpCall(path="/api/generate", body=with_card_fields(body, ask, card))
        body["messages"] = chat_turns(ask, card)
        if ask.transport == "structured" and ask.schema is not None:
            body["format"] = dict(ask.schema)
        return HttpCall(path="/api/chat", body=with_card_fields(body, ask, card))

    def read(self, answer: Any, ask: Ask) -> Parsed:
        """Read the answer. `thinking` is no part of the text."""
        whole = answer_object(answer)
        if ask.transport == "completions":
            if "response" not in whole:
                raise ValueError("the answer has no response")
            text = text_of(whole["response"], "the response")
        else:
            text = text_of(as_object(whole.get("message"), "the message").get("content"), "the message's content")
        outputs = count(whole.get("eval_count"))
        usage = make_usage(
            # A prompt that is still in memory is not counted.
            None if outputs is None else count(whole.get("prompt_eval_count")) or 0,
            outputs,
        )
        choice = Choice(index=0, text=text, finish_reason=text_or_none(whole.get("done_reason")))
        return Parsed(choices=(choice,), usage=usage)


def _options(ask: Ask, card: Card) -> dict[str, Any]:
    options: dict[str, Any] = {card.output_limit_field or "num_predict": ask.max_tokens}
    options |= sampling_fields(ask, card)
    if ask.seeds and card.can.seed:
        options["seed"] = ask.seeds[0]
    if ask.stop and card.can.stop:
        options["stop"] = list(ask.stop)
    return options
