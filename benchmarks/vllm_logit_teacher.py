"""A real vLLM server on the CPU as the logit teacher of the quickstart world, beside the same weights in the trainer.

    python benchmarks/vllm_logit_teacher.py --vllm-python .venv-vllm/bin/python

The trainer talks to the server over HTTP and needs no vLLM; `make test-engines` makes an environment that has it. Each
white-box objective runs twice with the same seed through `omniopd train`: once with `hf:`, once with `vllm:`. Reported
are the gap between the two teachers' log-probs on the rollouts of the first step, and how long the two runs stay the
same: they differ by rounding alone, unless that once makes a sampled token another one; from then on they are two
samples of one procedure. A third run, `hf:` again, shows whether a run repeats itself at all.

Seconds are those of an idle machine only if it was idle; server and trainer share its cores.

Shape letters: T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from omniopd.logits.scores import Reading, SequenceTeacher, TokenScores
from omniopd.worlds.mini_math import model_path

RESULTS = Path(__file__).parent / "results"
NAME = "teacher"
IN_PROCESS = "hf:mini-math:teacher"
CONTEXT = 256
START_S = 180.0
DIFFERS = 1e-4
"""Two losses further apart than this, relative to the larger, are no rounding."""
OBJECTIVES: dict[str, list[str]] = {
    "sampled token": ["opd-sampled-token"],
    "teacher top-4 reverse KL": ["opd-top-k", "learner.losses.kl={type: teacher_topk_reverse_kl, k: 4}"],
    "student top-4 reverse KL": ["opd-top-k", "learner.losses.kl={type: student_topk_reverse_kl, k: 4}"],
    "reverse KL, whole vocabulary": ["opd-reverse-kl"],
}
"""Run file and what is changed in it."""


@contextlib.contextmanager
def serve(python: Path, folder: Path, log: Path) -> Iterator[str]:
    """Run vLLM's server on a model and yield its address. Exits with the end of its log when it does not come up."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # `vllm serve` of the CPU build looks for a distribution named vllm and dies; its module does not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "64"]
    command += ["--max-logprobs", "-1", "--generation-config", "vllm"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while ask(f"{url}/health") is None:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the vLLM server did not come up; the end of its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(url: str) -> bytes | None:
    """Return what a local address answers, None where it does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return bytes(response.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None


def train(folder: Path, name: str, words: Sequence[str], spec: str, *, steps: int, seed: int) -> Path:
    """Run `omniopd train` in a process of its own and return the run's folder."""
    command = [sys.executable, "-m", "omniopd", "train", *words, f"steps={steps}", f"seed={seed}", f"output={folder}"]
    command += ["--run-name", name, "--overwrite", "threads=1", "eval.every=0", "record_every=1", "trackers=[]"]
    command += [f"teacher.spec={spec}", "teacher.tokenizer=mini-math:teacher"]
    command += ["teacher.scoring.max_logprobs=-1", "teacher.scoring.requested_by=search"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return folder / name


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rollouts_of(run: Path, step: int) -> list[dict[str, Any]]:
    """Return the recorded rollouts of a step."""
    lines = (run / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line)["rollout"] for line in lines]


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), sys.float_info.min)


