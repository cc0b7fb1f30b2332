r"""What `default` reads from one text: numbers and what is computed with them, words, and the shape of a program.

Numbers are exact: `3/4`, `0.75`, `75%` and `\frac{3}{4}` are one value, so are `1,000` and `1000`, `$18.00` and `18`,
`1 \frac{1}{4}` and `1.25`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from omniopd.scoring.numbers import Number, exact, plain, stated_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """What is read from one text."""

    values: dict[Number, float]
    """The distinct numbers, signed, each with its information in bits, see `information`."""
    counts: Counter[Number]
    """How often each number stands there."""
    num_numbers: int
    answer: Number | None
    """The final answer; None when the text states none."""
    last_number: Number | None
    last_result: Number | None
    """The last number to the right of an `=`, else the last number."""
    operations: Counter[tuple[str, object]]
    """An operator with its operands: in order for `-`, `/`, `^`; unordered for `+`, `*`; a word is any operand."""
    num_words: float
    """Words, those of style and grammar counting a tenth."""
    words: dict[str, tuple[int, float]]
    """Word stems, pairs of neighbors, and operators: how many, and the weight of one."""
    signs: Counter[str]
    """Visible characters; empty for a text with words or numbers."""
    code: tuple[str, ...]
    """The tokens of program text, variables named by the order of their first appearance; empty for other text."""


def read_worked(text: str) -> Worked:
    """Read a text once, for comparing it many times."""
    code = _code_shape(text)
    tokens = _tokens(text)
    numbers: list[Number] = []
    results: list[Number] = []
    operations: Counter[tuple[str, object]] = Counter()
    for i, token in enumerate(tokens):
        if token.kind == "number":
            sign = i > 0 and tokens[i - 1].text == "-" and not _joins(tokens, i - 1)
            value = _negative(token.value) if sign else token.value
            numbers.append(value)
            if _is_result(tokens, i - 1 - sign):
                results.append(value)
        elif _is_operation(tokens, i, in_code=bool(code)):
            operations[_operation(tokens, i)] += 1
    words = _WORD.findall(text.lower().replace("n't", " not"))
    stems = [_stem(word) for word in words if word not in _LAYOUT]
    return Worked(
        values={value: information(value) for value in numbers},
        counts=Counter(numbers),
        num_numbers=len(numbers),
        answer=_answer(text),
        last_number=numbers[-1] if numbers else None,
        last_result=results[-1] if results else numbers[-1] if numbers else None,
        operations=operations,
        num_words=math.fsum(map(_weight, stems)),
        words=_weighted_words(stems, operations),
        signs=Counter() if stems or numbers else Counter("".join(text.split())),
        code=code,
    )


def _answer(text: str) -> Number | None:
    """Return the answer a text states; one that is no number as its text."""
    answer = stated_answer(text)
    if isinstance(answer, str):
        tokens = _tokens(answer)
        if len(tokens) == 1 and tokens[0].kind == "number":
            return tokens[0].value
    return answer


@lru_cache(maxsize=1 << 14)
def information(value: Number) -> float:
    """Return the bits it takes to write a number: log2(2 + |numerator|) + log2(denominator).

    Small whole numbers stand in most texts, so sharing one says little: 2 counts 2 bits, 36000 counts 15.1.
    """
    if isinstance(value, str):
        return len(value) * math.log2(10)
    return math.log2(2 + abs(value.numerator)) + math.log2(value.denominator)


class _Token(NamedTuple):
    kind: str
    """number, relation, operator, word, open, close, break or other"""
    text: str
    spaced: bool
    """Whitespace stands before it."""
    value: Number = ""


_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2}(?![\w.]))?"
    r"|(?<![\w)\]])\.[0-9]+)"
    r"|(?P<relation><=|>=|!=|[=<>])"
    r"|(?P<operator>\*\*|//|[-+*/^])"
    r"|(?P<word>\\?[^\W\d]\w*)"
    r"|(?P<open>[(\[{])"
    r"|(?P<close>[)\]}])"
    r"|(?P<break>[\n;:?])"
    r"|(?P<other>[^\s])"
)


def _tokens(text: str) -> list[_Token]:
    """Split a text; percentages, fractions and mixed numbers become one number."""
    flat = plain(_CALCULATOR_MARK.sub("", text))
    found = [
        _Token(kind=match.lastgroup or "", text=match[0], spaced=flat[match.start() - 1 : match.start()].isspace())
        for match in _TOKEN.finditer(flat)
    ]
    tokens: list[_Token] = []
    i = 0
    while i < len(found):
        token, width = found[i], 1
        if token.kind == "number":
            value, width = _fraction(found, i)
            if i + width < len(found) and found[i + width].text == "%" and isinstance(value, Fraction):
                value, width = value / 100, width + 1
            token = token._replace(value=value)
            if _is_mixed(tokens, token, width):
                whole = tokens.pop()
                token = token._replace(value=whole.value + value, spaced=whole.spaced)  # type: ignore[operator]
        elif token.text in ("x", "X") and tokens and tokens[-1].kind == "number" and _kind(found, i + 1) == "number":
            token = token._replace(kind="operator", text="*")
        tokens.append(token)
        i += width
    return tokens


def _kind(tokens: list[_Token], i: int) -> str:
    return tokens[i].kind if 0 <= i < len(tokens) else "break"


def _fraction(found: list[_Token], i: int) -> tuple[Number, int]:
    """Return the number at i and its width; `3/4` is one number unless it is whole or a result follows (`7/2=`)."""
    value = exact(found[i].text)
    if i + 2 < len(found) and found[i + 1].text == "/" and found[i + 2].kind == "number":
        below = exact(found[i + 2].text)
        tight = not (found[i + 1].spaced or found[i + 2].spaced)
        computed = i + 3 < len(found) and found[i + 3].text == "="
        if tight and not computed and isinstance(value, Fraction) and isinstance(below, Fraction) and below:
            ratio = value / below
            if ratio.denominator != 1:
                return ratio, 3
    return value, 1


def _is_mixed(tokens: list[_Token], token: _Token, width: int) -> bool:
    """Whether a proper fraction follows a whole number, as in `1 3/4`."""
    return (
        width == 3
        and token.spaced
        and bool(tokens)
        and tokens[-1].kind == "number"
        and tokens[-1].text.isdigit()
        and isinstance(token.value, Fraction)
        and isinstance(tokens[-1].value, Fraction)
        and token.value < 1
    )


def _negative(value: Number) -> Number:
    return f"-{value}" if isinstance(value, str) else -value


_WRAPPERS = frozenset(("\\boxed", "\\fbox", "\\text", "\\mathbf", "\\mathrm"))


def _is_result(tokens: list[_Token], j: int) -> bool:
    """Whether the number that begins after token j stands to the right of an `=`."""
    while j >= 0 and (tokens[j].kind == "open" or tokens[j].text in _WRAPPERS):
        j -= 1
    return j >= 0 and tokens[j].text == "="


def _is_operation(tokens: list[_Token], i: int, *, in_code: bool) -> bool:
    if tokens[i].kind == "relation":
        return tokens[i].text != "="
    return tokens[i].kind == "operator" and _joins(tokens, i, in_code=in_code)


def _joins(tokens: list[_Token], i: int, *, in_code: bool = False) -> bool:
    """Whether the operator at i has an operand on both sides; else it is a sign, a hyphen or a list bullet."""
    before, after = _kind(tokens, i - 1), _kind(tokens, i + 1)
    if before not in ("number", "word", "close") or after not in ("number", "word", "open", "operator"):
        return False
    spaced, spaced_after = tokens[i].spaced, tokens[i + 1].spaced
    if before == "word" and len(tokens[i - 1].text) > 1 and tokens[i].text in "+-" and spaced and not spaced_after:
        return in_code  # "is -4"
    if "word" not in (before, after) or in_code or (spaced and spaced_after):
        return True
    # "5-year", "$5/hour" and "well-known" join words; "2-x" and "n/2" compute.
    return all(len(side.text) == 1 or side.text[0] == "\\" for side in _words_beside(tokens, i))


def _words_beside(tokens: list[_Token], i: int) -> list[_Token]:
    return [side for side in (tokens[i - 1], tokens[i + 1]) if side.kind == "word"]


_COMMUTES = frozenset("+*")
_FLIPPED = {">": "<", ">=": "<="}


def _operation(tokens: list[_Token], i: int) -> tuple[str, object]:
    """Return the operator at i with its operands; `4 < x` and `x > 4` are one, two names cannot be told apart."""
    left, right = _operand(tokens, i - 1, -1), _operand(tokens, i + 1, 1)
    text = tokens[i].text
    if text in _COMMUTES or text == "!=":
        return text, frozenset((left, right))
    if text in _FLIPPED and (left or right):
        return _FLIPPED[text], (right, left)
    return text, (left, right)


def _operand(tokens: list[_Token], j: int, step: int) -> Number:
    """Return the number at j, or the one whose unit stands there ("4 goals - 2"); "" for anything else."""
    if _kind(tokens, j) == "word" and step < 0 and _kind(tokens, j - 1) == "number":
        j -= 1
    return tokens[j].value if _kind(tokens, j) == "number" else ""


def _split(words: str) -> frozenset[str]:
    return frozenset(words.split())


_WORD = re.compile(r"\\?[^\W\d_]+|[\u3040-\u30ff\u3400-\u9fff]")
_LAYOUT = _split(
    r"\frac \dfrac \tfrac \boxed \fbox \text \mathrm \mathbf \textbf \left \right \quad \qquad \times \cdot \div"
)
_NEGATIONS = _split("not no never none neither nor cannot without")
_STYLE = _split(
    "a about all also an and answer any are as at be because been but by can do each final finally first following for"
    " from get given had has have he her his how i if in into is it its let may need next now of on or our out over she"
    " should simply since so solution solve some step such than that the their them then there therefore these they"
    " this thus to total up us using was we well were what when where which who will with would you your"
)
_STYLE_WEIGHT = 0.1
_NEGATION_WEIGHT = 2.0
_OPERATOR_WEIGHT = 2.0
_PAIR_WEIGHT = 0.5


def _weighted_words(stems: list[str], operations: Counter[tuple[str, object]]) -> dict[str, tuple[int, float]]:
    """Count stems, neighboring stems and operators. Words of style weigh a tenth, negations and operators double."""
    counts = Counter(stems)
    weighted = {stem: (count, _weight(stem)) for stem, count in counts.items()}
    for (left, right), count in Counter(pairwise(stems)).items():
        weighted[f"{left} {right}"] = count, _PAIR_WEIGHT * min(_weight(left), _weight(right))
    for operator, count in Counter(operator for operator, _ in operations.elements()).items():
        weighted[operator] = count, _OPERATOR_WEIGHT
    return weighted


def _weight(stem: str) -> float:
    return _NEGATION_WEIGHT if stem in _NEGATIONS else _STYLE_WEIGHT if stem in _STYLE else 1.0


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """Cut the common English endings, crudely: `plates` and `plate`, `adding` and `added` become one."""
    if word in _STYLE or len(word) < 4:
        return word
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


_CODE_SIGN = re.compile(
    r"^\s*(?:def|class|import|from \w+ import|return|elif|else:|while\b.*:|for \w+(?:, ?\w+)* in\b.*:|if\b.*:$)"
    r"|[+*/-]=|[!=]=|;[ \t]*$|[{}][ \t]*$|\w\(\)|\w\[\w+\]|^\s*\w+ = \w+[.(]|=>|&&|\|\|"
    r"|\b(?:const|let|var|int|return|function|print)\b[ (]\w",
    re.MULTILINE,
)
_MIN_CODE_SIGNS_PER_LINE = 0.5
_CODE_TOKEN = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?|[-+*/%&|^<>=!]=|\*\*|//|->|=>|&&|\|\||[^\w\s]|\n(?=\S)")
_KEYWORDS = _split(
    "and as assert async await bool break case catch class const continue def del do double elif else except false"
    " finally float for from function global if import in int is lambda let long new none not null or pass private"
    " public raise return self static string struct switch this throw true try var void while with yield"
)


def _code_shape(text: str) -> tuple[str, ...]:
    """Return the tokens of a program with its variables numbered; empty when the text is no program."""
    if "\\" in text and "\\n" not in text:
        return ()
    lines = sum(1 for line in text.split("\n") if line.strip())
    if len(_CODE_SIGN.findall(text)) < _MIN_CODE_SIGNS_PER_LINE * max(1, lines):
        return ()
    tokens: list[str] = _CODE_TOKEN.findall(text)
    defined = {name for word, name in pairwise(tokens) if word in ("def", "class", "function")}
    names: dict[str, str] = {}
    shape: list[str] = []
    for i, token in enumerate(tokens):
        called = tokens[i + 1 : i + 2] == ["("] or tokens[i - 1 : i] == ["."]
        is_name = (token[0].isalpha() or token[0] == "_") and token.lower() not in _KEYWORDS
        if is_name and (token in defined or not called):
            token = names.setdefault(token, f"@{len(names)}")
        shape.append(token)
    return tuple(shape)
