"""The parts of a run, made of its settings and its live models: who writes, who supervises, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from omniopd.config import RunConfig
from omniopd.diagnosis.run_diagnostics import OpenTeacher, RunDiagnostics, most_likely_known
from omniopd.inputs import check_routes
from omniopd.logit_teachers import LogitTeacher
from omniopd.method import ONLY_TEACHER, Method, Role
from omniopd.method_settings import ChunkedSettings, LogprobSettings, RoutedSettings, Settings, VerifierSettings
from omniopd.supervision.routed import ByColumn, ByWeight
from omniopd.teachers.metered import MeteredTeacher
from omniopd.timing import StepTimer
from omniopd.types import Rollout

if TYPE_CHECKING:
    from omniopd.behavior.base import Behavior, Verifier
    from omniopd.learner.learner import Learner
    from omniopd.learner.policy import Policy
    from omniopd.rollout.detokenize import Detokenizer
    from omniopd.rollout.engine import RolloutEngine
    from omniopd.supervision.base import StudentMeasure, Supervision


def build_route(settings: Settings) -> ByColumn | ByWeight | None:
    """Return what chooses among several teachers; None with one."""
    if not isinstance(settings, RoutedSettings):
        return None
    if settings.by == "weight":
        return ByWeight(weights={name: route.weight for name, route in settings.routes.items()})
    names = {name: name for name in settings.routes}
    if settings.by == "domain":
        names = {domain: name for name, route in settings.routes.items() for domain in route.domains}
    return ByColumn(column=settings.by, names=names, default=settings.default)


def check_data_routes(config: RunConfig, method: Method) -> None:
    """Look at the data before any teacher is opened, which may cost, where its rows name their teachers.

    Raises ConfigError for rows that no teacher is for.
    """
    from omniopd.data import load_rows

    route, data = build_route(method.supervision), config.data
    if isinstance(route, ByColumn) and route.default is None:
        read = load_rows(data.train, split=data.split, max_prompts=data.max_prompts, on_bad_row=data.on_bad_row)
        check_routes(route, read.rows, data.train)


class Student:
    """What the rest of the run may know of the student's tokenizer."""

    def __init__(self, policy: Policy, detokenize: Detokenizer) -> None:
        from omniopd.generation import end_token_ids

        self.detokenize = detokenize
        self.end_id: int | None = policy.tokenizer.eos_token_id
        self.end_ids = end_token_ids(policy.model, policy.tokenizer)
        self._tokenizer = policy.tokenizer
        self._anchor = self._ids("\n")
        # Some vocabularies put a space before every text they are given; text that follows other text has none.
        self._needs_anchor = self._ids("\na") != self._anchor + self._ids("a")
        self.encode = lru_cache(maxsize=1 << 16)(self._encode)

    def _encode(self, text: str) -> list[int]:
        if self._needs_anchor:
            ids = self._ids("\n" + text)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What the parts of a run are made of."""

    config: RunConfig
    method: Method
    learner: Learner
    engine: RolloutEngine
    student: Student
    verifier: Verifier | None
    route: ByColumn | ByWeight | None
    text_teachers: Mapping[str, MeteredTeacher]
    """By role."""
    logit_teachers: Mapping[str, LogitTeacher]
    timer: StepTimer

    def behavior(self) -> Behavior:
        """Return who writes the rollouts."""
        from omniopd.behavior.mixed import MixedBehavior

        parts = [(share, self._writer(author)) for author, share in self.method.authors.items()]
        return parts[0][1] if len(parts) == 1 else MixedBehavior(tuple(parts))

    def _writer(self, author: str) -> Behavior:
        from omniopd.behavior.dataset import DatasetBehavior
        from omniopd.behavior.student import StudentBehavior
        from omniopd.behavior.teacher import TeacherBehavior
        from omniopd.inputs import read_responses

        student, max_tokens = self.student, self.config.rollout.max_tokens
        if author == "student":
            return StudentBehavior(self.engine, self.timer, self.verifier)
        if author == "dataset":
            return DatasetBehavior(
                responses=read_responses(self.config.data),
                encode=student.encode,
                end_id=student.end_id,
                detokenize=student.detokenize,
                max_tokens=max_tokens,
                verifier=self.verifier,
            )
        (teacher,) = self.text_teachers.values()  # Routed teachers do not write.
        return TeacherBehavior(
            teacher=teacher,
            encode=student.encode,
            end_id=student.end_id,
            detokenize=student.detokenize,
            max_tokens=max_tokens,
            timer=self.timer,
            verifier=self.verifier,
        )

    def supervision(self) -> Supervision:
        """Return what makes signals of them."""
        from omniopd.supervision.routed import RoutedSupervision

        parts = {role.name: self._supervision_of(role) for role in self.method.roles(self.config)}
        if self.route is None:
            return parts[ONLY_TEACHER]
        return RoutedSupervision(route=self.route, supervisions=parts)

    def _supervision_of(self, role: Role) -> Supervision:
        from omniopd.supervision.imitation import ImitationSupervision
        from omniopd.supervision.verified import VerifiedSupervision

        settings = role.method.supervision
        if isinstance(settings, LogprobSettings):
            return self._logprob_supervision(role, settings)
        if isinstance(settings, VerifierSettings):
            return VerifiedSupervision(normalize_std=settings.normalize_std)
        if isinstance(settings, ChunkedSettings):
            return self._chunked_supervision(role, settings)
        return ImitationSupervision()

    def _chunked_supervision(self, role: Role, settings: ChunkedSettings) -> Supervision:
        from omniopd.scoring.chunk_score import ChunkScorer
        from omniopd.supervision.chunked import ChunkedSupervision

        assert role.method.chunker is not None and role.method.credit is not None
        return ChunkedSupervision(
            teacher=self.text_teachers[role.name],
            chunker=role.method.chunker,
            scorer=ChunkScorer(
                similarity=settings.similarity, min_continuations=settings.min_continuations, align=settings.align
            ),
            credit=role.method.credit,
            vocabulary=self.student,
            measure=self._measure(settings.entropy),
            timer=self.timer,
            num_continuations=settings.num_continuations,
            continuation_tokens=settings.continuation_tokens,
            anchor_beta=settings.anchor_beta,
            max_missing_fraction=role.teacher.max_missing_fraction,
            seed=self.config.seed,
        )

    def _logprob_supervision(self, role: Role, settings: LogprobSettings) -> Supervision:
        from omniopd.supervision.combined import SummedSupervision
        from omniopd.supervision.logprob import LogprobSupervision
        from omniopd.supervision.verified import VerifiedSupervision

        assert role.method.objective is not None
        teacher = self.logit_teachers[role.name]
        supervision = LogprobSupervision(
            objective=role.method.objective,
            weight=settings.weight,
            reader=teacher.reader,
            teacher=teacher.scorer,
            student=self._measure("auto"),
            candidates=self.learner.candidates,
            wanted=teacher.wanted,
            name=role.name,
            spread=settings.spread,
            masked_ids=teacher.masked_ids,
            max_missing_fraction=role.teacher.max_missing_fraction,
            timer=self.timer,
        )
        if settings.verifier is None:
            return supervision
        reward = VerifiedSupervision(normalize_std=settings.verifier.normalize_std)
        return SummedSupervision(((1.0, supervision), (settings.verifier.weight, reward)))

    def diagnostics(self, say: Callable[[str], None]) -> RunDiagnostics:
        """Return what is measured beside the losses."""
        return RunDiagnostics(
            settings=self.config.diagnostics,
            match=self.learner.match,
            open_teachers={
                role.name: OpenTeacher(
                    reader=of.reader,
                    has_weights=of.model is not None,
                    scorer=of.scorer,
                    scorer_top_k=most_likely_known(of.scorer, role.teacher.scoring.max_logprobs),
                    masked_ids=of.masked_ids,
                )
                for role in self.method.roles(self.config)
                if (of := self.logit_teachers.get(role.name)) is not None
            },
            text_teachers=self.text_teachers,
            verifier=self.verifier,
            answer_tokens=self.config.rollout.max_tokens,
            route=self.route,
            say=say,
            timer=self.timer,
        )

    def _measure(self, source: str) -> StudentMeasure:
        """Take the engine's own figures where they are exact, else a forward pass of the learner."""
        exact = self.config.rollout.temperature == 1.0 and self.config.rollout.top_p == 1.0
        if source == "learner" or not exact:
            return self.learner.score

        def from_engine(rollouts: Sequence[Rollout]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
            if any(r.sampler_logprobs is None or r.entropies is None for r in rollouts):
                return self.learner.score(rollouts)
            return [(r.sampler_logprobs or (), r.entropies or ()) for r in rollouts]

        return from_engine
