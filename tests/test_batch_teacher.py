from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batch_server import Answer, BatchServer
from omniopd.errors import (
    ConfigError,
    RunError,
    TeacherAuthError,
    TeacherBudgetError,
    TeacherCapabilityError,
    TeacherConnectionError,
    TeacherRateLimitError,
    TeacherResponseError,
    TeacherTimeoutError,
)
from omniopd.teachers import batch_waiting
from omniopd.teachers.base import Bound, ContinuationRequest, RecordedTeacher, Reply, TeacherAnswer
from omniopd.teachers.batch import BatchTeacher, Planner, discounted
from omniopd.teachers.batch_endpoints import AnthropicBatches, OpenAIBatches
from omniopd.teachers.cards import Capabilities, Card, DialectName, ModelPrice, Transport
from omniopd.teachers.dialects.base import Ask, Choice, HttpCall, Parsed
from omniopd.types import Continuation, Message, Missing, Usage

KEY = "sk-planted-0123456789abcdef"
PRICE = ModelPrice(input_usd_per_mtok=2.0, output_usd_per_mtok=10.0)
DIALECTS: list[DialectName] = ["openai", "anthropic"]


@dataclass
class Words:
    """One wording for both endpoints: a prefix goes out, `texts` come back."""

    name: DialectName

    def headers(self, card: Card, api_key: str | None) -> dict[str, str]:
        if self.name == "openai":
            return {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        return {"x-api-key": str(api_key), "content-type": "application/json"}

    def call(self, ask: Ask, card: Card) -> HttpCall:
        path = "/chat/completions" if self.name == "openai" else "/messages"
        return HttpCall(path=path, body={"model": ask.model, "prefix": ask.prefix, "n": ask.n, "seeds": ask.seeds})

    def read(self, answer: Any, ask: Ask) -> Parsed:
        if "texts" not in answer:
            raise ValueError("no texts")
        choices = tuple(Choice(index=i, text=text, finish_reason="stop") for i, text in enumerate(answer["texts"]))
        tokens = answer.get("tokens")
        usage = None if tokens is None else Usage(requests=1, input_tokens=tokens[0], output_tokens=tokens[1])
        return Parsed(choices=choices, usage=usage)


@dataclass
class Plan:
    """As the real one: several samples in a request where the server takes `n`, else one each."""

    dialect: Words
    base_url: str
    card: Card
    teacher_id: str = "fake:model"
    transport: Transport = "chat"
    temperature: float = 1.0

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"teacher": self.teacher_id, "temperature": self.temperature}

    def asks(self, request: ContinuationRequest) -> list[tuple[Ask, tuple[int, ...]]]:
        size = request.n if self.card.can.n else 1
        parts = [tuple(range(i, min(i + size, request.n))) for i in range(0, request.n, size)]
        return [(self._ask(request, part), part) for part in parts]

    def _ask(self, request: ContinuationRequest, part: tuple[int, ...]) -> Ask:
        return Ask(
            model="model",
            transport="chat",
            n=len(part),
            max_tokens=request.max_tokens,
            messages=request.messages,
            prefix=request.prefix,
            seeds=part[:1],
        )

    def call(self, ask: Ask) -> HttpCall:
        return self.dialect.call(ask, self.card)

    def bound(self, ask: Ask, price: ModelPrice | None) -> Bound:
        usd = None if price is None else price.cost_usd(100, ask.n * ask.max_tokens)
        return Bound(tokens=100 + ask.n * ask.max_tokens, usd=usd)

    def replies(
        self, position: int, request: ContinuationRequest, samples: tuple[int, ...], parsed: Parsed
    ) -> list[Reply]:
        return [
            Reply(position=position, sample=i, raw=c.text, continuation=Continuation(text=c.text, finish_reason="stop"))
            for i, c in zip(samples, parsed.choices, strict=False)
        ]


