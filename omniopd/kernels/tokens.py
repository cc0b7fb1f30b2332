"""Which tokens are computed, and what their values are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omniopd.errors import DataError


@dataclass(frozen=True, slots=True)
class Tokens:
    """N of T tokens."""

    total: int
    rows_N: Tensor | None = None
    """Their places; None: all of them."""
    factors_N: Tensor | None = None
    """None: 1 each."""

    @classmethod
    def of(cls, hidden_TH: Tensor, weights_T: Tensor | None, dtype: torch.dtype, *, is_mean: bool = False) -> Tokens:
        """Leave out what weighs nothing. Raises DataError for weights that do not fit the hidden states."""
        total = len(hidden_TH)
        if weights_T is None:
            return cls(total, None, hidden_TH.new_full((total,), 1 / total, dtype=dtype) if is_mean and total else None)
        if weights_T.shape != (total,) or weights_T.device != hidden_TH.device:
            raise DataError(
                f"weights is {list(weights_T.shape)} on {weights_T.device}; expected [{total}] on {hidden_TH.device}, "
                "one for each row of the hidden states"
            )
        if weights_T.requires_grad:
            raise DataError("weights has requires_grad, but no gradient flows into weights; pass weights.detach()")
        factors_T = weights_T.to(dtype)
        if is_mean:
            norm = factors_T.sum()
            factors_T = factors_T / norm.where(norm != 0, torch.ones_like(norm))
            factors_T = factors_T * (norm != 0)
        rows_N = weights_T.nonzero().squeeze(-1)
        if len(rows_N) == total:
            return cls(total, None, factors_T)
        return cls(total, rows_N, factors_T[rows_N])

    def pick(self, tensor_T: Tensor) -> Tensor:
        """Return the rows of these tokens, without a copy when they are all."""
        return tensor_T if self.rows_N is None else tensor_T[self.rows_N]

    def spread(self, values_N: Tensor, *, fill: float) -> Tensor:
        """Return [T], with `fill` where nothing was computed."""
        if self.rows_N is None:
            return values_N
        return values_N.new_full((self.total,), fill).index_copy(0, self.rows_N, values_N)
