"""The OpenAI-compatible teacher against a scripted server: what it sends, what it makes of answers, what it costs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback import Loopback, Received, Scripted, chat, completion, error
from omniopd.errors import (
    TeacherAuthError,
    TeacherConnectionError,
    TeacherError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.cards import Card, ModelPrice, find_card
from omniopd.teachers.continuation import clean_continuation, continuation_messages, sent_prefix
from omniopd.teachers.openai_compatible import OpenAITeacher
from omniopd.teachers.retry import redact, server_wait_s
from omniopd.types import Continuation, Message, Missing, Usage

KEY = "sk-test-0123456789abcdef"
PRICE = ModelPrice(input_usd_per_mtok=2.0, output_usd_per_mtok=8.0)
TASK = (Message(role="user", content="What is 2+3?"),)


def ask(prefix: str = "The sum", *, n: int = 1, seed: int | None = None, max_tokens: int = 8) -> ContinuationRequest:
    return ContinuationRequest(messages=TASK, prefix=prefix, n=n, max_tokens=max_tokens, seed=seed)


class Waits:
    """A clock that does not wait."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def teacher(base_url: str, *, card: str | Card = "openai", transport: str = "chat", **settings: Any) -> OpenAITeacher:
    return OpenAITeacher(
        **{
            "id": "test:m",
            "model": "m",
            "base_url": base_url,
            "api_key": KEY,
            "card": find_card(card) if isinstance(card, str) else card,
            "transport": transport,
            "render": lambda messages: "|".join(m.content for m in messages) + ">",
            "price": PRICE,
            "sleep": Waits(),
            **settings,
        }
    )


