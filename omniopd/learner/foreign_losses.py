"""Losses against a teacher with another vocabulary: `kl` stream, one value a group. Importing this does not load torch.

A group is what both models wrote between two shared byte boundaries (`logits.alignment`). Its distribution is built
from the log-probs of its tokens on each side (`distributions`), then the two are compared (`__call__`). Gradients flow
into the student alone, through every token of the group. `foreign` adds the losses of a micro-batch up.

Shape letters: T tokens, G groups, V a vocabulary (V the student's and W the teacher's where both appear).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from omniopd.errors import ConfigError, DataError
from omniopd.learner.loss_inputs import Fused

if TYPE_CHECKING:
    from torch import Tensor

    from omniopd.logits.foreign import MatchedVocabulary


@dataclass(frozen=True)
class ForeignDivergence:
    """What both share: how the tokens of a group become one distribution.

    `observed` takes the distribution of the first token times the probabilities of the later ones as written,
    `bayesian` that of the last token times those of the earlier ones. `temperature` softens every distribution first,
    so also those scalar probabilities; the value keeps no factor temperature ** 2.
    """

    stream: ClassVar[str] = "kl"
    needs: ClassVar[str | None] = "foreign_teacher"
    fused: ClassVar[Fused | None] = None
    needs_matched: ClassVar[bool]
    """Whether it asks which tokens both vocabularies hold; then both tokenizers must have exact bytes."""
    merge: Literal["observed", "bayesian"] = "observed"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.merge not in ("observed", "bayesian"):
            raise ConfigError(f"merge is {self.merge!r}; it can be observed or bayesian")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature must be positive, got {self.temperature}")

    def distributions(self, logprobs_TV: Tensor, token_ids_T: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Return the log distribution of each group [G, V] of one side; `ranges` are half-open and count the T rows."""
        from omniopd.logits.foreign import merge_groups

        if self.temperature != 1.0:
            logprobs_TV = (logprobs_TV / self.temperature).log_softmax(-1)
        return merge_groups(logprobs_TV, token_ids_T, ranges, merge=self.merge)

    def __call__(
        self, student_logprobs_GV: Tensor, teacher_logprobs_GW: Tensor, matched: MatchedVocabulary | None
    ) -> Tensor:
        """Return [G] for the groups' distributions of both sides."""
        raise NotImplementedError


@dataclass(frozen=True)
class UniversalLogitDistillation(ForeignDivergence):
    """L1 distance of the sorted probabilities, in [0, 2]. Source: arXiv 2402.12030, eq. 2.

    Compares shapes only: a teacher that likes other tokens as much as the student likes its own costs nothing. Needs
    nothing of the tokenizers but the alignment.
    """

    needs_matched: ClassVar[bool] = False

    def __call__(
        self, student_logprobs_GV: Tensor, teacher_logprobs_GW: Tensor, matched: MatchedVocabulary | None = None
    ) -> Tensor:
        from omniopd.logits.foreign import uld_loss

        return uld_loss(student_logprobs_GV, teacher_logprobs_GW)


@dataclass(frozen=True)
class HybridMatching(ForeignDivergence):
    """Generalised JSD on the tokens that both vocabularies hold, sorted L1 on all others. Source: GOLD (TRL).

    `beta` as TRL has it, the convention `trl` of the loss `jsd`: J = beta KL(Q || M) + (1 - beta) KL(P || M) with
    M = beta Q + (1 - beta) P inside, the forward KL at 0, the reverse KL at 1, so small next to those for a `beta` near
    0 or 1. Without weights the matched part counts M / W and the rest 1 - M / W, for M matched tokens of the teacher's
    W. Between identical vocabularies with everything matched this is that generalised JSD.

    Where the teacher writes one token `ab` for the student's `a` and `b`, the two are not matched, and the student's
    merged mass stands against what the teacher gives `a` alone: the loss can then lower the student's probability of
    the very text that the teacher likes. The exact log-prob differences of groups (`alignment.group_logprobs`) cannot.
    """

    needs_matched: ClassVar[bool] = True
    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    """Both or neither."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(f"beta must be in [0, 1], got {self.beta}")
        weights = (self.matched_weight, self.unmatched_weight)
        if (self.matched_weight is None) != (self.unmatched_weight is None):
            raise ConfigError(
                f"matched_weight is {weights[0]} and unmatched_weight {weights[1]}; give both, or neither for weights "
                "by the share of the teacher's vocabulary that is matched"
            )
        given = [w for w in weights if w is not None]
        if any(not (math.isfinite(w) and w >= 0.0) for w in given) or (given and not any(given)):
            raise ConfigError(
                f"matched_weight is {weights[0]} and unmatched_weight {weights[1]}; expected 0 or more, and not both 0"
            )

    def __call__(
        self, student_logprobs_GV: Tensor, teacher_logprobs_GW: Tensor, matched: MatchedVocabulary | None
    ) -> Tensor:
        from omniopd.logits.foreign import hybrid_loss

        if matched is None:
            raise DataError(
                "the hybrid loss got no matched vocabulary; make one with learner.foreign.match_vocabularies, or use "
                "the uld loss, which needs none"
            )
        return hybrid_loss(
            student_logprobs_GV,
            teacher_logprobs_GW,
            matched,
            beta=self.beta,
            matched_weight=self.matched_weight,
            unmatched_weight=self.unmatched_weight,
        )


FOREIGN_LOSSES: Mapping[str, type[Any]] = {"uld": UniversalLogitDistillation, "hybrid": HybridMatching}
