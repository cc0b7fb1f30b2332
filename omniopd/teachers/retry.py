"""The one retry layer: what went wrong with a request, whether to ask again, and how long to wait.

No message here holds a key: a server's own words are cleaned of it, and a library's exceptions, which may hold the
request, are never chained.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

MAX_SERVER_WAIT_S = 120.0
"""A server that asks for a longer pause is not waited for: the request fails."""
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0
RATE_LIMIT_PATIENCE = 4
"""Times as many attempts for a request that is told to slow down."""

_PAUSED_ENGINE_WAIT_S = 1.0
_MAX_ERROR_BYTES = 1 << 20
_DETAIL_CHARS = 300

# These codes and words mean money or a daily quota, which no waiting of ours brings back.
_QUOTA_CODES = frozenset(
    {"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "billing_not_active"}
    | {"billing_error", "exceeded_current_quota_error", "insufficient_user_quota", "spend_limit_reached"}
)
_QUOTA_WORDS = re.compile(
    r"credit balance is too low|insufficient (?:balance|credits|funds)|specified api usage limits"
    r"|(?:credits are|balance is) (?:depleted|exhausted)|key limit exceeded|spend(?:ing)? limit",
    re.IGNORECASE,
)
_MODEL_CODES = frozenset({"model_not_found", "model_not_available", "deploymentnotfound"})
_BUSY_STATUS = frozenset({408, 409, 425, 429})
# What the server does not implement, it will not implement a second later.
_HOPELESS_STATUS = frozenset({501, 505})
# A gateway gave up on a server that may still write its answer, and bill it.
_GATEWAY_TIMEOUTS = frozenset({504, 524})
_KEY_SHAPED = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|hf|ghp|fw|nvapi|tgp)[-_][\w*.-]{6,}|\bAIza[\w*.-]{8,}|(?i:\bbearer\s+)\S+"
)

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class FaultKind(StrEnum):
    """What went wrong with a request."""

    AUTH = "auth"
    QUOTA = "quota"
    """Money, or a quota that comes back tomorrow."""
    NO_MODEL = "no_model"
    REJECTED = "rejected"
    """The request itself is wrong: 400, 413, 422 and the like, and redirects."""
    UNREACHABLE = "unreachable"
    """No connection was made."""
    LOST = "lost"
    """The connection broke."""
    TIMEOUT = "timeout"
    BUSY = "busy"
    """408, 409, 425, 429 and everything from 500 on."""
    NONSENSE = "nonsense"
    """Status 200, but no completion in it; or no HTTP at all."""


_RETRIED = frozenset({FaultKind.UNREACHABLE, FaultKind.LOST, FaultKind.TIMEOUT, FaultKind.BUSY})


class RequestFault(Exception):
    """A request that failed, in our words."""

    def __init__(
        self,
        kind: FaultKind,
        detail: str,
        *,
        wait_s: float | None = None,
        answered: bool = False,
        was_sent: bool = False,
        status: int | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.wait_s = wait_s
        """How long the server asks to wait."""
        self.answered = answered
        """A server was there and its answer came in whole, if only to refuse."""
        self.was_sent = was_sent or answered
        """The request went out on a connection."""
        self.status = status
        """Of the HTTP answer, where there was one."""
        self.should_retry = should_retry
        """What the server itself says about asking again; None when it says nothing."""
        self.attempts = 1

    @property
    def may_be_billed(self) -> bool:
        """Whether samples may have been written for it that nobody will see."""
        if self.answered:
            return self.kind is FaultKind.NONSENSE or self.status in _GATEWAY_TIMEOUTS
        return self.was_sent

    def add(self, words: str) -> None:
        """Append to the detail."""
        self.detail = f"{self.detail}; {words}"
        self.args = (self.detail,)


async def with_retries(
    attempt: Callable[[], Awaitable[T]],
    *,
    max_attempts: int,
    deadline_s: float | None = None,
    sleep: Sleep = asyncio.sleep,
    jitter: Callable[[float, float], float] = random.uniform,
    now: Callable[[], float] = time.monotonic,
    on_fault: Callable[[RequestFault], None] | None = None,
) -> tuple[T, int]:
    """Run `attempt` until it succeeds, and return its result and how many attempts it took.

    The wait before attempt k + 1 is drawn from [0, min(60, 0.5 * 2**(k-1))] seconds, or longer when the server says so.

    Args:
        deadline_s: for all attempts and waits, from the call on. No wait begins that would end later; an attempt that
            has begun is not cut short.
        on_fault: sees the fault of every failed attempt, the last one too, before the wait.

    Raises the last RequestFault, with its `attempts`.
    """
    start = now()
    first: RequestFault | None = None
    # Nearly all attempts succeed, and tenacity costs more than half of what the request itself does.
    try:
        return await attempt(), 1
    except RequestFault as fault:
        first = fault

    from tenacity import AsyncRetrying

    pause = 0.0
    nonsense = 0

    async def once() -> T:  # tenacity awaits nothing but coroutine functions.
        nonlocal first
        if first is not None:
            fault, first = first, None
            raise fault
        return await attempt()

    def is_retried(state: RetryCallState) -> bool:
        nonlocal pause, nonsense
        fault = state.outcome.exception() if state.outcome else None
        if not isinstance(fault, RequestFault):
            return False
        fault.attempts = state.attempt_number
        if on_fault is not None:
            on_fault(fault)
        nonsense += fault.kind is FaultKind.NONSENSE
        # Being told to slow down is no failure: it ends with the deadline, and only much later with the attempts.
        most = max_attempts * (RATE_LIMIT_PATIENCE if fault.status in (429, 529) else 1)
        if state.attempt_number >= most or nonsense > 1 or not _is_worth_asking_again(fault):
            return False
        pause = max(jitter(0.0, _backoff_s(fault.attempts)), fault.wait_s or 0.0)
        if deadline_s is not None and now() - start + pause > deadline_s:
            fault.add(f"the next attempt would begin after the deadline of {deadline_s:g} s")
            return False
        return True

    retrying = AsyncRetrying(wait=lambda _: pause, retry=is_retried, sleep=sleep, reraise=True)
    result: T = await retrying(once)
    return result, int(retrying.statistics["attempt_number"])


def _backoff_s(attempts: int) -> float:
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempts - 1, 10))


def _is_worth_asking_again(fault: RequestFault) -> bool:
    if fault.kind is FaultKind.QUOTA or fault.should_retry is False:
        return False
    if (fault.wait_s or 0.0) > MAX_SERVER_WAIT_S:
        fault.add(f"the server asks to wait {fault.wait_s:.0f} s, more than the {MAX_SERVER_WAIT_S:.0f} s we wait")
        return False
    return fault.should_retry is True or fault.kind in _RETRIED or fault.kind is FaultKind.NONSENSE


def fault_of_status(
    status: int, headers: Mapping[str, str], body: bytes, *, secret: str | None, now: Callable[[], float] = time.time
) -> RequestFault:
    """Turn an HTTP answer that is no success into a fault; it knows the error bodies of all dialects.

    A status below 300 with an error inside, as OpenRouter sends, counts as the status that the error names. `headers`
    have lower-case names. `secret` is cut out of every text.
    """
    error = _read_error(body)
    if status < 300:
        status = int(error.code) if error.code.isdigit() and 400 <= int(error.code) < 600 else status
    kind = _kind_of(status, error)
    words = error.message or error.code or "no explanation"
    if 300 <= status < 400:
        words = f"the server redirects to {_redirect_target(headers)}, which is not followed; use that as the base_url"
    wait_s = server_wait_s(headers, now=now)
    if wait_s is None:
        wait_s = error.retry_delay_s
    if wait_s is None and status == 503 and error.mentions("engine_paused"):
        wait_s = _PAUSED_ENGINE_WAIT_S
    advice = {"true": True, "false": False}.get(headers.get("x-should-retry", "").lower())
    return RequestFault(
        kind,
        redact(f"HTTP {status}: {words}", secret),
        wait_s=wait_s,
        answered=True,
        was_sent=True,
        status=status,
        should_retry=advice,
    )


def redact(text: str, secret: str | None) -> str:
    """Return a server's words, shortened, with the key and all that looks like one replaced."""
    if secret:
        for form in (secret, urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1]):
            text = text.replace(form, "[key]")
    text = " ".join(_KEY_SHAPED.sub("[key]", text).split())
    return text if len(text) <= _DETAIL_CHARS else text[: _DETAIL_CHARS - 3] + "..."


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _ServerError:
    """What an error body says."""

    message: str = ""
    code: str = ""
    """The server's own code or, where it has none, its type or status word."""
    marks: frozenset[str] = frozenset()
    """Code, type, status and reasons, in lower case."""
    retry_delay_s: float | None = None
    is_daily_quota: bool = False
    is_moderation: bool = False

    def mentions(self, mark: str) -> bool:
        return mark in self.marks or mark in self.message


