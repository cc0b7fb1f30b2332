"""What a text-only teacher is: the request it gets, the answer it gives, and whom it asks before it spends.

A teacher never sees the student's chunk, only the prompt and the text before it; so rollouts that share a prefix may
share an answer. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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
    sample_numbers: tuple[int, ...] | None = None
    """[n] which samples of a larger request these are, when the others are there already; None: 0..n-1."""
    token_ids: tuple[int, ...] | None = None
    """Prompt and prefix as the student drew them, for a teacher with the student's own vocabulary; None where nobody
    needs them."""


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

        A sample that fails becomes a `Continuation` with a reason. Raises TeacherAuthError, TeacherConnectionError,
        TeacherRateLimitError (a quota is used up) and TeacherBudgetError, which no further request would survive.
        """
        ...

    async def aclose(self) -> None:
        """Close connections. Safe to call twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One sample as it came off the wire, and what was made of it."""

    position: int
    """Which of the requests of the call."""
    sample: int
    """0..n-1 of that request."""
    raw: str
    """As the server sent it."""
    continuation: Continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound(Value):
    """The most that one HTTP request can cost."""

    tokens: int
    """Input and output."""
    usd: float | None = None
    """None when the price is unknown."""


class Order(Protocol):
    """One HTTP request that may be sent. It is settled exactly once."""

    async def settle(self, replies: Sequence[Reply], usage: Usage, seconds: float) -> None:
        """Write the bill and the samples down, together; they are safe on disk when this returns.

        A request that failed is settled with what is known: no replies, and `usage.unanswered_requests=1` when it was
        sent and no answer came, so that its bound counts as possibly spent. Raises RunError when it cannot be written.
        """
        ...


class Till(Protocol):
    """Whom a teacher asks before it spends."""

    async def order(self, bound: Bound) -> Order:
        """Reserve the bound for one HTTP request. Raises TeacherBudgetError when the budget does not cover it."""
        ...


class RecordedTeacher(Teacher, Protocol):
    """A teacher that orders each HTTP request and settles it before its samples are used."""

    @property
    def exact_samples(self) -> bool:
        """Whether asking the same request again gives the same samples."""
        ...

    @property
    def reads_token_ids(self) -> bool:
        """Whether `token_ids` shape the answer, and not the prefix's text alone."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """All that shapes an answer besides the request; plain JSON values."""
        ...

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]: ...
