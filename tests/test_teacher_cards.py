"""Naming teachers, reading their cards, putting a teacher together."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from omniopd.errors import ConfigError, TeacherAuthError
from omniopd.teachers import cards
from omniopd.teachers.base import ContinuationRequest, Teacher
from omniopd.teachers.cards import Card, find_card, list_cards, load_card
from omniopd.teachers.resolve import find_key, load_render, open_teacher, pick_transport
from omniopd.teachers.spec import TeacherSpec, parse_spec
from omniopd.types import Message
from omniopd.worlds.mini_math import model_path

SHIPPED = ["deepseek", "echo", "local", "openai", "openrouter", "vllm"]
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _only_shipped_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cards, "USER_CARDS", tmp_path / "home-cards")
    for card in ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "DEEPSEEK_API_KEY"):
        monkeypatch.delenv(card, raising=False)


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
    with pytest.raises(ConfigError, match="there are deepseek, echo"):
        find_card("zzz")


def write_card(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_nearer_cards_win(tmp_path: Path) -> None:
    write_card(tmp_path / "home-cards" / "openai.yaml", "{id: openai, dialect: openai-chat, note: home}")
    assert find_card("openai").note == "home"
    write_card(tmp_path / "teachers" / "openai.yaml", "{id: openai, dialect: openai-chat, note: here}")
    assert find_card("openai").note == "here"
    mine = write_card(tmp_path / "mine.yaml", "{id: mine, dialect: openai-chat, note: path}")
    assert find_card(str(mine)).note == "path"


def test_unrelated_yaml_in_the_folder_does_not_stop_a_run(tmp_path: Path) -> None:
    write_card(tmp_path / "teachers" / "timetable.yaml", "- monday\n")
    assert find_card("openai").id == "openai"
    with pytest.raises(ConfigError, match=r"timetable\.yaml must be a mapping, got list"):
        list_cards()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{id: x, dialect: openai-chat, colour: red}", "colour: Extra inputs"),
        ("{id: x, dialect: telepathy}", "dialect: Input should be"),
        ("{id: x, dialect: openai-chat, price: {models: {}}}", "price.as_of: Field required"),
        ("{id: x, dialect: openai-chat, continuation: prefill}", "is not among can.continuations"),
        ("{id: x, dialect: openai-completions}", "has only the continuation 'completions'"),
        ("{id: x, dialect: openai-chat, base_url: ftp://h}", "is no address"),
        ("{id: x, dialect: openai-chat, api_key_env: sk-abcdefghijklmnop1234}", "looks like a key"),
        ("{id: x, dialect: openai-chat, note: 'Bearer abcdefghijk'}", "looks like a key"),
        ("{id: x, dialect: openai-chat", "is no YAML"),
        ("{id: other, dialect: openai-chat}", "the file must be called other.yaml"),
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
            "{id: p, dialect: openai-chat, price: {as_of: 2026-01-02, models: "
            "{big: {input_usd_per_mtok: 2, output_usd_per_mtok: 8}}}}",
        )
    )
    assert card.price is not None
    price = card.price.of("big")
    assert price is not None
    # 1000 * 2 / 1e6 + 500 * 8 / 1e6 = 0.002 + 0.004
    assert price.cost_usd(1000, 500) == pytest.approx(0.006)
    assert card.price.of("small") is None


def test_a_missing_key_names_the_variable_to_set() -> None:
    with pytest.raises(TeacherAuthError, match="export OPENAI_API_KEY="):
        open_teacher("openai:gpt-4o")
    with pytest.raises(TeacherAuthError, match="OPENAI_API_KEY is not set"):
        open_teacher("openai:m@https://somewhere.example/v1")


def test_keys_go_to_this_machine_and_over_https_only(monkeypatch: pytest.MonkeyPatch) -> None:
    card = find_card("openai")
    assert find_key(card, "http://127.0.0.1:9/v1") == "none"
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
    with pytest.raises(ConfigError, match="offers chat, completions"):
        pick("openai", "prefill")
    assert pick("openai", "prefill", ours=True) == "prefill"
    with pytest.raises(ConfigError, match="expected auto, completions, prefill, chat"):
        pick("openai", "telepathy")
    raw_only = Card.model_validate(
        {
            "id": "raw",
            "dialect": "openai-completions",
            "continuation": "completions",
            "can": {"continuations": ["completions"]},
        }
    )
    with pytest.raises(ConfigError, match="folder of its tokenizer"):
        pick_transport(raw_only, "auto", has_tokenizer=False, is_card_host=True)


def test_a_teacher_without_an_address_or_a_price_is_refused(tmp_path: Path) -> None:
    mine = write_card(tmp_path / "mine.yaml", "{id: mine, dialect: openai-chat}")
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
