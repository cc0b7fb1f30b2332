"""What was submitted in batches, on disk before it is waited for. Holds hashes and ids; no prompts, answers or keys."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from omniopd.errors import RunError
from omniopd.types import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent(Value):
    """One batch: about to be submitted, or submitted."""

    token: str
    """Random; part of every custom id, so that what is found at the server is known for certain."""
    time: float
    """Unix seconds, before the submit."""
    service: str
    """Dialect and address."""
    path: str
    items: Mapping[str, Mapping[str, Any]]
    """By item id: the request's key and the numbers of its samples."""
    batch_id: str | None = None
    """None: whether the server has it is not known."""

    def custom_id(self, item: str) -> str:
        """Return the name that the item has at the server."""
        return f"{item}-{self.token}"


class Journal:
    """An append-only file of JSON lines, for one process at a time; each line is on disk before the call returns.

    Raises RunError when the file is in use, damaged or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._intents: dict[str, Intent] = {}
        self._tokens: dict[str, str] = {}

    def open(self) -> None:
        """Lock the file and read it. Does nothing when it is open already."""
        if self._file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as error:
            raise RunError(f"cannot open the list of batches {self.path}: {error.strerror}") from error
        try:
            self._lock(file)
            self._replay(file)
        except BaseException:
            file.close()
            raise
        self._file = file

    def close(self) -> None:
        """Give the file back. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def batch_of(self, item: str) -> Intent | None:
        """Return the batch whose answer for the item is still to be used."""
        token = self._tokens.get(item)
        return None if token is None else self._intents[token]

    def batch_ids(self, service: str) -> set[str]:
        """Return all ids ever known of a service, those of finished batches among them."""
        return {i.batch_id for i in self._intents.values() if i.batch_id is not None and i.service == service}

    def intend(self, intent: Intent) -> None:
        """Note that a batch is about to be submitted."""
        self._write({"event": "intent", **intent.to_json()})

    def submitted(self, intent: Intent, batch_id: str) -> Intent:
        """Note the id that the server gave."""
        self._write({"event": "submitted", "token": intent.token, "batch_id": batch_id, "time": time.time()})
        return self._intents[intent.token]

    def abandon(self, intent: Intent) -> None:
        """Note that the server does not have the batch."""
        self._write({"event": "abandoned", "token": intent.token})

    def settled(self, items: Collection[str]) -> None:
        """Note that the answers of these items are used; asking for them again buys new ones."""
        if items:
            self._write({"event": "settled", "items": sorted(items)})

    def _lock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another process waits for the batches in {self.path}; stop it, or give this one a ledger of its own"
            ) from None

    def _replay(self, file: IO[bytes]) -> None:
        file.seek(0)
        content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            file.truncate(len(complete))  # A crash tore the last line; nothing was done after it.
        self._intents, self._tokens = {}, {}
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise RunError(
                    f"{self.path}:{number} is no line of this file; look up the batches at the provider, then move the "
                    "file away"
                ) from None

    def _write(self, event: Mapping[str, Any]) -> None:
        if self._file is None:
            raise RunError(f"the list of batches {self.path} is closed")
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        try:
            end = self._file.seek(0, os.SEEK_END)
            try:
                self._file.write(line)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise
        except OSError as error:
            raise RunError(
                f"cannot write the list of batches {self.path}: {error.strerror}; free the disk, then run the same "
                "command again"
            ) from error
        self._apply(json.loads(line))

    def _apply(self, event: dict[str, Any]) -> None:
        match event.pop("event"):
            case "intent":
                intent = Intent(**event)
                self._intents[intent.token] = intent
                self._tokens.update(dict.fromkeys(intent.items, intent.token))
            case "submitted":
                token = event["token"]
                self._intents[token] = replace(self._intents[token], batch_id=event["batch_id"])
            case "abandoned":
                for item in self._intents.pop(event["token"]).items:
                    del self._tokens[item]
            case "settled":
                for item in event["items"]:
                    self._tokens.pop(item, None)
            case unknown:
                raise ValueError(unknown)
