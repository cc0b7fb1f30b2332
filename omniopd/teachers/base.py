"""What a text-only teacher is: the request it gets, the answer it gives. Standard library only.

A teacher never sees the student's chunk, only the prompt and the text before it; so rollouts that share a prefix may
share an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from omniopd.types import Continuation, Message, Usage, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationRequest(Value):
    """Ask for `n` continuations of one partial answer."""

    messages: tuple[Message, ...]
    """The conversation, without the partial answer."""
    prefix: str
    """The partial answer; empty asks for an answer from the start."""
    n: int
    max_tokens: int
    """Length limit of each continuation, in the teacher's tokens."""
    seed: int | None = None
    """Best effort at hosted teachers, exact at `omniopd serve`. Sample i of a request is the same whatever `n` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAnswer(Value):
    """What came back for one request: exactly `n` continuations, each with text or a reason."""

    continuations: tuple[Continuation, ...]
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0


@runtime_checkable
class Teacher(Protocol):
    """A model that can only be prompted. Spends money."""

    @property
    def id(self) -> str:
        """`provider:model`, for records and the ledger."""
        ...

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        """Answer every request, in order.

        A sample that fails becomes a `Continuation` with a reason. Raises TeacherAuthError, TeacherConnectionError
        and TeacherBudgetError, which no further request would survive.
        """
        ...

    async def aclose(self) -> None:
        """Close connections. Safe to call twice."""
        ...
