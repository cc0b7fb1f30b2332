from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd.scoring import default
from omniopd.scoring.default import agreements, compare_worked, maths_agreement
from omniopd.scoring.similarity import get_similarity
from omniopd.scoring.worked import information, read_worked

_FITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "similarity_default.json"

REFERENCE = (
    "Half a dozen plates cost 6 * 6000 = 36000 dollars.\n"
    "The cups cost 1200 dollars less, which is 36000 - 1200 = 34800.\n"
    "There are 20 * 12 = 240 cups, so each costs 34800 / 240 = 145 dollars."
)
OTHER_WORDS = (
    "Six plates are $6,000 each: 6*$6000 = $36,000.\n"
    "For all cups together one pays 36000-1200=$34,800.\n"
    "Twenty dozen make 20*12=240, and 34,800/240=$145.00 a cup."
)
PROBLEM = (
    "Twenty dozen cups cost $1200 less than the total cost of half a dozen plates sold at $6000 each. Calculate the"
    " total cost of buying each cup."
)


def phi(a: str, b: str) -> float:
    return get_similarity("default")(a, b)


_TEXT = st.text(alphabet="ab 12-=.,/\n\\{}%#<+*()x:", max_size=40)


@settings(max_examples=300, deadline=None)
@given(a=_TEXT, b=_TEXT)
def test_default_is_symmetric_bounded_and_one_on_identical_text(a: str, b: str) -> None:
    assert phi(a, a) == 1.0
    assert 0.0 <= phi(a, b) <= 1.0
    assert phi(a, b) == phi(b, a)
    if a.strip():
        assert phi(a, "") == phi(a, " \n") == 0.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3/4", "0.75"),
        ("75%", "3/4"),
        (r"\frac{3}{4}", ".75"),
        (r"75\%", "75 percent"),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        ("$18.00", "18"),
        (r"1 \frac{1}{4}", "5/4"),
        ("1 1/4", "1.25"),
        ("2 - 3 + (-4)", "2 - 3 + (-4.0)"),
        ("2 x 3", "2*3"),
        ("<<2*3=6>>6", "6"),
        ("4 < n", "n > 4.0"),
    ],
)
def test_one_value_has_many_spellings(a: str, b: str) -> None:
    x, y = read_worked(a), read_worked(b)
    assert x.counts == y.counts
    assert x.operations == y.operations
    assert agreements(x, y) == (1.0,) * 6


def test_values_are_signed_and_exact() -> None:
    assert set(read_worked("x = -4, then 3-2, a 5-year plan").values) == {-4, 3, 2, 5}
    assert set(read_worked("0.1 + 0.2 = 0.3").values) == {Fraction(1, 10), Fraction(1, 5), Fraction(3, 10)}
    assert set(read_worked("7/2=3.5").values) == {7, 2, Fraction(7, 2)}  # a division, since its result follows
    huge = "9" * 400
    assert read_worked(f"x = -{huge}").last_result == f"-{huge}"
    assert information(huge) == pytest.approx(400 * math.log2(10))


def test_operations_know_order_units_and_hyphens() -> None:
    assert read_worked("4 goals - 2 goals").operations == {("-", (4, 2)): 1}
    assert read_worked("2 + 5").operations == read_worked("5 + 2").operations
    assert read_worked("5 - 2").operations != read_worked("2 - 5").operations
    assert not read_worked("a 5-year plan at $5/hour is well-known\n- 3 apples\nit is -4").operations
    assert read_worked("n/2 + 2*x").operations == {
        ("/", ("", 2)): 1,
        ("+", frozenset((2,))): 1,
        ("*", frozenset((2, ""))): 1,
    }


