"""A folder of what a teacher says of fixed completions. It knows files and rows, no log-probs and no model.

    manifest.json            who said it, and what is stored; a folder never mixes two answers to that
    part-00000.safetensors   arrays of many completions, one after the other; the header lists the completions
    index.jsonl              completion -> shard and rows; one line each

A shard is never changed: it is written aside, synced, renamed, and only then its lines are added to the index. A kill
at any instant loses at most the shard being written: the next writer adds the lines that are missing, from the headers.
Readers may read on while a writer adds.

Letters: N rows of a shard, one for each token of its completions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

import numpy as np

from omniopd.errors import ConfigError, DataError, RunError
from omniopd.logits.scores import Reading
from omniopd.logits.shards import WRITE_COMMAND, Framework, damaged, open_shard, shard_path, write_safetensors
from omniopd.run_folder import read_json, write_json_atomic, write_text_atomic
from omniopd.types import Missing

FORMAT = 1
MANIFEST, INDEX, LOCK = "manifest.json", "index.jsonl", ".lock"


def completion_key(reading: Reading) -> bytes:
    """Return 16 bytes that stand for prompt and completion. What else a reading asks for plays no part."""
    digest = hashlib.blake2b(len(reading.prompt_ids).to_bytes(8, "little"), digest_size=16)
    digest.update(np.array((*reading.prompt_ids, *reading.token_ids), dtype="<i8").tobytes())
    return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder holds. Two folders of one manifest hold the same numbers."""

    kind: Literal["scores", "states"]
    teacher: str
    """Its id, for records."""
    identity: str = ""
    """Tells the teacher's weights and tokenizer from others, such as a digest; empty: nobody said."""
    vocabulary: int | None = None
    """Tokens; None: nobody said."""
    dtype: str = "float32"
    """Of log-probs or hidden states."""
    top_k: int | None = None
    """Scores only: the teacher's likeliest tokens at each position."""
    width: int | None = None
    """States only: numbers in one."""
    softcap: float | None = None
    """States only: see `stored_states.StoredHead`."""
    head: str | None = None
    """States only: digest of the output layer."""
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder. Raises ConfigError where there is none, DataError for another format."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}; write it with `{WRITE_COMMAND}`, or correct its name")
        if not path.is_file():
            raise ConfigError(
                f"{folder} holds no stored scores: it has no {MANIFEST}; make them with `{WRITE_COMMAND}`"
            )
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else values
            raise DataError(
                f"{path} has format {found!r}, expected {FORMAT}; write the folder anew with `{WRITE_COMMAND}`"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise DataError(f"{path} is no manifest of format {FORMAT}: {error}") from error

    def check_same(self, wanted: Manifest, folder: Path) -> None:
        """Raise ConfigError when another thing is to be written than is there, naming both values."""
        if self.kind != wanted.kind:
            raise ConfigError(f"{folder} holds {self.kind}, asked for {wanted.kind}; give another folder (--out)")
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(wanted, f.name)]
        if names:
            told = "; ".join(f"{name} {getattr(self, name)!r}, asked for {getattr(wanted, name)!r}" for name in names)
            raise ConfigError(f"{folder} is written with {told}; give the same, or another folder")

    def expect(self, kind: str, identity: str | None, folder: Path) -> None:
        """Raise ConfigError when a reader needs another kind, or the weights of another teacher."""
        if self.kind != kind:
            raise ConfigError(
                f"{folder} holds {self.kind}, expected {kind}; read it with teacher.spec={self.kind}:{folder}, or give "
                f"the folder of the {kind}"
            )
        if identity is not None and identity != self.identity:
            raise ConfigError(
                f"{folder} is of {self.teacher} with identity {self.identity!r}, expected {identity!r}; "
                "write the folder anew, or point to the teacher that wrote it"
            )


def check_stored(spec: str) -> Manifest | None:
    """Return what the folder of `scores:FOLDER` or `states:FOLDER` holds; None for any other teacher. Reads one file.

    Raises ConfigError for a folder that is not there or of something else, DataError for a manifest of another format.
    """
    kind, _, name = spec.partition(":")
    if kind not in ("scores", "states"):
        return None
    manifest = Manifest.read(Path(name))
    manifest.expect(kind, None, Path(name))
    return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCounts:
    """What a writer did."""

    written: int
    already_there: int
    """Completions that were in the folder, repeated ones, and those without a token."""
    missing: Mapping[Missing, int] = field(default_factory=dict)
    """Completions the teacher said nothing of, by reason. The next run asks again."""
    first_missing: str = ""
    """The detail of the first of them."""


