"""A scripted OpenAI-like server on this machine: says what it is told to say, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """One HTTP response."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """Sent as it is instead of `body`."""
    delay_s: float = 0.0
    drop: bool = False
    """Close the connection without an answer."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """One HTTP request."""

    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: dict[str, Any]


def chat(
    *texts: str | None,
    finish_reason: str = "stop",
    refusal: str | None = None,
    usage: tuple[int, int] = (10, 5),
    **extra_usage: Any,
) -> Scripted:
    """Answer a chat request with these choices."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text, "refusal": refusal},
            "finish_reason": finish_reason,
        }
        for i, text in enumerate(texts)
    ]
    return Scripted(body=_envelope(choices, usage, extra_usage))


def completion(
    *texts: str, finish_reason: str = "stop", usage: tuple[int, int] = (10, 5), **extra_usage: Any
) -> Scripted:
    """Answer a raw completion request with these choices."""
    choices = [{"index": i, "text": text, "finish_reason": finish_reason} for i, text in enumerate(texts)]
    return Scripted(body=_envelope(choices, usage, extra_usage))


def error(status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None) -> Scripted:
    """Refuse in OpenAI's error shape."""
    return Scripted(status=status, body={"error": {"message": message, "code": code}}, headers=headers or {})


class ThreadedServer:
    """An HTTP server on a free port of this machine, in a thread for the length of a `with` block."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Loopback(ThreadedServer):
    """The server. `script` is a list that is used up in order, its last entry again and again, or a function."""

    def __init__(self, script: Sequence[Scripted] | Callable[[Received], Scripted]) -> None:
        self._script = script
        self._lock = threading.Lock()
        self.received: list[Received] = []
        self.in_flight = 0
        self.most_in_flight = 0
        super().__init__(self._handler())

    def _next(self, received: Received) -> Scripted:
        with self._lock:
            self.received.append(received)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            if callable(self._script):
                return self._script(received)
            return self._script[min(len(self.received), len(self._script)) - 1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                scripted = loopback._next(Received(path=self.path, headers=headers, body=body))
                time.sleep(scripted.delay_s)
                with loopback._lock:
                    loopback.in_flight -= 1
                if scripted.drop:
                    self.close_connection = True
                    return
                data = json.dumps(scripted.body).encode() if scripted.raw is None else scripted.raw
                try:
                    self.send_response(scripted.status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(data)))
                    for name, value in scripted.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # The client has given up.

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _envelope(choices: list[dict[str, Any]], usage: tuple[int, int], extra_usage: Mapping[str, Any]) -> dict[str, Any]:
    inputs, outputs = usage
    totals = {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}
    return {"id": "x", "object": "x", "created": 0, "model": "m", "choices": choices, "usage": totals | extra_usage}
