"""The sections of `method.supervision`, one class a type. Parts inside them are validated where they are built."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from omniopd.config import Section

AuthorName = Literal["student", "teacher", "dataset"]


class ChunkedSettings(Section):
    """Black box: audit chunks with the teacher's text."""

    type: Literal["chunked"] = "chunked"
    chunker: dict[str, Any] = Field(default_factory=lambda: {"type": "entropy", "chunk_tokens": 50, "max_chunks": 4})
    """`entropy` or `uniform`, with `chunk_tokens` (C) and `max_chunks` (M)."""
    num_continuations: int = Field(default=4, ge=1)
    """N, for each chunk. 4 chunks by 4 continuations cost a sixth of the published 10 by 10."""
    min_continuations: int = Field(default=1, ge=1)
    """With fewer usable ones a chunk is unaudited."""
    continuation_tokens: int | None = Field(default=None, ge=1)
    """In teacher tokens; None: as many as the chunk has student tokens."""
    similarity: str = "edit"
    """A name of `omniopd.get_similarity`."""
    align: bool = True
    """Cut continuations to the chunk's length before comparing."""
    entropy: Literal["auto", "learner"] = "auto"
    """Where entropies and priors come from: `auto` takes the engine's where they are exact, else the learner's."""
    credit: dict[str, Any] = Field(default_factory=lambda: {"type": "teacher_text"})
    """How evidence becomes a signal: `teacher_text`, `smoothed` (published), `centered`, `raw`."""
    anchor_beta: float = Field(default=0.1, ge=0)
    """Weight of the KL to the frozen initial student on unaudited tokens."""
    allow_zero_anchor: bool = False
    """Confirms `anchor_beta: 0` for a method that collapses without it."""


class VerifierReward(Section):
    """Group-relative advantages from the verifier, beside another objective."""

    weight: float = Field(default=1.0, gt=0)
    normalize_std: bool = True


def _only_the_student() -> dict[AuthorName, float]:
    return {"student": 1.0}


class LogprobSettings(Section):
    """White box: what an open-weight teacher's distributions say (`teacher.spec`: hf:, vllm:, scores:, states:)."""

    type: Literal["logprob"]
    objective: str | dict[str, Any] = "divergence"
    """`divergence` (the loss of the `kl` stream at every token), `sampled` or `minillm`; a mapping has settings."""
    weight: float = Field(default=1.0, gt=0)
    """Of the objective."""
    verifier: VerifierReward | None = None
    """Add the verifier's advantages."""
    authors: dict[AuthorName, float] = Field(default_factory=_only_the_student)
    """Who writes, as shares of the batches that add up to 1; GKD's lambda is the student's."""
    alignment: Literal["none", "groups"] = "none"
    """`groups`: the teacher has another tokenizer, and tokens that wrote the same bytes are compared."""
    spread: Literal["share", "whole"] = "share"
    """What each of the n tokens of a group gets of its advantage: a share of 1 / n, or all of it."""
    mask_tokens: list[str] = Field(default_factory=list)
    """Tokens of the student, such as `<think>`, that get no signal wherever they stand."""


class RouteSettings(Section):
    """One of several teachers: what it is used for."""

    supervision: dict[str, Any] = Field(default_factory=lambda: {"type": "chunked"})
    """`chunked`, `logprob` or `verifier` with their settings."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the prompts, relative to the others', with `by: weight`."""
    domains: list[str] = Field(default_factory=list)
    """What it is asked about, with `by: domain`."""


class RoutedSettings(Section):
    """Several teachers: each prompt goes to one of them, with all its rollouts."""

    type: Literal["routed"]
    by: Literal["teacher_id", "domain", "weight"] = "teacher_id"
    """By a column of the data, or drawn by weight."""
    routes: dict[str, RouteSettings]
    """By the names in `teachers`; a route without a teacher there must not need one."""
    default: str | None = None
    """The route of prompts that name none, or an unknown one; None: such data is an error."""


class VerifierSettings(Section):
    """No teacher: group-relative advantages from the verifier (GRPO)."""

    type: Literal["verifier"]
    normalize_std: bool = True


class ImitationSettings(Section):
    """SFT on answers that the teacher writes."""

    type: Literal["imitation"]


Settings = ChunkedSettings | LogprobSettings | VerifierSettings | ImitationSettings | RoutedSettings
SETTINGS: dict[str, type[Settings]] = {
    "chunked": ChunkedSettings,
    "logprob": LogprobSettings,
    "verifier": VerifierSettings,
    "imitation": ImitationSettings,
    "routed": RoutedSettings,
}
ROUTED = ("chunked", "logprob", "verifier")
"""What a route may hold: what supervises the student's own rollouts."""
