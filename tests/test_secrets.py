"""A planted key, and every byte that failing runs leave behind: on disk, on the screen, in the traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loopback import Loopback, Received, Scripted, chat, error
from omniopd.cli import main
from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.teachers.resolve import refuse_keys

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-planted-7f3a9c1e5b2d4f60"
RUN = ["train", "quickstart", "--run-name", "run", "steps=2", "save_every=1", "eval.num_problems=4", "eval.k=2"]
RUN += ["rollout.prompts_per_step=2", "rollout.group_size=2", "teacher.serve=null", "teacher.max_attempts=2"]
RUN += ["teacher.max_missing_fraction=1.0", "teacher.continuation=chat"]


def traces(needle: str, *places: Path) -> list[str]:
    """Name every file below the places that holds the needle, compressed pages of SQLite included."""
    found = []
    for place in places:
        for path in place.rglob("*"):
            if path.is_file() and needle.encode() in path.read_bytes():
                found.append(str(path))
    return found


def run_with_key(
    tmp_path: Path, base_url: str, *words: str, before: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, whose whole output is kept."""
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "omniopd", "--traceback", *(before or RUN), f"output={tmp_path / 'runs'}"]
    return subprocess.run(
        [*command, f"teacher.spec=openai:m@{base_url}", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )


def leaking(received: Received) -> Scripted:
    """Answer with the key in every place that a server can put it."""
    number = len(json.dumps(received.body)) % 4
    if number == 0:
        return error(500, f"cannot serve {KEY}", headers={"x-echo": KEY})
    if number == 1:
        return Scripted(raw=b"{" + KEY.encode())
    answer = chat(f" the key is {KEY}, so")
    return Scripted(body={**answer.body, "id": KEY}, headers={"x-request-id": KEY})


@pytest.mark.parametrize("ending", ["goes on", "refused", "out of credit"])
def test_no_byte_of_a_run_holds_the_key(tmp_path: Path, ending: str) -> None:
    count = 0

    def script(received: Received) -> Scripted:
        nonlocal count
        count += 1
        if ending == "goes on" or count <= 14:
            return leaking(received)
        if ending == "refused":
            return error(401, f"Incorrect API key provided: {KEY}.", code="invalid_api_key")
        return error(429, f"no credit left for {KEY}", code="insufficient_quota")

    with Loopback(script) as server:
        done = run_with_key(tmp_path, server.base_url)
    assert all(received.headers["authorization"] == f"Bearer {KEY}" for received in server.received)
    assert count > 14, done.stderr
    # The run that was stopped shows its whole traceback.
    assert (done.returncode == 0) == (ending == "goes on"), done.stderr
    assert ("Traceback" in done.stderr) == (ending != "goes on")
    assert (tmp_path / "runs" / "run" / "ledger.sqlite").is_file()
    assert traces(KEY, tmp_path) == []
    assert KEY not in done.stdout + done.stderr
    assert traces("[key]", tmp_path) != [] or ending != "goes on"


def test_a_key_among_the_settings_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Loopback([chat("x")]) as server:
        done = run_with_key(tmp_path, server.base_url, f"teacher.extra_body={{user: '{KEY}'}}")
    assert done.returncode != 0
    assert "holds what looks like a key" in done.stderr
    assert KEY not in done.stdout + done.stderr
    assert traces(KEY, tmp_path) == []
    assert server.received == []


def test_keys_are_known_by_their_shape_and_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_keys("extra_body", {"metadata": {"a": ["fine", 3, None]}})
    with pytest.raises(ConfigError, match="extra_body holds what looks like a key"):
        refuse_keys("extra_body", {"headers": [{"x": "Bearer abcdefgh12345678"}]})
    monkeypatch.setenv("MY_OWN_TOKEN", "plainwordsecret")
    with pytest.raises(ConfigError) as caught:
        refuse_keys("teacher", {"a": {"b": "say plainwordsecret"}})
    assert "plainwordsecret" not in str(caught.value)


def test_a_key_in_the_address_is_refused_without_showing_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers", "check", f"openai:m@https://user:{KEY}@host/v1"]) == 2
    assert KEY not in capsys.readouterr().err


def test_a_key_in_the_place_of_the_model_is_refused_without_showing_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "plainwordsecret")
    for model in (KEY, "plainwordsecret"):
        assert main(["teachers", "check", f"openai:{model}@http://127.0.0.1:9/v1"]) == 2
        err = capsys.readouterr().err
        assert "looks like a key" in err and model not in err


def test_no_setting_is_made_for_a_key() -> None:
    assert not [name for name in RunConfig.model_fields["teacher"].annotation.model_fields if "key" in name]  # type: ignore[union-attr]
