"""A teacher behind a ledger: nothing is bought twice, by whomever, and every bill is on an answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from omniopd.errors import ConfigError, TeacherAuthError, TeacherBudgetError
from omniopd.teachers.base import Bound, ContinuationRequest, Reply, TeacherAnswer, Till
from omniopd.teachers.budget import Budget
from omniopd.teachers.cards import ModelPrice
from omniopd.teachers.echo import EchoTeacher
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.ledgered import Ledgered, request_key
from omniopd.types import Continuation, Missing, Usage
from scripted_teacher import ScriptedTeacher, ask, sold, texts

PRICE = ModelPrice(input_usd_per_mtok=1.0, output_usd_per_mtok=1.0)
CACHED = Usage(cached_requests=1)


def run(teacher: Ledgered, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
    async def go() -> list[TeacherAnswer]:
        try:
            return await teacher.continuations(requests)
        finally:
            await teacher.aclose()

    return asyncio.run(go())


def bills(answers: Sequence[TeacherAnswer]) -> Usage:
    return sum((a.usage for a in answers), Usage())


def test_an_answer_is_bought_once_across_restarts(tmp_path: Path) -> None:
    path, book = tmp_path / "run" / "l.sqlite", tmp_path / "sold"
    (first,) = run(Ledgered(ScriptedTeacher(book), Ledger(path)), [ask(n=2)])
    again, other = run(Ledgered(ScriptedTeacher(book), Ledger(path)), [ask(n=2), ask("Other")])
    assert sold(book) == ["The sum None 0", "The sum None 1", "Other None 0"]
    assert texts(again) == texts(first) == [" The sum/None/0", " The sum/None/1"]
    assert (again.usage, again.seconds) == (CACHED, 0.0)
    # Two requests of 10 in, 5 out and 0.5 USD.
    spent = Usage(requests=2, input_tokens=20, output_tokens=10, cost_usd=1.0)
    assert Ledger(path).spent() == first.usage + other.usage == spent
    assert other.seconds == 0.25


def test_only_missing_samples_are_asked_for_and_by_their_numbers(tmp_path: Path) -> None:
    teacher = Ledgered(ScriptedTeacher(tmp_path / "sold"), Ledger(tmp_path / "l.sqlite"))
    run(teacher, [ask(n=2, seed=7)])
    (answer,) = run(teacher, [ask(n=5, seed=7)])
    assert texts(answer) == [f" The sum/7/{i}" for i in range(5)]
    (cached,) = run(teacher, [ask(n=4, seed=7)])
    assert texts(cached) == texts(answer)[:4]


def test_an_exact_teacher_is_asked_for_the_whole_request_again(tmp_path: Path) -> None:
    teacher = Ledgered(ScriptedTeacher(tmp_path / "sold", is_exact=True), Ledger(tmp_path / "l.sqlite"))
    run(teacher, [ask(n=2, seed=7)])
    (answer,) = run(teacher, [ask(n=3, seed=7)])
    assert texts(answer) == [f" The sum/7/{i}" for i in range(3)]
    fresh, grown = (Ledgered(EchoTeacher(), Ledger(":memory:")) for _ in range(2))
    run(grown, [ask(n=2, seed=3)])
    assert texts(run(grown, [ask(n=6, seed=3)])[0]) == texts(run(fresh, [ask(n=6, seed=3)])[0])


def test_the_same_request_twice_in_a_call_is_asked_once(tmp_path: Path) -> None:
    teacher = Ledgered(ScriptedTeacher(tmp_path / "sold"), Ledger(":memory:"))
    small, large, other = answers = run(teacher, [ask(n=1), ask(n=3), ask("b")])
    assert len(sold(tmp_path / "sold")) == 4
    assert texts(small) == texts(large)[:1]
    assert (small.usage.requests, large.usage, other.usage.requests) == (1, CACHED, 1)
    assert bills(answers) == Usage(requests=2, input_tokens=20, output_tokens=10, cost_usd=1.0, cached_requests=1)


def test_identical_requests_at_the_same_time_are_one(tmp_path: Path) -> None:
    teacher = Ledgered(ScriptedTeacher(tmp_path / "sold", delay_s=(0.02, 0.02)), Ledger(tmp_path / "l.sqlite"))

    async def go() -> list[list[TeacherAnswer]]:
        calls = [teacher.continuations([ask("a", n=2), ask(str(i % 3))]) for i in range(9)]
        results = await asyncio.gather(*calls)
        await teacher.aclose()
        return results

    results = asyncio.run(go())
    assert Counter(sold(tmp_path / "sold")) == Counter(["a None 0", "a None 1", *(f"{i} None 0" for i in range(3))])
    assert len({str(texts(first)) for first, _ in results}) == 1
    assert bills([a for answers in results for a in answers]) == Usage(
        requests=4, input_tokens=40, output_tokens=20, cost_usd=2.0, cached_requests=14
    )


def test_threads_with_their_own_loops_share_what_is_under_way(tmp_path: Path) -> None:
    teacher = Ledgered(ScriptedTeacher(tmp_path / "sold", delay_s=(0.03, 0.03)), Ledger(tmp_path / "l.sqlite"))
    answers: list[TeacherAnswer] = []

    def work() -> None:
        answers.extend(asyncio.run(teacher.continuations([ask()])))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(teacher.aclose())
    assert (len(sold(tmp_path / "sold")), bills(answers).requests, bills(answers).cached_requests) == (1, 1, 3)


def test_a_second_one_tries_when_the_first_failed(tmp_path: Path) -> None:
    scripted = ScriptedTeacher(tmp_path / "sold", delay_s=(0.02, 0.02), outcome={"a": Missing.TIMEOUT})
    teacher = Ledgered(scripted, Ledger(tmp_path / "l.sqlite"))

    async def go() -> list[list[TeacherAnswer]]:
        calls = [asyncio.ensure_future(teacher.continuations([ask("a")])) for _ in range(2)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        scripted.outcome.clear()
        return await asyncio.gather(*calls)

    (first,), (second,) = asyncio.run(go())
    asyncio.run(teacher.aclose())
    assert (first.continuations[0].missing, texts(second)) == (Missing.TIMEOUT, [" a/None/0"])
    assert first.usage.requests == second.usage.requests == 1


def test_failures_are_not_stored_but_what_was_paid_for_is(tmp_path: Path) -> None:
    book = tmp_path / "sold"
    outcome = {reason.value: reason for reason in Missing if reason is not Missing.TOO_FEW}
    requests = [ask(reason) for reason in outcome]
    path = tmp_path / "l.sqlite"
    run(Ledgered(ScriptedTeacher(book, outcome=outcome), Ledger(path)), requests)
    later = run(Ledgered(ScriptedTeacher(book), Ledger(path)), requests)
    unpaid = {"timeout", "failed", "budget"}
    assert {line.split()[0] for line in sold(book)} == unpaid
    assert {str(a.continuations[0].missing) for a in later if a.usage == CACHED} == {"empty", "refused", "garbage"}


def test_what_was_paid_before_a_fatal_error_is_kept(tmp_path: Path) -> None:
    path, book = tmp_path / "l.sqlite", tmp_path / "sold"
    fatal = ScriptedTeacher(book, outcome={"bad": TeacherAuthError("revoked")})
    with pytest.raises(TeacherAuthError):
        run(Ledgered(fatal, Ledger(path)), [ask("good"), ask("bad")])
    good, bad = run(Ledgered(ScriptedTeacher(book), Ledger(path)), [ask("good"), ask("bad")])
    assert (good.usage, bad.usage.requests) == (CACHED, 1)
    assert sold(book) == ["good None 0", "bad None 0"]
    ledger = Ledger(path)
    # The order of the bad one was never settled by its teacher.
    assert (ledger.spent().requests, ledger.spent().unanswered_requests, ledger.possible()) == (3, 1, (1.0, 20))


def test_cancelling_frees_the_request_for_others_and_counts_it_as_possibly_spent(tmp_path: Path) -> None:
    slow = ScriptedTeacher(tmp_path / "sold", delay_s=(30.0, 30.0))
    quick = ScriptedTeacher(tmp_path / "sold")
    path = tmp_path / "l.sqlite"

    async def go() -> None:
        first, second = Ledgered(slow, Ledger(path)), Ledgered(quick, Ledger(path))
        waiting = asyncio.ensure_future(first.continuations([ask()]))
        same = asyncio.ensure_future(first.continuations([ask()]))
        other = asyncio.ensure_future(second.continuations([ask()]))
        await asyncio.sleep(0.1)
        assert not other.done()
        same.cancel()
        waiting.cancel()
        assert [type(r) for r in await asyncio.gather(waiting, same, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 2
        (answer,) = await other
        assert answer.usage.requests == 1
        assert Ledger(path).possible() == (1.0, 20)
        await first.aclose()
        await second.aclose()

    asyncio.run(go())
    assert len(sold(tmp_path / "sold")) == 1


class _Late(ScriptedTeacher):
    """Fails at once, and goes on to settle what it ordered."""

    settling: asyncio.Task[None] | None = None

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]:
        assert till is not None
        order = await till.order(Bound(tokens=20, usd=1.0))
        reply = Reply(position=0, sample=0, raw="late", continuation=Continuation(text="late"))
        bill = Usage(requests=1, input_tokens=10, output_tokens=5, cost_usd=0.5)
        self.settling = asyncio.ensure_future(order.settle([reply], bill, 0.0))
        raise TeacherAuthError("revoked")


def test_an_answer_that_is_settled_after_its_call_failed_is_kept(tmp_path: Path) -> None:
    late = _Late(tmp_path / "sold")

    async def go() -> None:
        teacher = Ledgered(late, Ledger(tmp_path / "l.sqlite"))
        with pytest.raises(TeacherAuthError):
            await teacher.continuations([ask()])
        assert late.settling is not None
        await late.settling
        (answer,) = await teacher.continuations([ask()])
        assert (texts(answer), answer.usage) == (["late"], CACHED)
        await teacher.aclose()

    asyncio.run(go())


BUYER = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.ledgered import Ledgered
from omniopd.types import Usage
from scripted_teacher import ScriptedTeacher, ask, texts
async def go():
    folder = Path(sys.argv[2])
    teacher = Ledgered(ScriptedTeacher(folder / "sold", delay_s=(0.0, 0.02)), Ledger(folder / "l.sqlite"))
    calls = [teacher.continuations([ask(f"p{10 * i + j}", n=2) for j in range(10)]) for i in range(10)]
    answers = [a for part in await asyncio.gather(*calls) for a in part]
    await teacher.aclose()
    usage = sum((a.usage for a in answers), Usage())
    print(json.dumps([usage.to_json(), [texts(a) for a in answers]]))
asyncio.run(go())
"""


