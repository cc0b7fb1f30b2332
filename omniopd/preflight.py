"""Can this teacher teach this student on these prompts? Checked on fresh rollouts, before a run spends days or money.

prompts of the run -> rollouts of the student -> verdicts -> each teacher: distributions | endings and text -> verdict

The prompts, their order and the first rollouts are those of the run itself. What a text teacher answers lies in the
run's own ledger: one budget then holds for the check and the run together, a repeated check pays nothing, and a run
that asks the same finds the answer there. A folder in which a run has not begun stays one that `train` takes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from omniopd.assembly import build_route, check_data_routes
from omniopd.config import RunConfig
from omniopd.diagnosis.evidence import ProbeCost, is_students_own, num_text_tokens
from omniopd.diagnosis.logit_match import LogitMatchReport, summarize_match
from omniopd.diagnosis.prefix_probe import (
    PrefixProbeSettings,
    PrefixReport,
    cut_positions,
    prefix_probe_cost,
    probe_prefixes,
)
from omniopd.diagnosis.preflight_report import NOT_ASKED, PreflightReport, PreflightSettings, TeacherCheck
from omniopd.diagnosis.text_match import TextMatchReport, TextMatchSettings, match_texts, text_match_cost
from omniopd.diagnosis.verdict import Verdict, judge_logits, judge_text
from omniopd.errors import DataError
from omniopd.estimate import chunk_shape
from omniopd.inputs import check_teachers, load_prompts, open_text_teacher
from omniopd.logit_teachers import LogitTeacher, open_logit_teacher
from omniopd.method import Method, Role, build_method
from omniopd.method_checks import access_of
from omniopd.method_settings import ChunkedSettings
from omniopd.progress import RunProgress, format_usd
from omniopd.prompts import build_sampler
from omniopd.run_folder import RunFolder
from omniopd.scoring.similarity import get_similarity
from omniopd.spending import checked_target
from omniopd.teachers.resolve import LOCAL_DIALECTS
from omniopd.templates import preview
from omniopd.timing import StepTimer
from omniopd.types import FinishReason, Prompt, Rollout, StepContext
from omniopd.verify import get_verifier

if TYPE_CHECKING:
    from omniopd.behavior.base import Verifier
    from omniopd.learner.matching import TokenDiagnostics
    from omniopd.learner.policy import Policy
    from omniopd.logits.reading import Read
    from omniopd.teachers.metered import MeteredTeacher


def run_preflight(config: RunConfig, settings: PreflightSettings | None = None) -> PreflightReport:
    """Check every teacher of a run on fresh rollouts of its student. Spends money where a text teacher does.

    Raises what `run_training` raises before its first step, and TeacherBudgetError; what was paid stays in the ledger.
    """
    settings = settings or PreflightSettings()
    method = build_method(config.method)
    check_teachers(config, method)
    check_data_routes(config, method)
    started = time.perf_counter()
    if not method.needs_teacher:
        return PreflightReport(name=config.name, student=config.student.model, settings=settings)
    with ExitStack() as stack:
        rollouts, teachers = asyncio.run(_Preflight(config, method, settings, stack).run())
    verdicts = [r.is_correct for r in rollouts if r.is_correct is not None]
    return PreflightReport(
        name=config.name,
        student=config.student.model,
        settings=settings,
        num_prompts=len({r.prompt.id for r in rollouts}),
        num_rollouts=len(rollouts),
        accuracy=sum(verdicts) / len(verdicts) if verdicts else None,
        mean_tokens=sum(r.num_tokens for r in rollouts) / len(rollouts),
        truncated=sum(r.finish_reason is FinishReason.LENGTH for r in rollouts) / len(rollouts),
        teachers=tuple(teachers),
        seconds=time.perf_counter() - started,
    )


class _Preflight:
    """The live objects of one check. Everything that must be closed is on the exit stack."""

    def __init__(self, config: RunConfig, method: Method, settings: PreflightSettings, stack: ExitStack) -> None:
        import torch

        from omniopd.generation import end_token_ids
        from omniopd.learner.learner import Learner
        from omniopd.learner.policy import Policy

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.settings, self.roles = config, settings, method.roles(config)
        self.progress = stack.enter_context(RunProgress())
        self.folder = RunFolder(Path(config.output) / config.name)
        self.asked = [role for role in self.roles if role.method.needs_text_teacher and settings.asks_for_text]
        self.text_teachers = self._open_text_teachers(stack)
        self.policy: Policy = Policy.load(config.student)
        self.verifier, prompts = training_prompts(config, self.policy, self.progress.message)
        sampler = build_sampler(config.data.sampler, prompts, config.seed)
        self.prompts = sampler.draw(0, min(settings.num_prompts, len(prompts)))
        self.route = build_route(method.supervision)
        if self.route is not None:
            self.route.check(prompts)
        self.reads: dict[str, list[str]] = {role.name: [] for role in self.roles}
        self.logit_teachers: dict[str, LogitTeacher] = {
            role.name: open_logit_teacher(
                role,
                config,
                self.policy,
                self.prompts,
                end_ids=end_token_ids(self.policy.model, self.policy.tokenizer),
                offload_folder=self.folder.teacher(role.folder).path / "offload",
                say=self.reads[role.name].append,
            )
            for role in self.roles
            if role.method.needs_distributions and not _is_stored(role)
        }
        self.learner = Learner(
            self.policy,
            config.learner,
            num_steps=config.steps,
            max_steps_off_policy=0,
            keep_reference=False,
            teachers={name: of.model for name, of in self.logit_teachers.items() if of.model is not None},
        )

    def _open_text_teachers(self, stack: ExitStack) -> dict[str, MeteredTeacher]:
        # Layers that wait on disk lie in the run's folder, too, which then has to be one that `train` takes.
        if not self.asked and all(role.teacher.weights.offload != "disk" for role in self.roles):
            return {}
        for role in self.asked:
            checked_target(role.alone(self.config))
        if not self.folder.resolved.is_file() or self.folder.has_never_begun:
            self.folder = RunFolder.create(self.folder.path, resume=False, overwrite=False)
            self.folder.write_resolved(self.config.model_dump(mode="json"))
        opened = {
            role.name: open_text_teacher(role, self.config, self.folder, stack, self.progress.message)
            for role in self.asked
        }
        return {name: teacher for name, teacher in opened.items() if teacher is not None}

    async def run(self) -> tuple[list[Rollout], list[TeacherCheck]]:
        ctx = StepContext(step=0, num_steps=self.config.steps, seed=self.config.seed)
        try:
            self.progress.phase("rollouts")
            rollouts = await self._draw(ctx)
            checks = []
            for role in self.roles:
                own = [r for r in rollouts if self.route is None or self.route(r.prompt, ctx) == role.name]
                checks.append(await self._check(role, own))
            return rollouts, checks
        finally:
            for teacher in self.text_teachers.values():
                await teacher.aclose()
            for of in self.logit_teachers.values():
                if of.scorer is not None:
                    await of.scorer.aclose()

    async def _draw(self, ctx: StepContext) -> list[Rollout]:
        from omniopd.behavior.student import StudentBehavior
        from omniopd.rollout.embedded import EmbeddedEngine

        writer = StudentBehavior(EmbeddedEngine(self.policy, self.config.rollout), StepTimer(), self.verifier)
        return await writer.rollouts(self.prompts, ctx, group_size=self.settings.num_rollouts)

    async def _check(self, role: Role, rollouts: Sequence[Rollout]) -> TeacherCheck:
        logits, prefix, text, usage = None, None, None, None
        left_out: list[str] = []
        verdicts: list[Verdict] = []
        reads = self.reads[role.name]
        if not role.method.needs_teacher:
            left_out.append("nothing to check: these prompts need no teacher")
        elif not rollouts:
            left_out.append("none of the prompts goes to this teacher; raise --prompts")
        else:
            if role.name in self.logit_teachers:
                logits = await self._match_logits(role, rollouts)
                verdicts.append(judge_logits(logits))
            elif _is_stored(role):
                left_out.append("distributions: what lies on disk is of other rollouts than the ones drawn here")
            if role.name in self.text_teachers:
                reads += preview(rollouts[0].prompt).splitlines()
                teacher = self.text_teachers[role.name]
                teacher.take()
                prefix, text = await self._ask(role, teacher, rollouts, left_out)
                usage = teacher.take()
                verdicts.append(judge_text(prefix, text))
            elif role.method.needs_text_teacher:
                left_out.append(NOT_ASKED)
        return TeacherCheck(
            name=role.name,
            spec=role.teacher.spec,
            reads=tuple(reads),
            num_rollouts=len(rollouts),
            logits=logits,
            prefix=prefix,
            text=text,
            usage=usage,
            left_out=tuple(left_out),
            verdicts=tuple(verdicts),
        )

    async def _match_logits(self, role: Role, rollouts: Sequence[Rollout]) -> LogitMatchReport:
        """Compare distributions where both are at hand, else what the teacher's scores tell."""
        from omniopd.learner.matching import top_set_size
        from omniopd.learner.terms import vocabulary_of

        self.progress.phase(f"distributions of {role.name}")
        teacher = self.logit_teachers[role.name]
        vocabulary = vocabulary_of(self.policy)
        k = top_set_size(self.config.diagnostics.top_k, vocabulary)
        reads = [(r, teacher.reader.read(r)) for r in rollouts]
        missing = Counter(str(read.missing) for _, read in reads if read.missing is not None)
        readable = [(r, read, read.reading) for r, read in reads if read.reading is not None]
        if teacher.model is not None:
            kept = [r for r, _, _ in readable]
            found = self.learner.match(kept, [read for _, read, _ in readable], teacher=role.name, k=k)
        else:
            assert teacher.scorer is not None
            is_foreign = any(read.alignment is not None for _, read, _ in readable)
            allowed = role.teacher.scoring.max_logprobs
            k = k if allowed < 0 else min(k, allowed)
            answers = await teacher.scorer.score([reading for *_, reading in readable], top_k=0 if is_foreign else k)
            missing.update(str(answer.missing) for answer in answers if answer.missing is not None)
            scored = [
                (r, read, answer.scores)
                for (r, read, _), answer in zip(readable, answers, strict=True)
                if answer.scores is not None
            ]
            kept = [r for r, _, _ in scored]
            if is_foreign:
                found = self._grouped([(r, read, scores.logprobs_T.tolist()) for r, read, scores in scored])
            else:
                found = self.learner.match(kept, [scores for *_, scores in scored], teacher=role.name, k=k)
        return summarize_match(
            kept,
            found,
            teacher_id=role.teacher.spec,
            top_k=k,
            vocabulary=vocabulary,
            masked_ids=teacher.masked_ids,
            missing=dict(missing),
        )

    def _grouped(self, scored: Sequence[tuple[Rollout, Read, Sequence[float]]]) -> list[TokenDiagnostics]:
        """Compare what two tokenizers cut differently, where only log-probs of the teacher's own tokens are known."""
        from omniopd.logits.alignment import group_logprobs

        found = []
        for (_, read, theirs), (ours, _) in zip(scored, self.learner.score([r for r, _, _ in scored]), strict=True):
            assert read.alignment is not None
            grouped = group_logprobs(read.alignment, ours, theirs)
            ratios = zip(grouped.advantages, grouped.weights, strict=True)
            found.append({"log_ratio": [value if weight else math.nan for value, weight in ratios]})
        return found

    async def _ask(
        self, role: Role, teacher: MeteredTeacher, rollouts: Sequence[Rollout], left_out: list[str]
    ) -> tuple[PrefixReport | None, TextMatchReport | None]:
        """Ask a text teacher, after saying what that can cost."""
        prefix_settings = PrefixProbeSettings(
            fractions=(),
            positions=cut_positions(rollouts),
            max_tokens=self.config.rollout.max_tokens,
            seed=self.config.seed,
        )
        text_settings = self._text_settings(role.method)
        can_finish = any(r.is_correct is not None and r.prompt.answer is not None for r in rollouts)
        has_text = any(is_students_own(r) and num_text_tokens(r) for r in rollouts)
        thinking = checked_target(role.alone(self.config)).card.thinking.headroom_tokens
        costs = []
        if can_finish:
            costs.append(prefix_probe_cost(rollouts, prefix_settings, thinking_tokens=thinking))
        else:
            left_out.append("prefix probe: the data has no answers, so nobody can tell whether an ending is right")
        if has_text:
            costs.append(text_match_cost(rollouts, text_settings, thinking_tokens=thinking))
        else:
            left_out.append("text overlap: no rollout has any text")
        self.progress.message(f"{role.label}: {cost_notice(role, self.config, costs)}")
        prefix = text = None
        if can_finish:
            assert self.verifier is not None
            prefix = await self._probe(teacher, rollouts, self.verifier, prefix_settings, left_out)
        if has_text:
            text = await match_texts(
                rollouts,
                teacher,
                EmbeddedSpans(self.policy, self.config),
                get_similarity(_similarity(role.method)),
                text_settings,
                progress=self._counts("text overlap"),
            )
        return prefix, text

    async def _probe(
        self,
        teacher: MeteredTeacher,
        rollouts: Sequence[Rollout],
        verifier: Verifier,
        settings: PrefixProbeSettings,
        left_out: list[str],
    ) -> PrefixReport | None:
        try:
            return await probe_prefixes(rollouts, teacher, verifier, settings, progress=self._counts("prefix probe"))
        except DataError as error:
            left_out.append(f"prefix probe: {error}")
            return None

    def _text_settings(self, method: Method) -> TextMatchSettings:
        """Ask as an audit of the run would, so that it finds the answers from prefixes that it comes to, too."""
        settings = method.supervision
        if not isinstance(settings, ChunkedSettings):
            return TextMatchSettings(num_prefixes=self.settings.num_prompts, seed=self.config.seed)
        return TextMatchSettings(
            num_prefixes=self.settings.num_prompts,
            num_spans=settings.num_continuations,
            span_tokens=settings.continuation_tokens or chunk_shape(method)[0],
            seed=self.config.seed,
        )

    def _counts(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress.phase(name, done, total)


class EmbeddedSpans:
    """Lets the student go on from prefixes with the settings of the run's rollouts. A `SpanSampler`."""

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self._policy = policy
        self._rollout = config.rollout

    async def __call__(
        self, prefixes: Sequence[tuple[int, ...]], *, n: int, max_tokens: int, seeds: Sequence[int]
    ) -> list[list[str]]:
        from omniopd.rollout.embedded import EmbeddedEngine

        engine = EmbeddedEngine(self._policy, self._rollout.model_copy(update={"max_tokens": max_tokens}))
        asked = [Prompt(id=str(i), messages=(), text="", token_ids=ids) for i, ids in enumerate(prefixes)]
        drawn = await engine.generate(asked, group_size=n, seeds=seeds, tag="span")
        return [[r.text for r in drawn[i * n : (i + 1) * n]] for i in range(len(prefixes))]


def training_prompts(
    config: RunConfig, policy: Policy, say: Callable[[str], None]
) -> tuple[Verifier | None, tuple[Prompt, ...]]:
    """Return the run's verifier and its training prompts; what the held-out problems decide of both needs no look."""
    data, rollout = config.data, config.rollout
    if data.eval is None:
        return load_prompts(config, policy, say)[:2]
    longest = max(rollout.max_tokens, config.eval.max_tokens or 0)
    changes = {
        "data": data.model_copy(update={"eval": None, "verifier": "none"}),
        "rollout": rollout.model_copy(update={"max_tokens": longest}),
    }
    _, prompts, _ = load_prompts(config.model_copy(update=changes), policy, say)
    return get_verifier(data.verifier, source=data.eval), prompts


def cost_notice(role: Role, config: RunConfig, costs: Sequence[ProbeCost]) -> str:
    """Say what a check asks at most, before it asks; the ledger may make it cheaper."""
    target = checked_target(role.alone(config))
    requests = sum(cost.num_requests for cost in costs)
    answers = sum(cost.num_answers for cost in costs)
    tokens = sum(cost.max_output_tokens for cost in costs)
    said = f"{role.teacher.spec} writes at most {tokens:,} tokens in {answers:,} answers to {requests:,} requests"
    if target.card.dialect in LOCAL_DIALECTS:
        return said
    limits = [
        f"{role.teacher.budget_usd:g} USD" if role.teacher.budget_usd is not None else "",
        f"{role.teacher.budget_tokens:,} tokens" if role.teacher.budget_tokens is not None else "",
        f"{role.teacher.budget_calls:,} calls" if role.teacher.budget_calls is not None else "",
    ]
    limit = " and ".join(filter(None, limits))
    limited = f"budget {limit}, for check and run together" if limit else "no budget limits it"
    cost = None if target.price is None else target.price.cost_usd(0, tokens)
    if cost == 0:
        return f"{said}, which cost nothing"
    price = "its price is unknown" if cost is None else f"up to {format_usd(cost)} besides what it reads"
    return f"{said}, {price}; {limited}"


def _similarity(method: Method) -> str:
    settings = method.supervision
    return settings.similarity if isinstance(settings, ChunkedSettings) else "edit"


def _is_stored(role: Role) -> bool:
    return role.method.needs_distributions and access_of(role.teacher.spec) in ("scores", "states")
