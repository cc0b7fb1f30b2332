"""The store: what is acknowledged is on the disk, budgets hold across processes, the dead leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd.errors import ConfigError, RunError, TeacherBudgetError
from omniopd.teachers.base import Bound, Reply
from omniopd.teachers.budget import Amount, Budget, Funds
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.owners import is_alive, live_owners, owners_folder
from omniopd.types import Continuation, Missing, Usage

BILL = Usage(
    requests=1,
    input_tokens=10,
    output_tokens=5,
    cost_usd=0.5,
    cached_input_tokens=4,
    cache_write_tokens=3,
    reasoning_tokens=2,
)
LOST = Usage(requests=1, unanswered_requests=1, cost_usd=0.0)
BOUND = Bound(tokens=20, usd=1.0)


def reply(text: str = "x") -> Reply:
    return Reply(position=0, sample=0, raw=f"raw {text}", continuation=Continuation(text=text))


def test_an_answer_and_its_bill_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.sqlite"
    refused = Continuation(text=None, missing=Missing.REFUSED, detail="no", is_exact=False)
    odd = Continuation(text="\ud800\0", finish_reason="stop")

    async def go() -> None:
        ledger = Ledger(path)
        # With a limit the reservation is waited for; without one it stands in the queue before its bill.
        order = await ledger.order(BOUND, teacher_id="t", budget=Budget(calls=9))
        assert [(o.teacher, o.bound, o.is_alive) for o in ledger.in_flight()] == [("t", BOUND, True)]
        samples = [
            ("k", 0, Reply(position=0, sample=0, raw="\ud800\0", continuation=odd)),
            ("k", 2, Reply(position=0, sample=1, raw="", continuation=refused)),
        ]
        await ledger.settle(order, samples, BILL, 0.25)
        assert ledger.in_flight() == []
        ledger.close()
        assert ledger.find(["k", "other"]) == {"k": {0: odd, 2: refused}}
        ledger.close()

    asyncio.run(go())
    again = Ledger(path)
    assert again.find(["k"]) == {"k": {0: odd, 2: refused}}
    assert (again.spent(), again.possible()) == (BILL, (0.0, 0))
    again.close()
    again.close()
    assert not owners_folder(path).exists()


def test_a_sample_that_is_there_stays_and_its_bill_counts() -> None:
    ledger = Ledger(":memory:")
    ledger.add("t", [("k", 0, reply("first"))], BILL, 0.0)
    ledger.add("t", [("k", 0, reply("second"))], BILL, 0.0)
    ledger.close()
    assert ledger.find(["k"])["k"][0].text == "first"
    assert ledger.spent() == BILL + BILL


def test_costs_are_unknown_as_soon_as_one_is_but_a_request_without_an_answer_is_only_possible() -> None:
    async def go(ledger: Ledger, usage: Usage, bound: Bound) -> tuple[float | None, tuple[float | None, int]]:
        await ledger.settle(await ledger.order(bound, teacher_id="t"), [], usage, 0.0)
        return ledger.spent().cost_usd, ledger.possible()

    ledger = Ledger(":memory:")
    assert ledger.spent() == Usage()
    assert asyncio.run(go(ledger, BILL, BOUND)) == (0.5, (0.0, 0))
    assert asyncio.run(go(ledger, LOST, BOUND)) == (0.5, (1.0, 20))
    # Answered, but the server sent no bill: up to the bound.
    assert asyncio.run(go(ledger, Usage(requests=1, input_tokens=1), BOUND)) == (None, (2.0, 20))
    assert asyncio.run(go(ledger, Usage(requests=1, unanswered_requests=1), Bound(tokens=7))) == (None, (None, 27))
    ledger.close()


def test_what_arrives_together_is_committed_together(tmp_path: Path) -> None:
    async def go() -> tuple[int, int, int]:
        ledger = Ledger(tmp_path / "l.sqlite")

        async def one(i: int) -> None:
            order = await ledger.order(BOUND, teacher_id="t")
            await ledger.settle(order, [(f"k{i}", 0, reply())], BILL, 0.0)

        await asyncio.gather(*(one(i) for i in range(200)))
        numbers = ledger.commits, ledger.flushes, ledger.spent().requests
        ledger.close()
        return numbers

    commits, flushes, requests = asyncio.run(go())
    assert requests == 200
    # Alone, each would take two commits, and one of them to the disk.
    assert 1 <= flushes <= commits <= 100


def test_several_threads_with_their_own_loops_share_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")

    async def some(name: str) -> None:
        for i in range(20):
            order = await ledger.order(BOUND, teacher_id="t")
            await ledger.settle(order, [(f"{name}{i}", 0, reply())], BILL, 0.0)

    threads = [threading.Thread(target=lambda n=name: asyncio.run(some(n))) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.spent().requests == len(ledger.find([f"{n}{i}" for n in "abc" for i in range(20)])) == 60
    ledger.close()


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    for attempt in range(10):
        start, opened = threading.Barrier(8), []

        def work(start: threading.Barrier = start, opened: list[Ledger] = opened, attempt: int = attempt) -> None:
            start.wait()
            opened.append(Ledger(tmp_path / f"{attempt}.sqlite"))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [ledger.spent() for ledger in opened] == [Usage()] * 8
        for ledger in opened:
            ledger.close()


def test_a_key_is_claimed_once_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"

    async def go() -> None:
        here, there = Ledger(path), Ledger(path)
        assert (await here.claim(["a", "b"])).granted == {"a", "b"}
        assert (await there.claim(["b", "c"])).granted == {"c"}
        assert (await here.claim(["a"])).granted == frozenset()
        here.release(["a"])
        here.add("t", [("a", 0, reply())], BILL, 0.0)
        claimed = await there.claim(["a", "b"])
        assert (claimed.granted, claimed.found) == ({"a"}, {"a": {0: reply().continuation}})
        here.close()
        assert (await there.claim(["b"])).granted == {"b"}
        there.close()

    asyncio.run(go())


def test_a_cancelled_wait_leaves_neither_order_nor_claim_but_a_settled_bill() -> None:
    async def go() -> None:
        ledger = Ledger(":memory:")
        settled = await ledger.order(BOUND, teacher_id="t")
        waits = [
            asyncio.ensure_future(ledger.claim(["k"])),
            asyncio.ensure_future(ledger.order(BOUND, teacher_id="t", budget=Budget(calls=9))),
            asyncio.ensure_future(ledger.settle(settled, [("s", 0, reply())], BILL, 0.0)),
        ]
        await asyncio.sleep(0)
        for wait in waits:
            wait.cancel()
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*waits, return_exceptions=True))
        assert (await ledger.claim(["k", "s"])).granted == {"k", "s"}
        assert (ledger.in_flight(), ledger.spent(), list(ledger.find(["s"]))) == ([], BILL, ["s"])
        ledger.close()

    asyncio.run(go())


HOLDER = """
import asyncio, sys
from omniopd.teachers.base import Bound
from omniopd.teachers.budget import Budget
from omniopd.teachers.ledger import Ledger
async def go():
    ledger = Ledger(sys.argv[1])
    await ledger.claim(["k"])
    await ledger.order(Bound(tokens=20, usd=1.0), teacher_id="t", budget=Budget(calls=9))
    print("ready", flush=True)
    await asyncio.sleep(60)
