"""Ask an open-weight teacher once about answers that never change, and write down what it says for any number of runs.

The answers are the worked responses of the training data, word for word those of a run with `authors: {dataset: 1}`.
"""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omniopd.config import RunConfig
from omniopd.errors import ConfigError, DataError
from omniopd.inputs import check_teachers, load_prompts, read_responses
from omniopd.logit_teachers import LARGEST_WHOLE, LogitTeacher, evidence_of, open_logit_teacher, wanted_of
from omniopd.logits.reading import WithinContext
from omniopd.method import Role, build_method
from omniopd.method_checks import access_of
from omniopd.method_settings import LogprobSettings
from omniopd.models import context_length, resolve_model
from omniopd.types import StepContext

if TYPE_CHECKING:
    from omniopd.learner.policy import LanguageModel, Policy
    from omniopd.logits.score_folder import WriteCounts
    from omniopd.logits.scores import Reading
    from omniopd.logits.stored_states import Stored
    from omniopd.types import Rollout

Progress = Callable[[int, int], None]
SCORES_BATCH, STATES_BATCH = 64, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKind:
    """What is written of each answer: the teacher's likeliest tokens, or its hidden states."""

    top_k: int | None = None
    """None: as many as the run's loss reads."""
    states: bool = False
    dtype: Stored | None = None
    """Of the states; None: that of the teacher's output layer."""
    batch: int | None = None
    """Answers of one shard, which a kill loses at most; None: 64, and 16 of states."""

    def __post_init__(self) -> None:
        if self.states and self.top_k is not None:
            raise ConfigError(
                f"--states and --top-k {self.top_k} exclude each other: hidden states hold every token; give one"
            )
        if self.dtype is not None and not self.states:
            raise ConfigError(f"--dtype {self.dtype} is for hidden states; add --states, or leave it out")
        for flag, value in (("--top-k", self.top_k), ("--batch", self.batch)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} is {value}; expected 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precomputed:
    """What was written, and the settings with which a run reads it."""

    folder: Path
    counts: WriteCounts
    prompts_without_response: int
    size_bytes: int
    """Of all files of the folder."""
    settings: tuple[str, ...]
    """As `key.path=value`, to add to the run file."""


def precompute(
    config: RunConfig,
    folder: Path,
    kind: StoredKind,
    *,
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> Precomputed:
    """Write what the run's teacher says of the data's own responses. Run it again to go on after a kill.

    Costs what the teacher costs. The run file's `authors` play no part.

    Raises:
        ConfigError: a teacher that cannot give this, or a folder of something else.
        DataError: no row of the data has a response.
        TeacherError: as the teacher has it; what was written stays.
    """
    role = _only_role(config, kind)
    if not read_responses(config.data):
        raise DataError(
            f"no row of data.train ({config.data.train}) has a worked response, so there is nothing to ask about; end "
            "its `messages` in an assistant turn, or use GSM8K rows"
        )
    import torch

    from omniopd.learner.policy import Policy

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Only its tokenizer and the shape of its vocabulary matter, so the device is the teacher's alone.
    plain = config.student.model_copy(update={"device": "cpu", "dtype": "float32", "lora": None})
    policy = Policy.load(plain)
    rollouts, end_ids, without = _answers(config, policy, say)
    prompts = [rollout.prompt for rollout in rollouts]
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.offload-", dir=folder.parent) as aside:
        teacher = open_logit_teacher(
            role,
            config,
            policy,
            prompts,
            end_ids=end_ids,
            offload_folder=Path(aside),
            say=say,
            feeds_learner=False,
        )
        reader = teacher.reader
        if kind.states and isinstance(reader, WithinContext):
            reader = reader.reader  # A run has no states of what is left out, so that is refused below.
        reads = [reader.read(rollout) for rollout in rollouts]
        readings = [read.reading for read in reads if read.reading is not None]
        asked = _Asked(role=role, teacher=teacher, readings=readings, progress=progress)
        if kind.states:
            counts = _write_states(folder, asked, kind)
            settings = _settings(role, f"states:{folder}", None)
        else:
            vocabulary = policy.model.config.get_text_config().vocab_size
            top_k = _top_k(config, role, kind, vocabulary)
            counts = asyncio.run(_write_scores(folder, asked, kind, top_k, vocabulary))
            settings = _settings(role, f"scores:{folder}", _loss_for(config, top_k, vocabulary))
    unread = Counter(read.missing for read in reads if read.missing is not None)
    missing = Counter(counts.missing) + unread
    detail = counts.first_missing or next((read.detail for read in reads if read.missing is not None), "")
    return Precomputed(
        folder=folder,
        counts=replace(counts, missing=dict(missing), first_missing=detail),
        prompts_without_response=without,
        size_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        settings=settings,
    )


def describe_precomputed(done: Precomputed) -> str:
    """Return what was written and how to go on, for a person."""
    counts = done.counts
    lines = [
        f"{counts.written:,} answers written, {counts.already_there:,} were there or repeat another; "
        f"{done.size_bytes / 2**20:,.1f} MiB in {done.folder}"
    ]
    if done.prompts_without_response:
        lines.append(f"{done.prompts_without_response:,} prompts have no worked response and are left out")
    if counts.missing:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.missing.items()))
        lines.append(f"missing: {reasons}; the first says: {counts.first_missing}")
        lines.append("the same command asks for those again; a run counts them as unscored")
    words = " ".join(shlex.quote(word) for word in done.settings)
    return "\n".join([*lines, "a run learns from them with the same run file and", f"  {words}"])


