"""Recorded answers, and nothing else."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from omniopd.errors import ConfigError, RunError
from omniopd.teachers import ledger_schema
from omniopd.teachers.base import ContinuationRequest, RecordedTeacher, TeacherAnswer
from omniopd.teachers.budget import Budget
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.ledgered import Ledgered
from omniopd.teachers.replay import ReplayTeacher
from omniopd.types import Missing, Usage
from scripted_teacher import ScriptedTeacher, ask, sold, texts


def record(folder: Path, requests: Sequence[ContinuationRequest], **teacher: object) -> list[TeacherAnswer]:
    scripted = ScriptedTeacher(folder / "sold", **teacher)  # type: ignore[arg-type]
    return run(Ledgered(scripted, Ledger(folder / "l.sqlite")), requests)


def run(teacher: Ledgered | ReplayTeacher, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
    async def go() -> list[TeacherAnswer]:
        try:
            return await teacher.continuations(requests)
        finally:
            await teacher.aclose()

    return asyncio.run(go())


def test_a_replay_gives_the_recorded_answers_and_counts_what_is_missing(tmp_path: Path) -> None:
    recorded = record(tmp_path, [ask("a", n=2, seed=3), ask("b")])
    record(tmp_path, [ask("a", n=3, seed=3)])
    before = (tmp_path / "l.sqlite").read_bytes()
    replay = ReplayTeacher(tmp_path / "l.sqlite")
    assert isinstance(replay, RecordedTeacher)
    assert (replay.id, replay.fingerprint, replay.exact_samples) == ("scripted:m", {"temperature": 1.0}, True)
    assert replay.source == f"replay:{tmp_path / 'l.sqlite'}"
    a, b, other, more = run(replay, [ask("a", n=2, seed=3), ask("b"), ask("c", n=2), ask("a", n=4, seed=3)])
    assert (a.continuations, b.continuations) == tuple(r.continuations for r in recorded)
    assert a.usage == Usage(cached_requests=1, cost_usd=0.0)
    assert {c.missing for c in other.continuations} == {Missing.FAILED}
    assert "no recorded answer of scripted:m in" in other.continuations[0].detail
    # The third sample was bought later; the fourth nobody ever bought.
    assert texts(more) == [" a/3/0", " a/3/1", " a/3/2", None]
    assert replay.misses == 3
    assert (tmp_path / "l.sqlite").read_bytes() == before


def test_a_replay_can_be_recorded_anew_at_no_cost(tmp_path: Path) -> None:
    (recorded,) = record(tmp_path, [ask("a", n=2)])
    copy = tmp_path / "copy.sqlite"
    (answer,) = run(
        Ledgered(ReplayTeacher(tmp_path / "l.sqlite"), Ledger(copy), budget=Budget(calls=1)), [ask("a", n=2)]
    )
    assert answer.continuations == recorded.continuations
    (tmp_path / "l.sqlite").unlink()
    run(ReplayTeacher(copy), [ask("a", n=2)])
    ledger = Ledger(copy)
    assert (ledger.spent().requests, ledger.spent().cost_usd, ledger.possible()) == (0, 0.0, (0.0, 0))
    ledger.close()
    assert len(sold(tmp_path / "sold")) == 2


def test_token_ids_are_part_of_a_request_for_teachers_that_read_them(tmp_path: Path) -> None:
    drawn = replace(ask("a"), token_ids=(1, 2))
    record(tmp_path, [drawn], reads_token_ids=True)
    replay = ReplayTeacher(tmp_path / "l.sqlite")
    assert replay.reads_token_ids
    hit, miss = run(replay, [drawn, replace(drawn, token_ids=(1, 3))])
    assert (texts(hit), texts(miss)) == ([" a/None/0"], [None])


def test_a_ledger_of_several_teachers_needs_a_name(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    for temperature in (0.5, 1.0):
        record(tmp_path, [ask(str(temperature))], fingerprint={"temperature": temperature})
    with pytest.raises(ConfigError, match="holds answers of several teachers; write replay:") as caught:
        ReplayTeacher(path, teacher_id="scripted:m")
    names = [line.split()[0] for line in str(caught.value).splitlines()[1:]]
    found = [run(ReplayTeacher(path, teacher_id=name), [ask("0.5")])[0].continuations[0].text for name in names]
    assert sorted(found, key=str) == [" 0.5/None/0", None]
    with pytest.raises(ConfigError, match="no answers of 'other:m'"):
        ReplayTeacher(path, teacher_id="other:m")


def test_what_cannot_be_replayed_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no ledger"):
        ReplayTeacher(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 20)
    with pytest.raises(RunError, match="is it a ledger"):
        ReplayTeacher(tmp_path / "text")
    Ledger(tmp_path / "empty.sqlite").close()
    with pytest.raises(ConfigError, match="names no teacher"):
        ReplayTeacher(tmp_path / "empty.sqlite")
    db = sqlite3.connect(tmp_path / "old.sqlite")
    db.execute("PRAGMA user_version=1")
    db.close()
    with pytest.raises(RunError, match="has version 1, expected 2; `omniopd cache stats"):
        ReplayTeacher(tmp_path / "old.sqlite")


def test_a_file_in_a_folder_that_cannot_be_written_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, [ask("a")])
    peek = ledger_schema._peek

    def refuse_shared(uri: str, path: str) -> tuple[sqlite3.Connection, int]:
        # What SQLite does where it cannot create its shared memory; root may write everywhere.
        if "immutable" not in uri:
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        return peek(uri, path)

    monkeypatch.setattr(ledger_schema, "_peek", refuse_shared)
    assert texts(run(ReplayTeacher(tmp_path / "l.sqlite"), [ask("a")])[0]) == [" a/None/0"]
    (tmp_path / "l.sqlite-wal").write_bytes(b"the last answers")
    with pytest.raises(RunError, match=r"its last answers are in l\.sqlite-wal"):
        ReplayTeacher(tmp_path / "l.sqlite")
