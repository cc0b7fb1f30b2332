"""Can the teacher finish from the student's prefix? On-policy distillation teaches only where it can, and better.

rollouts with verdicts -> cut -> the teacher goes on -> verify prefix + continuation -> compare with the student

The measure is the continuation advantage: the teacher's success rate minus the student's, from the same prefixes. It
trains nothing, chooses no settings and draws nothing from the student: a rollout's own verdict is the student's one
sample from each of its prefixes. What follows from that:

- At an absolute position the verdict is a fair sample, because the cut looks at nothing behind it. A fraction of the
  rollout's length looks ahead: where failing rollouts are long, cuts inside them lie late and those inside short right
  ones early, and even a teacher that is the student seems to do worse. Fractions compare teachers and parts of a
  rollout; positions tell whether a teacher is ahead at all.
- Positions beyond a rollout's end leave that rollout out, so different positions speak of different rollouts.
- From the prefixes of wrong rollouts the student's rate is 0 by selection. Drawn again it would recover, too, so the
  recovery rate alone is no advantage; the advantage over all rollouts is free of that.

Answers that are missing are left out and counted by reason; they are never failures. An answer that the length limit
cut is verified like any other (so is a student's rollout), right counts as right, wrong as wrong; those are counted,
and `advantage_if_finished` says what the advantage would be at most, had each of them ended right.

Source: arXiv 2604.13016 (+0.37 after a short prefix, +0.02 after a long one). Differs: paired, with intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omniopd.behavior.base import Verifier
from omniopd.diagnosis.evidence import (
    ProbeCost,
    Progress,
    PromptMean,
    ask_once,
    cost_of,
    cut_at,
    is_students_own,
    mean_over_prompts,
    num_text_tokens,
    require_positive,
)
from omniopd.errors import ConfigError, DataError
from omniopd.signals.credit import rejoin
from omniopd.supervision.chunked import request_seed
from omniopd.teachers.base import ContinuationRequest, Teacher, TeacherAnswer
from omniopd.types import FinishReason, Missing, Rollout, Usage, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixProbeSettings(Value):
    """Where rollouts are cut, and how much is asked there."""

    fractions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    """Of the rollout's own length in tokens with text, in [0, 1)."""
    positions: tuple[int, ...] = ()
    """Absolute: after so many tokens. A rollout that is not longer is left out."""
    num_continuations: int = 2
    """Teacher answers from each prefix."""
    max_tokens: int = 1024
    """Length limit of each answer in teacher tokens, the same everywhere, so that one prefix is one question. Give it
    what the student has for a whole rollout."""
    requests_per_call: int | None = 256
    """How many requests the teacher gets in one call; progress is told after each. None: all in one, which a batch
    endpoint needs."""
    seed: int = 0

    def __post_init__(self) -> None:
        if bad := [f for f in self.fractions if not 0 <= f < 1]:
            raise ConfigError(f"fractions has {bad[0]:g}; expected 0 or more and less than 1, the whole rollout")
        if bad_positions := [p for p in self.positions if p < 0]:
            raise ConfigError(f"positions has {bad_positions[0]}; expected token counts of 0 or more")
        if not self.fractions and not self.positions:
            raise ConfigError("neither fractions nor positions to cut at; give at least one")
        require_positive(num_continuations=self.num_continuations, max_tokens=self.max_tokens)
        require_positive(requests_per_call=1 if self.requests_per_call is None else self.requests_per_call)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the cuts, from short to long: fractions (`0.25`), then positions (`1024t`)."""
        return (*(f"{f:g}" for f in sorted(set(self.fractions))), *(f"{p}t" for p in sorted(set(self.positions))))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOutcome(Value):
    """What the teacher made of one prefix of one rollout: the raw evidence."""

    rollout_id: str
    prompt_id: str
    label: str
    """Which cut, as in `PrefixProbeSettings.labels`."""
    start: int
    """Tokens of the completion before the cut."""
    student_is_correct: bool
    """What became of the rollout itself."""
    num_right: int
    num_wrong: int
    num_truncated: int
    """Of the right and wrong answers, those that the length limit cut."""
    num_truncated_wrong: int
    num_asked_to: int
    """Of the right and wrong answers, those of a chat model that was only asked to go on. One that stops early says
    nothing about whether it could have finished."""
    missing: tuple[Missing, ...] = ()
    is_repeat: bool = False
    """Whether an earlier rollout has the same prefix, and so the same answers; they are counted once."""

    @property
    def num_answers(self) -> int:
        """The answers that are evidence."""
        return self.num_right + self.num_wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPoint(Value):
    """One cut over all rollouts. Every rate is a mean over prompts, of the mean over a prompt's rollouts."""

    label: str
    teacher: PromptMean | None
    """The teacher's success rate, in [0, 1]; None without a usable answer."""
    student: PromptMean | None
    """The student's, of the same rollouts."""
    advantage: PromptMean | None
    """Teacher minus student, in [-1, 1], paired by rollout."""
    recovery: PromptMean | None
    """The teacher's rate from prefixes of wrong rollouts; None without one."""
    spoiling: PromptMean | None
    """The share of right rollouts that the teacher ends wrong; None without a right one."""
    advantage_if_finished: float | None
    """The advantage had every wrong answer that the length limit cut ended right: an upper bound."""
    num_answers: int
    """Distinct usable answers; siblings that share a prefix share them."""
    num_truncated: int
    num_truncated_wrong: int
    num_asked_to: int
    missing: Mapping[str, int] = field(default_factory=dict)
    """Distinct answers that are no evidence, by reason."""
    num_unanswered: int = 0
    """Rollouts left out because every answer is missing."""
    num_too_short: int = 0
    """Rollouts left out because they end before the cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixReport(Value):
    """The whole probe: what was asked, what came back, what follows."""

    teacher_id: str
    settings: PrefixProbeSettings
    points: tuple[PrefixPoint, ...]
    """One for each cut, in the order of `settings.labels`."""
    outcomes: tuple[PrefixOutcome, ...]
    num_rollouts: int
    """Rollouts that were probed."""
    num_skipped: int
    """Rollouts without a verdict, aborted or not written by the student."""
    num_truncated_rollouts: int
    """Of those probed, how many hit the student's length limit. Their verdict is the student's with no room left, while
    the teacher gets `max_tokens` from every prefix."""
    usage: Usage

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for a run's records, `prefix/advantage@0.25` and so on. What has no evidence has no entry."""
        found: dict[str, float | None] = {}
        for p in self.points:
            asked = p.num_answers + sum(p.missing.values())
            means = {"teacher": p.teacher, "student": p.student, "recovery": p.recovery, "spoiling": p.spoiling}
            found |= {f"prefix/{name}@{p.label}": mean.value for name, mean in means.items() if mean is not None}
            if p.advantage is not None:
                found[f"prefix/advantage@{p.label}"] = p.advantage.value
                found[f"prefix/advantage_low@{p.label}"] = p.advantage.low
                found[f"prefix/advantage_high@{p.label}"] = p.advantage.high
                found[f"prefix/truncated@{p.label}"] = p.num_truncated / p.num_answers
            found[f"prefix/missing@{p.label}"] = sum(p.missing.values()) / asked if asked else None
        return {name: value for name, value in found.items() if value is not None}


