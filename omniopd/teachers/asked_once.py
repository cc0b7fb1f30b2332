"""Many askers, one question: requests that several of them need go to the teacher once, with or without a ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from omniopd.errors import TeacherResponseError
from omniopd.teachers.base import ContinuationRequest, Teacher, TeacherAnswer
from omniopd.types import Usage


class AskedOnce:
    """Ask a teacher each request once, however many need its answer and whenever they do. For one event loop.

    An answer is kept until the last one who needs it has it. Its bill goes to the first.

    Args:
        teacher: Who is asked.
        needed: Every request that will be asked for, as often as it will be. Read once; only counts are kept.
    """

    def __init__(self, teacher: Teacher, needed: Iterable[ContinuationRequest]) -> None:
        self._teacher = teacher
        # By hash, since the texts of all requests together may be large; a collision keeps an answer for longer.
        uses = Counter(map(hash, needed))
        self._left = {key: count for key, count in uses.items() if count > 1}
        self._asked: dict[ContinuationRequest, asyncio.Future[TeacherAnswer]] = {}
        self._billed: set[ContinuationRequest] = set()

    async def answers(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        """Answer every request, in order; what nobody has asked yet goes to the teacher in one call.

        Raises what the teacher raises, also to those who wait for the same request.
        """
        await self.ask([request for request in requests if request not in self._asked])
        return [await self._take(request) for request in requests]

    async def ask(self, requests: Iterable[ContinuationRequest]) -> None:
        """Ask for these in one call, for later."""
        loop = asyncio.get_running_loop()
        asked = {request: loop.create_future() for request in requests}
        if not asked:
            return
        self._asked.update(asked)
        try:
            got = await self._teacher.continuations(list(asked))
            if len(got) != len(asked):
                raise TeacherResponseError(
                    f"the teacher {self._teacher.id} gave {len(got)} answers to {len(asked)} requests; expected as many"
                )
        except BaseException as error:
            for waiting in asked.values():
                _fail(waiting, error)
            raise
        for waiting, answer in zip(asked.values(), got, strict=True):
            if not waiting.done():
                waiting.set_result(answer)

    async def _take(self, request: ContinuationRequest) -> TeacherAnswer:
        answer = await self._asked[request]
        if request in self._billed:
            answer = replace(answer, usage=Usage())
        self._billed.add(request)
        key = hash(request)
        left = self._left.get(key, 1) - 1
        if left:
            self._left[key] = left
        else:
            self._left.pop(key, None)
            self._asked.pop(request, None)
            self._billed.discard(request)
        return answer


def _fail(waiting: asyncio.Future[TeacherAnswer], error: BaseException) -> None:
    if waiting.done():
        return
    if isinstance(error, asyncio.CancelledError):
        waiting.cancel()
    else:
        waiting.set_exception(error)
        waiting.exception()  # Perhaps nobody waits; then this is no error of its own.
