"""Terms whose loss the fused kernel knows: no log-probs of the whole vocabulary in memory.

Shape letters: M tokens of a term, N signalled tokens of the micro-batch, H hidden width, V vocabulary, T tokens of a
rollout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniopd.kernels import chunked_divergence, chunked_logprobs
from omniopd.learner.batch import MicroBatch
from omniopd.learner.policy import PlainHead, Policy
from omniopd.learner.terms import ModelReference, Term


def can_fuse(term: Term) -> bool:
    """Whether the kernel has the loss, and the reference is a model with a plain head."""
    if term.loss.fused is None:
        return False
    reference = term.reference
    return reference is None or (isinstance(reference, ModelReference) and reference.head is not None)


def fused_loss(policy: Policy, batch: MicroBatch, term: Term, leaf_NH: Tensor) -> Tensor:
    """Return the weighted sum of a term; the kernel takes its gradient along with it."""
    fused, head = term.loss.fused, policy.plain_head
    assert fused is not None and head is not None
    states_MH, weight_VH = _operands(policy, leaf_NH[term.rows_M], head)
    with torch.autocast(leaf_NH.device.type, enabled=False):
        if fused.kind == "logprob":
            factors_M = -term.weights_M
            if fused.uses_advantages:
                factors_M = factors_M * batch.advantages_N[term.rows_M]
            ids_M = batch.token_ids_N[term.rows_M]
            values_M, _ = chunked_logprobs(
                states_MH, weight_VH, ids_M, bias=head.bias_V, softcap=head.softcap, weights=factors_M
            )
            return values_M.sum()
        assert isinstance(term.reference, ModelReference) and term.reference.head is not None
        other = term.reference.head
        return chunked_divergence(
            states_MH,
            weight_VH,
            term.reference.states_MG.to(other.weight_VH.dtype),
            other.weight_VH,
            kind=fused.kind,  # type: ignore[arg-type]
            beta=fused.beta,
            student_bias=head.bias_V,
            teacher_bias=other.bias_V,
            student_softcap=head.softcap,
            teacher_softcap=other.softcap,
            temperature=fused.temperature,
            weights=term.weights_M,
            reduction="sum",
        )


def fused_score(policy: Policy, states_TH: Tensor, ids_T: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the student's logprobs [T] of its tokens and its entropies [T]."""
    head = policy.plain_head
    assert head is not None
    states_TH, weight_VH = _operands(policy, states_TH, head)
    with torch.autocast(states_TH.device.type, enabled=False):
        logprobs_T, entropies_T = chunked_logprobs(states_TH, weight_VH, ids_T, bias=head.bias_V, softcap=head.softcap)
    return tuple(logprobs_T.tolist()), tuple(entropies_T.tolist())


def _operands(policy: Policy, states_NH: Tensor, head: PlainHead) -> tuple[Tensor, Tensor]:
    """Multiply in the compute dtype, as autocast would; the kernel's sums are wider."""
    reduced = policy.compute_dtype in (torch.bfloat16, torch.float16)
    dtype = policy.compute_dtype if reduced else head.weight_VH.dtype
    return states_NH.to(dtype), head.weight_VH.to(dtype)
