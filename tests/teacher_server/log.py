"""What the server remembers: every request, what became of it, and what it would have cost."""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(slots=True, kw_only=True)
class Entry:
    """One request. Written when it arrives, completed when it ends."""

    number: int
    arrived: float
    """Seconds since the epoch."""
    path: str
    dialect: str
    body_hash: str
    times_seen: int = 0
    """How often this body came before."""
    identities: tuple[str, ...] = ()
    """Which conversation and prefix, for each prompt; see `identity`."""
    how: str = ""
    n: int = 0
    seeds: tuple[int | None, ...] = ()
    decision: str = "served"
    """`served`, the name of a fault, `limit`, `auth`, `quota` or `rejected`."""
    status: int | None = None
    choices: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    ended: float | None = None
    """None: in flight."""
    outcome: str = ""
    """`answered`, or `abandoned` by the client, or `broken` on purpose."""
    billed: bool = False
    """A complete 200 answer was written in full."""
    batch: str | None = None


class Log:
    """Append-only, in memory and, where a path is given, as a JSON line for each request that has ended.

    May be read from another thread than the server's.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.clear()

    def clear(self) -> None:
        """Forget everything but the file."""
        self.entries: list[Entry] = []
        self.in_flight = 0
        self.peak_in_flight = 0
        self.violations = 0
        """Requests that came over a limit."""
        self.early_retries = 0
        """Requests that came again before the wait that their 429 named was over."""
        self._seen: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}

    def begin(self, path: str, dialect: str, body_hash: str) -> Entry:
        now = time.time()
        entry = Entry(
            number=len(self.entries),
            arrived=now,
            path=path,
            dialect=dialect,
            body_hash=body_hash,
            times_seen=self._seen[body_hash],
        )
        self._seen[body_hash] += 1
        if self._not_before.pop(body_hash, 0.0) > now:
            self.early_retries += 1
        self.entries.append(entry)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        return entry

    def wait_before(self, body_hash: str, seconds: float) -> None:
        """Remember that the client was told to wait."""
        self._not_before[body_hash] = time.time() + seconds

    def end(self, entry: Entry, outcome: str, *, billed: bool = False) -> None:
        entry.ended, entry.outcome, entry.billed = time.time(), outcome, billed
        self.in_flight -= 1

    def write(self, entry: Entry) -> None:
        """Append an entry that has ended to the file."""
        if self._file is not None:
            os.write(self._file, json.dumps(asdict(entry)).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def received(self) -> int:
        return len(self.entries)

    @property
    def billed(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.billed]

    def choices_billed(self) -> Counter[str]:
        """Count the samples that were delivered for each identity."""
        counted: Counter[str] = Counter()
        for entry in self.billed:
            for name in entry.identities:
                counted[name] += entry.choices // len(entry.identities)
        return counted

    def stats(self) -> dict[str, Any]:
        """Sum up, as plain JSON."""
        billed = self.billed
        return {
            "received": self.received,
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "billed": len(billed),
            "billed_choices": sum(entry.choices for entry in billed),
            "billed_input_tokens": sum(entry.input_tokens for entry in billed),
            "billed_output_tokens": sum(entry.output_tokens for entry in billed),
            "billed_usd": sum(entry.usd for entry in billed),
            "abandoned": sum(entry.outcome == "abandoned" for entry in self.entries),
            "violations": self.violations,
            "early_retries": self.early_retries,
            "decisions": dict(Counter(entry.decision for entry in self.entries)),
        }


class Window:
    """A sliding window over what was let in."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, int]] = deque()
        self.used = 0

    def expire(self, now: float, length_s: float) -> None:
        while self._events and self._events[0][0] <= now - length_s:
            self.used -= self._events.popleft()[1]

    def add(self, now: float, amount: int) -> None:
        self._events.append((now, amount))
        self.used += amount

    def wait_s(self, now: float, length_s: float) -> float:
        """Return the time until the oldest event leaves."""
        return self._events[0][0] + length_s - now if self._events else 0.0
