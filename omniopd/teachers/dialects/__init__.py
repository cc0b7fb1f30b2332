"""The wording of each provider, by the name that cards use."""

from __future__ import annotations

from omniopd.errors import ConfigError
from omniopd.teachers.dialects.anthropic import AnthropicDialect
from omniopd.teachers.dialects.base import Dialect
from omniopd.teachers.dialects.gemini import GeminiDialect
from omniopd.teachers.dialects.ollama import OllamaDialect
from omniopd.teachers.dialects.openai import OpenAIDialect

_DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect for dialect in (OpenAIDialect(), AnthropicDialect(), GeminiDialect(), OllamaDialect())
}


def get_dialect(name: str) -> Dialect:
    """Return the dialect that a card names. Raises ConfigError for unknown names and where nothing goes over a wire."""
    if name in _DIALECTS:
        return _DIALECTS[name]
    known = ", ".join(_DIALECTS)
    if name in ("echo", "hf", "replay"):
        raise ConfigError(f"teachers with the dialect {name!r} send no HTTP requests; those that do speak {known}")
    raise ConfigError(f"there is no dialect {name!r}; expected {known}")
