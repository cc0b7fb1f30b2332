"""What a step leaves behind, derived by hand, and that a resumed run leaves the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import run_fixture
from omniopd.errors import ConfigError, DataError, MissingExtraError, RunError
from omniopd.records import (
    Records,
    compose_metrics,
    is_reproducible,
    read_evals,
    read_metrics,
    read_signals,
    usage_of,
)
from omniopd.run_folder import RunFolder
from omniopd.trackers import TRACKERS, open_trackers
from omniopd.types import Author, FinishReason, Missing, TokenSignal, Update, Usage

UPDATE = Update(
    step=1, policy_version=1, loss=0.5, grad_norm=2.0, learning_rate=1e-4, metrics={"loss/pg": 0.5, "tokens/pg": 16.0}
)


class ListTracker:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.num_closed = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", resume=False, overwrite=False)


def test_metrics_of_a_step_by_hand() -> None:
    long = replace(
        run_fixture.rollout("p0/0", text="12345678", is_correct=True),  # 8 characters and the end: 9 tokens
        entropies=(1.0,) * 9,
        finish_reason=FinishReason.LENGTH,
    )
    short = replace(run_fixture.rollout("p0/1", text="12", is_correct=False), entropies=(0.5,) * 3)
    unverified = replace(run_fixture.rollout("p0/2", text="12345", is_correct=None), entropies=None)  # 6 tokens
    audits = (
        run_fixture.audit(long, 0, 0, (1.0, 0.5, None, None), weight=0.7),  # score (1 + 0.5) / 2
        run_fixture.audit(long, 1, 8, (None, None, None, None)),
    )
    signals = [run_fixture.signal(long, audits), run_fixture.signal(short, ()), run_fixture.signal(unverified, ())]
    usage = Usage(requests=4, input_tokens=100, output_tokens=20, cost_usd=0.25, cached_requests=1)
    metrics = compose_metrics(UPDATE, signals, {"generate": 2.0, "step": 5.0}, usage, {"memory/peak_rss_mb": 10.0})
    assert metrics == {
        "rollout/count": 3,
        "rollout/accuracy": 0.5,  # 1 of the 2 that were verified
        "rollout/length_mean": 6.0,  # (9 + 3 + 6) / 3
        "rollout/truncated": pytest.approx(1 / 3),
        "rollout/entropy_mean": pytest.approx(0.875),  # (9 * 1.0 + 3 * 0.5) / 12
        "rollout/tokens_per_s": 9.0,  # 18 / 2.0
        "teacher/requests": 4,
        "teacher/cached": 1,
        "teacher/input_tokens": 100,
        "teacher/output_tokens": 20,
        "teacher/continuations": 8,
        "teacher/missing": 6,
        "teacher/missing/timeout": 6,
        "cost/usd": 0.25,
        "score/mean": 0.75,
        "score/audited_chunks": 1,
        "score/unaudited_chunks": 1,
        "signal/weight_mean": 0.7,
        "signal/weight_std": 0.0,
        "optim/loss": 0.5,
        "optim/grad_norm": 2.0,
        "optim/learning_rate": 1e-4,
        "loss/pg": 0.5,
        "tokens/pg": 16.0,
        "time/generate_s": 2.0,
        "time/step_s": 5.0,
        "memory/peak_rss_mb": 10.0,
    }


def test_weight_spread_is_that_of_the_population() -> None:
    source = run_fixture.rollout(text="0123456789abcdef")
    audits = tuple(run_fixture.audit(source, i, 8 * i, (1.0, 1.0), weight=w) for i, w in enumerate((0.2, 0.6)))
    metrics = compose_metrics(UPDATE, [run_fixture.signal(source, audits)], {}, Usage(), {})
    assert metrics["signal/weight_mean"] == pytest.approx(0.4)
    assert metrics["signal/weight_std"] == pytest.approx(0.2)  # both are 0.2 away from 0.4


def test_what_was_not_measured_is_none_and_what_was_not_asked_is_free() -> None:
    metrics = compose_metrics(UPDATE, [], {}, Usage(), {})
    unmeasured = {name for name, value in metrics.items() if value is None}
    assert unmeasured == {
        "rollout/accuracy",
        "rollout/length_mean",
        "rollout/truncated",
        "rollout/entropy_mean",
        "rollout/tokens_per_s",
        "score/mean",
        "signal/weight_mean",
        "signal/weight_std",
    }
    assert metrics["cost/usd"] == 0.0
    assert compose_metrics(UPDATE, [], {}, Usage(requests=1), {})["cost/usd"] is None


def test_only_the_student_counts_and_every_rollout_once() -> None:
    mine = run_fixture.rollout("p0/0", text="12", is_correct=False)
    rewritten = replace(run_fixture.rollout("p1/0", text="1234", is_correct=True), author=Author.TEACHER)
    signals = [TokenSignal(rollout=mine), TokenSignal(rollout=mine), TokenSignal(rollout=rewritten)]
    metrics = compose_metrics(UPDATE, signals, {}, Usage(), {})
    assert (metrics["rollout/count"], metrics["rollout/accuracy"]) == (1, 0.0)


def test_reasons_are_counted_apart() -> None:
    source = run_fixture.rollout()
    lost = run_fixture.audit(source, 0, 0, (None, 0.5, 0.5))
    first, *rest = lost.continuations.continuations
    refused = replace(first, missing=Missing.REFUSED)
    audits = (lost, replace(lost, continuations=replace(lost.continuations, continuations=(refused, *rest))))
    metrics = compose_metrics(UPDATE, [run_fixture.signal(source, audits)], {}, Usage(), {})
    counts = (metrics["teacher/missing"], metrics["teacher/missing/timeout"], metrics["teacher/missing/refused"])
    assert counts == (2, 1, 1)


def test_a_name_is_used_once_and_numbers_are_finite() -> None:
    with pytest.raises(DataError, match="optim/loss"):
        compose_metrics(UPDATE, [], {}, Usage(), {"optim/loss": 1.0})
    with pytest.raises(DataError, match="eval/x of step 1 is nan"):
        compose_metrics(UPDATE, [], {}, Usage(), {"eval/x": float("nan")})


def test_a_step_is_written_and_read_back(folder: RunFolder) -> None:
    tracker = ListTracker()
    records = Records(folder, [tracker])
    signals = run_fixture.step_signals(1)
    metrics = records.step(UPDATE, signals, {"generate": 1.0}, Usage())
    (row,) = read_metrics(folder.metrics)
    assert row.pop("time") > 0
    assert row == {"step": 1, **metrics}
    assert read_signals(folder.rollouts_of(1)) == signals
    assert tracker.rows == [(1, {name: value for name, value in metrics.items() if value is not None})]
    records.close()
    records.close()
    assert tracker.num_closed == 1


def test_line_separators_in_a_rollout_do_not_tear_the_record(folder: RunFolder) -> None:
    signals = [run_fixture.signal(run_fixture.rollout(text="a\u2028b\nc\x85d"), ())]
    Records(folder).step(UPDATE, signals, {}, Usage())
    assert read_signals(folder.rollouts_of(1)) == signals


def test_rollouts_are_recorded_every_so_many_steps(folder: RunFolder) -> None:
    records = Records(folder, record_every=2)
    for step in (1, 2, 3, 4):
        records.step(replace(UPDATE, step=step), run_fixture.step_signals(step, num_rollouts=1), {}, Usage())
    assert sorted(p.name for p in folder.rollouts.iterdir()) == ["step-000002.jsonl", "step-000004.jsonl"]
    with pytest.raises(DataError, match="record_every is 0"):
        Records(folder, record_every=0)


def evaluation(step: int, when: str, avg_at_k: float) -> dict[str, object]:
    return {"step": step, "when": when, "k": 4, "avg_at_k": avg_at_k, "greedy": None, "seconds": 3.0}


def test_an_evaluation_made_again_replaces_the_first(folder: RunFolder) -> None:
    tracker = ListTracker()
    records = Records(folder, [tracker])
    for row in (evaluation(0, "before", 0.3), evaluation(2, "during", 0.4), evaluation(2, "after", 0.5)):
        records.evaluation(row)
    records.evaluation(evaluation(2, "during", 0.45))
    rows = [(row["step"], row["when"], row["avg_at_k"]) for row in read_evals(folder.evals)]
    assert rows == [(0, "before", 0.3), (2, "after", 0.5), (2, "during", 0.45)]
    assert tracker.rows[0] == (0, {"eval/k": 4, "eval/avg_at_k": 0.3})


def write_steps(folder: RunFolder, steps: range) -> None:
    records = Records(folder)
    for step in steps:
        update = replace(UPDATE, step=step, loss=1.0 / step)
        signals = run_fixture.step_signals(step, num_rollouts=2)
        records.step(update, signals, {"generate": 0.1 * step}, Usage(requests=1, cost_usd=0.5))
        records.evaluation(evaluation(step, "during", step / 10))


def reproducible(path: Path) -> list[dict[str, object]]:
    return [{name: v for name, v in row.items() if is_reproducible(name)} for row in read_metrics(path)]


def test_a_resumed_run_leaves_the_records_of_a_straight_one(tmp_path: Path) -> None:
    straight, resumed = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "resumed")
    for folder in (straight, resumed):
        RunFolder.create(folder.path, resume=False, overwrite=False)
    write_steps(straight, range(1, 7))

    write_steps(resumed, range(1, 6))
    with resumed.metrics.open("a") as file:
        file.write('{"step": 6, "time": 17')  # the process died in the middle of a line
    Records(resumed).truncate_after(3)
    assert [row["step"] for row in read_metrics(resumed.metrics)] == [1, 2, 3]
    write_steps(resumed, range(4, 7))

    assert reproducible(resumed.metrics) == reproducible(straight.metrics)
    assert len(reproducible(straight.metrics)) == 6
    assert resumed.evals.read_bytes() == straight.evals.read_bytes()
    files = [{p.name: p.read_bytes() for p in folder.rollouts.iterdir()} for folder in (straight, resumed)]
    assert files[0] == files[1]
    assert len(files[0]) == 6


def test_truncating_nothing_is_fine(folder: RunFolder) -> None:
    Records(folder).truncate_after(0)
    assert list(folder.path.iterdir()) == []


def test_only_clocks_memory_and_payments_are_not_reproducible() -> None:
    metrics = compose_metrics(UPDATE, [], {"generate": 1.0}, Usage(), {"memory/peak_rss_mb": 1.0})
    names = {name for name in ("time", *metrics) if not is_reproducible(name)}
    assert names == {
        "time",
        "time/generate_s",
        "rollout/tokens_per_s",
        "memory/peak_rss_mb",
        "teacher/requests",
        "teacher/cached",
        "teacher/input_tokens",
        "teacher/output_tokens",
        "cost/usd",
    }


def test_a_damaged_record_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not a record"):
        read_metrics(path)
    path.write_text('{"rollout": {"id": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not a recorded rollout"):
        read_signals(path)
    with pytest.raises(RunError, match="does not exist"):
        read_signals(tmp_path / "step-000009.jsonl")
    assert read_metrics(tmp_path / "none.jsonl") == []
    with pytest.raises(RunError, match="cannot be read"):
        read_metrics(tmp_path)


def test_a_full_disk_is_a_run_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()  # stands for any refusal of the file system
    with pytest.raises(RunError, match="cannot write"):
        Records(folder, record_every=2).step(UPDATE, [], {}, Usage())


def test_usage_adds_up_and_an_unknown_price_stays_unknown() -> None:
    row = {"teacher/requests": 2, "teacher/input_tokens": 10, "teacher/output_tokens": 5, "teacher/cached": 1}
    paid = usage_of([{**row, "cost/usd": 0.5}, {**row, "cost/usd": 0.25}])
    assert paid == Usage(requests=4, input_tokens=20, output_tokens=10, cost_usd=0.75, cached_requests=2)
    assert usage_of([{**row, "cost/usd": 0.5}, {**row, "cost/usd": None}]).cost_usd is None
    assert usage_of([]) == Usage()


FAKE_TRACKER = """
calls = []
class Run:
    id = "abc"
    def log(self, metrics, step): calls.append(("log", step, metrics))
    def finish(self): calls.append(("finish",))
