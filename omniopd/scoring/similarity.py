"""Similarity of two short texts, in [0, 1]: the registry, the lexical measures, blends and options.

Every similarity is symmetric, 1 for identical texts, and 0 for an empty text against visible characters. A
configuration names one in a line: `edit`, `0.5*edit + 0.5*numbers`, `edit | floor 0.15 | align`. Naming one loads no
model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from omniopd.errors import ConfigError, MissingExtraError, ScoringError

F = TypeVar("F")

LEXICAL = ("edit", "rouge1", "chrf", "exact", "numbers", "default")
"""Names that need no model."""

OPTIONS = ("floor", "align", "device")
"""What may follow a `|`."""


@runtime_checkable
class Similarity(Protocol):
    """Compares two texts. Symmetric, in [0, 1], 1 for identical texts."""

    @property
    def name(self) -> str:
        """The spelling that `get_similarity` turns into this object again, for records."""
        ...

    def __call__(self, a: str, b: str) -> float:
        """Compare one pair."""
        ...

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """Compare a[i] with b[i] for every i; the way to compare many."""
        ...


AnySimilarity = str | Similarity | Callable[[str, str], float]
"""A line for `get_similarity`, an object, or a plain function of two texts."""


@lru_cache(maxsize=128)
def get_similarity(name: str) -> Similarity:
    """Return the similarity a configuration names.

    `NAME`, or `WEIGHT*NAME + WEIGHT*NAME ...` (weights are scaled to add up to 1; leave all of them out for equal
    ones), then any number of options, applied from left to right to the whole blend:

    - `| floor F`: (phi - F) / (1 - F), at least 0; takes away what unrelated texts score (about 0.15 for `edit`).
    - `| align` or `| align SHARE`: compare equal lengths, see `Align`.
    - `| device cuda`: where an embedding model runs; the default is sentence-transformers' own choice.

    Names: edit, rouge1, chrf, exact, numbers, default (see `scoring.default`), embedding, embedding:MODEL_OR_FOLDER
    (the path must not hold `+`, `*` or `|`).

    Raises:
        ConfigError: the line cannot be read; names the nearest valid name.
    """
    blend, *options = (part.strip() for part in name.split("|"))
    parsed = [_option(option, name) for option in options]
    devices = [str(value) for key, value in parsed if key == "device"]
    similarity = _blend(blend, device=devices[0] if devices else None)
    if len(devices) > 1 or (devices and "embedding" not in blend):
        raise ConfigError(f"'device' in the similarity {name!r}; expected it once, and only with an embedding part")
    for key, value in parsed:
        if key == "floor":
            similarity = Floor(inner=similarity, floor=float(value))
        elif key == "align":
            similarity = Align(inner=similarity, min_share=float(value))
    return similarity


def as_similarity(similarity: AnySimilarity) -> Similarity:
    """Return a `Similarity` for a name, for an object that is one, or for a plain function of two texts."""
    if isinstance(similarity, str):
        return get_similarity(similarity)
    if isinstance(similarity, Similarity):
        return similarity
    if callable(similarity):
        return _Function(name=getattr(similarity, "__name__", type(similarity).__name__), function=similarity)
    raise ConfigError(f"similarity is {similarity!r}; expected a name, a Similarity or a function of two texts")


@dataclass(frozen=True, slots=True)
class Edit:
    """1 - Levenshtein distance in characters / length of the longer text. The paper's default.

    Source: arXiv:2606.01476 section 4.
    """

    name: str = field(default="edit", init=False)

    def __call__(self, a: str, b: str) -> float:
        return float(_rapidfuzz().distance.Levenshtein.normalized_similarity(a, b))

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        _require_paired(a, b)
        # Short pairs are compared faster than they are looked up.
        if sum(map(len, a)) < _DEDUPE_MEAN_CHARS * len(a):
            return self._unique_pairs(a, b)
        unique = dict.fromkeys(zip(a, b, strict=True))
        if len(unique) == len(a):
            return self._unique_pairs(a, b)
        left, right = zip(*unique, strict=True)
        known = dict(zip(unique, self._unique_pairs(left, right), strict=True))
        return [known[pair] for pair in zip(a, b, strict=True)]

    def _unique_pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        rapidfuzz = _rapidfuzz()
        scorer = rapidfuzz.distance.Levenshtein.normalized_similarity
        # The default of float32 would make a batch differ from single calls.
        scores: list[float] = rapidfuzz.process.cpdist(a, b, scorer=scorer, dtype=float).tolist()
        return scores


_DEDUPE_MEAN_CHARS = 64


@dataclass(frozen=True, slots=True)
class Featured(Generic[F]):
    """A similarity of what is read from each text once: `compare(features(a), features(b))`."""

    name: str
    features: Callable[[str], F]
    compare: Callable[[F, F], float]

    def __call__(self, a: str, b: str) -> float:
        return self.compare(self.features(a), self.features(b))

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        _require_paired(a, b)
        known = {text: self.features(text) for text in {*a, *b}}
        scores = {pair: self.compare(known[pair[0]], known[pair[1]]) for pair in set(zip(a, b, strict=True))}
        return [scores[pair] for pair in zip(a, b, strict=True)]


@dataclass(frozen=True, slots=True)
class Blend:
    """A weighted mean of similarities. Weights add up to 1."""

    parts: tuple[tuple[float, Similarity], ...]

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:.6g}*{part.name}" for weight, part in self.parts)

    def __call__(self, a: str, b: str) -> float:
        return self.pairs((a,), (b,))[0]

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        columns = [part.pairs(a, b) for _, part in self.parts]
        weights = [weight for weight, _ in self.parts]
        # Divided by the rounded sum of the weights, identical texts score 1 and not 0.9999999999999999.
        total = math.fsum(weights)
        return [
            math.fsum(weight * score for weight, score in zip(weights, row, strict=True)) / total
            for row in zip(*columns, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """(phi - floor) / (1 - floor), at least 0: what unrelated texts score counts as nothing."""

    inner: Similarity
    floor: float

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ConfigError(f"floor is {self.floor!r}; expected at least 0 and below 1")

    @property
    def name(self) -> str:
        return f"{self.inner.name} | floor {self.floor:g}"

    def __call__(self, a: str, b: str) -> float:
        return self._lift(self.inner(a, b))

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        return [self._lift(score) for score in self.inner.pairs(a, b)]

    def _lift(self, score: float) -> float:
        return max(0.0, (score - self.floor) / (1 - self.floor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Align:
    """Compare equal lengths: cut the longer text to the length of the shorter, in characters.

    But never to less than `min_share` of its own length, so an early end is no free agreement: with lengths m < n the
    longer one keeps max(m, ceil(min_share * n)) characters. At the default of 0.5 a text that stops after a quarter
    is compared with the first half, and `edit` gives at most 0.5. An empty text against any other stays 0.
    """

    inner: Similarity
    min_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.min_share <= 1:
            raise ConfigError(f"align share is {self.min_share!r}; expected above 0 and at most 1")

    @property
    def name(self) -> str:
        return f"{self.inner.name} | align {self.min_share:g}"

    def __call__(self, a: str, b: str) -> float:
        return self.pairs((a,), (b,))[0]

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        _require_paired(a, b)
        cut = [self._cut(left, right) for left, right in zip(a, b, strict=True)]
        scores = self.inner.pairs([left for left, _ in cut], [right for _, right in cut])
        return [0.0 if bool(left) != bool(right) else score for left, right, score in zip(a, b, scores, strict=True)]

    def _cut(self, a: str, b: str) -> tuple[str, str]:
        shorter, longer = sorted((len(a), len(b)))
        keep = max(shorter, math.ceil(self.min_share * longer))
        return a[:keep], b[:keep]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Function:
    """A plain function of two texts, as a `Similarity`. The function answers for symmetry; the range is checked."""

    name: str
    function: Callable[[str, str], float]

    def __call__(self, a: str, b: str) -> float:
        score = float(self.function(a, b))
        if not 0 <= score <= 1:
            raise ScoringError(f"similarity {self.name} returned {score}; expected a number from 0 to 1")
        return score

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        _require_paired(a, b)
        return [self(left, right) for left, right in zip(a, b, strict=True)]


# A LaTeX command, a number, a word, a single CJK character (no spaces there), or any other single visible character;
# so signs, operators and brackets are tokens of their own.
_TOKEN = re.compile(
    r"\\[a-zA-Z]+|\d+(?:[.,]\d+)*|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]"
)


def word_counts(text: str) -> Counter[str]:
    """Count words, numbers, signs and operators, each a token; letter case does not count."""
    return Counter(_TOKEN.findall(text.lower()))


def multiset_f1(a: Counter[Any], b: Counter[Any]) -> float:
    """Return the F1 overlap of two multisets: twice the shared count over the sum of both; 1 when both are empty."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


