"""The values that flow, in the order they are made. Standard library only; nothing here computes a method.

    Prompt -> Rollout -> Chunk -> TeacherContinuations -> ChunkScore -> TokenSignal -> Update

Every value is immutable and every sequence a tuple, so a whole step prints, hashes, diffs and replays. Letters in the
shapes: P prompt tokens, T completion tokens, K continuations of one chunk.
"""

from __future__ import annotations

import dataclasses
import types as _types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, Self

from omniopd.errors import DataError


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Author(StrEnum):
    """Who wrote the tokens of a rollout. Only student tokens may enter an on-policy ratio."""

    STUDENT = "student"
    TEACHER = "teacher"
    DATASET = "dataset"
    """A reference response of the data."""


class Missing(StrEnum):
    """Why evidence is absent. Absent is never zero."""

    EMPTY = "empty"
    """The teacher answered with no text."""
    REFUSED = "refused"
    """The teacher declined, or a content filter stopped it."""
    GARBAGE = "garbage"
    """The answer could not be read as a continuation (echo, restart, control characters)."""
    TIMEOUT = "timeout"
    FAILED = "failed"
    """The request failed after all retries; `detail` says how."""
    BUDGET = "budget"
    TOO_FEW = "too_few"
    """Fewer usable continuations than the run asks for."""


_UNRECORDED = "unrecorded"


