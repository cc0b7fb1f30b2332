"""What the served teacher knows: a continuation that is a pure function of the conversation, the prefix and the sample.

So a client's answers can be checked one by one, whatever the concurrency, the retries and the dialect.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

Turns = tuple[tuple[str, str], ...]
"""(role, text) without system turns: instructions are merged into those, so they are no part of who is asked what."""

_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n?", re.DOTALL)
_ANSWER_MARKS = (
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|assistant|>\n",
    "[/INST]",
    "\nAssistant:",
    "\nAnswer:",
)
_EQUATION = re.compile(r"(\d{1,9}) ?([-+*]) ?(\d{1,9}) ?=$")
_COUNT = re.compile(r"(?<![\w.])(\d{1,9})(,? )(\d{1,9})\2(\d{1,9})(,?)$")
_NUDGE = re.compile(r"(go on|continue)\b", re.IGNORECASE)
_QUOTE_END = re.compile(r"</(partial(?:-\d+)?)>\n\n")


@dataclass(frozen=True, slots=True)
class Written:
    """One continuation."""

    text: str
    tokens: int
    is_finished: bool
    """False: `max_tokens` cut it."""


def expected_continuation(
    messages: Iterable[Any],
    prefix: str,
    sample: int,
    max_tokens: int,
    *,
    seed: int | None = None,
    is_instructed: bool = False,
    corpus: Mapping[str, str] | None = None,
) -> str:
    """Return the text that follows `prefix` in choice number `sample` of a request with this seed.

    `messages` is the conversation before any instruction was put around it: `Message` objects or mappings. A prefix
    is sent without its trailing whitespace; where the teacher's text begins with the same whitespace, that is taken
    off here as a client has to. With `is_instructed` (chat, chat-turn, structured) the model was told that the
    whitespace is there, so a client takes one space off its head even where the prefix ended in something else.
    """
    text = write(turns_of(messages), prefix, sample, max_tokens, seed=seed, corpus=corpus).text
    return text.removeprefix(" ") if is_instructed and prefix != prefix.rstrip() else text


def identity(messages: Iterable[Any], prefix: str) -> str:
    """Name the logical request, the same in every dialect and shape; the log's `identity`."""
    return identity_of(turns_of(messages), prefix)


def turns_of(messages: Iterable[Any]) -> Turns:
    """Reduce messages to what the teacher goes by."""
    return _normal((m["role"], m["content"]) if isinstance(m, Mapping) else (m.role, m.content) for m in messages)


def _normal(pairs: Iterable[tuple[str, str]]) -> Turns:
    """Leave system turns out and join consecutive turns of one role, which some APIs do not have."""
    turns: list[tuple[str, str]] = []
    for role, content in pairs:
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n\n{content.strip()}")
        elif role not in ("system", "developer"):
            turns.append((role, content.strip()))
    return tuple(turns)


def identity_of(turns: Turns, prefix: str) -> str:
    return blake2b(repr((turns, prefix.rstrip())).encode(), digest_size=8).hexdigest()


def write(
    turns: Turns,
    prefix: str,
    sample: int,
    max_tokens: int | None,
    *,
    seed: int | None = None,
    corpus: Mapping[str, str] | None = None,
) -> Written:
    """Write what follows the prefix, be it sent with or without its trailing whitespace.

    A known text goes on verbatim. Else a count goes on counting and an equation gets its result, in every sample;
    after that come sentences that differ from sample to sample.
    """
    sent = prefix.rstrip()
    known = (corpus or {}).get(turns[-1][1] if turns else "")
    if known is not None and known.startswith(sent):
        tokens = re.findall(r"\s*\S+|\s+$", known[len(sent) :])
    elif count := _COUNT.search(sent[-64:]):
        tokens = _counted(*count.groups())
    else:
        tokens = _derived(turns, sent, sample, seed)
    limit = len(tokens) if max_tokens is None else max(0, max_tokens)
    text = _without(prefix[len(sent) :], "".join(tokens[:limit]))
    return Written(text, min(limit, len(tokens)), limit >= len(tokens))


