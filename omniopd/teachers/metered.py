"""Counts what the teacher costs, for the records and for a run that is continued."""

from __future__ import annotations

from collections.abc import Sequence

from omniopd.teachers.base import ContinuationRequest, Teacher, TeacherAnswer
from omniopd.types import Usage


class MeteredTeacher:
    """Passes every request on and adds up the usage."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._since_taken = Usage()

    @property
    def id(self) -> str:
        return self._teacher.id

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        answers = await self._teacher.continuations(requests)
        for answer in answers:
            self._since_taken += answer.usage
        return answers

    def take(self) -> Usage:
        """Return the usage since the last call."""
        taken, self._since_taken = self._since_taken, Usage()
        return taken

    async def aclose(self) -> None:
        await self._teacher.aclose()
