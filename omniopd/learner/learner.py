"""One optimiser step from token signals, whatever made them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniopd.config import LearnerConfig
from omniopd.errors import ConfigError, LearnerError, NonFiniteLossError
from omniopd.learner.batch import MicroBatch, Normalizer, pack, pad_rollouts
from omniopd.learner.losses import STREAMS, TokenLoss, TokenSlice, build_losses
from omniopd.learner.policy import LanguageModel, Policy
from omniopd.timing import StepTimer
from omniopd.types import Author, Rollout, TokenSignal, Update

MAX_STEPS_WITHOUT_SIGNAL = 10
"""One step without a signal is luck (every group all right or all wrong); so many are a fault."""

SaveOffenders = Callable[[Sequence[TokenSignal]], Path]


class Learner:
    """AdamW on the student's weights. Knows streams and losses, never a method.

    The step is the same for any `micro_batch_size`: every normaliser is computed over the whole step first. Logits are
    computed `logits_slice_tokens` tokens at a time and their gradient is taken at once, so peak memory does not grow
    with rollout length times vocabulary. `keep_reference=False` saves the copy of the initial student where no signal
    anchors to it.
    """

    def __init__(
        self,
        policy: Policy,
        config: LearnerConfig,
        *,
        num_steps: int,
        max_steps_off_policy: int = 0,
        keep_reference: bool = True,
        teacher: LanguageModel | None = None,
        save_offenders: SaveOffenders | None = None,
        timer: StepTimer | None = None,
    ) -> None:
        self.policy = policy
        self.policy_version = 0
        self.last_step = 0
        """The step that the weights have seen last, counted from 1."""
        self._steps_without_signal = 0
        self._config = config
        self._max_steps_off_policy = max_steps_off_policy
        self._teacher = teacher
        self._losses = build_losses(config.losses)
        self._save_offenders = save_offenders
        self._timer = timer or StepTimer()
        if teacher is not None:
            _check_vocabularies(policy, teacher)
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
        was_training = self.policy.model.training
        self.policy.model.eval()
        results: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
        size = self._config.micro_batch_size
        for start in range(0, len(rollouts), size):
            part = rollouts[start : start + size]
            results.extend(self._score(part))
        self.policy.model.train(was_training)
        return results

    @torch.no_grad()
    def teacher_logprobs(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """Return the open-weight teacher's logprobs [T] of each rollout's own tokens, exact, at temperature 1.

        Raises LearnerError when none is loaded.
        """
        if self._teacher is None:
            raise LearnerError(
                "the method asks for an open-weight teacher, but none is loaded; set teacher.spec to hf:"
            )
        size = self._config.micro_batch_size
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        return [logprobs for part in parts for logprobs, _ in self._score(part, self._teacher)]

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
            hidden_NH = _pick(policy.hidden(batch.input_ids_BL, batch.attention_mask_BL), batch)
            references = self._reference_hidden(batch)
            leaf_NH = hidden_NH.detach().requires_grad_(True)
            for start in range(0, batch.num_tokens, self._config.logits_slice_tokens):
                part = slice(start, start + self._config.logits_slice_tokens)
                losses = self._slice_losses(batch, part, leaf_NH[part], references)
                for stream, value in losses.items():
                    totals[stream] += float(value.detach())
                loss = sum(losses.values())
                if isinstance(loss, Tensor):
                    loss.backward()  # type: ignore[no-untyped-call]
        hidden_NH.backward(leaf_NH.grad)  # type: ignore[no-untyped-call]
        return totals

    def _slice_losses(
        self, batch: MicroBatch, part: slice, hidden_NH: Tensor, references: dict[str, tuple[LanguageModel, Tensor]]
    ) -> dict[str, Tensor]:
        logprobs_NV = self.policy.logprobs(hidden_NH)
        losses = {}
        for stream, weights_N in batch.weights.items():
            rows = weights_N[part].nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            loss = self._losses[stream]
            reference = None
            if loss.needs is not None:
                model, states_NH = references[loss.needs]
                reference = self._reference_logprobs(loss, model, states_NH[part][rows])
            # When every token is used, indexing would only copy [N, V].
            everything = rows.numel() == logprobs_NV.shape[0]
            tokens = TokenSlice(
                logprobs_NV=logprobs_NV if everything else logprobs_NV[rows],
                token_ids_N=batch.token_ids_N[part][rows],
                advantages_N=batch.advantages_N[part][rows],
                reference_logprobs_NV=reference,
                target_ids_NK=batch.target_ids_NK[part][rows],
                target_probs_NK=batch.target_probs_NK[part][rows],
                self_weights_N=batch.self_weights_N[part][rows],
            )
            losses[stream] = (weights_N[part][rows] * loss(tokens)).sum()
        return losses

    def _reference_hidden(self, batch: MicroBatch) -> dict[str, tuple[LanguageModel, Tensor]]:
        needed = {self._losses[stream].needs for stream in batch.weights} - {None}
        found: dict[str, tuple[LanguageModel, Tensor]] = {}
        with torch.no_grad():
            if "reference" in needed:
                with self.policy.reference() as model:
                    found["reference"] = (
                        model,
                        _pick(model.hidden(batch.input_ids_BL, batch.attention_mask_BL), batch),
                    )
            if "teacher" in needed:
                if self._teacher is None:
                    raise LearnerError(
                        "a signal asks for an open-weight teacher, but none is loaded; set teacher.spec to hf:"
                    )
                states = self._teacher.hidden(batch.input_ids_BL, batch.attention_mask_BL)
                found["teacher"] = (self._teacher, _pick(states, batch))
        return found

    @torch.no_grad()
    def _reference_logprobs(self, loss: TokenLoss, model: LanguageModel, states_NH: Tensor) -> Tensor:
        with self.policy.reference() if loss.needs == "reference" else nullcontext():
            return self._in_student_vocabulary(model.logprobs(states_NH))

    def _in_student_vocabulary(self, logprobs: Tensor) -> Tensor:
        # A padded embedding table may be longer than the student's; the extra rows are no tokens.
        width = self.policy.model.config.get_text_config().vocab_size
        if logprobs.shape[-1] > width:
            logprobs = torch.log_softmax(logprobs[..., :width], dim=-1)
        return logprobs

    def _score(
        self, rollouts: Sequence[Rollout], model: LanguageModel | None = None
    ) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Return logprobs and entropies by the student, or by another model in the student's vocabulary."""
        policy = self.policy
        model = model or policy
        input_ids, mask = pad_rollouts(rollouts, policy.tokenizer.pad_token_id or 0)
        results = []
        with policy.autocast():
            hidden = model.hidden(input_ids.to(policy.device), mask.to(policy.device))
            for row, rollout in enumerate(rollouts):
                start = len(rollout.prompt.token_ids) - 1
                states_TH = hidden[row, start : start + rollout.num_tokens]
                ids_T = torch.tensor(rollout.token_ids, device=policy.device)
                logprobs: list[float] = []
                entropies: list[float] = []
                for first in range(0, rollout.num_tokens, self._config.logits_slice_tokens):
                    part = slice(first, first + self._config.logits_slice_tokens)
                    values_NV = self._in_student_vocabulary(model.logprobs(states_TH[part]))
                    logprobs += values_NV.gather(-1, ids_T[part, None]).squeeze(-1).tolist()
                    entropies += torch.special.entr(values_NV.exp()).sum(-1).tolist()
                results.append((tuple(logprobs), tuple(entropies)))
        return results

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


def _pick(hidden_BLH: Tensor, batch: MicroBatch) -> Tensor:
    return hidden_BLH[batch.rows_N, batch.columns_N]


def _check_vocabularies(policy: Policy, teacher: LanguageModel) -> None:
    ours = policy.model.config.get_text_config().vocab_size
    theirs = teacher.model.config.get_text_config().vocab_size
    if theirs < ours:
        raise ConfigError(
            f"the teacher's vocabulary has {theirs} entries and the student's {ours}: they are not of one family; "
            "use the text path (method.supervision.type: chunked) for this teacher"
        )
