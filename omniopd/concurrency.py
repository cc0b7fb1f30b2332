"""Many jobs at a time with their results in order, and an event loop for callers that have none. Knows no teacher."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar, cast

R = TypeVar("R")


async def all_done(work: Iterable[Coroutine[Any, Any, R]]) -> list[R]:
    """Await all at once, then raise the first error: what is under way ends before anybody hears of it."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast("list[R]", results)


async def in_order(
    jobs: Iterable[Callable[[], Coroutine[Any, Any, R]]],
    *,
    most_running: int,
    most_ahead: int,
    most_together: int = 32,
) -> AsyncGenerator[list[R]]:
    """Run jobs side by side and yield their results in the order of the jobs, in groups: all that are ready.

    A slow job delays the results after it, not the work on them. After a failure no job is started; those under way
    may end, the results before it are yielded, then it is raised. Closing cancels what is under way and waits for it.

    Args:
        jobs: Read as they are started.
        most_ahead: Jobs that are started and whose results are not yielded yet; bounds the memory behind a slow job.
        most_together: Results in one group.
    """
    waiting = iter(jobs)
    is_open = True
    started: deque[asyncio.Task[R]] = deque()
    running: set[asyncio.Task[R]] = set()
    changed = asyncio.Event()

    def ended(task: asyncio.Task[R]) -> None:
        nonlocal is_open
        running.discard(task)
        is_open = is_open and _succeeded(task)
        changed.set()

    try:
        while True:
            while is_open and len(running) < most_running and len(started) < most_ahead:
                job = next(waiting, None)
                if job is None:
                    is_open = False
                    break
                task = asyncio.create_task(job())
                task.add_done_callback(ended)
                running.add(task)
                started.append(task)
            ready: list[R] = []
            while started and len(ready) < most_together and _succeeded(started[0]):
                ready.append(started.popleft().result())
            if ready:
                yield ready
            elif not started:
                return
            elif started[0].done():
                if running:
                    # Their answers are paid for: let them be written down.
                    await asyncio.wait(running)
                started[0].result()
            else:
                changed.clear()
                await changed.wait()
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)


def _succeeded(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


class LoopThread:
    """An event loop on a thread of its own, so that synchronous callers can await, whatever loop they run in.

    It outlives single calls because the connections of a teacher belong to the loop they were opened on.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def submit(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        """Start the work; the future gives its result. Cancel it to cancel the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Return the result of the work. When interrupted, cancel it, and leave when it has put its things in order."""
        outcome: Future[R] = Future()
        tasks: list[asyncio.Task[R]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(partial(_hand_over, outcome))

        self._loop.call_soon_threadsafe(start)
        try:
            return outcome.result()
        finally:
            if not outcome.done():
                self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                wait([outcome])

    def stop(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def _hand_over(outcome: Future[R], task: asyncio.Task[R]) -> None:
    if task.cancelled():
        outcome.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())
