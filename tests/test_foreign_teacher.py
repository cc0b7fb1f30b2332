"""A student and a teacher with different byte-level vocabularies, on text with answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byte_level import save_writer
from omniopd.cli import main
from omniopd.records import read_metrics, read_signals
from omniopd.run_folder import RunFolder
from omniopd.teachers.ledger import Ledger

TEXTS = [
    ("Tom has 3 apples and buys 14 more. How many?", "He has 3 apples. 3 + 14 = 17. The answer is 17."),
    (
        "A r\u00e9sum\u00e9 costs \u20ac5. What do two cost?",
        "Two cost 2 * \u20ac5 = \u20ac10. \u7b54\u6848\u662f 10. \U0001f600",
    ),
    ("She sold 48 clips in April and half as many in May.", "In May: 48 / 2 = 24 clips, so 48 + 24 = 72."),
]


@pytest.mark.parametrize("transport", ["completions", "chat"])
def test_text_alone_connects_two_vocabularies(tmp_path: Path, transport: str) -> None:
    student = save_writer(tmp_path / "student", TEXTS, vocabulary=320, hidden=64, seed=1)
    teacher = save_writer(tmp_path / "teacher", TEXTS, vocabulary=290, hidden=96, seed=2)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "answer": "17"}) + "\n" for text, _ in TEXTS), encoding="utf-8")
    words = ["train", "--student", str(student), "--teacher", "local:teacher", "--data", str(data)]
    words += [f"teacher.serve={teacher}", f"teacher.continuation={transport}", f"output={tmp_path}", "trackers=[]"]
    words += ["steps=2", "rollout.max_tokens=40", "rollout.prompts_per_step=3", "rollout.group_size=2"]
    words += ["method.supervision.chunker={type: entropy, chunk_tokens: 8, max_chunks: 2}"]
    words += ["teacher.max_missing_fraction=1.0"]
    assert main(words) == 0

    folder = RunFolder(tmp_path / "run")
    assert [row["tokens/soft"] > 0 for row in read_metrics(folder.metrics)] == [True, True]
    for signal in read_signals(folder.rollouts_of(2)):
        rollout = signal.rollout
        assert "".join(rollout.text_between(t, t + 1) for t in range(rollout.num_tokens)) == rollout.text
        for audit in signal.audits:
            exact = {c.is_exact for c in audit.continuations.continuations if c.text is not None}
            assert exact <= {transport == "completions" or not audit.chunk.prefix.strip()}
    spent = Ledger(folder.teacher().ledger).spent()
    assert spent.requests > 0 and spent.cost_usd == 0.0