async def probe_prefixes(
    rollouts: Sequence[Rollout],
    teacher: Teacher,
    verifier: Verifier,
    settings: PrefixProbeSettings | None = None,
    *,
    progress: Progress | None = None,
) -> PrefixReport:
    """Let the teacher finish the rollouts from their own prefixes. Spends money; `prefix_probe_cost` says how much.

    The same prefix of the same prompt is asked once, with the same seed in every probe, so a ledger answers repeats.

    Args:
        rollouts: With verdicts of this very verifier. Those without one are skipped and counted.
        teacher: Any text teacher; not closed here.
        verifier: (response, answer) -> right or wrong.
        settings: None takes the defaults.
        progress: Called with (requests answered, requests in all).

    Raises:
        DataError: no rollout can be probed.
        TeacherResponseError: the teacher answers another number of requests or samples than it was asked.
        TeacherAuthError, TeacherConnectionError, TeacherRateLimitError, TeacherBudgetError: from the teacher.
    """
    settings = settings or PrefixProbeSettings()
    usable = [r for r in rollouts if _is_usable(r)]
    probes = _probes(usable, settings)
    if not probes:
        raise DataError(
            f"none of {len(rollouts)} rollouts can be probed ({len(usable)} are the student's own with a verdict); "
            "the prefix probe needs prompts with answers, a verifier, and cuts before the rollouts end"
        )
    answers = await ask_once(
        teacher, [p.request for p in probes], per_call=settings.requests_per_call, progress=progress
    )
    outcomes = _outcomes(probes, answers, verifier)
    return PrefixReport(
        teacher_id=teacher.id,
        settings=settings,
        points=tuple(summarize(outcomes, label, num_rollouts=len(usable)) for label in settings.labels),
        outcomes=outcomes,
        num_rollouts=len(usable),
        num_skipped=len(rollouts) - len(usable),
        num_truncated_rollouts=sum(r.finish_reason is FinishReason.LENGTH for r in usable),
        usage=sum((answer.usage for answer in answers.values()), Usage()),
    )


