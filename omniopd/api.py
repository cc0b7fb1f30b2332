"""The library facade: score finished text against a teacher that can only be prompted. Loads no torch.

    with ChunkRewarder(teacher="openai:gpt-4o", similarity="0.5*edit + 0.5*numbers") as rewarder:
        [rewards] = rewarder.score(["What is 12 + 35?"], ["12 + 35 = 47, so the answer is 47."])
        rewards.reward

Scoring calls the teacher, which may cost money; everything else here is free.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from omniopd.chunking import num_words, peak_words, select_chunks, tile_words
from omniopd.errors import ConfigError, TeacherResponseError
from omniopd.scoring.chunk_score import ChunkScorer, smoothed_target
from omniopd.scoring.similarity import AnySimilarity, as_similarity, get_similarity
from omniopd.teachers.base import ContinuationRequest, Teacher, TeacherAnswer
from omniopd.types import Chunk, ChunkScore, Message, Missing, TeacherContinuations, Usage, Value

__all__ = [
    "ChunkRewarder",
    "ChunkRewards",
    "ScoredChunk",
    "as_reward_func",
    "get_similarity",
    "select_chunks",
    "smoothed_target",
]

R = TypeVar("R")

Conversation = str | Sequence[Mapping[str, Any] | Message]
"""A prompt: text, which is one user message, or chat messages."""

RewardFunction = Callable[..., list[float | None]]

_REQUESTS_PER_CALL = 256
"""Requests handed to the teacher at once; the teacher limits its own concurrency."""
_TOKENS_PER_WORD = 4
"""Room for the numbers and LaTeX of a worked solution; prose needs 1.3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredChunk(Value):
    """A span of a response and how far the teacher agrees with it."""

    start: int
    end: int
    """Half-open character range [start, end) of the response."""
    text: str
    score: float | None
    """In [0, 1]; None when too little of the teacher's text was usable."""
    num_continuations: int
    """How many continuations the score rests on."""
    missing: Missing | None = None
    """Why there is no score."""
    detail: str = ""
    continuations: tuple[str, ...] = ()
    """What the teacher wrote instead, as far as usable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRewards(Value):
    """All chunks of one response, in the order of the text."""

    chunks: tuple[ScoredChunk, ...]
    usage: Usage = field(default_factory=Usage)
    """What this response cost. A request that several responses share is counted with the first."""

    @property
    def reward(self) -> float | None:
        """The mean of the scores there are; None without any."""
        scores = [chunk.score for chunk in self.chunks if chunk.score is not None]
        return math.fsum(scores) / len(scores) if scores else None


@dataclass(kw_only=True, eq=False)
class ChunkRewarder:
    """Score responses chunk by chunk: the teacher continues each prefix, agreement with the response is the reward.

    `score` may be called anywhere, also inside a running event loop; `ascore` awaits. A teacher named by a spec is
    opened at the first call, kept, and closed by `close()` or `with`. A teacher object stays yours to close; `score`
    awaits it on a thread that this object keeps until closed, `ascore` on your loop.

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
    _thread: _LoopThread | None = field(default=None, init=False, repr=False)
    _opened: Teacher | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

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
        """All that shapes a score, as plain values: two rewarders with equal settings are interchangeable."""
        options = {f"teacher_options.{name}": str(value) for name, value in sorted(self.teacher_options.items())}
        return {
            "teacher": self.teacher if isinstance(self.teacher, str) else self.teacher.id,
            **options,
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
        entropies: Sequence[Sequence[float]] | None = None,
        progress: bool = False,
    ) -> list[ChunkRewards]:
        """Score every response, in order. Spends money at a paid teacher.

        Args:
            prompts: One for each response.
            responses: Finished texts. One without a word has no chunk and the reward None.
            entropies: For each response one number for each whitespace-separated word, on any scale; chunks then
                start at the highest, do not overlap, and need `chunk_words` words. Without them, chunks cover the text.
            progress: Draw a bar on a terminal.

        Raises:
            ConfigError: lengths that do not match, or a prompt that is neither text nor messages.
            TeacherError: as the teacher raises it; single failed continuations do not raise.
        """
        jobs = self._jobs(prompts, responses, entropies)
        return self._own_thread().run(self._score(jobs, progress=progress))

    async def ascore(
        self,
        prompts: Sequence[Conversation],
        responses: Sequence[str],
        *,
        entropies: Sequence[Sequence[float]] | None = None,
        progress: bool = False,
    ) -> list[ChunkRewards]:
        """Do what `score` does, without blocking the event loop."""
        scoring = self._score(self._jobs(prompts, responses, entropies), progress=progress)
        if isinstance(self.teacher, str):
            # One opened teacher serves both `score` and `ascore`, and its connections belong to one loop.
            return await asyncio.wrap_future(self._own_thread().submit(scoring))
        return await scoring

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

    def _own_thread(self) -> _LoopThread:
        with self._lock:
            if self._thread is None:
                self._thread = _LoopThread()
                # For those who neither close nor use `with`: connections left open complain when Python ends.
                atexit.register(self.close)
            return self._thread

    def _open(self) -> Teacher:
        if not isinstance(self.teacher, str):
            return self.teacher
        with self._lock:
            if self._opened is None:
                from omniopd.teachers.resolve import open_teacher

                self._opened = open_teacher(self.teacher, **self.teacher_options)
            return self._opened

    def _jobs(
        self,
        prompts: Sequence[Conversation],
        responses: Sequence[str],
        entropies: Sequence[Sequence[float]] | None,
    ) -> list[_Job]:
        """Check the input and cut the chunks, before any money is spent."""
        for name, value in (("prompts", prompts), ("responses", responses)):
            if isinstance(value, str):
                raise ConfigError(f"{name} is a text; expected a list with one entry for each response")
        if len(prompts) != len(responses):
            raise ConfigError(f"{len(prompts)} prompts for {len(responses)} responses; expected as many of both")
        if entropies is not None and len(entropies) != len(responses):
            raise ConfigError(f"{len(entropies)} lists of entropies for {len(responses)} responses; expected one each")
        per_response = [None] * len(responses) if entropies is None else list(entropies)
        return [
            _Job(messages=as_messages(prompt), chunks=self._chunks(number, response, ranking))
            for number, (prompt, response, ranking) in enumerate(zip(prompts, responses, per_response, strict=True))
        ]

    def _chunks(self, number: int, response: str, entropies: Sequence[float] | None) -> tuple[Chunk, ...]:
        if not isinstance(response, str):
            raise ConfigError(f"response {number} is {type(response).__name__}; expected text")
        if entropies is None:
            spans = _spread(tile_words(response, words_per_chunk=self.chunk_words), self.max_chunks)
        else:
            most = self.max_chunks or max(1, num_words(response))
            try:
                spans = peak_words(response, entropies, words_per_chunk=self.chunk_words, max_chunks=most)
            except ConfigError as error:
                raise ConfigError(f"response {number}: {error}") from error
        return tuple(
            Chunk(
                rollout_id=str(number),
                index=index,
                start=start,
                end=end,
                prefix=response[:start],
                text=response[start:end],
            )
            for index, (start, end) in enumerate(spans)
        )

    def _request(self, job: _Job, chunk: Chunk) -> ContinuationRequest:
        return ContinuationRequest(
            messages=job.messages,
            prefix=chunk.prefix,
            n=self.num_continuations,
            max_tokens=self.max_tokens or _TOKENS_PER_WORD * self.chunk_words,
            seed=self.seed,
        )

    async def _score(self, jobs: Sequence[_Job], *, progress: bool) -> list[ChunkRewards]:
        asked = [(job, chunk, self._request(job, chunk)) for job in jobs for chunk in job.chunks]
        # Responses that share a prompt and a prefix (every first chunk does) share the request.
        requests = list(dict.fromkeys(request for _, _, request in asked))
        if not requests:
            return [ChunkRewards(chunks=()) for _ in jobs]
        teacher = self._open()
        answers = await _ask(teacher, requests, progress=progress)
        unbilled = dict(answers)
        evidence = [
            TeacherContinuations(
                chunk=chunk,
                continuations=answers[request].continuations,
                teacher_id=teacher.id,
                usage=paid.usage if (paid := unbilled.pop(request, None)) else Usage(),
                seconds=answers[request].seconds,
            )
            for _, chunk, request in asked
        ]
        # In a thread: a model may score, and the event loop has other work.
        scores = iter(zip(evidence, await asyncio.to_thread(self._scorer.score, evidence), strict=True))
        return [self._rewards([next(scores) for _ in job.chunks]) for job in jobs]

    def _rewards(self, scored: Sequence[tuple[TeacherContinuations, ChunkScore]]) -> ChunkRewards:
        return ChunkRewards(
            chunks=tuple(self._scored_chunk(evidence, score) for evidence, score in scored),
            usage=sum((evidence.usage for evidence, _ in scored), Usage()),
        )

    def _scored_chunk(self, evidence: TeacherContinuations, score: ChunkScore) -> ScoredChunk:
        value = score.value
        if value is not None:
            value = smoothed_target(score.evidence, score.num_continuations, self.prior, alpha=self.alpha)
        return ScoredChunk(
            start=score.chunk.start,
            end=score.chunk.end,
            text=score.chunk.text,
            score=value,
            num_continuations=score.num_continuations,
            missing=score.missing,
            detail=score.detail,
            continuations=evidence.texts,
        )


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
        responses = [_completion_text(number, completion) for number, completion in enumerate(completions)]
        return [rewards.reward for rewards in rewarder.score(prompts, responses)]

    # Trainers read the name of a reward from its function.
    reward.__name__ = reward.__qualname__ = name
    return reward


