"""Putting a teacher together: key, transport, template."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from omniopd.errors import ConfigError, TeacherAuthError
from omniopd.teachers import cards
from omniopd.teachers.base import ContinuationRequest, Teacher
from omniopd.teachers.cards import Card, find_card
from omniopd.teachers.resolve import find_key, load_render, open_teacher, pick_transport
from omniopd.types import Message
from omniopd.worlds.mini_math import model_path


@pytest.fixture(autouse=True)
def _only_shipped_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cards, "USER_CARDS", tmp_path / "home-cards")
    for card in ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "DEEPSEEK_API_KEY"):
        monkeypatch.delenv(card, raising=False)


def write_card(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_missing_key_names_the_variable_to_set() -> None:
    with pytest.raises(TeacherAuthError, match="export OPENAI_API_KEY="):
        open_teacher("openai:gpt-4o")
    with pytest.raises(TeacherAuthError, match="OPENAI_API_KEY is not set"):
        open_teacher("openai:m@https://somewhere.example/v1")


def test_keys_go_to_this_machine_and_over_https_only(monkeypatch: pytest.MonkeyPatch) -> None:
    card = find_card("openai")
    assert find_key(card, "http://127.0.0.1:9/v1") is None
    assert find_key(find_card("vllm"), "http://gpu-box:8000/v1") is None
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert find_key(card, "https://somewhere.example/v1") == "sk-secret"
    assert find_key(card, "http://localhost:9/v1") == "sk-secret"
    with pytest.raises(ConfigError, match="unencrypted to http://somewhere") as caught:
        find_key(card, "http://somewhere.example/v1")
    assert "sk-secret" not in str(caught.value)


def test_auto_takes_the_cards_word_where_it_can() -> None:
    def pick(provider: str, continuation: str = "auto", *, has_tokenizer: bool = False, ours: bool = False) -> str:
        return pick_transport(find_card(provider), continuation, has_tokenizer=has_tokenizer, is_card_host=not ours)

    assert pick("openai") == "chat"
    assert pick("deepseek") == "prefill"
    assert pick("local", has_tokenizer=True) == "completions"
    assert pick("local") == "prefill"
    assert pick("local", "chat") == "chat"
    with pytest.raises(ConfigError, match="offers chat, chat-turn, structured"):
        pick("openai", "prefill")
    assert pick("openai", "prefill", ours=True) == "prefill"
    with pytest.raises(ConfigError, match="expected auto, tokens, completions"):
        pick("openai", "telepathy")
    raw_only = Card.model_validate(
        {
            "id": "raw",
            "dialect": "openai",
            "can": {"continuations": ["completions"]},
        }
    )
    with pytest.raises(ConfigError, match="folder of its tokenizer"):
        pick_transport(raw_only, "auto", has_tokenizer=False, is_card_host=True)


def test_a_teacher_without_an_address_or_a_price_is_refused(tmp_path: Path) -> None:
    mine = write_card(tmp_path / "mine.yaml", "{id: mine, dialect: openai}")
    with pytest.raises(ConfigError, match="has no address"):
        open_teacher(f"{mine}:m")
    with pytest.raises(ConfigError, match=r"price of vllm:m is unknown"):
        open_teacher("vllm:m", budget_usd=1.0)
    with pytest.raises(ConfigError, match="tokenizer"):
        open_teacher("vllm:m", continuation="completions")
    with pytest.raises(ConfigError, match="extra_body holds n"):
        open_teacher("vllm:m", extra_body={"n": 3})


def test_raw_prompts_are_written_by_the_teachers_own_template() -> None:
    render = load_render(model_path("teacher"))
    assert render([Message(role="user", content="48+37-19")]) == "Q:48+37-19?"


def test_echo_is_deterministic_free_and_continues_after_a_space() -> None:
    def ask(n: int, seed: int, max_tokens: int = 20) -> list[str]:
        teacher = open_teacher("echo:demo")
        assert isinstance(teacher, Teacher)
        request = ContinuationRequest(
            messages=(Message(role="user", content="red green blue"),),
            prefix="I see",
            n=n,
            max_tokens=max_tokens,
            seed=seed,
        )
        (answer,) = asyncio.run(teacher.continuations([request]))
        asyncio.run(teacher.aclose())
        assert answer.usage.cost_usd == 0.0
        assert answer.usage.input_tokens == 5
        return [c.text or "" for c in answer.continuations]

    four = ask(4, seed=1)
    assert ask(4, seed=1) == four
    assert ask(2, seed=1) == four[:2]
    assert ask(4, seed=2) != four
    assert len(set(four)) == 4
    assert all(text.startswith(" ") for text in four)
    assert [len(text.split()) for text in ask(3, seed=1, max_tokens=2)] == [2, 2, 2]
