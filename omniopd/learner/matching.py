"""How the student's distribution and a teacher's compare at every token of a rollout: to log, never to train on.

Shape letters: T tokens of a completion, U the teacher's tokens of it, N those of a slice, H and G hidden widths of
student and teacher, V the student's vocabulary, K tokens that a record names, k size of the top sets. P is the student,
Q the teacher. Whole distributions exist a slice at a time; nothing here has a gradient, draws a number or keeps a
state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from omniopd.errors import LearnerError
from omniopd.learner.policy import Policy
from omniopd.learner.teachers import TeacherModel
from omniopd.learner.terms import KnownReference, check_length, in_vocabulary, vocabulary_of
from omniopd.logits.alignment import group_logprobs
from omniopd.logits.diagnostics import TopTokens, match_diagnostics, overlap_advantage, overlap_ratio, overlap_reward
from omniopd.logits.diagnostics import top_k_masses as masses_of
from omniopd.logits.reading import Read
from omniopd.logits.scores import Reading, TokenScores
from omniopd.types import Rollout

TokenDiagnostics = dict[str, list[float]]
"""Name -> [T]; nan where a token gives no evidence. What the teacher's evidence cannot tell has no entry."""
Evidence = Reading | Read | TokenScores
"""How a teacher with weights here reads the completion (`Read`: in its own tokens), or what another one said of it."""
Compare = Callable[[Tensor, slice], dict[str, Tensor]]
"""(log P [N, V], which tokens) -> diagnostics [N]."""
SMALLEST_SHARE = 8
"""The top sets hold at most 1 / 8 of the vocabulary; sets of most of a small one always overlap."""


