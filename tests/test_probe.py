"""The probe against teachers whose habits are known."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from omniopd.errors import TeacherAuthError, TeacherResponseError
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.probe import (
    OPEN_QUESTION,
    QUESTIONS,
    ProbeCache,
    ProbeResult,
    WayProbe,
    choose,
    describe_probe,
    probe_teacher,
    summarize_probe,
    warnings_of,
)
from omniopd.teachers.repair import Repair
from omniopd.types import Continuation, Missing, Usage

DAY = datetime.date(2026, 11, 22)
KNOWN = {question.prefix: question.known for question in QUESTIONS}


A_CENT = Usage(requests=1, input_tokens=20, output_tokens=8, cost_usd=0.01)


class Habits:
    """A teacher that writes what it is told to, `usage` for each request."""

    def __init__(
        self,
        write: Callable[[ContinuationRequest, int], Continuation],
        *,
        usage: Usage = A_CENT,
    ) -> None:
        self.id = "test:m"
        self.write = write
        self.usage = usage
        self.asked: list[ContinuationRequest] = []
        self.is_closed = False

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        self.asked += requests
        return [
            TeacherAnswer(
                continuations=tuple(self.write(request, i) for i in range(request.n)), usage=self.usage, seconds=0.5
            )
            for request in requests
        ]

    async def aclose(self) -> None:
        self.is_closed = True


def good(request: ContinuationRequest, sample: int) -> Continuation:
    known = KNOWN.get(request.prefix)
    return Continuation(text=known + " and so on" if known else f" he sells {sample} rolls", finish_reason="stop")


def probe(teachers: dict[str, object], *, is_thorough: bool = False, asks_for_n: bool = True) -> ProbeResult:
    def open_as(way: str) -> Habits:
        teacher = teachers[way]
        if isinstance(teacher, Exception):
            raise teacher
        assert isinstance(teacher, Habits)
        return teacher

    ways = tuple(teachers)
    return asyncio.run(
        probe_teacher(
            open_as,  # type: ignore[arg-type]
            ways,  # type: ignore[arg-type]
            teacher_id="test:m",
            asks_for_n=asks_for_n,
            is_thorough=is_thorough,
            day=DAY,
        )
    )


def test_a_good_teacher_is_measured_and_the_first_way_is_enough() -> None:
    first, second = Habits(good), Habits(good)
    result = probe({"completions": first, "chat": second})
    assert (result.chosen, len(result.ways), second.asked) == ("completions", 1, [])
    assert first.is_closed
    (way,) = result.ways
    # Three questions with two samples each, and four samples of the open one.
    assert (way.asked, way.usable, way.exact_joints, way.echoes, way.distinct) == (10, 10, 1.0, 0.0, 4)
    assert way.honors_n is True
    assert way.seconds == 0.5
    # Four requests of a cent each, for ten usable continuations.
    assert way.usd_per_usable == pytest.approx(0.004)
    # " he sells 0 rolls" and " he sells 1 rolls" differ in one of 17 characters: 1 - 1/17, for each pair.
    assert way.self_agreement == pytest.approx(16 / 17, abs=1e-6)
    assert warnings_of(result) == []
    assert {request.seed for request in first.asked} == {DAY.toordinal()}


def test_a_thorough_probe_tries_every_way() -> None:
    result = probe({"completions": Habits(good), "chat": Habits(good)}, is_thorough=True)
    assert [way.transport for way in result.ways] == ["completions", "chat"]
    assert result.chosen == "completions"


def test_a_way_that_is_refused_is_a_result_and_the_next_one_is_taken() -> None:
    def rejected(request: ContinuationRequest, sample: int) -> Continuation:
        return Continuation(text=None, missing=Missing.FAILED, detail="HTTP 400: no prefill")

    class Gone(Habits):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            raise TeacherResponseError("no such endpoint")

    result = probe({"completions": Gone(good), "prefill": Habits(rejected), "chat": Habits(good)})
    assert result.chosen == "chat"
    assert result.ways[0].error == "no such endpoint"
    assert result.ways[1].missing == ("10 x failed: HTTP 400: no prefill",)
    told = describe_probe(result)
    assert "completions: cannot be used: no such endpoint" in told
    assert "-> chat: 10 of 10 continuations usable" in told
    assert result.usage.requests == 8


def test_an_echoing_teacher_without_variety_is_warned_about() -> None:
    def echo(request: ContinuationRequest, sample: int) -> Continuation:
        text = KNOWN.get(request.prefix) or " the same"
        return Continuation(text=text, finish_reason="stop", detail=str(Repair.ECHO))

    usage = Usage(requests=4, input_tokens=20, output_tokens=400, reasoning_tokens=390)
    result = probe({"chat": Habits(echo, usage=usage)})
    (way,) = result.ways
    assert (way.echoes, way.distinct, way.honors_n, way.usd_per_usable) == (1.0, 1, False, None)
    assert way.repairs == (f"10 x {Repair.ECHO}",)
    # 4 requests of 390 thinking tokens for 10 samples.
    assert way.thinking_tokens == pytest.approx(156.0)
    warned = " ".join(warnings_of(result))
    assert "all samples are equal" in warned and "`n` is ignored" in warned and "hidden thinking" in warned
    assert probe({"chat": Habits(echo, usage=usage)}, asks_for_n=False).ways[0].honors_n is None


def test_a_small_model_that_knows_nothing_keeps_the_preferred_way() -> None:
    def babble(request: ContinuationRequest, sample: int) -> Continuation:
        return Continuation(text=f" blah {sample}", finish_reason="length")

    # A raw prompt goes on exactly by construction; a template may not.
    result = probe({"completions": Habits(babble), "prefill": Habits(babble)})
    assert (result.chosen, len(result.ways), warnings_of(result)) == ("completions", 1, [])
    result = probe({"prefill": Habits(babble), "chat": Habits(babble)})
    assert (result.chosen, len(result.ways)) == ("prefill", 2)
    assert "few continuations go on exactly" in warnings_of(result)[0]
    assert summarize_probe(result).splitlines() == [
        "teacher test:m is asked by prefill: 10 of 10 continuations usable, agreement with itself 0.86, "
        "0.50 s a request",
        f"  warning: {warnings_of(result)[0]}",
    ]


def test_what_stops_every_request_stops_the_probe() -> None:
    with pytest.raises(TeacherAuthError):
        probe({"chat": TeacherAuthError("no key")})


def test_no_usable_way_is_said() -> None:
    def nothing(request: ContinuationRequest, sample: int) -> Continuation:
        return Continuation(text=None, missing=Missing.EMPTY)

    result = probe({"chat": Habits(nothing)})
    assert (result.chosen, result.best) == (None, None)
    assert warnings_of(result) == ["no way gave a usable continuation"]
    assert "exact joint unknown" in describe_probe(result)


def test_usable_beats_exact() -> None:
    rarely = WayProbe(transport="prefill", asked=10, usable=2, exact_joints=1.0)
    often = WayProbe(transport="chat", asked=10, usable=9, exact_joints=0.2)
    assert choose([rarely, often]) is often
    assert choose([WayProbe(transport="chat", asked=10)]) is None


def test_results_are_kept_for_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, result = ProbeCache(), probe({"chat": Habits(good)})
    assert cache.find(["test:m"], DAY) is None
    cache.add(["test:m"], result)
    assert cache.find(["test:m"], DAY) == result
    assert cache.find(["test:other"], DAY) is None
    assert cache.find(["test:m"], DAY + datetime.timedelta(days=1)) is None
    (file,) = (tmp_path / "omniopd" / "probes").iterdir()
    file.write_text("{torn")
    assert cache.find(["test:m"], DAY) is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    ProbeCache(blocked / "below").add(["x"], result)


def test_the_open_question_has_no_single_answer() -> None:
    assert OPEN_QUESTION.known is None
    assert all(not question.prefix[-1].isspace() for question in (*QUESTIONS, OPEN_QUESTION))
