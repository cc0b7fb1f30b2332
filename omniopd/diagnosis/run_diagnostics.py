"""What a run measures beside its losses: how well teacher and student match, and whether rollouts go wrong.

    Watched(supervision).signals -> RunDiagnostics.look -> take() -> the step's metrics and a row of diagnostics.jsonl

The look happens between supervision and update, with the very weights that drew the rollouts. It hands the signals on
as they are, draws no random number and leaves the student's mode as it was, so a run learns the same with and without.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from omniopd.behavior.base import Verifier
from omniopd.config import DiagnosticsConfig
from omniopd.diagnosis.evidence import is_students_own, num_text_tokens
from omniopd.diagnosis.prefix_probe import PrefixProbeSettings, probe_prefixes
from omniopd.diagnosis.prefix_summary import summary_lines
from omniopd.errors import ConfigError
from omniopd.logits.diagnostics import AlarmLimits, by_correctness, by_position, rollout_alarms, rollout_health
from omniopd.logits.reading import Reader
from omniopd.logits.scores import SequenceTeacher, TokenScores
from omniopd.supervision.base import Supervision
from omniopd.teachers.base import Teacher
from omniopd.timing import StepTimer
from omniopd.types import Author, Prompt, Rollout, StepContext, TokenSignal

if TYPE_CHECKING:
    from omniopd.learner.matching import Evidence, TokenDiagnostics

BINS = 10
ALARMS: Mapping[str, AlarmLimits] = {
    "repetition": AlarmLimits(max_truncated=1.0, max_length_ratio=math.inf),
    "truncation": AlarmLimits(max_affected=1.0, max_length_ratio=math.inf),
    "length": AlarmLimits(max_affected=1.0, max_truncated=1.0),
}
"""Each alarm by the limits that only it can break."""


class MatchTokens(Protocol):
    """The learner's comparison with one of its teachers."""

    def __call__(
        self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], *, teacher: str, k: int
    ) -> list[TokenDiagnostics]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTeacher:
    """An open-weight teacher of the run, as the diagnostics need it."""

    reader: Reader
    has_weights: bool
    """Whether the learner computes its whole distributions."""
    scorer: SequenceTeacher | None = None
    """Without weights: asked where the signals carry no record. None: then nothing is known."""
    scorer_top_k: int = 0
    """The most that it tells of its likeliest tokens."""
    masked_ids: frozenset[int] = frozenset()
    """Tokens of the student that get no signal, and count for nothing here."""


