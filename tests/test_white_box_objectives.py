"""The white-box objectives: every divergence against sums over the vocabulary, every estimator against its mean."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from omniopd.errors import ConfigError
from omniopd.kernels import chunked_divergence
from omniopd.learner.divergence_math import log_mixture_ratio
from omniopd.learner.divergences import DIVERGENCES, GeneralizedJSD, SkewedKL
from omniopd.learner.learner import Learner
from omniopd.learner.loss_inputs import TokenSlice
from omniopd.learner.losses import TokenLoss, build_losses
from omniopd.learner.policy import LanguageModel
from omniopd.logits.estimators import check_estimator
from omniopd.logits.model_scores import ModelScores
from omniopd.logits.reading import SameVocabulary
from omniopd.supervision.logprob import Divergence, LogprobSupervision, MiniLLM, Objective, SampledTokens, Wanted
from omniopd.types import Rollout, StepContext, TokenSignal

CTX = StepContext(step=0, num_steps=1)
Pair = tuple[Sequence[float], Sequence[float]]


def loss_of(**settings: Any) -> TokenLoss:
    return build_losses({"kl": settings})["kl"]


def evaluate(loss: TokenLoss, p: Sequence[float], q: Sequence[float], *, token: int = 0) -> tuple[float, list[float]]:
    """Return the value at one token and its gradient on the student's logits."""
    logits = torch.tensor([p], dtype=torch.float64).log().requires_grad_(True)
    tokens = TokenSlice(
        logprobs_NV=torch.log_softmax(logits, -1),
        token_ids_N=torch.tensor([token]),
        reference_logprobs_NV=torch.tensor([q], dtype=torch.float64).log(),
    )
    value = loss(tokens)
    value.sum().backward()
    assert logits.grad is not None
    return value.item(), logits.grad[0].tolist()


def distributions(seed: int, size: int = 6) -> Pair:
    rng = random.Random(seed)
    rows = [[rng.random() ** 2 + 0.01 for _ in range(size)] for _ in range(2)]
    p, q = ([x / sum(row) for x in row] for row in rows)
    return p, q


def sum_kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixture(p: Sequence[float], q: Sequence[float], share: float) -> list[float]:
    return [(1 - share) * a + share * b for a, b in zip(p, q, strict=True)]


def trl_jsd(p: Sequence[float], q: Sequence[float], beta: float) -> float:
    m = mixture(p, q, beta)
    return beta * sum_kl(q, m) + (1 - beta) * sum_kl(p, m)


def softened(p: Sequence[float], temperature: float) -> list[float]:
    raised = [a ** (1 / temperature) for a in p]
    return [a / sum(raised) for a in raised]


def top_k(first: Sequence[float], second: Sequence[float], k: int, *, by: Sequence[float], tail: bool) -> float:
    """Return KL(first || second) over the k tokens that are the likeliest in `by`."""
    kept = sorted(range(len(by)), key=lambda v: -by[v])[:k]
    few = [[x[v] for v in kept] for x in (first, second)]
    if tail:
        return sum_kl([*few[0], 1 - sum(few[0])], [*few[1], 1 - sum(few[1])])
    return sum_kl(*([a / sum(x) for a in x] for x in few))


