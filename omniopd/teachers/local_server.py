"""A teacher server that lives as long as a run: `omniopd serve` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from omniopd.errors import TeacherConnectionError, TeacherTimeoutError

_POLL_S = 0.1
_TAIL_LINES = 20


class LocalTeacherServer:
    """Start `omniopd serve` on a model folder, wait until it answers, and stop it at the end.

    The server also stops by itself when this process dies, however that happens.

    Args:
        model_dir: a model folder, or `mini-math:teacher`.
        log: gets the server's output.
        device, threads: passed on.
        timeout_s: for loading the model.
    """

    def __init__(
        self,
        model_dir: Path | str,
        *,
        log: Path,
        device: str = "auto",
        threads: int | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self._model_dir = str(model_dir)
        self._log = log
        self._device = device
        self._threads = threads
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._base_url: str | None = None

    @property
    def base_url(self) -> str:
        """Where to ask, up to and including `/v1`. Only while the server runs."""
        if self._base_url is None:
            raise TeacherConnectionError(
                f"the teacher server for {self._model_dir} is not running; use it in a with block"
            )
        return self._base_url

    @property
    def pid(self) -> int | None:
        """The server's process; None when it does not run."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        """Start the server. Raises TeacherConnectionError when it ends early, TeacherTimeoutError when it is slow."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="omniopd-serve-") as folder:
            announce = Path(folder) / "base_url"
            command = [sys.executable, "-m", "omniopd", "serve", self._model_dir, "--port", "0"]
            command += ["--announce", str(announce), "--exit-with", str(os.getpid()), "--device", self._device]
            command += ["--threads", str(self._threads)] if self._threads is not None else []
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                self._base_url = self._wait(announce)
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self, announce: Path) -> str:
        assert self._process is not None
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise TeacherConnectionError(
                    f"the teacher server for {self._model_dir} ended with code {code} before it answered; "
                    f"the end of {self._log}:\n{self._tail()}"
                )
            if announce.exists():
                base_url = announce.read_text(encoding="utf-8")
                if _is_healthy(base_url):
                    return base_url
            time.sleep(_POLL_S)
        raise TeacherTimeoutError(
            f"the teacher server for {self._model_dir} did not answer within {self._timeout_s:g} s; "
            f"the end of {self._log}:\n{self._tail()}"
        )

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:]) or "(empty)"

    def _stop(self) -> None:
        process, self._process, self._base_url = self._process, None, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_healthy(base_url: str) -> bool:
    # No proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(base_url.removesuffix("/v1") + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
