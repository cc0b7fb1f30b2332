"""Naming teachers and reading their cards; what the shipped cards say."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any, get_args

import pytest

from omniopd.errors import ConfigError
from omniopd.teachers import cards
from omniopd.teachers.cards import Transport, find_card, list_cards, load_card
from omniopd.teachers.dialects import get_dialect
from omniopd.teachers.dialects.base import Ask
from omniopd.teachers.spec import TeacherSpec, is_loopback, parse_spec
from omniopd.types import Message

SHIPPED = [
    "anthropic", "azure", "deepseek", "echo", "fireworks", "gemini", "hf", "llamacpp", "local", "mistral", "ollama",
    "openai", "openrouter", "replay", "sglang", "together", "vllm",
]  # fmt: skip
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _only_shipped_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cards, "USER_CARDS", tmp_path / "home-cards")


@pytest.mark.parametrize(
    ("text", "provider", "model", "base_url"),
    [
        ("openai:gpt-4o", "openai", "gpt-4o", None),
        ("vllm:Qwen/Qwen3-32B@http://h:8001/v1/", "vllm", "Qwen/Qwen3-32B", "http://h:8001/v1"),
        ("openai:ft:gpt-4o:org::id", "openai", "ft:gpt-4o:org::id", None),
        ("openrouter:@cf/meta/llama-3", "openrouter", "@cf/meta/llama-3", None),
        ("openai:claude@20251001@https://h/v1", "openai", "claude@20251001", "https://h/v1"),
        ("./mine.yaml:m", "./mine.yaml", "m", None),
    ],
)
def test_specs_are_split(text: str, provider: str, model: str, base_url: str | None) -> None:
    spec = parse_spec(text)
    assert spec == TeacherSpec(provider=provider, model=model, base_url=base_url)
    assert str(spec) == text.rstrip("/")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpt-4o", "names no provider"),
        ("opanai/gpt-4o", "nearest provider is 'openai'"),
        ("openai:", "names no model"),
        (":gpt-4o", "expected provider:model"),
        ("open ai:gpt-4o", "nearest provider is 'openai'"),
        ("local:m@127.0.0.1:8000/v1", "local:m@http://127.0.0.1:8000/v1"),
        ("local:m@localhost", "local:m@http://localhost"),
        ("local:m@http://", "is no address"),
        ("local:m@https://h/v1?api=1", "query"),
    ],
)
def test_bad_specs_say_what_to_write(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(text)
    assert words in str(caught.value)


def test_credentials_in_an_address_are_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec("openai:m@https://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)


def test_all_shipped_cards_are_valid_and_free_of_keys() -> None:
    assert [card.id for card in list_cards()] == SHIPPED
    assert sorted(path.stem for path in (REPOSITORY / "teachers").glob("*.yaml")) == SHIPPED


def test_an_unknown_provider_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'openai'"):
        find_card("openia")
    with pytest.raises(ConfigError, match="there are anthropic, azure, deepseek, echo"):
        find_card("zzz")


def write_card(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_nearer_cards_win(tmp_path: Path) -> None:
    write_card(tmp_path / "home-cards" / "openai.yaml", "{id: openai, dialect: openai, note: home}")
    assert find_card("openai").note == "home"
    write_card(tmp_path / "teachers" / "openai.yaml", "{id: openai, dialect: openai, note: here}")
    assert find_card("openai").note == "here"
    mine = write_card(tmp_path / "mine.yaml", "{id: mine, dialect: openai, note: path}")
    assert find_card(str(mine)).note == "path"


def test_unrelated_yaml_in_the_folder_does_not_stop_a_run(tmp_path: Path) -> None:
    write_card(tmp_path / "teachers" / "timetable.yaml", "- monday\n")
    assert find_card("openai").id == "openai"
    with pytest.raises(ConfigError, match=r"timetable\.yaml must be a mapping, got list"):
        list_cards()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{id: x, dialect: openai, colour: red}", "colour: Extra inputs"),
        ("{id: x, dialect: telepathy}", "dialect: Input should be"),
        ("{id: x, dialect: openai, price: {models: {}}}", "price.as_of: Field required"),
        ("{id: x, dialect: openai, can: {continuations: []}}", "can.continuations is empty"),
        ("{id: x, dialect: openai, can: {continuations: [telepathy]}}", "can.continuations.0: Input should be"),
        ("{id: x, dialect: openai, families: [{models: [m], can: {colour: red}}]}", "colour"),
        ("{id: x, dialect: openai, families: [{models: [m], body: {colour: {}}}]}", "colour"),
        ("{id: x, dialect: openai, base_url: ftp://h}", "is no address"),
        ("{id: x, dialect: openai, api_key_env: sk-abcdefghijklmnop1234}", "looks like a key"),
        ("{id: x, dialect: openai, note: 'Bearer abcdefghijk'}", "looks like a key"),
        ("{id: x, dialect: openai", "is no YAML"),
        ("{id: other, dialect: openai}", "the file must be called other.yaml"),
    ],
)
def test_bad_cards_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = write_card(tmp_path / "teachers" / "x.yaml", text)
    with pytest.raises(ConfigError) as caught:
        find_card("x")
    assert words in str(caught.value)
    assert str(path.name) in str(caught.value)
    assert "sk-abcdefghijklmnop1234" not in str(caught.value)


def test_a_missing_card_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_card(Path("nowhere.yaml"))


def test_prices_are_per_million_tokens_and_by_model(tmp_path: Path) -> None:
    card = load_card(
        write_card(
            tmp_path / "p.yaml",
            "{id: p, dialect: openai, price: {as_of: 2026-01-02, models: "
            "{big: {input_usd_per_mtok: 2, output_usd_per_mtok: 8}}}}",
        )
    )
    assert card.price is not None
    price = card.price.of("big")
    assert price is not None
    # 1000 * 2 / 1e6 + 500 * 8 / 1e6 = 0.002 + 0.004
    assert price.cost_usd(1000, 500) == pytest.approx(0.006)
    assert card.price.of("small") is None


def test_a_name_wins_over_a_pattern_and_a_longer_pattern_over_a_shorter(tmp_path: Path) -> None:
    costs = {"big": 1, "b*": 2, "bi*": 3}
    models = ", ".join(f'"{name}": {{input_usd_per_mtok: {n}, output_usd_per_mtok: 9}}' for name, n in costs.items())
    text = f"{{id: p, dialect: openai, price: {{as_of: 2026-01-02, models: {{{models}}}}}}}"
    price = load_card(write_card(tmp_path / "p.yaml", text)).price
    assert price is not None
    found = {model: price.of(model) for model in ("big", "bigger", "bad", "small")}
    assert {m: p.input_usd_per_mtok if p else None for m, p in found.items()} == {
        "big": 1.0, "bigger": 3.0, "bad": 2.0, "small": None,
    }  # fmt: skip


def test_cached_and_written_input_have_their_own_prices() -> None:
    price = cards.ModelPrice(
        input_usd_per_mtok=2.0, output_usd_per_mtok=8.0, cached_input_usd_per_mtok=0.5, cache_write_usd_per_mtok=2.5
    )
    # (600 * 2 + 300 * 0.5 + 100 * 2.5 + 50 * 8) / 1e6 = (1200 + 150 + 250 + 400) / 1e6
    assert price.cost_usd(1000, 50, cached_input_tokens=300, cache_write_tokens=100) == pytest.approx(0.002)
    assert price.highest_input_usd_per_mtok == 2.5


# What the shipped cards say about models: the ways to hand over a partial answer, whether temperature is taken, hidden
# thinking, and the fields that are sent because of it.
OFF: dict[str, Any] = {"thinking": {"type": "disabled"}}
ASKED = ("chat-turn", "chat")
PREFILLED = ("prefill", "chat-turn", "chat")
HOSTED = ("chat", "chat-turn", "structured")


def level(name: str) -> dict[str, Any]:
    return {"generationConfig": {"thinkingConfig": {"thinkingLevel": name}}}


def budget(tokens: int) -> dict[str, Any]:
    return {"generationConfig": {"thinkingConfig": {"thinkingBudget": tokens}}}


@pytest.mark.parametrize(
    ("provider", "model", "continuations", "sampling", "thinking", "body"),
    [
        ("openai", "gpt-4o", HOSTED, True, "none", {}),
        ("openai", "gpt-3.5-turbo-instruct", ("completions",), True, "none", {}),
        ("openai", "o4-mini", HOSTED, False, "always", {}),
        ("openai", "ft:o4-mini:org::id", HOSTED, False, "always", {}),
        ("openai", "gpt-5", HOSTED, False, "always", {"reasoning_effort": "minimal"}),
        ("openai", "gpt-5-mini", HOSTED, False, "always", {"reasoning_effort": "minimal"}),
        ("openai", "gpt-5-chat-latest", HOSTED, True, "none", {}),
        ("openai", "gpt-5.1", HOSTED, False, "switchable", {"reasoning_effort": "none"}),
        ("openai", "gpt-5.6-mini", HOSTED, False, "switchable", {"reasoning_effort": "none"}),
        ("azure", "gpt-4o", HOSTED, True, "none", {}),
        ("azure", "gpt-5.2", HOSTED, False, "switchable", {"reasoning_effort": "none"}),
        ("anthropic", "claude-3-7-sonnet-20250219", PREFILLED, True, "none", {}),
        ("anthropic", "claude-opus-4-20250514", PREFILLED, True, "none", {}),
        ("anthropic", "claude-opus-4-1-20250805", PREFILLED, True, "none", {}),
        ("anthropic", "claude-sonnet-4-5-20250929", PREFILLED, True, "none", {}),
        ("anthropic", "claude-haiku-4-5", PREFILLED, True, "none", {}),
        ("anthropic", "claude-opus-4-6", ASKED, True, "none", {}),
        ("anthropic", "claude-sonnet-4-6", ASKED, True, "none", {}),
        ("anthropic", "claude-opus-4-7", ASKED, False, "none", {}),
        ("anthropic", "claude-opus-4-8", ASKED, False, "none", {}),
        ("anthropic", "claude-sonnet-5", ASKED, False, "switchable", OFF),
        ("anthropic", "claude-opus-5", ASKED, False, "switchable", OFF),
        ("anthropic", "claude-haiku-5-5", ASKED, False, "switchable", OFF),
        ("anthropic", "claude-sonnet-5-5", ASKED, False, "switchable", {"thinking": {"type": "between_tools"}}),
        ("anthropic", "claude-opus-5-5", ASKED, False, "always", {"output_config": {"effort": "low"}}),
        ("anthropic", "claude-fable-5-1", ASKED, False, "always", {"output_config": {"effort": "low"}}),
        ("anthropic", "claude-newer-than-this", ASKED, False, "always", {}),
        ("gemini", "gemini-2.0-flash", (*PREFILLED, "structured"), True, "none", {}),
        ("gemini", "gemini-2.5-flash", (*PREFILLED, "structured"), True, "switchable", budget(0)),
        ("gemini", "gemini-2.5-pro", (*PREFILLED, "structured"), True, "always", budget(128)),
        ("gemini", "gemini-3-flash", (*PREFILLED, "structured"), True, "always", level("MINIMAL")),
        ("gemini", "gemini-3.1-pro", (*PREFILLED, "structured"), True, "always", level("LOW")),
        ("gemini", "gemini-3.5-flash", (*PREFILLED, "structured"), True, "always", level("MINIMAL")),
        ("gemini", "gemini-3.5-flash-lite", (*ASKED, "structured"), False, "always", level("MINIMAL")),
        ("gemini", "gemini-3.8-flash", (*ASKED, "structured"), False, "always", level("MINIMAL")),
        ("gemini", "gemini-4-pro", (*ASKED, "structured"), False, "always", level("LOW")),
        ("deepseek", "deepseek-v4-flash", PREFILLED, True, "switchable", OFF),
        ("mistral", "mistral-large-latest", (*PREFILLED, "structured"), True, "none", {}),
        ("mistral", "magistral-medium-latest", (*PREFILLED, "structured"), True, "always", {}),
        ("openrouter", "anthropic/claude-sonnet-4.5", (*ASKED, "prefill", "structured"), True, "switchable",
         {"reasoning": {"effort": "none"}}),
        ("openrouter", "anthropic/claude-opus-5.5", ASKED, False, "always", {"reasoning": {"effort": "low"}}),
        ("openrouter", "anthropic/claude-opus-4.7", ASKED, False, "switchable", {"reasoning": {"effort": "none"}}),
        ("openrouter", "anthropic/claude-sonnet-4.6", ASKED, True, "switchable", {"reasoning": {"effort": "none"}}),
        ("openrouter", "openai/gpt-5.2", ASKED, False, "switchable", {"reasoning": {"effort": "none"}}),
        ("openrouter", "google/gemini-2.5-pro", ASKED, True, "always", {"reasoning": {"effort": "low"}}),
        ("vllm", "Qwen/Qwen3-32B", ("tokens", "completions", "prefill", "chat-turn", "chat"), True, "switchable",
         {"chat_template_kwargs": {"enable_thinking": False}}),
    ],
)  # fmt: skip
def test_a_family_knows_its_models(
    provider: str,
    model: str,
    continuations: tuple[Transport, ...],
    sampling: bool,
    thinking: str,
    body: dict[str, Any],
) -> None:
    card = find_card(provider).for_model(model)
    assert card.can.continuations == continuations
    assert card.can.sampling is sampling
    assert card.thinking.mode == thinking
    assert card.body.of("chat") == body
    # What cannot be switched off needs room, what is off needs none.
    assert card.thinking.headroom_tokens == (1024 if thinking == "always" else 0)


@pytest.mark.parametrize(
    ("model", "mode", "min_tokens"),
    [
        ("anthropic:claude-opus-4-5-20251101", "explicit", 4096),
        ("anthropic:claude-sonnet-4-5", "explicit", 1024),
        ("anthropic:claude-opus-4-6", "explicit", 4096),
        ("anthropic:claude-sonnet-4-6", "explicit", 1024),
        ("anthropic:claude-opus-4-7", "explicit", 2048),
        ("anthropic:claude-opus-4-8", "explicit", 1024),
        ("anthropic:claude-opus-5-5", "explicit", 512),
        ("openai:gpt-4o", "automatic", 1024),
        ("gemini:gemini-2.5-pro", "automatic", 2048),
        ("gemini:gemini-3.8-flash", "automatic", 4096),
        ("deepseek:deepseek-chat", "automatic", 64),
        ("vllm:anything", "automatic", 16),
        ("together:anything", "none", 1024),
    ],
)
def test_prompt_caches(model: str, mode: str, min_tokens: int) -> None:
    provider, _, name = model.partition(":")
    cache = find_card(provider).for_model(name).prompt_cache
    assert (cache.mode, cache.min_tokens) == (mode, min_tokens)


def test_a_familys_prefill_keeps_the_switches_of_its_card() -> None:
    for provider in ("vllm", "sglang"):
        card = find_card(provider)
        plain, thinker = card.body.prefill, card.for_model("qwen3-8b").body.prefill
        assert thinker == {**plain, "chat_template_kwargs": {"enable_thinking": False}}
        assert card.for_model("qwen3-8b").body.of("completions") == {}


@pytest.mark.parametrize("provider", SHIPPED)
def test_every_family_is_reached_by_one_of_its_own_names(provider: str) -> None:
    card = find_card(provider)
    for family in card.families:
        names = [pattern.replace("[0-9]", "3").replace("[Qq]", "q").replace("*", "x") for pattern in family.models]
        for name in names:
            first = next(f for f in card.families if any(fnmatch.fnmatchcase(name, p) for p in f.models))
            assert first == family, f"{name} of {provider} never reaches its family"


@pytest.mark.parametrize("provider", SHIPPED)
def test_every_card_can_be_asked_as_it_says(provider: str) -> None:
    whole = find_card(provider)
    if whole.dialect in ("echo", "hf", "replay"):
        with pytest.raises(ConfigError, match="send no HTTP requests"):
            get_dialect(whole.dialect)
        return
    dialect = get_dialect(whole.dialect)
    for card in (whole.for_model("any"), *(whole.of_family(family) for family in whole.families)):
        for transport in card.can.continuations:
            call = dialect.call(ask_for(transport, n=2 if card.can.n else 1), card)
            assert call.path.startswith("/")
            assert is_in(card.body.of(transport), call.body)


def ask_for(transport: Transport, *, n: int) -> Ask:
    given: dict[str, Any] = {"messages": (Message(role="user", content="Q"),)}
    if transport == "prefill":
        given["prefix"] = "A"
    elif transport == "completions":
        given = {"prompts": ("QA",)}
    elif transport == "tokens":
        given = {"prompt_ids": (1, 2)}
    elif transport == "structured":
        given["schema"] = {"type": "object"}
    return Ask(model="m", transport=transport, n=n, max_tokens=8, seeds=(1,), temperature=1.0, **given)


def is_in(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and is_in(part[name], whole[name]) for name in part)
    return bool(part == whole)


def test_keys_are_named_for_hosted_servers_and_for_no_other() -> None:
    for card in list_cards():
        is_hosted = card.dialect not in ("echo", "hf", "replay") and not is_loopback(card.base_url or "https://hosted")
        assert (card.api_key_env is not None) == is_hosted, card.id
        if card.base_url and is_hosted:
            assert card.base_url.startswith("https://")


def test_no_hosted_price_is_shipped_and_only_own_machines_are_free() -> None:
    free = {"echo", "hf", "local", "replay"}
    assert {card.id for card in list_cards() if card.price is not None} == free
    for card in list_cards():
        if card.price is not None:
            price = card.price.of("anything")
            assert price is not None
            assert price.cost_usd(1000, 1000) == 0.0


def test_the_raw_prompt_goes_first_at_servers_of_ones_own() -> None:
    order = ("tokens", "completions", "prefill", "chat-turn", "chat")
    for name in ("vllm", "sglang", "llamacpp"):
        assert find_card(name).can.continuations == order
    assert find_card("local").can.continuations == ("completions", "tokens", "prefill", "chat", "chat-turn")
    assert set(order) | {"structured"} == set(get_args(Transport))


@pytest.mark.parametrize(
    "spec",
    ["openai:m@htps://host/v1", "openai:m@ftp://host", "openai:m@https:/host/v1", "openai:m@//host", "openai:m@"],
)
def test_an_address_with_a_slip_is_no_part_of_the_models_name(spec: str) -> None:
    with pytest.raises(ConfigError, match="an address that is none"):
        parse_spec(spec)
