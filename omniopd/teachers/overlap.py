"""Does a reply repeat the prefix it should go on from? Pure functions on two texts.

Linear in the lengths, for a student that loops must not stall the run. `sent` is the prefix without trailing
whitespace.
"""

from __future__ import annotations

import re
from typing import Literal

MIN_OVERLAP = 8
"""Shortest repetition of the prefix's end that counts as an echo, in characters."""
MIN_LOOSE_OVERLAP = 16
"""The same where whitespace, markup and case may differ."""
TAIL_CHARACTERS = 200
"""How much of the prefix's end is looked for where an echo may differ in any letter."""

_LOOSE = re.compile("[\\s\"'`$\\\\#_\u2018\u2019\u201c\u201d]+|\\*\\*")
_TRAILING_LOOSE = re.compile("[\"'`$\\\\#_*\u2018\u2019\u201c\u201d]+\\Z")
_SENTENCE_END = re.compile(r"[.!?:]\s+|\n+")
_BETWEEN = " \n\t.,;:!?"
_NUMBERS = re.compile(r"\d|[+=/<>\u00d7\u00f7-]")


def after_echo(sent: str, text: str) -> tuple[Literal["whole", "end", "near"], str] | None:
    """Return what the text's beginning repeats and what follows it; None when it repeats nothing.

    `whole` and `end` are exact. `near` differs in whitespace, markup, case or a few letters, but in no number.
    """
    heads = list(dict.fromkeys((text, text.lstrip(), text.lstrip(" \n\t.\u2026"))))
    for head in heads:
        if head.startswith(sent) and (head is text or len(sent) >= MIN_OVERLAP):
            return "whole", head[len(sent) :]
    for head in heads:
        size = _overlap(sent, head, MIN_OVERLAP)
        if size and not _goes_on_as_before(sent, head, size):
            return "end", head[size:]
    rest = _after_loose_echo(sent, text)
    rest = _after_similar(sent, text.lstrip()) if rest is None else rest
    return None if rest is None else ("near", rest)


def _overlap(sent: str, text: str, at_least: int) -> int:
    """Return the length of the longest end of `sent` that `text` begins with; 0 for none.

    Also 0 where `sent` already repeated that end: what goes on in a loop is no echo.
    """
    longest = min(len(sent), len(text))
    if longest < at_least:
        return 0
    head = text[:at_least]
    start = sent.find(head, len(sent) - longest)
    for _ in range(16):
        if start < 0:
            return 0
        if text.startswith(sent[start:]):
            size = len(sent) - start
            break
        start = sent.find(head, start + 1)
    else:
        size = _border(text[:longest], sent[len(sent) - longest :])
        if size < at_least:
            return 0
    return 0 if _is_loop(sent, size) else size