def _only_role(config: RunConfig, kind: StoredKind) -> Role:
    """Return the teacher that is asked, before anything is loaded. Raises ConfigError where none can be."""
    method = build_method(config.method)
    check_teachers(config, method)
    settings = method.supervision
    if method.routes:
        raise ConfigError(
            "method.supervision.type is routed, but one teacher is written at a time, and the student alone writes "
            "where there are several; give a run file with `teacher` and method.supervision.type: logprob"
        )
    (role,) = method.roles(config)
    access = access_of(role.teacher.spec)
    if access is None:
        raise ConfigError(
            f"teacher.spec is {role.teacher.spec!r}, which gives text only and no log-probs; use hf:MODEL or "
            "vllm:MODEL@URL"
        )
    if access in ("scores", "states"):
        raise ConfigError(
            f"teacher.spec is {role.teacher.spec!r}, which is written already; give the teacher that is to be asked, "
            "hf:MODEL or vllm:MODEL@URL"
        )
    if not isinstance(settings, LogprobSettings):
        raise ConfigError(
            f"method.supervision.type is {settings.type}, which asks for no log-probs; use method.supervision.type: "
            "logprob, as the run that will read them"
        )
    if settings.alignment == "groups":
        raise ConfigError(
            "method.supervision.alignment is groups, and no loss on fixed answers reads stored scores of another "
            "vocabulary; run with the teacher's weights (hf:), or use a teacher with the student's vocabulary"
        )
    if kind.states and access != "hf":
        raise ConfigError(
            f"--states needs the teacher's weights in this process, but teacher.spec is {role.teacher.spec!r}; use "
            "hf:MODEL, or --top-k K"
        )
    return role


def _answers(
    config: RunConfig, policy: Policy, say: Callable[[str], None]
) -> tuple[list[Rollout], frozenset[int], int]:
    """Return the data's responses as a run makes rollouts of them, the end tokens, and how many prompts have none."""
    from omniopd.assembly import Student
    from omniopd.behavior.dataset import DatasetBehavior
    from omniopd.rollout.detokenize import Detokenizer

    student = Student(policy, Detokenizer(policy.tokenizer))
    # Held-out problems are none of this command's business.
    _, prompts, _ = load_prompts(
        config.model_copy(update={"data": config.data.model_copy(update={"eval": None})}), policy, say
    )
    behavior = DatasetBehavior(
        responses=read_responses(config.data),
        encode=student.encode,
        end_id=student.end_id,
        detokenize=student.detokenize,
        max_tokens=config.rollout.max_tokens,
    )
    only = StepContext(step=0, num_steps=1, seed=config.seed)
    rollouts = asyncio.run(behavior.rollouts(prompts, only, group_size=1))
    return rollouts, frozenset(student.end_ids), len(prompts) - len(rollouts)


