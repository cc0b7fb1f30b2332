"""From `provider:model[@base_url]` to a live teacher: card, key, price, limiter, client and ledger put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args
from urllib.parse import urlsplit

from omniopd.errors import ConfigError, TeacherAuthError
from omniopd.teachers.base import RecordedTeacher, Teacher
from omniopd.teachers.budget import Budget
from omniopd.teachers.cards import Card, Limits, ModelPrice, Transport, find_card, holds_key
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.ledgered import Ledgered
from omniopd.teachers.prices import FoundPrice, find_price
from omniopd.teachers.spec import TeacherSpec, is_loopback, parse_spec
from omniopd.types import Message

if TYPE_CHECKING:
    from omniopd.teachers.plan import Plan, Render
    from omniopd.teachers.probe import Encode

TRANSPORTS: tuple[str, ...] = get_args(Transport)
LOCAL_DIALECTS = frozenset({"echo", "hf", "replay"})
"""Nothing goes over a wire."""


def open_teacher(
    spec: str,
    *,
    temperature: float | None = 1.0,
    top_p: float | None = None,
    continuation: str = "auto",
    max_concurrency: int = 16,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    timeout_s: float = 60.0,
    deadline_s: float = 300.0,
    max_attempts: int = 5,
    budget_usd: float | None = None,
    budget_tokens: int | None = None,
    budget_calls: int | None = None,
    price: ModelPrice | Mapping[str, float] | None = None,
    ledger: Path | None = None,
    extra_body: Mapping[str, Any] | None = None,
    tokenizer_path: Path | None = None,
    shares_vocabulary: bool = False,
    address: str | None = None,
    remembers: bool = True,
    batch: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Teacher:
    """Open a teacher. Sends nothing yet.

    The key comes from the variable that the card names, and goes to the address that the user wrote: whoever writes
    `openai:MODEL@BASE_URL` means OPENAI_API_KEY for BASE_URL, as every OpenAI-compatible server expects. It never goes
    over plain http to another machine. A server on this machine is asked without a key when none is set.

    Args:
        spec: `provider:model[@base_url]`; `hf:FOLDER_OR_NAME` runs in this process, `replay:LEDGER` asks nobody.
        temperature: None leaves it to the server.
        continuation: `auto` takes the first way on the card that is possible here: token ids where the vocabulary is
            shared, raw completions where the tokenizer is known, else what the server's own chat endpoint offers.
        requests_per_minute: the stricter of this and the card's; so too `tokens_per_minute`.
        deadline_s: for one request with all its attempts and waits.
        budget_usd: for all calls in the ledger; without a ledger file, for this teacher's life, in which identical
            requests are then paid once. So too `budget_tokens` (input and output) and `budget_calls` (HTTP requests).
        price: instead of the card's.
        ledger: file that keeps answers and bills.
        extra_body: sent with every request.
        tokenizer_path: the teacher's tokenizer folder, whose chat template writes raw prompts.
        shares_vocabulary: the student's token ids mean the same to the teacher.
        address: what the ledger knows the server by instead of its URL, for one that comes back on another port.
        remembers: note in the ledger what its answers depend on, so that they can be replayed; a trial need not.
        batch: use the provider's half-price endpoint, which may take a day to answer.
        progress: told, while a batch is waited for, how many of how many of its HTTP requests are answered.

    Raises:
        ConfigError: the spec, the card or the arguments cannot be used.
        TeacherAuthError: no key, naming the variable to set.
    """
    refuse_keys("extra_body", extra_body or {})
    limits_given = {
        "max_concurrency": max_concurrency,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_attempts": max_attempts,
    }
    for name, limit in limits_given.items():
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} is {limit}; expected 1 or more")
    target = find_target(spec, price=price)
    teacher = _local_teacher(target, temperature=temperature, top_p=top_p, continuation=continuation)
    if teacher is None:
        plan = make_plan(
            target,
            temperature=temperature,
            top_p=top_p,
            continuation=continuation,
            extra_body=extra_body,
            tokenizer_path=tokenizer_path,
            shares_vocabulary=shares_vocabulary,
            address=address,
        )
        key = find_key(target.card, plan.base_url)
        if batch:
            teacher = _batch_teacher(plan, key, target, ledger, progress)
        else:
            from omniopd.teachers.limiter import shared_limiter
            from omniopd.teachers.remote import RemoteTeacher

            limits = target.card.limits if target.is_card_host else Limits()
            limiter = shared_limiter(
                plan.base_url,
                key,
                plan.model,
                max_in_flight=_stricter(max_concurrency, limits.max_in_flight) or max_concurrency,
                requests_per_minute=_stricter(requests_per_minute, limits.requests_per_minute),
                tokens_per_minute=_stricter(tokens_per_minute, limits.tokens_per_minute),
            )
            teacher = RemoteTeacher(
                plan,
                api_key=key,
                limiter=limiter,
                price=target.price,
                timeout_s=timeout_s,
                deadline_s=deadline_s,
                max_attempts=max_attempts,
            )
    budget = Budget(usd=budget_usd, tokens=budget_tokens, calls=budget_calls)
    if ledger is None and not budget.is_limited:
        return teacher
    # A batch orders everything before it sends anything: it would wait for itself.
    return Ledgered(
        teacher,
        Ledger(ledger or ":memory:"),
        price=target.price,
        budget=budget,
        remembers=remembers,
        **({"max_wait_s": 0.0} if batch else {}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A spec with all that is known about it."""

    spec: TeacherSpec
    card: Card
    """As it holds for the model."""
    is_card_host: bool
    """Whether the card speaks about this address: its prices and limits hold for no other."""
    found_price: FoundPrice | None

    @property
    def teacher_id(self) -> str:
        """`provider:model`, for records and the ledger."""
        return f"{self.card.id}:{self.spec.model}"

    @property
    def price(self) -> ModelPrice | None:
        """What the model costs; None when that is unknown, which is not free."""
        return self.found_price.price if self.found_price else None


