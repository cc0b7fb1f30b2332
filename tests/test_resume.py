"""A real run, killed with SIGKILL at random moments and resumed, equals the run that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniopd.records import is_reproducible, read_metrics

STEPS = 8
KILLS = 3


def run_command(folder: Path, *extra: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "omniopd",
        "train",
        "quickstart",
        "--run-name",
        folder.name,
        f"output={folder.parent}",
        f"steps={STEPS}",
        "save_every=2",
        "threads=1",
        "data.eval=null",
        "data.sampler={type: frontier}",
        "rollout.prompts_per_step=4",
        "rollout.group_size=2",
        "trackers=[]",
        *extra,
    ]


def start(folder: Path, *extra: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            run_command(folder, *extra),
            stdout=log,
            stderr=log,
            env=environment,
            # Under a shell that starts jobs in the background Ctrl-C is ignored, and a child would inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(timeout=200) == 0, (folder.parent / f"{folder.name}.log").read_text()[-3000:]


def kill_somewhere(process: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> int:
    """Wait until some more steps are recorded, then a random moment more, and kill. Returns the steps recorded."""
    wanted = len(read_metrics(folder / "metrics.jsonl")) + rng.randint(0, 2)
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) <= wanted and process.poll() is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.01)
    time.sleep(rng.random() * 0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(read_metrics(folder / "metrics.jsonl"))


@pytest.mark.timeout(400)
def test_killed_and_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    straight, disturbed = tmp_path / "straight", tmp_path / "disturbed"
    finish(start(straight), straight)
    rng = random.Random(7)
    process = start(disturbed)
    recorded = []
    for _ in range(KILLS):
        recorded.append(kill_somewhere(process, disturbed, rng))
        process = start(disturbed, "--resume")
    finish(process, disturbed)
    assert min(recorded) < STEPS, f"every kill came after the end: {recorded}"

    ours = load_file(disturbed / "final" / "model.safetensors")
    theirs = load_file(straight / "final" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    kept = [
        [
            {name: value for name, value in row.items() if is_reproducible(name)}
            for row in read_metrics(f / "metrics.jsonl")
        ]
        for f in (straight, disturbed)
    ]
    for rows in kept:
        for row in rows:  # What was paid before a kill is answered from the ledger afterwards, at no cost.
            for name in ("teacher/requests", "teacher/input_tokens", "teacher/output_tokens"):
                row.pop(name, None)
    assert kept[0] == kept[1]
    for step in range(1, STEPS + 1):
        rollouts = [
            [
                without_costs(json.loads(line))
                for line in (f / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
            ]
            for f in (straight, disturbed)
        ]
        assert rollouts[0] == rollouts[1]


def without_costs(signal_row: dict) -> dict:
    for audit in signal_row["audits"]:
        audit["continuations"].pop("usage")
        audit["continuations"].pop("seconds")
    return signal_row


@pytest.mark.timeout(200)
def test_interrupted_run_saves_what_is_done_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    quick = ("method.supervision={type: verifier}", "steps=200", "save_every=1000")
    process = start(run, *quick)
    deadline = time.monotonic() + 100
    while len(read_metrics(run / "metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "--resume" in (tmp_path / "run.log").read_text()
    (saved,) = (run / "checkpoints").glob("step-*")
    done = len(read_metrics(run / "metrics.jsonl"))
    assert saved.name == f"step-{done:06d}"
    finish(start(run, *quick, f"steps={done + 2}", "--resume"), run)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, done + 3))
