"""What a run is made from: its prompts and verifier, its text teachers. Open-weight ones are in `logit_teachers`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.config import DataConfig, RunConfig, TeacherConfig
from omniopd.errors import ConfigError, TeacherResponseError
from omniopd.method import Method, Role
from omniopd.models import resolve_model, room_for_prompts
from omniopd.run_folder import RunFolder, read_json, write_json_atomic
from omniopd.spending import probe_cache, probe_key, shares_vocabulary, teacher_tokenizer
from omniopd.supervision.routed import ByColumn, ByWeight
from omniopd.teachers.base import Teacher
from omniopd.teachers.in_process import weights_identity
from omniopd.teachers.metered import MeteredTeacher
from omniopd.teachers.probe import Encode, ProbeResult, probe_teacher, summarize_probe
from omniopd.teachers.resolve import (
    LOCAL_DIALECTS,
    Target,
    find_target,
    open_teacher,
    prompt_encoder,
    refuse_keys,
    ways_to_ask,
)
from omniopd.types import Message, Prompt

if TYPE_CHECKING:
    from omniopd.behavior.base import Verifier
    from omniopd.data import Row
    from omniopd.learner.policy import Policy
    from omniopd.teachers.cards import Transport


def check_teachers(config: RunConfig, method: Method) -> None:
    """Refuse teachers that cannot serve the method, before anything is loaded."""
    for role in method.roles(config):
        teacher = role.teacher
        if role.method.needs_text_teacher and teacher.serve is not None:
            served = f"local:{Path(resolve_model(teacher.serve)).name}"
            if teacher.spec != served:
                raise ConfigError(
                    f"{role.label}.serve starts a server for {teacher.serve!r}, which answers to spec {served!r}, but "
                    f"{role.label}.spec is {teacher.spec!r}; use {served} or leave {role.label}.serve out"
                )
        refuse_keys(role.label, teacher.model_dump(mode="json"))


def check_folders(config: RunConfig, method: Method) -> None:
    """Refuse a folder of scores or hidden states that is not there or holds something else."""
    from omniopd.logits.score_folder import check_stored

    for role in method.roles(config):
        if role.method.needs_distributions:
            check_stored(role.teacher.spec)


def check_routes(route: ByColumn | ByWeight | None, rows: Sequence[Row], source: str) -> None:
    """Refuse data with prompts that no teacher is for. Raises ConfigError."""
    if not isinstance(route, ByColumn) or route.default is not None:
        return
    if all(getattr(row, route.column) is None for row in rows):
        raise ConfigError(
            f"method.supervision.by is {route.column}, but no row of data.train ({source}) has a column "
            f"{route.column!r}; add it, set method.supervision.default, or use method.supervision.by: weight"
        )
    route.check(
        [
            Prompt(
                id=row.source,
                messages=row.messages,
                text="",
                token_ids=(),
                teacher_id=row.teacher_id,
                domain=row.domain,
            )
            for row in rows
        ]
    )


def load_prompts(
    config: RunConfig, policy: Policy, say: Callable[[str], None]
) -> tuple[Verifier | None, tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Return the verifier, the training prompts and the held-out prompts (none when evaluation is off)."""
    from omniopd.data import load_rows
    from omniopd.templates import build_prompts
    from omniopd.verify import get_verifier

    data = config.data
    limits = {"rollout.max_tokens": config.rollout.max_tokens}
    if data.eval is not None and config.eval.max_tokens is not None:
        limits["eval.max_tokens"] = config.eval.max_tokens
    key = max(limits, key=limits.__getitem__)
    room = room_for_prompts(policy.model.config, limits[key], data.max_prompt_tokens, key=key)

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


def read_responses(data: DataConfig) -> dict[tuple[Message, ...], str]:
    """Return the worked responses of the training data by conversation, the first where one comes twice."""
    from omniopd.data import load_rows
    from omniopd.templates import apply_prompt_options

    found: dict[tuple[Message, ...], str] = {}
    for row in load_rows(data.train, split=data.split, max_prompts=data.max_prompts, on_bad_row=data.on_bad_row).rows:
        if row.response:
            asked = apply_prompt_options(
                row.messages, prompt_template=data.prompt_template, system_prompt=data.system_prompt
            )
            found.setdefault(asked, row.response)
    return found


