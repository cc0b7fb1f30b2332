"""When a run folder may be used, and what a resumed run may change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from omniopd.errors import ConfigError, RunError
from omniopd.run_folder import RunFolder, config_differences, describe_environment, read_json, write_json_atomic


def existing_run(path: Path) -> RunFolder:
    folder = RunFolder.create(path, resume=False, overwrite=False)
    folder.write_resolved({"name": "r", "steps": 5})
    (folder.checkpoints / "step-000001").mkdir(parents=True)
    return folder


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "a", resume=False, overwrite=False)
    assert folder.path.is_dir()
    assert list(folder.path.iterdir()) == []


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, resume=False, overwrite=False).path == tmp_path


def test_an_existing_run_needs_a_decision(tmp_path: Path) -> None:
    existing_run(tmp_path / "a")
    with pytest.raises(RunError, match=r"--resume.*--overwrite.*another name"):
        RunFolder.create(tmp_path / "a", resume=False, overwrite=False)


def test_resume_keeps_the_files(tmp_path: Path) -> None:
    existing_run(tmp_path / "a")
    folder = RunFolder.create(tmp_path / "a", resume=True, overwrite=False)
    assert folder.read_resolved() == {"name": "r", "steps": 5}


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        RunFolder.create(tmp_path / "missing", resume=True, overwrite=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="is not a run"):
        RunFolder.create(tmp_path / "other", resume=True, overwrite=False)


def test_overwrite_empties_a_run_and_only_a_run(tmp_path: Path) -> None:
    existing_run(tmp_path / "a")
    target = tmp_path / "kept"
    target.mkdir()
    (target / "file").write_text("outside")
    (tmp_path / "a" / "link").symlink_to(target)
    folder = RunFolder.create(tmp_path / "a", resume=False, overwrite=True)
    assert list(folder.path.iterdir()) == []
    assert (target / "file").read_text() == "outside"

    (tmp_path / "a" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="refuses to delete"):
        RunFolder.create(tmp_path / "a", resume=False, overwrite=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "precious"


def test_overwrite_of_nothing_is_a_new_run(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path / "a", resume=False, overwrite=True).path.is_dir()


def test_both_flags_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of them"):
        RunFolder.create(tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize("below", [".", "runs"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="file"):
        RunFolder.create(tmp_path / "file" / below, resume=False, overwrite=False)


def test_the_layout_of_a_run() -> None:
    folder = RunFolder(Path("r"))
    assert folder.rollouts_of(12) == Path("r/rollouts/step-000012.jsonl")
    assert folder.checkpoint(50) == Path("r/checkpoints/step-000050")
    names = [folder.latest_checkpoint, folder.final, folder.summary, folder.report, folder.teacher().ledger]
    assert [str(p) for p in names] == [
        "r/checkpoints/latest.json",
        "r/final",
        "r/summary.json",
        "r/report.html",
        "r/ledger.sqlite",
    ]
    assert folder.tensorboard == Path("r/tensorboard")
    assert folder.teacher().server_log == Path("r/teacher_server.log")


def test_differences_are_named_by_dotted_key() -> None:
    old = {"steps": 5, "seed": 0, "eval": {"every": 1, "k": 4}, "transforms": [{"type": "clip"}], "lora": None}
    new = {"steps": 9, "seed": 1, "eval": {"every": 2, "k": 8}, "transforms": [], "lora": {"rank": 8}}
    # steps and eval.every are free; `lora` goes from None to a mapping: the key ends on one side, lora.rank appears.
    assert config_differences(old, new) == ["eval.k", "lora", "lora.rank", "seed", "transforms"]
    assert config_differences(old, old) == []


def test_free_keys_may_change() -> None:
    old = {"output": "a", "trackers": [], "save_every": 1, "keep_checkpoints": 1, "record_every": 1}
    new = {"output": "b", "trackers": ["wandb"], "save_every": 2, "keep_checkpoints": 3, "record_every": 5}
    assert config_differences(old, new) == []


def test_empty_and_absent_differ_and_a_tuple_equals_its_list() -> None:
    assert config_differences({"losses": {}}, {}) == ["losses"]
    assert config_differences({"betas": [0.9, 0.99]}, {"betas": (0.9, 0.99)}) == []


def test_budgets_of_several_teachers_are_kept_and_may_be_raised(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", resume=False, overwrite=False)
    folder.write_resolved({"teachers": {"a.b": {"budget_usd": 5.0, "temperature": 1.0}}})
    with pytest.raises(RunError, match=r"teachers\.a\.b\.budget_usd=5\.0; give it again or raise it"):
        folder.check_resumable({"teachers": {"a.b": {"budget_usd": None, "temperature": 1.0}}})
    folder.check_resumable({"teachers": {"a.b": {"budget_usd": 7.5, "temperature": 1.0}}})
    with pytest.raises(RunError, match=r"teachers\.a\.b\.temperature"):
        folder.check_resumable({"teachers": {"a.b": {"budget_usd": 7.5, "temperature": 0.5}}})


def test_a_budget_is_not_dropped_by_accident(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", resume=False, overwrite=False)
    folder.write_resolved({"teacher": {"budget_usd": 5.0}})
    with pytest.raises(RunError, match=r"teacher\.budget_usd=5\.0; give it again or raise it"):
        folder.check_resumable({"teacher": {"budget_usd": None}})
    folder.check_resumable({"teacher": {"budget_usd": 7.5}})


def test_a_changed_run_cannot_be_resumed(tmp_path: Path) -> None:
    folder = existing_run(tmp_path / "a")
    folder.check_resumable({"name": "r", "steps": 50})
    with pytest.raises(RunError, match="other settings: name;"):
        folder.check_resumable({"name": "s", "steps": 5})


@pytest.mark.parametrize(("content", "message"), [("- 1\n", "holds a list"), ("a: [1\n", "cannot be read")])
def test_a_damaged_run_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "resolved.yaml").write_text(content)
    with pytest.raises(RunError, match=message):
        RunFolder(tmp_path).read_resolved()


def test_an_atomic_write_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.json"
    write_json_atomic(path, {"x": 1})
    write_json_atomic(path, {"x": 2})
    assert read_json(path) == {"x": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json_atomic(path, {"x": float("nan")})
    assert read_json(path) == {"x": 1}
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*folder\.json"):
        write_json_atomic(tmp_path / "folder.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "folder.json"]


def test_a_torn_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x":')
    with pytest.raises(RunError, match=r"a\.json cannot be read"):
        read_json(tmp_path / "a.json")


def test_the_environment_keeps_the_starts_of_a_resumed_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", resume=False, overwrite=False)
    for argument in ("one", "two", "three"):
        folder.write_environment(["omniopd", argument])
    written = json.loads(folder.environment.read_text())
    assert written["argv"] == ["omniopd", "three"]
    assert [entry["argv"][1] for entry in written["earlier"]] == ["one", "two"]
    assert written["packages"]["pydantic"].split(".")[0] == "2"
    assert written["packages"]["vllm"] is None or written["packages"]["vllm"]
    assert written["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_revision_is_that_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_environment([])["git"]["current_directory"] is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-qm", "first")
    revision = git("rev-parse", "HEAD").strip()
    assert describe_environment([])["git"]["current_directory"] == {"revision": revision, "dirty": False}
    (tmp_path / "a.txt").write_text("2")
    assert describe_environment([])["git"]["current_directory"] == {"revision": revision, "dirty": True}


def test_no_git_program_means_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment([])["git"] == {"source": None, "current_directory": None}


def test_describing_the_environment_imports_no_heavy_package() -> None:
    script = (
        "import sys; from omniopd.run_folder import describe_environment; describe_environment([]);"
        "sys.exit(','.join({'torch', 'transformers', 'openai', 'yaml'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) in [(0, ""), (1, "")]
