"""The loop over chunks of tokens and its gradient. Logits exist a chunk at a time and are used up on the spot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omniopd.errors import ConfigError, LearnerError
from omniopd.kernels.blocks import Scratch, compiled, evaluate
from omniopd.kernels.heads import Head, working_dtype
from omniopd.kernels.objectives import Objective

CHUNK_BYTES = 112 * 2**20
"""The logits of one model for one chunk of tokens. Less memory makes the matrix products slower."""
CACHED_NUMBERS = 2**18
"""A block of rows on a CPU: its passes run on what the caches of the cores hold."""
LAUNCHED_NUMBERS = 2**25
"""A block of rows on an accelerator, where the number of launches counts."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients to compute."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def has_any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(slots=True)
class Gradients:
    """On the student's tensors; None where not wanted."""

    hidden_NH: Tensor | None = None
    weight_VH: Tensor | None = None
    bias_V: Tensor | None = None

    @classmethod
    def allocate(cls, wanted: Wanted, student: Head, hidden_NH: Tensor, dtype: torch.dtype) -> Gradients:
        """Return memory to fill; without tokens nothing would fill that of the head."""
        make = hidden_NH.new_zeros if len(hidden_NH) == 0 else hidden_NH.new_empty
        return cls(
            hidden_NH=make(hidden_NH.shape, dtype=dtype) if wanted.hidden else None,
            weight_VH=make(student.weight_VH.shape, dtype=dtype) if wanted.weight else None,
            bias_V=hidden_NH.new_zeros(student.vocabulary, dtype=dtype) if wanted.bias else None,
        )

    def scale(self, upstream_N: Tensor, factor: float | None) -> None:
        """Multiply by the upstream gradient in place; drop what was summed over tokens when it is not one number."""
        if self.hidden_NH is not None:
            self.hidden_NH.mul_(upstream_N[:, None])
        if factor is None:
            self.weight_VH = self.bias_V = None
        for tensor in (self.weight_VH, self.bias_V):
            if tensor is not None and factor is not None and factor != 1.0:
                tensor.mul_(factor)


