"""What a block of rows is worth, and its gradient on the logits, in place and in as few passes as plain torch allows.

A block is a few rows of a chunk, small enough to stay in the cores' caches between the passes. No row is normalised:
with a = exp(s) and its sum Z, S = a / Z and log S = s - log Z, so the sums run over raw exponentials and the constants
of a row come last.

More shape letters: s and t are the logits of student and teacher, a = exp(s) and b = exp(t) [b, V], Z_s and Z_t their
sums [b, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """One value a row, and perhaps a second one that comes for free."""

    buffers: ClassVar[int]
    """How many [b, V] tensors it writes to."""

    def __call__(
        self,
        student_bV: Tensor,
        teacher_bV: Tensor | None,
        ids_b1: Tensor | None,
        buffers: Sequence[Tensor],
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the values [b] and the entropies [b] of the student, if at hand; logits and buffers are used up.

        With `gradient`, `student_bV` holds the gradient of the values on the student's logits afterwards.
        """
        ...


def exponentiate_(logits_bV: Tensor, *, out: Tensor) -> Tensor:
    """Shift every row so that its largest logit is 0, write the exponentials to `out`, and return their sums [b, 1].

    The shift changes no value, and float32 resolves what is near 0 best.
    """
    logits_bV.sub_(logits_bV.amax(-1, keepdim=True))
    torch.exp(logits_bV, out=out)
    return out.sum(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """KL(T || S) = sum b (t - s) / Z_t + log(Z_s / Z_t), gradient a / Z_s - b / Z_t."""

    buffers: ClassVar[int] = 2

    def __call__(
        self,
        student_bV: Tensor,
        teacher_bV: Tensor | None,
        ids_b1: Tensor | None,
        buffers: Sequence[Tensor],
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        assert teacher_bV is not None
        a_bV, b_bV = buffers
        student_sums_b1 = exponentiate_(student_bV, out=a_bV)
        teacher_sums_b1 = exponentiate_(teacher_bV, out=b_bV)
        crossed_b1 = teacher_bV.sub_(student_bV).mul_(b_bV).sum(-1, keepdim=True)
        values_b1 = (student_sums_b1 / teacher_sums_b1).log_().addcdiv_(crossed_b1, teacher_sums_b1)
        if gradient:
            torch.div(a_bV, student_sums_b1, out=student_bV)
            student_bV.addcmul_(b_bV, teacher_sums_b1.reciprocal(), value=-1.0)
        return values_b1.squeeze(-1), None


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """KL(S || T) = e - log(Z_s / Z_t) with e = sum a (s - t) / Z_s, gradient a (s - t - e) / Z_s."""

    buffers: ClassVar[int] = 2

    def __call__(
        self,
        student_bV: Tensor,
        teacher_bV: Tensor | None,
        ids_b1: Tensor | None,
        buffers: Sequence[Tensor],
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        assert teacher_bV is not None
        a_bV, b_bV = buffers
        student_sums_b1 = exponentiate_(student_bV, out=a_bV)
        teacher_sums_b1 = exponentiate_(teacher_bV, out=b_bV)
        student_bV.sub_(teacher_bV).mul_(a_bV)
        means_b1 = student_bV.sum(-1, keepdim=True).div_(student_sums_b1)
        if gradient:
            student_bV.addcmul_(a_bV, means_b1, value=-1.0).div_(student_sums_b1)
        return (means_b1 - (student_sums_b1 / teacher_sums_b1).log_()).squeeze(-1), None


@dataclass(frozen=True, slots=True)
class JensenShannon:
    """scale * (beta KL(T || M) + (1 - beta) KL(S || M)) with M = beta T + (1 - beta) S.

    With k = beta Z_s / ((1 - beta) Z_t) and m = log(a + k b): log M = m + log(1 - beta) - log Z_s, so
    KL(S || M) = e - log(1 - beta) with e = sum a (s - m) / Z_s, and
    KL(T || M) = sum b (t - m) / Z_t - log(1 - beta) + log(Z_s / Z_t).
    The gradient is scale * (1 - beta) * a (s - m - e) / Z_s: what passes through M itself adds up to nothing.
    """

    beta: float
    scale: float = 1.0
    buffers: ClassVar[int] = 3

    def __call__(
        self,
        student_bV: Tensor,
        teacher_bV: Tensor | None,
        ids_b1: Tensor | None,
        buffers: Sequence[Tensor],
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        assert teacher_bV is not None
        a_bV, b_bV, m_bV = buffers
        student_sums_b1 = exponentiate_(student_bV, out=a_bV)
        teacher_sums_b1 = exponentiate_(teacher_bV, out=b_bV)
        ratios_b1 = student_sums_b1 / teacher_sums_b1
        torch.addcmul(a_bV, b_bV, ratios_b1, value=self.beta / (1.0 - self.beta), out=m_bV)
        # Where both underflow, 0 (s - log 0) must be 0.
        m_bV.clamp_(min=torch.finfo(m_bV.dtype).tiny).log_()
        of_teacher_b1 = (
            teacher_bV.sub_(m_bV).mul_(b_bV).sum(-1, keepdim=True).div_(teacher_sums_b1).add_(ratios_b1.log())
        )
        of_student_b1 = student_bV.sub_(m_bV).mul_(a_bV).sum(-1, keepdim=True).div_(student_sums_b1)
        if gradient:
            factors_b1 = student_sums_b1.reciprocal().mul_(self.scale * (1.0 - self.beta))
            student_bV.addcmul_(a_bV, of_student_b1, value=-1.0).mul_(factors_b1)
        values_b1 = self.beta * of_teacher_b1 + (1.0 - self.beta) * of_student_b1 - math.log1p(-self.beta)
        return values_b1.mul_(self.scale).squeeze(-1), None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log S(y) = s_y - log Z_s, gradient onehot(y) - a / Z_s; the entropy is log Z_s - sum a s / Z_s."""

    buffers: ClassVar[int] = 1

    def __call__(
        self,
        student_bV: Tensor,
        teacher_bV: Tensor | None,
        ids_b1: Tensor | None,
        buffers: Sequence[Tensor],
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        assert ids_b1 is not None
        (a_bV,) = buffers
        sums_b1 = exponentiate_(student_bV, out=a_bV)
        logs_b1 = sums_b1.log()
        values_b1 = student_bV.gather(-1, ids_b1).sub_(logs_b1)
        entropies_b1 = logs_b1 - student_bV.mul_(a_bV).sum(-1, keepdim=True).div_(sums_b1)
        if gradient:
            torch.div(a_bV, sums_b1.neg(), out=student_bV)
            student_bV.scatter_add_(-1, ids_b1, torch.ones_like(values_b1))
        return values_b1.squeeze(-1), entropies_b1.squeeze(-1)
