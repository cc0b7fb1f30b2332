"""The command line: what it accepts, what it hands on, what it says and which code it ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import omniopd
from loopback import Loopback, Received, Scripted, chat, error
from omniopd.cli import build_parser, main, parse
from omniopd.config import RunConfig
from omniopd.errors import RunError


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Catch what `train` hands to the run; the run leaves a summary behind."""
    calls: list[dict[str, Any]] = []

    def run_training(config: RunConfig, *, resume: bool, overwrite: bool, argv: list[str]) -> Path:
        calls.append({"config": config, "resume": resume, "overwrite": overwrite, "argv": argv})
        gain = {"k": 4, "before": 0.3, "after": 0.5, "gain": 0.2, "ci95": [0.15, 0.25]}
        summary = {
            "avg_at_k": gain,
            "teacher_tokens": 1234,
            "teacher_requests": 9,
            "cost_usd": 0.5,
            "train_seconds": 61,
        }
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        return tmp_path

    monkeypatch.setattr("omniopd.run.run_training", run_training)
    return calls


def test_teacher_student_and_data_are_enough(trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--teacher", "openai:gpt-4o", "--student", "Qwen/Qwen3-1.7B", "--data", "p.jsonl"]
    assert main(words) == 0
    config = trained[0]["config"]
    assert (config.teacher.spec, config.student.model, config.data.train) == (
        "openai:gpt-4o",
        "Qwen/Qwen3-1.7B",
        "p.jsonl",
    )
    assert (trained[0]["resume"], trained[0]["overwrite"]) == (False, False)
    assert trained[0]["argv"] == ["omniopd", *words]
    out = capsys.readouterr().out
    assert "30.0% -> 50.0%" in out
    assert "+20.0 points" in out
    assert "1,234" in out


@pytest.mark.parametrize(
    "words",
    [
        ["quickstart", "steps=2", "seed=5", "--run-name", "x", "--resume"],
        ["--resume", "quickstart", "--run-name", "x", "steps=2", "seed=5"],
        ["--run-name", "x", "quickstart", "--resume", "steps=2", "seed=5"],
        ["quickstart", "steps=9", "--run-name=x", "steps=2", "--resume", "seed=5"],
    ],
)
def test_files_settings_and_options_mix_in_any_order(trained: list[dict[str, Any]], words: list[str]) -> None:
    assert main(["train", *words]) == 0
    config = trained[0]["config"]
    assert (config.name, config.steps, config.seed) == ("x", 2, 5)
    assert config.student.model == "mini-math:student"
    assert trained[0]["resume"] is True


def test_a_teacher_flag_takes_the_place_of_a_served_teacher(trained: list[dict[str, Any]]) -> None:
    assert main(["train", "quickstart"]) == 0
    assert main(["train", "quickstart", "--teacher", "echo:demo"]) == 0
    assert trained[0]["config"].teacher.serve == "mini-math:teacher"
    assert (trained[1]["config"].teacher.spec, trained[1]["config"].teacher.serve) == ("echo:demo", None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", "quickstart", "--stepz", "3"], "unknown argument '--stepz'; settings are written key.path=value"),
        (["train", "--resume", "--overwrite"], "not allowed with argument"),
        (["train", "--learner.lr=1"], "settings are written key.path=value, without dashes"),
        (["eval", "m", "--data", "d", "extra"], "eval: unknown argument 'extra'"),
        (["eval", "m"], "--data"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "COMMAND"),
        (["teachers"], "ACTION"),
        (["score", "i", "--teach", "x"], "required: --teacher"),
    ],
)
def test_wrong_words_are_explained_with_exit_code_2(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_our_errors_are_one_message_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", "learner.lr=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "omniopd: learner.lr: unknown key (override 'learner.lr=1'). Did you mean learner.learning_rate?\n"
    )


@pytest.mark.parametrize("words", [["--traceback", "train", "nowhere"], ["train", "nowhere", "--traceback"]])
def test_traceback_on_request(words: list[str]) -> None:
    with pytest.raises(omniopd.ConfigError, match="no run file 'nowhere'"):
        main(words)


