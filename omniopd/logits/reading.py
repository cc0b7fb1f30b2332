"""How a completion of the student is shown to an open-weight teacher, and the check of it before a run spends anything.

    Reader.read(rollout) -> Read(Reading, Alignment | None) | Read(the reason why there is none)
    prompt_check(prompt, ...) -> PromptCheck      both prompts, their difference, what is wrong with them

Tokenizers are those of transformers and are handed in; nothing here loads a model or asks a teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol

from omniopd.errors import ConfigError, DataError
from omniopd.logits.alignment import Alignment, PromptComparison, align, compare_prompts
from omniopd.logits.scores import Reading
from omniopd.logits.token_bytes import TokenBytes
from omniopd.models import foreign_tokens, render_chat
from omniopd.types import Message, Missing, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFormat = Literal["student", "teacher"]
"""Whose chat format the teacher reads the question in."""
_THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
_ANSWER = "omniopd"
_PROMPTS_KEPT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A completion in the teacher's tokens, or the reason why it has none. Absent is never zero."""

    reading: Reading | None = None
    alignment: Alignment | None = None
    """The student's tokens against the teacher's; None when they are the same tokens."""
    missing: Missing | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.reading is None) == (self.missing is None):
            raise DataError("a completion that was read has either a reading or a reason")

    @property
    def num_tokens(self) -> int:
        """Of the teacher; 0 where it cannot read the completion."""
        return 0 if self.reading is None else self.reading.num_tokens


class Reader(Protocol):
    """Turns rollouts into what a teacher reads."""

    def read(self, rollout: Rollout) -> Read:
        """Never raises for a rollout: one that cannot be read becomes a reason."""
        ...


