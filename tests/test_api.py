from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

import omniopd.api
from omniopd.api import ChunkRewarder, ChunkRewards, as_reward_func
from omniopd.errors import ConfigError, TeacherAuthError, TeacherConnectionError, TeacherResponseError
from omniopd.responses import as_messages
from omniopd.teachers.asked_once import AskedOnce
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.resolve import open_teacher
from omniopd.teachers.shaping import SHAPING_OPTIONS
from omniopd.types import Continuation, Message, Missing, Usage


class ScriptedTeacher:
    """Answers by a function of the prefix; remembers what it was asked, and on which loop."""

    id = "scripted:test"

    def __init__(self, answer: Callable[[str], str | Missing]) -> None:
        self.answer = answer
        self.requests: list[ContinuationRequest] = []
        self.loops: set[int] = set()
        self.closed = 0

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        await asyncio.sleep(0)
        self.loops.add(id(asyncio.get_running_loop()))
        self.requests += requests
        return [self._one(request) for request in requests]

    def _one(self, request: ContinuationRequest) -> TeacherAnswer:
        got = self.answer(request.prefix)
        one = Continuation(text=None, missing=got) if isinstance(got, Missing) else Continuation(text=got)
        return TeacherAnswer(continuations=(one,) * request.n, usage=Usage(requests=1, output_tokens=10))

    async def aclose(self) -> None:
        self.closed += 1


def _follows(text: str) -> ScriptedTeacher:
    """A teacher that would have written exactly this text."""
    return ScriptedTeacher(lambda prefix: text[len(prefix) :] or " end")


def test_a_response_is_tiled_and_each_chunk_scored_against_its_own_prefix() -> None:
    teacher = _follows("one two three four five")
    with ChunkRewarder(teacher=teacher, chunk_words=2, num_continuations=3, seed=7) as rewarder:
        (rewards,) = rewarder.score(["Count."], ["one two three FOUR five"])
    assert [(c.start, c.end, c.text) for c in rewards.chunks] == [
        (0, 7, "one two"),
        (7, 18, " three FOUR"),
        (18, 23, " five"),
    ]
    # Without the leading space "three FOUR" and "three four" are 10 characters, 4 differ.
    assert [c.score for c in rewards.chunks] == pytest.approx([1.0, 0.6, 1.0])
    assert rewards.reward == pytest.approx(2.6 / 3)
    assert rewards.chunks[1].continuations == (" three four five",) * 3
    assert [r.prefix for r in teacher.requests] == ["", "one two", "one two three FOUR"]
    assert {(r.n, r.seed, r.max_tokens) for r in teacher.requests} == {(3, 7, 8)}
    assert teacher.requests[0].messages == (Message(role="user", content="Count."),)
    assert teacher.closed == 0  # it is not ours


def test_missing_evidence_is_none_with_a_reason_and_leaves_the_mean() -> None:
    teacher = ScriptedTeacher(lambda prefix: Missing.REFUSED if prefix else "one two")
    with ChunkRewarder(teacher=teacher, chunk_words=2) as rewarder:
        full, empty, refused = rewarder.score(["q"] * 3, ["one two three", " \n", "x"])
        assert [(c.score, c.missing, c.num_continuations) for c in full.chunks] == [
            (1.0, None, 4),
            (None, Missing.REFUSED, 0),
        ]
        assert full.reward == 1.0
        assert (empty.chunks, empty.reward) == ((), None)
        assert refused.reward == 0.0  # "o" against "x"
        teacher.answer = lambda prefix: Missing.TIMEOUT
        (nothing,) = rewarder.score(["q"], ["one"])
    assert (nothing.reward, nothing.chunks[0].missing) == (None, Missing.TIMEOUT)
    assert "0 of 4" in nothing.chunks[0].detail


def test_shared_prefixes_are_asked_and_billed_once() -> None:
    teacher = _follows("a b c d")
    with ChunkRewarder(teacher=teacher, chunk_words=2) as rewarder:
        first, second, other = rewarder.score(["q", "q", "other"], ["a b c d", "a x c d", "a b"])
    # ("q", ""), ("q", "a b"), ("q", "a x"), ("other", "")
    assert len(teacher.requests) == 4
    assert [r.usage.requests for r in (first, second, other)] == [2, 1, 1]
    assert second.chunks[0].score == pytest.approx(2 / 3)


