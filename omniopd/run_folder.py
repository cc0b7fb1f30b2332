"""The folder of one run: where each file lies, and when a folder may be used, continued or replaced.

It neither reads nor writes records; see `omniopd.records`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniopd.errors import ConfigError, RunError

FREE_ON_RESUME = frozenset(
    {"steps", "output", "trackers", "save_every", "keep_checkpoints", "record_every", "eval.every"}
    | {"teacher.budget_usd", "teacher.max_attempts", "teacher.max_concurrency", "teacher.max_missing_fraction"}
    | {"teacher.timeout_s", "teacher.deadline_s", "teacher.requests_per_minute", "teacher.tokens_per_minute"}
    | {"teacher.budget_tokens", "teacher.budget_calls", "teacher.price", "teacher.probe"}
    | {"diagnostics.every", "diagnostics.max_tokens", "diagnostics.top_k"}
    | {f"diagnostics.prefix_probe.{name}" for name in ("every", "max_rollouts", "fractions", "positions")}
    | {f"diagnostics.prefix_probe.{name}" for name in ("num_continuations", "max_tokens")}
)
"""Dotted keys that may differ between the first start of a run and its continuation."""

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "accelerate",
    "vllm",
    "openai",
    "httpx",
    "httpx2",
    "pydantic",
    "numpy",
    "datasets",
    "rapidfuzz",
    "sentence-transformers",
    "math-verify",
    "starlette",
    "uvicorn",
    "rich",
    "tensorboard",
    "wandb",
    "trackio",
)
"""Distributions whose versions go into `environment.json`; null there means not installed."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class TeacherFiles:
    """What a run keeps of one teacher."""

    path: Path

    @property
    def ledger(self) -> Path:
        """All its answers paid for."""
        return self.path / "ledger.sqlite"

    @property
    def probe(self) -> Path:
        """What it did with the first questions."""
        return self.path / "probe.json"

    @property
    def estimate(self) -> Path:
        """What it was expected to be asked and to cost."""
        return self.path / "estimate.json"

    @property
    def server_log(self) -> Path:
        return self.path / "teacher_server.log"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run, by name. Constructing it touches nothing; `create` does."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, resume: bool, overwrite: bool) -> RunFolder:
        """Make the folder of a new run, or open the one of a run to continue.

        `overwrite` empties an existing folder, and only one that holds a `resolved.yaml`. A run that has never begun
        is in nobody's way. Raises RunError when the folder cannot be used that way, ConfigError when both flags are
        given.
        """
        if resume and overwrite:
            raise ConfigError("--resume keeps a run and --overwrite deletes it; give one of them")
        folder = cls(Path(path))
        occupied = _is_occupied(folder.path)
        if resume:
            if not occupied:
                raise RunError(f"there is no run to resume in {path}; check the name, or leave out --resume")
            if not folder.resolved.is_file():
                raise RunError(f"{path} is not a run: it has no resolved.yaml; use another name")
        elif overwrite and occupied:
            if not folder.resolved.is_file():
                raise RunError(
                    f"--overwrite refuses to delete {path}: without a resolved.yaml it does not look like a run; "
                    "use another name, or delete the folder yourself"
                )
            _empty(folder.path)
        elif occupied and not folder.has_never_begun:
            raise RunError(
                f"{path} exists and is not empty; continue it with --resume, replace it with --overwrite, "
                "or use another name"
            )
        _make_writable(folder.path)
        return folder

    @property
    def has_never_begun(self) -> bool:
        """Whether a run was set up here and stopped before its first result, by a missing key for instance."""
        results = (self.metrics, self.evals, self.rollouts, self.checkpoints, self.summary)
        return self.resolved.is_file() and not any(path.exists() for path in results)

    @property
    def resolved(self) -> Path:
        """The complete run file, as it was used."""
        return self.path / "resolved.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evals(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latest_checkpoint(self) -> Path:
        """A small file that names the newest complete checkpoint."""
        return self.checkpoints / "latest.json"

    @property
    def final(self) -> Path:
        """The trained student, as a plain transformers model."""
        return self.path / "final"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def teacher(self, name: str | None = None) -> TeacherFiles:
        """Name the files of one of several teachers; None: of the only one."""
        return TeacherFiles(self.path if name is None else self.path / "teachers" / name)

    @property
    def teachers(self) -> tuple[TeacherFiles, ...]:
        """The files of all teachers that were asked, in the order of their names."""
        several = sorted(path for path in (self.path / "teachers").glob("*") if path.is_dir())
        found = [self.teacher(), *(self.teacher(path.name) for path in several)]
        return tuple(files for files in found if files.ledger.is_file() or files.estimate.is_file())

    def rollouts_of(self, step: int) -> Path:
        """Name the file of one step's rollouts."""
        return self.rollouts / f"step-{step:06d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """Name the folder of the checkpoint taken after `step` updates."""
        return self.checkpoints / f"step-{step:06d}"

    def write_resolved(self, config: Mapping[str, Any]) -> None:
        """Write the complete run file. `config` holds plain values (`RunConfig.model_dump(mode="json")`)."""
        import yaml

        write_text_atomic(self.resolved, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def read_resolved(self) -> dict[str, Any]:
        """Read the complete run file. Raises RunError when it is missing or is not a mapping."""
        import yaml

        try:
            config = yaml.safe_load(self.resolved.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{self.path} is not a run: it has no resolved.yaml") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunError(f"{self.resolved} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"{self.resolved} holds a {type(config).__name__}, expected a mapping of settings")
        return config

    def check_resumable(self, config: Mapping[str, Any]) -> None:
        """Raise RunError when `config` would continue the run as a different one."""
        before = self.read_resolved()
        new = _teachers(config)
        for label, old in _teachers(before).items():
            for name in ("budget_usd", "budget_tokens", "budget_calls"):
                if old.get(name) is not None and new.get(label, {}).get(name) is None:
                    raise RunError(
                        f"{self.path} was started with {label}.{name}={old[name]}; give it again or raise it, so that "
                        "no budget is dropped by accident"
                    )
        differences = config_differences(before, dict(config))
        if differences:
            raise RunError(
                f"{self.path} was started with other settings: {', '.join(differences)}; resume with the settings in "
                f"{self.resolved}, or start a run with another name"
            )

    def write_environment(self, argv: Sequence[str]) -> None:
        """Write what the run runs on. A resumed run keeps the earlier entries under `earlier`."""
        earlier: list[Any] = []
        if self.environment.is_file():
            previous = read_json(self.environment)
            earlier = [*previous.pop("earlier", []), previous]
        write_json_atomic(self.environment, {**describe_environment(argv), "earlier": earlier})


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name the dotted keys whose values differ, sorted, without those in `FREE_ON_RESUME`.

    A key that only one side has differs. Lists are compared whole.

    Example:
        >>> config_differences({"steps": 1, "eval": {"k": 4}}, {"steps": 2, "eval": {"k": 8}})
        ['eval.k']
    """
    before, after = _leaves(old), _leaves(new)
    changed = {key for key in before.keys() | after.keys() if before.get(key, _ABSENT) != after.get(key, _ABSENT)}
    return sorted(key for key in changed if not _is_free(key))


