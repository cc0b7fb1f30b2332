"""What a teacher is given to read, against prompts written out by hand, and every mismatch that must not pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from omniopd.errors import ConfigError, DataError
from omniopd.logits.alignment import group_logprobs
from omniopd.logits.reading import (
    ForeignVocabulary,
    PromptCheck,
    Read,
    SameVocabulary,
    end_of_turn,
    prompt_check,
    special_ids,
)
from omniopd.types import FinishReason, Message, Missing, Prompt, Rollout
from tests import byte_level, tiny

EMOJI = "\N{GRINNING FACE}"
CORPUS = "the sum of the numbers and the rest of the sum is the end; 12 + 30 = 42"
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QUESTION = (Message(role="system", content="Be brief."), Message(role="user", content="12 + 30?"))
QWEN_PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
LLAMA_PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n12 + 30?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def tokenizer(
    special: Sequence[str], template: str | None, *, merges: int = 0, adds: str | None = None, **names: str
) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer; `adds` is what it writes around a text, such as `<s> $A`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([CORPUS] * 5, trainer)
    if adds is not None:
        core.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(token, core.token_to_id(token)) for token in adds.split() if token != "$A"]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    made.chat_template = template
    return made


def qwen(template: str | None = QWEN, *, eos: str = "<|im_end|>", more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    return tokenizer([*QWEN_SPECIAL, *more], template, merges=20, eos_token=eos, pad_token="<|endoftext|>")


def llama(template: str | None = LLAMA, *, eos: str = "<|eot_id|>") -> PreTrainedTokenizerFast:
    return tokenizer(
        LLAMA_SPECIAL,
        template,
        merges=60,
        adds="<|begin_of_text|> $A",
        bos_token="<|begin_of_text|>",
        eos_token=eos,
    )


def asked(reader: Any, messages: Sequence[Message] = QUESTION, *, text: str | None = None) -> Prompt:
    """Make a prompt as the student of this tokenizer reads it."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    written = text or reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = reader(written, add_special_tokens=False)["input_ids"]
    return Prompt(id="p", messages=tuple(messages), text=written, token_ids=tuple(ids))


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


# The check before a run.


def check(prompt: Prompt, student: Any, teacher: Any, **settings: Any) -> PromptCheck:
    return prompt_check(prompt, student, teacher, **settings)


def test_alike_sides_pass_without_a_word() -> None:
    found = check(asked(qwen()), qwen(), qwen())
    assert (found.errors, found.warnings) == ((), ())
    assert found.teacher_ids == found.student_ids
    assert found.lines()[2:] == ["both read the same text"]


def test_a_foreign_pair_passes_and_both_prompts_are_printed() -> None:
    found = check(asked(qwen()), qwen(), llama(), is_foreign=True)
    assert (found.errors, found.warnings) == ((), ())
    lines = found.lines()
    assert lines[0] == f"the student reads ({len(found.student_ids)} tokens): {QWEN_PROMPT!r}"
    assert lines[1] == f"the teacher reads ({len(found.teacher_ids)} tokens): {LLAMA_PROMPT!r}"
    assert any("only the teacher has" in line and "<|eot_id|>" in line for line in lines)


DROPPING = QWEN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
REVERSING = QWEN.replace("in messages", "in messages | reverse")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (DROPPING, "the teacher's prompt does not contain the message 'Be brief.'"),
        (REVERSING, "the teacher's prompt has out of order the message '12 + 30?'"),
    ],
)
def test_a_message_lost_or_reordered_is_an_error(template: str, problem: str) -> None:
    found = check(asked(qwen()), qwen(), qwen(template))
    assert found.errors == (problem,)
    assert f"error: {problem}" in found.lines()


def test_a_student_that_ends_with_another_token_than_the_teacher_is_an_error_until_it_is_masked() -> None:
    base, teacher = qwen(eos="<|endoftext|>"), qwen()
    (error,) = check(asked(base), base, teacher).errors
    assert "the student ends with '<|endoftext|>', the teacher's turns end with '<|im_end|>'" in error
    assert "mask '<|endoftext|>' in the loss" in error
    ids = special_ids(base, ["<|endoftext|>"])
    assert check(asked(base), base, teacher, masked_ids=ids).errors == ()
    # A student whose generation config names both can end as the teacher does.
    assert check(asked(base), base, teacher, student_end_ids={0, 2}).errors == ()
    # Another vocabulary: the reader puts the teacher's end in its place.
    assert check(asked(base), base, teacher, is_foreign=True).errors == ()


def test_a_teacher_that_reads_the_students_format_may_also_end_with_its_end_token() -> None:
    base, teacher = qwen(eos="<|endoftext|>"), qwen(eos="<|endoftext|>")
    assert len(check(asked(base), base, teacher, prompt_format="teacher").errors) == 1
    assert check(asked(base), base, teacher, prompt_format="student").errors == ()
    assert len(check(asked(base), base, qwen(), prompt_format="student").errors) == 1


@pytest.mark.parametrize(
    ("is_foreign", "warning"), [(True, "not asked whether the student ends well"), (False, "little probability")]
)
def test_a_teacher_without_an_end_token_is_told(is_foreign: bool, warning: str) -> None:
    endless = tokenizer(QWEN_SPECIAL, None, merges=20)
    prompt = asked(qwen(), (Message(role="user", content="12?"),))
    found = check(prompt, qwen(), endless, is_foreign=is_foreign)
    assert found.errors == () and len(found.warnings) == 1 and warning in found.warnings[0]