def run(one: OpenAITeacher, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
    async def go() -> list[TeacherAnswer]:
        try:
            return await one.continuations(requests)
        finally:
            await one.aclose()
            await one.aclose()

    return asyncio.run(go())


def texts(answer: TeacherAnswer) -> list[str | None]:
    return [c.text for c in answer.continuations]


def test_chat_quotes_the_partial_answer_and_sends_every_setting() -> None:
    with Loopback([chat(" is 5", " is five")]) as server:
        one = teacher(server.base_url, temperature=0.7, top_p=0.9, extra_body={"reasoning_effort": "none"})
        (answer,) = run(one, [ask(n=2, seed=11)])
    (sent,) = server.received
    assert sent.path == "/v1/chat/completions"
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert {k: v for k, v in sent.body.items() if k != "messages"} == {
        "model": "m",
        "temperature": 0.7,
        "top_p": 0.9,
        "n": 2,
        "seed": 11,
        "max_completion_tokens": 8,
        "reasoning_effort": "none",
    }
    assert [m["role"] for m in sent.body["messages"]] == ["system", "user"]
    assert "What is 2+3?\n\n<partial>The sum</partial>" in sent.body["messages"][1]["content"]
    assert texts(answer) == [" is 5", " is five"]
    # 10 * 2 / 1e6 + 5 * 8 / 1e6 = 0.00002 + 0.00004
    assert answer.usage == Usage(requests=1, input_tokens=10, output_tokens=5, cost_usd=pytest.approx(0.00006))


def test_prefill_marks_the_open_message_as_the_card_says() -> None:
    with Loopback([chat("is 5")]) as server:
        run(teacher(server.base_url, card="deepseek", transport="prefill"), [ask("The sum \n"), ask("")])
    sent = {len(r.body["messages"]): r.body for r in server.received}
    assert sent[2]["messages"][1] == {"role": "assistant", "content": "The sum", "prefix": True}
    assert sent[2]["thinking"] == {"type": "disabled"}
    assert sent[1]["messages"] == [{"role": "user", "content": "What is 2+3?"}]
    with Loopback([chat("is 5")]) as server:
        run(teacher(server.base_url, card="vllm", transport="prefill"), [ask(), ask("")])
    flags = {len(r.body["messages"]): r.body.get("continue_final_message") for r in server.received}
    assert flags == {2: True, 1: None}


def test_raw_prompts_share_a_request_and_keep_their_own_seeds() -> None:
    def script(received: Received) -> Scripted:
        prompts = received.body["prompt"]
        return completion(*(f"{p}{i}" for p in prompts for i in range(2)), usage=(30, 12))

    with Loopback(script) as server:
        one = teacher(server.base_url, card="local", transport="completions", api_key=None)
        answers = run(one, [ask("a ", n=2, seed=1), ask("b", n=2, seed=2), ask("a ", n=2, seed=1)])
    (sent,) = server.received
    assert sent.path == "/v1/completions"
    assert sent.body["prompt"] == ["What is 2+3?>a", "What is 2+3?>b"]
    assert sent.body["seeds"] == [1, 2]
    assert sent.body["max_tokens"] == 8
    assert [texts(a) for a in answers] == [
        ["What is 2+3?>a0", "What is 2+3?>a1"],
        ["What is 2+3?>b0", "What is 2+3?>b1"],
        ["What is 2+3?>a0", "What is 2+3?>a1"],
    ]
    assert [a.usage.requests for a in answers] == [1, 0, 0]
    assert sum((a.usage for a in answers), Usage()).input_tokens == 30


def test_prompts_are_packed_by_settings_up_to_the_cards_limit() -> None:
    card = find_card("vllm").model_copy(update={"can": find_card("vllm").can.model_copy(update={"batch_prompts": 2})})

    def script(received: Received) -> Scripted:
        prompts = received.body["prompt"]
        return completion(*(["x"] * (1 if isinstance(prompts, str) else len(prompts))))

    with Loopback(script) as server:
        run(
            teacher(server.base_url, card=card, transport="completions"),
            [ask("a", seed=1), ask("b", seed=2), ask("c", seed=1), ask("d", seed=1), ask("e", seed=1, max_tokens=9)],
        )
    sent = [(r.body["seed"], r.body["max_tokens"], str(r.body["prompt"]).count(">")) for r in server.received]
    assert sorted(sent) == [(1, 8, 1), (1, 8, 2), (1, 9, 1), (2, 8, 1)]


def test_one_prompt_that_is_too_long_does_not_take_the_others_with_it() -> None:
    def script(received: Received) -> Scripted:
        prompt = received.body["prompt"]
        return error(400, "context is full") if "long" in str(prompt) else completion("ok")

    with Loopback(script) as server:
        one = teacher(server.base_url, card="local", transport="completions")
        answers = run(one, [ask("a"), ask("long")])
    assert len(server.received) == 3
    assert texts(answers[0]) == ["ok"]
    assert answers[1].continuations[0].missing is Missing.FAILED
    assert "HTTP 400: context is full" in answers[1].continuations[0].detail


def test_a_server_that_ignores_n_is_asked_for_the_rest() -> None:
    with Loopback([chat(" one")]) as server:
        one = teacher(server.base_url)
        (first,) = run(one, [ask(n=3, seed=5)])
        assert len(server.received) == 3
        (second,) = run(one, [ask("Other", n=2)])
    assert texts(first) == [" one"] * 3
    assert first.usage.requests == 3
    assert [r.body.get("n") for r in server.received] == [3, None, None, None, None]
    assert len({r.body.get("seed") for r in server.received[:3]}) == 3
    assert texts(second) == [" one"] * 2


def test_too_many_and_too_few_choices() -> None:
    with Loopback([chat(" 1", " 2", " 3")]) as server:
        (answer,) = run(teacher(server.base_url), [ask(n=2)])
        assert texts(answer) == [" 1", " 2"]
    with Loopback([chat()]) as server:
        (answer,) = run(teacher(server.base_url), [ask(n=2)])
        assert [c.missing for c in answer.continuations] == [Missing.FAILED] * 2
        assert len(server.received) == 3
    with Loopback([completion("a", "b", "c"), completion("z")]) as server:
        one = teacher(server.base_url, card="local", transport="completions")
        answers = run(one, [ask("a"), ask("b")])
        assert [texts(a) for a in answers] == [["z"], ["z"]]
        assert len(server.received) == 3


def test_a_teacher_without_n_is_asked_once_for_each_sample() -> None:
    with Loopback([chat("5")]) as server:
        run(teacher(server.base_url, card="openrouter"), [ask(n=3, seed=1)])
    assert len(server.received) == 3
    assert all("n" not in r.body and "seed" not in r.body for r in server.received)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [({"retry-after": "7"}, 7.0), ({"retry-after-ms": "90000", "retry-after": "7"}, 90.0)],
)
def test_a_busy_server_is_waited_for_as_long_as_it_says(headers: dict[str, str], wait: float) -> None:
    waits = Waits()
    with Loopback([error(429, "slow down", headers=headers), chat("5")]) as server:
        (answer,) = run(teacher(server.base_url, sleep=waits), [ask()])
    assert waits.seconds == [wait]
    assert len(server.received) == 2
    assert texts(answer) == ["5"]
    assert answer.usage.requests == 2


