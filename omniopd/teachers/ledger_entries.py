"""What goes into a ledger and comes out of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from omniopd.teachers.base import Bound, Reply
from omniopd.teachers.budget import Budget
from omniopd.teachers.ledger_queries import Samples, storable, write_continuation
from omniopd.types import Usage


@dataclass(slots=True, eq=False)
class Ordered:
    """One HTTP request that may be sent: reserved, not yet settled."""

    id: int
    teacher_id: str
    bound: Bound


@dataclass(slots=True, eq=False)
class Claim:
    """Keys that somebody wants to ask for."""

    keys: tuple[str, ...]
    granted: list[str] = field(default_factory=list)
    """Filled in by the writer's thread."""


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """A request that somebody wants to send."""

    order: Ordered
    budget: Budget
    deadline: float
    """In monotonic seconds: until then it may wait."""


@dataclass(frozen=True, slots=True, eq=False)
class Bill:
    """A settled request as its rows; made by whoever settles, so that the writer's thread need not."""

    order: int
    amounts: tuple[Any, ...]
    samples: list[tuple[str, int, str, str]]

    @classmethod
    def of(cls, order: Ordered, samples: Sequence[tuple[str, int, Reply]], usage: Usage, seconds: float) -> Self:
        """Make the rows of a request, with the most that may have been spent where the bill does not say."""
        bound, tokens = order.bound, usage.input_tokens + usage.output_tokens
        # Without an answer or without a bill, up to the bound may have been spent.
        is_uncertain = usage.unanswered_requests > 0 or usage.cost_usd is None
        is_uncounted = usage.unanswered_requests > 0 or (usage.requests > 0 and bool(samples) and tokens == 0)
        amounts = (
            *(time.time(), seconds, order.teacher_id, usage.requests, usage.unanswered_requests),
            *(usage.input_tokens, usage.output_tokens, usage.cached_input_tokens, usage.cache_write_tokens),
            *(usage.reasoning_tokens, usage.cost_usd),
            *(bound.usd if is_uncertain else 0.0, bound.tokens if is_uncounted else 0),
        )
        rows = [(key, i, storable(r.raw), write_continuation(r.continuation)) for key, i, r in samples]
        return cls(order.id, amounts, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What a claim got."""

    granted: frozenset[str] = frozenset()
    """Keys that nobody else is asking for."""
    found: Samples = field(default_factory=dict)
    """Samples of the granted keys that came in since one last looked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A request without an answer."""

    owner: str
    teacher: str
    time: float
    """Seconds since 1970."""
    bound: Bound
    is_alive: bool
    """Whether its process still runs. If not, the answer is lost and may have been billed."""
