"""The divergence kernel beside those of TRL and Liger: forward and backward pass, time and memory, on a CPU.

    pip install --target peers --no-deps trl==1.16.0 liger-kernel==0.8.5
    PYTHONPATH=peers python benchmarks/divergence_kernel.py

Every cell runs in a process of its own: inputs first, then a call on a few tokens to load what is loaded late, then
one call whose peak memory is read and whose loss and both gradients are compared with a float64 reference (dense
formula, autograd, a few tokens at a time), then the timed calls. Contenders take turns, round by round, so a busy
machine slows them all; a time is the median over all rounds. Beside the seconds on the clock stand those of the
processor, over all threads, which other work on the machine changes less: threads that wait for each other sleep
(OMP_WAIT_POLICY), for every contender. Extra memory is the peak of the resident set during the call, less what it was
before and less the two gradients, which everybody has to return. All compute the mean over tokens, in float32, of the
same inputs. Prints a table and writes `benchmarks/results/divergence_kernel.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RESULT = Path(__file__).parent / "results" / "divergence_kernel.json"
SHAPES = ((256, 151936, 896), (1024, 32000, 512), (1024, 151936, 896))
"""Tokens, vocabulary, hidden width."""
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""In the convention of both peers."""
CONTENDERS = ("omniopd", "trl_dense", "trl_chunked", "liger")
THREADS = 2
TOLERANCE = 1e-5
MB = 2**20

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Inputs], Tensor]


def contender(name: str, kind: str) -> Loss:
    """Return the mean divergence as one library computes it."""
    return {"omniopd": _omniopd, "trl_dense": _trl_dense, "trl_chunked": _trl_chunked, "liger": _liger}[name](kind)


def _omniopd(kind: str) -> Loss:
    from omniopd.kernels import chunked_divergence

    def loss(inputs: Inputs) -> Tensor:
        return chunked_divergence(*inputs, kind=kind, reduction="mean")  # type: ignore[arg-type]

    return loss


def _trl_dense(kind: str) -> Loss:
    from trl.experimental.gkd import GKDTrainer

    def loss(inputs: Inputs) -> Tensor:
        student_hidden, student_head, teacher_hidden, teacher_head = inputs
        student = F.linear(student_hidden, student_head)
        with torch.no_grad():
            teacher = F.linear(teacher_hidden, teacher_head)
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETAS[kind], num_items_in_batch=len(student))

    return loss


def _trl_chunked(kind: str) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(inputs: Inputs) -> Tensor:
        student_hidden, student_head, teacher_hidden, teacher_head = inputs
        values, _ = ChunkedDivergenceFunction.apply(
            student_hidden, student_head, None, teacher_hidden, teacher_head, None, BETAS[kind]
        )
        return values.sum() / len(student_hidden)

    return loss


def _liger(kind: str) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[kind], compiled=False)

    def loss(inputs: Inputs) -> Tensor:
        return module(*inputs, torch.zeros(len(inputs[0]), dtype=torch.long))

    return loss


def make_inputs(tokens: int, vocabulary: int, hidden: int) -> Inputs:
    """Return student and teacher of the same width; their logits have a standard deviation of about 1.5."""
    rng = torch.Generator().manual_seed(0)
    student_hidden, teacher_hidden = (torch.randn(tokens, hidden, generator=rng) for _ in range(2))
    scale = 1.5 / hidden**0.5
    student_head, teacher_head = (torch.randn(vocabulary, hidden, generator=rng).mul_(scale) for _ in range(2))
    return student_hidden.requires_grad_(), student_head.requires_grad_(), teacher_hidden, teacher_head


