"""Where the time of a step goes. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Adds up the named phases of a step; `on_phase` is told when one begins."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's wall time under `phase`."""
        if self._on_phase is not None:
            self._on_phase(phase)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase and of the whole `step`, and start the next one."""
        now = time.perf_counter()
        phases = {**self._seconds, "step": now - self._started}
        self._seconds, self._started = {}, now
        return phases

    def restart(self) -> None:
        """Begin the step now: what came before belongs to none."""
        self._seconds, self._started = {}, time.perf_counter()
