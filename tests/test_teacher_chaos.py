"""A bad day at six teachers behind five dialects: every continuation accounted for, every cent, every request.

The large version is `benchmarks/teacher_chaos.py`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.types import Continuation, Message, Missing
from teacher_server import TeacherServer, expected_continuation
from teacher_server.audit import FAULTS, Client, ask_all, audit, make_clients, most_in_window

REQUESTS = 600
RATE = 3200
WINDOW_S = 4.0
# A client may send 10 s worth of its rate at once and then goes on at the rate: in 4 s at most (10 + 4) s worth of it.
# With a second more, as requests do not travel equally fast, the server allows 15 s worth in 4 s, 3.75 times the rate.
SERVER_FACTOR = 3.75


def test_nothing_is_lost_paid_twice_or_unexplained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, ledger = make_clients(REQUESTS, requests_per_minute=RATE), tmp_path / "ledger.sqlite"
    assert sum(client.requests for client in clients) == REQUESTS
    for client in clients:
        monkeypatch.setenv(client.key_variable, "test-key")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                TeacherServer(
                    latency_s=0.01,
                    faults=client.faults,
                    repeats="fresh",
                    requests_per_minute=int(client.requests_per_minute * SERVER_FACTOR),
                    window_s=WINDOW_S,
                )
            )
            for client in clients
        ]
        urls = [server.base_url(client.dialect) for client, server in zip(clients, servers, strict=True)]

        def ask() -> list[list[TeacherAnswer]]:
            return asyncio.run(asyncio.wait_for(ask_all(clients, urls, ledger=ledger, timeout_s=1.0), 60))

        answers = ask()
        decisions: Counter[str] = Counter()
        for client, server, own in zip(clients, servers, answers, strict=True):
            found = audit(client, own, [asdict(entry) for entry in server.log.entries], ledger)
            assert not found.errors, (client.spec, found.errors)
            assert server.log.violations == 0
            assert not client.has_own_bodies or server.log.early_retries == 0
            decisions.update(found.figures["decisions"])
        assert set(FAULTS) <= set(decisions), "some faults never happened"
        _check_second_pass(answers, ask(), servers)


def _check_second_pass(
    first: list[list[TeacherAnswer]], second: list[list[TeacherAnswer]], servers: list[TeacherServer]
) -> None:
    """What was answered comes from the ledger, what failed is asked again."""
    pairs = [
        pair
        for own, again in zip(first, second, strict=True)
        for one, other in zip(own, again, strict=True)
        for pair in zip(one.continuations, other.continuations, strict=True)
    ]
    failed = [one for one, _ in pairs if one.missing in (Missing.FAILED, Missing.TIMEOUT)]
    assert all(one == other for one, other in pairs if one not in failed)
    assert len(failed) < len(pairs) // 50
    answered = sum(answer.usage.requests > 0 for own in second for answer in own)
    assert answered <= len(failed)


def _small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Client, list[TeacherAnswer], list[dict[str, Any]], Path]:
    client = make_clients(50, requests_per_minute=60_000)[0]
    client, ledger = replace(client, requests=8), tmp_path / "ledger.sqlite"
    monkeypatch.setenv(client.key_variable, "test-key")
    with TeacherServer(repeats="fresh", faults={"truncated": 0.2, "refusal": 0.2}) as server:
        url = server.base_url(client.dialect)
        (answers,) = asyncio.run(ask_all([client], [url], ledger=ledger, timeout_s=5.0))
        entries = [asdict(entry) for entry in server.log.entries]
    assert not audit(client, answers, entries, ledger).errors
    return client, answers, entries, ledger


def test_the_audit_sees_a_choice_used_twice_and_one_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, answers, entries, ledger = _small(tmp_path, monkeypatch)
    at = next(i for i, answer in enumerate(answers) if answer.continuations[0].text is not None)
    first, _, *rest = answers[at].continuations
    answers[at] = replace(answers[at], continuations=(first, first, *rest))
    errors = audit(client, answers, entries, ledger).errors
    assert any("never sent" in error for error in errors)
    answers[at] = replace(answers[at], continuations=(first, *rest))
    errors = audit(client, answers, entries, ledger).errors
    assert any("3 continuations" in error for error in errors)
    assert any("billed and not used" in error for error in errors)


def test_the_audit_sees_a_failure_without_a_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, answers, entries, ledger = _small(tmp_path, monkeypatch)
    made_up = Continuation(text=None, missing=Missing.TIMEOUT, detail="no answer within 5 s (5 attempts)")
    answers[0] = replace(answers[0], continuations=(made_up, *answers[0].continuations[1:]))
    assert any("no answer within" in error for error in audit(client, answers, entries, ledger).errors)


def test_the_audit_sees_a_bill_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, answers, entries, ledger = _small(tmp_path, monkeypatch)
    with closing(sqlite3.connect(ledger)) as db, db:
        db.execute("UPDATE calls SET cost_usd = cost_usd + 1e-6 WHERE id = 1")
    (error,) = audit(client, answers, entries, ledger).errors
    assert "USD in the ledger" in error
    extra = {**entries[0], "number": len(entries)}
    assert any("the server" in error for error in audit(client, answers, [*entries, extra], ledger).errors)


def test_the_busiest_window_is_counted() -> None:
    # Half open: what is exactly 60 s old has left.
    assert most_in_window([0.0, 1.0, 59.9, 60.0, 61.0], 60.0) == 3
    assert most_in_window([], 60.0) == 0


def test_numbered_choices_differ() -> None:
    """Else a choice that is used twice could not be told from two."""
    request = ContinuationRequest(messages=(Message(role="user", content="q"),), prefix="First", n=1, max_tokens=24)
    texts = {expected_continuation(request.messages, request.prefix, i, 24) for i in range(8)}
    assert len(texts) == 8