def open_text_teacher(
    role: Role, config: RunConfig, folder: RunFolder, stack: ExitStack, say: Callable[[str], None]
) -> MeteredTeacher | None:
    """Open the text teacher of a role, starting its server first where the config asks for one, and probe it.

    Returns None when the role asks for no text. Raises what the probe raises, and TeacherResponseError when the teacher
    gives no usable continuation at all.
    """
    if not role.method.needs_text_teacher:
        return None
    config, files = role.alone(config), folder.teacher(role.folder)
    files.path.mkdir(parents=True, exist_ok=True)
    is_new = folder.has_never_begun
    settings = config.teacher
    spec = settings.spec
    tokenizer = teacher_tokenizer(settings)
    tokenizer_path = None if tokenizer is None else Path(resolve_model(tokenizer))
    # What the run serves itself comes back on another port, and is the same only with the same weights.
    address = None
    if settings.serve is not None:
        from omniopd.teachers.local_server import LocalTeacherServer

        model = resolve_model(settings.serve)
        server = LocalTeacherServer(Path(model), log=files.server_log, threads=config.threads)
        stack.enter_context(server)
        spec = f"{spec}@{server.base_url}"
        address = f"served:{weights_identity(model)}"
    target = find_target(spec, price=settings.price)
    shares = shares_vocabulary(config, target)

    def open_as(continuation: str, *, remembers: bool = True) -> Teacher:
        return open_teacher(
            spec,
            address=address,
            remembers=remembers,
            temperature=settings.temperature,
            top_p=settings.top_p,
            continuation=continuation,
            max_concurrency=settings.max_concurrency,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            timeout_s=settings.timeout_s,
            deadline_s=settings.deadline_s,
            max_attempts=settings.max_attempts,
            budget_usd=settings.budget_usd,
            budget_tokens=settings.budget_tokens,
            budget_calls=settings.budget_calls,
            price=settings.price,
            ledger=files.ledger,
            extra_body=settings.extra_body,
            tokenizer_path=tokenizer_path,
            shares_vocabulary=shares,
        )

    continuation: str = settings.continuation
    if settings.probe and target.card.dialect not in LOCAL_DIALECTS:
        # Says at once what no server is needed for: a missing key, a way that is not possible.
        asyncio.run(open_as(continuation).aclose())
        has_tokenizer = tokenizer_path is not None
        ways = ways_to_ask(target, continuation, has_tokenizer=has_tokenizer, shares_vocabulary=shares)
        encode = prompt_encoder(tokenizer_path) if tokenizer_path is not None and "tokens" in ways else None
        try_as = partial(open_as, remembers=False)
        result = _earlier_probe(files.probe, ways, is_new=is_new) or _probe(
            try_as, ways, target, spec, settings, encode
        )
        write_json_atomic(files.probe, result.to_json())
        _check_probe(result, spec)
        assert result.chosen is not None
        continuation = result.chosen
        say(summarize_probe(result))
    return MeteredTeacher(open_as(continuation))


def _earlier_probe(file: Path, ways: Sequence[Transport], *, is_new: bool) -> ProbeResult | None:
    """Return what the run found when it began: asked in another way, the teacher would not be the same."""
    if is_new or not file.is_file():
        return None
    result = ProbeResult.from_json(read_json(file))
    return result if result.chosen in ways else None


def _probe(
    open_as: Callable[[str], Teacher],
    ways: Sequence[Transport],
    target: Target,
    spec: str,
    settings: TeacherConfig,
    encode: Encode | None,
) -> ProbeResult:
    """Probe the teacher, or take today's result of another run."""
    cache, key = probe_cache(target), probe_key(settings, target)
    result = cache.find(key) if cache else None
    if result is None or result.chosen not in ways:
        asks_for_n = target.card.can.n
        result = asyncio.run(
            probe_teacher(open_as, ways, teacher_id=target.teacher_id, asks_for_n=asks_for_n, encode=encode)
        )
        if cache and result.chosen:
            cache.add(key, result)
    return result


def _check_probe(result: ProbeResult, spec: str) -> None:
    if result.best is None:
        why = next((way.error or "; ".join(way.missing) for way in result.ways), "there is no way to ask it")
        raise TeacherResponseError(
            f"the teacher {spec} gave no usable answer to the first short questions ({why}); look at it with "
            f"`omniopd teachers check {spec}`"
        )


def raw_ways(spec: str) -> tuple[str, ...]:
    """Return the teacher's ways that take raw prompts, for which its tokenizer has to be known."""
    target = find_target(spec)
    if target.card.dialect in LOCAL_DIALECTS:
        return ()
    return tuple(way for way in target.card.can.continuations if way in ("tokens", "completions"))


def check_text_teacher(
    spec: str,
    *,
    continuation: str = "auto",
    tokenizer: Path | None = None,
    temperature: float | None = 1.0,
    extra_body: Mapping[str, Any] | None = None,
) -> ProbeResult:
    """Probe a teacher in every way that is possible with what is at hand. Spends a few hundred tokens for each.

    Raises what `open_teacher` and the probe raise.
    """
    target = find_target(spec)

    def open_as(way: str) -> Teacher:
        # The probe writes token ids with the teacher's own tokenizer, so the vocabulary is shared.
        return open_teacher(
            spec,
            continuation=way,
            temperature=temperature,
            extra_body=extra_body,
            tokenizer_path=tokenizer,
            shares_vocabulary=tokenizer is not None,
            max_attempts=2,
        )

    open_way: Callable[[str], Teacher] = open_as
    has_tokenizer = tokenizer is not None
    ways = ways_to_ask(target, continuation, has_tokenizer=has_tokenizer, shares_vocabulary=has_tokenizer)
    if target.card.dialect in LOCAL_DIALECTS:
        # There is one way to ask what has no wire, whatever it is called.
        ways, open_way = ("prefill",), lambda way: open_as("auto")
    return asyncio.run(
        probe_teacher(
            open_way,
            ways,
            teacher_id=target.teacher_id,
            asks_for_n=target.card.can.n,
            encode=prompt_encoder(tokenizer) if tokenizer is not None else None,
            is_thorough=True,
        )
    )
