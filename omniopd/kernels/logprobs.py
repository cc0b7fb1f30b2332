"""Log-probs of given tokens and entropies, from hidden states and the head."""

from __future__ import annotations

import torch
from torch import Tensor

from omniopd.errors import DataError
from omniopd.kernels.chunked import Pass, chunked_values
from omniopd.kernels.heads import Head, working_dtype
from omniopd.kernels.objectives import TokenLogprob
from omniopd.kernels.tokens import Tokens


def chunked_logprobs(
    hidden: Tensor,
    head: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each token [T] and the entropy of its distribution [T], in nats.

    The log-probs are differentiable once, in `hidden`, `head` and `bias`; the entropies are not. Without `weights` any
    upstream gradient is expected, such as one of importance ratios, and the head's gradient is left to the backward
    pass. With `weights` the log-probs come multiplied by them, so that a loss that only adds them up (a policy
    gradient with advantages, a cross-entropy) has its gradient with the values, at one matrix product less.

    Args:
        hidden: [T, H]; padding left out.
        head: [V, H], the weight of the output layer; it may be the embedding itself.
        token_ids: [T], 0 to V - 1.
        bias: [V].
        softcap: logits become softcap * tanh(logits / softcap).
        temperature: divides the logits.
        weights: [T]. A token of weight 0 is not computed at all: its log-prob is 0 and its entropy NaN, for unknown.
        chunk_tokens: default: 112 MB of logits.
        chunk_vocab: rows of a half-precision head that are widened at a time; default: 32 MB.

    Raises:
        DataError: tensors that do not fit each other.
        ConfigError: a setting out of range.
    """
    model = Head(head, bias, softcap, temperature, chunk_vocab)
    model.check("", hidden)
    _check_ids(token_ids, hidden, model.vocabulary)
    dtype = working_dtype(head)
    tokens = Tokens.of(hidden, weights, dtype)
    states_NH = tokens.pick(hidden)
    entropies_N = states_NH.new_empty(len(states_NH), dtype=dtype).detach()
    work = Pass(model, states_NH, None, None, TokenLogprob(), chunk_tokens, tokens.pick(token_ids), entropies_N)
    values_N = chunked_values(work, tokens.factors_N, is_eager=weights is not None)
    return tokens.spread(values_N, fill=0.0), tokens.spread(entropies_N, fill=float("nan"))


def _check_ids(token_ids: Tensor, hidden: Tensor, vocabulary: int) -> None:
    if token_ids.shape != hidden.shape[:1] or token_ids.dtype != torch.long or token_ids.device != hidden.device:
        raise DataError(
            f"token_ids is {list(token_ids.shape)} of {token_ids.dtype} on {token_ids.device}; expected "
            f"[{len(hidden)}] of torch.int64 on {hidden.device}, one for each row of the hidden states"
        )
    if len(token_ids) == 0:
        return
    lowest, highest = (int(bound) for bound in token_ids.aminmax())
    if lowest < 0 or highest >= vocabulary:
        raise DataError(
            f"token_ids holds {lowest} to {highest}; expected 0 to {vocabulary - 1}, the rows of the head; is this a "
            "text of another tokenizer, or padding?"
        )
