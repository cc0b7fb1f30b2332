"""Open-weight teachers of a run: how each reads the rollouts, who scores them, and what the learner gets of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omniopd.config import RunConfig, ScoringConfig, TeacherConfig
from omniopd.errors import ConfigError
from omniopd.logits.prompt_check import PromptCheck, prompt_check
from omniopd.logits.reading import (
    ForeignVocabulary,
    Reader,
    SameVocabulary,
    WithinContext,
    special_ids,
)
from omniopd.logits.score_folder import Manifest, check_stored
from omniopd.logits.scores import Reading, SequenceTeacher
from omniopd.logits.shards import WRITE_COMMAND
from omniopd.method import Role
from omniopd.method_checks import Access, access_of
from omniopd.method_settings import LogprobSettings
from omniopd.models import context_length, load_tokenizer
from omniopd.supervision.logprob import Wanted
from omniopd.types import Prompt, StepContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from omniopd.behavior.base import Behavior
    from omniopd.learner.divergences import Evidence
    from omniopd.learner.policy import LanguageModel, Policy
    from omniopd.learner.teachers import TeacherModel

WHOLE_VOCABULARY = -1
"""As a server's --max-logprobs has it."""
LARGEST_WHOLE = 4096
"""Tokens of a vocabulary whose whole distribution a server is asked for; beyond that it is megabytes a rollout."""
CHECKED_PROMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTeacher:
    """An open-weight teacher, ready."""

    reader: Reader
    scorer: SequenceTeacher | None
    """Gives log-probs of what was written. None: only hidden states are known."""
    model: TeacherModel | None
    """What the learner computes whole distributions from; None where only some log-probs can be had."""
    wanted: Wanted | None
    """What the learner's divergence must be told instead."""
    masked_ids: frozenset[int]


def open_logit_teacher(
    role: Role,
    config: RunConfig,
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    end_ids: Collection[int],
    offload_folder: Path,
    say: Callable[[str], None],
    feeds_learner: bool = True,
) -> LogitTeacher:
    """Open the teacher of a role and compare what both sides read, before anything is spent.

    Args:
        feeds_learner: whether the run's loss is to be computed from what the teacher says, which must then suffice.

    Raises:
        ConfigError: the teacher cannot serve the loss, or reads something that makes its log-probs meaningless.
        TeacherError: a server that cannot be reached, or whose log-probs depend on what else it computes.
    """
    settings, teacher = role.method.supervision, role.teacher
    access = access_of(teacher.spec)
    assert isinstance(settings, LogprobSettings) and access is not None
    name = teacher.spec.partition(":")[2]
    masked = special_ids(policy.tokenizer, settings.mask_tokens)
    tokenizer = _teacher_tokenizer(role, access, name)
    reader = _reader(role, policy.tokenizer, tokenizer, end_ids)
    if tokenizer is not None:
        check = compare_prompts(role, prompts[0], policy.tokenizer, tokenizer, end_ids=end_ids)
        _refuse_other_text(role, check, say)
    scorer: SequenceTeacher | None
    model: TeacherModel | None = None
    vocabulary = policy.model.config.get_text_config().vocab_size
    most = vocabulary
    if access == "hf":
        from omniopd.logits.model_scores import ModelScores

        weights = load_weights(config, teacher, name, offload_folder)
        context = context_length(weights.model.config)
        if context is not None:
            reader = WithinContext(reader, context)
        # A teacher of the same vocabulary may have more rows than the student, to pad its table.
        num_tokens = vocabulary if settings.alignment == "none" else None
        scorer = ModelScores(weights, id=teacher.spec, vocabulary=num_tokens, context=context)
        model = _model(role, config, policy, weights, tokenizer, end_ids)
    elif access == "states":
        from omniopd.learner.teachers import StoredTeacher
        from omniopd.logits.stored_states import StoredStates

        scorer, model = None, StoredTeacher(StoredStates(name, device=policy.device))
    elif access == "scores":
        from omniopd.logits.stored_scores import StoredScores

        scorer = StoredScores(name)
        most = most_named(teacher, scorer.manifest, vocabulary)
    else:
        assert tokenizer is not None
        scorer = _open_server(teacher, vocabulary, samples_of(prompts, tokenizer), say)
        most = most_named(teacher, None, vocabulary)
    wanted = None
    if feeds_learner and model is None and role.method.uses_divergence:
        wanted = wanted_of(evidence_of(config), teacher, vocabulary, most=most)
        check_top_k(wanted, most, role, access)
    return LogitTeacher(reader=reader, scorer=scorer, model=model, wanted=wanted, masked_ids=masked)