def test_other_errors_and_interrupts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: list[dict[str, Any]]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Path:
        raise RunError("the disk is full")

    monkeypatch.setattr("omniopd.run.run_training", fail)
    assert main(["train", "quickstart"]) == 2
    assert capsys.readouterr().err == "omniopd: the disk is full\n"

    def interrupt(*args: Any, **kwargs: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("omniopd.run.run_training", interrupt)
    assert main(["train", "quickstart"]) == 130
    assert "--resume goes on" in capsys.readouterr().err

    def bug(*args: Any, **kwargs: Any) -> Path:
        raise ZeroDivisionError

    # What nobody raised on purpose is a bug and keeps its traceback.
    monkeypatch.setattr("omniopd.run.run_training", bug)
    with pytest.raises(ZeroDivisionError):
        main(["train", "quickstart"])


def test_every_command_has_help_that_says_something() -> None:
    commands = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(commands) == {
        *("train", "estimate", "preflight", "eval", "score", "scores", "report", "serve"),
        *("teachers", "cache", "configs"),
    }
    for name, parser in commands.items():
        for action in parser._actions:
            assert action.help or action.metavar, f"{name} {action.dest} has no help"
        assert len(parser.description or "") > 20, name


def test_version_and_module_entry() -> None:
    run = subprocess.run([sys.executable, "-m", "omniopd", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"omniopd {omniopd.__version__}\n"


def test_teachers_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers", "list"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "OPENAI_API_KEY" in listed["openai"]
    assert "no key" in listed["vllm"]
    assert main(["teachers", "show", "vllm"]) == 0
    assert "id: vllm\n" in capsys.readouterr().out
    assert main(["teachers", "show", "opanai"]) == 2
    assert "did you mean 'openai'?" in capsys.readouterr().err


def test_teachers_check_prints_what_the_probe_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers", "check", "echo:demo"]) == 0
    out = capsys.readouterr().out
    assert "10 of 10 continuations usable" in out
    assert "agreement with itself" in out
    assert "4 requests" in out and "cost $0.00" in out
    # It writes shuffled words, so it knows none of the answers.
    assert "exact joint 0%" in out and "warning: few continuations" in out


def test_teachers_check_tries_every_way_that_is_possible(capsys: pytest.CaptureFixture[str]) -> None:
    def script(received: Received) -> Scripted:
        if "completions" in received.path and "prompt" in received.body:
            return error(404, "no such endpoint")
        open_turn = received.body["messages"][-1]["role"] == "assistant"
        return error(400, "no prefill here") if open_turn else chat(*["\n10"] * received.body.get("n", 1))

    with Loopback(script) as server:
        assert main(["teachers", "check", f"vllm:m@{server.base_url}"]) == 0
    out = capsys.readouterr().out
    assert "   prefill: 0 of 10 continuations usable" in out
    assert "-> chat-turn: 10 of 10" in out
    assert "10 x failed: HTTP 400: no prefill here" in out
    assert main(["teachers", "check", "echo:demo", "--extra-body", "[1]"]) == 2
    assert "--extra-body is no mapping" in capsys.readouterr().err


def test_estimate_names_calls_tokens_and_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "quickstart", "steps=3"]) == 0
    out = capsys.readouterr().out
    assert "3 steps" in out and "requests" in out and "output tokens" in out
    assert main(["estimate", "quickstart", "--teacher", "openai:gpt-4o", "teacher.tokenizer=null"]) == 0
    out = capsys.readouterr().out
    assert "price of openai:gpt-4o is unknown" in out
    assert "omniopd teachers check openai:gpt-4o" in out


def test_cache_commands_look_into_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, ledger = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "ledger.sqlite"
    source.write_text(json.dumps({"prompt": "What is 1+1?", "response": "one and one are two"}) + "\n")
    words = ["score", str(source), "--teacher", "echo:demo", "-o", str(target), "--ledger", str(ledger)]
    assert main([*words, "--chunk-words", "5", "--num-continuations", "3"]) == 0
    capsys.readouterr()
    assert main(["cache", "stats", str(ledger)]) == 0
    out = capsys.readouterr().out
    assert "echo:demo" in out and "3" in out
    exported = tmp_path / "answers.jsonl"
    assert main(["cache", "export", str(ledger), "-o", str(exported)]) == 0
    assert len(exported.read_text().splitlines()) == 3
    capsys.readouterr()
    assert main(["cache", "gc", str(ledger)]) == 2
    assert "--older-than-days" in capsys.readouterr().err
    assert main(["cache", "gc", str(ledger), "--teacher", "echo:demo", "--dry-run"]) == 0
    assert main(["cache", "gc", str(ledger), "--teacher", "echo:demo"]) == 0
    assert main(["cache", "export", str(ledger), "-o", str(exported)]) == 0
    assert exported.read_text() == ""
    assert main(["cache", "stats", str(tmp_path)]) == 0
    assert main(["cache", "stats", str(tmp_path / "none")]) == 2
    assert "there is no ledger" in capsys.readouterr().err


def test_teachers_check_without_a_key_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers", "check", "openai:gpt-4o"]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_configs_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"quickstart", "paper-qwen3-4b"}
    assert main(["configs", "show", "quickstart"]) == 0
    assert "model: mini-math:student" in capsys.readouterr().out


def test_score_writes_scored_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "What is 1+1?", "response": "one and one are two"}) + "\n")
    words = [
        "score",
        str(source),
        "--teacher",
        "echo:demo",
        "-o",
        str(target),
        "--chunk-words",
        "3",
        "--similarity",
        "rouge1",
    ]
    assert main(words) == 0
    [row] = [json.loads(line) for line in target.read_text().splitlines()]
    # Five words in chunks of three: two chunks.
    assert len(row["chunks"]) == 2
    assert "1 rows; 2 chunks scored now" in capsys.readouterr().out
    assert main(words) == 0
    assert "1 of them from an earlier call" in capsys.readouterr().out
    assert main([*words, "--overwrite"]) == 0
    assert "earlier call" not in capsys.readouterr().out