def test_entropies_choose_the_words_where_chunks_start() -> None:
    teacher = _follows("a b c d e f")
    with ChunkRewarder(teacher=teacher, chunk_words=2, max_chunks=2) as rewarder:
        (rewards,) = rewarder.score(["q"], ["a b c d e f"], entropies=[[5, 1, 2, 9, 8, 7]])
        # 9 at "d" takes "d e"; 8 and 7 overlap or run out; 5 at "a" takes "a b".
        assert [c.text for c in rewards.chunks] == ["a b", " d e"]
        with pytest.raises(ConfigError, match="response 1: 2 entropies for a text of 3 words"):
            rewarder.score(["q", "q"], ["a", "a b c"], entropies=[[1], [1, 2]])
        with pytest.raises(ConfigError, match="1 lists of entropies for 2 responses"):
            rewarder.score(["q", "q"], ["a", "b"], entropies=[[1]])
    with ChunkRewarder(teacher=teacher, chunk_words=2) as rewarder:
        (rewards,) = rewarder.score(["q"], ["a b c d e f"], entropies=[[5, 1, 2, 9, 8, 7]])
    assert [c.text for c in rewards.chunks] == ["a b", " d e"]  # all that fit


def test_max_chunks_without_entropies_spreads_over_the_response() -> None:
    teacher = _follows("")
    with ChunkRewarder(teacher=teacher, chunk_words=1, max_chunks=2) as rewarder:
        (rewards,) = rewarder.score(["q"], ["a b c d e f"])
    # Six words in two shares of three: the middle ones.
    assert [c.text for c in rewards.chunks] == [" b", " e"]


def test_alpha_shrinks_towards_the_prior() -> None:
    with ChunkRewarder(teacher=_follows("a"), num_continuations=3, alpha=1.0, prior=0.2) as rewarder:
        (rewards,) = rewarder.score(["q"], ["a"])
    assert rewards.chunks[0].score == pytest.approx((3 + 0.2) / 4)


def test_chat_prompts_and_own_similarity_and_max_tokens() -> None:
    teacher = _follows("a b")
    turns: list[dict[str, str] | Message] = [{"role": "system", "content": "s"}, Message(role="user", content="u")]
    rewarder = ChunkRewarder(
        teacher=teacher,
        similarity=lambda a, b: 0.25,
        max_tokens=5,
        min_continuations=4,
    )
    with rewarder:
        (rewards,) = rewarder.score([turns], ["a b"])
    assert teacher.requests[0].messages == (Message(role="system", content="s"), Message(role="user", content="u"))
    assert teacher.requests[0].max_tokens == 5
    assert rewards.reward == 0.25


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        (["a", "b"], ["c"], "2 prompts for 1 responses"),
        ("a", ["c"], "prompts is a text"),
        (["a"], "c", "responses is a text"),
        ([[]], ["c"], "not empty"),
        ([3], ["c"], "expected text or a list"),
        ([[{"role": "user"}]], ["c"], "a message is"),
        ([[{"role": "user", "content": [{"type": "text"}]}]], ["c"], "a message is"),
        ([["hello"]], ["c"], "a message is 'hello'"),
        (["a"], [None], "response 0 is NoneType"),
    ],
)
def test_bad_input_is_refused_before_the_teacher_is_asked(prompts: Any, responses: Any, message: str) -> None:
    teacher = _follows("x")
    rewarder = ChunkRewarder(teacher=teacher)
    with rewarder, pytest.raises(ConfigError, match=message):
        rewarder.score(prompts, responses)
    assert teacher.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_words": 0}, "chunk_words is 0"),
        ({"num_continuations": 1.5}, r"num_continuations is 1\.5"),
        ({"max_chunks": -1}, "max_chunks is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"similarity": "edt"}, "did you mean 'edit'"),
        ({"min_continuations": 5}, "5 of num_continuations 4"),
        ({"alpha": -1.0}, "alpha is -1"),
        ({"prior": 2.0}, "prior is 2"),
        ({"teacher": object()}, "expected a spec"),
        ({"teacher_options": {"temperature": 0.5}}, "belong to a teacher spec"),
    ],
)
def test_settings_are_checked_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChunkRewarder(**{"teacher": _follows("x"), **options})