def test_a_server_that_asks_for_ten_minutes_is_not_waited_for() -> None:
    waits = Waits()
    with Loopback([error(429, "slow down", headers={"retry-after": "600"})]) as server:
        (answer,) = run(teacher(server.base_url, sleep=waits), [ask()])
    assert (waits.seconds, len(server.received)) == ([], 1)
    assert answer.continuations[0].missing is Missing.FAILED


def test_failures_after_all_attempts_are_missing_samples_with_a_reason() -> None:
    waits = Waits()
    with Loopback([error(500, f"boom for {KEY}")]) as server:
        (answer,) = run(teacher(server.base_url, max_attempts=4, sleep=waits), [ask(n=2)])
    assert len(server.received) == 4
    # Full jitter below 0.5, 1 and 2 seconds.
    assert len(waits.seconds) == 3
    assert all(0 <= s <= 0.5 * 2**k for k, s in enumerate(waits.seconds))
    assert [c.missing for c in answer.continuations] == [Missing.FAILED] * 2
    assert answer.continuations[0].detail == "HTTP 500: boom for [key] (4 attempts)"
    assert answer.usage == Usage(requests=4, cost_usd=0.0)


def test_timeouts_and_broken_connections() -> None:
    with Loopback([Scripted(delay_s=0.3)]) as server:
        (answer,) = run(teacher(server.base_url, timeout_s=0.1, max_attempts=2), [ask()])
        assert answer.continuations[0].missing is Missing.TIMEOUT
        assert len(server.received) == 2
    with Loopback([Scripted(drop=True), chat("5")]) as server:
        (answer,) = run(teacher(server.base_url), [ask()])
        assert texts(answer) == ["5"]
    with Loopback([Scripted(drop=True)]) as server:
        (answer,) = run(teacher(server.base_url, max_attempts=2), [ask()])
        assert answer.continuations[0].missing is Missing.FAILED
        assert "broke" in answer.continuations[0].detail


@pytest.mark.parametrize("raw", [b"{oops", b'{"choices": null}'])
def test_nonsense_with_status_200_is_asked_again_once(raw: bytes) -> None:
    with Loopback([Scripted(raw=raw)]) as server:
        (answer,) = run(teacher(server.base_url), [ask()])
    assert len(server.received) == 2
    assert answer.continuations[0].missing is Missing.FAILED


def free_port_url() -> str:
    with Loopback([chat("x")]) as server:
        return server.base_url


def test_an_unreachable_server_says_how_to_start_one() -> None:
    url = free_port_url()
    with pytest.raises(TeacherConnectionError, match="omniopd serve MODEL_DIR") as caught:
        run(teacher(url, card="local", transport="prefill", max_attempts=2), [ask()])
    assert url in str(caught.value)
    assert "after 2 attempts" in str(caught.value)


def test_a_server_that_goes_away_later_costs_samples_and_not_the_run() -> None:
    server = Loopback([chat("5")])
    with server:
        one = teacher(server.base_url, max_attempts=2)
        assert texts(run(one, [ask()])[0]) == ["5"]
    (answer,) = run(one, [ask("Other")])
    assert answer.continuations[0].missing is Missing.FAILED
    assert "no connection" in answer.continuations[0].detail


@pytest.mark.parametrize(
    ("scripted", "kind", "words"),
    [
        (error(401, f"bad key {KEY}", code="invalid_api_key"), TeacherAuthError, "check the key in OPENAI_API_KEY"),
        (error(403, "not yours"), TeacherAuthError, "HTTP 403: not yours"),
        (error(429, "broke", code="insufficient_quota"), TeacherRateLimitError, "add credit"),
        (error(402, "pay"), TeacherRateLimitError, "HTTP 402"),
        (error(404, "no model"), TeacherResponseError, "has no model 'm'"),
    ],
)
def test_what_no_request_would_survive_stops_at_once(scripted: Scripted, kind: type[TeacherError], words: str) -> None:
    with Loopback([scripted]) as server:
        one = teacher(server.base_url, max_concurrency=1)
        with pytest.raises(kind, match=words) as caught:
            run(one, [ask(str(i)) for i in range(5)])
    assert len(server.received) == 1
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_redirect_is_not_followed() -> None:
    with (
        Loopback([chat("stolen")]) as other,
        Loopback([Scripted(status=307, headers={"location": other.base_url})]) as server,
    ):
        (answer,) = run(teacher(server.base_url), [ask()])
    assert not other.received
    assert "HTTP 307" in answer.continuations[0].detail