asyncio.run(go())
"""


def test_a_killed_process_frees_its_claims_and_its_orders_become_possible_cost_once(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"

    async def go() -> None:
        ledger = Ledger(path)
        assert (await ledger.claim(["k"])).granted == frozenset()
        assert len(live_owners(path)) == 2
        with pytest.raises(TeacherBudgetError, match=r"spent 0\.0000, possibly spent 0\.0000, under way 1\.0000"):
            await ledger.order(BOUND, teacher_id="t", budget=Budget(usd=1.5), max_wait_s=0)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert [order.is_alive for order in ledger.in_flight()] == [False]
        assert (ledger.possible(), ledger.spent()) == ((1.0, 20), Usage())
        assert (await ledger.claim(["k"])).granted == {"k"}
        assert (ledger.possible(), ledger.spent(), ledger.in_flight()) == ((1.0, 20), LOST, [])
        ledger.close()
        other = Ledger(path)
        await other.claim(["k"])
        assert other.spent() == LOST
        other.close()

    asyncio.run(go())
    if holder.stdout:
        holder.stdout.close()
    assert not owners_folder(path).exists()


def test_a_lock_file_that_nobody_holds_is_a_dead_owners(tmp_path: Path) -> None:
    folder = owners_folder(tmp_path / "l.sqlite")
    folder.mkdir()
    (folder / "dead").touch()
    assert not is_alive(folder, "dead")
    assert live_owners(tmp_path / "l.sqlite") == ()
    assert not folder.exists()
    folder.mkdir()
    (folder / "dead").touch()
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add("t", [], BILL, 0.0)
    assert len(list(folder.iterdir())) == 1
    ledger.close()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget(usd=1.9),
            r"1\.9000 USD .*spent 0\.5000, possibly spent 1\.0000, under way 0\.0000, this may cost 1\.0",
        ),
        (Budget(tokens=54), r"54 tokens .*spent 15, possibly spent 20, under way 0, this may cost 20; .*budget_tokens"),
        (Budget(calls=2), r"2 calls .*spent 2, possibly spent 0, under way 0, this may cost 1; .*budget_calls"),
    ],
)
def test_a_budget_in_each_unit_says_where_it_stands(budget: Budget, message: str) -> None:
    async def go() -> None:
        ledger = Ledger(":memory:")
        for usage in (BILL, LOST):
            await ledger.settle(await ledger.order(BOUND, teacher_id="t"), [], usage, 0.0)
        with pytest.raises(TeacherBudgetError, match=message + r".*--resume"):
            await ledger.order(BOUND, teacher_id="t", budget=budget)
        # 0.5 + 1 + 1 USD, 15 + 20 + 20 tokens, 1 + 1 + 1 calls: just covered.
        await ledger.order(BOUND, teacher_id="t", budget=Budget(usd=2.5, tokens=55, calls=3))
        ledger.close()

    asyncio.run(go())


def test_an_order_waits_for_others_to_turn_out_cheaper_but_not_for_ever() -> None:
    async def go() -> None:
        ledger = Ledger(":memory:")
        first = await ledger.order(BOUND, teacher_id="t", budget=Budget(usd=1.5))
        second = asyncio.ensure_future(ledger.order(BOUND, teacher_id="t", budget=Budget(usd=1.5)))
        with pytest.raises(TeacherBudgetError, match=r"under way 1\.0000"):
            await ledger.order(BOUND, teacher_id="t", budget=Budget(usd=1.5), max_wait_s=0.02)
        assert not second.done()
        await ledger.settle(first, [], BILL, 0.0)
        await second
        ledger.close()

    asyncio.run(go())


def test_a_budget_in_usd_needs_known_prices() -> None:
    async def go() -> None:
        ledger = Ledger(":memory:")
        with pytest.raises(ConfigError, match="its price is unknown"):
            await ledger.order(Bound(tokens=1), teacher_id="t", budget=Budget(usd=1.0))
        await ledger.order(Bound(tokens=1), teacher_id="t", budget=Budget(tokens=1))
        with pytest.raises(ConfigError, match="calls of unknown cost"):
            await ledger.order(BOUND, teacher_id="t", budget=Budget(usd=10.0))
        ledger.close()

    asyncio.run(go())
    with pytest.raises(ConfigError, match="budget_tokens is -1"):
        Budget(tokens=-1)


@given(
    limit=st.integers(0, 60),
    amounts=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    may_wait=st.booleans(),
)
def test_a_budget_covers_exactly_what_fits(limit: int, amounts: list[int], may_wait: bool) -> None:
    spent, possible, under_way, this = amounts
    funds = Funds(spent=Amount(spent), possible=Amount(possible), under_way=Amount(under_way))
    bound = Bound(tokens=0, usd=float(this))
    if spent + possible + under_way + this <= limit:
        assert Budget(usd=limit).covers(bound, funds, "t", may_wait=may_wait)
    elif may_wait and spent + possible + this <= limit:
        assert not Budget(usd=limit).covers(bound, funds, "t", may_wait=True)
    else:
        with pytest.raises(TeacherBudgetError):
            Budget(usd=limit).covers(bound, funds, "t", may_wait=may_wait)


@settings(max_examples=20, deadline=None)
@given(
    limit=st.integers(1, 30),
    bills=st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1), st.booleans()), max_size=15),
    seed=st.integers(0, 99),
)
def test_two_ledgers_on_a_file_never_overrun_a_budget_together(
    limit: int, bills: list[tuple[int, float, bool]], seed: int
) -> None:
    """Each bill: its bound, the share of it that it costs, and whether it is answered."""
    draw = random.Random(seed)

    async def buy(ledger: Ledger, bound: int, share: float, is_answered: bool) -> float:
        try:
            order = await ledger.order(
                Bound(tokens=1, usd=float(bound)), teacher_id="t", budget=Budget(usd=limit), max_wait_s=0.01
            )
        except TeacherBudgetError:
            return 0.0
        await asyncio.sleep(draw.uniform(0, 0.003))
        cost = bound * share
        usage = Usage(requests=1, cost_usd=cost) if is_answered else LOST
        await ledger.settle(order, [], usage, 0.0)
        return cost if is_answered else bound

    async def go(path: Path) -> None:
        ledgers = [Ledger(path), Ledger(path)]
        costs = await asyncio.gather(*(buy(ledgers[i % 2], *bill) for i, bill in enumerate(bills)))
        possible, _ = ledgers[0].possible()
        assert sum(costs) <= limit + 1e-6
        assert (ledgers[0].spent().cost_usd or 0.0) + (possible or 0.0) == pytest.approx(sum(costs))
        for ledger in ledgers:
            ledger.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(go(Path(folder) / "l.sqlite"))


SPENDER = """
import asyncio, sys
from omniopd.errors import TeacherBudgetError
from omniopd.teachers.base import Bound
from omniopd.teachers.budget import Budget
from omniopd.teachers.ledger import Ledger
from omniopd.types import Usage
async def one(ledger):
    try:
        order = await ledger.order(Bound(tokens=1, usd=1.0), teacher_id="t", budget=Budget(usd=20.0, calls=35))
    except TeacherBudgetError:
        return 0
    await asyncio.sleep(0.002)
    await ledger.settle(order, [], Usage(requests=1, cost_usd=0.5), 0.0)
    return 1
