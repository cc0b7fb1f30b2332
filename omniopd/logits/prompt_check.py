"""What the student and an open-weight teacher read before a completion, compared before a run spends anything.

prompt_check(prompt, ...) -> PromptCheck      both prompts, their difference, what is wrong with them
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from omniopd.errors import ConfigError, DataError
from omniopd.logits.alignment import PromptComparison, compare_prompts
from omniopd.logits.reading import (
    PromptFormat,
    end_of_turn,
    ending_ids,
    render_for_teacher,
    special_texts,
    tokenize_for_teacher,
)
from omniopd.models import foreign_tokens
from omniopd.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCheck:
    """One question as the student and as the teacher read it."""

    comparison: PromptComparison
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    """What the teacher is given; empty when it cannot be written."""
    errors: tuple[str, ...]
    """What makes the teacher's log-probs say nothing about the student; a run must not start."""
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return what to print; line breaks of the prompts are spelled out."""
        compared = self.comparison
        return [
            f"the student reads ({len(self.student_ids)} tokens): {compared.student!r}",
            f"the teacher reads ({len(self.teacher_ids)} tokens): {compared.teacher!r}",
            *(compared.difference.splitlines() or ["both read the same text"]),
            *(f"error: {error}" for error in self.errors),
            *(f"warning: {warning}" for warning in self.warnings),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """All that the checks look at, and what they find."""

    prompt: Prompt
    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    teacher_text: str
    teacher_ids: tuple[int, ...]
    reads_student_format: bool
    is_foreign: bool
    student_end_ids: frozenset[int]
    teacher_end_id: int | None
    masked_ids: frozenset[int]
    errors: list[str]
    warnings: list[str]


def prompt_check(
    prompt: Prompt,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_format: PromptFormat = "teacher",
    is_foreign: bool = False,
    student_end_ids: Collection[int] | None = None,
    teacher_end_id: int | None = None,
    masked_ids: Collection[int] = (),
) -> PromptCheck:
    """Compare what both sides read, before a run spends anything.

    Args:
        prompt_format: as for `SameVocabulary`; a foreign teacher always reads its own.
        is_foreign: whether the teacher is read with `ForeignVocabulary`.
        student_end_ids: what ends a completion of the student; None: its tokenizer's end token.
        teacher_end_id: what ends a turn of the teacher; None: `end_of_turn`.
        masked_ids: tokens that the run leaves out of the loss; they cannot be misjudged.
    """
    if is_foreign and prompt_format == "student":
        raise ConfigError("a teacher with a vocabulary of its own cannot read the student's prompt; use teacher")
    errors: list[str] = []
    warnings: list[str] = []
    text, ids = prompt.text, prompt.token_ids
    if prompt_format == "teacher":
        try:
            text = render_for_teacher(teacher_tokenizer, prompt.messages)
            ids = tokenize_for_teacher(teacher_tokenizer, text)
        except DataError as error:
            text, ids = "", ()
            errors.append(str(error))
    comparison = compare_prompts(prompt.text, text, contents=[message.content for message in prompt.messages])
    if ids:
        errors.extend(comparison.problems)
        sides = _Sides(
            prompt=prompt,
            student=student_tokenizer,
            teacher=teacher_tokenizer,
            teacher_text=text,
            teacher_ids=ids,
            reads_student_format=prompt_format == "student",
            is_foreign=is_foreign,
            student_end_ids=ending_ids(student_tokenizer, student_end_ids),
            teacher_end_id=end_of_turn(teacher_tokenizer) if teacher_end_id is None else teacher_end_id,
            masked_ids=frozenset(masked_ids),
            errors=errors,
            warnings=warnings,
        )
        for check in (_check_vocabulary, _check_end, _check_first_token, _check_special_texts, _check_thinking):
            check(sides)
    elif not errors:
        errors.append("the teacher's prompt has no tokens, and a model says nothing about a first token alone")
    return PromptCheck(
        comparison=comparison,
        student_ids=prompt.token_ids,
        teacher_ids=ids,
        errors=tuple(errors),
        warnings=tuple(warnings),
    )


def _check_vocabulary(sides: _Sides) -> None:
    if sides.is_foreign:
        return
    other = sides.teacher.get_vocab()
    differing = foreign_tokens(sides.student, sides.teacher)
    specials = set(special_texts(sides.student).values())
    if plain := [token for token in differing if token not in specials]:
        sides.errors.append(
            f"{len(plain):,} of the student's {len(sides.student.get_vocab()):,} tokens, e.g. {plain[0]!r}, have "
            "another id or none in the vocabulary of the teacher: token by token unrelated things would be compared; "
            "use method.supervision.alignment: groups, or method.supervision.type: chunked"
        )
        return
    for token in differing:
        token_id = sides.student.get_vocab()[token]
        what = f"has another id for {token!r}" if token in other else f"has no {token!r}"
        if token_id in sides.teacher_ids:
            sides.errors.append(
                f"the teacher {what}, a special token of the prompt it is given; let it read its own format"
            )
        elif token_id in sides.student_end_ids:
            sides.errors.append(
                f"the teacher {what}, with which the student ends; use method.supervision.alignment: groups, which "
                "puts the teacher's own end token in its place"
            )
        else:
            sides.warnings.append(
                f"the teacher {what}; a completion that holds it is misjudged there, unless it is among "
                "method.supervision.mask_tokens"
            )


def _check_end(sides: _Sides) -> None:
    if sides.teacher_end_id is None:
        sides.warnings.append(
            "the teacher's tokenizer has no token that ends a turn, so it is not asked whether the student ends well"
            if sides.is_foreign
            else "the teacher's tokenizer has no token that ends a turn; it gives the student's little probability"
        )
        return
    judged = sides.student_end_ids - sides.masked_ids
    expected = {sides.teacher_end_id}
    if sides.reads_student_format and sides.teacher.eos_token_id is not None:
        expected.add(sides.teacher.eos_token_id)
    if sides.is_foreign or not judged or judged & expected:
        return
    ours = " or ".join(_spelled(sides.student, i) for i in sorted(judged))
    theirs = _spelled(sides.teacher, sides.teacher_end_id)
    sides.errors.append(
        f"the student ends with {ours}, the teacher's turns end with {theirs}: the teacher gives the student's end "
        f"token almost no probability, so the student would learn never to stop; mask {ours} in the loss, or have the "
        f"student end with {theirs} (eos_token_id of its tokenizer or generation config)"
    )


def _check_first_token(sides: _Sides) -> None:
    student, teacher = sides.student.bos_token_id, sides.teacher.bos_token_id
    student_has = student is not None and sides.prompt.token_ids[:1] == (student,)
    teacher_has = teacher is not None and sides.teacher_ids[:1] == (teacher,)
    if teacher_has and sides.teacher_ids[1:2] == (teacher,):
        sides.errors.append(f"the teacher's prompt begins with {_spelled(sides.teacher, teacher)} twice; write it once")
    if student_has and sides.prompt.token_ids[1:2] == (student,):
        sides.warnings.append(f"the student's prompt begins with {_spelled(sides.student, student)} twice")
    if not teacher_has and _adds_first_token(sides.teacher):
        message = (
            f"the teacher's tokenizer puts {_spelled(sides.teacher, teacher)} before every text, but the prompt it is "
            "given begins without it"
        )
        if sides.reads_student_format:
            sides.errors.append(f"{message}; let it read its own format")
        else:
            sides.warnings.append(f"{message}, as its chat template has it")
    elif student_has != teacher_has and not sides.is_foreign:
        side = "student" if student_has else "teacher"
        sides.warnings.append(f"only the {side}'s prompt begins with a BOS token")


def _adds_first_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("?")["input_ids"][:1] == [tokenizer.bos_token_id]


def _check_special_texts(sides: _Sides) -> None:
    """Look for special tokens that the messages spell out: one side reads a token there, the other plain text."""
    ours, theirs = (set(special_texts(t).values()) - {""} for t in (sides.student, sides.teacher))
    if sides.reads_student_format:
        return
    for message in sides.prompt.messages:
        for text in sorted(text for text in ours ^ theirs if text in message.content):
            side, other = ("student", "teacher") if text in ours else ("teacher", "student")
            sides.warnings.append(f"a message holds {text!r}: a special token to the {side}, text to the {other}")


def _check_thinking(sides: _Sides) -> None:
    ours, theirs = (_thinking(text, sides.prompt.messages) for text in (sides.prompt.text, sides.teacher_text))
    if ours == theirs:
        return
    if "opens a" in (ours, theirs):
        sides.errors.append(
            f"the student's prompt {ours} thinking block and the teacher's {theirs} one: the one is asked for "
            "thoughts, the other for an answer; change a chat template, or let the teacher read the student's prompt"
        )
    else:
        sides.warnings.append(
            f"the student's prompt {ours} thinking block and the teacher's {theirs} one; a teacher that thinks first "
            "gives an immediate answer little probability"
        )


def _thinking(rendered: str, messages: Sequence[Message]) -> Literal["has no", "opens a", "closes a"]:
    """Say what a prompt does after its last message."""
    last = messages[-1].content.strip() if messages else ""
    written = rendered[rendered.rfind(last) + len(last) :] if last in rendered else rendered
    for opening, closing in _THINKING:
        if opening in written:
            return "closes a" if closing in written.rpartition(opening)[2] else "opens a"
    return "has no"


def _spelled(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token_id) or token_id)