def test_no_more_requests_are_under_way_than_allowed() -> None:
    scripted = chat("5")
    slow = Scripted(body=scripted.body, delay_s=0.05)
    with Loopback([slow]) as server:
        run(teacher(server.base_url, max_concurrency=3), [ask(str(i)) for i in range(9)])
    assert server.most_in_flight == 3
    limited = find_card("openai").model_copy(
        update={"limits": find_card("openai").limits.model_copy(update={"max_in_flight": 1})}
    )
    with Loopback([slow]) as server:
        run(teacher(server.base_url, card=limited, max_concurrency=3), [ask(str(i)) for i in range(3)])
    assert server.most_in_flight == 1


def test_a_reported_cost_beats_the_price_and_no_price_is_unknown() -> None:
    with Loopback([chat("5", cost=0.25)]) as server:
        (answer,) = run(teacher(server.base_url, price=None), [ask()])
        assert answer.usage.cost_usd == 0.25
    with Loopback([chat("5")]) as server:
        (answer,) = run(teacher(server.base_url, price=None), [ask()])
        assert answer.usage.cost_usd is None


def test_the_key_is_in_no_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Loopback([error(500, f"echo of {KEY} and sk-other-abcdefghijk and Bearer xyz")]) as server:
        one = teacher(server.base_url, max_attempts=2)
        (answer,) = run(one, [ask()])
    shown = repr(one) + repr(answer) + str(one.fingerprint) + caplog.text
    assert KEY not in shown
    assert "[key] and [key] and [key]" in answer.continuations[0].detail


def test_what_shapes_answers_is_in_the_fingerprint() -> None:
    base = teacher("https://h/v1")
    assert base.fingerprint == teacher("https://h/v1", max_attempts=1, timeout_s=1.0).fingerprint
    others = [
        teacher("https://g/v1"),
        teacher("https://h/v1", temperature=0.5),
        teacher("https://h/v1", extra_body={"min_p": 0.1}),
        teacher("https://h/v1", transport="completions"),
        teacher("https://h/v1", transport="completions", render=lambda m: "other template"),
    ]
    seen = [str(one.fingerprint) for one in (base, *others)]
    assert len(set(seen)) == len(seen)
    assert teacher("http://127.0.0.1:1/v1").fingerprint == teacher("http://127.0.0.1:2/v1").fingerprint


def test_waits_are_read_from_headers() -> None:
    assert server_wait_s({"retry-after-ms": "1500"}) == 1.5
    assert server_wait_s({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=lambda: 40.0) == 60.0
    assert server_wait_s({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, now=lambda: 40.0) == 0.0
    assert server_wait_s({"retry-after": "soon"}) is None
    assert server_wait_s({"retry-after": "inf"}) is None
    assert server_wait_s({}) is None


def test_redaction_keeps_the_rest() -> None:
    assert redact("Incorrect key: sk-abc***wxyz.", None) == "Incorrect key: [key]"
    assert redact("a plain   message\nwith lines", "secret") == "a plain message with lines"


def clean(prefix: str, text: str, transport: str = "chat", **settings: Any) -> Continuation:
    return clean_continuation(prefix, text, transport=transport, **{"finish_reason": "length", **settings})


LONG = "First add the two numbers, which"


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        ("2 + 3 =", "2 + 3 = 5", " 5"),
        (LONG, "two numbers, which gives 5", " gives 5"),
        (LONG, " gives 5", " gives 5"),
        (LONG, "which gives", "which gives"),
        (LONG, "```\n gives 5\n```", " gives 5"),
        (LONG, f"```text\n{LONG} gives 5\n```", " gives 5"),
        (LONG, '" gives 5"', " gives 5"),
        (LONG, "gives 5</partial>", "gives 5"),
        (LONG, f"<partial>{LONG} gives 5</partial>", " gives 5"),
        (LONG + ' "so', ' called" sum "5"', ' called" sum "5"'),
        ("Answer: ", " 5", "5"),
        ("Answer: ", "5", "5"),
        ("Answer:", "5", "5"),
        ("```python\n", "```\nx\n```", "```\nx\n```"),
    ],
)
def test_chat_replies_are_repaired(prefix: str, text: str, expected: str) -> None:
    assert clean(prefix, text).text == expected


