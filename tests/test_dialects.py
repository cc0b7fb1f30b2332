"""The wording of each provider: exact requests, and field names that the SDKs know."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import typing_extensions as typing

from omniopd.errors import ConfigError, TeacherCapabilityError
from omniopd.teachers.cards import Card, Transport, find_card
from omniopd.teachers.dialects import get_dialect
from omniopd.teachers.dialects.base import Ask, HttpCall
from omniopd.types import Message

USER = Message(role="user", content="48+37?")
SYSTEM = Message(role="system", content="Be brief.")
SCHEMA = {"type": "object", "properties": {"continuation": {"type": "string"}}}
ANY_CAN = {"n": True, "seed": True, "batch_prompts": 8}


def make_card(dialect: str, *, can: dict[str, Any] | None = None, **fields: Any) -> Card:
    return Card.model_validate({"id": "x", "dialect": dialect, "can": {**ANY_CAN, **(can or {})}, **fields})


def make_ask(transport: Transport, **fields: Any) -> Ask:
    given: dict[str, Any] = {"model": "m", "n": 1, "max_tokens": 50}
    if transport not in ("tokens", "completions"):
        given["messages"] = (SYSTEM, USER)
    return Ask(transport=transport, **{**given, **fields})


FULL: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seeds": (7,), "stop": ("</t>",)}


def call(dialect: str, ask: Ask, card: Card | None = None) -> HttpCall:
    return get_dialect(dialect).call(ask, card or make_card(dialect))


# OpenAI: requests


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "48+37?"}]


def test_openai_tokens() -> None:
    sent = call("openai", make_ask("tokens", n=4, prompt_ids=(5, 6, 7), **FULL))
    assert sent.path == "/completions"
    assert sent.body == {
        "model": "m", "prompt": [5, 6, 7], "max_tokens": 50, "n": 4, "temperature": 0.8, "top_p": 0.9, "seed": 7,
        "stop": ["</t>"],
    }  # fmt: skip


def test_openai_completions_of_one_prompt_and_of_several() -> None:
    sent = call("openai", make_ask("completions", prompts=("Q: 48+37? A: 8",), temperature=0.8))
    assert sent.path == "/completions"
    assert sent.body == {"model": "m", "prompt": "Q: 48+37? A: 8", "max_tokens": 50, "temperature": 0.8}

    several = make_ask("completions", prompts=("a", "b"), n=2, seeds=(7, 8))
    local = make_card("openai", can={"prompt_seeds": True})
    assert call("openai", several, local).body == {
        "model": "m", "prompt": ["a", "b"], "max_tokens": 50, "n": 2, "seeds": [7, 8],
    }  # fmt: skip
    with pytest.raises(TeacherCapabilityError, match="takes one seed for all"):
        call("openai", several)
    one_seed = make_ask("completions", prompts=("a", "b"), seeds=(7,))
    for card in (local, make_card("openai")):
        assert call("openai", one_seed, card).body["seed"] == 7
    assert "seed" not in call("openai", one_seed, make_card("openai", can={"seed": False})).body


def test_openai_chat() -> None:
    card = make_card("openai", output_limit_field="max_completion_tokens")
    for transport in ("chat", "chat-turn"):
        sent = call("openai", make_ask(transport, n=4, **FULL), card)
        assert sent.path == "/chat/completions"
        assert sent.body == {
            "model": "m", "messages": MESSAGES, "max_completion_tokens": 50, "n": 4, "temperature": 0.8, "top_p": 0.9,
            "seed": 7, "stop": ["</t>"],
        }  # fmt: skip
    # Raw completions never had the newer name.
    assert call("openai", make_ask("completions", prompts=("a",)), card).body["max_tokens"] == 50


def test_openai_structured() -> None:
    assert call("openai", make_ask("structured", schema=SCHEMA)).body == {
        "model": "m", "messages": MESSAGES, "max_tokens": 50,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "continuation", "strict": True, "schema": SCHEMA},
        },
    }  # fmt: skip
    # An answer from the start has no form.
    assert "response_format" not in call("openai", make_ask("structured")).body


def test_openai_prefill() -> None:
    body = {
        "all": {"think": False},
        "prefill": {"continue_final_message": True},
        "chat": {"chat_only": 1},
        "prefill_message": {"prefix": True},
    }
    card = make_card("openai", body=body)
    sent = call("openai", make_ask("prefill", prefix="The sum"), card)
    assert sent.path == "/chat/completions"
    assert sent.body == {
        "model": "m",
        "messages": [*MESSAGES, {"role": "assistant", "content": "The sum", "prefix": True}],
        "max_tokens": 50, "think": False, "continue_final_message": True,
    }  # fmt: skip
    # Without a partial answer there is nothing to continue: it is a plain question.
    assert call("openai", make_ask("prefill"), card).body == {
        "model": "m", "messages": MESSAGES, "max_tokens": 50, "think": False, "chat_only": 1,
    }  # fmt: skip


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini", "ollama"])
def test_what_a_server_does_not_take_is_not_sent(dialect: str) -> None:
    card = make_card(dialect, can={"sampling": False, "stop": False, "seed": False})
    full, plain = make_ask("chat", **FULL), make_ask("chat")
    assert call(dialect, full, card) == call(dialect, plain, card)
    assert call(dialect, full) != call(dialect, plain)


def test_openai_headers() -> None:
    openai = get_dialect("openai")
    assert openai.headers(make_card("openai"), "k") == {"Authorization": "Bearer k"}
    assert openai.headers(find_card("azure"), "k") == {"api-key": "k"}
    assert openai.headers(find_card("vllm"), None) == {}


# Anthropic: requests


def test_anthropic_chat_and_prefill() -> None:
    sent = call("anthropic", make_ask("chat", **FULL))
    assert sent.path == "/messages"
    assert sent.body == {
        "model": "m", "system": "Be brief.", "messages": [{"role": "user", "content": "48+37?"}], "max_tokens": 50,
        "temperature": 0.8, "top_p": 0.9, "stop_sequences": ["</t>"],
    }  # fmt: skip
    assert call("anthropic", make_ask("chat-turn", stop=("\n", "END"))).body["stop_sequences"] == ["END"]
    assert "stop_sequences" not in call("anthropic", make_ask("chat", stop=("\n\n",))).body

    assert call("anthropic", make_ask("prefill", messages=(USER,), prefix="The sum", cuts=(3,))).body == {
        "model": "m", "max_tokens": 50,
        "messages": [{"role": "user", "content": "48+37?"}, {"role": "assistant", "content": "The sum"}],
    }  # fmt: skip
    assert call("anthropic", make_ask("prefill")).body["messages"] == [{"role": "user", "content": "48+37?"}]


def anthropic_blocks(prefix: str, cuts: tuple[int, ...]) -> Any:
    card = make_card("anthropic", prompt_cache={"mode": "explicit"})
    return call("anthropic", make_ask("prefill", prefix=prefix, cuts=cuts), card).body["messages"][-1]["content"]


def test_anthropic_cuts_a_growing_prefix_into_blocks_that_its_cache_can_find() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    prefix = "First 48.\n\n  Then 37. Sum"
    assert anthropic_blocks(prefix, (9, 18)) == [
        {"type": "text", "text": "First 48."},
        # Nobody goes on from the end of the last block, so what is written ends where others go on too.
        {"type": "text", "text": "\n\n  Then ", **mark},
        {"type": "text", "text": "37. Sum"},
    ]
    # [9:11] is whitespace alone: no block of its own. What lies outside of the text is no cut.
    assert anthropic_blocks(prefix, (9, 11, 25, 99)) == [
        {"type": "text", "text": "First 48."},
        {"type": "text", "text": "\n\n  Then 37. Sum", **mark},
    ]
    assert anthropic_blocks(prefix, ()) == prefix


def test_anthropic_blocks_are_the_prefix_whatever_the_cuts() -> None:
    prefix = "a  b\n\nc d"
    for size in range(4):
        for cuts in itertools.combinations(range(len(prefix) + 2), size):
            content = anthropic_blocks(prefix, cuts)
            if not [cut for cut in cuts if 0 < cut <= len(prefix)]:
                assert content == prefix
                continue
            assert "".join(block["text"] for block in content) == prefix
            assert all(block["text"].strip() for block in content)
            assert sum("cache_control" in block for block in content) == 1


def test_anthropic_keeps_system_text_apart_and_joins_what_one_side_said() -> None:
    said = (
        SYSTEM,
        USER,
        Message(role="system", content="In English."),
        Message(role="user", content="Quick!"),
        Message(role="assistant", content="85"),
        Message(role="user", content="Sure?"),
    )
    body = call("anthropic", make_ask("chat", messages=said)).body
    assert body["system"] == "Be brief.\n\nIn English."
    assert body["messages"] == [
        {"role": "user", "content": "48+37?\n\nQuick!"},
        {"role": "assistant", "content": "85"},
        {"role": "user", "content": "Sure?"},
    ]


def test_anthropic_headers() -> None:
    anthropic = get_dialect("anthropic")
    card = find_card("anthropic")
    assert anthropic.headers(card, "k") == {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    assert anthropic.headers(card, None) == {"anthropic-version": "2023-06-01"}


# Gemini: requests


def test_gemini_chat_prefill_and_structured() -> None:
    sent = call("gemini", make_ask("chat", n=4, **FULL))
    assert sent.path == "/models/m:generateContent"
    question = {"role": "user", "parts": [{"text": "48+37?"}]}
    assert sent.body == {
        "contents": [question],
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "generationConfig": {
            "maxOutputTokens": 50, "temperature": 0.8, "topP": 0.9, "candidateCount": 4, "seed": 7,
            "stopSequences": ["</t>"],
        },
    }  # fmt: skip
    assert call("gemini", make_ask("prefill", messages=(USER,), prefix="The sum")).body == {
        "contents": [question, {"role": "model", "parts": [{"text": "The sum"}]}],
        "generationConfig": {"maxOutputTokens": 50},
    }
    assert call("gemini", make_ask("prefill", messages=(USER,))).body["contents"] == [question]
    structured = call("gemini", make_ask("structured", messages=(USER,), schema=SCHEMA))
    assert structured.body["generationConfig"] == {
        "maxOutputTokens": 50, "responseMimeType": "application/json", "responseJsonSchema": SCHEMA,
    }  # fmt: skip
    said = (USER, Message(role="assistant", content="85"), Message(role="user", content="Go on."))
    turns = call("gemini", make_ask("chat-turn", messages=said)).body["contents"]
    assert [turn["role"] for turn in turns] == ["user", "model", "user"]


def test_gemini_merges_the_cards_nested_fields_and_leaves_the_card_alone() -> None:
    card = find_card("gemini").for_model("gemini-2.5-flash")
    before = card.model_dump()
    config = call("gemini", make_ask("chat"), card).body["generationConfig"]
    assert config == {"maxOutputTokens": 50, "thinkingConfig": {"thinkingBudget": 0}}
    assert card.model_dump() == before


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-2.5-pro", "/models/gemini-2.5-pro:generateContent"),
        ("models/gemini-2.5-pro", "/models/gemini-2.5-pro:generateContent"),
        ("tunedModels/mine", "/tunedModels/mine:generateContent"),
        ("a?key=b", "/models/a%3Fkey%3Db:generateContent"),
    ],
)
def test_gemini_has_the_model_in_its_path(model: str, path: str) -> None:
    assert call("gemini", make_ask("chat", model=model)).path == path


def test_gemini_headers() -> None:
    gemini = get_dialect("gemini")
    assert gemini.headers(find_card("gemini"), "k") == {"x-goog-api-key": "k"}
    assert gemini.headers(find_card("gemini"), None) == {}


# Ollama: requests


def test_ollama() -> None:
    card = find_card("ollama")
    options = {"num_predict": 50, "temperature": 0.8, "top_p": 0.9, "seed": 7, "stop": ["</t>"]}
    raw = call("ollama", make_ask("completions", prompts=("Q: 48+37?",), **FULL), card)
    assert raw.path == "/api/generate"
    assert raw.body == {"model": "m", "prompt": "Q: 48+37?", "raw": True, "stream": False, "options": options}
    chat = call("ollama", make_ask("chat", **FULL), card)
    assert chat.path == "/api/chat"
    assert chat.body == {"model": "m", "messages": MESSAGES, "stream": False, "options": options, "think": False}
    prefill = call("ollama", make_ask("prefill", prefix="The sum"), card)
    assert prefill.path == "/api/chat"
    assert prefill.body == {
        "model": "m", "messages": [*MESSAGES, {"role": "assistant", "content": "The sum"}], "stream": False,
        "options": {"num_predict": 50}, "think": False,
    }  # fmt: skip
    structured = call("ollama", make_ask("structured", schema=SCHEMA), card)
    assert structured.path == "/api/chat"
    assert structured.body["format"] == SCHEMA
    assert get_dialect("ollama").headers(card, None) == {}
    assert get_dialect("ollama").headers(card, "k") == {"Authorization": "Bearer k"}
    keyed = make_card("ollama", key_header="x-key")
    assert get_dialect("ollama").headers(keyed, "k") == {"x-key": "k"}


# What a dialect cannot say


@pytest.mark.parametrize(
    ("dialect", "ask", "words"),
    [
        ("anthropic", make_ask("structured", schema=SCHEMA), "anthropic API cannot .* structured; use prefill"),
        ("anthropic", make_ask("completions", prompts=("a",)), "cannot .* completions"),
        ("anthropic", make_ask("tokens", prompt_ids=(1,)), "cannot .* tokens"),
        ("anthropic", make_ask("chat", n=2), "one sample for each request and 2"),
        ("anthropic", make_ask("chat", messages=(SYSTEM,)), "no user message"),
        ("anthropic", make_ask("chat", messages=(Message(role="tool", content="1"),)), "role 'tool'"),
        ("gemini", make_ask("completions", prompts=("a",)), "gemini API cannot"),
        ("gemini", make_ask("chat", messages=(SYSTEM,)), "no user message"),
        ("ollama", make_ask("tokens", prompt_ids=(1,)), "ollama API cannot"),
        ("ollama", make_ask("chat", n=2), "one sample for each request"),
        ("ollama", make_ask("completions", prompts=("a", "b")), "one prompt in each request and 2"),
    ],
)
def test_what_a_dialect_cannot_say_is_refused(dialect: str, ask: Ask, words: str) -> None:
    with pytest.raises(TeacherCapabilityError, match=words):
        call(dialect, ask)


@pytest.mark.parametrize("field", ["model", "messages", "prompt", "contents", "n", "stream"])
def test_a_card_may_not_say_what_is_written_here(field: str) -> None:
    card = make_card("openai", body={"all": {field: 1}})
    with pytest.raises(ConfigError, match=rf"teacher card x sets {field}"):
        call("openai", make_ask("chat"), card)


def test_teachers_without_a_wire_have_no_dialect() -> None:
    for name in ("echo", "hf", "replay"):
        with pytest.raises(ConfigError, match="send no HTTP requests"):
            get_dialect(name)
    with pytest.raises(ConfigError, match="no dialect 'telepathy'; expected openai, anthropic, gemini, ollama"):
        get_dialect("telepathy")
    for name in ("openai", "anthropic", "gemini", "ollama"):
        assert get_dialect(name).name == name


# Field names, as the SDKs' own types have them


def all_bodies(provider: str) -> list[dict[str, Any]]:
    """Return what is sent to every family of a card, by every transport it offers."""
    whole = find_card(provider)
    bodies = []
    for card in (whole.for_model("any"), *(whole.of_family(family) for family in whole.families)):
        for transport in card.can.continuations:
            fields: dict[str, Any] = {"n": 2 if card.can.n else 1, **FULL}
            fields |= {"prefix": "A B", "cuts": (1,)} if transport == "prefill" else {}
            fields |= {"prompts": ("a",)} if transport == "completions" else {}
            fields |= {"schema": SCHEMA} if transport == "structured" else {}
            bodies.append(dict(call(whole.dialect, make_ask(transport, **fields), card).body))
    return bodies


def unknown_fields(value: Any, hint: Any) -> set[str]:
    """Return the names in a JSON value that its typed dictionary does not have, nested ones by their path."""
    origin = typing.get_origin(hint)
    if origin in (typing.Required, typing.NotRequired, typing.Annotated):
        return unknown_fields(value, typing.get_args(hint)[0])
    if typing.is_typeddict(hint):
        if not isinstance(value, dict):
            return {f"<{type(value).__name__}>"}
        fields = typing.get_type_hints(hint)
        extra = set(value) - set(fields)
        nested = {name: unknown_fields(inner, fields[name]) for name, inner in value.items() if name in fields}
        return extra | {f"{name}.{odd}" for name, odds in nested.items() for odd in odds}
    options = typing.get_args(hint)
    dictionaries = [option for option in options if typing.is_typeddict(option)]
    if isinstance(value, dict) and dictionaries:
        # A union: it fits if one member has all the names.
        return min((unknown_fields(value, option) for option in dictionaries), key=len)
    if isinstance(value, list | dict) and options:
        unions = [o for o in options if typing.get_origin(o) is not None or typing.is_typeddict(o)]
        inner = value if isinstance(value, list) else [value]
        return set().union(*(min((unknown_fields(v, o) for o in unions), key=len, default=set()) for v in inner))
    return set()


def test_openai_knows_every_field_that_is_sent() -> None:
    from openai.types import completion_create_params as raw
    from openai.types.chat import completion_create_params as chat

    for body in all_bodies("openai"):
        hint = chat.CompletionCreateParamsBase if "messages" in body else raw.CompletionCreateParamsBase
        assert unknown_fields(body, hint) == set()


def test_anthropic_knows_every_field_that_is_sent() -> None:
    from anthropic.types import message_create_params

    for body in all_bodies("anthropic"):
        # The SDK has no temperature any more because the newest models refuse it; older ones take both.
        assert unknown_fields(body, message_create_params.MessageCreateParamsBase) <= {"temperature", "top_p"}


def test_the_check_of_field_names_sees_misspelt_ones() -> None:
    from anthropic.types import message_create_params
    from openai.types.chat import completion_create_params as chat

    body = dict(call("openai", make_ask("structured", schema=SCHEMA)).body)
    misspelt = {**body, "max_token": 1, "response_format": {"type": "json_schema", "json_shema": {}}}
    found = unknown_fields(misspelt, chat.CompletionCreateParamsBase)
    assert found == {"max_token", "response_format.json_shema"}
    found = unknown_fields(
        {"model": "m", "thinking": {"typ": "disabled"}}, message_create_params.MessageCreateParamsBase
    )
    assert found == {"thinking.typ"}


# generateContent as the REST reference has it; there is no typed SDK here.
GEMINI_FIELDS = {"contents", "systemInstruction", "generationConfig"}
GEMINI_CONFIG = {
    "maxOutputTokens", "temperature", "topP", "candidateCount", "seed", "stopSequences", "responseMimeType",
    "responseJsonSchema", "thinkingConfig",
}  # fmt: skip


def test_gemini_is_sent_nothing_else_than_its_reference_has() -> None:
    for body in all_bodies("gemini"):
        assert set(body) <= GEMINI_FIELDS
        assert set(body["generationConfig"]) <= GEMINI_CONFIG
        # Never both: the API refuses that.
        assert len(body["generationConfig"].get("thinkingConfig", {})) <= 1
