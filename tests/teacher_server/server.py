"""The sockets: HTTP/1.1 by hand on asyncio, one timer for each request and no tasks.

A request that waits is a timer that a lost connection cancels, so nothing can be left behind that waits for a client.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl

from .asked import Answer
from .batches import Batches
from .faults import Settings
from .log import Entry, Log
from .teaching import Plan, Teaching

BACKLOG = 4096
_PHRASES = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}
_PATHS = {
    "openai": "/v1",
    "vllm": "/vllm/v1",
    "openrouter": "/openrouter/v1",
    "deepseek": "/beta",
    "mistral": "/mistral/v1",
    "anthropic": "/v1",
    "anthropic-sdk": "",
    "gemini": "/v1beta",
}


class TeacherServer:
    """The server on a thread of its own, for tests. Takes the fields of `Settings`."""

    def __init__(self, *, port: int = 0, log_path: Path | None = None, **settings: Any) -> None:
        self._teaching = Teaching(settings=Settings(**settings), log=Log(log_path))
        self._port = port
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="teacher-server", daemon=True)

    @property
    def log(self) -> Log:
        return self._teaching.log

    @property
    def port(self) -> int:
        return self._port

    def base_url(self, dialect: str = "openai") -> str:
        """Return where a dialect lives: openai, vllm, openrouter, deepseek, mistral, anthropic or gemini;
        Anthropic's SDK writes the version into the path itself and wants `anthropic-sdk`."""
        return base_url(self._port, dialect)

    def change(self, **settings: Any) -> None:
        """Behave differently from now on."""
        self._teaching.settings = replace(self._teaching.settings, **settings)

    def reset(self) -> None:
        """Forget all requests. The settings stay."""
        self._teaching.reset()

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(10):
            raise TimeoutError("the teacher server did not start within 10 s")
        if self._error is not None:
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self._thread.is_alive():
            raise TimeoutError("the teacher server did not stop within 10 s")

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with listening(self._teaching, self._port) as port:
            self._port = port
            self._started.set()
            await self._stop.wait()


def base_url(port: int, dialect: str = "openai") -> str:
    """Return where a dialect lives on a server at this port."""
    return f"http://127.0.0.1:{port}{_PATHS[dialect]}"


