"""Who has a ledger open: a lock file for each owner, which the system releases however the process ends.

Needs flock, so POSIX and a file system that has it. A forked child keeps its parent's lock for as long as it lives.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from omniopd.errors import RunError

try:
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]


def owners_folder(ledger: Path | str) -> Path:
    """Return the folder with the lock files of a ledger."""
    return Path(f"{ledger}.owners")


class Owner:
    """One open ledger, in the eyes of the others that share the file.

    Args:
        ledger: None for a ledger in memory, which nobody shares.
    """

    def __init__(self, ledger: Path | str | None) -> None:
        self.id = uuid.uuid4().hex
        self._folder = None if ledger is None else owners_folder(ledger)
        self._lock = None if self._folder is None else _hold(self._folder, self.id)

    def knows_alive(self, owner: str) -> bool:
        """Say whether an owner still has the ledger open."""
        return owner == self.id or (self._folder is not None and is_alive(self._folder, owner))

    def close(self) -> None:
        """Give the lock up and remove its file. Safe to call twice."""
        if self._folder is None or self._lock is None:
            return
        (self._folder / self.id).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):  # Not empty: others are there.
            self._folder.rmdir()


def is_alive(folder: Path, owner: str) -> bool:
    """Say whether an owner holds its lock. The lock file of a dead one is removed."""
    try:
        lock = os.open(folder / owner, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # Not ours to open. Who cannot tell takes nothing away.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        with contextlib.suppress(OSError):
            (folder / owner).unlink()
        return False
    finally:
        os.close(lock)


def live_owners(ledger: Path | str) -> tuple[str, ...]:
    """Return who has the ledger open for writing. Lock files of the dead are removed."""
    folder = owners_folder(ledger)
    if not folder.is_dir():
        return ()
    locks = [file.name for file in folder.iterdir() if "." not in file.name]
    live = tuple(sorted(owner for owner in locks if is_alive(folder, owner)))
    if not live:
        with contextlib.suppress(OSError):  # Somebody came in between.
            folder.rmdir()
    return live


def _hold(folder: Path, owner: str) -> int:
    if fcntl is None:  # pragma: no cover
        raise RunError(f"the ledger beside {folder} needs POSIX file locks, which this system does not have")
    path = folder / owner
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # The last owner has just removed the folder.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Between the two calls somebody may have taken the file for that of a dead owner and removed it.
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