@dataclass(kw_only=True)
class RunDiagnostics:
    """Looks at every step of a run; `take` gives what it saw.

    Raises ConfigError for a prefix probe that has nobody to ask, nothing to verify with or no place to cut.
    """

    settings: DiagnosticsConfig
    match: MatchTokens
    open_teachers: Mapping[str, OpenTeacher] = field(default_factory=dict)
    text_teachers: Mapping[str, Teacher] = field(default_factory=dict)
    verifier: Verifier | None = None
    answer_tokens: int = 1024
    """Of a probe's answer where the settings name no number."""
    route: Callable[[Prompt, StepContext], str] | None = None
    """Which of several teachers a prompt belongs to."""
    say: Callable[[str], None] = lambda message: None
    timer: StepTimer = field(default_factory=StepTimer)
    _first: dict[str, float] | None = None
    _standing: frozenset[str] = frozenset()
    _metrics: dict[str, float] = field(default_factory=dict)
    _row: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.settings.prefix_probe.every:
            return
        if not self.text_teachers:
            raise ConfigError(
                "diagnostics.prefix_probe.every is set, but no teacher of this run writes text; set it to 0"
            )
        if self.verifier is None:
            raise ConfigError(
                "diagnostics.prefix_probe.every is set, but nothing tells right answers from wrong ones; give "
                "data with answers and a data.verifier, or set it to 0"
            )
        self._probe_settings(seed=0)

    def begin(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Go on from the recorded metrics of the steps before, so that a resumed run sounds no alarm twice."""
        for row in rows:
            if row.get("rollout/count"):
                self._first = self._first or {
                    "rollout/truncated": row["rollout/truncated"],
                    "rollout/mean_tokens": row["rollout/length_mean"],
                }
                self._standing = frozenset(name for name in ALARMS if row.get(f"alarm/{name}"))

    async def look(self, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
        """Measure one step. Spends money where a prefix probe is due.

        Raises what the teachers raise when no further question would do better, and when a budget is used up.
        """
        self._metrics, self._row = {}, {}
        own = [signal for signal in signals if signal.rollout.author is Author.STUDENT]
        if not own:
            return
        self._watch([signal.rollout for signal in own], ctx)
        whole = [signal for signal in own if is_students_own(signal.rollout) and signal.rollout.num_tokens]
        if is_due(self.settings.every, ctx):
            for name, teacher in self.open_teachers.items():
                await self._match(name, teacher, self._of_teacher(name, whole, ctx))
        if is_due(self.settings.prefix_probe.every, ctx):
            for name, writer in self.text_teachers.items():
                await self._probe(name, writer, [s.rollout for s in self._of_teacher(name, whole, ctx)], ctx)

    def take(self) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Return the metrics of the step and its row, None where there is nothing to put into one; once."""
        metrics, row = self._metrics, self._row
        self._metrics, self._row = {}, {}
        return metrics, row or None

    def _of_teacher(self, name: str, signals: Sequence[TokenSignal], ctx: StepContext) -> list[TokenSignal]:
        return [s for s in signals if self.route is None or self.route(s.rollout.prompt, ctx) == name]

    def _watch(self, rollouts: Sequence[Rollout], ctx: StepContext) -> None:
        """Tell what rollouts look like, and say so when they begin to go wrong."""
        health = rollout_health(list({r.id: r for r in rollouts}.values()))
        self._first = self._first or health
        told = {name: rollout_alarms(health, self._first, limits) for name, limits in ALARMS.items()}
        # The records have the length and the truncated share of every step already.
        self._metrics |= {name: health[name] for name in ("rollout/repeated_share", "rollout/repetitive")}
        self._metrics |= {f"alarm/{name}": float(bool(lines)) for name, lines in told.items()}
        standing = frozenset(name for name, lines in told.items() if lines)
        started = {name: told[name][0] for name in sorted(standing - self._standing)}
        for sentence in started.values():
            self.say(f"step {ctx.step + 1}: {sentence}")
        if started:
            self._row["alarms"] = started
        self._standing = standing

    async def _match(self, name: str, teacher: OpenTeacher, signals: Sequence[TokenSignal]) -> None:
        with self.timer("match"):
            chosen = within(signals, self.settings.max_tokens)
            rollouts, evidence = await self._evidence(teacher, chosen)
            if not rollouts:
                return
            found = self.match(rollouts, evidence, teacher=name, k=self.settings.top_k)
            known = [_where_it_counts(of, r, teacher.masked_ids) for of, r in zip(found, rollouts, strict=True)]
            sizes = [size for of in found for size in of.get("top_k", ())]
            row = {"top_k": int(min(sizes)) if sizes else None, **summarize_match(known, rollouts)}
        self._row.setdefault("match", {})[name] = row
        prefix = _area("match", name, self.open_teachers)
        self._metrics |= {f"{prefix}/{of}": value for of, value in row["means"].items()}
        self._metrics |= {f"{prefix}/tokens": float(row["tokens"])}
        if row["not_finite"]:
            self._metrics[f"{prefix}/not_finite"] = float(row["not_finite"])

    async def _evidence(
        self, teacher: OpenTeacher, signals: Sequence[TokenSignal]
    ) -> tuple[list[Rollout], list[Evidence]]:
        """Return the rollouts of which something can be known, and what tells it."""
        found: list[tuple[Rollout, Evidence]] = []
        unknown = []
        for signal in signals:
            if not teacher.has_weights and isinstance(signal.kl_evidence, TokenScores):
                found.append((signal.rollout, signal.kl_evidence))
                continue
            read = teacher.reader.read(signal.rollout)
            if read.reading is None:
                continue
            if teacher.has_weights:
                found.append((signal.rollout, read.reading if read.alignment is None else read))
            elif read.alignment is None:
                unknown.append((signal.rollout, read.reading))
        if unknown and teacher.scorer is not None:
            top_k = min(self.settings.top_k, teacher.scorer_top_k)
            answers = await teacher.scorer.score([reading for _, reading in unknown], top_k=top_k)
            found += [
                (rollout, answer.scores)
                for (rollout, _), answer in zip(unknown, answers, strict=True)
                if answer.scores is not None
            ]
        return [rollout for rollout, _ in found], [of for _, of in found]

    async def _probe(self, name: str, teacher: Teacher, rollouts: Sequence[Rollout], ctx: StepContext) -> None:
        settings = self.settings.prefix_probe
        usable = [r for r in rollouts if r.is_correct is not None and r.prompt.answer is not None]
        if not usable:
            self.say(f"step {ctx.step + 1}: no rollout with a verdict, so no prefix is probed")
            return
        assert self.verifier is not None
        asked = self._probe_settings(seed=ctx.seed)
        chosen = sorted(usable, key=lambda r: r.group_index)[: settings.max_rollouts]
        first = 0 if settings.fractions else min(settings.positions)
        if first and all(num_text_tokens(r) <= first for r in chosen):
            self.say(f"step {ctx.step + 1}: every rollout ends before the first prefix, so none is probed")
            return
        with self.timer("probe"):
            report = await probe_prefixes(chosen, teacher, self.verifier, asked)
        lines = summary_lines(report)
        for line in lines:
            self.say(line)
        self._row.setdefault("prefix", {})[name] = {"lines": list(lines), "usage": report.usage.to_json()}
        prefix = _area("prefix", name, self.text_teachers)
        self._metrics |= {f"{prefix}/{of.removeprefix('prefix/')}": value for of, value in report.metrics.items()}

    def _probe_settings(self, *, seed: int) -> PrefixProbeSettings:
        """Return what a prefix probe asks. Raises ConfigError for cuts that there cannot be."""
        settings = self.settings.prefix_probe
        return PrefixProbeSettings(
            fractions=settings.fractions,
            positions=settings.positions,
            num_continuations=settings.num_continuations,
            max_tokens=settings.max_tokens or self.answer_tokens,
            requests_per_call=None,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A supervision whose signals the diagnostics look at before the learner gets them."""

    supervision: Supervision
    diagnostics: RunDiagnostics

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Return the supervision's own signals, untouched. Raises what either raises."""
        signals = await self.supervision.signals(rollouts, ctx)
        await self.diagnostics.look(signals, ctx)
        return signals


def most_likely_known(scorer: SequenceTeacher | None, max_logprobs: int) -> int:
    """Return how many of its likeliest tokens a teacher without weights here tells; `max_logprobs` is a server's."""
    from omniopd.logits.stored_scores import StoredScores

    if isinstance(scorer, StoredScores):
        return scorer.manifest.top_k or 0
    return sys.maxsize if max_logprobs < 0 else max_logprobs


def is_due(every: int, ctx: StepContext) -> bool:
    """Tell whether something that happens every so many steps, first and last included, happens in this one."""
    step = ctx.step + 1
    return every > 0 and (step % every == 0 or step == 1 or step == ctx.num_steps)


def within(signals: Sequence[TokenSignal], max_tokens: int) -> list[TokenSignal]:
    """Return whole rollouts of at most so many tokens together, at least one: one of each prompt, then a second...

    They end where the next would not fit; picking shorter ones instead would favor what the student does quickly.
    """
    chosen: list[TokenSignal] = []
    left = max_tokens
    for signal in sorted(signals, key=lambda s: s.rollout.group_index):
        left -= signal.rollout.num_tokens
        if chosen and left < 0:
            break
        chosen.append(signal)
    return chosen


def summarize_match(found: Sequence[TokenDiagnostics], rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Return the token means of each diagnostic, over all, by tenth of the rollout and by verdict.

    What has no evidence is None in the parts and has no mean. Values that are not finite (the teacher gives a token no
    probability at all) are left out and counted.
    """
    names = sorted({name for of in found for name in of})
    # A rollout without a diagnostic that others have is no evidence of it.
    values = {name: [of.get(name, []) for of in found] for name in names}
    not_finite = sum(math.isinf(v) for rows in values.values() for row in rows for v in row)
    values = {name: [[math.nan if math.isinf(v) else v for v in row] for row in rows] for name, rows in values.items()}
    means = {name: by_position(rows, bins=1)[0] for name, rows in values.items()}
    verdicts = [r.is_correct for r in rollouts]
    return {
        "rollouts": len(rollouts),
        "tokens": sum(r.num_tokens for r in rollouts),
        "not_finite": not_finite,
        "means": {name: mean for name, mean in means.items() if mean is not None},
        "by_position": {name: list(by_position(rows, bins=BINS)) for name, rows in values.items()},
        "by_correctness": {name: by_correctness(rows, verdicts) for name, rows in values.items()},
    }


def _where_it_counts(found: TokenDiagnostics, rollout: Rollout, masked_ids: frozenset[int]) -> TokenDiagnostics:
    if masked_ids.isdisjoint(rollout.token_ids):
        return found
    return {
        name: [math.nan if i in masked_ids else v for i, v in zip(rollout.token_ids, values, strict=True)]
        for name, values in found.items()
    }


def _area(area: str, name: str, teachers: Mapping[str, object]) -> str:
    return area if len(teachers) == 1 else f"{area}/{name}"
