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
import base64
import io
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from omniopd.errors import (
    ConfigError,
    OmniOPDError,
    TeacherAuthError,
    TeacherConnectionError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.logits.scores import Floats, Ids, Known, Reading, Scored, TokenScores
from omniopd.teachers.limiter import shared_limiter
from omniopd.teachers.retry import MAX_SERVER_WAIT_S, FaultKind, RequestFault, Sleep, fault_of_status, with_retries
from omniopd.teachers.spec import check_base_url, is_loopback
from omniopd.teachers.wire import MAX_ANSWER_BYTES, HttpClient, HttpReply
from omniopd.types import Missing

WHOLE_VOCABULARY = -1
DEFAULT_MAX_LOGPROBS = 20
"""What vLLM allows when its --max-logprobs is not set."""

_LEAST_ENTRY_BYTES = 50
"""Of one token's JSON, {"logprob": ..., "rank": ..., "decoded_token": ...} under its id; 60 to 75 are usual."""
_CLAMPED = -9999.0
"""What vLLM writes for -inf, which JSON does not know."""
_ROUNDING = 0.01
"""More than a log-prob may be above 0, or the probabilities of some tokens above 1."""
_SAME = 1e-3
"""Nats between two ways of reading one log-prob from one forward pass."""
_LONG_BODY_BYTES = 1 << 18
_TABLE = re.compile(r'"prompt_logprobs"\s*:\s*\[')
_BY_IDS = re.compile(rb'"prompt_token_id_logprobs"\s*:\s*"([^"]*)"')
_TOO_LONG = re.compile(r"maximum (?:context|model) length|max_tokens must be at least")
_GAP = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringUsage:
    """What scoring took."""

    requests: int = 0
    """HTTP requests, repeated ones too."""
    prompt_tokens: int = 0
    """Read by the server in requests that it answered: prompts and completions."""
    seconds: float = 0.0
    """Spent in `score`, summed over its calls."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Ask:
    """One completion, and what is wanted of it."""

    reading: Reading
    known: Known | None
    width: int
    """How many of the likeliest tokens the server is asked for; WHOLE_VOCABULARY for all."""
    num_kept: int
    """K"""
    is_by_ids: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        return self.reading.prompt_ids + self.reading.token_ids


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
            largest = max(largest, _largest_gap(ours[len(ours) - len(theirs) :], theirs))
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

    def _ask(self, reading: Reading, top_k: int) -> _Ask:
        size = self._vocab_size
        if top_k < 0 or (size is not None and top_k > size):
            raise ConfigError(f"top_k is {top_k}; expected 0 to {size or 'the size of the vocabulary'} for {self.id}")
        if reading.requested_TK is not None:
            count = reading.requested_TK.shape[1]
            if self._requested_by == "ids":
                return _Ask(reading=reading, known="requested", width=0, num_kept=count, is_by_ids=True)
            width = self._search_top
            if width != WHOLE_VOCABULARY:
                width = max(width, count)
                width = WHOLE_VOCABULARY if size is not None and width >= size else width
            return _Ask(reading=reading, known="requested", width=width, num_kept=count)
        if top_k and top_k == size:
            return _Ask(reading=reading, known="vocabulary", width=WHOLE_VOCABULARY, num_kept=size)
        return _Ask(reading=reading, known="teacher_top_k" if top_k else None, width=top_k, num_kept=top_k)

    async def _score(self, ask: _Ask) -> Scored:
        if not ask.reading.token_ids:
            nothing_TK = np.zeros((0, ask.num_kept), np.float32)
            return Scored(scores=_record(ask, np.zeros(0, np.float32), nothing_TK.astype(np.int64), nothing_TK))
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

    async def _exchange(self, ask: _Ask) -> Scored:
        """Send one request and read its answer. Raises RequestFault and ConfigError."""
        self._count(requests=1)
        path = "/inference/v1/generate" if ask.is_by_ids else "/completions"
        root = self._base_url.removesuffix("/v1") if ask.is_by_ids else self._base_url
        body = json.dumps({"model": self._model, "cache_salt": secrets.token_hex(16), **_fields(ask)}).encode()
        reply = await self._client.post(root + path, headers=self._headers, body=body, timeout_s=self._timeout_s)
        self._was_reached = True
        self._limiter.learn(reply.headers)
        if reply.status != 200:
            raise self._refused(reply)
        try:
            if len(reply.body) < _LONG_BODY_BYTES:
                scored = _read(reply.body, ask)
            else:
                scored = await asyncio.to_thread(_read, reply.body, ask)
        except _UnreadableError as error:
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

    def _fatal(self, fault: RequestFault, ask: _Ask) -> OmniOPDError | None:
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
                f"python -m vllm.entrypoints.openai.api_server --model MODEL --max-logprobs {max(ask.width, 20)}"
            )
        return None


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


def _fields(ask: _Ask) -> dict[str, Any]:
    """Return what a request says besides the model."""
    if not ask.is_by_ids:
        drawn = {"max_tokens": 1, "temperature": 0, "add_special_tokens": False}
        return {**drawn, "prompt": ask.ids, "prompt_logprobs": ask.width}
    assert ask.reading.requested_TK is not None
    # The completion's own tokens too: their log-probs come twice, which shows whether the rows are where they should.
    rows = np.column_stack([ask.reading.requested_TK, ask.reading.token_ids]).tolist()
    wanted = {"prompt_logprob_token_ids": rows, "prompt_logprob_start": len(ask.reading.prompt_ids) - 1}
    sampling = {**wanted, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    return {"token_ids": ask.ids, "sampling_params": sampling}


class _UnreadableError(Exception):
    """An answer that is not what was asked for."""


def _read(body: bytes, ask: _Ask) -> Scored:
    """Turn an answer into a record. Raises _UnreadableError and ConfigError."""
    own_T, ids_TN, logprobs_TN = _read_table(body.decode("utf-8", "replace"), ask)
    if own_T.max() > _ROUNDING or (np.exp(np.minimum(logprobs_TN, 1.0)).sum(axis=1) > 1.0 + _ROUNDING).any():
        raise ConfigError(
            "the server's numbers are no log-probs: they add up to more than 1; start it without --logprobs-mode"
        )
    requested = ask.reading.requested_TK
    if ask.known == "vocabulary":
        expected = np.arange(ask.num_kept)
        if ids_TN.shape[1] != ask.num_kept or (np.sort(ids_TN, axis=1) != expected).any():
            raise ConfigError(
                f"the server's model has {ids_TN.shape[1]} tokens and vocab_size is {ask.num_kept}; set vocab_size to "
                "the number of its logits (vocab_size in its config.json)"
            )
        logprobs_TV = np.empty_like(logprobs_TN)
        np.put_along_axis(logprobs_TV, ids_TN, logprobs_TN, axis=1)
        return Scored(scores=_record(ask, own_T, np.broadcast_to(expected, ids_TN.shape), logprobs_TV))
    if requested is None:
        return Scored(scores=_record(ask, own_T, ids_TN, logprobs_TN))
    wanted_TK = np.array(requested, dtype=np.int64)
    if ask.is_by_ids:
        return Scored(scores=_record(ask, own_T, wanted_TK, _read_scores(body, own_T, wanted_TK.shape)))
    own_ids = np.array(ask.reading.token_ids)
    found_TK = _find(np.column_stack([own_ids, ids_TN]), np.column_stack([own_T, logprobs_TN]), wanted_TK)
    if num_lacking := int(np.isnan(found_TK).any(axis=1).sum()):
        detail = f"at {num_lacking} of {len(own_T)} tokens a requested id is not among the {ids_TN.shape[1]} likeliest "
        detail += "that the server gave; raise search_top and the server's --max-logprobs (-1 for the whole vocabulary)"
        return Scored(missing=Missing.FAILED, detail=detail)
    return Scored(scores=_record(ask, own_T, wanted_TK, found_TK))


def _record(ask: _Ask, own_T: Floats, ids_TK: Ids, logprobs_TK: Floats) -> TokenScores:
    if ask.known is None:
        return TokenScores(logprobs_T=own_T)
    return TokenScores(logprobs_T=own_T, known=ask.known, ids_TK=ids_TK, logprobs_TK=logprobs_TK)


def _read_table(text: str, ask: _Ask) -> tuple[Floats, Ids, Floats]:
    """Return the log-probs [T] of the completion's tokens, and ids and log-probs [T, N] of the likeliest, in order.

    One position is parsed at a time: 64 of each of 4,096 tokens then peak at 31 MB, and at 106 MB all at once.
    """
    start = _TABLE.search(text)
    if start is None:
        raise _UnreadableError("the answer holds no prompt_logprobs, which vLLM's server gives")
    parse, at = json.JSONDecoder().raw_decode, start.end()
    own: list[float] = []
    ids: list[Ids] = []
    logprobs: list[Floats] = []
    width = ask.width
    for position, token in enumerate(ask.ids):
        try:
            row, at = parse(text, _GAP.match(text, at).end())  # type: ignore[union-attr]
            if position == 0:
                continue  # Nothing precedes the first token.
            entry = row[str(token)]
            if position < len(ask.reading.prompt_ids):
                continue
            width = len(row) if width == WHOLE_VOCABULARY else width
            if len(row) == width + 1:
                del row[str(token)]  # It is always there, also where it is not among the likeliest.
            if len(row) != width:
                raise ValueError
            ids.append(np.fromiter(map(int, row), np.int64, width))
            logprobs.append(np.fromiter((e["logprob"] for e in row.values()), np.float32, width))
            own.append(float(entry["logprob"]))
        except (KeyError, TypeError, ValueError):
            raise _UnreadableError(
                f"prompt_logprobs does not have token {token} at position {position}, or not with {width} likeliest"
            ) from None
    if not text.startswith("]", _GAP.match(text, at).end()):  # type: ignore[union-attr]
        raise _UnreadableError(f"prompt_logprobs goes on after the {len(ask.ids)} tokens that were sent")
    own_T, logprobs_TN = np.array(own, np.float32), np.stack(logprobs)
    if np.isnan(own_T).any() or np.isnan(logprobs_TN).any():
        raise _UnreadableError("prompt_logprobs holds what is no number")
    for array in (own_T, logprobs_TN):
        array[array == _CLAMPED] = -np.inf
    order = np.argsort(-logprobs_TN, axis=1, kind="stable")
    return own_T, np.take_along_axis(np.stack(ids), order, axis=1), np.take_along_axis(logprobs_TN, order, axis=1)


def _largest_gap(ours_T: Floats, theirs_T: Floats) -> float:
    """Return the largest difference; tokens that are impossible to both agree."""
    finite = np.isfinite(ours_T) & np.isfinite(theirs_T)
    gaps_T = np.abs(np.where(finite, ours_T, 0.0) - np.where(finite, theirs_T, 0.0))
    return float(np.where(finite | (ours_T == theirs_T), gaps_T, np.inf).max(initial=0.0))


def _read_scores(body: bytes, own_T: Floats, shape: tuple[int, ...]) -> Floats:
    """Return the log-probs [T, K] of the ids that the server was handed."""
    found = _BY_IDS.search(body)
    try:
        scores = np.load(io.BytesIO(base64.b64decode(found[1])), allow_pickle=False) if found else None
    except (ValueError, EOFError):
        scores = None
    if scores is None or scores.shape != (shape[0], shape[1] + 1) or np.isnan(scores).any():
        raise _UnreadableError("prompt_token_id_logprobs does not hold the log-probs that were asked for")
    if _largest_gap(scores[:, -1], own_T) > _SAME:
        raise _UnreadableError(
            "prompt_token_id_logprobs and prompt_logprobs disagree about the completion's own tokens"
        )
    return np.array(scores[:, :-1])


def _find(ids_TN: Ids, logprobs_TN: Floats, wanted_TK: Ids) -> Floats:
    """Return the log-prob of each wanted id at its own position; NaN where it is not there."""
    order = np.argsort(ids_TN, axis=1)
    # One search for all rows: each in a range of numbers of its own.
    rows = np.arange(len(ids_TN))[:, None] * (1 + max(ids_TN.max(), wanted_TK.max(initial=0)))
    known = (np.take_along_axis(ids_TN, order, axis=1) + rows).ravel()
    places = np.searchsorted(known, wanted_TK + rows).clip(max=len(known) - 1)
    is_found = (known[places] == wanted_TK + rows) & (wanted_TK >= 0)
    return np.where(is_found, np.take_along_axis(logprobs_TN, order, axis=1).ravel()[places], np.float32(np.nan))