BY_SUMS: list[tuple[dict[str, Any], Callable[[Sequence[float], Sequence[float]], float]]] = [
    ({"type": "reverse_kl"}, sum_kl),
    ({"type": "forward_kl"}, lambda p, q: sum_kl(q, p)),
    ({"type": "jsd", "beta": 0.3}, lambda p, q: trl_jsd(p, q, 0.3) / 0.21),
    ({"type": "jsd", "beta": 0.8, "convention": "trl"}, lambda p, q: trl_jsd(p, q, 0.8)),
    ({"type": "jsd", "beta": 0, "convention": "trl"}, lambda p, q: sum_kl(q, p)),
    ({"type": "jsd", "beta": 1, "convention": "trl"}, sum_kl),
    ({"type": "skewed", "alpha": 0.1}, lambda p, q: sum_kl(q, mixture(p, q, 0.1))),
    ({"type": "skewed", "alpha": 0.7}, lambda p, q: sum_kl(q, mixture(p, q, 0.7))),
    ({"type": "skewed", "alpha": 0.1, "direction": "reverse"}, lambda p, q: sum_kl(p, mixture(q, p, 0.1))),
    ({"type": "skewed", "alpha": 0, "direction": "reverse"}, sum_kl),
    ({"type": "total_variation"}, lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
    ({"type": "mixed", "forward": 0.25}, lambda p, q: 0.25 * sum_kl(q, p) + 0.75 * sum_kl(p, q)),
    ({"type": "mixed"}, lambda p, q: 0.5 * sum_kl(q, p) + 0.5 * sum_kl(p, q)),
    ({"type": "reverse_kl", "temperature": 2}, lambda p, q: sum_kl(softened(p, 2), softened(q, 2))),
    ({"type": "jsd", "temperature": 0.5}, lambda p, q: trl_jsd(softened(p, 0.5), softened(q, 0.5), 0.5) / 0.25),
    ({"type": "teacher_topk_reverse_kl", "k": 3}, lambda p, q: top_k(p, q, 3, by=q, tail=False)),
    ({"type": "teacher_topk_reverse_kl", "k": 3, "tail": True}, lambda p, q: top_k(p, q, 3, by=q, tail=True)),
    ({"type": "teacher_topk_reverse_kl", "k": 1, "tail": True}, lambda p, q: top_k(p, q, 1, by=q, tail=True)),
    ({"type": "teacher_topk_forward_kl", "k": 3}, lambda p, q: top_k(q, p, 3, by=q, tail=True)),
    ({"type": "teacher_topk_forward_kl", "k": 1}, lambda p, q: top_k(q, p, 1, by=q, tail=True)),
    ({"type": "teacher_topk_forward_kl", "k": 3, "tail": False}, lambda p, q: top_k(q, p, 3, by=q, tail=False)),
    (
        {"type": "teacher_topk_forward_kl", "k": 2, "tail": False, "temperature": 2},
        lambda p, q: top_k(softened(q, 2), softened(p, 2), 2, by=q, tail=False),
    ),
    (
        {"type": "teacher_topk_forward_kl", "k": 2, "temperature": 2},
        lambda p, q: top_k(softened(q, 2), softened(p, 2), 2, by=q, tail=True),
    ),
    (
        {"type": "student_topk_reverse_kl", "k": 3, "stop_gradient": False},
        lambda p, q: top_k(p, q, 3, by=p, tail=False),
    ),
    ({"type": "student_topk_reverse_kl", "k": 3, "tail": True}, lambda p, q: top_k(p, q, 3, by=p, tail=True)),
    (
        {"type": "student_topk_reverse_kl", "k": 2, "tail": True, "stop_gradient": False},
        lambda p, q: top_k(p, q, 2, by=p, tail=True),
    ),
]


@pytest.mark.parametrize(("settings", "by_sum"), BY_SUMS, ids=lambda x: str(x) if isinstance(x, dict) else "")
@pytest.mark.parametrize("seed", [1, 2])
def test_value_and_gradient_are_those_of_the_sum(
    settings: dict[str, Any], by_sum: Callable[[Sequence[float], Sequence[float]], float], seed: int
) -> None:
    p, q = distributions(seed)
    value, gradient = evaluate(loss_of(**settings), p, q)
    assert value == pytest.approx(by_sum(p, q), abs=1e-13)
    step = 1e-6

    def nudged(place: int, by: float) -> float:
        raised = [a * math.exp(by * (v == place)) for v, a in enumerate(p)]
        return by_sum([a / sum(raised) for a in raised], q)

    slopes = [(nudged(v, step) - nudged(v, -step)) / (2 * step) for v in range(len(p))]
    assert gradient == pytest.approx(slopes, abs=1e-8)


FUSED = [(settings, by_sum) for settings, by_sum in BY_SUMS if loss_of(**settings).fused is not None]


@pytest.mark.parametrize(("settings", "by_sum"), FUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_what_a_loss_calls_itself_in_the_kernel_is_that_sum(
    settings: dict[str, Any], by_sum: Callable[[Sequence[float], Sequence[float]], float]
) -> None:
    p, q = distributions(9)
    fused = loss_of(**settings).fused
    assert fused is not None and not fused.uses_advantages
    student, teacher = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    # With the unit matrix as the head hidden states are logits.
    head = torch.eye(6, dtype=torch.float64)
    value = chunked_divergence(
        student, head, teacher, head, kind=fused.kind, beta=fused.beta, temperature=fused.temperature
    )
    assert value.item() == pytest.approx(by_sum(p, q), abs=1e-13)


def test_the_kernel_knows_these_losses() -> None:
    assert {settings["type"] for settings, _ in FUSED} == {"reverse_kl", "forward_kl", "jsd"}


def test_no_divergence_is_left_out_of_these_sums() -> None:
    assert {settings["type"] for settings, _ in BY_SUMS} | {"sampled_token"} == set(DIVERGENCES)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # With P = (.5, .5), Q = (.9, .1). Forward: .9 log 1.8 + .1 log .2 = .529008 - .160944.
        ({"type": "forward_kl"}, 0.368064),
        # Reverse: .5 log(5/9) + .5 log 5 = -.293893 + .804719.
        ({"type": "reverse_kl"}, 0.510826),
        ({"type": "mixed"}, 0.439445),
        ({"type": "jsd", "beta": 0.5, "convention": "trl"}, 0.101749),
        ({"type": "jsd", "beta": 0.1, "convention": "trl"}, 0.033603),
        ({"type": "jsd", "beta": 0.9, "convention": "trl"}, 0.043074),
        ({"type": "jsd", "beta": 0.5}, 4 * 0.101749),
        # .5 (.4 + .4)
        ({"type": "total_variation"}, 0.4),
    ],
)
def test_published_numbers(settings: dict[str, Any], expected: float) -> None:
    assert evaluate(loss_of(**settings), (0.5, 0.5), (0.9, 0.1))[0] == pytest.approx(expected, abs=2e-6)


