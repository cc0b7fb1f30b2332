"""The method of a run, from its names in the run file to its parts. Pure validation: no torch, no network.

A part is a frozen dataclass; its fields are its settings and its defaults are vetted. Adding one is a row in a table.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from omniopd.chunking import EntropyChunker, UniformChunker
from omniopd.config import MethodConfig, Section
from omniopd.errors import ConfigError
from omniopd.scoring.similarity import get_similarity
from omniopd.signals.credit import CenteredTarget, Credit, RawAgreement, SmoothedTarget, TeacherText
from omniopd.signals.filters import DropTruncated, DropUnaudited
from omniopd.signals.weights import WeightByEntropy, WeightByPosition
from omniopd.supervision.base import SignalTransform
from omniopd.supervision.chunked import Chunker

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


class LogprobSettings(Section):
    """White box: a divergence to an open-weight teacher in process (`teacher.spec: hf:MODEL`)."""

    type: Literal["logprob"]
    weight: float = Field(default=1.0, gt=0)


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

    @property
    def needs_text_teacher(self) -> bool:
        """Whether the run asks a teacher for text."""
        return isinstance(self.supervision, ChunkedSettings | ImitationSettings)

    @property
    def needs_teacher_weights(self) -> bool:
        return isinstance(self.supervision, LogprobSettings)

    @property
    def needs_reference(self) -> bool:
        """Whether a signal anchors to the frozen initial student."""
        return isinstance(self.supervision, ChunkedSettings) and self.supervision.anchor_beta > 0

    @property
    def teacher_writes(self) -> bool:
        """Whether the rollouts are the teacher's instead of the student's."""
        return isinstance(self.supervision, ImitationSettings)

    def in_words(self) -> str:
        """Say the objective in one or two sentences, for the start of the run, the dry run and the report."""
        transforms = "".join(f", then {describe_part(t)}" for t in self.transforms)
        return f"{_objective(self)}{transforms}."


def build_method(config: MethodConfig) -> Method:
    """Validate the method section and make its parts. Raises ConfigError naming the key and what is allowed."""
    supervision = dict(config.supervision)
    kind = supervision.setdefault("type", "chunked")
    if kind not in SUPERVISIONS:
        raise ConfigError(_unknown("method.supervision.type", kind, SUPERVISIONS))
    try:
        settings = _SETTINGS.validate_python(supervision)
    except ValidationError as error:
        raise ConfigError(_first_problem("method.supervision", error, _keys_of(kind))) from error
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
    transforms = tuple(
        build_part(f"method.transforms[{i}]", spec, TRANSFORMS) for i, spec in enumerate(config.transforms)
    )
    return Method(supervision=settings, chunker=chunker, credit=credit, transforms=transforms)


def build_part(path: str, spec: Mapping[str, Any], table: Mapping[str, type[Any]]) -> Any:
    """Make a part from `{type: NAME, ...}`. Raises ConfigError for an unknown name or setting, with the nearest."""
    settings = dict(spec)
    name = settings.pop("type", None)
    if name not in table:
        raise ConfigError(_unknown(f"{path}.type", name, table))
    part = table[name]
    known = [f.name for f in dataclasses.fields(part) if f.init]
    for key in settings:
        if key not in known:
            raise ConfigError(_unknown(f"{path}.{key}", key, known, what=f"setting of {name}"))
    required = [
        f.name
        for f in dataclasses.fields(part)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    absent = [key for key in required if key not in settings]
    if absent:
        raise ConfigError(f"{path} ({name}) needs {', '.join(absent)}")
    try:
        return TypeAdapter(part).validate_python(settings)
    except ValidationError as error:
        raise ConfigError(_first_problem(path, error, known)) from error


LOSS_TYPES: Mapping[str, tuple[str, ...]] = {
    "pg": ("policy_gradient",),
    "anchor": ("forward_kl",),
    "kl": ("reverse_kl", "forward_kl"),
    "ce": ("cross_entropy",),
    "soft": ("cross_entropy",),
}
"""The losses of `omniopd.learner.losses` by stream, known here so that a run file is checked without loading torch."""


def check_losses(losses: Mapping[str, Mapping[str, Any]]) -> None:
    """Validate `learner.losses`. Raises ConfigError naming the key and what is allowed."""
    for stream, settings in losses.items():
        if stream not in LOSS_TYPES:
            raise ConfigError(_unknown(f"learner.losses.{stream}", stream, LOSS_TYPES, what="stream"))
        for key in settings:
            if key != "type":
                raise ConfigError(_unknown(f"learner.losses.{stream}.{key}", key, ["type"], what="setting"))
        if settings.get("type") not in LOSS_TYPES[stream]:
            raise ConfigError(_unknown(f"learner.losses.{stream}.type", settings.get("type"), LOSS_TYPES[stream]))


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


def _objective(method: Method) -> str:
    settings = method.supervision
    if isinstance(settings, LogprobSettings):
        return (
            "minimize the divergence to the teacher's next-token distribution on every token of the student's rollouts"
        )
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


def _unknown(path: str, value: Any, allowed: Any, *, what: str = "value") -> str:
    names = [str(a) for a in allowed]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{path}: there is no {what} {value!r}{hint} Allowed: {', '.join(names)}"


def _first_problem(path: str, error: ValidationError, known: list[str]) -> str:
    problem = error.errors()[0]
    place = ".".join(str(p) for p in problem["loc"] if p not in SUPERVISIONS)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown(f"{path}.{place}", place, known, what="setting")
    return f"{path}.{place}: {problem['msg']}, got {problem['input']!r}" if place else f"{path}: {problem['msg']}"
