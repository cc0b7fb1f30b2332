"""What a run is going to ask of its teacher, in words: `omniopd estimate`, the dry run and the notice at the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from omniopd.config import RunConfig, TeacherConfig
from omniopd.errors import ConfigError
from omniopd.estimate import Estimate, chunk_shape, estimate_run
from omniopd.method import Method, build_method
from omniopd.method_checks import access_of
from omniopd.method_settings import ChunkedSettings
from omniopd.models import reads_alike
from omniopd.progress import format_seconds, format_usd
from omniopd.teachers.cards import Transport
from omniopd.teachers.continuation import ANCHOR_CHARACTERS, ASKED, continuation_messages
from omniopd.teachers.probe import ProbeCache, ProbeResult
from omniopd.teachers.resolve import LOCAL_DIALECTS, Target, find_target, pick_transport
from omniopd.teachers.spec import is_loopback
from omniopd.types import Message

CHARACTERS_PER_TOKEN = 4
"""A rough figure for English text, where no tokenizer is at hand."""
ASSUMED_PROMPT_TOKENS = 200
"""Where the data is not at hand."""


def describe_calls(config: RunConfig, method: Method, *, prompt_tokens: int, transport: str, is_assumed: bool) -> str:
    """Return the calls, tokens, USD and time of a step and of the run, as ranges.

    Args:
        config: the run.
        method: its parts.
        prompt_tokens: mean length of what is sent besides the student's text.
        transport: how the partial answer is handed over.
        is_assumed: nobody could measure that.
    """
    scoring = _describe_scoring(config, method, prompt_tokens, is_assumed=is_assumed)
    if not method.needs_text_teacher:
        return scoring or "none: this method asks for no text"
    target = checked_target(config)
    probe = find_probe(config.teacher, target)
    known: dict[str, Any] = {"prompt_tokens": prompt_tokens, "transport": transport, "probe": probe}
    whole = estimate_run(config, method, target, **known)
    one = estimate_run(config.model_copy(update={"steps": 1}), method, target, **known)
    assert whole is not None and one is not None
    rows = [("", "a step", f"{config.steps} steps")]
    for name in ("requests", "continuations", "output tokens", "input tokens"):
        rows.append((name, _count_range(one, name), _count_range(whole, name)))
    if one.usd is not None and whole.usd is not None:
        rows.append(("cost", _range(one.usd, format_usd), _range(whole.usd, format_usd)))
    if one.seconds is not None and whole.seconds is not None:
        rows.append(("teacher's time", _range(one.seconds, format_seconds), _range(whole.seconds, format_seconds)))
    assumed = " (assumed: the data is not at hand)" if is_assumed else ""
    notes = [
        f"A request without the student's text has about {prompt_tokens} tokens{assumed}. The upper figures are a "
        "bound while nothing has to be asked again; the lower ones assume rollouts a third and continuations half as "
        "long as they may be. Shared prefixes and batched prompts need fewer."
    ]
    return "\n".join([*_aligned(rows), *notes, *_money_notes(config, whole), *([scoring] if scoring else [])])


def _describe_scoring(config: RunConfig, method: Method, prompt_tokens: int, *, is_assumed: bool) -> str | None:
    """Say what a vLLM server is asked for log-probs; None where no server scores."""
    if not is_scored_by_server(config, method):
        return None
    rollout = config.rollout
    requests = rollout.prompts_per_step * rollout.group_size
    tokens = requests * (prompt_tokens + rollout.max_tokens)
    rows = [
        ("", "a step", f"{config.steps} steps"),
        ("scoring requests", f"{requests:,}", f"{requests * config.steps:,}"),
        ("tokens read", f"{tokens:,}", f"{tokens * config.steps:,}"),
    ]
    assumed = " (assumed: the data is not at hand)" if is_assumed else ""
    note = (
        f"A request for each rollout, of about {prompt_tokens} prompt tokens{assumed} and at most {rollout.max_tokens} "
        "of the rollout; the server writes nothing. A few more go to the check at the start and to diagnostics. A "
        "server of your own is not metered."
    )
    return "\n".join([*_aligned(rows), note])


def is_scored_by_server(config: RunConfig, method: Method) -> bool:
    """Say whether a vLLM server is asked for log-probs of the rollouts."""
    return method.needs_distributions and access_of(config.teacher.spec) == "vllm"


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]


def instruction_tokens(method: Method, transport: str) -> int:
    """Estimate what is wrapped around the prompt where a chat model has to be asked to go on."""
    if not isinstance(method.supervision, ChunkedSettings) or transport not in ASKED:
        return 0
    asked = continuation_messages(
        [Message(role="user", content="")],
        "x" * ANCHOR_CHARACTERS,
        max_tokens=chunk_shape(method)[0],
        transport=cast(Transport, transport),
    )
    return sum(len(message.content) for message in asked) // CHARACTERS_PER_TOKEN


def estimate_with(
    config: RunConfig, method: Method, *, prompt_tokens: Sequence[int], probe: ProbeResult | None
) -> Estimate | None:
    """Estimate a run whose prompts have these lengths; None when the method asks for no text."""
    if not method.needs_text_teacher:
        return None
    target = checked_target(config)
    way = probe.chosen if probe and probe.chosen else likely_transport(config, target)
    sent = round(sum(prompt_tokens) / max(1, len(prompt_tokens))) + instruction_tokens(method, way)
    return estimate_run(config, method, target, prompt_tokens=sent, transport=way, probe=probe)


def likely_transport(config: RunConfig, target: Target) -> Transport:
    """Return how the teacher will be asked, as far as that is known without asking it. Raises ConfigError."""
    if target.card.dialect in LOCAL_DIALECTS:
        # A stand-in has no wire: it takes the messages and the open answer as they are.
        return "prefill"
    return pick_transport(
        target.card,
        config.teacher.continuation,
        has_tokenizer=teacher_tokenizer(config.teacher) is not None,
        shares_vocabulary=shares_vocabulary(config, target),
        is_card_host=target.is_card_host,
    )


def teacher_tokenizer(settings: TeacherConfig) -> str | None:
    """Return the folder or name of the teacher's tokenizer, if the run says what it is."""
    return settings.tokenizer or settings.serve


