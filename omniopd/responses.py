"""Prompts and responses as callers hand them over, checked and cut into chunks. Asks no teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omniopd.chunking import num_words, peak_words, tile_words
from omniopd.errors import ConfigError
from omniopd.types import Chunk, Message

Conversation = str | Sequence[Mapping[str, Any] | Message]
"""A prompt: text, which is one user message, or chat messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response and where its chunks lie."""

    number: int
    messages: tuple[Message, ...]
    text: str
    spans: tuple[tuple[int, int], ...]
    """Half-open character ranges, in order."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks with their prefixes; made anew each time, for together they are many times the text."""
        return tuple(
            Chunk(
                rollout_id=str(self.number),
                index=index,
                start=start,
                end=end,
                prefix=self.text[:start],
                text=self.text[start:end],
            )
            for index, (start, end) in enumerate(self.spans)
        )


def cut_responses(
    prompts: Sequence[Conversation],
    responses: Sequence[str],
    entropies: Sequence[Sequence[float] | None] | None,
    *,
    chunk_words: int,
    max_chunks: int | None,
) -> list[Response]:
    """Check what a caller hands over and cut it. Raises ConfigError, naming the response by its number."""
    for name, value in (("prompts", prompts), ("responses", responses)):
        if isinstance(value, str):
            raise ConfigError(f"{name} is a text; expected a list with one entry for each response")
    if len(prompts) != len(responses):
        raise ConfigError(f"{len(prompts)} prompts for {len(responses)} responses; expected as many of both")
    if entropies is None:
        entropies = [None] * len(responses)
    elif len(entropies) != len(responses):
        raise ConfigError(f"{len(entropies)} lists of entropies for {len(responses)} responses; expected one each")
    return [
        Response(
            number=number,
            messages=as_messages(prompt),
            text=response,
            spans=_spans(number, response, ranking, chunk_words, max_chunks),
        )
        for number, (prompt, response, ranking) in enumerate(zip(prompts, responses, entropies, strict=True))
    ]


def _spans(
    number: int, response: str, entropies: Sequence[float] | None, chunk_words: int, max_chunks: int | None
) -> tuple[tuple[int, int], ...]:
    if not isinstance(response, str):
        raise ConfigError(f"response {number} is {type(response).__name__}; expected text")
    if entropies is None:
        return _spread(tile_words(response, words_per_chunk=chunk_words), max_chunks)
    most = max_chunks or max(1, num_words(response))
    try:
        return tuple(peak_words(response, entropies, words_per_chunk=chunk_words, max_chunks=most))
    except ConfigError as error:
        raise ConfigError(f"response {number}: {error}") from error


def _spread(spans: Sequence[tuple[int, int]], most: int | None) -> tuple[tuple[int, int], ...]:
    """Keep at most that many spans, evenly over the text, the middle one of each equal share."""
    if most is None or len(spans) <= most:
        return tuple(spans)
    return tuple(spans[(2 * i + 1) * len(spans) // (2 * most)] for i in range(most))


def as_messages(prompt: Conversation) -> tuple[Message, ...]:
    """Return the chat messages of a prompt. Raises ConfigError for anything but text and messages with text."""
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    if not isinstance(prompt, Sequence) or not prompt:  # callers hand over what a file or a trainer held
        raise ConfigError(f"prompt is {prompt!r}; expected text or a list of messages that is not empty")
    return tuple(_message(turn) for turn in prompt)


def completion_text(number: int, completion: Any) -> str:
    """Return the text of a completion: itself, or that of its one message. Raises ConfigError."""
    if isinstance(completion, str):
        return completion
    messages = as_messages(completion)
    if len(messages) != 1:
        raise ConfigError(f"completion {number} has {len(messages)} messages; expected one assistant message")
    return messages[0].content


def _message(turn: object) -> Message:
    if isinstance(turn, Message):
        return turn
    if isinstance(turn, Mapping):
        role, content = turn.get("role"), turn.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return Message(role=role, content=content)
    raise ConfigError(f"a message is {turn!r}; expected {{'role': 'user', 'content': 'some text'}}")