def write_reference(path: Path, shape: tuple[int, int, int], kind: str) -> None:
    """Save loss and gradients, computed in float64 from the definition."""
    inputs = make_inputs(*shape)
    student_hidden, student_head, teacher_hidden, teacher_head = (x.detach().double() for x in inputs)
    student_hidden.requires_grad_()
    student_head.requires_grad_()
    size = max(1, 128 * 151936 // shape[1])
    total = 0.0
    for start in range(0, shape[0], size):
        rows = slice(start, start + size)
        s = torch.log_softmax(student_hidden[rows] @ student_head.t(), -1)
        t = torch.log_softmax(teacher_hidden[rows] @ teacher_head.t(), -1)
        if kind == "forward_kl":
            value = (t.exp() * (t - s)).sum()
        elif kind == "reverse_kl":
            value = (s.exp() * (s - t)).sum()
        else:
            mixture = ((s.exp() + t.exp()) / 2).log()
            value = ((t.exp() * (t - mixture)).sum() + (s.exp() * (s - mixture)).sum()) / 2
        value = value / shape[0]
        value.backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
    assert student_hidden.grad is not None and student_head.grad is not None
    # Rounding to float32 is a hundredth of the tolerance.
    torch.save((total, student_hidden.grad.float(), student_head.grad.float()), path)


def memory(field: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run_cell(name: str, shape: tuple[int, int, int], kind: str, reference: Path, repeats: int) -> dict[str, Any]:
    """Measure one cell; this process does nothing else."""
    loss_of = contender(name, kind)
    small = make_inputs(64, 4000, 64)
    loss_of(small).backward()  # type: ignore[no-untyped-call]
    inputs = make_inputs(*shape)
    parameters = inputs[:2]

    def call() -> tuple[dict[str, float], float]:
        for parameter in parameters:
            parameter.grad = None
        started, worked = time.perf_counter(), time.process_time()
        loss = loss_of(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
        return spent, float(loss.detach())

    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    spent, loss = call()
    extra = memory("VmHWM") - before - sum(p.numel() * p.element_size() for p in parameters)
    errors = _errors(loss, parameters, reference)
    calls = [spent] if repeats == 1 else [call()[0] for _ in range(repeats)]
    return {"calls": calls, "extra_mb": extra / MB, "errors": errors}


def _errors(loss: float, parameters: tuple[Tensor, ...], reference: Path) -> dict[str, float]:
    """Return relative differences: of the loss, and of each gradient in the Euclidean norm."""
    expected_loss, *expected = torch.load(reference, mmap=True)
    found = {"loss": abs(loss - expected_loss) / abs(expected_loss)}
    for name, parameter, gradient in zip(("hidden", "head"), parameters, expected, strict=True):
        assert parameter.grad is not None
        difference = torch.linalg.vector_norm(parameter.grad - gradient, dtype=torch.float64)
        found[name] = float(difference / torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return found


def in_a_process(*arguments: object) -> dict[str, Any]:
    """Run this file with some arguments and return what it prints."""
    threads = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = os.environ | threads | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(shape: tuple[int, int, int], kind: str, *, rounds: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Measure all contenders in turns."""
    reference = folder / "reference.pt"
    in_a_process("--reference", reference, "--shape", *shape, "--kind", kind)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            cell = ("--cell", name, "--shape", *shape, "--kind", kind)
            runs[name].append(in_a_process(*cell, "--reference", reference, "--repeats", repeats))
    found = {}
    for name, results in runs.items():
        times = [call["seconds"] for result in results for call in result["calls"]]
        work = [call["cpu_seconds"] for result in results for call in result["calls"]]
        found[name] = {
            "seconds": statistics.median(times),
            "seconds_range": [min(times), max(times)],
            "cpu_seconds": statistics.median(work),
            "extra_mb": statistics.median(result["extra_mb"] for result in results),
            "errors": {k: max(result["errors"][k] for result in results) for k in ("loss", "hidden", "head")},
        }
    return {"tokens": shape[0], "vocabulary": shape[1], "hidden": shape[2], "kind": kind, **_ratios(found), **found}


def _ratios(found: dict[str, Any]) -> dict[str, Any]:
    ours, peers = found["omniopd"], [found[name] for name in CONTENDERS[1:]]
    return {
        "time_ratio": ours["seconds"] / min(peer["seconds"] for peer in peers),
        "cpu_time_ratio": ours["cpu_seconds"] / min(peer["cpu_seconds"] for peer in peers),
        "memory_ratio": ours["extra_mb"] / min(peer["extra_mb"] for peer in peers),
        "is_exact": all(error < TOLERANCE for error in ours["errors"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cell", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help="one shape only: tokens, vocabulary, hidden width")
    parser.add_argument("--kind", choices=tuple(BETAS), help="one divergence only")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    if given.cell is not None:
        print(json.dumps(run_cell(given.cell, tuple(given.shape), given.kind, given.reference, given.repeats)))
        return
    if given.reference is not None:
        write_reference(given.reference, tuple(given.shape), given.kind)
        print("{}")
        return
    cells = []
    shapes = SHAPES if given.shape is None else (tuple(given.shape),)
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            for kind in BETAS if given.kind is None else (given.kind,):
                repeats = 1 if shape[0] * shape[1] > 10**8 else 3
                cell = measure(shape, kind, rounds=given.rounds, repeats=repeats, folder=Path(folder))
                cells.append(cell)
                print_cell(cell)
                write(given.out, cells, given.rounds)


def print_cell(cell: dict[str, Any]) -> None:
    print(f"{cell['tokens']} x {cell['vocabulary']} x {cell['hidden']}, {cell['kind']}")
    for name in CONTENDERS:
        found = cell[name]
        low, high = found["seconds_range"]
        worst = max(found["errors"].values())
        print(
            f"  {name:<12} {found['seconds']:7.2f} s ({low:.2f} to {high:.2f}) {found['cpu_seconds']:7.2f} s cpu "
            f"{found['extra_mb']:7.0f} MB, error {worst:.1e}"
        )
    print(
        f"  {cell['time_ratio']:.2f} of the fastest ({cell['cpu_time_ratio']:.2f} in cpu seconds), "
        f"{cell['memory_ratio']:.2f} of the smallest",
        flush=True,
    )


def write(path: Path, cells: list[dict[str, Any]], rounds: int) -> None:
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "trl", "liger-kernel", "transformers")}
        | {"python": platform.python_version()},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads_used": THREADS},
        "load_average": os.getloadavg()[1],
        "rounds": rounds,
        "cells": cells,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