def test_two_processes_with_the_same_requests_buy_each_sample_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUYER, str(Path(__file__).parent), str(tmp_path)]
    buyers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (usage, got), (other_usage, other_got) = (json.loads(buyer.communicate(timeout=60)[0]) for buyer in buyers)
    assert Counter(sold(tmp_path / "sold")) == Counter(f"p{i} None {k}" for i in range(100) for k in range(2))
    assert got == other_got
    assert usage["requests"] + other_usage["requests"] == 100
    assert usage["cached_requests"] + other_usage["cached_requests"] == 100
    assert Ledger(tmp_path / "l.sqlite").spent().requests == 100


def test_the_budget_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    path, book = tmp_path / "l.sqlite", tmp_path / "sold"

    def teacher(usd: float) -> Ledgered:
        return Ledgered(ScriptedTeacher(book), Ledger(path), price=PRICE, budget=Budget(usd=usd))

    run(teacher(1.0), [ask()])
    with pytest.raises(TeacherBudgetError, match=r"next request to scripted:m: spent 0\.5000"):
        run(teacher(1.0), [ask("other")])
    assert run(teacher(1.0), [ask()])[0].usage == CACHED
    run(teacher(1.5), [ask("other")])
    assert len(sold(book)) == 2


def test_a_teacher_that_orders_everything_first_is_refused_at_once(tmp_path: Path) -> None:
    scripted = ScriptedTeacher(tmp_path / "sold", delay_s=(0.05, 0.05))
    budget = Budget(calls=1)
    with pytest.raises(TeacherBudgetError, match="under way 1"):
        run(Ledgered(scripted, Ledger(":memory:"), budget=budget, max_wait_s=0), [ask("a"), ask("b")])