def test_eval_measures_and_compares(student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    words = ["eval", str(student_folder), "--data", "mini-math:held-out", "-k", "2", "--num-problems", "6"]
    words += ["--max-tokens", "30", "--device", "cpu"]
    assert main([*words, "-o", str(result)]) == 0
    assert "6 problems" in capsys.readouterr().out
    stored = json.loads(result.read_text())
    assert main([*words, "--compare", str(result)]) == 0
    out = capsys.readouterr().out
    assert f"avg@2   {stored['avg_at_k']:.1%}" in out
    # The same model with the same seed: no difference at all.
    assert "+0.0 points (95% interval +0.0 to +0.0)" in out


def test_serve_hands_over_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student_folder: Path) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("omniopd.serving.app.serve", lambda folder, **options: calls.append((folder, options)))
    announce = tmp_path / "address"
    words = [
        "serve",
        "mini-math:student",
        "--port",
        "0",
        "--threads",
        "1",
        "--announce",
        str(announce),
        "--exit-with",
        "7",
    ]
    assert main(words) == 0
    [(folder, options)] = calls
    assert Path(folder) == student_folder
    assert options == {
        "host": "127.0.0.1",
        "port": 0,
        "model_name": None,
        "device": "auto",
        "threads": 1,
        "announce": announce,
        "exit_with": 7,
    }


def test_report_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_parse_keeps_files_and_settings_in_order() -> None:
    args = parse(["train", "a.yaml", "--dry-run", "b.yaml", "x=1"])
    assert args.settings == ["a.yaml", "b.yaml", "x=1"]
    assert args.dry_run


def test_dry_run_prints_and_starts_nothing(
    trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--dry-run", "steps=7"]) == 0
    out = capsys.readouterr().out
    assert "steps: 7" in out
    assert "7 steps" in out
    assert trained == []
    assert list(tmp_path.iterdir()) == []


def test_scores_are_told_with_what_is_missing() -> None:
    from omniopd.commands import describe_scores
    from omniopd.score_file import ScoreSummary
    from omniopd.types import Usage

    usage = Usage(requests=3, input_tokens=1_500, output_tokens=20, cost_usd=None, cached_requests=2)
    text = describe_scores(
        ScoreSummary(
            rows=5, rows_resumed=0, chunks=2, missing={"refused": 2}, mean_score=None, usage=usage, seconds=65.0
        )
    )
    assert "5 rows; 2 chunks scored now, mean score none" in text
    assert "without a score: 2 refused" in text
    assert "3 requests (2 from the ledger), 1,500 tokens in, 20 out, cost $?, 1m 05s" in text
