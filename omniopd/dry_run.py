"""What a run would do, before it does anything: settings, objective, prompts, teacher calls and their price.

Reads the run file's data and, where it lies on this machine, the student's tokenizer. Never touches network or GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from omniopd.config import RunConfig
from omniopd.data import Dataset, Row, load_rows
from omniopd.errors import ConfigError
from omniopd.inputs import check_teacher
from omniopd.method import ChunkedSettings, Method, build_method, describe_part
from omniopd.models import load_tokenizer, read_chat_template, resolve_model
from omniopd.progress import format_usd
from omniopd.prompts import build_sampler
from omniopd.run_folder import RunFolder
from omniopd.teachers.cards import ModelPrice, Transport, find_card
from omniopd.teachers.continuation import continuation_messages, sent_prefix
from omniopd.teachers.resolve import is_card_host, load_render, pick_transport
from omniopd.teachers.spec import parse_spec
from omniopd.templates import apply_prompt_options, build_prompts, preview
from omniopd.types import Message, Prompt
from omniopd.verify import resolve_verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_PROMPTS = 64
"""So many prompts are rendered to measure their length."""
CHARACTERS_PER_TOKEN = 4
"""A rough figure for English text, where no tokenizer is at hand."""
ASSUMED_PROMPT_TOKENS = 200
"""Where the data is not at hand either."""
PLACEHOLDER = "[what the student wrote before the chunk]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Teacher calls as upper bounds; tokens counted as the student's tokenizer would."""

    requests: int
    continuations: int
    output_tokens: int
    input_tokens: tuple[int, int]
    """Chunks as early as they can lie, and as late."""

    def times(self, factor: int) -> Calls:
        low, high = self.input_tokens
        return Calls(
            requests=self.requests * factor,
            continuations=self.continuations * factor,
            output_tokens=self.output_tokens * factor,
            input_tokens=(low * factor, high * factor),
        )

    def cost_usd(self, price: ModelPrice) -> tuple[float, float]:
        """Return the cost at the lower and the higher input."""
        low, high = self.input_tokens
        return price.cost_usd(low, self.output_tokens), price.cost_usd(high, self.output_tokens)


def dry_run(config: RunConfig) -> str:
    """Check a run as far as that needs no network and no GPU, and describe it.

    Raises ConfigError or DataError for what would stop the run: a part, the data, a template, the teacher's card.
    """
    method = build_method(config.method)
    check_teacher(config, method)
    dataset = _read_data(config)
    tokenizer = find_tokenizer(config.student.model)
    prompts = _student_prompts(config, dataset, tokenizer)
    sections = [
        ("Settings", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()),
        ("Objective", describe_method(config, method)),
        ("Prompts", _describe_prompts(config, method, dataset, tokenizer, prompts)),
        ("Teacher calls, at most", _describe_calls(config, method, dataset, prompts)),
        ("Evaluation", _describe_evaluation(config)),
        ("Run folder", _describe_folder(config)),
    ]
    return "\n\n".join(f"== {title} ==\n{body}" for title, body in sections)


def describe_method(config: RunConfig, method: Method) -> str:
    """Return the objective in words, its parts, and how the loss is added up."""
    parts = [part for part in (method.chunker, method.credit, *method.transforms) if part is not None]
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


