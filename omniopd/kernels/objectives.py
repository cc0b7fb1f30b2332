"""What a block of rows is worth, and its gradient on the logits, in place and in as few passes as plain torch allows.

A block is a few rows of a chunk, small enough to stay in a core's cache between the passes; the passes cost little
beside the matrix products only because of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOGIT_FLOOR = -1e4
"""A logit that lies further below the largest of its row counts as that far below it, minus infinity included: every
value and gradient stays finite, and the probability is 0 all the same."""


class Scratch:
    """Memory for [b, V] tensors of one block, used again for every block."""

    def __init__(self, rows: int, vocabulary: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self._shape = (rows, vocabulary)
        self._dtype, self._device = dtype, device
        self._tensors: list[Tensor] = []

    def take(self, count: int, rows: int) -> Iterator[Tensor]:
        """Give `count` uninitialised tensors of `rows` rows."""
        while len(self._tensors) < count:
            self._tensors.append(torch.empty(self._shape, dtype=self._dtype, device=self._device))
        return (tensor[:rows] for tensor in self._tensors[:count])


class Objective(Protocol):
    """One value a row."""

    def __call__(
        self, student_bV: Tensor, teacher_bV: Tensor | None, rows: slice, scratch: Scratch, *, gradient: bool
    ) -> Tensor:
        """Return the values [b] of `rows`; both logits are used up.

        With `gradient`, `student_bV` holds the gradient of the values on the student's logits afterwards.
        """
        ...


def normalize_(logits_bV: Tensor, *, probs: Tensor) -> None:
    """Turn logits into their log-softmax in place, and write the softmax to `probs`."""
    logits_bV.sub_(logits_bV.amax(-1, keepdim=True)).clamp_(min=LOGIT_FLOOR)
    torch.exp(logits_bV, out=probs)
    total_b1 = probs.sum(-1, keepdim=True)
    probs.div_(total_b1)
    logits_bV.sub_(total_b1.log_())


def normalize_pair_(student_bV: Tensor, teacher_bV: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Turn both logits into log-probabilities in place, and return the probabilities in the first two buffers."""
    s_bV, t_bV = scratch.take(2, len(student_bV))
    normalize_(student_bV, probs=s_bV)
    normalize_(teacher_bV, probs=t_bV)
    return s_bV, t_bV


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """KL(T || S) = sum T (log T - log S), gradient S - T."""

    def __call__(
        self, student_bV: Tensor, teacher_bV: Tensor | None, rows: slice, scratch: Scratch, *, gradient: bool
    ) -> Tensor:
        assert teacher_bV is not None
        s_bV, t_bV = normalize_pair_(student_bV, teacher_bV, scratch)
        values_b = teacher_bV.sub_(student_bV).mul_(t_bV).sum(-1)
        if gradient:
            torch.sub(s_bV, t_bV, out=student_bV)
        return values_b


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """KL(S || T) = sum S d with d = log S - log T, gradient S (d - KL)."""

    def __call__(
        self, student_bV: Tensor, teacher_bV: Tensor | None, rows: slice, scratch: Scratch, *, gradient: bool
    ) -> Tensor:
        assert teacher_bV is not None
        s_bV, _ = normalize_pair_(student_bV, teacher_bV, scratch)
        student_bV.sub_(teacher_bV).mul_(s_bV)
        values_b1 = student_bV.sum(-1, keepdim=True)
        if gradient:
            student_bV.addcmul_(s_bV, values_b1, value=-1.0)
        return values_b1.squeeze(-1)


@dataclass(frozen=True, slots=True)
class JensenShannon:
    """scale * (beta KL(T || M) + (1 - beta) KL(S || M)) with M = beta T + (1 - beta) S.

    The gradient is scale * (1 - beta) * S (a - E_S[a]) with a = log S - log M: what passes through M itself adds up
    to nothing.
    """

    beta: float
    scale: float = 1.0

    def __call__(
        self, student_bV: Tensor, teacher_bV: Tensor | None, rows: slice, scratch: Scratch, *, gradient: bool
    ) -> Tensor:
        assert teacher_bV is not None
        s_bV, t_bV = normalize_pair_(student_bV, teacher_bV, scratch)
        _, _, mixture_bV = scratch.take(3, len(student_bV))  # The first two are those of the pair.
        torch.lerp(s_bV, t_bV, self.beta, out=mixture_bV)
        # Where both underflow, 0 (log 0 - log 0) must be 0.
        mixture_bV.clamp_(min=torch.finfo(mixture_bV.dtype).tiny).log_()
        of_teacher_b = teacher_bV.sub_(mixture_bV).mul_(t_bV).sum(-1)
        of_student_b1 = student_bV.sub_(mixture_bV).mul_(s_bV).sum(-1, keepdim=True)
        if gradient:
            student_bV.addcmul_(s_bV, of_student_b1, value=-1.0).mul_(self.scale * (1.0 - self.beta))
        values_b = self.beta * of_teacher_b + (1.0 - self.beta) * of_student_b1.squeeze(-1)
        return values_b.mul_(self.scale)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log S(y), gradient onehot(y) - S. Fills in the entropies on the way."""

    token_ids_N: Tensor
    entropies_N: Tensor

    def __call__(
        self, student_bV: Tensor, teacher_bV: Tensor | None, rows: slice, scratch: Scratch, *, gradient: bool
    ) -> Tensor:
        (s_bV,) = scratch.take(1, len(student_bV))
        normalize_(student_bV, probs=s_bV)
        ids_b1 = self.token_ids_N[rows, None]
        values_b1 = student_bV.gather(-1, ids_b1)
        self.entropies_N[rows] = student_bV.mul_(s_bV).sum(-1).neg_()
        if gradient:
            torch.neg(s_bV, out=student_bV)
            student_bV.scatter_add_(-1, ids_b1, torch.ones_like(values_b1))
        return values_b1.squeeze(-1)
