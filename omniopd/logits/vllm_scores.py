"""A vLLM server as the teacher: the log-probs of the tokens of a prompt, one HTTP request for each completion.

What is sent is prompt and completion as token ids; the one token that vLLM insists on writing is thrown away. Each
attempt has a cache salt of its own, so that no log-prob comes from blocks that another request computed; vLLM 0.32
reads no cached prefix for such requests anyway.

What the server must allow:
    --max-logprobs N      for `top_k` and `search_top` up to N; 20 unless set, -1 for the whole vocabulary
    --max-model-len L+1   for prompt and completion of L tokens together
    --enable-scale-out    for `requested_by="ids"`, and the V2 model runner, which needs a GPU

Shape letters: T tokens of a completion, N likeliest at each, K tokens of a record.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from omniopd.errors import (
    ConfigError,
    OmniOPDError,
    TeacherAuthError,
    TeacherConnectionError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.logits.scores import Reading, Scored
from omniopd.logits.vllm_wire import (
    WHOLE_VOCABULARY,
    Ask,
    UnreadableError,
    as_record,
    largest_gap,
    read_answer,
    request_fields,
)
from omniopd.teachers.limiter import shared_limiter
from omniopd.teachers.retry import MAX_SERVER_WAIT_S, FaultKind, RequestFault, Sleep, fault_of_status, with_retries
from omniopd.teachers.spec import check_base_url, is_loopback
from omniopd.teachers.wire import MAX_ANSWER_BYTES, HttpClient, HttpReply
from omniopd.types import Missing

DEFAULT_MAX_LOGPROBS = 20
"""What vLLM allows when its --max-logprobs is not set."""

_LEAST_ENTRY_BYTES = 50
"""Of one token's JSON, {"logprob": ..., "rank": ..., "decoded_token": ...} under its id; 60 to 75 are usual."""
_LONG_BODY_BYTES = 1 << 18
_TOO_LONG = re.compile(r"maximum (?:context|model) length|max_tokens must be at least")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringUsage:
    """What scoring took."""

    requests: int = 0
    """HTTP requests, repeated ones too."""
    prompt_tokens: int = 0
    """Read by the server in requests that it answered: prompts and completions."""
    seconds: float = 0.0
    """Spent in `score`, summed over its calls."""