def _kind_of(status: int, error: _ServerError) -> FaultKind:
    """Read the status, then what the body says, which wins."""
    has_no_money = bool(error.marks & _QUOTA_CODES) or bool(_QUOTA_WORDS.search(error.message))
    if status == 402 or error.is_daily_quota or (status in (400, 403, 429) and has_no_money):
        return FaultKind.QUOTA
    if status < 300:
        return FaultKind.NONSENSE
    if "api_key_invalid" in error.marks:  # Gemini says 400.
        return FaultKind.AUTH
    if status == 403 and error.is_moderation:
        return FaultKind.REJECTED
    if status in (401, 403, 407):
        return FaultKind.AUTH
    if status == 404 or (status == 400 and error.marks & _MODEL_CODES):
        return FaultKind.NO_MODEL
    if status in _BUSY_STATUS or (status >= 500 and status not in _HOPELESS_STATUS):
        return FaultKind.BUSY
    return FaultKind.REJECTED


def _read_error(body: bytes) -> _ServerError:
    text = body[:_MAX_ERROR_BYTES].decode("utf-8", "replace").strip()
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        return _ServerError(message=_plain_words(text))
    if isinstance(data, list):  # Gemini, when it was asked for a stream.
        data = data[0] if data else None
    if not isinstance(data, dict):
        return _ServerError(message=_text_of(data))
    error = data.get("error", data)
    if not isinstance(error, dict):  # Ollama, and {"error": "...", "message": "..."}.
        return _ServerError(message=_text_of(error) or _text_of(data.get("message")))
    details = [entry for entry in _list(error.get("details")) if isinstance(entry, dict)]
    words = [_text_of(error.get(name)) for name in ("code", "type", "status")]
    words += [_text_of(entry.get("reason")) for entry in details]
    metadata = error.get("metadata")
    return _ServerError(
        message=_text_of(error.get("message")) or _text_of(error.get("detail")) or _text_of(data.get("message")),
        code=next((word for word in words if word), ""),
        marks=frozenset(word.lower() for word in words if word),
        retry_delay_s=next(_retry_delays(details), None),
        is_daily_quota=any("PerDay" in quota for quota in _quota_ids(details)),
        is_moderation=isinstance(metadata, dict) and "flagged_input" in metadata,
    )