_MAX_NGRAM = 6


def ngram_counts(text: str) -> list[Counter[Hashable]]:
    """Count the character n-grams of orders 1 to 6, whitespace left out as in the reference implementation."""
    packed = "".join(text.split())
    return [Counter(packed[i : i + n] for i in range(len(packed) - n + 1)) for n in range(1, _MAX_NGRAM + 1)]


def chrf(a: list[Counter[Hashable]], b: list[Counter[Hashable]]) -> float:
    """Return the mean F1 over the orders that at least one text has.

    Differs from the published chrF: recall has no extra weight (beta = 1, not 2) and F is taken for each order before
    the mean, which makes it symmetric, and 1 for identical texts that are shorter than an n-gram.
    """
    orders = [(left, right) for left, right in zip(a, b, strict=True) if left or right]
    if not orders:
        return 1.0
    return math.fsum(multiset_f1(left, right) for left, right in orders) / len(orders)


def _same(a: str, b: str) -> float:
    return 1.0 if a == b else 0.0


def _identity(text: str) -> str:
    return text


def _named(name: str, *, device: str | None) -> Similarity:
    """Return the similarity of one name of the registry."""
    if name == "edit":
        return Edit()
    if name == "rouge1":
        return Featured("rouge1", word_counts, multiset_f1)
    if name == "chrf":
        return Featured("chrf", ngram_counts, chrf)
    if name == "exact":
        return Featured("exact", _identity, _same)
    if name == "numbers":
        from omniopd.scoring.numbers import agreement, read_facts

        return Featured("numbers", read_facts, agreement)
    if name == "default":
        from omniopd.scoring.default import compare_worked
        from omniopd.scoring.worked import read_worked

        return Featured("default", read_worked, compare_worked)
    kind, _, model = name.partition(":")
    if kind == "embedding":
        from omniopd.scoring.embed import DEFAULT_MODEL, EmbeddingSimilarity

        return EmbeddingSimilarity(model=model.strip() or DEFAULT_MODEL, device=device)
    valid = [*LEXICAL, "embedding", "embedding:MODEL"]
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no similarity {name!r}{hint} (valid: {', '.join(valid)}, and blends of them)")


