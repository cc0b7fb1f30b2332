"""Whole runs in the quickstart world: every method through the same loop, from the command to the final weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from omniopd.cli import main
from omniopd.records import read_evals, read_metrics, read_signals
from omniopd.report.build import build_report
from omniopd.types import Author
from omniopd.worlds.mini_math import model_path

METHODS = {
    "teacher text": [],
    "paper": [
        "preset=paper",
        "method.supervision.chunker={type: entropy, chunk_tokens: 8, max_chunks: 3}",
        "method.supervision.num_continuations=4",
        "method.supervision.credit={type: smoothed, alpha: 1.0}",
        "method.supervision.similarity=edit",
        "method.supervision.anchor_beta=0.1",
        "eval.max_tokens=40",
    ],
    "sft": ["method.supervision={type: imitation}"],
    "grpo": ["method.supervision={type: verifier}"],
    "logits": ["method.supervision={type: logprob}", "teacher.spec=hf:mini-math:teacher", "teacher.serve=null"],
}


def train(output: Path, name: str, *overrides: str) -> Path:
    words = ["train", "quickstart", "--run-name", name, f"output={output}", "steps=2", "trackers=[]"]
    words += ["eval.num_problems=8", "eval.k=2", "rollout.prompts_per_step=4", "rollout.group_size=4", *overrides]
    assert main(words) == 0
    return output / name


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_end_to_end(tmp_path: Path, method: str) -> None:
    run = train(tmp_path, "run", *METHODS[method])
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["train_seconds"] > 0
    assert summary["avg_at_k"]["k"] == 2
    low, high = summary["avg_at_k"]["ci95"]
    gain = summary["avg_at_k"]["after"] - summary["avg_at_k"]["before"]
    assert low <= gain + 1e-9 and gain - 1e-9 <= high
    asks = method in ("teacher text", "paper", "sft")
    assert (summary["teacher_tokens"] > 0) == asks
    assert [row["when"] for row in read_evals(run / "evals.jsonl")] == ["before", "after"]

    trained = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    initial = AutoModelForCausalLM.from_pretrained(model_path("student")).state_dict()
    assert any(not torch.equal(trained[name], initial[name]) for name in initial)

    signals = read_signals(run / "rollouts" / "step-000002.jsonl")
    assert len(signals) == 16
    author = Author.TEACHER if method == "sft" else Author.STUDENT
    assert {signal.rollout.author for signal in signals} == {author}
    if method in ("teacher text", "paper"):
        assert all(audit.continuations.texts for signal in signals for audit in signal.audits)
    assert build_report(run).is_file()


def test_text_teacher_gets_the_prompt_and_the_prefix_and_nothing_of_the_chunk(tmp_path: Path) -> None:
    run = train(tmp_path, "run", "steps=1")
    for signal in read_signals(run / "rollouts" / "step-000001.jsonl"):
        for audit in signal.audits:
            chunk = audit.chunk
            assert signal.rollout.text.startswith(chunk.prefix + chunk.text)
            assert chunk.text == signal.rollout.text_between(chunk.start, chunk.end)


def test_evaluation_during_training_is_recorded_at_its_step(tmp_path: Path) -> None:
    run = train(tmp_path, "run", "steps=4", "eval.every=2", "eval.k_during=1", "method.supervision={type: verifier}")
    assert [(row["step"], row["when"], row["k"]) for row in read_evals(run / "evals.jsonl")] == [
        (0, "before", 2),
        (2, "during", 1),
        (4, "after", 2),
    ]


def test_lora_run_saves_merged_weights(tmp_path: Path) -> None:
    run = train(tmp_path, "run", "student.lora={rank: 4}", "method.supervision={type: logprob}", *METHODS["logits"][1:])
    names = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert not any("lora" in name for name in names)


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    losses = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = train(tmp_path, name, f"seed={seed}", "data.eval=null", "method.supervision={type: verifier}")
        losses[name] = [row["optim/loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


def test_existing_run_needs_a_word_and_resuming_with_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["data.eval=null", "method.supervision={type: verifier}"]
    train(tmp_path, "run", *quick)
    words = ["train", "quickstart", "--run-name", "run", f"output={tmp_path}", "trackers=[]"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "--resume" in told and "--overwrite" in told
    assert main([*words, "--resume", *quick, "learner.learning_rate=0.5"]) == 2
    assert "learner.learning_rate" in capsys.readouterr().err


def test_run_keeps_what_it_was_made_of(tmp_path: Path) -> None:
    run = train(tmp_path, "run", "data.eval=null", "method.supervision={type: verifier}")
    resolved = yaml.safe_load((run / "resolved.yaml").read_text())
    assert resolved["learner"]["aggregation"] == "sequence_mean_token_sum"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__


def test_raw_prompts_and_prefilled_chat_reach_the_teacher_as_the_same_text(tmp_path: Path) -> None:
    losses = []
    for transport in ("completions", "prefill"):
        run = train(tmp_path, transport, "data.eval=null", f"teacher.continuation={transport}")
        losses.append([row["optim/loss"] for row in read_metrics(run / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
