"""What scoring a response comes to: the values, and how one is made of a score and its evidence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from omniopd.types import ChunkScore, Continuation, Missing, TeacherContinuations, Usage, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredChunk(Value):
    """A span of a response and how far the teacher agrees with it."""

    start: int
    end: int
    """Half-open character range [start, end) of the response."""
    text: str
    score: float | None
    """In [0, 1]; None when too little of the teacher's text was usable."""
    num_continuations: int
    """How many continuations the score rests on."""
    missing: Missing | None = None
    """Why there is no score."""
    detail: str = ""
    """Why evidence is missing, and what was repaired in the teacher's replies."""
    continuations: tuple[str, ...] = ()
    """What the teacher wrote instead, as far as usable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRewards(Value):
    """All chunks of one response, in the order of the text."""

    chunks: tuple[ScoredChunk, ...]
    usage: Usage = field(default_factory=Usage)
    """What this response cost. A request that several responses share is counted with the first."""

    @property
    def reward(self) -> float | None:
        """The mean of the scores there are; None without any."""
        scores = [chunk.score for chunk in self.chunks if chunk.score is not None]
        return math.fsum(scores) / len(scores) if scores else None


def scored_chunk(evidence: TeacherContinuations, score: ChunkScore, value: float | None) -> ScoredChunk:
    """Put together what is told about a chunk; `value` is the final score."""
    return ScoredChunk(
        start=score.chunk.start,
        end=score.chunk.end,
        text=score.chunk.text,
        score=value,
        num_continuations=score.num_continuations,
        missing=score.missing,
        detail=_detail(score, evidence.continuations),
        continuations=evidence.texts,
    )


def _detail(score: ChunkScore, continuations: Sequence[Continuation]) -> str:
    counts = Counter(continuation.detail for continuation in continuations if continuation.detail)
    told = [text if count == 1 else f"{count} x {text}" for text, count in counts.items()]
    return "; ".join(([score.detail] if score.detail else []) + told)
