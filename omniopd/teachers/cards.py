"""Teacher cards: one YAML file for a provider, with what is known about it. Loads pydantic and yaml, nothing else.

A card holds facts, never a key. Facts about hosted servers age: a card is the starting point, not the truth.
"""

from __future__ import annotations

import datetime
import fnmatch
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from omniopd.errors import ConfigError
from omniopd.teachers.spec import check_base_url, nearest

Transport = Literal["tokens", "completions", "prefill", "chat", "chat-turn", "structured"]
"""How a partial answer is handed over: the student's own token ids; one raw text; an assistant turn left open; quoted
in a user turn that asks to go on; an assistant turn and a user turn that asks to go on; `chat` with a JSON answer."""

DialectName = Literal["openai", "anthropic", "gemini", "ollama", "echo", "hf", "replay"]

USER_CARDS = Path("~/.config/omniopd/teachers")
_PACKAGED_CARDS = Path(__file__).with_name("cards")
_CHECKOUT_CARDS = Path(__file__).parents[2] / "teachers"

# Long unbroken runs of letters and digits with a well-known key prefix, or anything after "Bearer".
_SECRET = re.compile(r"\b(sk|pk|rk|gsk|xai|hf|ghp)[-_][A-Za-z0-9_-]{12,}|\bAIza[A-Za-z0-9_-]{20,}|\bBearer\s+\S{8,}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class Capabilities(_Part):
    """What the server does."""

    continuations: tuple[Transport, ...] = ("chat", "chat-turn")
    """The ways in which it can be handed a partial answer, the preferred first."""
    n: bool = False
    """Several samples in one request, the prompt paid once."""
    max_n: int | None = Field(default=None, ge=1)
    """The most samples in one request."""
    sampling: bool = True
    """It takes `temperature` and `top_p`. Where not, samples are as diverse as the server makes them."""
    seed: bool = False
    """It takes a seed."""
    stop: bool = True
    """It takes stop sequences."""
    logprobs: bool = False
    batch_prompts: int = Field(default=1, ge=1)
    """Prompts in one raw completion request."""
    prompt_seeds: bool = False
    """It takes `seeds`, one for each prompt, and sample i depends on (seed, i) alone: `omniopd serve`."""
    batch_api: bool = False
    """It has the half-price endpoint that answers within a day."""
    max_context_tokens: int | None = Field(default=None, ge=1)


class Thinking(_Part):
    """Hidden thinking, which is billed as output."""

    mode: Literal["none", "switchable", "always"] = "none"
    """`switchable`: the card's `body` switches it off. `always`: it cannot be."""
    headroom_tokens: int = Field(default=0, ge=0)
    """Added to the output limit, so that thinking does not use up what the answer needs."""


class PromptCache(_Part):
    """The provider's own cache of prompt heads."""

    mode: Literal["none", "automatic", "explicit"] = "none"
    """`explicit`: only where the request marks a place."""
    min_tokens: int = Field(default=1024, ge=1)
    """Shorter prompts are never cached."""


class Limits(_Part):
    """What the server allows."""

    max_in_flight: int | None = Field(default=None, ge=1)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


class ModelPrice(_Part):
    """What a model costs."""

    input_usd_per_mtok: float = Field(ge=0)
    output_usd_per_mtok: float = Field(ge=0)
    cached_input_usd_per_mtok: float | None = Field(default=None, ge=0)
    """Input read from the provider's cache; None: as other input."""
    cache_write_usd_per_mtok: float | None = Field(default=None, ge=0)
    """Input written into the provider's cache; None: as other input."""
    batch_factor: float = Field(default=0.5, gt=0, le=1)
    """What the batch endpoint charges of it."""

    def cost_usd(
        self, input_tokens: int, output_tokens: int, *, cached_input_tokens: int = 0, cache_write_tokens: int = 0
    ) -> float:
        """Price tokens. The cached and the written ones are part of `input_tokens`.

        Example:
            >>> ModelPrice(input_usd_per_mtok=2.0, output_usd_per_mtok=8.0).cost_usd(500_000, 250_000)
            3.0
        """
        read = self.input_usd_per_mtok if self.cached_input_usd_per_mtok is None else self.cached_input_usd_per_mtok
        write = self.input_usd_per_mtok if self.cache_write_usd_per_mtok is None else self.cache_write_usd_per_mtok
        plain = input_tokens - cached_input_tokens - cache_write_tokens
        inputs = plain * self.input_usd_per_mtok + cached_input_tokens * read + cache_write_tokens * write
        return (inputs + output_tokens * self.output_usd_per_mtok) / 1e6

    def highest_cost_usd(self, input_tokens: int, output_tokens: int) -> float:
        """Price tokens in the worst case: all input written into a cache that bills that."""
        return (input_tokens * self.highest_input_usd_per_mtok + output_tokens * self.output_usd_per_mtok) / 1e6

    @property
    def highest_input_usd_per_mtok(self) -> float:
        """The price of an input token in the worst case."""
        return max(self.input_usd_per_mtok, self.cache_write_usd_per_mtok or 0.0)


class Price(_Part):
    """Prices with the day on which they were read."""

    as_of: datetime.date
    models: dict[str, ModelPrice] = Field(min_length=1)
    """By model name or pattern (`gpt-4o*`); a name wins over a pattern, a longer pattern over a shorter."""

    def of(self, model: str) -> ModelPrice | None:
        """Return the price of a model; None when it is unknown."""
        if model in self.models:
            return self.models[model]
        fitting = [pattern for pattern in self.models if fnmatch.fnmatchcase(model, pattern)]
        return self.models[max(fitting, key=len)] if fitting else None


class Terms(_Part):
    """What the provider allows to do with its answers."""

    url: str | None = None
    note: str = ""


class Bodies(_Part):
    """Fields that a server needs in its requests, by transport."""

    all: dict[str, Any] = Field(default_factory=dict)
    tokens: dict[str, Any] = Field(default_factory=dict)
    completions: dict[str, Any] = Field(default_factory=dict)
    prefill: dict[str, Any] = Field(default_factory=dict)
    chat: dict[str, Any] = Field(default_factory=dict)
    """Of all transports that only ask: `chat`, `chat-turn`, `structured`."""
    prefill_message: dict[str, Any] = Field(default_factory=dict)
    """Put into the open assistant message itself."""

    def of(self, transport: Transport) -> dict[str, Any]:
        """Return the fields of a transport, those of all among them."""
        own = {"tokens": self.tokens, "completions": self.completions, "prefill": self.prefill}
        return {**self.all, **own.get(transport, self.chat)}


class Family(_Part):
    """Models of the provider that differ from the rest of the card. What is None is as the card says."""

    models: tuple[str, ...] = Field(min_length=1)
    """Patterns of model names, e.g. `claude-*-4-5*`. The first family that fits counts."""
    can: dict[str, Any] = Field(default_factory=dict)
    """Fields of the card's `can` that differ."""
    body: dict[str, Any] = Field(default_factory=dict)
    """Fields of the card's `body` that differ."""
    thinking: Thinking | None = None
    prompt_cache: PromptCache | None = None
    output_limit_field: str | None = None
    note: str = ""


class Card(_Part):
    """One provider, or one family of servers."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    dialect: DialectName
    base_url: Annotated[str, AfterValidator(check_base_url)] | None = None
    """None: the user must give one."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Z][A-Z0-9_]*$")
    """The name of the variable with the key; None when the server asks for none."""
    key_header: str | None = None
    """Where the key goes if not where the dialect puts it, e.g. `api-key`."""
    output_limit_field: str | None = None
    """What the dialect calls the output limit, if not as usual, e.g. `max_completion_tokens`."""
    echoes_prefix: bool = False
    """The answer to a prefill begins with the prefilled text."""
    can: Capabilities = Capabilities()
    thinking: Thinking = Thinking()
    prompt_cache: PromptCache = PromptCache()
    limits: Limits = Limits()
    price: Price | None = None
    """None: unknown here, which is not free."""
    price_table: str | None = None
    """The provider's name in litellm's price table, when that package is installed."""
    body: Bodies = Bodies()
    families: tuple[Family, ...] = ()
    start_hint: str = "check the address and that the server is running"
    """What to do when nothing answers at the address."""
    terms: Terms = Terms()
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.can.continuations:
            raise ValueError("can.continuations is empty")
        for family in self.families:
            self.of_family(family)  # Raises for a field that does not exist.
        return self

    def for_model(self, model: str) -> Card:
        """Return the card as it holds for one model: its family's fields merged in, no families left."""
        for family in self.families:
            if any(fnmatch.fnmatchcase(model, pattern) for pattern in family.models):
                return self.of_family(family)
        return self.model_copy(update={"families": ()})

    def of_family(self, family: Family) -> Card:
        """Return the card with one family's fields merged in."""
        fields = ("thinking", "prompt_cache", "output_limit_field")
        given = {name: value for name in fields if (value := getattr(family, name)) is not None}
        return self.model_copy(
            update={
                **given,
                "can": Capabilities.model_validate({**self.can.model_dump(), **family.can}),
                "body": Bodies.model_validate({**self.body.model_dump(), **family.body}),
                "note": " ".join(note for note in (self.note, family.note) if note),
                "families": (),
            }
        )


def holds_key(text: str) -> bool:
    """Say whether a text holds what is shaped like a key."""
    return _SECRET.search(text) is not None


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
    if holds_key(text):
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
