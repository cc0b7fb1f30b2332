"""Agreement of the mathematics in two texts: numbers, signs, relations, operators and the final answer.

Reads plain text and the LaTeX that models write. It compares what is written; it neither evaluates nor simplifies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from omniopd.scoring.similarity import multiset_f1, word_counts

FINAL_ANSWER_WEIGHT = 0.5
"""The share of the score that rests on the final answer when both texts state one."""

Number = Fraction | str
"""Exact; the digits themselves where there are too many of them to be worth arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is read from one text."""

    items: Counter[tuple[str, Number]]
    """A number counts 2, a relation or an arithmetic operator 1: whole numbers for the weights 1 and 1/2."""
    words: Counter[str]
    final: Number | None
    """The final answer; None when the text states none."""


def agreement(a: Facts, b: Facts) -> float:
    """Return how far two texts agree on the mathematics, in [0, 1].

    The F1 overlap of numbers (weight 1), relations and operators (1/2). When both texts state a final answer, half of
    the score is whether those are equal. When neither text holds a number, words take the place of numbers, so prose is
    compared as prose. Numbers on one side only: 0.
    """
    body = multiset_f1(a.items, b.items) if a.items or b.items else multiset_f1(a.words, b.words)
    if a.final is None or b.final is None:
        return body
    return (1 - FINAL_ANSWER_WEIGHT) * body + FINAL_ANSWER_WEIGHT * (a.final == b.final)


def read_facts(text: str) -> Facts:
    r"""Read numbers, relations, operators and the final answer from a text.

    - Numbers are exact: `0.5`, `.5`, `1/2`, `\frac{1}{2}`, `50%` and `50 percent` are 1/2; `1,200` and `1{,}200` are
      1200; `+4` is 4. `a/b` is one number unless its value is whole (7/2); else a division of two numbers (12/2).
    - A minus is a sign unless it follows an operand: `x = -4` holds -4; `3-2` and `x - 2` hold 2 and the operator
      minus; `COVID-19`, `5-year` and a list bullet hold neither.
    - A relation (`=`, `<`, `>`, `<=`, `>=`, `!=`, the LaTeX commands) counts with the number next to it, so `= 71` and
      `= 17` share nothing; `4 < x` is read as `x > 4`.
    - The final answer is the last `\boxed{...}`, else the last `#### 71` or `#71`, else the last `Answer: 71`, `A: 71`
      or `the answer is 71`.
    """
    items: Counter[tuple[str, Number]] = Counter()
    tokens = list(_tokens(plain(text)))
    for i, token in enumerate(tokens):
        if token.kind == "number":
            number, first = _signed(tokens, i)
            items["number", number] += 2
            relation = _relation(tokens, first, i)
            if relation:
                items[relation, number] += 1
        elif token.kind == "operator" and _is_arithmetic(tokens, i):
            items[token.text, ""] += 1
    return Facts(items=items, words=word_counts(text), final=stated_answer(text))


class _Token(NamedTuple):
    kind: str
    """number, relation, operator, word, open, close, line or other"""
    text: str
    spaced: bool
    """Whitespace stands before it."""
    value: Number = ""


_COMMANDS = {
    **dict.fromkeys(("le", "leq", "leqslant"), "<="),
    **dict.fromkeys(("ge", "geq", "geqslant"), ">="),
    **dict.fromkeys(("ne", "neq"), "!="),
    **dict.fromkeys(("approx", "sim", "simeq"), "~"),
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("to", "rightarrow", "Rightarrow", "implies", "left", "right", "quad", "qquad"), " "),
    "lt": "<",
    "gt": ">",
    "div": " / ",
}
_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": "*",
        "\u00b7": "*",
        "\u22c5": "*",
        "\u00f7": " / ",
        "\u2264": "<=",
        "\u2265": ">=",
        "\u2260": "!=",
        "\u2248": "~",
        "\u2192": " ",
    }
)
_DECIMAL = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_GROUPED = r"[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?:\.[0-9]+)?"
_SIDE = rf"(?:\{{\s*([-+]?)\s*({_GROUPED}|{_DECIMAL})\s*\}}|([0-9]))"
_FRAC = re.compile(rf"\\[dtc]?frac\s*{_SIDE}\s*{_SIDE}")
_REWRITES = (
    (re.compile(r"(?<=[0-9])\s+percent\b|\\%"), "%"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9])"), ","),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"(?<=-)\\?\$"), ""),
    # Calculator marks of the GSM8K solutions, and arrows, are no relations.
    (re.compile(r"<<|>>|[-=]+>|\\\$|\$"), " "),
    (re.compile(r"=="), "="),
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)")


def _slashed(fraction: re.Match[str]) -> str:
    """Write a LaTeX fraction of two numbers with a slash, its sign in front."""
    top_sign, top, top_digit, bottom_sign, bottom, bottom_digit = fraction.groups()
    sides = [number.replace("{,}", "").replace(",", "") for number in (top or top_digit, bottom or bottom_digit)]
    return ("-" if (top_sign == "-") != (bottom_sign == "-") else "") + "/".join(sides)


def plain(text: str) -> str:
    """Rewrite LaTeX and Unicode mathematics in ASCII, as far as the readers of numbers need it."""
    text = text.translate(_CHARACTERS)
    text = re.sub(r"(?<=[0-9A-Za-z])(?=\\[dtc]?frac)", " ", text)
    text = _FRAC.sub(_slashed, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), text)


_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2}(?![\w.]))?"
    r"|\.[0-9]+)"
    r"|(?P<relation><=|>=|!=|[=<>~])"
    r"|(?P<operator>[-+*/^])"
    r"|(?P<word>\\?[^\W\d_]+)"
    r"|(?P<open>[(\[{])"
    r"|(?P<close>[)\]}])"
    r"|(?P<line>\n)"
    r"|(?P<other>[^\s])"
)
_MAX_DIGITS = 300


def _tokens(text: str) -> Iterator[_Token]:
    """Split plain text; fractions like 1/2 and percentages become one number."""
    found = [
        _Token(kind=match.lastgroup or "", text=match[0], spaced=text[match.start() - 1 : match.start()].isspace())
        for match in _TOKEN.finditer(text)
    ]
    i = 0
    while i < len(found):
        token = found[i]
        if token.kind != "number":
            yield token
            i += 1
            continue
        value, width = _fraction(found, i)
        if i + width < len(found) and found[i + width].text == "%" and isinstance(value, Fraction):
            value, width = value / 100, width + 1
        yield token._replace(value=value)
        i += width


def _fraction(found: list[_Token], i: int) -> tuple[Number, int]:
    """Return the number that starts at token i and how many tokens it takes."""
    value = exact(found[i].text)
    if i + 2 < len(found) and found[i + 1].text == "/" and found[i + 2].kind == "number":
        below = exact(found[i + 2].text)
        tight = not (found[i + 1].spaced or found[i + 2].spaced)
        if tight and isinstance(value, Fraction) and isinstance(below, Fraction) and below:
            ratio = value / below
            if ratio.denominator != 1:
                return ratio, 3
    return value, 1


@lru_cache(maxsize=4096)
def exact(digits: str) -> Number:
    """Return the value of decimal digits, grouped or not; the digits where there are more than 300."""
    digits = digits.replace(",", "")
    return Fraction(digits) if len(digits) <= _MAX_DIGITS else digits


def _signed(tokens: list[_Token], i: int) -> tuple[Number, int]:
    """Return the number at i with its sign, and the index of the first token that belongs to it."""
    value = tokens[i].value
    if i == 0 or tokens[i - 1].text not in ("-", "+") or not _is_sign(tokens, i - 1):
        return value, i
    if tokens[i - 1].text == "+":
        return value, i - 1
    return (f"-{value}" if isinstance(value, str) else -value), i - 1


def _is_sign(tokens: list[_Token], i: int) -> bool:
    """Whether the minus or plus at i, with a number after it, is that number's sign."""
    spaced_after = tokens[i + 1].spaced
    before = tokens[i - 1] if i else None
    if before is None or before.kind == "line":
        return not spaced_after  # "- 3 apples" is a list item
    if before.kind == "word":
        # "is -4", but neither "x -4" nor "total - 4" nor "COVID-19"
        return len(before.text) > 1 and tokens[i].spaced and not spaced_after
    return before.kind not in ("number", "close") and before.text not in ("%", "!", "'")


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_WRAPPERS = frozenset(("\\boxed", "\\fbox", "\\text", "\\mathbf", "\\mathrm"))