def check_coverage(
    role: Role,
    teacher: LogitTeacher,
    behavior: Callable[[], Behavior],
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
) -> None:
    """Say how many of the data's answers the folder of a stored teacher has. Does nothing for any other teacher.

    Args:
        behavior: makes the run's own writer of rollouts, which for a stored teacher gives the data's answers.

    Raises:
        ConfigError: the folder lacks too many of them.
        DataError: no prompt has a worked response.
    """
    manifest = check_stored(role.teacher.spec)
    if manifest is None:
        return
    from omniopd.behavior.dataset import DatasetBehavior
    from omniopd.logits.stored_scores import StoredScores
    from omniopd.logits.stored_states import StoredStates

    writer, folder = behavior(), role.teacher.spec.partition(":")[2]
    assert isinstance(writer, DatasetBehavior)  # Stored answers are of fixed ones, which `build_method` saw to.
    # Whether an answer is right plays no part here.
    writer, only = replace(writer, verifier=None), StepContext(step=0, num_steps=1, seed=0)
    rollouts = asyncio.run(writer.rollouts(prompts, only, group_size=1))
    stored = StoredScores(folder) if manifest.kind == "scores" else StoredStates(folder)
    readings = [teacher.reader.read(rollout).reading for rollout in rollouts]
    there = sum(reading is not None and reading in stored for reading in readings)
    total = f"{len(rollouts):,} answers of the data"
    if there == len(rollouts):
        say(f"{role.label}: {folder} has all {total}")
        return
    kept = f"--states --dtype {manifest.dtype}" if manifest.kind == "states" else f"--top-k {manifest.top_k}"
    advice = (
        f"write them with `{WRITE_COMMAND} RUN_FILE {role.label}.spec={manifest.teacher} --out {folder} {kept}` and "
        "the data, chat format and rollout.max_tokens of this run"
    )
    limit = 0.0 if manifest.kind == "states" else role.teacher.max_missing_fraction
    if len(rollouts) - there > limit * len(rollouts):
        raise ConfigError(
            f"{role.label}: {folder} has {there:,} of the {total}, and the run would stop at the others "
            f"({role.label}.max_missing_fraction is {limit:g}); {advice}"
            if limit
            else f"{role.label}: {folder} has {there:,} of the {total}, and all of them are needed; {advice}"
        )
    say(
        f"{role.label}: WARNING: {folder} has {there:,} of the {total}; nothing is learned from the others, and a step "
        f"that lacks more than {role.label}.max_missing_fraction={limit:g} of its answers stops the run; {advice}"
    )


def load_weights(config: RunConfig, teacher: TeacherConfig, name: str, offload_folder: Path) -> LanguageModel:
    """Load an open-weight teacher into this process. Raises ConfigError and MissingExtraError."""
    from omniopd.learner.policy import load_frozen

    settings = teacher.weights
    return load_frozen(
        name,
        device=settings.device or config.student.device,
        dtype=settings.dtype or config.student.dtype,
        offload=settings.offload,
        quantization=settings.quantization,
        offload_folder=offload_folder,
    )