@dataclass
class Entry:
    """One order of the till."""

    till: Purse
    bound: Bound
    settled: list[tuple[Sequence[Reply], Usage]] = field(default_factory=list)

    async def settle(self, replies: Sequence[Reply], usage: Usage, seconds: float) -> None:
        await asyncio.sleep(0)
        if replies and self.till.full_disk:
            raise RunError("disk full")
        assert not self.settled, "settled twice"
        self.settled.append((tuple(replies), usage))


@dataclass
class Purse:
    """A till with so many dollars."""

    usd: float = 100.0
    full_disk: bool = False
    entries: list[Entry] = field(default_factory=list)

    async def order(self, bound: Bound) -> Entry:
        await asyncio.sleep(0)
        reserved = sum(entry.bound.usd or 0.0 for entry in self.entries if not entry.settled)
        if reserved + (bound.usd or 0.0) > self.usd:
            raise TeacherBudgetError("the budget is spent")
        self.entries.append(Entry(self, bound))
        return self.entries[-1]

    @property
    def samples(self) -> list[tuple[int, int, str]]:
        return sorted((r.position, r.sample, r.raw) for e in self.entries for got, _ in e.settled for r in got)

    @property
    def bill(self) -> Usage:
        return sum((usage for entry in self.entries for _, usage in entry.settled), Usage())


class Died(BaseException):
    """The process ends here."""


class Clock:
    """Sleeps that take no time; the process can die in one of them."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.slept: list[float] = []
        self.dies_at = dies_at

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) == self.dies_at:
            raise Died


def says(*, tokens: tuple[int, int] | None = (100, 50)) -> Answer:
    """A server that writes where it goes on from, and which sample it is."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        first = body["seeds"][0]
        texts = [f" after {body['prefix']} #{first + i}" for i in range(body["n"])]
        return {"body": {"texts": texts, **({"tokens": tokens} if tokens else {})}}

    return answer


def ask(prefix: str, *, n: int = 2, **fields: Any) -> ContinuationRequest:
    question = (Message(role="user", content="q"),)
    return ContinuationRequest(messages=question, prefix=prefix, n=n, max_tokens=20, **fields)


def plan(server: BatchServer, dialect: DialectName = "openai", **fields: Any) -> Plan:
    can = Capabilities(batch_api=True, n=dialect == "openai")
    card = Card(id="fake", dialect=dialect, can=can)
    return Plan(Words(dialect), server.base_url, card, **fields)


def run(
    how: Plan, tmp_path: Path, requests: Sequence[ContinuationRequest], *, till: Purse | None = None, **options: Any
) -> list[TeacherAnswer]:
    """Ask in a new teacher, as a new process would."""
    options = {"price": PRICE, "sleep": Clock(), **options}

    async def call() -> list[TeacherAnswer]:
        teacher = BatchTeacher(how, api_key=KEY, ledger=tmp_path / "ledger.sqlite", **options)
        try:
            return await teacher.continuations(requests, till=till)
        finally:
            await teacher.aclose()

    return asyncio.run(call())


def texts(answers: Sequence[TeacherAnswer]) -> list[list[str | None]]:
    return [[c.text for c in answer.continuations] for answer in answers]


