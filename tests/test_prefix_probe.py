"""The prefix probe in worlds where the truth is known: rates, pairing, intervals, what is left out, what is asked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from omniopd.diagnosis.evidence import cut_at, mean_over_prompts, num_text_tokens
from omniopd.diagnosis.prefix_probe import (
    PrefixProbeSettings,
    PrefixReport,
    largest_prefix_probe_cost,
    prefix_probe_cost,
    probe_prefixes,
)
from omniopd.diagnosis.prefix_summary import advice, summary_lines
from omniopd.errors import ConfigError, DataError, TeacherBudgetError, TeacherResponseError
from omniopd.supervision.chunked import request_seed
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.ledgered import Ledgered
from omniopd.types import Author, Continuation, FinishReason, Missing, Prompt, Rollout, Usage
from scripted_teacher import ScriptedTeacher, sold

Law = Callable[[ContinuationRequest, random.Random], Continuation]


class LawTeacher:
    """Answer by a law; sample i of a request depends on its seed and i alone."""

    id = "law:m"

    def __init__(self, law: Law) -> None:
        self.law = law
        self.calls: list[list[ContinuationRequest]] = []

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        self.calls.append(list(requests))
        return [
            TeacherAnswer(
                continuations=tuple(self.law(r, random.Random(f"{r.seed} {i}")) for i in range(r.n)),
                usage=Usage(requests=1, output_tokens=3, cost_usd=0.5),
            )
            for r in requests
        ]

    async def aclose(self) -> None: ...

    @property
    def requests(self) -> list[ContinuationRequest]:
        return [request for call in self.calls for request in call]


def ends_right(response: str, answer: str) -> bool:
    return response.rpartition("#")[2] == answer


def says(text: str, **fields: Any) -> Continuation:
    return Continuation(text=text, **{"finish_reason": "stop", **fields})


def always(text: str, **fields: Any) -> LawTeacher:
    return LawTeacher(lambda request, rng: says(text, **fields))


def rollout(text: str, name: str = "p0/0", **fields: Any) -> Rollout:
    """Make a judged rollout of one token a character and an end token; every answer is 3."""
    of = tiny.prompt(name.partition("/")[0])
    return tiny.rollout(text, name=name, of=of, **{"is_correct": ends_right(text, "3"), **fields})


def probe(
    rollouts: Sequence[Rollout], teacher: Any, verifier: Callable[[str, str], bool] = ends_right, **settings: Any
) -> PrefixReport:
    settings = {"num_continuations": 1, "max_tokens": 8, **settings}
    return asyncio.run(probe_prefixes(rollouts, teacher, verifier, PrefixProbeSettings(**settings)))


# Three rollouts of one prompt and one of another; every rollout has 8 characters.
GROUPS = (
    rollout("1+2=3;#3", "p0/0"),
    rollout("1+2=4;#4", "p0/1"),
    rollout("1+2=5;#5", "p0/2"),
    rollout("2+1=3;#3", "p1/0"),
)


def test_every_figure_of_a_world_worked_out_by_hand() -> None:
    # From the start the teacher is right. After `1+2=` it is right, after `2+1=` wrong.
    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        return says("#4" if request.prefix == "2+1=" else "#3")

    report = probe(GROUPS, LawTeacher(law), fractions=(0.5, 0.0))
    start, half = report.points
    assert (start.label, half.label) == ("0", "0.5")
    # Student: p0 is right in 1 of 3, p1 in 1 of 1: (1/3 + 1) / 2 = 2/3 over prompts (not 2/4 over rollouts).
    assert start.student is not None and start.student.value == pytest.approx(2 / 3)
    assert start.teacher is not None and start.teacher.value == 1.0
    # Advantages: p0 (0 + 1 + 1) / 3, p1 0: 1/3.
    assert start.advantage is not None and start.advantage.value == pytest.approx(1 / 3)
    assert (start.advantage.num_prompts, start.advantage.num_rollouts) == (2, 4)
    # Resampling two prompts gives 0, 1/3 and 2/3 with 1/4, 1/2 and 1/4: the 2.5% and 97.5% points are the outer ones.
    assert (start.advantage.low, start.advantage.high) == (0.0, pytest.approx(2 / 3))
    # Half: teacher p0 1, p1 0; advantage p0 2/3, p1 -1: -1/6.
    assert half.teacher is not None and half.teacher.value == 0.5
    assert half.advantage is not None and half.advantage.value == pytest.approx(-1 / 6)
    # Wrong rollouts are p0's alone, one prompt has no interval; of the right ones p0's is kept and p1's spoiled.
    assert half.recovery is not None and (half.recovery.value, half.recovery.low) == (1.0, None)
    assert (half.recovery.num_prompts, half.recovery.num_rollouts) == (1, 2)
    assert half.spoiling is not None and half.spoiling.value == 0.5
    assert report.usage == Usage(requests=4, output_tokens=12, cost_usd=2.0)


def test_a_teacher_that_turns_every_verdict_around() -> None:
    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        return says("#4" if request.prefix.startswith("a") else "#3")

    rollouts = [rollout("aaaaaa#3" if i < 3 else "bbbbbb#4", f"p{i}/0") for i in range(10)]
    (point,) = probe(rollouts, LawTeacher(law), fractions=(0.5,)).points
    assert point.recovery is not None and point.spoiling is not None and point.advantage is not None
    # 7 of 10 are recovered, 3 spoiled: 0.7 - 0.3.
    assert (point.recovery.value, point.spoiling.value) == (1.0, 1.0)
    assert point.advantage.value == pytest.approx(0.4)


def test_requests_hold_the_exact_prefix_and_seed_and_siblings_share_the_empty_one() -> None:
    teacher = always("#3")
    probe(GROUPS, teacher, fractions=(0.0, 0.4), num_continuations=3, seed=5)
    asked = {(r.prefix, r.token_ids): r for r in teacher.requests}
    # 0.4 of 8 tokens with text (the end token is none) is token 3; the three p0 share `1+2`, too.
    assert [r.prefix for r in teacher.requests] == ["", "1+2", "", "2+1"]
    request = asked["2+1", tuple(tiny.encode("Q:1+2?2+1"))]
    assert (request.n, request.max_tokens) == (3, 8)
    assert request.seed == request_seed(5, "p1", "2+1")
    assert request.messages == GROUPS[3].prompt.messages


def test_the_same_rollouts_are_the_same_questions_and_the_ledger_answers_them(tmp_path: Path) -> None:
    def once() -> PrefixReport:
        teacher = Ledgered(ScriptedTeacher(tmp_path / "sold"), Ledger(tmp_path / "ledger.sqlite"))
        return probe(GROUPS, teacher)

    first, again = once(), once()
    # Four cuts, of which p0's three rollouts share 0, 2 (`1+`), 4 (`1+2=`) and differ at 6 (`1+2=3;`): 3 + 3, and 4.
    assert len(sold(tmp_path / "sold")) == 10 == first.usage.requests
    assert again.usage == Usage(cached_requests=10)
    assert again.points == first.points


def test_a_cut_never_splits_a_character_and_the_text_is_exact() -> None:
    # Tokens 1 to 3 hold the bytes of one character, 5 has no text of its own, 6 is the end token.
    cut = tiny.rollout_of((9, 10, 11, 12, 13, 14, 1))
    cut = Rollout(**{**_fields(cut), "text": "a\N{SNOWMAN}bc", "char_starts": (0, 1, 1, 1, 2, 3, 4)})
    assert num_text_tokens(cut) == 6
    assert [cut_at(cut, t) for t in range(5)] == [(0, ""), (1, "a"), (1, "a"), (1, "a"), (4, "a\N{SNOWMAN}")]
    assert cut_at(cut, 7) == (6, "a\N{SNOWMAN}bc")
    judged = Rollout(**{**_fields(cut), "prompt": tiny.prompt(), "is_correct": False})
    probe([judged], teacher := always("#3"), fractions=(), positions=(2,))
    (request,) = teacher.requests
    assert (request.prefix, request.token_ids) == ("a", (*tiny.prompt().token_ids, 9))


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def test_absolute_positions_leave_short_rollouts_out() -> None:
    rollouts = [rollout("aaaaaa#3", "p0/0"), rollout("a#4", "p1/0")]
    teacher = always("#3")
    near, at_end, far = probe(rollouts, teacher, fractions=(), positions=(9, 2, 3)).points
    assert (near.label, at_end.label, far.label) == ("2t", "3t", "9t")
    assert (near.num_too_short, at_end.num_too_short, far.num_too_short) == (0, 1, 2)
    # The other one alone: right anyway.
    assert at_end.advantage is not None and (at_end.advantage.value, at_end.advantage.num_rollouts) == (0.0, 1)
    assert far.advantage is None
    assert {r.prefix for r in teacher.requests} == {"aa", "a#", "aaa"}


def test_a_cut_answer_is_verified_and_counted_and_bounds_the_advantage() -> None:
    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        # One right although it was cut, one wrong because of it, one wrong by itself, one right.
        texts = {"1": ("#3", "length"), "2": ("+1", "length"), "3": ("#4", "stop"), "4": ("#3", "stop")}
        text, reason = texts[request.prefix]
        return says(text, finish_reason=reason)

    rollouts = [rollout(f"{i}#4", f"p{i}/0") for i in range(1, 5)]
    report = probe(rollouts, LawTeacher(law), fractions=(0.5,))
    (point,) = report.points
    assert (point.num_answers, point.num_truncated, point.num_truncated_wrong) == (4, 2, 1)
    assert point.advantage is not None and point.advantage.value == 0.5
    assert point.advantage_if_finished == 0.75
    assert report.metrics["prefix/truncated@0.5"] == 0.5
    assert "1 of 4 answers were cut" in "\n".join(advice(report))


def test_answers_that_siblings_share_are_counted_once() -> None:
    (point,) = probe(GROUPS, always("#4", finish_reason="length", is_exact=False), fractions=(0.0,)).points
    # Two prompts, one answer each, for four rollouts.
    assert (point.num_answers, point.num_truncated, point.num_truncated_wrong, point.num_asked_to) == (2, 2, 2, 2)
    assert point.advantage is not None and point.advantage.num_rollouts == 4


def test_missing_answers_are_left_out_on_both_sides_and_counted_once() -> None:
    # p1 is wrong; were its missing answers failures of the teacher, the advantage would differ.
    rollouts = [rollout("1#3"), rollout("2#4", "p1/0"), rollout("2#4", "p1/1"), rollout("3#4", "p2/0")]

    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        if request.prefix == "2":
            return Continuation(text=None, missing=Missing.REFUSED, finish_reason="stop")
        if request.prefix == "3" and rng.random() < 0.5:
            return Continuation(text=None, missing=Missing.TIMEOUT)
        return says("#3")

    report = probe(rollouts, LawTeacher(law), fractions=(0.5,), num_continuations=8)
    (point,) = report.points
    timeouts = point.missing["timeout"]
    assert 0 < timeouts < 8  # luck: 2 / 2^8 of all seeds
    assert point.missing == {"refused": 8, "timeout": timeouts}
    assert (point.num_unanswered, point.num_answers) == (2, 16 - timeouts)
    # p0 right and right, p2 wrong and right: (0 + 1) / 2, of two prompts.
    assert point.advantage is not None
    assert (point.advantage.value, point.advantage.num_prompts) == (0.5, 2)
    assert point.student is not None and point.student.value == 0.5
    assert report.metrics["prefix/missing@0.5"] == (8 + timeouts) / 24
    assert "answers are missing" in "\n".join(advice(report))


def test_without_any_answer_there_is_no_number() -> None:
    gone = LawTeacher(lambda request, rng: Continuation(text=None, missing=Missing.EMPTY))
    report = probe(GROUPS, gone, fractions=(0.0,))
    (point,) = report.points
    assert (point.teacher, point.student, point.advantage, point.advantage_if_finished) == (None,) * 4
    assert report.metrics == {"prefix/missing@0": 1.0}
    assert advice(report)[0].startswith("no advice")
    assert "2 empty" in "\n".join(summary_lines(report))


def test_the_whitespace_that_a_chat_model_loses_at_the_joint_is_the_students() -> None:
    def number(response: str, answer: str) -> bool:
        return response.split()[-1] == answer

    asked = tiny.prompt("p0", answer="42")
    written = "so it is 42"
    one = Rollout(
        id="p0/0",
        prompt=asked,
        group_index=0,
        token_ids=(5,) * 4,
        text=written,
        char_starts=(0, 2, 5, 8),
        finish_reason=FinishReason.STOP,
        policy_version=0,
        is_correct=True,
    )

    def rate(continuation: Continuation) -> float:
        (point,) = probe([one], LawTeacher(lambda r, g: continuation), number, fractions=(0.75,)).points
        assert point.teacher is not None and point.num_asked_to == int(not continuation.is_exact)
        return point.teacher.value

    # `so it is` + `42`: an exact `42` really reads `is42`.
    assert rate(says("42", is_exact=False)) == 1.0
    assert rate(says(" 42", is_exact=False)) == 1.0
    assert rate(says("42")) == 0.0


def test_what_is_not_the_students_or_has_no_verdict_is_skipped() -> None:
    extra = [
        rollout("1#3", is_correct=None),
        rollout("1#3", author=Author.TEACHER),
        rollout("1#3", finish_reason=FinishReason.ABORT),
        tiny.rollout("1#3", of=tiny.prompt(answer=None), is_correct=True),
    ]
    report = probe([*GROUPS, *extra], always("#3"))
    assert (report.num_rollouts, report.num_skipped) == (4, 4)
    assert "4 skipped" in summary_lines(report)[0]
    with pytest.raises(DataError, match=r"none of 4 rollouts can be probed \(0 are"):
        probe(extra, always("#3"))
    with pytest.raises(DataError, match=r"\(1 are"):
        probe([rollout("1#3")], always("#3"), fractions=(), positions=(9,))


def markov_rollouts(num_prompts: int, group_size: int, seed: int) -> list[Rollout]:
    """Draw a student that ends right with 0.2 after each letter, and wrong after ten letters."""
    rng = random.Random(seed)
    return [
        rollout(letters + end, f"p{p}/{g}")
        for p in range(num_prompts)
        for g in range(group_size)
        for letters, end in [_markov("", rng)]
    ]


def _markov(prefix: str, rng: random.Random) -> tuple[str, str]:
    letters = ""
    while len(prefix) + len(letters) < 10:
        letters += rng.choice("ab")
        if rng.random() < 0.2:
            return letters, "#3"
    return letters, "#4"


def test_a_teacher_that_is_the_student_has_no_advantage_at_positions_but_recovers() -> None:
    def student_again(request: ContinuationRequest, rng: random.Random) -> Continuation:
        return says("".join(_markov(request.prefix, rng)))

    # More than 4 letters: P(right) = 1 - 0.8^6 = 0.738 for whoever goes on after the fourth.
    rollouts = [r for r in markov_rollouts(500, 6, seed=2) if r.text.index("#") > 4]
    report = probe(rollouts, LawTeacher(student_again), fractions=(0.5,), positions=(4,), num_continuations=4)
    by_length, at_four = report.points
    assert at_four.advantage is not None and at_four.recovery is not None
    # Worlds of 60 prompts spread by 0.048 around 0, so 500 by 0.017: three deviations.
    assert at_four.advantage.value == pytest.approx(0.0, abs=0.05)
    assert at_four.advantage.low is not None and at_four.advantage.high is not None
    assert at_four.advantage.low < 0 < at_four.advantage.high
    # From the prefixes of its own failures the student would recover just as often: no advantage at all.
    assert at_four.recovery.value == pytest.approx(1 - 0.8**6, abs=0.05)
    # A cut by length looks ahead: the same teacher seems to do worse, as the module's docstring warns.
    assert by_length.advantage is not None and by_length.advantage.high is not None and by_length.advantage.high < 0
    assert "cuts at fractions favor the student" in "\n".join(advice(report))


def test_a_known_rate_by_prefix_length_is_found() -> None:
    # Right with 0.9 at the start and 0.2 less with each letter; the student with 0.5.
    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        return says("#3" if rng.random() < 0.9 - 0.2 * len(request.prefix) else "#4")

    rng = random.Random(7)
    rollouts = [
        rollout("".join(rng.choice("ab") for _ in range(6)) + rng.choice(("#3", "#4")), f"p{i}/{g}")
        for i in range(200)
        for g in range(2)
    ]
    report = probe(rollouts, LawTeacher(law), num_continuations=4)
    for point, letters in zip(report.points, (0, 2, 4, 6), strict=True):
        assert point.teacher is not None and point.advantage is not None
        # Two deviations of 800 answers with 0.5 are 0.035; at the start siblings share 4: 0.05.
        assert point.teacher.value == pytest.approx(max(0.0, 0.9 - 0.2 * letters), abs=0.05)
        assert point.advantage.low is not None and point.advantage.high is not None
        assert point.advantage.low < max(0.0, 0.9 - 0.2 * letters) - 0.5 < point.advantage.high
    told = "\n".join(advice(report))
    assert "ahead up to the prefix 0:" in told and "audit only before 0.25" in told
    assert "worse than the student at 0.5:" in told
    assert report.metrics["prefix/advantage@0.25"] == report.points[1].advantage.value  # type: ignore[union-attr]


def test_intervals_cover_the_truth_as_often_as_they_say_although_siblings_are_alike() -> None:
    # A prompt's rate is uniform in [0, 1]; 8 rollouts of each of 40 prompts are drawn with it. The truth is 0.5.
    rng = np.random.default_rng(3)
    covered = naive = 0
    for world in range(200):
        values = rng.random((40, 8)) < rng.random((40, 1))
        named = [(f"p{p}", float(v)) for p, row in enumerate(values) for v in row]
        mean = mean_over_prompts(named, seed=world)
        assert mean is not None and mean.low is not None and mean.high is not None
        covered += mean.low <= 0.5 <= mean.high
        spread = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / values.size)
        naive += abs(values.mean() - 0.5) <= spread
    # Two deviations of 200 draws with 0.95 are 0.031; a percentile interval of 40 prompts falls a little short.
    assert 0.90 <= covered / 200 <= 0.98
    assert naive / 200 < 0.80  # what counting rollouts as independent would give


def test_copies_of_a_prompts_rollouts_add_no_certainty() -> None:
    once = [(f"p{i}", float(i % 3 == 0)) for i in range(30)]
    one, ten = mean_over_prompts(once), mean_over_prompts(once * 10)
    assert one is not None and ten is not None
    assert (one.value, one.low, one.high) == (ten.value, ten.low, ten.high)
    assert (one.num_rollouts, ten.num_rollouts) == (30, 300)
    assert mean_over_prompts([]) is None


def test_costs_are_known_before_and_bound_what_is_asked() -> None:
    settings = PrefixProbeSettings(num_continuations=3, max_tokens=50)
    cost = prefix_probe_cost(GROUPS, settings, thinking_tokens=10)
    # 10 distinct prefixes, see the ledger's test; 10 * 3 * (50 + 10) tokens.
    assert (cost.num_requests, cost.num_answers, cost.max_output_tokens) == (10, 30, 1800)
    teacher = always("#3")
    asyncio.run(probe_prefixes(GROUPS, teacher, ends_right, settings))
    assert len(teacher.requests) == cost.num_requests
    # 2 prompts with 3 rollouts each: 2 empty prefixes and 3 * 6 others; the empty position is the empty fraction.
    assert largest_prefix_probe_cost(num_prompts=2, group_size=3, settings=settings).num_requests == 20
    both = PrefixProbeSettings(fractions=(0.0,), positions=(0, 4))
    assert largest_prefix_probe_cost(num_prompts=2, group_size=3, settings=both).num_requests == 8


def test_progress_counts_distinct_requests_call_by_call() -> None:
    seen: list[tuple[int, int]] = []
    teacher = always("#3")
    settings = PrefixProbeSettings(requests_per_call=4)
    asyncio.run(
        probe_prefixes(GROUPS, teacher, ends_right, settings, progress=lambda done, total: seen.append((done, total)))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert [len(call) for call in teacher.calls] == [4, 4, 2]
    probe(GROUPS, teacher := always("#3"), requests_per_call=None)
    assert [len(call) for call in teacher.calls] == [10]


def test_a_teacher_that_answers_too_little_is_refused_and_its_errors_pass() -> None:
    class Short(LawTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            return (await super().continuations(requests))[:-1]

    class Spent(LawTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            raise TeacherBudgetError("spent")

    law = always("#3").law
    with pytest.raises(TeacherResponseError, match="gave 9 answers with 9 samples to 10 requests for 10"):
        probe(GROUPS, Short(law))
    with pytest.raises(TeacherBudgetError):
        probe(GROUPS, Spent(law))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"fractions": (0.5, 1.0)}, "fractions has 1; expected"),
        ({"positions": (-1,)}, "positions has -1"),
        ({"fractions": ()}, "neither fractions nor positions"),
        ({"num_continuations": 0}, "num_continuations is 0"),
        ({"requests_per_call": 0}, "requests_per_call is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        PrefixProbeSettings(**settings)


def world(num_prompts: int, student_rate: float, teacher_rates: dict[int, float]) -> PrefixReport:
    """Probe rollouts of four letters, of which a share is right, with a teacher that is right at shares by length."""

    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        return says("#3" if rng.random() < teacher_rates[len(request.prefix)] else "#4")

    rng = random.Random(11)
    rollouts = [
        rollout("".join(rng.choice("ab") for _ in range(4)) + ("#3" if i < student_rate * num_prompts else "#4"), name)
        for i in range(num_prompts)
        for name in [f"p{i}/0"]
    ]
    positions = tuple(teacher_rates)
    return probe(rollouts, LawTeacher(law), fractions=(), positions=positions, num_continuations=4)


@pytest.mark.parametrize(
    ("num_prompts", "student_rate", "teacher_rates", "said", "unsaid"),
    [
        (200, 0.3, {0: 0.9, 2: 0.9}, "ahead as far as was probed", "beyond"),
        (200, 0.5, {0: 0.9, 2: 0.1}, "audit only before 2t, or shorten", "ruled out"),
        (200, 0.5, {0: 0.2, 2: 0.9}, "no advantage is shown at 0t", "beyond"),
        (200, 0.5, {0: 0.3, 2: 0.1}, "cannot teach this student", "cuts at fractions"),
        (24, 0.5, {0: 0.5}, "0.05 is not ruled out; probe more prompts", "cannot teach"),
        (24, 1.0, {0: 1.0}, "right in 100% of its rollouts", "cannot teach"),
        (24, 0.5, {0: 1.0, 2: 0.5}, "not ruled out; more prompts would tell", "cannot teach"),
        (5, 0.0, {0: 1.0}, "only 5 prompts at the least: a hint", "cannot teach"),
    ],
)
def test_the_advice_follows_from_the_numbers(
    num_prompts: int, student_rate: float, teacher_rates: dict[int, float], said: str, unsaid: str
) -> None:
    told = "\n".join(advice(world(num_prompts, student_rate, teacher_rates)))
    assert said in told
    assert unsaid not in told


def test_the_advice_names_what_speaks_against_it() -> None:
    def law(request: ContinuationRequest, rng: random.Random) -> Continuation:
        return says("#3", is_exact=not request.prefix)

    rollouts = [rollout("aaaa#4", f"p{i}/0", finish_reason=FinishReason.LENGTH) for i in range(4)]
    told = "\n".join(advice(probe(rollouts, LawTeacher(law))))
    assert "4 of 4 rollouts hit the student's length limit" in told
    assert "12 of 16 answers come from a chat model that was asked" in told


def test_the_table_says_what_was_measured() -> None:
    lines = summary_lines(world(40, 0.5, {0: 1.0, 9: 1.0}))
    # Right from the start, the student in half: +0.50; from 9 tokens on every rollout is too short.
    first = lines[2].split()
    assert first[:4] == ["0t", "1.00", "0.50", "+0.50"]
    assert first[7:] == ["1.00", "0.00", "40", "160", "0", "-"]
    assert lines[3].split() == ["9t", "-", "-", "-", "-", "-", "0", "0", "0", "40", "too", "short"]
    assert all(line.isascii() for line in lines)


def test_a_report_survives_the_disk() -> None:
    report = probe(GROUPS, always("#3", finish_reason="length"))
    assert PrefixReport.from_json(report.to_json()) == report


def test_one_prompt_has_a_value_and_no_interval() -> None:
    report = probe(GROUPS[:3], always("#3"), fractions=(0.0,))
    assert report.metrics["prefix/advantage@0"] == pytest.approx(2 / 3)
    assert "prefix/advantage_low@0" not in report.metrics
    assert "+0.67 (unknown)" in summary_lines(report)[2]


def test_the_prompt_stands_for_itself() -> None:
    # Two prompts with the same words are two questions: their seeds differ.
    twins = [Prompt(**{**_fields(tiny.prompt()), "id": name}) for name in ("p0", "p1")]
    teacher = always("#3")
    probe([tiny.rollout("1#3", of=twin, is_correct=True) for twin in twins], teacher, fractions=(0.0,))
    assert len({r.seed for r in teacher.requests}) == 2
