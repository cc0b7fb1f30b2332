"""A teacher in this process that orders and settles as one over HTTP does, and writes down each thing it sells."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd.teachers.base import Bound, ContinuationRequest, Reply, TeacherAnswer, Till
from omniopd.types import Continuation, Message, Missing, Usage


def ask(prefix: str = "The sum", *, n: int = 1, seed: int | None = None) -> ContinuationRequest:
    return ContinuationRequest(
        messages=(Message(role="user", content="2+3"),), prefix=prefix, n=n, max_tokens=10, seed=seed
    )


def texts(answer: TeacherAnswer) -> list[str | None]:
    return [c.text for c in answer.continuations]


class ScriptedTeacher:
    """Sell a sample for each one asked: 10 tokens in and 5 out for 0.5 USD a request, bounded by 20 tokens and 1 USD.

    Args:
        sold: one line for each sample that was sold, `prefix seed number`; all processes append to it.
        delay_s: what an answer takes; a pair draws it between two bounds.
        outcome: what becomes of a prefix, if not an answer.
    """

    def __init__(
        self,
        sold: Path,
        *,
        delay_s: tuple[float, float] = (0.0, 0.0),
        outcome: Mapping[str, Missing | Exception] | None = None,
        is_exact: bool = False,
        reads_token_ids: bool = False,
        price_usd: float | None = 0.5,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        self.id = "scripted:m"
        self.exact_samples = is_exact
        self.reads_token_ids = reads_token_ids
        self.fingerprint: Mapping[str, Any] = fingerprint or {"temperature": 1.0}
        self.outcome = dict(outcome or {})
        self.closed = 0
        self._sold = sold
        self._delay_s = delay_s
        self._price_usd = price_usd
        self._random = random.Random(os.getpid())

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]:
        assert till is not None
        return list(await asyncio.gather(*(self._sell(i, r, till) for i, r in enumerate(requests))))

    async def aclose(self) -> None:
        self.closed += 1

    async def _sell(self, position: int, request: ContinuationRequest, till: Till) -> TeacherAnswer:
        order = await till.order(Bound(tokens=20, usd=None if self._price_usd is None else 1.0))
        usage = Usage(requests=1, input_tokens=10, output_tokens=5, cost_usd=self._price_usd)
        await asyncio.sleep(self._random.uniform(*self._delay_s))
        outcome = self.outcome.get(request.prefix)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            continuations = (Continuation(text=None, missing=outcome, detail="scripted"),) * request.n
        else:
            numbers = request.sample_numbers or range(request.n)
            with self._sold.open("a") as file:
                file.write("".join(f"{request.prefix} {request.seed} {i}\n" for i in numbers))
            continuations = tuple(
                Continuation(text=f" {request.prefix}/{request.seed}/{i}", finish_reason="stop") for i in numbers
            )
        replies = [
            Reply(position=position, sample=i, raw=f"raw {c.text}", continuation=c) for i, c in enumerate(continuations)
        ]
        await order.settle(replies, usage, 0.25)
        return TeacherAnswer(continuations=continuations, usage=usage, seconds=0.25)


def sold(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
