"""The optimiser step: against a float64 brute force that materializes every logit, and on its own promises."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from omniopd.config import LearnerConfig
from omniopd.errors import ConfigError, LearnerError, NonFiniteLossError
from omniopd.generation import Sampler, SampleRequest
from omniopd.learner.batch import Normalizer
from omniopd.learner.learner import MAX_STEPS_WITHOUT_SIGNAL, Learner, schedule
from omniopd.learner.policy import LanguageModel, Policy
from omniopd.types import Rollout, SoftTarget, TokenSignal

BETA = 0.1


def omniopd_signals() -> list[TokenSignal]:
    """Return four rollouts of unlike lengths: two audits, one, none, everything."""
    generator = torch.Generator().manual_seed(1)
    spans = [(7, [(1, 3), (4, 6)]), (4, [(0, 2)]), (9, []), (3, [(0, 3)])]
    signals = []
    for number, (length, chunks) in enumerate(spans):
        ids = torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist()
        weights = [0.0] * length
        for start, end in chunks:
            weights[start:end] = [0.2 + 0.1 * number + 0.05 * start] * (end - start)
        audited = [any(start <= t < end for start, end in chunks) for t in range(length)]
        signals.append(
            TokenSignal(
                rollout=tiny.rollout_of(ids, prompt_ids=range(3, 5 + number), name=f"p{number}/0"),
                advantages=tuple(weights) if chunks else None,
                pg_weights=tuple(float(a) for a in audited) if chunks else None,
                anchor_weights=tuple(0.0 if a else BETA for a in audited),
            )
        )
    return signals


def moved(network: Any, *, by: float = 0.05) -> None:
    """Move a model away from its initial self, so that the anchor has something to say."""
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            steps = torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter)
            parameter.add_(by * torch.cos(steps + index))


def start_step(**settings: Any) -> Learner:
    """Make a learner whose student has moved away from its reference."""
    made = tiny.learner(**settings)
    moved(made.policy.model)
    return made


def sequence_mean(sums: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(sums)).sum() / len(sums)


def naive_omniopd(network: Any, reference: Any, signals: Sequence[TokenSignal], *, token_mean: bool = False) -> Tensor:
    """L = mean over rollouts of [- sum_c w_c sum_t log P(y_t) + beta sum_unaudited KL(R || P)], nothing clever."""
    pg, kl = [], []
    for signal in signals:
        logprobs = tiny.naive_logprobs(network, signal.rollout)
        with torch.no_grad():
            anchor = tiny.naive_logprobs(reference, signal.rollout)
        for t, token in enumerate(signal.rollout.token_ids):
            if signal.advantages is not None and signal.pg_weights is not None and signal.pg_weights[t]:
                pg.append(-signal.advantages[t] * logprobs[t, token])
            elif signal.anchor_weights is not None:
                kl.append(BETA * (anchor[t].exp() * (anchor[t] - logprobs[t])).sum())
    if token_mean:
        return torch.stack(pg).sum() / len(pg) + torch.stack(kl).sum() / len(kl)
    return (torch.stack(pg).sum() + torch.stack(kl).sum()) / len(signals)


def brute_force(loss: Tensor, network: Any) -> tuple[float, dict[str, Tensor]]:
    network.zero_grad(set_to_none=True)
    loss.backward()
    found = tiny.gradients(network)
    network.zero_grad(set_to_none=True)
    return loss.item(), found


def gradient_of(made: Learner, signals: Sequence[TokenSignal]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of one step."""
    loss = made.update(1, signals).loss
    return loss, tiny.gradients(made.policy.model)


