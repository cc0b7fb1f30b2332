"""What a run will ask of its teacher, before anything is spent: calls, tokens, USD and time, each as a range.

The upper end is a bound while nothing has to be asked twice: every rollout at full length, every chunk audited as late
as it can lie, every continuation at its limit. The lower end is a guess that says so: rollouts a third as long as they
may be, chunks as early as they can lie, continuations half as long as they may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.method_settings import ChunkedSettings
from omniopd.types import Value

if TYPE_CHECKING:
    from omniopd.teachers.cards import Card
    from omniopd.teachers.probe import ProbeResult
    from omniopd.teachers.resolve import Target

LIKELY_LENGTH = 1 / 3
"""Of a rollout, as a share of the longest; for the lower end."""
LIKELY_CONTINUATION = 1 / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls(Value):
    """Teacher calls; tokens counted as the student's tokenizer would."""

    requests: int
    continuations: int
    output_tokens: int
    input_tokens: int

    def times(self, factor: int) -> Calls:
        return Calls(
            requests=self.requests * factor,
            continuations=self.continuations * factor,
            output_tokens=self.output_tokens * factor,
            input_tokens=self.input_tokens * factor,
        )

    def plus(self, other: Calls) -> Calls:
        return Calls(
            requests=self.requests + other.requests,
            continuations=self.continuations + other.continuations,
            output_tokens=self.output_tokens + other.output_tokens,
            input_tokens=self.input_tokens + other.input_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Value):
    """What a whole run will ask and cost."""

    teacher: str
    steps: int
    low: Calls
    high: Calls
    usd: tuple[float, ...] | None
    """(low, high); None when the price is unknown, which is not free."""
    price_source: str | None
    seconds: tuple[float, ...] | None
    """(low, high) that the teacher takes, the student's own time not counted; None when nobody has measured it."""
    seconds_source: str
    """Where the time comes from, or what would tell it."""


def estimate_step(
    config: RunConfig, method: Method, *, prompt_tokens: int, paid_per_sample: bool, thinking_tokens: int = 0
) -> tuple[Calls, Calls] | None:
    """Return the lower and the upper end of one step's calls; None when the method asks for no text.

    Args:
        config: the run.
        method: its parts.
        prompt_tokens: mean length of what is sent besides the student's text.
        paid_per_sample: the server has no `n`, so every sample pays for its prompt.
        thinking_tokens: hidden ones of each sample.

    Raises ConfigError when no chunk fits into a rollout.
    """
    if not method.needs_text_teacher:
        return None
    longest = config.rollout.max_tokens
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    settings = method.supervision
    if not isinstance(settings, ChunkedSettings):
        requests = rollouts if paid_per_sample else config.rollout.prompts_per_step
        ends = []
        for length in (math.ceil(longest * LIKELY_LENGTH), longest):
            ends.append(
                Calls(
                    requests=requests,
                    continuations=rollouts,
                    output_tokens=rollouts * (length + thinking_tokens),
                    input_tokens=prompt_tokens * requests,
                )
            )
        return ends[0], ends[1]
    size, most = chunk_shape(method)
    if longest < size:
        raise ConfigError(
            f"nothing could be audited: method.supervision.chunker.chunk_tokens is {size}, but rollout.max_tokens is "
            f"{longest}; expected chunks no longer than a rollout"
        )
    limit = settings.continuation_tokens or size
    copies = settings.num_continuations if paid_per_sample else 1

    def calls(length: int, continuation: int, *, is_late: bool) -> Calls:
        chunks = min(most, length // size)
        # m disjoint chunks of C tokens start on average at (m - 1) C / 2 when they open the rollout, and T - m C later
        # when they close it.
        start = (chunks - 1) * size / 2 + (length - chunks * size if is_late else 0)
        audits = rollouts * chunks
        return Calls(
            requests=audits * copies,
            continuations=audits * settings.num_continuations,
            output_tokens=audits * settings.num_continuations * (continuation + thinking_tokens),
            input_tokens=round(audits * copies * (prompt_tokens + start)),
        )

    likely = max(size, math.ceil(longest * LIKELY_LENGTH))
    low = calls(likely, math.ceil(limit * LIKELY_CONTINUATION), is_late=False)
    return low, calls(longest, limit, is_late=True)


def estimate_run(
    config: RunConfig,
    method: Method,
    target: Target,
    *,
    prompt_tokens: int,
    transport: str,
    probe: ProbeResult | None = None,
) -> Estimate | None:
    """Estimate a whole run; None when the method asks for no text.

    A probe of the teacher tells how long a request takes, how much it thinks and whether it takes `n`.
    """
    card = target.card
    found = probe.best if probe else None
    ignores_n = found is not None and found.honors_n is False
    paid_per_sample = not card.can.n or ignores_n
    thinking = round(found.thinking_tokens or 0) if found else card.thinking.headroom_tokens
    asked: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "paid_per_sample": paid_per_sample,
        "thinking_tokens": thinking,
    }
    step = estimate_step(config, method, **asked)
    if step is None:
        return None
    low, high = (end.times(config.steps) for end in step)
    probes = probe_calls(config, **asked)
    low, high = low.plus(probes[0]), high.plus(probes[1])
    at_once = card.can.batch_prompts if transport == "completions" else 1
    seconds, source = _seconds(config, card, low, high, found.seconds if found else None, at_once)
    price = target.price
    return Estimate(
        teacher=target.teacher_id,
        steps=config.steps,
        low=low,
        high=high,
        usd=None
        if price is None
        else (
            price.cost_usd(low.input_tokens, low.output_tokens),
            price.highest_cost_usd(high.input_tokens, high.output_tokens),
        ),
        price_source=target.found_price.source if target.found_price else None,
        seconds=seconds,
        seconds_source=source,
    )


