"""Credit assignment: what an audited chunk's evidence says to each of its tokens.

A credit reads all audited rollouts of a step at once, because baselines need company.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from omniopd.errors import ConfigError
from omniopd.scoring.chunk_score import geometric_prior, smoothed_target
from omniopd.types import Audit, Continuation, Rollout, SoftTarget


class StudentVocabulary(Protocol):
    """What credit needs to know of the student's tokenizer."""

    @property
    def end_id(self) -> int | None:
        """The token that ends a completion."""
        ...

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a completion; some models have several."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it would follow other text, without special tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRollout:
    """A rollout with its audits, and the student's own logprobs [T] in nats at temperature 1."""

    rollout: Rollout
    audits: tuple[Audit, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCredit:
    """What one audited chunk tells its tokens; None leaves the chunk unaudited."""

    weight: float | None = None
    """One advantage for all tokens of the chunk (policy gradient)."""
    soft_targets: tuple[SoftTarget, ...] = ()


class Credit(Protocol):
    """Turns evidence into per-token training signals."""

    def assign(
        self, rollouts: Sequence[AuditedRollout], vocabulary: StudentVocabulary
    ) -> list[tuple[ChunkCredit, ...]]:
        """Return for each rollout one credit for each of its audits."""
        ...


def _weights(rollouts: Sequence[AuditedRollout], alpha: float) -> list[list[float | None]]:
    """Smoothed targets w_c = (k + alpha b) / (n + alpha), None where there is no evidence."""
    table: list[list[float | None]] = []
    for audited in rollouts:
        row: list[float | None] = []
        for audit in audited.audits:
            score = audit.score
            if score.value is None:
                row.append(None)
            elif alpha == 0:
                row.append(score.value)
            else:
                prior = geometric_prior(audited.logprobs[audit.chunk.start : audit.chunk.end])
                row.append(smoothed_target(score.evidence, score.num_continuations, prior, alpha=alpha))
        table.append(row)
    return table


@dataclass(frozen=True)
class SmoothedTarget:
    """As published: every token of the chunk is reinforced with w = (k + alpha b) / (n + alpha), always positive.

    k is the summed similarity of n continuations, b the geometric mean of the student's own token probabilities.
    Source: arXiv 2606.01476, section 3.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ConfigError(f"alpha must be positive, got {self.alpha}; use {{type: raw}} for no smoothing")

    def assign(
        self, rollouts: Sequence[AuditedRollout], vocabulary: StudentVocabulary
    ) -> list[tuple[ChunkCredit, ...]]:
        return [tuple(ChunkCredit(weight=w) for w in row) for row in _weights(rollouts, self.alpha)]


@dataclass(frozen=True)
class RawAgreement:
    """k / n without the student's prior: the published ablation."""

    def assign(
        self, rollouts: Sequence[AuditedRollout], vocabulary: StudentVocabulary
    ) -> list[tuple[ChunkCredit, ...]]:
        return [tuple(ChunkCredit(weight=w) for w in row) for row in _weights(rollouts, 0.0)]


@dataclass(frozen=True)
class CenteredTarget:
    """The smoothed target minus the mean over the chunks of the step's other rollouts, so that weights are signed.

    On fresh samples a constant part of the weight has zero expected gradient and only adds variance. The baseline keeps
    the expectation because it leaves out the whole rollout: later chunks of it depend on this one. Without another
    audited rollout there is no baseline and no credit. Ours; see arXiv 2606.01476 section 3 for the target.
    """

    alpha: float = 1.0

    def assign(
        self, rollouts: Sequence[AuditedRollout], vocabulary: StudentVocabulary
    ) -> list[tuple[ChunkCredit, ...]]:
        table = _weights(rollouts, self.alpha)
        known = [[w for w in row if w is not None] for row in table]
        total, count = sum(map(sum, known)), sum(map(len, known))
        credits = []
        for row, own in zip(table, known, strict=True):
            others = count - len(own)
            baseline = (total - sum(own)) / others if others else None
            credits.append(
                tuple(ChunkCredit(weight=None if w is None or baseline is None else w - baseline) for w in row)
            )
        return credits


@dataclass(frozen=True)
class TeacherText:
    """Let the continuations say what the teacher would have written, token by token.

    At every token of the chunk that some continuations still agree with, the counts of their next tokens and the
    student's own distribution as a prior form a soft target:
    target(v) = (number of surviving continuations whose next token is v + prior P(v)) / (survivors + prior).
    It is a Monte-Carlo estimate of the teacher's next-token distribution from text alone; where no continuation
    survives there is no evidence and no target. Agreement is by characters, the next token is the student tokenizer's,
    so any teacher will do. Where a chat model was only asked to go on, its missing whitespace at the joint is not held
    against the student and the end of its reply is not taken for the end of the answer. Ours.
    """

    prior: float = 1.0
    """Weight of the student's own distribution, in continuations."""

    def __post_init__(self) -> None:
        if self.prior < 0:
            raise ConfigError(f"prior must be 0 or more, got {self.prior}")

    def assign(
        self, rollouts: Sequence[AuditedRollout], vocabulary: StudentVocabulary
    ) -> list[tuple[ChunkCredit, ...]]:
        return [tuple(self._of_chunk(audited, audit, vocabulary) for audit in audited.audits) for audited in rollouts]

    def _of_chunk(self, audited: AuditedRollout, audit: Audit, vocabulary: StudentVocabulary) -> ChunkCredit:
        if audit.score.value is None:
            return ChunkCredit()
        rollout, chunk = audited.rollout, audit.chunk
        origin = rollout.char_starts[chunk.start]
        continuations = [
            (rejoin(c, chunk.text), c.is_exact and c.finish_reason == "stop")
            for c in audit.continuations.continuations
            if c.text is not None
        ]
        targets = []
        alive = list(range(len(continuations)))
        for position in range(chunk.start, chunk.end):
            here = rollout.char_starts[position] - origin
            piece = rollout.text_between(position, position + 1)
            token_id = rollout.token_ids[position]
            shared = _same_character(rollout, position, vocabulary)
            own = rollout.text[rollout.char_starts[position] :][:64]
            is_canonical = not shared and vocabulary.encode(own)[:1] == [token_id]
            votes: Counter[int] = Counter()
            survivors = []
            for i in alive:
                text, has_ended = continuations[i]
                token = _next_token(text[here:], has_ended, piece, token_id, shared, is_canonical, vocabulary)
                if token is None:
                    continue
                votes[token] += 1
                if token == token_id:
                    survivors.append(i)
            if not votes:
                break
            mass = sum(votes.values()) + self.prior
            targets.append(
                SoftTarget(
                    position=position,
                    token_ids=tuple(votes),
                    probs=tuple(count / mass for count in votes.values()),
                    self_weight=self.prior / mass,
                )
            )
            alive = survivors
        return ChunkCredit(soft_targets=tuple(targets))


def _same_character(rollout: Rollout, position: int, vocabulary: StudentVocabulary) -> tuple[int, ...]:
    """Return the tokens right before `position` that hold the first bytes of its character.

    Byte-level vocabularies split some characters; all their tokens start where the character does. So do tokens
    without text, which are no part of it.
    """
    start = rollout.char_starts[position]
    first = bisect.bisect_left(rollout.char_starts, start)
    if first == position:
        return ()
    before = rollout.token_ids[first:position]
    ids = vocabulary.encode(rollout.text_between(first, bisect.bisect_right(rollout.char_starts, start)))
    return before if tuple(ids[: len(before)]) == before else ()


def rejoin(continuation: Continuation, following: str) -> str:
    """Return the continuation with the whitespace that an asked chat model loses at the joint, as the student has it.

    Args:
        continuation: a usable one.
        following: what the student wrote after the prefix.
    """
    assert continuation.text is not None
    margin = following[: len(following) - len(following.lstrip())]
    if continuation.is_exact or not margin or continuation.text[:1].isspace():
        return continuation.text
    return margin + continuation.text


def _next_token(
    rest: str,
    has_ended: bool,
    piece: str,
    token_id: int,
    shared: tuple[int, ...],
    is_canonical: bool,
    vocabulary: StudentVocabulary,
) -> int | None:
    """Return the student token with which a continuation goes on, None when it does not tell.

    Args:
        rest: what the continuation still holds at this place.
        has_ended: whether the teacher ended its answer there, rather than being cut off.
        piece: the text of the student's own token at this place.
        token_id: its id.
        shared: the tokens before it that hold the first bytes of its character.
        is_canonical: whether the student's tokenizer would write the student's text with that token. If so, a teacher
            who goes on with a longer token that begins like it (" and" for " a") does not agree.
        vocabulary: of the student.
    """
    if not rest:
        if not has_ended or shared:
            return None
        return token_id if token_id in vocabulary.end_ids else vocabulary.end_id
    if rest == piece:
        return token_id
    ids = vocabulary.encode(rest[:64])
    if piece and rest.startswith(piece) and (not is_canonical or ids[:1] == [token_id]):
        return token_id
    if tuple(ids[: len(shared)]) != shared:
        return None
    ids = ids[len(shared) :]
    if not ids:
        return None
    # A continuation that was cut off may end inside a word, and then its last token is not what the teacher meant.
    # One character cannot be cut.
    if len(ids) == 1 and not has_ended and len(rest) > 1:
        return None
    return ids[0]