# The objective


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("logits_slice_tokens", [1, 3, 1000])
def test_omniopd_step_equals_brute_force(tied: bool, micro_batch_size: int, logits_slice_tokens: int) -> None:
    settings = {"micro_batch_size": micro_batch_size, "logits_slice_tokens": logits_slice_tokens}
    made = start_step(student=tiny.policy(tied=tied), **settings)
    signals = omniopd_signals()
    reference = tiny.model(tied=tied)
    loss, expected = brute_force(naive_omniopd(made.policy.model, reference, signals), made.policy.model)
    ours, found = gradient_of(made, signals)
    assert ours == pytest.approx(loss, rel=1e-10)
    assert tiny.largest_gap(found, expected) < 1e-10


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_token_mean_divides_each_stream_by_its_own_tokens(micro_batch_size: int) -> None:
    made = start_step(aggregation="token_mean", micro_batch_size=micro_batch_size, logits_slice_tokens=3)
    signals = omniopd_signals()
    naive = naive_omniopd(made.policy.model, tiny.model(), signals, token_mean=True)
    loss, expected = brute_force(naive, made.policy.model)
    ours, found = gradient_of(made, signals)
    assert ours == pytest.approx(loss, rel=1e-10)
    assert tiny.largest_gap(found, expected) < 1e-10


def test_metrics_tell_the_streams_apart() -> None:
    made = start_step()
    signals = omniopd_signals()
    with torch.no_grad():
        pg = [
            -sum(a * p for a, p in zip(s.advantages or (), picked(made.policy.model, s.rollout), strict=False))
            for s in signals
        ]
    update = made.update(7, signals)
    # audited: 4 + 2 + 0 + 3 of 7 + 4 + 9 + 3 tokens
    assert update.metrics["tokens/pg"] == 9
    assert update.metrics["tokens/anchor"] == 14
    assert update.metrics["loss/pg"] == pytest.approx(sum(pg) / 4, rel=1e-10)
    assert update.loss == pytest.approx(update.metrics["loss/pg"] + update.metrics["loss/anchor"], rel=1e-12)
    assert set(update.metrics) == {"tokens/pg", "tokens/anchor", "loss/pg", "loss/anchor"}
    assert (update.step, update.policy_version, made.policy_version) == (7, 1, 1)
    assert update.grad_norm > 0


def picked(network: Any, rollout: Rollout) -> list[float]:
    """Return the logprobs of a rollout's own tokens."""
    logprobs = tiny.naive_logprobs(network, rollout)
    return [logprobs[t, token].item() for t, token in enumerate(rollout.token_ids)]


def test_anchor_is_zero_before_the_first_step() -> None:
    made = tiny.learner()
    update = made.update(1, omniopd_signals())
    assert abs(update.metrics["loss/anchor"]) < 1e-15


def test_anchor_has_no_part_when_everything_is_audited() -> None:
    made = start_step()
    update = made.update(1, omniopd_signals()[3:])
    assert "loss/anchor" not in update.metrics
    assert update.loss == update.metrics["loss/pg"] > 0


def test_without_chunks_only_the_anchor_is_left() -> None:
    made = start_step()
    signal = omniopd_signals()[2]
    with torch.no_grad():
        ours = tiny.naive_logprobs(made.policy.model, signal.rollout)
        anchor = tiny.naive_logprobs(tiny.model(), signal.rollout)
    kl = (anchor.exp() * (anchor - ours)).sum().item()
    # loss = beta * sum KL
    assert made.update(1, [signal]).loss == pytest.approx(BETA * kl, rel=1e-10)


def test_reference_stays_the_initial_student_after_many_steps() -> None:
    made = tiny.learner(learning_rate=1e-2)
    before = tiny.naive_logprobs(tiny.model(), omniopd_signals()[0].rollout)
    for step in range(1, 4):
        made.update(step, omniopd_signals())
    with made.policy.reference() as frozen:
        after = tiny.naive_logprobs(frozen.model, omniopd_signals()[0].rollout)
    assert torch.equal(before, after)
    assert made.update(4, omniopd_signals()).metrics["loss/anchor"] > 1e-6


# The other streams