def _top_k(config: RunConfig, role: Role, kind: StoredKind, vocabulary: int) -> int:
    if kind.top_k is not None:
        return min(kind.top_k, vocabulary)
    evidence = evidence_of(config)
    if evidence.kind == "whole" and vocabulary > LARGEST_WHOLE:
        states = ", or --states, which hold every token" if access_of(role.teacher.spec) == "hf" else ""
        raise ConfigError(
            f"learner.losses.kl reads the teacher's whole distribution over {vocabulary:,} tokens, which takes "
            f"{8 * vocabulary / 2**20:.1f} MiB a token; give --top-k, e.g. 64{states}"
        )
    wanted = wanted_of(evidence, role.teacher, vocabulary, most=vocabulary)
    if wanted.top_k == 0:
        raise ConfigError(
            f"learner.losses.kl reads {evidence.kind} of the teacher, which does not say how many of its likeliest "
            "tokens to store; give --top-k, e.g. 64, or --states"
        )
    return wanted.top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Who is asked about what."""

    role: Role
    teacher: LogitTeacher
    readings: Sequence[Reading]
    progress: Progress | None


async def _write_scores(folder: Path, asked: _Asked, kind: StoredKind, top_k: int, vocabulary: int) -> WriteCounts:
    from omniopd.logits.model_scores import ModelScores
    from omniopd.logits.stored_scores import write_scores

    scorer = asked.teacher.scorer
    assert scorer is not None
    try:
        return await write_scores(
            folder,
            scorer,
            asked.readings,
            top_k=top_k,
            identity=_identity(asked),
            # Of a server nobody knows more than that it reads the student's tokens.
            vocabulary=scorer.vocabulary if isinstance(scorer, ModelScores) else vocabulary,
            batch=kind.batch or SCORES_BATCH,
            progress=asked.progress,
        )
    finally:
        await scorer.aclose()


def _write_states(folder: Path, asked: _Asked, kind: StoredKind) -> WriteCounts:
    from omniopd.logits.stored_states import write_states

    spec, model = asked.role.teacher.spec, _weights(asked.teacher)
    head = model.plain_head
    if head is None:
        raise ConfigError(
            f"the output layer of {spec!r} is no plain product of its last hidden states, so states alone do not hold "
            "its distributions; use --top-k K"
        )
    room = context_length(model.model.config)
    longest = max((len(reading.prompt_ids) + len(reading.token_ids) for reading in asked.readings), default=0)
    if room is not None and longest > room:
        raise ConfigError(
            f"a prompt and its answer have {longest:,} tokens, but the context of {spec!r} has {room:,}; lower "
            "rollout.max_tokens or data.max_prompt_tokens"
        )
    return write_states(
        folder,
        model,
        head,
        asked.readings,
        teacher=spec,
        dtype=kind.dtype,
        identity=_identity(asked),
        batch=kind.batch or STATES_BATCH,
        progress=asked.progress,
    )


def _weights(teacher: LogitTeacher) -> LanguageModel:
    from omniopd.learner.teachers import LiveTeacher

    assert isinstance(teacher.model, LiveTeacher)
    return teacher.model.weights


def _identity(asked: _Asked) -> str:
    """Return what tells the teacher's numbers from others': its weights and how they are computed with.

    Nothing of a server, whose address says nothing of its weights.
    """
    if asked.teacher.model is None:
        return ""
    from omniopd.teachers.in_process import weights_identity

    teacher = asked.role.teacher
    digest = weights_identity(resolve_model(teacher.spec.partition(":")[2]))
    dtype = str(_weights(asked.teacher).compute_dtype).removeprefix("torch.")
    return f"{digest} {dtype} {teacher.weights.quantization}"


def _loss_for(config: RunConfig, top_k: int, vocabulary: int) -> str | None:
    """Return the loss that reads so many tokens; None where the run's own does."""
    evidence = evidence_of(config)
    reads = vocabulary if evidence.kind == "whole" else evidence.k
    # The student's own likeliest tokens need not be among the stored ones, unless all are.
    is_enough = top_k == vocabulary if evidence.kind == "student_top_k" else reads <= top_k
    if is_enough and evidence.kind in ("whole", "teacher_top_k", "student_top_k"):
        return None
    return f"learner.losses.kl={{type: teacher_topk_reverse_kl, k: {top_k}}}"


def _settings(role: Role, spec: str, loss: str | None) -> tuple[str, ...]:
    """Return what turns the run file that was written with into the one that reads."""
    settings = role.method.supervision
    assert isinstance(settings, LogprobSettings)
    words = [f"teacher.spec={spec}"]
    if role.teacher.chat_format == "teacher" and role.teacher.tokenizer is None:
        # The folder does not say in whose format its prompts are; the run writes them anew.
        words.append(f"teacher.tokenizer={role.teacher.spec.partition(':')[2]}")
    if role.method.authors != {"dataset": 1.0}:
        # Mappings merge, so the shares of a run file are taken back one by one.
        others = [name for name in settings.authors if name != "dataset" and "authors" in settings.model_fields_set]
        shares = ", ".join([*(f"{name}: 0" for name in others), "dataset: 1"])
        words.append(f"method.supervision.authors={{{shares}}}")
    if role.method.objective is not None and role.method.objective.uses_samples:
        words.append("method.supervision.objective=divergence")
    if settings.verifier is not None:
        words.append("method.supervision.verifier=null")
    return (*words, loss) if loss is not None else tuple(words)