@dataclass(frozen=True, slots=True)
class Pass:
    """One look at N tokens: values, and gradients of sum(factors * values)."""

    student: Head
    hidden_NH: Tensor
    teacher: Head | None
    teacher_NG: Tensor | None
    objective: Objective
    chunk_tokens: int | None
    token_ids_N: Tensor | None = None
    entropies_N: Tensor | None = None
    """To fill in, by an objective that has them."""

    def __call__(self, wanted: Wanted, factors_N: Tensor | None) -> tuple[Tensor, Gradients]:
        """Return the values [N], factors not applied, and the gradients."""
        hidden_NH, student, teacher = self.hidden_NH, self.student, self.teacher
        dtype = working_dtype(*(head.weight_VH for head in (student, teacher) if head is not None))
        device, vocabulary = hidden_NH.device, student.vocabulary
        values_N = hidden_NH.new_empty(len(hidden_NH), dtype=dtype)
        gradients = Gradients.allocate(wanted, student, hidden_NH, dtype)
        size = self._chunk(dtype)
        student_nV = hidden_NH.new_empty((size, vocabulary), dtype=dtype)
        teacher_nV = None if teacher is None else torch.empty_like(student_nV)
        numbers = CACHED_NUMBERS if device.type == "cpu" else LAUNCHED_NUMBERS
        scratch = Scratch(min(size, max(1, numbers // vocabulary)), self.objective.buffers, student_nV)
        for rows in slices(0, len(hidden_NH), size):
            logits_nV = student_nV[: rows.stop - rows.start]
            student.project(hidden_NH[rows], out=logits_nV)
            theirs_nV = None
            if teacher is not None:
                assert teacher_nV is not None and self.teacher_NG is not None
                theirs_nV = teacher_nV[: len(logits_nV)]
                teacher.project(self.teacher_NG[rows], out=theirs_nV)
            self._evaluate(logits_nV, theirs_nV, rows, scratch, values_N, gradient=wanted.has_any)
            self._collect(logits_nV, rows, factors_N, gradients)
        return values_N, gradients

    def _evaluate(
        self,
        student_nV: Tensor,
        teacher_nV: Tensor | None,
        rows: slice,
        scratch: Scratch,
        values_N: Tensor,
        *,
        gradient: bool,
    ) -> None:
        """Fill in the values of a chunk; with `gradient` its logits become their gradient."""
        is_compiled = student_nV.device.type == "cuda"
        run = compiled() if is_compiled else evaluate
        curve, teacher_curve = self.student.curve, None if self.teacher is None else self.teacher.curve
        for block in slices(0, len(student_nV), scratch.rows):
            place = slice(rows.start + block.start, rows.start + block.stop)
            student_bV = student_nV[block]
            teacher_bV = None if teacher_nV is None else teacher_nV[block]
            ids_b1 = None if self.token_ids_N is None else self.token_ids_N[place, None]
            buffers = None if is_compiled else scratch.take(len(student_bV))
            values_b, entropies_b = run(
                self.objective, curve, student_bV, teacher_curve, teacher_bV, ids_b1, buffers, gradient
            )
            values_N[place] = values_b
            if self.entropies_N is not None and entropies_b is not None:
                self.entropies_N[place] = entropies_b

    def _collect(self, gradient_nV: Tensor, rows: slice, factors_N: Tensor | None, gradients: Gradients) -> None:
        """Take the gradient of a chunk's logits on to the student's tensors."""
        dtype = gradient_nV.dtype
        factors_n = None if factors_N is None else factors_N[rows].to(dtype)
        if gradients.hidden_NH is not None:
            out = gradients.hidden_NH[rows]
            self.student.hidden_gradient(gradient_nV, out=out)
            if factors_n is not None:
                out.mul_(factors_n[:, None])
        if gradients.weight_VH is not None:
            hidden_nH = self.hidden_NH[rows]
            if factors_n is not None:
                # The factors go into the narrower side of the product.
                hidden_nH = hidden_nH.to(dtype) * factors_n[:, None]
            self.student.add_weight_gradient(gradient_nV, hidden_nH, out=gradients.weight_VH, add=rows.start > 0)
        if gradients.bias_V is not None:
            ones_n = gradient_nV.new_ones(len(gradient_nV)) if factors_n is None else factors_n
            gradients.bias_V.addmv_(gradient_nV.t(), ones_n)

    def _chunk(self, dtype: torch.dtype) -> int:
        """Return tokens of a chunk: as many as asked for or as fit, spread evenly over the chunks."""
        total = len(self.hidden_NH)
        most = self.chunk_tokens or max(1, CHUNK_BYTES // (self.student.vocabulary * dtype.itemsize))
        return math.ceil(total / math.ceil(total / most)) if total else 0


def chunked_values(work: Pass, factors_N: Tensor | None, *, is_eager: bool) -> Tensor:
    """Return factors * values [N], differentiable in the student's hidden states, weight and bias.

    With `is_eager` the gradients are computed along with the values, for an upstream gradient that is the same number
    everywhere, as that of a sum or a mean is. For any other the head's gradient is computed again in the backward
    pass, exactly.
    """
    if work.chunk_tokens is not None and work.chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {work.chunk_tokens}; expected 1 or more, or None to choose it here")
    student = work.student
    values_N: Tensor = _ChunkedValues.apply(  # type: ignore[no-untyped-call]
        work.hidden_NH, student.weight_VH, student.bias_V, work, factors_N, is_eager, torch.is_grad_enabled()
    )
    return values_N


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Cover start..stop in steps of `size`; the last may be shorter."""
    for first in range(start, stop, max(1, size)):
        yield slice(first, min(first + size, stop))


class _ChunkedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        work: Pass,
        factors_N: Tensor | None,
        is_eager: bool,
        needs_grad: bool,
    ) -> Tensor:
        wanted = Wanted(*(needs_grad and needed for needed in ctx.needs_input_grad[:3]))
        # What only scales row by row holds for any upstream gradient.
        early = wanted if is_eager or not (wanted.weight or wanted.bias) else Wanted()
        with torch.autocast(hidden_NH.device.type, enabled=False):
            values_N, ctx.gradients = work(early, factors_N)
        # `work` holds them too; saved tensors notice a change between the passes.
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        ctx.work, ctx.factors_N, ctx.wanted = work, factors_N, wanted
        return values_N if factors_N is None else values_N.mul_(factors_N)

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise LearnerError(
                "the chunked kernels have no second derivative, and the backward pass was asked for a graph of its "
                "own; leave out create_graph=True, or write the divergence out over whole logits"
            )
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        wanted: Wanted = ctx.wanted
        # Handed over rather than copied: they become some parameter's .grad. A second backward computes its own.
        found: Gradients = ctx.gradients
        ctx.gradients = Gradients()
        found.scale(upstream_N, _common(upstream_N))
        missing = Wanted(
            hidden=wanted.hidden and found.hidden_NH is None,
            weight=wanted.weight and found.weight_VH is None,
            bias=wanted.bias and found.bias_V is None,
        )
        if missing.has_any:
            factors_N = upstream_N if ctx.factors_N is None else upstream_N * ctx.factors_N
            with torch.autocast(upstream_N.device.type, enabled=False):
                _, late = ctx.work(missing, factors_N)
        else:
            late = Gradients()
        return (
            _like(saved[0], found.hidden_NH, late.hidden_NH),
            _like(saved[1], found.weight_VH, late.weight_VH),
            _like(saved[2], found.bias_V, late.bias_V),
            *(None,) * 4,
        )


def _common(upstream_N: Tensor) -> float | None:
    """Return the number that the upstream gradient holds everywhere, or None."""
    if len(upstream_N) == 0:
        return 1.0
    first = upstream_N[0]
    return float(first) if upstream_N.stride(0) == 0 or bool((upstream_N == first).all()) else None


def _like(saved: Tensor | None, early: Tensor | None, late: Tensor | None) -> Tensor | None:
    """Return whichever gradient there is, in the dtype of its tensor."""
    gradient = late if early is None else early
    return None if gradient is None or saved is None else gradient.to(saved.dtype)