def find_target(spec: str, *, price: ModelPrice | Mapping[str, float] | None = None) -> Target:
    """Read a spec, its card and its price. Raises ConfigError."""
    refuse_keys("the teacher's name", spec)
    parsed = parse_spec(spec)
    whole_card = find_card(parsed.provider)
    on_card_host = is_card_host(parsed, whole_card)
    card = whole_card.for_model(parsed.model)
    if not on_card_host:
        # Compatible servers understand the older name of the output limit, not all of them the newer one.
        card = card.model_copy(update={"output_limit_field": None})
    found = find_price(card, parsed.model, is_card_host=on_card_host, override=_as_price(price))
    return Target(spec=parsed, card=card, is_card_host=on_card_host, found_price=found)


def make_plan(
    target: Target,
    *,
    temperature: float | None = 1.0,
    top_p: float | None = None,
    continuation: str = "auto",
    extra_body: Mapping[str, Any] | None = None,
    tokenizer_path: Path | None = None,
    shares_vocabulary: bool = False,
    address: str | None = None,
) -> Plan:
    """Decide how a teacher behind HTTP is asked. Raises ConfigError when it cannot be as the arguments say."""
    from omniopd.teachers.dialects import get_dialect
    from omniopd.teachers.plan import Plan

    card, spec = target.card, target.spec
    base_url = spec.base_url or card.base_url
    if base_url is None:
        raise ConfigError(f"the teacher {spec} has no address; write {spec.provider}:{spec.model}@BASE_URL")
    transport = pick_transport(
        card,
        continuation,
        has_tokenizer=tokenizer_path is not None,
        shares_vocabulary=shares_vocabulary,
        is_card_host=target.is_card_host,
    )
    return Plan(
        teacher_id=target.teacher_id,
        model=spec.model,
        base_url=base_url,
        address=address,
        card=card,
        dialect=get_dialect(card.dialect),
        transport=transport,
        render=load_render(tokenizer_path) if transport == "completions" and tokenizer_path else None,
        temperature=temperature,
        top_p=top_p,
        extra_body=dict(extra_body or {}),
    )


