"""Text in, text out: how a partial answer is handed to a chat model, and how its reply becomes a continuation.

Pure functions. What a transport promises decides what may be repaired: `completions` and `prefill` go on from the
prefix by construction, so their text is never searched for repetitions of it; `chat` only asks for that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from omniopd.types import Continuation, Message, Missing

MIN_OVERLAP = 8
"""Shortest repetition of the prefix's end that counts as an echo, in characters."""
ANCHOR_CHARACTERS = 80
"""How much of the prefix's end the instruction quotes."""
INSTRUCTION = (
    "You continue unfinished answers. You are given a task and the beginning of an answer between <partial> and "
    "</partial>. It stops mid-thought. Write only the text that comes next, starting with the very next characters. "
    "Do not repeat, correct or comment on the given text, do not start over, do not greet, and use no quotes and no "
    "code fence around your text."
)
INSTRUCTION_VERSION = 1
"""Part of the ledger's key: raise it whenever the wording changes."""

_FENCE = re.compile(r"^```[\w+-]*\n(.*?)\n?```$", re.DOTALL)
_TAGS = ("<partial>", "</partial>")
_QUOTES = {'"': '"', "\N{LEFT DOUBLE QUOTATION MARK}": "\N{RIGHT DOUBLE QUOTATION MARK}"}


def sent_prefix(prefix: str) -> str:
    """Return the part of the prefix that is sent: without trailing whitespace.

    Vocabularies put the space on the word that follows, so a prefix that ends in one forces an odd token path, and
    some servers refuse it. `clean_continuation` takes the whitespace back off the head of the answer.
    """
    return prefix.rstrip()


def continuation_messages(messages: Sequence[Message], prefix: str, *, max_tokens: int) -> tuple[Message, ...]:
    """Ask a chat model to continue a quoted partial answer.

    All that stays the same while the answer grows comes first, for the servers' prompt caches. An empty prefix asks for
    an answer from the start, so the conversation is returned as it is.
    """
    sent = sent_prefix(prefix)
    if not sent:
        return tuple(messages)
    system = "\n\n".join([INSTRUCTION, *(m.content for m in messages if m.role == "system")])
    turns = [m for m in messages if m.role != "system"]
    task = turns.pop().content if turns and turns[-1].role == "user" else ""
    ended = "It ends in whitespace" if sent != prefix else "It does not end in whitespace"
    request = (
        f"{task}\n\n<partial>{sent}</partial>\n\n"
        f"Continue right after {sent[-ANCHOR_CHARACTERS:]!r}. {ended}. Write about {max(1, max_tokens * 3 // 4)} words."
    )
    return (
        Message(role="system", content=system),
        *turns,
        Message(role="user", content=request.lstrip()),
    )


