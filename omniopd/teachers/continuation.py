"""How a partial answer is put to a model that can only be asked to go on. Pure functions.

`repair` turns the reply into a continuation. What stays the same while an answer grows comes first in every message,
for the providers' prompt caches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from omniopd.errors import ConfigError
from omniopd.types import Message

ANCHOR_CHARACTERS = 100
"""How much of the prefix's end the request quotes."""
END_MARKER = "<end-of-answer>"
"""What the teacher writes where it holds the answer to be complete. No markup that a student writes."""
INSTRUCTION_VERSION = 2
"""Part of the ledger's key: raise it whenever the wording changes."""
ASKED = frozenset({"chat", "chat-turn", "structured"})
"""The transports that only ask; all others go on from the prefix by construction."""
STOP_SEQUENCES: Mapping[str, tuple[str, ...]] = {"chat": ("</partial>",), "chat-turn": (), "structured": ()}
"""Where a server may cut, by transport, for a prefix without tags of its own (`stop_sequences` knows any). Not the end
marker, which has to be seen to count, and no blank line, which could cut everything."""
STRUCTURED_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"continuation": {"type": "string"}},
    "required": ["continuation"],
    "additionalProperties": False,
}
"""The JSON schema of an answer over `structured`."""

_RULES = (
    "Write only what comes next, starting with the very next character, as you yourself would go on. You need not "
    "agree with what is written: if you would object at this point, or change course, do that in the flow of the text. "
    "But do not repeat or rewrite what is there, do not start over, do not greet, announce or sum up"
)
_END = f"If nothing is missing, or as soon as the answer is complete, write {END_MARKER} and stop."
_QUOTED = (
    "You continue unfinished answers. You are given a task and the beginning of an answer between <{tag}> and "
    "</{tag}>. It stops mid-thought. "
)
_TURN = (
    "Your last answer was cut off mid-thought, and the user will ask you to go on. Your next message is glued to its "
    "end without anything between. "
)
_JSON = (
    'Answer with a JSON object {"continuation": "..."} whose string is that text and nothing else. Escape as JSON '
    "does: a backslash is written twice."
)


def sent_prefix(prefix: str) -> str:
    """Return the part of the prefix that is sent: without trailing whitespace.

    Vocabularies put the space on the word that follows, so a prefix that ends in one forces an odd token path, and
    some servers refuse it. `clean_continuation` takes the whitespace back off the head of the answer.
    """
    return prefix.rstrip()


def partial_tag(prefix: str) -> str:
    """Return the tag that quotes the prefix: `partial`, or the first of `partial-2`, `partial-3`, ... it does not hold.

    The same prefix always has the same tag.
    """
    tag, number = "partial", 1
    while f"<{tag}>" in prefix or f"</{tag}>" in prefix:
        number += 1
        tag = f"partial-{number}"
    return tag


def stop_sequences(transport: str, prefix: str) -> tuple[str, ...]:
    """Return where a server may cut its answer to this prefix; empty for transports without a quoted prefix."""
    return (f"</{partial_tag(prefix)}>",) if transport == "chat" else ()


def continuation_messages(
    messages: Sequence[Message], prefix: str, *, max_tokens: int, transport: str = "chat"
) -> tuple[Message, ...]:
    """Ask a chat model to continue a partial answer.

    An empty prefix asks for an answer from the start, so the conversation is returned as it is, whatever the transport.

    Args:
        messages: The conversation without the partial answer.
        prefix: The partial answer.
        max_tokens: Length limit of the continuation; the request names it in words, as a guide.
        transport: `chat` quotes the prefix in the last user turn; `chat-turn` gives it as an assistant turn and asks
            in a user turn after it; `structured` is `chat` with a JSON answer, see `STRUCTURED_SCHEMA`.
    """
    if transport not in ASKED:
        raise ConfigError(f"the transport {transport!r} asks for nothing; expected one of {', '.join(sorted(ASKED))}")
    sent = sent_prefix(prefix)
    if not sent:
        return tuple(messages)
    turns = [m for m in messages if m.role != "system"]
    tag = partial_tag(prefix)
    system = _with_system(_instruction(transport, tag), messages)
    nudge = _nudge(prefix, max_tokens=max_tokens)
    if transport == "chat-turn":
        return (system, *turns, Message(role="assistant", content=sent), Message(role="user", content=nudge))
    task = turns.pop().content if turns and turns[-1].role == "user" else ""
    request = f"{task}\n\n<{tag}>{sent}</{tag}>\n\n{nudge}".lstrip()
    return (system, *turns, Message(role="user", content=request))


def _instruction(transport: str, tag: str) -> str:
    if transport == "chat-turn":
        return f"{_TURN}{_RULES}, and use no quotes and no code fence around your text. {_END}"
    quoted = _QUOTED.format(tag=tag)
    if transport == "structured":
        return f"{quoted}{_RULES}. {_END} {_JSON}"
    return f"{quoted}{_RULES}, and use no quotes, tags or code fence around your text. {_END}"


def _with_system(instruction: str, messages: Sequence[Message]) -> Message:
    return Message(
        role="system", content="\n\n".join([instruction, *(m.content for m in messages if m.role == "system")])
    )


def _nudge(prefix: str, *, max_tokens: int) -> str:
    """Return the short line after the prefix. All of it changes with the prefix, so it comes last."""
    sent = sent_prefix(prefix)
    anchor = json.dumps(sent[-ANCHOR_CHARACTERS:], ensure_ascii=False)
    if sent != prefix:
        state = f"followed by {_whitespace_in_words(prefix[len(sent) :])}, which is already there"
    else:
        state = "with no whitespace after it, so begin with a space or a line break if one is due"
    return (
        f"Go on. The text so far ends with {anchor}, {state}. Write only the characters that follow, "
        f"about {max(1, max_tokens * 3 // 4)} words."
    )


def _whitespace_in_words(held_back: str) -> str:
    return {" ": "a space", "\n": "a line break", "\n\n": "an empty line"}.get(held_back, json.dumps(held_back))
