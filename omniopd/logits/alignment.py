"""One text, two tokenizers: which tokens of the student and which of the teacher wrote the same bytes.

    TokenBytes(tokenizer)(token_ids) -> Segments        where every token ends, in bytes
    align(student, teacher)          -> Alignment       groups that end on the same byte
    group_logprobs(alignment, ...)   -> GroupedLogprobs exact log-prob differences, spread over the student's tokens

Standard library only. Nothing here loads a model or asks a teacher.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omniopd.errors import ConfigError, DataError
from omniopd.logits.token_bytes import Segments

Spread = Literal["share", "whole"]
_MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tokens of both sides that wrote the same bytes; half-open ranges."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int
    is_exact: bool = True
    """Whether both sides end on the same byte. The leftovers at the end do not, and cannot be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Two cuts of one text and their groups; the ranges of the groups count the N tokens of `Segments`."""

    student: Segments
    teacher: Segments
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedLogprobs:
    """What the teacher thinks of the student's text, group by group."""

    differences: tuple[float | None, ...]
    """[G] log Q(group) - log P(group) in nats; None where the group is not exact."""
    advantages: tuple[float, ...]
    """[T] for the student's tokens: higher = the teacher likes it more."""
    weights: tuple[float, ...]
    """[T] 1, or 0 where nothing could be compared: special tokens and leftovers."""


def align_ends(
    student_ends: Sequence[int], teacher_ends: Sequence[int], *, limit: int | None = None
) -> tuple[Group, ...]:
    """Return the finest groups of tokens that end on the same byte on both sides.

    Every token of both sides lies in exactly one group. Both lists are walked, the side that ends first moves on, and a
    group closes where both end together. A token without text pairs with one of the other side at the same byte, else
    it joins the text after it (at the very end, the text before it). Leftovers form one last group that is not exact.

    Args:
        student_ends: [N] the byte at which each token ends, non-decreasing.
        teacher_ends: [M] the same of the other side.
        limit: bytes up to which both texts agree; no group closes beyond it. None: they agree.

    Raises:
        DataError: ends that go backwards.

    Source: byte-offset alignment of GOLD (Patino et al. 2025). Differs: GOLD leaves the side without leftovers empty
    when the other has only tokens without text; here those join the group before.

    Example:
        >>> [(g.student_end, g.teacher_end) for g in align_ends([1, 3, 4], [2, 3, 4])]
        [(2, 2), (3, 3)]
    """
    _check_ends("student", student_ends)
    _check_ends("teacher", teacher_ends)
    groups: list[Group] = []
    closed_s = closed_t = s = t = 0
    while s < len(student_ends) and t < len(teacher_ends):
        student_end, teacher_end = student_ends[s], teacher_ends[t]
        if limit is not None and max(student_end, teacher_end) > limit:
            break
        s += student_end <= teacher_end
        t += teacher_end <= student_end
        if student_end == teacher_end:
            groups.append(Group(student_start=closed_s, student_end=s, teacher_start=closed_t, teacher_end=t))
            closed_s, closed_t = s, t
    rest = (*student_ends[closed_s:], *teacher_ends[closed_t:])
    if not rest:
        return tuple(groups)
    is_one_sided = closed_s == len(student_ends) or closed_t == len(teacher_ends)
    has_no_text = bool(groups) and all(end == student_ends[closed_s - 1] for end in rest)
    last = groups.pop() if is_one_sided and has_no_text else None
    groups.append(
        Group(
            student_start=last.student_start if last else closed_s,
            student_end=len(student_ends),
            teacher_start=last.teacher_start if last else closed_t,
            teacher_end=len(teacher_ends),
            is_exact=last is not None,
        )
    )
    return tuple(groups)


def _check_ends(side: str, ends: Sequence[int]) -> None:
    before = 0
    for i, end in enumerate(ends):
        if end < before:
            raise DataError(f"{side} token {i} ends at byte {end}, before byte {before} where the one before it does")
        before = end


def align(student: Segments, teacher: Segments) -> Alignment:
    """Align two cuts of the same text.

    Where the student's bytes stop being UTF-8 (a completion cut inside a character) the teacher cannot have the same
    text; what lies beyond becomes the last group, which is not exact.

    Raises:
        DataError: the texts differ although the student's is valid, or one side alone keeps special tokens. Either
            means that the teacher was not given what the student wrote.
    """
    agree = _common_prefix(student.data, teacher.data)
    valid = len(student.text.encode())
    is_cut = valid < len(student.data)
    if agree < valid or (not is_cut and len(teacher.data) > agree):
        raise DataError(
            f"student and teacher do not write the same text: from byte {agree} on it is "
            f"{student.data[agree : agree + 40]!r} and {teacher.data[agree : agree + 40]!r}; "
            "give the teacher the student's text (Segments.text) unchanged"
        )
    if student.num_kept != teacher.num_kept:
        raise DataError(
            f"the student keeps {student.num_kept} special tokens and the teacher {teacher.num_kept}; "
            "keep the end of the turn on both sides or on neither"
        )
    return Alignment(student=student, teacher=teacher, groups=align_ends(student.ends, teacher.ends, limit=agree))