def probe_calls(
    config: RunConfig, *, prompt_tokens: int, paid_per_sample: bool, thinking_tokens: int
) -> tuple[Calls, Calls]:
    """Return the lower and the upper end of all prefix probes of a run; nothing where they are off."""
    settings, rollout = config.diagnostics.prefix_probe, config.rollout
    steps = range(1, config.steps + 1) if settings.every else ()
    num_probes = sum(s % settings.every == 0 or s in (1, config.steps) for s in steps)
    num_rollouts = min(settings.max_rollouts, rollout.prompts_per_step * rollout.group_size)
    prefixes = num_probes * num_rollouts * (len(set(settings.fractions)) + len(set(settings.positions)))
    answers = prefixes * settings.num_continuations
    requests = answers if paid_per_sample else prefixes
    limit = settings.max_tokens or rollout.max_tokens

    def calls(answer_tokens: int, prefix_tokens: int) -> Calls:
        return Calls(
            requests=requests,
            continuations=answers,
            output_tokens=answers * (answer_tokens + thinking_tokens),
            input_tokens=requests * (prompt_tokens + prefix_tokens),
        )

    return calls(math.ceil(limit * LIKELY_CONTINUATION), 0), calls(limit, rollout.max_tokens)


def chunk_shape(method: Method) -> tuple[int, int]:
    """Return C and M of the chunker."""
    return int(getattr(method.chunker, "chunk_tokens", 1)), int(getattr(method.chunker, "max_chunks", 1))


def _seconds(
    config: RunConfig, card: Card, low: Calls, high: Calls, latency: float | None, prompts_at_once: int
) -> tuple[tuple[float, float] | None, str]:
    """Bound the time from below by the latency at full concurrency and by the rates that are allowed."""
    settings, limits = config.teacher, card.limits
    in_flight = min(settings.max_concurrency, limits.max_in_flight or settings.max_concurrency)
    at_once = in_flight * prompts_at_once
    rates = [r for r in (settings.requests_per_minute, limits.requests_per_minute) if r]
    token_rates = [r for r in (settings.tokens_per_minute, limits.tokens_per_minute) if r]

    def slowest(calls: Calls) -> float:
        waits = [60.0 * calls.requests / min(rates)] if rates else []
        waits += [60.0 * (calls.input_tokens + calls.output_tokens) / min(token_rates)] if token_rates else []
        waits += [latency * math.ceil(calls.requests / at_once)] if latency else []
        return max(waits)

    if latency is None and not rates and not token_rates:
        return None, f"unknown until it is measured: omniopd teachers check {settings.spec}"
    source = f"{latency:.2f} s a request, {at_once} at a time" if latency else "the allowed rate alone"
    return (slowest(low), slowest(high)), source
