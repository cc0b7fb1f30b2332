"""The loop with scripted parts: who is called, when, with what; and what watches it."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from omniopd import loop
from omniopd.checkpoint import Checkpoints
from omniopd.loop import Run, train
from omniopd.observers import PeriodicCheckpoint, PeriodicEvaluation, PromptFeedback, StepRecorder, peak_rss_mb
from omniopd.prompts import FrontierPrompts, ShuffledPrompts
from omniopd.run_folder import RunFolder
from omniopd.teachers.metered import MeteredTeacher
from omniopd.timing import StepTimer
from omniopd.types import Prompt, Rollout, StepContext, TokenSignal, Update, Usage


class Script:
    """Every part of a run in one, writing down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: list[StepContext] = []
        self.phases: list[str] = []

    def draw(self, step: int, n: int) -> Sequence[Prompt]:
        self.calls.append(("draw", step, n))
        return (tiny.prompt(f"p{step}"),)

    async def rollouts(self, prompts: Sequence[Prompt], ctx: StepContext, *, group_size: int) -> list[Rollout]:
        self.calls.append(("rollouts", [p.id for p in prompts], group_size))
        self.contexts.append(ctx)
        return [tiny.rollout("12", of=p, name=f"{p.id}/{i}") for p in prompts for i in range(group_size)]

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        self.calls.append(("signals", [r.id for r in rollouts]))
        self.contexts.append(ctx)
        return [TokenSignal(rollout=r) for r in rollouts]

    def transform(self, note: str) -> Any:
        def call(signals: Sequence[TokenSignal], ctx: StepContext) -> list[TokenSignal]:
            self.contexts.append(ctx)
            return [TokenSignal(rollout=s.rollout, notes=(*s.notes, note)) for s in signals]

        return call

    def update(self, step: int, signals: Sequence[TokenSignal]) -> Update:
        self.calls.append(("update", step, [s.notes for s in signals]))
        return Update(step=step, policy_version=10 * step, loss=0.0, grad_norm=1.0, learning_rate=1.0)

    async def push_weights(self, version: int) -> None:
        self.calls.append(("push", version))

    def observer(self, name: str) -> Any:
        script = self

        class Observer:
            def after_step(self, update: Update, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
                script.calls.append((name, update.step, len(signals)))
                script.contexts.append(ctx)

        return Observer()

    @contextmanager
    def timer(self, phase: str) -> Any:
        self.phases.append(phase)
        yield


def run_of(script: Any, **settings: Any) -> Run:
    defaults: dict[str, Any] = {
        "num_steps": 2,
        "prompts_per_step": 5,
        "group_size": 2,
        "seed": 7,
        "prompts": script,
        "behavior": script,
        "supervision": script,
        "transforms": (script.transform("a"), script.transform("b")),
        "learner": script,
        "engine": script,
        "observers": (script.observer("first"), script.observer("second")),
        "timer": script.timer,
    }
    return Run(**(defaults | settings))


def test_one_step_calls_each_part_once_in_order() -> None:
    script = Script()
    asyncio.run(train(run_of(script, num_steps=1)))
    assert script.calls == [
        ("draw", 0, 5),
        ("rollouts", ["p0"], 2),
        ("signals", ["p0/0", "p0/1"]),
        # Updates are counted from 1: the steps that are done.
        ("update", 1, [("a", "b"), ("a", "b")]),
        ("push", 10),
        ("first", 1, 2),
        ("second", 1, 2),
    ]
    assert set(script.contexts) == {StepContext(step=0, num_steps=1, seed=7)}
    assert script.phases == ["sync"]


def test_a_run_goes_on_where_it_stopped() -> None:
    script = Script()
    asyncio.run(train(run_of(script, num_steps=5), start_step=3))
    assert [c for c in script.calls if c[0] in ("draw", "push")] == [
        ("draw", 3, 5),
        ("push", 40),
        ("draw", 4, 5),
        ("push", 50),
    ]
    assert {ctx.step for ctx in script.contexts} == {3, 4}
    finished = Script()
    asyncio.run(train(run_of(finished, num_steps=5), start_step=5))
    assert finished.calls == []


def test_fresh_weights_arrive_before_the_next_rollouts() -> None:
    script = Script()
    asyncio.run(train(run_of(script)))
    names = [c[0] for c in script.calls]
    assert names.index("push") < [i for i, name in enumerate(names) if name == "rollouts"][1]


def test_errors_of_a_part_stop_the_loop() -> None:
    class Broken(Script):
        def update(self, step: int, signals: Sequence[TokenSignal]) -> Update:
            raise ValueError("broken")

    script = Broken()
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(train(run_of(script)))
    assert [c[0] for c in script.calls] == ["draw", "rollouts", "signals"]


def test_the_loop_knows_no_method() -> None:
    tree = ast.parse(inspect.getsource(loop))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    concrete = ("chunked", "verified", "logprob", "imitation", "signals", "learner", "method", "teachers", "scoring")
    assert not [m for m in imported if any(word in str(m) for word in concrete)]


# Observers


def update_of(step: int) -> Update:
    return Update(step=step, policy_version=step, loss=0.5, grad_norm=1.0, learning_rate=1e-6)


def watch(observer: Any, steps: int) -> None:
    for step in range(steps):
        observer.after_step(update_of(step + 1), [], StepContext(step=step, num_steps=steps))


def test_periodic_evaluation_leaves_the_last_step_to_the_final_one() -> None:
    seen: list[tuple[int, str]] = []

    def evaluate(step: int, when: str) -> Any:
        seen.append((step, when))

    watch(PeriodicEvaluation(every=2, evaluate=evaluate, timer=StepTimer()), 6)
    assert seen == [(2, "during"), (4, "during")]
    seen.clear()
    watch(PeriodicEvaluation(every=0, evaluate=evaluate, timer=StepTimer()), 6)
    assert seen == []


def test_evaluation_is_no_part_of_the_next_step() -> None:
    timer = StepTimer()

    def evaluate(step: int, when: str) -> Any:
        with timer("generate"):
            time.sleep(0.03)

    watch(PeriodicEvaluation(every=1, evaluate=evaluate, timer=timer), 2)
    found = timer.take()
    assert "generate" not in found and found["step"] < 0.03


STATELESS = ShuffledPrompts(prompts=(tiny.prompt(),), seed=0)


def test_checkpoints_come_every_so_often_and_after_the_last_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=9)
    states = iter(range(100))
    saver = PeriodicCheckpoint(
        every=2, checkpoints=checkpoints, state=lambda: {"number": next(states)}, prompts=STATELESS
    )
    watch(saver, 5)
    assert checkpoints.steps() == [2, 4, 5]
    assert (saver.completed, checkpoints.load(5)["number"]) == (5, 2)