def figures(run: Path) -> dict[str, Any]:
    """Return what one run came to."""
    summary, rows = json.loads((run / "summary.json").read_text()), metrics_of(run)
    return {
        "avg_at_k": summary["avg_at_k"],
        "greedy": summary["greedy"],
        "first_loss": rows[0]["optim/loss"],
        "first_grad_norm": rows[0]["optim/grad_norm"],
        "last_loss": rows[-1]["optim/loss"],
        "seconds_per_step": statistics.median(row["time/step_s"] for row in rows),
        "teacher_seconds_per_step": statistics.median(row.get("time/teacher_s") or 0.0 for row in rows),
    }


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Say how long two runs stay the same."""
    rows = list(zip(metrics_of(ours), metrics_of(theirs), strict=True))
    loss_gaps = [relative(a["optim/loss"], b["optim/loss"]) for a, b in rows]
    norm_gaps = [relative(a["optim/grad_norm"], b["optim/grad_norm"]) for a, b in rows]
    differing = []
    for step in range(1, len(rows) + 1):
        pairs = zip(rollouts_of(ours, step), rollouts_of(theirs, step), strict=True)
        differing.append(sum(a["token_ids"] != b["token_ids"] for a, b in pairs))
    num_same = next((i for i, count in enumerate(differing) if count), len(rows))
    return {
        "first_loss_gap": loss_gaps[0],
        "first_grad_norm_gap": norm_gaps[0],
        "first_step_with_another_token": num_same + 1 if num_same < len(rows) else None,
        "rollouts_with_another_token_in_that_step": differing[num_same] if num_same < len(rows) else 0,
        "largest_loss_gap_before": max(loss_gaps[:num_same], default=None),
        "largest_grad_norm_gap_before": max(norm_gaps[:num_same], default=None),
        "first_step_with_loss_gap_above_1e-4": next((i + 1 for i, gap in enumerate(loss_gaps) if gap > DIFFERS), None),
        "rollouts_with_another_token_in_all": sum(differing),
        "rollouts": sum(len(rollouts_of(ours, step)) for step in range(1, len(rows) + 1)),
    }


def score_all(teacher: SequenceTeacher, readings: Sequence[Reading], vocabulary: int) -> list[TokenScores]:
    async def run() -> list[TokenScores]:
        try:
            scored = await teacher.score(readings, top_k=vocabulary)
        finally:
            await teacher.aclose()
        failed = [one.detail for one in scored if one.scores is None]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(scored)} completions have no record: {failed[0]}")
        return [one.scores for one in scored if one.scores is not None]

    return asyncio.run(run())


def whole(scores: TokenScores) -> Any:
    """Return log-probs [T, V] in the order of the ids."""
    assert scores.known == "vocabulary" and scores.ids_TK is not None and scores.logprobs_TK is not None
    order = np.argsort(scores.ids_TK, axis=1)
    return np.take_along_axis(scores.logprobs_TK, order, axis=1).astype(np.float64)


def logprob_gap(rollouts: Sequence[dict[str, Any]], spec: str) -> dict[str, Any]:
    """Score the same completions with both teachers, over the whole vocabulary."""
    from omniopd.learner.policy import load_frozen
    from omniopd.logits.model_scores import ModelScores
    from omniopd.logits.vllm_scores import open_vllm_scores

    readings = [Reading(prompt_ids=tuple(r["prompt"]["token_ids"]), token_ids=tuple(r["token_ids"])) for r in rollouts]
    weights = load_frozen(str(model_path("teacher")), device="cpu", dtype="float32")
    in_process = ModelScores(weights, id=IN_PROCESS)
    vocabulary = in_process.vocabulary
    ours = score_all(in_process, readings, vocabulary)
    theirs = score_all(open_vllm_scores(spec, vocab_size=vocabulary), readings, vocabulary)
    own = np.concatenate([a.logprobs_T.astype(np.float64) - b.logprobs_T for a, b in zip(ours, theirs, strict=True)])
    tables = [(whole(a), whole(b)) for a, b in zip(ours, theirs, strict=True)]
    ours_NV, theirs_NV = (np.concatenate(column) for column in zip(*tables, strict=True))
    top_ours, top_theirs = (np.argsort(-table, axis=1, kind="stable")[:, :4] for table in (ours_NV, theirs_NV))
    kl_N = (np.exp(ours_NV) * (ours_NV - theirs_NV)).sum(axis=1)
    return {
        "completions": len(readings),
        "tokens": len(own),
        "vocabulary": vocabulary,
        "own_tokens_largest": float(np.abs(own).max()),
        "own_tokens_mean": float(np.abs(own).mean()),
        "own_tokens_least_logprob": float(min(one.logprobs_T.min() for one in ours)),
        "vocabulary_largest": float(np.abs(ours_NV - theirs_NV).max()),
        "vocabulary_mean": float(np.abs(ours_NV - theirs_NV).mean()),
        "vocabulary_least_logprob": float(ours_NV.min()),
        "largest_kl": float(np.abs(kl_N).max()),
        "tokens_with_the_same_top_4_in_order": int((top_ours == top_theirs).all(axis=1).sum()),
    }


def describe(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| objective | avg@16 hf / vllm | greedy hf / vllm | first loss hf / vllm | largest relative loss gap "
        "before another token | first other token at step | s a step hf / vllm |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours, theirs, gap = result["hf"], result["vllm"], result["hf_against_vllm"]
        before = gap["largest_loss_gap_before"]
        lines.append(
            f"| {result['objective']} | {ours['avg_at_k']['after']:.1%} / {theirs['avg_at_k']['after']:.1%} "
            f"| {ours['greedy']['after']:.1%} / {theirs['greedy']['after']:.1%} "
            f"| {ours['first_loss']:.7g} / {theirs['first_loss']:.7g} | {'-' if before is None else f'{before:.1e}'} "
            f"| {gap['first_step_with_another_token'] or 'none'} "
            f"| {ours['seconds_per_step']:.2f} / {theirs['seconds_per_step']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), help="interpreter that has vLLM")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder for the runs; a temporary one unless given")
    args = parser.parse_args()
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = args.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        url = stack.enter_context(serve(args.vllm_python, model_path("teacher"), folder / "server.log"))
        start_seconds = time.perf_counter() - started
        version = json.loads(ask(f"{url}/version") or b"{}").get("version")
        spec = f"vllm:{NAME}@{url}/v1"
        gap: dict[str, Any] = {}
        for number, (objective, words) in enumerate(OBJECTIVES.items()):
            runs = {}
            for label, teacher in (("hf", IN_PROCESS), ("vllm", spec), ("hf-again", IN_PROCESS)):
                runs[label] = train(folder, f"{number}-{label}", words, teacher, steps=args.steps, seed=args.seed)
            gap = gap or logprob_gap(rollouts_of(runs["hf"], 1), spec)
            result = {
                "objective": objective,
                "hf": figures(runs["hf"]),
                "vllm": figures(runs["vllm"]),
                "hf_against_vllm": compare(runs["hf"], runs["vllm"]),
                "hf_against_hf_again": compare(runs["hf"], runs["hf-again"]),
            }
            results.append(result)
            print(f"{objective}: {result['hf_against_vllm']}", file=sys.stderr, flush=True)
    record = {
        **provenance(),
        "vllm": version,
        "trainer_has_vllm": find_spec("vllm") is not None,
        "steps": args.steps,
        "seed": args.seed,
        "server_start_seconds": round(start_seconds, 1),
        "wall_seconds": round(time.perf_counter() - started),
        "logprob_gap_nats": gap,
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vllm_logit_teacher.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(gap, indent=1))
    print(describe(results))


if __name__ == "__main__":
    main()