class Place(NamedTuple):
    """Where a completion lies."""

    shard: int
    start: int
    stop: int


class FolderReader:
    """Which completions a folder holds, and their arrays. Grows as a writer adds lines.

    Shards are mapped, so only the rows asked for are read, and no file stays open. The index is kept in memory: about
    260 bytes for each completion.

    Args:
        framework: `numpy`, or `pt` for tensors, which have bfloat16.
    """

    def __init__(self, folder: Path, framework: Framework) -> None:
        self._folder = folder
        self._framework: Framework = framework
        self._places: dict[bytes, Place] = {}
        self._read_bytes = 0
        self._inode: int | None = None
        self._reading = threading.Lock()
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shards(self) -> set[int]:
        """The numbers of all shards with a line."""
        return {place.shard for place in self._places.values()}

    def find(self, key: bytes) -> Place | None:
        """Return where a completion lies, looking at the disk again before it says None."""
        place = self._places.get(key)
        if place is None:
            self.refresh()
            place = self._places.get(key)
        return place

    def refresh(self) -> int:
        """Read the lines that were added; return where the last whole one ends. A torn one is left for later.

        Raises DataError for a line that is whole and no line of an index.
        """
        with self._reading:
            try:
                with (self._folder / INDEX).open("rb") as file:
                    status = os.fstat(file.fileno())
                    if status.st_ino != self._inode or status.st_size < self._read_bytes:
                        self._places, self._read_bytes, self._inode = {}, 0, status.st_ino
                    if status.st_size > self._read_bytes:
                        self._take(file)
            except FileNotFoundError:
                self._places, self._read_bytes, self._inode = {}, 0, None
            return self._read_bytes

    def read(self, keys: Sequence[bytes], names: Mapping[str, int | None]) -> dict[bytes, dict[str, Any]]:
        """Return the arrays of those completions that the folder holds.

        Args:
            names: array -> how many of its columns, None for all.

        Raises:
            DataError: a shard is missing or damaged.
        """
        by_shard: dict[int, dict[bytes, Place]] = {}
        for key in keys:
            if (place := self.find(key)) is not None:
                by_shard.setdefault(place.shard, {})[key] = place
        found: dict[bytes, dict[str, Any]] = {}
        for shard, places in sorted(by_shard.items()):
            path = shard_path(self._folder, shard)
            with open_shard(path, self._framework) as file:
                rows = _rows(file, path)
                for key, place in places.items():
                    if rows.get(key) != (place.start, place.stop):
                        raise DataError(damaged(path, f"it does not hold what {INDEX} says"))
                    found[key] = {name: _cut(file, name, place, columns) for name, columns in names.items()}
        return found

    def _take(self, file: IO[bytes]) -> None:
        file.seek(self._read_bytes)
        for line in file:
            if not line.endswith(b"\n"):
                return
            key, place = _parse(line, self._folder / INDEX, self._read_bytes)
            self._places.setdefault(key, place)
            self._read_bytes += len(line)