_TERM = re.compile(r"(?:(?P<weight>[^*]*)\*)?\s*(?P<name>[^*]+)")


def _blend(text: str, *, device: str | None) -> Similarity:
    """Read `NAME`, `NAME + NAME` or `WEIGHT*NAME + WEIGHT*NAME`."""
    terms = [_TERM.fullmatch(term.strip()) for term in text.split("+")]
    if any(term is None for term in terms):
        raise ConfigError(f"cannot read the similarity {text!r}; expected NAME or WEIGHT*NAME + WEIGHT*NAME")
    read = [(term["weight"], term["name"].strip()) for term in terms if term is not None]
    parts = [(weight, _named(name, device=device)) for weight, name in read]
    if len({weight is None for weight, _ in parts}) > 1:
        raise ConfigError(f"similarity {text!r} gives some parts a weight and others none; give one to all, or to none")
    weights = [1.0 if weight is None else _positive(weight.strip(), text) for weight, _ in parts]
    if len(parts) == 1:
        return parts[0][1]
    total = math.fsum(weights)
    return Blend(tuple((weight / total, part) for weight, (_, part) in zip(weights, parts, strict=True)))


def _positive(text: str, line: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"weight {text!r} in the similarity {line!r}; expected a number above 0")
    return weight


def _option(text: str, line: str) -> tuple[str, str | float]:
    """Read `floor F`, `align`, `align SHARE` or `device NAME`."""
    key, *values = text.split() or [""]
    if key == "device" and len(values) == 1:
        return key, values[0]
    if key == "align" and not values:
        return key, 0.5
    if key in ("floor", "align") and len(values) == 1:
        try:
            return key, float(values[0])
        except ValueError:
            raise ConfigError(f"{key} {values[0]!r} in the similarity {line!r}; expected a number") from None
    near = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"cannot read the option {text!r} of the similarity {line!r};"
        f" expected 'floor NUMBER', 'align', 'align SHARE' or 'device NAME'.{hint}"
    )


def _require_paired(a: Sequence[str], b: Sequence[str]) -> None:
    if len(a) != len(b):
        raise ScoringError(f"cannot pair {len(a)} texts with {len(b)}; expected as many on both sides")


@lru_cache(maxsize=1)
def _rapidfuzz() -> Any:
    try:
        import rapidfuzz
        import rapidfuzz.distance
        import rapidfuzz.process
    except ImportError as error:
        raise MissingExtraError("the edit similarity needs rapidfuzz: pip install rapidfuzz") from error
    return rapidfuzz
