"""Gradients of the losses against a teacher with another vocabulary, a batch of groups at a time.

Shape letters: T tokens of a rollout, U tokens of the same text in the teacher's vocabulary, H and G the widths of the
hidden states, V and W the vocabularies of student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniopd.errors import ConfigError, DataError
from omniopd.learner.foreign_losses import ForeignDivergence
from omniopd.logits.alignment import Alignment
from omniopd.logits.foreign import MatchedVocabulary
from omniopd.logits.token_bytes import TokenBytes, shared_tokens

Logprobs = Callable[[Tensor], Tensor]
"""Hidden states [n, H] to log-softmax [n, V], at least float32."""
_Batch = list[tuple["ForeignRollout", list[int]]]
"""Rollouts with the numbers of those of their groups that are taken together."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ForeignRollout:
    """One rollout as both models read it. Row t of the states predicts token t; special tokens are included."""

    student_states_TH: Tensor
    """Part of a detached leaf that requires grad; a leaf for each rollout is the cheapest."""
    student_ids_T: Tensor
    teacher_states_UG: Tensor
    teacher_ids_U: Tensor
    alignment: Alignment
    weights: tuple[float, ...]
    """One a group of the alignment, normalised over the whole step; 0 where it is not exact. See `group_weights`."""

    def __post_init__(self) -> None:
        if not self.student_states_TH.requires_grad:
            raise DataError("the student's states do not require grad, so nothing would reach the trunk; give a leaf")
        for side, states, ids, segments in (
            ("student", self.student_states_TH, self.student_ids_T, self.alignment.student),
            ("teacher", self.teacher_states_UG, self.teacher_ids_U, self.alignment.teacher),
        ):
            if not states.shape[0] == ids.shape[0] == segments.num_tokens:
                raise DataError(
                    f"the {side} has {states.shape[0]} states and {ids.shape[0]} ids, its alignment "
                    f"{segments.num_tokens} tokens; give the completion's rows alone, special tokens included"
                )
        if len(self.weights) != len(self.alignment.groups):
            raise DataError(f"{len(self.weights)} weights for {len(self.alignment.groups)} groups; expected one each")
        for index, (group, weight) in enumerate(zip(self.alignment.groups, self.weights, strict=True)):
            if not (math.isfinite(weight) and weight >= 0.0):
                raise DataError(f"the weight of group {index} is {weight}; expected a finite number, 0 or more")
            if weight > 0.0 and not group.is_exact:
                raise DataError(f"group {index} is not exact and has weight {weight}; leftovers must have weight 0")


def accumulate_groups(
    rollouts: Sequence[ForeignRollout],
    loss: ForeignDivergence,
    *,
    student_logprobs: Logprobs,
    teacher_logprobs: Logprobs,
    matched: MatchedVocabulary | None,
    slice_tokens: int,
) -> float:
    """Add the gradient of the weighted sum of the loss over all groups; return that sum.

    Groups are taken in batches, across rollouts, and each batch goes backward at once into the leaf and the head. So
    log-probs exist for at most `slice_tokens` tokens of both sides together, or for one group where that alone is
    longer: a group is never split. The sum does not depend on `slice_tokens` but for rounding. Groups of weight 0 cost
    nothing, so what they hold cannot spoil the sum.

    Args:
        student_logprobs: with gradient, such as `Policy.logprobs`.
        teacher_logprobs: called without gradient.
        matched: which ids mean the same; None for losses that do not ask (`needs_matched`).
    """
    if slice_tokens < 1:
        raise ConfigError(f"slice_tokens must be 1 or more, got {slice_tokens}")
    # Read at the end: each reading waits for the GPU.
    values: list[Tensor] = []
    for batch in _batches(rollouts, slice_tokens):
        value = _batch_value(batch, loss, student_logprobs, teacher_logprobs, matched)
        value.backward()  # type: ignore[no-untyped-call]
        values.append(value.detach())
    return math.fsum(value.item() for value in values)


