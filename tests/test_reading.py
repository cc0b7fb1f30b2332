"""What a teacher is given to read, against prompts written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from omniopd.errors import ConfigError, DataError
from omniopd.logits.alignment import group_logprobs
from omniopd.logits.prompt_check import prompt_check
from omniopd.logits.reading import ForeignVocabulary, Read, SameVocabulary, WithinContext, end_of_turn, special_ids
from omniopd.types import FinishReason, Message, Missing, Prompt, Rollout
from tests import byte_level, tiny
from tests.chat_tokenizers import (
    LLAMA_PROMPT,
    QUESTION,
    QWEN,
    QWEN_PROMPT,
    asked,
    llama,
    qwen,
    tokenizer,
)

EMOJI = "\N{GRINNING FACE}"


def written(reader: Any, text: str, *, end: str | None = None, prompt: Prompt | None = None, cut: int = 0) -> Rollout:
    """Make a completion: a text, its end token, and `cut` tokens less at the end."""
    ids = reader(text, add_special_tokens=False)["input_ids"]
    ids = ids[: len(ids) - cut] + ([] if end is None else [reader.convert_tokens_to_ids(end)])
    return Rollout(
        id="p/0",
        prompt=prompt or asked(reader),
        group_index=0,
        token_ids=tuple(ids),
        text=reader.decode(ids, skip_special_tokens=True),
        char_starts=(0,) * len(ids),
        finish_reason=FinishReason.LENGTH if end is None else FinishReason.STOP,
        policy_version=0,
    )


def given(read: Read) -> tuple[tuple[int, ...], tuple[int, ...]]:
    assert read.reading is not None, read.detail
    return read.reading.prompt_ids, read.reading.token_ids


def spelled(reader: Any, ids: Sequence[int]) -> str:
    return str(reader.decode(list(ids), skip_special_tokens=False))


# One vocabulary.


def test_the_students_own_prompt_and_tokens_are_read_unchanged() -> None:
    rollout = written(qwen(), "the sum is 42", end="<|im_end|>")
    read = SameVocabulary("student").read(rollout)
    assert given(read) == (rollout.prompt.token_ids, rollout.token_ids)
    assert read.alignment is None


def test_a_teacher_reads_the_question_in_its_own_template_and_the_completion_unchanged() -> None:
    student, teacher = qwen("{{ messages[-1].content }}"), qwen()
    rollout = written(student, "the sum is 42", end="<|im_end|>")
    assert rollout.prompt.text == "12 + 30?"
    prompt_ids, token_ids = given(SameVocabulary("teacher", teacher).read(rollout))
    assert spelled(teacher, prompt_ids) == QWEN_PROMPT
    assert token_ids == rollout.token_ids


def test_a_template_that_writes_the_first_token_gets_no_second_one() -> None:
    teacher = llama()
    prompt_ids, _ = given(SameVocabulary("teacher", teacher).read(written(llama(), "42")))
    assert spelled(teacher, prompt_ids) == LLAMA_PROMPT
    assert prompt_ids.count(teacher.bos_token_id) == 1


def test_a_base_teacher_reads_plain_text_after_its_first_token() -> None:
    base = llama(None)
    turns = (Message(role="user", content="the sum"), Message(role="user", content="of 12?"))
    prompt_ids, _ = given(SameVocabulary("teacher", base).read(written(llama(), "42", prompt=asked(llama(), turns))))
    assert spelled(base, prompt_ids) == "<|begin_of_text|>the sum\nof 12?"


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt() -> None:
    closing = tokenizer(["<s>", "</s>"], None, adds="$A </s>", eos_token="</s>")
    rollout = written(closing, "42", prompt=asked(closing, (Message(role="user", content="12?"),), text="12?"))
    prompt_ids, _ = given(SameVocabulary("teacher", closing).read(rollout))
    assert spelled(closing, prompt_ids) == "12?"


REJECTING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + QWEN


@pytest.mark.parametrize(
    ("teacher", "messages", "reason"),
    [
        (qwen(None), QUESTION, "no chat template, so a conversation with system turns"),
        (qwen(REJECTING), QUESTION, "does not take a conversation of system, user: no system turns"),
        (qwen(), (), "has no messages"),
    ],
)
def test_a_question_that_the_teacher_cannot_be_asked_is_a_reason_not_a_crash(
    teacher: Any, messages: Sequence[Message], reason: str
) -> None:
    student = qwen()
    rollout = written(student, "42", prompt=asked(student, messages, text="12 + 30?"))
    for reader in (SameVocabulary("teacher", teacher), ForeignVocabulary(student, teacher)):
        read = reader.read(rollout)
        assert read.missing is Missing.FAILED and reason in read.detail
    check = prompt_check(rollout.prompt, student, teacher)
    assert check.teacher_ids == () and len(check.errors) == 1 and reason in check.errors[0]


def test_a_completion_without_tokens_is_a_reason() -> None:
    read = SameVocabulary("student").read(written(qwen(), ""))
    assert read.missing is Missing.FAILED and "no tokens" in read.detail


def test_a_completion_beyond_the_teachers_context_is_a_reason() -> None:
    rollout = written(qwen(), "the sum is 42", end="<|im_end|>")
    plain = SameVocabulary("student")
    size = len(rollout.prompt.token_ids) + rollout.num_tokens
    assert given(WithinContext(plain, size).read(rollout)) == given(plain.read(rollout))
    read = WithinContext(plain, size - 1).read(rollout)
    assert read.missing is Missing.FAILED
    assert read.detail == f"prompt and completion have {size} tokens, the teacher's context {size - 1}"
    assert "no tokens" in WithinContext(plain, size).read(written(qwen(), "")).detail


def test_readers_refuse_settings_they_cannot_use() -> None:
    with pytest.raises(ConfigError, match="it can be student or teacher"):
        SameVocabulary("ours")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no teacher_tokenizer"):
        SameVocabulary("teacher")
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ConfigError, match="SlowTokenizer does not tell where its tokens stand"):
        ForeignVocabulary(qwen(), slow)
    with pytest.raises(DataError, match="either a reading or a reason"):
        Read()


# A vocabulary of its own.


def test_a_foreign_teacher_reads_the_same_text_and_its_own_end_of_turn() -> None:
    student, teacher = qwen(), llama()
    rollout = written(student, f"the sum is {EMOJI} 42", end="<|im_end|>")
    read = ForeignVocabulary(student, teacher).read(rollout)
    prompt_ids, token_ids = given(read)
    assert spelled(teacher, prompt_ids) == LLAMA_PROMPT
    assert spelled(teacher, token_ids) == f"the sum is {EMOJI} 42<|eot_id|>"
    alignment = read.alignment
    assert alignment is not None and all(group.is_exact for group in alignment.groups)
    assert alignment.student.num_tokens == len(rollout.token_ids)
    assert alignment.teacher.num_tokens == len(token_ids) != len(rollout.token_ids)
    last = alignment.groups[-1]
    assert (last.student_start, last.student_end) == (len(rollout.token_ids) - 1, len(rollout.token_ids))
    assert (last.teacher_start, last.teacher_end) == (len(token_ids) - 1, len(token_ids))
    assert alignment.student.data == alignment.teacher.data == f"the sum is {EMOJI} 42".encode()


def test_a_completion_that_was_cut_off_has_no_end_on_either_side() -> None:
    student, teacher = qwen(), llama()
    read = ForeignVocabulary(student, teacher).read(written(student, "the sum is"))
    assert spelled(teacher, given(read)[1]) == "the sum is"
    assert read.alignment is not None and read.alignment.student.num_kept == read.alignment.teacher.num_kept == 0


def test_a_character_that_was_cut_off_is_not_shown_and_not_compared() -> None:
    student, teacher = qwen(), llama()
    # The emoji is four bytes, and the student has a token for each of them: one is missing.
    rollout = written(student, f"the sum {EMOJI}", cut=1)
    read = ForeignVocabulary(student, teacher).read(rollout)
    teacher_ids = given(read)[1]
    assert spelled(teacher, teacher_ids) == "the sum "
    assert read.alignment is not None
    compared = group_logprobs(read.alignment, [-1.0] * rollout.num_tokens, [-1.0] * len(teacher_ids))
    assert compared.weights[-3:] == (0.0, 0.0, 0.0) and set(compared.weights[:-3]) == {1.0}


def test_the_end_alone_is_a_completion_and_half_a_character_is_none() -> None:
    student, teacher = qwen(), llama()
    reader = ForeignVocabulary(student, teacher)
    assert spelled(teacher, given(reader.read(written(student, "", end="<|im_end|>")))[1]) == "<|eot_id|>"
    read = reader.read(written(student, EMOJI, cut=2))
    assert read.missing is Missing.FAILED and "no tokens" in read.detail


def test_the_ends_of_both_sides_can_be_named() -> None:
    student, teacher = qwen(), llama()
    rollout = written(student, "42", end="<|endoftext|>")
    default = ForeignVocabulary(student, teacher)
    # The tokenizer's end token is another one, so this one is left out.
    assert spelled(teacher, given(default.read(rollout))[1]) == "42"
    named = ForeignVocabulary(
        student,
        teacher,
        student_end_ids={student.pad_token_id, student.eos_token_id},
        teacher_end_id=teacher.convert_tokens_to_ids("<|end_of_text|>"),
    )
    assert spelled(teacher, given(named.read(rollout))[1]) == "42<|end_of_text|>"


def test_a_teacher_without_an_end_token_is_not_asked_about_the_end() -> None:
    student, endless = qwen(), tokenizer(["<x>"], "{{ messages[-1].content }}")
    read = ForeignVocabulary(student, endless).read(written(student, "42", end="<|im_end|>"))
    assert spelled(endless, given(read)[1]) == "42"
    assert read.alignment is not None and read.alignment.student.num_kept == 0


def test_text_that_spells_a_special_token_of_the_teacher_is_a_reason() -> None:
    student, teacher = qwen(), llama()
    read = ForeignVocabulary(student, teacher).read(written(student, "the <|eot_id|> token", end="<|im_end|>"))
    assert read.missing is Missing.FAILED and "special token" in read.detail
    assert read.reading is None and read.alignment is None


def test_a_foreign_reader_of_one_vocabulary_gives_the_same_tokens_one_by_one() -> None:
    rollout = written(qwen(), "the sum is 42", end="<|im_end|>")
    read = ForeignVocabulary(qwen(), qwen()).read(rollout)
    assert given(read) == given(SameVocabulary("teacher", qwen()).read(rollout))
    assert read.alignment is not None
    assert [(g.student_end, g.teacher_end) for g in read.alignment.groups] == [
        (i, i) for i in range(1, rollout.num_tokens + 1)
    ]


def test_all_rollouts_of_a_prompt_share_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    from omniopd.logits import reading

    rendered: list[int] = []
    original = reading.render_chat

    def counting(*args: Any, **options: Any) -> str:
        rendered.append(1)
        return original(*args, **options)

    reader = SameVocabulary("teacher", qwen())
    monkeypatch.setattr(reading, "render_chat", counting)
    rollout = written(qwen(), "42")
    for _ in range(5):
        reader.read(rollout)
    reader.read(replace(rollout, prompt=asked(qwen(), (Message(role="user", content="30?"),))))
    assert len(rendered) == 2


# Tokens by name.

MISTRAL = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"  # noqa: E501
GLM = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
USERS_ONLY = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        (qwen(), "<|im_end|>"),
        (qwen(eos="<|endoftext|>"), "<|im_end|>"),
        (qwen(byte_level.TEMPLATE, eos="<|endoftext|>"), "<|im_end|>"),
        (llama(eos="<|end_of_text|>"), "<|eot_id|>"),
        (llama(None, eos="<|end_of_text|>"), "<|end_of_text|>"),
        (tokenizer(["</s>", "<|end|>"], MISTRAL, eos_token="<|end|>"), "</s>"),
        (tokenizer(["</s>", "</s>x", "<|end|>"], MISTRAL.replace("</s>", "</s>x"), eos_token="<|end|>"), "</s>x"),
        # GLM writes no end; its models stop by opening the user's turn.
        (tokenizer(["<|user|>", "<|assistant|>", "<|end|>"], GLM, eos_token="<|end|>"), "<|user|>"),
        (tokenizer(["<|end|>"], USERS_ONLY, eos_token="<|end|>"), "<|end|>"),
        (tokenizer(["<|end|>"], "{{ messages[1].content }}, next", eos_token="<|end|>"), "<|end|>"),
    ],
)
def test_the_end_of_turn_is_what_the_template_writes_after_an_answer(reader: Any, expected: str) -> None:
    assert end_of_turn(reader) == reader.convert_tokens_to_ids(expected)


def test_a_tokenizer_without_any_end_has_no_end_of_turn() -> None:
    assert end_of_turn(tokenizer(["<x>"], None)) is None


def test_tokens_are_named_as_in_the_vocabulary_or_by_their_text() -> None:
    reader = qwen()
    the = reader(" the", add_special_tokens=False)["input_ids"]
    assert len(the) == 1
    assert special_ids(reader, ["<|im_end|>", " the", "<"]) == {2, the[0], reader.convert_tokens_to_ids("<")}
    assert special_ids(reader, []) == frozenset()


@pytest.mark.parametrize("name", ["<|eot_id|>", "two words", ""])
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no token of this vocabulary.*<\|im_end\|>"):
        special_ids(qwen(), [name])


def test_the_unknown_token_is_nobodys_name() -> None:
    with pytest.raises(ConfigError, match="'X' is no token"):
        special_ids(tiny.tokenizer(), ["X"])
