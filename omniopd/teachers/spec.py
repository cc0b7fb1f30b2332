"""How a teacher is named: `provider:model[@base_url]`. Knows nothing about what a provider can do."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from omniopd.errors import ConfigError

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

_FORM = "provider:model[@base_url], for example openai:gpt-4o or local:my-model@http://127.0.0.1:8000/v1"
# Model names may hold '@' themselves (Vertex, Cloudflare), so only '@http...' starts a base_url.
_BASE_URL = re.compile(r"@(?=https?://)", re.IGNORECASE)
_HOST_WITHOUT_SCHEME = re.compile(r"@(localhost|[\w.-]+:\d+)(/|$)", re.IGNORECASE)
_BROKEN_URL = re.compile(r"@[A-Za-z][A-Za-z0-9+.-]*:/|@/")
_PROVIDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec:
    """A teacher as the user wrote it."""

    provider: str
    """The id of a card, or the path of a card file ending in `.yaml` or `.yml`."""
    model: str
    """As the server knows it; may hold ':' and '/'."""
    base_url: str | None = None
    """Where to ask instead of the card's address; without a trailing slash."""

    @property
    def is_card_file(self) -> bool:
        return self.provider.endswith((".yaml", ".yml"))

    def __str__(self) -> str:
        return f"{self.provider}:{self.model}" + (f"@{self.base_url}" if self.base_url else "")


def parse_spec(text: str) -> TeacherSpec:
    """Read `provider:model[@base_url]`. Raises ConfigError that names the nearest provider.

    Only the form is checked: `omniopd.teachers.cards.find_card` tells whether the provider exists.

    Example:
        >>> parse_spec("vllm:Qwen/Qwen3-32B@http://127.0.0.1:8001/v1").model
        'Qwen/Qwen3-32B'
    """
    head, *urls = _BASE_URL.split(text.strip(), maxsplit=1)
    base_url = check_base_url(urls[0]) if urls else None
    provider, colon, model = head.partition(":")
    if not colon:
        raise ConfigError(f"the teacher {text!r} names no provider; expected {_FORM}{_suggestion(head)}")
    if not model or model != model.strip():
        raise ConfigError(f"the teacher {text!r} names no model; expected {_FORM}")
    if model.endswith("@") or _BROKEN_URL.search(model):
        # Taken for a part of the name, it would send prompts and key to the card's own address.
        raise ConfigError(f"the teacher {text!r} has an address that is none; expected {_FORM}")
    if host := _HOST_WITHOUT_SCHEME.search(model):
        raise ConfigError(
            f"the teacher {text!r} has an address without a scheme after '@'; "
            f"write {provider}:{model[: host.start()]}@http://{model[host.start() + 1 :]}"
        )
    spec = TeacherSpec(provider=provider, model=model, base_url=base_url)
    if not spec.is_card_file and not _PROVIDER.fullmatch(provider):
        raise ConfigError(
            f"the teacher {text!r} has the provider {provider!r}; expected {_FORM}{_suggestion(provider)}"
        )
    return spec


def check_base_url(url: str) -> str:
    """Return the address without its trailing slash. Raises ConfigError when it could leak or cannot work."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        # The message leaves the address out: it holds a secret.
        raise ConfigError(
            "the teacher's base_url holds a user name or password; put the key in an environment variable"
        )
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the teacher's base_url {url!r} is no address; expected http(s)://host[:port]/v1")
    if parts.query or parts.fragment:
        raise ConfigError(
            f"the teacher's base_url for {parts.hostname} has a query or a fragment; expected http(s)://host[:port]/v1"
        )
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Say whether the address is on this machine."""
    return (urlsplit(url).hostname or "").lower() in LOOPBACK_HOSTS


def nearest(name: str, known: list[str]) -> str | None:
    """Return the known name that looks most like `name`, if any does."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return close[0] if close else None


def _suggestion(provider: str) -> str:
    # Late: cards use this module.
    from omniopd.teachers.cards import card_names

    known = card_names()
    close = nearest(re.split(r"[/ -]", provider)[0], known)
    return f"; the nearest provider is {close!r}" if close else f"; the providers are {', '.join(known)}"