def test_a_budget_in_usd_needs_prices(tmp_path: Path) -> None:
    scripted = ScriptedTeacher(tmp_path / "sold", price_usd=None)
    with pytest.raises(ConfigError, match=r"train: teacher\.price"):
        Ledgered(scripted, Ledger(":memory:"), budget=Budget(usd=1.0))
    run(Ledgered(scripted, Ledger(tmp_path / "l.sqlite"), budget=Budget(calls=1)), [ask()])
    assert Ledger(tmp_path / "l.sqlite").spent().cost_usd is None
    with pytest.raises(ConfigError, match="calls of unknown cost"):
        Ledgered(scripted, Ledger(tmp_path / "l.sqlite"), price=PRICE, budget=Budget(usd=1.0))


def test_the_key_depends_on_all_that_shapes_a_sample_and_not_on_n() -> None:
    keys = {
        request_key(marks, request, reads_token_ids=False)
        for marks in ('{"temperature": 1}', '{"temperature": 2}')
        for request in (ask(), ask("x"), ask(seed=1), ask("\ud800"), dataclasses.replace(ask(), max_tokens=11))
    }
    assert len(keys) == 10
    assert request_key("{}", ask(n=2), reads_token_ids=True) == request_key("{}", ask(n=3), reads_token_ids=False)
    drawn = [dataclasses.replace(ask(), token_ids=ids) for ids in ((1, 2), (1, 3), None)]
    assert len({request_key("{}", r, reads_token_ids=True) for r in drawn}) == 3
    assert len({request_key("{}", r, reads_token_ids=False) for r in drawn}) == 1
    # Whoever adds a field to a request has to say whether it shapes the answer.
    known = {"messages", "prefix", "n", "max_tokens", "seed", "token_ids", "sample_numbers"}
    assert {f.name for f in dataclasses.fields(ContinuationRequest)} == known
    # As in version 1, whose samples stay.
    assert request_key("{}", ask(), reads_token_ids=True) == (
        "7e9458977e1d3774bb810a5dfb769eb27dac595626453e6ccfe32cbca993b6b2"
    )


def test_prompts_are_not_on_disk(tmp_path: Path) -> None:
    request = dataclasses.replace(ask("my private prefix"), max_tokens=1)
    run(Ledgered(EchoTeacher(), Ledger(tmp_path / "l.sqlite")), [request])
    on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"echo:demo" in on_disk
    assert b"my private prefix" not in on_disk


def test_closing_closes_the_teacher_and_a_later_request_opens_again(tmp_path: Path) -> None:
    scripted = ScriptedTeacher(tmp_path / "sold")
    teacher = Ledgered(scripted, Ledger(tmp_path / "l.sqlite"))
    assert [run(teacher, [ask(str(i))])[0].usage.requests for i in range(2)] == [1, 1]
    assert (scripted.closed, teacher.id) == (2, "scripted:m")