async def go():
    ledger = Ledger(sys.argv[1])
    print(sum(await asyncio.gather(*(one(ledger) for _ in range(40)))))
    ledger.close()
asyncio.run(go())
"""


def test_two_processes_spend_a_budget_to_its_end_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    spenders = [
        subprocess.Popen([sys.executable, "-c", SPENDER, str(path)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    counts = [int(spender.communicate(timeout=60)[0]) for spender in spenders]
    ledger = Ledger(path)
    # 80 want 0.5 USD each; 35 calls are the tighter limit, for which all 20 USD need not be reserved at once.
    assert sum(counts) == ledger.spent().requests == 35
    assert ledger.spent().cost_usd == 17.5
    ledger.close()


VERSION_1 = """
CREATE TABLE calls (id INTEGER PRIMARY KEY, time REAL NOT NULL, seconds REAL NOT NULL, teacher TEXT NOT NULL,
    requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost_usd REAL);
CREATE TABLE samples (key TEXT NOT NULL, sample INTEGER NOT NULL, call INTEGER NOT NULL REFERENCES calls (id),
    raw TEXT NOT NULL, continuation TEXT NOT NULL, PRIMARY KEY (key, sample)) WITHOUT ROWID;
INSERT INTO calls VALUES (1, 0, 0, 't', 1, 10, 5, 0.5);
INSERT INTO samples VALUES ('k', 0, 1, 'raw', '{"text": "old", "finish_reason": null, "missing": null, "detail": ""}');
PRAGMA user_version=1;
"""


def test_a_file_of_version_1_keeps_its_bills_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    db = sqlite3.connect(path)
    db.executescript(VERSION_1)
    db.close()
    ledger = Ledger(path)
    assert ledger.spent() == Usage(requests=1, input_tokens=10, output_tokens=5, cost_usd=0.5)
    assert ledger.possible() == (0.0, 0)
    assert ledger.find(["k"]) == {"k": {0: Continuation(text="old")}}
    ledger.add("t", [("k", 1, reply("new"))], BILL, 0.0)
    assert len(ledger.find(["k"])["k"]) == 2
    ledger.close()


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for the head of one, says sqlite" * 20)
    with pytest.raises(RunError, match=r"cannot open the ledger .*notes\.txt"):
        Ledger(path)
    newer = tmp_path / "newer.sqlite"
    db = sqlite3.connect(newer)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(RunError, match="has version 99"):
        Ledger(newer)


def test_a_failed_write_reaches_its_waiter_alone_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    db = sqlite3.connect(path)
    db.execute(
        "CREATE TRIGGER full BEFORE INSERT ON samples WHEN NEW.key = 'bad' BEGIN SELECT RAISE(FAIL, 'full'); END"
    )
    db.commit()
    db.close()

    async def go() -> list[object]:
        orders = [await ledger.order(BOUND, teacher_id="t") for _ in range(3)]
        keys = ("good", "bad", "fine")
        settles = [ledger.settle(o, [(k, 0, reply(k))], BILL, 0.0) for o, k in zip(orders, keys, strict=True)]
        return list(await asyncio.gather(*settles, return_exceptions=True))

    results = asyncio.run(go())
    assert [type(r) for r in results] == [type(None), RunError, type(None)]
    assert "cannot write to the ledger" in str(results[1])
    assert "free the disk, then --resume" in str(results[1])
    assert ledger.spent() == BILL + BILL
    assert list(ledger.find(["bad", "good", "fine"])) == ["fine", "good"]
    assert len(ledger.in_flight()) == 1
    ledger.close()
    # Nobody will settle it any more.
    assert (ledger.spent(), ledger.possible()) == (BILL + BILL + LOST, (1.0, 20))
    ledger.close()


def test_reading_a_broken_file_is_an_error_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    db = sqlite3.connect(path)
    db.executescript("DROP TABLE samples; DROP TABLE calls;")
    db.close()
    for read in (lambda: ledger.find(["k"]), ledger.spent, ledger.possible):
        with pytest.raises(RunError, match="cannot read the ledger"):
            read()
    ledger.close()


def test_a_place_that_cannot_be_written_is_an_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot open the ledger"):
        Ledger(tmp_path / "file" / "l.sqlite")
    ledger = Ledger(tmp_path / "l.sqlite")
    owners_folder(tmp_path / "l.sqlite").touch()
    with pytest.raises(RunError, match="cannot lock the ledger"):
        ledger.add("t", [], BILL, 0.0)
    ledger.close()


WRITER = """
import asyncio, itertools, os, random, sys
from omniopd.teachers.base import Bound, Reply
from omniopd.teachers.budget import Budget
from omniopd.teachers.ledger import Ledger
from omniopd.types import Continuation, Usage
def say(what, key):
    os.write(1, f"{what} {key}\\n".encode())  # At once: nothing is torn by a kill.