def other_signals(**fields: float) -> list[TokenSignal]:
    """Return two rollouts with one weight a token, unlike within a rollout."""
    rollouts = [tiny.rollout_of([4, 9, 11], name="a/0"), tiny.rollout_of([8, 3, 22, 7, 12], name="b/0")]
    return [
        TokenSignal(
            rollout=r,
            **{name: tuple(w * (1 + t % 2) for t in range(r.num_tokens)) for name, w in fields.items()},  # type: ignore[arg-type]
        )
        for r in rollouts
    ]


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_divergence_to_an_open_weight_teacher(kind: str) -> None:
    teacher = tiny.model(phase=1.0)
    made = tiny.learner(
        teacher=LanguageModel(teacher, compute_dtype=torch.float64),
        losses={"kl": {"type": kind}},
        logits_slice_tokens=2,
        micro_batch_size=2,
    )
    signals = other_signals(kl_weights=0.5)
    sums = []
    for signal in signals:
        p = tiny.naive_logprobs(made.policy.model, signal.rollout)
        q = tiny.naive_logprobs(teacher, signal.rollout).detach()
        each = (p.exp() * (p - q)).sum(-1) if kind == "reverse_kl" else (q.exp() * (q - p)).sum(-1)
        sums.append((torch.tensor(signal.kl_weights) * each).sum())
    loss, expected = brute_force(sequence_mean(sums), made.policy.model)
    ours, found = gradient_of(made, signals)
    assert ours == pytest.approx(loss, rel=1e-10)
    assert tiny.largest_gap(found, expected) < 1e-10


def test_cross_entropy_stream() -> None:
    made = tiny.learner(logits_slice_tokens=2)
    signals = other_signals(ce_weights=0.5)
    sums = []
    for signal in signals:
        p = tiny.naive_logprobs(made.policy.model, signal.rollout)
        own = p.gather(-1, torch.tensor(signal.rollout.token_ids)[:, None]).squeeze(-1)
        sums.append(-(torch.tensor(signal.ce_weights) * own).sum())
    loss, expected = brute_force(sequence_mean(sums), made.policy.model)
    ours, found = gradient_of(made, signals)
    assert ours == pytest.approx(loss, rel=1e-10)
    assert tiny.largest_gap(found, expected) < 1e-10


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_soft_target_stream_with_ragged_targets_and_an_anchor(micro_batch_size: int) -> None:
    made = start_step(logits_slice_tokens=2, micro_batch_size=micro_batch_size)
    targets = [
        (SoftTarget(position=1, token_ids=(4, 9, 10), probs=(0.3, 0.2, 0.1), self_weight=0.4),),
        (
            SoftTarget(position=0, token_ids=(8,), probs=(1.0,)),
            SoftTarget(position=3, token_ids=(7, 2), probs=(2 / 3, 1 / 6), self_weight=1 / 6),
        ),
    ]
    signals = [
        dataclasses.replace(
            s,
            soft_targets=of,
            anchor_weights=tuple(0.0 if t in {x.position for x in of} else BETA for t in range(s.rollout.num_tokens)),
        )
        for s, of in zip(other_signals(), targets, strict=True)
    ]
    reference = tiny.model()
    sums = []
    for signal in signals:
        p = tiny.naive_logprobs(made.policy.model, signal.rollout)
        anchor = tiny.naive_logprobs(reference, signal.rollout).detach()
        total = torch.zeros((), dtype=torch.float64)
        by_position = {t.position: t for t in signal.soft_targets or ()}
        for t in range(signal.rollout.num_tokens):
            target = by_position.get(t)
            if target is None:
                total = total + BETA * (anchor[t].exp() * (anchor[t] - p[t])).sum()
                continue
            whole = target.self_weight * p[t].detach().exp()
            for token, share in zip(target.token_ids, target.probs, strict=True):
                whole[token] += share
            assert whole.sum().item() == pytest.approx(1)
            total = total - (whole * p[t]).sum()
        sums.append(total)
    loss, expected = brute_force(sequence_mean(sums), made.policy.model)
    ours, found = gradient_of(made, signals)
    assert ours == pytest.approx(loss, rel=1e-10)
    assert tiny.largest_gap(found, expected) < 1e-10


