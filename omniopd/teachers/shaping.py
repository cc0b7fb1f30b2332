"""What of a teacher's spec and options shapes its answers, in a form that holds tomorrow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from omniopd.teachers.spec import is_loopback, parse_spec

SHAPING_OPTIONS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": None,
    "continuation": "auto",
    "extra_body": None,
    "tokenizer_path": None,
    "shares_vocabulary": False,
}
"""The options of `open_teacher` that shape an answer, with their defaults. The others say how fast it comes, what it
may cost and where it is kept."""


def shaping_options(options: Mapping[str, Any]) -> dict[str, str | int | float | None]:
    """Return those of the options that shape an answer, with the defaults of the rest, as plain values."""
    given = {**SHAPING_OPTIONS, **options}
    plain = {name: _plain(given[name]) for name in SHAPING_OPTIONS}
    if plain["tokenizer_path"] is not None:
        plain["tokenizer_path"] = os.path.abspath(os.path.expanduser(str(plain["tokenizer_path"])))
    return plain


def lasting_spec(spec: str) -> str:
    """Return a teacher's spec without the port of a server on this machine, which is another one tomorrow."""
    parsed = parse_spec(spec)
    if parsed.base_url is None or not is_loopback(parsed.base_url):
        return spec.strip()
    parts = urlsplit(parsed.base_url)
    host = parts.netloc.removesuffix(f":{parts.port}")
    return f"{parsed.provider}:{parsed.model}@{parts.scheme}://{host}{parts.path}"


def _plain(value: Any) -> str | int | float | None:
    return value if isinstance(value, str | int | float | None) else str(value)
