"""The endpoints that answer later for half the price: OpenAI's files and batches, Anthropic's message batches."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any

from .asked import Answer, RejectedError, Wire
from .faults import ON_THE_WIRE, applies, draw_fault
from .teaching import Teaching

PRICE_FACTOR = 0.5
_OPENAI_LINE = frozenset({"custom_id", "method", "url", "body"})


@dataclass(kw_only=True)
class _Batch:
    id: str
    created: float
    endpoint: str
    input_file: str
    lines: list[tuple[str, Any]]
    ready_at: float
    metadata: Any = None
    is_cancelled: bool = False
    results: list[dict[str, Any]] | None = None
    """None until it has run."""
    errors: list[dict[str, Any]] = field(default_factory=list)


class Batches:
    """A batch runs at once when its delay is over; a fault of the wire becomes a line that failed."""

    def __init__(self, teaching: Teaching, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._teaching = teaching
        self._call_later = call_later
        self._files: dict[str, tuple[str, bytes]] = {}
        self._batches: dict[str, _Batch] = {}

    def answer(self, wire: Wire, method: str, path: str, headers: Mapping[str, str], content: bytes) -> Answer | None:
        """Answer a request for anything about files or batches; None where there is no such endpoint."""
        try:
            if path.startswith("/v1/messages/batches"):
                return self._messages(method, path.removeprefix("/v1/messages/batches").strip("/"), content)
            kind, *rest = path.removeprefix("/v1/").split("/")
            if kind == "files":
                return self._file(method, rest, headers, content)
            return self._batch(method, rest, content) if kind == "batches" else None
        except RejectedError as error:
            return wire.reject(error)

    def _file(self, method: str, rest: list[str], headers: Mapping[str, str], content: bytes) -> Answer | None:
        if method == "POST" and not rest:
            fields = _form(headers.get("content-type", ""), content)
            if unknown := fields.keys() - {"purpose", "file"}:
                raise RejectedError(f"Unknown parameter: '{min(unknown)}'.", code="unknown_parameter")
            if fields.get("purpose") != b"batch" or "file" not in fields:
                raise RejectedError("A file with purpose 'batch' is expected.", param="purpose")
            return Answer(status=200, body=self._put("batch", fields["file"]))
        if not rest or rest[0] not in self._files:
            raise RejectedError(f"No such File object: {'/'.join(rest)}", status=404)
        purpose, data = self._files[rest[0]]
        if method == "GET" and rest[1:] == ["content"]:
            return Answer(status=200, body=data)
        if method == "GET" and len(rest) == 1:
            return Answer(status=200, body=_file_json(rest[0], purpose, data))
        if method == "DELETE" and len(rest) == 1:
            del self._files[rest[0]]
            return Answer(status=200, body={"id": rest[0], "object": "file", "deleted": True})
        return None

    def _put(self, purpose: str, data: bytes) -> dict[str, Any]:
        name = f"file-{len(self._files)}{blake2b(data, digest_size=4).hexdigest()}"
        self._files[name] = (purpose, data)
        return _file_json(name, purpose, data)

    def _batch(self, method: str, rest: list[str], content: bytes) -> Answer | None:
        if method == "POST" and not rest:
            return Answer(status=200, body=self._batch_json(self._open(json.loads(content))))
        if method == "GET" and not rest:
            data = [self._batch_json(batch) for batch in reversed(self._batches.values())]
            return Answer(
                status=200,
                body={
                    "object": "list",
                    "data": data,
                    "first_id": data[0]["id"] if data else None,
                    "last_id": data[-1]["id"] if data else None,
                    "has_more": False,
                },
            )
        batch = self._batches.get(rest[0]) if rest else None
        if batch is None:
            raise RejectedError(f"No batch found with id '{'/'.join(rest)}'.", status=404)
        if method == "POST" and rest[1:] == ["cancel"]:
            batch.is_cancelled = batch.results is None
        elif method != "GET" or len(rest) > 1:
            return None
        return Answer(status=200, body=self._batch_json(batch))

    def _open(self, body: dict[str, Any]) -> _Batch:
        known = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
        if unknown := body.keys() - known:
            raise RejectedError(f"Unknown parameter: '{min(unknown)}'.", param=min(unknown), code="unknown_parameter")
        if body.get("completion_window") != "24h":
            raise RejectedError("Invalid 'completion_window': only '24h' is supported.", param="completion_window")
        if body.get("endpoint") not in ("/v1/chat/completions", "/v1/completions"):
            raise RejectedError(f"Invalid 'endpoint': {body.get('endpoint')!r}.", param="endpoint")
        if body.get("input_file_id") not in self._files:
            raise RejectedError("No such File object.", param="input_file_id", code="invalid_value")
        lines, seen = [], set()
        for row in self._files[body["input_file_id"]][1].splitlines():
            line = json.loads(row)
            if set(line) != _OPENAI_LINE or line["method"] != "POST" or line["url"] != body["endpoint"]:
                raise RejectedError("A line needs custom_id, method POST, the batch's url and a body.")
            if line["custom_id"] in seen:
                raise RejectedError(f"Duplicate custom_id {line['custom_id']!r}.", code="duplicate_custom_id")
            seen.add(line["custom_id"])
            lines.append((line["custom_id"], line["body"]))
        return self._start(f"batch_{len(self._batches)}", lines, body["endpoint"], body["input_file_id"], body)

    def _start(self, name: str, lines: list[tuple[str, Any]], endpoint: str, file: str, body: dict[str, Any]) -> _Batch:
        delay = self._teaching.settings.batch_delay_s
        batch = _Batch(
            id=name,
            created=time.time(),
            endpoint=endpoint,
            input_file=file,
            lines=lines,
            ready_at=time.time() + delay,
            metadata=body.get("metadata"),
        )
        self._batches[name] = batch
        self._call_later(delay, lambda: self._run(batch))
        return batch

    def _run(self, batch: _Batch) -> None:
        if batch.is_cancelled:
            return
        results = []
        for number, (custom_id, body) in enumerate(batch.lines):
            status, answer = self._line(batch, body)
            results.append({"number": number, "custom_id": custom_id, "status": status, "answer": answer})
        batch.results = [result for result in results if result["status"] == 200]
        batch.errors = [result for result in results if result["status"] != 200]

    def _line(self, batch: _Batch, body: Any) -> tuple[int, Any]:
        """Answer one request of a batch: its status and its body."""
        teaching = self._teaching
        wire = teaching.wire(batch.endpoint)
        assert wire is not None
        content = json.dumps(body).encode()
        body_hash = blake2b(batch.endpoint.encode() + content, digest_size=8).hexdigest()
        entry = teaching.log.begin(batch.endpoint, wire.name, body_hash)
        entry.batch = batch.id
        try:
            asked = teaching.read(wire, content, batch.endpoint, {"anthropic-version": "batch"})
        except RejectedError as error:
            answer = wire.reject(error)
            entry.decision, entry.status = "rejected", answer.status
            teaching.log.end(entry, "answered")
            teaching.log.write(entry)
            return answer.status, answer.body
        fault = draw_fault(teaching.settings, body_hash, entry.times_seen)
        fault = fault if applies(fault, asked) else None
        entry.decision = fault or "served"
        if fault in ON_THE_WIRE:
            answer = wire.fail("500")
            entry.status = answer.status
            teaching.log.end(entry, "answered")
            teaching.log.write(entry)
            return answer.status, answer.body
        done = teaching.complete(wire, asked, entry, fault, price_factor=PRICE_FACTOR)
        entry.status = 200
        teaching.log.end(entry, "answered", billed=True)
        teaching.log.write(entry)
        return 200, done

    def _batch_json(self, batch: _Batch) -> dict[str, Any]:
        created = int(batch.created)
        status = "cancelled" if batch.is_cancelled else "in_progress" if batch.results is None else "completed"
        done: dict[str, Any] = {}
        if batch.results is not None:
            done["completed_at"] = int(batch.ready_at)
            for key, rows in (("output_file_id", batch.results), ("error_file_id", batch.errors)):
                name = f"file-{batch.id}-{key.partition('_')[0]}"
                if rows and name not in self._files:
                    self._files[name] = ("batch_output", b"".join(_openai_line(batch, row) for row in rows))
                done[key] = name if rows else None
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "errors": None,
            "input_file_id": batch.input_file,
            "completion_window": "24h",
            "status": status,
            "created_at": created,
            "in_progress_at": created,
            "expires_at": created + 86400,
            "metadata": batch.metadata,
            "request_counts": {
                "total": len(batch.lines),
                "completed": len(batch.results or ()),
                "failed": len(batch.errors),
            },
            **done,
        }

    def _messages(self, method: str, rest: str, content: bytes) -> Answer | None:
        name, _, action = rest.partition("/")
        if method == "POST" and not name:
            body = json.loads(content)
            lines = [(request["custom_id"], request["params"]) for request in body["requests"]]
            if len({custom_id for custom_id, _ in lines}) < len(lines):
                raise RejectedError("requests: custom_id must be unique")
            batch = self._start(f"msgbatch_{len(self._batches)}", lines, "/v1/messages", "", {})
            return Answer(status=200, body=self._message_batch_json(batch))
        found = self._batches.get(name)
        if found is None:
            raise RejectedError(f"Batch {name} not found", status=404)
        if method == "GET" and action == "results":
            if found.results is None:
                raise RejectedError("The batch has not ended yet.", status=404)
            rows = sorted([*found.results, *found.errors], key=lambda row: int(row["number"]))
            return Answer(status=200, body=b"".join(_anthropic_line(row) for row in rows))
        if method == "POST" and action == "cancel":
            found.is_cancelled = found.results is None
        elif method != "GET" or action:
            return None
        return Answer(status=200, body=self._message_batch_json(found))

    def _message_batch_json(self, batch: _Batch) -> dict[str, Any]:
        created = datetime.fromtimestamp(batch.created, UTC)
        has_ended = batch.results is not None or batch.is_cancelled
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts["processing"] = 0 if has_ended else len(batch.lines)
        counts["succeeded"], counts["errored"] = len(batch.results or ()), len(batch.errors)
        counts["canceled"] = len(batch.lines) if batch.is_cancelled else 0
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if has_ended else "in_progress",
            "request_counts": counts,
            "created_at": created.isoformat(),
            "expires_at": (created + timedelta(days=1)).isoformat(),
            "ended_at": datetime.fromtimestamp(batch.ready_at, UTC).isoformat() if has_ended else None,
            "results_url": f"/v1/messages/batches/{batch.id}/results" if has_ended else None,
            "archived_at": None,
            "cancel_initiated_at": None,
        }


def _file_json(name: str, purpose: str, data: bytes) -> dict[str, Any]:
    return {
        "id": name,
        "object": "file",
        "bytes": len(data),
        "created_at": int(time.time()),
        "filename": f"{name}.jsonl",
        "purpose": purpose,
        "status": "processed",
    }


def _openai_line(batch: _Batch, row: dict[str, Any]) -> bytes:
    response = {"status_code": row["status"], "request_id": f"r{row['number']}", "body": row["answer"]}
    line = {"id": f"{batch.id}_{row['number']}", "custom_id": row["custom_id"], "response": response, "error": None}
    return json.dumps(line).encode() + b"\n"


def _anthropic_line(row: dict[str, Any]) -> bytes:
    result = {"type": "succeeded", "message": row["answer"]}
    if row["status"] != 200:
        result = {"type": "errored", "error": row["answer"]}
    return json.dumps({"custom_id": row["custom_id"], "result": result}).encode() + b"\n"


def _form(content_type: str, content: bytes) -> dict[str, bytes]:
    """Read a multipart form."""
    found = re.search(r'boundary="?([^";]+)', content_type)
    if found is None:
        raise RejectedError("multipart/form-data is expected")
    fields: dict[str, bytes] = {}
    for part in content.split(b"--" + found[1].encode())[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]+)"', head)
        if name is not None:
            fields[name[1].decode()] = data.removesuffix(b"\r\n")
    return fields