def _relation(tokens: list[_Token], first: int, last: int) -> str | None:
    """Return the relation that the number at tokens first..last is the right side of, flipped if it is the left."""
    j = first - 1
    while j >= 0 and (tokens[j].kind == "open" or tokens[j].text in _WRAPPERS):
        j -= 1
    if j >= 0 and tokens[j].kind == "relation":
        return tokens[j].text
    j = last + 1
    if j >= len(tokens) or tokens[j].kind != "relation":
        return None
    relation = tokens[j].text
    j += 1
    while j < len(tokens) and (tokens[j].kind == "open" or tokens[j].text in ("-", "+") or tokens[j].text in _WRAPPERS):
        j += 1
    if j < len(tokens) and tokens[j].kind == "number":
        return None  # counted with the number on the right
    return _FLIPPED.get(relation, relation)


def _is_arithmetic(tokens: list[_Token], i: int) -> bool:
    """Whether the operator at i combines two operands, at least one of them a number."""
    if i == 0 or i + 1 == len(tokens):
        return False
    before, after = tokens[i - 1], tokens[i + 1]
    if after.kind == "number" and tokens[i].text in ("-", "+") and _is_sign(tokens, i):
        return False
    # "5-year", "$5/hour" and "COVID-19" join words.
    if any(side.kind == "word" and len(side.text) > 1 and side.text[0] != "\\" for side in (before, after)) and not (
        tokens[i].spaced and after.spaced
    ):
        return False
    is_left_operand = before.kind in ("number", "word", "close")
    is_right_operand = after.kind in ("number", "word", "open")
    return is_left_operand and is_right_operand and "number" in (before.kind, after.kind)