def group_weights(alignment: Alignment, token_weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weight of each group: the sum of its student tokens' [T], 0 where the group is not exact.

    With weight 1 on the first token of a group and 0 on its others every group counts once, as in GOLD; with 1 on all
    of them it counts once for each token of the student. One token a group: the weights themselves.
    """
    student = alignment.student
    if len(token_weights) != student.num_tokens:
        raise DataError(f"{len(token_weights)} weights for {student.num_tokens} tokens of the student")
    return tuple(
        math.fsum(token_weights[t] for t in student.positions[group.student_start : group.student_end])
        if group.is_exact
        else 0.0
        for group in alignment.groups
    )


def match_vocabularies(
    student: TokenBytes,
    teacher: TokenBytes,
    *,
    student_size: int,
    teacher_size: int,
    kept: Collection[tuple[int, int]] = (),
) -> MatchedVocabulary:
    """Return which ids write the same bytes in both vocabularies (`token_bytes.shared_tokens`).

    Args:
        student_size: number of ids in the student's tokenizer.
        teacher_size: the same of the teacher.
        kept: special tokens that mean the same although they have no bytes: (student's id, teacher's id) of the end of
            the turn where the alignment keeps it. Without them it counts as unmatched.
    """
    student_ids, teacher_ids = shared_tokens(student, teacher, student_size, teacher_size)
    return MatchedVocabulary(
        student_ids=(*student_ids, *(own for own, _ in kept)),
        teacher_ids=(*teacher_ids, *(other for _, other in kept)),
    )


def _batches(rollouts: Sequence[ForeignRollout], slice_tokens: int) -> Iterator[_Batch]:
    batch: _Batch = []
    size = 0
    for rollout in rollouts:
        for index, group in enumerate(rollout.alignment.groups):
            if rollout.weights[index] == 0.0:
                continue
            num_tokens = group.student_end - group.student_start + group.teacher_end - group.teacher_start
            if batch and size + num_tokens > slice_tokens:
                yield batch
                batch, size = [], 0
            if not batch or batch[-1][0] is not rollout:
                batch.append((rollout, []))
            batch[-1][1].append(index)
            size += num_tokens
    if batch:
        yield batch


def _batch_value(
    batch: _Batch,
    loss: ForeignDivergence,
    student_logprobs: Logprobs,
    teacher_logprobs: Logprobs,
    matched: MatchedVocabulary | None,
) -> Tensor:
    student_GV = _distributions(batch, loss, student_logprobs, of_teacher=False)
    with torch.no_grad():
        teacher_GW = _distributions(batch, loss, teacher_logprobs, of_teacher=True).to(student_GV)
    weights = [rollout.weights[index] for rollout, indices in batch for index in indices]
    weights_G = torch.tensor(weights, dtype=student_GV.dtype, device=student_GV.device)
    return (weights_G * loss(student_GV, teacher_GW, matched)).sum()


def _distributions(batch: _Batch, loss: ForeignDivergence, logprobs: Logprobs, *, of_teacher: bool) -> Tensor:
    """Return the log distributions of the groups of a batch on one side, all of them in one call of the head."""
    states: list[Tensor] = []
    ids: list[Tensor] = []
    ranges: list[tuple[int, int]] = []
    num_rows = 0
    for rollout, indices in batch:
        positions = [_positions(rollout.alignment, index, of_teacher=of_teacher) for index in indices]
        for own in positions:
            ranges.append((num_rows, num_rows + len(own)))
            num_rows += len(own)
        of_states = rollout.teacher_states_UG if of_teacher else rollout.student_states_TH
        of_ids = rollout.teacher_ids_U if of_teacher else rollout.student_ids_T
        rows = torch.tensor([p for own in positions for p in own], device=of_states.device)
        states.append(of_states[rows])
        ids.append(of_ids[rows])
    return loss.distributions(logprobs(torch.cat(states)), torch.cat(ids), ranges)


def _positions(alignment: Alignment, index: int, *, of_teacher: bool) -> tuple[int, ...]:
    """Return where the tokens of a group stand among all tokens of one side, special ones included."""
    group = alignment.groups[index]
    if of_teacher:
        return alignment.teacher.positions[group.teacher_start : group.teacher_end]
    return alignment.student.positions[group.student_start : group.student_end]