def test_a_vocabulary_that_differs_is_an_error_unless_it_is_read_as_foreign() -> None:
    (error, *_) = check(asked(qwen()), qwen(), llama()).errors
    assert "are other tokens to the teacher or none; treat its vocabulary as foreign" in error


def test_a_special_token_that_the_teacher_lacks_is_judged_by_where_it_occurs() -> None:
    student = tokenizer([*QWEN_SPECIAL], QWEN, merges=20, eos_token="<|im_end|>")
    student.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    unused = check(asked(student), student, qwen())
    assert unused.errors == ()
    assert unused.warnings == ("the teacher has no '<|tool|>'; a completion that holds it is misjudged there",)

    prompt = asked(student, text=f"<|tool|>{QWEN_PROMPT}")
    (error,) = check(prompt, student, qwen(), prompt_format="student").errors
    assert "the teacher has no '<|tool|>', a special token of the prompt it is given" in error

    ending = {student.convert_tokens_to_ids("<|tool|>"), 2}
    (error,) = check(asked(student), student, qwen(), student_end_ids=ending).errors
    assert "the teacher has no '<|tool|>', with which the student ends" in error


def test_special_tokens_with_exchanged_ids_are_an_error_where_they_occur() -> None:
    swapped = tokenizer(["<|endoftext|>", "<|im_end|>", "<|im_start|>"], QWEN, merges=20, eos_token="<|im_end|>")
    found = check(asked(qwen()), qwen(), swapped, prompt_format="student")
    assert any("the teacher has another id for '<|im_end|>', a special token of the prompt" in e for e in found.errors)


def test_a_first_token_twice_is_an_error_at_the_teacher_and_a_warning_at_the_student() -> None:
    doubling = LLAMA.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    student = llama()
    (error,) = check(asked(student), student, llama(doubling)).errors
    assert error == "the teacher's prompt begins with '<|begin_of_text|>' twice; write it once"
    doubled = asked(student, text=f"<|begin_of_text|>{LLAMA_PROMPT}")
    found = check(doubled, student, student)
    assert found.errors == ()
    assert found.warnings == ("the student's prompt begins with '<|begin_of_text|>' twice",)


def test_a_teacher_that_expects_a_first_token_and_gets_none_is_told() -> None:
    bare = LLAMA.replace("{{ bos_token }}", "")
    student = llama(bare)
    (error,) = check(asked(student), student, llama(), prompt_format="student").errors
    assert "puts '<|begin_of_text|>' before every text, but the prompt it is given begins without it" in error
    own = check(asked(llama()), llama(), llama(bare))
    assert own.errors == () and len(own.warnings) == 1 and "as its chat template has it" in own.warnings[0]


def test_a_first_token_on_one_side_only_is_a_warning_where_the_vocabulary_is_shared() -> None:
    bare = llama(LLAMA.replace("{{ bos_token }}", ""))
    found = check(asked(bare), bare, llama())
    assert found.errors == ()
    assert found.warnings == ("only the teacher's prompt begins with a BOS token",)


def thinking(block: str) -> PreTrainedTokenizerFast:
    return qwen(QWEN.replace("assistant\n{% endif %}", f"assistant\n{block}{{% endif %}}"))


@pytest.mark.parametrize(
    ("ours", "theirs", "is_error"),
    [
        ("", "<think>\n", True),
        ("<think>\n", "", True),
        ("<think>\n", "<think>\n\n</think>\n\n", True),
        ("", "<think>\n\n</think>\n\n", False),
    ],
)
def test_a_thinking_block_on_one_side_only_is_never_silent(ours: str, theirs: str, is_error: bool) -> None:
    found = check(asked(thinking(ours)), thinking(ours), thinking(theirs))
    message = (found.errors if is_error else found.warnings)[0]
    assert "thinking block and the teacher's" in message
    assert (len(found.errors), len(found.warnings)) == ((1, 0) if is_error else (0, 1))
    # Where the teacher reads the student's prompt, both read the same.
    same = check(asked(thinking(ours)), thinking(ours), thinking(theirs), prompt_format="student")
    assert (same.errors, same.warnings) == ((), ())


def test_a_thinking_block_on_both_sides_is_fine_and_one_in_a_question_is_text() -> None:
    both = thinking("<think>\n")
    assert check(asked(both), both, both).errors == ()
    messages = (Message(role="user", content="what does <think> do?"),)
    found = check(asked(qwen(), messages), qwen(), thinking("<think>\n\n</think>\n\n"))
    assert found.errors == () and "the student's prompt has no thinking block" in found.warnings[0]


def test_a_special_token_in_a_message_is_text_to_the_other_side() -> None:
    messages = (Message(role="user", content="what is <|eot_id|>?"),)
    found = check(asked(qwen(), messages), qwen(), llama(), is_foreign=True)
    assert found.warnings == ("a message holds '<|eot_id|>': a special token to the teacher, text to the student",)


def test_a_prompt_without_tokens_is_an_error() -> None:
    silent = qwen("{% if false %}x{% endif %}")
    found = check(asked(qwen()), qwen(), silent)
    assert any("has no tokens" in error for error in found.errors)


def test_a_foreign_teacher_cannot_read_the_students_tokens() -> None:
    with pytest.raises(ConfigError, match="cannot read the student's prompt"):
        check(asked(qwen()), qwen(), llama(), is_foreign=True, prompt_format="student")
