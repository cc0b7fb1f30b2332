"""Can this teacher teach this student on these prompts? One finding from the numbers, in words, with what to do next.

Every threshold here is our choice, none is from a paper; each is named in the sentence that it decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omniopd.diagnosis.evidence import PromptMean
from omniopd.diagnosis.logit_match import LOG_RATIO, OVERLAP, LogitMatchReport, told_mean
from omniopd.diagnosis.prefix_probe import PrefixPoint, PrefixReport
from omniopd.diagnosis.prefix_summary import FEW_PROMPTS, NO_ROOM, WORTH
from omniopd.diagnosis.text_match import TextMatchReport
from omniopd.types import Value

LOW_OVERLAP = 0.5
"""Below it teacher and student consider different tokens. Runs that went well began near 0.72 (arXiv 2604.13016)."""
SAME_OVERLAP = 0.98
SAME_LOG_RATIO = 0.01
"""Nats a token. Above that overlap and with a log-ratio so near to 0 the two are one model, as far as training could
tell."""
TAIL_DROP = 0.15
"""A last fifth whose overlap lies so far below that of the first half is a tail to cut off."""
FAR_TEXT = 0.5
"""A teacher whose text is less than so much as close to the student's as the student's own writes another way."""
SAME_TEXT = 0.95
"""The same, for a teacher that writes as the student does."""

COLD_START = (
    "cold start: first fine-tune the student on answers of the teacher (as `omniopd train sft-teacher-samples` does), "
    "then check again"
)
ALIGNED_PROMPTS = "prompts from the teacher's own post-training, in its own template, bring the two closer"
SHORTER = "shorter completions: lower rollout.max_tokens"
ANOTHER = "another teacher: one that is better at these prompts"
HARDER = "harder prompts, or a better teacher"
MORE_PROMPTS = "more prompts: raise --prompts"
GO = "train"


class Finding(StrEnum):
    """What a check came to."""

    CAN_TEACH = "can_teach"
    NOTHING_NEW = "nothing_new"
    TOO_FAR = "too_far"
    """The teacher knows more, but not where the student goes."""
    CANNOT_TEACH = "cannot_teach"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Value):
    """A finding with its reason."""

    finding: Finding
    says: str
    next_steps: tuple[str, ...]

    def lines(self) -> tuple[str, ...]:
        """Return the verdict for a person, a line each."""
        return (f"verdict: {self.says}", *(f"next: {step}" for step in self.next_steps))


def _verdict(finding: Finding, says: str, *next_steps: str) -> Verdict:
    return Verdict(finding=finding, says=says, next_steps=next_steps)


def _more_prompts(num_prompts: int) -> str:
    """Say how many to ask for, given how many there was evidence of."""
    wanted = f"{FEW_PROMPTS} or more" if num_prompts < FEW_PROMPTS else f"more than {num_prompts}"
    return f"more prompts: --prompts {wanted}"


def judge_logits(report: LogitMatchReport) -> Verdict:
    """Judge what the distributions tell. An interval that straddles a threshold decides nothing."""
    ratio, overlap = report.numbers.get(LOG_RATIO), report.numbers.get(OVERLAP)
    if ratio is None:
        return _verdict(Finding.UNCLEAR, "no rollout could be compared; see what is missing", MORE_PROMPTS)
    is_near = _low(ratio.mean) > -SAME_LOG_RATIO and _high(ratio.mean) < SAME_LOG_RATIO
    told = f"log-ratio (teacher minus student) {told_mean(ratio.mean)} nats a token"
    if overlap is None:
        if is_near:
            return _verdict(
                Finding.NOTHING_NEW,
                f"nothing new to teach: {told} (the same model within {SAME_LOG_RATIO:g} of 0)",
                HARDER,
            )
        return _verdict(
            Finding.UNCLEAR,
            f"{told}, so the two differ; whether they consider the same tokens cannot be told from what this teacher "
            "gives",
            "a few steps of training, and see whether the log-ratio nears 0",
        )
    told = f"overlap {told_mean(overlap.mean)}, {told}"
    if is_near and _low(overlap.mean) >= SAME_OVERLAP:
        return _verdict(
            Finding.NOTHING_NEW,
            f"nothing new to teach: {told} (the same model from overlap {SAME_OVERLAP:g} and within "
            f"{SAME_LOG_RATIO:g} of 0)",
            "another teacher: this one already agrees with the student",
        )
    if _high(overlap.mean) < LOW_OVERLAP:
        return _verdict(
            Finding.TOO_FAR,
            f"too far apart: {told} (overlap limit {LOW_OVERLAP:g}); the teacher would correct tokens that the student "
            "does not consider",
            COLD_START,
            ALIGNED_PROMPTS,
            "another teacher: a closer relative of the student",
        )
    tail = _tail(overlap.tenths)
    if _low(overlap.mean) < LOW_OVERLAP or overlap.mean.num_prompts < FEW_PROMPTS:
        return _verdict(
            Finding.UNCLEAR,
            f"undecided between close enough and too far: {told} over {overlap.mean.num_prompts} prompts (overlap "
            f"limit {LOW_OVERLAP:g}, at least {FEW_PROMPTS} prompts)",
            _more_prompts(overlap.mean.num_prompts),
        )
    return _verdict(
        Finding.CAN_TEACH,
        f"close enough to teach, and there is something to learn: {told} (overlap limit {LOW_OVERLAP:g}). Whether "
        "the teacher is right more often is not looked at here",
        GO,
        *tail,
    )


def _tail(tenths: tuple[float | None, ...]) -> tuple[str, ...]:
    start = [v for v in tenths[: len(tenths) // 2] if v is not None]
    end = [v for v in tenths[-2:] if v is not None]
    if not start or not end:
        return ()
    before, after = sum(start) / len(start), sum(end) / len(end)
    if before - after < TAIL_DROP:
        return ()
    return (
        f"{SHORTER}, or drop truncated rollouts: the overlap falls from {before:.2f} in the first half to {after:.2f} "
        f"in the last fifth (a drop of {TAIL_DROP:g} counts)",
    )


def judge_text(prefix: PrefixReport | None, text: TextMatchReport | None, *, worth: float = WORTH) -> Verdict:
    """Judge a text teacher: can it finish from the student's prefixes, and does it write as the student does?"""
    closeness = _closeness(text)
    if prefix is None:
        return _judge_by_text_alone(text, closeness)
    points = [p for p in prefix.points if p.advantage is not None and p.advantage.low is not None]
    if not points:
        return _verdict(Finding.UNCLEAR, "no prefix has usable answers for two prompts or more", MORE_PROMPTS)
    more = _more_prompts(fewest := min(_prompts(p) for p in points))
    hint = (f"{more}; with fewer this is a hint",) if fewest < FEW_PROMPTS else ()
    helping = [p for p in points if _advantage_low(p) > 0]
    if any(not is_empty_prefix(p) for p in helping):
        return _verdict(
            Finding.CAN_TEACH,
            f"the teacher goes on from the student's own prefixes and is ahead ({_told(helping)}){closeness.note}",
            GO,
            *(() if helping[-1] is points[-1] else (f"{SHORTER}; no advantage is shown after {helping[-1].label}",)),
            *closeness.next_steps,
            *hint,
        )
    ruled_out = all(_advantage_high(p) < worth for p in points if p not in helping)
    if helping:
        return _verdict(
            Finding.TOO_FAR if ruled_out else Finding.UNCLEAR,
            f"the teacher is ahead from the question alone ({_told(helping)}) and not shown to be from the student's "
            f"prefixes{closeness.note}",
            COLD_START,
            ALIGNED_PROMPTS,
            SHORTER,
            *(hint if ruled_out else (more,)),
        )
    first = points[0]
    if closeness.is_same or (first.student is not None and first.student.value >= NO_ROOM):
        why = (
            "it writes as the student does and is nowhere ahead"
            if closeness.is_same
            else "the student is right already"
        )
        return _verdict(Finding.NOTHING_NEW, f"nothing new to teach: {why}{closeness.note}", HARDER, *hint)
    if ruled_out:
        return _verdict(
            Finding.CANNOT_TEACH,
            f"the teacher cannot teach here: it is nowhere ahead, and an advantage of {worth:g} is ruled out "
            f"({_told(points)}){closeness.note}",
            ANOTHER,
            ALIGNED_PROMPTS,
            *hint,
        )
    return _verdict(
        Finding.UNCLEAR,
        f"no advantage is shown, and {worth:g} is not ruled out ({_told(points)}){closeness.note}",
        more,
        ANOTHER,
    )