def _common_prefix(a: bytes, b: bytes) -> int:
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def group_logprobs(
    alignment: Alignment,
    student_logprobs: Sequence[float],
    teacher_logprobs: Sequence[float],
    *,
    spread: Spread = "share",
) -> GroupedLogprobs:
    """Return d = log Q(group) - log P(group) of every exact group as advantages of the student's tokens.

    The log-prob of a group is the sum of its tokens', so it is exact for the two cuts at hand; other cuts of the same
    bytes, which both models also give some probability, are not summed over. Where both sides cut alike, every group
    is one token and the advantages are log Q(y_t) - log P(y_t), bit for bit.

    Args:
        student_logprobs: [T] nats of all tokens of the student, special ones included.
        teacher_logprobs: [U] nats of all tokens of the teacher, special ones included.
        spread: `share`: d / n for each of the n tokens of a group; added from left to right they give d exactly, so
            that no text counts twice. `whole`: d for each of them, which makes the expected policy gradient that of
            the reverse KL over groups, n times the weight of `share`.

    Raises:
        DataError: a wrong number of log-probs, or one that is not finite.

    Source: ours; the alignment is GOLD's, see `align_ends`.
    """
    if spread not in ("share", "whole"):
        raise ConfigError(f"spread is {spread!r}; it can be share or whole")
    student = _aligned_logprobs("student", alignment.student, student_logprobs)
    teacher = _aligned_logprobs("teacher", alignment.teacher, teacher_logprobs)
    differences: list[float | None] = []
    advantages = [0.0] * alignment.student.num_tokens
    weights = [0.0] * alignment.student.num_tokens
    for group in alignment.groups:
        if not group.is_exact:
            differences.append(None)
            continue
        difference = math.fsum(teacher[group.teacher_start : group.teacher_end]) - math.fsum(
            student[group.student_start : group.student_end]
        )
        differences.append(difference)
        size = group.student_end - group.student_start
        shares = _equal_shares(difference, size) if spread == "share" else [difference] * size
        for position, share in zip(
            alignment.student.positions[group.student_start : group.student_end], shares, strict=True
        ):
            advantages[position], weights[position] = share, 1.0
    return GroupedLogprobs(differences=tuple(differences), advantages=tuple(advantages), weights=tuple(weights))


def _equal_shares(total: float, size: int) -> list[float]:
    """Split a number so that adding from left to right gives it back to the last bit."""
    share = total / size
    before = 0.0
    for _ in range(size - 1):
        before += share
    # `before` lies within a factor of two of `total`, so this difference has no rounding error (Sterbenz).
    return [share] * (size - 1) + [total - before]


def _aligned_logprobs(side: str, segments: Segments, logprobs: Sequence[float]) -> list[float]:
    if len(logprobs) != segments.num_tokens:
        raise DataError(f"{len(logprobs)} {side} log-probs for {segments.num_tokens} tokens")
    chosen = [logprobs[p] for p in segments.positions]
    for position, value in zip(segments.positions, chosen, strict=True):
        if not math.isfinite(value):
            raise DataError(f"the {side} log-prob of token {position} is {value}, expected a finite number of nats")
    return chosen


def _visible_lines(text: str) -> list[str]:
    return [json.dumps(line, ensure_ascii=True)[1:-1] for line in text.splitlines(keepends=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptComparison:
    """One conversation as the student and as the teacher read it."""

    student: str
    teacher: str
    difference: str
    """Line by line, `-` the student's and `+` the teacher's, with invisible characters spelled out; empty if same."""
    problems: tuple[str, ...]
    """What would make the teacher judge another conversation; empty when the two formats only spell it differently."""

    def __str__(self) -> str:
        lines = [f"student: {self.student!r}", f"teacher: {self.teacher!r}"]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, self.difference or "the prompts are the same"])


def compare_prompts(student_rendered: str, teacher_rendered: str, *, contents: Sequence[str] = ()) -> PromptComparison:
    """Compare two renderings of one conversation, to be printed before a run spends anything.

    Args:
        student_rendered: with the student's chat template.
        teacher_rendered: with the teacher's.
        contents: what the messages say. A rendering that lacks one of them, or has them in another order, is a
            problem: its template drops or rewrites messages.
    """
    lines = list(
        difflib.unified_diff(
            _visible_lines(student_rendered),
            _visible_lines(teacher_rendered),
            fromfile="student",
            tofile="teacher",
            lineterm="",
        )
    )
    student_markers, teacher_markers = set(_MARKER.findall(student_rendered)), set(_MARKER.findall(teacher_rendered))
    for side, own in (("student", student_markers - teacher_markers), ("teacher", teacher_markers - student_markers)):
        if own:
            lines.append(f"only the {side} has {', '.join(sorted(own))}")
    problems = []
    for side, rendered in (("student", student_rendered), ("teacher", teacher_rendered)):
        position = 0
        for content in contents:
            found = rendered.find(content.strip(), position)
            if found < 0:
                what = "does not contain" if content.strip() not in rendered else "has out of order"
                problems.append(f"the {side}'s prompt {what} the message {content.strip()[:60]!r}")
            else:
                position = found + len(content.strip())
    return PromptComparison(
        student=student_rendered, teacher=teacher_rendered, difference="\n".join(lines), problems=tuple(problems)
    )
