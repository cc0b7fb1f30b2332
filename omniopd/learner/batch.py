"""Token signals become padded tensors. Shape letters: B rollouts, L padded positions, N signalled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniopd.errors import LearnerError
from omniopd.learner.losses import STREAMS
from omniopd.types import Rollout, TokenSignal


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rollouts with their signals, right-padded."""

    signals: tuple[TokenSignal, ...]
    """[B]"""
    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    rows_N: Tensor
    """Which of the B rollouts each signalled token belongs to; ascending."""
    columns_N: Tensor
    """The position whose hidden state predicts it."""
    positions_N: Tensor
    """Which token of the completion it is; ascending within a rollout."""
    token_ids_N: Tensor
    weights: dict[str, Tensor]
    """Stream -> [N] weight, normalised over the whole step."""
    advantages_N: Tensor
    target_ids_NK: Tensor
    target_probs_NK: Tensor
    self_weights_N: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_N.numel())


@dataclass(frozen=True, slots=True)
class Normalizer:
    """What each stream's weighted sum is divided by. Computed over the whole step before any backward pass.

    `sequence_mean_token_sum` divides by the number of rollouts, as published: sums per rollout, mean over rollouts.
    `token_mean` divides by the stream's own number of weighted tokens.
    """

    num_rollouts: int
    num_tokens: dict[str, int]
    aggregation: str

    @classmethod
    def of(cls, signals: Sequence[TokenSignal], aggregation: str) -> Normalizer:
        counts = dict.fromkeys(STREAMS, 0)
        for signal in signals:
            for stream, weights in stream_weights(signal).items():
                counts[stream] += sum(1 for w in weights if w > 0)
        return cls(len(signals), counts, aggregation)

    def scale(self, stream: str) -> float:
        count = self.num_rollouts if self.aggregation == "sequence_mean_token_sum" else self.num_tokens[stream]
        return 1.0 / count if count else 0.0


def stream_weights(signal: TokenSignal) -> dict[str, tuple[float, ...]]:
    """Return the streams that are used, each [T]. Raises LearnerError for a negative weight or NaN."""
    length = signal.rollout.num_tokens
    soft: tuple[float, ...] | None = None
    if signal.soft_targets is not None:
        covered = [0.0] * length
        for target in signal.soft_targets:
            covered[target.position] = 1.0
        soft = tuple(covered)
    streams = {
        "pg": signal.pg_weights,
        "anchor": signal.anchor_weights,
        "kl": signal.kl_weights,
        "ce": signal.ce_weights,
        "soft": soft,
    }
    used = {name: weights for name, weights in streams.items() if weights is not None}
    for name, weights in used.items():
        odd = next((w for w in weights if not w >= 0), None)
        if odd is not None:
            raise LearnerError(
                f"the {name} weights of rollout {signal.rollout.id} hold {odd}; expected 0 or more everywhere"
            )
    return used


def pack(
    signals: Sequence[TokenSignal], normalizer: Normalizer, *, pad_id: int, device: torch.device, dtype: torch.dtype
) -> MicroBatch:
    """Pad the rollouts to the right and list their signalled tokens."""
    input_ids, mask = pad_rollouts([s.rollout for s in signals], pad_id)
    rows, columns, positions, token_ids, advantages, self_weights = [], [], [], [], [], []
    weights: dict[str, list[float]] = {stream: [] for stream in STREAMS}
    target_ids: list[tuple[int, ...]] = []
    target_probs: list[tuple[float, ...]] = []
    for row, signal in enumerate(signals):
        streams = stream_weights(signal)
        soft = {t.position: t for t in signal.soft_targets or ()}
        start = len(signal.rollout.prompt.token_ids)
        for t, token_id in enumerate(signal.rollout.token_ids):
            if not any(stream[t] > 0 for stream in streams.values()):
                continue
            rows.append(row)
            columns.append(start + t - 1)
            positions.append(t)
            token_ids.append(token_id)
            advantages.append(signal.advantages[t] if signal.advantages is not None else 0.0)
            target = soft.get(t)
            target_ids.append(target.token_ids if target else ())
            target_probs.append(target.probs if target else ())
            self_weights.append(target.self_weight if target else 0.0)
            for stream in STREAMS:
                weights[stream].append(streams[stream][t] if stream in streams else 0.0)
    width = max((len(ids) for ids in target_ids), default=0)
    return MicroBatch(
        signals=tuple(signals),
        input_ids_BL=input_ids.to(device),
        attention_mask_BL=mask.to(device),
        rows_N=torch.tensor(rows, dtype=torch.long, device=device),
        columns_N=torch.tensor(columns, dtype=torch.long, device=device),
        positions_N=torch.tensor(positions, dtype=torch.long, device=device),
        token_ids_N=torch.tensor(token_ids, dtype=torch.long, device=device),
        weights={
            stream: torch.tensor(values, dtype=dtype, device=device) * normalizer.scale(stream)
            for stream, values in weights.items()
            if any(values)
        },
        advantages_N=torch.tensor(advantages, dtype=dtype, device=device),
        target_ids_NK=_ragged(target_ids, width, torch.long).to(device),
        target_probs_NK=_ragged(target_probs, width, dtype).to(device),
        self_weights_N=torch.tensor(self_weights, dtype=dtype, device=device),
    )


def pad_rollouts(rollouts: Sequence[Rollout], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return prompt plus completion of each rollout [B, L], padded to the right, and the attention mask."""
    return pad_sequences([r.prompt.token_ids + r.token_ids for r in rollouts], pad_id)


def pad_sequences(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the sequences [B, L], padded to the right, and the attention mask."""
    width = max(len(s) for s in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return input_ids, mask


def _ragged(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    filled = [list(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=dtype).reshape(len(rows), width)
