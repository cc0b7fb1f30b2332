from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from omniopd.data import Dataset, Row
from omniopd.errors import ConfigError, DataError
from omniopd.models import read_chat_template
from omniopd.templates import apply_prompt_options, build_prompts, preview, render_prompt
from omniopd.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def dataset(*texts: str) -> Dataset:
    rows = [Row(messages=(user(t),), answer="7", source=f"d.txt:{i}") for i, t in enumerate(texts, 1)]
    return Dataset(rows=tuple(rows))


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from omniopd.worlds.mini_math.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="module")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, no chat template; puts <s> before and </s> after a text, as T5 and some Llamas do."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_render_uses_the_tokenizers_template_or_the_one_given(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(chat_tokenizer, [user("1+2")]) == "Q:1+2?"
    assert render_prompt(chat_tokenizer, [user("1+2")], chat_template=CHAT) == "<user>1+2<answer>"


def test_render_without_a_template_joins_user_turns(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(plain_tokenizer, [user("one"), user("two")]) == "one\ntwo"
    with pytest.raises(ConfigError, match=r"assistant and system turns has no text form; set student\.chat_template"):
        render_prompt(
            plain_tokenizer,
            [Message(role="system", content="s"), user("one"), Message(role="assistant", content="a"), user("two")],
        )


def test_a_template_that_rejects_a_conversation_is_a_data_error(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with pytest.raises(DataError, match="does not take a conversation of system, user: no system role"):
        render_prompt(chat_tokenizer, [Message(role="system", content="s"), user("q")], chat_template=template)


def test_prompt_options_wrap_the_last_user_turn() -> None:
    turns = (user("first"), Message(role="assistant", content="ok"), user("x = {y}"))
    changed = apply_prompt_options(turns, prompt_template="Solve {prompt} in {z}.", system_prompt="Be kind.")
    assert [(m.role, m.content) for m in changed] == [
        ("system", "Be kind."),
        ("user", "first"),
        ("assistant", "ok"),
        ("user", "Solve x = {y} in {z}."),
    ]
    assert apply_prompt_options(turns) == turns


def test_prompt_options_that_cannot_take_effect_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"has no \{prompt\}, so the question would be lost"):
        apply_prompt_options((user("q"),), prompt_template="Solve {question}")
    with pytest.raises(ConfigError, match="has a system turn of its own"):
        apply_prompt_options((Message(role="system", content="a"), user("q")), system_prompt="b")


def test_chat_prompts_carry_exactly_the_tokens_of_the_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [prompt] = build_prompts(dataset("1+2"), chat_tokenizer).prompts
    # Three special tokens, then "0123456789+-*/=;#?Q:...": '1' is 4, '2' is 5, '+' 13, '?' 20, 'Q' 21, ':' 22.
    assert prompt.token_ids == (21, 22, 4, 13, 5, 20)
    assert (prompt.text, prompt.answer) == ("Q:1+2?", "7")


def test_plain_prompts_keep_the_start_token_and_lose_the_end_token(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    [prompt] = build_prompts(dataset("one two"), plain_tokenizer).prompts
    assert prompt.token_ids == (0, 3, 4)
    [templated] = build_prompts(
        dataset("two"), plain_tokenizer, chat_template="<s>one{{ messages[0].content }}"
    ).prompts
    # A template writes its special tokens itself; "onetwo" is one unknown word.
    assert templated.token_ids == (0, 2)


def test_ids_are_stable_and_tell_duplicates_apart(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = build_prompts(dataset("1+2", "3+4", "1+2", "1+2"), chat_tokenizer).prompts
    # sha1 of [["user", "1+2"]]
    assert [p.id for p in prompts[:1]] == [HASH_OF_1_PLUS_2]
    assert [p.id for p in prompts[2:]] == [f"{HASH_OF_1_PLUS_2}-2", f"{HASH_OF_1_PLUS_2}-3"]
    assert prompts[1].id == build_prompts(dataset("3+4"), chat_tokenizer).prompts[0].id
    wrapped = build_prompts(dataset("1+2"), chat_tokenizer, prompt_template="0+{prompt}").prompts[0]
    assert wrapped.id != HASH_OF_1_PLUS_2


HASH_OF_1_PLUS_2 = "6cb8f4c6aaf5"


def test_long_prompts_are_left_out_and_counted(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    # "Q:" and "?" are 3 tokens, so 1+2 has 6 and 10+20 has 8.
    result = build_prompts(dataset("1+2", "10+20", "3+4"), chat_tokenizer, max_prompt_tokens=6)
    assert [p.text for p in result.prompts] == ["Q:1+2?", "Q:3+4?"]
    assert result.too_long == 1
    with pytest.raises(DataError, match=r"all 2 prompts are longer than data.max_prompt_tokens 5; the shortest has 6"):
        build_prompts(dataset("1+2", "10+20"), chat_tokenizer, max_prompt_tokens=5)


def test_a_prompt_without_tokens_is_named(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"d\.txt:1: the prompt has no tokens"):
        build_prompts(dataset("one"), plain_tokenizer, chat_template="{{ '' }}")


def test_chat_template_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT, encoding="utf-8")
    assert read_chat_template(path) == CHAT
    with pytest.raises(ConfigError, match=r"cannot read the chat template .*none\.jinja"):
        read_chat_template(tmp_path / "none.jinja")


def test_preview_shows_both_views(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [prompt] = build_prompts(dataset("1+2"), chat_tokenizer, system_prompt="Count.").prompts
    assert preview(prompt) == (
        "The student reads (6 tokens):\n  | Q:1+2?\nThe teacher reads (messages):\n  | [system] Count.\n  | [user] 1+2"
    )
    assert preview(prompt, teacher_text="<q>1+2").endswith("The teacher reads (text):\n  | <q>1+2")
