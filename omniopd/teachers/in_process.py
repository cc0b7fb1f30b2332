"""`hf:MODEL`: a teacher in this process. Text goes in and text comes out, as from a server; nobody bills tokens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.errors import ConfigError, TeacherCapabilityError
from omniopd.models import context_length, resolve_model
from omniopd.serving.batcher import Batcher
from omniopd.teachers.base import Bound, ContinuationRequest, Reply, TeacherAnswer, Till
from omniopd.teachers.continuation import sent_prefix
from omniopd.teachers.repair import clean_continuation
from omniopd.types import Continuation, Message, Missing, Usage

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from omniopd.generation import Sample, Sampler, SampleRequest
    from omniopd.teachers.probe import Encode

_CONFIGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_GLIMPSE_BYTES = 1024


class HFTeacher:
    """Write continuations with a model folder, or a model of the Hugging Face hub, in a thread of this process.

    The weights are loaded when the first continuation is asked for, and let go by `aclose`; the process holds them
    beside the student's. Sample i of a request depends on its seed and i alone, as at `omniopd serve`; a request
    without a seed gets one from its text.

    Args:
        id: `hf:MODEL`, for records.
        model: a folder, `mini-math:teacher` or a name on the hub.
        temperature: None means 1.
        top_p: None means all tokens.
        threads: CPU threads of torch for the teacher's thread.
        continuation: `completions` has the teacher read prompt and prefix as text in its own chat template; `tokens`
            goes on from the student's token ids, which needs the student's vocabulary.
        batch_size: sequences written together; bounds the memory.

    Raises:
        ConfigError: the folder is not there, or an argument cannot be used.
    """

    def __init__(
        self,
        id: str,
        model: str,
        *,
        temperature: float | None = 1.0,
        top_p: float | None = None,
        device: str = "auto",
        threads: int | None = None,
        continuation: str = "completions",
        batch_size: int = 32,
    ) -> None:
        if continuation not in ("completions", "tokens"):
            raise ConfigError(
                f"continuation is {continuation!r}, but a teacher in this process takes completions or tokens"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
        self._id = id
        self._model = model
        self._source = resolve_model(model)
        self._temperature = 1.0 if temperature is None else temperature
        self._top_p = 1.0 if top_p is None else top_p
        self._device = device
        self._threads = threads
        self._transport = continuation
        self._batch_size = batch_size
        self._opening = threading.Lock()
        self._batcher: Batcher | None = None

    def __repr__(self) -> str:
        return f"HFTeacher({self._id!r}, {self._model!r}, continuation={self._transport!r})"

    @property
    def id(self) -> str:
        """`hf:MODEL`"""
        return self._id

    @property
    def exact_samples(self) -> bool:
        """Always: sample i of a request is reproducible from its seed."""
        return True

    @property
    def reads_token_ids(self) -> bool:
        """Whether the student's token ids are what the teacher goes on from."""
        return self._transport == "tokens"

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that shapes an answer besides the request, for the ledger's key. Loads the tokenizer, not the weights."""
        template = _digest([repr(self._reader.encode([Message(role="user", content="?")], "")).encode()])
        return {
            "teacher": self._id,
            "model": self._model,
            "weights": weights_identity(self._source),
            "transport": self._transport,
            "template": template,
            "temperature": self._temperature,
            "top_p": self._top_p,
        }

    async def continuations(
        self, requests: Sequence[ContinuationRequest], *, till: Till | None = None
    ) -> list[TeacherAnswer]:
        """Answer every request, in order, a batch at a time: each is ordered, written, settled.

        A prompt that leaves no room in the context has its samples FAILED, the others are answered. Raises ConfigError
        when the model cannot be loaded, TeacherCapabilityError for token ids that are missing or not of its vocabulary,
        RolloutError when its weights are broken, and what the till raises.
        """
        reader = await asyncio.to_thread(lambda: self._reader)
        answers: dict[int, TeacherAnswer] = {}
        jobs: list[_Job] = []
        for position, request in enumerate(requests):
            ids = self._token_ids(request, reader)
            if problem := reader.why_too_long(ids, request.max_tokens):
                lost = Continuation(text=None, missing=Missing.FAILED, detail=problem)
                answers[position] = TeacherAnswer(continuations=(lost,) * request.n, usage=Usage(cost_usd=0.0))
            else:
                jobs.append(_Job(position, request, self._sample_request(request, ids)))
        for batch in _batches(jobs, self._batch_size):
            answers |= await self._write(batch, till)
        return [answers[position] for position in range(len(requests))]

    async def aclose(self) -> None:
        """Finish what is being written and let the weights go. Safe to call twice; a later request loads them again."""
        with self._opening:
            batcher, self._batcher = self._batcher, None
        if batcher is not None:
            await asyncio.to_thread(batcher.close)

    async def _write(self, batch: list[_Job], till: Till | None) -> dict[int, TeacherAnswer]:
        outputs = sum(job.asked.num_samples * job.asked.max_tokens for job in batch)
        bound = Bound(tokens=sum(len(job.asked.token_ids) for job in batch) + outputs, usd=0.0)
        order = await till.order(bound) if till is not None else None
        start = time.perf_counter()
        replies: list[Reply] = []
        usages = [Usage(requests=int(job is batch[0]), cost_usd=0.0) for job in batch]
        try:
            results = await asyncio.wrap_future(self._submit([job.asked for job in batch]))
            usages = [job.usage(samples, is_first=job is batch[0]) for job, samples in zip(batch, results, strict=True)]
            for job, samples in zip(batch, results, strict=True):
                replies += [self._reply(job, i, sample) for i, sample in enumerate(samples)]
        finally:
            seconds = time.perf_counter() - start
            if order is not None:
                await order.settle(replies, sum(usages, Usage()), seconds)
        return {
            job.position: TeacherAnswer(
                continuations=tuple(r.continuation for r in replies if r.position == job.position),
                usage=usage,
                seconds=seconds,
            )
            for job, usage in zip(batch, usages, strict=True)
        }

    def _token_ids(self, request: ContinuationRequest, reader: _Reader) -> tuple[int, ...]:
        if self._transport == "completions":
            return reader.encode(request.messages, sent_prefix(request.prefix))
        if request.token_ids is None:
            raise TeacherCapabilityError(
                f"the teacher {self._id} is asked with token ids (continuation: tokens) and the request has none; only "
                "a run whose student shares the teacher's vocabulary gives them; use continuation: completions"
            )
        if strangers := [i for i in request.token_ids if not 0 <= i < reader.vocabulary_size]:
            raise TeacherCapabilityError(
                f"the teacher {self._id} was given token id {strangers[0]} and has 0..{reader.vocabulary_size - 1}: "
                "its vocabulary is not the student's; use continuation: completions"
            )
        return request.token_ids

    def _sample_request(self, request: ContinuationRequest, ids: tuple[int, ...]) -> SampleRequest:
        from omniopd.generation import SampleRequest

        return SampleRequest(
            token_ids=ids,
            num_samples=request.n,
            max_tokens=request.max_tokens,
            temperature=self._temperature,
            top_p=self._top_p,
            seed=int(_digest([repr(ids).encode()]), 16) if request.seed is None else request.seed,
        )

    def _reply(self, job: _Job, index: int, sample: Sample) -> Reply:
        continuation = clean_continuation(
            job.request.prefix, sample.text, transport=self._transport, finish_reason=sample.finish_reason.value
        )
        return Reply(position=job.position, sample=index, raw=sample.text, continuation=continuation)

    def _submit(self, requests: Sequence[SampleRequest]) -> Future[list[list[Sample]]]:
        with self._opening:
            if self._batcher is None:
                weights = _LazySampler(self._source, device=self._device, threads=self._threads)
                self._batcher = Batcher(weights, batch_size=self._batch_size)
            return self._batcher.submit(requests)

    @cached_property
    def _reader(self) -> _Reader:
        from omniopd.teachers.resolve import prompt_encoder

        config = _load_config(self._source)
        return _Reader(
            encode=prompt_encoder(Path(self._source)),
            context_tokens=context_length(config),
            vocabulary_size=config.get_text_config().vocab_size,
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """How the model reads a request."""

    encode: Encode
    """With the model's chat template."""
    context_tokens: int | None
    vocabulary_size: int

    def why_too_long(self, ids: Sequence[int], max_tokens: int) -> str | None:
        """Return what is wrong with the length of a prompt, None when it can be answered."""
        if not ids:
            return "the prompt has no tokens; a model needs at least one to go on from"
        if self.context_tokens is not None and len(ids) + max_tokens > self.context_tokens:
            return (
                f"a prompt of {len(ids)} tokens plus max_tokens={max_tokens} exceeds the context of "
                f"{self.context_tokens} tokens"
            )
        return None


@dataclass(frozen=True, slots=True)
class _Job:
    """A request that fits, and what the sampler is asked for it."""

    position: int
    request: ContinuationRequest
    asked: SampleRequest

    def usage(self, samples: Sequence[Sample], *, is_first: bool) -> Usage:
        """Count its tokens; the prompt once. A batch is one request."""
        return Usage(
            requests=int(is_first),
            input_tokens=len(self.asked.token_ids),
            output_tokens=sum(len(sample.token_ids) for sample in samples),
            cost_usd=0.0,
        )


class _LazySampler:
    """A sampler that loads its weights when it is first used, in the thread that uses it."""

    def __init__(self, source: str, *, device: str, threads: int | None) -> None:
        self._source = source
        self._device = device
        self._threads = threads
        self._sampler: Sampler | None = None

    def sample(self, requests: Sequence[SampleRequest], *, batch_size: int = 512) -> list[list[Sample]]:
        if self._sampler is None:
            from omniopd.generation import load_sampler

            if self._threads is not None:
                import torch

                torch.set_num_threads(self._threads)
            self._sampler = load_sampler(self._source, device=self._device)
        return self._sampler.sample(requests, batch_size=batch_size)


def _batches(jobs: list[_Job], batch_size: int) -> Iterable[list[_Job]]:
    """Pack whole requests, alike lengths together, to `batch_size` sequences; one with more has a batch of its own."""
    batch: list[_Job] = []
    for job in sorted(jobs, key=lambda job: (job.asked.max_tokens, len(job.asked.token_ids), job.position)):
        if batch and sum(j.asked.num_samples for j in batch) + job.asked.num_samples > batch_size:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _load_config(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"cannot load the teacher {source!r}: {reason}; give a folder with config.json and weights, or the name of "
            "a model on the Hugging Face hub"
        ) from error


def weights_identity(source: str) -> str:
    """Return what tells a model from others: the commit on the hub, or a digest of the folder.

    A glimpse of each tensor tells trained weights apart without reading gigabytes, wherever the folder is copied to;
    other formats than safetensors go by size and time.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file

        return Path(str(cached_file(source, "config.json"))).parent.name
    parts = [name.encode() + (folder / name).read_bytes() for name in _CONFIGS if (folder / name).is_file()]
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            parts += [path.name.encode(), *_glimpses(path)]
        elif path.suffix in (".bin", ".pt", ".pth"):
            parts.append(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return _digest(parts)


def _glimpses(path: Path) -> Iterable[bytes]:
    """Yield the header of a safetensors file, then the first, middle and last bytes of each tensor."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        yield header
        start = file.tell()
        for name, tensor in sorted(json.loads(header).items()):
            if name != "__metadata__":
                first, end = tensor["data_offsets"]
                for place in (first, (first + end) // 2, max(first, end - _GLIMPSE_BYTES)):
                    file.seek(start + place)
                    yield file.read(min(_GLIMPSE_BYTES, end - place))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
