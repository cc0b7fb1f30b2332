"""Checkpoints that are whole or not there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from omniopd.checkpoint import STATE, Checkpoints
from omniopd.errors import RunError
from omniopd.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def state(number: float) -> dict[str, torch.Tensor]:
    return {"weights": torch.full((4,), float(number))}


def test_a_state_comes_back(folder: RunFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest() is None and checkpoints.steps() == []
    target = checkpoints.save(50, state(3) | {"seconds": 1.5})
    assert target == folder.checkpoint(50) and target.name == "step-000050"
    loaded = Checkpoints(folder, keep=2).load(50)
    assert torch.equal(loaded["weights"], torch.full((4,), 3.0))
    assert loaded["seconds"] == 1.5
    assert set(loaded) == {"weights", "seconds"}
    assert json.loads(folder.latest_checkpoint.read_text()) == {"step": 50, "folder": "step-000050"}


def test_random_generators_go_on_where_they_were(folder: RunFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, {})
    first = random.random(), np.random.random(), torch.rand(1).item()
    assert (random.random(), np.random.random(), torch.rand(1).item()) != first
    checkpoints.load(1)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == first


def test_only_the_newest_are_kept(folder: RunFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    for step in (2, 4, 10, 100):
        checkpoints.save(step, state(step))
        assert checkpoints.latest() == step
    assert checkpoints.steps() == [10, 100]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["latest.json", "step-000010", "step-000100"]
    assert checkpoints.load(10)["weights"][0] == 10


def test_a_kill_before_the_rename_leaves_the_last_one(folder: RunFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, state(1))
    # What a kill between writing and renaming leaves behind: everything but the name.
    aside = folder.checkpoints / ".step-000002.partial"
    aside.mkdir()
    (aside / STATE).write_bytes((folder.checkpoint(1) / STATE).read_bytes()[:100])
    assert (checkpoints.latest(), checkpoints.steps()) == (1, [1])
    # The next attempt is not disturbed by the left-overs.
    checkpoints.save(2, state(2))
    assert not aside.exists()
    assert checkpoints.load(2)["weights"][0] == 2


def test_a_kill_after_the_rename_loses_nothing(folder: RunFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, state(1))
    before = folder.latest_checkpoint.read_text()
    checkpoints.save(2, state(2))
    folder.latest_checkpoint.write_text(before)
    assert checkpoints.latest() == 2


def test_folders_that_are_no_checkpoints_are_ignored(folder: RunFolder) -> None:
    checkpoints = Checkpoints(folder, keep=1)
    for name in ("step-000009", "step-abc", "other"):
        (folder.checkpoints / name).mkdir(parents=True)
    (folder.checkpoints / "step-abc" / STATE).touch()
    assert checkpoints.latest() is None


def test_the_same_step_is_not_written_twice(folder: RunFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, state(1))
    checkpoints.save(1, state(9))
    assert checkpoints.load(1)["weights"][0] == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone"])
def test_an_unreadable_checkpoint_says_what_to_delete(folder: RunFolder, damage: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    path = checkpoints.save(1, {"weights": torch.zeros(1000)}) / STATE
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"no checkpoint" * 99}[damage])
    with pytest.raises(RunError, match=r"step-000001/state\.pt cannot be read .*delete its folder to go on"):
        checkpoints.load(1)


SAVE_ON_A_SMALL_DISK = """
import resource, sys
import torch
from pathlib import Path
from omniopd.checkpoint import Checkpoints
from omniopd.errors import RunError
from omniopd.run_folder import RunFolder

checkpoints = Checkpoints(RunFolder(Path(sys.argv[1])), keep=1)
checkpoints.save(1, {"weights": torch.ones(8)})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    checkpoints.save(2, {"weights": torch.ones(1_000_000)})
except RunError as error:
    sys.stdout.write(str(error))
else:
    sys.exit("the disk did not refuse")
"""


def test_a_disk_that_refuses_leaves_the_last_checkpoint_whole(folder: RunFolder) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVE_ON_A_SMALL_DISK, str(folder.path)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot save the checkpoint of step 2 in " in done.stdout
    assert "the checkpoint of step 1 is intact" in done.stdout
    assert "MiB are free" in done.stdout and "--resume" in done.stdout
    checkpoints = Checkpoints(folder, keep=1)
    assert checkpoints.latest() == 1
    assert torch.equal(checkpoints.load(1)["weights"], torch.ones(8))
    # Nothing of the failed attempt is left to fill the disk.
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["latest.json", "step-000001"]


def test_the_first_checkpoint_may_fail_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunError, match=r"cannot save the checkpoint of step 1 .*there is no earlier checkpoint"):
        Checkpoints(RunFolder(tmp_path), keep=1).save(1, state(1))