def samples_of(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Reading]:
    """Return a few prompts as something to score: the second half of each after its first, in the teacher's tokens."""
    found = []
    for prompt in prompts[:CHECKED_PROMPTS]:
        ids = tuple(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
        half = len(ids) // 2
        if half:
            found.append(Reading(prompt_ids=ids[:half], token_ids=ids[half:]))
    return found


def wanted_of(evidence: Evidence, teacher: TeacherConfig, vocabulary: int, *, most: int) -> Wanted:
    """Return what a teacher without weights here is asked for, so that the learner's divergence can be computed.

    Args:
        most: tokens that the teacher names at a position, for the advice.

    Raises ConfigError for a loss that needs more than such a teacher gives.
    """
    if evidence.kind == "token":
        return Wanted()
    if evidence.kind == "student_top_k":
        return Wanted(candidates=min(evidence.k, vocabulary))
    if evidence.kind == "teacher_top_k":
        return Wanted(top_k=min(evidence.k, vocabulary))
    if vocabulary > LARGEST_WHOLE:
        raise ConfigError(
            f"learner.losses.kl needs the teacher's whole distribution over {vocabulary:,} tokens, but "
            f"{teacher.spec!r} gives the log-probs of some; {_ways_out(teacher.spec, most)}"
        )
    return Wanted(top_k=vocabulary)


def most_named(teacher: TeacherConfig, manifest: Manifest | None, vocabulary: int) -> int:
    """Return how many tokens a folder (`manifest`), or else a server, names at each position at most."""
    if manifest is not None:
        return manifest.top_k or 0
    most = teacher.scoring.max_logprobs
    return vocabulary if most == WHOLE_VOCABULARY else most


def check_top_k(wanted: Wanted, most: int, role: Role, access: Access) -> None:
    """Raise ConfigError where the loss reads more tokens at a position than the teacher names."""
    if wanted.top_k <= most:
        return
    more = (
        f"start the server with --max-logprobs {wanted.top_k} and set {role.label}.scoring.max_logprobs"
        if access == "vllm"
        else f"write another folder with --top-k {wanted.top_k}"
    )
    raise ConfigError(
        f"learner.losses.kl reads {wanted.top_k:,} tokens of the teacher at each position, but {role.teacher.spec!r} "
        f"names {most:,}; {more}, or {_ways_out(role.teacher.spec, most)}"
    )


def _ways_out(spec: str, most: int) -> str:
    """Return what to do about a loss that reads more of a teacher than the `most` tokens it names at a position."""
    access = access_of(spec)
    # Of a server that names all of a large vocabulary, so many are what it can send in reasonable time.
    k = most if most <= LARGEST_WHOLE else ScoringConfig().max_logprobs
    ways = [f"use learner.losses.kl={{type: teacher_topk_reverse_kl, k: {k}}}"] if k >= 2 else []
    if access == "scores":
        ways.append(
            f"write the teacher's hidden states with `{WRITE_COMMAND} --states` and use teacher.spec=states:OUT"
        )
    else:
        ways += ["use method.supervision.objective: sampled", "teacher.spec=hf:MODEL"]
    return ", or ".join(ways)


def evidence_of(config: RunConfig) -> Evidence:
    """Return what the loss of the `kl` stream must know of the teacher at each token."""
    from omniopd.learner.divergences import TeacherDivergence
    from omniopd.learner.losses import build_losses

    loss = build_losses(config.learner.losses)["kl"]
    assert isinstance(loss, TeacherDivergence)  # Other vocabularies need weights, which `check_inputs` saw to.
    return loss.evidence


def _teacher_tokenizer(role: Role, access: Access, name: str) -> PreTrainedTokenizerBase | None:
    """Return the teacher's tokenizer. Raises ConfigError where the run does not say what it is, and must."""
    if access == "hf":
        return load_tokenizer(role.teacher.tokenizer or name)
    if role.teacher.tokenizer is not None:
        return load_tokenizer(role.teacher.tokenizer)
    settings = role.method.supervision
    assert isinstance(settings, LogprobSettings)
    if access == "vllm" or role.teacher.chat_format == "teacher" or settings.alignment == "groups":
        raise ConfigError(
            f"{role.label}.tokenizer is not set, so nobody can tell whether {role.teacher.spec!r} reads the student's "
            "tokens and its chat format; set it to the teacher's folder or name"
        )
    return None  # What lies on disk was compared when it was written.


def _reader(
    role: Role,
    ours: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None,
    end_ids: Collection[int],
) -> Reader:
    settings = role.method.supervision
    assert isinstance(settings, LogprobSettings)
    if settings.alignment == "groups":
        assert theirs is not None
        return ForeignVocabulary(ours, theirs, student_end_ids=end_ids)
    return SameVocabulary(role.teacher.chat_format, theirs)


def compare_prompts(
    role: Role,
    prompt: Prompt,
    ours: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    *,
    end_ids: Collection[int] | None = None,
) -> PromptCheck:
    """Compare a question as the student and as the open-weight teacher of a role read it.

    Args:
        end_ids: what ends a completion of the student; None: its tokenizer's end token.
    """
    settings = role.method.supervision
    assert isinstance(settings, LogprobSettings)
    is_foreign = settings.alignment == "groups"
    return prompt_check(
        prompt,
        ours,
        theirs,
        prompt_format="teacher" if is_foreign else role.teacher.chat_format,
        is_foreign=is_foreign,
        student_end_ids=end_ids,
        masked_ids=special_ids(ours, settings.mask_tokens),
    )


def _refuse_other_text(role: Role, check: PromptCheck, say: Callable[[str], None]) -> None:
    """Show a question as both sides read it. Raises ConfigError for what makes the teacher judge something else."""
    for line in check.lines():
        say(f"{role.label}: {line}")
    if check.errors:
        raise ConfigError(f"{role.label} ({role.teacher.spec}) would judge another text: {'; '.join(check.errors)}")


def _model(
    role: Role,
    config: RunConfig,
    policy: Policy,
    weights: LanguageModel,
    theirs: PreTrainedTokenizerBase | None,
    end_ids: Collection[int],
) -> TeacherModel:
    from omniopd.learner.foreign import match_vocabularies
    from omniopd.learner.losses import build_losses
    from omniopd.learner.teachers import ForeignTeacher, LiveTeacher
    from omniopd.logits.reading import end_of_turn
    from omniopd.logits.token_bytes import TokenBytes

    settings = role.method.supervision
    assert isinstance(settings, LogprobSettings)
    if settings.alignment == "none":
        return LiveTeacher(weights)
    if not getattr(build_losses(config.learner.losses)["kl"], "needs_matched", False):
        return ForeignTeacher(weights)
    assert theirs is not None
    ours, end = policy.tokenizer, end_of_turn(theirs)
    # Of several ends, such as a base model's beside the chat's, the student is to keep the one that it writes.
    candidates = (end_of_turn(ours), ours.eos_token_id, *sorted(end_ids))
    own = next((i for i in candidates if i is not None and i in end_ids), None)
    kept = [(own, end)] if own is not None and end is not None else []
    matched = match_vocabularies(
        TokenBytes(ours),
        TokenBytes(theirs),
        student_size=len(ours),
        teacher_size=len(theirs),
        kept=kept,
    )
    return ForeignTeacher(weights, matched=matched)


def _open_server(
    teacher: TeacherConfig, vocabulary: int, samples: Sequence[Reading], say: Callable[[str], None]
) -> SequenceTeacher:
    """Open a vLLM server and find out whether its log-probs depend on what else it computes."""
    from omniopd.logits.vllm_scores import open_vllm_scores

    scoring = teacher.scoring
    server = open_vllm_scores(
        teacher.spec,
        vocab_size=vocabulary,
        requested_by=scoring.requested_by,
        search_top=scoring.max_logprobs,
        max_concurrency=teacher.max_concurrency,
        timeout_s=teacher.timeout_s,
        deadline_s=teacher.deadline_s,
        max_attempts=teacher.max_attempts,
    )

    async def check() -> float:
        try:
            return await server.check(samples, tolerance=scoring.tolerance)
        finally:
            await server.aclose()

    difference = asyncio.run(check())
    say(f"{server.id} gives the same log-probs alone and in a batch to {difference:.2g} nats")
    return server