def _is_free(key: str) -> bool:
    """Tell whether a key may differ; each of several teachers may be changed as the only one may."""
    if not key.startswith("teachers."):
        return key in FREE_ON_RESUME
    return any(
        key.endswith(f".{name.removeprefix('teacher.')}") for name in FREE_ON_RESUME if name.startswith("teacher.")
    )


def _teachers(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of all teachers by the keys of their sections."""
    several = config.get("teachers") or {}
    return {"teacher": config.get("teacher") or {}, **{f"teachers.{name}": of for name, of in several.items()}}


def describe_environment(argv: Sequence[str]) -> dict[str, Any]:
    """Return the command, versions, machine and git state. Imports none of the packages it names."""
    return {
        "time": time.time(),
        "argv": list(argv),
        "omniopd": _version("omniopd"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "git": {"source": _git_state(Path(__file__)), "current_directory": _git_state(Path.cwd())},
    }


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part. Raises RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def write_json_atomic(path: Path, value: Any) -> None:
    """Write one JSON value as `write_text_atomic` does. Raises ValueError on a number that is not finite."""
    write_text_atomic(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises RunError when it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings; an empty one counts as a leaf, so that {} and absent differ."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_leaves(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _is_occupied(path: Path) -> bool:
    try:
        return any(path.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunError(f"cannot use {path} as a run folder: {error.strerror or error}") from error


def _empty(path: Path) -> None:
    try:
        for child in path.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
    except OSError as error:
        raise RunError(f"cannot overwrite {path}: {error.strerror or error}") from error


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}; choose another output folder") from error


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(path: Path) -> dict[str, Any] | None:
    """Revision and dirty flag of the repository that tracks `path`; None when none does.

    An installed copy may lie inside somebody's repository without belonging to it, so a file must be tracked.
    """
    directory = path if path.is_dir() else path.parent
    if path.is_file() and _git(directory, "ls-files", "--error-unmatch", path.name) is None:
        return None
    revision = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if revision is None or changes is None:
        return None
    return {"revision": revision, "dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