def find_key(card: Card, base_url: str) -> str | None:
    """Return the key for an address, or None where none is needed.

    Raises TeacherAuthError when it is missing, and ConfigError when it would travel in the clear.
    """
    if card.api_key_env is None:
        return None
    key = os.environ.get(card.api_key_env, "").strip()
    if is_loopback(base_url):
        return key or None
    if not key:
        raise TeacherAuthError(
            f"the teacher {card.id} at {base_url} needs a key and {card.api_key_env} is not set; "
            f"set it with: export {card.api_key_env}=..."
        )
    if urlsplit(base_url).scheme.lower() != "https":
        raise ConfigError(
            f"{card.api_key_env} would travel unencrypted to {base_url}; use https, a tunnel to this machine, or a "
            "card with api_key_env: null for a server that needs no key"
        )
    return key


def refuse_keys(place: str, value: object) -> None:
    """Raise ConfigError when settings that are written to disk hold a key, known from the environment or by its shape.

    The message names the place and never the key.
    """
    texts = list(_texts(value))
    known = {
        secret.strip()
        for name, secret in os.environ.items()
        if name.endswith(("_KEY", "_TOKEN", "_SECRET")) and len(secret.strip()) >= 8
    }
    if any(holds_key(text) or any(secret in text for secret in known) for text in texts):
        raise ConfigError(
            f"{place} holds what looks like a key, and settings are written into the run's files; put the key into the "
            "environment variable that the teacher's card names (api_key_env), and for a header of its own use a card "
            "with key_header"
        )


def feasible_transports(card: Card, *, has_tokenizer: bool, shares_vocabulary: bool) -> tuple[Transport, ...]:
    """Return the card's ways to hand over a partial answer that are possible here, in its order."""
    lacking = {"tokens": not shares_vocabulary, "completions": not has_tokenizer}
    return tuple(way for way in card.can.continuations if not lacking.get(way, False))


def ways_to_ask(
    target: Target, continuation: str, *, has_tokenizer: bool, shares_vocabulary: bool
) -> tuple[Transport, ...]:
    """Return the ways that a probe may try: the one that is wanted, else all that are possible."""
    if continuation != "auto":
        return (cast(Transport, continuation),)
    return feasible_transports(target.card, has_tokenizer=has_tokenizer, shares_vocabulary=shares_vocabulary)


def pick_transport(
    card: Card, continuation: str, *, has_tokenizer: bool, is_card_host: bool, shares_vocabulary: bool = False
) -> Transport:
    """Choose how the partial answer is handed over. Raises ConfigError when it cannot be as asked."""
    if continuation == "auto":
        possible = feasible_transports(card, has_tokenizer=has_tokenizer, shares_vocabulary=shares_vocabulary)
        if not possible:
            raise ConfigError(f"the teacher {card.id} takes raw prompts only; give the folder of its tokenizer")
        return possible[0]
    if continuation not in TRANSPORTS:
        raise ConfigError(f"continuation is {continuation!r}; expected auto, {', '.join(TRANSPORTS)}")
    # What an address of the user's own can do, only the user knows.
    if is_card_host and continuation not in card.can.continuations:
        raise ConfigError(
            f"continuation is {continuation!r} but the teacher {card.id} offers {', '.join(card.can.continuations)}; "
            "use one of these or auto"
        )
    if continuation == "tokens" and not shares_vocabulary:
        raise ConfigError(
            "continuation is 'tokens', which hands over the student's own token ids, and nothing shows that the "
            "teacher has the student's vocabulary; set teacher.tokenizer to the folder of its tokenizer, or use "
            "completions"
        )
    return cast(Transport, continuation)


