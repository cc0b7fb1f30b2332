"""Sums over tokens that divergences are made of, from log-probabilities. Importing this file does not load torch.

Shape letters: N tokens of a slice, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_FAR = 30.0
"""Log-ratios beyond this are computed from the other end; e ** 30 squared still fits into float32."""


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(first || second) [N] of log-probabilities [N, K]."""
    return (first.exp() * (first - second)).sum(-1)


def log_mixture_ratio(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return log((1 - share) first + share second) - log first of log-probabilities, for 0 < share < 1.

    Exact relative to `share` however small it is, where log-sum-exp would leave rounding errors of the size of log
    first; dividing by a small share later does not blow them up.
    """
    if share > 0.5:
        return second - first + log_mixture_ratio(second, first, 1.0 - share)
    ratio = second - first
    near = (share * ratio.clamp(max=_FAR).expm1()).log1p()
    far = ratio.clamp(min=_FAR)
    return near.where(ratio <= _FAR, far + (share + (1.0 - share) * (-far).exp()).log())


def with_tail(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Return the log-probs of some tokens and of all others together [N, K + 1].

    The others are summed where they are: 1 minus the sum of the kept would cancel.
    """
    import torch

    rest = logprobs_NV.scatter(-1, ids_NK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs_NV.gather(-1, ids_NK), rest], -1)