def journal(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite.batches.jsonl"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_answers_come_in_order_with_half_the_bill_and_are_settled_first(tmp_path: Path, dialect: DialectName) -> None:
    till, seen = Purse(), list[tuple[int, int]]()
    with BatchServer(says(), polls=3) as server:
        how = plan(server, dialect)
        requests = [ask("a"), ask("b", n=3), ask("a", n=1)]
        answers = run(how, tmp_path, requests, till=till, progress=lambda *counts: seen.append(counts))
        assert len(server.batches) == 1
        assert server.keys == {f"Bearer {KEY}" if dialect == "openai" else KEY}
        ids = [custom_id for custom_id, _ in server.batches["batch_0"].requests]
    assert texts(answers) == [[" after a #0", " after a #1"], [f" after b #{i}" for i in range(3)], [" after a #0"]]
    assert till.samples == [(0, 0, " after a #0"), (0, 1, " after a #1")] + [(1, i, f" after b #{i}") for i in range(3)]
    # OpenAI takes n: 2 HTTP requests; Anthropic: 2 + 3. The third request shares the first one's samples.
    sent = 2 if dialect == "openai" else 5
    assert len(set(ids)) == sent and all(len(custom_id) <= 64 for custom_id in ids)
    # Each 100 tokens in, 50 out: (100 * 2 + 50 * 10) / 1e6 = 0.0007, half of it.
    assert till.bill == Usage(
        requests=sent, input_tokens=100 * sent, output_tokens=50 * sent, cost_usd=pytest.approx(0.00035 * sent)
    )
    assert [answer.usage.requests for answer in answers] == ([1, 1, 0] if dialect == "openai" else [2, 3, 0])
    assert sum(answer.usage.cost_usd or 0.0 for answer in answers) == pytest.approx(till.bill.cost_usd)
    # Bounds at half price, too: OpenAI's second request has 100 in and 60 out, (200 + 600) / 2e6; Anthropic's have
    # 100 in and 20 out each, (200 + 200) / 2e6.
    assert till.entries[1].bound.usd == pytest.approx(0.0004 if dialect == "openai" else 0.0002)
    assert seen[-1] == (sent, sent) and len(seen) == 4


def test_polls_grow_to_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    with BatchServer(says(), polls=8) as server:
        run(plan(server), tmp_path, [ask("a")], sleep=clock)
    # 5 * 1.5**k: 5, 7.5, 11.25, 16.875, 25.3125, 37.96875, 56.953125, then 60.
    assert clock.slept == [5.0, 7.5, 11.25, 16.875, 25.3125, 37.96875, 56.953125, 60.0]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_process_that_dies_while_waiting_goes_on_with_the_same_batch(tmp_path: Path, dialect: DialectName) -> None:
    first, second = Purse(), Purse()
    with BatchServer(says(), polls=4) as server:
        how = plan(server, dialect)
        with pytest.raises(Died):
            run(how, tmp_path, [ask("a"), ask("b")], till=first, sleep=Clock(dies_at=2))
        # What was ordered is given back without a bill.
        assert (
            first.samples == [] and first.bill == Usage(cost_usd=0.0) and all(entry.settled for entry in first.entries)
        )
        answers = run(how, tmp_path, [ask("b"), ask("c"), ask("a")], till=second)
        bought = sorted(body["prefix"] for body in server.bodies)
    assert texts(answers) == [[f" after {p} #0", f" after {p} #1"] for p in "bca"]
    assert bought == (["a", "b", "c"] if dialect == "openai" else ["a", "a", "b", "b", "c", "c"])
    assert second.bill.requests == len(bought)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_submit_whose_answer_was_lost_is_adopted(tmp_path: Path, dialect: DialectName) -> None:
    with BatchServer(says(), polls=2) as server:
        how = plan(server, dialect)
        for age in range(3):  # Other people's batches, more than a page.
            server.add([(f"other-{age}", {"prefix": "x", "n": 1, "seeds": [0]})] * (1 if dialect == "openai" else 2))
        submit = "POST /batches" if dialect == "openai" else "POST /messages/batches"
        server.faults = [(submit, "lose")]
        with pytest.raises(Died):
            run(how, tmp_path, [ask("a")], sleep=Clock(dies_at=1))
        server.add([("later", {"prefix": "x", "n": 1, "seeds": [0]})] * (1 if dialect == "openai" else 2))
        assert "submitted" not in journal(tmp_path).read_text()
        assert texts(run(how, tmp_path, [ask("a")])) == [[" after a #0", " after a #1"]]
        assert server.asked.count(submit) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_in_one_process_a_lost_submit_is_looked_for_before_it_is_repeated(tmp_path: Path, dialect: DialectName) -> None:
    submit = "POST /batches" if dialect == "openai" else "POST /messages/batches"
    with BatchServer(says(), polls=0) as server:
        how = plan(server, dialect)
        server.faults = [(submit, "lose")]
        run(how, tmp_path, [ask("a")])
        assert server.asked.count(submit) == 1
        server.faults = [(submit, "drop"), (submit, 503), (submit, 429)]
        run(how, tmp_path, [ask("b")])
        assert server.asked.count(submit) == 1 + 4 and len(server.batches) == 2


def test_anthropic_waits_for_a_running_batch_that_may_be_its_own(tmp_path: Path) -> None:
    with BatchServer(says(), polls=2) as server:
        server.faults = [("POST /messages/batches", "lose")]
        clock = Clock()
        answers = run(plan(server, "anthropic"), tmp_path, [ask("a")], sleep=clock)
        assert texts(answers) == [[" after a #0", " after a #1"]] and len(server.batches) == 1
        # After the lost submit one pause; then two more until the batch has ended.
        assert clock.slept == [5.0, 5.0, 7.5]


def test_an_intent_that_the_server_never_saw_is_submitted_anew(tmp_path: Path) -> None:
    with BatchServer(says(), polls=0) as server:
        server.faults = [("POST /batches", "drop")]
        with pytest.raises(Died):
            run(plan(server), tmp_path, [ask("a")], sleep=Clock(dies_at=1))
        assert texts(run(plan(server), tmp_path, [ask("a")])) == [[" after a #0", " after a #1"]]
        assert len(server.batches) == 1


def test_another_fingerprint_never_takes_a_waiting_batch(tmp_path: Path) -> None:
    with BatchServer(says(), polls=2) as server:
        with pytest.raises(Died):
            run(plan(server), tmp_path, [ask("a")], sleep=Clock(dies_at=1))
        run(plan(server, temperature=0.5), tmp_path, [ask("a")])
        assert len(server.batches) == 2
        run(plan(server), tmp_path, [ask("a")])
        assert len(server.batches) == 2


def test_failed_requests_say_why_and_cost_nothing_and_can_be_asked_again(tmp_path: Path) -> None:
    moods = {"bad": {"error": {"code": "too_long", "message": f"not with {KEY}"}}, "late": {"expired": True}}

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        prefix = body["prefix"]
        if prefix == "odd":
            return {"body": {"oops": 1}}
        if prefix == "short":
            return {"body": {"texts": ["one"], "tokens": (1, 1)}}
        return moods.get(prefix) or says()(body)

    till = Purse()
    requests = [ask(prefix) for prefix in ("bad", "late", "odd", "short", "good")]
    with BatchServer(answer, polls=0, status="expired") as server:
        answers = run(plan(server), tmp_path, requests, till=till)
        bad, late, odd, short, good = (answer.continuations[1] for answer in answers)
        assert (bad.missing, bad.detail) == (Missing.FAILED, "status 400: too_long not with ***")
        assert late.detail == "batch_expired not done within the window"
        assert odd.detail == "the answer is no completion: no texts"
        assert short.detail == "the server gave 1 of 2 samples"
        assert good.text == " after good #1"
        assert [answer.usage.cost_usd for answer in answers[:3]] == [0.0, 0.0, None]
        assert till.bill.cost_usd is None  # Nobody said what the odd answer cost.
        moods.clear()
        assert texts(run(plan(server), tmp_path, requests[:1])) == [[" after bad #0", " after bad #1"]]
        assert len(server.batches) == 2


def test_failures_of_anthropic_say_why(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        wrong = {"error": {"type": "invalid_request_error", "message": "no"}}
        return wrong if body["seeds"][0] == 0 else {"expired": True}

    with BatchServer(answer, polls=0) as server:
        (answered,) = run(plan(server, "anthropic"), tmp_path, [ask("a")])
    assert [c.detail for c in answered.continuations] == ["errored: invalid_request_error no", "expired"]
    assert answered.usage == Usage(requests=2, cost_usd=0.0)


def test_a_batch_that_fails_or_is_forgotten_leaves_a_reason(tmp_path: Path) -> None:
    with BatchServer(says(), polls=0, status="failed") as server:
        (failed,) = run(plan(server), tmp_path, [ask("a")])
        assert failed.continuations[0].detail == "batch batch_0 ended as failed: line 1"
        with pytest.raises(Died):
            server.polls = 3
            run(plan(server), tmp_path, [ask("b")], sleep=Clock(dies_at=1))
        del server.batches["batch_1"]
        (gone,) = run(plan(server), tmp_path, [ask("b")])
        assert gone.continuations[0].detail == "the server no longer knows batch batch_1"


def test_a_forgotten_anthropic_batch_leaves_a_reason(tmp_path: Path) -> None:
    with BatchServer(says(), polls=2) as server:
        with pytest.raises(Died):
            run(plan(server, "anthropic"), tmp_path, [ask("b")], sleep=Clock(dies_at=1))
        server.batches.clear()
        (gone,) = run(plan(server, "anthropic"), tmp_path, [ask("b")])
        assert gone.continuations[0].detail == "the server no longer knows batch batch_0"


def test_a_budget_that_does_not_cover_all_buys_nothing(tmp_path: Path) -> None:
    # Two bounds of 0.0003 each: (100 * 1 + 40 * 5) / 1e6.
    till = Purse(usd=0.0005)
    with BatchServer(says()) as server:
        with pytest.raises(TeacherBudgetError):
            run(plan(server), tmp_path, [ask("a"), ask("b")], till=till)
        assert server.asked == [] and len(till.entries) == 1
        assert till.entries[0].settled == [((), Usage(cost_usd=0.0))]


def test_more_than_fits_goes_into_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ask(f"p{i}") for i in range(7)]
    with BatchServer(says(), polls=1) as server:
        answers = run(plan(server), tmp_path, requests, max_batch_requests=3)
        assert [len(batch.requests) for batch in server.batches.values()] == [3, 3, 1]
        assert texts(answers) == [[f" after p{i} #0", f" after p{i} #1"] for i in range(7)]
        # A line of such a request has about 180 bytes; 128 more are set aside for the id and what frames it.
        monkeypatch.setattr(OpenAIBatches, "max_bytes", 700)
        run(plan(server, temperature=0.5), tmp_path, requests)
        sizes = [len(batch.requests) for batch in list(server.batches.values())[3:]]
        assert sum(sizes) == 7 and max(sizes) == 2
        assert all(len(content) <= 700 for name, content in server.files.items() if name.startswith("file_"))


def test_a_request_spread_over_batches_is_settled_whole(tmp_path: Path) -> None:
    till = Purse()
    with BatchServer(says(), polls=1) as server:
        answers = run(plan(server, "anthropic"), tmp_path, [ask("a", n=3)], till=till, max_batch_requests=1)
        assert len(server.batches) == 3
    assert texts(answers) == [[f" after a #{i}" for i in range(3)]]
    # Three bills, and all samples with the first of them.
    assert [(len(replies), usage.requests) for e in till.entries for replies, usage in e.settled] == [
        (3, 1),
        (0, 1),
        (0, 1),
    ]


def test_an_answer_that_cannot_be_written_down_is_read_again(tmp_path: Path) -> None:
    with BatchServer(says(), polls=0) as server:
        with pytest.raises(RunError, match="disk full"):
            run(plan(server), tmp_path, [ask("a")], till=Purse(full_disk=True))
        till = Purse()
        run(plan(server), tmp_path, [ask("a")], till=till)
        assert len(server.batches) == 1 and len(till.samples) == 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_broken_line_is_no_failure(tmp_path: Path, dialect: DialectName) -> None:
    results = "GET /files/batch" if dialect == "openai" else "GET /messages/batches/batch_0/results"
    with BatchServer(says(), polls=1) as server:
        server.faults = [(results, "cut"), (results, "drop"), (results, 500)]
        server.faults += [
            (f"GET {'' if dialect == 'openai' else '/messages'}/batches/", fault) for fault in ("drop", 502)
        ]
        assert texts(run(plan(server, dialect), tmp_path, [ask("a")])) == [[" after a #0", " after a #1"]]


def test_a_network_that_stays_away_ends_the_wait_and_not_the_batch(tmp_path: Path) -> None:
    with BatchServer(says(), polls=1) as server:
        server.faults = [("GET /batches/", "drop")] * 31
        with pytest.raises(TeacherConnectionError, match=r"31 polls .* run on"):
            run(plan(server), tmp_path, [ask("a")])
        run(plan(server), tmp_path, [ask("a")])
        assert len(server.batches) == 1
        server.faults = [("POST /files", "drop")] * 6
        with pytest.raises(TeacherConnectionError, match="no answer that could be used"):
            run(plan(server), tmp_path, [ask("b")])
        server.faults = [("POST /batches", 500)] * 6
        with pytest.raises(TeacherConnectionError, match="6 attempts"):
            run(plan(server), tmp_path, [ask("b")])
        assert len(server.batches) == 1


def test_a_batch_that_never_ends_is_given_up_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_waiting, "MAX_WAIT_S", 600.0)
    with BatchServer(says(), polls=10**6) as server:
        with pytest.raises(TeacherTimeoutError, match="1 batches have not ended"):
            run(plan(server), tmp_path, [ask("a")])
        server.polls = 0
        run(plan(server), tmp_path, [ask("a")])
        assert len(server.batches) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("status", "error"),
    [(401, TeacherAuthError), (402, TeacherRateLimitError), (400, TeacherResponseError), (404, TeacherResponseError)],
)
def test_refusals_stop_at_once_without_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dialect: DialectName, status: int, error: type[Exception]
) -> None:
    caplog.set_level(logging.DEBUG)
    with BatchServer(says()) as server:
        server.faults = [("POST /files" if dialect == "openai" else "POST /messages/batches", status)]
        with pytest.raises(error) as caught:
            run(plan(server, dialect), tmp_path, [ask("a")])
    chain: list[BaseException | None] = [caught.value, caught.value.__cause__]
    assert caught.value.__suppress_context__
    left = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in left + caplog.text + repr(chain)