def test_a_longer_teacher_vocabulary_is_cut_and_renormalized() -> None:
    teacher = tiny.model(vocabulary=30, phase=1.0)
    made = tiny.learner(teacher=LanguageModel(teacher, compute_dtype=torch.float64))
    signals = other_signals(kl_weights=1.0)
    sums = []
    for signal in signals:
        p = tiny.naive_logprobs(made.policy.model, signal.rollout)
        q = torch.log_softmax(tiny.naive_logprobs(teacher, signal.rollout)[:, : tiny.VOCABULARY], -1)
        sums.append((torch.tensor(signal.kl_weights) * (p.exp() * (p - q)).sum(-1)).sum())
    assert made.update(1, signals).loss == pytest.approx(sequence_mean(sums).item(), rel=1e-10)


def test_a_shorter_teacher_vocabulary_is_refused() -> None:
    teacher = LanguageModel(tiny.model(vocabulary=20), compute_dtype=torch.float64)
    with pytest.raises(ConfigError, match="output layer has 20 rows and the student's 23"):
        tiny.learner(teacher=teacher)


def test_a_teacher_signal_without_a_teacher_is_an_error() -> None:
    with pytest.raises(LearnerError, match="none is loaded"):
        tiny.learner().update(1, other_signals(kl_weights=1.0))


def test_expected_policy_gradient_is_the_gradient_of_the_sequence_reverse_kl() -> None:
    """V = 5, T = 2: all 25 rollouts, each weighted by its own probability."""
    student = tiny.policy(vocabulary=5)
    teacher = tiny.model(vocabulary=5, phase=1.0)
    rollouts = [
        tiny.rollout_of(ids, prompt_ids=(3, 4), name=f"p/{i}")
        for i, ids in enumerate(itertools.product(range(5), repeat=2))
    ]

    def sequence_logprob(network: Any, rollout: Rollout) -> Tensor:
        logprobs = tiny.naive_logprobs(network, rollout)
        return logprobs.gather(-1, torch.tensor(rollout.token_ids)[:, None]).sum()

    p = torch.stack([sequence_logprob(student.model, r) for r in rollouts])
    q = torch.stack([sequence_logprob(teacher, r) for r in rollouts]).detach()
    assert p.exp().sum().item() == pytest.approx(1.0)
    _, expected = brute_force((p.exp() * (p - q)).sum(), student.model)
    # The learner takes the mean over 25 rollouts, so P(y) enters as 25 P(y); the advantage is log Q(y)/P(y).
    signals = [
        TokenSignal(rollout=r, advantages=((b - a).item(),) * 2, pg_weights=(25 * a.exp().item(),) * 2)
        for r, a, b in zip(rollouts, p.detach(), q, strict=True)
    ]
    _, found = gradient_of(tiny.learner(student=student, micro_batch_size=25), signals)
    assert tiny.largest_gap(found, expected) < 1e-10


def test_a_constant_weight_teaches_nothing_in_expectation() -> None:
    student = tiny.policy(vocabulary=5)
    rollouts = [tiny.rollout_of(ids, prompt_ids=(3, 4)) for ids in itertools.product(range(5), repeat=2)]
    signals = []
    for rollout in rollouts:
        probability = math.exp(sum(picked(student.model, rollout)))
        signals.append(
            TokenSignal(rollout=rollout, advantages=(0.7, 0.7), pg_weights=(25 * probability, 25 * probability))
        )
    _, found = gradient_of(tiny.learner(student=student, micro_batch_size=25), signals)
    # E[grad log P] = 0
    assert max(float(g.abs().max()) for g in found.values()) < 1e-12


# Memory


class WidestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor whose last dimension is the vocabulary, and the largest tensor of all."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary, self.hidden = vocabulary, hidden
        self.rows = 0
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
                is_weight = tensor.dim() == 2 and tensor.shape[0] == self.hidden
                if tensor.dim() and tensor.shape[-1] == self.vocabulary and not is_weight:
                    self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


