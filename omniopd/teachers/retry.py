"""The one retry layer: what went wrong with a request, whether to ask again, and how long to wait.

No message here holds a key: a server's own words are cleaned of it, and the SDK's exceptions, which hold the request,
are never chained.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

MAX_SERVER_WAIT_S = 120.0
"""A server that asks for a longer pause is not waited for: the request fails."""
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0

# 402 and these codes of a 429 mean money, which no waiting brings back.
_QUOTA_CODES = frozenset({"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached"})
_KEY_SHAPED = re.compile(r"\b(?:sk|pk|rk|gsk|xai|hf)[-_][\w*.-]{6,}|(?i:\bbearer\s+)\S+")

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class FaultKind(StrEnum):
    """What went wrong with a request."""

    AUTH = "auth"
    QUOTA = "quota"
    NO_MODEL = "no_model"
    REJECTED = "rejected"
    """The request itself is wrong: 400, 413, 422 and the like."""
    UNREACHABLE = "unreachable"
    """No connection was made."""
    LOST = "lost"
    """The connection broke."""
    TIMEOUT = "timeout"
    BUSY = "busy"
    """408, 409, 425, 429 and everything from 500 on."""
    NONSENSE = "nonsense"
    """Status 200, but no completion in it."""


_RETRIED = frozenset({FaultKind.UNREACHABLE, FaultKind.LOST, FaultKind.TIMEOUT, FaultKind.BUSY})


class RequestFault(Exception):
    """A request that failed, in our words."""

    def __init__(self, kind: FaultKind, detail: str, *, wait_s: float | None = None, answered: bool = False) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.wait_s = wait_s
        """How long the server asks to wait."""
        self.answered = answered
        """A server was there."""
        self.attempts = 1


async def with_retries(
    attempt: Callable[[], Awaitable[T]],
    *,
    max_attempts: int,
    sleep: Sleep = asyncio.sleep,
    jitter: Callable[[float, float], float] = random.uniform,
) -> tuple[T, int]:
    """Run `attempt` until it succeeds, and return its result and how many attempts it took.

    The wait before attempt k + 1 is drawn from [0, min(60, 0.5 * 2**(k-1))] seconds, or longer when the server says so.
    Raises the last RequestFault, with its `attempts`.
    """
    from tenacity import AsyncRetrying, stop_after_attempt

    async def once() -> T:  # tenacity awaits nothing but coroutine functions.
        return await attempt()

    def is_retried(state: RetryCallState) -> bool:
        fault = state.outcome.exception() if state.outcome else None
        if not isinstance(fault, RequestFault):
            return False
        fault.attempts = state.attempt_number
        if fault.kind is FaultKind.NONSENSE:
            return state.attempt_number == 1
        return fault.kind in _RETRIED and (fault.wait_s or 0.0) <= MAX_SERVER_WAIT_S

    def wait(state: RetryCallState) -> float:
        fault = state.outcome.exception() if state.outcome else None
        backoff = jitter(0.0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (state.attempt_number - 1)))
        return max(backoff, (fault.wait_s or 0.0) if isinstance(fault, RequestFault) else 0.0)

    retrying = AsyncRetrying(
        stop=stop_after_attempt(max_attempts), wait=wait, retry=is_retried, sleep=sleep, reraise=True
    )
    result: T = await retrying(once)
    return result, int(retrying.statistics["attempt_number"])


def classify(error: Exception, *, secret: str | None) -> RequestFault:
    """Turn what the SDK or the event loop raised into a fault. `secret` is cut out of every text."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return _classify_status(error, secret)
    if isinstance(error, json.JSONDecodeError):
        return RequestFault(FaultKind.NONSENSE, "the answer is no JSON", answered=True)
    # The SDK's aiohttp transport reports a refused or a broken connection as a timeout, so the causes decide.
    names = {type(link).__name__ for link in _chain(error)}
    if any(isinstance(link, ConnectionRefusedError | socket.gaierror) for link in _chain(error)) or (
        names & {"ConnectError", "ClientConnectorError"}
    ):
        return RequestFault(FaultKind.UNREACHABLE, "no connection could be made")
    if names & {"ServerDisconnectedError", "ClientPayloadError", "RemoteProtocolError", "ReadError"}:
        return RequestFault(FaultKind.LOST, "the connection broke before the answer was complete")
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return RequestFault(FaultKind.TIMEOUT, "no answer in time")
    return RequestFault(FaultKind.LOST, f"the connection failed ({type(error).__name__})")


def redact(text: str, secret: str | None) -> str:
    """Return a server's words, shortened, with the key and all that looks like one replaced."""
    if secret:
        text = text.replace(secret, "[key]")
    return " ".join(_KEY_SHAPED.sub("[key]", text).split())[:300]


def _classify_status(error: object, secret: str | None) -> RequestFault:
    import openai

    assert isinstance(error, openai.APIStatusError)
    status = error.status_code
    code = error.code or error.type or ""
    detail = redact(f"HTTP {status}: {_server_words(error.body) or code or 'no explanation'}", secret)
    if status in (401, 403):
        kind = FaultKind.AUTH
    elif status == 402 or (status == 429 and code in _QUOTA_CODES):
        kind = FaultKind.QUOTA
    elif status == 404:
        kind = FaultKind.NO_MODEL
    elif status in (408, 409, 425, 429) or status >= 500:
        kind = FaultKind.BUSY
    else:
        kind = FaultKind.REJECTED
    return RequestFault(kind, detail, wait_s=server_wait_s(error.response.headers), answered=True)


def _server_words(body: object) -> str:
    message = body.get("message", body.get("detail")) if isinstance(body, Mapping) else body
    return message if isinstance(message, str) else ""


def server_wait_s(headers: Mapping[str, str], *, now: Callable[[], float] = time.time) -> float | None:
    """Read `retry-after-ms`, then `retry-after` (seconds or a date). None when neither says anything usable."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, date.timestamp() - now())


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
