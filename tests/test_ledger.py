"""The ledger: nothing is paid twice, nothing is lost, and the budget holds."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from loopback import Loopback, Received, Scripted, chat, error
from omniopd.errors import ConfigError, RunError, TeacherAuthError, TeacherBudgetError
from omniopd.teachers import resolve
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.cards import ModelPrice, find_card
from omniopd.teachers.echo import EchoTeacher
from omniopd.teachers.ledger import Ledger, Ledgered, Reply, highest_cost_usd, request_key
from omniopd.teachers.openai_compatible import OpenAITeacher
from omniopd.types import Continuation, Message, Missing, Usage

KEY = "sk-test-0123456789abcdef"
PRICE = ModelPrice(input_usd_per_mtok=100.0, output_usd_per_mtok=1000.0)


def ask(prefix: str = "The sum", *, n: int = 1, seed: int | None = None) -> ContinuationRequest:
    return ContinuationRequest(
        messages=(Message(role="user", content="2+3"),), prefix=prefix, n=n, max_tokens=10, seed=seed
    )


def open_paid(
    url: str, path: Path | str, *, budget_usd: float | None = None, price: ModelPrice | None = PRICE
) -> Ledgered:
    async def no_wait(seconds: float) -> None:
        pass

    teacher = OpenAITeacher(
        id="openai:m",
        model="m",
        base_url=url,
        api_key=KEY,
        card=find_card("openai"),
        transport="chat",
        price=price,
        max_attempts=2,
        sleep=no_wait,
    )
    return Ledgered(teacher, Ledger(path), price=price, budget_usd=budget_usd)


def run(teacher: Ledgered, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
    async def go() -> list[TeacherAnswer]:
        try:
            return await teacher.continuations(requests)
        finally:
            await teacher.aclose()

    return asyncio.run(go())


def texts(answer: TeacherAnswer) -> list[str | None]:
    return [c.text for c in answer.continuations]


def numbered() -> Callable[[Received], Scripted]:
    """Answer every choice ever asked for with its own number."""
    count = iter(range(1000))
    return lambda received: chat(*(f" {next(count)}" for _ in range(received.body.get("n", 1))))


def test_an_answer_is_paid_once_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.sqlite"
    with Loopback(numbered()) as server:
        (first,) = run(open_paid(server.base_url, path), [ask(n=2)])
        again, other = run(open_paid(server.base_url, path), [ask(n=2), ask("Other")])
    assert [r.body.get("n") for r in server.received] == [2, None]
    assert texts(again) == texts(first) == [" 0", " 1"]
    assert texts(other) == [" 2"]
    assert again.usage == Usage(cached_requests=1)
    # Two calls of 10 * 100 / 1e6 + 5 * 1000 / 1e6 = 0.006
    assert Ledger(path).spent() == Usage(requests=2, input_tokens=20, output_tokens=10, cost_usd=pytest.approx(0.012))


def test_only_missing_samples_are_asked_for_and_with_another_seed(tmp_path: Path) -> None:
    with Loopback(numbered()) as server:
        teacher = open_paid(server.base_url, tmp_path / "l.sqlite")
        run(teacher, [ask(n=2, seed=7)])
        (answer,) = run(teacher, [ask(n=5, seed=7)])
    assert texts(answer) == [" 0", " 1", " 2", " 3", " 4"]
    assert [(r.body["n"], r.body["seed"] == 7) for r in server.received] == [(2, True), (3, False)]


def test_the_same_request_twice_in_a_call_is_asked_once(tmp_path: Path) -> None:
    with Loopback(numbered()) as server:
        small, large = run(open_paid(server.base_url, tmp_path / "l.sqlite"), [ask(n=1), ask(n=3)])
    assert len(server.received) == 1
    assert (texts(small), texts(large)) == ([" 0"], [" 0", " 1", " 2"])


def test_exact_teachers_give_the_same_samples_in_any_order(tmp_path: Path) -> None:
    fresh = Ledgered(EchoTeacher(), Ledger(":memory:"))
    grown = Ledgered(EchoTeacher(), Ledger(tmp_path / "l.sqlite"))
    run(grown, [ask(n=2, seed=3)])
    assert texts(run(grown, [ask(n=6, seed=3)])[0]) == texts(run(fresh, [ask(n=6, seed=3)])[0])


def test_failures_are_not_stored_but_refusals_are(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Loopback([error(500, "boom"), error(500, "boom"), chat("", refusal="no"), chat(" 5")]) as server:
        (failed,) = run(open_paid(server.base_url, path), [ask()])
        (refused,) = run(open_paid(server.base_url, path), [ask()])
        (cached,) = run(open_paid(server.base_url, path), [ask()])
    assert failed.continuations[0].missing is Missing.FAILED
    assert refused.continuations[0].missing is Missing.REFUSED
    assert cached.continuations == refused.continuations
    assert len(server.received) == 3
    assert Ledger(path).spent().requests == 3


def test_what_was_paid_before_a_fatal_error_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"

    def script(received: Received) -> Scripted:
        return error(401, "revoked") if "bad" in str(received.body["messages"]) else chat(" 5")

    with Loopback(script) as server:
        with pytest.raises(TeacherAuthError):
            run(open_paid(server.base_url, path), [ask("good"), ask("bad")])
        paid = sum("good" in str(r.body["messages"]) for r in server.received)
        (answer,) = run(open_paid(server.base_url, path), [ask("good")])
    assert texts(answer) == [" 5"]
    assert sum("good" in str(r.body["messages"]) for r in server.received) == paid == 1


CRASH = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_ledger import ask, open_paid
async def go():
    teacher = open_paid({url!r}, Path({path!r}))
    asyncio.get_running_loop().call_later(1.0, os._exit, 9)
    await teacher.continuations([ask("quick"), ask("slow")])
asyncio.run(go())
"""


