"""Submit batches once and wait until they end, across lost connections and restarts of this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from omniopd.errors import TeacherConnectionError, TeacherError, TeacherTimeoutError
from omniopd.teachers.batch_endpoints import BatchEndpoint, BatchState, NotYetKnownError, Outcome, TryAgainError
from omniopd.teachers.batch_journal import Intent, Journal

FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 60.0
PAUSE_GROWTH = 1.5
MAX_WAIT_S = 26 * 3600.0
"""Servers end a batch after 24 hours; one that has not ended by then is given up on, but not forgotten."""
MAX_FAILED_POLLS = 30
"""Polls in a row that may fail: about half an hour without a network."""
MAX_ATTEMPTS = 6

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]
Progress = Callable[[int, int], None]
"""Told how many HTTP requests are answered, of how many."""


@dataclass(frozen=True, slots=True)
class EndedBatch:
    """What came of a batch."""

    intent: Intent
    outcomes: Mapping[str, Outcome]
    """By custom id."""
    reason: str
    """Why a request without an outcome has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientEndpoint:
    """A batch endpoint whose submits are in the journal before they are sent."""

    endpoint: BatchEndpoint
    journal: Journal
    base_url: str
    """For messages."""
    sleep: Sleep
    progress: Progress

    async def adopt(self, intent: Intent) -> None:
        """Find out what became of a submit that an earlier process did not live to write down."""
        if (batch_id := await self._find(intent)) is not None:
            self.journal.submitted(intent, batch_id)
        else:
            self.journal.abandon(intent)

    async def submit(self, intent: Intent, lines: Sequence[bytes]) -> None:
        """Submit a batch. What cannot be submitted is not in the journal afterwards, unless nobody knows."""
        staged = await self._repeat(lambda: self.endpoint.stage(lines))
        self.journal.intend(intent)
        self.journal.submitted(intent, await self._create(intent, staged))

    async def ended(self, intents: Sequence[Intent]) -> AsyncGenerator[EndedBatch, None]:
        """Poll until every batch has ended; yields each as it does."""
        waiting = {intent.token: intent for intent in intents}
        done = dict.fromkeys(waiting, 0)
        total = sum(len(intent.items) for intent in intents)
        pauses, failed = _Pauses(self.sleep), 0
        while waiting:
            for token, intent in list(waiting.items()):
                try:
                    state = await self._state(intent)
                except TryAgainError as fault:
                    failed += 1
                    if failed > MAX_FAILED_POLLS:
                        raise TeacherConnectionError(
                            f"{failed} polls of {self.base_url} in a row failed, the last with: {fault}; submitted "
                            "batches run on, run the same command again to wait for them"
                        ) from None
                    continue
                failed = 0
                done[token] = len(intent.items) if state.ended else state.done
                if state.ended:
                    outcomes = await self._results(state)
                    del waiting[token]
                    yield EndedBatch(intent, outcomes, state.reason)
            self.progress(sum(done.values()), total)
            if waiting and pauses.waited_s >= MAX_WAIT_S:
                raise TeacherTimeoutError(
                    f"{len(waiting)} batches have not ended after {pauses.waited_s / 3600:.0f} hours, expected 24 at "
                    f"most; they are kept in {self.journal.path}, run the same command again to go on waiting"
                )
            if waiting:
                await pauses.next()

    async def _state(self, intent: Intent) -> BatchState:
        assert intent.batch_id is not None
        return await self.endpoint.state(intent.path, intent.batch_id)

    async def _results(self, state: BatchState) -> dict[str, Outcome]:
        """Read the results; when some lack, again, and in the end take what there is."""
        pauses = _Pauses(self.sleep)
        for _ in range(MAX_ATTEMPTS):
            outcomes = await self._repeat(lambda: self.endpoint.results(state))
            if len(outcomes) >= state.num_results:
                break
            await pauses.next()
        return outcomes

    async def _find(self, intent: Intent) -> str | None:
        known = self.journal.batch_ids(intent.service)
        return await self._repeat(
            lambda: self.endpoint.find(intent.path, intent.token, len(intent.items), intent.time, known)
        )

    async def _create(self, intent: Intent, staged: Any) -> str:
        """Start the batch once: after an attempt of unknown outcome, look before asking again."""
        pauses, fault = _Pauses(self.sleep), ""
        for _ in range(MAX_ATTEMPTS):
            try:
                return await self.endpoint.create(intent.path, staged, intent.token)
            except TryAgainError as error:
                fault = str(error)
            except TeacherError:
                self.journal.abandon(intent)
                raise
            await pauses.next()
            if (batch_id := await self._find(intent)) is not None:
                return batch_id
        self.journal.abandon(intent)
        raise TeacherConnectionError(
            f"no batch could be submitted to {self.base_url} in {MAX_ATTEMPTS} attempts, the last with: {fault}; run "
            "the same command again"
        )

    async def _repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat what buys nothing. What only time can tell is waited for as long as a batch."""
        pauses, attempts = _Pauses(self.sleep), 0
        while True:
            try:
                return await attempt()
            except TryAgainError as fault:
                attempts += not isinstance(fault, NotYetKnownError)
                if attempts >= MAX_ATTEMPTS or pauses.waited_s >= MAX_WAIT_S:
                    raise TeacherConnectionError(
                        f"{self.base_url} gave no answer that could be used: {fault}; what was submitted is kept, run "
                        "the same command again"
                    ) from None
            await pauses.next()


class _Pauses:
    """Pauses that grow from the first to the longest."""

    def __init__(self, sleep: Sleep) -> None:
        self._sleep = sleep
        self._next_s = FIRST_PAUSE_S
        self.waited_s = 0.0

    async def next(self) -> None:
        await self._sleep(self._next_s)
        self.waited_s += self._next_s
        self._next_s = min(self._next_s * PAUSE_GROWTH, MAX_PAUSE_S)
