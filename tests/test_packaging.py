"""The wheel as a user gets it: built, installed in a fresh environment, run. Slow; `make test-wheel`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command far away from the checkout and return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, as on a package index."""
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", target, ROOT, cwd=target)
    [path] = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with nothing but the wheel and its `train` extra."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", f"{wheel}[train]", cwd=folder)
    return folder


def test_wheel_holds_cards_configs_models_and_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"omniopd/teachers/cards/{path.name}" for path in (ROOT / "teachers").glob("*.yaml")}
    expected |= {f"omniopd/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    for model in ("student", "teacher"):
        folder = f"omniopd/worlds/mini_math/models/{model}"
        expected |= {f"{folder}/model.safetensors", f"{folder}/config.json", f"{folder}/tokenizer.json"}
    expected |= {
        str(path.relative_to(ROOT))
        for path in (ROOT / "omniopd").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names, sorted(expected - names)
    assert not [name for name in names if name.startswith(("tests/", "teachers/", "configs/", "runs/"))]


def test_command_line_works_away_from_the_checkout(installed: Path) -> None:
    omniopd = installed / "venv" / "bin" / "omniopd"
    python = installed / "venv" / "bin" / "python"
    where = run(python, "-c", "import omniopd; print(omniopd.__file__)", cwd=installed)
    assert where.startswith(str(installed)), where
    assert "openai" in run(omniopd, "teachers", "list", cwd=installed)
    assert "quickstart" in run(omniopd, "configs", "list", cwd=installed)
    assert "== Teacher calls, at most ==" in run(omniopd, "train", "quickstart", "--dry-run", cwd=installed)


def test_quickstart_trains_two_steps(installed: Path) -> None:
    omniopd = installed / "venv" / "bin" / "omniopd"
    settings = ["steps=2", "eval.num_problems=8", "eval.k=2", "learner.warmup_steps=0", "--run-name", "two"]
    run(omniopd, "train", "quickstart", *settings, cwd=installed)
    folder = installed / "runs" / "two"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["teacher_requests"] > 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    run(omniopd, "report", folder, cwd=installed)
    assert "<html" in (folder / "report.html").read_text()
