"""What a run would do, before it does anything: settings, objective, prompts, teacher calls and their price.

Reads the run file's data and, where it lies on this machine, the student's tokenizer. Never touches network or GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from omniopd.assembly import build_route
from omniopd.config import RunConfig
from omniopd.data import Dataset, Row, load_rows
from omniopd.errors import ConfigError
from omniopd.estimate import chunk_shape
from omniopd.inputs import check_routes, check_teachers
from omniopd.logit_teachers import check_top_k, compare_prompts, evidence_of, most_named, wanted_of
from omniopd.logits.score_folder import check_stored
from omniopd.method import Method, Role, build_method, describe_part
from omniopd.method_checks import access_of
from omniopd.method_settings import ChunkedSettings
from omniopd.models import load_tokenizer, read_chat_template, resolve_model
from omniopd.prompts import build_sampler
from omniopd.run_folder import RunFolder
from omniopd.spending import (
    ASSUMED_PROMPT_TOKENS,
    CHARACTERS_PER_TOKEN,
    describe_calls,
    instruction_tokens,
    is_scored_by_server,
    likely_transport,
    teacher_tokenizer,
)
from omniopd.supervision.routed import ByWeight
from omniopd.teachers.cards import Transport
from omniopd.teachers.continuation import ASKED, continuation_messages, sent_prefix
from omniopd.teachers.resolve import find_target, load_render
from omniopd.templates import apply_prompt_options, build_prompts, preview_student
from omniopd.types import Message, Prompt
from omniopd.verify import resolve_verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_PROMPTS = 64
"""So many prompts are rendered to measure their length."""
PLACEHOLDER = "[what the student wrote before the chunk]"


def dry_run(config: RunConfig) -> str:
    """Check a run as far as that needs no network and no GPU, and describe it.

    Raises ConfigError or DataError for what would stop the run: a part, the data, a template, the teacher's card.
    """
    method = build_method(config.method)
    check_teachers(config, method)
    dataset = _read_data(config)
    if dataset is not None:
        check_routes(build_route(method.supervision), dataset.rows, config.data.train)
    tokenizer = find_tokenizer(config.student.model)
    _check_distributions(config, method, tokenizer)
    prompts = _student_prompts(config, dataset, tokenizer)
    sections = [
        ("Settings", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()),
        ("Objective", describe_method(config, method)),
        ("Prompts", _describe_prompts(config, method, dataset, tokenizer, prompts)),
        ("Teacher calls, at most", _describe_all_calls(config, method, dataset, prompts)),
        ("Evaluation", _describe_evaluation(config)),
        ("Run folder", _describe_folder(config)),
    ]
    return "\n\n".join(f"== {title} ==\n{body}" for title, body in sections)


def describe_method(config: RunConfig, method: Method) -> str:
    """Return the objective in words, its parts, and how the loss is added up."""
    chosen = [part for one in method.parts for part in (one.chunker, one.credit)]
    parts = [part for part in (*chosen, *method.transforms) if part is not None]
    learner = config.learner
    sums = {
        "sequence_mean_token_sum": "token losses are summed within a rollout and averaged over rollouts (as published)",
        "token_mean": "token losses are averaged over all tokens of a step",
    }
    return "\n".join(
        [
            f"Each step: {method.in_words()}",
            *(f"  {describe_part(part)}" for part in parts),
            f"  {sums[learner.aggregation]}",
            f"  learning rate {learner.learning_rate:g}, {learner.schedule}, {learner.warmup_steps} warm-up steps",
        ]
    )


def find_tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer from a folder or the local hub cache; None when it is not on this machine."""
    if Path(resolve_model(model)).is_dir():
        return load_tokenizer(model)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError):
        return None
    return tokenizer