def test_score_works_inside_a_running_loop_and_keeps_one_loop_for_the_teacher() -> None:
    teacher = _follows("a")
    rewarder = ChunkRewarder(teacher=teacher)

    async def notebook() -> list[ChunkRewards]:
        return rewarder.score(["q"], ["a"])

    with rewarder:
        assert asyncio.run(notebook())[0].reward == 1.0
        assert rewarder.score(["q"], ["a"])[0].reward == 1.0
    # Connections of a real teacher belong to a loop, so a second one would break them.
    assert len(teacher.loops) == 1
    assert not any(thread.name == "omniopd-teacher" for thread in threading.enumerate())
    rewarder.close()  # again is fine


def test_ascore_awaits_a_teacher_object_on_the_callers_loop() -> None:
    teacher = _follows("a")
    rewarder = ChunkRewarder(teacher=teacher)

    async def both() -> tuple[list[ChunkRewards], list[ChunkRewards], int]:
        first, second = await asyncio.gather(rewarder.ascore(["q"], ["a"]), rewarder.ascore(["q"], ["b"]))
        return first, second, id(asyncio.get_running_loop())

    first, second, loop = asyncio.run(both())
    assert (first[0].reward, second[0].reward) == (1.0, 0.0)
    assert teacher.loops == {loop}


def _patched_resolve(monkeypatch: pytest.MonkeyPatch, teacher: ScriptedTeacher) -> list[tuple[str, dict[str, Any]]]:
    opened: list[tuple[str, dict[str, Any]]] = []

    class Resolve:
        @staticmethod
        def open_teacher(spec: str, **options: Any) -> ScriptedTeacher:
            opened.append((spec, options))
            return teacher

    monkeypatch.setitem(sys.modules, "omniopd.teachers.resolve", Resolve)
    return opened


def test_a_spec_is_opened_once_when_needed_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = _follows("a")
    opened = _patched_resolve(monkeypatch, teacher)
    rewarder = ChunkRewarder(teacher="openai:some-model", teacher_options={"temperature": 0.7})

    async def in_a_loop() -> list[ChunkRewards]:
        return await rewarder.ascore(["q"], ["a"])

    with rewarder:
        assert rewarder.score(["q"], [""])[0].reward is None
        assert opened == []  # nothing to ask
        assert rewarder.score(["q"], ["a"])[0].reward == 1.0
        assert asyncio.run(in_a_loop())[0].reward == 1.0
    assert opened == [("openai:some-model", {"temperature": 0.7})]
    assert len(teacher.loops) == 1
    assert teacher.closed == 1


