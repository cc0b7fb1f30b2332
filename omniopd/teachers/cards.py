"""Teacher cards: one YAML file for a provider, with what is known about it. Loads pydantic and yaml, nothing else.

A card holds facts, never a key. Facts about hosted servers age: a card is the starting point, not the truth.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from omniopd.errors import ConfigError
from omniopd.teachers.spec import check_base_url, nearest

Transport = Literal["completions", "prefill", "chat"]

USER_CARDS = Path("~/.config/omniopd/teachers")
_PACKAGED_CARDS = Path(__file__).with_name("cards")
_CHECKOUT_CARDS = Path(__file__).parents[2] / "teachers"

# Long unbroken runs of letters and digits with a well-known key prefix, or anything after "Bearer".
_SECRET = re.compile(r"\b(sk|pk|rk|gsk|xai|hf|ghp)[-_][A-Za-z0-9_-]{12,}|\bAIza[A-Za-z0-9_-]{20,}|\bBearer\s+\S{8,}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class Capabilities(_Part):
    """What the server does."""

    continuations: tuple[Transport, ...] = ("chat",)
    """The ways in which it can be handed a partial answer."""
    n: bool = False
    """Several samples in one request, the prompt paid once."""
    seed: bool = False
    """It takes `seed`."""
    logprobs: bool = False
    batch_prompts: int = Field(default=1, ge=1)
    """Prompts in one `/completions` request."""
    prompt_seeds: bool = False
    """It takes `seeds`, one for each prompt, and sample i depends on (seed, i) alone: `omniopd serve`."""
    max_context_tokens: int | None = Field(default=None, ge=1)


class Limits(_Part):
    """What the server allows."""

    max_in_flight: int | None = Field(default=None, ge=1)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


class ModelPrice(_Part):
    """What a model costs."""

    input_usd_per_mtok: float = Field(ge=0)
    output_usd_per_mtok: float = Field(ge=0)

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float:
        """Price tokens.

        Example:
            >>> ModelPrice(input_usd_per_mtok=2.0, output_usd_per_mtok=8.0).cost_usd(500_000, 250_000)
            3.0
        """
        return (input_tokens * self.input_usd_per_mtok + output_tokens * self.output_usd_per_mtok) / 1e6


class Price(_Part):
    """Prices with the day on which they were read."""

    as_of: datetime.date
    models: dict[str, ModelPrice] = Field(min_length=1)
    """By model name; `*` holds for every other model."""

    def of(self, model: str) -> ModelPrice | None:
        """Return the price of a model; None when it is unknown."""
        return self.models.get(model) or self.models.get("*")


class Terms(_Part):
    """What the provider allows to do with its answers."""

    url: str | None = None
    note: str = ""


class Bodies(_Part):
    """Fields that a server needs in its requests, by transport."""

    all: dict[str, Any] = Field(default_factory=dict)
    completions: dict[str, Any] = Field(default_factory=dict)
    prefill: dict[str, Any] = Field(default_factory=dict)
    chat: dict[str, Any] = Field(default_factory=dict)
    prefill_message: dict[str, Any] = Field(default_factory=dict)
    """Put into the trailing assistant message itself."""


class Card(_Part):
    """One provider, or one family of servers."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    dialect: Literal["openai-chat", "openai-completions", "echo"]
    """`openai-completions` has no chat endpoint."""
    base_url: Annotated[str, AfterValidator(check_base_url)] | None = None
    """None: the user must give one."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Z][A-Z0-9_]*$")
    """The name of the variable with the key; None when the server asks for none."""
    continuation: Transport = "chat"
    """How a partial answer is handed over unless the user says otherwise."""
    output_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    echoes_prefix: bool = False
    """The answer to a prefill begins with the prefilled text."""
    can: Capabilities = Capabilities()
    limits: Limits = Limits()
    price: Price | None = None
    """None: unknown, which is not free."""
    body: Bodies = Bodies()
    start_hint: str = "check the address and that the server is running"
    """What to do when nothing answers at the address."""
    terms: Terms = Terms()
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.continuation not in self.can.continuations:
            raise ValueError(f"continuation {self.continuation!r} is not among can.continuations")
        if self.dialect == "openai-completions" and self.can.continuations != ("completions",):
            raise ValueError("the dialect openai-completions has only the continuation 'completions'")
        return self


def load_card(path: Path) -> Card:
    """Read one card. Raises ConfigError that names the file and the field."""
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the teacher card {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        # No cause: the parser quotes the line, and a line may hold a key pasted by mistake.
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"the teacher card {path} is no YAML{where}") from None
    if _SECRET.search(text):
        raise ConfigError(
            f"the teacher card {path} holds what looks like a key; a card names the environment variable "
            "(api_key_env: NAME) and never the key"
        )
    if not isinstance(data, dict):
        raise ConfigError(f"the teacher card {path} must be a mapping, got {type(data).__name__}")
    try:
        return Card.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'card'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"the teacher card {path} is invalid: {problems}") from None


def card_folders() -> tuple[Path, ...]:
    """Return where cards are looked for, first match wins: ./teachers, the user's, those that come with omniopd."""
    # An editable install and a checkout have no copy inside the package; a wheel has nothing else.
    shipped = _PACKAGED_CARDS if _PACKAGED_CARDS.is_dir() else _CHECKOUT_CARDS
    return (Path("teachers"), USER_CARDS.expanduser(), shipped)


def card_names() -> list[str]:
    """Return the ids that `find_card` knows, without reading the files: a card's file is called after its id."""
    return sorted({path.stem for folder in card_folders() for path in folder.glob("*.yaml")})


def list_cards() -> list[Card]:
    """Return all cards that `find_card` knows, by id. Raises ConfigError when one of them is invalid."""
    return [find_card(name) for name in card_names()]


def find_card(provider: str) -> Card:
    """Return the card with this id, or the one in this file. Raises ConfigError that names the nearest id."""
    if provider.endswith((".yaml", ".yml")):
        return load_card(Path(provider).expanduser())
    for folder in card_folders():
        path = folder / f"{provider}.yaml"
        if path.is_file():
            card = load_card(path)
            if card.id != provider:
                raise ConfigError(
                    f"the teacher card {path} has the id {card.id!r}; the file must be called {card.id}.yaml"
                )
            return card
    known = card_names()
    close = nearest(provider, known)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}."
    raise ConfigError(
        f"there is no teacher card {provider!r}; {hint} Any OpenAI-compatible server works as openai:MODEL@BASE_URL; "
        f"or write teachers/{provider}.yaml"
    )
