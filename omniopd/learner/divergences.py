"""Divergences to an open-weight teacher: the losses of the `kl` stream. Importing this file does not load torch.

P is the student, Q the teacher, both over the whole vocabulary at one position of a rollout; every loss is in nats per
token, 0 where P = Q, and lower is closer. Gradients flow into P alone. `temperature` softens both distributions before
they are compared; the value is that of the softened pair, without the factor temperature ** 2 of some codebases.

A teacher behind a server, or on disk, tells less than its whole distribution; `evidence` says what a loss makes do
with.

Shape letters: N tokens of a slice, V vocabulary, K kept tokens (and the bucket of the others).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from omniopd.errors import ConfigError
from omniopd.learner.divergence_math import kl, log_mixture_ratio, with_tail
from omniopd.learner.loss_inputs import Fused
from omniopd.logits.estimators import LOWERS, estimate

if TYPE_CHECKING:
    from torch import Tensor

    from omniopd.learner.loss_inputs import KnownTokens, TokenSlice

_LEAST_REST = 1e-7
"""Mass that a teacher leaves to the tokens it did not name, at least: what float32 log-probs can tell from none."""
_FUSED_BETA = 0.01
"""Nearer to its ends than this the scaled JSD needs the exact ratios of this file."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a loss must know of the teacher at each token."""

    kind: Literal["whole", "teacher_top_k", "student_top_k", "token"]
    """Its whole distribution; its K likeliest tokens; the student's K likeliest; the rollout's own token."""
    k: int = 0


WHOLE = Evidence("whole")


@dataclass(frozen=True)
class TeacherDivergence:
    """What all of them share: stream, need and temperature."""

    stream: ClassVar[str] = "kl"
    needs: ClassVar[str | None] = "teacher"
    temperature: float = 1.0

    @property
    def evidence(self) -> Evidence:
        """What must be known of the teacher at each token."""
        return WHOLE

    @property
    def fused(self) -> Fused | None:
        return None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature must be positive, got {self.temperature}")

    def pair(self, tokens: TokenSlice) -> tuple[Tensor, Tensor]:
        """Return log P and log Q [N, V]."""
        assert tokens.reference_logprobs_NV is not None
        student, teacher = tokens.logprobs_NV, tokens.reference_logprobs_NV
        if self.temperature == 1.0:
            return student, teacher
        return (student / self.temperature).log_softmax(-1), (teacher / self.temperature).log_softmax(-1)


@dataclass(frozen=True)
class TeacherReverseKL(TeacherDivergence):
    """KL(P || Q): the usual on-policy distillation loss. Settles on what Q likes. Source: arXiv 2306.13649."""

    @property
    def fused(self) -> Fused:
        return Fused("reverse_kl", temperature=self.temperature)

    def __call__(self, tokens: TokenSlice) -> Tensor:
        return kl(*self.pair(tokens))


@dataclass(frozen=True)
class TeacherForwardKL(TeacherDivergence):
    """KL(Q || P): covers all that Q does. Source: arXiv 2306.13649."""

    @property
    def fused(self) -> Fused:
        return Fused("forward_kl", temperature=self.temperature)

    def __call__(self, tokens: TokenSlice) -> Tensor:
        student, teacher = self.pair(tokens)
        return kl(teacher, student)


@dataclass(frozen=True)
class GeneralizedJSD(TeacherDivergence):
    """J = beta KL(Q || M) + (1 - beta) KL(P || M) with M = beta Q + (1 - beta) P. Source: arXiv 2306.13649.

    J goes to 0 at both ends, and only J / (beta (1 - beta)) goes to the forward KL at beta 0 and to the reverse KL at
    beta 1. `limits` returns that quotient, which is continuous in beta and keeps its scale (4 J at beta 0.5). `trl` is
    what TRL and the GKD paper compute: J itself inside, and the two KLs at exactly 0 and 1, where it jumps.
    """

    beta: float = 0.5
    convention: Literal["limits", "trl"] = "limits"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("beta", self.beta)

    @property
    def fused(self) -> Fused | None:
        if self.convention == "trl":
            return Fused("trl_jsd", beta=self.beta, temperature=self.temperature)
        if 0.0 < min(self.beta, 1.0 - self.beta) < _FUSED_BETA:
            return None
        return Fused("scaled_jsd", beta=self.beta, temperature=self.temperature)

    def __call__(self, tokens: TokenSlice) -> Tensor:
        student, teacher = self.pair(tokens)
        if self.beta == 0.0:
            return kl(teacher, student)
        if self.beta == 1.0:
            return kl(student, teacher)
        # Dividing before the sum keeps the quotient exact for a beta near its ends.
        of_teacher = -(teacher.exp() * log_mixture_ratio(teacher, student, 1.0 - self.beta)).sum(-1) / (1.0 - self.beta)
        of_student = -(student.exp() * log_mixture_ratio(student, teacher, self.beta)).sum(-1) / self.beta
        quotient = of_teacher + of_student
        return quotient if self.convention == "limits" else self.beta * (1.0 - self.beta) * quotient


