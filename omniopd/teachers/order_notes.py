"""Requests under way, noted in a plain file before they go out, for orders that nothing can refuse.

A line that was written survives the death of the process, and writing it takes microseconds where a transaction takes
milliseconds. Lost in a power cut, it costs a count and no answer.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from omniopd.errors import RunError
from omniopd.teachers.ledger_entries import Ordered

_SUFFIX = ".orders"

Note = tuple[int, str, float, int, float | None]
"""Number, teacher, time, and the bound's tokens and USD."""


class OrderNotes:
    """The open orders of one owner. Any thread.

    Args:
        folder: where the owner's files lie; None for a ledger in memory, which dies with its process.
        owner: who orders.
    """

    def __init__(self, folder: Path | None, owner: str) -> None:
        self.open: dict[int, Note] = {}
        self._path = None if folder is None else folder / f"{owner}{_SUFFIX}"
        self._file: int | None = None
        self._lock = threading.Lock()

    def add(self, order: Ordered) -> None:
        """Note an order. Raises RunError when that cannot be written."""
        note = (order.id, order.teacher_id, time.time(), order.bound.tokens, order.bound.usd)
        with self._lock:
            self._write(json.dumps(note) + "\n")
            self.open[order.id] = note

    def strike(self, numbers: Iterable[int]) -> None:
        """Strike orders that are settled, and on the disk; those that were never noted are passed over."""
        with self._lock:
            struck = [number for number in numbers if self.open.pop(number, None) is not None]
            if struck:
                self._write(json.dumps(struck) + "\n")

    def close(self) -> None:
        """Remove the file. Safe to call twice."""
        with self._lock:
            if self._file is not None and self._path is not None:
                self._path.unlink(missing_ok=True)
                os.close(self._file)
                self._file = None

    def _write(self, line: str) -> None:
        if self._path is None:
            return
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._file, line.encode())
        except OSError as error:
            raise RunError(f"cannot write to {self._path}: {error.strerror}; free the disk, then --resume") from error


def noting_owners(folder: Path) -> Iterator[str]:
    """Yield the owners that have noted orders."""
    if folder.is_dir():
        for path in folder.glob(f"*{_SUFFIX}"):
            yield path.name.removesuffix(_SUFFIX)


def read_notes(folder: Path, owner: str) -> list[Note]:
    """Return the open orders of an owner."""
    try:
        return _open_orders((folder / f"{owner}{_SUFFIX}").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []


def take_notes(folder: Path, owner: str) -> list[Note]:
    """Return the open orders of a dead owner, to one alone of those who ask, and remove its file."""
    mine = folder / f"{owner}.taken-{uuid.uuid4().hex}"
    try:
        (folder / f"{owner}{_SUFFIX}").rename(mine)
    except FileNotFoundError:
        return []
    notes = _open_orders(mine.read_text(encoding="utf-8"))
    mine.unlink()
    return notes


def _open_orders(text: str) -> list[Note]:
    notes: dict[int, Note] = {}
    # What follows the last line break is torn: an order that was never sent.
    for entry in map(json.loads, text.split("\n")[:-1]):
        if isinstance(entry, list) and len(entry) == 5 and isinstance(entry[1], str):
            number, teacher, at, tokens, usd = entry
            notes[number] = (number, teacher, at, tokens, usd)
        else:
            for number in entry:
                notes.pop(number, None)
    return list(notes.values())
