"""The composition root: a validated `RunConfig` becomes live objects, and a run from its first to its last line.

What the objects are made into is in `assembly`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.assembly import RunParts, Student, build_route, check_data_routes
from omniopd.config import RunConfig
from omniopd.diagnosis.run_diagnostics import Watched
from omniopd.errors import TeacherError
from omniopd.inputs import check_folders, check_teachers, load_prompts, open_text_teacher
from omniopd.logit_teachers import check_coverage, open_logit_teacher
from omniopd.logits.vllm_scores import VllmScores
from omniopd.loop import Observer, Run, train
from omniopd.method import Method, build_method
from omniopd.observers import PeriodicCheckpoint, PeriodicEvaluation, PromptFeedback, StepRecorder
from omniopd.progress import RunProgress
from omniopd.prompts import LearnsFromRollouts, build_sampler
from omniopd.records import Records, read_metrics
from omniopd.report.build import build_report
from omniopd.run_folder import RunFolder, read_json, write_json_atomic
from omniopd.spending import estimate_with
from omniopd.teachers.probe import ProbeResult
from omniopd.timing import StepTimer
from omniopd.types import Prompt, TokenSignal, Usage

if TYPE_CHECKING:
    from omniopd.evaluation import EvalResult

EVAL_SEED_OFFSET = 1_000_003
"""Evaluation draws from streams of its own, the same before and after training."""


def run_training(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, argv: Sequence[str] | None = None
) -> Path:
    """Run `config` from start to end, or on from its newest checkpoint, and return the run folder.

    Spends money when the teacher does. Ctrl-C and a teacher that stops answering leave a checkpoint behind.

    Raises:
        ConfigError, DataError: what the run file asks for cannot be done; nothing was spent.
        RunError: the run folder cannot be used.
        TeacherError, LearnerError: the run stopped; `resume` goes on.
    """
    method = build_method(config.method)
    check_teachers(config, method)
    check_folders(config, method)
    check_data_routes(config, method)
    folder = RunFolder.create(Path(config.output) / config.name, resume=resume, overwrite=overwrite)
    plain = config.model_dump(mode="json")
    if resume:
        folder.check_resumable(plain)
    folder.write_resolved(plain)
    folder.write_environment(list(argv or ["omniopd.run_training"]))
    with ExitStack() as stack:
        session = _Session(config, method, folder, stack)
        try:
            session.run(resume=resume)
        except (TeacherError, KeyboardInterrupt):
            session.stop_early()
            raise
    return folder.path


class _Session:
    """The live objects of one run. Everything that must be closed is on the exit stack."""

    def __init__(self, config: RunConfig, method: Method, folder: RunFolder, stack: ExitStack) -> None:
        import torch

        from omniopd.checkpoint import Checkpoints
        from omniopd.learner.learner import Learner
        from omniopd.learner.policy import Policy
        from omniopd.rollout.detokenize import Detokenizer
        from omniopd.rollout.embedded import EmbeddedEngine

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.method, self.folder = config, method, folder
        self.progress = stack.enter_context(RunProgress())
        self.timer = StepTimer(on_phase=self.progress.phase)
        # First, because a missing key or a wrong address should not wait for a large model to load.
        self.roles = method.roles(config)
        opened = {
            role.name: open_text_teacher(role, config, folder, stack, self.progress.message) for role in self.roles
        }
        self.text_teachers = {name: teacher for name, teacher in opened.items() if teacher is not None}
        self.policy = Policy.load(config.student)
        self.student = Student(self.policy, Detokenizer(self.policy.tokenizer))
        self.verifier, prompts, self.eval_prompts = load_prompts(config, self.policy, self.progress.message)
        self.prompts = build_sampler(config.data.sampler, prompts, config.seed)
        self.route = build_route(method.supervision)
        if self.route is not None:
            self.route.check(prompts)
        self.logit_teachers = {
            role.name: open_logit_teacher(
                role,
                config,
                self.policy,
                prompts,
                end_ids=self.student.end_ids,
                offload_folder=folder.teacher(role.folder).path / "offload",
                say=self.progress.message,
            )
            for role in self.roles
            if role.method.needs_distributions
        }
        self.learner = Learner(
            self.policy,
            config.learner,
            num_steps=config.steps,
            max_steps_off_policy=config.rollout.max_steps_off_policy,
            keep_reference=self.method.needs_reference,
            teachers={name: of.model for name, of in self.logit_teachers.items() if of.model is not None},
            save_offenders=self._save_offenders,
            timer=self.timer,
        )
        self.engine = EmbeddedEngine(self.policy, config.rollout)
        self.parts = RunParts(
            config=config,
            method=method,
            learner=self.learner,
            engine=self.engine,
            student=self.student,
            verifier=self.verifier,
            route=self.route,
            text_teachers=self.text_teachers,
            logit_teachers=self.logit_teachers,
            timer=self.timer,
        )
        for role in self.roles:
            if role.name in self.logit_teachers:
                of = self.logit_teachers[role.name]
                check_coverage(role, of, self.parts.behavior, prompts, self.progress.message)
        self.diagnostics = self.parts.diagnostics(self.progress.message)
        self.checkpoints = Checkpoints(folder, keep=config.keep_checkpoints)
        self.saver = PeriodicCheckpoint(
            every=config.save_every, checkpoints=self.checkpoints, state=self._state, prompts=self.prompts
        )
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0
        self._preview(prompts[0])
        self._estimate(prompts)

    def run(self, *, resume: bool) -> None:
        """Measure, train, measure again, and write the results."""
        start_step = self._resume() if resume else 0
        self.saver.begin(start_step)
        records = self._open_records(start_step)
        try:
            before = self._evaluate_once(records, 0, "before") if start_step == 0 else self._read_evaluation("before")
            self.started = time.perf_counter()
            asyncio.run(self._train(records, start_step))
            train_seconds = self.earlier_seconds + time.perf_counter() - self.started
            self.policy.save(self.folder.final)
            after = self._evaluate_once(records, self.config.steps, "after")
        finally:
            records.close()
        write_json_atomic(self.folder.summary, self._summary(before, after, train_seconds))
        build_report(self.folder.path)

    def stop_early(self) -> None:
        """Save what is done, so that a stopped run loses no finished step."""
        # Interrupted between the update and its records, the weights belong to no completed step; then the checkpoint
        # before stands.
        if self.saver.completed > 0 and self.learner.last_step == self.saver.completed:
            self.saver.save()
            self.progress.message(
                f"stopped after step {self.saver.completed}, which is saved; go on with --resume ({self.folder.path})"
            )

    async def _train(self, records: Records, start_step: int) -> None:
        config = self.config
        await self.engine.push_weights(self.learner.policy_version)
        self.progress.start(config.steps, start_step, spent=self._spent())
        observers: list[Observer] = [
            PromptFeedback(prompts=self.prompts),
            StepRecorder(
                records=records,
                progress=self.progress,
                timer=self.timer,
                teachers=tuple(self.text_teachers.values()),
                scorers=tuple(of.scorer for of in self.logit_teachers.values() if isinstance(of.scorer, VllmScores)),
                diagnostics=self.diagnostics,
            ),
        ]
        if self.eval_prompts and config.eval.every:

            def evaluate(step: int, when: str) -> EvalResult:
                return self._evaluate(records, step, when, k=config.eval.k_during)

            observers.append(PeriodicEvaluation(every=config.eval.every, evaluate=evaluate, timer=self.timer))
        # Last, so that a checkpoint stands for a step that is completely on record.
        observers.append(self.saver)
        run = Run(
            num_steps=config.steps,
            prompts_per_step=config.rollout.prompts_per_step,
            group_size=config.rollout.group_size,
            seed=config.seed,
            prompts=self.prompts,
            behavior=self.parts.behavior(),
            supervision=Watched(supervision=self.parts.supervision(), diagnostics=self.diagnostics),
            transforms=self.method.transforms,
            learner=self.learner,
            engine=self.engine,
            observers=observers,
            timer=self.timer,
        )
        self.timer.restart()
        try:
            await train(run, start_step=start_step)
        finally:
            await self.engine.aclose()
            for teacher in self.text_teachers.values():
                await teacher.aclose()
            for of in self.logit_teachers.values():
                if of.scorer is not None:
                    await of.scorer.aclose()

    def _evaluate_once(self, records: Records, step: int, when: str) -> EvalResult | None:
        if not self.eval_prompts:
            return None
        result = self._evaluate(records, step, when, k=self.config.eval.k)
        write_json_atomic(self._evaluation_file(when), result.to_json())
        return result

    def _evaluate(self, records: Records, step: int, when: str, *, k: int) -> EvalResult:
        from omniopd.evaluation import evaluate
        from omniopd.generation import Sampler

        settings = self.config.eval
        assert self.verifier is not None
        with self.policy.autocast():
            result = evaluate(
                self.eval_prompts,
                Sampler(self.policy.model, self.policy.tokenizer),
                self.verifier,
                k=k,
                temperature=settings.temperature,
                max_tokens=settings.max_tokens or self.config.rollout.max_tokens,
                seed=self.config.seed + EVAL_SEED_OFFSET,
                batch_size=self.config.rollout.batch_size,
                progress=lambda done, total: self.progress.phase(f"evaluate {when}", done, total),
            )
        row = {"step": step, "when": when, **result.summary()}
        records.evaluation(row)
        self.progress.evaluation(row)
        return result

    def _evaluation_file(self, when: str) -> Path:
        return self.folder.path / f"eval_{when}.json"

    def _read_evaluation(self, when: str) -> EvalResult | None:
        from omniopd.evaluation import EvalResult

        path = self._evaluation_file(when)
        return EvalResult.from_json(json.loads(path.read_text())) if path.is_file() else None

    def _open_records(self, start_step: int) -> Records:
        from omniopd.trackers import open_trackers

        config = self.config
        trackers = open_trackers(
            config.trackers,
            self.folder,
            run_name=config.name,
            config=config.model_dump(mode="json"),
            start_step=start_step,
        )
        return Records(self.folder, trackers, record_every=config.record_every)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "learner": self.learner.state_dict(),
            "seconds": self.earlier_seconds + time.perf_counter() - self.started,
        }
        return state

    def _resume(self) -> int:
        step = self.checkpoints.latest()
        Records(self.folder).truncate_after(step or 0)
        if step is None:
            self.progress.message("no checkpoint yet: starting from step 0")
            return 0
        state = self.checkpoints.load(step)
        self.learner.load_state_dict(state["learner"])
        self.diagnostics.begin(read_metrics(self.folder.metrics))
        if isinstance(self.prompts, LearnsFromRollouts):
            self.prompts.load_state_dict(state["prompts"])
        self.earlier_seconds = state["seconds"]
        self.progress.message(f"resuming after step {step}")
        return step

    def _teacher_names(self) -> list[str]:
        """Name every teacher once, whether it writes or is compared with."""
        asked = [role for role in self.roles if role.method.needs_teacher]
        return list(
            dict.fromkeys(
                self.text_teachers[role.name].id if role.name in self.text_teachers else role.teacher.spec
                for role in asked
            )
        )

    def _spent(self) -> Usage:
        """Return all that the run was billed, also for steps that a crash made it repeat."""
        from omniopd.teachers.ledger import Ledger

        ledgers = [files.ledger for files in self.folder.teachers if files.ledger.is_file()]
        return sum((Ledger(ledger).spent() for ledger in ledgers), Usage())

    def _save_offenders(self, signals: Sequence[TokenSignal]) -> Path:
        path = self.folder.path / "offending_rollouts.jsonl"
        path.write_text("".join(json.dumps(signal.to_json()) + "\n" for signal in signals))
        return path

    def _estimate(self, prompts: Sequence[Prompt]) -> None:
        """Write down what the run is expected to ask and cost; a resumed run keeps the first word."""
        lengths = [len(prompt.token_ids) for prompt in prompts]
        for role in self.roles:
            files = self.folder.teacher(role.folder)
            if files.estimate.is_file():
                continue
            probe = ProbeResult.from_json(read_json(files.probe)) if files.probe.is_file() else None
            expected = estimate_with(role.alone(self.config), role.method, prompt_tokens=lengths, probe=probe)
            if expected is not None:
                write_json_atomic(files.estimate, expected.to_json())

    def _preview(self, prompt: Prompt) -> None:
        from omniopd.templates import preview_student, preview_teacher

        self.progress.message(f"objective: {self.method.in_words()}")
        self.progress.message(f"aggregation: {self.config.learner.aggregation}")
        self.progress.message(preview_student(prompt))
        for role in self.roles:
            if role.method.needs_text_teacher:
                name = f"{role.name}: " if self.method.routes else ""
                self.progress.message(name + preview_teacher(prompt))

    def _summary(self, before: EvalResult | None, after: EvalResult | None, train_seconds: float) -> dict[str, Any]:
        from omniopd.evaluation import compare

        spent = self._spent()
        summary: dict[str, Any] = {
            "name": self.config.name,
            "seed": self.config.seed,
            "steps": self.config.steps,
            "method": self.method.in_words(),
            "teacher": ", ".join(self._teacher_names()) or None,
            "teacher_tokens": spent.output_tokens,
            "teacher_input_tokens": spent.input_tokens,
            "teacher_requests": spent.requests,
            "cost_usd": spent.cost_usd if spent.requests else 0.0,
            "train_seconds": round(train_seconds, 2),
        }
        if before is not None and after is not None:
            summary |= compare(before, after).summary()
        return summary
