"""One block of rows, from the projections of both models to values and gradient: as it stands on a CPU, compiled on
an accelerator, where every pass would be a launch and a trip to memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniopd.kernels.heads import Curve
from omniopd.kernels.objectives import Objective

Values = tuple[Tensor, Tensor | None]
"""Of a block: those of the objective [b], and the student's entropies [b] where it has them."""


class Scratch:
    """Memory for [b, V] tensors of one block, used again for every block."""

    def __init__(self, rows: int, count: int, like_nV: Tensor) -> None:
        self.rows = rows
        self._tensors = [like_nV.new_empty((rows, like_nV.shape[1])) for _ in range(count)]

    def take(self, rows: int) -> list[Tensor]:
        """Give the first `rows` rows of every tensor, whatever they hold."""
        return [tensor[:rows] for tensor in self._tensors]


def evaluate(
    objective: Objective,
    curve: Curve,
    student_bV: Tensor,
    teacher_curve: Curve | None,
    teacher_bV: Tensor | None,
    ids_b1: Tensor | None,
    buffers: Sequence[Tensor] | None,
    gradient: bool,
) -> Values:
    """Return the values of a block; with `gradient`, the student's projections become the gradient on them.

    `buffers` may be left out; a compiler then finds that most are not needed.
    """
    if buffers is None:
        buffers = [torch.empty_like(student_bV) for _ in range(objective.buffers)]
    slope_bV = curve.bend_(student_bV, gradient=gradient)
    if teacher_curve is not None and teacher_bV is not None:
        teacher_curve.bend_(teacher_bV, gradient=False)
    values = objective(student_bV, teacher_bV, ids_b1, buffers, gradient=gradient)
    if gradient:
        curve.unbend_(student_bV, slope_bV)
    return values


@functools.cache
def compiled() -> Callable[..., Values]:
    """Return `evaluate` through torch.compile, or itself, with a warning, where nothing can be compiled.

    The compiled function is checked against the plain one on a CPU; it has not run on a GPU yet. One compilation
    serves one objective, setting and dtype, and one more any number of rows.
    """
    fused: Callable[..., Values] = torch.compile(evaluate)
    is_broken = False

    def run(*args: object) -> Values:
        nonlocal is_broken
        if not is_broken:
            try:
                return fused(*args)
            except _compile_errors() as error:
                # Compilation comes before the first write, so the block can still be done the plain way.
                is_broken = True
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"torch.compile failed, so the kernels run uncompiled, several times slower: {reason}; install "
                    "the triton that goes with this torch",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return evaluate(*args)  # type: ignore[arg-type]

    return run


def _compile_errors() -> tuple[type[Exception], ...]:
    """Return what torch.compile raises where there is no compiler or it fails; importing them takes a second."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)
