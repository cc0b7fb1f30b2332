"""From conversation to the text and tokens that a student reads: one rendering for training, teacher and evaluation.

Reads no files of data and talks to no model; a tokenizer is all it needs.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omniopd.data import Dataset
from omniopd.errors import ConfigError, DataError
from omniopd.models import render_chat
from omniopd.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FIELD = "{prompt}"
_ID_LENGTH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of a dataset, in its order."""

    prompts: tuple[Prompt, ...]
    too_long: int
    """How many were left out for their length."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, chat_template: str | None = None
) -> str:
    """Render a conversation as the text whose continuation is the answer.

    With a chat template, `chat_template` (Jinja text) before the tokenizer's own, this is the template with its
    generation prompt. Without one, it is the contents of the user turns joined by newlines.

    Raises:
        ConfigError: There is no template and the conversation has system or assistant turns.
        DataError: The template rejects the conversation.
    """
    if _has_template(tokenizer, chat_template):
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = render_chat(tokenizer, turns, chat_template=chat_template, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the chat template does not take a conversation of {roles}: {error}; change the prompts, leave out "
                "data.system_prompt, or set student.chat_template"
            ) from error
        return text
    others = sorted({message.role for message in messages} - {"user"})
    if others:
        raise ConfigError(
            f"the tokenizer has no chat template, so a conversation with {' and '.join(others)} turns has no text "
            "form; set student.chat_template to a Jinja file, or use user turns only"
        )
    return "\n".join(message.content for message in messages)


def apply_prompt_options(
    messages: Sequence[Message], *, prompt_template: str | None = None, system_prompt: str | None = None
) -> tuple[Message, ...]:
    """Put the template around the last user turn and the system prompt before the conversation.

    Raises ConfigError when `prompt_template` lacks `{prompt}`, and when there is a system turn already.
    """
    changed = tuple(messages)
    if prompt_template is not None:
        if PROMPT_FIELD not in prompt_template:
            raise ConfigError(
                f"data.prompt_template {prompt_template!r} has no {PROMPT_FIELD}, so the question would be lost; write "
                f"e.g. 'Solve this: {PROMPT_FIELD}'"
            )
        place = max(i for i, message in enumerate(changed) if message.role == "user")
        # Not str.format: questions and templates are full of other braces.
        content = prompt_template.replace(PROMPT_FIELD, changed[place].content)
        changed = (*changed[:place], Message(role="user", content=content), *changed[place + 1 :])
    if system_prompt is not None:
        if any(message.role == "system" for message in changed):
            raise ConfigError(
                "data.system_prompt is set but the data has a system turn of its own; leave out the one or the other"
            )
        changed = (Message(role="system", content=system_prompt), *changed)
    return changed


def build_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    max_prompt_tokens: int = 2048,
    chat_template: str | None = None,
) -> PromptSet:
    """Render and tokenise every row.

    A prompt's id is a hash of its conversation, so it is the same in every run; the second of two equal conversations
    gets `-2` after it. Raises DataError when no prompt is short enough.
    """
    prompts: list[Prompt] = []
    seen: Counter[str] = Counter()
    shortest: int | None = None
    for row in dataset.rows:
        messages = apply_prompt_options(row.messages, prompt_template=prompt_template, system_prompt=system_prompt)
        text = render_prompt(tokenizer, messages, chat_template=chat_template)
        token_ids = tokenize_prompt(tokenizer, text, rendered=_has_template(tokenizer, chat_template))
        if not token_ids:
            raise DataError(f"{row.source}: the prompt has no tokens in the student's vocabulary, its text is {text!r}")
        digest = _content_hash(messages)
        seen[digest] += 1
        if len(token_ids) > max_prompt_tokens:
            shortest = min(len(token_ids), shortest or len(token_ids))
            continue
        prompts.append(
            Prompt(
                id=digest if seen[digest] == 1 else f"{digest}-{seen[digest]}",
                messages=messages,
                text=text,
                token_ids=token_ids,
                answer=row.answer,
                teacher_id=row.teacher_id,
                domain=row.domain,
            )
        )
    if not prompts:
        raise DataError(
            f"all {len(dataset.rows)} prompts are longer than data.max_prompt_tokens {max_prompt_tokens}; the shortest "
            f"has {shortest} tokens"
        )
    return PromptSet(prompts=tuple(prompts), too_long=len(dataset.rows) - len(prompts))


def preview(prompt: Prompt, *, teacher_text: str | None = None) -> str:
    """Show one prompt as the student reads it and as the teacher gets it. For people; the format may change.

    Args:
        prompt: A prompt of the run.
        teacher_text: The text sent to a teacher that takes text; None shows the messages a chat teacher gets.
    """
    return f"{preview_student(prompt)}\n{preview_teacher(prompt, teacher_text=teacher_text)}"


def preview_student(prompt: Prompt) -> str:
    """Show one prompt as the student reads it."""
    return f"The student reads ({len(prompt.token_ids)} tokens):\n{_indent(prompt.text)}"


def preview_teacher(prompt: Prompt, *, teacher_text: str | None = None) -> str:
    """Show one prompt as a teacher that is asked for text gets it; see `preview`."""
    if teacher_text is not None:
        return f"The teacher reads (text):\n{_indent(teacher_text)}"
    turns = "\n".join(f"[{message.role}] {message.content}" for message in prompt.messages)
    return f"The teacher reads (messages):\n{_indent(turns)}"


def _has_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> bool:
    return chat_template is not None or getattr(tokenizer, "chat_template", None) is not None


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, rendered: bool) -> tuple[int, ...]:
    """Tokenise a prompt: a chat template writes the special tokens itself, plain text gets the tokenizer's own."""
    token_ids: list[int] = tokenizer(text, add_special_tokens=not rendered)["input_ids"]
    # Some tokenizers (T5, a few fine-tunes) close plain text with the end token, which nothing can follow.
    if not rendered and token_ids and token_ids[-1] == tokenizer.eos_token_id:
        token_ids = token_ids[:-1]
    return tuple(token_ids)


def _content_hash(messages: Sequence[Message]) -> str:
    canonical = json.dumps([[message.role, message.content] for message in messages])
    return hashlib.sha1(canonical.encode("ascii"), usedforsecurity=False).hexdigest()[:_ID_LENGTH]


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))
