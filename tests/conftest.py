"""What every test runs under: no network beyond this machine, no keys, one thread, a fixed seed."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read once, when the libraries are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest

from omniopd.worlds.mini_math import model_path

if TYPE_CHECKING:
    from omniopd.generation import Sampler

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "")


class NetworkBlockedError(AssertionError):
    """A test reached for the network. Not an OSError: code under test would take that for a failed request."""


def _require_loopback(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name is not None and name not in _LOOPBACK and not str(name).startswith("127."):
        raise NetworkBlockedError(f"a test tried to reach {name!r}; tests may only use loopback")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def checked(original: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _require_loopback(address[0])
            return original(self, address)

        return call

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        _require_loopback(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked(connect))
        patch.setattr(socket.socket, "connect_ex", checked(connect_ex))
        patch.setattr(socket, "getaddrinfo", lookup)
        yield


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Seed every generator and hide the developer's keys and caches: no test depends on another or on the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in [name for name in os.environ if name.endswith("_API_KEY")]:
        monkeypatch.delenv(name)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)


def _model(name: str) -> Path:
    folder = model_path(name)
    assert (folder / "config.json").is_file(), (
        f"{folder} has no model; it belongs to the repository (or: make mini-math)"
    )
    return folder


@pytest.fixture(scope="session")
def student_folder() -> Path:
    """The mini-math student: right steps in its head, slips when sampled."""
    return _model("student")


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """The mini-math teacher."""
    return _model("teacher")


@pytest.fixture(scope="module")
def sampler(teacher_folder: Path) -> Sampler:
    """The teacher as `omniopd serve` holds it."""
    from omniopd.generation import load_sampler

    return load_sampler(teacher_folder, device="cpu", dtype="float32")