def _is_loop(sent: str, size: int) -> bool:
    """Say whether the last `size` characters repeat themselves or what stands before them."""
    end = sent[len(sent) - size :]
    shift = end.find(end[: size - size // 2], 1)
    if 0 < shift <= size // 2 and end.startswith(end[shift:]):
        return True
    core = end.strip(_BETWEEN).casefold()
    before = sent[max(0, len(sent) - 2 * size - 16) : len(sent) - size]
    return bool(core) and before.rstrip(_BETWEEN).casefold().endswith(core)


def _goes_on_as_before(sent: str, text: str, size: int) -> bool:
    """Say whether the prefix begins as it ends, and the text goes on as that beginning does."""
    more = size + MIN_OVERLAP // 2
    return len(text) >= more and sent.lstrip().startswith(text[:more])


def _border(head: str, tail: str) -> int:
    """Return the length of the longest beginning of `head` that `tail` ends with (Knuth, Morris and Pratt)."""
    back = [0] * len(head)
    size = 0
    for i in range(1, len(head)):
        while size and head[i] != head[size]:
            size = back[size - 1]
        size += head[i] == head[size]
        back[i] = size
    size = 0
    for character in tail:
        while size and (size == len(head) or character != head[size]):
            size = back[size - 1]
        size += character == head[size]
    return size


def _loose(text: str) -> str:
    return _LOOSE.sub("", text).casefold()


def _after_loose_echo(sent: str, text: str) -> str | None:
    """As an overlap, where whitespace, quotes, bold and backslashes may differ."""
    tail = sent[-2 * len(text) - 64 :]
    loose_sent, loose_text = _loose(tail), _loose(text)
    size = _overlap(loose_sent, loose_text, MIN_LOOSE_OVERLAP)
    if not size and 6 <= len(loose_sent) < MIN_LOOSE_OVERLAP and tail == sent and loose_text.startswith(loose_sent):
        size = len(loose_sent)
    if not size:
        return None
    end = seen = 0
    while seen < size:
        skipped = _LOOSE.match(text, end)
        if skipped:
            end = skipped.end()
        else:
            seen += len(text[end].casefold())
            end += 1
    rest = text[end:]
    if text.count("**", 0, end) % 2:  # Bold that the echo opened.
        return rest.removeprefix("**")
    closing = _TRAILING_LOOSE.search(sent)
    return rest.removeprefix(closing.group()) if closing else rest


def _after_similar(sent: str, text: str) -> str | None:
    """As an overlap from a sentence's beginning, where a few letters may differ, but no number."""
    from rapidfuzz import fuzz

    first = _loose(text[:24])[:6]
    ends = [match.end() for match in _SENTENCE_END.finditer(sent, max(0, len(sent) - TAIL_CHARACTERS))]
    for begin in (0, *ends):
        size = len(sent) - begin
        if size < 3 * MIN_OVERLAP or _loose(sent[begin : begin + 24])[:6] != first:
            continue
        tail, slack = sent[-min(size, TAIL_CHARACTERS) :], MIN_OVERLAP + size // 20
        low = max(0, size - len(tail) - slack)
        window = text[low : size + slack]
        if len(window) < len(tail):
            continue
        found = fuzz.partial_ratio_alignment(tail, window, score_cutoff=95)
        if found is None:
            continue
        start, end = low + found.dest_start, low + found.dest_end
        exact = text.find(sent[-MIN_OVERLAP:], max(start, end - 2 * MIN_OVERLAP), end + 2 * MIN_OVERLAP)
        end = exact + MIN_OVERLAP if exact >= 0 else end
        if _NUMBERS.findall(tail) == _NUMBERS.findall(text[start:end]):
            return text[end:]
    return None


def is_cut_echo(sent: str, text: str, is_cut: bool) -> bool:
    """Say whether the text is nothing but a part of the prefix from its beginning, or from that of a sentence."""
    bare = text.strip()
    # A reply that came to its own end may close with the sentence that the answer began with: that is agreement.
    if not is_cut or len(bare) < MIN_OVERLAP or sent.endswith(bare):
        return False
    if sent.lstrip().startswith(bare):
        return sent.find(bare, len(sent) - len(sent.lstrip()) + 1) < 0  # Where it comes again, it may well once more.
    if bare[0].casefold() == sent.lstrip()[0].casefold():
        loose = _loose(bare)
        if len(loose) >= MIN_LOOSE_OVERLAP and _loose(sent[: 2 * len(bare) + 64]).startswith(loose):
            return True
    at = sent.rfind(bare) if len(bare) >= 3 * MIN_OVERLAP else -1
    return at > 0 and _SENTENCE_END.search(sent, max(0, at - 3), at) is not None


def starts_over(sent: str, text: str) -> bool:
    """Say whether the text resembles the prefix's beginning and not what could follow its end.

    After an open sentence a capital is odd already; after a complete one, the next may well be built like the first.
    Sentences built alike differ in their numbers, an answer begun again mostly does not.
    """
    from rapidfuzz import fuzz

    head, own = text.lstrip()[:120], sent.lstrip()[:120]
    size = min(len(head), len(own))
    if size < 20:
        return False
    head, own = head[:size], own[:size]
    if own[0].isupper() != head[0].isupper():
        return False
    is_open = (sent[-1].isalnum() or sent[-1] in ",+-=*/(<$") and head[0].isupper() and "\n" not in text[:2]
    if not fuzz.ratio(head, own, score_cutoff=75 if is_open else 90):
        return False
    mine, theirs = _NUMBERS.findall(own), _NUMBERS.findall(head)
    shared = min(len(mine), len(theirs))
    return mine[:shared] == theirs[:shared]
