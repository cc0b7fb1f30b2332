"""What a run is made from: its prompts and verifier, its teacher in text or in weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.models import resolve_model, room_for_prompts
from omniopd.run_folder import RunFolder
from omniopd.teachers.metered import MeteredTeacher
from omniopd.types import Prompt

if TYPE_CHECKING:
    from omniopd.behavior.base import Verifier
    from omniopd.learner.policy import LanguageModel, Policy


def check_teacher(config: RunConfig, method: Method) -> None:
    """Refuse teachers that cannot serve the method, before anything is loaded."""
    is_weights = config.teacher.spec.startswith("hf:")
    if method.needs_teacher_weights and not is_weights:
        raise ConfigError(
            f"method.supervision.type logprob needs the teacher's weights, and {config.teacher.spec!r} only gives "
            "text; use teacher.spec=hf:MODEL, or method.supervision.type=chunked"
        )
    if method.needs_text_teacher and config.teacher.serve is not None:
        served = f"local:{Path(resolve_model(config.teacher.serve)).name}"
        if config.teacher.spec != served:
            raise ConfigError(
                f"teacher.serve starts a server for {config.teacher.serve!r}, which answers to teacher.spec "
                f"{served!r}, but teacher.spec is {config.teacher.spec!r}; use {served} or leave teacher.serve out"
            )
    if method.needs_text_teacher and is_weights:
        model = config.teacher.spec.removeprefix("hf:")
        raise ConfigError(
            f"teacher.spec {config.teacher.spec!r} loads weights, and this method asks for text; use "
            f"teacher.serve={model} with teacher.spec=local:{Path(model).name}, or method.supervision.type=logprob"
        )


def load_prompts(
    config: RunConfig, policy: Policy, say: Callable[[str], None]
) -> tuple[Verifier | None, tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Return the verifier, the training prompts and the held-out prompts (none when evaluation is off)."""
    from omniopd.data import load_rows
    from omniopd.templates import build_prompts
    from omniopd.verify import get_verifier

    data = config.data
    longest_answer = max(config.rollout.max_tokens, config.eval.max_tokens or 0 if data.eval is not None else 0)
    room = room_for_prompts(policy.model.config, longest_answer, data.max_prompt_tokens)

    def prompts_of(source: str, split: str, limit: int | None) -> tuple[tuple[Prompt, ...], bool]:
        rows = load_rows(source, split=split, max_prompts=limit, on_bad_row=data.on_bad_row)
        for place, reason in rows.skipped[:3]:
            say(f"skipped {place}: {reason}")
        built = build_prompts(
            rows,
            policy.tokenizer,
            prompt_template=data.prompt_template,
            system_prompt=data.system_prompt,
            max_prompt_tokens=room,
        )
        left_out = f", {len(rows.skipped)} malformed rows skipped" if rows.skipped else ""
        left_out += f", {built.too_long} too long" if built.too_long else ""
        say(f"{source}: {len(built.prompts)} prompts{left_out}")
        return built.prompts, rows.has_answers

    training, has_answers = prompts_of(data.train, data.split, data.max_prompts)
    if data.eval is None:
        return get_verifier(data.verifier, source=data.train, has_answers=has_answers), training, ()
    held_out, can_verify = prompts_of(data.eval, data.eval_split, config.eval.num_problems)
    if not can_verify:
        raise ConfigError(f"data.eval {data.eval!r} has no answers, so nothing can be measured; set data.eval to null")
    return get_verifier(data.verifier, source=data.eval, has_answers=True), training, held_out


def open_text_teacher(config: RunConfig, method: Method, folder: RunFolder, stack: ExitStack) -> MeteredTeacher | None:
    """Open the text teacher, starting its server first where the config asks for one."""
    if not method.needs_text_teacher:
        return None
    from omniopd.teachers.resolve import open_teacher

    settings = config.teacher
    spec = settings.spec
    tokenizer_path = Path(resolve_model(settings.tokenizer)) if settings.tokenizer is not None else None
    if settings.serve is not None:
        from omniopd.teachers.local_server import LocalTeacherServer

        model = resolve_model(settings.serve)
        server = LocalTeacherServer(Path(model), log=folder.teacher_server_log, threads=config.threads)
        stack.enter_context(server)
        spec = f"{spec}@{server.base_url}"
        tokenizer_path = tokenizer_path or Path(model)
    teacher = open_teacher(
        spec,
        temperature=settings.temperature,
        top_p=settings.top_p,
        continuation=settings.continuation,
        max_concurrency=settings.max_concurrency,
        timeout_s=settings.timeout_s,
        max_attempts=settings.max_attempts,
        budget_usd=settings.budget_usd,
        ledger=folder.ledger,
        extra_body=settings.extra_body,
        tokenizer_path=tokenizer_path,
    )
    return MeteredTeacher(teacher)


def load_teacher_weights(config: RunConfig, method: Method, policy: Policy) -> LanguageModel | None:
    """Load the open-weight teacher of the logit path.

    Raises ConfigError when its vocabulary gives the student's tokens other ids: the divergence would compare unrelated
    tokens.
    """
    if not method.needs_teacher_weights:
        return None
    from omniopd.learner.policy import load_frozen
    from omniopd.models import load_tokenizer

    name = config.teacher.spec.removeprefix("hf:")
    ours, theirs = policy.tokenizer.get_vocab(), load_tokenizer(name).get_vocab()
    strangers = [token for token, i in ours.items() if theirs.get(token) != i]
    if strangers:
        raise ConfigError(
            f"{len(strangers):,} of the student's {len(ours):,} tokens, e.g. {strangers[0]!r}, have another id or "
            f"none in the vocabulary of {name!r}: the logit path needs one vocabulary; use "
            "method.supervision.type: chunked"
        )
    return load_frozen(name, device=config.student.device, dtype=config.student.dtype)
