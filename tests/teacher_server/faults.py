"""What goes wrong, how often, and what a fault makes of an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Literal

from .asked import Asked, Sample
from .world import Handed, write

FAULTS = (
    "429",
    "429-bare",
    "500",
    "503",
    "529",
    "hang",
    "reset",
    "reset-mid",
    "truncated",
    "slow",
    "refusal",
    "refusal-words",
    "empty-thinking",
    "fewer",
    "more",
    "echo",
    "partial-echo",
    "preamble",
    "fence",
)
"""429 names a wait and 429-bare does not; `hang` never answers; `reset` breaks the connection before the headers and
`reset-mid` within the body; `truncated` is JSON that stops half way in a complete HTTP answer; `slow` answers `slow_s`
later. The rest changes what the model says; the last four only where an instruction is all that keeps it from that."""

ON_THE_WIRE = frozenset(FAULTS[: FAULTS.index("slow")])
"""No complete answer comes of these."""

REFUSAL = "I'm sorry, but I can't help with that."
PREAMBLE = "Sure, here is the continuation:\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the server behaves."""

    latency_s: float = 0.0
    faults: Mapping[str, float] = field(default_factory=dict)
    """Probability of each of FAULTS; their sum is at most 1."""
    seed: int = 0
    """Of the faults."""
    key: str | None = "test-key"
    """The key that is accepted; None: no key is asked for."""
    mode: Literal["ok", "quota", "auth"] = "ok"
    """`quota`: nothing is left of it; `auth`: the key was withdrawn."""
    retry_after_s: float = 0.05
    slow_s: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Input and the output that is asked for, as providers count it up front."""
    window_s: float = 60.0
    """Over which the limits per minute hold, as a sliding window: 600 per minute over 1 s are 10 in any second."""
    max_in_flight: int | None = None
    max_context_tokens: int | None = None
    thinking_tokens: int = 0
    """Spent on every sample before its text, unless the request switches thinking off."""
    honors_n: bool = True
    repeats: Literal["same", "fresh"] = "same"
    """Without a seed, the same request gives the same samples, or those that follow the ones it already gave."""
    corpus: Mapping[str, str] = field(default_factory=dict)
    """Known answers by the text of the last turn."""
    batch_delay_s: float = 0.0
    input_usd_per_mtok: float = 1.0
    output_usd_per_mtok: float = 4.0

    def __post_init__(self) -> None:
        if unknown := set(self.faults) - set(FAULTS):
            raise ValueError(f"there are no faults {sorted(unknown)}; there are {', '.join(FAULTS)}")
        if not all(share >= 0 for share in self.faults.values()) or sum(self.faults.values()) > 1 + 1e-9:
            raise ValueError(f"faults must be probabilities with a sum of at most 1, got {dict(self.faults)}")


def draw_fault(settings: Settings, body_hash: str, times_seen: int) -> str | None:
    """Decide what goes wrong with a request that came `times_seen` times before; None: nothing."""
    if not settings.faults:
        return None
    digest = blake2b(f"{settings.seed}:{body_hash}:{times_seen}".encode(), digest_size=8).digest()
    left = int.from_bytes(digest, "big") / 2**64
    for name in FAULTS:
        left -= settings.faults.get(name, 0.0)
        if left < 0:
            return name
    return None


def applies(fault: str | None, asked: Asked) -> bool:
    """Whether the model can go wrong in this way on this request at all."""
    if fault in ("echo", "partial-echo"):
        return asked.prompts[0].is_instructed and bool(asked.prompts[0].sent)
    if fault in ("preamble", "fence"):
        return asked.prompts[0].is_instructed and asked.schema_field is None
    if fault in ("fewer", "more"):
        return asked.honors_n
    return fault is not None


def make_samples(asked: Asked, settings: Settings, fault: str | None, first: int) -> list[Sample]:
    """Write all choices of a request, those of its first prompt first. `first` numbers the samples without a seed."""
    n = asked.n if asked.honors_n and settings.honors_n else 1
    if fault == "fewer":
        n -= 1
    elif fault == "more":
        n += 1
    made = []
    for handed, seed in zip(asked.prompts, asked.seeds, strict=True):
        for i in range(n):
            number = 0 if asked.is_greedy else first + i
            made.append(_sample(asked, settings, fault, handed, None if asked.is_greedy else seed, number))
    return made


def _sample(
    asked: Asked, settings: Settings, fault: str | None, handed: Handed, seed: int | None, number: int
) -> Sample:
    if fault == "refusal":
        return Sample(text="", tokens=1, finish="content_filter", refusal=REFUSAL)
    if fault == "refusal-words":
        return _stopped(asked, Sample(text=_worded(asked, REFUSAL), tokens=8))
    limit = asked.max_tokens
    thinking = settings.thinking_tokens if asked.thinks else 0
    if fault == "empty-thinking" or (limit is not None and 0 < limit <= thinking):
        return Sample(text="", tokens=0, finish="length", thinking_tokens=limit or 100)
    room = None if limit is None else limit - thinking
    written = write(handed.turns, handed.sent, number, room, seed=seed, corpus=settings.corpus)
    text = written.text
    if fault == "echo" or asked.echoes:
        text = handed.sent + text
    elif fault == "partial-echo":
        text = handed.sent[-max(12, len(handed.sent) // 3) :] + text
    elif fault == "preamble":
        text = PREAMBLE + text.lstrip()
    elif fault == "fence":
        text = f"```\n{text}\n```"
    finish = "stop" if written.is_finished else "length"
    plain = Sample(
        text=_worded(asked, text, is_cut=not written.is_finished),
        tokens=written.tokens,
        finish=finish,
        thinking_tokens=thinking,
    )
    return _stopped(asked, plain)


def _worded(asked: Asked, text: str, *, is_cut: bool = False) -> str:
    if asked.schema_field is None:
        return text
    whole = json.dumps({asked.schema_field: text}, ensure_ascii=False)
    # The length limit cuts the JSON, not the text in it.
    return whole.removesuffix('"}') if is_cut else whole


def _stopped(asked: Asked, sample: Sample) -> Sample:
    found = [(at, stop) for stop in asked.stop if (at := sample.text.find(stop)) >= 0]
    if not found:
        return sample
    at, stop = min(found)
    return replace(sample, text=sample.text[:at], finish="sequence", stop_sequence=stop)
