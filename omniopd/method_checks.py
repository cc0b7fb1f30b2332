"""What goes together in a run file: method, losses, rollouts and the kind of teacher. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.method import Method, Role
from omniopd.method_settings import LogprobSettings, RoutedSettings, VerifierSettings
from omniopd.parts import unknown
from omniopd.supervision.logprob import MiniLLM

if TYPE_CHECKING:
    from omniopd.learner.losses import TokenLoss

Access = Literal["hf", "vllm", "scores", "states"]
"""How the distributions of a teacher come: its weights here, a vLLM server, scores on disk, hidden states on disk."""
ACCESSES: tuple[Access, ...] = get_args(Access)


def access_of(spec: str) -> Access | None:
    """Return how the distributions of a teacher come, None where it gives text only."""
    kind = spec.partition(":")[0]
    return next((access for access in ACCESSES if access == kind), None)


def check_losses(losses: Mapping[str, Mapping[str, Any]], method: Method | None = None) -> None:
    """Validate `learner.losses`, and with a method that it can use them.

    Raises ConfigError naming the key and what is allowed.
    """
    from omniopd.learner.losses import build_losses  # Free of torch until a loss is computed.

    built = build_losses(losses)
    if method is not None:
        for part in method.parts:
            _check_alignment(built["kl"], part)
    if method is None or "kl" not in losses:
        return
    kind = losses["kl"]["type"]
    if not method.uses_divergence:
        raise ConfigError(
            f"learner.losses.kl: {kind} would never be used, because method.supervision feeds no divergence to a "
            "teacher; leave it out, or use method.supervision={type: logprob}"
        )
    is_minillm = any(isinstance(part.objective, MiniLLM) and part.uses_divergence for part in method.parts)
    if is_minillm and (kind != "reverse_kl" or losses["kl"].get("temperature", 1) != 1):
        raise ConfigError(
            f"learner.losses.kl: {kind} cannot be MiniLLM's single step, which is the reverse KL at temperature 1; "
            "leave it out, or set method.supervision.objective={type: minillm, single_step: false}"
        )
    if kind == "sampled_token" and any(set(part.authors) != {"student"} for part in method.parts):
        raise ConfigError(
            f"learner.losses.kl: {_as_written(built['kl'])} estimates from tokens that the student drew itself, but "
            f"method.supervision.authors is {method.authors}; use a full divergence such as reverse_kl, or "
            "authors={student: 1}"
        )


def _check_alignment(loss: TokenLoss, method: Method) -> None:
    """Refuse a divergence between vocabularies that the loss does not know how to compare."""
    settings = method.supervision
    if not isinstance(settings, LogprobSettings) or not method.uses_divergence:
        return
    written = _as_written(loss)
    if settings.alignment == "groups" and isinstance(method.objective, MiniLLM):
        raise ConfigError(
            "method.supervision.objective is minillm, whose single step compares token by token, but "
            "method.supervision.alignment is groups; set method.supervision.objective={type: minillm, single_step: "
            "false}, or objective: divergence with learner.losses.kl={type: hybrid}"
        )
    if settings.alignment == "groups" and loss.needs != "foreign_teacher":
        raise ConfigError(
            f"method.supervision.alignment is groups, but learner.losses.kl is {written}, which compares token by "
            "token; use learner.losses.kl={type: hybrid} or {type: uld}, or method.supervision.objective: sampled"
        )
    if settings.alignment == "none" and loss.needs == "foreign_teacher":
        raise ConfigError(
            f"learner.losses.kl is {written}, which compares groups of tokens, but "
            "method.supervision.alignment is none; set method.supervision.alignment: groups, or use a loss "
            "for one vocabulary such as reverse_kl"
        )


def _as_written(loss: Any) -> str:
    """Return a loss as a run file has it, with the settings that are not the default ones."""
    from omniopd.learner.losses import LOSSES

    name = next(name for name, part in LOSSES[loss.stream].items() if part is type(loss))
    values = {f.name: (getattr(loss, f.name), f.default) for f in dataclasses.fields(loss) if f.init}
    changed = [f"{key}: {value}" for key, (value, default) in values.items() if value != default]
    return "{" + ", ".join([f"type: {name}", *changed]) + "}"


def check_inputs(config: RunConfig, method: Method) -> None:
    """Refuse rollouts, data and teachers that the objective cannot use. Raises ConfigError naming what to change."""
    rollout = config.rollout
    loss = config.learner.losses.get("kl", {}).get("type")
    uses_samples = any(part.objective is not None and part.objective.uses_samples for part in method.parts)
    if (uses_samples or loss == "sampled_token") and (rollout.temperature != 1.0 or rollout.top_p != 1.0):
        key, value = ("temperature", rollout.temperature) if rollout.temperature != 1.0 else ("top_p", rollout.top_p)
        raise ConfigError(
            f"rollout.{key} is {value:g}: the objective estimates from sampled tokens, which then are not drawn from "
            f"the student's own distribution, and is biased; use {key} 1, or a divergence over the vocabulary "
            "(method.supervision.objective: divergence), which holds whatever was drawn"
        )
    if any(_rewards(part) for part in method.parts) and config.data.verifier == "none":
        raise ConfigError(
            "data.verifier is none, but method.supervision rewards right answers; use data.verifier: auto, or leave "
            "the verifier out of method.supervision"
        )
    stray = sorted(set(config.teachers) - set(method.routes))
    if stray:
        raise ConfigError(
            unknown(f"teachers.{stray[0]}", stray[0], method.routes, what="route")
            if method.routes
            else f"teachers.{stray[0]} is set, but only method.supervision.type: routed uses several teachers; use "
            "`teacher` for one"
        )
    kinds = {type(part.supervision) for part in method.parts}
    is_drawn = isinstance(method.supervision, RoutedSettings) and method.supervision.by == "weight"
    if is_drawn and len(kinds) > 1 and config.learner.aggregation == "token_mean":
        raise ConfigError(
            "learner.aggregation is token_mean, which divides each stream by its own tokens, so the weights of routes "
            "with other supervisions would mean nothing; use sequence_mean_token_sum"
        )
    for role in method.roles(config):
        if method.routes and role.method.needs_teacher and role.name not in config.teachers:
            if get_close_matches(role.name, config.teachers, n=1):
                path = f"method.supervision.routes.{role.name}"
                raise ConfigError(unknown(path, role.name, config.teachers, what="teacher"))
            raise ConfigError(
                f"method.supervision.routes.{role.name} asks a teacher, but there is no teachers.{role.name}; add it "
                "with its spec"
            )
        _check_role(role)


def _rewards(method: Method) -> bool:
    settings = method.supervision
    return isinstance(settings, VerifierSettings) or (
        isinstance(settings, LogprobSettings) and settings.verifier is not None
    )


def _check_role(role: Role) -> None:
    method, key = role.method, f"{role.label}.spec"
    settings = method.supervision
    if not isinstance(settings, LogprobSettings):
        return
    access = access_of(role.teacher.spec)
    if access is None:
        raise ConfigError(
            f"method.supervision.type logprob needs the teacher's distributions, and {role.teacher.spec!r} only gives "
            f"text; use {key}=hf:MODEL, vllm:MODEL@URL, scores:FOLDER or states:FOLDER, or "
            "method.supervision.type=chunked"
        )
    budgets = [f"budget_{unit}" for unit in ("usd", "tokens", "calls")]
    limit = next((name for name in budgets if getattr(role.teacher, name) is not None), None)
    if limit is not None and not method.needs_text_teacher:
        raise ConfigError(
            f"{role.label}.{limit} is {getattr(role.teacher, limit)}, but budgets are for teachers that are asked for "
            f"text, and {role.teacher.spec!r} is asked for log-probs, which nobody meters; leave {limit} out"
        )
    if access in ("scores", "states") and set(method.authors) != {"dataset"}:
        raise ConfigError(
            f"{key} is {role.teacher.spec!r}, what a teacher said of fixed answers, but method.supervision.authors is "
            f"{method.authors}; use authors={{dataset: 1}} with a divergence, or {key}=hf:MODEL"
        )
    if settings.alignment == "groups" and method.uses_divergence and access != "hf":
        raise ConfigError(
            f"learner.losses.kl compares whole distributions of two vocabularies, which need the teacher's weights, "
            f"but {key} is {role.teacher.spec!r}; use hf:MODEL, or method.supervision.objective: sampled"
        )
