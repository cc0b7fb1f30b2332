"""Checkpoints that are whole or not there: written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniopd.errors import RunError
from omniopd.run_folder import RunFolder, write_json_atomic

STATE = "state.pt"


class Checkpoints:
    """The checkpoints of one run. A kill at any instant leaves the newest complete one loadable."""

    def __init__(self, folder: RunFolder, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after `step` updates, then drop the oldest beyond `keep`.

        Raises RunError when the disk refuses; earlier checkpoints stay as they were.
        """
        target = self._folder.checkpoint(step)
        if target.exists():
            return target
        aside = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            with (aside / STATE).open("wb") as file:
                torch.save({**state, "rng": _rng_state()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, target)
            _sync_folder(target.parent)
            write_json_atomic(self._folder.latest_checkpoint, {"step": step, "folder": target.name})
        except (OSError, RuntimeError) as error:
            # torch reports a failed write of its zip stream as a RuntimeError.
            shutil.rmtree(aside, ignore_errors=True)
            raise RunError(self._save_failed(step, error)) from error
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._folder.checkpoint(old), ignore_errors=True)
        return target

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        if not self._folder.checkpoints.is_dir():
            return []
        names = [p.name.removeprefix("step-") for p in self._folder.checkpoints.glob("step-*") if (p / STATE).is_file()]
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None when there is none.

        What is on disk counts, not what latest.json says: a kill between the rename and its update must not lose one.
        """
        steps = self.steps()
        return steps[-1] if steps else None

    def load(self, step: int) -> dict[str, Any]:
        """Read a checkpoint and put the random generators back. Raises RunError when it cannot be read."""
        path = self._folder.checkpoint(step) / STATE
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(
                f"the checkpoint {path} cannot be read ({error}); delete its folder to go on from the one before"
            ) from error
        _restore_rng(state.pop("rng"))
        return state

    def _save_failed(self, step: int, error: Exception) -> str:
        kept = self.latest()
        whole = f"the checkpoint of step {kept} is intact" if kept is not None else "there is no earlier checkpoint"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self._folder.path).free / 2**20
            whole += f"; {free:,.0f} MiB are free"
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else f"writing failed: {error}"
        return (
            f"cannot save the checkpoint of step {step} in {self._folder.checkpoints}: {what} ({whole}). Free some "
            "space and continue with --resume."
        )


def _rng_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