def widest_logits(length: int, *, slice_tokens: int) -> WidestLogits:
    made = tiny.learner(student=tiny.policy(vocabulary=2000, dtype=torch.float32), logits_slice_tokens=slice_tokens)
    rollout = tiny.rollout_of([3 + t % 19 for t in range(length)])
    audited = [t % 8 < 4 for t in range(length)]
    signal = TokenSignal(
        rollout=rollout,
        advantages=tuple(0.5 * a for a in audited),
        pg_weights=tuple(float(a) for a in audited),
        anchor_weights=tuple(0.0 if a else BETA for a in audited),
    )
    with WidestLogits(2000, 32) as seen:
        made.update(1, [signal])
        made.score([rollout])
    return seen


def test_logits_in_memory_do_not_grow_with_the_rollout() -> None:
    short, long = widest_logits(64, slice_tokens=16), widest_logits(512, slice_tokens=16)
    assert short.rows == long.rows == 16
    # 512 x 2,000 logits would be 1,024,000 numbers.
    assert long.numel < 512 * 2000 / 3


def test_logits_in_memory_grow_with_the_slice() -> None:
    seen = widest_logits(512, slice_tokens=1000)
    assert seen.rows == 512
    assert seen.numel >= 512 * 2000


# What goes wrong


def test_non_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    saved: list[str] = []

    def save_offenders(signals: Sequence[TokenSignal]) -> Path:
        saved.extend(s.rollout.id for s in signals)
        return tmp_path / "offenders.jsonl"

    made = tiny.learner(save_offenders=save_offenders, micro_batch_size=1)
    before = {name: p.clone() for name, p in made.policy.model.named_parameters()}
    good, bad = other_signals(ce_weights=1.0)
    bad = dataclasses.replace(bad, ce_weights=(math.inf, *(bad.ce_weights or ())[1:]))
    with pytest.raises(NonFiniteLossError, match=r"step 3: the loss is not finite.*b/0.*offenders\.jsonl") as caught:
        made.update(3, [good, bad])
    assert "weights were not changed" in str(caught.value)
    assert saved == ["b/0"]
    assert all(torch.equal(before[name], p) for name, p in made.policy.model.named_parameters())
    assert made.policy_version == 0


def test_non_finite_gradient_stops_before_the_weights_change() -> None:
    made = tiny.learner()
    first = next(iter(made.policy.model.parameters()))
    first.register_hook(lambda gradient: gradient * math.nan)
    before = {name: p.clone() for name, p in made.policy.model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="the gradient norm is nan"):
        made.update(1, other_signals(ce_weights=1.0))
    assert all(torch.equal(before[name], p) for name, p in made.policy.model.named_parameters())


def test_a_step_after_a_failed_one_is_clean() -> None:
    good, bad = other_signals(ce_weights=1.0)
    bad = dataclasses.replace(bad, ce_weights=(math.inf,) * 5)
    failed, fresh = tiny.learner(), tiny.learner()
    with pytest.raises(NonFiniteLossError):
        failed.update(1, [good, bad])
    assert failed.update(1, [good]).grad_norm == fresh.update(1, [good]).grad_norm


@pytest.mark.parametrize("weight", [-0.5, math.nan])
def test_weights_below_zero_are_refused(weight: float) -> None:
    signal = other_signals(ce_weights=1.0)[0]
    with pytest.raises(LearnerError, match=r"the ce weights of rollout a/0 hold (-0\.5|nan)"):
        tiny.learner().update(1, [dataclasses.replace(signal, ce_weights=(1.0, weight, 1.0))])


