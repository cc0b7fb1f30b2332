"""The off-policy behavior: the teacher writes whole answers, the student reads them with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omniopd.behavior.base import Verifier, group_seeds, judge, transcribe
from omniopd.errors import TeacherResponseError
from omniopd.teachers.base import ContinuationRequest, Teacher
from omniopd.timing import StepTimer
from omniopd.types import Author, Continuation, Prompt, Rollout, StepContext


@dataclass(frozen=True)
class TeacherBehavior:
    """Ask the teacher for `group_size` answers of each prompt. Unusable answers are left out, never filled in."""

    teacher: Teacher
    encode: Callable[[str], list[int]]
    """The student's tokenizer, without special tokens."""
    end_id: int | None
    detokenize: Callable[[Sequence[int]], tuple[str, tuple[int, ...]]]
    max_tokens: int
    timer: StepTimer
    verifier: Verifier | None = None

    async def rollouts(self, prompts: Sequence[Prompt], ctx: StepContext, *, group_size: int) -> list[Rollout]:
        """Raise TeacherResponseError when not one answer is usable."""
        requests = [
            ContinuationRequest(
                messages=prompt.messages,
                prefix="",
                n=group_size,
                max_tokens=self.max_tokens,
                seed=seed,
            )
            for prompt, seed in zip(prompts, group_seeds(ctx, prompts), strict=True)
        ]
        with self.timer("teacher"):
            answers = await self.teacher.continuations(requests)
        written = [
            self._rollout(f"{ctx.step + 1:06d}/{place}", prompt, index, continuation)
            for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            for index, continuation in enumerate(answer.continuations)
            if continuation.text
        ]
        if not written:
            raise TeacherResponseError(
                f"step {ctx.step + 1}: {self.teacher.id} gave no usable answer to {len(prompts)} prompts"
            )
        return judge(written, self.verifier)

    def _rollout(self, group: str, prompt: Prompt, index: int, continuation: Continuation) -> Rollout:
        assert continuation.text is not None
        return transcribe(
            continuation.text,
            id=f"{group}/{index}",
            prompt=prompt,
            group_index=index,
            author=Author.TEACHER,
            has_ended=continuation.finish_reason == "stop",
            encode=self.encode,
            end_id=self.end_id,
            detokenize=self.detokenize,
            max_tokens=self.max_tokens,
        )
