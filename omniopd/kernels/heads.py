"""A language model's head: hidden states to logits and back, in float32 or wider whatever the weights are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from omniopd.errors import ConfigError, DataError

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)
LOGIT_FLOOR = -1e4
"""A bias that puts a logit lower counts as that much, minus infinity included: every value and gradient stays finite,
and the probability is 0 all the same."""
CAST_BYTES = 32 * 2**20
"""Half-precision weights are widened that much at a time."""


@dataclass(frozen=True, slots=True)
class Curve:
    """logits = softcap * tanh(projection / softcap) / temperature."""

    softcap: float | None = None
    temperature: float = 1.0

    def bend_(self, logits_bV: Tensor, *, gradient: bool) -> Tensor | None:
        """Turn projections into logits in place; return the slope [b, V] where it is not one number."""
        if self.softcap is None:
            if self.temperature != 1.0:
                logits_bV.div_(self.temperature)
            return None
        logits_bV.div_(self.softcap).tanh_()
        slope_bV = None
        if gradient:
            slope_bV = logits_bV.square().neg_().add_(1.0)
        logits_bV.mul_(self.softcap / self.temperature)
        return slope_bV

    def unbend_(self, gradient_bV: Tensor, slope_bV: Tensor | None) -> None:
        """Turn the gradient on the logits into that on the projection, in place."""
        if slope_bV is not None:
            gradient_bV.mul_(slope_bV)
        if self.temperature != 1.0:
            gradient_bV.div_(self.temperature)


@dataclass(frozen=True, slots=True)
class Head:
    """projection = hidden @ weight.T + bias, and the curve that makes logits of it."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    chunk_vocab: int | None = None
    """Rows of a half-precision weight that are converted at a time; None: as many as fit in 32 MB."""

    @property
    def vocabulary(self) -> int:
        return self.weight_VH.shape[0]

    @property
    def curve(self) -> Curve:
        return Curve(self.softcap, self.temperature)

    def project(self, hidden_nH: Tensor, *, out: Tensor) -> None:
        """Write hidden @ weight.T + bias [n, V] into `out`; the curve makes logits of it."""
        for tile in self._tiles(out.dtype):
            self._multiply(hidden_nH, self.weight_VH[tile].t(), out=out[:, tile], add=False)
        if self.bias_V is not None:
            out.add_(self.bias_V.to(out.dtype).clamp(min=LOGIT_FLOOR * self.temperature))

    def hidden_gradient(self, gradient_nV: Tensor, *, out: Tensor) -> None:
        """Write gradient @ weight [n, H] into `out`."""
        for tile in self._tiles(out.dtype):
            self._multiply(gradient_nV[:, tile], self.weight_VH[tile], out=out, add=tile.start > 0)

    def add_weight_gradient(self, gradient_nV: Tensor, hidden_nH: Tensor, *, out: Tensor, add: bool) -> None:
        """Add gradient.T @ hidden [V, H] to `out`, or write it there when `add` is false."""
        for tile in self._tiles(out.dtype):
            self._multiply(gradient_nV[:, tile].t(), hidden_nH, out=out[tile], add=add)

    def check(self, owner: str, hidden_TH: Tensor) -> None:
        """Raise DataError or ConfigError when the head does not fit the hidden states."""
        weight, bias = self.weight_VH, self.bias_V
        if hidden_TH.dim() != 2 or weight.dim() != 2 or hidden_TH.shape[1] != weight.shape[1]:
            raise DataError(
                f"{owner}hidden is {list(hidden_TH.shape)} and {owner}head {list(weight.shape)}; expected "
                "[tokens, width] and [vocabulary, width] of one width; flatten the batch and leave out padding"
            )
        if weight.shape[0] == 0:
            raise DataError(f"{owner}head is {list(weight.shape)}; expected at least one token in the vocabulary")
        if hidden_TH.dtype != weight.dtype or weight.dtype not in FLOATS:
            raise DataError(
                f"{owner}hidden is {hidden_TH.dtype} and {owner}head {weight.dtype}; expected one floating dtype for "
                f"both; convert the hidden states, which are small: {owner}hidden.to({owner}head.dtype)"
            )
        if hidden_TH.device != weight.device:
            raise DataError(f"{owner}hidden is on {hidden_TH.device} and {owner}head on {weight.device}; move one")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
            raise DataError(
                f"{owner}bias is {list(bias.shape)} on {bias.device}; expected [{weight.shape[0]}] on {weight.device}, "
                f"one number for each row of {owner}head"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ConfigError(f"{owner}softcap is {self.softcap}; expected a number above 0, or None for no cap")
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}; expected a number above 0")
        if self.chunk_vocab is not None and self.chunk_vocab < 1:
            raise ConfigError(f"chunk_vocab is {self.chunk_vocab}; expected 1 or more, or None to choose it here")

    def _multiply(self, a: Tensor, b: Tensor, *, out: Tensor, add: bool) -> None:
        """Write a @ b to `out`, or add it: the sum is as wide as `out`, whatever the factors are kept in."""
        dtype = self.weight_VH.dtype
        if self.weight_VH.is_cuda and dtype in HALF and out.dtype == torch.float32:
            # Tensor cores multiply half-precision numbers and add up in float32.
            a, b = a.to(dtype), b.to(dtype)
            if add:
                torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
            else:
                torch.mm(a, b, out_dtype=torch.float32, out=out)
            return
        a, b = a.to(out.dtype), b.to(out.dtype)
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)

    def _tiles(self, wide: torch.dtype) -> Iterator[slice]:
        """Cover the vocabulary: at once where nothing is to be converted."""
        size = self.vocabulary
        if self.weight_VH.dtype != wide:
            fitting = CAST_BYTES // (self.weight_VH.shape[1] * wide.itemsize)
            size = self.chunk_vocab or max(1, fitting)
        for start in range(0, self.vocabulary, size):
            yield slice(start, min(start + size, self.vocabulary))


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 when any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
