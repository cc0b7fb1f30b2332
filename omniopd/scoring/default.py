"""The default similarity: what two texts compute, then what they say. Plain Python, no model.

    phi = lambda * maths + (1 - lambda) * text,    lambda = n^2 / (n^2 + w / 4)

n is the mean count of numbers of the two texts and w that of their words: one number among 16 words decides a fifth,
eight decide 94%, and where neither text has a number words decide alone. When both texts state a final answer, half of
the score is whether those are equal, as in `numbers`.

`maths` is a logistic model of six agreements, each in [0, 1] and 1 for identical texts, with weights of at least 0:

    maths = (s(b + sum_i w_i f_i) - s(b)) / (s(b + sum_i w_i) - s(b)),    s the logistic function

hence symmetric, in [0, 1], 1 for identical texts and never lower for more agreement. The constants were fitted by
`benchmarks/similarity_default.py`, which says on what; the texts the figures are reported on took no part.

It compares what is written. It does not know which text is right, and it cannot see that two correct ways to the same
answer are both correct while their numbers differ.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from omniopd.scoring.numbers import FINAL_ANSWER_WEIGHT, Number
from omniopd.scoring.similarity import multiset_f1
from omniopd.scoring.worked import Worked

FEATURES = ("values", "counts", "last_result", "last_number", "operations", "length")
"""See `agreements`."""

WEIGHTS = (0.68, 1.74, 1.33, 1.04, 1.42, 0.73)
"""One for each of `FEATURES`, in its order; from `benchmarks/results/similarity_default.json`."""

BIAS = -3.95
"""The logit of agreement in nothing; from the same file."""

WORD_SHARE = 0.25
"""What a word weighs beside the square of the count of numbers. Chosen, not fitted: small enough to cost no AUC on the
half of the problems used for fitting, large enough that a year shared by two unrelated paragraphs decides little."""


def compare_worked(a: Worked, b: Worked) -> float:
    """Return how far two texts agree, in [0, 1]."""
    agreement = _body_agreement(a, b)
    if a.answer is None or b.answer is None:
        return agreement
    return (1 - FINAL_ANSWER_WEIGHT) * agreement + FINAL_ANSWER_WEIGHT * _same(a.answer, b.answer)


def _body_agreement(a: Worked, b: Worked) -> float:
    count = ((a.num_numbers + b.num_numbers) / 2) ** 2
    if not count:
        return text_agreement(a, b)
    words = WORD_SHARE * (a.num_words + b.num_words) / 2
    return (count * maths_agreement(agreements(a, b)) + words * text_agreement(a, b)) / (count + words)


def agreements(a: Worked, b: Worked) -> tuple[float, ...]:
    """Return the agreements that `FEATURES` names, for texts of which at least one holds a number.

    - values: F1 of the distinct numbers, each weighing its information. Repeating one gains nothing.
    - counts: F1 of the numbers with repetitions, all of one weight.
    - last_result: whether the last number to the right of an `=` is equal; without one, the last number.
    - last_number: whether the last number is equal.
    - operations: F1 of the operators with their operands; where neither text has one, values.
    - length: the smaller count of numbers over the larger.
    """
    values = weighted_f1(a.values, b.values)
    return (
        values,
        multiset_f1(a.counts, b.counts),
        _same(a.last_result, b.last_result),
        _same(a.last_number, b.last_number),
        multiset_f1(a.operations, b.operations) if a.operations or b.operations else values,
        _ratio(a.num_numbers, b.num_numbers),
    )


def maths_agreement(features: tuple[float, ...]) -> float:
    """Return the logistic model's value, scaled to 0 for agreement in nothing and 1 for agreement in everything."""
    if min(features) == 1:
        return 1.0
    logit = BIAS + math.fsum(weight * feature for weight, feature in zip(WEIGHTS, features, strict=True))
    return min(1.0, (_logistic(logit) - _NOTHING) / (_EVERYTHING - _NOTHING))


def text_agreement(a: Worked, b: Worked) -> float:
    """Return the agreement of two texts as prose, or as programs when both are.

    Prose: F1 of the weighted stems, pairs of stems and operators; where there is none, of visible characters. Programs:
    words count a twentieth; the operators and the pairs of neighboring tokens, with variables numbered, share the rest.
    So renaming a variable costs little and another operator costs much.
    """
    words = _words_f1(a.words, b.words) if a.words or b.words else multiset_f1(a.signs, b.signs)
    if not (a.code and b.code):
        return words
    shape = multiset_f1(_neighbors(a.code), _neighbors(b.code))
    operations = multiset_f1(a.operations, b.operations)
    return 0.05 * words + 0.475 * shape + 0.475 * operations


def weighted_f1(a: dict[Number, float], b: dict[Number, float]) -> float:
    """Return twice the shared weight over the weight of both; 1 when both are empty."""
    total = math.fsum(a.values()) + math.fsum(b.values())
    return 2 * math.fsum(weight for value, weight in a.items() if value in b) / total if total else 1.0


def _words_f1(a: dict[str, tuple[int, float]], b: dict[str, tuple[int, float]]) -> float:
    total = math.fsum(count * weight for words in (a, b) for count, weight in words.values())
    shared = math.fsum(min(count, b[stem][0]) * weight for stem, (count, weight) in a.items() if stem in b)
    return 2 * shared / total


def _neighbors(tokens: tuple[str, ...]) -> Counter[tuple[str, str]]:
    return Counter(pairwise(tokens))


def _ratio(a: int, b: int) -> float:
    return min(a, b) / max(a, b, 1)


def _same(a: Number | None, b: Number | None) -> float:
    return 1.0 if a is not None and a == b else 0.0


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


_NOTHING = _logistic(BIAS)
_EVERYTHING = _logistic(BIAS + math.fsum(WEIGHTS))
