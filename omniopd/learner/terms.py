"""What a micro-batch is compared with: each stream becomes terms, each with one loss and one reference.

Shape letters: N signalled tokens of the micro-batch, M those of one term, G hidden width of the reference, V the
student's vocabulary, K tokens that a teacher named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omniopd.errors import LearnerError
from omniopd.learner.batch import MicroBatch
from omniopd.learner.divergences import TeacherDivergence
from omniopd.learner.foreign import ForeignRollout, group_weights
from omniopd.learner.foreign_losses import ForeignDivergence
from omniopd.learner.loss_inputs import KnownTokens
from omniopd.learner.losses import TokenLoss
from omniopd.learner.policy import PlainHead, Policy
from omniopd.learner.teachers import ForeignTeacher, TeacherModel
from omniopd.logits.reading import Read
from omniopd.logits.scores import Reading, TokenScores
from omniopd.types import Rollout, TokenSignal


@dataclass(frozen=True, slots=True, eq=False)
class ModelReference:
    """A frozen model's view of the tokens, ready to become log-probs."""

    states_MG: Tensor
    logprobs: Callable[[Tensor], Tensor]
    """States to log-softmax in the student's vocabulary."""
    head: PlainHead | None
    """The same for the fused kernel; None where that cannot be had."""


@dataclass(frozen=True, slots=True, eq=False)
class KnownReference:
    """What a teacher said of the tokens."""

    token_logprobs_M: Tensor
    ids_MK: Tensor | None
    logprobs_MK: Tensor | None
    is_whole: bool
    """Whether every token of the vocabulary was named."""

    def known(self, rows: slice) -> KnownTokens:
        ids_MK, logprobs_MK = self.ids_MK, self.logprobs_MK
        return KnownTokens(
            token_logprobs_N=self.token_logprobs_M[rows],
            ids_NK=None if ids_MK is None else ids_MK[rows],
            logprobs_NK=None if logprobs_MK is None else logprobs_MK[rows],
        )

    def whole(self, rows: slice, vocabulary: int) -> Tensor:
        """Return log-probs [n, V] of a teacher that named every token."""
        assert self.ids_MK is not None and self.logprobs_MK is not None
        values_nK = self.logprobs_MK[rows]
        return in_vocabulary(torch.empty_like(values_nK).scatter_(-1, self.ids_MK[rows], values_nK), vocabulary)


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """Tokens of one stream with one reference."""

    stream: str
    loss: TokenLoss
    rows_M: Tensor
    """Which of the N tokens; ascending."""
    weights_M: Tensor
    reference: ModelReference | KnownReference | None = None


def terms_of(
    batch: MicroBatch, losses: Mapping[str, TokenLoss], policy: Policy, teachers: Mapping[str, TeacherModel]
) -> list[Term]:
    """Return the terms of a micro-batch, stream by stream. Raises LearnerError for a teacher that is not there."""
    terms = []
    for stream, weights_N in batch.weights.items():
        rows_M = weights_N.nonzero().squeeze(-1)
        if rows_M.numel() == 0:
            continue
        loss = losses[stream]
        if loss.needs == "foreign_teacher":
            continue
        if loss.needs == "teacher":
            terms += _teacher_terms(batch, stream, loss, rows_M, policy, teachers)
            continue
        reference = _initial_student(batch, rows_M, policy) if loss.needs == "reference" else None
        terms.append(Term(stream, loss, rows_M, weights_N[rows_M], reference))
    return terms


@dataclass(frozen=True, slots=True, eq=False)
class ForeignTerm:
    """The rollouts of a micro-batch that one teacher with another vocabulary has read."""

    stream: str
    loss: ForeignDivergence
    teacher: ForeignTeacher
    rollouts: tuple[ForeignRollout, ...]
    states: tuple[Tensor, ...]
    """What their leaves were detached from; their gradients go on from there."""


def foreign_terms_of(
    batch: MicroBatch, losses: Mapping[str, Any], hidden_BLH: Tensor, teachers: Mapping[str, TeacherModel]
) -> list[ForeignTerm]:
    """Return the terms of streams that compare groups of tokens. Raises LearnerError when the teacher is not there."""
    terms = []
    for stream, weights_N in batch.weights.items():
        if losses[stream].needs != "foreign_teacher":
            continue
        members: dict[str | None, list[tuple[int, Read]]] = defaultdict(list)
        # Rollouts without a weighted token need no evidence, and no teacher reads them.
        for b in sorted(set(batch.rows_N[weights_N > 0].tolist())):
            signal = batch.signals[b]
            if not isinstance(signal.kl_evidence, Read) or signal.kl_evidence.alignment is None:
                raise LearnerError(
                    f"rollout {signal.rollout.id}: the loss {losses[stream]} compares groups of tokens, but the signal "
                    "does not say in which tokens the teacher reads the rollout; set method.supervision.alignment: "
                    "groups, or use a loss for one vocabulary such as reverse_kl"
                )
            members[signal.kl_teacher].append((b, signal.kl_evidence))
        for name, of in members.items():
            teacher = _named(name, teachers)
            if not isinstance(teacher, ForeignTeacher):
                raise LearnerError(
                    f"the loss {losses[stream]} compares vocabularies, but the teacher has the student's"
                )
            terms.append(_foreign_term(batch, stream, losses[stream], weights_N, hidden_BLH, teacher, of))
    return terms