def test_answers_that_came_before_a_crash_are_not_paid_again(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    is_slow = True

    def script(received: Received) -> Scripted:
        slow = is_slow and "slow" in str(received.body["messages"])
        return Scripted(body=chat(" 5").body, delay_s=2.0 if slow else 0.0)

    with Loopback(script) as server:
        code = CRASH.format(tests=str(Path(__file__).parent), url=server.base_url, path=str(path))
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
        is_slow = False
        answers = run(open_paid(server.base_url, path), [ask("quick"), ask("slow")])
    assert [texts(a) for a in answers] == [[" 5"], [" 5"]]
    asked = ["quick" in str(r.body["messages"]) for r in server.received]
    assert (asked.count(True), asked.count(False)) == (1, 2)


WRITER = """
import sys
from omniopd.teachers.ledger import Ledger, Reply
from omniopd.types import Continuation, Usage
ledger = Ledger(sys.argv[1])
for i in range(100):
    reply = Reply(position=0, sample=0, raw="x", continuation=Continuation(text=sys.argv[2]))
    ledger.add("t", [(f"{sys.argv[2]}{i}", 0, reply), (f"both{i}", 0, reply)], Usage(requests=1, cost_usd=0.5), 0.0)
"""


def test_two_processes_share_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [w.wait(timeout=60) for w in writers] == [0, 0]
    ledger = Ledger(path)
    assert ledger.spent() == Usage(requests=200, cost_usd=pytest.approx(100.0))
    assert len(ledger.find([f"{name}{i}" for name in "ab" for i in range(100)])) == 200
    assert len(ledger.find([f"both{i}" for i in range(100)])) == 100


def test_what_a_request_can_cost_at_most() -> None:
    # 3 bytes + 8 for the message, 7 for the prefix, 256 for template and instruction: 274 tokens, twice, 2 * 10 out:
    # 548 * 100 / 1e6 + 20 * 1000 / 1e6 = 0.0548 + 0.02
    assert highest_cost_usd(ask(n=2), PRICE) == pytest.approx(0.0748)


def test_the_budget_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    # One sample may cost 274 * 100 / 1e6 + 10 * 1000 / 1e6 = 0.0374 and does cost 0.006.
    with Loopback(numbered()) as server:
        run(open_paid(server.base_url, path, budget_usd=0.04), [ask()])
        with pytest.raises(TeacherBudgetError, match="does not cover the next 1 requests") as caught:
            run(open_paid(server.base_url, path, budget_usd=0.04), [ask("Other")])
        assert "spent 0.0060" in str(caught.value)
        assert len(server.received) == 1
        run(open_paid(server.base_url, path, budget_usd=0.04), [ask()])
        run(open_paid(server.base_url, path, budget_usd=0.05), [ask("Other")])
    assert len(server.received) == 2


def test_calls_under_way_are_part_of_what_is_spent(tmp_path: Path) -> None:
    async def both(teacher: Ledgered) -> list[object]:
        calls = [teacher.continuations([ask("a")]), teacher.continuations([ask("b")])]
        results = await asyncio.gather(*calls, return_exceptions=True)
        await teacher.aclose()
        return list(results)

    with Loopback(numbered()) as server:
        results = asyncio.run(both(open_paid(server.base_url, tmp_path / "l.sqlite", budget_usd=0.06)))
    assert [isinstance(r, TeacherBudgetError) for r in results] == [False, True]
    # 1 byte of prefix: (3 + 8 + 1 + 256) * 100 / 1e6 + 10 * 1000 / 1e6 = 0.0268 + 0.01
    assert "under way 0.0368" in str(results[1])


def test_a_budget_needs_prices(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with pytest.raises(ConfigError, match=r"teachers/openai\.yaml"):
        open_paid("https://h/v1", path, budget_usd=1.0, price=None)
    with Loopback(numbered()) as server:
        run(open_paid(server.base_url, path, price=None), [ask()])
    assert Ledger(path).spent().cost_usd is None
    with pytest.raises(ConfigError, match="calls of unknown cost"):
        open_paid("https://h/v1", path, budget_usd=1.0)


def test_a_budget_without_a_file_holds_for_the_teachers_life() -> None:
    teacher = resolve.open_teacher("echo:demo", budget_usd=1.0)
    assert isinstance(teacher, Ledgered)
    assert teacher.id == "echo:demo"
    (first,), (second,) = run(teacher, [ask(seed=1)]), run(teacher, [ask(seed=1)])
    assert texts(first) == texts(second)
    assert second.usage.cached_requests == 1


def test_the_key_depends_on_all_that_shapes_a_sample_and_not_on_n() -> None:
    keys = {
        request_key(marks, request)
        for marks in ('{"temperature": 1}', '{"temperature": 2}')
        for request in (ask(), ask("x"), ask(seed=1), ask("\ud800"))
    }
    assert len(keys) == 8
    assert request_key("{}", ask(n=2)) == request_key("{}", ask(n=3))


def test_neither_key_nor_prompt_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Loopback([error(500, f"echo {KEY}"), chat(" 5")]) as server:
        run(open_paid(server.base_url, path), [ask("my private prefix")])
    on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"openai:m" in on_disk
    assert KEY.encode() not in on_disk
    assert b"my private prefix" not in on_disk


def test_the_raw_text_is_kept_beside_the_repaired(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Loopback([chat("The sum is 5")]) as server:
        (answer,) = run(open_paid(server.base_url, path), [ask()])
    assert texts(answer) == [" is 5"]
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT raw FROM samples").fetchall() == [("The sum is 5",)]
    db.close()


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for the head of one, says sqlite" * 20)
    with pytest.raises(RunError, match=r"cannot open the ledger .*notes\.txt"):
        Ledger(path)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(RunError, match="has version 99"):
        Ledger(newer)


def test_a_failed_write_says_so_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE samples")
    db.close()
    reply = Reply(position=0, sample=0, raw="x", continuation=Continuation(text="x"))
    with pytest.raises(RunError, match="cannot write to the ledger"):
        ledger.add("t", [("k", 0, reply)], Usage(requests=1), 0.0)
    assert ledger.spent().requests == 0
    ledger.close()
    ledger.close()