def test_the_key_goes_nowhere_else(tmp_path: Path) -> None:
    with BatchServer(says(), polls=0) as server, BatchServer(says()) as other:
        server.results_url = f"{other.base_url}/messages/batches/x/results"
        (answer,) = run(plan(server, "anthropic"), tmp_path, [ask("a")])
        assert answer.continuations[0].text is not None
        assert other.asked == []


def test_a_torn_last_line_is_dropped_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    with BatchServer(says(), polls=3) as server:
        with pytest.raises(Died):
            run(plan(server), tmp_path, [ask("a")], sleep=Clock(dies_at=1))
        with journal(tmp_path).open("ab") as file:
            file.write(b'{"event":"sett')
        run(plan(server), tmp_path, [ask("a")])
        assert len(server.batches) == 1
        events = [json.loads(line)["event"] for line in journal(tmp_path).read_text().splitlines()]
        assert events == ["intent", "submitted", "settled"]
        journal(tmp_path).write_text('{"event":"what"}\n')
        with pytest.raises(RunError, match="jsonl:1"):
            run(plan(server), tmp_path, [ask("a")])


def test_no_prompt_is_kept(tmp_path: Path) -> None:
    with BatchServer(says(), polls=0) as server:
        run(plan(server), tmp_path, [ask("a secret prefix")])
    assert "secret" not in journal(tmp_path).read_text()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with BatchServer(says(), polls=1) as server:

        async def other(seconds: float) -> None:
            teacher = BatchTeacher(plan(server), api_key=KEY, ledger=tmp_path / "ledger.sqlite")
            with pytest.raises(RunError, match="another process"):
                await teacher.continuations([ask("a")])

        run(plan(server), tmp_path, [ask("a")], sleep=other)


