"""The objective of a run in words, from its resolved settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniopd.config import MethodConfig

_SUPERVISION = {
    "chunked": (
        "The teacher is asked in text only: at the audited chunks of a rollout it continues the student's own prefix, "
        "without seeing what the student wrote there."
    ),
    "logprob": "The teacher's weights are open: it gives its own distribution for every token of the student's text.",
    "verifier": "No teacher is asked: the reference answers decide.",
    "imitation": "The teacher writes whole answers, and the student learns to write the same.",
}
_AGGREGATION = {
    "sequence_mean_token_sum": "Token losses are summed within a rollout and averaged over rollouts, as published.",
    "token_mean": "Token losses are averaged over all tokens of a step.",
}


def describe_objective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `text`, a few sentences, and `parts`, every named part with its settings as the run file has them.

    A method that this version cannot build (a run of another version) is described by its settings alone.
    """
    method = config.get("method") or {}
    learner = config.get("learner") or {}
    supervision = method.get("supervision") or {}
    text = [*_in_words(method), _SUPERVISION.get(str(supervision.get("type", "chunked")), "")]
    text.append(_AGGREGATION.get(str(learner.get("aggregation")), ""))
    if learner.get("learning_rate") is not None:
        text.append(
            f"Learning rate {learner['learning_rate']:g}, {learner.get('schedule', 'constant')} after "
            f"{learner.get('warmup_steps', 0)} warm-up steps; gradients are clipped at norm "
            f"{learner.get('max_grad_norm', 1.0):g}."
        )
    parts = [("supervision", _settings(supervision))]
    parts += [(f"transform {i}", _settings(part)) for i, part in enumerate(method.get("transforms") or (), start=1)]
    parts += [(f"loss of {stream}", _settings(part)) for stream, part in (learner.get("losses") or {}).items()]
    return {"text": [line for line in text if line], "parts": [part for part in parts if part[1]]}


def _in_words(method: Mapping[str, Any]) -> list[str]:
    from omniopd.method import build_method

    try:
        words = build_method(MethodConfig.model_validate(method)).in_words()
    except ValueError:  # ConfigError and pydantic's ValidationError alike
        return []
    return [words[:1].upper() + words[1:]]


def _settings(part: Any) -> str:
    """Write a part as `name(key value, key value)`, nested parts likewise."""
    if not isinstance(part, Mapping):
        return "none" if part is None else f"{part:g}" if isinstance(part, float) else str(part)
    rest = ", ".join(f"{key} {_settings(value)}" for key, value in part.items() if key != "type")
    name = str(part.get("type", ""))
    return f"{name}({rest})" if rest else name