def estimate_calls(config: RunConfig, method: Method, *, prompt_tokens: int, paid_per_sample: bool) -> Calls | None:
    """Bound the teacher calls of one step; None when the method asks for no text.

    Args:
        config: The run.
        method: Its parts.
        prompt_tokens: Mean length of what is sent besides the student's text.
        paid_per_sample: The server has no `n`, so every sample pays for its prompt.
    """
    if not method.needs_text_teacher:
        return None
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    settings = method.supervision
    if not isinstance(settings, ChunkedSettings):
        requests = config.rollout.prompts_per_step
        sent = prompt_tokens * (rollouts if paid_per_sample else requests)
        return Calls(
            requests=rollouts if paid_per_sample else requests,
            continuations=rollouts,
            output_tokens=rollouts * config.rollout.max_tokens,
            input_tokens=(sent, sent),
        )
    size, most = _chunk_shape(method)
    longest = config.rollout.max_tokens
    chunks = min(most, longest // size)
    if chunks == 0:
        raise ConfigError(
            f"nothing could be audited: method.supervision.chunker.chunk_tokens is {size}, but rollout.max_tokens is "
            f"{longest}; expected chunks no longer than a rollout"
        )
    # m disjoint chunks of C tokens start on average at (m - 1) C / 2 when they open the rollout, and T - m C later
    # when they close it.
    earliest = (chunks - 1) * size / 2
    latest = earliest + longest - chunks * size
    audits = rollouts * chunks
    copies = settings.num_continuations if paid_per_sample else 1
    return Calls(
        requests=audits * copies,
        continuations=audits * settings.num_continuations,
        output_tokens=audits * settings.num_continuations * (settings.continuation_tokens or size),
        input_tokens=(
            round(audits * copies * (prompt_tokens + earliest)),
            round(audits * copies * (prompt_tokens + latest)),
        ),
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


def _chunk_shape(method: Method) -> tuple[int, int]:
    """Return C and M of the chunker."""
    return int(getattr(method.chunker, "chunk_tokens", 1)), int(getattr(method.chunker, "max_chunks", 1))


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
        lines.append(preview(prompts[0]).partition("\nThe teacher reads")[0])
    else:
        lines += ["The student reads (messages):", _indented(_turns(messages))]
    if method.needs_text_teacher:
        lines += _teacher_prompt(config, method, messages)
    return "\n".join(lines)


def _teacher_prompt(config: RunConfig, method: Method, messages: Sequence[Message]) -> list[str]:
    """Show what the teacher is sent for one chunk, in the way its card or the run file says."""
    if not isinstance(method.supervision, ChunkedSettings):
        return ["The teacher reads (messages):", _indented(_turns(messages))]
    size, _ = _chunk_shape(method)
    transport = _transport(config)
    if transport == "chat":
        asked = continuation_messages(messages, PLACEHOLDER, max_tokens=method.supervision.continuation_tokens or size)
        return ["The teacher reads (chat, asked to go on):", _indented(_turns(asked))]
    if transport == "prefill":
        opened = Message(role="assistant", content=sent_prefix(PLACEHOLDER))
        return ["The teacher reads (messages, the last one left open):", _indented(_turns([*messages, opened]))]
    served = config.teacher.tokenizer or config.teacher.serve
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
    return ["The teacher reads (one text):", _indented(render(messages) + sent_prefix(PLACEHOLDER))]


def _transport(config: RunConfig) -> Transport:
    spec = parse_spec(config.teacher.spec)
    card = find_card(spec.provider)
    if card.dialect == "echo":
        # The stand-in has no wire: it takes the messages and the open answer as they are.
        return "prefill"
    return pick_transport(
        card,
        config.teacher.continuation,
        has_tokenizer=(config.teacher.tokenizer or config.teacher.serve) is not None,
        is_card_host=is_card_host(spec, card),
    )


def _describe_calls(config: RunConfig, method: Method, dataset: Dataset | None, prompts: Sequence[Prompt]) -> str:
    if not method.needs_text_teacher:
        return "none: this method asks for no text"
    price = _price(config)
    sent = _prompt_tokens(dataset, prompts) + _instruction_tokens(config, method)
    has_n = find_card(parse_spec(config.teacher.spec).provider).can.n
    step = estimate_calls(config, method, prompt_tokens=sent, paid_per_sample=not has_n)
    assert step is not None
    total = step.times(config.steps)
    rows = [
        ("", "a step", f"{config.steps} steps"),
        ("requests", f"{step.requests:,}", f"{total.requests:,}"),
        ("continuations", f"{step.continuations:,}", f"{total.continuations:,}"),
        ("output tokens", f"{step.output_tokens:,}", f"{total.output_tokens:,}"),
        ("input tokens", _range(step.input_tokens), _range(total.input_tokens)),
    ]
    notes = [
        f"A request without the student's text has about {sent} tokens"
        f"{' (assumed: the data is not at hand)' if dataset is None else ''}. The range of the input is chunks early "
        "or late in a full-length rollout; shared prefixes, batched prompts and shorter rollouts need fewer."
    ]
    budget = config.teacher.budget_usd
    if price is None:
        notes.append(
            f"The price of {config.teacher.spec} is unknown, which is not free: put it on a card in ./teachers/."
        )
    else:
        rows.append(("cost", _usd_range(step.cost_usd(price)), _usd_range(total.cost_usd(price))))
        if budget is not None and total.cost_usd(price)[1] > budget:
            notes.append(f"teacher.budget_usd {format_usd(budget)} may stop the run before its last step.")
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    return "\n".join([*table, *notes])


def spending_notice(config: RunConfig) -> str | None:
    """Say in one line what a run may buy at most, before it begins; None when the teacher costs nothing.

    Reads no data. Raises ConfigError for a method or a teacher that cannot be used.
    """
    method = build_method(config.method)
    if not method.needs_text_teacher:
        return None
    price = _price(config)
    has_n = find_card(parse_spec(config.teacher.spec).provider).can.n
    step = estimate_calls(config, method, prompt_tokens=ASSUMED_PROMPT_TOKENS, paid_per_sample=not has_n)
    assert step is not None
    total = step.times(config.steps)
    bought = f"{config.teacher.spec} writes at most {total.output_tokens:,} tokens in {total.requests:,} requests"
    if price is None:
        return f"{bought}; its price is unknown, so no budget limits it (--dry-run shows more, Ctrl-C stops)"
    cost = price.cost_usd(0, total.output_tokens)
    if cost == 0:
        return None
    limit = "no budget limits it" if config.teacher.budget_usd is None else f"budget {config.teacher.budget_usd:g} USD"
    return f"{bought}, up to {format_usd(cost)} besides what it reads; {limit}"


def _price(config: RunConfig) -> ModelPrice | None:
    """Return what the teacher costs; None when that is unknown, which a budget does not go with."""
    spec = parse_spec(config.teacher.spec)
    card = find_card(spec.provider)
    price = card.price.of(spec.model) if card.price and is_card_host(spec, card) else None
    if price is None and config.teacher.budget_usd is not None:
        raise ConfigError(
            f"teacher.budget_usd is {config.teacher.budget_usd}, but the price of {config.teacher.spec} is unknown; "
            "put it on a card in ./teachers/, or leave the budget out"
        )
    return price


def _instruction_tokens(config: RunConfig, method: Method) -> int:
    """Estimate what is wrapped around the prompt where a chat model has to be asked to go on."""
    if not isinstance(method.supervision, ChunkedSettings) or _transport(config) != "chat":
        return 0
    asked = continuation_messages([Message(role="user", content="")], PLACEHOLDER, max_tokens=_chunk_shape(method)[0])
    return sum(len(message.content) for message in asked) // CHARACTERS_PER_TOKEN


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


def _range(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _usd_range(bounds: tuple[float, float]) -> str:
    low, high = format_usd(bounds[0]), format_usd(bounds[1])
    return low if low == high else f"{low} to {high}"