def _without(whitespace: str, text: str) -> str:
    """Take off the head of the text what the prefix already ended in."""
    size = 0
    while size < min(len(whitespace), len(text)) and whitespace[size] == text[size]:
        size += 1
    return text[size:]


def _counted(first: str, separator: str, second: str, third: str, tail: str) -> list[str]:
    a, b, c = int(first), int(second), int(third)
    step = b - a if b - a == c - b else 1
    numbers = [str(c + step * i) for i in range(1, 21)]
    glue = separator if not tail else " "
    return [f"{glue}{numbers[0]}", *(f"{separator}{number}" for number in numbers[1:])]


def _derived(turns: Turns, sent: str, sample: int, seed: int | None) -> list[str]:
    digest = blake2b(repr((turns, sent, sample, seed)).encode()).digest()
    tokens: list[str] = []
    if equation := _EQUATION.search(sent[-32:]):
        left, sign, right = int(equation[1]), equation[2], int(equation[3])
        tokens.append(f" {left + right if sign == '+' else left - right if sign == '-' else left * right}.")
    for i in range(2 + digest[0] % 5):
        tokens += _SENTENCES[int.from_bytes(digest[2 + 2 * i : 4 + 2 * i], "big") % len(_SENTENCES)]
    tokens += [" So", " the", " answer", " is", f" {digest[1]}."]
    if not sent:
        tokens[0] = tokens[0].lstrip()
    return tokens


def _sentences() -> list[tuple[str, ...]]:
    rng = random.Random(0)
    made = []
    for _ in range(1024):
        a, b = rng.randrange(2, 99), rng.randrange(2, 99)
        sign, result = rng.choice([("+", a + b), ("-", a - b), ("*", a * b)])
        start = rng.choice(["Then", "Next,", "That makes", "We have", "Now", "After that"])
        made.append(tuple(f" {word}" for word in f"{start} {a} {sign} {b} = {result}.".split()))
    return made


_SENTENCES = _sentences()


@dataclass(frozen=True, slots=True)
class Handed:
    """One partial answer as it reached the server."""

    turns: Turns
    sent: str
    how: str
    """`begin` (no prefix), `prefill`, `raw`, `chat` (quoted in tags) or `chat-turn` (a turn and a nudge)."""

    @property
    def is_instructed(self) -> bool:
        """Nothing but an instruction keeps the model from repeating the prefix."""
        return self.how in ("chat", "chat-turn")


def find_prefix(messages: list[tuple[str, str]], *, is_prefill: bool) -> Handed:
    """Find the conversation and the partial answer in the turns of a chat request."""
    role, last = messages[-1]
    if is_prefill and role == "assistant":
        return Handed(_normal(messages[:-1]), last, "prefill")
    if role == "user" and (closings := list(_QUOTE_END.finditer(last))):
        # The tag is one that the quoted text does not hold.
        end, tag = closings[-1].start(), closings[-1][1]
        start = last.rfind(f"<{tag}>", 0, end)
        if start >= 0:
            task = last[:start].rstrip()
            turns = _normal([*messages[:-1], *([("user", task)] if task else [])])
            return Handed(turns, last[start + len(tag) + 2 : end], "chat")
    if role == "user" and len(messages) > 1 and messages[-2][0] == "assistant" and _NUDGE.match(last):
        return Handed(_normal(messages[:-2]), messages[-2][1], "chat-turn")
    return Handed(_normal(messages), "", "begin")


def split_raw(prompt: str) -> Handed:
    """Split a raw text at the place where the answer begins; ChatML is read back into its turns."""
    marks = [prompt.rfind(mark) + len(mark) for mark in _ANSWER_MARKS if mark in prompt]
    if not marks:
        return Handed((), prompt, "raw")
    at = max(marks)
    head, sent = prompt[:at], prompt[at:]
    turns = _normal(_CHATML_TURN.findall(head))
    return Handed(turns or (("prompt", head),), sent, "raw")


def text_of_ids(ids: list[int]) -> str:
    """Read token ids as the bytes of a text where they can be, else as their numbers."""
    if all(0 <= i < 256 for i in ids):
        return bytes(ids).decode("utf-8", errors="replace")
    return " ".join(map(str, ids))
