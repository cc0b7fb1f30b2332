"""Single-sample estimators of a divergence to the teacher, and the policy gradients made of them.

Shape letters: B sequences, T tokens. P is the student, Q the teacher, d = log P(y) - log Q(y) at the sampled token y.
Importing this module loads no torch, so that a configuration can be checked without. Who draws the tokens and who steps
the optimiser is decided elsewhere.

What an estimator's *value* measures and what its *gradient* does are two things. With y drawn from P, in expectation:

    name   value                          direct: back-propagated        advantage: -value * grad log P(y)
    k1     KL(P||Q)                       0, the teacher cancels         reverse KL
    k2     E[d^2] / 2, biased             reverse KL                     no divergence
    k3     KL(P||Q), never negative       forward KL(Q||P)               reverse KL minus forward KL
    abs    E|d|                           twice the total variation      no divergence

"reverse KL" in the last two columns stands for its gradient in the student. `check_estimator` refuses the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from omniopd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

How = Literal["advantage", "direct"]
Aim = Literal["reverse_kl", "forward_kl", "total_variation"]
TopKForm = Literal["plain", "renormalized", "stop_gradient", "tail_bucket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamp:
    """Limits that keep one token from dominating a batch. Outside them the gradient is zero."""

    difference: float | None = None
    """d is kept within +- this many nats, before the estimator."""
    value: float | None = None
    """The estimate is kept within +- this many nats."""

    def __post_init__(self) -> None:
        for name, limit in (("difference", self.difference), ("value", self.value)):
            if limit is not None and not limit > 0:
                raise ConfigError(f"clamp.{name} is {limit}; expected a positive number of nats, or none")


VERL_CLAMP = Clamp(difference=20.0, value=10.0)
"""What verl applies to k3 (`low_var_kl`), and to k3 alone."""


def k1(difference: Tensor) -> Tensor:
    """Return d: unbiased for KL(P||Q), can be negative. Source: J. Schulman, "Approximating KL divergence", 2020."""
    return difference


def k2(difference: Tensor) -> Tensor:
    """Return d^2 / 2: biased as a value, but its own gradient is that of the reverse KL. Source: as `k1`."""
    return 0.5 * difference.square()


def k3(difference: Tensor) -> Tensor:
    """Return e^-d - 1 + d: unbiased for KL(P||Q) where Q's support is within P's, and >= 0. Source: as `k1`."""
    # expm1 keeps the digits that e^-d - 1 loses near d = 0, where a converged student lives.
    return (-difference).expm1() + difference


def absolute(difference: Tensor) -> Tensor:
    """Return |d|: how far apart, whichever way. Source: verl `kl_penalty` ("abs")."""
    return difference.abs()


ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}


def estimate(name: str, student_logprobs: Tensor, teacher_logprobs: Tensor, *, clamp: Clamp | None = None) -> Tensor:
    """Return one estimate a token, in nats; higher = further from the teacher.

    Args:
        name: k1, k2, k3 or abs.
        student_logprobs: log P(y), of any shape; the gradient flows through it.
        teacher_logprobs: log Q(y), the same shape; never gets a gradient.
        clamp: limits; None for none, `VERL_CLAMP` for verl's.

    Source: verl `kl_penalty_forward`.
    """
    if name not in ESTIMATORS:
        raise ConfigError(f"there is no estimator {name!r}; there are {', '.join(ESTIMATORS)}")
    clamp = clamp or Clamp()
    difference = student_logprobs - teacher_logprobs.detach()
    if clamp.difference is not None:
        difference = difference.clamp(-clamp.difference, clamp.difference)
    value = ESTIMATORS[name](difference)
    return value if clamp.value is None else value.clamp(-clamp.value, clamp.value)


def sampled_policy_gradient_advantage(
    sampler_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor, *, coefficient: float = 1.0, discount: float = 0.0
) -> Tensor:
    """Return the advantages [B, T] of the Thinking Machines recipe, -c * (log P_old(y) - log Q(y)).

    Higher = do it more. With discount 0 every token answers for itself: the expected policy gradient is that of the
    sum over positions of KL(P||Q) at the states as visited. With discount 1 a token also answers for all that follows:
    the gradient of the reverse KL of whole sequences. Detached; the policy gradient with its importance ratio is the
    learner's.

    Args:
        sampler_logprobs: [B, T] nats, of the policy that drew the tokens.
        teacher_logprobs: [B, T] nats.
        mask: [B, T] 1 for tokens that the student drew, 0 for prompt, tool and padding tokens: their advantage is 0
            and they add nothing to the return of others.
        coefficient: c >= 0; scales linearly.
        discount: in [0, 1]; weight of the next token's term in this token's return; counts positions.

    Source: tinker-cookbook `distillation/train_on_policy.py` (c 1.0, discount 0.0). As published, but for tokens
    outside the mask: there the discounted sum spills onto them, here their advantage stays 0.
    """
    _check_unit("discount", discount)
    if not coefficient >= 0:
        raise ConfigError(f"coefficient is {coefficient}; expected 0 or more, the sign is in the formula")
    reward = _inside(teacher_logprobs - sampler_logprobs, mask)
    return coefficient * _discounted_future_sum(reward, discount) * mask


def return_to_go(rewards: Tensor, mask: Tensor, *, discount: float = 1.0, length_normalized: bool = True) -> Tensor:
    """Return MiniLLM's returns [B, T]: the discounted rewards from each token on, divided by the tokens that remain.

    The remaining tokens include the present one, so r = (1, 2, 3) gives (6, 5, 3) and, normalised, (2, 2.5, 3).
    Dividing keeps long answers from being disliked for their length. Detached; 0 outside the mask.

    Args:
        rewards: [B, T] nats, log Q(y) - log P(y): higher = do it more.
        mask: [B, T] 1 for tokens of the completion.
        discount: gamma in [0, 1].
        length_normalized: whether to divide.

    Source: arXiv 2306.08543, section 2.2; LMOps `minillm/losses.py`. Differs: whitening is the caller's.
    """
    _check_unit("discount", discount)
    returns = _discounted_future_sum(_inside(rewards, mask), discount)
    if length_normalized:
        returns = returns / _remaining(mask).to(returns.dtype)
    return _inside(returns, mask)


def long_term_return(rewards: Tensor, mask: Tensor, *, discount: float = 1.0, length_normalized: bool = True) -> Tensor:
    """Return what is left of `return_to_go` [B, T] when each token's own reward is split off.

    The gradient of the sequence reverse KL is E[sum_t R_t grad log P(y_t)]. MiniLLM computes the own reward's part
    exactly, as the full-vocabulary reverse KL at each position (`single_step_weight` times it), and keeps the policy
    gradient for the rest, so nothing is counted twice. On the last token it is 0.

    Source: arXiv 2306.08543, section 2.2 (single-step decomposition). Differs: the official code adds the exact term
    and keeps the own reward in the return as well, which counts it twice; `return_to_go` with the exact term does so.
    """
    _check_unit("discount", discount)
    own = _inside(rewards, mask)
    returns = _discounted_future_sum(own, discount) - own
    if length_normalized:
        returns = returns / _remaining(mask).to(returns.dtype)
    return _inside(returns, mask)


def single_step_weight(mask: Tensor, *, length_normalized: bool = True) -> Tensor:
    """Return the weight [B, T] of the exact reverse KL at each position that goes with `long_term_return`.

    1 over the remaining tokens where the return is divided by them, else 1. MiniLLM itself weighs all positions 1 even
    beside normalised returns.
    """
    weight = mask.float() if not mask.is_floating_point() else mask
    return weight / _remaining(mask).to(weight.dtype) if length_normalized else weight


def mixed_sampling_weights(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, teacher_share: float, clamp: float | None = None
) -> Tensor:
    """Return the importance weights P(y) / (a Q(y) + (1 - a) P(y)) of tokens drawn from teacher and student mixed.

    One weight a token, not their product over the prefix: the product is unbiased for whole sequences but its variance
    explodes. At most 1 / (1 - a); exactly 1 for a = 0. Detached.

    Args:
        student_logprobs: log P(y), of any shape.
        teacher_logprobs: log Q(y), the same shape.
        teacher_share: a in [0, 1); MiniLLM takes 0.2.
        clamp: upper limit of a weight, None for none.

    Source: arXiv 2306.08543, section 2.2 (teacher-mixed sampling).
    """
    if not 0 <= teacher_share < 1:
        raise ConfigError(f"teacher_share is {teacher_share}; expected 0 up to, not including, 1")
    # P / mix = 1 / (1 - a + a * Q / P); nothing here overflows where the student's probability underflows.
    ratio = (teacher_logprobs - student_logprobs).detach().exp()
    weights = 1.0 / (1.0 - teacher_share + teacher_share * ratio) if teacher_share else ratio.new_ones(ratio.shape)
    return weights if clamp is None else weights.clamp(max=clamp)


def check_estimator(
    name: str,
    *,
    how: How,
    aim: Aim = "reverse_kl",
    top_k: int | None = None,
    form: TopKForm = "renormalized",
) -> None:
    """Refuse combinations whose expected gradient is not that of the divergence they are meant to lower.

    Args:
        name: k1, k2, k3, abs, or top_k_reverse_kl.
        how: `direct`: back-propagate the value; `advantage`: use it, negated and detached, in a policy gradient.
        aim: the divergence that is to fall.
        top_k: K of top_k_reverse_kl.
        form: `plain` sums over the K tokens as they are; `renormalized` scales both sides to 1 on them;
            `stop_gradient` reinforces each of them with a detached reward; `tail_bucket` puts the rest into one bucket.

    Raises:
        ConfigError: with the reason and what to do instead.
    """
    if how not in ("advantage", "direct"):
        raise ConfigError(f"how is {how!r}; it can be advantage or direct")
    if name == "top_k_reverse_kl":
        _check_top_k(how, aim, top_k, form)
    elif name not in ESTIMATORS:
        raise ConfigError(f"there is no estimator {name!r}; there are {', '.join(ESTIMATORS)}, top_k_reverse_kl")
    elif LOWERS.get((name, how)) != aim:
        right = " or ".join(f"{n} as {h}" for (n, h), lowered in LOWERS.items() if lowered == aim)
        raise ConfigError(f"{name} as {how} does not lower the {aim}: {_REASONS[name, how]}; use {right or 'none'}")


LOWERS: Mapping[tuple[str, str], str] = {
    ("k1", "advantage"): "reverse_kl",
    ("k2", "direct"): "reverse_kl",
    ("k3", "direct"): "forward_kl",
    ("abs", "direct"): "total_variation",
}
"""Which divergence falls by which use of which estimator; every other use lowers none."""
_REASONS: Mapping[tuple[str, str], str] = {
    ("k1", "advantage"): "its expected gradient is that of the reverse KL",
    ("k1", "direct"): "the teacher is a constant in d, and the expected gradient of log P is 0",
    ("k2", "advantage"): "d^2/2 as a penalty dislikes what the teacher likes more just as it does the opposite",
    ("k2", "direct"): "its expected gradient is that of the reverse KL",
    ("k3", "advantage"): "its expected gradient is that of the reverse KL minus the forward KL",
    ("k3", "direct"): "its expected gradient is that of the forward KL",
    ("abs", "advantage"): "|d| as a penalty dislikes what the teacher likes more just as it does the opposite",
    ("abs", "direct"): "its expected gradient is that of twice the total variation",
}


def _check_top_k(how: str, aim: str, top_k: int | None, form: str) -> None:
    if aim != "reverse_kl":
        raise ConfigError(f"top_k_reverse_kl does not lower the {aim}; use the exact divergence")
    if form not in ("plain", "renormalized", "stop_gradient", "tail_bucket"):
        raise ConfigError(f"form is {form!r}; it can be renormalized, stop_gradient or tail_bucket")
    if top_k is None or top_k < 1:
        raise ConfigError(f"top_k is {top_k}; top_k_reverse_kl needs the number of tokens, such as 16")
    if how == "advantage":
        raise ConfigError(
            "top_k_reverse_kl as advantage throws away all but the sampled token; "
            "use it direct, or k1 as advantage when only the sampled token is known"
        )
    if form == "plain":
        raise ConfigError(
            "plain top-k reverse KL can be negative and falls when the student leaves the top-k altogether; "
            "use form renormalized or tail_bucket"
        )
    if top_k == 1 and form != "tail_bucket":
        raise ConfigError(
            "top_k_reverse_kl with one token learns nothing from the teacher: renormalised it is always 0, and without "
            "that it only moves the likeliest token; use k1 as advantage on the sampled token, or top_k of 4 or more"
        )


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; expected 0 to 1")


def _discounted_future_sum(rewards: Tensor, discount: float) -> Tensor:
    """Return sum_{s>=t} discount^(s-t) r_s along the last dimension."""
    if discount == 0.0:
        return rewards
    if discount == 1.0:
        return rewards.flip(-1).cumsum(-1).flip(-1)
    returns = rewards.clone()
    for t in reversed(range(rewards.shape[-1] - 1)):
        returns[..., t] += discount * returns[..., t + 1]
    return returns


def _inside(values: Tensor, mask: Tensor) -> Tensor:
    # where, not a product: padding may hold infinities, and 0 * inf is nan.
    return values.detach().where(mask.bool(), values.new_zeros(()))


def _remaining(mask: Tensor) -> Tensor:
    """Return how many tokens of the mask are left from each one on, at least 1."""
    if mask.dim() == 0:
        raise DataError("the mask is a single number; expected [..., T]")
    return mask.long().flip(-1).cumsum(-1).flip(-1).clamp(min=1)