@dataclass(frozen=True)
class SkewedKL(TeacherDivergence):
    """KL to a mixture that holds a share `alpha` of the first distribution, so it stays finite. arXiv 2402.03898.

    forward: KL(Q || alpha Q + (1 - alpha) P). reverse: KL(P || alpha P + (1 - alpha) Q), gradients through both P. At
    alpha 0 they are the plain KLs; the value shrinks with alpha and is at most log(1 / alpha).
    """

    alpha: float = 0.1
    direction: Literal["forward", "reverse"] = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha < 1.0:
            raise ConfigError(f"alpha must be at least 0 and less than 1, where the loss is always 0; got {self.alpha}")

    def __call__(self, tokens: TokenSlice) -> Tensor:
        student, teacher = self.pair(tokens)
        first, second = (teacher, student) if self.direction == "forward" else (student, teacher)
        if self.alpha == 0.0:
            return kl(first, second)
        return -(first.exp() * log_mixture_ratio(first, second, 1.0 - self.alpha)).sum(-1)


@dataclass(frozen=True)
class TotalVariation(TeacherDivergence):
    """Half of the summed |P - Q|, in [0, 1]: bounded, and deaf to how wrong a rare token is. arXiv 2307.15190."""

    def __call__(self, tokens: TokenSlice) -> Tensor:
        student, teacher = self.pair(tokens)
        return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


@dataclass(frozen=True)
class MixedKL(TeacherDivergence):
    """forward KL(Q || P) + (1 - forward) KL(P || Q): cover and settle at once. At 0.5 half of Jeffreys' divergence."""

    forward: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("forward", self.forward)

    def __call__(self, tokens: TokenSlice) -> Tensor:
        student, teacher = self.pair(tokens)
        return self.forward * kl(teacher, student) + (1.0 - self.forward) * kl(student, teacher)


@dataclass(frozen=True)
class TopKDivergence(TeacherDivergence):
    """A KL over K tokens. The rest is renormalized away, or with `tail` compared as one bucket."""

    k: int = 32
    renormalize: bool = True
    tail: bool = False
    """Keep the mass outside as one more outcome; then the masses add up to 1 without renormalizing."""
    of_teacher: ClassVar[bool] = True
    """Whose likeliest tokens they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"k must be 1 or more, got {self.k}")
        if not self.renormalize and not self.tail:
            raise ConfigError(
                "renormalize is false and there is no tail: plain top-k reverse KL is no divergence, it falls below 0 "
                "(-0.22 for Q = .6 .3 .1, P = .2 .3 .5, k = 2) by moving mass out of the k tokens; use renormalize: "
                "true or tail: true"
            )
        if self.k == 1 and not self.tail:
            raise ConfigError(
                "k is 1: one token renormalized has probability 1 in both models, so nothing is compared; use k of 2 "
                "or more, tail: true, or method.supervision={type: logprob, objective: sampled}"
            )

    @property
    def evidence(self) -> Evidence:
        if self.tail and self.temperature != 1.0:
            return WHOLE  # What the others weigh at another temperature cannot be told from their sum.
        return Evidence("teacher_top_k" if self.of_teacher else "student_top_k", self.k)

    def outcomes(self, tokens: TokenSlice) -> tuple[Tensor, Tensor]:
        """Return log P and log Q [N, K] of what is compared; without the tail they are not renormalized yet."""
        if tokens.known is not None:
            return self._known_outcomes(tokens, tokens.known)
        student, teacher = self.pair(tokens)
        size = student.shape[-1]
        ids_NK = (teacher if self.of_teacher else student.detach()).topk(min(self.k, size), -1).indices
        if self.tail and self.k < size:
            return with_tail(student, ids_NK), with_tail(teacher, ids_NK)
        return student.gather(-1, ids_NK), teacher.gather(-1, ids_NK)

    def _known_outcomes(self, tokens: TokenSlice, known: KnownTokens) -> tuple[Tensor, Tensor]:
        """Return the same where only these tokens of the teacher are known."""
        import torch

        assert known.ids_NK is not None and known.logprobs_NK is not None
        ids_NK, teacher = known.ids_NK[:, : self.k], known.logprobs_NK[:, : self.k]
        if not self.tail or ids_NK.shape[-1] == tokens.logprobs_NV.shape[-1]:
            return tokens.logprobs_NV.gather(-1, ids_NK) / self.temperature, teacher / self.temperature
        rest = (-teacher.exp().sum(-1, keepdim=True).clamp(max=1.0 - _LEAST_REST)).log1p()
        return with_tail(tokens.logprobs_NV, ids_NK), torch.cat([teacher, rest], -1)

    def normalize(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Make both add up to 1 where the tail does not do that already."""
        return (student, teacher) if self.tail else (student.log_softmax(-1), teacher.log_softmax(-1))


@dataclass(frozen=True)
class TeacherTopKReverseKL(TopKDivergence):
    """KL(P || Q) over the teacher's K most likely tokens, with its full gradient. Source: arXiv 2603.25562.

    As published with k 32 and both renormalized; with `tail` it is the reverse KL of the coarser outcomes, a lower
    bound of the exact one. k = V gives the exact one either way.
    """

    def __call__(self, tokens: TokenSlice) -> Tensor:
        return kl(*self.normalize(*self.outcomes(tokens)))


