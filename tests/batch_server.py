"""A batch endpoint on this machine, in OpenAI's and in Anthropic's words, with switchable faults."""

from __future__ import annotations

import datetime
import email
import email.policy
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback import ThreadedServer

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""From a request's body to `{"body": ...}`, `{"error": ...}` or `{"expired": True}`."""


@dataclass(kw_only=True)
class Batch:
    """One batch as the server keeps it."""

    id: str
    created: float
    requests: list[tuple[str, dict[str, Any]]]
    """Custom id and body."""
    polls: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    endpoint: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI: the lines of the input file."""


class BatchServer(ThreadedServer):
    """The server. What it is told to do wrong it does once for each entry of `faults`.

    Args:
        answer: what a request's body is answered with.
        polls: how often a batch says that it is under way.
        status: how OpenAI's batches end.
    """

    def __init__(self, answer: Answer, *, polls: int = 1, status: str = "completed") -> None:
        self.answer = answer
        self.polls = polls
        self.status = status
        self.faults: list[tuple[str, int | str]] = []
        """The beginning of `METHOD /path`, and a status, `drop` (nothing is done) or `lose` (done, but no answer)."""
        self.batches: dict[str, Batch] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        """`METHOD /path` of every request."""
        self.keys: set[str] = set()
        self.results_url: str | None = None
        """Where Anthropic's results are said to be, instead of here."""
        self._lock = threading.Lock()
        super().__init__(self._handler())

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """What was bought: the bodies of all requests of all batches."""
        return [body for batch in self.batches.values() for _, body in batch.requests]

    def add(self, requests: list[tuple[str, dict[str, Any]]], **settings: Any) -> Batch:
        """Take a batch."""
        batch = Batch(id=f"batch_{len(self.batches)}", created=time.time(), requests=requests, **settings)
        self.batches[batch.id] = batch
        return batch

    def handle(self, method: str, target: str, content: bytes, content_type: str) -> tuple[int, Any]:
        """Return status and JSON (or bytes) of one request."""
        url = urlsplit(target)
        parts = url.path.removeprefix("/v1/").split("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match method, parts:
            case "POST", ["files"]:
                file = f"file_{len(self.files)}"
                self.files[file] = _uploaded(content, content_type)
                return 200, _file(file, len(content))
            case "GET", ["files", file, "content"]:
                return 200, self.files[file]
            case "POST", ["batches"]:
                asked = json.loads(content)
                lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
                requests = [(line["custom_id"], line["body"]) for line in lines]
                batch = self.add(requests, metadata=asked["metadata"], endpoint=asked["endpoint"], lines=lines)
                return 200, self._openai(batch)
            case "GET", ["batches"]:
                return 200, self._page(query.get("after"), self._openai)
            case "GET", ["batches", id]:
                return self._poll(id, self._openai)
            case "POST", ["messages", "batches"]:
                asked = json.loads(content)
                batch = self.add([(one["custom_id"], one["params"]) for one in asked["requests"]])
                return 200, self._anthropic(batch)
            case "GET", ["messages", "batches"]:
                return 200, self._page(query.get("after_id"), self._anthropic)
            case "GET", ["messages", "batches", id]:
                return self._poll(id, self._anthropic)
            case "GET", ["messages", "batches", id, "results"]:
                return 200, self._results(self.batches[id])
        return 404, {"error": {"message": f"no {method} {target}", "type": "not_found_error"}}

    def _poll(self, id: str, word: Callable[[Batch], dict[str, Any]]) -> tuple[int, Any]:
        if id not in self.batches:
            return 404, {"error": {"message": "no such batch", "type": "not_found_error"}}
        self.batches[id].polls += 1
        return 200, word(self.batches[id])

    def _page(self, after: str | None, word: Callable[[Batch], dict[str, Any]]) -> dict[str, Any]:
        """Two batches a page, the newest first."""
        newest = list(self.batches)[::-1]
        first = newest.index(after) + 1 if after else 0
        ids = newest[first : first + 2]
        has_more = first + 2 < len(newest)
        for id in ids:
            self.batches[id].polls += 1
        data = [word(self.batches[id]) for id in ids]
        return {"object": "list", "data": data, "has_more": has_more, "last_id": ids[-1] if ids else None}

    def _openai(self, batch: Batch) -> dict[str, Any]:
        ended = batch.polls > self.polls
        outputs = {name: None for name in ("output_file_id", "error_file_id")}
        if ended and self.status != "failed":
            outputs = self._output_files(batch)
        failed = self.status == "failed" and ended
        answered = sum("body" in self.answer(body) for _, body in batch.requests) if ended and not failed else 0
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "completion_window": "24h",
            "created_at": int(batch.created),
            "input_file_id": "file",
            "status": self.status if ended else "in_progress",
            "metadata": batch.metadata,
            "errors": {"object": "list", "data": [{"code": "bad_line", "message": "line 1"}]} if failed else None,
            "request_counts": {"total": len(batch.requests), "completed": answered, "failed": 0},
            **outputs,
        }

    def _output_files(self, batch: Batch) -> dict[str, str | None]:
        rows: dict[str, list[bytes]] = {"output_file_id": [], "error_file_id": []}
        for custom_id, body in batch.requests[::-1]:  # In no order that a client may count on.
            got = self.answer(body)
            row: dict[str, Any] = {"id": "r", "custom_id": custom_id, "response": None, "error": None}
            if "body" in got:
                row["response"] = {"status_code": 200, "request_id": "q", "body": got["body"]}
            elif "expired" in got:
                row["error"] = {"code": "batch_expired", "message": "not done within the window"}
            else:
                row["response"] = {"status_code": 400, "request_id": "q", "body": {"error": got["error"]}}
            rows["output_file_id" if "body" in got else "error_file_id"].append(json.dumps(row).encode())
        names = {}
        for kind, lines in rows.items():
            names[kind] = f"{batch.id}_{kind}" if lines else None
            self.files[f"{batch.id}_{kind}"] = b"\n".join(lines) + b"\n"
        return names

    def _anthropic(self, batch: Batch) -> dict[str, Any]:
        ended = batch.polls > self.polls
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts["succeeded" if ended else "processing"] = len(batch.requests)
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts,
            "created_at": datetime.datetime.fromtimestamp(batch.created, datetime.UTC).isoformat(),
            "results_url": (self.results_url or f"{self.base_url}/messages/batches/{batch.id}/results")
            if ended
            else None,
        }

    def _results(self, batch: Batch) -> bytes:
        lines = []
        for custom_id, body in batch.requests[::-1]:
            got = self.answer(body)
            if "body" in got:
                result = {"type": "succeeded", "message": got["body"]}
            elif "expired" in got:
                result = {"type": "expired"}
            else:
                result = {"type": "errored", "error": {"type": "error", "error": got["error"]}}
            lines.append(json.dumps({"custom_id": custom_id, "result": result}).encode())
        return b"\n".join(lines) + b"\n"

    def _fault(self, asked: str) -> int | str | None:
        for index, (start, fault) in enumerate(self.faults):
            if asked.startswith(start):
                del self.faults[index]
                return fault
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._do("GET")

            def do_POST(self) -> None:
                self._do("POST")

            def _do(self, method: str) -> None:
                content = self.rfile.read(int(self.headers.get("content-length") or 0))
                asked = f"{method} {self.path.removeprefix('/v1')}"
                with server._lock:
                    server.asked.append(asked)
                    server.keys.add(self.headers.get("authorization") or self.headers.get("x-api-key") or "")
                    fault = server._fault(asked)
                    if isinstance(fault, int):
                        status: int = fault
                        answer: Any = {"error": {"message": f"told to fail, {self.headers['authorization']}"}}
                    elif fault != "drop":
                        kind = self.headers.get("content-type") or ""
                        status, answer = server.handle(method, self.path, content, kind)
                if fault in ("drop", "lose"):
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                if fault == "cut":
                    data = data[: len(data) // 2]
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _uploaded(content: bytes, content_type: str) -> bytes:
    """Return the file of a multipart form, after checking what it is for."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + content, policy=email.policy.HTTP).iter_parts()
    fields = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}
    assert fields["purpose"] == b"batch"
    file = fields["file"]
    assert isinstance(file, bytes)
    return file


def _file(id: str, size: int) -> dict[str, Any]:
    return {
        "id": id,
        "object": "file",
        "bytes": size,
        "created_at": int(time.time()),
        "filename": "omniopd.jsonl",
        "purpose": "batch",
        "status": "processed",
    }
