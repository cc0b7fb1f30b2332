"""The method of a run, from its names in the run file to its parts. Pure validation: no torch, no network.

A part is a frozen dataclass; its fields are its settings and its defaults are vetted. Adding one is a row in a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from omniopd.chunking import EntropyChunker, UniformChunker
from omniopd.config import MethodConfig, RunConfig, Section
from omniopd.errors import ConfigError
from omniopd.parts import build_part, first_problem, unknown
from omniopd.scoring.similarity import get_similarity
from omniopd.signals.credit import CenteredTarget, Credit, RawAgreement, SmoothedTarget, TeacherText
from omniopd.signals.filters import DropTruncated, DropUnaudited
from omniopd.signals.weights import WeightByEntropy, WeightByPosition
from omniopd.supervision.base import SignalTransform
from omniopd.supervision.chunked import Chunker
from omniopd.supervision.logprob import Divergence, MiniLLM, Objective, SampledTokens

CHUNKERS: Mapping[str, type[Any]] = {"entropy": EntropyChunker, "uniform": UniformChunker}
CREDITS: Mapping[str, type[Any]] = {
    "teacher_text": TeacherText,
    "smoothed": SmoothedTarget,
    "centered": CenteredTarget,
    "raw": RawAgreement,
}
TRANSFORMS: Mapping[str, type[Any]] = {
    "drop_truncated": DropTruncated,
    "drop_unaudited": DropUnaudited,
    "weight_by_entropy": WeightByEntropy,
    "weight_by_position": WeightByPosition,
}

OBJECTIVES: Mapping[str, type[Any]] = {"divergence": Divergence, "sampled": SampledTokens, "minillm": MiniLLM}
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
    """White box: an open-weight teacher in process (`teacher.spec: hf:MODEL`)."""

    type: Literal["logprob"]
    objective: str | dict[str, Any] = "divergence"
    """`divergence` (the loss of the `kl` stream at every token), `sampled` or `minillm`; a mapping has settings."""
    weight: float = Field(default=1.0, gt=0)
    """Of the objective."""
    verifier: VerifierReward | None = None
    """Add the verifier's advantages."""
    authors: dict[AuthorName, float] = Field(default_factory=_only_the_student)
    """Who writes, as shares of the batches that add up to 1; GKD's lambda is the student's."""


class VerifierSettings(Section):
    """No teacher: group-relative advantages from the verifier (GRPO)."""

    type: Literal["verifier"]
    normalize_std: bool = True


class ImitationSettings(Section):
    """SFT on answers that the teacher writes."""

    type: Literal["imitation"]


