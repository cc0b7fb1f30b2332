"""Looking into a ledger, clearing it and writing it out."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from pathlib import Path

import pytest

from omniopd.errors import ConfigError, RunError
from omniopd.teachers import cache
from omniopd.teachers.base import Bound, Reply
from omniopd.teachers.cache import TeacherStats
from omniopd.teachers.ledger import Ledger
from omniopd.types import Continuation, Missing, Usage

BILL = Usage(requests=1, input_tokens=10, output_tokens=5, cost_usd=0.5)


def reply(text: str | None = "x" * 5000) -> Reply:
    missing = Missing.REFUSED if text is None else None
    return Reply(position=0, sample=0, raw=f"raw {text}", continuation=Continuation(text=text, missing=missing))


def fill(path: Path) -> None:
    """a: two samples on one bill; b: one refused; c: one of another teacher, of unknown price, paid ten days ago."""
    ledger = Ledger(path)
    ledger.add("t", [("a", 0, reply()), ("a", 1, reply())], BILL, 0.25)
    ledger.add("t", [("b", 0, reply(None))], BILL, 0.25)
    ledger.add("other", [("c", 0, reply())], Usage(requests=1, input_tokens=1), 0.5)
    ledger.close()
    db = sqlite3.connect(path)
    db.execute("UPDATE calls SET time = time - 10 * 86400 WHERE teacher = 'other'")
    db.commit()
    db.close()


def keys(path: Path) -> list[str]:
    ledger = Ledger(path)
    found = sorted(ledger.find(["a", "b", "c"]))
    ledger.close()
    return found


def test_stats_sum_up_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    fill(path)
    stats = cache.stats(path)
    assert (stats.keys, stats.samples, stats.calls, stats.in_flight) == (3, 4, 3, 0)
    assert stats.by_reason == (("usable", 3), ("refused", 1))
    assert stats.teachers == (
        TeacherStats(teacher="other", samples=1, calls=1, cost_usd=None),
        TeacherStats(teacher="t", samples=3, calls=2, cost_usd=1.0),
    )
    assert stats.spent == Usage(requests=3, input_tokens=21, output_tokens=10)
    assert (stats.possible_usd, stats.possible_tokens) == (None, 0)
    assert stats.size_bytes == path.stat().st_size
    assert stats.oldest is not None and stats.newest is not None
    assert stats.newest - stats.oldest == pytest.approx(10 * 86400, abs=60)
    assert cache.Stats.from_json(json.loads(json.dumps(stats.to_json()))).spent == stats.spent


def test_stats_count_what_is_under_way(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    asyncio.run(ledger.order(Bound(tokens=1), teacher_id="t"))
    stats = cache.stats(tmp_path / "l.sqlite")
    assert (stats.in_flight, stats.calls, stats.oldest) == (1, 0, None)
    ledger.close()


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        ({}, ["a", "b", "c"]),
        ({"older_than_days": 9}, ["a", "b"]),
        ({"older_than_days": 11}, ["a", "b", "c"]),
        ({"teacher": "t"}, ["c"]),
        ({"unusable": True}, ["a", "c"]),
        ({"unusable": True, "teacher": "other"}, ["a", "b", "c"]),
        ({"older_than_days": 0}, []),
    ],
)
def test_gc_deletes_samples_that_fit_all_conditions_and_no_bill(
    tmp_path: Path, conditions: dict[str, object], left: list[str]
) -> None:
    path = tmp_path / "l.sqlite"
    fill(path)
    deleted = {"a": 2, "b": 1, "c": 1}
    count = sum(deleted[key] for key in deleted.keys() - set(left))
    dry = cache.gc(path, dry_run=True, **conditions)  # type: ignore[arg-type]
    assert (dry.samples, dry.kept, dry.freed_bytes, keys(path)) == (count, 4 - count, 0, ["a", "b", "c"])
    cleared = cache.gc(path, **conditions)  # type: ignore[arg-type]
    assert (cleared.samples, cleared.kept, keys(path)) == (count, 4 - count, left)
    # The refused one is too small to free a page.
    assert (cleared.freed_bytes > 0) == bool({"a", "c"} - set(left))
    assert cache.stats(path).calls == 3


def test_gc_waits_for_nobody(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    fill(path)
    ledger = Ledger(path)
    asyncio.run(ledger.claim(["k"]))
    with pytest.raises(RunError, match=r"1 process\(es\) have the ledger"):
        cache.gc(path, teacher="t")
    assert cache.gc(path, teacher="t", dry_run=True).samples == 3
    ledger.close()
    assert cache.gc(path, teacher="t").samples == 3


def test_gc_names_what_it_cannot_use(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    fill(path)
    with pytest.raises(ConfigError, match="holds nothing of 'x'; it has other, t"):
        cache.gc(path, teacher="x")
    with pytest.raises(ConfigError, match="older_than_days is -1"):
        cache.gc(path, older_than_days=-1)
    text = tmp_path / "text"
    text.write_text("no database, but long enough to be taken for one" * 20)
    with pytest.raises(RunError, match="cannot clear the ledger"):
        cache.gc(text)
    for look in (cache.stats, cache.gc, lambda p: cache.export(p, tmp_path / "out")):
        with pytest.raises(RunError, match="there is no ledger"):
            look(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_export_writes_a_line_for_each_sample_with_its_bill(tmp_path: Path) -> None:
    path, out = tmp_path / "l.sqlite", tmp_path / "new" / "out.jsonl"
    fill(path)
    exported = cache.export(path, out)
    assert (exported.samples, exported.calls, exported.path) == (4, 3, str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["key"], line["sample"], line["teacher"], line["call"]) for line in lines] == [
        *[("a", 0, "t", 1), ("a", 1, "t", 1), ("b", 0, "t", 2), ("c", 0, "other", 3)]
    ]
    assert lines[0]["time"] == pytest.approx(time.time(), abs=60)
    assert (lines[0]["seconds"], lines[2]["raw"], lines[2]["continuation"]["missing"]) == (0.25, "raw None", "refused")
    assert lines[0]["bill"] == {
        **{"requests": 1, "input_tokens": 10, "output_tokens": 5, "cost_usd": 0.5},
        **{"cached_input_tokens": 0, "cache_write_tokens": 0, "reasoning_tokens": 0},
    }
    assert lines[3]["bill"]["cost_usd"] is None
    assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    fill(path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        cache.export(path, tmp_path / "file" / "out.jsonl")