_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHED = re.compile(r"####[ \t]*(?=[-+.$\\0-9])([^\n;]*)|(?<![\w#&])#(?=[-+.0-9])([^\s;]+)")
_ANSWER = re.compile(
    r"\banswer\b\s*(?:\bis\b\s*:?|:)[\s*]*([^\n]+)|^[ \t]*A:[ \t]*([^\n]+)", re.IGNORECASE | re.MULTILINE
)
_WHOLE_NUMBER = re.compile(
    rf"(?:[a-z]\s*=\s*)?([-+]?)\s*({_DECIMAL})(?:/({_DECIMAL}))?(\s*%)?(?=$|[\s.,;*])", re.IGNORECASE
)


def stated_answer(text: str) -> Number | None:
    """Return the final answer a text states, see `read_facts`; None when it states none."""
    boxed = [content for match in _BOXED.finditer(text) if (content := _braced(text, match.end())) is not None]
    if boxed:
        return _answer_value(boxed[-1]) or None
    for pattern in (_HASHED, _ANSWER):
        for match in reversed(list(pattern.finditer(text))):
            answer = _answer_value(match[1] or match[2])
            # "The answer is the sum of ..." announces one and states none.
            if isinstance(answer, Fraction) or (answer and " " not in answer):
                return answer
    return None


def _braced(text: str, start: int) -> str | None:
    """Return what stands between the brace before `start` and its partner; None when the text ends before."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return None


def _answer_value(text: str) -> Number:
    """Return the number an answer is, units left out, or else its text without layout."""
    flat = plain(re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", " ", text)).strip()
    flat = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", flat)
    match = _WHOLE_NUMBER.match(flat)
    rest = "" if match is None else flat[match.end() :].strip(" .,;*")
    if match is None or len(match[2]) > _MAX_DIGITS or not re.fullmatch(r"[^0-9=<>+*/^\\-]*", rest):
        return " ".join(flat.strip(" .;*").lower().split())
    value = Fraction(match[2])
    if match[3] and Fraction(match[3]):
        value /= Fraction(match[3])
    return value * (-1 if match[1] == "-" else 1) / (100 if match[4] else 1)
