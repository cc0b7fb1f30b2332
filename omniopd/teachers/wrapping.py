"""What models put around an answer: announcements, tags, fences, quotes, thinking. Pure functions.

Each takes one kind of wrapper off a reply to a prefix, unless the prefix left it open, and returns the reply as it is
where there is none. `sent` is the prefix without trailing whitespace, `tag` what it was quoted in ("" where it was
not), `is_cut` whether the length limit ended the reply, so that a wrapper may be open.
"""

from __future__ import annotations

import re

_POLITE = r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|got it|understood|no problem)\b[,.!:]*"
_TEXT = r"(?:text|answer|solution|response|reply|part|characters?|words?)\b"
_ABOUT = (
    rf"(?:continuation\b|left off\b|(?:rest|remainder|completion) of (?:the|your) (?:\w+ )?{_TEXT}"
    rf"|(?:remaining|next|following|missing) {_TEXT})"
)
_SHOWS = r"(?:here(?:'s|\u2019s| is| are)|this is|below is|picking up)\b"
_CHINESE = "(?:\u597d\u7684|\u5f53\u7136|\u4ee5\u4e0b\u662f|\u7eed\u5199)"
# What speaks of the text itself. "The pattern continues as follows:" is an answer; so is all with numbers or formulas.
_PREAMBLE = re.compile(
    rf"(?!.*[\d=+$\\])(?:{_POLITE}"
    rf"|(?:{_POLITE}\s*)?{_SHOWS}.{{0,30}}?{_ABOUT}.{{0,50}}?[:.]"
    rf"|(?:{_POLITE}\s*)?continuing (?:from|where|right|exactly|(?:with )?(?:the|your) (?:\w+ )?{_TEXT}).{{0,50}}?[:.]"
    rf"|(?:{_POLITE}\s*)?(?:the |my )?continuation\b.{{0,40}}?:"
    rf"|{_POLITE}\s*(?:let me|i(?:'ll|\u2019ll| will)) continue\b.{{0,50}}?[:.]"
    rf"|{_CHINESE}.{{0,30}}?[:\uff1a])",
    re.IGNORECASE,
)
_FENCE = re.compile(r"```(?:text|txt|plaintext|plain|markdown|md|latex|tex)?[ \t]*\n(.*?)(\n?```)?\Z", re.DOTALL)
_WRAPPER = re.compile(r"<(continuation|completion|output|response|text)>\n?(.*?)(?:\n?</\1>)?\Z", re.DOTALL)
_QUOTES = {'"': '"', "\N{LEFT DOUBLE QUOTATION MARK}": "\N{RIGHT DOUBLE QUOTATION MARK}"}


def without_thinking(sent: str, text: str, tag: str, is_cut: bool) -> str:
    """Take off a `<think>` block that the server left in the text."""
    if not text.lstrip().startswith("<think>") or "<think>" in sent:
        return text
    _, closing, rest = text.partition("</think>")
    return rest.lstrip("\n") if closing else ""


def without_preamble(sent: str, text: str, tag: str, is_cut: bool) -> str:
    """Take off an announcement: "Certainly!", "Sure, here is the continuation:"."""
    line, newline, rest = text.lstrip().partition("\n")
    if newline and len(line) <= 120 and _PREAMBLE.fullmatch(line.strip(" \t\r*_#")):
        return rest.lstrip("\r\n")
    head, colon, behind = line[:120].partition(":")
    if colon and _PREAMBLE.fullmatch(head.strip(" *_#") + ":"):
        return text.lstrip()[len(head) + 1 :].lstrip(" *_\r\n") if behind or newline else ""
    return text


def without_tags(sent: str, text: str, tag: str, is_cut: bool) -> str:
    """Take off the tag that quoted the prefix, and tags like `<continuation>` around the whole."""
    if "<" not in text:
        return text
    bare = text.strip()
    if tag and f"<{tag}>" in bare[: len(tag) + 2]:
        text = bare[len(tag) + 2 :]
    elif (wrapper := _WRAPPER.match(bare)) and f"<{wrapper[1]}>" not in sent:
        return wrapper[2]
    if tag and f"</{tag}>" in text:
        head, _, rest = text.partition(f"</{tag}>")
        # It closes its echo of the quotation and goes on after it.
        return rest if rest.strip() and sent.endswith(head.strip()) else head
    return text


def without_fence(sent: str, text: str, tag: str, is_cut: bool) -> str:
    """Take off a code fence without a programming language around the whole."""
    bare = text.strip()
    if not bare.startswith("```") or sent.count("```") % 2:
        return text
    fenced = _FENCE.match(bare)
    if fenced is None or not (fenced[2] or is_cut) or "```" in fenced[1]:
        return text
    # "The program is:" is rightly followed by a block.
    return text if sent.endswith(":") and not fenced[1].startswith(sent) else fenced[1]


def without_quotes(sent: str, text: str, tag: str, is_cut: bool) -> str:
    """Take off double quotes around the whole."""
    bare = text.strip()
    opening = bare[:1]
    closing = _QUOTES.get(opening)
    if closing is None or len(bare) < 3:
        return text
    if sent.count(opening) % 2 if opening == closing else sent.count(opening) > sent.count(closing):
        return text
    inner = bare[1:].removesuffix(closing)
    if inner.startswith(sent):
        return inner
    if closing in inner:
        return text
    # No quotation begins with a space, so an open one that does can only be a wrapper that was cut.
    return inner if bare.endswith(closing) or (is_cut and inner[:1].isspace()) else text