def summarize(outcomes: Sequence[PrefixOutcome], label: str, *, num_rollouts: int) -> PrefixPoint:
    """Return the figures of one cut. Deterministic; spends nothing.

    Args:
        outcomes: Of any cuts; those of `label` count.
        label: As in `PrefixProbeSettings.labels`.
        num_rollouts: How many were probed, whether they reach the cut or not.
    """
    here = [o for o in outcomes if o.label == label]
    known = [o for o in here if o.num_answers]
    distinct = [o for o in here if not o.is_repeat]
    finished = [(o.prompt_id, (o.num_right + o.num_truncated_wrong) / o.num_answers - _student(o)) for o in known]
    bound = mean_over_prompts(finished)
    return PrefixPoint(
        label=label,
        teacher=mean_over_prompts([(o.prompt_id, _teacher(o)) for o in known]),
        student=mean_over_prompts([(o.prompt_id, _student(o)) for o in known]),
        advantage=mean_over_prompts([(o.prompt_id, _teacher(o) - _student(o)) for o in known]),
        recovery=mean_over_prompts([(o.prompt_id, _teacher(o)) for o in known if not o.student_is_correct]),
        spoiling=mean_over_prompts([(o.prompt_id, 1.0 - _teacher(o)) for o in known if o.student_is_correct]),
        advantage_if_finished=None if bound is None else bound.value,
        num_answers=sum(o.num_answers for o in distinct),
        num_truncated=sum(o.num_truncated for o in distinct),
        num_truncated_wrong=sum(o.num_truncated_wrong for o in distinct),
        num_asked_to=sum(o.num_asked_to for o in distinct),
        missing=dict(sorted(Counter(reason.value for o in distinct for reason in o.missing).items())),
        num_unanswered=len(here) - len(known),
        num_too_short=num_rollouts - len(here),
    )


def prefix_probe_cost(
    rollouts: Sequence[Rollout], settings: PrefixProbeSettings, *, thinking_tokens: int = 0
) -> ProbeCost:
    """Return what a probe of these rollouts will ask, before anything is spent; a ledger may make it cheaper.

    Args:
        rollouts: As for `probe_prefixes`.
        settings: As for `probe_prefixes`.
        thinking_tokens: Hidden ones of each answer, which come on top of `max_tokens`.
    """
    requests = {probe.request for probe in _probes([r for r in rollouts if _is_usable(r)], settings)}
    return _cost(len(requests), settings, thinking_tokens)