def as_messages(prompt: Conversation) -> tuple[Message, ...]:
    """Return the chat messages of a prompt. Raises ConfigError for anything but text and messages with text."""
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    if not isinstance(prompt, Sequence) or not prompt:  # callers hand over what a file or a trainer held
        raise ConfigError(f"prompt is {prompt!r}; expected text or a list of messages that is not empty")
    return tuple(_message(turn) for turn in prompt)


def _message(turn: object) -> Message:
    if isinstance(turn, Message):
        return turn
    if isinstance(turn, Mapping):
        role, content = turn.get("role"), turn.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return Message(role=role, content=content)
    raise ConfigError(f"a message is {turn!r}; expected {{'role': 'user', 'content': 'some text'}}")


def _completion_text(number: int, completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    messages = as_messages(completion)
    if len(messages) != 1:
        raise ConfigError(f"completion {number} has {len(messages)} messages; expected one assistant message")
    return messages[0].content


def _spread(spans: list[tuple[int, int]], most: int | None) -> list[tuple[int, int]]:
    """Keep at most that many spans, evenly over the text, the middle one of each equal share."""
    if most is None or len(spans) <= most:
        return spans
    return [spans[(2 * i + 1) * len(spans) // (2 * most)] for i in range(most)]


async def _ask(
    teacher: Teacher, requests: Sequence[ContinuationRequest], *, progress: bool
) -> dict[ContinuationRequest, TeacherAnswer]:
    answers: dict[ContinuationRequest, TeacherAnswer] = {}
    with progress_bar("asking the teacher", len(requests), show=progress) as advance:
        for first in range(0, len(requests), _REQUESTS_PER_CALL):
            batch = requests[first : first + _REQUESTS_PER_CALL]
            got = await teacher.continuations(batch)
            if len(got) != len(batch):
                raise TeacherResponseError(f"teacher {teacher.id} gave {len(got)} answers to {len(batch)} requests")
            answers.update(zip(batch, got, strict=True))
            advance(len(batch))
    return answers


@contextmanager
def progress_bar(description: str, total: int, *, show: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Draw a bar on standard error when it is a terminal and `show` is set; yields what to call with each advance."""
    if not (show and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One response, ready to be asked about."""

    messages: tuple[Message, ...]
    chunks: tuple[Chunk, ...]


class _LoopThread:
    """An event loop on a thread of its own, so that synchronous callers can await, whatever loop they run in.

    It outlives single calls because the connections of a teacher belong to the loop they were opened on.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="omniopd-teacher", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def submit(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        future = self.submit(work)
        try:
            return future.result()
        finally:
            # After an interrupt the work must not go on spending.
            future.cancel()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
