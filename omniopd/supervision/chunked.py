"""Black-box supervision: audit uncertain chunks with a teacher's text (arXiv 2606.01476).

rollouts -> chunks -> teacher continuations -> similarities -> credit -> token signals
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from omniopd.errors import ConfigError, TeacherResponseError
from omniopd.signals.credit import AuditedRollout, ChunkCredit, Credit, StudentVocabulary
from omniopd.supervision.base import StudentMeasure
from omniopd.teachers.base import ContinuationRequest, Teacher, TeacherAnswer
from omniopd.timing import StepTimer
from omniopd.types import Audit, Chunk, ChunkScore, Rollout, StepContext, TeacherContinuations, TokenSignal


class Chunker(Protocol):
    """Chooses the spans of a rollout that are audited."""

    def split(self, rollout: Rollout) -> list[Chunk]:
        """Return disjoint chunks in the order of the text."""
        ...


class Scorer(Protocol):
    """Compares continuations with what the student wrote."""

    def score(self, answers: Sequence[TeacherContinuations]) -> list[ChunkScore]:
        """Return one score for each answer, in order."""
        ...


@dataclass(kw_only=True)
class ChunkedSupervision:
    """Audits each rollout where the chunker says, and anchors every token that got no other signal."""

    teacher: Teacher
    chunker: Chunker
    scorer: Scorer
    credit: Credit
    vocabulary: StudentVocabulary
    measure: StudentMeasure
    timer: StepTimer
    num_continuations: int
    """N"""
    anchor_beta: float
    """Weight of the exact KL to the frozen initial student."""
    continuation_tokens: int | None = None
    """Length limit of a continuation in teacher tokens; None: as many as the chunk has student tokens."""
    max_missing_fraction: float = 0.5
    seed: int = 0
    _has_audited: bool = field(default=False, init=False)

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Audit the rollouts.

        Raises:
            ConfigError: when no rollout is long enough for one chunk.
            TeacherResponseError: when more than `max_missing_fraction` of the continuations is unusable.
            TeacherAuthError, TeacherConnectionError, TeacherBudgetError: from the teacher.
        """
        with self.timer("measure"):
            views = self.measure(rollouts)
        measured = [
            dataclasses.replace(r, entropies=entropies) for r, (_, entropies) in zip(rollouts, views, strict=True)
        ]
        chunks = [self.chunker.split(rollout) for rollout in measured]
        self._check_chunks(measured, chunks)
        with self.timer("teacher"):
            answers = await self._ask(measured, chunks)
        self._check_missing(answers, ctx)
        with self.timer("score"):
            audits = self._score(chunks, answers)
            audited = [
                AuditedRollout(rollout=r, audits=a, logprobs=logprobs)
                for r, a, (logprobs, _) in zip(measured, audits, views, strict=True)
            ]
            credits = self.credit.assign(audited, self.vocabulary)
            return [self._signal(a, c) for a, c in zip(audited, credits, strict=True)]

    async def _ask(self, rollouts: Sequence[Rollout], chunks: Sequence[Sequence[Chunk]]) -> list[TeacherAnswer]:
        requests = [
            ContinuationRequest(
                messages=rollout.prompt.messages,
                prefix=chunk.prefix,
                n=self.num_continuations,
                max_tokens=self.continuation_tokens or chunk.num_tokens,
                seed=request_seed(self.seed, rollout.prompt.id, chunk.prefix),
                token_ids=rollout.prompt.token_ids + rollout.token_ids[: chunk.start],
            )
            for rollout, of_rollout in zip(rollouts, chunks, strict=True)
            for chunk in of_rollout
        ]
        return await self.teacher.continuations(requests) if requests else []

    def _score(self, chunks: Sequence[Sequence[Chunk]], answers: Sequence[TeacherAnswer]) -> list[tuple[Audit, ...]]:
        flat = [chunk for of_rollout in chunks for chunk in of_rollout]
        evidence = [
            TeacherContinuations(
                chunk=chunk,
                continuations=answer.continuations,
                teacher_id=self.teacher.id,
                usage=answer.usage,
                seconds=answer.seconds,
            )
            for chunk, answer in zip(flat, answers, strict=True)
        ]
        scores = self.scorer.score(evidence)
        audits = iter(Audit(chunk=c, continuations=e, score=s) for c, e, s in zip(flat, evidence, scores, strict=True))
        return [tuple(next(audits) for _ in of_rollout) for of_rollout in chunks]

    def _signal(self, audited: AuditedRollout, credits: Sequence[ChunkCredit]) -> TokenSignal:
        length = audited.rollout.num_tokens
        advantages, pg_weights = [0.0] * length, [0.0] * length
        targets = [target for credit in credits for target in credit.soft_targets]
        for audit, credit in zip(audited.audits, credits, strict=True):
            if credit.weight is not None:
                for t in range(audit.chunk.start, audit.chunk.end):
                    advantages[t], pg_weights[t] = credit.weight, 1.0
        supervised = {t for t, weight in enumerate(pg_weights) if weight > 0} | {target.position for target in targets}
        has_weights = any(credit.weight is not None for credit in credits)
        return TokenSignal(
            rollout=audited.rollout,
            advantages=tuple(advantages) if has_weights else None,
            pg_weights=tuple(pg_weights) if has_weights else None,
            soft_targets=tuple(targets) or None,
            anchor_weights=tuple(0.0 if t in supervised else self.anchor_beta for t in range(length))
            if self.anchor_beta > 0
            else None,
            audits=tuple(
                dataclasses.replace(audit, weight=credit.weight)
                for audit, credit in zip(audited.audits, credits, strict=True)
            ),
        )

    def _check_chunks(self, rollouts: Sequence[Rollout], chunks: Sequence[Sequence[Chunk]]) -> None:
        if any(chunks):
            self._has_audited = True
        elif not self._has_audited:
            longest = max((r.num_tokens for r in rollouts), default=0)
            wanted = getattr(self.chunker, "chunk_tokens", "?")
            raise ConfigError(
                f"no chunk fits: method.supervision.chunker.chunk_tokens is {wanted}, but the longest of the "
                f"{len(rollouts)} rollouts has {longest} tokens; set it to {max(1, longest // 3)} or less"
            )

    def _check_missing(self, answers: Sequence[TeacherAnswer], ctx: StepContext) -> None:
        asked = [c for answer in answers for c in answer.continuations]
        missing = [c for c in asked if c.missing is not None]
        if not asked or len(missing) <= self.max_missing_fraction * len(asked):
            return
        reasons = Counter(str(c.missing) for c in missing)
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        first = next((c.detail for c in missing if c.detail), "no detail")
        raise TeacherResponseError(
            f"step {ctx.step + 1}: {len(missing)} of {len(asked)} continuations of {self.teacher.id} are unusable "
            f"({told}), more "
            f"than teacher.max_missing_fraction {self.max_missing_fraction:g}; the first says: {first}. Try "
            f"`omniopd teachers check {self.teacher.id}` or another teacher.continuation."
        )


def request_seed(seed: int, prompt_id: str, prefix: str) -> int:
    """Return the sampling seed of a prefix: the same prefix is the same question, whichever rollout it stands in.

    So rollouts that share a prefix share the answer, and a prefix that comes back later is answered from the ledger.
    """
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}\0{prefix}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") >> 1