def test_a_checkpoint_holds_the_prompts_of_finished_steps_only(tmp_path: Path) -> None:
    prompts = tuple(tiny.prompt(f"p{i}") for i in range(6))
    source = FrontierPrompts(prompts=prompts, seed=3, floor=0.01)
    source.observe([dataclasses.replace(tiny.rollout("1", of=p), is_correct=True) for p in prompts])
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=9)
    saver = PeriodicCheckpoint(every=100, checkpoints=checkpoints, state=dict, prompts=source)
    saver.after_step(update_of(3), [], StepContext(step=2, num_steps=9))
    before = source.state_dict()
    source.draw(3, 4)  # The next step draws, and is interrupted.
    assert source.state_dict() != before
    saver.save()
    assert checkpoints.load(3)["prompts"] == before


def test_a_stopped_run_saves_its_finished_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=9)
    saver = PeriodicCheckpoint(every=100, checkpoints=checkpoints, state=dict, prompts=STATELESS)
    saver.after_step(update_of(3), [], StepContext(step=2, num_steps=9))
    assert checkpoints.latest() is None
    saver.save()
    assert checkpoints.latest() == 3


def test_prompt_feedback_reaches_sources_that_learn() -> None:
    class Learns:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def draw(self, step: int, n: int) -> Sequence[Prompt]:
            return ()

        def observe(self, rollouts: Sequence[Rollout]) -> None:
            self.seen.extend(r.id for r in rollouts)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    learns, signals = Learns(), [TokenSignal(rollout=tiny.rollout("1"))]
    ctx = StepContext(step=0, num_steps=1)
    PromptFeedback(prompts=learns).after_step(update_of(1), signals, ctx)
    assert learns.seen == ["p0/0"]
    PromptFeedback(prompts=Script()).after_step(update_of(1), signals, ctx)


def test_step_recorder_hands_over_times_and_costs() -> None:
    told: dict[str, Any] = {}

    class Records:
        def step(
            self, update: Update, signals: Any, seconds: dict[str, float], usage: Usage, extra: dict[str, float]
        ) -> dict[str, float]:
            told.update(update=update, seconds=seconds, usage=usage, extra=extra)
            return {"progress/step": float(update.step)}

    class Progress:
        def step(self, row: dict[str, float]) -> None:
            told["row"] = row

    timer = StepTimer()
    with timer("learn"):
        pass
    teacher = MeteredTeacher(tiny.ScriptedTeacher(lambda request: ()))
    teacher._since_taken = Usage(requests=2)
    other = MeteredTeacher(tiny.ScriptedTeacher(lambda request: ()))
    other._since_taken = Usage(requests=3, input_tokens=5)
    recorder: Any = StepRecorder(records=Records(), progress=Progress(), timer=timer, teachers=(teacher, other))  # type: ignore[arg-type]
    watch(recorder, 1)
    assert told["usage"] == Usage(requests=5, input_tokens=5)
    assert (told["update"], told["row"]) == (update_of(1), {"progress/step": 1.0})
    assert set(told["seconds"]) == {"learn", "step"}
    assert teacher.take() == other.take() == Usage()
    # A Python process with torch in it: more than 50 MiB, less than 100 GiB.
    assert 50 < told["extra"]["memory/peak_rss_mb"] < 100_000
    without: Any = StepRecorder(records=Records(), progress=Progress(), timer=timer, teachers=())  # type: ignore[arg-type]
    watch(without, 1)
    assert told["usage"] == Usage()


@pytest.mark.parametrize(("platform", "expected"), [("linux", 2.0), ("darwin", 2 / 1024)])
def test_peak_memory_is_in_mebibytes_everywhere(
    platform: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omniopd import observers

    # Linux counts KiB, macOS bytes.
    monkeypatch.setattr(observers.sys, "platform", platform)
    monkeypatch.setattr(observers.resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": 2048}))
    assert peak_rss_mb() == pytest.approx(expected)


# Time


def test_phases_add_up_within_the_step() -> None:
    timer = StepTimer()
    for _ in range(2):
        with timer("teacher"):
            time.sleep(0.01)
    with pytest.raises(ValueError, match="x"), timer("score"):
        raise ValueError("x")
    found = timer.take()
    assert set(found) == {"teacher", "score", "step"}
    assert 0.02 <= found["teacher"] <= found["step"]
    assert set(timer.take()) == {"step"}