def test_agreements_by_hand() -> None:
    a, b = read_worked("2 + 6 = 8"), read_worked("2 + 14 = 16 and 6")
    values, counts, last_result, last_number, operations, length = agreements(a, b)
    # Bits: log2(2 + n) is 2 for 2, 3 for 6, log2(10) for 8, 4 for 14, log2(18) for 16; 2 and 6 are shared.
    total = (2 + 3 + math.log2(10)) + (2 + 4 + math.log2(18) + 3)
    assert values == pytest.approx(2 * 5 / total)
    assert counts == pytest.approx(2 * 2 / (3 + 4))
    assert (last_result, last_number, operations) == (0, 0, 0)
    assert length == 3 / 4
    # 8 is the last result of both; the last numbers are 8 and 5.
    assert agreements(a, read_worked("8 - 0 = 8, or 5"))[2:4] == (1, 0)


def test_the_model_is_monotone_and_scaled() -> None:
    assert maths_agreement((0.0,) * 6) == 0.0
    assert maths_agreement((1.0,) * 6) == 1.0
    for i in range(6):
        features = [0.5] * 6
        features[i] = 0.75
        assert maths_agreement(tuple(features)) > maths_agreement((0.5,) * 6)

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    low, high = s(default.BIAS), s(default.BIAS + sum(default.WEIGHTS))
    by_hand = (s(default.BIAS + 0.5 * sum(default.WEIGHTS)) - low) / (high - low)
    assert maths_agreement((0.5,) * 6) == pytest.approx(by_hand)


def test_the_constants_are_the_fitted_ones() -> None:
    fitted = json.loads(_FITTED.read_text(encoding="utf-8"))
    assert fitted["weights"] == dict(zip(default.FEATURES, default.WEIGHTS, strict=True))
    assert fitted["bias"] == default.BIAS


def test_numbers_and_words_share_the_score_by_their_counts() -> None:
    a, b = read_worked("cats 7"), read_worked("dogs 7")
    # One number and one word on either side: lambda = 1 / (1 + 1 / 4); the mathematics agrees, the words do not.
    assert compare_worked(a, b) == pytest.approx(0.8)
    # Four words: lambda = 1 / (1 + 4 / 4).
    assert phi("cats mice rats bats 7", "dogs pigs hens ants 7") == pytest.approx(0.5)


def test_half_of_the_score_is_the_stated_answer() -> None:
    assert phi("#### 71", "#### 71") == 1
    body = phi("71", "17")
    assert phi("#71", "#17") == pytest.approx(body / 2)
    assert phi(r"\boxed{x+y}", r"\boxed{x-y}") < phi(r"\boxed{x+y}", r"\boxed{ x+y }") - 0.4
    assert phi(r"So \boxed{1 \frac{1}{4}}", r"So \boxed{5/4}") == 1


GENUINE = 0.9


def test_other_words_for_the_same_solution_agree() -> None:
    assert phi(REFERENCE, OTHER_WORDS) > GENUINE


@pytest.mark.parametrize(
    ("hack", "ceiling"),
    [
        pytest.param(PROBLEM, 0.2, id="the problem copied"),
        pytest.param("145 " * 50, 0.3, id="the right number many times"),
        pytest.param("= 145 " * 50, 0.3, id="the right result many times"),
        pytest.param("145", 0.3, id="the answer alone"),
        pytest.param(", ".join(map(str, range(1, 101))), 0.1, id="all numbers to 100"),
        pytest.param(", ".join(map(str, range(1, 101))) + " = 145", 0.25, id="all numbers, then the answer"),
        pytest.param(
            "First, let us simply think step by step. Therefore, finally, the answer is clear.", 0.1, id="style"
        ),
        pytest.param("\n".join([REFERENCE] * 8), 0.6, id="the solution eight times"),
        pytest.param("?!" * 40, 0.0, id="signs"),
        pytest.param("", 0.0, id="nothing"),
    ],
)
def test_hacks_score_far_below_agreement(hack: str, ceiling: float) -> None:
    assert phi(REFERENCE, hack) <= ceiling < GENUINE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("= $145.00 a cup", "= $154.00 a cup", id="digits swapped"),
        pytest.param("=$145.00", "=-$145.00", id="sign"),
        pytest.param("=$145.00", "=$146.00", id="one off"),
        pytest.param("36000-1200=$34,800", "1200-36000=$34,800", id="operands swapped"),
        pytest.param("36000-1200=", "36000+1200=", id="operator"),
        pytest.param("20*12", "20/12", id="operator between others"),
        pytest.param("$36,000", "$3,600", id="a zero lost"),
        pytest.param("cup", "hour", id="unit"),
    ],
)
def test_one_mistake_lowers_the_score(old: str, new: str) -> None:
    old = old if old in OTHER_WORDS else old.replace("= $", "=$")
    assert old in OTHER_WORDS
    assert phi(REFERENCE, OTHER_WORDS.replace(old, new)) < phi(REFERENCE, OTHER_WORDS)