class SameVocabulary:
    """The teacher has the student's vocabulary: the completion's token ids are its own.

    Args:
        prompt: `student`: the question exactly as the student read it. `teacher`: in the teacher's chat template, which
            is what an instruct teacher knows; a teacher without a template reads the user turns as plain text.
        teacher_tokenizer: needed for `teacher`.

    Raises:
        ConfigError: `teacher` without a tokenizer.
    """

    def __init__(self, prompt: PromptFormat, teacher_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if prompt not in ("student", "teacher"):
            raise ConfigError(f"prompt is {prompt!r}; it can be student or teacher")
        if prompt == "teacher" and teacher_tokenizer is None:
            raise ConfigError("prompt is 'teacher', but there is no teacher_tokenizer to write it with; pass one")
        self._prompts = None if prompt == "student" else _TeacherPrompts(teacher_tokenizer)

    def read(self, rollout: Rollout) -> Read:
        try:
            prompt_ids = rollout.prompt.token_ids if self._prompts is None else self._prompts.ids(rollout.prompt)
            return _read(prompt_ids, rollout.token_ids)
        except DataError as error:
            return Read(missing=Missing.FAILED, detail=str(error))


class ForeignVocabulary:
    """The teacher has a vocabulary of its own: the completion's text is cut anew, and both cuts are aligned.

    The teacher reads the question in its own chat template. The end token that the student drew becomes the teacher's
    end of turn, and the two are compared; a completion that was cut off has none. Text that is no UTF-8, and what comes
    after it, is not shown to the teacher.

    Args:
        student_end_ids: what ends a completion of the student; None: its tokenizer's end token.
        teacher_end_id: what ends a turn of the teacher; None: `end_of_turn`. A teacher without any is not asked about
            the end.

    Raises:
        ConfigError: a slow tokenizer of the teacher.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        student_end_ids: Collection[int] | None = None,
        teacher_end_id: int | None = None,
    ) -> None:
        if not teacher_tokenizer.is_fast:
            raise ConfigError(
                f"the teacher's {type(teacher_tokenizer).__name__} does not tell where its tokens stand in a text; use "
                "a fast tokenizer (tokenizer.json)"
            )
        self._student = TokenBytes(student_tokenizer)
        self._teacher = TokenBytes(teacher_tokenizer)
        self._prompts = _TeacherPrompts(teacher_tokenizer)
        self._end_ids = _end_ids(student_tokenizer, student_end_ids)
        self._teacher_end = end_of_turn(teacher_tokenizer) if teacher_end_id is None else teacher_end_id

    def read(self, rollout: Rollout) -> Read:
        try:
            return self._read(rollout)
        except DataError as error:
            return Read(missing=Missing.FAILED, detail=str(error))

    def _read(self, rollout: Rollout) -> Read:
        ids = rollout.token_ids
        is_kept = bool(ids) and ids[-1] in self._end_ids and self._teacher_end is not None
        student = self._student(ids, keep=ids[-1:] if is_kept else ())
        teacher_ids, teacher = self._teacher.encode(student.text)
        if is_kept and self._teacher_end is not None:
            # Appended by hand: as text, the end of turn would have to survive the tokenizer's own rules.
            teacher_ids = (*teacher_ids, self._teacher_end)
            teacher = replace(
                teacher,
                ends=(*teacher.ends, len(teacher.data)),
                positions=(*teacher.positions, teacher.num_tokens),
                num_tokens=teacher.num_tokens + 1,
                num_kept=teacher.num_kept + 1,
            )
        alignment = align(student, teacher)
        return _read(self._prompts.ids(rollout.prompt), teacher_ids, alignment)


def _read(prompt_ids: tuple[int, ...], token_ids: tuple[int, ...], alignment: Alignment | None = None) -> Read:
    if not token_ids:
        return Read(missing=Missing.FAILED, detail="the completion has no tokens that the teacher could read")
    return Read(reading=Reading(prompt_ids=prompt_ids, token_ids=token_ids), alignment=alignment)


class _TeacherPrompts:
    """Questions in the teacher's format. All rollouts of a prompt share one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(maxsize=_PROMPTS_KEPT)(self._encode_now)

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        return self._encode(prompt.messages)

    def _encode_now(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        return tokenize_prompt(self._tokenizer, render_for_teacher(self._tokenizer, messages))


def render_for_teacher(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Write a conversation in the teacher's chat template, ready for its answer; without one, as plain text.

    Raises DataError when the template rejects the conversation, and for system or assistant turns without a template.
    """
    if not messages:
        raise DataError(
            "the prompt has no messages, so the teacher's chat template has nothing to write; let the teacher read the "
            "student's prompt instead"
        )
    if tokenizer.chat_template is None:
        if others := sorted({message.role for message in messages} - {"user"}):
            raise DataError(
                f"the teacher has no chat template, so a conversation with {' and '.join(others)} turns has no text "
                "form; let it read the student's prompt, or give its tokenizer a template"
            )
        return "\n".join(message.content for message in messages)
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return render_chat(tokenizer, turns, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the teacher's chat template does not take a conversation of {roles}: {error}") from error


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokenise a rendered prompt: a chat template writes special tokens itself, plain text gets the tokenizer's own."""
    has_template = tokenizer.chat_template is not None
    ids: list[int] = tokenizer(text, add_special_tokens=not has_template)["input_ids"]
    # Some tokenizers close plain text with the end token, which nothing can follow.
    if not has_template and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return tuple(ids)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which a model closes its answer: what its chat template writes there, else its end token.

    The two differ in practice: base models of the Qwen family end with `<|endoftext|>`, their template's turns with
    `<|im_end|>`. None when there is neither.
    """
    eos: int | None = tokenizer.eos_token_id
    if tokenizer.chat_template is None:
        return eos
    from jinja2 import TemplateError

    # The turn after the answer makes templates that leave the last one open close it.
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": "?"},
    ]
    try:
        after = render_chat(tokenizer, turns).partition(_ANSWER)[2].lstrip()
    except TemplateError:
        return eos
    written = [(len(text), i) for i, text in _special_texts(tokenizer).items() if after.startswith(text)]
    return max(written)[1] if written else eos


def special_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> frozenset[int]:
    """Return the ids of tokens, for masks. A name is a token's spelling in the vocabulary, or a text that is one token.

    Raises ConfigError for a name that is neither.
    """
    vocabulary = tokenizer.get_vocab()
    found = set()
    for name in names:
        if name in vocabulary:
            found.add(vocabulary[name])
            continue
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(
                f"{name!r} is no token of this vocabulary; its special tokens are "
                f"{', '.join(sorted(_special_texts(tokenizer).values()))}"
            )
        found.add(ids[0])
    return frozenset(found)


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
            ids = tokenize_prompt(teacher_tokenizer, text)
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
            student_end_ids=_end_ids(student_tokenizer, student_end_ids),
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
    specials = set(_special_texts(sides.student).values())
    if plain := [token for token in differing if token not in specials]:
        sides.errors.append(
            f"{len(plain)} of the student's tokens, such as {plain[0]!r}, are other tokens to the teacher or none; "
            "treat its vocabulary as foreign"
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
                f"the teacher {what}, with which the student ends; treat its vocabulary as foreign, which puts the "
                "teacher's own end token in its place"
            )
        else:
            sides.warnings.append(f"the teacher {what}; a completion that holds it is misjudged there")


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
    ours, theirs = (set(_special_texts(t).values()) - {""} for t in (sides.student, sides.teacher))
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


def _end_ids(tokenizer: PreTrainedTokenizerBase, given: Collection[int] | None) -> frozenset[int]:
    if given is not None:
        return frozenset(given)
    return frozenset({tokenizer.eos_token_id} - {None})


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _spelled(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token_id) or token_id)
