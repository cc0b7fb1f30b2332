"""Several supervisions at once: advantages add up, other streams stand side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omniopd.errors import ConfigError
from omniopd.supervision.base import Supervision
from omniopd.types import Rollout, StepContext, TokenSignal

_OTHER_STREAMS = ("anchor_weights", "kl_weights", "ce_weights", "soft_targets")
_OF_KL = ("kl_teacher", "kl_evidence", "unscored")


@dataclass(frozen=True)
class SummedSupervision:
    """advantage = sum of weight * advantage over the parts, e.g. a teacher's logprobs plus a verifier's reward.

    A token is trained on when one of the parts trains on it; the others count as 0 there.
    Source: arXiv 2604.13016 (its optional sum with GRPO advantages, weight 1).
    """

    parts: tuple[tuple[float, Supervision], ...]
    """(weight of the advantages, supervision); other streams are taken over as they are."""

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Raise ConfigError when two parts use the same stream other than the policy gradient."""
        columns = [(weight, await part.signals(rollouts, ctx)) for weight, part in self.parts]
        return [_merge(r, [(weight, signals[i]) for weight, signals in columns]) for i, r in enumerate(rollouts)]


def _merge(rollout: Rollout, parts: Sequence[tuple[float, TokenSignal]]) -> TokenSignal:
    fields: dict[str, Any] = {}
    for name in _OTHER_STREAMS:
        found = [value for _, signal in parts if (value := getattr(signal, name)) is not None]
        if len(found) > 1:
            raise ConfigError(f"two supervisions of one run use {name}; only advantages can be added up")
        fields[name] = found[0] if found else None
    # At most one part feeds the stream; what belongs to it goes with it.
    for name in _OF_KL:
        fields[name] = next((value for _, signal in parts if (value := getattr(signal, name)) is not None), None)
    advantages = [0.0] * rollout.num_tokens
    weights = [0.0] * rollout.num_tokens
    has_advantages = False
    for factor, signal in parts:
        if signal.advantages is None or signal.pg_weights is None:
            continue
        has_advantages = True
        for t, (advantage, weight) in enumerate(zip(signal.advantages, signal.pg_weights, strict=True)):
            advantages[t] += factor * weight * advantage
            weights[t] = max(weights[t], float(weight > 0))
    if has_advantages:
        fields |= {"advantages": tuple(advantages), "pg_weights": tuple(weights)}
    first = dataclasses.replace(parts[0][1], audits=(), notes=())
    return dataclasses.replace(
        first,
        **fields,
        audits=tuple(a for _, s in parts for a in s.audits),
        notes=tuple(n for _, s in parts for n in s.notes),
    )
