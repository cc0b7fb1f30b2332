"""How a completion of the student is shown to an open-weight teacher.

    Reader.read(rollout) -> Read(Reading, Alignment | None) | Read(the reason why there is none)

Tokenizers are those of transformers and are handed in; nothing here loads a model or asks a teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol

from omniopd.errors import ConfigError, DataError
from omniopd.logits.alignment import Alignment, align
from omniopd.logits.scores import Reading
from omniopd.logits.token_bytes import TokenBytes
from omniopd.models import render_chat
from omniopd.templates import tokenize_prompt
from omniopd.types import Message, Missing, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFormat = Literal["student", "teacher"]
"""Whose chat format the teacher reads the question in."""
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
        self._end_ids = ending_ids(student_tokenizer, student_end_ids)
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


@dataclass(frozen=True, slots=True)
class WithinContext:
    """Leaves out what a teacher cannot hold: beyond its context a model's distributions mean nothing."""

    reader: Reader
    context: int
    """Tokens, with the prompt."""

    def read(self, rollout: Rollout) -> Read:
        read = self.reader.read(rollout)
        if read.reading is None:
            return read
        size = len(read.reading.prompt_ids) + len(read.reading.token_ids)
        if size <= self.context:
            return read
        detail = f"prompt and completion have {size} tokens, the teacher's context {self.context}"
        return Read(missing=Missing.FAILED, detail=detail)


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
        return tokenize_for_teacher(self._tokenizer, render_for_teacher(self._tokenizer, messages))


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


def tokenize_for_teacher(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokenise what `render_for_teacher` wrote."""
    return tokenize_prompt(tokenizer, text, rendered=tokenizer.chat_template is not None)


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
    written = [(len(text), i) for i, text in special_texts(tokenizer).items() if after.startswith(text)]
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
                f"{', '.join(sorted(special_texts(tokenizer).values()))}"
            )
        found.add(ids[0])
    return frozenset(found)


def ending_ids(tokenizer: PreTrainedTokenizerBase, given: Collection[int] | None) -> frozenset[int]:
    """Return what ends a completion: the ids that were given, else the tokenizer's end token if it has one."""
    if given is not None:
        return frozenset(given)
    return frozenset({tokenizer.eos_token_id} - {None})


def special_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the special tokens of a vocabulary by id."""
    added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
