"""Exact divergences between two language models, token by token, from their hidden states and heads."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from omniopd.errors import ConfigError, DataError
from omniopd.kernels.chunked import Pass, chunked_values
from omniopd.kernels.heads import Head, working_dtype
from omniopd.kernels.objectives import ForwardKL, JensenShannon, Objective, ReverseKL
from omniopd.kernels.tokens import Tokens

Kind = Literal["forward_kl", "reverse_kl", "jsd", "scaled_jsd", "trl_jsd"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Reduction = Literal["none", "sum", "mean"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def chunked_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: Reduction = "none",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> Tensor:
    """Return the divergence of S, the student, from T, the teacher, at each token, in nats; [T] or a scalar.

    Kinds, with M = beta T + (1 - beta) S:

    - `forward_kl`: KL(T || S). Covers what the teacher does.
    - `reverse_kl`: KL(S || T). Settles on what the teacher likes.
    - `jsd`: beta KL(T || M) + (1 - beta) KL(S || M). Tends to 0 at beta 0 and 1, and is 0 there.
    - `scaled_jsd`: that divided by beta (1 - beta). Tends to forward KL at beta 0 and to reverse KL at beta 1, and is
      those there. Below 0.01 from either end float32 loses digits.
    - `trl_jsd`: as TRL has it: forward KL at beta 0, reverse KL at beta 1, `jsd` in between. It jumps at both ends.

    Differentiable once, in `student_hidden`, `student_head` and `student_bias`; nothing flows into the teacher. Logits
    of at most `chunk_tokens` tokens exist at a time, and gradients are computed along with the values, so the backward
    pass is a multiplication. They hold for an upstream gradient that is one number everywhere; any other, exact too,
    costs a second pass: put what differs between tokens into `weights`. Sums run in float32 whatever the heads are
    kept in (float64 if one is float64); the gradient of a half-precision head is kept in float32 on the way.

    Args:
        student_hidden: [T, H]; padding left out.
        student_head: [V, H], the weight of the output layer; it may be the embedding itself.
        teacher_hidden: [T, G].
        teacher_head: [V, G], the same tokens in the same order as in `student_head`.
        beta: the teacher's share of M, 0 to 1; read by the three JSD kinds only.
        student_bias: [V]; minus infinity shuts a token out, see `heads.LOGIT_FLOOR`.
        teacher_bias: [V].
        student_softcap: logits become softcap * tanh(logits / softcap).
        teacher_softcap: the same for the teacher.
        temperature: divides the logits of both; the result is not multiplied by its square.
        weights: [T], multiplies the values. A token of weight 0 is not computed at all: its value is 0, NaN or not.
        reduction: `sum` of weight * value; `mean`, that over the sum of weights (0 where that is 0).
        chunk_tokens: default: 112 MB of logits for each model.
        chunk_vocab: rows of a half-precision head that are widened at a time; default: 32 MB.

    Raises:
        DataError: tensors that do not fit each other.
        ConfigError: a setting out of range.
        LearnerError: in the backward pass, when it is to be differentiated itself.

    Source: arXiv:2306.13649, eq. 1 (the generalised JSD). Differs: `beta` weighs the teacher, as there, and the
    values at 0 and 1 are the limits unless TRL's are asked for.
    """
    objective = _objective(kind, beta)
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; it can be {', '.join(REDUCTIONS)}")
    student = Head(student_head, student_bias, student_softcap, temperature, chunk_vocab)
    frozen_bias = None if teacher_bias is None else teacher_bias.detach()
    teacher = Head(teacher_head.detach(), frozen_bias, teacher_softcap, temperature, chunk_vocab)
    student.check("student_", student_hidden)
    teacher.check("teacher_", teacher_hidden)
    _check_pair(student_hidden, student, teacher_hidden, teacher)
    if objective is None:
        # The limit of `jsd`: no token adds anything, yet the value has a gradient, as every other has.
        objective, weights = ForwardKL(), student_hidden.new_zeros(len(student_hidden))
    dtype = working_dtype(student_head, teacher_head)
    tokens = Tokens.of(student_hidden, weights, dtype, is_mean=reduction == "mean")
    states_NG = tokens.pick(teacher_hidden.detach())
    work = Pass(student, tokens.pick(student_hidden), teacher, states_NG, objective, chunk_tokens)
    values_N = chunked_values(work, tokens.factors_N, is_eager=True)
    return values_N.sum() if reduction != "none" else tokens.spread(values_N, fill=0.0)


def _objective(kind: str, beta: float) -> Objective | None:
    """Return what to compute, or None for a divergence that is 0 everywhere."""
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; it can be {', '.join(KINDS)}")
    if kind == "forward_kl":
        return ForwardKL()
    if kind == "reverse_kl":
        return ReverseKL()
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta is {beta}; expected 0 to 1, the share of the teacher in the mixture")
    if beta in (0, 1):
        if kind == "jsd":
            return None
        return ForwardKL() if beta == 0 else ReverseKL()
    return JensenShannon(beta, 1 / (beta * (1 - beta)) if kind == "scaled_jsd" else 1.0)


def _check_pair(student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head) -> None:
    if len(student_hidden) != len(teacher_hidden):
        raise DataError(
            f"student_hidden has {len(student_hidden)} tokens and teacher_hidden {len(teacher_hidden)}; expected the "
            "hidden states of both models at the same positions of the same text"
        )
    if student.vocabulary != teacher.vocabulary:
        raise DataError(
            f"student_head has {student.vocabulary} rows and teacher_head {teacher.vocabulary}; expected one "
            "vocabulary: cut the rows that pad the longer one (head[:size]), or use the path for foreign tokenizers"
        )
    if student_hidden.device != teacher_hidden.device:
        raise DataError(
            f"student_hidden is on {student_hidden.device} and teacher_hidden on {teacher_hidden.device}; move one"
        )
