"""What may be spent, in USD, tokens or calls, and the check that keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from omniopd.errors import ConfigError, TeacherBudgetError
from omniopd.teachers.base import Bound
from omniopd.types import Value

# Sums of floats are off by less than this; it is a thousandth of a millionth of a dollar.
_SLACK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(Value):
    """The most that all calls in a ledger may cost together, earlier runs included. None is no limit."""

    usd: float | None = None
    tokens: int | None = None
    """Input and output."""
    calls: int | None = None
    """HTTP requests, failed ones included."""

    def __post_init__(self) -> None:
        for name, limit in (("usd", self.usd), ("tokens", self.tokens), ("calls", self.calls)):
            if limit is not None and not limit >= 0:
                raise ConfigError(f"budget_{name} is {limit}; expected 0 or more, or null for no limit")

    @property
    def is_limited(self) -> bool:
        return (self.usd, self.tokens, self.calls) != (None, None, None)

    def covers(self, bound: Bound, funds: Funds, teacher_id: str, *, may_wait: bool = False) -> bool:
        """Say whether one more HTTP request may be sent now.

        False only if it may wait: it fits what is spent, but not what is under way besides, which may turn out cheaper.

        Raises:
            TeacherBudgetError: it does not fit, or will not whatever becomes of what is under way.
            ConfigError: a budget in USD and something whose cost nobody can bound.
        """
        if self.usd is not None and (bound.usd is None or funds.unbounded_calls):
            what = "its price is unknown" if bound.usd is None else "the ledger holds calls of unknown cost"
            raise ConfigError(f"budget_usd is {self.usd} for {teacher_id} but {what}; give its price, or a new ledger")
        parts = (
            ("usd", "USD", ".4f", self.usd, bound.usd or 0.0, funds.spent.usd, funds.possible.usd, funds.under_way.usd),
            (
                *("tokens", "tokens", ",.0f", self.tokens),
                *(bound.tokens, funds.spent.tokens, funds.possible.tokens, funds.under_way.tokens),
            ),
            ("calls", "calls", ",.0f", self.calls, 1, funds.spent.calls, 0, funds.under_way.calls),
        )
        fits = True
        for name, unit, form, limit, this, spent, possible, under_way in parts:
            if limit is None:
                continue
            short = spent + possible + under_way + this > limit + _SLACK
            if short and (not may_wait or spent + possible + this > limit + _SLACK):
                raise TeacherBudgetError(
                    f"the budget of {limit:{form}} {unit} does not cover the next request to {teacher_id}: "
                    f"spent {spent:{form}}, possibly spent {possible:{form}}, under way {under_way:{form}}, "
                    f"this may cost {this:{form}}; raise budget_{name} and run the same again (train: with --resume)"
                )
            fits = fits and not short
        return fits


UNLIMITED = Budget()


@dataclass(frozen=True, slots=True)
class Amount:
    """Money, tokens and calls of some requests."""

    usd: float = 0.0
    tokens: float = 0
    calls: float = 0

    def plus(self, other: Amount) -> Amount:
        """Return the sum."""
        return Amount(self.usd + other.usd, self.tokens + other.tokens, self.calls + other.calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Funds:
    """Where a ledger stands, all processes that share it together."""

    spent: Amount
    possible: Amount
    """Upper bounds of requests that were sent and never answered, or answered without a bill."""
    under_way: Amount
    """Upper bounds of requests whose answer is still to come."""
    unbounded_calls: int = 0
    """Requests of unknown price."""
