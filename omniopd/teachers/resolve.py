"""From `provider:model[@base_url]` to a live teacher: card, key, client and ledger put together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args
from urllib.parse import urlsplit

from omniopd.errors import ConfigError, TeacherAuthError
from omniopd.teachers.base import Teacher
from omniopd.teachers.cards import Card, Transport, find_card
from omniopd.teachers.ledger import Ledger, Ledgered, RecordedTeacher
from omniopd.teachers.spec import TeacherSpec, is_loopback, parse_spec
from omniopd.types import Message

if TYPE_CHECKING:
    from omniopd.teachers.openai_compatible import Render

_PLACEHOLDER_KEY = "none"
TRANSPORTS: tuple[str, ...] = get_args(Transport)


def open_teacher(
    spec: str,
    *,
    temperature: float | None = 1.0,
    top_p: float | None = None,
    continuation: str = "auto",
    max_concurrency: int = 16,
    timeout_s: float = 60.0,
    max_attempts: int = 5,
    budget_usd: float | None = None,
    ledger: Path | None = None,
    extra_body: Mapping[str, Any] | None = None,
    tokenizer_path: Path | None = None,
) -> Teacher:
    """Open a teacher. Sends nothing yet.

    The key comes from the variable that the card names, and goes to the address that the user wrote: whoever writes
    `openai:MODEL@BASE_URL` means OPENAI_API_KEY for BASE_URL, as every OpenAI-compatible server expects. It never goes
    over plain http to another machine. A server on this machine is asked without a key when none is set.

    Args:
        spec: `provider:model[@base_url]`.
        temperature: None leaves it to the server.
        continuation: `auto` takes the card's word; where that is `completions` and no tokenizer is known, `prefill` or
            `chat`, whichever the server can do.
        budget_usd: for all calls in the ledger; without a ledger file, for this teacher's life, in which identical
            requests are then paid once.
        ledger: file that keeps answers and bills.
        extra_body: sent with every request.
        tokenizer_path: the teacher's tokenizer folder, whose chat template writes raw prompts.

    Raises:
        ConfigError: the spec, the card or the arguments cannot be used.
        TeacherAuthError: no key, naming the variable to set.
    """
    parsed = parse_spec(spec)
    card = find_card(parsed.provider)
    on_card_host = is_card_host(parsed, card)
    price = card.price.of(parsed.model) if card.price and on_card_host else None
    teacher: RecordedTeacher
    if card.dialect == "echo":
        from omniopd.teachers.echo import EchoTeacher

        teacher = EchoTeacher(parsed.model)
    else:
        from omniopd.teachers.openai_compatible import OpenAITeacher

        base_url = parsed.base_url or card.base_url
        if base_url is None:
            raise ConfigError(f"the teacher {spec} has no address; write {parsed.provider}:{parsed.model}@BASE_URL")
        if not on_card_host:
            # Compatible servers understand the older name of the output limit, not all of them the newer one.
            card = card.model_copy(update={"output_limit_field": "max_tokens"})
        has_tokenizer = tokenizer_path is not None
        transport = pick_transport(card, continuation, has_tokenizer=has_tokenizer, is_card_host=on_card_host)
        teacher = OpenAITeacher(
            id=f"{card.id}:{parsed.model}",
            model=parsed.model,
            base_url=base_url,
            api_key=find_key(card, base_url),
            card=card,
            transport=transport,
            render=load_render(tokenizer_path) if transport == "completions" and tokenizer_path else None,
            price=price,
            temperature=temperature,
            top_p=top_p,
            max_concurrency=max_concurrency,
            timeout_s=timeout_s,
            max_attempts=max_attempts,
            extra_body=extra_body,
        )
    if ledger is None and budget_usd is None:
        return teacher
    return Ledgered(teacher, Ledger(ledger or ":memory:"), price=price, budget_usd=budget_usd)


def find_key(card: Card, base_url: str) -> str | None:
    """Return the key for an address, or None where none is needed.

    Raises TeacherAuthError when it is missing, and ConfigError when it would travel in the clear.
    """
    if card.api_key_env is None:
        return None
    key = os.environ.get(card.api_key_env, "").strip()
    if is_loopback(base_url):
        return key or _PLACEHOLDER_KEY
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


def pick_transport(card: Card, continuation: str, *, has_tokenizer: bool, is_card_host: bool) -> Transport:
    """Choose how the partial answer is handed over. Raises ConfigError when it cannot be as asked."""
    if continuation == "auto":
        if card.continuation != "completions" or has_tokenizer:
            return card.continuation
        for fallback in ("prefill", "chat"):
            if fallback in card.can.continuations:
                return fallback
        raise ConfigError(f"the teacher {card.id} takes raw prompts only; give the folder of its tokenizer")
    if continuation not in TRANSPORTS:
        raise ConfigError(f"continuation is {continuation!r}; expected auto, {', '.join(TRANSPORTS)}")
    # What an address of the user's own can do, only the user knows.
    if is_card_host and continuation not in card.can.continuations:
        raise ConfigError(
            f"continuation is {continuation!r} but the teacher {card.id} offers {', '.join(card.can.continuations)}; "
            "use one of these or auto"
        )
    return cast(Transport, continuation)


def load_render(tokenizer_path: Path) -> Render:
    """Return the function that writes a conversation with a tokenizer's chat template, up to where the answer begins.

    Without a template the messages are joined by blank lines. A start token that the server will add itself is left
    out, so that it is there once.
    """
    from omniopd.models import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_path))
    start = tokenizer.bos_token or ""
    server_adds_it = bool(start) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def render(messages: Sequence[Message]) -> str:
        if tokenizer.chat_template is None:
            return "\n\n".join(message.content for message in messages)
        turns = [message.to_json() for message in messages]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return text.removeprefix(start) if server_adds_it else text

    return render


def is_card_host(spec: TeacherSpec, card: Card) -> bool:
    """Say whether the card speaks about this address: its prices and limits hold for no other."""
    if spec.base_url is None or card.base_url is None:
        return spec.base_url is None
    if is_loopback(spec.base_url):
        return is_loopback(card.base_url)
    return urlsplit(spec.base_url).hostname == urlsplit(card.base_url).hostname
