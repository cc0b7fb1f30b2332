"""Who may send a request now: requests and tokens per minute, and how many at a time.

A limiter paces the requests to one model at one address with one key. Standard library only; one limiter may serve
several event loops in several threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from omniopd.teachers.rates import EPSILON_S, Entry, Rate, ToldLimits, read_limits, stricter
from omniopd.teachers.retry import MAX_SERVER_WAIT_S

CUT_INTERVAL_S: Final = 1.0
"""One overload makes many requests fail together; they halve the concurrency once."""

_NOTHING_TOLD = ToldLimits()


class Slot:
    """The right to send one request. Give it back with `release`."""

    __slots__ = ("_is_open", "_limiter", "_request", "_tokens")

    def __init__(self, limiter: Limiter, request: Entry | None, tokens: Entry | None) -> None:
        self._limiter = limiter
        self._request = request
        self._tokens = tokens
        self._is_open = True

    def release(self, *, used_tokens: int | None = None, was_unused: bool = False) -> None:
        """Give the slot back. Only the first call counts.

        `used_tokens` is what the request really used: what was reserved beyond it is free again at once, and what it
        used beyond the reservation counts too. None: all that was reserved counts. `was_unused`: nothing was sent, so
        nothing counts.
        """
        self._limiter._release(self, 0 if was_unused else used_tokens, was_unused=was_unused)


class Limiter:
    """Admit requests first come, first served, within all limits.

    In no 60 seconds are more requests admitted than `requests_per_minute`, nor requests that reserved more tokens than
    `tokens_per_minute`; within that, admissions are spread: a sixth of the limit at once, then at the steady rate. A
    request that alone reserves more than the whole token limit is admitted when nothing else counts, or it would wait
    forever.

    Concurrency starts at `max_in_flight`, is halved by `throttled` (at most once a second, never below 1) and grows by
    one after as many successes as the limit then is.

    Args:
        clock: seconds, monotonic; must run as fast as the clocks of the event loops.
        wall_clock: seconds since 1970, for headers that name a date.
    """

    def __init__(
        self,
        *,
        max_in_flight: int,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight}; it must be at least 1")
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.RLock()  # Reentrant: a collected task may give its slot back anywhere.
        self._max_in_flight = max_in_flight
        self._concurrency = max_in_flight
        self._in_flight = 0
        self._successes = 0
        self._not_before = -math.inf
        self._last_cut = -math.inf
        self._requests = Rate(requests_per_minute)
        self._tokens = Rate(tokens_per_minute)
        self._waiters: deque[_Waiter] = deque()

    @property
    def in_flight(self) -> int:
        """Slots that are out."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiters)

    @property
    def concurrency(self) -> int:
        """How many slots may be out now."""
        return self._concurrency

    @property
    def requests_per_minute(self) -> int | None:
        """The limit in force: as configured, or as the server said if that is lower."""
        return self._requests.limit

    @property
    def tokens_per_minute(self) -> int | None:
        """The limit in force: as configured, or as the server said if that is lower."""
        return self._tokens.limit

    async def acquire(self, tokens: int, *, is_retry: bool = False) -> Slot:
        """Wait for the right to send a request that may use so many tokens, input and output.

        A retry goes before those who have not begun: its deadline is running.
        """
        with self._lock:
            if not self._waiters and self._delay_s(tokens, self._clock()) == 0:
                return self._admit(tokens)
            waiter = _Waiter(tokens)
            if is_retry:
                self._waiters.appendleft(waiter)
            else:
                self._waiters.append(waiter)
            self._dispatch()
        try:
            await waiter.turn
        except BaseException:  # Cancelled; whether the turn had come is settled under the lock.
            with self._lock:
                if waiter.slot is not None:
                    self._take_back(waiter.slot, 0, was_unused=True)
                elif waiter in self._waiters:
                    self._waiters.remove(waiter)
                self._dispatch()
            raise
        finally:
            if waiter.timer is not None:
                waiter.timer.cancel()
        assert waiter.slot is not None
        return waiter.slot

    @contextlib.asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[Slot]:
        """Hold a slot for the block; call its `release` with what was used, or else all that was reserved counts."""
        slot = await self.acquire(tokens)
        try:
            yield slot
        finally:
            slot.release()

    def throttled(self, wait_s: float | None) -> None:
        """Take note of a 429: half the concurrency, and no request starts for `wait_s`, at most 120 s.

        Slots that are out are not taken back.
        """
        with self._lock:
            now = self._clock()
            if now - self._last_cut >= CUT_INTERVAL_S:
                self._last_cut = now
                self._concurrency = max(1, self._concurrency // 2)
            self._successes = 0
            self._hold_back(now, wait_s or 0.0)

    def succeeded(self) -> None:
        """Take note of an answer."""
        with self._lock:
            if self._concurrency < self._max_in_flight:
                self._successes += 1
                if self._successes >= self._concurrency:
                    self._successes = 0
                    self._concurrency += 1
                    self._dispatch()

    def learn(self, headers: Mapping[str, str]) -> None:
        """Read the limits that an answer's headers tell (`rates.read_limits`); names in lower case.

        A told limit holds where none or a higher one is configured. When nothing remains, no request starts until the
        server's counter is reset, at most 120 s.
        """
        told = read_limits(headers, wall_clock=self._wall_clock)
        if told == _NOTHING_TOLD:
            return
        with self._lock:
            self._requests.told = told.requests_per_minute or self._requests.told
            self._tokens.told = told.tokens_per_minute or self._tokens.told
            self._hold_back(self._clock(), told.wait_s)

    def tighten(
        self, *, max_in_flight: int, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
    ) -> None:
        """Keep the stricter of these limits and those configured so far."""
        with self._lock:
            self._max_in_flight = min(self._max_in_flight, max_in_flight)
            self._concurrency = min(self._concurrency, self._max_in_flight)
            self._requests.configured = stricter(self._requests.configured, requests_per_minute)
            self._tokens.configured = stricter(self._tokens.configured, tokens_per_minute)

    # All below is called with the lock held, but for _arm, _due and _release.

    def _delay_s(self, tokens: int, now: float) -> float:
        """Return in how many seconds such a request may start, as far as time decides; inf while all slots are out."""
        if self._in_flight >= self._concurrency:
            return math.inf
        delay = max(self._not_before - now, self._requests.delay_s(1, now), self._tokens.delay_s(tokens, now))
        return delay if delay > EPSILON_S else 0.0

    def _admit(self, tokens: int) -> Slot:
        now = self._clock()
        self._in_flight += 1
        return Slot(self, self._requests.take(1, now), self._tokens.take(tokens, now))

    def _hold_back(self, now: float, wait_s: float) -> None:
        self._not_before = max(self._not_before, now + min(wait_s, MAX_SERVER_WAIT_S))

    def _dispatch(self) -> None:
        """Give slots to those who wait, in order; when time holds back the first, wake up in time."""
        while self._waiters:
            waiter = self._waiters[0]
            now = self._clock()
            delay = self._delay_s(waiter.tokens, now)
            if delay == math.inf:
                return
            if delay > 0:
                if waiter.wakes_at <= now + delay and not waiter.loop.is_closed():
                    return
                waiter.wakes_at = now + delay
                if waiter.call(self._arm, waiter, delay):
                    return
                self._waiters.popleft()  # Its event loop is over.
                continue
            self._waiters.popleft()
            waiter.slot = self._admit(waiter.tokens)
            if not waiter.call(_set_done, waiter.turn):
                self._take_back(waiter.slot, 0, was_unused=True)

    def _arm(self, waiter: _Waiter, delay_s: float) -> None:
        """Start the timer of a waiter, in its event loop. It may come early; `_due` looks again."""
        if waiter.timer is not None:
            waiter.timer.cancel()
        if not waiter.turn.done():
            waiter.timer = waiter.loop.call_later(delay_s, self._due, waiter)

    def _due(self, waiter: _Waiter) -> None:
        with self._lock:
            waiter.wakes_at = math.inf
            self._dispatch()

    def _release(self, slot: Slot, used_tokens: int | None, *, was_unused: bool) -> None:
        with self._lock:
            self._take_back(slot, used_tokens, was_unused=was_unused)
            self._dispatch()

    def _take_back(self, slot: Slot, used_tokens: int | None, *, was_unused: bool) -> None:
        if not slot._is_open:
            return
        slot._is_open = False
        self._in_flight -= 1
        if was_unused:
            self._requests.correct(slot._request, 0)
        if used_tokens is not None:
            self._tokens.correct(slot._tokens, max(0, used_tokens))


class _Waiter:
    """One call of `acquire` that has to wait."""

    __slots__ = ("loop", "slot", "timer", "tokens", "turn", "wakes_at")

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.loop = asyncio.get_running_loop()
        self.turn: asyncio.Future[None] = self.loop.create_future()
        self.slot: Slot | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.wakes_at = math.inf

    def call(self, function: Callable[..., None], *args: object) -> bool:
        """Call a function in the waiter's event loop. Returns False when that loop is over."""
        if self.loop is _running_loop():
            function(*args)
            return True
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return False
        return True


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _set_done(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


_shared: weakref.WeakValueDictionary[tuple[str, str | None, str], Limiter] = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def shared_limiter(
    base_url: str,
    api_key: str | None,
    model: str,
    *,
    max_in_flight: int,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> Limiter:
    """Return the limiter of this process for one model at one address with one key.

    It lives as long as somebody holds it. When it is asked for again with other limits, the stricter ones hold from
    then on, for everybody.
    """
    mark = None if api_key is None else hashlib.sha256(api_key.encode()).hexdigest()
    with _shared_lock:
        limiter = _shared.get((base_url.rstrip("/"), mark, model))
        if limiter is None:
            limiter = Limiter(
                max_in_flight=max_in_flight,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
            )
            _shared[(base_url.rstrip("/"), mark, model)] = limiter
        else:
            limiter.tighten(
                max_in_flight=max_in_flight,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
            )
    return limiter