Settings = ChunkedSettings | LogprobSettings | VerifierSettings | ImitationSettings
_SETTINGS: TypeAdapter[Settings] = TypeAdapter(Annotated[Settings, Field(discriminator="type")])
SUPERVISIONS = ("chunked", "logprob", "verifier", "imitation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A validated method: its settings and the parts that need nothing of the run."""

    supervision: Settings
    chunker: Chunker | None
    credit: Credit | None
    transforms: tuple[SignalTransform, ...]
    objective: Objective | None = None
    """Of a teacher's logprobs."""

    @property
    def needs_text_teacher(self) -> bool:
        """Whether the run asks a teacher for text."""
        return isinstance(self.supervision, ChunkedSettings) or "teacher" in self.authors

    @property
    def needs_teacher_weights(self) -> bool:
        return isinstance(self.supervision, LogprobSettings)

    @property
    def needs_reference(self) -> bool:
        """Whether a signal anchors to the frozen initial student."""
        return isinstance(self.supervision, ChunkedSettings) and self.supervision.anchor_beta > 0

    @property
    def authors(self) -> dict[str, float]:
        """Who writes the rollouts, as shares of the batches."""
        if isinstance(self.supervision, LogprobSettings):
            return {name: share for name, share in self.supervision.authors.items() if share > 0}
        return {"teacher" if isinstance(self.supervision, ImitationSettings) else "student": 1.0}

    @property
    def uses_divergence(self) -> bool:
        """Whether signals feed the learner's `kl` stream."""
        return self.objective is not None and self.objective.uses_divergence

    def in_words(self) -> str:
        """Say the objective in one or two sentences, for the start of the run, the dry run and the report."""
        transforms = "".join(f", then {describe_part(t)}" for t in self.transforms)
        return f"{_objective(self)}{transforms}."


def build_method(config: MethodConfig) -> Method:
    """Validate the method section and make its parts. Raises ConfigError naming the key and what is allowed."""
    supervision = dict(config.supervision)
    kind = supervision.setdefault("type", "chunked")
    if kind not in SUPERVISIONS:
        raise ConfigError(unknown("method.supervision.type", kind, SUPERVISIONS))
    try:
        settings = _SETTINGS.validate_python(supervision)
    except ValidationError as error:
        raise ConfigError(first_problem("method.supervision", error, _keys_of(kind), tags=SUPERVISIONS)) from error
    chunker: Chunker | None = None
    credit: Credit | None = None
    if isinstance(settings, ChunkedSettings):
        get_similarity(settings.similarity)
        chunker = build_part("method.supervision.chunker", settings.chunker, CHUNKERS)
        credit = build_part("method.supervision.credit", settings.credit, CREDITS)
        _check_anchor(settings)
        if settings.min_continuations > settings.num_continuations:
            raise ConfigError(
                f"method.supervision.min_continuations is {settings.min_continuations}, but only num_continuations = "
                f"{settings.num_continuations} are asked for, so every chunk would stay unaudited; lower it"
            )
    objective = _build_objective(settings) if isinstance(settings, LogprobSettings) else None
    transforms = tuple(
        build_part(f"method.transforms[{i}]", spec, TRANSFORMS) for i, spec in enumerate(config.transforms)
    )
    return Method(supervision=settings, chunker=chunker, credit=credit, transforms=transforms, objective=objective)


def check_losses(losses: Mapping[str, Mapping[str, Any]], method: Method | None = None) -> None:
    """Validate `learner.losses`, and with a method that it can use them.

    Raises ConfigError naming the key and what is allowed.
    """
    from omniopd.learner.losses import build_losses  # Free of torch until a loss is computed.

    built = build_losses(losses)
    if method is None or "kl" not in losses:
        return
    kind = losses["kl"]["type"]
    if not method.uses_divergence:
        raise ConfigError(
            f"learner.losses.kl: {kind} would never be used, because method.supervision feeds no divergence to a "
            "teacher; leave it out, or use method.supervision={type: logprob}"
        )
    if isinstance(method.objective, MiniLLM) and (kind != "reverse_kl" or losses["kl"].get("temperature", 1) != 1):
        raise ConfigError(
            f"learner.losses.kl: {kind} cannot be MiniLLM's single step, which is the reverse KL at temperature 1; "
            "leave it out, or set method.supervision.objective={type: minillm, single_step: false}"
        )
    if kind == "sampled_token" and set(method.authors) != {"student"}:
        raise ConfigError(
            f"learner.losses.kl: sampled_token ({built['kl']}) estimates from tokens that the student drew itself, but "
            f"method.supervision.authors is {method.authors}; use a full divergence such as reverse_kl, or "
            "authors={student: 1}"
        )


def check_inputs(config: RunConfig, method: Method) -> None:
    """Refuse rollouts and data that the objective cannot use. Raises ConfigError naming the key and what to do."""
    settings, rollout = method.supervision, config.rollout
    loss = config.learner.losses.get("kl", {}).get("type")
    uses_samples = method.objective is not None and method.objective.uses_samples
    if (uses_samples or loss == "sampled_token") and (rollout.temperature != 1.0 or rollout.top_p != 1.0):
        key, value = ("temperature", rollout.temperature) if rollout.temperature != 1.0 else ("top_p", rollout.top_p)
        raise ConfigError(
            f"rollout.{key} is {value:g}: the objective estimates from sampled tokens, which then are not drawn from "
            f"the student's own distribution, and is biased; use {key} 1, or a divergence over the vocabulary "
            "(method.supervision.objective: divergence), which holds whatever was drawn"
        )
    rewards = isinstance(settings, VerifierSettings)
    rewards = rewards or (isinstance(settings, LogprobSettings) and settings.verifier is not None)
    if rewards and config.data.verifier == "none":
        raise ConfigError(
            "data.verifier is none, but method.supervision rewards right answers; use data.verifier: auto, or leave "
            "the verifier out of method.supervision"
        )


def describe_part(part: Any) -> str:
    """Return a part as `name(setting=value, ...)`."""
    settings = ", ".join(f"{f.name}={getattr(part, f.name)!r}" for f in dataclasses.fields(part) if f.init)
    return f"{type(part).__name__}({settings})"


def _check_anchor(settings: ChunkedSettings) -> None:
    if (
        settings.anchor_beta == 0
        and not settings.allow_zero_anchor
        and settings.credit.get("type") in ("smoothed", "raw")
    ):
        raise ConfigError(
            "method.supervision.anchor_beta is 0: with positive chunk weights and no anchor the published method "
            "collapses (8.28 instead of 69.08, arXiv 2606.01476 ablations); use 0.1, or set "
            "method.supervision.allow_zero_anchor=true "
            "to do it anyway"
        )


def _build_objective(settings: LogprobSettings) -> Objective:
    named = settings.objective
    spec = {"type": named} if isinstance(named, str) else named
    objective: Objective = build_part("method.supervision.objective", spec, OBJECTIVES)
    shares = settings.authors
    if any(not (math.isfinite(s) and s >= 0) for s in shares.values()) or abs(sum(shares.values()) - 1.0) > 1e-9:
        raise ConfigError(f"method.supervision.authors is {shares}; expected shares of 0 or more that add up to 1")
    others = [name for name, share in shares.items() if name != "student" and share > 0]
    if others and objective.uses_samples:
        raise ConfigError(
            f"method.supervision.authors has a share of {' and '.join(others)}, but objective: {spec['type']} learns "
            "from tokens that the student drew itself and would do nothing with text of others; use objective: "
            "divergence, or authors={student: 1}"
        )
    if settings.verifier is not None and not shares.get("student"):
        raise ConfigError(
            "method.supervision.verifier is set, but method.supervision.authors has no share of `student`: the "
            "verifier rewards the student's own samples only; give it a share or leave the verifier out"
        )
    return objective


def _logprob_objective(method: Method, settings: LogprobSettings) -> str:
    whose = "the student's rollouts"
    if set(method.authors) != {"student"}:
        parts = [f"{100 * share:g}% by the {name}" for name, share in method.authors.items()]
        whose = f"whole batches written {', '.join(parts)}"
    if isinstance(method.objective, SampledTokens):
        said = "reinforce each sampled token by how much likelier the teacher finds it than the student"
        if method.objective.discount > 0:
            said += f", and by that of later tokens discounted by {method.objective.discount:g} each"
    elif isinstance(method.objective, MiniLLM):
        each = "exactly at its own position and " if method.objective.single_step else ""
        mean = "mean " if method.objective.length_normalize else "summed "
        said = f"minimize the reverse KL of whole answers: {each}by the {mean}log-ratio of what follows (MiniLLM)"
    else:
        said = f"minimize the divergence to the teacher's next-token distribution on every token of {whose}"
    if settings.verifier is not None:
        said += f"; plus {settings.verifier.weight:g} x right answers against the mean of their group"
    return said


def _objective(method: Method) -> str:
    settings = method.supervision
    if isinstance(settings, LogprobSettings):
        return _logprob_objective(method, settings)
    if isinstance(settings, VerifierSettings):
        return "reinforce right answers against the mean of their group (no teacher)"
    if isinstance(settings, ImitationSettings):
        return "imitate whole answers written by the teacher (SFT)"
    agreement = f"its agreement ({settings.similarity}) with the teacher's text"
    signal = {
        TeacherText: "move the student towards what the teacher's continuations say next, token by token",
        SmoothedTarget: f"reinforce each audited chunk by {agreement}",
        CenteredTarget: f"reinforce or weaken each audited chunk by {agreement}, against the mean of the others",
        RawAgreement: f"reinforce each audited chunk by {agreement}, unsmoothed",
    }[type(method.credit)]
    anchor = (
        f"hold all other tokens with {settings.anchor_beta:g} x KL(initial student || student)"
        if settings.anchor_beta > 0
        else "with no anchor"
    )
    return f"{signal}; {anchor}"


def _keys_of(kind: str) -> list[str]:
    models: dict[str, type[Section]] = {
        "chunked": ChunkedSettings,
        "logprob": LogprobSettings,
        "verifier": VerifierSettings,
        "imitation": ImitationSettings,
    }
    return list(models[kind].model_fields)
