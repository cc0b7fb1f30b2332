"""The library facade: score finished text against a teacher that can only be prompted. Loads no torch.

    with ChunkRewarder(teacher="openai:gpt-4o", similarity="0.5*edit + 0.5*numbers") as rewarder:
        [rewards] = rewarder.score(["What is 12 + 35?"], ["12 + 35 = 47, so the answer is 47."])
        rewards.reward

Scoring calls the teacher, which may cost money; everything else here is free.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from omniopd.chunking import select_chunks
from omniopd.concurrency import LoopThread, in_order
from omniopd.errors import ConfigError
from omniopd.progress import counting
from omniopd.responses import Conversation, Response, completion_text, cut_responses
from omniopd.rewards import ChunkRewards, ScoredChunk, scored_chunk
from omniopd.scoring.chunk_score import ChunkScorer, smoothed_target
from omniopd.scoring.similarity import AnySimilarity, as_similarity, get_similarity
from omniopd.teachers.asked_once import AskedOnce
from omniopd.teachers.base import ContinuationRequest, Teacher
from omniopd.teachers.shaping import lasting_spec, shaping_options
from omniopd.types import ChunkScore, TeacherContinuations, Usage

__all__ = [
    "ChunkRewarder",
    "ChunkRewards",
    "ScoredChunk",
    "as_reward_func",
    "get_similarity",
    "select_chunks",
    "smoothed_target",
]

RewardFunction = Callable[..., list[float | None]]

Tell = Callable[[str, int, int], None]
"""Told what is counted, how many are done, and of how many."""

_TOKENS_PER_WORD = 4
"""Room for the numbers and LaTeX of a worked solution; prose needs 1.3."""
_RESPONSES_PER_SLOT = 4
"""Responses under way for each request that the teacher may have under way: some wait for one slow answer."""
_MOST_AHEAD = 16
"""Times the responses under way: how many may be finished while one before them is not."""
_DEFAULT_CONCURRENCY = 16
"""Of `open_teacher`."""


@dataclass(kw_only=True, eq=False)
class ChunkRewarder:
    """Score responses chunk by chunk: the teacher continues each prefix, agreement with the response is the reward.

    `score` may be called anywhere, also inside a running event loop; `ascore` awaits. A teacher named by a spec is
    opened at the first call, kept, and closed by `close()` or `with`. A teacher object stays yours to close; `score`
    awaits it on a thread that this object keeps until closed, `ascore` on your loop.

    Responses are worked on side by side, four for each request that the teacher may have under way
    (`teacher_options["max_concurrency"]`, 16). A prefix that several responses of a call share is asked once. With
    `teacher_options={"batch": True}` the whole call goes to the batch endpoint in one piece.

    Source: arXiv:2606.01476 section 3. Differs: chunks are counted in words, since plain text has no student tokens,
    and the prior is one number, since it has no student probabilities.

    Raises:
        ConfigError: an argument out of range, at construction.
    """

    teacher: str | Teacher
    """`provider:model[@base_url]`, or any object with the Teacher protocol."""
    teacher_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to `omniopd.teachers.resolve.open_teacher` with the spec, e.g. `{"temperature": 0.7}`."""
    similarity: AnySimilarity = "edit"
    """As in `ChunkScorer`."""
    num_continuations: int = 4
    """N, asked for each chunk."""
    chunk_words: int = 12
    """C in words."""
    max_chunks: int | None = None
    """M. None: all of a response. Else the words of highest entropy start the chunks, or, without entropies, chunks
    evenly spread over the response."""
    max_tokens: int | None = None
    """Length limit of a continuation, in the teacher's tokens; None: four for each word."""
    min_continuations: int | float = 0.5
    """As in `ChunkScorer`."""
    alpha: float = 0.0
    """Shrinks a score towards `prior` as if `alpha` more continuations had agreed that much; 0 is the plain mean."""
    prior: float = 0.5
    """Read when `alpha` is above 0."""
    seed: int | None = 0
    """Sent to the teacher, which may ignore it."""
    _thread: LoopThread | None = field(default=None, init=False, repr=False)
    _opened: Teacher | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _tell: Tell = field(default=lambda what, done, total: None, init=False, repr=False)
    """For the call that waits for a batch."""

    def __post_init__(self) -> None:
        self._scorer = ChunkScorer(similarity=self.similarity, min_continuations=self.min_continuations)
        smoothed_target(0.0, 1, self.prior, alpha=self.alpha)
        counts = {"num_continuations": self.num_continuations, "chunk_words": self.chunk_words}
        optional = {"max_chunks": self.max_chunks, "max_tokens": self.max_tokens}
        for name, value in (counts | {key: value for key, value in optional.items() if value is not None}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
        if isinstance(self.min_continuations, int) and self.min_continuations > self.num_continuations:
            raise ConfigError(
                f"min_continuations is {self.min_continuations} of num_continuations {self.num_continuations}; "
                "expected at most as many, otherwise no chunk is ever scored"
            )
        if not isinstance(self.teacher, str | Teacher):
            raise ConfigError(
                f"teacher is {self.teacher!r}; expected a spec like 'openai:gpt-4o' or an object with id, "
                "continuations and aclose (omniopd.teachers.base.Teacher)"
            )
        if self.teacher_options and not isinstance(self.teacher, str):
            raise ConfigError("teacher_options belong to a teacher spec; a teacher object has its options already")

    @property
    def settings(self) -> dict[str, str | int | float | None]:
        """All that shapes a score, as plain values: two rewarders with equal settings are interchangeable.

        Where the answers are kept, what they may cost and how fast they come is no part of it, nor is the port of a
        server on this machine.
        """
        options = shaping_options(self.teacher_options) if isinstance(self.teacher, str) else {}
        return {
            "teacher": lasting_spec(self.teacher) if isinstance(self.teacher, str) else self.teacher.id,
            **{f"teacher_options.{name}": value for name, value in options.items()},
            "similarity": as_similarity(self.similarity).name,
            "num_continuations": self.num_continuations,
            "chunk_words": self.chunk_words,
            "max_chunks": self.max_chunks,
            "max_tokens": self.max_tokens,
            "min_continuations": self.min_continuations,
            "alpha": self.alpha,
            "prior": self.prior,
            "seed": self.seed,
        }

    def score(
        self,
        prompts: Sequence[Conversation],
        responses: Sequence[str],
        *,
        entropies: Sequence[Sequence[float] | None] | None = None,
        progress: bool = False,
    ) -> list[ChunkRewards]:
        """Score every response, in order. Spends money at a paid teacher.

        Args:
            prompts: One for each response.
            responses: Finished texts. One without a word has no chunk and the reward None.
            entropies: For each response one number for each whitespace-separated word, on any scale; chunks then
                start at the highest, do not overlap, and need `chunk_words` words. Without them, or where they are
                None, chunks cover the text.
            progress: Draw a bar on a terminal; elsewhere write a line now and then, to standard error.

        Raises:
            ConfigError: lengths that do not match, or a prompt that is neither text nor messages.
            TeacherError: as the teacher raises it; single failed continuations do not raise. A ledger
                (`teacher_options["ledger"]`) has what was answered until then.
        """
        jobs = self._cut(prompts, responses, entropies)
        with progress_display(show=progress) as tell:
            return self._own_thread().run(self._score(jobs, tell))

    async def ascore(
        self,
        prompts: Sequence[Conversation],
        responses: Sequence[str],
        *,
        entropies: Sequence[Sequence[float] | None] | None = None,
        progress: bool = False,
    ) -> list[ChunkRewards]:
        """Do what `score` does, without blocking the event loop."""
        jobs = self._cut(prompts, responses, entropies)
        with progress_display(show=progress) as tell:
            if isinstance(self.teacher, str):
                # One opened teacher serves both `score` and `ascore`, and its connections belong to one loop.
                return await asyncio.wrap_future(self._own_thread().submit(self._score(jobs, tell)))
            return await self._score(jobs, tell)

    def stream(
        self,
        prompts: Sequence[Conversation],
        responses: Sequence[str],
        *,
        entropies: Sequence[Sequence[float] | None] | None = None,
        tell: Tell = lambda what, done, total: None,
    ) -> Generator[list[ChunkRewards]]:
        """Yield what `score` returns piece by piece: in order, each time all that is ready.

        A response whose answers are slow delays what is yielded, not the work on those after it. Whatever is raised
        comes after the rewards of all responses before the one that failed. Leaving the loop early cancels the rest.

        Args:
            tell: Called from another thread as responses are finished, in whatever order.
        """
        thread = self._own_thread()
        groups = self._stream(self._cut(prompts, responses, entropies), tell)

        async def following() -> list[ChunkRewards] | None:
            return await anext(groups, None)

        try:
            while (group := thread.run(following())) is not None:
                yield group
        finally:
            thread.run(_close(groups))

    def close(self) -> None:
        """Close what was opened. Safe to call twice; scoring again opens anew."""
        with self._lock:
            thread, self._thread = self._thread, None
            opened, self._opened = self._opened, None
        if thread is None:
            return
        atexit.unregister(self.close)
        try:
            if opened is not None:
                thread.run(opened.aclose())
        finally:
            thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own_thread(self) -> LoopThread:
        with self._lock:
            if self._thread is None:
                self._thread = LoopThread("omniopd-teacher")
                # For those who neither close nor use `with`: connections left open complain when Python ends.
                atexit.register(self.close)
            return self._thread

    def _open(self) -> Teacher:
        if not isinstance(self.teacher, str):
            return self.teacher
        with self._lock:
            if self._opened is None:
                from omniopd.teachers.resolve import open_teacher

                options = dict(self.teacher_options)
                if self._asks_at_once:
                    options["progress"] = lambda done, total: self._tell("answers of the batch", done, total)
                self._opened = open_teacher(self.teacher, **options)
            return self._opened

    @property
    def _asks_at_once(self) -> bool:
        return isinstance(self.teacher, str) and bool(self.teacher_options.get("batch"))

    def _cut(
        self,
        prompts: Sequence[Conversation],
        responses: Sequence[str],
        entropies: Sequence[Sequence[float] | None] | None,
    ) -> list[Response]:
        """Check the input and cut the chunks, before any money is spent."""
        return cut_responses(prompts, responses, entropies, chunk_words=self.chunk_words, max_chunks=self.max_chunks)

    def _requests(self, response: Response) -> list[ContinuationRequest]:
        return [
            ContinuationRequest(
                messages=response.messages,
                prefix=response.text[:start],
                n=self.num_continuations,
                max_tokens=self.max_tokens or _TOKENS_PER_WORD * self.chunk_words,
                seed=self.seed,
            )
            for start, _ in response.spans
        ]

    async def _score(self, responses: Sequence[Response], tell: Tell) -> list[ChunkRewards]:
        async with aclosing(self._stream(responses, tell)) as groups:
            return [rewards async for group in groups for rewards in group]

    async def _stream(self, responses: Sequence[Response], tell: Tell) -> AsyncGenerator[list[ChunkRewards]]:
        if not any(response.spans for response in responses):
            if responses:
                yield [ChunkRewards(chunks=()) for _ in responses]
            return
        teacher = self._open()
        asked = AskedOnce(teacher, (request for response in responses for request in self._requests(response)))
        if self._asks_at_once:
            self._tell = tell
            await asked.ask(request for response in responses for request in self._requests(response))
        one_by_one = asyncio.Lock()
        done = 0

        async def reward(response: Response) -> ChunkRewards:
            nonlocal done
            answers = await asked.answers(self._requests(response))
            evidence = [
                TeacherContinuations(
                    chunk=chunk,
                    continuations=answer.continuations,
                    teacher_id=teacher.id,
                    usage=answer.usage,
                    seconds=answer.seconds,
                )
                for chunk, answer in zip(response.chunks, answers, strict=True)
            ]
            async with one_by_one:
                # In a thread: a model may score, and the event loop has other work.
                scores = await asyncio.to_thread(self._scorer.score, evidence) if evidence else []
            done += 1
            tell("responses", done, len(responses))
            return self._rewards(list(zip(evidence, scores, strict=True)))

        slots = int(self.teacher_options.get("max_concurrency") or _DEFAULT_CONCURRENCY)
        most = _RESPONSES_PER_SLOT * slots
        jobs = (partial(reward, response) for response in responses)
        async with aclosing(in_order(jobs, most_running=most, most_ahead=_MOST_AHEAD * most)) as groups:
            async for group in groups:
                yield group

    def _rewards(self, scored: Sequence[tuple[TeacherContinuations, ChunkScore]]) -> ChunkRewards:
        return ChunkRewards(
            chunks=tuple(scored_chunk(evidence, score, self._value(score)) for evidence, score in scored),
            usage=sum((evidence.usage for evidence, _ in scored), Usage()),
        )

    def _value(self, score: ChunkScore) -> float | None:
        if score.value is None:
            return None
        return smoothed_target(score.evidence, score.num_continuations, self.prior, alpha=self.alpha)


def as_reward_func(
    teacher: ChunkRewarder | Teacher | str, *, name: str = "chunk_reward", **options: Any
) -> RewardFunction:
    """Return a reward function in the style of TRL: `f(prompts, completions, **columns) -> [reward or None]`.

    Prompts and completions may be text or conversations; a conversational completion is one assistant message. A
    response that could not be audited gets None, which TRL leaves out of the advantage.

    Args:
        teacher: A rewarder, or what `ChunkRewarder` takes as its teacher.
        name: What the trainer logs the reward as.
        options: The other arguments of `ChunkRewarder`; none with a rewarder.
    """
    if isinstance(teacher, ChunkRewarder):
        if options:
            raise ConfigError(f"the rewarder is built already; give it {', '.join(sorted(options))} itself")
        rewarder = teacher
    else:
        rewarder = ChunkRewarder(teacher=teacher, **options)

    def reward(prompts: Sequence[Conversation], completions: Sequence[Any], **_: Any) -> list[float | None]:
        responses = [completion_text(number, completion) for number, completion in enumerate(completions)]
        return [rewards.reward for rewards in rewarder.score(prompts, responses)]

    # Trainers read the name of a reward from its function.
    reward.__name__ = reward.__qualname__ = name
    return reward


@contextmanager
def progress_display(*, show: bool, done_before: int = 0) -> Iterator[Tell]:
    """Show the counts it is told, on standard error; `done_before` is added to those of responses."""
    if not show:
        yield lambda what, done, total: None
        return
    shown, shown_done = "", 0
    with ExitStack() as stack:
        advance: Callable[[int], None]

        def tell(what: str, done: int, total: int) -> None:
            nonlocal advance, shown, shown_done
            if what == "responses":
                done, total = done + done_before, total + done_before
            if what != shown:
                stack.close()
                advance = stack.enter_context(counting(total, what))
                shown, shown_done = what, 0
            if done > shown_done:
                advance(done - shown_done)
                shown_done = done

        yield tell


async def _close(groups: AsyncGenerator[list[ChunkRewards]]) -> None:
    await groups.aclose()
