"""Batched sampling from a causal language model: the one decode loop of rollouts, evaluation and `omniopd serve`.

Two things that `model.generate` does not give: a prompt with many samples is read once, and every sample has its own
random stream, so it does not depend on what it was batched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from omniopd.errors import ConfigError, RolloutError
from omniopd.types import FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPACT_BELOW = 0.75
"""Rows that have ended leave the batch when fewer than this share is still writing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Ask for `num_samples` continuations of one token sequence."""

    token_ids: tuple[int, ...]
    num_samples: int
    max_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    seed: int = 0
    """Sample i depends on (seed, i) alone."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are left out of its text."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ConfigError("a sample request needs at least one token to continue from, got none")
        if self.num_samples < 1 or self.max_tokens < 1:
            raise ConfigError(
                f"num_samples and max_tokens must be 1 or more, got {self.num_samples}, {self.max_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"need temperature >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One continuation. T tokens, the end token included when it was drawn."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """[T] nats, of the distribution it was drawn from (temperature and top_p applied); greedy: at temperature 1."""
    entropies: tuple[float, ...]
    """[T] nats, full vocabulary, at temperature 1."""
    text: str
    """Without special tokens and without the stop text."""
    finish_reason: FinishReason


@dataclass(slots=True)
class _Row:
    """A sample that is being written."""

    request: int
    index: int
    uniforms: np.ndarray
    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finish_reason: FinishReason | None = None
    text: str | None = None

    def next_uniform(self) -> float:
        # A row that has ended stays in the batch until the next compaction; what it draws is thrown away.
        return 0.0 if self.finish_reason is not None else float(self.uniforms[len(self.token_ids)])


class Sampler:
    """Samples from a model that it does not own: weights changed elsewhere are used from the next call on.

    Results are deterministic in the seeds, up to the last bits of the floating point arithmetic, which may depend on
    the batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self._pad_id is None:
            raise RolloutError("the tokenizer has neither a pad nor an end token; add one to tokenizer_config.json")
        self._end_ids = end_token_ids(model, tokenizer)

    def sample(self, requests: Sequence[SampleRequest], *, batch_size: int = 512) -> list[list[Sample]]:
        """Answer every request, in order. `batch_size` bounds the sequences in memory at once.

        Raises RolloutError when a prompt leaves no room in the model's context.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for request in requests:
            if limit is not None and len(request.token_ids) + request.max_tokens > limit:
                raise RolloutError(
                    f"a prompt of {len(request.token_ids)} tokens plus {request.max_tokens} new ones exceeds the "
                    f"model's context of {limit}; shorten the prompts or lower max_tokens"
                )
        was_training = self.model.training
        self.model.eval()
        results: list[list[Sample]] = [[] for _ in requests]
        try:
            with torch.inference_mode():
                for batch in self._batches(requests, batch_size):
                    for row in self._decode(requests, batch):
                        results[row.request].append(self._finish(row))
        finally:
            self.model.train(was_training)
        return results

    def _batches(self, requests: Sequence[SampleRequest], batch_size: int) -> list[list[tuple[int, int]]]:
        """Group (request, sample) pairs: alike lengths together, samples of one request side by side."""
        order = sorted(range(len(requests)), key=lambda i: (requests[i].max_tokens, len(requests[i].token_ids), i))
        pairs = [(i, j) for i in order for j in range(requests[i].num_samples)]
        return [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]

    def _decode(self, requests: Sequence[SampleRequest], batch: list[tuple[int, int]]) -> list[_Row]:
        device = self.model.device
        rows = [_Row(i, j, _uniforms(requests[i], j), [], [], []) for i, j in batch]
        unique = list(dict.fromkeys(i for i, _ in batch))
        width = max(len(requests[i].token_ids) for i in unique)
        prompt_ids = torch.full((len(unique), width), self._pad_id, dtype=torch.long)
        mask = torch.zeros((len(unique), width), dtype=torch.long)
        for place, i in enumerate(unique):
            ids = requests[i].token_ids
            prompt_ids[place, width - len(ids) :] = torch.tensor(ids)
            mask[place, width - len(ids) :] = 1
        prompt_ids, mask = prompt_ids.to(device), mask.to(device)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self._forward(prompt_ids, mask, positions, cache)
        place_of = {i: place for place, i in enumerate(unique)}
        spread = torch.tensor([place_of[i] for i, _ in batch], device=device)
        if len(batch) != len(unique):
            cache.batch_select_indices(spread)
        logits, mask, lengths = output[spread], mask[spread], mask[spread].sum(-1)
        active = list(range(len(rows)))
        while True:
            settings = _Settings.of([requests[rows[r].request] for r in active], device)
            # float32 would round the largest to 1, past the last token that has any probability.
            draws = torch.tensor([rows[r].next_uniform() for r in active], dtype=torch.float64, device=device)
            tokens, logprobs, entropies = _draw(logits.float(), settings, draws)
            if not bool(entropies.isfinite().all()):
                raise RolloutError(
                    "the model's logits hold NaN or infinity; its weights are broken, go back to a checkpoint"
                )
            self._append(requests, [rows[r] for r in active], tokens, logprobs, entropies)
            keep = [k for k, r in enumerate(active) if rows[r].finish_reason is None]
            if not keep:
                return rows
            writing = torch.ones(len(active), 1, dtype=mask.dtype, device=device)
            if len(keep) < COMPACT_BELOW * len(active):
                index = torch.tensor(keep, device=device)
                cache.batch_select_indices(index)
                tokens, mask, lengths, writing = tokens[index], mask[index], lengths[index], writing[index]
                active = [active[k] for k in keep]
            mask = torch.cat([mask, writing], dim=1)
            logits = self._forward(tokens[:, None], mask, lengths[:, None], cache)
            lengths = lengths + 1

    def _forward(
        self, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Return the logits [B, V] after the last token; the cache grows by the tokens given."""
        logits: torch.Tensor = self.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def _append(
        self,
        requests: Sequence[SampleRequest],
        rows: list[_Row],
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        entropies: torch.Tensor,
    ) -> None:
        columns = zip(rows, tokens.tolist(), logprobs.tolist(), entropies.tolist(), strict=True)
        for row, token, logprob, entropy in columns:
            if row.finish_reason is not None:
                continue
            request = requests[row.request]
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.entropies.append(entropy)
            if token in self._end_ids:
                row.finish_reason = FinishReason.STOP
            elif request.stop and (cut := self._stopped(row.token_ids, request.stop)) is not None:
                row.finish_reason, row.text = FinishReason.STOP, cut
            elif len(row.token_ids) >= request.max_tokens:
                row.finish_reason = FinishReason.LENGTH

    def _stopped(self, token_ids: list[int], stop: tuple[str, ...]) -> str | None:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        cuts = [text.index(s) for s in stop if s in text]
        return text[: min(cuts)] if cuts else None

    def _finish(self, row: _Row) -> Sample:
        text = row.text
        if text is None:
            text = self.tokenizer.decode(row.token_ids, skip_special_tokens=True)
        assert row.finish_reason is not None
        return Sample(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            entropies=tuple(row.entropies),
            text=text,
            finish_reason=row.finish_reason,
        )


@dataclass(frozen=True, slots=True)
class _Settings:
    """Sampling settings of the rows of a batch."""

    temperatures: torch.Tensor
    """[B, 1]"""
    top_p: torch.Tensor
    """[B, 1]"""
    is_greedy: torch.Tensor
    """[B]"""
    all_plain: bool
    """Temperature 1 and the whole vocabulary for every row."""

    @classmethod
    def of(cls, requests: list[SampleRequest], device: torch.device) -> _Settings:
        temperatures = torch.tensor([r.temperature for r in requests], device=device)
        top_p = torch.tensor([r.top_p for r in requests], device=device)
        greedy = temperatures == 0
        plain = all(r.temperature == 1 and r.top_p == 1 for r in requests)
        return cls(temperatures.where(~greedy, torch.ones_like(temperatures))[:, None], top_p[:, None], greedy, plain)


def _draw(
    logits: torch.Tensor, settings: _Settings, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: [B, V] float32.
        settings: of the B rows.
        uniforms: [B] float64 in [0, 1), one for each row.

    Returns:
        Token ids [B], their logprobs [B] under the sampling distribution, and entropies [B] of softmax(logits).
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    entropies = torch.special.entr(probs).sum(-1)
    if not settings.all_plain:
        logprobs = torch.log_softmax(logits / settings.temperatures, dim=-1)
        if bool((settings.top_p < 1).any()):
            logprobs = torch.log_softmax(
                logprobs.masked_fill(_outside_nucleus(logprobs, settings.top_p), -torch.inf), -1
            )
        probs = logprobs.exp()
    cumulative = probs.double().cumsum(-1)
    targets = (uniforms * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(settings.is_greedy, logits.argmax(-1), tokens)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropies


def _outside_nucleus(logprobs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Mark [B, V] the tokens outside the smallest set whose mass reaches top_p."""
    ordered, order = logprobs.exp().sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return (before >= top_p).gather(-1, order.argsort(-1))


def _uniforms(request: SampleRequest, index: int) -> np.ndarray:
    """Return the random numbers of sample `index`, one for each token: a stream of its own, whatever the batch is."""
    key = np.array([request.seed % 2**64, index], dtype=np.uint64)
    stream = np.random.Generator(np.random.Philox(key=key))
    return stream.random(request.max_tokens)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return all ids that end a completion: the tokenizer's and those of the model's generation config."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return frozenset(i for i in ids if i is not None)


def load_sampler(folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> Sampler:
    """Load a model and its tokenizer for sampling. Raises ConfigError when either cannot be loaded."""
    from omniopd.models import load_model, load_tokenizer

    return Sampler(load_model(str(folder), device=device, dtype=dtype), load_tokenizer(str(folder)))
