from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest

from omniopd.concurrency import LoopThread, in_order

Jobs = list[Callable[[], Coroutine[Any, Any, int]]]


async def _collect(jobs: Jobs, *, most_running: int = 4, most_ahead: int = 100) -> tuple[list[list[int]], str]:
    groups: list[list[int]] = []
    try:
        async for group in in_order(jobs, most_running=most_running, most_ahead=most_ahead):
            groups.append(group)
    except ValueError as error:
        return groups, str(error)
    return groups, ""


def test_results_come_in_order_and_a_slow_job_delays_no_work() -> None:
    others_done = asyncio.Event()
    left = 30

    async def job(number: int) -> int:
        nonlocal left
        if number == 1:
            # Only when everything after it is finished.
            await asyncio.wait_for(others_done.wait(), 10)
        elif number > 1:
            left -= 1
            if left == 0:
                others_done.set()
        return number

    groups, _ = asyncio.run(_collect([partial(job, i) for i in range(32)], most_running=3))
    assert [n for group in groups for n in group] == list(range(32))
    assert len(groups) <= 2  # the slow one came together with all that waited behind it


def test_no_more_run_and_no_more_wait_than_allowed() -> None:
    running = peak = started = 0
    release = asyncio.Event()

    async def job(number: int) -> int:
        nonlocal running, peak, started
        started += 1
        running += 1
        peak = max(peak, running)
        await (release.wait() if number == 0 else asyncio.sleep(0))
        running -= 1
        return number

    async def run() -> list[int]:
        jobs = [partial(job, i) for i in range(50)]
        async with aclosing(in_order(jobs, most_running=3, most_ahead=10)) as groups:
            first = asyncio.ensure_future(anext(groups))
            await asyncio.sleep(0.05)
            assert started == 10  # the head of the line holds up the eleventh
            release.set()
            numbers = await first
            return numbers + [n async for group in groups for n in group]

    assert asyncio.run(run()) == list(range(50))
    assert peak == 3


def test_after_a_failure_nothing_starts_what_runs_may_end_and_what_came_before_is_given() -> None:
    ended: list[int] = []

    async def job(number: int) -> int:
        await asyncio.sleep(0.05 if number == 0 else 0)
        if number == 2:
            raise ValueError("job 2")
        await asyncio.sleep(0.1 if number == 3 else 0)
        ended.append(number)
        return number

    groups, error = asyncio.run(_collect([partial(job, i) for i in range(40)], most_running=4))
    assert ([n for group in groups for n in group], error) == ([0, 1], "job 2")
    assert sorted(ended) == [0, 1, 3]


def test_closing_cancels_what_runs_and_waits_for_it() -> None:
    cleaned: list[int] = []

    async def job(number: int) -> int:
        if number == 0:
            return number
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(number)
        return number

    async def run() -> None:
        async with aclosing(in_order([partial(job, i) for i in range(9)], most_running=4, most_ahead=9)) as groups:
            assert await anext(groups) == [0]

    asyncio.run(run())
    # One that was started last may not have begun.
    assert set(cleaned) <= {1, 2, 3, 4}
    assert {1, 2, 3} <= set(cleaned)


def test_an_interrupted_caller_leaves_when_the_work_has_put_its_things_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = LoopThread("test-loop")
    begun, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            cleaned.set()

    def interrupt(self: object) -> None:
        assert begun.wait(5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("omniopd.concurrency.Future.result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            thread.run(work())
    assert cleaned.is_set()
    thread.stop()
    assert not any(t.name == "test-loop" for t in threading.enumerate())


def test_a_result_and_an_error_come_back_from_the_thread() -> None:
    thread = LoopThread("test-loop")

    async def work(number: int) -> int:
        return 10 // number

    assert thread.run(work(5)) == 2
    assert thread.submit(work(2)).result(5) == 5
    with pytest.raises(ZeroDivisionError):
        thread.run(work(0))
    thread.stop()