def test_a_step_without_a_signal_changes_nothing_and_many_in_a_row_are_an_error() -> None:
    loud = other_signals(ce_weights=1.0)
    silent = [dataclasses.replace(s, ce_weights=(0.0,) * s.rollout.num_tokens) for s in loud]
    made = tiny.learner()
    before = {name: p.clone() for name, p in made.policy.trainable_state().items()}
    for step in range(1, MAX_STEPS_WITHOUT_SIGNAL):
        update = made.update(step, silent if step % 2 else [])
        assert (update.loss, update.grad_norm, update.policy_version) == (0.0, 0.0, 0)
    assert all(torch.equal(p, before[name]) for name, p in made.policy.trainable_state().items())
    with pytest.raises(LearnerError, match=f"for {MAX_STEPS_WITHOUT_SIGNAL} steps no rollout has carried a signal"):
        made.update(MAX_STEPS_WITHOUT_SIGNAL, silent)
    assert made.update(MAX_STEPS_WITHOUT_SIGNAL + 1, loud).policy_version == 1
    assert made.update(MAX_STEPS_WITHOUT_SIGNAL + 2, silent).loss == 0.0  # The count starts again.


def test_a_silent_rollout_counts_as_a_rollout_but_costs_nothing() -> None:
    loud, other = other_signals(ce_weights=1.0)
    silent = dataclasses.replace(other, ce_weights=(0.0,) * 5)
    alone = tiny.learner(micro_batch_size=1).update(1, [loud])
    both = tiny.learner(micro_batch_size=1).update(1, [loud, silent])
    # Token sums are averaged over rollouts, and the silent one is a rollout.
    assert both.loss == pytest.approx(alone.loss / 2, rel=1e-12)
    assert both.metrics["tokens/ce"] == alone.metrics["tokens/ce"] == 3


def test_normalizer_leaves_unused_streams_out() -> None:
    normalizer = Normalizer.of(omniopd_signals(), "token_mean")
    assert (normalizer.scale("pg"), normalizer.scale("anchor"), normalizer.scale("kl")) == (1 / 9, 1 / 14, 0.0)
    assert Normalizer.of(omniopd_signals(), "sequence_mean_token_sum").scale("pg") == 1 / 4


# The optimizer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        # (step + 1) / (warmup + 1)
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1]),
        # done = (step - 1) / 4 after one step of warm-up
        ({"schedule": "linear", "warmup_steps": 1}, [0.5, 1, 0.75, 0.5, 0.25]),
        # (1 + cos(pi step / 5)) / 2
        ({"schedule": "cosine"}, [1, 0.904508, 0.654508, 0.345492, 0.095492]),
    ],
)
def test_schedule(settings: dict[str, Any], expected: list[float]) -> None:
    factor = schedule(LearnerConfig(**settings), 5)
    assert [factor(step) for step in range(5)] == pytest.approx(expected, abs=1e-6)


def test_schedule_beyond_its_end_stays_at_zero() -> None:
    assert schedule(LearnerConfig(schedule="linear"), 5)(9) == 0
    assert schedule(LearnerConfig(schedule="cosine"), 5)(9) == 0


def test_learning_rate_told_is_the_one_used() -> None:
    made = tiny.learner(learning_rate=1e-2, warmup_steps=1, num_steps=4)
    rates = [made.update(step, other_signals(ce_weights=1.0)).learning_rate for step in (1, 2, 3)]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2])
    fresh = tiny.learner(learning_rate=1e-2, warmup_steps=1, num_steps=4)
    weight = fresh.policy.model.get_output_embeddings().weight
    before = weight.detach().clone()
    fresh.update(1, other_signals(ce_weights=1.0))
    # The first step of Adam moves every weight by the learning rate, whatever its gradient.
    assert (weight - before).abs().max().item() == pytest.approx(5e-3, rel=1e-3)


def test_gradient_norm_is_told_before_clipping_and_clipping_works() -> None:
    signals = other_signals(ce_weights=1.0)
    free = tiny.learner()
    norm = free.update(1, signals).grad_norm
    clipped = tiny.learner(max_grad_norm=norm / 4)
    assert clipped.update(1, signals).grad_norm == pytest.approx(norm, rel=1e-12)
    left = torch.stack([g.norm() for g in tiny.gradients(clipped.policy.model).values()]).norm().item()
    assert left == pytest.approx(norm / 4, rel=1e-5)


