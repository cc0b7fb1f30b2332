"""The limiter, in virtual time: its limits hold in every window, everybody is served in order, nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd.teachers import limiter as limiter_module
from omniopd.teachers.limiter import Limiter, Slot, shared_limiter
from omniopd.teachers.rates import read_limits

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer. Fails when all wait and nothing will ever happen."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> Any:
            assert timeout is not None, "all tasks wait and no timer is set"
            self._seconds += timeout
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._seconds


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


def new_limiter(**limits: Any) -> Limiter:
    return Limiter(**{"max_in_flight": 1000, "clock": lambda: now(), "wall_clock": lambda: 1_000_000.0, **limits})


async def start_times(limiter: Limiter, sizes: list[int], *, used: int | None = None) -> list[float]:
    """Acquire for all at once, hold each slot for 2 s, and return when each was admitted, rounded to ms."""

    async def one(tokens: int) -> float:
        async with limiter.slot(tokens) as slot:
            started = now()
            await asyncio.sleep(2)
            slot.release(used_tokens=used)
            return round(started, 3)

    return await asyncio.gather(*map(one, sizes))


def test_requests_are_spread_and_the_window_holds() -> None:
    # 6 a minute is one in 10 s; the seventh would come at 60 s, when the first has not left the window of 61 s.
    times = run(start_times(new_limiter(requests_per_minute=6), [0] * 8))
    assert times == [0, 10, 20, 30, 40, 50, 61, 71]


def test_a_burst_is_a_sixth_of_a_minute() -> None:
    # 60 a minute: 10 at once, then one each second.
    times = run(start_times(new_limiter(requests_per_minute=60), [0] * 13))
    assert times == [0] * 10 + [1, 2, 3]


def test_tokens_are_reserved() -> None:
    # 600 a minute are 10 a second, 100 at once: 100 at 0; the next 100 need the bucket full again, at 10 s.
    assert run(start_times(new_limiter(tokens_per_minute=600), [100, 100, 50])) == [0, 10, 15]


def test_unused_tokens_are_free_again_at_once() -> None:
    # As above, but each says after 2 s that it used 10 of 100, which is 1 s worth.
    assert run(start_times(new_limiter(tokens_per_minute=600), [100, 100, 100], used=10)) == [0, 2, 4]


def test_tokens_beyond_the_reservation_count_too() -> None:
    # 50 reserved, 200 used: full again not at 5 but at 20 s.
    assert run(start_times(new_limiter(tokens_per_minute=600), [50, 100], used=200)) == [0, 0 + 20]


def test_more_than_the_whole_limit_is_admitted_alone() -> None:
    # 500 of 100 a minute: when the 30 have left the window; and nothing else until it has left too.
    assert run(start_times(new_limiter(tokens_per_minute=100), [30, 500, 1])) == [0, 61, 122]


def test_the_first_in_the_queue_is_not_overtaken() -> None:
    # The small one could start at once; the large one before it would then wait for ever in a steady stream.
    times = run(start_times(new_limiter(tokens_per_minute=600), [60, 100, 1]))
    assert times == [0, 6, pytest.approx(6.1)]


def test_concurrency_is_halved_and_grows_by_one() -> None:
    async def main() -> list[int]:
        limiter = new_limiter(max_in_flight=8)
        seen = [limiter.concurrency]
        limiter.throttled(None)
        limiter.throttled(None)  # Of the same overload.
        seen.append(limiter.concurrency)
        for _ in range(4):
            await asyncio.sleep(1)
            limiter.throttled(None)
            seen.append(limiter.concurrency)
        for _ in range(1 + 2 + 3 + 4 + 5 + 6 + 7):
            limiter.succeeded()
        seen.append(limiter.concurrency)
        limiter.succeeded()
        seen.append(limiter.concurrency)
        return seen

    # 8 successes from 1 on are 1 + 2 + ... + 7 steps up to 8, and no further.
    assert run(main()) == [8, 4, 2, 1, 1, 1, 8, 8]


def test_growth_starts_who_waits() -> None:
    async def main() -> tuple[int, int]:
        limiter = new_limiter(max_in_flight=4)
        limiter.throttled(None)
        tasks = [asyncio.create_task(limiter.acquire(0)) for _ in range(4)]
        await asyncio.sleep(0.01)
        before = limiter.in_flight
        limiter.succeeded()
        limiter.succeeded()
        await asyncio.sleep(0.01)
        after = limiter.in_flight
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return before, after

    assert run(main()) == (2, 3)


@pytest.mark.parametrize(("wait_s", "start"), [(None, 0), (7.5, 7.5), (3600.0, 120)])
def test_a_throttled_limiter_holds_everybody_back(wait_s: float | None, start: float) -> None:
    async def main() -> list[float]:
        limiter = new_limiter(max_in_flight=8)
        limiter.throttled(wait_s)
        return await start_times(limiter, [0, 0])

    assert run(main()) == [start, start]


def test_a_cancelled_waiter_makes_room() -> None:
    async def main() -> tuple[float, int, int]:
        limiter = new_limiter(tokens_per_minute=600)
        (await limiter.acquire(100)).release()
        large = asyncio.create_task(limiter.acquire(100))  # At 10 s.
        small = asyncio.create_task(limiter.acquire(20))
        await asyncio.sleep(1)
        assert limiter.waiting == 2
        large.cancel()
        (await small).release()  # 20 tokens are 2 s worth: when 2 s of the 10 s are there again.
        with pytest.raises(asyncio.CancelledError):
            await large
        return now(), limiter.in_flight, limiter.waiting

    assert run(main()) == (pytest.approx(2.0, abs=1e-3), 0, 0)


def test_a_slot_that_came_too_late_is_given_back_unused() -> None:
    async def main() -> tuple[float, int]:
        limiter = new_limiter(max_in_flight=1, requests_per_minute=6)
        slot = await limiter.acquire(0)
        waiter = asyncio.create_task(limiter.acquire(0))
        await asyncio.sleep(30)
        slot.release()  # The waiter has its slot now, but has not run yet.
        assert limiter.in_flight == 1
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert limiter.in_flight == 0
        (await limiter.acquire(0)).release()
        return now(), limiter.in_flight

    # Had the cancelled one counted, the last would start at 40 s.
    assert run(main()) == (30.0, 0)


def test_releasing_twice_counts_once() -> None:
    async def main() -> tuple[int, list[float]]:
        limiter = new_limiter(tokens_per_minute=600)
        slot = await limiter.acquire(100)
        slot.release(used_tokens=100)
        slot.release(used_tokens=0)
        return limiter.in_flight, await start_times(limiter, [100])

    assert run(main()) == (0, [10])


def test_a_refund_after_the_window_changes_nothing() -> None:
    async def main() -> list[float]:
        limiter = new_limiter(tokens_per_minute=60)
        slot = await limiter.acquire(60)
        await asyncio.sleep(62)
        first = await limiter.acquire(60)
        slot.release(used_tokens=0)
        first.release()
        return await start_times(limiter, [1])

    assert run(main()) == [62 + 61]


@dataclass
class Job:
    gap_s: float
    tokens: int
    seconds: float
    used: float | None
    cancel_after_s: float | None
    throttled_s: float | None

    admitted: float | None = field(default=None, init=False)
    released: float = field(default=float("inf"), init=False)
    counted: int = field(default=0, init=False)
    is_cancelled: bool = field(default=False, init=False)


jobs = st.lists(
    st.builds(
        Job,
        gap_s=st.sampled_from([0.0, 0.0, 0.1, 3.0, 20.0, 60.0]),
        tokens=st.integers(0, 130),
        seconds=st.sampled_from([0.0, 0.5, 5.0, 70.0]),
        used=st.none() | st.floats(0, 1),
        cancel_after_s=st.none() | st.none() | st.sampled_from([0.0, 1.0, 10.0]),
        throttled_s=st.none() | st.none() | st.none() | st.sampled_from([0.0, 2.0, 30.0]),
    ),
    min_size=1,
    max_size=40,
)


async def work(limiter: Limiter, job: Job, pauses: list[tuple[float, float]]) -> None:
    async with limiter.slot(job.tokens) as slot:
        job.admitted = now()
        job.counted = job.tokens
        await asyncio.sleep(job.seconds)
        if job.throttled_s is not None:
            limiter.throttled(job.throttled_s)
            pauses.append((now(), now() + job.throttled_s))
        else:
            limiter.succeeded()
        if job.used is not None:
            job.counted = int(job.tokens * job.used)
            slot.release(used_tokens=job.counted)
            job.released = now()


@settings(max_examples=100, deadline=None)
@given(
    jobs=jobs, requests=st.none() | st.integers(1, 30), tokens=st.none() | st.integers(1, 100), most=st.integers(1, 8)
)
def test_no_window_ever_exceeds_the_limits(
    jobs: list[Job], requests: int | None, tokens: int | None, most: int
) -> None:
    pauses: list[tuple[float, float]] = []

    async def main() -> tuple[int, int]:
        limiter = new_limiter(max_in_flight=most, requests_per_minute=requests, tokens_per_minute=tokens)
        tasks = []
        for job in jobs:
            await asyncio.sleep(job.gap_s)
            task = asyncio.create_task(work(limiter, job, pauses))
            if job.cancel_after_s is not None:
                asyncio.get_running_loop().call_later(job.cancel_after_s, task.cancel)
            tasks.append(task)
        for job, end in zip(jobs, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            assert end is None or isinstance(end, asyncio.CancelledError)
            job.is_cancelled = end is not None
        return limiter.in_flight, limiter.waiting

    assert run(main()) == (0, 0)
    assert all(job.is_cancelled or job.admitted is not None for job in jobs)
    started = [job for job in jobs if job.admitted is not None]
    times = [job.admitted for job in started if job.admitted is not None]
    assert times == sorted(times)  # First come, first served.
    for i, (job, at) in enumerate(zip(started, times, strict=True)):
        window = [other for other, t in zip(started[:i], times, strict=False) if at - 60 < t]
        assert requests is None or len(window) < requests
        # Who has not said by now how much it used counts with what it reserved.
        counted = sum(other.counted if other.released <= at else other.tokens for other in window)
        if tokens is not None and job.tokens > 0:
            assert counted + job.tokens <= tokens or (counted == 0 and job.tokens > tokens)
        assert not any(begin < at < end - 1e-5 for begin, end in pauses)


def test_all_are_served_at_the_full_rate() -> None:
    async def main() -> tuple[float, int]:
        limiter = new_limiter(max_in_flight=16, requests_per_minute=600, tokens_per_minute=60_000)
        draw = random.Random(0)

        async def one() -> None:
            async with limiter.slot(200) as slot:
                await asyncio.sleep(draw.random())
                slot.release(used_tokens=50)

        await asyncio.gather(*(one() for _ in range(6000)))
        return now(), limiter.in_flight

    seconds, left = run(main())
    # 6000 requests at 600 in 61 s: the last 600 start in the tenth window.
    assert 9 * 61 <= seconds < 10 * 61 + 1
    assert left == 0


def test_several_threads_share_one_limiter() -> None:
    limiter = Limiter(max_in_flight=5)
    lock = threading.Lock()
    out = most = served = 0

    async def one(draw: random.Random) -> None:
        nonlocal out, most, served
        async with limiter.slot(1):
            with lock:
                out += 1
                most = max(most, out)
            try:
                await asyncio.sleep(draw.random() / 1000)
            finally:
                with lock:
                    out -= 1
            with lock:
                served += 1

    async def many(seed: int) -> None:
        draw = random.Random(seed)
        tasks = [asyncio.create_task(one(draw)) for _ in range(150)]
        await asyncio.sleep(0.01)
        for task in tasks[::7]:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            assert end is None or isinstance(end, asyncio.CancelledError)

    threads = [threading.Thread(target=asyncio.run, args=(many(seed),)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert most == 5
    assert served >= 4 * (150 - 22)  # Every seventh is cancelled, some of them too late.
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


def test_an_event_loop_that_is_over_blocks_nobody() -> None:
    limiter = Limiter(max_in_flight=1)

    async def hold() -> Slot:
        return await limiter.acquire(0)

    slot = asyncio.run(hold())
    left = asyncio.new_event_loop()
    task = left.create_task(limiter.acquire(0))
    left.run_until_complete(asyncio.sleep(0))
    left.close()
    assert limiter.waiting == 1
    slot.release()

    async def after() -> None:
        async with asyncio.timeout(5):
            (await limiter.acquire(0)).release()

    asyncio.run(after())
    assert (limiter.in_flight, limiter.waiting) == (0, 0)
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_real_time_at_a_high_rate() -> None:
    async def main() -> float:
        # 100 a second, 1000 at once: the last of 1050 comes at 0.5 s.
        limiter = Limiter(max_in_flight=64, requests_per_minute=6000, tokens_per_minute=10_000_000)

        async def one() -> None:
            async with limiter.slot(100) as slot:
                slot.release(used_tokens=10)

        begin = time.monotonic()
        await asyncio.gather(*(one() for _ in range(1050)))
        return time.monotonic() - begin

    assert 0.48 <= asyncio.run(main()) < 10


def test_a_free_slot_costs_next_to_nothing() -> None:
    async def main() -> float:
        limiter = Limiter(max_in_flight=64)
        best = float("inf")
        for _ in range(5):
            begin = time.process_time()
            for _ in range(2000):
                (await limiter.acquire(100)).release(used_tokens=50)
            best = min(best, (time.process_time() - begin) / 2000)
        return best

    # 3 microseconds on an idle machine; a coverage tool makes that 15.
    assert asyncio.run(main()) < 50e-6


RESETS = [
    ("6m0s", 360.0),
    ("1s", 1.0),
    ("20ms", 0.02),
    ("1h2m3.5s", 3723.5),
    ("1d", 86400.0),
    ("12", 12.0),
    ("0.5", 0.5),
]


@pytest.mark.parametrize(("reset", "seconds"), RESETS)
def test_resets_are_read(reset: str, seconds: float) -> None:
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": reset}
    assert read_limits(headers, wall_clock=lambda: 0.0).wait_s == pytest.approx(seconds)


@pytest.mark.parametrize("reset", ["", "soon", "1795000000000", "-3", "nan", "6m 0s", "2026-11-23T00:00:00"])
def test_a_reset_that_says_nothing_holds_nobody_back(reset: str) -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": reset}
    assert read_limits(headers, wall_clock=lambda: 0.0).wait_s == 0


def test_anthropics_words_are_read() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2026-11-23T00:09:00Z",
        "anthropic-ratelimit-input-tokens-limit": "30000",
        "anthropic-ratelimit-output-tokens-limit": "8000",
        "anthropic-ratelimit-output-tokens-remaining": "0",
        "anthropic-ratelimit-output-tokens-reset": "2026-11-23T00:00:09Z",
    }
    told = read_limits(headers, wall_clock=lambda: 1795392000.0)  # 2026-11-23T00:00:00Z
    # 30000 in and 8000 out are at most 38000 together; only what is used up is waited for.
    assert (told.requests_per_minute, told.tokens_per_minute, told.wait_s) == (50, 38000, 9.0)


def test_limits_per_second_are_left_alone() -> None:
    headers = {"x-ratelimit-limit": "10", "x-ratelimit-limit-tokens": "3000", "x-ratelimit-remaining-tokens": "0"}
    told = read_limits(headers | {"x-ratelimit-reset-tokens": "1"}, wall_clock=lambda: 0.0)
    assert (told.requests_per_minute, told.tokens_per_minute, told.wait_s) == (None, None, 0.0)


def test_a_told_limit_lowers_and_never_raises() -> None:
    async def main() -> list[tuple[int | None, int | None]]:
        limiter = new_limiter(requests_per_minute=100)
        seen = []
        for requests, tokens in (("60", "900"), ("500", "600"), ("-1", "0"), ("many", "")):
            limiter.learn({"x-ratelimit-limit-requests": requests, "x-ratelimit-limit-tokens": tokens})
            seen.append((limiter.requests_per_minute, limiter.tokens_per_minute))
        return seen

    assert run(main()) == [(60, 900), (100, 600), (100, 600), (100, 600)]


def test_an_empty_counter_is_waited_for() -> None:
    async def main() -> list[float]:
        limiter = new_limiter()
        limiter.learn({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "3s"})
        return await start_times(limiter, [0])

    assert run(main()) == [3]


def test_learning_holds_from_the_next_request_on() -> None:
    async def main() -> list[float]:
        limiter = new_limiter()
        (await limiter.acquire(0)).release()
        limiter.learn({"x-ratelimit-limit-requests": "6"})
        return await start_times(limiter, [0, 0])

    assert run(main()) == [0, 10]


@pytest.mark.parametrize("limits", [{"max_in_flight": 0}, {"requests_per_minute": 0}, {"tokens_per_minute": -5}])
def test_impossible_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        new_limiter(**limits)


def test_one_limiter_for_each_address_key_and_model() -> None:
    places = itertools.product(["http://a/v1", "http://b/v1"], ["key-one", "key-two", None], ["m", "n"])
    limiters = [shared_limiter(url, key, model, max_in_flight=4) for url, key, model in places]
    assert len(set(map(id, limiters))) == 12
    assert shared_limiter("http://a/v1/", "key-one", "m", max_in_flight=4) is limiters[0]
    assert "key-one" not in repr(list(limiter_module._shared.items()))


def test_the_stricter_limits_hold_and_end_with_their_last_holder() -> None:
    first = shared_limiter("http://s/v1", "k", "m", max_in_flight=8, tokens_per_minute=100)
    second = shared_limiter("http://s/v1", "k", "m", max_in_flight=4, requests_per_minute=9, tokens_per_minute=500)
    assert first is second
    assert (first.concurrency, first.requests_per_minute, first.tokens_per_minute) == (4, 9, 100)
    del first, second
    gc.collect()
    assert shared_limiter("http://s/v1", "k", "m", max_in_flight=8).concurrency == 8