@pytest.mark.parametrize(
    ("text", "same", "other"),
    [
        ("= 71;", "=71;", "= 17;"),
        ("x = 4", "x=4", "x = -4"),
        ("8 - 3 = 5", "8-3=5", "3 - 8 = 5"),
        ("12 * 4", "12 x 4", "12 + 4"),
        ("so n > 5", "so 5 < n", "so n < 5"),
        ("it takes 5 minutes", "it takes 5 minute", "it takes 5 hours"),
        ("12.5%", "1/8", "12.5"),
        ("it is not prime", "not prime it is", "it is prime"),
        ("a - b", "a-b", "a + b"),
    ],
)
def test_short_chunks(text: str, same: str, other: str) -> None:
    assert phi(text, same) > phi(text, other) + 0.1


def test_prose() -> None:
    text = "The committee rejected the proposal because the costs were too high."
    paraphrase = "Because of the high costs, the proposal was rejected by the committee."
    negated = "The committee never rejected the proposal because the costs were too high."
    unrelated = "A gentle wind moved through the trees while the children played near the river."
    assert phi(text, paraphrase) > 0.5
    assert phi(text, unrelated) < 0.05
    assert phi(text, unrelated) < phi(text, negated) < 1
    # A year that two paragraphs share decides little.
    assert phi(f"In 1998, {text}", f"In 1998, {unrelated}") < 0.5 < phi(f"In 1998, {text}", f"In 1998, {paraphrase}")


CODE = """\
def area(width, height):
    total = width * height
    if total > limit:
        return limit - total
    return total
"""


def test_a_program_is_what_it_computes_and_not_its_names() -> None:
    renamed = CODE.replace("width", "w").replace("height", "h").replace("total", "product")
    assert phi(CODE, renamed) > 0.85
    for changed in (
        CODE.replace("width * height", "width + height"),
        CODE.replace("total > limit", "total < limit"),
        CODE.replace("limit - total", "total - limit"),
    ):
        assert phi(CODE, changed) < phi(CODE, renamed)
    assert phi("x = max(a[i], b)\ny = x\n", "p = max(q[r], s)\nt = p\n") > phi(
        "x = max(a[i], b)\ny = x\n", "x = min(a[i], b)\ny = x\n"
    )
    unrelated = "import os\nfor name in os.listdir(path):\n    print(name)\n"
    assert phi(CODE, unrelated) < 0.3


def test_mathematics_in_latex_is_no_program() -> None:
    assert read_worked(r"\begin{align} f(x) &= 2x \\ g(x) &= x[1] \end{align}").code == ()
    assert read_worked(CODE).code[:4] == ("def", "@0", "(", "@1")


def test_a_batch_equals_single_calls_and_composes() -> None:
    texts = [REFERENCE, OTHER_WORDS, PROBLEM, CODE, "", "145"]
    a = [left for left in texts for _ in texts]
    b = texts * len(texts)
    assert get_similarity("default").pairs(a, b) == [phi(left, right) for left, right in zip(a, b, strict=True)]
    blend = get_similarity("0.5*default + 0.5*edit | floor 0.1")
    expected = (0.5 * phi(REFERENCE, PROBLEM) + 0.5 * get_similarity("edit")(REFERENCE, PROBLEM) - 0.1) / 0.9
    assert blend(REFERENCE, PROBLEM) == pytest.approx(max(0.0, expected))
    assert get_similarity("default").name == "default"
