"""One optimiser step from token signals, whatever made them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniopd.config import LearnerConfig
from omniopd.errors import ConfigError, LearnerError, NonFiniteLossError
from omniopd.kernels.chunked import slices
from omniopd.learner.batch import MicroBatch, Normalizer, pack, pad_rollouts
from omniopd.learner.foreign import accumulate_groups
from omniopd.learner.fused import can_fuse, fused_loss, fused_score
from omniopd.learner.loss_inputs import TokenSlice
from omniopd.learner.losses import STREAMS, build_losses
from omniopd.learner.matching import Evidence, TokenDiagnostics, match
from omniopd.learner.policy import Policy
from omniopd.learner.teachers import ForeignTeacher, TeacherModel
from omniopd.learner.terms import (
    KnownReference,
    ModelReference,
    Term,
    foreign_terms_of,
    terms_of,
    vocabulary_of,
)
from omniopd.logits.scores import Floats, Ids
from omniopd.timing import StepTimer
from omniopd.types import Author, Rollout, TokenSignal, Update

MAX_STEPS_WITHOUT_SIGNAL = 10
"""One step without a signal is luck (every group all right or all wrong); so many are a fault."""

FUSED_VOCABULARY = 2048
"""From this size on the fused kernel computes what it can; smaller distributions fit into a cache as they are."""

SaveOffenders = Callable[[Sequence[TokenSignal]], Path]


class Learner:
    """AdamW on the student's weights. Knows streams and losses, never a method.

    The step is the same for any `micro_batch_size`: every normaliser is computed over the whole step first. Losses that
    the fused kernel knows go through it where the vocabulary has `fused_from` tokens or more. For all others logits are
    computed `logits_slice_tokens` tokens at a time and their gradient is taken at once; either way peak memory does not
    grow with rollout length times vocabulary. `keep_reference=False` saves the copy of the initial student where no
    signal anchors to it. `teachers` are the open-weight ones by name.
    """

    def __init__(
        self,
        policy: Policy,
        config: LearnerConfig,
        *,
        num_steps: int,
        max_steps_off_policy: int = 0,
        keep_reference: bool = True,
        teachers: Mapping[str, TeacherModel] | None = None,
        save_offenders: SaveOffenders | None = None,
        timer: StepTimer | None = None,
        fused_from: int = FUSED_VOCABULARY,
    ) -> None:
        self.policy = policy
        self.policy_version = 0
        self.last_step = 0
        """The step that the weights have seen last, counted from 1."""
        self._steps_without_signal = 0
        self._config = config
        self._max_steps_off_policy = max_steps_off_policy
        self._teachers = dict(teachers or {})
        self._losses = build_losses(config.losses)
        self._save_offenders = save_offenders
        self._timer = timer or StepTimer()
        self._vocabulary = vocabulary_of(policy)
        self._fuses = self._vocabulary >= fused_from and policy.plain_head is not None
        for teacher in self._teachers.values():
            _check_vocabularies(self._vocabulary, teacher)
        self.optimizer = torch.optim.AdamW(
            policy.trainable, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(config, num_steps))
        # Now or never: a copy made later would not be the initial student.
        if keep_reference:
            policy.freeze_reference()

    def update(self, step: int, signals: Sequence[TokenSignal]) -> Update:
        """Take one optimiser step. A step without any signal leaves the weights as they are.

        Raises:
            NonFiniteLossError: before the weights change; the offending rollouts are saved first.
            LearnerError: when too many steps in a row carry no signal, or a student's rollout is older than
                `max_steps_off_policy`.
        """
        self._check_age(step, signals)
        used = [s for s in signals if s.rollout.num_tokens > 0]
        normalizer = Normalizer.of(used, self._config.aggregation)
        if not any(normalizer.num_tokens.values()):
            return self._skip(step, len(signals))
        self._steps_without_signal = 0
        self.policy.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._timer("loss"):
            totals = self._gradient(step, used, normalizer)
        with self._timer("optimizer"):
            grad_norm = float(torch.nn.utils.clip_grad_norm_(self.policy.trainable, self._config.max_grad_norm))
            if not math.isfinite(grad_norm):
                self._fail(step, used, f"the gradient norm is {grad_norm}")
            rate = float(self.scheduler.get_last_lr()[0])
            self.optimizer.step()
            self.scheduler.step()
        self.policy_version += 1
        self.last_step = step
        metrics = {f"tokens/{name}": float(count) for name, count in normalizer.num_tokens.items() if count}
        metrics |= {f"loss/{name}": totals[name] for name, count in normalizer.num_tokens.items() if count}
        return Update(
            step=step,
            policy_version=self.policy_version,
            loss=sum(totals.values()),
            grad_norm=grad_norm,
            learning_rate=rate,
            metrics=metrics,
        )

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Return for each rollout its logprobs [T] and full-vocabulary entropies [T], exact, at temperature 1."""
        with self._evaluating():
            return [score for part in self._parts(len(rollouts)) for score in self._score(rollouts[part])]

    @torch.no_grad()
    def candidates(self, rollouts: Sequence[Rollout], k: int) -> list[tuple[Ids, Floats]]:
        """Return the student's k likeliest tokens [T, k], the likeliest first, and their logprobs [T, k] for each."""
        with self._evaluating():
            parts = self._parts(len(rollouts))
            return [self._likeliest(states_TH, k) for part in parts for states_TH in self._states(rollouts[part])]

    @torch.no_grad()
    def match(
        self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], *, teacher: str, k: int
    ) -> list[TokenDiagnostics]:
        """Compare the student with a teacher at every token, see `matching.match`. Leaves no trace in the training."""
        found: list[TokenDiagnostics] = []
        # Several tables [N, V] exist at once, where a fused step has none.
        slice_tokens = max(1, self._config.logits_slice_tokens // 4)
        model = self._teachers.get(teacher)
        with self._evaluating():
            for part in self._parts(len(rollouts)):
                of = rollouts[part]
                found += match(self.policy, self._states(of), of, model, evidence[part], k=k, slice_tokens=slice_tokens)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on bit for bit on a CPU."""
        return {
            "weights": self.policy.trainable_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "policy_version": self.policy_version,
            "last_step": self.last_step,
            "steps_without_signal": self._steps_without_signal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. The reference stays the initial student."""
        self.policy.load_trainable_state(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.policy_version = state["policy_version"]
        self.last_step = state["last_step"]
        self._steps_without_signal = state["steps_without_signal"]

    def _skip(self, step: int, num_rollouts: int) -> Update:
        """Leave the weights as they are, unless too many steps in a row have had no signal."""
        self._steps_without_signal += 1
        if self._steps_without_signal >= MAX_STEPS_WITHOUT_SIGNAL:
            raise LearnerError(
                f"step {step}: for {self._steps_without_signal} steps no rollout has carried a signal (the last had "
                f"{num_rollouts}); look at the missing reasons and the filters in the records"
            )
        self.last_step = step
        rate = float(self.scheduler.get_last_lr()[0])
        return Update(step=step, policy_version=self.policy_version, loss=0.0, grad_norm=0.0, learning_rate=rate)

    def _check_age(self, step: int, signals: Sequence[TokenSignal]) -> None:
        """Refuse stale rollouts: a missed weight push shows here instead of in the results."""
        oldest = self.policy_version - self._max_steps_off_policy
        for rollout in (s.rollout for s in signals if s.rollout.author == Author.STUDENT):
            if rollout.policy_version < oldest:
                raise LearnerError(
                    f"step {step}: rollout {rollout.id} was drawn with weights of version {rollout.policy_version}, "
                    f"the learner is at {self.policy_version} and rollout.max_steps_off_policy is "
                    f"{self._max_steps_off_policy}; the engine did not get the last weights"
                )

    def _gradient(self, step: int, signals: Sequence[TokenSignal], normalizer: Normalizer) -> dict[str, float]:
        """Add up the gradient of all micro-batches; return the loss of each stream."""
        totals = dict.fromkeys(STREAMS, 0.0)
        # Alike lengths together waste less padding; the sum does not depend on the order.
        ordered = sorted(signals, key=lambda s: len(s.rollout.prompt.token_ids) + s.rollout.num_tokens)
        size = self._config.micro_batch_size
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            losses = self._accumulate(part, normalizer)
            if not all(math.isfinite(v) for v in losses.values()):
                self._fail(step, part, f"the loss is not finite: {losses}")
            for stream, value in losses.items():
                totals[stream] += value
        return totals

    def _accumulate(self, signals: Sequence[TokenSignal], normalizer: Normalizer) -> dict[str, float]:
        """Add the gradient of some rollouts; return the loss of each stream."""
        policy = self.policy
        dtype = torch.float64 if policy.compute_dtype == torch.float64 else torch.float32
        pad_id = policy.tokenizer.pad_token_id or 0
        batch = pack(signals, normalizer, pad_id=pad_id, device=policy.device, dtype=dtype)
        totals = {stream: 0.0 for stream in batch.weights}
        if not totals:
            return totals
        with policy.autocast():
            hidden_BLH = policy.hidden(batch.input_ids_BL, batch.attention_mask_BL)
            hidden_NH = hidden_BLH[batch.rows_N, batch.columns_N]
            terms = terms_of(batch, self._losses, policy, self._teachers)
            leaf_NH = hidden_NH.detach().requires_grad_(True)
            fused = [term for term in terms if self._fuses and can_fuse(term)]
            for term in fused:
                loss = fused_loss(policy, batch, term, leaf_NH)
                totals[term.stream] += float(loss.detach())
                loss.backward()  # type: ignore[no-untyped-call]
            others = [term for term in terms if term not in fused]
            for start in range(0, batch.num_tokens if others else 0, self._config.logits_slice_tokens):
                part = slice(start, start + self._config.logits_slice_tokens)
                losses = self._slice_losses(batch, others, part, leaf_NH[part])
                for term, value in losses:
                    totals[term.stream] += float(value.detach())
                total = sum(value for _, value in losses)
                if isinstance(total, Tensor):
                    total.backward()  # type: ignore[no-untyped-call]
            reached = [(hidden_NH, leaf_NH.grad)]
            for foreign in foreign_terms_of(batch, self._losses, hidden_BLH, self._teachers):
                totals[foreign.stream] += accumulate_groups(
                    foreign.rollouts,
                    foreign.loss,
                    student_logprobs=policy.logprobs,
                    teacher_logprobs=foreign.teacher.logprobs,
                    matched=foreign.teacher.matched,
                    slice_tokens=self._config.logits_slice_tokens,
                )
                reached += [
                    (s, r.student_states_TH.grad) for s, r in zip(foreign.states, foreign.rollouts, strict=True)
                ]
        ends = [(states, gradient) for states, gradient in reached if gradient is not None]
        if ends:
            torch.autograd.backward([states for states, _ in ends], [gradient for _, gradient in ends])
        return totals

    def _slice_losses(
        self, batch: MicroBatch, terms: Sequence[Term], part: slice, hidden_NH: Tensor
    ) -> list[tuple[Term, Tensor]]:
        logprobs_NV = self.policy.logprobs(hidden_NH)
        losses = []
        for term in terms:
            first, last = torch.searchsorted(
                term.rows_M, torch.tensor([part.start, part.stop]).to(term.rows_M)
            ).tolist()
            if first == last:
                continue
            own = slice(first, last)
            rows = term.rows_M[own]
            # When every token is used, indexing would only copy [N, V].
            everything = len(rows) == len(logprobs_NV)
            tokens = TokenSlice(
                logprobs_NV=logprobs_NV if everything else logprobs_NV[rows - part.start],
                token_ids_N=batch.token_ids_N[rows],
                advantages_N=batch.advantages_N[rows],
                target_ids_NK=batch.target_ids_NK[rows],
                target_probs_NK=batch.target_probs_NK[rows],
                self_weights_N=batch.self_weights_N[rows],
                **self._reference(term, own),
            )
            losses.append((term, (term.weights_M[own] * term.loss(tokens)).sum()))
        return losses

    def _reference(self, term: Term, rows: slice) -> dict[str, Any]:
        """Return what a loss may read of the term's reference."""
        reference = term.reference
        if isinstance(reference, ModelReference):
            return {"reference_logprobs_NV": reference.logprobs(reference.states_MG[rows])}
        if not isinstance(reference, KnownReference):
            return {}
        if reference.is_whole:
            return {"reference_logprobs_NV": reference.whole(rows, self._vocabulary)}
        return {"known": reference.known(rows)}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Read with the model as it is sampled from, and leave its mode as it was."""
        was_training = self.policy.model.training
        self.policy.model.eval()
        yield
        self.policy.model.train(was_training)

    def _parts(self, total: int) -> Iterator[slice]:
        """Cover so many rollouts, a micro-batch at a time."""
        return slices(0, total, self._config.micro_batch_size)

    def _likeliest(self, states_TH: Tensor, k: int) -> tuple[Ids, Floats]:
        with self.policy.autocast():
            tops = [
                self.policy.logprobs(states_TH[part]).topk(min(k, self._vocabulary), -1)
                for part in slices(0, len(states_TH), self._config.logits_slice_tokens)
            ]
        ids, values = (torch.cat([getattr(top, name) for top in tops]).cpu() for name in ("indices", "values"))
        return ids.numpy(), values.numpy()

    def _score(self, rollouts: Sequence[Rollout]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Return the student's logprobs and entropies."""
        results = []
        for rollout, states_TH in zip(rollouts, self._states(rollouts), strict=True):
            ids_T = torch.tensor(rollout.token_ids, device=self.policy.device)
            with self.policy.autocast():
                if self._fuses:
                    results.append(fused_score(self.policy, states_TH, ids_T))
                else:
                    results.append(self._sliced_score(states_TH, ids_T))
        return results

    def _states(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Return the student's hidden states [T, H] that predict each rollout's tokens."""
        policy = self.policy
        input_ids, mask = pad_rollouts(rollouts, policy.tokenizer.pad_token_id or 0)
        with policy.autocast():
            hidden_BLH = policy.hidden(input_ids.to(policy.device), mask.to(policy.device))
        starts = [len(rollout.prompt.token_ids) - 1 for rollout in rollouts]
        return [
            hidden_BLH[row, start : start + rollout.num_tokens]
            for row, (rollout, start) in enumerate(zip(rollouts, starts, strict=True))
        ]

    def _sliced_score(self, states_TH: Tensor, ids_T: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        logprobs: list[float] = []
        entropies: list[float] = []
        for first in range(0, len(ids_T), self._config.logits_slice_tokens):
            part = slice(first, first + self._config.logits_slice_tokens)
            values_NV = self.policy.logprobs(states_TH[part])
            logprobs += values_NV.gather(-1, ids_T[part, None]).squeeze(-1).tolist()
            entropies += torch.special.entr(values_NV.exp()).sum(-1).tolist()
        return tuple(logprobs), tuple(entropies)

    def _fail(self, step: int, signals: Sequence[TokenSignal], what: str) -> None:
        place = f" They are saved in {self._save_offenders(signals)}." if self._save_offenders is not None else ""
        names = ", ".join(s.rollout.id for s in signals[:3])
        raise NonFiniteLossError(
            f"step {step}: {what}, with {len(signals)} rollouts ({names}).{place} The weights were not changed; lower "
            "learner.learning_rate or look at these rollouts."
        )


def schedule(config: LearnerConfig, num_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at an optimiser step, 0..num_steps-1."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return max(0.0, 1.0 - done) if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return factor


def _check_vocabularies(ours: int, teacher: TeacherModel) -> None:
    if teacher.vocabulary < ours and not isinstance(teacher, ForeignTeacher):
        raise ConfigError(
            f"the teacher's output layer has {teacher.vocabulary} rows and the student's {ours}, so it gives some "
            "of the student's ids no probability; use a teacher with as many rows or more, or the text path "
            "(method.supervision.type: chunked)"
        )
