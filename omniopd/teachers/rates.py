"""An amount per minute that is never exceeded, and what a server's headers tell of its own limits. Standard library."""

from __future__ import annotations

import datetime
import math
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

WINDOW_S: Final = 61.0
"""Limits hold in every window of this length. A second more than a minute, as requests do not travel equally fast."""
BURST_S: Final = 10.0
"""At most this much of the rate is admitted at once: providers also enforce a minute's limit over shorter times."""
EPSILON_S: Final = 1e-6
"""Shorter waits are none: no timer is that fine."""


class Entry:
    """What one request counts against a rate."""

    __slots__ = ("amount", "counts", "time")

    def __init__(self, time: float, amount: int) -> None:
        self.time = time
        self.amount = amount
        self.counts = True


class Rate:
    """An amount per minute: never more in any window, by a log of the window; and spread, by a bucket.

    The bucket is told by the time at which it is full again; it holds `BURST_S` of the rate.
    """

    __slots__ = ("_full_at", "_log", "_total", "configured", "told")

    def __init__(self, configured: int | None) -> None:
        if configured is not None and configured < 1:
            raise ValueError(f"a limit per minute is {configured}; it must be at least 1")
        self.configured = configured
        self.told: int | None = None
        self._log: deque[Entry] = deque()
        self._total = 0
        self._full_at = -math.inf

    @property
    def limit(self) -> int | None:
        """The one in force."""
        return stricter(self.configured, self.told)

    def delay_s(self, amount: int, now: float) -> float:
        """Return after how long the amount may be taken, if nobody takes anything before."""
        limit = self.limit
        if limit is None:
            return 0.0
        self._forget(now)
        cost_s = self._cost_s(amount, limit)
        # An amount beyond the bucket needs a full one.
        spread_s = self._full_at - now if cost_s >= BURST_S else self._full_at + cost_s - BURST_S - now
        return max(0.0, spread_s, self._window_delay_s(amount, limit, now))

    def _window_delay_s(self, amount: int, limit: int, now: float) -> float:
        """Return when enough of the log has left the window."""
        excess = min(self._total, self._total + amount - limit)
        if excess <= 0:
            return 0.0
        for entry in self._log:
            excess -= entry.amount
            if excess <= 0:
                break
        return entry.time + WINDOW_S - now

    def take(self, amount: int, now: float) -> Entry | None:
        """Count the amount. Returns None where nothing limits it."""
        limit = self.limit
        if limit is None or amount <= 0:
            return None
        entry = Entry(now, amount)
        self._log.append(entry)
        self._total += amount
        self._full_at = max(self._full_at, now) + self._cost_s(amount, limit)
        return entry

    def correct(self, entry: Entry | None, amount: int) -> None:
        """Let an entry count as much as was really used."""
        limit = self.limit
        if entry is None or limit is None or not entry.counts:
            return
        self._total += amount - entry.amount
        self._full_at += self._cost_s(amount, limit) - self._cost_s(entry.amount, limit)
        entry.amount = amount

    def _forget(self, now: float) -> None:
        log = self._log
        while log and log[0].time + WINDOW_S <= now + EPSILON_S:
            entry = log.popleft()
            entry.counts = False
            self._total -= entry.amount

    @staticmethod
    def _cost_s(amount: int, limit: int) -> float:
        return min(amount, limit) * 60.0 / limit


def stricter(one: int | None, other: int | None) -> int | None:
    """Return the lower of two limits; None is no limit."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldLimits:
    """What the headers of an answer say."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    wait_s: float = 0.0
    """Until a counter that is used up is reset."""


def read_limits(headers: Mapping[str, str], *, wall_clock: Callable[[], float]) -> ToldLimits:
    """Read OpenAI's `x-ratelimit-*` and Anthropic's `anthropic-ratelimit-*`; names in lower case.

    Where `x-ratelimit-limit` is there too, limits are per second (Together) and are not read.
    """
    if "x-ratelimit-limit" in headers:
        return ToldLimits()
    tokens = _limit(headers, "tokens")
    if tokens is None:
        inputs, outputs = _limit(headers, "input-tokens"), _limit(headers, "output-tokens")
        tokens = inputs + outputs if inputs and outputs else None
    waits = [
        _seconds_until(_told(headers, "reset", kind), wall_clock)
        for kind in ("requests", "tokens", "input-tokens", "output-tokens")
        if _told(headers, "remaining", kind) == "0"
    ]
    return ToldLimits(
        requests_per_minute=_limit(headers, "requests"),
        tokens_per_minute=tokens,
        wait_s=max((wait for wait in waits if wait is not None), default=0.0),
    )


def _told(headers: Mapping[str, str], what: str, kind: str) -> str:
    return headers.get(f"x-ratelimit-{what}-{kind}", "") or headers.get(f"anthropic-ratelimit-{kind}-{what}", "")


def _limit(headers: Mapping[str, str], kind: str) -> int | None:
    text = _told(headers, "limit", kind)
    return int(text) if text.isdecimal() and int(text) > 0 else None


_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|d|h|m|s))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")


def _seconds_until(reset: str, wall_clock: Callable[[], float]) -> float | None:
    """Read `6m0s`, `20ms`, plain seconds, or a date as RFC 3339 writes it. None for anything else."""
    if _DURATION.fullmatch(reset):
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(reset))
    try:
        seconds = float(reset)
    except ValueError:
        pass
    else:
        # Larger numbers are seconds or milliseconds since 1970, and which of the two nobody says.
        return seconds if 0 <= seconds < 1e8 else None
    try:
        date = datetime.datetime.fromisoformat(reset)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - wall_clock()) if date.tzinfo else None
