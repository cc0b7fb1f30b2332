"""What makes a teacher judge another text than the student's is found before a run spends anything."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from omniopd.errors import ConfigError
from omniopd.logits.prompt_check import PromptCheck, prompt_check
from omniopd.logits.reading import special_ids
from omniopd.types import Message, Prompt
from tests.chat_tokenizers import LLAMA, LLAMA_PROMPT, QWEN, QWEN_PROMPT, QWEN_SPECIAL, asked, llama, qwen, tokenizer


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
    assert "have another id or none in the vocabulary of the teacher" in error
    assert "use method.supervision.alignment: groups" in error


def test_a_special_token_that_the_teacher_lacks_is_judged_by_where_it_occurs() -> None:
    student = tokenizer([*QWEN_SPECIAL], QWEN, merges=20, eos_token="<|im_end|>")
    student.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    unused = check(asked(student), student, qwen())
    assert unused.errors == ()
    assert unused.warnings == (
        "the teacher has no '<|tool|>'; a completion that holds it is misjudged there, unless it is among "
        "method.supervision.mask_tokens",
    )

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