def clean_continuation(
    prefix: str,
    text: str,
    *,
    transport: str,
    finish_reason: str | None,
    refusal: str | None = None,
    echoes_prefix: bool | None = None,
) -> Continuation:
    """Turn what a server wrote into the text that follows `prefix`, or into the reason why it cannot.

    The steps, in this order; those that changed something are named in `detail`:

    1. a refusal or a content filter: REFUSED;
    2. mostly control or replacement characters: GARBAGE;
    3. an echo of the whole prefix is cut, for `chat` also one of its end (`MIN_OVERLAP` characters or more) and a
       fence, quotes or tags around the whole answer; nothing but an echo: GARBAGE;
    4. whitespace that ended the prefix and was held back when it was sent is taken off the answer's head;
    5. no text: EMPTY, with one exception. When a server that goes on from a non-empty prefix by construction stops at
       once, the teacher says that the answer is complete there. That is evidence, and stays the usable text "".

    What a chat model wrote for a non-empty prefix is marked as not exact.

    Args:
        prefix: the partial answer as the student wrote it.
        text: the server's text, unchanged.
        transport: `completions`, `prefill` or `chat`.
        finish_reason: as the server gave it.
        refusal: the refusal text of a chat server, if any.
        echoes_prefix: whether the answer may begin with the whole prefix; None: in `chat` only. Where it may not, a
            repetition is the teacher's own text and is kept.
    """

    is_chat = transport == "chat"
    may_echo = bool(prefix.strip()) and (is_chat if echoes_prefix is None else echoes_prefix)

    def missing(reason: Missing, detail: str) -> Continuation:
        return Continuation(text=None, missing=reason, detail=detail, finish_reason=finish_reason)

    if refusal or finish_reason == "content_filter":
        return missing(Missing.REFUSED, f"refusal: {refusal[:200]}" if refusal else "stopped by a content filter")
    if text and 2 * sum(_is_noise(c) for c in text) > len(text):
        return missing(Missing.GARBAGE, f"mostly control or replacement characters: {text[:20]!r}")
    repairs: list[str] = []
    rest = _cut_echo(prefix, text, repairs) if may_echo else None
    if rest is None and may_echo and is_chat:
        text = _unwrap(prefix, text, repairs)
        rest = _cut_echo(prefix, text, repairs)
        rest = _cut_overlap(prefix, text, repairs) if rest is None else rest
    if rest is None and may_echo and _is_cut_echo(prefix, text, at_least=MIN_OVERLAP if is_chat else 1):
        return missing(Missing.GARBAGE, "the reply ended while it still repeated the prefix")
    if rest is not None and not rest.strip() and is_chat:
        return missing(Missing.GARBAGE, "the reply repeats the prefix and adds nothing")
    joined = _restore_joint(prefix, text if rest is None else rest, repairs)
    if joined.strip() or (joined and not is_chat):
        is_exact = not is_chat or not prefix.strip()
        return Continuation(text=joined, finish_reason=finish_reason, detail="; ".join(repairs), is_exact=is_exact)
    if not is_chat and prefix and finish_reason == "stop":
        return Continuation(text="", finish_reason=finish_reason, detail="the teacher ended the answer here")
    return missing(Missing.EMPTY, f"no text, finish_reason {finish_reason!r}")


def _is_noise(character: str) -> bool:
    return character == "\N{REPLACEMENT CHARACTER}" or (ord(character) < 32 and character not in "\n\t\r")


def _cut_echo(prefix: str, text: str, repairs: list[str]) -> str | None:
    """Return what follows the whole prefix, held-back whitespace included, when the text begins with it."""
    sent = sent_prefix(prefix)
    if not text.startswith(sent):
        return None
    repairs.append("echo of the prefix cut")
    return text[len(sent) :]


def _is_cut_echo(prefix: str, text: str, *, at_least: int) -> bool:
    bare = text.strip()
    return len(bare) >= at_least and prefix.startswith(bare)


def _cut_overlap(prefix: str, text: str, repairs: list[str]) -> str | None:
    """Return what follows the longest end of the prefix that the text begins with, else None."""
    sent = sent_prefix(prefix)
    for size in range(min(len(sent), len(text)), MIN_OVERLAP - 1, -1):
        if sent.endswith(text[:size]):
            repairs.append(f"echo of the last {size} characters cut")
            return text[size:]
    return None


def _unwrap(prefix: str, text: str, repairs: list[str]) -> str:
    """Take off tags, a code fence or quotes around the whole text, unless the prefix left them open."""
    bare = text.strip()
    for tag in _TAGS:
        if tag in bare and tag not in prefix:
            bare = bare.removeprefix(tag).removesuffix(tag)
            repairs.append(f"{tag} taken off")
    if prefix.count("```") % 2 == 0 and (fenced := _FENCE.match(bare)):
        repairs.append("code fence taken off")
        return fenced.group(1)
    closing = _QUOTES.get(bare[:1])
    if (
        closing
        and len(bare) > 2
        and bare.endswith(closing)
        and closing not in bare[1:-1]
        and not _ends_in_quote(prefix)
    ):
        repairs.append("quotes taken off")
        return bare[1:-1]
    return bare if bare != text.strip() else text


def _ends_in_quote(prefix: str) -> bool:
    return prefix.count('"') % 2 == 1


def _restore_joint(prefix: str, text: str, repairs: list[str]) -> str:
    """Take the whitespace that was held back from the prefix off the head of the text."""
    held_back = prefix[len(sent_prefix(prefix)) :]
    size = 0
    while size < min(len(held_back), len(text)) and held_back[size] == text[size]:
        size += 1
    if size < len(held_back) and text:
        repairs.append("whitespace at the joint differs")
    return text[size:]