def top_set_size(k: int, vocabulary: int) -> int:
    """Return how many tokens a top set of k holds with so small a vocabulary, at least one."""
    return min(k, max(1, vocabulary // SMALLEST_SHARE))


@torch.no_grad()
def match(
    policy: Policy,
    states: Sequence[Tensor],
    rollouts: Sequence[Rollout],
    teacher: TeacherModel | None,
    evidence: Sequence[Evidence],
    *,
    k: int,
    slice_tokens: int,
) -> list[TokenDiagnostics]:
    """Return the diagnostics of every rollout, token by token, in order.

    Always `log_ratio`: log Q(y_t) - log P(y_t) in nats, a share of its group's where the tokenizers differ. Beside it,
    where both whole distributions are at hand, all of `match_diagnostics` and `sampled_outside_top_k` (1 where y_t is
    not among the teacher's k likeliest). A record of the teacher's likeliest tokens tells all but the entropies and the
    teacher's mass on the student's set; one of the student's candidates tells the two masses on these. Where sets are
    compared, `top_k` is their size.

    Args:
        states: the student's hidden states [T, H] that predict each rollout's tokens.
        teacher: what computes distributions; None where the evidence holds records only.
        evidence: one for each rollout. Requested tokens are taken for the student's candidates, the likeliest first.
        k: size of the top sets, less for a small vocabulary (`top_set_size`) and for a record of fewer tokens.
        slice_tokens: tokens whose distributions are in memory at once.

    Raises LearnerError for evidence of another completion, or that needs a teacher with weights here.
    """
    readings = {
        place: reading for place, of in enumerate(evidence) if (reading := _reading_of(of, rollouts[place])) is not None
    }
    if readings and teacher is None:
        raise LearnerError(
            f"rollout {rollouts[min(readings)].id}: its evidence says how a teacher reads it, and no teacher is there"
        )
    k = top_set_size(k, vocabulary_of(policy))
    taught = teacher.states(list(readings.values())) if teacher is not None and readings else []
    teacher_states = dict(zip(readings, taught, strict=True))
    found = []
    for place, (rollout, states_TH, of) in enumerate(zip(rollouts, states, evidence, strict=True)):
        if isinstance(of, TokenScores):
            compare = _recorded(of, rollout, policy, k)
        else:
            assert teacher is not None
            if isinstance(of, Read) and of.alignment is not None:
                found.append(
                    _grouped(policy, states_TH, rollout, teacher, teacher_states[place], of, slice_tokens=slice_tokens)
                )
                continue
            compare = _live(teacher, teacher_states[place], rollout, policy, k)
        found.append(_by_slice(policy, states_TH, compare, slice_tokens))
    return found


def _reading_of(of: Evidence, rollout: Rollout) -> Reading | None:
    if isinstance(of, TokenScores):
        check_length(of.num_tokens, rollout)
        return None
    if isinstance(of, Reading):
        check_length(of.num_tokens, rollout)
        return of
    if of.reading is None:
        raise LearnerError(f"rollout {rollout.id}: the teacher could not read it ({of.missing}); leave it out")
    if of.alignment is None:
        check_length(of.num_tokens, rollout)
    return of.reading


def _by_slice(policy: Policy, states_TH: Tensor, compare: Compare, slice_tokens: int) -> TokenDiagnostics:
    found: dict[str, list[float]] = defaultdict(list)
    for part in _slices(len(states_TH), slice_tokens):
        with policy.autocast():
            student_NV = policy.logprobs(states_TH[part])
        for name, values_N in compare(student_NV, part).items():
            found[name] += values_N.tolist()
    return dict(found)


def _slices(size: int, at_once: int) -> Iterator[slice]:
    for first in range(0, size, at_once):
        yield slice(first, min(first + at_once, size))


def _live(teacher: TeacherModel, states_TG: Tensor, rollout: Rollout, policy: Policy, k: int) -> Compare:
    ids_T = _ids(rollout, policy)
    width = vocabulary_of(policy)

    def compare(student_NV: Tensor, part: slice) -> dict[str, Tensor]:
        teacher_NV = in_vocabulary(teacher.logprobs(states_TG[part]), width).to(student_NV)
        return _whole(student_NV, teacher_NV, ids_T[part], k)

    return compare


def _recorded(scores: TokenScores, rollout: Rollout, policy: Policy, k: int) -> Compare:
    ids_T = _ids(rollout, policy)
    width = vocabulary_of(policy)

    def compare(student_NV: Tensor, part: slice) -> dict[str, Tensor]:
        def rows(array: object) -> Tensor:
            return torch.as_tensor(array[part].copy(), device=student_NV.device)  # type: ignore[index]

        own_N = rows(scores.logprobs_T).to(student_NV.dtype)
        ids_N = ids_T[part]
        ratio = {"log_ratio": own_N - _at(student_NV, ids_N)}
        if scores.ids_TK is None or scores.logprobs_TK is None:
            return ratio
        named_ids_NK, named_NK = rows(scores.ids_TK).long(), rows(scores.logprobs_TK).to(student_NV.dtype)
        if scores.known == "vocabulary":
            if named_ids_NK.shape[-1] < width:
                return ratio
            known = KnownReference(own_N, named_ids_NK, named_NK, is_whole=True)
            return _whole(student_NV, known.whole(slice(None), width), ids_N, k)
        size = min(k, named_ids_NK.shape[-1])
        named_ids_NK, named_NK = named_ids_NK[:, :size], named_NK[:, :size]
        if scores.known == "requested":
            masses = {
                "top_k": _size_of_each(student_NV, size),
                "student_mass_on_student_top_k": student_NV.gather(-1, named_ids_NK).exp().sum(-1),
                "teacher_mass_on_student_top_k": named_NK.exp().sum(-1),
            }
            return ratio | masses
        return ratio | _top_k(student_NV, ids_N, named_ids_NK, named_NK)

    return compare


def _whole(student_NV: Tensor, teacher_NV: Tensor, ids_N: Tensor, k: int) -> dict[str, Tensor]:
    size = min(k, student_NV.shape[-1])
    own_N = _at(teacher_NV, ids_N)
    return {
        "log_ratio": own_N - _at(student_NV, ids_N),
        "top_k": _size_of_each(student_NV, size),
        "sampled_outside_top_k": ((teacher_NV > own_N[:, None]).sum(-1) >= size).to(student_NV.dtype),
        **match_diagnostics(student_NV, teacher_NV, k=size),
    }


def _top_k(student_NV: Tensor, ids_N: Tensor, teacher_ids_Nk: Tensor, teacher_Nk: Tensor) -> dict[str, Tensor]:
    """Return what the teacher's likeliest tokens tell: log Q on S is known where S meets them, which will do."""
    on_student = student_NV.topk(teacher_ids_Nk.shape[-1], dim=-1)
    is_same_Nkk = on_student.indices[:, :, None] == teacher_ids_Nk[:, None, :]
    known_Nk = teacher_Nk[:, None, :].masked_fill(~is_same_Nkk, -math.inf).amax(-1)
    top = TopTokens(
        student_ids_Nk=on_student.indices,
        teacher_ids_Nk=teacher_ids_Nk,
        student_on_student_Nk=on_student.values,
        teacher_on_student_Nk=known_Nk.where(is_same_Nkk.any(-1), known_Nk.new_full((), math.nan)),
        student_on_teacher_Nk=student_NV.gather(-1, teacher_ids_Nk),
        teacher_on_teacher_Nk=teacher_Nk,
    )
    masses = masses_of(top)
    # A mean over the positions where S lies within U would be one of the easy positions.
    del masses["teacher_mass_on_student_top_k"]
    return {
        "top_k": _size_of_each(student_NV, teacher_ids_Nk.shape[-1]),
        "sampled_outside_top_k": (~(teacher_ids_Nk == ids_N[:, None]).any(-1)).to(student_NV.dtype),
        "overlap_ratio": overlap_ratio(top),
        "overlap_advantage": overlap_advantage(top),
        "overlap_reward": overlap_reward(top),
        **masses,
    }


def _grouped(
    policy: Policy,
    states_TH: Tensor,
    rollout: Rollout,
    teacher: TeacherModel,
    states_UG: Tensor,
    read: Read,
    *,
    slice_tokens: int,
) -> TokenDiagnostics:
    """Compare what two tokenizers cut differently: group by group, so only the log-ratio is left."""
    assert read.alignment is not None and read.reading is not None
    ids_T = _ids(rollout, policy)
    ids_U = torch.tensor(read.reading.token_ids, device=states_UG.device, dtype=torch.long)
    student: list[float] = []
    for part in _slices(len(states_TH), slice_tokens):
        with policy.autocast():
            student += _at(policy.logprobs(states_TH[part]), ids_T[part]).tolist()
    taught: list[float] = []
    for part in _slices(len(states_UG), slice_tokens):
        taught += _at(teacher.logprobs(states_UG[part]), ids_U[part]).tolist()
    grouped = group_logprobs(read.alignment, student, taught)
    return {
        "log_ratio": [
            value if weight else math.nan for value, weight in zip(grouped.advantages, grouped.weights, strict=True)
        ]
    }


def _size_of_each(student_NV: Tensor, size: int) -> Tensor:
    return student_NV.new_full((len(student_NV),), size)


def _ids(rollout: Rollout, policy: Policy) -> Tensor:
    return torch.tensor(rollout.token_ids, device=policy.device, dtype=torch.long)


def _at(logprobs_NV: Tensor, ids_N: Tensor) -> Tensor:
    return logprobs_NV.gather(-1, ids_N[:, None]).squeeze(-1)
