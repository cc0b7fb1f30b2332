"""Divergences between two vocabularies: sorted probabilities, hybrid matching, and distributions of merged tokens.

Shape letters: T tokens, G groups, V the student's vocabulary, W the teacher's, M matched tokens. Row t holds the
distribution that predicts token t. The teacher's side never gets a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from omniopd.errors import ConfigError, DataError

Merge = Literal["observed", "bayesian"]


def merge_groups(
    logprobs_TV: Tensor, token_ids_T: Tensor, ranges: Sequence[tuple[int, int]], *, merge: Merge = "observed"
) -> Tensor:
    """Return one log distribution a group [G, V]: the model's view of all the bytes that the group's tokens write.

    `observed` takes the distribution of the group's first token times the probabilities that the later tokens, as
    written, had; `bayesian` takes that of the last token times the probabilities of the earlier ones. Neither sums to 1
    in a group of several tokens, on purpose: the missing mass is that of other ways to write on.

    Args:
        logprobs_TV: log-softmax; row t predicts token t.
        token_ids_T: what was written.
        ranges: half-open, not empty, such as (group.student_start, group.student_end).
        merge: see above.

    Raises:
        DataError: an empty range, or one outside the tokens.

    Source: GOLD (Patino et al. 2025). Differs: TRL reads "observed" off rows that are not shifted, where row t predicts
    token t + 1, and keeps scalar probabilities above 1e-8; here both merges read row t for token t, and nothing is cut.
    """
    if merge not in ("observed", "bayesian"):
        raise ConfigError(f"merge is {merge!r}; it can be observed or bayesian")
    num_tokens = logprobs_TV.shape[0]
    for start, end in ranges:
        if not 0 <= start < end <= num_tokens:
            raise DataError(f"the group [{start}, {end}) is empty or outside the {num_tokens} tokens; drop it first")
    device = logprobs_TV.device
    bases = [start if merge == "observed" else end - 1 for start, end in ranges]
    rest = [(g, t) for g, (start, end) in enumerate(ranges) for t in range(start, end) if t != bases[g]]
    token_logprobs_T = logprobs_TV.gather(-1, token_ids_T[:, None]).squeeze(-1)
    scale_G = torch.zeros(len(ranges), dtype=logprobs_TV.dtype, device=device)
    if rest:
        owners, tokens = (torch.tensor(column, device=device) for column in zip(*rest, strict=True))
        scale_G = scale_G.index_add(0, owners, token_logprobs_T[tokens])
    return logprobs_TV[torch.tensor(bases, dtype=torch.long, device=device)] + scale_G[:, None]


def uld_loss(student_logprobs_GV: Tensor, teacher_logprobs_GW: Tensor) -> Tensor:
    """Return the L1 distance of the sorted probabilities [G], in [0, 2] for distributions.

    The shorter vocabulary is padded with zeros. Token identity plays no part: any permutation of the teacher's
    probabilities gives the same loss, so agreement in shape is all it asks for.

    Source: arXiv 2402.12030, eq. 2 (with uniform transport cost). As published; rows must already correspond.
    """
    _check_rows(student_logprobs_GV, teacher_logprobs_GW)
    return _sorted_l1(student_logprobs_GV.exp(), teacher_logprobs_GW.detach().exp())


@dataclass(frozen=True, slots=True, eq=False)
class MatchedColumns:
    """Where matched and unmatched tokens stand in tables of log-probs, on one device."""

    student_M: Tensor
    teacher_M: Tensor
    """The same tokens in the same order."""
    student_others: Tensor
    teacher_others: Tensor


@dataclass(frozen=True)
class MatchedVocabulary:
    """Tokens with the same bytes in both vocabularies, see `token_bytes.shared_tokens`."""

    student_ids: tuple[int, ...]
    """[M]"""
    teacher_ids: tuple[int, ...]
    """[M] the same tokens."""
    _columns: dict[tuple[torch.device, int, int], MatchedColumns] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.student_ids) != len(self.teacher_ids):
            raise DataError(f"{len(self.student_ids)} student ids matched with {len(self.teacher_ids)} of the teacher")
        for side, ids in (("student", self.student_ids), ("teacher", self.teacher_ids)):
            if len(set(ids)) != len(ids):
                raise DataError(f"a {side} id is matched twice; expected one to one")

    def columns(self, device: torch.device, *, student_size: int, teacher_size: int) -> MatchedColumns:
        """Return the ids as indices for tables of these widths. Made once: tuples of 100,000 ids cost milliseconds."""
        key = (device, student_size, teacher_size)
        if key not in self._columns:
            # Tensors made in inference mode could not be used where a gradient is wanted later.
            with torch.inference_mode(False):
                student_M = torch.tensor(self.student_ids, dtype=torch.long, device=device)
                teacher_M = torch.tensor(self.teacher_ids, dtype=torch.long, device=device)
                self._columns[key] = MatchedColumns(
                    student_M, teacher_M, _others(student_M, student_size), _others(teacher_M, teacher_size)
                )
        return self._columns[key]


def hybrid_loss(
    student_logprobs_GV: Tensor,
    teacher_logprobs_GW: Tensor,
    matched: MatchedVocabulary,
    *,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
) -> Tensor:
    """Return the hybrid loss [G]: generalised JSD on the tokens that both know, sorted L1 on all others.

    Args:
        student_logprobs_GV: log-softmax, or `merge_groups` of it.
        teacher_logprobs_GW: the same of the teacher.
        matched: which ids mean the same.
        beta: 0 forward, 1 reverse, between them beta KL(T||m) + (1 - beta) KL(S||m) with m = beta T + (1 - beta) S.
        matched_weight: None together with `unmatched_weight`: M / W and 1 - M / W.
        unmatched_weight: given together with `matched_weight`.

    Source: GOLD (Patino et al. 2025), defaults of TRL. Differs: on matched ids alone neither side sums to 1, and at
    beta 0 and 1 the sum of log-ratios can then be negative and reward leaving the matched ids. There the generalised
    KL (sum of p log(p/q) - p + q), never negative and the same for full distributions, stands in for it. Where only one
    side has unmatched tokens TRL ignores them; here they count against zeros, as padding does.
    """
    _check_rows(student_logprobs_GV, teacher_logprobs_GW)
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta is {beta}; expected 0 to 1")
    if (matched_weight is None) != (unmatched_weight is None):
        raise ConfigError("matched_weight and unmatched_weight go together: give both, or neither for adaptive ones")
    student, teacher = student_logprobs_GV, teacher_logprobs_GW.detach()
    columns = matched.columns(student.device, student_size=student.shape[-1], teacher_size=teacher.shape[-1])
    if matched_weight is None or unmatched_weight is None:
        matched_weight = len(matched.teacher_ids) / max(1, teacher.shape[-1])
        unmatched_weight = 1.0 - matched_weight
    same = generalized_jsd(student[:, columns.student_M], teacher[:, columns.teacher_M], beta=beta)
    others = _sorted_l1(student[:, columns.student_others].exp(), teacher[:, columns.teacher_others].exp())
    return matched_weight * same + unmatched_weight * others


def generalized_jsd(student_logprobs_GM: Tensor, teacher_logprobs_GM: Tensor, *, beta: float) -> Tensor:
    """Return the generalised JSD [G] of two measures that need not sum to 1; never negative, 0 only where they agree.

    For distributions, beta 0 is KL(T||S), beta 1 is KL(S||T), in nats.
    """
    student, teacher = student_logprobs_GM, teacher_logprobs_GM
    if beta == 0.0:
        return _generalized_kl(teacher, student)
    if beta == 1.0:
        return _generalized_kl(student, teacher)
    mix = beta * teacher.exp() + (1.0 - beta) * student.exp()
    # Where both sides are exactly 0 so is the mixture; log of the smallest number keeps 0 * log finite there.
    log_mix = mix.clamp(min=torch.finfo(mix.dtype).tiny).log()
    return beta * _weighted_difference(teacher, log_mix) + (1.0 - beta) * _weighted_difference(student, log_mix)


def _generalized_kl(p: Tensor, q: Tensor) -> Tensor:
    return _weighted_difference(p, q) - p.exp().sum(-1) + q.exp().sum(-1)


def _weighted_difference(p: Tensor, q: Tensor) -> Tensor:
    """Return sum of exp(p) * (p - q) with 0 log 0 = 0, also in the gradient."""
    has_mass = p > -torch.inf
    finite = torch.where(has_mass, p, 0.0)
    return torch.where(has_mass, finite.exp() * (finite - torch.where(has_mass, q, 0.0)), 0.0).sum(-1)


def _sorted_l1(student_GV: Tensor, teacher_GW: Tensor) -> Tensor:
    size = max(student_GV.shape[-1], teacher_GW.shape[-1])
    padded = [
        torch.nn.functional.pad(p.sort(dim=-1, descending=True).values, (0, size - p.shape[-1]))
        for p in (student_GV, teacher_GW)
    ]
    return (padded[0] - padded[1]).abs().sum(-1)


def _others(ids: Tensor, size: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool, device=ids.device)
    mask[ids] = False
    return mask.nonzero().squeeze(-1)


def _check_rows(student: Tensor, teacher: Tensor) -> None:
    if student.shape[0] != teacher.shape[0]:
        raise DataError(
            f"{student.shape[0]} rows of the student against {teacher.shape[0]} of the teacher; "
            "align and merge both sides first (alignment.align, merge_groups)"
        )