def init(**settings):
    calls.append(("init", settings))
    return Run()
def log(metrics, step): calls.append(("log", step, metrics))
def finish(): calls.append(("finish",))
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_online_trackers_continue_their_run(
    name: str, folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(FAKE_TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    for start_step in (0, 5):
        (tracker,) = open_trackers([name], folder, run_name="r", config={"seed": 1}, start_step=start_step)
        tracker.log(start_step + 1, {"optim/loss": 0.5})
        tracker.close()
    calls = sys.modules[name].calls
    monkeypatch.delitem(sys.modules, name)
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    assert calls[1] == ("log", 1, {"optim/loss": 0.5})
    fresh, again = calls[0][1], calls[3][1]
    assert (fresh["name"], fresh["config"]) == ("r", {"seed": 1})
    if name == "wandb":
        assert (fresh["id"], again["id"]) == (None, "abc")
    else:
        assert (fresh["resume"], again["resume"]) == ("never", "allow")


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_tracker_without_its_package_says_what_to_install(
    name: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"pip install {name}"):
        open_trackers([name], folder, run_name="r", config={})


def test_an_unknown_tracker_is_named(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"unknown mlflow; known are tensorboard, wandb, trackio"):
        open_trackers(["mlflow"], folder, run_name="r", config={})


def test_tensorboard_holds_what_was_logged_and_a_resume_supersedes(folder: RunFolder) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start_step, values in ((0, (1.0, 2.0, 3.0)), (1, (20.0,))):
        records = Records(
            folder, open_trackers(["tensorboard"], folder, run_name="r", config={}, start_step=start_step)
        )
        for step, loss in enumerate(values, start=start_step + 1):
            records.step(replace(UPDATE, step=step, loss=loss), [], {}, Usage())
        records.close()
    events = accumulators.EventAccumulator(str(folder.tensorboard), purge_orphaned_data=True)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("optim/loss")] == [(1, 1.0), (2, 20.0)]
    assert "score/mean" not in events.Tags()["scalars"]


def test_recorded_json_is_plain(folder: RunFolder) -> None:
    Records(folder).step(UPDATE, run_fixture.step_signals(3, num_rollouts=1), {}, Usage())
    line = json.loads(folder.rollouts_of(1).read_text())
    assert line["rollout"]["finish_reason"] == "stop"
    assert line["audits"][0]["chunk"]["index"] == 0
