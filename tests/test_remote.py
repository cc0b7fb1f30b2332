"""A teacher behind HTTP against a scripted server: what it sends, what it makes of answers, what it pays."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import pytest

from loopback import Loopback, Received, Scripted, chat, completion, error
from omniopd.errors import (
    ConfigError,
    TeacherAuthError,
    TeacherBudgetError,
    TeacherConnectionError,
    TeacherError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.teachers.base import Bound, ContinuationRequest, Reply, TeacherAnswer, Till
from omniopd.teachers.cards import Card, ModelPrice, find_card
from omniopd.teachers.dialects import get_dialect
from omniopd.teachers.limiter import Limiter
from omniopd.teachers.plan import Plan
from omniopd.teachers.remote import RemoteTeacher
from omniopd.types import Message, Missing, Usage

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


def teacher(
    base_url: str, *, card: str | Card = "openai", transport: str = "chat", model: str = "m", **settings: Any
) -> RemoteTeacher:
    whole = find_card(card) if isinstance(card, str) else card
    asked = {
        name: settings.pop(name)
        for name in ("temperature", "top_p", "extra_body", "render", "address")
        if name in settings
    }
    plan = Plan(
        **{
            "teacher_id": "test:m",
            "model": model,
            "base_url": base_url,
            "card": whole.for_model(model),
            "dialect": get_dialect(whole.dialect),
            "transport": transport,
            "render": lambda messages: "|".join(m.content for m in messages) + ">",
            **asked,
        }
    )
    limiter = Limiter(max_in_flight=settings.pop("max_concurrency", 16))
    return RemoteTeacher(plan, **{"api_key": KEY, "limiter": limiter, "price": PRICE, "sleep": Waits(), **settings})


class Book:
    """A till that remembers."""

    def __init__(self, *, orders: int = 1_000) -> None:
        self.left = orders
        self.bounds: list[Bound] = []
        self.bills: list[Usage] = []
        self.samples: list[tuple[int, int]] = []
        self.open = 0

    async def order(self, bound: Bound) -> Book:
        if not self.left:
            raise TeacherBudgetError("the budget is spent")
        self.left -= 1
        self.open += 1
        self.bounds.append(bound)
        return self

    async def settle(self, replies: Sequence[Reply], usage: Usage, seconds: float) -> None:
        self.open -= 1
        self.bills.append(usage)
        self.samples += [(reply.position, reply.sample) for reply in replies]


def run(one: RemoteTeacher, requests: Sequence[ContinuationRequest], till: Till | None = None) -> list[TeacherAnswer]:
    async def go() -> list[TeacherAnswer]:
        try:
            return await one.continuations(requests, till=till)
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
        "stop": ["</partial>"],
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


def test_a_server_that_ignores_n_is_asked_for_the_rest_and_in_time_one_by_one() -> None:
    with Loopback([chat(" one")]) as server:
        one = teacher(server.base_url)
        (first,) = run(one, [ask(n=3, seed=5)])
        assert [r.body.get("n") for r in server.received] == [3, None, None]
        assert len({r.body.get("seed") for r in server.received}) == 3
        for prefix in ("Second", "Third", "Fourth"):
            run(one, [ask(prefix, n=2)])
    assert texts(first) == [" one"] * 3
    assert first.usage.requests == 3
    # One short answer may be a slip; after three in a row nobody asks for several any more.
    assert [r.body.get("n") for r in server.received[3:]] == [2, None, 2, None, None, None]


def test_one_short_answer_does_not_make_a_server_dear() -> None:
    with Loopback([chat(" one"), chat(" two"), chat(" a", " b")]) as server:
        one = teacher(server.base_url)
        for i in range(6):
            run(one, [ask(str(i), n=2)])
    assert len(server.received) == 7


def test_a_server_that_refuses_n_is_asked_one_by_one() -> None:
    def script(received: Received) -> Scripted:
        return error(400, "only one completion choice is allowed") if received.body.get("n") else chat(" 5")

    with Loopback(script) as server:
        one = teacher(server.base_url)
        (first,) = run(one, [ask(n=2)])
        run(one, [ask("Other", n=2)])
    assert texts(first) == [" 5", " 5"]
    assert [r.body.get("n") for r in server.received] == [2, None, None, None, None]
    with Loopback([error(400, "the prompt is too long")]) as server:
        one = teacher(server.base_url)
        (answer,) = run(one, [ask(n=2)])
        run(one, [ask("Other", n=2)])
    assert [c.missing for c in answer.continuations] == [Missing.FAILED] * 2
    # It was not `n`: the next request asks for both again.
    assert [r.body.get("n") for r in server.received] == [2, None, None, 2, None, None]


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
    [({"retry-after": "1"}, 1.0), ({"retry-after-ms": "600", "retry-after": "7"}, 0.6)],
)
def test_a_busy_server_is_waited_for_as_long_as_it_says(headers: dict[str, str], wait: float) -> None:
    waits = Waits()
    with Loopback([error(429, "slow down", headers=headers), chat("5")]) as server:
        (answer,) = run(teacher(server.base_url, sleep=waits), [ask()])
    assert waits.seconds == [wait]
    assert len(server.received) == 2
    assert texts(answer) == ["5"]
    assert answer.usage.requests == 2


def test_a_server_that_asks_for_ten_minutes_stops_the_run() -> None:
    waits = Waits()
    with Loopback([error(429, "slow down", headers={"retry-after": "600"})]) as server:
        one = teacher(server.base_url, sleep=waits, max_concurrency=1)
        with pytest.raises(TeacherRateLimitError, match="asks to wait 600 s"):
            run(one, [ask(str(i)) for i in range(5)])
        assert (waits.seconds, len(server.received)) == ([], 1)


def test_nobody_waits_for_a_turn_after_a_hard_stop() -> None:
    with Loopback([error(401, "no")]) as server:
        one = teacher(server.base_url, limiter=Limiter(max_in_flight=8, requests_per_minute=60))
        start = time.monotonic()
        with pytest.raises(TeacherAuthError):
            run(one, [ask(str(i)) for i in range(40)])
    # Ten may start at once and the others one a second: it would take half a minute.
    assert time.monotonic() - start < 10.0


def test_room_for_thinking_grows_once_for_all_that_is_under_way() -> None:
    def script(received: Received) -> Scripted:
        if received.body["max_completion_tokens"] < 200:
            details = {"reasoning_tokens": 8}
            return chat("", finish_reason="length", usage=(10, 8), completion_tokens_details=details)
        return chat(" 5")

    with Loopback(script) as server:
        answers = run(teacher(server.base_url), [ask(str(i)) for i in range(12)])
    assert [texts(answer) for answer in answers] == [[" 5"]] * 12
    assert {r.body["max_completion_tokens"] for r in server.received} == {8, 276}


def test_a_short_key_is_not_looked_for_in_answers() -> None:
    with Loopback([chat(" none of them")]) as server:
        (answer,) = run(teacher(server.base_url, api_key="none"), [ask()])
    assert texts(answer) == [" none of them"]


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
        assert "closed the connection" in answer.continuations[0].detail


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
    assert "connection refused" in answer.continuations[0].detail


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
    slow = Scripted(body=chat("5").body, delay_s=0.05)
    with Loopback([slow]) as server:
        run(teacher(server.base_url, max_concurrency=3), [ask(str(i)) for i in range(9)])
    assert server.most_in_flight == 3


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
    # Two servers of this machine are two teachers, but one that a run starts itself may come back on another port.
    assert teacher("http://127.0.0.1:1/v1").fingerprint != teacher("http://127.0.0.1:2/v1").fingerprint
    served = [teacher(f"http://127.0.0.1:{port}/v1", address="served:abc").fingerprint for port in (1, 2)]
    assert served[0] == served[1]


def test_each_attempt_is_ordered_first_and_settled_once() -> None:
    book = Book()
    with Loopback([error(500, "boom"), Scripted(drop=True), chat(" 5", " 6")]) as server:
        (answer,) = run(teacher(server.base_url), [ask(n=2)], book)
    assert texts(answer) == [" 5", " 6"]
    assert (len(server.received), len(book.bounds), book.open) == (3, 3, 0)
    assert [(bill.requests, bill.unanswered_requests, bill.cost_usd) for bill in book.bills] == [
        (1, 0, 0.0),
        (1, 1, 0.0),
        (1, 0, pytest.approx(0.00006)),
    ]
    assert book.samples == [(0, 0), (0, 1)]
    assert answer.usage == sum(book.bills, Usage())
    sent = server.received[0].body
    written = sum(len(m["content"]) + 8 for m in sent["messages"]) + 256
    assert book.bounds[0] == Bound(tokens=written + 2 * 8, usd=pytest.approx((written * 2.0 + 2 * 8 * 8.0) / 1e6))


def test_a_spent_budget_stops_the_call_after_what_is_under_way_is_written_down() -> None:
    book = Book(orders=2)
    with Loopback([chat(" 5")]) as server:
        one = teacher(server.base_url, max_concurrency=2)
        with pytest.raises(TeacherBudgetError, match="spent"):
            run(one, [ask(str(i)) for i in range(6)], book)
    assert len(server.received) == 2
    assert (len(book.samples), book.open) == (2, 0)


def test_an_interrupted_request_may_have_been_billed() -> None:
    book = Book()

    async def go(url: str) -> None:
        one = teacher(url)
        job = asyncio.create_task(one.continuations([ask()], till=book))
        while not book.bounds:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await one.aclose()

    with Loopback([Scripted(body=chat(" 5").body, delay_s=0.5)]) as server:
        asyncio.run(go(server.base_url))
    assert [bill.unanswered_requests for bill in book.bills] == [1]


def test_a_model_that_thinks_too_long_is_given_room_once() -> None:
    thought = chat("", finish_reason="length", usage=(10, 8), completion_tokens_details={"reasoning_tokens": 8})
    book = Book()
    with Loopback([thought, chat(" 5"), chat(" 6")]) as server:
        one = teacher(server.base_url)
        (first,) = run(one, [ask()], book)
        (second,) = run(one, [ask("Other")], book)
    # 8 thought tokens and half as much again, and 256: 8 + 12 + 256.
    assert [r.body["max_completion_tokens"] for r in server.received] == [8, 276, 276]
    assert (texts(first), texts(second)) == ([" 5"], [" 6"])
    assert (first.usage.requests, first.usage.reasoning_tokens) == (2, 8)
    with Loopback([thought]) as server:
        (answer,) = run(teacher(server.base_url), [ask()], book)
    assert len(server.received) == 2
    assert answer.continuations[0].missing is Missing.EMPTY
    assert "thinking" in answer.continuations[0].detail


def test_the_longest_prefix_of_an_answer_goes_first_where_the_provider_caches_heads() -> None:
    whole = find_card("openai")
    cached = whole.model_copy(
        update={"prompt_cache": whole.prompt_cache.model_copy(update={"mode": "automatic", "min_tokens": 8})}
    )
    prefixes = ["One two three", "One two three four five six", "Another answer, unrelated", "One two three four five"]
    slow = Scripted(body=chat(" x").body, delay_s=0.05)
    with Loopback([slow]) as server:
        run(teacher(server.base_url, card=cached), [ask(prefix) for prefix in prefixes])
    sent = [next(p for p in sorted(prefixes, key=len, reverse=True) if p in str(r.body)) for r in server.received]
    assert sent.index(prefixes[1]) < min(sent.index(prefixes[0]), sent.index(prefixes[3]))
    # The longest one and the unrelated one, then the two shorter ones.
    assert server.most_in_flight <= 3
    with Loopback([Scripted(body=chat(" x").body, delay_s=0.8)]) as server:
        run(teacher(server.base_url), [ask(prefix) for prefix in prefixes])
        assert server.most_in_flight == 4


def test_token_ids_are_sent_as_they_are() -> None:
    import dataclasses

    with Loopback([completion(" 5")]) as server:
        one = teacher(server.base_url, card="vllm", transport="tokens")
        request = dataclasses.replace(ask("The sum "), token_ids=(5, 6, 7))
        (answer,) = run(one, [request])
    assert server.received[0].body["prompt"] == [5, 6, 7]
    assert one.reads_token_ids
    # Nothing was held back, so nothing is taken off.
    assert texts(answer) == [" 5"]


def test_no_usage_in_an_answer_counts_as_perhaps_billed() -> None:
    body = {name: value for name, value in chat(" 5").body.items() if name != "usage"}
    with Loopback([Scripted(body=body)]) as server:
        (answer,) = run(teacher(server.base_url), [ask()])
    assert texts(answer) == [" 5"]
    assert answer.usage.unanswered_requests == 1


def test_a_refused_request_costs_nothing_even_where_the_price_is_unknown() -> None:
    with Loopback([error(429, "slow"), chat(" 5", cost=0.25)]) as server:
        (answer,) = run(teacher(server.base_url, price=None), [ask()])
    assert answer.usage == Usage(requests=2, input_tokens=10, output_tokens=5, cost_usd=0.25)


def test_samples_of_a_larger_request_keep_their_seeds() -> None:
    import dataclasses

    card = find_card("ollama").model_copy(update={"dialect": "openai"})
    with Loopback([chat(" 5")]) as server:
        one = teacher(server.base_url, card=card, transport="chat")
        run(one, [ask(n=4, seed=7)])
        whole = {r.body["seed"] for r in server.received}
        run(one, [dataclasses.replace(ask(n=2, seed=7), sample_numbers=(1, 3))])
    assert len(whole) == 4
    assert {r.body["seed"] for r in server.received[4:]} < whole - {7}


def test_seeds_fit_into_31_bits() -> None:
    with Loopback([chat(" 5")]) as server:
        run(teacher(server.base_url), [ask(seed=2**46 + 5)])
    assert server.received[0].body["seed"] == 5


@pytest.mark.parametrize(
    "body", [{"generationConfig": {"candidateCount": 8}}, {"best_of": 20}, {"options": {"seed": 1}}]
)
def test_what_would_raise_the_bill_behind_the_budget_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has a setting of its own"):
        teacher("https://h/v1", extra_body=body)
