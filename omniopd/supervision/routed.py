"""Several teachers: every prompt goes to one of them, with all its rollouts."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from omniopd.errors import ConfigError
from omniopd.supervision.base import Supervision
from omniopd.types import Prompt, Rollout, StepContext, TokenSignal


class Route(Protocol):
    """Chooses a teacher."""

    def __call__(self, prompt: Prompt, ctx: StepContext) -> str:
        """Return the name of the route. The same for all rollouts of a prompt at a step."""
        ...


@dataclass(frozen=True, kw_only=True)
class ByColumn:
    """By what the data says of the prompt."""

    column: str
    """`teacher_id` or `domain`."""
    names: Mapping[str, str]
    """Value of the column -> route."""
    default: str | None = None
    """The route of all others."""

    def __call__(self, prompt: Prompt, ctx: StepContext) -> str:
        """Raise ConfigError for a prompt that no route is for."""
        value = getattr(prompt, self.column)
        found = self.names.get(value) if value is not None else None
        if found is None and self.default is None:
            raise ConfigError(f"prompt {prompt.id} has no route: {self._problem([value])}")
        return found or self.default or ""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError for prompts that no route is for, before anything is spent."""
        if self.default is not None:
            return
        values = Counter(getattr(prompt, self.column) for prompt in prompts)
        lost = {value: count for value, count in values.items() if value not in self.names}
        if lost:
            raise ConfigError(
                f"{sum(lost.values()):,} of {len(prompts):,} prompts have no route: {self._problem(list(lost))}"
            )

    def _problem(self, values: Sequence[str | None]) -> str:
        seen = ", ".join("none" if value is None else repr(value) for value in values[:3])
        known = ", ".join(map(repr, self.names))
        return (
            f"{self.column} is {seen}, the routes are for {known}; add a route, fix the column, or set "
            "method.supervision.default"
        )


@dataclass(frozen=True, kw_only=True)
class ByWeight:
    """Drawn with probabilities proportional to the weights, seeded by run, step and prompt.

    With `learner.aggregation: sequence_mean_token_sum` the step's loss is in expectation the weighted mean of what each
    teacher alone would make of all prompts, at the price of asking one. With `token_mean` every stream is a mean over
    its own tokens, so teachers that feed different streams count alike whatever their weights.
    """

    weights: Mapping[str, float]
    """Route -> weight above 0."""

    def __call__(self, prompt: Prompt, ctx: StepContext) -> str:
        digest = hashlib.blake2b(f"route\0{ctx.seed}\0{ctx.step}\0{prompt.id}".encode(), digest_size=8).digest()
        point = int.from_bytes(digest, "big") / 2**64 * sum(self.weights.values())
        for name, weight in self.weights.items():
            point -= weight
            if point < 0:
                return name
        return name  # Rounding left the point at the very end.

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt has a route."""


@dataclass(frozen=True, kw_only=True)
class RoutedSupervision:
    """Hands each teacher's supervision its rollouts and puts the signals back in order."""

    route: Route
    supervisions: Mapping[str, Supervision]

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Return one signal for each rollout.

        Raises what the parts raise, and ConfigError for a prompt without a route.
        """
        places: dict[str, list[int]] = defaultdict(list)
        for place, rollout in enumerate(rollouts):
            places[self.route(rollout.prompt, ctx)].append(place)
        found: dict[int, TokenSignal] = {}
        for name, supervision in self.supervisions.items():
            if mine := places[name]:
                signals = await supervision.signals([rollouts[place] for place in mine], ctx)
                found |= dict(zip(mine, signals, strict=True))
        return [found[place] for place in range(len(rollouts))]