def _check_distributions(config: RunConfig, method: Method, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a teacher without weights here that names fewer tokens than the loss reads, or whose folder is missing."""
    for role in method.roles(config):
        spec = role.teacher.spec
        manifest = check_stored(spec) if role.method.needs_distributions else None
        access = access_of(spec)
        if access not in ("scores", "vllm") or not role.method.uses_divergence:
            continue
        evidence = evidence_of(config)
        vocabulary = manifest.vocabulary if manifest is not None else None
        if vocabulary is None:
            if tokenizer is None and evidence.kind == "whole":
                continue  # Nobody here knows how many tokens that would be.
            vocabulary = evidence.k if tokenizer is None else len(tokenizer)
        most = most_named(role.teacher, manifest, vocabulary)
        check_top_k(wanted_of(evidence, role.teacher, vocabulary, most=most), most, role, access)


def _read_data(config: RunConfig) -> Dataset | None:
    """Read the training data; None when only the hub has it."""
    data = config.data
    if _is_remote(data.train):
        return None
    dataset = load_rows(data.train, split=data.split, max_prompts=data.max_prompts, on_bad_row=data.on_bad_row)
    resolve_verifier(data.verifier, source=data.train, has_answers=dataset.has_answers)
    if data.eval is not None and not _is_remote(data.eval):
        held_out = load_rows(data.eval, split=data.eval_split, max_prompts=config.eval.num_problems)
        if not held_out.has_answers:
            raise ConfigError(f"data.eval {data.eval!r} has no answers to compare with; expected an `answer` column")
    return dataset


def _is_remote(source: str) -> bool:
    return source.startswith("hf:") and not Path(source.removeprefix("hf:")).is_dir()


def _student_prompts(
    config: RunConfig, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Prompt, ...]:
    """Render the first prompts as the student reads them; empty without a tokenizer or data."""
    student = config.student
    template = None if student.chat_template is None else read_chat_template(student.chat_template)
    if dataset is None or tokenizer is None:
        return ()
    prompts = build_prompts(
        Dataset(rows=dataset.rows[:SAMPLE_PROMPTS]),
        tokenizer,
        prompt_template=config.data.prompt_template,
        system_prompt=config.data.system_prompt,
        max_prompt_tokens=config.data.max_prompt_tokens,
        chat_template=template,
    ).prompts
    build_sampler(config.data.sampler, prompts, config.seed)
    return prompts


def _messages(config: RunConfig, dataset: Dataset | None) -> tuple[Message, ...]:
    """Return the first conversation of the data, or a stand-in."""
    stand_in = Row(messages=(Message(role="user", content="[a question of the data]"),), source="stand-in")
    row = dataset.rows[0] if dataset is not None else stand_in
    data = config.data
    return apply_prompt_options(row.messages, prompt_template=data.prompt_template, system_prompt=data.system_prompt)


def _prompt_tokens(dataset: Dataset | None, prompts: Sequence[Prompt]) -> int:
    """Return the mean length of a prompt, measured where that is possible."""
    if prompts:
        return round(sum(len(prompt.token_ids) for prompt in prompts) / len(prompts))
    if dataset is None:
        return ASSUMED_PROMPT_TOKENS
    rows = dataset.rows[:SAMPLE_PROMPTS]
    characters = sum(len(message.content) for row in rows for message in row.messages)
    return round(characters / len(rows) / CHARACTERS_PER_TOKEN)


def _describe_prompts(
    config: RunConfig,
    method: Method,
    dataset: Dataset | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
) -> str:
    data, model = config.data, config.student.model
    if dataset is None:
        lines = [f"{data.train} is on the Hugging Face hub; a dry run does not fetch it."]
    else:
        skipped = f", {len(dataset.skipped)} malformed rows left out" if dataset.skipped else ""
        answers = "with answers" if dataset.has_answers else "without answers"
        lines = [f"{data.train}: {len(dataset.rows):,} prompts {answers}{skipped}"]
    if tokenizer is None:
        lines.append(f"The tokenizer of {model} is not on this machine, so its prompt is shown as messages.")
    messages = prompts[0].messages if prompts else _messages(config, dataset)
    if prompts:
        lines.append(preview_student(prompts[0]))
    else:
        lines += ["The student reads (messages):", _indented(_turns(messages))]
    for role in method.roles(config):
        name = f"{role.name}: " if method.routes else ""
        if role.method.needs_text_teacher:
            first, *rest = _teacher_prompt(role.alone(config), role.method, messages)
            lines += [name + first, *rest]
        if role.method.needs_distributions and prompts and tokenizer is not None:
            lines += [name + "Beside an open-weight teacher:", _indented(_compared(role, prompts[0], tokenizer))]
    return "\n".join(lines)


def _compared(role: Role, prompt: Prompt, ours: PreTrainedTokenizerBase) -> str:
    """Compare a question as the student and an open-weight teacher read it, where the teacher's tokenizer is here."""
    teacher = role.teacher
    name = teacher.tokenizer or (teacher.spec.partition(":")[2] if teacher.spec.startswith("hf:") else None)
    if name is None:
        return f"{role.label}.tokenizer is not set, so nothing can be compared here"
    theirs = find_tokenizer(name)
    if theirs is None:
        return f"the tokenizer of {name} is not on this machine; the run compares before it spends anything"
    return "\n".join(compare_prompts(role, prompt, ours, theirs).lines())


def _teacher_prompt(config: RunConfig, method: Method, messages: Sequence[Message]) -> list[str]:
    """Show what the teacher is sent for one chunk, in the way its card or the run file says."""
    if not isinstance(method.supervision, ChunkedSettings):
        return ["The teacher reads (messages):", _indented(_turns(messages))]
    size, _ = chunk_shape(method)
    transport = _transport(config)
    if transport in ASKED:
        asked = continuation_messages(
            messages,
            PLACEHOLDER,
            max_tokens=method.supervision.continuation_tokens or size,
            transport=transport,
        )
        return [f"The teacher reads ({transport}, asked to go on):", _indented(_turns(asked))]
    if transport == "prefill":
        opened = Message(role="assistant", content=sent_prefix(PLACEHOLDER))
        return ["The teacher reads (messages, the last one left open):", _indented(_turns([*messages, opened]))]
    served = teacher_tokenizer(config.teacher)
    if served is None:
        raise ConfigError(
            "teacher.continuation is completions, and nothing says how to write a conversation as raw text; set "
            "teacher.tokenizer to the folder of the teacher's tokenizer, or use prefill or chat"
        )
    if find_tokenizer(served) is None:
        opened = Message(role="assistant", content=sent_prefix(PLACEHOLDER))
        return [
            f"The teacher reads (one text in the chat template of {served}, which is not on this machine):",
            _indented(_turns([*messages, opened])),
        ]
    render = load_render(Path(resolve_model(served)))
    what = "one text, as the student's own token ids" if transport == "tokens" else "one text"
    return [f"The teacher reads ({what}):", _indented(render(messages) + sent_prefix(PLACEHOLDER))]


def _transport(config: RunConfig) -> Transport:
    return likely_transport(config, find_target(config.teacher.spec, price=config.teacher.price))


def estimate(config: RunConfig) -> str:
    """Say what a run will ask of its teacher and what that costs. Nothing is asked; a probe of today is made use of.

    Raises ConfigError or DataError for what would stop the run.
    """
    method = build_method(config.method)
    check_teachers(config, method)
    dataset = _read_data(config)
    if dataset is not None:
        check_routes(build_route(method.supervision), dataset.rows, config.data.train)
    tokenizer = find_tokenizer(config.student.model)
    _check_distributions(config, method, tokenizer)
    prompts = _student_prompts(config, dataset, tokenizer)
    return _describe_all_calls(config, method, dataset, prompts)


def _describe_all_calls(config: RunConfig, method: Method, dataset: Dataset | None, prompts: Sequence[Prompt]) -> str:
    """Describe the calls of every teacher; of several, as if each were asked about every prompt."""
    roles = method.roles(config)
    if len(roles) == 1:
        return _describe_calls(roles[0].alone(config), roles[0].method, dataset, prompts)
    route = build_route(method.supervision)
    weights = route.weights if isinstance(route, ByWeight) else {}
    shares = {
        name: f" {weight / sum(weights.values()):.0%} of the prompts by weight;" for name, weight in weights.items()
    }
    parts = [
        f"{role.name} ({role.teacher.spec}),{shares.get(role.name, '')} if every prompt went to it:\n"
        + _indented(_describe_calls(role.alone(config), role.method, dataset, prompts))
        for role in roles
    ]
    return "\n".join(parts)


def _describe_calls(config: RunConfig, method: Method, dataset: Dataset | None, prompts: Sequence[Prompt]) -> str:
    way = _transport(config) if method.needs_text_teacher else ""
    is_asked = way or is_scored_by_server(config, method)
    sent = _prompt_tokens(dataset, prompts) + (instruction_tokens(method, way) if way else 0) if is_asked else 0
    return describe_calls(config, method, prompt_tokens=sent, transport=way, is_assumed=dataset is None)


def _describe_evaluation(config: RunConfig) -> str:
    if config.data.eval is None:
        return "off: data.eval is not set, so nothing will tell whether the student improved"
    settings = config.eval
    often = f", and {settings.k_during} samples every {settings.every} steps" if settings.every else ""
    return (
        f"{config.data.eval}: {settings.num_problems} problems x {settings.k} samples at temperature "
        f"{settings.temperature:g}, before and after{often}"
    )


def _describe_folder(config: RunConfig) -> str:
    folder = config.output / config.name
    is_occupied = folder.is_dir() and any(folder.iterdir()) and not RunFolder(folder).has_never_begun
    return f"{folder}" + (" exists: the run needs --resume, --overwrite or another --run-name" if is_occupied else "")


def _turns(messages: Sequence[Message]) -> str:
    return "\n".join(f"[{message.role}] {message.content}" for message in messages)


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))