def _foreign_term(
    batch: MicroBatch,
    stream: str,
    loss: ForeignDivergence,
    weights_N: Tensor,
    hidden_BLH: Tensor,
    teacher: ForeignTeacher,
    of: list[tuple[int, Read]],
) -> ForeignTerm:
    readings = [read.reading for _, read in of if read.reading is not None]
    rollouts, states = [], []
    for (b, read), reading, teacher_states_UG in zip(of, readings, teacher.states(readings), strict=True):
        assert read.alignment is not None
        rollout = batch.signals[b].rollout
        start = len(rollout.prompt.token_ids) - 1
        own_TH = hidden_BLH[b, start : start + rollout.num_tokens]
        mine_N = batch.rows_N == b
        weights_T = weights_N.new_zeros(rollout.num_tokens)
        weights_T[batch.positions_N[mine_N]] = weights_N[mine_N]
        device = hidden_BLH.device
        rollouts.append(
            ForeignRollout(
                student_states_TH=own_TH.detach().requires_grad_(True),
                student_ids_T=torch.tensor(rollout.token_ids, device=device),
                teacher_states_UG=teacher_states_UG,
                teacher_ids_U=torch.tensor(reading.token_ids, device=teacher_states_UG.device),
                alignment=read.alignment,
                weights=group_weights(read.alignment, weights_T.tolist()),
            )
        )
        states.append(own_TH)
    return ForeignTerm(stream, loss, teacher, tuple(rollouts), tuple(states))


def vocabulary_of(policy: Policy) -> int:
    """Return the number of rows of the student's own vocabulary."""
    size: int = policy.model.config.get_text_config().vocab_size
    return size


def _initial_student(batch: MicroBatch, rows_M: Tensor, policy: Policy) -> ModelReference:
    with torch.no_grad(), policy.reference() as model:
        hidden_BLG = model.hidden(batch.input_ids_BL, batch.attention_mask_BL)

    @torch.no_grad()
    def logprobs(states_NG: Tensor) -> Tensor:
        with policy.reference() as model:
            return model.logprobs(states_NG)

    return ModelReference(hidden_BLG[batch.rows_N[rows_M], batch.columns_N[rows_M]], logprobs, model.plain_head)


def _teacher_terms(
    batch: MicroBatch,
    stream: str,
    loss: TokenLoss,
    rows_M: Tensor,
    policy: Policy,
    teachers: Mapping[str, TeacherModel],
) -> list[Term]:
    """Part the tokens by teacher, and by how its view of them comes."""
    members: dict[tuple[str | None, bool, str | None, int], list[int]] = defaultdict(list)
    # Rollouts without a weighted token need no evidence, and no teacher reads them.
    for b in sorted(set(batch.rows_N[rows_M].tolist())):
        signal = batch.signals[b]
        _check_evidence(signal, loss, vocabulary_of(policy))
        scores = signal.kl_evidence if isinstance(signal.kl_evidence, TokenScores) else None
        known = None if scores is None else scores.known
        width = 0 if scores is None or scores.ids_TK is None else scores.ids_TK.shape[1]
        members[signal.kl_teacher, scores is not None, known, width].append(b)
    terms = []
    for (name, is_known, _, _), of in members.items():
        mine_M = rows_M[torch.isin(batch.rows_N[rows_M], torch.tensor(of, device=rows_M.device))]
        reference = (
            _known(batch, of, mine_M, policy) if is_known else _live(batch, of, mine_M, policy, _named(name, teachers))
        )
        terms.append(Term(stream, loss, mine_M, batch.weights[stream][mine_M], reference))
    return terms