def _retry_delays(details: list[dict[str, Any]]) -> Iterator[float]:
    for entry in details:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)s", _text_of(entry.get("retryDelay")))
        if match:
            yield float(match[1])


def _quota_ids(details: list[dict[str, Any]]) -> Iterator[str]:
    for entry in details:
        for violation in _list(entry.get("violations")):
            if isinstance(violation, dict):
                yield _text_of(violation.get("quotaId"))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text_of(value: object) -> str:
    """Return a message as text: FastAPI sends lists of {loc, msg}; codes may be numbers."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return "; ".join(filter(None, map(_text_of, value)))
    if isinstance(value, dict):
        where = ".".join(map(str, _list(value.get("loc"))))
        words = _text_of(value.get("msg")) or _text_of(value.get("message"))
        return f"{where}: {words}" if where and words else words
    return ""


def _plain_words(text: str) -> str:
    if not text.startswith("<"):
        return text
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    return title[1] if title else re.sub(r"<[^>]*>", " ", text)


def _redirect_target(headers: Mapping[str, str]) -> str:
    # No path: a login page's address may carry a token.
    try:
        target = urllib.parse.urlsplit(headers.get("location", ""))
        host, port = target.hostname, target.port
    except ValueError:
        return "an address that cannot be read"
    if not host:
        return "another path of its own" if target.path else "an address that it does not name"
    return f"{target.scheme or 'https'}://{host}" + (f":{port}" if port else "")
