"""An open-weight teacher in this process: one forward pass over a batch of completions, logits a slice at a time.

Shape letters: B completions of a batch, L tokens with prompt and padding, H hidden width, T tokens of a completion,
n tokens of a slice, V vocabulary, K tokens whose log-probs are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from omniopd.errors import ConfigError
from omniopd.logits.scores import Known, Reading, Scored, TokenScores
from omniopd.types import Missing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ScoringModel(Protocol):
    """A causal language model split into trunk and head."""

    @property
    def device(self) -> torch.device: ...

    def autocast(self) -> contextlib.AbstractContextManager[Any]: ...

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return the last hidden states [B, L, H]."""
        ...

    def logprobs(self, hidden_NH: Tensor) -> Tensor:
        """Return log-softmax [N, V], at least float32."""
        ...


class ModelScores:
    """Score completions with a model of this process, which stays the caller's. A `SequenceTeacher`.

    The work is done in the caller's thread; other tasks get their turn between two batches.

    Args:
        id: for records.
        vocabulary: tokens that there are, where the head has more rows to pad its table; those are left out, and the
            others add up to 1. None: all rows. Give the student's, whose tokens are compared.
        context: tokens that the model can hold with the prompt; longer completions have no record. None: no bound.
        batch_tokens: tokens of one forward pass, padding included; a longer completion goes alone.
        chunk_tokens: tokens whose log-probs over the vocabulary exist at once; 128 x 152k are 78 MB in float32, and
            about three times that in all.
    """

    def __init__(
        self,
        model: ScoringModel,
        *,
        id: str,
        vocabulary: int | None = None,
        context: int | None = None,
        batch_tokens: int = 8192,
        chunk_tokens: int = 128,
    ) -> None:
        for name, value in (("batch_tokens", batch_tokens), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        if vocabulary is not None and vocabulary < 1:
            raise ConfigError(f"vocabulary is {vocabulary}; expected the number of tokens, or None for all rows")
        self._model = model
        self._id = id
        self._known_tokens = vocabulary
        self._context = context
        self._batch_tokens = batch_tokens
        self._chunk_tokens = chunk_tokens

    def __repr__(self) -> str:
        return f"ModelScores({self._id!r})"

    @property
    def id(self) -> str:
        return self._id

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that have a log-prob: rows of the head, or as many as were told. Costs a forward pass of one token."""
        import torch

        ids_11 = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
        with torch.no_grad(), self._model.autocast():
            return self._logprobs(self._model.hidden(ids_11, torch.ones_like(ids_11))[0]).shape[-1]

    async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
        """Score every completion, in order, as `SequenceTeacher` says.

        A `top_k` of the whole vocabulary or more gives all of it, the likeliest first. Raises ConfigError for a
        negative one.
        """
        if top_k < 0:
            raise ConfigError(f"top_k is {top_k}; expected 0 or more")
        scored: list[Scored | None] = [self._refusal(reading) for reading in readings]
        waiting = [i for i, refusal in enumerate(scored) if refusal is None]
        for batch in self._batches(readings, waiting):
            for i, result in zip(batch, self._score_batch([readings[i] for i in batch], top_k), strict=True):
                scored[i] = result
            await asyncio.sleep(0)
        return [result for result in scored if result is not None]

    async def aclose(self) -> None:
        """Do nothing: the model is the caller's."""

    def _refusal(self, reading: Reading) -> Scored | None:
        size = len(reading.prompt_ids) + len(reading.token_ids)
        if self._context is not None and size > self._context:
            return _failed(f"prompt and completion have {size} tokens, the teacher's context {self._context}")
        ids = np.asarray((*reading.prompt_ids, *reading.token_ids))
        requested = np.empty(0, dtype=np.int64) if reading.requested_TK is None else reading.requested_TK
        for name, values in (("token", ids), ("requested token", requested)):
            # On CUDA an id outside the table kills the process, not the completion.
            outside = values[(values < 0) | (values >= self.vocabulary)]
            if len(outside):
                return _failed(f"{name} {outside[0]} is not in the teacher's vocabulary of {self.vocabulary}")
        return None

    def _batches(self, readings: Sequence[Reading], waiting: Sequence[int]) -> Iterator[list[int]]:
        """Put completions of about one length together: padding is work for nothing."""
        sizes = {i: len(readings[i].prompt_ids) + len(readings[i].token_ids) for i in waiting}
        batch: list[int] = []
        # The longest come first, so that a batch too large for the memory fails at once. The first of a batch is its
        # longest.
        for i in sorted(waiting, key=lambda i: -sizes[i]):
            if batch and (len(batch) + 1) * sizes[batch[0]] > self._batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score_batch(self, readings: Sequence[Reading], top_k: int) -> list[Scored]:
        import torch

        rows = [torch.tensor(reading.prompt_ids + reading.token_ids) for reading in readings]
        # What stands right of a token cannot change it, so padding there needs no positions and any id will do.
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = self._model.device
        with torch.no_grad(), self._model.autocast():
            hidden_BLH = self._model.hidden(ids_BL.to(device), mask_BL.to(device))
            scored = []
            for row, reading in enumerate(readings):
                start = len(reading.prompt_ids) - 1
                scored.append(self._record(hidden_BLH[row, start : start + len(reading.token_ids)], reading, top_k))
        return scored

    def _logprobs(self, hidden_nH: Tensor) -> Tensor:
        """Return log-softmax [n, V] over the tokens that there are."""
        logprobs_nV = self._model.logprobs(hidden_nH)
        if self._known_tokens is None or self._known_tokens >= logprobs_nV.shape[-1]:
            return logprobs_nV
        return logprobs_nV[:, : self._known_tokens].log_softmax(-1)

    def _record(self, hidden_TH: Tensor, reading: Reading, top_k: int) -> Scored:
        """Read what is asked for off the hidden states that predict the T tokens."""
        import torch

        device = hidden_TH.device
        token_ids_T1 = torch.tensor(reading.token_ids, dtype=torch.long, device=device)[:, None]
        wanted = reading.requested_TK
        wanted_TK = None if wanted is None else torch.as_tensor(wanted.astype(np.int64), device=device)
        kept = min(top_k, self.vocabulary)
        own, tables, ids = [], [], []
        for start in range(0, max(1, len(hidden_TH)), self._chunk_tokens):
            part = slice(start, start + self._chunk_tokens)
            logprobs_nV = self._logprobs(hidden_TH[part])
            own.append(logprobs_nV.gather(-1, token_ids_T1[part]).squeeze(-1).cpu())
            if wanted_TK is not None:
                tables.append(logprobs_nV.gather(-1, wanted_TK[part]).cpu())
            elif kept:
                best = logprobs_nV.topk(kept, dim=-1)
                tables.append(best.values.cpu())
                ids.append(best.indices.to(torch.int32).cpu())
            del logprobs_nV
        logprobs_T = torch.cat(own).numpy()
        if not np.isfinite(logprobs_T).all():
            first = int(np.flatnonzero(~np.isfinite(logprobs_T))[0])
            return _failed(f"the teacher's log-prob of token {first} is {logprobs_T[first]}, expected a finite number")
        if not tables:
            return Scored(scores=TokenScores(logprobs_T=logprobs_T))
        known: Known = "vocabulary" if kept == self.vocabulary else "teacher_top_k"
        return Scored(
            scores=TokenScores(
                logprobs_T=logprobs_T,
                known=known if wanted is None else "requested",
                ids_TK=torch.cat(ids).numpy() if wanted is None else wanted.copy(),
                logprobs_TK=torch.cat(tables).numpy(),
            )
        )


def _failed(detail: str) -> Scored:
    return Scored(missing=Missing.FAILED, detail=detail)
