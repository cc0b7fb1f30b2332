"""OmniOPD: on-policy distillation from a teacher that can only be prompted.

The names below load on first use, so `import omniopd` is quick and needs neither torch nor an API client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniopd.api import ChunkRewarder, ChunkRewards, get_similarity, select_chunks, smoothed_target
    from omniopd.config import RunConfig
    from omniopd.errors import ConfigError, OmniOPDError
    from omniopd.run import run_training as train

__version__ = "0.1.0"

__all__ = [
    "ChunkRewarder",
    "ChunkRewards",
    "ConfigError",
    "OmniOPDError",
    "RunConfig",
    "__version__",
    "get_similarity",
    "select_chunks",
    "smoothed_target",
    "train",
]

_HOMES = {
    "ChunkRewarder": ("omniopd.api", "ChunkRewarder"),
    "ChunkRewards": ("omniopd.api", "ChunkRewards"),
    "ConfigError": ("omniopd.errors", "ConfigError"),
    "OmniOPDError": ("omniopd.errors", "OmniOPDError"),
    "RunConfig": ("omniopd.config", "RunConfig"),
    "get_similarity": ("omniopd.api", "get_similarity"),
    "select_chunks": ("omniopd.api", "select_chunks"),
    "smoothed_target": ("omniopd.api", "smoothed_target"),
    "train": ("omniopd.run", "run_training"),
}
"""Public name -> module and name there."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'omniopd' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
