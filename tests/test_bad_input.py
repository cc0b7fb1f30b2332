"""What goes wrong for real users, typed as they would type it: exit code 2 and a message that says what to do next."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loopback import Loopback, Scripted, chat, completion
from omniopd.cli import main
from omniopd.worlds.mini_math import model_path

SMALL = (
    "steps=1",
    "data.eval=null",
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "trackers=[]",
    "teacher.max_attempts=1",
    "teacher.serve=null",
)


def train(folder: Path, *overrides: str) -> int:
    return main(["train", "quickstart", "--run-name", "run", f"output={folder}", *SMALL, *overrides])


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """The error as it was printed, without the line breaks of the terminal."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def scripted_teacher(text: str) -> Loopback:
    """A teacher that answers every prompt of a request with the same text."""

    def answer(request: object) -> Scripted:
        body = request.body  # type: ignore[attr-defined]
        if "messages" in body:
            return chat(*[text] * body.get("n", 1))
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        return completion(*[text] * (len(prompts) * body.get("n", 1)))

    return Loopback(answer)


def test_missing_api_key_names_the_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for _ in range(2):  # The run that failed to start does not stand in the way of the next one.
        assert train(tmp_path, "teacher.spec=openai:gpt-4o") == 2
        assert "OPENAI_API_KEY" in message(capsys)


def test_unreachable_teacher_names_the_address_before_any_rollout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "teacher.spec=local:teacher@http://127.0.0.1:9/v1") == 2
    assert "127.0.0.1:9" in message(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("text", ["", "\x00\x00\x00\x00"])
def test_teacher_that_answers_nothing_usable_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with scripted_teacher(text) as server:
        spec = f"teacher.spec=local:teacher@{server.base_url}"
        assert train(tmp_path, spec, "teacher.tokenizer=mini-math:teacher") == 2
    told = message(capsys)
    assert "no usable answer" in told and "teachers check" in told


def test_data_that_names_no_teacher_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["opd-several-teachers", f"output={tmp_path}", "method.supervision.by=teacher_id"]
    with Loopback(lambda request: chat("1")) as server:
        words.append(f"teachers.text={{spec: 'local:teacher@{server.base_url}', serve: null}}")
        assert main(["train", *words]) == 2
        assert server.received == []
    missing = "method.supervision.by is teacher_id, but no row of data.train (mini-math) has a column 'teacher_id'"
    assert missing in message(capsys)
    assert list(tmp_path.iterdir()) == []
    for command in (["train", *words, "--dry-run"], ["estimate", *words]):
        assert main(command) == 2
        assert missing in message(capsys)


def test_wrong_column_names_the_columns_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"promt": "1+1"}) + "\n")
    assert train(tmp_path, f"data.train={data}", "method.supervision={type: verifier}") == 2
    told = message(capsys)
    assert "questions.jsonl:1" in told and "promt" in told and "prompt" in told


def test_student_folder_without_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tmp_path / "student"
    shutil.copytree(model_path("student"), student)
    for file in student.glob("tokenizer*"):
        file.unlink()
    assert train(tmp_path, f"student.model={student}", "method.supervision={type: verifier}") == 2
    assert "has no tokenizer" in message(capsys)


def test_chunk_longer_than_every_rollout_names_both_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_teacher("48+37=85") as server:
        code = train(
            tmp_path,
            f"teacher.spec=local:teacher@{server.base_url}",
            "teacher.tokenizer=mini-math:teacher",
            "method.supervision.chunker={type: entropy, chunk_tokens: 39, max_chunks: 3}",
        )
    told = message(capsys)
    assert code == 2
    assert "chunk_tokens is 39" in told and "the longest of the 4 rollouts has" in told


def test_chunk_longer_than_a_rollout_may_be_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "method.supervision.chunker={type: entropy, chunk_tokens: 500, max_chunks: 3}") == 2
    told = message(capsys)
    assert "chunk_tokens is 500" in told and "rollout.max_tokens is 40" in told
    assert not (tmp_path / "run").exists()


def test_output_folder_that_is_not_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A plain file stands where the folder should be made: that is not writable for root either.
    (tmp_path / "blocked").write_text("")
    assert train(tmp_path / "blocked", "method.supervision={type: verifier}") == 2
    assert str(tmp_path / "blocked") in message(capsys)


def test_disk_that_is_full_during_a_checkpoint_keeps_the_run_resumable(tmp_path: Path) -> None:
    # A limit on the size of a file stands for the full disk: the checkpoint is the only large file of this run.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000));"
        "from omniopd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["train", "quickstart", "--run-name", "run", f"output={tmp_path}", *SMALL]
    command += ["method.supervision={type: verifier}", "rollout.group_size=8", "rollout.prompts_per_step=8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run([sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    told = " ".join(full.stderr.split())
    assert "cannot save the checkpoint of step 1" in told and "--resume" in told
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    again = subprocess.run(
        [sys.executable, "-m", "omniopd", *command, "--resume"], env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_prompts_that_do_not_fit_the_context_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "questions.jsonl"
    rows = [{"prompt": "12+13", "answer": 25}, {"prompt": "12+13" * 50, "answer": 25}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(tmp_path, f"data.train={data}", "data.verifier=mini-math", "method.supervision={type: verifier}") == 0
    assert "1 prompts, 1 too long" in message(capsys)
    assert main(["eval", "mini-math:student", "--data", str(data), "-k", "1", "--num-problems", "2"]) == 0
    assert train(tmp_path / "other", "rollout.max_tokens=300", "method.supervision={type: verifier}") == 2
    assert "rollout.max_tokens is 300, but the model's whole context has 256 tokens" in message(capsys)
