"""What the tests of the server send, and what they expect."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

from omniopd.teachers.continuation import continuation_messages
from omniopd.types import Message

from . import TeacherServer, expected_continuation

TASK = (Message(role="user", content="What is 12 + 35?"),)
PREFIX = "We add the tens first. 12 + 35 ="


def post(url: str, body: Any, *, timeout: float = 5.0, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Send one request on a connection of its own."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        sent = {"authorization": "Bearer test-key", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", target, body if isinstance(body, bytes) else json.dumps(body), sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.getheaders())
    finally:
        connection.close()


def chat(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in turns or (("user", TASK[0].content),)]
    return {"model": "m", "messages": messages, **fields}


def asking(transport: str, prefix: str = PREFIX, max_tokens: int = 12) -> list[dict[str, Any]]:
    asked = continuation_messages(TASK, prefix, max_tokens=max_tokens, transport=transport)
    return [message.to_json() for message in asked]


def expected(prefix: str, sample: int = 0, max_tokens: int = 12, **more: Any) -> str:
    return expected_continuation(TASK, prefix, sample, max_tokens, **more)


def get(server: TeacherServer, path: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request("GET", path, headers={"authorization": "Bearer test-key"})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def until(holds: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)