def test_errors_of_the_teacher_reach_the_caller() -> None:
    def refuse(prefix: str) -> str:
        raise TeacherAuthError("the key is refused")

    with ChunkRewarder(teacher=ScriptedTeacher(refuse)) as rewarder, pytest.raises(TeacherAuthError):
        rewarder.score(["q"], ["a"])

    class Short(ScriptedTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            return []

    with ChunkRewarder(teacher=Short(str)) as rewarder, pytest.raises(TeacherResponseError, match="0 answers to 1"):
        rewarder.score(["q"], ["a"])


def test_many_responses_are_under_way_at_a_time_and_not_all() -> None:
    class Slow(ScriptedTeacher):
        running = peak = 0

        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            Slow.running += 1
            Slow.peak = max(Slow.peak, Slow.running)
            await asyncio.sleep(0.01)
            Slow.running -= 1
            return await super().continuations(requests)

    with ChunkRewarder(teacher=Slow(lambda prefix: "a")) as rewarder:
        rewards = rewarder.score([f"q{i}" for i in range(200)], ["a"] * 200)
    assert [r.reward for r in rewards] == [1.0] * 200
    assert Slow.peak == 4 * 16


def test_a_shared_request_is_asked_once_however_far_apart() -> None:
    class Waiting(ScriptedTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            await asyncio.sleep(0.02)
            return await super().continuations(requests)

    teacher = Waiting(lambda prefix: "a")
    prompts = [f"q{i % 100}" for i in range(200)]
    with ChunkRewarder(teacher=teacher) as rewarder:
        rewards = rewarder.score(prompts, ["a"] * 200)
    # 64 are under way at a time, so both those of the same moment and those of an earlier one are met.
    assert len(teacher.requests) == 100
    assert [r.usage.requests for r in rewards] == [1] * 100 + [0] * 100
    assert all(r.reward == 1.0 for r in rewards)


def test_who_waits_for_a_request_that_fails_fails_with_it() -> None:
    def refuse(prefix: str) -> str:
        raise TeacherAuthError("the key is refused")

    async def run() -> list[BaseException | list[TeacherAnswer]]:
        teacher = ScriptedTeacher(refuse)
        request = ContinuationRequest(messages=(Message(role="user", content="q"),), prefix="", n=1, max_tokens=5)
        asked = AskedOnce(teacher, [request] * 3)
        results = await asyncio.gather(*(asked.answers([request]) for _ in range(3)), return_exceptions=True)
        assert len(teacher.requests) == 1
        return results

    assert all(isinstance(result, TeacherAuthError) for result in asyncio.run(run()))


def test_stream_gives_what_is_ready_in_order_and_then_the_error() -> None:
    class Failing(ScriptedTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            number = int(requests[0].messages[0].content)
            await asyncio.sleep(0.002 * (5 - number))  # the later, the sooner
            if number == 3:
                raise TeacherConnectionError("gone")
            return await super().continuations(requests)

    told: list[tuple[str, int, int]] = []
    seen: list[float | None] = []
    with ChunkRewarder(teacher=Failing(lambda prefix: "b")) as rewarder, pytest.raises(TeacherConnectionError):
        for group in rewarder.stream(list("01234"), list("abbbb"), tell=lambda *counts: told.append(counts)):
            seen += [rewards.reward for rewards in group]
    assert seen == [0.0, 1.0, 1.0]
    assert sorted(told) == [("responses", i, 5) for i in range(1, 5)]


def test_leaving_a_stream_early_cancels_the_rest() -> None:
    class Endless(ScriptedTeacher):
        cancelled = 0

        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            if requests[0].messages[0].content != "0":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    Endless.cancelled += 1
                    raise
            return await super().continuations(requests)

    with ChunkRewarder(teacher=Endless(lambda prefix: "a")) as rewarder:
        groups = rewarder.stream(["0", "1", "2"], ["a"] * 3)
        assert len(next(groups)) == 1
        groups.close()
    assert Endless.cancelled == 2


def test_a_batch_gets_everything_in_one_call_and_reports_its_own_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Batch(ScriptedTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            calls.append(len(requests))
            opened[0][1]["progress"](3, 150)
            return await super().continuations(requests)

    opened = _patched_resolve(monkeypatch, Batch(lambda prefix: "a"))
    told: list[tuple[str, int, int]] = []
    prompts = [f"q{i % 150}" for i in range(300)]
    with ChunkRewarder(teacher="openai:m", teacher_options={"batch": True}) as rewarder:
        stream = rewarder.stream(prompts, ["a"] * 300, tell=lambda *counts: told.append(counts))
        rewards = [r for group in stream for r in group]
    assert calls == [150]
    assert told[0] == ("answers of the batch", 3, 150)
    assert told[-1] == ("responses", 300, 300)
    assert sum(r.usage.requests for r in rewards) == 150


def test_settings_name_what_shapes_a_score_and_nothing_else() -> None:
    def settings(spec: str, **options: Any) -> dict[str, Any]:
        return ChunkRewarder(teacher=spec, teacher_options=options).settings

    plain = settings("local:m@http://127.0.0.1:8000/v1")
    assert plain["teacher"] == "local:m@http://127.0.0.1/v1"
    assert plain == settings("local:m@http://127.0.0.1:9/v1", ledger="x", budget_usd=1, max_concurrency=4, batch=True)
    assert plain == settings("local:m@http://127.0.0.1:9/v1", temperature=1.0, continuation="auto")
    assert plain != settings("local:m@http://127.0.0.1:8000/v1", temperature=None)
    assert settings("vllm:m@https://host:8000/v1")["teacher"] == "vllm:m@https://host:8000/v1"
    assert settings("local:m@http://[::1]:80/v1")["teacher"] == "local:m@http://[::1]/v1"


def test_every_option_of_open_teacher_is_known_to_shape_or_not_to() -> None:
    parameters = inspect.signature(open_teacher).parameters
    speed = {"max_concurrency", "requests_per_minute", "tokens_per_minute", "timeout_s", "deadline_s", "max_attempts"}
    money = {"budget_usd", "budget_tokens", "budget_calls", "price", "ledger", "batch", "progress"}
    records = {"address", "remembers"}
    assert set(parameters) - {"spec"} == set(SHAPING_OPTIONS) | speed | money | records
    assert {name: parameters[name].default for name in SHAPING_OPTIONS} == dict(SHAPING_OPTIONS)
    assert parameters["max_concurrency"].default == omniopd.api._DEFAULT_CONCURRENCY


def test_detail_tells_repairs_and_failures_with_their_counts() -> None:
    class Mixed(ScriptedTeacher):
        def _one(self, request: ContinuationRequest) -> TeacherAnswer:
            echo = Continuation(text="a", detail="echo of the prefix cut")
            lost = Continuation(text=None, missing=Missing.FAILED, detail="HTTP 500 (5 attempts)")
            return TeacherAnswer(continuations=(echo, echo, Continuation(text="a"), lost))

    with ChunkRewarder(teacher=Mixed(str)) as rewarder:
        (rewards,) = rewarder.score(["q"], ["a"])
    assert rewards.chunks[0].detail == "2 x echo of the prefix cut; HTTP 500 (5 attempts)"
    assert (rewards.reward, rewards.chunks[0].num_continuations) == (1.0, 3)


def test_progress_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with omniopd.api.progress_display(show=True, done_before=4) as tell:
        tell("answers of the batch", 1, 2)
        tell("responses", 1, 6)
    drawn = capsys.readouterr().err
    assert "answers of the batch" in drawn
    assert "responses" in drawn
    assert "50%" in drawn  # 4 before and 1 of 6 now


def test_reward_function_takes_text_and_conversations_and_extra_columns() -> None:
    rewarder = ChunkRewarder(teacher=_follows("a b"))
    reward = as_reward_func(rewarder, name="agreement")
    with rewarder:
        chat = [[{"role": "assistant", "content": "a b"}]]
        assert reward(prompts=["q"], completions=["a b"], answer=["4"]) == [1.0]
        assert reward([[{"role": "user", "content": "q"}]], chat, completion_ids=[[1]]) == [1.0]
        assert reward(["q"], [""]) == [None]
        with pytest.raises(ConfigError, match="completion 0 has 2 messages"):
            reward(["q"], [chat[0] * 2])
    assert reward.__name__ == "agreement"
    with pytest.raises(ConfigError, match="give it chunk_words itself"):
        as_reward_func(rewarder, chunk_words=3)


def test_reward_function_builds_its_rewarder(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _patched_resolve(monkeypatch, _follows("a b"))
    reward = as_reward_func("openai:some-model", chunk_words=1)
    assert reward(["q"], ["a b"]) == [1.0]
    assert opened == [("openai:some-model", {})]


def test_rewards_survive_json() -> None:
    with ChunkRewarder(teacher=_follows("a b c"), chunk_words=2) as rewarder:
        (rewards,) = rewarder.score(["q"], ["a b c"])
    assert ChunkRewards.from_json(rewards.to_json()) == rewards


def test_as_messages_keeps_order() -> None:
    turns: list[Mapping[str, str]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [m.content for m in as_messages(turns)] == ["a", "b"]


def test_the_facade_needs_no_heavy_package() -> None:
    code = (
        "import sys, omniopd.api, omniopd.score_file, omniopd.chunking, omniopd.scoring.chunk_score;"
        "omniopd.api.ChunkRewarder(teacher='openai:gpt-4o', similarity='0.5*numbers + 0.5*embedding');"
        "heavy = {'torch', 'transformers', 'openai', 'sentence_transformers', 'rich', 'rapidfuzz'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_score_needs_no_torch() -> None:
    code = """
import sys
from omniopd.api import ChunkRewarder
from omniopd.teachers.base import TeacherAnswer
from omniopd.types import Continuation

class Echo:
    id = "own:echo"
    async def continuations(self, requests):
        return [TeacherAnswer(continuations=(Continuation(text="a b"),) * r.n) for r in requests]
    async def aclose(self): ...

with ChunkRewarder(teacher=Echo(), similarity="0.5*edit + 0.5*numbers") as rewarder:
    assert rewarder.score(["q"], ["a b"])[0].reward == 1.0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
