"""Which prompts a step works on: shuffled, in order, or near the student's frontier. Standard library only.

A source without feedback is a function of the step, so a resumed run needs no state for it. What a prompt looks like
is decided elsewhere (`omniopd.templates`).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from omniopd.errors import ConfigError, DataError
from omniopd.types import FinishReason, Prompt, Rollout


class PromptSource(Protocol):
    """Where a step's prompts come from."""

    def draw(self, step: int, count: int) -> tuple[Prompt, ...]:
        """Return the `count` prompts of step `step`.

        Epochs follow each other without a gap, so a draw may straddle two of them and then hold a prompt twice.
        """
        ...


@runtime_checkable
class LearnsFromRollouts(Protocol):
    """A source that looks at outcomes, and so has a state to save."""

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Take note of a step's verified rollouts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state. Raises DataError when it belongs to other prompts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffledPrompts:
    """Draw every prompt once an epoch, in an order that depends on the seed and the epoch alone."""

    prompts: tuple[Prompt, ...]
    seed: int

    def __post_init__(self) -> None:
        _require_prompts(self.prompts)

    def draw(self, step: int, count: int) -> tuple[Prompt, ...]:
        start = _start(step, count)
        return tuple(self.at(position) for position in range(start, start + count))

    def at(self, position: int) -> Prompt:
        """Return the prompt at a position of the endless stream of epochs."""
        epoch, place = divmod(position, len(self.prompts))
        return self.prompts[_permutation(len(self.prompts), self.seed, epoch)[place]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialPrompts:
    """Draw the prompts in the order of the data, over and over. Deterministic."""

    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        _require_prompts(self.prompts)

    def draw(self, step: int, count: int) -> tuple[Prompt, ...]:
        start = _start(step, count)
        return tuple(self.prompts[position % len(self.prompts)] for position in range(start, start + count))


class FrontierPrompts:
    """Prefer prompts that the student solves about half of the time; there a group of rollouts says most.

    Walks the stream of `ShuffledPrompts` and passes over a prompt with probability 1 - max(floor, 4 p (1 - p)), where
    p is its pass rate so far. A prompt that was never observed is always taken, so without observations this is
    `ShuffledPrompts`. Deterministic in the seed and the observations. Draw once for each step, in order.

    Args:
        prompts: All prompts, with distinct ids.
        seed: Of the shuffle and of passing over.
        floor: In (0, 1]. How often a prompt that is always or never solved is still taken; 1 is `ShuffledPrompts`.
        decay: In [0, 1]. How much of the older evidence counts when a prompt is observed again; the student changes.

    Source: the learnability weight p (1 - p) of prioritised sampling, as in arXiv:2504.03380 (online difficulty
        filtering). Differs: rejection from a shuffled stream, with a floor, in place of a hard band.
    """

    def __init__(self, *, prompts: tuple[Prompt, ...], seed: int, floor: float = 0.1, decay: float = 0.5) -> None:
        if not 0 < floor <= 1:
            raise ConfigError(f"floor is {floor}; expected a share above 0 and at most 1")
        if not 0 <= decay <= 1:
            raise ConfigError(f"decay is {decay}; expected a share from 0 to 1")
        self.stream = ShuffledPrompts(prompts=prompts, seed=seed)
        self.floor = floor
        self.decay = decay
        self._evidence: dict[str, tuple[float, float]] = {}
        self._passed_over = 0
        self._known = frozenset(prompt.id for prompt in prompts)
        if len(self._known) != len(prompts):
            raise DataError(f"{len(prompts)} prompts share {len(self._known)} ids; outcomes need distinct ones")

    def pass_rate(self, prompt_id: str) -> float | None:
        """Return the discounted share of correct rollouts, in [0, 1]; None when there are no observations."""
        passes, trials = self._evidence.get(prompt_id, (0.0, 0.0))
        return passes / trials if trials > 0 else None

    def draw(self, step: int, count: int) -> tuple[Prompt, ...]:
        position = _start(step, count) + self._passed_over
        drawn: list[Prompt] = []
        while len(drawn) < count:
            prompt = self.stream.at(position)
            if self._takes(prompt, position):
                drawn.append(prompt)
            else:
                self._passed_over += 1
            position += 1
        return tuple(drawn)

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Take note of verified rollouts; those without a verdict and aborted ones say nothing."""
        outcomes: dict[str, list[bool]] = {}
        for rollout in rollouts:
            if rollout.is_correct is not None and rollout.finish_reason is not FinishReason.ABORT:
                outcomes.setdefault(rollout.prompt.id, []).append(rollout.is_correct)
        for prompt_id, verdicts in outcomes.items():
            passes, trials = self._evidence.get(prompt_id, (0.0, 0.0))
            self._evidence[prompt_id] = (self.decay * passes + sum(verdicts), self.decay * trials + len(verdicts))

    def state_dict(self) -> dict[str, Any]:
        return {
            "passed_over": self._passed_over,
            "evidence": {key: list(value) for key, value in self._evidence.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        unknown = sorted(set(state["evidence"]) - self._known)
        if unknown:
            raise DataError(
                f"the saved prompt sampler knows {len(unknown)} prompts that the data lacks (e.g. {unknown[0]}); "
                "resume with the data and the prompt settings of the first run"
            )
        self._passed_over = int(state["passed_over"])
        self._evidence = {key: (float(passes), float(trials)) for key, (passes, trials) in state["evidence"].items()}

    def _takes(self, prompt: Prompt, position: int) -> bool:
        rate = self.pass_rate(prompt.id)
        if rate is None:
            return True
        return random.Random(f"{self.stream.seed}:take:{position}").random() < max(self.floor, 4 * rate * (1 - rate))


SAMPLERS: dict[str, Callable[..., PromptSource]] = {
    "shuffled": ShuffledPrompts,
    "sequential": SequentialPrompts,
    "frontier": FrontierPrompts,
}


def check_sampler(spec: Mapping[str, Any]) -> tuple[Callable[..., PromptSource], dict[str, Any]]:
    """Return the sampler that `spec` names and its settings. Raises ConfigError as `build_sampler` does."""
    kind = spec.get("type")
    if not isinstance(kind, str) or kind not in SAMPLERS:
        raise ConfigError(f"data.sampler.type is {kind!r}; {_expected(str(kind), SAMPLERS)}")
    sampler = SAMPLERS[kind]
    parameters = set(inspect.signature(sampler).parameters)
    settings = {key: value for key, value in spec.items() if key != "type"}
    for key, value in settings.items():
        allowed = parameters - {"prompts", "seed"}
        if key not in allowed:
            raise ConfigError(
                f"data.sampler has no key {key!r} for type {kind!r}; {_expected(key, allowed | {'type'})}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"data.sampler.{key} is {value!r}; expected a number")
    return sampler, settings


def build_sampler(spec: Mapping[str, Any], prompts: Sequence[Prompt], seed: int) -> PromptSource:
    """Make the prompt sampler that `data.sampler` names, e.g. `{type: frontier, floor: 0.2}`.

    Raises ConfigError for an unknown type or key, naming the nearest, and for a value that is no number in range.
    """
    sampler, settings = check_sampler(spec)
    if "seed" in inspect.signature(sampler).parameters:
        settings["seed"] = seed
    return sampler(prompts=tuple(prompts), **settings)


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return tuple(order)


def _start(step: int, count: int) -> int:
    if step < 0 or count < 1:
        raise ConfigError(f"cannot draw {count} prompts for step {step}; expected 1 or more for a step from 0")
    return step * count


def _require_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise DataError("there are no prompts to draw from")


def _expected(name: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    near = get_close_matches(name, names, n=1)
    return f"expected {', '.join(names) or 'no keys'}" + (f"; did you mean {near[0]!r}?" if near else "")