def shares_vocabulary(config: RunConfig, target: Target) -> bool:
    """Say whether the student's token ids can be handed over. Loads both tokenizers where that is a question."""
    tokenizer = teacher_tokenizer(config.teacher)
    is_wanted = config.teacher.continuation in ("auto", "tokens") and "tokens" in target.card.can.continuations
    return is_wanted and tokenizer is not None and reads_alike(config.student.model, tokenizer)


def spending_notice(config: RunConfig) -> str | None:
    """Say in a line for each teacher what a run may buy at most, before it begins; None when that costs nothing.

    Reads no data. Raises ConfigError for a method or a teacher that cannot be used.
    """
    method = build_method(config.method)
    notices = [_notice(role.alone(config), role.method) for role in method.roles(config)]
    return "\n".join(filter(None, notices)) or None


def _notice(config: RunConfig, method: Method) -> str | None:
    if not method.needs_text_teacher:
        return None
    target = checked_target(config)
    if target.card.dialect in LOCAL_DIALECTS:
        return None
    whole = estimate_run(config, method, target, prompt_tokens=ASSUMED_PROMPT_TOKENS, transport="")
    assert whole is not None
    settings = config.teacher
    bought = f"{settings.spec} writes at most {whole.high.output_tokens:,} tokens in {whole.high.requests:,} requests"
    limits = [
        f"{settings.budget_usd:g} USD" if settings.budget_usd is not None else "",
        f"{settings.budget_tokens:,} tokens" if settings.budget_tokens is not None else "",
        f"{settings.budget_calls:,} calls" if settings.budget_calls is not None else "",
    ]
    limit = " and ".join(filter(None, limits))
    limited = f"budget {limit}" if limit else "no budget limits it"
    if target.price is None:
        return f"{bought}; its price is unknown, so {limited} (omniopd estimate shows more, Ctrl-C stops)"
    cost = target.price.cost_usd(0, whole.high.output_tokens)
    if cost == 0:
        return None
    return f"{bought}, up to {format_usd(cost)} besides what it reads; {limited}"


def checked_target(config: RunConfig) -> Target:
    """Return the teacher. Raises ConfigError for a budget in USD that goes with no price."""
    target = find_target(config.teacher.spec, price=config.teacher.price)
    if target.price is None and config.teacher.budget_usd is not None:
        raise ConfigError(
            f"teacher.budget_usd is {config.teacher.budget_usd}, but the price of {config.teacher.spec} is unknown; "
            "set teacher.price, put it on a card in ./teachers/, or limit budget_tokens or budget_calls instead"
        )
    return target


def find_probe(settings: TeacherConfig, target: Target) -> ProbeResult | None:
    """Return what today's probe found, if the teacher was probed today with these settings."""
    cache = probe_cache(target)
    return cache.find(probe_key(settings, target)) if cache else None


def probe_cache(target: Target) -> ProbeCache | None:
    """Return where the probes of this teacher are kept; None for one on this machine, whose port tells nothing."""
    url = target.spec.base_url or target.card.base_url
    return None if url is None or is_loopback(url) else ProbeCache()


def probe_key(settings: TeacherConfig, target: Target) -> list[object]:
    """Return all that shapes what a probe finds, besides the day."""
    return [
        target.teacher_id,
        target.spec.base_url,
        settings.continuation,
        settings.tokenizer,
        settings.temperature,
        settings.top_p,
        settings.extra_body,
        target.card.model_dump(mode="json"),
    ]


def _money_notes(config: RunConfig, whole: Estimate) -> list[str]:
    settings, notes = config.teacher, []
    if whole.usd is None:
        notes.append(
            f"The price of {settings.spec} is unknown, which is not free: set teacher.price, put it on a card in "
            "./teachers/, or install litellm, whose table is then read."
        )
    elif whole.usd[1] > 0:
        notes.append(f"Price: {whole.price_source}.")
    notes.append(f"Teacher's time: {whole.seconds_source}.")
    spent = (
        ("budget_usd", settings.budget_usd, whole.usd[1] if whole.usd else None),
        ("budget_tokens", settings.budget_tokens, whole.high.input_tokens + whole.high.output_tokens),
        ("budget_calls", settings.budget_calls, whole.high.requests),
    )
    for name, limit, most in spent:
        if limit is not None and most is not None and most > limit:
            notes.append(f"teacher.{name} {limit:,} may stop the run before its last step.")
    return notes


def _count_range(estimate: Estimate, name: str) -> str:
    field = name.replace(" ", "_")
    return _range((getattr(estimate.low, field), getattr(estimate.high, field)), "{:,}".format)


def _range(ends: Sequence[float], form: object) -> str:
    assert callable(form)
    low, high = form(ends[0]), form(ends[1])
    return str(low) if low == high else f"{low} to {high}"