def test_calls_at_the_same_time_have_their_own_samples(tmp_path: Path) -> None:
    async def both() -> list[list[TeacherAnswer]]:
        teacher = BatchTeacher(plan(server), api_key=KEY, ledger=tmp_path / "l", sleep=Clock())
        try:
            return await asyncio.gather(*(teacher.continuations([ask("a")]) for _ in range(2)))
        finally:
            await teacher.aclose()

    with BatchServer(says(), polls=2) as server:
        answers = asyncio.run(both())
        assert len(server.batches) == 2 and [a[0].usage.requests for a in answers] == [1, 1]


def test_token_ids_count_only_where_they_are_sent(tmp_path: Path) -> None:
    requests = [ask("a", token_ids=(1,)), ask("a", token_ids=(2,))]
    with BatchServer(says(), polls=0) as server:
        run(plan(server), tmp_path, requests)
        assert len(server.bodies) == 1
        run(plan(server, transport="tokens"), tmp_path, requests)
        assert len(server.bodies) == 3


def test_unknown_prices_stay_unknown_and_a_servers_own_bill_wins(tmp_path: Path) -> None:
    with BatchServer(says(), polls=0) as server:
        till = Purse()
        (answer,) = run(plan(server), tmp_path, [ask("a")], till=till, price=None)
        assert answer.usage.cost_usd is None and till.entries[0].bound.usd is None
        server.answer = says(tokens=None)
        (answer,) = run(plan(server), tmp_path, [ask("b")])
        assert answer.usage == Usage(requests=1)