def test_published_numbers_of_the_truncated_losses() -> None:
    p, q = (0.2, 0.3, 0.5), (0.6, 0.3, 0.1)
    # P~ = (.4, .6), Q~ = (2/3, 1/3): .4 log .6 + .6 log 1.8 = -.204330 + .352672
    assert evaluate(loss_of(type="teacher_topk_reverse_kl", k=2), p, q)[0] == pytest.approx(0.148342, abs=1e-6)
    # Forward, over the same two: 2/3 log(5/3) + 1/3 log(5/9) = .340550 - .195929
    forward = "teacher_topk_forward_kl"
    assert evaluate(loss_of(type=forward, k=2, tail=False), p, q)[0] == pytest.approx(0.144622, abs=1e-6)
    # With the third as the bucket it is the whole: .6 log 3 + .3 log 1 + .1 log .2 = .659167 - .160944
    assert evaluate(loss_of(type=forward, k=2), p, q)[0] == pytest.approx(0.498224, abs=1e-6)
    # One token and the others: .6 log 3 + .4 log(.4/.8) = .659167 - .277259; the slopes are P - Q, the others' shared
    # as P shares them: .8 - .4 to 3/8 and 5/8.
    value, gradient = evaluate(loss_of(type=forward, k=1), p, q)
    assert value == pytest.approx(0.381908, abs=1e-6)
    assert gradient == pytest.approx([-0.4, 0.15, 0.25], abs=1e-12)
    # The student's two: tokens 2 and 1, rho = (.625, .375); rewards .625 log(.1/.5) = -1.005899 and .375 log 1 = 0.
    value, gradient = evaluate(loss_of(type="student_topk_reverse_kl", k=2), p, q)
    assert value == pytest.approx(1.005899, abs=1e-6)
    # 1.005899 grad log P(2), grad log P(2) = e_2 - P
    assert gradient == pytest.approx([-1.005899 * 0.2, -1.005899 * 0.3, 1.005899 * 0.5], abs=1e-6)


# Limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jsd_goes_to_the_two_kls_and_keeps_its_digits_on_the_way(dtype: torch.dtype) -> None:
    p, q = (torch.tensor([x], dtype=dtype).log() for x in distributions(3, 50))
    tokens = TokenSlice(logprobs_NV=p, token_ids_N=torch.tensor([0]), reference_logprobs_NV=q)
    forward, reverse = (GeneralizedJSD(beta=beta)(tokens).item() for beta in (0.0, 1.0))
    assert abs(forward - reverse) > 0.04
    for small in (1e-3, 1e-6, 1e-9):
        assert GeneralizedJSD(beta=small)(tokens).item() == pytest.approx(forward, rel=5 * small + 2e-6)
        assert GeneralizedJSD(beta=1 - small)(tokens).item() == pytest.approx(reverse, rel=5 * small + 2e-6)
        # TRL's own goes to 0 beside the ends.
        assert GeneralizedJSD(beta=small, convention="trl")(tokens).item() < 2 * small
    assert SkewedKL(alpha=1e-6)(tokens).item() == pytest.approx(forward, rel=1e-4)


