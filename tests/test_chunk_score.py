from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from pydantic import TypeAdapter, ValidationError

from omniopd.errors import ConfigError
from omniopd.scoring.chunk_score import ChunkScorer, geometric_prior, smoothed_target
from omniopd.types import Chunk, ChunkScore, Continuation, Missing, TeacherContinuations


def _answer(chunk_text: str, *continuations: str | Missing) -> TeacherContinuations:
    return TeacherContinuations(
        chunk=Chunk(rollout_id="r", index=0, start=0, end=3, prefix="", text=chunk_text),
        continuations=tuple(
            Continuation(text=None, missing=c) if isinstance(c, Missing) else Continuation(text=c)
            for c in continuations
        ),
        teacher_id="scripted:test",
    )


def _score(scorer: ChunkScorer, chunk_text: str, *continuations: str | Missing) -> ChunkScore:
    (score,) = scorer.score([_answer(chunk_text, *continuations)])
    return score


def test_the_published_numbers() -> None:
    prior = geometric_prior([-0.1, -0.3, -0.2])  # exp(-0.6 / 3)
    assert prior == pytest.approx(0.818731, abs=1e-6)
    target = smoothed_target(4, 10, prior, alpha=1.0)  # (4 + 0.818731) / 11
    assert target == pytest.approx(0.438066, abs=1e-6)
    assert 0.6 * target == pytest.approx(0.262840, abs=1e-6)  # the chunk loss, -w * sum of log-probabilities
    assert smoothed_target(0, 10, prior, alpha=1.0) == pytest.approx(0.074430, abs=1e-6)
    assert smoothed_target(10, 10, prior, alpha=1.0) == pytest.approx(0.983521, abs=1e-6)


def test_without_a_prior_the_target_is_the_mean_and_without_evidence_the_prior() -> None:
    assert smoothed_target(3.0, 4, 0.9, alpha=0.0) == 0.75
    assert smoothed_target(0.0, 0, 0.9, alpha=2.0) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("evidence", "n", "prior", "alpha", "message"),
    [
        (5.1, 5, 0.5, 1.0, "expected 0 to 5"),
        (-0.1, 5, 0.5, 1.0, "expected 0 to 5"),
        (math.nan, 5, 0.5, 1.0, "expected 0 to 5"),
        (0.0, -1, 0.5, 2.0, "-1 continuations"),
        (1.0, 5, 1.1, 1.0, "prior is 1.1"),
        (1.0, 5, math.nan, 1.0, "prior is nan"),
        (1.0, 5, 0.5, -1.0, "alpha is -1"),
        (1.0, 5, 0.5, math.inf, "alpha is inf"),
        (0.0, 0, 0.5, 0.0, "there is no target"),
    ],
)
def test_targets_outside_the_definition_are_refused(
    evidence: float, n: int, prior: float, alpha: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        smoothed_target(evidence, n, prior, alpha=alpha)


def test_prior_edges() -> None:
    assert geometric_prior([-math.inf, -1.0]) == 0.0
    assert geometric_prior([1e-7]) == 1.0  # float32 rounding, not a probability above 1
    for bad in ([], [0.1], [math.nan]):
        with pytest.raises(ConfigError):
            geometric_prior(bad)


def test_value_is_the_mean_over_usable_continuations() -> None:
    score = _score(ChunkScorer(), "abc", "abd", Missing.TIMEOUT, "abc")
    assert score.similarities == pytest.approx((2 / 3, 1.0))
    assert score.value == pytest.approx(5 / 6)
    assert (score.num_continuations, score.missing, score.scorer_id) == (2, None, "edit")
    assert score.evidence == pytest.approx(5 / 3)


def test_continuations_are_cut_to_the_chunk_but_an_early_end_counts() -> None:
    assert _score(ChunkScorer(), "abcd", "abcdefgh").value == 1.0
    assert _score(ChunkScorer(align=False), "abcd", "abcdefgh").value == 0.5
    assert _score(ChunkScorer(), "abcd", "ab").value == 0.5


def test_the_space_at_the_joint_is_not_compared() -> None:
    scorer = ChunkScorer(similarity="exact")
    assert _score(scorer, " 71 is", "71 is it").value == 1.0
    assert _score(scorer, "71 is", "\n 71 is it").value == 1.0
    # Whitespace is all there is: then it counts.
    assert _score(scorer, "\n", "71").value == 0.0
    assert _score(scorer, "\n", "\n").value == 1.0


@pytest.mark.parametrize(
    ("least", "scored"),
    [(1, True), (2, True), (3, False), (0.5, True), (0.51, False), (1.0, False)],
)
def test_too_few_usable_continuations_leave_the_chunk_unaudited(least: int | float, scored: bool) -> None:
    score = _score(ChunkScorer(min_continuations=least), "a", "a", "a", Missing.REFUSED, Missing.EMPTY)
    assert (score.value is not None) == scored
    assert score.num_continuations == 2
    if not scored:
        assert score.missing is Missing.TOO_FEW
        assert "2 of 4 continuations usable" in score.detail and "1 refused, 1 empty" in score.detail


def test_a_fraction_is_not_pushed_up_by_rounding() -> None:
    # 0.1 * 30 is 3.0000000000000004 in floating point; 3 are enough.
    answer = _answer("a", *["a"] * 3, *[Missing.FAILED] * 27)
    assert ChunkScorer(min_continuations=0.1).score([answer])[0].value == 1.0


def test_when_nothing_came_back_the_commonest_reason_is_named() -> None:
    score = _score(ChunkScorer(), "a", Missing.EMPTY, Missing.REFUSED, Missing.REFUSED)
    assert (score.value, score.missing) == (None, Missing.REFUSED)
    assert _score(ChunkScorer(), "a").missing is Missing.TOO_FEW


@dataclass
class _Counting:
    name: str = "counting"
    batches: list[list[tuple[str, str]]] = field(default_factory=list)

    def __call__(self, a: str, b: str) -> float:
        return self.pairs([a], [b])[0]

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        self.batches.append(list(zip(a, b, strict=True)))
        return [float(left == right) for left, right in zip(a, b, strict=True)]


def test_all_pairs_of_a_call_are_compared_in_one_batch() -> None:
    similarity = _Counting()
    answers = [_answer("ab", "ab", "xy"), _answer("c", Missing.EMPTY), _answer("de", "dx", "de", "de!")]
    scores = ChunkScorer(similarity=similarity).score(answers)
    assert similarity.batches == [[("ab", "ab"), ("ab", "xy"), ("de", "dx"), ("de", "de"), ("de", "de")]]
    assert [s.value for s in scores] == [0.5, None, pytest.approx(2 / 3)]
    assert [s.chunk for s in scores] == [a.chunk for a in answers]
    assert scores[0].scorer_id == "counting"
    assert ChunkScorer().score([]) == []


@pytest.mark.parametrize("least", [0, -1, 0.0, 1.5, True, "2"])
def test_min_continuations_is_a_count_or_a_fraction(least: int | float) -> None:
    with pytest.raises(ConfigError, match="min_continuations"):
        ChunkScorer(min_continuations=least)


def test_settings_are_checked_when_built_and_when_read_from_yaml() -> None:
    with pytest.raises(ConfigError, match="did you mean 'edit'"):
        ChunkScorer(similarity="edt")
    adapter = TypeAdapter(ChunkScorer)
    read = adapter.validate_python({"similarity": "numbers", "min_continuations": 2, "align": False})
    assert read == ChunkScorer(similarity="numbers", min_continuations=2, align=False)
    with pytest.raises(ValidationError, match="aling"):
        adapter.validate_python({"aling": True})
