"""One safetensors file of a folder of stored scores: written as a whole or not at all, mapped to be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from omniopd.errors import DataError, MissingExtraError, RunError

WRITE_COMMAND = "omniopd scores write"
Framework = Literal["numpy", "pt"]
"""How arrays come and go; `pt` are tensors, which have bfloat16."""


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"part-{shard:05d}.safetensors"


def write_safetensors(path: Path, arrays: Mapping[str, Any], framework: Framework, metadata: dict[str, str]) -> None:
    """Write a file so that it is there as a whole or not at all. Raises RunError when the disk refuses."""
    _need_safetensors()
    # Not save_file: its files are for their owner alone, and those a kill leaves behind have names nobody knows.
    if framework == "numpy":
        from safetensors.numpy import save

        content = save(dict(arrays), metadata)
    else:
        from safetensors.torch import save as save_tensors

        content = save_tensors(dict(arrays), metadata)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror}; free the disk, then run the same command again"
        ) from error


@contextlib.contextmanager
def open_shard(path: Path, framework: Framework) -> Iterator[Any]:
    """Map a safetensors file. Raises DataError when it is missing or damaged."""
    _need_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(damaged(path, "it is not there")) from error
    except SafetensorError as error:
        raise DataError(damaged(path, str(error))) from error


def damaged(path: Path, what: str) -> str:
    """Return what to tell a user whose file cannot be read."""
    return (
        f"{path} cannot be read: {what}; delete it and run the same `{WRITE_COMMAND}` again, which writes what is "
        "missing; the other shards stay"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _need_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("stored scores need safetensors: pip install 'omniopd[train]'") from error
