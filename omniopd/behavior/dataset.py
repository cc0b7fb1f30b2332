"""The off-policy behavior without a teacher: the data's own worked responses are what is learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from omniopd.behavior.base import Verifier, judge, transcribe
from omniopd.errors import DataError
from omniopd.types import Author, Message, Prompt, Rollout, StepContext


@dataclass(frozen=True)
class DatasetBehavior:
    """Give each prompt's reference response as one rollout, whatever the group size: copies teach nothing more.

    Prompts without a response are left out, never filled in.
    """

    responses: Mapping[tuple[Message, ...], str]
    """By conversation, as the prompts hold it."""
    encode: Callable[[str], list[int]]
    """The student's tokenizer, without special tokens."""
    end_id: int | None
    detokenize: Callable[[Sequence[int]], tuple[str, tuple[int, ...]]]
    max_tokens: int
    verifier: Verifier | None = None

    def __post_init__(self) -> None:
        if not self.responses:
            raise DataError(
                "method.supervision.authors has a share of `dataset`, but no row of data.train has a worked response; "
                "end its `messages` in an assistant turn, or give that share to `teacher`"
            )

    async def rollouts(self, prompts: Sequence[Prompt], ctx: StepContext, *, group_size: int) -> list[Rollout]:
        """Raise DataError when not one prompt of the step has a response."""
        written = [
            transcribe(
                self.responses[prompt.messages],
                id=f"{ctx.step + 1:06d}/{place}/0",
                prompt=prompt,
                group_index=0,
                author=Author.DATASET,
                has_ended=True,
                encode=self.encode,
                end_id=self.end_id,
                detokenize=self.detokenize,
                max_tokens=self.max_tokens,
            )
            for place, prompt in enumerate(prompts)
            if self.responses.get(prompt.messages)
        ]
        if not written:
            raise DataError(f"step {ctx.step + 1}: none of the {len(prompts)} prompts has a worked response")
        return judge(written, self.verifier)
