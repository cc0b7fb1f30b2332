"""The method of a run, from its names in the run file to its parts. Pure validation: no torch, no network.

A part is a frozen dataclass; its fields are its settings and its defaults are vetted. Adding one is a row in a table.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from omniopd.chunking import EntropyChunker, UniformChunker
from omniopd.config import MethodConfig, RunConfig, TeacherConfig
from omniopd.errors import ConfigError
from omniopd.method_settings import (
    ROUTED,
    SETTINGS,
    ChunkedSettings,
    ImitationSettings,
    LogprobSettings,
    RoutedSettings,
    Settings,
    VerifierSettings,
)
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


_SETTINGS: TypeAdapter[Settings] = TypeAdapter(Annotated[Settings, Field(discriminator="type")])
_ROUTE_NAME = re.compile(r"\w[\w.:-]*", re.ASCII)
"""It names a folder of the run."""
ONLY_TEACHER = "teacher"
"""What the teacher of a run with one teacher is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One teacher of a run, and what it is for."""

    name: str
    teacher: TeacherConfig
    method: Method

    def alone(self, config: RunConfig) -> RunConfig:
        """Return the run as it would be with this teacher only."""
        return config.model_copy(update={"teacher": self.teacher})

    @property
    def folder(self) -> str | None:
        """The name of its folder within the run's; None: the run's own."""
        return None if self.name == ONLY_TEACHER else self.name

    @property
    def label(self) -> str:
        """The key of its settings."""
        return "teacher" if self.name == ONLY_TEACHER else f"teachers.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A validated method: its settings and the parts that need nothing of the run."""

    supervision: Settings
    chunker: Chunker | None
    credit: Credit | None
    transforms: tuple[SignalTransform, ...]
    objective: Objective | None = None
    """Of a teacher's logprobs."""
    routes: Mapping[str, Method] = field(default_factory=dict)
    """Of several teachers, by name; empty with one."""

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods of all teachers; with one teacher this very method."""
        return tuple(self.routes.values()) or (self,)

    @property
    def needs_text_teacher(self) -> bool:
        """Whether the run asks a teacher for text."""
        if self.routes:
            return any(part.needs_text_teacher for part in self.parts)
        return isinstance(self.supervision, ChunkedSettings) or "teacher" in self.authors

    @property
    def needs_teacher(self) -> bool:
        """Whether there is anybody to ask at all."""
        return self.needs_text_teacher or self.needs_distributions

    @property
    def needs_distributions(self) -> bool:
        """Whether the run compares a teacher's distributions with the student's."""
        return any(isinstance(part.supervision, LogprobSettings) for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        """Whether a signal anchors to the frozen initial student."""
        return any(
            isinstance(part.supervision, ChunkedSettings) and part.supervision.anchor_beta > 0 for part in self.parts
        )

    @property
    def authors(self) -> dict[str, float]:
        """Who writes the rollouts, as shares of the batches."""
        if isinstance(self.supervision, LogprobSettings):
            return {name: share for name, share in self.supervision.authors.items() if share > 0}
        return {"teacher" if isinstance(self.supervision, ImitationSettings) else "student": 1.0}

    @property
    def uses_divergence(self) -> bool:
        """Whether signals feed the learner's `kl` stream."""
        return any(part.objective is not None and part.objective.uses_divergence for part in self.parts)

    def roles(self, config: RunConfig) -> tuple[Role, ...]:
        """Return the teachers of the run with what each is for. Routes that need no teacher have the default one."""
        if not self.routes:
            return (Role(name=ONLY_TEACHER, teacher=config.teacher, method=self),)
        return tuple(
            Role(name=name, teacher=config.teachers.get(name, TeacherConfig()), method=part)
            for name, part in self.routes.items()
        )

    def in_words(self) -> str:
        """Say the objective in one or two sentences, for the start of the run, the dry run and the report."""
        transforms = "".join(f", then {describe_part(t)}" for t in self.transforms)
        return f"{_objective(self)}{transforms}."


def build_method(config: MethodConfig) -> Method:
    """Validate the method section and make its parts. Raises ConfigError naming the key and what is allowed."""
    supervision = dict(config.supervision)
    settings = _read_settings("method.supervision", supervision, tuple(SETTINGS))
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
    return Method(
        supervision=settings,
        chunker=chunker,
        credit=credit,
        transforms=transforms,
        objective=objective,
        routes=_build_routes(settings) if isinstance(settings, RoutedSettings) else {},
    )


def _read_settings(key: str, supervision: dict[str, Any], allowed: Sequence[str]) -> Settings:
    kind = supervision.setdefault("type", "chunked")
    if kind not in allowed:
        raise ConfigError(unknown(f"{key}.type", kind, allowed))
    try:
        return _SETTINGS.validate_python(supervision)
    except ValidationError as error:
        raise ConfigError(first_problem(key, error, list(SETTINGS[kind].model_fields), tags=tuple(SETTINGS))) from error


def _build_routes(settings: RoutedSettings) -> dict[str, Method]:
    key = "method.supervision"
    if not settings.routes:
        raise ConfigError(f"{key}.routes is empty; expected at least one route, by the name of its teacher")
    if settings.default is not None and settings.default not in settings.routes:
        raise ConfigError(unknown(f"{key}.default", settings.default, settings.routes, what="route"))
    if settings.by == "weight" and settings.default is not None:
        raise ConfigError(
            f"{key}.default is {settings.default!r}, but by: weight draws a route for every prompt; leave it out"
        )
    if settings.by == "domain":
        _check_domains(settings)
    routes = {}
    for name, route in settings.routes.items():
        if not _ROUTE_NAME.fullmatch(name) or name == ONLY_TEACHER:
            raise ConfigError(
                f"{key}.routes has {name!r}; expected a name of letters, digits and . _ : - other than {ONLY_TEACHER}"
            )
        kind = route.supervision.get("type", "chunked")
        if kind not in ROUTED:
            raise ConfigError(unknown(f"{key}.routes.{name}.supervision.type", kind, ROUTED))
        try:
            method = build_method(MethodConfig(supervision=route.supervision))
        except ConfigError as error:
            raise ConfigError(f"{key}.routes.{name}: {error}") from error
        if set(method.authors) != {"student"}:
            raise ConfigError(
                f"{key}.routes.{name}.supervision.authors is {method.authors}: with several teachers the student "
                "writes all rollouts; leave authors out"
            )
        routes[name] = method
    return routes


def _check_domains(settings: RoutedSettings) -> None:
    owners: dict[str, str] = {}
    for name, route in settings.routes.items():
        if not route.domains and name != settings.default:
            raise ConfigError(
                f"method.supervision.routes.{name} has no domains, so by: domain never asks it; list some, or make it "
                "the default"
            )
        for domain in route.domains:
            if owners.setdefault(domain, name) != name:
                raise ConfigError(
                    f"the domain {domain!r} is listed by the routes {owners[domain]} and {name}; expected one of them"
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
    if settings.alignment == "groups":
        said += ", in groups of tokens that wrote the same bytes"
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
    if isinstance(settings, RoutedSettings):
        chosen = {"weight": "drawn by weight", "domain": "by its domain", "teacher_id": "by its teacher_id"}
        each = "; ".join(f"{name}: {_objective(part)}" for name, part in method.routes.items())
        return f"each prompt goes to one of {len(method.routes)} teachers, {chosen[settings.by]} ({each})"
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