class Value:
    """Shared by all values: `to_json` and `from_json`, so that records can be replayed from disk."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, without the fields that no record holds."""
        fields = (f for f in dataclasses.fields(self) if not f.metadata.get(_UNRECORDED))  # type: ignore[arg-type]
        return {f.name: _plain(getattr(self, f.name)) for f in fields}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the value. Raises DataError on an unknown field."""
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - known)
        if unknown:
            raise DataError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**{name: _typed(hints[name], value) for name, value in data.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Value):
        return value.to_json()
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin = typing.get_origin(hint)
    if origin in (typing.Union, _types.UnionType):
        return _typed(next(arg for arg in typing.get_args(hint) if arg is not type(None)), value)
    if origin is tuple:
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_typed(args[0], item) for item in value)
        return tuple(_typed(arg, item) for arg, item in zip(args, value, strict=True))
    if isinstance(hint, type) and issubclass(hint, Value):
        return hint.from_json(value)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(value)
    return value


def _same_length(owner: str, length: int, **fields: tuple[Any, ...] | None) -> None:
    for name, value in fields.items():
        if value is not None and len(value) != length:
            raise DataError(f"{owner}.{name} has {len(value)} entries, expected {length}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message(Value):
    """One chat turn."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Value):
    """A question, as the data gives it and as the student reads it. Made by the prompt source."""

    id: str
    messages: tuple[Message, ...]
    """The conversation before the completion; a plain text prompt is one user message."""
    text: str
    """`messages` rendered with the student's chat template (or the raw text when it has none)."""
    token_ids: tuple[int, ...]
    """[P] `text` in the student's vocabulary."""
    answer: str | None = None
    """The reference answer; None when the data has none, then nothing can be verified."""
    teacher_id: str | None = None
    """Which of the run's teachers is to be asked, as the data says."""
    domain: str | None = None
    """What the prompt is about, as the data says; teachers can be chosen by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Value):
    """One completion of a prompt, token by token as it was drawn. Never re-tokenised. Made by the behavior."""

    id: str
    prompt: Prompt
    group_index: int
    """0..group_size-1 among the rollouts of the same prompt."""
    token_ids: tuple[int, ...]
    """[T] with the end token when one was drawn."""
    text: str
    """The completion without special tokens."""
    char_starts: tuple[int, ...]
    """[T] where each token's text starts in `text`; tokens without text start where the next one does."""
    finish_reason: FinishReason
    policy_version: int
    """The weights that drew the rollout."""
    sampler_logprobs: tuple[float, ...] | None = None
    """[T] nats, at the sampling temperature; None for text the student did not draw."""
    entropies: tuple[float, ...] | None = None
    """[T] nats over the full vocabulary at temperature 1; None when the engine cannot tell."""
    author: Author = Author.STUDENT
    policy_versions: tuple[int, ...] | None = None
    """[T] per token, when the rollout crossed a weight update; None when all equal `policy_version`."""
    is_correct: bool | None = None
    """What the verifier says; None without a reference answer."""

    def __post_init__(self) -> None:
        _same_length(
            f"Rollout {self.id}",
            len(self.token_ids),
            char_starts=self.char_starts,
            sampler_logprobs=self.sampler_logprobs,
            entropies=self.entropies,
            policy_versions=self.policy_versions,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def text_between(self, start: int, end: int) -> str:
        """Return the text of the tokens start..end-1."""
        stop = self.char_starts[end] if end < len(self.char_starts) else len(self.text)
        first = self.char_starts[start] if start < len(self.char_starts) else len(self.text)
        return self.text[first:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(Value):
    """A span of a completion chosen for audit. Made by the chunker."""

    rollout_id: str
    index: int
    """0, 1, ... in the order of the text."""
    start: int
    end: int
    """Half-open token range [start, end) of the completion (words or characters where there are no tokens)."""
    prefix: str
    """The completion before the chunk: with the prompt, all that the teacher sees."""
    text: str
    """What the student wrote in the chunk. The teacher never sees it."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise DataError(f"chunk {self.index} of {self.rollout_id} has the empty range [{self.start}, {self.end})")

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Value):
    """What teacher calls cost. Sums with `+`."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    """None when the price is unknown. Unknown is not free."""
    cached_requests: int = 0
    """Requests answered from the run's own ledger, at no cost."""
    cached_input_tokens: int = 0
    """Of the input tokens, those that the provider read from its prompt cache."""
    cache_write_tokens: int = 0
    """Of the input tokens, those that the provider wrote into its prompt cache, where it bills that."""
    reasoning_tokens: int = 0
    """Of the output tokens, those of hidden thinking."""
    unanswered_requests: int = 0
    """Of the requests, those that were sent and never answered. They may have been billed; nobody can know here."""

    def __add__(self, other: Usage) -> Usage:
        known = [cost for cost in (self.cost_usd, other.cost_usd) if cost is not None]
        unknown = any(u.cost_usd is None and u.requests > 0 for u in (self, other))
        return Usage(
            requests=self.requests + other.requests,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cost_usd=None if unknown or not known else sum(known),
            cached_requests=self.cached_requests + other.cached_requests,
            cached_input_tokens=self.cached_input_tokens + other.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            unanswered_requests=self.unanswered_requests + other.unanswered_requests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation(Value):
    """One answer of the teacher to one prefix: usable text, or the reason why there is none."""

    text: str | None
    finish_reason: str | None = None
    """As the server gave it."""
    missing: Missing | None = None
    detail: str = ""
    """What was repaired, or what went wrong. Never holds a key."""
    is_exact: bool = True
    """Whether the server went on from the prefix itself. A chat model that was only asked to may have lost whitespace
    at the joint, and where its reply ends says nothing about where the answer does."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.missing is None):
            raise DataError(f"a continuation has either text or a reason, got {self.text!r} and {self.missing!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherContinuations(Value):
    """What the teacher wrote from one chunk's prefix. Made by the teacher."""

    chunk: Chunk
    continuations: tuple[Continuation, ...]
    """[K] all that were asked for, usable or not."""
    teacher_id: str
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0

    @property
    def texts(self) -> tuple[str, ...]:
        """The usable continuations."""
        return tuple(c.text for c in self.continuations if c.text is not None)

    @property
    def missing_reasons(self) -> tuple[Missing, ...]:
        return tuple(c.missing for c in self.continuations if c.missing is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScore(Value):
    """How much the teacher's continuations agree with the student's chunk. Made by the scorer."""

    chunk: Chunk
    value: float | None
    """Mean similarity of the usable continuations, in [0, 1]; None when there is too little evidence."""
    similarities: tuple[float, ...]
    """[K'] one for each usable continuation, in [0, 1]."""
    scorer_id: str
    missing: Missing | None = None
    """Why `value` is None."""
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.missing is None):
            raise DataError(f"a chunk score has a value or a reason, got {self.value!r} and {self.missing!r}")

    @property
    def num_continuations(self) -> int:
        """How many continuations the value rests on."""
        return len(self.similarities)

    @property
    def evidence(self) -> float:
        """k_c: the sum of the similarities (arXiv 2606.01476, section 3)."""
        return sum(self.similarities)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit(Value):
    """One audited chunk with its evidence: what supervision hands to credit assignment, records and the report."""

    chunk: Chunk
    continuations: TeacherContinuations
    score: ChunkScore
    weight: float | None = None
    """What the chunk's tokens were finally reinforced with; None when unaudited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftTarget(Value):
    """A sparse target distribution for one token, plus a share of the student's own distribution.

    target(v) = sum_i probs[i] [v = token_ids[i]] + self_weight * P(v), with the student's P held fixed. All shares
    add up to 1.
    """

    position: int
    """0..T-1"""
    token_ids: tuple[int, ...]
    probs: tuple[float, ...]
    self_weight: float = 0.0


class TeacherEvidence(Protocol):
    """What the learner needs beside the rollout to compare it with an open-weight teacher.

    Which class it is tells the learner how: `logits.scores.TokenScores` holds what the teacher said,
    `logits.scores.Reading` how it reads the rollout, `logits.reading.Read` also in which of its own tokens.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens of the completion, in the teacher's vocabulary."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSignal(Value):
    """The dense training signal of one rollout. Made by supervision, adjusted by transforms, read by the learner.

    A stream that is None is not used; a weight of 0.0 leaves the token out of the stream, also when tokens are counted.
    """

    rollout: Rollout
    advantages: tuple[float, ...] | None = None
    """[T] policy gradient: higher = do it more. Detached."""
    pg_weights: tuple[float, ...] | None = None
    """[T] >= 0; 1 where `advantages` holds."""
    anchor_weights: tuple[float, ...] | None = None
    """[T] >= 0; times the exact forward KL to the frozen initial student."""
    kl_weights: tuple[float, ...] | None = None
    """[T] >= 0; times a divergence to an open-weight teacher."""
    kl_teacher: str | None = None
    """Which open-weight teacher the signal comes from; None: from none, or the learner has but one."""
    kl_evidence: TeacherEvidence | None = field(default=None, metadata={_UNRECORDED: True})
    """None: the teacher reads the very tokens of the rollout, and the learner has its weights."""
    unscored: Missing | None = None
    """Why an open-weight teacher says nothing of the rollout; its weights are 0 then."""
    ce_weights: tuple[float, ...] | None = None
    """[T] >= 0; times -log P of the rollout's own tokens (text somebody else wrote)."""
    soft_targets: tuple[SoftTarget, ...] | None = None
    """Cross-entropy to distributions estimated from teacher text; at most one for each position."""
    audits: tuple[Audit, ...] = ()
    notes: tuple[str, ...] = ()
    """What filters and weightings did, for the records."""

    def __post_init__(self) -> None:
        _same_length(
            f"TokenSignal of {self.rollout.id}",
            self.rollout.num_tokens,
            advantages=self.advantages,
            pg_weights=self.pg_weights,
            anchor_weights=self.anchor_weights,
            kl_weights=self.kl_weights,
            ce_weights=self.ce_weights,
        )
        if (self.advantages is None) != (self.pg_weights is None):
            raise DataError("advantages and pg_weights go together")


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(Value):
    """One optimiser step. Made by the learner, read by the records."""

    step: int
    policy_version: int
    """The version the weights have after the step."""
    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`loss/<stream>` and `tokens/<stream>` for every stream that was fed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext(Value):
    """Where the run stands; schedules read it."""

    step: int
    num_steps: int
    seed: int = 0