async def one(ledger, number):
    key = f"{sys.argv[2]}.{number}"
    await ledger.claim([key])
    order = await ledger.order(Bound(tokens=20, usd=1.0), teacher_id="t", budget=Budget(calls=10**6))
    say("sent", key)
    await asyncio.sleep(random.uniform(0.0, 0.01))
    say("answered", key)
    reply = Reply(position=0, sample=0, raw="x", continuation=Continuation(text=key))
    bill = Usage(requests=1, input_tokens=10, cost_usd=0.5)
    await ledger.settle(order, [(key, 0, reply)], bill, 0.0)
    say("safe", key)
    ledger.release([key])
async def go():
    ledger = Ledger(sys.argv[1])
    for i in itertools.count():
        await asyncio.gather(*(one(ledger, 8 * i + j) for j in range(8)))
asyncio.run(go())
"""


def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, draw = tmp_path / "l.sqlite", random.Random(5)
    log = tmp_path / "log"
    for life in range(15):
        with log.open("ab") as out:
            writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(life)], stdout=out)
            before = log.stat().st_size
            while log.stat().st_size == before and writer.poll() is None:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.06))
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
    events: dict[str, set[str]] = {"sent": set(), "answered": set(), "safe": set()}
    for line in log.read_text().splitlines():
        what, key = line.split()
        events[what].add(key)
    ledger = Ledger(path)
    asyncio.run(ledger.claim(["wake up"]))
    stored = set(ledger.find(sorted(events["sent"])))
    assert len(events["safe"]) > 100
    assert events["safe"] <= stored <= events["answered"]
    spent = ledger.spent()
    assert spent.requests - spent.unanswered_requests == len(stored)
    # Whatever was sent and is not stored is possibly spent; so is what was reserved and not yet sent: 8 each life.
    assert len(events["sent"] - stored) <= spent.unanswered_requests <= 15 * 8
    assert ledger.possible() == (float(spent.unanswered_requests), 20 * spent.unanswered_requests)
    assert ledger.in_flight() == []
    ledger.close()
    assert not owners_folder(path).exists()


def test_only_what_a_teacher_says_of_itself_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.remember_teacher("t", {"b": 1, "a": [2]}, reads_token_ids=True)
    ledger.remember_teacher("t", {"a": [2], "b": 1}, reads_token_ids=True)
    ledger.close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT * FROM teachers").fetchall() == [("t", json.dumps({"a": [2], "b": 1}), 1)]
    db.close()


def test_a_database_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(RunError, match="no ledger"):
        Ledger(path)
    assert path.read_bytes() == before