def test_weight_decay_and_betas_reach_the_optimizer() -> None:
    group = tiny.learner(weight_decay=0.3, betas=(0.8, 0.95)).optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.8, 0.95))


def test_going_on_from_a_saved_state_is_bit_for_bit() -> None:
    settings = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 1, "num_steps": 4}
    straight = tiny.learner(**settings)
    told = [straight.update(step, omniopd_signals()) for step in (1, 2, 3, 4)]
    first = tiny.learner(**settings)
    for step in (1, 2):
        first.update(step, omniopd_signals())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = tiny.learner(**settings)
    second.load_state_dict(torch.load(file, weights_only=False))
    assert [second.update(step, omniopd_signals()) for step in (3, 4)] == told[2:]
    ends = zip(straight.policy.model.parameters(), second.policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in ends)


# Reading instead of training


def test_scores_are_naive_logprobs_and_entropies() -> None:
    made = tiny.learner(micro_batch_size=3, logits_slice_tokens=2)
    rollouts = [s.rollout for s in omniopd_signals()]
    for rollout, (logprobs, entropies) in zip(rollouts, made.score(rollouts), strict=True):
        naive = tiny.naive_logprobs(made.policy.model, rollout)
        assert logprobs == pytest.approx(picked(made.policy.model, rollout), rel=1e-10)
        assert entropies == pytest.approx((-naive.exp() * naive).sum(-1).tolist(), rel=1e-10)
    assert made.score([]) == []


def test_scoring_leaves_the_mode_of_the_model_alone() -> None:
    made = tiny.learner()
    for mode in (True, False):
        made.policy.model.train(mode)
        made.score([omniopd_signals()[0].rollout])
        assert made.policy.model.training is mode


def test_learner_and_sampler_see_the_same_student() -> None:
    student = tiny.policy(dtype=torch.float32)
    prompts = [(5, 6, 7), (4,), (8, 9, 10, 11, 12)]
    requests = [SampleRequest(token_ids=p, num_samples=2, max_tokens=12, seed=3) for p in prompts]
    groups = Sampler(student.model, student.tokenizer).sample(requests)
    samples = [(p, s) for p, group in zip(prompts, groups, strict=True) for s in group]
    scores = tiny.learner(student=student).score([tiny.rollout_of(s.token_ids, prompt_ids=p) for p, s in samples])
    for (_, sample), (logprobs, entropies) in zip(samples, scores, strict=True):
        assert sample.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert sample.entropies == pytest.approx(entropies, abs=1e-4)


def test_bfloat16_computing_is_near_float32() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        student = Policy(tiny.model(dtype=torch.float32), tiny.tokenizer(), compute_dtype=dtype, lora=False)
        made = tiny.learner(student=student, logits_slice_tokens=3)
        moved(student.model)
        update = made.update(1, omniopd_signals())
        assert {p.dtype for p in student.model.parameters()} == {torch.float32}
        found[dtype] = update, tiny.gradients(student.model)
    (exact, right), (rough, near) = found[torch.float32], found[torch.bfloat16]
    # bfloat16 keeps 8 bits: errors of about 1/256 a product.
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss
    for name in right:
        similarity = torch.nn.functional.cosine_similarity(right[name].flatten(), near[name].flatten(), dim=0)
        assert similarity > 0.98, name


def test_stale_rollouts_are_refused_before_anything_changes() -> None:
    made = tiny.learner(max_steps_off_policy=0)
    signals = omniopd_signals()  # drawn with version 0
    made.update(1, signals)
    before = {name: p.clone() for name, p in made.policy.trainable_state().items()}
    with pytest.raises(LearnerError, match=r"version 0, the learner is at 1 and rollout\.max_steps_off_policy is 0"):
        made.update(2, signals)
    assert all(torch.equal(p, before[name]) for name, p in made.policy.trainable_state().items())
    tolerant = tiny.learner(max_steps_off_policy=1)
    tolerant.update(1, signals)
    assert tolerant.update(2, signals).policy_version == 2