@dataclass(frozen=True)
class TeacherTopKForwardKL(TopKDivergence):
    """KL(Q || P) over the teacher's K most likely tokens and one bucket of the others: a lower bound of the exact one.

    The distillation loss of servers that name a few tokens each. Source: TRL's server distillation (beta 0, with the
    bucket); verl leaves out both bucket and renormalization.
    """

    tail: bool = True

    def __call__(self, tokens: TokenSlice) -> Tensor:
        student, teacher = self.normalize(*self.outcomes(tokens))
        return kl(teacher, student)


@dataclass(frozen=True)
class StudentTopKReverseKL(TopKDivergence):
    """KL(P || Q) over the student's own K most likely tokens. Source: arXiv 2604.13016 (k 16, stop gradient).

    With `stop_gradient`, as published, every kept token has the fixed reward rho (log Q - log P), rho being P
    renormalized over the K tokens, and its log P is raised by it; the value is minus the summed reward. Without, the
    gradient also flows through the reward and the renormalization. At k = V the two gradients are the same.
    """

    of_teacher: ClassVar[bool] = False
    k: int = 16
    stop_gradient: bool = True

    @property
    def evidence(self) -> Evidence:
        if self.stop_gradient and self.temperature != 1.0:
            return WHOLE  # The rewards are log-ratios of softened distributions, normalized over all tokens.
        return super().evidence

    def __call__(self, tokens: TokenSlice) -> Tensor:
        student, teacher = self.outcomes(tokens)
        if not self.stop_gradient:
            return kl(*self.normalize(student, teacher))
        fixed = student.detach()
        share = fixed.exp() if self.tail else fixed.softmax(-1)
        cost = share * (fixed - teacher)
        # The value is the cost, the gradient that of cost * log P.
        return (cost * (1.0 + student - fixed)).sum(-1)


@dataclass(frozen=True)
class SampledToken(TeacherDivergence):
    """A divergence from the sampled token alone, back-propagated. With d = log P(y) - log Q(y), y drawn from P:

    k2 = d ** 2 / 2, whose gradient is on average that of the reverse KL (its value is not);
    k3 = exp(-d) - 1 + d, whose value is on average the reverse KL, but whose gradient is that of the *forward* KL;
    abs = |d|, in value and gradient on average twice the total variation.
    `aim` says which divergence is to fall, and must fit. Source: J. Schulman, "Approximating KL divergence" (2020); the
    gradients follow from E[grad log P] = 0. The token must be drawn at temperature 1 by the student as it is.
    """

    estimator: Literal["k1", "k2", "k3", "abs"] = "k2"
    aim: Literal["reverse_kl", "forward_kl", "total_variation"] = "reverse_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 1.0:
            raise ConfigError(
                f"temperature is {self.temperature}: the token was drawn from the student as it is, so only "
                "temperature 1 estimates anything; use a full divergence such as reverse_kl"
            )
        if self.estimator == "k1":
            raise ConfigError(
                "estimator is k1: back-propagated directly it is log P(y) alone, whose gradient is 0 on average, and "
                "the teacher drops out; use k1 as an advantage with method.supervision={type: logprob, objective: "
                "sampled}, or estimator: k2, which has the gradient of the reverse KL"
            )
        lowers = LOWERS[self.estimator, "direct"]
        if self.aim != lowers:
            value = " (only its value is)" if self.estimator == "k3" and self.aim == "reverse_kl" else ""
            raise ConfigError(
                f"estimator is {self.estimator}: back-propagated directly its gradient is that of the {lowers}, not of "
                f"the {self.aim}{value}; use type: {self.aim}, the estimator k2 for the reverse_kl, k3 for the "
                f"forward_kl or abs for the total_variation, or, if that is meant, aim: {lowers}"
            )

    @property
    def evidence(self) -> Evidence:
        return Evidence("token")

    def __call__(self, tokens: TokenSlice) -> Tensor:
        if tokens.known is not None:
            teacher = tokens.known.token_logprobs_N
        else:
            assert tokens.reference_logprobs_NV is not None
            teacher = tokens.reference_logprobs_NV.gather(-1, tokens.token_ids_N[:, None]).squeeze(-1)
        return estimate(self.estimator, tokens.token_logprobs_N, teacher)


DIVERGENCES: Mapping[str, type[Any]] = {
    "reverse_kl": TeacherReverseKL,
    "forward_kl": TeacherForwardKL,
    "jsd": GeneralizedJSD,
    "skewed": SkewedKL,
    "total_variation": TotalVariation,
    "mixed": MixedKL,
    "teacher_topk_reverse_kl": TeacherTopKReverseKL,
    "teacher_topk_forward_kl": TeacherTopKForwardKL,
    "student_topk_reverse_kl": StudentTopKReverseKL,
    "sampled_token": SampledToken,
}


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} must be in [0, 1], got {value}")
