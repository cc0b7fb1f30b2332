"""From teacher continuations to the evidence for a chunk, and from evidence to the target weight.

Pure arithmetic on text that is already there; asks no teacher.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omniopd.errors import ConfigError
from omniopd.scoring.similarity import AnySimilarity, as_similarity
from omniopd.types import ChunkScore, Missing, TeacherContinuations

_MAX_LOGPROB = 1e-6
"""A log-probability may exceed 0 by this much: float32 rounding."""


def smoothed_target(evidence: float, num_continuations: int, prior: float, *, alpha: float) -> float:
    """Return w = (k + alpha * b) / (n + alpha): the teacher's agreement, shrunk towards the student's own belief.

    Source: arXiv:2606.01476 section 3, as published; n is the number of usable continuations, so a lost one is not
    counted as disagreement.

    Args:
        evidence: k, the sum of n similarities.
        num_continuations: n.
        prior: b in [0, 1], see `geometric_prior`.
        alpha: The prior's weight, in continuations.

    Raises:
        ConfigError: not 0 <= k <= n, not 0 <= b <= 1, alpha < 0, or n + alpha = 0.

    Example:
        >>> round(smoothed_target(4, 10, 0.818731, alpha=1.0), 6)
        0.438066
    """
    if num_continuations < 0 or not 0 <= evidence <= num_continuations + 1e-9:
        raise ConfigError(
            f"evidence {evidence} from {num_continuations} continuations; expected 0 to {num_continuations}"
        )
    if not 0 <= prior <= 1:
        raise ConfigError(f"prior is {prior}; expected a probability from 0 to 1")
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"alpha is {alpha}; expected at least 0")
    if num_continuations + alpha == 0:
        raise ConfigError("no continuations and alpha 0: there is no target; expected some evidence or alpha above 0")
    return (evidence + alpha * prior) / (num_continuations + alpha)


def geometric_prior(logprobs: Sequence[float]) -> float:
    """Return b, the geometric mean of the probabilities of a chunk's tokens, in [0, 1].

    Source: arXiv:2606.01476 section 3, as published.

    Args:
        logprobs: [C] the student's, in nats. -inf is allowed and gives 0.

    Raises:
        ConfigError: empty, NaN, or above 0 by more than float32 rounding.
    """
    if not logprobs:
        raise ConfigError("no log-probabilities; expected one for each token of the chunk")
    for position, logprob in enumerate(logprobs):
        if not logprob <= _MAX_LOGPROB:
            raise ConfigError(f"log-probability {logprob} at position {position} of the chunk; expected at most 0")
    return min(1.0, math.exp(sum(logprobs) / len(logprobs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScorer:
    """Score chunks by the mean similarity of the teacher's usable continuations to the student's text.

    Whitespace at the joint is not compared: many chat endpoints cannot return it.

    Source: arXiv:2606.01476 section 3. Differs: `align`, and `min_continuations` instead of filling up with 0.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "arbitrary_types_allowed": True}

    similarity: AnySimilarity = "edit"
    """A line for `get_similarity`, an object, or a function of two texts."""
    min_continuations: int | float = 1
    """Below this a chunk is unaudited. A whole number counts continuations; a fraction (a float, at most 1.0) is the
    share of those asked for."""
    align: bool = True
    """Cut each continuation to the chunk's length in characters. The teacher's length limit is in its own tokens, so
    where a continuation ends late says nothing; one that ends early is compared as it is."""

    def __post_init__(self) -> None:
        as_similarity(self.similarity)
        least = self.min_continuations
        is_count = isinstance(least, int) and not isinstance(least, bool) and least >= 1
        if not is_count and not (isinstance(least, float) and 0 < least <= 1):
            raise ConfigError(
                f"min_continuations is {least!r}; expected a whole number of at least 1, or a fraction like 0.5"
            )

    def score(self, answers: Sequence[TeacherContinuations]) -> list[ChunkScore]:
        """Return one score for each answer, in order. All pairs are compared in one batch."""
        similarity = as_similarity(self.similarity)
        mine: list[str] = []
        theirs: list[str] = []
        for answer in answers:
            chunk_text = _without_joint(answer.chunk.text)
            for text in map(_without_joint, answer.texts):
                mine.append(chunk_text)
                theirs.append(text[: len(chunk_text)] if self.align else text)
        scores = iter(similarity.pairs(mine, theirs))
        return [
            self._chunk_score(answer, tuple(next(scores) for _ in answer.texts), similarity.name) for answer in answers
        ]

    def _chunk_score(self, answer: TeacherContinuations, similarities: tuple[float, ...], name: str) -> ChunkScore:
        asked, usable = len(answer.continuations), len(similarities)
        least = self.min_continuations
        needed = least if isinstance(least, int) else max(1, math.ceil(least * asked - 1e-9))
        if usable >= needed:
            value = math.fsum(similarities) / usable
            return ChunkScore(chunk=answer.chunk, value=value, similarities=similarities, scorer_id=name)
        reasons = Counter(answer.missing_reasons).most_common()
        counts = ", ".join(f"{count} {reason.value}" for reason, count in reasons)
        return ChunkScore(
            chunk=answer.chunk,
            value=None,
            similarities=similarities,
            scorer_id=name,
            missing=reasons[0][0] if reasons and not usable else Missing.TOO_FEW,
            detail=f"{usable} of {asked} continuations usable, {needed} needed" + (f" ({counts})" if counts else ""),
        )


def _without_joint(text: str) -> str:
    """Drop leading whitespace, unless nothing else is there."""
    return text.lstrip() or text