def test_beta_mirrors_student_and_teacher() -> None:
    p, q = distributions(4)
    middle = [evaluate(loss_of(type="jsd", beta=0.5), *pair)[0] for pair in ((p, q), (q, p))]
    assert middle[0] == pytest.approx(middle[1], abs=1e-14)
    for convention in ("limits", "trl"):
        left = evaluate(loss_of(type="jsd", beta=0.2, convention=convention), p, q)[0]
        assert evaluate(loss_of(type="jsd", beta=0.8, convention=convention), q, p)[0] == pytest.approx(left, abs=1e-14)


def test_mixture_ratio_is_finite_where_the_two_have_nothing_in_common() -> None:
    a = torch.tensor([-0.1, -200.0, -1.0, -50.0])
    b = torch.tensor([-300.0, -0.1, -1.0, -3.0])
    for share in (1e-8, 0.1, 0.5, 0.9, 1 - 1e-6):
        exact = torch.logaddexp(a.double() + math.log1p(-share), b.double() + math.log(share)) - a.double()
        assert torch.allclose(log_mixture_ratio(a, b, share).double(), exact, rtol=1e-5, atol=1e-6)
    for convention in ("limits", "trl"):
        student = torch.log_softmax(torch.tensor([[300.0, 0.0, 1.0]]), -1).requires_grad_(True)
        teacher = torch.log_softmax(torch.tensor([[0.0, 300.0, 1.0]]), -1)
        tokens = TokenSlice(logprobs_NV=student, token_ids_N=torch.tensor([0]), reference_logprobs_NV=teacher)
        loss = GeneralizedJSD(beta=0.5, convention=convention)(tokens)  # type: ignore[arg-type]
        loss.sum().backward()
        # Disjoint: log 2, and 4 log 2.
        assert loss.item() == pytest.approx(math.log(2) * (4 if convention == "limits" else 1), rel=1e-5)
        assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", ["teacher_topk_reverse_kl", "teacher_topk_forward_kl", "student_topk_reverse_kl"])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("k", [6, 100])
def test_all_tokens_give_the_unrestricted_loss(kind: str, tail: bool, k: int) -> None:
    p, q = distributions(5)
    exact, slope = evaluate(loss_of(type=kind.partition("topk_")[2]), p, q)
    forms: list[dict[str, Any]] = [{}] if kind.startswith("teacher") else [{}, {"stop_gradient": False}]
    for form in forms:
        value, gradient = evaluate(loss_of(type=kind, k=k, tail=tail, **form), p, q)
        assert value == pytest.approx(exact, abs=1e-13)
        assert gradient == pytest.approx(slope, abs=1e-13)


@pytest.mark.parametrize("kind", ["teacher_topk_reverse_kl", "teacher_topk_forward_kl"])
def test_the_tail_makes_a_lower_bound_that_rises_with_k(kind: str) -> None:
    for seed in range(20):
        p, q = distributions(seed, 8)
        values = [evaluate(loss_of(type=kind, k=k, tail=True), p, q)[0] for k in range(1, 9)]
        assert all(a <= b + 1e-13 for a, b in itertools.pairwise([0.0, *values]))
        assert values[-1] == pytest.approx(sum_kl(q, p) if "forward" in kind else sum_kl(p, q), abs=1e-12)
        assert values[0] < values[-1]


def test_with_a_tail_the_stopped_gradient_is_the_whole_one() -> None:
    # Sum of p grad log p over all outcomes is 0.
    p, q = distributions(6)
    stopped, whole = (
        evaluate(loss_of(type="student_topk_reverse_kl", k=2, tail=True, stop_gradient=s), p, q) for s in (True, False)
    )
    assert stopped[1] == pytest.approx(whole[1], abs=1e-13)