def test_repairs_are_named() -> None:
    assert clean(LONG, f"```\n{LONG} gives\n```").detail == "code fence taken off; echo of the prefix cut"
    assert clean(LONG, "two numbers, which gives 5").detail == "echo of the last 18 characters cut"
    assert clean(LONG, " gives 5").detail == ""


@pytest.mark.parametrize(
    ("prefix", "text", "settings", "reason"),
    [
        (LONG, "", {}, Missing.EMPTY),
        (LONG, " \n", {"finish_reason": "stop"}, Missing.EMPTY),
        (LONG, "", {"transport": "completions"}, Missing.EMPTY),
        ("", "", {"transport": "completions", "finish_reason": "stop"}, Missing.EMPTY),
        (LONG, "no", {"refusal": "I cannot help"}, Missing.REFUSED),
        (LONG, "x", {"finish_reason": "content_filter"}, Missing.REFUSED),
        (LONG, "\0\0\0a", {}, Missing.GARBAGE),
        (LONG, "\N{REPLACEMENT CHARACTER}" * 3, {"transport": "completions"}, Missing.GARBAGE),
        (LONG, LONG, {}, Missing.GARBAGE),
        (LONG, LONG[:12], {}, Missing.GARBAGE),
        (LONG, LONG[:12], {"transport": "prefill", "echoes_prefix": True}, Missing.GARBAGE),
    ],
)
def test_unusable_replies_say_why(prefix: str, text: str, settings: dict[str, Any], reason: Missing) -> None:
    cleaned = clean(prefix, text, **settings)
    assert cleaned.missing is reason
    assert cleaned.detail


def test_a_teacher_that_stops_at_once_says_that_the_answer_is_complete() -> None:
    for transport in ("completions", "prefill"):
        cleaned = clean(LONG, "", transport, finish_reason="stop")
        assert (cleaned.text, cleaned.missing) == ("", None)
        assert cleaned.detail == "the teacher ended the answer here"
    assert clean(LONG, LONG, "prefill", echoes_prefix=True, finish_reason="stop").text == ""


# Short alphabets make repetitions, overlaps and whitespace at the joint frequent.
TEXTS = st.text(alphabet='ab \n`"', max_size=40)


@given(text=TEXTS, at=st.integers(0, 40), transport=st.sampled_from(["completions", "prefill"]))
def test_raw_transports_give_back_the_rest_of_any_text(text: str, at: int, transport: str) -> None:
    prefix, rest = text[:at], text[at:]
    answer = text[len(sent_prefix(prefix)) :]
    expected = None if not rest and not prefix else rest
    assert clean(prefix, answer, transport, finish_reason="stop").text == expected


@given(text=TEXTS, at=st.integers(0, 40), transport=st.sampled_from(["chat", "prefill"]))
def test_echoed_answers_give_back_the_rest_of_any_text(text: str, at: int, transport: str) -> None:
    prefix, rest = text[:at], text[at:]
    if not prefix.strip() or not rest.strip():
        return
    assert clean(prefix, text, transport, echoes_prefix=True).text == rest


def test_the_instruction_keeps_its_head_while_the_answer_grows() -> None:
    system = (Message(role="system", content="Be brief."), *TASK)
    short = continuation_messages(system, "The sum", max_tokens=8)
    long = continuation_messages(system, "The sum is found ", max_tokens=8)
    assert short[0] == long[0]
    assert "Be brief." in short[0].content
    head = "What is 2+3?\n\n<partial>The sum"
    assert short[1].content.startswith(head) and long[1].content.startswith(head)
    assert "does not end in whitespace" in short[1].content
    assert "It ends in whitespace" in long[1].content
    assert continuation_messages(TASK, " ", max_tokens=8) == TASK


def test_only_a_chat_model_that_was_asked_to_go_on_is_not_exact() -> None:
    assert clean("2+2=", "4", "completions").is_exact
    assert clean("2+2=", "4", "prefill").is_exact
    assert not clean("2+2=", "4", "chat").is_exact
    # Without a prefix it was asked for its own answer, and the end of that is the end.
    assert clean("", "4", "chat").is_exact
