"""Score 600 real solutions in one call: killed and resumed, then replayed from the ledger without a teacher.

    python benchmarks/score_gsm8k.py [PATH/gsm8k_lm_solutions_600.jsonl] [--teacher MODEL_DIR] [--rows N]

Each of 600 GSM8K problems comes with the solutions of four language models; row i is scored on model i mod 4. The
teacher is served by `omniopd serve`: a model folder, or by default a tiny model that is first trained for a minute on
the reference solutions. It writes text of the right kind and solves nothing; this measures the machinery, not the
rewards. The runs:

    whole     all rows in one call of `score_file`
    killed    the same into other files, in a process that is killed with SIGKILL halfway
    resumed   the same call again, to the end
    replayed  both ledgers, without interruption and with the server stopped: no request is sent, and each output must
              equal, byte for byte, that of the run which wrote the ledger, interrupted or not

`whole` and `resumed` buy their samples separately, and the last bits of the server's arithmetic depend on what else is
in its batch, so a few samples in thousands may differ; `chunks_unlike_whole` counts them, and more than 1% is an error.
`requests_in_ledger` are HTTP requests: what the ledger of the killed run has more than the other one was under way
at the kill. Writes `benchmarks/results/score_gsm8k.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omniopd.api import ChunkRewarder
from omniopd.score_file import ScoreSummary, score_file
from omniopd.teachers.cache import stats
from omniopd.teachers.local_server import LocalTeacherServer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_lm_solutions_600.jsonl"
RESULT = Path(__file__).parent / "results" / "score_gsm8k.json"
SETTINGS: dict[str, Any] = {
    "similarity": "0.5*edit + 0.5*numbers",
    "num_continuations": 2,
    "chunk_words": 12,
    "max_chunks": 4,
    "max_tokens": 24,
}
CONTEXT = 1024
TRAINING_STEPS = 200


def write_input(data: Path, target: Path, num_rows: int | None) -> int:
    """Write one row for each problem in the form that `score_file` reads, and return how many."""
    lines = data.read_text(encoding="utf-8").splitlines()[:num_rows]
    with target.open("w", encoding="utf-8") as file:
        for number, line in enumerate(lines):
            row = json.loads(line)
            models = sorted(name for name, value in row.items() if isinstance(value, dict))
            model = models[number % len(models)]
            answer = row[model]
            scored = {
                "id": number,
                "prompt": row["question"],
                "response": answer["solution"],
                "model": model,
                "is_correct": answer["is_correct"],
            }
            file.write(json.dumps(scored) + "\n")
    return len(lines)


def train_teacher(data: Path, folder: Path) -> None:
    """Train a tiny model and its tokenizer on questions with their reference solutions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['question']}\n\n{row['ground_truth']}" for row in rows]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    template = (
        "{{ messages | map(attribute='content') | join('\n\n') }}{% if add_generation_prompt %}{{ '\n\n' }}{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    ids = torch.tensor([token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TRAINING_STEPS):
        starts = torch.randint(len(ids) - 128, (16,))
        batch = torch.stack([ids[start : start + 128] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def score(source: Path, output: Path, teacher: str, options: dict[str, Any]) -> ScoreSummary:
    """Score all rows in one call."""
    with ChunkRewarder(teacher=teacher, teacher_options=options, **SETTINGS) as rewarder:
        return score_file(source, output, rewarder)


def kill_halfway(source: Path, output: Path, teacher: str, options: dict[str, Any], num_rows: int) -> tuple[int, float]:
    """Score in a process of its own and kill it once half of the rows are there.

    Returns how many there are and the seconds it took, those of starting Python included.
    """
    started = time.monotonic()
    arguments = json.dumps([str(source), str(output), teacher, {name: str(value) for name, value in options.items()}])
    child = subprocess.Popen([sys.executable, __file__, "--child", arguments])
    try:
        while child.poll() is None and num_lines(output) < num_rows // 2:
            time.sleep(0.05)
        if child.poll() is not None:
            sys.exit(f"the run ended with {child.returncode} before it could be killed")
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    return num_lines(output), time.monotonic() - started


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def chunk_records(path: Path) -> list[dict[str, Any]]:
    return [chunk for line in path.read_text(encoding="utf-8").splitlines() for chunk in json.loads(line)["chunks"]]


def measure(data: Path, model_dir: Path, folder: Path, num_rows: int | None) -> dict[str, Any]:
    """Do the four runs and return what they came to."""
    source = folder / "input.jsonl"
    rows = write_input(data, source, num_rows)
    outputs = {name: folder / f"{name}.jsonl" for name in ("whole", "killed")}
    ledgers = {name: folder / f"{name}.sqlite" for name in ("whole", "killed")}
    options = {"tokenizer_path": model_dir}
    with LocalTeacherServer(model_dir, log=folder / "server.log", device="cpu", threads=1) as server:
        teacher = f"local:{model_dir.name}@{server.base_url}"
        whole = score(source, outputs["whole"], teacher, {**options, "ledger": ledgers["whole"]})
        cut = {**options, "ledger": ledgers["killed"]}
        rows_at_kill, seconds_to_kill = kill_halfway(source, outputs["killed"], teacher, cut, rows)
        kept = outputs["killed"].read_bytes()
        resumed = score(source, outputs["killed"], teacher, cut)
    replayed = {
        name: score(source, folder / f"replayed-{name}.jsonl", f"replay:{ledger}", {})
        for name, ledger in ledgers.items()
    }
    chunks, resumed_chunks = chunk_records(outputs["whole"]), chunk_records(outputs["killed"])
    return {
        "rows": rows,
        "chunks": len(chunks),
        "coverage": sum(chunk["score"] is not None for chunk in chunks) / len(chunks),
        "whole": figures(whole),
        "rows_at_kill": rows_at_kill,
        "resumed": figures(resumed),
        "replayed": figures(replayed["whole"]),
        "replayed_killed": figures(replayed["killed"]),
        "kept_rows_at_kill": outputs["killed"].read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]),
        "replays_equal": {
            name: output.read_bytes() == (folder / f"replayed-{name}.jsonl").read_bytes()
            for name, output in outputs.items()
        },
        "chunks_unlike_whole": sum(a != b for a, b in zip(chunks, resumed_chunks, strict=True)),
        "requests_in_ledger": {name: stats(ledger).spent.requests for name, ledger in ledgers.items()},
        "seconds_interrupted_to_whole": round((seconds_to_kill + resumed.seconds) / whole.seconds, 2),
        "seconds_replayed_to_whole": round(replayed["whole"].seconds / whole.seconds, 4),
        "settings": SETTINGS,
    }