KINDS: list[dict[str, Any]] = [settings for settings, _ in BY_SUMS] + [
    {"type": "student_topk_reverse_kl", "k": 3},
    {"type": "sampled_token", "estimator": "k2"},
    {"type": "sampled_token", "estimator": "k3", "aim": "forward_kl"},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(settings: dict[str, Any]) -> None:
    p, _ = distributions(7)
    value, gradient = evaluate(loss_of(**settings), p, p)
    assert value == pytest.approx(0.0, abs=1e-13)
    assert gradient == pytest.approx([0.0] * 6, abs=1e-13)


# Estimators from the sampled token


def test_estimators_at_single_tokens() -> None:
    # P = (.5, .5), Q = (.9, .1): d = log(5/9) = -.587787 and log 5 = 1.609438
    k2 = loss_of(type="sampled_token")
    k3 = loss_of(type="sampled_token", estimator="k3", aim="forward_kl")
    size = loss_of(type="sampled_token", estimator="abs", aim="total_variation")
    means = [0.0, 0.0, 0.0]
    for token, expected in ((0, (0.172747, 0.212213, 0.587787)), (1, (1.295145, 0.809438, 1.609438))):
        found = [evaluate(loss, (0.5, 0.5), (0.9, 0.1), token=token)[0] for loss in (k2, k3, size)]
        assert found == pytest.approx(expected, abs=1e-6)
        means = [mean + 0.5 * value for mean, value in zip(means, found, strict=True)]
    # Only k3 has the reverse KL as its mean.
    assert means == pytest.approx([0.733946, 0.510826, 1.098612], abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "aim", "factor"), [("k2", "reverse_kl", 1), ("k3", "forward_kl", 1), ("abs", "total_variation", 2)]
)
def test_mean_gradient_of_an_estimator_is_that_of_its_divergence(estimator: str, aim: str, factor: float) -> None:
    p, q = distributions(8)
    sampled = loss_of(type="sampled_token", estimator=estimator, aim=aim)
    each = [evaluate(sampled, p, q, token=y) for y in range(6)]
    mean = [sum(p[y] * each[y][1][v] for y in range(6)) for v in range(6)]
    _, exact = evaluate(loss_of(type=aim), p, q)
    assert mean == pytest.approx([factor * slope for slope in exact], abs=1e-13)
    if estimator == "k3":
        assert sum(p[y] * each[y][0] for y in range(6)) == pytest.approx(sum_kl(p, q), abs=1e-13)


def is_allowed(make: Callable[[], object]) -> bool:
    try:
        make()
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_run_file_refuses_what_the_formulas_refuse(estimator: str) -> None:
    for aim in ("reverse_kl", "forward_kl", "total_variation"):
        mine = is_allowed(lambda aim=aim: loss_of(type="sampled_token", estimator=estimator, aim=aim))  # type: ignore[misc]
        theirs = is_allowed(lambda aim=aim: check_estimator(estimator, how="direct", aim=aim))  # type: ignore[misc,arg-type]
        assert mine == theirs
    if estimator != "abs":
        mine = is_allowed(lambda: SampledTokens(estimator=estimator))  # type: ignore[arg-type]
        assert mine == is_allowed(lambda: check_estimator(estimator, how="advantage"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"type": "sampled_token", "estimator": "k1"}, r"gradient is 0 on average.*teacher drops out.*objective: samp"),
        (
            {"type": "sampled_token", "estimator": "k3"},
            r"gradient is that of the forward_kl, not of the reverse_kl \(on",
        ),
        ({"type": "sampled_token", "estimator": "k2", "aim": "forward_kl"}, "use type: forward_kl"),
        ({"type": "sampled_token", "temperature": 2}, "only temperature 1 estimates anything"),
        ({"type": "teacher_topk_reverse_kl", "renormalize": False}, r"plain top-k reverse KL is no divergence.*-0\.22"),
        ({"type": "student_topk_reverse_kl", "renormalize": False}, "use renormalize: true or tail: true"),
        ({"type": "teacher_topk_reverse_kl", "k": 1}, r"k is 1: one token renormalized.*objective: sampled"),
        ({"type": "student_topk_reverse_kl", "k": 1}, r"k is 1: .*tail: true"),
        ({"type": "teacher_topk_forward_kl", "k": 1, "tail": False}, r"k is 1: .*tail: true"),
        (
            {"type": "teacher_topk_forward_kl", "tail": False, "renormalize": False},
            "use renormalize: true or tail: true",
        ),
    ],
)
def test_losses_that_cannot_work_are_refused_with_a_way_out(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"^learner\.losses\.kl: .*" + told):
        loss_of(**settings)


def test_the_reason_against_plain_top_k_is_true() -> None:
    p, q = (0.2, 0.3, 0.5), (0.6, 0.3, 0.1)
    # .2 log(1/3) + .3 log 1
    assert sum(p[v] * math.log(p[v] / q[v]) for v in (0, 1)) == pytest.approx(-0.219722, abs=1e-6)


# In the learner


def rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(3)
    return [
        tiny.rollout_of(
            torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist(),
            prompt_ids=range(3, 5 + i),
            name=f"p{i}/0",
        )
        for i, length in enumerate((5, 2, 7))
    ]


def teacher(**settings: Any) -> LanguageModel:
    return LanguageModel(tiny.model(phase=1.0, **settings), compute_dtype=torch.float64)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_step_is_the_same_however_it_is_cut(settings: dict[str, Any]) -> None:
    weights = [tuple(0.5 + 0.25 * (t % 3) for t in range(r.num_tokens)) for r in rollouts()]
    signals = [TokenSignal(rollout=r, kl_weights=w) for r, w in zip(rollouts(), weights, strict=True)]
    student = tiny.policy()
    total = torch.zeros((), dtype=torch.float64)
    for rollout, weight in zip(rollouts(), weights, strict=True):
        tokens = TokenSlice(
            logprobs_NV=tiny.naive_logprobs(student.model, rollout),
            token_ids_N=torch.tensor(rollout.token_ids),
            reference_logprobs_NV=tiny.naive_logprobs(teacher().model, rollout).detach(),
        )
        total = total + (torch.tensor(weight) * loss_of(**settings)(tokens)).sum() / 3
    total.backward()
    expected = tiny.gradients(student.model)
    for micro_batch_size, logits_slice_tokens in ((1, 1000), (2, 3)):
        made = tiny.learner(
            teacher=teacher(),
            losses={"kl": settings},
            micro_batch_size=micro_batch_size,
            logits_slice_tokens=logits_slice_tokens,
        )
        assert made.update(1, signals).loss == pytest.approx(total.item(), rel=1e-10)
        assert tiny.largest_gap(tiny.gradients(made.policy.model), expected) < 1e-10


def white_box(
    made: Learner,
    objective: Objective,
    of: Sequence[Rollout],
    *,
    by: LanguageModel,
    weight: float = 1.0,
    wanted: Wanted | None = None,
) -> list[TokenSignal]:
    supervision = LogprobSupervision(
        objective=objective,
        weight=weight,
        reader=SameVocabulary("student"),
        student=made.score,
        teacher=ModelScores(by, id="tiny"),
        wanted=wanted,
    )
    return asyncio.run(supervision.signals(of, CTX))


@pytest.mark.parametrize("fused_from", [0, 1000])
def test_advantages_are_the_log_ratios_of_the_two_models(fused_from: int) -> None:
    made = tiny.learner(micro_batch_size=2, logits_slice_tokens=3, fused_from=fused_from)
    signals = white_box(made, SampledTokens(), rollouts(), by=teacher(), weight=0.5)
    for rollout, signal in zip(rollouts(), signals, strict=True):
        place = torch.tensor(rollout.token_ids)[:, None]
        p, q = (
            tiny.naive_logprobs(network, rollout).gather(-1, place).squeeze(-1)
            for network in (made.policy.model, teacher().model)
        )
        assert signal.advantages == pytest.approx((0.5 * (q - p)).tolist(), abs=1e-12)
        assert signal.pg_weights == (1.0,) * rollout.num_tokens
        assert signal.kl_weights is None


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"type": "reverse_kl"}, Wanted(top_k=tiny.VOCABULARY)),
        ({"type": "teacher_topk_reverse_kl", "k": 4}, Wanted(top_k=4)),
        ({"type": "teacher_topk_forward_kl", "k": 4}, Wanted(top_k=4)),
        ({"type": "sampled_token"}, Wanted()),
    ],
    ids=str,
)
def test_a_scored_step_is_the_live_step(settings: dict[str, Any], wanted: Wanted) -> None:
    found = []
    for live in (True, False):
        made = tiny.learner(teacher=teacher() if live else None, losses={"kl": settings}, micro_batch_size=2)
        signals = white_box(made, Divergence(), rollouts(), by=teacher(), weight=0.25, wanted=None if live else wanted)
        assert all((s.kl_evidence is None) is live for s in signals)
        found.append((made.update(1, signals).loss, tiny.gradients(made.policy.model)))
    (expected, slopes), (loss, gradients) = found
    assert loss == pytest.approx(expected, rel=1e-10)
    assert tiny.largest_gap(gradients, slopes) < 1e-10


@pytest.mark.parametrize("objective", [SampledTokens(), SampledTokens(discount=1.0), MiniLLM()])
def test_a_teacher_that_is_the_student_gives_no_gradient(objective: Objective) -> None:
    itself = LanguageModel(tiny.model(), compute_dtype=torch.float64)
    made = tiny.learner(teacher=itself)
    update = made.update(1, white_box(made, objective, rollouts(), by=itself))
    assert update.loss == pytest.approx(0.0, abs=1e-12)
    assert update.grad_norm < 1e-12


def enumerated(objective: Objective) -> dict[str, Tensor]:
    """Return the expected gradient over all 25 rollouts of V = 5, T = 2, each weighted by its own probability."""
    frozen = teacher(vocabulary=5)
    made = tiny.learner(student=tiny.policy(vocabulary=5), teacher=frozen, micro_batch_size=25, learning_rate=1e-9)
    every = [
        tiny.rollout_of(ids, prompt_ids=(3, 4), name=f"p/{i}")
        for i, ids in enumerate(itertools.product(range(5), repeat=2))
    ]
    signals = []
    for signal, (logprobs, _) in zip(white_box(made, objective, every, by=frozen), made.score(every), strict=True):
        share = 25 * math.exp(sum(logprobs))
        scaled = {
            name: tuple(share * w for w in weights)
            for name in ("pg_weights", "kl_weights")
            if (weights := getattr(signal, name)) is not None
        }
        signals.append(dataclasses.replace(signal, **scaled))
    made.update(1, signals)
    return tiny.gradients(made.policy.model)


def sequence_kl(*, token_level: bool) -> dict[str, Tensor]:
    """Return the gradient of the reverse KL of whole sequences, or of its token-level part (visits held fixed)."""
    network, frozen = tiny.model(vocabulary=5), teacher(vocabulary=5).model
    total = torch.zeros((), dtype=torch.float64)
    for ids in itertools.product(range(5), repeat=2):
        rollout = tiny.rollout_of(ids, prompt_ids=(3, 4))
        p, q = tiny.naive_logprobs(network, rollout), tiny.naive_logprobs(frozen, rollout).detach()
        place = torch.tensor(ids)[:, None]
        chance = p.gather(-1, place).sum().exp()
        if token_level:
            total = total + chance.detach() * (p.exp() * (p - q)).sum()
        else:
            total = total + chance * (p - q).gather(-1, place).sum()
    total.backward()
    return tiny.gradients(network)


def test_expected_gradients_by_enumeration() -> None:
    local, whole = sequence_kl(token_level=True), sequence_kl(token_level=False)
    assert tiny.largest_gap(local, whole) > 1e-3
    assert tiny.largest_gap(enumerated(SampledTokens()), local) < 1e-10
    assert tiny.largest_gap(enumerated(SampledTokens(discount=1.0)), whole) < 1e-10
    assert tiny.largest_gap(enumerated(MiniLLM(length_normalize=False, single_step=False)), whole) < 1e-10
    # The single step taken exactly does not change the mean.
    assert tiny.largest_gap(enumerated(MiniLLM(length_normalize=False)), whole) < 1e-10
    # With T = 2 there is at most one token left to answer for, so dividing by their number changes nothing.
    assert tiny.largest_gap(enumerated(MiniLLM()), whole) < 1e-10
    assert tiny.largest_gap(enumerated(MiniLLM(discount=0.0)), whole) < 1e-10
    # Sampling leaves the single step exact, unlike the plain returns with their length normalized.
    assert tiny.largest_gap(enumerated(MiniLLM(single_step=False)), whole) > 1e-3