def cut_positions(rollouts: Sequence[Rollout]) -> tuple[int, ...]:
    """Return where the prefix probe cuts: before the first token, and at about 1/4, 1/2 and 3/4 of a typical rollout.

    Absolute positions, because a fraction of each rollout's own length favors the student; two binary digits of each,
    so that more prompts seldom move a cut and what was asked stays asked.
    """
    lengths = sorted(num_text_tokens(r) for r in rollouts if is_students_own(r))
    middle = lengths[len(lengths) // 2] if lengths else 0
    parts = [middle // 4, middle // 2, 3 * middle // 4]
    return tuple(sorted({0, *(_two_digits(part) for part in parts if part)}))


def _two_digits(number: int) -> int:
    dropped = max(0, number.bit_length() - 2)
    return number >> dropped << dropped


def largest_prefix_probe_cost(
    *, num_prompts: int, group_size: int, settings: PrefixProbeSettings, thinking_tokens: int = 0
) -> ProbeCost:
    """Return what a probe of rollouts that are not drawn yet costs at most: siblings share only the empty prefix."""
    num_empty = len({label for label in settings.labels if label in ("0", "0t")})
    num_longer = len(settings.labels) - num_empty
    return _cost(num_prompts * (min(num_empty, 1) + num_longer * group_size), settings, thinking_tokens)


def _cost(num_requests: int, settings: PrefixProbeSettings, thinking_tokens: int) -> ProbeCost:
    return cost_of(
        num_requests,
        answers_per_request=settings.num_continuations,
        tokens_per_answer=settings.max_tokens + thinking_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    rollout: Rollout
    label: str
    start: int
    request: ContinuationRequest


def _is_usable(rollout: Rollout) -> bool:
    return is_students_own(rollout) and rollout.is_correct is not None and rollout.prompt.answer is not None


def _probes(rollouts: Sequence[Rollout], settings: PrefixProbeSettings) -> list[_Probe]:
    probes = []
    for rollout in rollouts:
        length = num_text_tokens(rollout)
        positions = [int(f * length) for f in sorted(set(settings.fractions))] + sorted(set(settings.positions))
        for label, position in zip(settings.labels, positions, strict=True):
            if 0 < position >= length:
                continue
            start, prefix = cut_at(rollout, position)
            request = ContinuationRequest(
                messages=rollout.prompt.messages,
                prefix=prefix,
                n=settings.num_continuations,
                max_tokens=settings.max_tokens,
                seed=request_seed(settings.seed, rollout.prompt.id, prefix),
                token_ids=rollout.prompt.token_ids + rollout.token_ids[:start],
            )
            probes.append(_Probe(rollout=rollout, label=label, start=start, request=request))
    return probes


def _outcomes(
    probes: Sequence[_Probe], answers: Mapping[ContinuationRequest, TeacherAnswer], verifier: Verifier
) -> tuple[PrefixOutcome, ...]:
    verdicts: dict[tuple[str, str], bool] = {}
    seen: set[tuple[str, ContinuationRequest]] = set()
    outcomes = []
    for probe in probes:
        rollout, prefix = probe.rollout, probe.request.prefix
        assert rollout.prompt.answer is not None and rollout.is_correct is not None
        usable = [c for c in answers[probe.request].continuations if c.missing is None]
        is_right = []
        for continuation in usable:
            key = (prefix + rejoin(continuation, rollout.text[len(prefix) :]), rollout.prompt.answer)
            if key not in verdicts:
                verdicts[key] = verifier(*key)
            is_right.append(verdicts[key])
        is_cut = [c.finish_reason == FinishReason.LENGTH for c in usable]
        outcomes.append(
            PrefixOutcome(
                rollout_id=rollout.id,
                prompt_id=rollout.prompt.id,
                label=probe.label,
                start=probe.start,
                student_is_correct=rollout.is_correct,
                num_right=sum(is_right),
                num_wrong=len(is_right) - sum(is_right),
                num_truncated=sum(is_cut),
                num_truncated_wrong=sum(cut and not right for cut, right in zip(is_cut, is_right, strict=True)),
                num_asked_to=sum(not c.is_exact for c in usable),
                missing=tuple(c.missing for c in answers[probe.request].continuations if c.missing is not None),
                is_repeat=(probe.label, probe.request) in seen,
            )
        )
        seen.add((probe.label, probe.request))
    return tuple(outcomes)


def _teacher(outcome: PrefixOutcome) -> float:
    return outcome.num_right / outcome.num_answers


def _student(outcome: PrefixOutcome) -> float:
    return float(outcome.student_is_correct)