def _check_evidence(signal: TokenSignal, loss: TokenLoss, vocabulary: int) -> None:
    """Raise LearnerError for evidence of another completion, or that says less than the loss reads."""
    evidence, rollout = signal.kl_evidence, signal.rollout
    if evidence is None:
        return
    check_length(evidence.num_tokens, rollout)
    if not isinstance(evidence, TokenScores) or not isinstance(loss, TeacherDivergence):
        return
    width = 0 if evidence.ids_TK is None else evidence.ids_TK.shape[1]
    wanted = loss.evidence
    if wanted.kind == "token" or (evidence.known == "vocabulary" and width >= vocabulary):
        return
    says = f"{width} tokens ({evidence.known})" if width else "the rollout's own tokens only"
    if wanted.kind == "whole":
        raise LearnerError(
            f"rollout {rollout.id}: the loss reads the teacher's whole distribution, and its record has {says}; use a "
            "top-k loss or sampled_token, or a teacher in this process"
        )
    whose, known = ("teacher", "teacher_top_k") if wanted.kind == "teacher_top_k" else ("student", "requested")
    if evidence.known != known or width < min(wanted.k, vocabulary):
        raise LearnerError(
            f"rollout {rollout.id}: the loss reads the {whose}'s {wanted.k} likeliest tokens, and the record has "
            f"{says}; expected {known!r} with {wanted.k} or more"
        )


def check_length(num_tokens: int, rollout: Rollout) -> None:
    """Raise LearnerError for evidence that has another number of tokens than the rollout."""
    if num_tokens != rollout.num_tokens:
        raise LearnerError(
            f"rollout {rollout.id}: the teacher's evidence has {num_tokens} tokens and the rollout "
            f"{rollout.num_tokens}; expected one for each, so it is of another completion"
        )


def _named(name: str | None, teachers: Mapping[str, TeacherModel]) -> TeacherModel:
    if name is None and len(teachers) == 1:
        return next(iter(teachers.values()))
    if name is None or name not in teachers:
        wanted = "an open-weight teacher" if name is None else f"the open-weight teacher {name!r}"
        there = f"only {', '.join(map(repr, teachers))} are loaded" if teachers else "none is loaded"
        raise LearnerError(f"a signal asks for {wanted}, but {there}; set teacher.spec to hf:")
    return teachers[name]


def _live(batch: MicroBatch, of: list[int], rows_M: Tensor, policy: Policy, teacher: TeacherModel) -> ModelReference:
    states = dict(zip(of, teacher.states([reading_of(batch.signals[b]) for b in of]), strict=True))
    # Token by token and in the order of the rows, which go through the rollouts one after the other.
    positions = {b: batch.positions_N[rows_M[batch.rows_N[rows_M] == b]].to(states[b].device) for b in of}
    picked_MG = torch.cat([states[b][positions[b]] for b in sorted(of)])
    width, head = vocabulary_of(policy), teacher.head

    def logprobs(states_NG: Tensor) -> Tensor:
        return in_vocabulary(teacher.logprobs(states_NG), width).to(policy.device)

    # The fused kernel reads both heads on one device.
    is_here = head is not None and head.weight_VH.device == policy.device
    return ModelReference(picked_MG, logprobs, head.rows(width) if head is not None and is_here else None)


def reading_of(signal: TokenSignal) -> Reading:
    """Return how the teacher reads the rollout: as the evidence says, else token by token as it was drawn."""
    if isinstance(signal.kl_evidence, Reading):
        return signal.kl_evidence
    rollout = signal.rollout
    return Reading(prompt_ids=rollout.prompt.token_ids, token_ids=rollout.token_ids)


def in_vocabulary(logprobs_NW: Tensor, width: int) -> Tensor:
    """Leave out the tokens that only pad a longer table."""
    if logprobs_NW.shape[-1] > width:
        return torch.log_softmax(logprobs_NW[..., :width], dim=-1)
    return logprobs_NW


def _known(batch: MicroBatch, of: list[int], rows_M: Tensor, policy: Policy) -> KnownReference:
    dtype = batch.advantages_N.dtype
    tokens, ids, values = [], [], []
    is_whole = True
    for b in sorted(of):
        scores = batch.signals[b].kl_evidence
        assert isinstance(scores, TokenScores)
        at = batch.positions_N[rows_M[batch.rows_N[rows_M] == b]].cpu().numpy()
        tokens.append(scores.logprobs_T[at])
        is_whole &= scores.known == "vocabulary" and scores.ids_TK is not None
        if scores.ids_TK is not None and scores.logprobs_TK is not None:
            ids.append(scores.ids_TK[at])
            values.append(scores.logprobs_TK[at])

    def as_tensor(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device=policy.device, dtype=dtype)

    return KnownReference(
        token_logprobs_M=as_tensor(tokens, dtype),
        ids_MK=as_tensor(ids, torch.long) if ids else None,
        logprobs_MK=as_tensor(values, dtype) if values else None,
        is_whole=is_whole,
    )
