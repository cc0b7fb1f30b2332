"""Collects what concurrent requests ask for and generates it together, in one thread beside the event loop.

A sample depends on its request's seed and its number alone, so batching changes how fast answers come, not what they
say.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from omniopd.generation import Sample, SampleRequest

GATHER_S = 0.003
"""How long the first request waits for company. While a batch is written, later ones wait anyway."""


class Samples(Protocol):
    """What the batcher needs of `omniopd.generation.Sampler`."""

    def sample(self, requests: Sequence[SampleRequest], *, batch_size: int = 512) -> list[list[Sample]]: ...


class _Job:
    __slots__ = ("future", "requests")

    def __init__(self, requests: Sequence[SampleRequest]) -> None:
        self.requests = tuple(requests)
        self.future: Future[list[list[Sample]]] = Future()


class Batcher:
    """Owns the sampler while it lives: nothing else may use the model.

    Args:
        sampler: used from the batcher's own thread only.
        batch_size: sequences decoded together; bounds the memory.
    """

    def __init__(self, sampler: Samples, *, batch_size: int = 512) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="omniopd-batcher", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[SampleRequest]) -> Future[list[list[Sample]]]:
        """Queue requests; the future gives their samples, in order. Cancel it to take them back."""
        job = _Job(requests)
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Finish what is queued and stop. Safe to call twice."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            time.sleep(GATHER_S)
            jobs, is_last = [first], False
            while not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    is_last = True
                    break
                jobs.append(job)
            self._run([job for job in jobs if job.future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _run(self, jobs: list[_Job]) -> None:
        for same in _alike(jobs):
            try:
                results = self._sampler.sample([r for job in same for r in job.requests], batch_size=self._batch_size)
            except Exception as error:
                if len(same) == 1:
                    # Not swallowed: whoever waits for this job gets it.
                    same[0].future.set_exception(error)
                    continue
                # One bad request must not fail its neighbors.
                for job in same:
                    self._run([job])
                continue
            position = 0
            for job in same:
                job.future.set_result(results[position : position + len(job.requests)])
                position += len(job.requests)


def _alike(jobs: list[_Job]) -> list[list[_Job]]:
    """Group jobs that cost the least together: with and without a nucleus, which sorts the vocabulary for every row."""
    groups: dict[tuple[bool, bool], list[_Job]] = {}
    for job in jobs:
        plain = all(r.temperature == 1 and r.top_p == 1 for r in job.requests)
        nucleus = any(r.top_p < 1 for r in job.requests)
        groups.setdefault((plain, nucleus), []).append(job)
    return list(groups.values())
