"""Per-token losses. Each reads a slice of tokens and returns one value a token; the learner weights and adds them up.

A loss is a frozen dataclass whose fields are its settings, vetted when it is made. Importing this file does not load
torch, so a run file is checked against the losses themselves. Divergences to a teacher are in `divergences`.

Shape letters: N tokens of a slice. All inputs are float32 (float64 in tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from omniopd.errors import ConfigError
from omniopd.learner.divergences import DIVERGENCES
from omniopd.learner.foreign_losses import FOREIGN_LOSSES
from omniopd.learner.loss_inputs import Fused, TokenSlice
from omniopd.parts import build_part, unknown

if TYPE_CHECKING:
    from torch import Tensor


class TokenLoss(Protocol):
    """One value a token, lower is better."""

    stream: ClassVar[str]
    """The stream of the token signal that weights it."""
    needs: ClassVar[str | None]
    """`reference`: the frozen initial student; `teacher`: an open-weight teacher; `foreign_teacher`: one with another
    vocabulary, compared group by group (`foreign_losses`); None: the student alone."""

    @property
    def fused(self) -> Fused | None:
        """The same values by the fused kernel; None where it has no such loss."""
        ...

    def __call__(self, tokens: TokenSlice) -> Tensor:
        """Return [N]."""
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """-advantage * log P(y): reinforce what was sampled. Fresh samples, so no ratio.

    Source: arXiv 2606.01476, section 3 (there the advantage is the chunk's target w).
    """

    stream: ClassVar[str] = "pg"
    needs: ClassVar[str | None] = None
    fused: ClassVar[Fused | None] = Fused("logprob", uses_advantages=True)

    def __call__(self, tokens: TokenSlice) -> Tensor:
        assert tokens.advantages_N is not None
        return -tokens.advantages_N * tokens.token_logprobs_N


@dataclass(frozen=True)
class TokenCrossEntropy:
    """-log P(y) of text that somebody else wrote."""

    stream: ClassVar[str] = "ce"
    needs: ClassVar[str | None] = None
    fused: ClassVar[Fused | None] = Fused("logprob")

    def __call__(self, tokens: TokenSlice) -> Tensor:
        return -tokens.token_logprobs_N


@dataclass(frozen=True)
class SoftCrossEntropy:
    """-sum_v target(v) log P(v) with a sparse target plus a detached share of the student itself."""

    stream: ClassVar[str] = "soft"
    needs: ClassVar[str | None] = None
    fused: ClassVar[Fused | None] = None

    def __call__(self, tokens: TokenSlice) -> Tensor:
        assert tokens.target_ids_NK is not None and tokens.target_probs_NK is not None
        named = (tokens.target_probs_NK * tokens.logprobs_NV.gather(-1, tokens.target_ids_NK)).sum(-1)
        loss = -named
        if tokens.self_weights_N is not None:
            own = (tokens.logprobs_NV.detach().exp() * tokens.logprobs_NV).sum(-1)
            loss = loss - tokens.self_weights_N * own
        return loss


@dataclass(frozen=True)
class ForwardKL:
    """KL(R || P), exact over the vocabulary, to the frozen initial student R. Source: arXiv 2606.01476, section 3."""

    stream: ClassVar[str] = "anchor"
    needs: ClassVar[str | None] = "reference"
    fused: ClassVar[Fused | None] = Fused("forward_kl")

    def __call__(self, tokens: TokenSlice) -> Tensor:
        assert tokens.reference_logprobs_NV is not None
        reference = tokens.reference_logprobs_NV
        return (reference.exp() * (reference - tokens.logprobs_NV)).sum(-1)


STREAMS = ("pg", "anchor", "kl", "ce", "soft")
LOSSES: Mapping[str, Mapping[str, type[Any]]] = {
    "pg": {"policy_gradient": PolicyGradient},
    "anchor": {"forward_kl": ForwardKL},
    "kl": {**DIVERGENCES, **FOREIGN_LOSSES},
    "ce": {"cross_entropy": TokenCrossEntropy},
    "soft": {"cross_entropy": SoftCrossEntropy},
}
"""Stream -> name -> loss; the first of each stream is its default."""


def build_losses(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, TokenLoss]:
    """Return the loss of every stream. Raises ConfigError for an unknown stream, type or setting, or a value beyond
    its bounds."""
    losses: dict[str, TokenLoss] = {stream: next(iter(table.values()))() for stream, table in LOSSES.items()}
    for stream, settings in overrides.items():
        if stream not in LOSSES:
            raise ConfigError(unknown(f"learner.losses.{stream}", stream, LOSSES, what="stream"))
        losses[stream] = build_part(f"learner.losses.{stream}", settings, LOSSES[stream])
    return losses
