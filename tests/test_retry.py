"""What went wrong, whether to ask again, and how long to wait: tables written by hand from the providers' answers."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import Sequence
from typing import Any

import pytest

from omniopd.teachers.retry import FaultKind, RequestFault, fault_of_status, redact, server_wait_s, with_retries

AUTH, QUOTA, NO_MODEL, REJECTED, BUSY = (
    FaultKind.AUTH,
    FaultKind.QUOTA,
    FaultKind.NO_MODEL,
    FaultKind.REJECTED,
    FaultKind.BUSY,
)
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "30s"}
GEMINI = "type.googleapis.com/google.rpc."


def openai(message: str, *, code: Any = None, type: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def anthropic(type: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": type, "message": message}, "request_id": "req_011"}


def gemini(code: int, status: str, message: str, *details: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def quota_failure(quota_id: str) -> dict[str, Any]:
    return {"@type": GEMINI + "QuotaFailure", "violations": [{"quotaMetric": "m", "quotaId": quota_id}]}


PER_DAY = quota_failure("GenerateRequestsPerDayPerProjectPerModel-FreeTier")
PER_MINUTE = quota_failure("GenerateRequestsPerMinutePerProjectPerModel-FreeTier")

ANSWERS: list[tuple[int, Any, FaultKind, str]] = [
    # OpenAI and those that speak like it.
    (401, openai("Incorrect API key provided: sk-abcd**wxyz.", code="invalid_api_key"), AUTH, "HTTP 401: Incorrect"),
    (403, openai("Project `p` does not have access to model `m`", code="model_not_found"), AUTH, "access to model"),
    (403, openai("Country, region, or territory not supported", code="unsupported_country"), AUTH, "not supported"),
    (404, openai("The model `m` does not exist", code="model_not_found"), NO_MODEL, "does not exist"),
    (400, openai("m is not a model", code="model_not_found"), NO_MODEL, "not a model"),
    (404, openai("The API deployment does not exist", code="DeploymentNotFound"), NO_MODEL, "deployment"),
    (400, openai("Unsupported value: 'temperature'", code="unsupported_value"), REJECTED, "temperature"),
    (400, openai("filtered", code="content_filter"), REJECTED, "filtered"),
    (429, openai("Rate limit reached", code="rate_limit_exceeded", type="tokens"), BUSY, "Rate limit reached"),
    (429, openai("You exceeded your quota", code="insufficient_quota"), QUOTA, "exceeded your quota"),
    (429, openai("You exceeded your quota", type="insufficient_quota"), QUOTA, "exceeded your quota"),
    (429, openai("Billing hard limit", code="billing_hard_limit_reached"), QUOTA, "hard limit"),
    (500, openai("The server had an error", type="server_error"), BUSY, "had an error"),
    (402, openai("Insufficient Balance", code="invalid_request_error"), QUOTA, "Insufficient Balance"),
    # OpenRouter: numbers as codes, errors inside a 200, moderation as 403.
    (402, openai("Insufficient credits", code=402), QUOTA, "HTTP 402: Insufficient credits"),
    (403, openai("Key limit exceeded (total limit)", code=403), QUOTA, "Key limit"),
    (
        403,
        {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["x"], "flagged_input": "a secret"}}},
        REJECTED,
        "HTTP 403: flagged",
    ),
    (200, openai("Provider returned error", code=502), BUSY, "HTTP 502: Provider returned error"),
    (200, openai("no", code=429), BUSY, "HTTP 429: no"),
    (200, openai("strange", code="odd"), FaultKind.NONSENSE, "HTTP 200: strange"),
    # Anthropic.
    (400, anthropic("invalid_request_error", "messages: at least one"), REJECTED, "at least one"),
    (400, anthropic("invalid_request_error", "Your credit balance is too low to access"), QUOTA, "too low"),
    (400, anthropic("invalid_request_error", "You have reached your specified API usage limits."), QUOTA, "usage"),
    (401, anthropic("authentication_error", "invalid x-api-key"), AUTH, "invalid x-api-key"),
    (402, anthropic("billing_error", "check your billing"), QUOTA, "billing"),
    (403, anthropic("permission_error", "no permission"), AUTH, "no permission"),
    (404, anthropic("not_found_error", "model: claude-x"), NO_MODEL, "model: claude-x"),
    (413, anthropic("request_too_large", "too large"), REJECTED, "too large"),
    (429, anthropic("rate_limit_error", "exceed your rate limit of 50 requests"), BUSY, "rate limit of 50"),
    (500, anthropic("api_error", "Internal server error"), BUSY, "Internal"),
    (529, anthropic("overloaded_error", "Overloaded"), BUSY, "HTTP 529: Overloaded"),
    # Gemini.
    (
        400,
        gemini(
            400, "INVALID_ARGUMENT", "API key not valid.", {"@type": GEMINI + "ErrorInfo", "reason": "API_KEY_INVALID"}
        ),
        AUTH,
        "API key not valid",
    ),
    (400, gemini(400, "INVALID_ARGUMENT", "ending with a model turn"), REJECTED, "model turn"),
    (403, gemini(403, "PERMISSION_DENIED", "Method doesn't allow"), AUTH, "allow"),
    (404, gemini(404, "NOT_FOUND", "models/x is not found"), NO_MODEL, "models/x"),
    (429, gemini(429, "RESOURCE_EXHAUSTED", "quota", PER_MINUTE, RETRY_INFO), BUSY, "HTTP 429: quota"),
    (429, gemini(429, "RESOURCE_EXHAUSTED", "quota", PER_DAY, RETRY_INFO), QUOTA, "HTTP 429: quota"),
    (429, [gemini(429, "RESOURCE_EXHAUSTED", "quota", PER_DAY)], QUOTA, "HTTP 429: quota"),
    (429, gemini(429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted."), QUOTA, "depleted"),
    (503, gemini(503, "UNAVAILABLE", "The model is overloaded."), BUSY, "overloaded"),
    # Ollama, vLLM, FastAPI, llama.cpp, Azure's gateway.
    (404, {"error": "model 'x' not found"}, NO_MODEL, "HTTP 404: model 'x' not found"),
    (400, {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, REJECTED, "too long"),
    (404, {"object": "error", "message": "no model x", "type": "NotFoundError", "code": 404}, NO_MODEL, "no model x"),
    (422, {"detail": [{"loc": ["body", "n"], "msg": "not an int"}]}, REJECTED, "HTTP 422: body.n: not an int"),
    (401, {"detail": "Unauthorized"}, AUTH, "HTTP 401: Unauthorized"),
    (503, openai("Loading model", code=503, type="unavailable_error"), BUSY, "Loading model"),
    (501, openai("no completions here", code=501, type="not_supported_error"), REJECTED, "no completions"),
    (429, {"statusCode": 429, "message": "Rate limit is exceeded. Try again in 1 seconds."}, BUSY, "Try again"),
    # No JSON, no words, the wrong shape.
    (
        502,
        b"<html><head><title>502 Bad\n Gateway</title></head><body>x</body></html>",
        BUSY,
        "HTTP 502: 502 Bad Gateway",
    ),
    (503, b"<p>Service <b>Unavailable</b></p>", BUSY, "HTTP 503: Service Unavailable"),
    (500, b"upstream\n  connect error", BUSY, "HTTP 500: upstream connect error"),
    (500, b"", BUSY, "HTTP 500: no explanation"),
    (500, b"\xff\xfe\x00", BUSY, "HTTP 500: "),
    (400, b"[" * 100_000, REJECTED, "HTTP 400: [[["),
    (400, [], REJECTED, "HTTP 400: no explanation"),
    (400, "plain text", REJECTED, "HTTP 400: plain text"),
    (400, {"error": None}, REJECTED, "HTTP 400: no explanation"),
    (400, {"error": {"code": "odd_code", "message": ""}}, REJECTED, "HTTP 400: odd_code"),
    (429, {"error": {"message": {"message": "inner"}, "details": ["x", {"violations": ["y"]}]}}, BUSY, "inner"),
    *[(status, b"", BUSY, f"HTTP {status}") for status in (408, 409, 425, 429, 500, 502, 503, 504, 520, 524, 529)],
    *[(status, b"", REJECTED, f"HTTP {status}") for status in (400, 405, 406, 410, 411, 413, 415, 422, 431, 451, 505)],
]


def fault(
    status: int, body: Any = b"", headers: dict[str, str] | None = None, secret: str | None = None
) -> RequestFault:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fault_of_status(status, headers or {}, raw, secret=secret, now=lambda: 0.0)


@pytest.mark.parametrize(("status", "body", "kind", "words"), ANSWERS)
def test_error_bodies_are_understood(status: int, body: Any, kind: FaultKind, words: str) -> None:
    found = fault(status, body)
    assert found.kind is kind
    assert words in found.detail
    assert found.answered
    assert len(found.detail) <= 300
    assert "a secret" not in found.detail


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("https://other.example:8443/v1/chat?token=abc", "redirects to https://other.example:8443, which"),
        ("https://api.example/x", "redirects to https://api.example, which"),
        ("/login?next=secret", "another path of its own"),
        ("", "does not name"),
        ("https://[broken", "cannot be read"),
    ],
)
def test_a_redirect_says_where_to(location: str, words: str) -> None:
    found = fault(307, headers={"location": location})
    assert found.kind is REJECTED
    assert words in found.detail
    assert "token" not in found.detail and "secret" not in found.detail


@pytest.mark.parametrize(
    ("headers", "body", "wait_s"),
    [
        ({"retry-after-ms": "250", "retry-after": "9"}, b"", 0.25),
        ({"retry-after": "9"}, gemini(429, "RESOURCE_EXHAUSTED", "q", RETRY_INFO), 9.0),
        ({}, gemini(429, "RESOURCE_EXHAUSTED", "q", RETRY_INFO), 30.0),
        ({}, [gemini(429, "RESOURCE_EXHAUSTED", "q", PER_MINUTE, {"retryDelay": "0.847655010s"})], 0.84765501),
        ({}, gemini(429, "RESOURCE_EXHAUSTED", "q", {"retryDelay": "soon"}), None),
        ({}, b"", None),
    ],
)
def test_the_servers_wait_is_read(headers: dict[str, str], body: Any, wait_s: float | None) -> None:
    assert fault(429, body, headers).wait_s == wait_s


def test_a_paused_engine_is_asked_again_soon() -> None:
    assert fault(503, openai("generation is paused", type="engine_paused")).wait_s == 1.0
    assert fault(503, {"object": "error", "message": "engine_paused: try again"}).wait_s == 1.0
    assert fault(503, openai("down", type="server_error")).wait_s is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0", 0.0), ("1.5", 1.5), ("-1", None), ("nan", None), ("inf", None), ("soon", None), ("", None)],
)
def test_seconds_to_wait(value: str, seconds: float | None) -> None:
    assert server_wait_s({"retry-after": value}) == seconds


def test_a_date_to_wait_for() -> None:
    headers = {"retry-after": "Thu, 01 Jan 1970 00:01:30 GMT"}
    assert server_wait_s(headers, now=lambda: 30.0) == 60.0
    assert server_wait_s(headers, now=lambda: 100.0) == 0.0


def test_what_may_have_been_billed() -> None:
    assert RequestFault(FaultKind.TIMEOUT, "x", was_sent=True).may_be_billed
    assert RequestFault(FaultKind.NONSENSE, "x", answered=True).may_be_billed
    assert fault(504).may_be_billed and fault(524).may_be_billed
    assert not fault(429).may_be_billed and not fault(500).may_be_billed
    assert not RequestFault(FaultKind.UNREACHABLE, "x").may_be_billed


# with_retries


class Server:
    """Attempts that end as told; `now` moves with each sleep, and by a second with each attempt."""

    def __init__(self, ends: Sequence[RequestFault | Exception | str]) -> None:
        self.ends = list(ends)
        self.waits: list[float] = []
        self.seen: list[RequestFault] = []
        self.now = 100.0

    async def attempt(self) -> str:
        self.now += 1
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def run(self, *, max_attempts: int = 5, deadline_s: float | None = None, draw: float = 1.0) -> tuple[str, int]:
        return asyncio.run(
            with_retries(
                self.attempt,
                max_attempts=max_attempts,
                deadline_s=deadline_s,
                sleep=self.sleep,
                jitter=lambda low, high: low + draw * (high - low),
                now=lambda: self.now,
                on_fault=self.seen.append,
            )
        )


def busy(wait_s: float | None = None) -> RequestFault:
    return RequestFault(BUSY, "busy", wait_s=wait_s, answered=True)


def test_backoff_doubles_up_to_a_minute_and_is_jittered() -> None:
    server = Server([busy() for _ in range(9)] + ["yes"])
    assert server.run(max_attempts=10) == ("yes", 10)
    assert server.waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert len(server.seen) == 9
    server = Server([busy(), busy(), "yes"])
    assert server.run(draw=0.25) == ("yes", 3)
    assert server.waits == [0.125, 0.25]
    assert Server(["yes"]).run() == ("yes", 1)


def test_the_server_may_ask_for_more_but_not_for_less() -> None:
    server = Server([busy(7.0), busy(0.1), "yes"])
    server.run()
    assert server.waits == [7.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "attempts"),
    [
        (AUTH, 1),
        (QUOTA, 1),
        (NO_MODEL, 1),
        (REJECTED, 1),
        (FaultKind.NONSENSE, 2),
        (FaultKind.UNREACHABLE, 4),
        (FaultKind.LOST, 4),
        (FaultKind.TIMEOUT, 4),
        (BUSY, 4),
    ],
)
def test_what_is_asked_again(kind: FaultKind, attempts: int) -> None:
    server = Server([RequestFault(kind, "no") for _ in range(9)])
    with pytest.raises(RequestFault) as caught:
        server.run(max_attempts=4)
    assert caught.value.attempts == attempts == len(server.seen)
    assert len(server.waits) == attempts - 1
    assert str(caught.value) == "no"
    assert caught.value.__context__ is None and caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("status", "advice", "attempts"),
    [(429, "false", 1), (400, "true", 3), (503, "TRUE", 3), (500, "maybe", 3), (402, "true", 1)],
)
def test_the_servers_advice_wins(status: int, advice: str, attempts: int) -> None:
    server = Server([fault(status, headers={"x-should-retry": advice}) for _ in range(9)])
    with pytest.raises(RequestFault) as caught:
        server.run(max_attempts=3)
    assert caught.value.attempts == attempts


def test_a_long_pause_is_not_waited_for() -> None:
    server = Server([busy(120.0), busy(121.0), "never"])
    with pytest.raises(
        RequestFault, match="busy; the server asks to wait 121 s, more than the 120 s we wait"
    ) as caught:
        server.run()
    assert server.waits == [120.0]
    assert caught.value.attempts == 2


def test_no_wait_passes_the_deadline() -> None:
    # An attempt takes 1 s: 1 + 0.5 + 1 + 1 + 1 = 4.5 s, and the next wait of 2 s would end at 6.5 s.
    server = Server([busy() for _ in range(9)])
    with pytest.raises(RequestFault, match="busy; the next attempt would begin after the deadline of 6 s") as caught:
        server.run(max_attempts=9, deadline_s=6.0)
    assert server.waits == [0.5, 1.0]
    assert (caught.value.attempts, caught.value.detail) == (3, str(caught.value))
    server = Server([busy(), busy(), busy(), "yes"])
    assert server.run(max_attempts=9, deadline_s=6.5) == ("yes", 4)


def test_other_errors_pass() -> None:
    server = Server([KeyError("bug"), "never"])
    with pytest.raises(KeyError):
        server.run()
    assert server.waits == []


# Secrets

KEY = "k/very+secret==0123456789"


@pytest.mark.parametrize(
    "form",
    [KEY, "k%2Fvery%2Bsecret%3D%3D0123456789", f"Bearer {KEY}", "sk-proj-abc***********wxyz", "AIzaSyA1234567890"],
)
def test_keys_are_cut_out_of_the_servers_words(form: str) -> None:
    assert redact(f"the key {form} is wrong", KEY) == "the key [key] is wrong"


def test_no_fault_holds_a_key() -> None:
    for body in (openai(f"no {KEY}"), {"error": KEY}, {"detail": [{"loc": [KEY], "msg": KEY}]}, KEY.encode()):
        found = fault(401, body, secret=KEY)
        server = Server([found])
        with pytest.raises(RequestFault) as caught:
            server.run()
        error = caught.value
        shown = (
            "".join(traceback.format_exception(error)) + repr(error) + str(error) + repr(error.args) + repr(vars(error))
        )
        assert KEY not in shown
        assert "[key]" in shown


def test_a_key_at_the_cut_does_not_survive_in_part() -> None:
    text = redact("x" * 290 + " " + KEY, KEY)
    assert "k/very" not in text
    assert len(text) <= 300
