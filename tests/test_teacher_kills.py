"""A scoring job that is killed and started again ends as if nothing had happened, and pays for what was under way.

The large version is `benchmarks/teacher_kills.py`.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from teacher_server import TeacherServer
from teacher_server.kills import CONCURRENCY, N, kill_and_restart, open_orders


def test_a_killed_job_goes_on_where_it_was(tmp_path: Path) -> None:
    with TeacherServer(latency_s=0.03) as server:
        found = kill_and_restart(tmp_path, server.port, rows=40, kills=4, seed=3, in_start_up=1)
    assert not found.errors, (found.errors, found.figures, found.kills)
    figures = found.figures
    assert figures["output_equal_byte_for_byte"]
    assert figures["kills"] == 4
    # 40 rows of 4 chunks: 27 words in chunks of 8.
    assert figures["unique_requests"] == 160
    assert figures["samples_in_ledger"] == 160 * N
    assert figures["requests_billed_beyond_the_unique"] <= figures["open_orders_at_kills"]
    assert figures["open_orders_at_kills"] <= 4 * (2 * CONCURRENCY)
    assert max(kill.open_orders for kill in found.kills) > 0, "no kill met a request under way"


def test_a_ledger_that_is_not_there_yet_has_no_open_orders(tmp_path: Path) -> None:
    assert open_orders(tmp_path / "none.sqlite") == set()
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    assert open_orders(tmp_path / "empty.sqlite") == set()
