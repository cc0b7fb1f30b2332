"""`echo:NAME`: a teacher without a model or a network, for tutorials and tests. It teaches nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from omniopd.teachers.base import Bound, ContinuationRequest, Reply, TeacherAnswer, Till
from omniopd.types import Continuation, Usage

_FILLER = ("so", "the", "next", "step", "is", "then")


class EchoTeacher:
    """Write the words of the prompt in a shuffled order. Deterministic in the request; free.

    Sample i depends on the messages, the prefix, the seed and i alone. A token is a word.
    """

    def __init__(self, name: str = "demo") -> None:
        self._id = f"echo:{name}"

    @property
    def id(self) -> str:
        """`echo:NAME`"""
        return self._id

    @property
    def exact_samples(self) -> bool:
        return True

    @property
    def reads_token_ids(self) -> bool:
        return False

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that shapes an answer besides the request, for the ledger's key."""
        return {"teacher": self._id}

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]:
        """Answer every request, in order."""
        answers = []
        for position, request in enumerate(requests):
            num_words = sum(len(m.content.split()) for m in request.messages) + len(request.prefix.split())
            bound = Bound(tokens=num_words + request.n * request.max_tokens, usd=0.0)
            order = await till.order(bound) if till is not None else None
            samples = tuple(self._write(request, i) for i in range(request.n))
            usage = Usage(
                requests=1,
                input_tokens=num_words,
                output_tokens=sum(len((c.text or "").split()) for c in samples),
                cost_usd=0.0,
            )
            if order is not None:
                replies = [
                    Reply(position=position, sample=i, raw=c.text or "", continuation=c) for i, c in enumerate(samples)
                ]
                await order.settle(replies, usage, 0.0)
            answers.append(TeacherAnswer(continuations=samples, usage=usage))
        return answers

    async def aclose(self) -> None:
        """Nothing to close."""

    def _write(self, request: ContinuationRequest, sample: int) -> Continuation:
        told = "\n".join([self._id, *(f"{m.role}: {m.content}" for m in request.messages), request.prefix])
        digest = hashlib.sha256(f"{told}\n{request.seed}\n{sample}".encode()).digest()
        words = [word for m in request.messages for word in m.content.split()] + request.prefix.split()
        words = (words or list(_FILLER)) + list(_FILLER)
        rng = random.Random(digest)
        count = min(request.max_tokens, rng.randint(4, 16))
        text = " ".join(rng.choice(words) for _ in range(count))
        joint = " " if request.prefix and not request.prefix[-1].isspace() else ""
        reason = "length" if count == request.max_tokens else "stop"
        return Continuation(text=joint + text, finish_reason=reason)