def test_a_discount_is_taken_off_every_price() -> None:
    price = ModelPrice(
        input_usd_per_mtok=4.0, output_usd_per_mtok=8.0, cached_input_usd_per_mtok=1.0, batch_factor=0.25
    )
    assert discounted(price) == ModelPrice(
        input_usd_per_mtok=1.0, output_usd_per_mtok=2.0, cached_input_usd_per_mtok=0.25, batch_factor=1.0
    )


@pytest.mark.parametrize(("dialect", "batch_api"), [("gemini", True), ("openai", False)])
def test_cards_without_a_batch_endpoint_are_refused(tmp_path: Path, dialect: DialectName, batch_api: bool) -> None:
    card = Card(id="fake", dialect=dialect, can=Capabilities(batch_api=batch_api))
    how = Plan(Words("openai"), "http://127.0.0.1:1/v1", card)
    with pytest.raises(TeacherCapabilityError, match="no batch endpoint"):
        BatchTeacher(how, api_key=None, ledger=tmp_path / "l")


def test_construction_checks_its_numbers_and_hides_the_key(tmp_path: Path) -> None:
    with BatchServer(says()) as server:
        with pytest.raises(ConfigError, match="max_batch_requests is 0"):
            BatchTeacher(plan(server), api_key=KEY, ledger=tmp_path / "l", max_batch_requests=0)
        teacher = BatchTeacher(plan(server), api_key=KEY, ledger=tmp_path / "l")
    planner: Planner = plan(server)
    recorded: RecordedTeacher = teacher
    assert recorded.id == planner.teacher_id and recorded.fingerprint == planner.fingerprint
    assert not recorded.exact_samples and not recorded.reads_token_ids and KEY not in repr(teacher)
    assert asyncio.run(teacher.continuations([])) == [] and not journal(tmp_path).exists()


def test_a_key_in_a_header_of_its_own_goes_without_a_bearer(tmp_path: Path) -> None:
    headers: Mapping[str, str] = {"x-api-key": KEY}

    async def poll(endpoint: OpenAIBatches | AnthropicBatches) -> None:
        async with endpoint:
            await endpoint.state("/messages", "batch_0")

    with BatchServer(says()) as server:
        server.add([])
        asyncio.run(poll(OpenAIBatches(base_url=server.base_url, headers=headers, api_key=KEY, timeout_s=5)))
        assert server.keys == {KEY}