class VllmScores:
    """Score completions with a vLLM server.

    Connections are made lazily for each running event loop; close the teacher in each. `open_vllm_scores` takes the key
    from the environment and refuses to send it in the clear.

    Args:
        base_url: up to and including `/v1`.
        model: as the server calls it.
        vocab_size: of the teacher's logits; needed to ask for all of them.
        api_key: never shown; None for servers that ask for none.
        requested_by: how `Reading.requested_TK` is served. `search`: the `search_top` likeliest are fetched and the
            requested ones found among them; a completion that has one elsewhere is missing. `ids`: the server is handed
            the ids, over `/inference/v1/generate`; they count against --max-logprobs, and one more at each token does,
            by which every answer is checked.
        search_top: WHOLE_VOCABULARY, or how many.
        max_concurrency: requests at a time, shared with all who use this model at this address in this process.
        timeout_s: for one attempt.
        deadline_s: for one completion with all its attempts and waits.
        sleep: replaces the pause between attempts in tests.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        vocab_size: int | None = None,
        api_key: str | None = None,
        provider: str = "vllm",
        requested_by: Literal["search", "ids"] = "search",
        search_top: int = DEFAULT_MAX_LOGPROBS,
        max_concurrency: int = 16,
        timeout_s: float = 120.0,
        deadline_s: float = 600.0,
        max_attempts: int = 5,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        for name, value in (("max_concurrency", max_concurrency), ("max_attempts", max_attempts)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        if vocab_size is not None and vocab_size < 1:
            raise ConfigError(f"vocab_size is {vocab_size}; expected the number of logits of {model}, or None")
        if search_top < 1 and search_top != WHOLE_VOCABULARY:
            raise ConfigError(f"search_top is {search_top}; expected 1 or more, or -1 for the whole vocabulary")
        if requested_by not in ("search", "ids"):
            raise ConfigError(f"requested_by is {requested_by!r}; expected search or ids")
        self.id = f"{provider}:{model}"
        self._base_url = check_base_url(base_url)
        self._model = model
        self._vocab_size = vocab_size
        self._api_key = api_key
        self._requested_by = requested_by
        self._search_top = search_top
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._limiter = shared_limiter(self._base_url, api_key, model, max_in_flight=max_concurrency)
        # A proxy from the environment has no business with a server on this machine.
        self._client = HttpClient(trust_env=not is_loopback(self._base_url))
        self._was_reached = False
        self._usage = ScoringUsage()

    def __repr__(self) -> str:
        return f"VllmScores({self.id!r}, base_url={self._base_url!r})"

    async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
        """Score every completion, in order.

        `top_k` equal to the size of the vocabulary gives records that know the whole of it, ids 0 to V-1 in order.
        Raises ConfigError for what the server does not allow, TeacherAuthError, TeacherRateLimitError (a quota is used
        up), TeacherResponseError (no such model) and TeacherConnectionError (never reached); any other failure makes
        that completion missing.
        """
        asks = [self._ask(reading, top_k) for reading in readings]
        start = time.perf_counter()
        tasks = [asyncio.ensure_future(self._score(ask)) for ask in asks]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # After an error that ends them all; else they are done.
            await asyncio.gather(*tasks, return_exceptions=True)
            self._count(seconds=time.perf_counter() - start)

    async def check(self, readings: Sequence[Reading], *, tolerance: float) -> float:
        """Score completions one by one, then all at once in another order and behind half of themselves.

        Returns the largest difference of one token's log-prob, in nats. Finds replicas with other weights or precision,
        caches that leak into the numbers and prompts that the server changes. Float32 servers stay below 1e-4, bfloat16
        ones differ by 0.01 to 0.1 with the batch. Raises TeacherResponseError when the difference exceeds `tolerance`,
        or when a completion cannot be scored.
        """
        alone = [(await self.score([reading]))[0] for reading in readings]
        together = await self.score([*map(_second_half, readings), *reversed(readings)])
        largest = 0.0
        for first, second in zip([*alone, *reversed(alone)], together, strict=True):
            if first.scores is None or second.scores is None:
                detail = first.detail or second.detail
                raise TeacherResponseError(f"{self._place} could not score what it was checked with ({detail})")
            ours, theirs = first.scores.logprobs_T, second.scores.logprobs_T
            largest = max(largest, largest_gap(ours[len(ours) - len(theirs) :], theirs))
        if not largest <= tolerance:
            raise TeacherResponseError(
                f"{self._place} gives one token log-probs {largest:.3g} nats apart, alone and in a batch; expected at "
                f"most {tolerance:g}; check that all replicas serve the same weights in the same precision, start the "
                "server with --no-enable-prefix-caching, or accept the difference with a larger tolerance"
            )
        return largest

    def take_usage(self) -> ScoringUsage:
        """Return what scoring took since this was last asked."""
        usage, self._usage = self._usage, ScoringUsage()
        return usage

    async def aclose(self) -> None:
        """Close the connections of the running event loop. Safe to call twice."""
        await self._client.aclose()

    @property
    def _place(self) -> str:
        return f"the teacher {self.id} at {self._base_url}"

    def _count(self, *, requests: int = 0, prompt_tokens: int = 0, seconds: float = 0.0) -> None:
        so_far = self._usage
        self._usage = ScoringUsage(
            requests=so_far.requests + requests,
            prompt_tokens=so_far.prompt_tokens + prompt_tokens,
            seconds=so_far.seconds + seconds,
        )

    def _ask(self, reading: Reading, top_k: int) -> Ask:
        size = self._vocab_size
        if top_k < 0 or (size is not None and top_k > size):
            raise ConfigError(f"top_k is {top_k}; expected 0 to {size or 'the size of the vocabulary'} for {self.id}")
        if reading.requested_TK is not None:
            count = reading.requested_TK.shape[1]
            if self._requested_by == "ids":
                return Ask(reading=reading, known="requested", width=0, num_kept=count, is_by_ids=True)
            width = self._search_top
            if width != WHOLE_VOCABULARY:
                width = max(width, count)
                width = WHOLE_VOCABULARY if size is not None and width >= size else width
            return Ask(reading=reading, known="requested", width=width, num_kept=count)
        if top_k and top_k == size:
            return Ask(reading=reading, known="vocabulary", width=WHOLE_VOCABULARY, num_kept=size)
        return Ask(reading=reading, known="teacher_top_k" if top_k else None, width=top_k, num_kept=top_k)

    async def _score(self, ask: Ask) -> Scored:
        if not ask.reading.token_ids:
            nothing_TK = np.zeros((0, ask.num_kept), np.float32)
            return Scored(scores=as_record(ask, np.zeros(0, np.float32), nothing_TK.astype(np.int64), nothing_TK))
        num_entries = 1 + (ask.width if ask.width != WHOLE_VOCABULARY else self._vocab_size or 0)
        if len(ask.ids) * num_entries * _LEAST_ENTRY_BYTES > MAX_ANSWER_BYTES:
            # Such an answer costs the server minutes and would be refused here.
            detail = f"{num_entries} log-probs at each of {len(ask.ids)} tokens are an answer of more than "
            detail += f"{MAX_ANSWER_BYTES >> 20} MB; lower top_k or search_top"
            return Scored(missing=Missing.FAILED, detail=detail)
        first = await self._limiter.acquire(len(ask.ids))
        turns = [first]

        async def attempt() -> Scored:
            # The deadline counts from the first turn: what waits for it has not begun.
            slot = turns.pop() if turns else await self._limiter.acquire(len(ask.ids), is_retry=True)
            try:
                return await self._exchange(ask)
            finally:
                slot.release()

        try:
            scored, _ = await with_retries(
                attempt, max_attempts=self._max_attempts, deadline_s=self._deadline_s, sleep=self._sleep
            )
        except RequestFault as fault:
            if error := self._fatal(fault, ask):
                raise error from None
            reason = Missing.TIMEOUT if fault.kind is FaultKind.TIMEOUT else Missing.FAILED
            detail = f"{fault.detail} ({fault.attempts} attempt{'s' * (fault.attempts > 1)})"
            if _TOO_LONG.search(fault.detail):
                detail += f"; start the server with --max-model-len {len(ask.ids) + 1} or more"
            return Scored(missing=reason, detail=detail)
        finally:
            first.release(was_unused=True)  # Only if no attempt got so far as to release it.
        return scored

    async def _exchange(self, ask: Ask) -> Scored:
        """Send one request and read its answer. Raises RequestFault and ConfigError."""
        self._count(requests=1)
        path = "/inference/v1/generate" if ask.is_by_ids else "/completions"
        root = self._base_url.removesuffix("/v1") if ask.is_by_ids else self._base_url
        body = json.dumps({"model": self._model, "cache_salt": secrets.token_hex(16), **request_fields(ask)}).encode()
        reply = await self._client.post(root + path, headers=self._headers, body=body, timeout_s=self._timeout_s)
        self._was_reached = True
        self._limiter.learn(reply.headers)
        if reply.status != 200:
            raise self._refused(reply)
        try:
            if len(reply.body) < _LONG_BODY_BYTES:
                scored = read_answer(reply.body, ask)
            else:
                scored = await asyncio.to_thread(read_answer, reply.body, ask)
        except UnreadableError as error:
            fault = self._refused(reply)  # Some gateways send their errors with status 200.
            if fault.kind is FaultKind.NONSENSE:
                fault = RequestFault(FaultKind.NONSENSE, str(error), answered=True, was_sent=True)
            raise fault from None
        self._limiter.succeeded()
        self._count(prompt_tokens=len(ask.ids))
        return scored

    def _refused(self, reply: HttpReply) -> RequestFault:
        fault = fault_of_status(reply.status, reply.headers, reply.body, secret=self._api_key)
        if reply.status in (429, 529) or (fault.kind is FaultKind.BUSY and fault.wait_s):
            is_waited_for = (fault.wait_s or 0.0) <= MAX_SERVER_WAIT_S
            self._limiter.throttled(fault.wait_s if is_waited_for else None)
        return fault

    def _fatal(self, fault: RequestFault, ask: Ask) -> OmniOPDError | None:
        """Return the error that no further request would survive, if the fault is one."""
        said = f"({fault.detail})"
        if "greater than max allowed" in fault.detail and fault.kind is FaultKind.REJECTED:
            return ConfigError(
                f"{self._place} does not give so many log-probs at each token {said}; start it with a larger "
                "--max-logprobs (-1 for the whole vocabulary), or lower top_k or search_top"
            )
        if ask.is_by_ids and (fault.status in (403, 404) or "V2 model runner" in fault.detail):
            return ConfigError(
                f"{self._place} takes no requested token ids {said}; start it on a GPU with --enable-scale-out, "
                "or use requested_by='search'"
            )
        if fault.kind is FaultKind.AUTH:
            advice = "check the key" if self._api_key else "give one by a card in ./teachers/ with api_key_env: NAME"
            return TeacherAuthError(f"{self._place} refuses access {said}; {advice}")
        if fault.kind is FaultKind.QUOTA or (fault.wait_s or 0.0) > MAX_SERVER_WAIT_S:
            return TeacherRateLimitError(f"{self._place} asks to stop {said}; run the same again later")
        if fault.kind is FaultKind.NO_MODEL:
            return TeacherResponseError(
                f"{self._place} has no such model or no such endpoint {said}; check the model's name "
                "(--served-model-name) and the base_url, which ends in /v1"
            )
        if fault.kind is FaultKind.UNREACHABLE and not self._was_reached:
            return TeacherConnectionError(
                f"{self._place} cannot be reached after {fault.attempts} attempts {said}; start it with: "
                f"{self._command(ask)}"
            )
        return None

    def _command(self, ask: Ask) -> str:
        """Return what starts a server that answers at this address and gives so many log-probs."""
        widths = (ask.width, self._search_top)
        most = WHOLE_VOCABULARY if WHOLE_VOCABULARY in widths else max(*widths, DEFAULT_MAX_LOGPROBS)
        address = urlsplit(self._base_url)
        port = address.port or (443 if address.scheme == "https" else 80)
        scale_out = " --enable-scale-out" if self._requested_by == "ids" else ""
        return f"vllm serve {shlex.quote(self._model)} --port {port} --max-logprobs {most}{scale_out}"


def open_vllm_scores(spec: str, **settings: Any) -> VllmScores:
    """Open `provider:model[@base_url]` with the key of its card, as text teachers are; `settings` as of `VllmScores`.

    Raises ConfigError and TeacherAuthError.
    """
    from omniopd.teachers.resolve import find_key, find_target

    target = find_target(spec)
    base_url = target.spec.base_url or target.card.base_url
    if base_url is None or target.card.dialect != "openai":
        raise ConfigError(f"the teacher {spec} is no vLLM server with an address; write vllm:MODEL@http://HOST:PORT/v1")
    key = find_key(target.card, base_url)
    return VllmScores(base_url=base_url, model=target.spec.model, api_key=key, provider=target.card.id, **settings)


def _second_half(reading: Reading) -> Reading:
    half = len(reading.token_ids) // 2
    return Reading(prompt_ids=reading.prompt_ids + reading.token_ids[:half], token_ids=reading.token_ids[half:])
