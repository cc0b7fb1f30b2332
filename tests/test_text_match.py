"""Text overlap at probe prefixes: worked-out numbers, a world where the teacher is the student, what is left out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import tiny
from omniopd.diagnosis.text_match import (
    SpanSampler,
    TextMatchReport,
    TextMatchSettings,
    match_texts,
    text_match_cost,
)
from omniopd.errors import ConfigError, DataError, RolloutError, TeacherResponseError
from omniopd.scoring.similarity import get_similarity
from omniopd.supervision.chunked import request_seed
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.types import Author, Continuation, Missing, Rollout, Usage

Law = Callable[[ContinuationRequest, random.Random], Continuation]


class LawTeacher:
    """Answer by a law; sample i of a request depends on its seed and i alone."""

    id = "law:m"

    def __init__(self, law: Law) -> None:
        self.law = law
        self.requests: list[ContinuationRequest] = []

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        self.requests += requests
        return [
            TeacherAnswer(
                continuations=tuple(self.law(r, random.Random(f"{r.seed} {i}")) for i in range(r.n)),
                usage=Usage(requests=1, output_tokens=r.n),
            )
            for r in requests
        ]

    async def aclose(self) -> None: ...


class Student:
    """Draw each span from `words`, by the seed of its prefix."""

    def __init__(self, words: str, *, lost: int = 0) -> None:
        self.words = words
        self.lost = lost
        self.asked: list[tuple[tuple[int, ...], int, int, int]] = []

    async def __call__(
        self, prefixes: Sequence[tuple[int, ...]], *, n: int, max_tokens: int, seeds: Sequence[int]
    ) -> list[list[str]]:
        self.asked += [(p, n, max_tokens, s) for p, s in zip(prefixes, seeds, strict=True)]
        return [[random.Random(f"{seed} {i}").choice(self.words) for i in range(n - self.lost)] for seed in seeds]


def one_of(words: str, **fields: Any) -> LawTeacher:
    return LawTeacher(lambda request, rng: Continuation(text=rng.choice(words), **fields))


def rollouts(num_prompts: int, group_size: int = 1) -> list[Rollout]:
    return [
        tiny.rollout(f"1+2={p}{g};#{p}", name=f"p{p}/{g}", of=tiny.prompt(f"p{p}"))
        for p in range(num_prompts)
        for g in range(group_size)
    ]


def match(
    of: Sequence[Rollout], teacher: Any, student: SpanSampler, *, similarity: str = "exact", **settings: Any
) -> TextMatchReport:
    return asyncio.run(match_texts(of, teacher, student, get_similarity(similarity), TextMatchSettings(**settings)))


def test_a_number_worked_out_by_hand() -> None:
    # The student always writes 1234. One teacher span in two is the same, the other 1b34: edit 3/4. Their mean: 7/8.
    class Fixed(Student):
        async def __call__(
            self, prefixes: Sequence[tuple[int, ...]], *, n: int, max_tokens: int, seeds: Sequence[int]
        ) -> list[list[str]]:
            return [["1234"] * n for _ in prefixes]

    class Half(LawTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            return [
                TeacherAnswer(continuations=(Continuation(text="1234"), Continuation(text="1b34"))) for _ in requests
            ]

    report = match(rollouts(3), Half(one_of("a").law), Fixed(""), similarity="edit", num_spans=2)
    assert report.text_overlap is not None and report.self_overlap is not None
    assert (report.text_overlap.value, report.text_overlap.low, report.text_overlap.high) == (0.875,) * 3
    assert report.self_overlap.value == 1.0
    assert report.num_spans == 6
    assert report.metrics["match/text_overlap"] == 0.875
    assert not any("ratio" in text for text in (*report.metrics, *report.summary_lines()))


def test_the_student_as_its_own_teacher_scores_what_it_scores_with_itself() -> None:
    # Spans are one of 5 letters. The chance that one of 4 student spans is the same: 1 - (4/5)^4 = 0.5904.
    report = match(rollouts(200, 2), one_of("12345"), Student("12345"), num_prefixes=400)
    assert report.text_overlap is not None and report.self_overlap is not None
    assert report.text_overlap.low is not None and report.text_overlap.high is not None
    assert report.text_overlap.low < 0.5904 < report.text_overlap.high
    assert report.self_overlap.value == pytest.approx(0.5904, abs=0.05)  # two deviations of 400 spans
    # With a teacher that uses two more letters: 5/7 of that.
    other = match(rollouts(200, 2), one_of("1234567"), Student("12345"), num_prefixes=400)
    assert other.text_overlap is not None and other.text_overlap.high is not None
    assert other.text_overlap.value == pytest.approx(0.5904 * 5 / 7, abs=0.04)
    assert other.text_overlap.high < 0.5904


def test_prefixes_are_dealt_to_the_prompts_in_turn_and_stay_the_same() -> None:
    of = [*rollouts(3, 4), *rollouts(4)[3:]]
    first, again, other = one_of("1"), one_of("1"), one_of("1")
    few = match(of, first, Student("1"), num_prefixes=5)
    match(of, again, Student("1"), num_prefixes=5)
    match(of, other, Student("1"), num_prefixes=5, seed=1)
    # Every one of 4 prompts comes once before one comes twice.
    assert [len({c.prompt_id for c in few.comparisons[:4]}), len(few.comparisons)] == [4, 5]
    assert first.requests == again.requests != other.requests
    assert len(match(of, one_of("1"), Student("1")).comparisons) == 13


def test_both_sides_go_on_from_the_same_exact_prefix_with_seeds_of_their_own() -> None:
    teacher, student = one_of("1"), Student("1")
    of = rollouts(6)
    report = match(of, teacher, student, num_spans=3, span_tokens=7, seed=2)
    assert [r.token_ids for r in teacher.requests] == [ids for ids, *_ in student.asked]
    by_name = {r.id: r for r in of}
    for request, comparison, (_, n, max_tokens, seed) in zip(
        teacher.requests, report.comparisons, student.asked, strict=True
    ):
        written = by_name[comparison.rollout_id]
        assert request.prefix == written.text[: comparison.start]
        assert request.token_ids == written.prompt.token_ids + written.token_ids[: comparison.start]
        assert request.seed == request_seed(2, written.prompt.id, request.prefix) != seed
        assert (request.n, request.max_tokens) == (3, 7)
        assert (n, max_tokens) == (4, 7)
    # Somewhere inside the text, never after it: there the student has nothing left to say.
    starts = [c.start for c in report.comparisons]
    assert max(starts) < 9 and len(set(starts)) > 2


def test_missing_spans_are_left_out_and_counted() -> None:
    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        if request.messages[0].content.startswith("b"):
            return Continuation(text=None, missing=Missing.REFUSED)
        return Continuation(text="1")

    silent = tiny.rollout("1+2=3;#3", name="p9/0", of=tiny.prompt("p9", "b"))
    report = match([*rollouts(2), silent], LawTeacher(law), Student("1"), num_spans=2)
    assert report.text_overlap is not None and report.self_overlap is not None
    # A mismatch in place of the missing ones would make it 2/3.
    assert (report.text_overlap.value, report.text_overlap.num_prompts) == (1.0, 2)
    assert report.self_overlap.num_prompts == 2
    assert (report.missing, report.num_unanswered) == ({"refused": 2}, 1)
    assert report.metrics["match/missing"] == pytest.approx(2 / 6)
    alone = match([silent], LawTeacher(law), Student("1"))
    assert alone.text_overlap is None
    assert alone.metrics == {"match/missing": 1.0}
    assert "no evidence" in alone.summary_lines()[0]


def test_a_chat_teacher_is_not_blamed_for_the_lost_space() -> None:
    spaced = tiny.rollout("1", name="p0/0")
    spaced = Rollout(
        **{name: getattr(spaced, name) for name in spaced.__slots__}
        | {"text": " 7", "token_ids": (5, 1), "char_starts": (0, 2)}
    )

    class Spaced(Student):
        async def __call__(
            self, prefixes: Sequence[tuple[int, ...]], *, n: int, max_tokens: int, seeds: Sequence[int]
        ) -> list[list[str]]:
            return [[" 7"] * n for _ in prefixes]

    def overlap(**fields: Any) -> float:
        report = match([spaced], one_of("7", **fields), Spaced(""))
        assert report.text_overlap is not None and report.text_overlap.low is None
        assert "unknown, one prompt" in report.summary_lines()[0]
        return report.text_overlap.value

    assert overlap(is_exact=False) == 1.0
    assert overlap() == 0.0


def test_only_the_students_own_text_is_probed() -> None:
    foreign = tiny.rollout("1", name="p0/0", author=Author.TEACHER)
    empty = tiny.rollout("", name="p1/0")
    report = match([foreign, empty, *rollouts(1)], one_of("1"), Student("1"))
    assert len(report.comparisons) == 1
    with pytest.raises(DataError, match="none of 2 rollouts"):
        match([foreign, empty], one_of("1"), Student("1"))


def test_the_cost_is_known_before_and_progress_after_each_call() -> None:
    of = rollouts(6)
    settings = TextMatchSettings(num_spans=3, span_tokens=7, requests_per_call=4)
    # 6 prefixes, 6 * 3 spans of 7 + 2 tokens.
    cost = text_match_cost(of, settings, thinking_tokens=2)
    assert (cost.num_requests, cost.num_answers, cost.max_output_tokens) == (6, 18, 162)
    seen: list[tuple[int, int]] = []
    similarity = get_similarity("exact")
    report = asyncio.run(
        match_texts(of, one_of("1"), Student("1"), similarity, settings, progress=lambda *at: seen.append(at))
    )
    assert seen == [(4, 6), (6, 6)]
    assert report.usage == Usage(requests=6, output_tokens=18)
    assert TextMatchReport.from_json(report.to_json()) == report


def test_sides_that_answer_too_little_are_refused() -> None:
    class Short(LawTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            return [TeacherAnswer(continuations=()) for _ in requests]

    with pytest.raises(RolloutError, match="wrote 8 spans at 2 prefixes; expected 5 at each of 2"):
        match(rollouts(2), one_of("1"), Student("1", lost=1))
    with pytest.raises(TeacherResponseError, match="2 answers with 0 samples to 2 requests for 8"):
        match(rollouts(2), Short(one_of("1").law), Student("1"))


@pytest.mark.parametrize("name", ["num_prefixes", "num_spans", "span_tokens", "requests_per_call"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; expected 1 or more"):
        TextMatchSettings(**{name: 0})