@dataclass(frozen=True, slots=True)
class _Closeness:
    is_same: bool = False
    is_far: bool = False
    note: str = ""
    next_steps: tuple[str, ...] = ()


def _closeness(text: TextMatchReport | None) -> _Closeness:
    if text is None or text.text_overlap is None or text.self_overlap is None or text.self_overlap.value <= 0:
        return _Closeness()
    own = text.self_overlap.value
    share = text.text_overlap.value / own
    if _high(text.text_overlap) < FAR_TEXT * own:
        note = (
            f"; its text is only {share:.2f} times as close to the student's as the student's own (limit {FAR_TEXT:g})"
        )
        return _Closeness(is_far=True, note=note, next_steps=(COLD_START,))
    if _low(text.text_overlap) >= SAME_TEXT * own:
        return _Closeness(is_same=True, note=f"; its text is {share:.2f} times as close as the student's own")
    return _Closeness(note=f"; its text is {share:.2f} times as close to the student's as the student's own")


def _judge_by_text_alone(text: TextMatchReport | None, closeness: _Closeness) -> Verdict:
    if text is None or text.text_overlap is None:
        return _verdict(Finding.UNCLEAR, "the teacher gave no usable text", "look at it with `omniopd teachers check`")
    if closeness.is_far:
        return _verdict(Finding.TOO_FAR, f"too far apart{closeness.note}", COLD_START, ALIGNED_PROMPTS)
    return _verdict(
        Finding.UNCLEAR,
        f"nothing speaks against this teacher, and without answers nobody can tell whether it is ahead{closeness.note}",
        "give the data answers (`answer`), so that the teacher's endings can be judged",
    )


def is_empty_prefix(point: PrefixPoint) -> bool:
    """Tell whether the cut lies before the first token, where the teacher reads the question alone."""
    return point.label in ("0", "0t")


def _low(mean: PromptMean) -> float:
    return mean.value if mean.low is None else mean.low


def _high(mean: PromptMean) -> float:
    return mean.value if mean.high is None else mean.high


def _advantage_low(point: PrefixPoint) -> float:
    assert point.advantage is not None
    return _low(point.advantage)


def _advantage_high(point: PrefixPoint) -> float:
    assert point.advantage is not None
    return _high(point.advantage)


def _prompts(point: PrefixPoint) -> int:
    assert point.advantage is not None
    return point.advantage.num_prompts


def _told(points: list[PrefixPoint]) -> str:
    return "; ".join(
        f"{p.label}: {p.advantage.value:+.2f} ({_advantage_low(p):+.2f} to {_advantage_high(p):+.2f})"
        for p in points
        if p.advantage is not None
    )
