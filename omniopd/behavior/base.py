"""The seam of rollout writing, and what every behavior shares: the verdict."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

from omniopd.types import Author, FinishReason, Prompt, Rollout, StepContext

Verifier = Callable[[str, str], bool]
"""(response, reference answer) -> right or wrong"""


class Behavior(Protocol):
    """Writes the rollouts of a step."""

    async def rollouts(self, prompts: Sequence[Prompt], ctx: StepContext, *, group_size: int) -> list[Rollout]:
        """Return `group_size` rollouts of each prompt, group by group."""
        ...


def judge(rollouts: Sequence[Rollout], verifier: Verifier | None) -> list[Rollout]:
    """Fill in `is_correct` where there is a reference answer and a verifier."""
    if verifier is None:
        return list(rollouts)
    return [
        r if r.prompt.answer is None else dataclasses.replace(r, is_correct=verifier(r.text, r.prompt.answer))
        for r in rollouts
    ]


def transcribe(
    text: str,
    *,
    id: str,
    prompt: Prompt,
    group_index: int,
    author: Author,
    has_ended: bool,
    encode: Callable[[str], list[int]],
    end_id: int | None,
    detokenize: Callable[[Sequence[int]], tuple[str, tuple[int, ...]]],
    max_tokens: int,
) -> Rollout:
    """Return text that somebody else wrote as a rollout in the student's tokens, `max_tokens` at most.

    The end token follows where the text `has_ended` and there is room for it.
    """
    ids = encode(text)[:max_tokens]
    ended = has_ended and len(ids) < max_tokens and end_id is not None
    if ended and end_id is not None:
        ids = [*ids, end_id]
    written, char_starts = detokenize(ids)
    return Rollout(
        id=id,
        prompt=prompt,
        group_index=group_index,
        token_ids=tuple(ids),
        text=written,
        char_starts=char_starts,
        finish_reason=FinishReason.STOP if ended else FinishReason.LENGTH,
        policy_version=-1,
        author=author,
    )


def group_seeds(ctx: StepContext, prompts: Sequence[Prompt]) -> list[int]:
    """Return a sampling seed for each prompt's group at a step. A prompt that is drawn twice gets two."""
    texts = [f"{ctx.seed}\0{ctx.step}\0{place}\0{prompt.id}" for place, prompt in enumerate(prompts)]
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") >> 1 for text in texts]