def load_render(tokenizer_path: Path) -> Render:
    """Return the function that writes a conversation with a tokenizer's chat template, up to where the answer begins.

    Without a template the messages are joined by blank lines. A start token that the server will add itself is left
    out, so that it is there once. A template that can think is told not to.
    """
    from omniopd.models import load_tokenizer, render_chat

    tokenizer = load_tokenizer(str(tokenizer_path))
    start = tokenizer.bos_token or ""
    server_adds_it = bool(start) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def render(messages: Sequence[Message]) -> str:
        if tokenizer.chat_template is None:
            return "\n\n".join(message.content for message in messages)
        turns = [message.to_json() for message in messages]
        text = render_chat(tokenizer, turns, add_generation_prompt=True, enable_thinking=False)
        return text.removeprefix(start) if server_adds_it else text

    return render


def prompt_encoder(tokenizer_path: Path) -> Encode:
    """Return the function that writes a conversation with an open answer as the tokenizer's own ids."""
    from omniopd.models import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_path))
    render = load_render(tokenizer_path)

    def encode(messages: Sequence[Message], prefix: str) -> tuple[int, ...]:
        return tuple(tokenizer(render(messages) + prefix).input_ids)

    return encode


def is_card_host(spec: TeacherSpec, card: Card) -> bool:
    """Say whether the card speaks about this address: its prices and limits hold for no other."""
    if card.base_url is None:
        return True  # The card speaks about a kind of server, wherever it stands.
    if spec.base_url is None:
        return True
    if is_loopback(spec.base_url):
        return is_loopback(card.base_url)
    return urlsplit(spec.base_url).hostname == urlsplit(card.base_url).hostname


def _local_teacher(
    target: Target, *, temperature: float | None, top_p: float | None, continuation: str
) -> RecordedTeacher | None:
    """Open a teacher that needs no wire; None for all others."""
    model = target.spec.model
    if target.card.dialect == "echo":
        from omniopd.teachers.echo import EchoTeacher

        return EchoTeacher(model)
    if target.card.dialect == "replay":
        from omniopd.teachers.replay import ReplayTeacher

        path, _, teacher_id = model.partition("#")
        return ReplayTeacher(Path(path).expanduser(), teacher_id=teacher_id or None)
    if target.card.dialect == "hf":
        from omniopd.teachers.in_process import HFTeacher

        way = "completions" if continuation == "auto" else continuation
        return HFTeacher(
            id=f"hf:{model}",
            model=model,
            temperature=1.0 if temperature is None else temperature,
            top_p=top_p,
            continuation=way,
        )
    return None


def _batch_teacher(
    plan: Plan, key: str | None, target: Target, ledger: Path | None, progress: Callable[[int, int], None] | None
) -> RecordedTeacher:
    from omniopd.teachers.batch import BatchTeacher

    if not target.card.can.batch_api:
        raise ConfigError(f"the teacher {plan.teacher_id} has no batch endpoint that omniopd knows; leave batch out")
    if ledger is None:
        raise ConfigError(
            "a batch may take a day, so its answers need a file that outlives this process; give a ledger"
        )
    return BatchTeacher(plan, api_key=key, price=target.price, ledger=ledger, progress=progress)


def _stricter(first: int | None, second: int | None) -> int | None:
    given = [limit for limit in (first, second) if limit is not None]
    return min(given) if given else None


def _as_price(price: ModelPrice | Mapping[str, float] | None) -> ModelPrice | None:
    if price is None or isinstance(price, ModelPrice):
        return price
    from pydantic import ValidationError

    try:
        return ModelPrice.model_validate(dict(price))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"the price is invalid: {problems}; expected e.g. {{input_usd_per_mtok: 2.5, output_usd_per_mtok: 10}}"
        ) from None


def _texts(value: object) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in (*value.keys(), *value.values()) for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []
