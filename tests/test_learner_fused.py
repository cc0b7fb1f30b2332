"""The optimiser step through the fused kernel: what the plain step gives, to rounding, without its logits in memory."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tiny
from omniopd.errors import NonFiniteLossError
from omniopd.kernels import chunked, chunked_divergence, chunked_logprobs
from omniopd.learner import fused as fused_module
from omniopd.learner.learner import FUSED_VOCABULARY, Learner
from omniopd.learner.policy import LanguageModel, Policy
from omniopd.types import SoftTarget, TokenSignal
from test_learner import (
    BETA,
    WidestLogits,
    brute_force,
    gradient_of,
    moved,
    naive_omniopd,
    omniopd_signals,
    other_signals,
    sequence_mean,
    start_step,
)

NEVER = 10**9


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what the learner asks of the fused kernels, and let them do it."""
    made: list[str] = []

    def divergence(*args: Any, **settings: Any) -> Tensor:
        made.append(settings["kind"])
        return chunked_divergence(*args, **settings)

    def logprobs(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        made.append("logprob")
        return chunked_logprobs(*args, **settings)

    monkeypatch.setattr(fused_module, "chunked_divergence", divergence)
    monkeypatch.setattr(fused_module, "chunked_logprobs", logprobs)
    return made


def open_weight(**settings: Any) -> LanguageModel:
    return LanguageModel(tiny.model(**{"phase": 1.0, **settings}), compute_dtype=torch.float64)


def check_step(made: Learner, signals: Sequence[TokenSignal], naive: Tensor) -> None:
    """Compare loss and every gradient of one step with a brute force over whole logits."""
    loss, expected = brute_force(naive, made.policy.model)
    ours, found = gradient_of(made, signals)
    assert ours == pytest.approx(loss, rel=1e-10)
    assert tiny.largest_gap(found, expected) < 1e-10


def weights_of(weights: Sequence[float] | None) -> Tensor:
    assert weights is not None
    return torch.tensor(weights, dtype=torch.float64)


def naive_divergence(
    network: Any, teacher: Any, signals: Sequence[TokenSignal], divergence: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the mean over rollouts of the weighted sums of divergence(log P, log Q)."""
    sums = []
    for signal in signals:
        p = tiny.naive_logprobs(network, signal.rollout)
        q = tiny.naive_logprobs(teacher, signal.rollout).detach()[:, : p.shape[-1]].log_softmax(-1)
        sums.append((weights_of(signal.kl_weights) * divergence(p, q)).sum())
    return sequence_mean(sums)


# Each stream


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_omniopd_step_equals_brute_force(calls: list[str], tied: bool, micro_batch_size: int) -> None:
    made = start_step(student=tiny.policy(tied=tied), micro_batch_size=micro_batch_size, fused_from=0)
    naive = naive_omniopd(made.policy.model, tiny.model(tied=tied), omniopd_signals())
    check_step(made, omniopd_signals(), naive)
    # Rollouts of 9, 4, 7 and 3 tokens: the first has no audit, the last no anchor.
    expected = {1: (3, 3), 2: (2, 2), 4: (1, 1)}[micro_batch_size]
    assert (calls.count("logprob"), calls.count("forward_kl")) == expected


def test_fused_and_plain_steps_are_the_same_step(calls: list[str]) -> None:
    told, weights = [], []
    for fused_from in (0, NEVER):
        made = start_step(fused_from=fused_from, aggregation="token_mean", micro_batch_size=3)
        updates = [made.update(step, omniopd_signals()) for step in (1, 2, 3)]
        told.append([number for u in updates for number in (u.loss, u.grad_norm, *u.metrics.values())])
        weights.append({name: p.detach() for name, p in made.policy.model.named_parameters()})
        # In each of three steps a micro-batch with both streams, and the unaudited rollout; then nothing more.
        assert len(calls) == 9
    assert told[0] == pytest.approx(told[1], rel=1e-8)
    assert tiny.largest_gap(*weights) < 1e-7


def test_cross_entropy_stream(calls: list[str]) -> None:
    made = tiny.learner(fused_from=0, micro_batch_size=2)
    signals = other_signals(ce_weights=0.5)
    sums = []
    for signal in signals:
        p = tiny.naive_logprobs(made.policy.model, signal.rollout)
        own = p.gather(-1, torch.tensor(signal.rollout.token_ids)[:, None]).squeeze(-1)
        sums.append(-(weights_of(signal.ce_weights) * own).sum())
    check_step(made, signals, sequence_mean(sums))
    assert calls == ["logprob"]


def forward(p: Tensor, q: Tensor) -> Tensor:
    return (q.exp() * (q - p)).sum(-1)


def reverse(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def jsd(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def divergence(p: Tensor, q: Tensor) -> Tensor:
        mixture = (beta * q.exp() + (1 - beta) * p.exp()).log()
        return beta * (q.exp() * (q - mixture)).sum(-1) + (1 - beta) * (p.exp() * (p - mixture)).sum(-1)

    return divergence


def scaled_jsd(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, q: jsd(beta)(p, q) / (beta * (1 - beta))


def softened(divergence: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, q: divergence((p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1))


KINDS: list[tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor], str | None]] = [
    ({"type": "reverse_kl"}, reverse, "reverse_kl"),
    ({"type": "forward_kl"}, forward, "forward_kl"),
    ({"type": "jsd"}, scaled_jsd(0.5), "scaled_jsd"),
    ({"type": "jsd", "beta": 0.2}, scaled_jsd(0.2), "scaled_jsd"),
    ({"type": "jsd", "beta": 0.01}, scaled_jsd(0.01), "scaled_jsd"),
    ({"type": "jsd", "beta": 0.0}, forward, "scaled_jsd"),
    ({"type": "jsd", "beta": 1.0}, reverse, "scaled_jsd"),
    # The kernel would lose digits here.
    ({"type": "jsd", "beta": 0.001}, scaled_jsd(0.001), None),
    ({"type": "jsd", "beta": 0.999}, scaled_jsd(0.999), None),
    ({"type": "jsd", "beta": 0.8, "convention": "trl"}, jsd(0.8), "trl_jsd"),
    ({"type": "jsd", "beta": 0.0, "convention": "trl"}, forward, "trl_jsd"),
    ({"type": "jsd", "beta": 1.0, "convention": "trl"}, reverse, "trl_jsd"),
    ({"type": "jsd", "beta": 0.001, "convention": "trl"}, jsd(0.001), "trl_jsd"),
    ({"type": "reverse_kl", "temperature": 2}, softened(reverse, 2), "reverse_kl"),
    ({"type": "forward_kl", "temperature": 0.5}, softened(forward, 0.5), "forward_kl"),
    ({"type": "jsd", "beta": 0.3, "temperature": 2}, softened(scaled_jsd(0.3), 2), "scaled_jsd"),
    ({"type": "total_variation"}, lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(-1), None),
]


@pytest.mark.parametrize(("settings", "divergence", "kind"), KINDS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_divergences_to_a_teacher_equal_brute_force(
    calls: list[str], settings: dict[str, Any], divergence: Callable[[Tensor, Tensor], Tensor], kind: str | None
) -> None:
    frozen = open_weight()
    made = tiny.learner(teacher=frozen, losses={"kl": settings}, micro_batch_size=2, fused_from=0)
    signals = other_signals(kl_weights=0.5)
    check_step(made, signals, naive_divergence(made.policy.model, frozen.model, signals, divergence))
    assert calls == ([] if kind is None else [kind])


@pytest.mark.parametrize("fused_from", [0, NEVER])
def test_a_tied_student_and_a_teacher_with_a_padded_tied_table(fused_from: int) -> None:
    frozen = open_weight(vocabulary=30, tied=True)
    made = tiny.learner(student=tiny.policy(tied=True), teacher=frozen, fused_from=fused_from)
    signals = other_signals(kl_weights=1.0)
    check_step(made, signals, naive_divergence(made.policy.model, frozen.model, signals, reverse))


def test_a_step_is_the_same_however_it_is_cut() -> None:
    found = []
    for micro_batch_size in (1, 2, 3):
        made = tiny.learner(teacher=open_weight(), fused_from=0, micro_batch_size=micro_batch_size)
        signals = [
            dataclasses.replace(s, kl_weights=tuple(0.5 + 0.25 * (t % 3) for t in range(s.rollout.num_tokens)))
            for s in omniopd_signals()
        ]
        found.append(gradient_of(made, signals))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        assert tiny.largest_gap(gradients, found[0][1]) < 1e-12


def test_every_stream_in_one_step_and_the_soft_one_stays_plain(calls: list[str]) -> None:
    frozen = open_weight()
    made = start_step(
        teacher=frozen, fused_from=0, micro_batch_size=2, logits_slice_tokens=3, losses={"kl": {"type": "forward_kl"}}
    )
    first, second = other_signals(ce_weights=0.5)
    signals = [
        dataclasses.replace(
            first, advantages=(0.3, -0.2, 0.0), pg_weights=(1.0, 2.0, 1.0), anchor_weights=(0.1, 0.0, 0.2)
        ),
        dataclasses.replace(
            second,
            kl_weights=(0.0, 1.0, 0.5, 0.0, 2.0),
            anchor_weights=(0.0, 0.0, 0.1, 0.0, 0.0),
            soft_targets=(SoftTarget(position=4, token_ids=(7, 2), probs=(0.5, 0.25), self_weight=0.25),),
        ),
    ]
    reference = tiny.model()
    (p, q), (r, s) = (
        (tiny.naive_logprobs(made.policy.model, x.rollout) for x in signals),
        (
            tiny.naive_logprobs(frozen.model, signals[1].rollout).detach(),
            [tiny.naive_logprobs(reference, x.rollout).detach() for x in signals],
        ),
    )
    own = [x.gather(-1, torch.tensor(y.rollout.token_ids)[:, None])[:, 0] for x, y in zip((p, q), signals, strict=True)]
    ce = -sum((weights_of(x.ce_weights) * o).sum() for x, o in zip(signals, own, strict=True))
    pg = -(0.3 * own[0][0] - 2 * 0.2 * own[0][1])
    anchor = 0.1 * forward(p[:1], s[0][:1]).sum() + 0.2 * forward(p[2:], s[0][2:]).sum()
    anchor = anchor + 0.1 * forward(q[2:3], s[1][2:3]).sum()
    kl = (weights_of(signals[1].kl_weights) * forward(q, r)).sum()
    whole = 0.25 * q[4].detach().exp()
    whole[7] += 0.5
    whole[2] += 0.25
    soft = -(whole * q[4]).sum()
    check_step(made, signals, (ce + pg + anchor + kl + soft) / 2)
    assert sorted(calls) == ["forward_kl", "forward_kl", "logprob", "logprob"]


# Every head


def capped(network: Any, cap: float) -> Any:
    """Cap a model's logits as Gemma 2 does."""
    network.config.final_logit_softcapping = cap
    network.register_forward_hook(
        lambda module, args, output: setattr(output, "logits", cap * torch.tanh(output.logits / cap))
    )
    return network


def policy_of(network: Any) -> Policy:
    return Policy(network, tiny.tokenizer(), compute_dtype=torch.float64, lora=False)


def test_capped_logits(calls: list[str]) -> None:
    frozen = LanguageModel(capped(tiny.model(phase=1.0), 3.0), compute_dtype=torch.float64)
    made = start_step(student=policy_of(capped(tiny.model(), 0.5)), teacher=frozen, fused_from=0, micro_batch_size=2)
    signals = [
        dataclasses.replace(s, anchor_weights=(BETA,) * s.rollout.num_tokens) for s in other_signals(kl_weights=1.0)
    ]
    anchor = naive_divergence(
        made.policy.model,
        capped(tiny.model(), 0.5),
        [dataclasses.replace(s, kl_weights=s.anchor_weights) for s in signals],
        forward,
    )
    naive = naive_divergence(made.policy.model, frozen.model, signals, reverse) + anchor
    uncapped = naive_divergence(made.policy.model, tiny.model(phase=1.0), signals, reverse)
    assert abs(uncapped.item() - (naive - anchor).item()) > 1e-3
    check_step(made, signals, naive)
    assert sorted(calls) == ["forward_kl", "reverse_kl"]


def with_bias(network: Any, phase: float) -> Any:
    size = network.lm_head.weight.shape[0]
    network.lm_head.bias = nn.Parameter(torch.sin(phase + torch.arange(size, dtype=torch.float64)))
    return network


def test_heads_with_a_bias_on_both_sides(calls: list[str]) -> None:
    frozen = LanguageModel(with_bias(tiny.model(phase=1.0, vocabulary=30), 2.0), compute_dtype=torch.float64)
    made = tiny.learner(student=policy_of(with_bias(tiny.model(), 1.0)), teacher=frozen, fused_from=0)
    signals = other_signals(kl_weights=1.0, ce_weights=0.5)
    naive = naive_divergence(made.policy.model, frozen.model, signals, reverse)
    for signal in signals:
        p = tiny.naive_logprobs(made.policy.model, signal.rollout)
        own = p.gather(-1, torch.tensor(signal.rollout.token_ids)[:, None])[:, 0]
        naive = naive - (weights_of(signal.ce_weights) * own).sum() / 2
    check_step(made, signals, naive)
    assert "lm_head.bias" in tiny.gradients(made.policy.model)
    assert sorted(calls) == ["logprob", "reverse_kl"]


def test_a_frozen_head_gets_no_gradient_and_the_trunk_the_whole_one() -> None:
    network = tiny.model()
    network.lm_head.weight.requires_grad_(False)
    made = start_step(student=policy_of(network), fused_from=0)
    check_step(made, omniopd_signals(), naive_omniopd(made.policy.model, tiny.model(), omniopd_signals()))
    assert made.policy.model.lm_head.weight.grad is None


def adapted(*, modules: list[str]) -> Policy:
    """Make a policy of a float64 model with adapters that already say something."""
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=modules, task_type="CAUSAL_LM")
    network = get_peft_model(tiny.model(), settings).to(torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in network.parameters() if p.requires_grad):
            parameter.copy_(0.3 * torch.sin(torch.arange(parameter.numel()) + index).view_as(parameter))
    return Policy(network, tiny.tokenizer(), compute_dtype=torch.float64, lora=True)


@pytest.mark.parametrize(
    ("modules", "is_fused"), [(["q_proj", "down_proj"], True), (["q_proj", "lm_head"], False)], ids=["trunk", "head"]
)
def test_adapters(calls: list[str], modules: list[str], is_fused: bool) -> None:
    student = adapted(modules=modules)
    made = tiny.learner(student=student, fused_from=0, micro_batch_size=2)
    naive = naive_omniopd(student.model, tiny.model(), omniopd_signals())
    check_step(made, omniopd_signals(), naive)
    assert all("lora_" in name for name in tiny.gradients(student.model))
    assert set(calls) == ({"logprob", "forward_kl"} if is_fused else set())


@pytest.mark.parametrize("when", [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook])
def test_a_head_with_a_hook_is_left_to_itself(calls: list[str], when: Callable[..., Any]) -> None:
    network = tiny.model()
    if when is nn.Module.register_forward_hook:
        when(network.lm_head, lambda module, args, output: 2 * output)
    else:
        when(network.lm_head, lambda module, args: (2 * args[0],))
    made = tiny.learner(student=policy_of(network), fused_from=0)
    signals = other_signals(ce_weights=1.0)
    sums = [
        -(weights_of(s.ce_weights) * tiny.naive_logprobs(network, s.rollout)[range(n), s.rollout.token_ids]).sum()
        for s in signals
        if (n := s.rollout.num_tokens)
    ]
    check_step(made, signals, sequence_mean(sums))
    made.score([signals[0].rollout])
    assert calls == []


def test_a_teacher_whose_head_has_a_hook_is_asked_slice_by_slice(calls: list[str]) -> None:
    network = tiny.model(phase=1.0)
    network.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    frozen = LanguageModel(network, compute_dtype=torch.float64)
    made = tiny.learner(teacher=frozen, fused_from=0, logits_slice_tokens=2)
    signals = other_signals(kl_weights=1.0)
    check_step(made, signals, naive_divergence(made.policy.model, network, signals, reverse))
    assert calls == []


@pytest.mark.parametrize(
    ("fused_from", "is_fused"),
    [(0, True), (tiny.VOCABULARY, True), (tiny.VOCABULARY + 1, False), (FUSED_VOCABULARY, False)],
)
def test_the_kernel_is_used_from_a_size_on(calls: list[str], fused_from: int, is_fused: bool) -> None:
    made = tiny.learner(fused_from=fused_from)
    made.update(1, omniopd_signals())
    made.score([omniopd_signals()[0].rollout])
    assert bool(calls) is is_fused


# Precision and memory


def test_bfloat16_computing_is_near_float32() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        student = Policy(tiny.model(dtype=torch.float32), tiny.tokenizer(), compute_dtype=dtype, lora=False)
        frozen = LanguageModel(tiny.model(dtype=torch.float32, phase=1.0), compute_dtype=dtype)
        made = tiny.learner(student=student, teacher=frozen, fused_from=0, micro_batch_size=2)
        moved(student.model)
        signals = [dataclasses.replace(s, kl_weights=(0.2,) * s.rollout.num_tokens) for s in omniopd_signals()]
        update = made.update(1, signals)
        assert {p.grad.dtype for p in student.model.parameters() if p.grad is not None} == {torch.float32}
        found[dtype] = update, tiny.gradients(student.model), made.score([s.rollout for s in signals])
    (exact, right, scores), (rough, near, rough_scores) = found[torch.float32], found[torch.bfloat16]
    # bfloat16 keeps 8 bits: errors of about 1/256 a product.
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss
    for name in right:
        similarity = torch.nn.functional.cosine_similarity(right[name].flatten(), near[name].flatten(), dim=0)
        assert similarity > 0.98, name
    for (logprobs, _), (rough_logprobs, _) in zip(scores, rough_scores, strict=True):
        assert rough_logprobs == pytest.approx(logprobs, abs=0.15)


def test_reduced_precision_rounds_no_more_than_the_plain_step_does() -> None:
    """Between a float32 step and the two bfloat16 ones, the fused one is not the farther."""
    gaps = {}
    exact: dict[str, Tensor] = {}
    for dtype, fused_from in ((torch.float32, NEVER), (torch.bfloat16, NEVER), (torch.bfloat16, 0)):
        student = Policy(tiny.model(dtype=torch.float32), tiny.tokenizer(), compute_dtype=dtype, lora=False)
        made = tiny.learner(student=student, fused_from=fused_from)
        moved(student.model)
        made.update(1, omniopd_signals())
        found = tiny.gradients(student.model)
        exact = exact or found
        gaps[dtype, fused_from] = tiny.largest_gap(found, exact)
    assert 0 < gaps[torch.bfloat16, 0] < 1.5 * gaps[torch.bfloat16, NEVER]


def widest(length: int, *, fused_from: int) -> WidestLogits:
    student = tiny.policy(vocabulary=2000, dtype=torch.float32)
    frozen = LanguageModel(tiny.model(vocabulary=2000, dtype=torch.float32, phase=1.0), compute_dtype=torch.float32)
    made = tiny.learner(student=student, teacher=frozen, fused_from=fused_from, logits_slice_tokens=NEVER)
    rollout = tiny.rollout_of([3 + t % 19 for t in range(length)])
    even = tuple(float(t % 2) for t in range(length))
    signal = TokenSignal(
        rollout=rollout,
        advantages=(0.5,) * length,
        pg_weights=even,
        anchor_weights=tuple(1.0 - a for a in even),
        kl_weights=(1.0,) * length,
    )
    with WidestLogits(2000, 32) as seen:
        made.update(1, [signal])
        made.score([rollout])
    return seen


def test_a_fused_step_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Room for the float32 logits of 16 tokens.
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 16 * 2000 * 4)
    short, long = widest(64, fused_from=0), widest(512, fused_from=0)
    assert short.rows == long.rows == 16
    # 512 x 2,000 logits would be 1,024,000 numbers; the largest tensor is a table of 2,000 x 32, or near it.
    assert long.numel < 512 * 2000 / 3
    assert widest(64, fused_from=NEVER).rows == 64


# What else a step promises


def test_scores_are_naive_logprobs_and_entropies(calls: list[str]) -> None:
    made = tiny.learner(student=policy_of(capped(with_bias(tiny.model(), 1.0), 2.0)), micro_batch_size=3, fused_from=0)
    rollouts = [s.rollout for s in omniopd_signals()]
    for rollout, (logprobs, entropies) in zip(rollouts, made.score(rollouts), strict=True):
        naive = tiny.naive_logprobs(made.policy.model, rollout).detach()
        assert logprobs == pytest.approx(naive[range(rollout.num_tokens), rollout.token_ids].tolist(), rel=1e-12)
        assert entropies == pytest.approx((-naive.exp() * naive).sum(-1).tolist(), rel=1e-12)
    assert calls == ["logprob"] * 4
    assert made.score([]) == []


def test_advantages_of_zero_move_nothing() -> None:
    made = tiny.learner(fused_from=0)
    signals = [
        dataclasses.replace(s, anchor_weights=None, advantages=(0.0,) * n, pg_weights=(1.0,) * n)
        for s in omniopd_signals()
        if (n := s.rollout.num_tokens)
    ]
    update = made.update(1, signals)
    assert (update.loss, update.grad_norm) == (0.0, 0.0)
    assert update.metrics["tokens/pg"] == 23
    assert all(bool((g == 0).all()) for g in tiny.gradients(made.policy.model).values())


def test_a_silent_rollout_counts_as_a_rollout_but_costs_nothing() -> None:
    loud, other = other_signals(kl_weights=1.0)
    silent = dataclasses.replace(other, kl_weights=(0.0,) * 5)
    for micro_batch_size in (1, 2):
        one, two = (
            tiny.learner(teacher=open_weight(), fused_from=0, micro_batch_size=micro_batch_size) for _ in range(2)
        )
        alone, both = one.update(1, [loud]), two.update(1, [loud, silent])
        assert both.loss == pytest.approx(alone.loss / 2, rel=1e-12)
        assert both.grad_norm == pytest.approx(alone.grad_norm / 2, rel=1e-12)


def test_a_teacher_that_is_the_student_gives_no_gradient() -> None:
    frozen = LanguageModel(tiny.model(), compute_dtype=torch.float64)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        made = tiny.learner(teacher=frozen, losses={"kl": {"type": kind}}, fused_from=0)
        update = made.update(1, other_signals(kl_weights=1.0))
        assert abs(update.loss) < 1e-12 and update.grad_norm < 1e-12


@pytest.mark.parametrize("stream", ["ce_weights", "kl_weights", "anchor_weights"])
def test_non_finite_loss_stops_before_the_weights_change(stream: str, tmp_path: Path) -> None:
    saved: list[str] = []

    def save_offenders(signals: Sequence[TokenSignal]) -> Path:
        saved.extend(s.rollout.id for s in signals)
        return tmp_path / "offenders.jsonl"

    made = start_step(teacher=open_weight(), fused_from=0, micro_batch_size=1, save_offenders=save_offenders)
    before = {name: p.clone() for name, p in made.policy.model.named_parameters()}
    good, bad = other_signals(**{stream: 1.0})
    bad = dataclasses.replace(bad, **{stream: (math.inf, *getattr(bad, stream)[1:])})
    with pytest.raises(NonFiniteLossError, match=r"step 3: the loss is not finite.*b/0"):
        made.update(3, [good, bad])
    assert saved == ["b/0"]
    assert all(torch.equal(before[name], p) for name, p in made.policy.model.named_parameters())


def test_going_on_from_a_saved_state_is_bit_for_bit() -> None:
    def fresh() -> Learner:
        return tiny.learner(learning_rate=1e-2, schedule="cosine", num_steps=4, fused_from=0)

    straight, first, second = fresh(), fresh(), fresh()
    told = [straight.update(step, omniopd_signals()) for step in (1, 2, 3)]
    first.update(1, omniopd_signals())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=False))
    assert [second.update(step, omniopd_signals()) for step in (2, 3)] == told[1:]