def problem_of(result: dict[str, Any]) -> str:
    """Say what must not be; empty when all is well."""
    if not all(result["replays_equal"].values()) or not result["kept_rows_at_kill"]:
        return "the outputs differ"
    if result["replayed"]["requests"] or result["replayed_killed"]["requests"]:
        return "a replay sent requests"
    if result["chunks_unlike_whole"] > result["chunks"] / 100:
        return "the resumed run has other scores than the whole one"
    return ""


def figures(summary: ScoreSummary) -> dict[str, Any]:
    return {
        "requests": summary.usage.requests,
        "cached_requests": summary.usage.cached_requests,
        "rows_resumed": summary.rows_resumed,
        "missing": dict(summary.missing),
        "seconds": round(summary.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--teacher", type=Path, metavar="MODEL_DIR", help="default: a tiny model, trained here")
    parser.add_argument("--rows", type=int, help="default: all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        source, output, teacher, options = json.loads(given.child)
        score(Path(source), Path(output), teacher, {name: Path(value) for name, value in options.items()})
        return
    if not given.data.is_file():
        sys.exit(f"{given.data} is not there; give the path of gsm8k_lm_solutions_600.jsonl (openai/grade-school-math)")
    with tempfile.TemporaryDirectory(prefix="omniopd-score-") as temporary:
        folder = Path(temporary)
        model_dir = given.teacher or folder / "tiny"
        if given.teacher is None:
            train_teacher(given.data, model_dir)
        result = measure(given.data, model_dir, folder, given.rows)
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        **result,
    }
    print(json.dumps(result, indent=1))
    if problem := problem_of(result):
        sys.exit(f"{problem}: nothing is written")
    if given.rows is None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