class listening:
    """Accept connections in the running event loop; entering gives the port, leaving breaks what is open."""

    def __init__(self, teaching: Teaching, port: int) -> None:
        self._teaching, self._port = teaching, port
        self._open: set[_Connection] = set()

    async def __aenter__(self) -> int:
        loop = asyncio.get_running_loop()
        batches = Batches(self._teaching, loop.call_later)
        self._server = await loop.create_server(
            lambda: _Connection(self._teaching, batches, self._open), "127.0.0.1", self._port, backlog=BACKLOG
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for connection in tuple(self._open):
            connection.break_off()
        await self._server.wait_closed()
        self._teaching.log.close()


class _Connection(asyncio.Protocol):
    """One client connection. Requests that come before the answer to the last wait for it."""

    def __init__(self, teaching: Teaching, batches: Batches, connections: set[_Connection]) -> None:
        self._teaching, self._batches, self._connections = teaching, batches, connections
        self._buffer = bytearray()
        self._entry: Entry | None = None
        self._is_busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._end("abandoned")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        """Begin with the next request if all of it is there."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "transfer-encoding" in headers:
            self._write(Answer(status=411, body={"error": {"message": "send a content-length"}}))
            self._transport.close()
            return
        size = end + 4 + int(headers.get("content-length", 0))
        if len(self._buffer) < size:
            return
        content = bytes(self._buffer[end + 4 : size])
        del self._buffer[:size]
        method, target, _ = first.split(" ", 2)
        path, _, query = target.partition("?")
        self._is_busy = True
        self._take(method, path, dict(parse_qsl(query)), headers, content)

    def _take(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], content: bytes
    ) -> None:
        if path.startswith("/__"):
            self._reply(control(self._teaching, path, query, content))
            return
        wire = self._teaching.wire(path)
        if wire is None:
            self._reply(_missing(method, path))
        elif "/files" in path or "/batches" in path:
            is_known = self._teaching.is_known(wire, headers, query)
            found = self._batches.answer(wire, method, path, headers, content) if is_known else wire.fail("auth")
            self._reply(found or _missing(method, path))
        elif method != "POST":
            self._reply(_missing(method, path))
        else:
            plan = self._teaching.plan(wire, path, headers, query, content)
            self._entry = plan.entry
            if plan.answer is not None and plan.delay_s > 0:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(plan.delay_s, self._finish, plan)
            elif plan.answer is not None:
                self._finish(plan)

    def _finish(self, plan: Plan) -> None:
        """Write the answer, or as much of it as is planned."""
        self._timer = None
        assert plan.answer is not None
        if plan.breaks == "reset":
            self._end("broken")
            self.break_off()
        elif plan.breaks == "reset-mid":
            data = _message(plan.answer)
            self._transport.write(data[: data.index(b"\r\n\r\n") + 4 + 10])
            self._end("broken")
            # A reset at once would take what was written along with it.
            self._timer = asyncio.get_running_loop().call_later(0.01, self.break_off)
        elif plan.breaks == "truncated":
            body = json.dumps(plan.answer.body).encode()
            self._write(replace(plan.answer, body=body[: len(body) // 2]))
            self._end("broken")
            self._go_on()
        else:
            self._deliver(plan.answer)
            self._go_on()

    def _deliver(self, answer: Answer) -> None:
        """Note an answer and write it, in this order: who has read an answer also finds it in the log."""
        entry, self._entry = self._entry, None
        assert entry is not None
        is_open = not self._transport.is_closing()
        self._teaching.log.end(entry, "answered" if is_open else "abandoned", billed=is_open and answer.status == 200)
        if is_open and not self._write(answer):
            entry.outcome, entry.billed = "abandoned", False
        self._teaching.log.write(entry)

    def _reply(self, answer: Answer) -> None:
        self._write(answer)
        self._go_on()

    def _go_on(self) -> None:
        self._is_busy = False
        if self._buffer:
            self._next()

    def _write(self, answer: Answer) -> bool:
        """Write an answer; whether the connection still stood after it."""
        if self._transport.is_closing():
            return False
        self._transport.write(_message(answer))
        return not self._transport.is_closing()

    def _end(self, outcome: str) -> None:
        if self._entry is not None:
            self._teaching.log.end(self._entry, outcome)
            self._teaching.log.write(self._entry)
            self._entry = None

    def break_off(self) -> None:
        """Close with a reset instead of a farewell."""
        if self._transport.is_closing():
            return
        peer: socket.socket = self._transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


def control(teaching: Teaching, path: str, query: Mapping[str, str], content: bytes) -> Answer:
    """Answer another process that steers the server: /__stats, /__log?since=N, /__reset, /__settings."""
    if path == "/__stats":
        return Answer(status=200, body=teaching.log.stats())
    if path == "/__log":
        since = int(query.get("since", 0))
        return Answer(status=200, body=[asdict(entry) for entry in teaching.log.entries[since:]])
    if path == "/__reset":
        teaching.reset()
        return Answer(status=200, body={})
    if path == "/__settings":
        try:
            teaching.settings = replace(teaching.settings, **json.loads(content or b"{}"))
        except (TypeError, ValueError) as error:
            return Answer(status=400, body={"error": {"message": str(error)}})
        return Answer(status=200, body=asdict(teaching.settings))
    return _missing("GET", path)


def _missing(method: str, path: str) -> Answer:
    message = f"Invalid URL ({method} {path})"
    return Answer(status=404, body={"error": {"message": message, "type": "invalid_request_error", "code": None}})


def _message(answer: Answer) -> bytes:
    """Return an answer as it goes over the wire."""
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    lines = [
        f"HTTP/1.1 {answer.status} {_PHRASES.get(answer.status, 'Error')}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
