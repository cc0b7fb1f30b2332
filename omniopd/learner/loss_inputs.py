"""What a loss may read, and how it names itself to the fused kernel. Importing this file does not load torch.

Shape letters: N tokens of a slice, V vocabulary, K tokens that are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """What a loss may read about N tokens."""

    logprobs_NV: Tensor
    """Log-softmax of the student, with gradient."""
    token_ids_N: Tensor
    """The tokens of the rollout."""
    advantages_N: Tensor | None = None
    reference_logprobs_NV: Tensor | None = None
    """Log-softmax of the frozen initial student or of an open-weight teacher; no gradient."""
    known: KnownTokens | None = None
    """Of a teacher whose whole distribution is not known."""
    target_ids_NK: Tensor | None = None
    target_probs_NK: Tensor | None = None
    """Sparse soft targets; absent places hold probability 0."""
    self_weights_N: Tensor | None = None
    """The share of the student's own distribution in the soft target."""

    @property
    def token_logprobs_N(self) -> Tensor:
        """The student's logprob of each token of the rollout."""
        return self.logprobs_NV.gather(-1, self.token_ids_N[:, None]).squeeze(-1)


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """What a teacher said of N positions, where that is less than its whole distribution. No gradient."""

    token_logprobs_N: Tensor
    """log Q of the rollout's own tokens."""
    ids_NK: Tensor | None = None
    logprobs_NK: Tensor | None = None
    """log Q of these tokens."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A loss as the fused kernel computes it, without log-probs of the whole vocabulary in memory."""

    kind: str
    """A kind of `omniopd.kernels.chunked_divergence`, or `logprob`: minus the log-prob of the rollout's token."""
    beta: float = 0.5
    temperature: float = 1.0
    uses_advantages: bool = False
    """Whether the log-prob is multiplied by the advantage."""
