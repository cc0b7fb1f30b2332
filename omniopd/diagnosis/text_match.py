"""How close a text teacher's next words are to the student's, at prefixes of the student's own rollouts.

It gathers the evidence for `text_overlap`, the stand-in for the overlap ratio where a teacher gives no log-probs. The
two are not comparable in size, and neither are two teachers under different similarities or span lengths. So that one
number can be read at all, the student is measured against itself in the same way: `self_overlap` is what a teacher
would score that writes exactly as the student does. Missing spans are left out and counted; they are never mismatches.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
from omniopd.errors import DataError, RolloutError
from omniopd.logits.diagnostics import text_overlap
from omniopd.scoring.similarity import Similarity
from omniopd.signals.credit import rejoin
from omniopd.supervision.chunked import request_seed
from omniopd.teachers.base import ContinuationRequest, Teacher
from omniopd.types import Continuation, Rollout, Usage, Value


class SpanSampler(Protocol):
    """Lets the student go on, as it does in rollouts: same weights, same sampling settings."""

    async def __call__(
        self, prefixes: Sequence[tuple[int, ...]], *, n: int, max_tokens: int, seeds: Sequence[int]
    ) -> Sequence[Sequence[str]]:
        """Return `n` texts of up to `max_tokens` tokens for each prefix, without special tokens.

        Args:
            prefixes: Token ids of the prompt and of the completion so far.
            n: Texts from each prefix. They are independent draws.
            max_tokens: In the student's tokens.
            seeds: One for each prefix.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMatchSettings(Value):
    """Where spans are compared, and how many."""

    num_prefixes: int = 64
    """M: over all rollouts, dealt out to the prompts in turn; fewer where there are fewer rollouts."""
    num_spans: int = 4
    """N: spans of each side at each prefix. The student writes one more, for `self_overlap`."""
    span_tokens: int = 32
    """Length limit of a span, for each side in its own tokens: across vocabularies the lengths differ, and a
    similarity with `| align` compares equal ones."""
    requests_per_call: int | None = 256
    """As in `PrefixProbeSettings`."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(num_prefixes=self.num_prefixes, num_spans=self.num_spans, span_tokens=self.span_tokens)
        require_positive(requests_per_call=1 if self.requests_per_call is None else self.requests_per_call)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanComparison(Value):
    """What both sides wrote at one prefix: the raw evidence."""

    rollout_id: str
    prompt_id: str
    start: int
    """Tokens of the completion before the spans."""
    teacher_spans: tuple[str, ...]
    """The usable ones."""
    student_spans: tuple[str, ...]
    """N"""
    overlap: float | None
    """`text_overlap` of this prefix, in [0, 1]; None without a usable teacher span."""
    self_overlap: float
    """The same of one more student span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMatchReport(Value):
    """How close the two write, over prompts. Never to be called an overlap ratio."""

    teacher_id: str
    similarity: str
    settings: TextMatchSettings
    text_overlap: PromptMean | None
    """In [0, 1]; None without a usable teacher span."""
    self_overlap: PromptMean | None
    """Of the student with itself at the same prefixes."""
    comparisons: tuple[SpanComparison, ...]
    num_spans: int
    """Distinct usable teacher spans."""
    missing: Mapping[str, int]
    """Distinct teacher spans that are no evidence, by reason."""
    num_unanswered: int
    """Prefixes left out because every teacher span is missing."""
    usage: Usage
    """Of the teacher."""

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for a run's records. What has no evidence has no entry."""
        found: dict[str, float | None] = {}
        for name, mean in (("text_overlap", self.text_overlap), ("self_overlap", self.self_overlap)):
            if mean is not None:
                found[f"match/{name}"] = mean.value
                found |= {f"match/{name}_low": mean.low, f"match/{name}_high": mean.high}
        asked = self.num_spans + sum(self.missing.values())
        found["match/missing"] = sum(self.missing.values()) / asked
        return {name: value for name, value in found.items() if value is not None}

    def summary_lines(self) -> tuple[str, ...]:
        """Return the figures in words, a line each."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.missing.items()) or "none"
        return (
            f"text overlap of {self.teacher_id} with the student: {_told(self.text_overlap)}; the student with itself: "
            f"{_told(self.self_overlap)}",
            f"similarity {self.similarity}, {len(self.comparisons)} prefixes, {self.num_spans} teacher spans of up to "
            f"{self.settings.span_tokens} tokens; missing: {left_out}",
        )


def _told(mean: PromptMean | None) -> str:
    if mean is None:
        return "no evidence"
    spread = "unknown, one prompt" if mean.low is None else f"{mean.low:.2f} to {mean.high:.2f}"
    return f"{mean.value:.2f} (95%: {spread})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    rollout: Rollout
    start: int
    request: ContinuationRequest


async def match_texts(
    rollouts: Sequence[Rollout],
    teacher: Teacher,
    student: SpanSampler,
    similarity: Similarity,
    settings: TextMatchSettings | None = None,
    *,
    progress: Progress | None = None,
) -> TextMatchReport:
    """Let both sides go on from prefixes of the rollouts and compare what they write. Spends money.

    Prefixes are drawn by seed, uniformly within a rollout, and are the same for the same rollouts.

    Args:
        rollouts: The student's own; others are left out. No verdicts needed.
        teacher: Any text teacher; not closed here.
        student: The rollout engine.
        similarity: Of two texts, in [0, 1].
        settings: None takes the defaults.
        progress: Called with (teacher requests answered, requests in all).

    Raises:
        DataError: there is no rollout with text.
        RolloutError: the student answers another number of prefixes or texts than it was asked.
        TeacherResponseError: the same of the teacher.
        TeacherAuthError, TeacherConnectionError, TeacherRateLimitError, TeacherBudgetError: from the teacher.
    """
    settings = settings or TextMatchSettings()
    probes = _probes(rollouts, settings)
    if not probes:
        raise DataError(f"none of {len(rollouts)} rollouts is the student's own and has text; draw rollouts first")
    own = await _student_spans(student, probes, settings)
    answers = await ask_once(
        teacher, [p.request for p in probes], per_call=settings.requests_per_call, progress=progress
    )
    comparisons = tuple(
        _compare(
            probe,
            [c for c in answers[probe.request].continuations if c.text is not None],
            own[probe.request],
            similarity,
        )
        for probe in probes
    )
    samples = [c for answer in answers.values() for c in answer.continuations]
    known = [c for c in comparisons if c.overlap is not None]
    return TextMatchReport(
        teacher_id=teacher.id,
        similarity=similarity.name,
        settings=settings,
        text_overlap=mean_over_prompts([(c.prompt_id, c.overlap) for c in known if c.overlap is not None]),
        self_overlap=mean_over_prompts([(c.prompt_id, c.self_overlap) for c in known]),
        comparisons=comparisons,
        num_spans=sum(c.missing is None for c in samples),
        missing=dict(sorted(Counter(c.missing.value for c in samples if c.missing is not None).items())),
        num_unanswered=len(comparisons) - len(known),
        usage=sum((answer.usage for answer in answers.values()), Usage()),
    )


def text_match_cost(rollouts: Sequence[Rollout], settings: TextMatchSettings, *, thinking_tokens: int = 0) -> ProbeCost:
    """Return what the teacher will be asked, before anything is spent; a ledger may make it cheaper."""
    requests = {probe.request for probe in _probes(rollouts, settings)}
    return cost_of(
        len(requests), answers_per_request=settings.num_spans, tokens_per_answer=settings.span_tokens + thinking_tokens
    )


def _probes(rollouts: Sequence[Rollout], settings: TextMatchSettings) -> list[_Probe]:
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        if is_students_own(rollout) and num_text_tokens(rollout):
            by_prompt.setdefault(rollout.prompt.id, []).append(rollout)
    queues = list(by_prompt.values())
    random.Random(settings.seed).shuffle(queues)
    rounds = max(map(len, queues), default=0)
    dealt = [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]
    return [_probe(rollout, settings) for rollout in dealt[: settings.num_prefixes]]


def _probe(rollout: Rollout, settings: TextMatchSettings) -> _Probe:
    # The rollout's id is not the same in every run, its text is.
    draw = random.Random(request_seed(settings.seed, rollout.prompt.id, rollout.text))
    start, prefix = cut_at(rollout, draw.randrange(num_text_tokens(rollout)))
    request = ContinuationRequest(
        messages=rollout.prompt.messages,
        prefix=prefix,
        n=settings.num_spans,
        max_tokens=settings.span_tokens,
        seed=request_seed(settings.seed, rollout.prompt.id, prefix),
        token_ids=rollout.prompt.token_ids + rollout.token_ids[:start],
    )
    return _Probe(rollout=rollout, start=start, request=request)


def _ids(request: ContinuationRequest) -> tuple[int, ...]:
    assert request.token_ids is not None
    return request.token_ids


async def _student_spans(
    student: SpanSampler, probes: Sequence[_Probe], settings: TextMatchSettings
) -> dict[ContinuationRequest, tuple[str, ...]]:
    distinct = list({probe.request: probe for probe in probes}.values())
    n = settings.num_spans + 1
    got = await student(
        [_ids(probe.request) for probe in distinct],
        n=n,
        max_tokens=settings.span_tokens,
        # Not the teacher's: a teacher with the student's weights and seed would repeat the student word for word.
        seeds=[request_seed(settings.seed, "student", str(probe.request.seed)) for probe in distinct],
    )
    if [len(texts) for texts in got] != [n] * len(distinct):
        raise RolloutError(
            f"the student wrote {sum(map(len, got))} spans at {len(got)} prefixes; expected {n} at each of "
            f"{len(distinct)}"
        )
    return {probe.request: tuple(texts) for probe, texts in zip(distinct, got, strict=True)}


def _compare(
    probe: _Probe, continuations: Sequence[Continuation], own: Sequence[str], similarity: Similarity
) -> SpanComparison:
    *spans, extra = own
    following = probe.rollout.text[len(probe.request.prefix) :]
    teacher_spans = tuple(rejoin(continuation, following) for continuation in continuations)
    self_overlap = text_overlap([(extra,)], [spans], similarity)
    assert self_overlap is not None
    return SpanComparison(
        rollout_id=probe.rollout.id,
        prompt_id=probe.rollout.prompt.id,
        start=probe.start,
        teacher_spans=teacher_spans,
        student_spans=tuple(spans),
        overlap=text_overlap([teacher_spans], [spans], similarity),
        self_overlap=self_overlap,
    )
