"""Where metrics go besides the run folder: TensorBoard, Weights & Biases, trackio. The JSONL records stay the truth.

Each tracker imports its package when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from omniopd.errors import ConfigError, MissingExtraError
from omniopd.run_folder import RunFolder, read_json, write_json_atomic

PROJECT = "omniopd"


class Tracker(Protocol):
    """A place that draws curves."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the measured metrics of a step."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


class TensorBoardTracker:
    """Event files under RUN/tensorboard. On resume, points from `start_step` + 1 on are superseded."""

    def __init__(self, folder: RunFolder, name: str, config: Mapping[str, Any], start_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        del name, config
        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(log_dir=str(folder.tensorboard), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            self._writer.add_scalar(metric, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases. The run id is kept in RUN/wandb.json, so that a resumed run continues its curves there."""

    def __init__(self, folder: RunFolder, name: str, config: Mapping[str, Any], start_step: int = 0) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        stored = folder.path / "wandb.json"
        run_id = read_json(stored)["id"] if start_step and stored.is_file() else None
        self._run: Any = wandb.init(
            project=PROJECT, name=name, config=dict(config), dir=str(folder.path), id=run_id, resume="allow"
        )
        write_json_atomic(stored, {"id": self._run.id})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """trackio, the local-first tracker; a run of the same name is continued when `start_step` is not 0."""

    def __init__(self, folder: RunFolder, name: str, config: Mapping[str, Any], start_step: int = 0) -> None:
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio") from error
        del folder
        self._trackio: Any = trackio
        trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow" if start_step else "never")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[RunFolder, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}
"""Name in the run file to tracker."""


def open_trackers(
    names: Sequence[str], folder: RunFolder, *, run_name: str, config: Mapping[str, Any], start_step: int = 0
) -> tuple[Tracker, ...]:
    """Open the trackers of a run. `start_step` is the number of updates already made when it is resumed.

    Raises MissingExtraError when a package is not installed, ConfigError on an unknown name.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"trackers: unknown {', '.join(unknown)}; known are {', '.join(TRACKERS)}")
    return tuple(TRACKERS[name](folder, run_name, config, start_step) for name in names)


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"the tracker {package} needs the package {package}; run `pip install {package}`, "
        f"or leave {package} out of `trackers`"
    )
