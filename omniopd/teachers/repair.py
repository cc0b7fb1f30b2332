"""How a server's reply becomes the text that follows the prefix, or the reason why it cannot. Pure functions.

What a transport promises decides what may be repaired. `tokens`, `completions` and `prefill` go on from the prefix by
construction, so their text is never searched for repetitions of it. The transports that only ask may get anything
back; for them, too, a repair needs evidence in the reply itself, for a wrong cut looks like a teacher who disagrees.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum

from omniopd.teachers.continuation import ASKED, END_MARKER, partial_tag, sent_prefix
from omniopd.teachers.overlap import after_echo, is_cut_echo, starts_over
from omniopd.teachers.wrapping import without_fence, without_preamble, without_quotes, without_tags, without_thinking
from omniopd.types import Continuation, Missing


class Repair(StrEnum):
    """What was done to a reply, or why it is no continuation; the value is its text in `Continuation.detail`."""

    THINKING = "visible thinking taken off"
    CLOSED_JSON = "cut JSON closed"
    RAW_JSON = "raw control characters in the JSON read"
    BACKSLASHES = "LaTeX backslashes restored"
    END_MARKER = "end marker taken off"
    PREAMBLE = "preamble taken off"
    TAGS = "tags taken off"
    FENCE = "code fence taken off"
    QUOTES = "quotes taken off"
    ECHO = "echo of the prefix cut"
    END_ECHO = "echo of the prefix's end cut"
    NEAR_ECHO = "inexact echo of the prefix cut"
    JOINT = "whitespace at the joint differs"
    GLUED = "a word may be glued to a word at the joint"

    ENDED = "the teacher ended the answer here"
    """No repair: the usable text is "", and that is evidence."""

    REFUSAL = "refusal"
    FILTERED = "stopped by a content filter"
    REFUSED_IN_WORDS = "the reply declines in words"
    NOT_JSON = "the reply is not the JSON that was asked for"
    NOISE = "mostly control or replacement characters"
    ONLY_ECHO = "the reply repeats the prefix and adds nothing"
    CUT_ECHO = "the reply ended while it still repeated the prefix"
    STARTED_OVER = "the reply started over"
    NO_TEXT = "no text"
    THOUGHT = "hidden thinking used the limit"


_REASONS = {
    Repair.REFUSAL: Missing.REFUSED,
    Repair.FILTERED: Missing.REFUSED,
    Repair.REFUSED_IN_WORDS: Missing.REFUSED,
    Repair.NO_TEXT: Missing.EMPTY,
    Repair.THOUGHT: Missing.EMPTY,
}
"""All other verdicts are GARBAGE."""


class _UnusableError(Exception):
    def __init__(self, why: Repair, more: str = "") -> None:
        super().__init__(why)
        self.why, self.more = why, more


def clean_continuation(
    prefix: str,
    text: str,
    *,
    transport: str,
    finish_reason: str | None,
    refusal: str | None = None,
    echoes_prefix: bool | None = None,
    reasoning_tokens: int = 0,
) -> Continuation:
    """Turn what a server wrote into the text that follows `prefix`, or into the reason why it cannot.

    The steps, in this order; `detail` names those that changed something, see `repairs_of`:

    1. a refusal field or a content filter: REFUSED;
    2. `structured`: the JSON is read; a string that the length limit cut is closed, backslashes of LaTeX commands that
       JSON took for control characters are restored; anything else that is not that JSON: GARBAGE;
    3. mostly control or replacement characters, or half a character: GARBAGE;
    4. the end marker and what follows it are cut, and `finish_reason` becomes `stop`;
    5. an echo of the whole prefix is cut. A reply without one loses thinking in tags, an announcement ("Sure, here is
       the continuation:"), a code fence, tags and quotes around the whole, and is searched again for an echo: of the
       whole prefix, of its end, of either with other whitespace, markup or case, of either with a few other letters.
       Numbers and operators must be the same: a repetition that corrects one is the teacher's objection;
    6. nothing but an echo, an echo that the length limit cut, or an answer from the start again: GARBAGE;
    7. a short reply that declines in words and was not cut: REFUSED;
    8. whitespace that ended the prefix and was held back when it was sent is taken off the head;
    9. no text: EMPTY. But the bare end marker says that the answer is complete, and so does a server that stops at once
       where it goes on from a non-empty prefix by construction. That is evidence, and is the usable text "".

    For an empty prefix an asked model wrote its own answer, which is left as it is; for a transport that goes on by
    construction there are only the steps 1, 3, 8, 9, and 5 and 6 where `echoes_prefix` says so. What an asked model
    wrote after a prefix is marked as not exact.

    A text that legitimately begins like an echo is cut too: nothing in the reply tells the two apart. Two cases stay
    whole, text that was periodic before the joint already, and repetitions of fewer than 8 characters.

    Args:
        prefix: The partial answer as the student wrote it.
        text: The server's text, unchanged.
        transport: As in `cards.Transport`.
        finish_reason: `stop`, `length`, `content_filter` or the server's own word.
        refusal: What the server says where it declines in a field of its own.
        echoes_prefix: Whether a server that goes on by construction answers with the prefix first. Asked ones are
            always searched.
        reasoning_tokens: What hidden thinking used.
    """
    repairs: list[Repair] = []
    is_asked = transport in ASKED and bool(prefix.strip())
    try:
        if refusal:
            raise _UnusableError(Repair.REFUSAL, refusal[:200])
        if finish_reason == "content_filter":
            raise _UnusableError(Repair.FILTERED)
        is_cut = finish_reason == "length"
        if transport == "structured" and is_asked and text.strip():
            text = _decoded(text, is_cut, repairs)
        if _is_noise(text):
            raise _UnusableError(Repair.NOISE, repr(text[:20]))
        if is_asked:
            text, has_ended = _cut_marker(prefix, text, is_cut, repairs)
            finish_reason = "stop" if has_ended else finish_reason
            text = _asked(prefix, text, transport, is_cut, has_ended, repairs)
        else:
            has_ended = bool(prefix) and transport not in ASKED and finish_reason == "stop"
            text = _cut_declared_echo(prefix, text, repairs) if echoes_prefix else text
        if finish_reason == "stop" and transport in ASKED and _declines(prefix, text):
            raise _UnusableError(Repair.REFUSED_IN_WORDS, repr(text[:80]))
        if transport != "tokens":  # Ids are handed over whole: nothing was held back.
            text = _joined(prefix, text, is_asked, repairs)
        if text.strip() or (text and transport not in ASKED):
            detail = "; ".join(repairs)
            return Continuation(text=text, finish_reason=finish_reason, detail=detail, is_exact=not is_asked)
        if has_ended:
            return Continuation(text="", finish_reason="stop", detail="; ".join([*repairs, Repair.ENDED]))
        has_thought = is_cut and (reasoning_tokens > 0 or Repair.THINKING in repairs)
        raise _UnusableError(Repair.THOUGHT if has_thought else Repair.NO_TEXT, f"finish_reason {finish_reason!r}")
    except _UnusableError as error:
        verdict = f"{error.why}: {error.more}" if error.more else str(error.why)
        reason = _REASONS.get(error.why, Missing.GARBAGE)
        detail = "; ".join([*repairs, verdict])
        return Continuation(text=None, missing=reason, detail=detail, finish_reason=finish_reason)


def repairs_of(continuation: Continuation) -> tuple[Repair, ...]:
    """Return what was done to a reply, in order, and last why it is unusable if it is; () for other failures."""
    found = []
    for part in continuation.detail.split("; "):
        name, colon, _ = part.partition(": ")
        if name not in _NAMES:
            break
        found.append(Repair(name))
        if colon:  # What follows is the server's own wording.
            break
    return tuple(found)


def used_up_by_thinking(continuation: Continuation) -> bool:
    """Say whether the answer is empty because thinking took all of the limit, so that a higher one may help."""
    return continuation.missing is Missing.EMPTY and repairs_of(continuation)[-1:] == (Repair.THOUGHT,)


_NAMES = frozenset(repair.value for repair in Repair)


def _note(repairs: list[Repair], repair: Repair) -> None:
    if repair not in repairs:
        repairs.append(repair)


# Steps 2 to 4: what can be said without looking at the prefix.

_NOISE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\N{REPLACEMENT CHARACTER}]")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_JSON_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)(?:\n\s*```)?\Z", re.DOTALL)
_OPEN_JSON = re.compile(r'\{\s*"continuation"\s*:\s*"((?:[^"\\]|\\.)*)("?)\s*\Z', re.DOTALL)
_CUT_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9a-fA-F]{0,3})?\Z")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}|(?P<none>))')
# JSON reads "\frac" as a form feed and "rac". Only what completes the name of a LaTeX command is taken back.
_EATEN_BACKSLASH = re.compile(
    "\b(?=(?:eta|oxed|egin|ar|inom|ullet|f|mod|ecause|oldsymbol|ot|ig[lr]?|igcup|igcap)(?![a-z]))"
    "|\f(?=(?:rac|orall|lat)(?![a-z]))"
    "|\n(?=(?:eq|abla|otin|subseteq)(?![a-z.]))"
    "|\r(?=(?:ight|angle|ceil|floor|ho|ightarrow)(?![a-z]))"
    "|\t(?=(?:imes|heta|frac|riangle|ilde|herefore)(?![a-z])|ext(?:bf|it|rm)?\\{|an[\\^({\\\\])"
)
_LETTERS = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_SHORTEST_MARKER = len("<end-")


def _is_noise(text: str) -> bool:
    # Half characters (lone surrogates) cannot be stored, so one is too many.
    if not text.isascii() and _HALF_CHARACTER.search(text):
        return True
    return _NOISE.search(text) is not None and 2 * len(_NOISE.findall(text)) > len(text)


def _decoded(text: str, is_cut: bool, repairs: list[Repair]) -> str:
    """Return the continuation that a JSON answer holds."""
    bare = text.strip()
    if fenced := _JSON_FENCE.match(bare):
        bare = fenced.group(1).strip()
        repairs.append(Repair.FENCE)
    whole = _CUT_ESCAPE.sub(r"\1", bare) if is_cut else bare
    # A backslash that begins no JSON escape can only stand for itself.
    mended = _ESCAPE.sub(lambda m: m.group() if m["none"] is None else r"\\", whole)
    found = _continuation_in(mended, repairs)
    if found is None and is_cut and (opened := _OPEN_JSON.match(mended)):
        found = _continuation_in(f'{{"continuation": "{opened[1]}"}}', repairs)
        if found is not None:
            found = re.sub("[\ud800-\udbff]\\Z", "", found)
            repairs.append(Repair.CLOSED_JSON)
    if found is None:
        raise _UnusableError(Repair.NOT_JSON, repr(text[:40]))
    restored = _EATEN_BACKSLASH.sub(lambda m: "\\" + _LETTERS[m.group()], found)
    if mended != whole or restored != found:
        repairs.append(Repair.BACKSLASHES)
    return restored


def _continuation_in(text: str, repairs: list[Repair]) -> str | None:
    for is_strict in (True, False):
        try:
            answer = json.loads(text, strict=is_strict)
        except (ValueError, RecursionError):
            continue
        found = answer.get("continuation") if isinstance(answer, dict) else None
        if isinstance(found, str):
            if not is_strict:
                repairs.append(Repair.RAW_JSON)
            return found
        return None
    return None


def _cut_marker(prefix: str, text: str, is_cut: bool, repairs: list[Repair]) -> tuple[str, bool]:
    """Cut the end marker, and say whether it was there. A limit may leave only its beginning."""
    sent = sent_prefix(prefix)
    if END_MARKER in prefix:  # The student writes it too, so only the very end counts.
        bare = text.rstrip()
        at = len(bare) - len(END_MARKER) if bare.endswith(END_MARKER) and bare != sent else -1
    else:
        at = text.find(END_MARKER)
    if at < 0 and is_cut:
        sizes = range(len(END_MARKER) - 1, _SHORTEST_MARKER - 1, -1)
        at = next((len(text) - size for size in sizes if text.endswith(END_MARKER[:size])), -1)
    if at < 0:
        return text, False
    repairs.append(Repair.END_MARKER)
    return text[:at].rstrip(), True


# Steps 5 and 6: what an asked model wrote after a prefix.


def _asked(prefix: str, text: str, transport: str, is_cut: bool, has_ended: bool, repairs: list[Repair]) -> str:
    """Return the reply without wrappers and echoes. Held-back whitespace is still on its head."""
    sent = sent_prefix(prefix)
    tag = "" if transport == "chat-turn" else partial_tag(prefix)
    if text.startswith(sent):
        repairs.append(Repair.ECHO)
        rest = text[len(sent) :]
        if tag and f"</{tag}>" in rest:
            _note(repairs, Repair.TAGS)
            rest = rest[: rest.index(f"</{tag}>")]
    else:
        text = _unwrapped(sent, text, tag, is_cut, repairs)
        if not text.startswith(sent) and is_cut_echo(sent, text, is_cut):
            raise _UnusableError(Repair.CUT_ECHO)
        echo = after_echo(sent, text)
        if echo is None:
            if starts_over(sent, text):
                raise _UnusableError(Repair.STARTED_OVER)
            return text
        repairs.append(_ECHOES[echo[0]])
        rest = echo[1]
    if not rest.strip() and not has_ended:
        raise _UnusableError(Repair.ONLY_ECHO)
    return rest


_ECHOES = {"whole": Repair.ECHO, "end": Repair.END_ECHO, "near": Repair.NEAR_ECHO}


def _cut_declared_echo(prefix: str, text: str, repairs: list[Repair]) -> str:
    """Cut the prefix from an answer of a server that gives it back by design."""
    sent = sent_prefix(prefix)
    if sent and text.startswith(sent):
        repairs.append(Repair.ECHO)
        return text[len(sent) :]
    if text.strip() and sent.startswith(text.strip()):
        raise _UnusableError(Repair.CUT_ECHO)
    return text


def _unwrapped(sent: str, text: str, tag: str, is_cut: bool, repairs: list[Repair]) -> str:
    """Take off what models put around an answer, unless the prefix left it open."""
    for _ in range(3):  # An announcement, a fence, tags in it.
        before = text
        for repair, bare in (
            (Repair.THINKING, without_thinking),
            (Repair.PREAMBLE, without_preamble),
            (Repair.FENCE, without_fence),
            (Repair.TAGS, without_tags),
            (Repair.QUOTES, without_quotes),
        ):
            shorter = bare(sent, text, tag, is_cut)
            if shorter != text:
                _note(repairs, repair)
                text = shorter
        if text == before or text.startswith(sent):
            break
    return text


# Steps 7 and 8.

_NOT_ABLE = r"(?:can(?:no|'|\u2019)t|am (?:unable|not able) to|(?:'|\u2019)m (?:unable|not able) to|won(?:'|\u2019)t)"
_DECLINES = re.compile(
    rf"\W*(?:(?:i(?:'|\u2019)?m |i am )?(?:very |so )?sorry\b[,.]?\s*(?:but )?i\s?{_NOT_ABLE}"
    rf"|i apologi[sz]e\b.{{0,20}}\bi\s?{_NOT_ABLE}"
    rf"|i\s?{_NOT_ABLE} (?:help|assist|continue|comply|provide|fulfill?|do that|complete|engage|write|generate)\b"
    r"|as an ai\b"
    r"|(?:it (?:looks|seems) like|it (?:appears|seems)) (?:that )?(?:your|the) "
    r"(?:message|question|prompt|partial answer|task)\b.{0,40}\b(?:cut off|incomplete|missing|empty)"
    r"|(?:could|can) you (?:please )?(?:provide|share|clarify)\b|please provide\b"
    "|(?:\u5f88)?\u62b1\u6b49[\uff0c,]?.{0,4}\u6211?(?:\u65e0\u6cd5|\u4e0d\u80fd)"
    "|\u5bf9\u4e0d\u8d77[\uff0c,]?.{0,4}\u6211?(?:\u65e0\u6cd5|\u4e0d\u80fd))",
    re.IGNORECASE,
)
_LONGEST_REFUSAL = 300


def _declines(prefix: str, text: str) -> bool:
    return len(text) <= _LONGEST_REFUSAL and _DECLINES.match(text) is not None and not _DECLINES.search(prefix)


def _joined(prefix: str, text: str, is_asked: bool, repairs: list[Repair]) -> str:
    """Take the whitespace that was held back from the prefix off the head of the text."""
    sent = sent_prefix(prefix)
    held_back = prefix[len(sent) :]
    if not held_back:
        is_known = not is_asked or Repair.ECHO in repairs or Repair.END_ECHO in repairs
        if not is_known and text[:1].isalnum() and sent[-1:].isalnum():
            _note(repairs, Repair.GLUED)
        return text
    if not text or text.startswith(held_back):
        return text[len(held_back) :]
    if is_asked and not text[0].isspace():
        return text  # It was told that the whitespace is there.
    _note(repairs, Repair.JOINT)
    if is_asked and text[0] == " " and not text[1:2].isspace():
        return text[1:]
    size = 0
    while size < min(len(held_back), len(text)) and held_back[size] == text[size]:
        size += 1
    return text[size:]