class FolderWriter:
    """Add completions to a folder, making it when it is new. Use it in a `with` statement.

    Raises:
        ConfigError: on entering, when the folder is written with another manifest.
        RunError: another process is writing it, or the disk refuses.
        DataError: the index or a shard is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._framework: Framework = "numpy" if manifest.kind == "scores" else "pt"
        self._lock: int | None = None
        self._index: FolderReader
        self._next = 0

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror}; give another folder") from error
        try:
            self._open(self._lock)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def close(self) -> None:
        """Give the lock up. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, completions: Sequence[tuple[bytes, int]], arrays: Mapping[str, Any]) -> None:
        """Write one shard: completions of at least one token, by key and length, and their rows. It is on disk after.

        Raises RunError when the disk refuses; the folder stays as it was, or has the shard without its lines.
        """
        header = json.dumps([[key.hex(), num_tokens] for key, num_tokens in completions], separators=(",", ":"))
        shard = self._next
        write_safetensors(shard_path(self.folder, shard), arrays, self._framework, {"completions": header})
        self._next += 1
        self._append(_lines(shard, _consecutive(completions)))

    def _open(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is writing {self.folder}; wait for it, or give another folder") from error
        if (self.folder / MANIFEST).exists():
            Manifest.read(self.folder).check_same(self.manifest, self.folder)
        else:
            if any(self.folder.glob("part-*.safetensors")):
                raise DataError(f"{self.folder} has shards and no {MANIFEST}, so nobody knows whose; move them away")
            write_json_atomic(self.folder / MANIFEST, asdict(self.manifest))
        for leftover in self.folder.glob(".*.safetensors.partial"):
            leftover.unlink()
        self._mend()

    def _mend(self) -> None:
        """Make the index say what the shards hold: a kill may have left lines out, a user may have deleted shards."""
        self._index = FolderReader(self.folder, self._framework)
        path = self.folder / INDEX
        shards = sorted(int(p.stem.removeprefix("part-")) for p in self.folder.glob("part-*.safetensors"))
        if self._index.shards - set(shards):
            write_text_atomic(path, "")
        whole = self._index.refresh()
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)
        lines = []
        for shard in sorted(set(shards[-1:]) | set(shards) - self._index.shards):
            with open_shard(shard_path(self.folder, shard), self._framework) as file:
                rows = _rows(file, shard_path(self.folder, shard))
            lines.append(_lines(shard, {key: place for key, place in rows.items() if key not in self._index}))
        self._append(b"".join(lines))
        self._next = shards[-1] + 1 if shards else 0

    def _append(self, lines: bytes) -> None:
        if not lines:
            return
        path = self.folder / INDEX
        try:
            with path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    if file.write(lines) != len(lines):
                        raise OSError(None, "the disk took only a part; it may be full")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror}; free the disk, then run the same command again"
            ) from error
        self._index.refresh()


def unwritten(writer: FolderWriter, readings: Sequence[Reading]) -> dict[bytes, Reading]:
    """Return the completions the folder does not have, each once, without requested tokens. Empty ones need nothing."""
    new: dict[bytes, Reading] = {}
    for reading in readings:
        key = completion_key(reading)
        if reading.token_ids and key not in writer and key not in new:
            new[key] = Reading(prompt_ids=reading.prompt_ids, token_ids=reading.token_ids)
    return new


def _cut(file: Any, name: str, place: Place, columns: int | None) -> Any:
    rows = slice(place.start, place.stop)
    return file.get_slice(name)[rows if columns is None else (rows, slice(0, columns))]


def _rows(file: Any, path: Path) -> dict[bytes, tuple[int, int]]:
    """Return completion -> rows, from the header of a shard."""
    try:
        listed = json.loads(file.metadata()["completions"])
        return _consecutive([(bytes.fromhex(key), int(num_tokens)) for key, num_tokens in listed])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(damaged(path, "its header lists no completions")) from error


def _consecutive(completions: Sequence[tuple[bytes, int]]) -> dict[bytes, tuple[int, int]]:
    """Return completion -> rows."""
    rows, start = {}, 0
    for key, num_tokens in completions:
        rows[key] = (start, start + num_tokens)
        start += num_tokens
    return rows


def _lines(shard: int, rows: Mapping[bytes, tuple[int, int]]) -> bytes:
    """Return the index lines of completions of a shard."""
    lines = (
        {"key": key.hex(), "shard": shard, "rows": [start, stop], "tokens": stop - start}
        for key, (start, stop) in rows.items()
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _parse(line: bytes, path: Path, offset: int) -> tuple[bytes, Place]:
    try:
        values = json.loads(line)
        start, stop = values["rows"]
        key, place = bytes.fromhex(values["key"]), Place(int(values["shard"]), int(start), int(stop))
        if stop - start != values["tokens"] or start < 0:
            raise ValueError("rows and tokens differ")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}, byte {offset}: no line of an index; delete the file and run the same `{WRITE_COMMAND}` again, "
            "which rebuilds it from the shards"
        ) from error
    return key, place
