"""The chunked kernels, against the same sums written out over whole logits in float64."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from omniopd.errors import ConfigError, DataError, LearnerError
from omniopd.kernels import KINDS, blocks, chunked, chunked_divergence, chunked_logprobs, heads
from omniopd.kernels.objectives import ForwardKL, JensenShannon, Objective, ReverseKL, TokenLogprob

F64 = torch.float64


@dataclass
class Models:
    """Hidden states and heads of a student and a teacher."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head


def models(
    tokens: int = 7, vocabulary: int = 11, hidden: int = 5, teacher: int = 3, *, dtype: torch.dtype = F64, seed: int = 0
) -> Models:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64).to(dtype)

    return Models(
        draw(tokens, hidden).requires_grad_(),
        draw(vocabulary, hidden).requires_grad_(),
        draw(tokens, teacher),
        draw(vocabulary, teacher),
    )


def of_probs(student: tuple[float, ...], teacher: tuple[float, ...]) -> Models:
    """Return one token whose logits are the logs of these probabilities."""
    one = torch.ones(1, 1, dtype=F64)
    heads_V1 = (torch.tensor(row, dtype=F64).log()[:, None] for row in (student, teacher))
    student_head, teacher_head = heads_V1
    return Models(one.clone().requires_grad_(), student_head.requires_grad_(), one, teacher_head)


def dense(m: Models, kind: str, beta: float = 0.5, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """Return the divergence [T] as its definition has it, whole logits in float64."""
    logs = []
    for hidden, head in ((m.student_hidden, m.student_head), (m.teacher_hidden, m.teacher_head)):
        logits = hidden.double() @ head.double().t()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logs.append(torch.log_softmax(logits / temperature, -1))
    s, t = logs
    if kind == "forward_kl":
        return kl(t, s)
    if kind == "reverse_kl":
        return kl(s, t)
    mixture = (beta * t.exp() + (1 - beta) * s.exp()).log()
    value = beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
    return value / (beta * (1 - beta)) if kind == "scaled_jsd" else value


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def gap(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference, relative to the largest number of its tensor."""
    pairs = [(f.detach().double(), e.detach().double()) for f, e in zip(found, expected, strict=True)]
    return max(float((f - e).abs().max() / e.abs().max().clamp(min=1e-30)) for f, e in pairs)


# Values


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        # P = (.5, .5), Q = (.9, .1): .9 log 1.8 + .1 log .2 = .529008 - .160944
        ("forward_kl", 0.5, 0.368064),
        # .5 log(.5/.9) + .5 log 5 = -.293893 + .804719
        ("reverse_kl", 0.5, 0.510826),
        ("jsd", 0.5, 0.101749),
        ("jsd", 0.1, 0.033603),
        ("jsd", 0.9, 0.043074),
        # .101749 / .25
        ("scaled_jsd", 0.5, 0.406996),
        ("scaled_jsd", 0.0, 0.368064),
        ("scaled_jsd", 1.0, 0.510826),
        ("trl_jsd", 0.0, 0.368064),
        ("trl_jsd", 0.1, 0.033603),
        ("trl_jsd", 1.0, 0.510826),
        ("jsd", 0.0, 0.0),
        ("jsd", 1.0, 0.0),
    ],
)
def test_values_done_by_hand(kind: Any, beta: float, expected: float) -> None:
    value = chunked_divergence(*of_probs((0.5, 0.5), (0.9, 0.1)).tensors, kind=kind, beta=beta)
    assert value.tolist() == pytest.approx([expected], abs=2e-6)


@pytest.mark.parametrize(("kind", "end"), list(itertools.product(("jsd", "scaled_jsd"), (0.0, 1.0))))
def test_the_values_at_the_ends_are_limits(kind: Any, end: float) -> None:
    m = models()
    near = chunked_divergence(*m.tensors, kind=kind, beta=abs(end - 1e-7))
    at = chunked_divergence(*m.tensors, kind=kind, beta=end)
    assert (near - at).abs().max() < 1e-4
    inputs = m.student_hidden, m.student_head
    for close, limit in zip(gradients(near.sum(), *inputs), gradients(at.sum(), *inputs), strict=True):
        assert (close - limit).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "scaled_jsd", "trl_jsd"])
@pytest.mark.parametrize(("beta", "temperature", "softcap"), [(0.5, 1.0, None), (0.1, 0.7, 2.0), (0.9, 3.0, None)])
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (7, 11, 5, 3), (40, 301, 8, 16)])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_values_and_gradients_equal_the_dense_formula(
    kind: Any, beta: float, temperature: float, softcap: float | None, shape: Any, chunk_tokens: int | None
) -> None:
    m = models(*shape)
    inputs = m.student_hidden, m.student_head
    caps = {"student_softcap": softcap, "teacher_softcap": softcap}
    found = chunked_divergence(
        *m.tensors, kind=kind, beta=beta, temperature=temperature, chunk_tokens=chunk_tokens, **caps
    )
    expected = dense(m, kind, beta, temperature, softcap)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-10
    assert gap(gradients(found.mean(), *inputs), gradients(expected.mean(), *inputs)) < 1e-10
    upstream = torch.linspace(-1, 2, len(expected), dtype=F64)
    found = chunked_divergence(
        *m.tensors, kind=kind, beta=beta, temperature=temperature, chunk_tokens=chunk_tokens, **caps
    )
    expected = dense(m, kind, beta, temperature, softcap)
    assert gap(gradients(found @ upstream, *inputs), gradients(expected @ upstream, *inputs)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Any) -> None:
    m = models(3, 5, 2, 4)
    bias = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def value(hidden: Tensor, head: Tensor, student_bias: Tensor) -> Tensor:
        return chunked_divergence(
            hidden, head, m.teacher_hidden, m.teacher_head, kind=kind, beta=0.3, student_bias=student_bias,
            student_softcap=3.0, temperature=1.3, chunk_tokens=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(value, (m.student_hidden, m.student_head, bias))


@pytest.mark.parametrize("weights", [None, (0.5, 0.0, -2.0)])
def test_gradcheck_of_logprobs(weights: Any) -> None:
    m = models(3, 5, 2)
    bias = torch.zeros(5, dtype=F64, requires_grad=True)
    ids = torch.tensor([4, 0, 2])

    def value(hidden: Tensor, head: Tensor, own_bias: Tensor) -> Tensor:
        given = None if weights is None else torch.tensor(weights, dtype=F64)
        return chunked_logprobs(
            hidden, head, ids, bias=own_bias, weights=given, softcap=3.0, temperature=0.8, chunk_tokens=2
        )[0]

    assert torch.autograd.gradcheck(value, (m.student_hidden, m.student_head, bias))


def test_a_divergence_from_itself_is_nothing() -> None:
    m = models()
    for kind in KINDS:
        value = chunked_divergence(
            m.student_hidden, m.student_head, m.student_hidden, m.student_head, kind=kind, beta=0.3
        )
        assert value.abs().max() < 1e-14
        assert max(g.abs().max() for g in gradients(value.sum(), m.student_hidden, m.student_head)) < 1e-13


def test_jsd_at_one_half_is_symmetric() -> None:
    m = models(teacher=5)
    there = chunked_divergence(*m.tensors, kind="jsd")
    back = chunked_divergence(m.teacher_hidden, m.teacher_head, m.student_hidden, m.student_head, kind="jsd")
    assert (there - back).abs().max() < 1e-14


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(*(st.integers(1, size) for size in (9, 40, 6, 6))),
    st.sampled_from(KINDS),
    st.floats(0.05, 0.95),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_any_shape(shape: Any, kind: Any, beta: float, chunk_tokens: int, seed: int) -> None:
    m = models(*shape, seed=seed)
    inputs = m.student_hidden, m.student_head
    weights = torch.randint(0, 3, (shape[0],), generator=torch.Generator().manual_seed(seed)).double()
    found = chunked_divergence(*m.tensors, kind=kind, beta=beta, chunk_tokens=chunk_tokens, weights=weights)
    expected = weights * dense(m, kind, beta)
    assert (found - expected).abs().max() < 1e-10
    for f, e in zip(gradients(found.sum(), *inputs), gradients(expected.sum(), *inputs), strict=True):
        assert (f - e).abs().max() < 1e-10


# What must not change the result


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_change_the_result(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    m = models(29, 53)
    inputs = m.student_hidden, m.student_head
    whole = chunked_divergence(*m.tensors, kind=kind, beta=0.2)
    expected = gradients(whole.sum(), *inputs)
    for chunk_tokens, block in itertools.product((1, 7, 28, 29, 1000), (1, 53 * 3, 2**18)):
        monkeypatch.setattr(chunked, "CACHED_NUMBERS", block)
        found = chunked_divergence(*m.tensors, kind=kind, beta=0.2, chunk_tokens=chunk_tokens)
        assert (found - whole).abs().max() < 1e-12
        assert gap(gradients(found.sum(), *inputs), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_of_a_half_precision_head_do_not_change_the_result(dtype: torch.dtype) -> None:
    m = models(9, 53, dtype=dtype)
    inputs = m.student_hidden, m.student_head
    whole = chunked_divergence(*m.tensors, kind="jsd", chunk_tokens=4)
    expected = gradients(whole.sum(), *inputs)
    for chunk_vocab in (1, 10, 52, 53, 1000):
        found = chunked_divergence(*m.tensors, kind="jsd", chunk_tokens=4, chunk_vocab=chunk_vocab)
        assert (found - whole).abs().max() < 1e-6
        assert gap(gradients(found.sum(), *inputs), expected) < 1e-2


def test_a_tied_head_gets_both_gradients() -> None:
    m = models(6, 11, 5)
    ids = torch.tensor([0, 3, 3, 10, 7, 1])

    def loss(value: Callable[[Models], Tensor]) -> tuple[Tensor, ...]:
        embedding = m.student_head
        tied = Models(embedding[ids].tanh(), embedding, m.teacher_hidden[:6], m.teacher_head)
        return gradients(value(tied).mean(), embedding)

    found = loss(lambda tied: chunked_divergence(*tied.tensors, kind="reverse_kl", chunk_tokens=4))
    assert gap(found, loss(lambda tied: dense(tied, "reverse_kl"))) < 1e-10


def test_strides_do_not_matter() -> None:
    m = models()
    expected = chunked_divergence(*m.tensors)
    inputs = m.student_hidden, m.student_head
    strided = [torch.stack([x, -x], -1)[..., 0] for x in m.tensors]
    assert not any(x.is_contiguous() for x in strided)
    found = chunked_divergence(*strided, chunk_tokens=3)
    assert (found - expected).abs().max() < 1e-14
    assert gap(gradients(found.sum(), *inputs), gradients(expected.sum(), *inputs)) < 1e-13


def test_autocast_does_not_round() -> None:
    m = models(dtype=torch.float32)
    expected = chunked_divergence(*m.tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_divergence(*m.tensors)
        loss = (found * torch.arange(7.0)).sum()
    assert torch.equal(found, expected)
    plain = gradients(expected @ torch.arange(7.0), m.student_head)
    assert gap(gradients(loss, m.student_head), plain) < 1e-6


# Weights, reductions and the backward pass


def test_a_token_of_weight_zero_is_not_computed() -> None:
    m = models()
    with torch.no_grad():
        m.student_hidden[2], m.teacher_hidden[5] = math.nan, math.inf
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 0.0, 3.0], dtype=F64)
    found = chunked_divergence(*m.tensors, kind="jsd", weights=weights, chunk_tokens=2)
    kept = weights.nonzero().squeeze(-1)
    rest = Models(m.student_hidden[kept], m.student_head, m.teacher_hidden[kept], m.teacher_head)
    expected = weights[kept] * dense(rest, "jsd")
    assert found[[2, 5]].tolist() == [0.0, 0.0]
    assert (found[kept] - expected).abs().max() < 1e-12
    inputs = m.student_hidden, m.student_head
    assert gap(gradients(found.sum(), *inputs), gradients(expected.sum(), *inputs)) < 1e-12


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.0, 0.5, 0.0, 0.0, 4.0)])
def test_reductions(weights: tuple[float, ...] | None) -> None:
    m = models()
    inputs = m.student_hidden, m.student_head
    given = None if weights is None else torch.tensor(weights, dtype=F64)
    factors = torch.ones(7, dtype=F64) if given is None else given
    for reduction, norm in (("sum", 1.0), ("mean", float(factors.sum()))):
        found = chunked_divergence(*m.tensors, weights=given, reduction=reduction, chunk_tokens=3)  # type: ignore[arg-type]
        expected = factors @ dense(m, "forward_kl") / norm
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
        assert gap(gradients(3 * found, *inputs), gradients(3 * expected, *inputs)) < 1e-12


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_compute_is_zero_with_a_zero_gradient(reduction: Any, tokens: int) -> None:
    m = models(tokens)
    weights = torch.zeros(tokens, dtype=F64)
    # At beta 1 there is nothing to compute whatever the weights.
    for kind, factors in (("forward_kl", weights), ("jsd", None)):
        value = chunked_divergence(*m.tensors, kind=kind, beta=1.0, weights=factors, reduction=reduction)  # type: ignore[arg-type]
        assert value.shape == ((tokens,) if reduction == "none" else ())
        assert value.sum().item() == 0
        hidden, head = gradients(value.sum(), m.student_hidden, m.student_head)
        assert hidden.shape == m.student_hidden.shape and head.shape == m.student_head.shape
        assert not hidden.any() and not head.any()


def products(work: Callable[[], object]) -> int:
    """Return how many matrix products run in `work`."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        work()
    return counter.count


def test_the_gradient_costs_two_products_and_is_computed_once() -> None:
    m = models()
    values: list[Tensor] = []
    assert products(lambda: values.append(chunked_divergence(*m.tensors))) == 4
    assert products(lambda: values[0].mean().backward()) == 0  # type: ignore[no-untyped-call]
    # Not the same everywhere: two products for the logits and one for the head.
    value = chunked_divergence(*m.tensors)
    assert products(lambda: (value @ torch.arange(7, dtype=F64)).backward()) == 3  # type: ignore[no-untyped-call]


def test_what_is_not_needed_is_not_computed() -> None:
    m = models()
    frozen = m.student_head.detach()
    with torch.no_grad():
        assert products(lambda: chunked_divergence(*m.tensors)) == 2
    assert products(lambda: chunked_divergence(m.student_hidden, frozen, m.teacher_hidden, m.teacher_head)) == 3
    assert products(lambda: chunked_divergence(m.student_hidden.detach(), *m.tensors[1:])) == 3
    ids = torch.arange(7)
    assert products(lambda: chunked_logprobs(m.student_hidden, m.student_head, ids)) == 1
    assert products(lambda: chunked_logprobs(m.student_hidden, frozen, ids)) == 2
    assert products(lambda: chunked_logprobs(m.student_hidden, m.student_head, ids, weights=torch.ones(7))) == 3


def test_a_second_backward_gives_the_same_gradient() -> None:
    m = models()
    inputs = m.student_hidden, m.student_head
    loss = 0.5 * chunked_divergence(*m.tensors, kind="jsd").sum()
    first = tuple(g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True))
    assert gap(torch.autograd.grad(loss, inputs), first) < 1e-13


def test_weights_that_changed_before_the_backward_pass_are_noticed() -> None:
    m = models()
    loss = chunked_divergence(*m.tensors).sum()
    with torch.no_grad():
        m.student_head.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_second_derivative_is_refused() -> None:
    m = models()
    loss = chunked_divergence(*m.tensors, kind="jsd").sum()
    with pytest.raises(LearnerError, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(loss, m.student_hidden, create_graph=True)


def test_nothing_flows_into_the_teacher() -> None:
    m = models()
    m.teacher_hidden.requires_grad_()
    m.teacher_head.requires_grad_()
    chunked_divergence(*m.tensors).sum().backward()  # type: ignore[no-untyped-call]
    assert m.teacher_hidden.grad is None and m.teacher_head.grad is None
    assert m.student_head.grad is not None


# Hard numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tokens_shut_out_and_underflow_stay_finite(kind: Any, dtype: torch.dtype) -> None:
    m = models(vocabulary=6, dtype=dtype)
    # 0 is shut out on both sides, 1 for the student, 2 for the teacher, 3 underflows.
    student = torch.tensor([-math.inf, -math.inf, 0.0, -500.0, 0.0, 0.0], dtype=dtype)
    teacher = torch.tensor([-math.inf, 0.0, -math.inf, -900.0, 0.0, 0.0], dtype=dtype)
    value = chunked_divergence(*m.tensors, kind=kind, beta=0.3, student_bias=student, teacher_bias=teacher)
    assert value.isfinite().all() and (value > 0).all()
    assert all(g.isfinite().all() for g in gradients(value.sum(), m.student_hidden, m.student_head))


def test_tokens_shut_out_on_both_sides_do_not_count() -> None:
    m = models(vocabulary=6)
    bias = torch.tensor([0.0, 0.0, -math.inf, 0.0, -math.inf, 0.0], dtype=F64)
    kept = [0, 1, 3, 5]
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        rest = Models(m.student_hidden, m.student_head[kept], m.teacher_hidden, m.teacher_head[kept])
        found = chunked_divergence(*m.tensors, kind=kind, student_bias=bias, teacher_bias=bias)  # type: ignore[arg-type]
        expected = dense(rest, kind)
        assert (found - expected).abs().max() < 1e-12
        inputs = m.student_hidden, m.student_head
        assert gap(gradients(found.sum(), *inputs), gradients(expected.sum(), *inputs)) < 1e-12


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_spoils_no_other(kind: Any, bad: float) -> None:
    m = models(dtype=torch.float32)
    expected = chunked_divergence(*m.tensors, kind=kind)
    (clean,) = gradients(expected.sum(), m.student_hidden)
    with torch.no_grad():
        m.student_hidden[3, 1] = bad
    found = chunked_divergence(*m.tensors, kind=kind)
    others = [0, 1, 2, 4, 5, 6]
    assert found[3].isnan()
    assert torch.equal(found[others], expected[others])
    (gradient,) = gradients(found.sum(), m.student_hidden)
    assert gradient[3].isnan().all()
    assert torch.equal(gradient[others], clean[others])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 8e-6)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_narrow_inputs_are_added_up_in_float32(kind: Any, dtype: torch.dtype, tolerance: float) -> None:
    m = models(200, 500, 32, 16, dtype=dtype, seed=3)
    inputs = m.student_hidden, m.student_head
    found = chunked_divergence(*m.tensors, kind=kind, chunk_tokens=16)
    # The inputs are what they are: nothing but the gradient at the very end is rounded.
    expected = dense(m, kind)
    assert found.dtype == torch.float32
    assert gap((found,), (expected,)) < 2e-6
    gradient = gradients(found.mean(), *inputs)
    assert [g.dtype for g in gradient] == [dtype, dtype]
    assert gap(gradient, gradients(expected.mean(), *inputs)) < tolerance


def test_a_wide_teacher_makes_the_sums_wide() -> None:
    m = models(dtype=torch.float32)
    value = chunked_divergence(*m.tensors[:2], m.teacher_hidden.double(), m.teacher_head.double())
    assert value.dtype == F64
    assert (value - dense(m, "forward_kl")).abs().max() < 1e-12
    assert gradients(value.sum(), m.student_head)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offsets", [(100.0, -100.0), (-1000.0, 5.0), (17.0, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_offset_of_all_logits_does_not_matter(kind: Any, offsets: tuple[float, float], dtype: torch.dtype) -> None:
    m = models(6, 40, dtype=dtype)
    biases = {
        f"{who}_bias": torch.full((40,), x, dtype=dtype) for who, x in zip(("student", "teacher"), offsets, strict=True)
    }
    found = chunked_divergence(*m.tensors, kind=kind, beta=0.3, **biases)
    expected = dense(m, kind, 0.3)
    inputs = m.student_hidden, m.student_head
    if kind == "trl_jsd":
        expected = dense(m, "jsd", 0.3)
    # float32 resolves a logit of 1,000 to 6e-5.
    tolerance = 1e-11 if dtype == F64 else 5e-4
    assert gap((found,), (expected,)) < tolerance
    assert gap(gradients(found.sum(), *inputs), gradients(expected.sum(), *inputs)) < tolerance


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_models_that_nearly_agree(kind: Any) -> None:
    m = models(64, 2000, 32, 32, dtype=torch.float32)
    noise = torch.randn(2000, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        m.student_head.mul_(0.2)
    near = Models(m.student_hidden, m.student_head, m.student_hidden.detach(), m.student_head.detach() + 0.02 * noise)
    found, expected = chunked_divergence(*near.tensors, kind=kind).double(), dense(near, kind)
    assert 1e-4 < expected.mean() < 1e-2
    assert abs(found.mean() / expected.mean() - 1) < 1e-5


def test_a_shut_token_stays_shut_at_a_high_temperature() -> None:
    m = models(vocabulary=6)
    bias = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0, 0.0], dtype=F64)
    ids = torch.tensor([2, 0, 1, 3, 4, 5, 0])
    logprobs, entropies = chunked_logprobs(m.student_hidden, m.student_head, ids, bias=bias, temperature=1e4)
    # The other five are all but equally likely.
    assert logprobs[0].item() == pytest.approx(heads.LOGIT_FLOOR, rel=1e-3)
    assert logprobs[1:].tolist() == pytest.approx([-math.log(5)] * 6, abs=1e-2)
    assert entropies.tolist() == pytest.approx([math.log(5)] * 7, abs=1e-2)


# Compiled


def block(rows: int, objective: Objective) -> tuple[Any, ...]:
    """Return the arguments of `blocks.evaluate`, drawn again from the same seed."""
    rng = torch.Generator().manual_seed(rows)
    student, teacher = (3 * torch.randn(rows, 97, generator=rng, dtype=F64) for _ in range(2))
    ids = torch.randint(0, 97, (rows, 1), generator=rng)
    curve = heads.Curve(softcap=30.0, temperature=0.8)
    if isinstance(objective, TokenLogprob):
        return objective, curve, student, None, None, ids, None, True
    return objective, curve, student, heads.Curve(), teacher, None, None, True


OBJECTIVES: tuple[Objective, ...] = (ForwardKL(), ReverseKL(), JensenShannon(0.3, 2.0), TokenLogprob())


@pytest.mark.skipif(not os.environ.get("OMNIOPD_TEST_COMPILE"), reason="takes a C++ compiler and 20 to 90 seconds")
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_plain() -> None:
    blocks.compiled.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        for objective, rows in itertools.product(OBJECTIVES, (5, 9)):
            plain, fused = block(rows, objective), block(rows, objective)
            values, entropies = blocks.evaluate(*plain)
            found, found_entropies = blocks.compiled()(*fused)
            # The third is the gradient by now.
            assert gap((found, fused[2]), (values, plain[2])) < 1e-12
            assert (found_entropies is None) == (entropies is None)
            if entropies is not None and found_entropies is not None:
                assert gap((found_entropies,), (entropies,)) < 1e-12


def test_without_a_compiler_the_passes_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    calls = []

    def broken(*args: Any) -> Any:
        calls.append(args)
        raise TorchDynamoException("no triton\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    blocks.compiled.cache_clear()
    try:
        run = blocks.compiled()
        expected = blocks.evaluate(*block(5, ForwardKL()))[0]
        with pytest.warns(RuntimeWarning, match=r"torch.compile failed.*: no triton; install the triton"):
            assert torch.equal(run(*block(5, ForwardKL()))[0], expected)
        assert torch.equal(run(*block(5, ForwardKL()))[0], expected)
        assert len(calls) == 1
    finally:
        blocks.compiled.cache_clear()


# Log-probs


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_logprobs_and_entropies(chunk_tokens: int | None) -> None:
    m = models()
    ids = torch.tensor([0, 10, 4, 4, 1, 9, 2])
    logprobs, entropies = chunked_logprobs(m.student_hidden, m.student_head, ids, chunk_tokens=chunk_tokens)
    log = torch.log_softmax(m.student_hidden @ m.student_head.t(), -1)
    picked = log[torch.arange(7), ids]
    assert (logprobs - picked).abs().max() < 1e-12
    assert (entropies + (log.exp() * log).sum(-1)).abs().max() < 1e-12
    assert not entropies.requires_grad
    inputs = m.student_hidden, m.student_head
    # Importance ratios: the gradient upstream depends on the value.
    assert gap(gradients(logprobs.exp().sum(), *inputs), gradients(picked.exp().sum(), *inputs)) < 1e-12


def test_weighted_logprobs_are_a_policy_gradient() -> None:
    m = models()
    ids = torch.tensor([0, 10, 4, 4, 1, 9, 2])
    advantages = torch.tensor([1.0, -2.0, 0.0, 0.3, 0.0, 1.0, 1.0], dtype=F64)
    weighted, entropies = chunked_logprobs(m.student_hidden, m.student_head, ids, weights=advantages, chunk_tokens=2)
    expected = advantages * torch.log_softmax(m.student_hidden @ m.student_head.t(), -1)[torch.arange(7), ids]
    assert (weighted - expected).abs().max() < 1e-12
    assert entropies.isnan().tolist() == [False, False, True, False, True, False, False]
    inputs = m.student_hidden, m.student_head
    assert gap(gradients(-weighted.sum(), *inputs), gradients(-expected.sum(), *inputs)) < 1e-12


def test_entropy_of_a_sure_and_of_a_clueless_student() -> None:
    hidden = torch.tensor([[0.0], [1000.0]])
    head = torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]])
    logprobs, entropies = chunked_logprobs(hidden, head, torch.tensor([0, 0]))
    assert logprobs.tolist() == pytest.approx([-math.log(4), 0.0])
    assert entropies.tolist() == pytest.approx([math.log(4), 0.0])


# Memory


class Storages(TorchDispatchMode):
    """Remembers the most bytes of the tensors made and alive at a time, those given left out."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.alive[storage.data_ptr()] = (StorageWeakRef(storage), len(storage))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak_bytes(tokens: int, chunk_tokens: int, kind: Any = "jsd", weights: Tensor | None = None) -> int:
    m = models(tokens, 4000, 8, 8, dtype=torch.float32)
    with Storages(m.tensors) as seen:
        chunked_divergence(*m.tensors, kind=kind, chunk_tokens=chunk_tokens, weights=weights).mean().backward()  # type: ignore[no-untyped-call]
    return seen.peak


@pytest.mark.parametrize("kind", KINDS)
def test_memory_holds_two_chunks_of_logits_and_the_gradients(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CACHED_NUMBERS", 4000)
    tokens, chunk = 256, 16
    logits = 2 * chunk * 4000 * 4
    found = (4000 * 8 + tokens * 8) * 4
    # One row a block: three of scratch and two that are being made.
    rows = 5 * 4000 * 4
    assert logits + found <= peak_bytes(tokens, chunk, kind) <= logits + found + rows + 40 * tokens


def test_memory_does_not_grow_with_the_tokens() -> None:
    short, long = peak_bytes(64, 16), peak_bytes(512, 16)
    # Hidden states and values alone: 8 + 8 numbers a token at most, against 4,000 logits.
    assert long - short < (512 - 64) * 16 * 4


def test_memory_grows_with_the_chunk() -> None:
    assert peak_bytes(256, 128) - peak_bytes(256, 16) > 2 * (128 - 16) * 4000 * 4 * 0.9


def test_the_chunk_follows_from_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 11 * 8)
    m = models(7, 11)
    # Room for 3 tokens: 7 tokens make 3 chunks, spread 3, 3, 1.
    assert products(lambda: chunked_divergence(*m.tensors)) == 3 * 4


def test_half_precision_heads_are_widened_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CAST_BYTES", 4 * 5 * 4)
    m = models(7, 11, dtype=torch.bfloat16)
    # 4 rows of the student (width 5) and 6 of the teacher (width 3): 3 tiles for three products, 2 for the other.
    assert products(lambda: chunked_divergence(*m.tensors)) == 3 + 3 + 3 + 2


# What goes wrong


@pytest.mark.parametrize(
    ("change", "settings_", "message"),
    [
        ({"student_hidden": (7, 4)}, {}, r"student_hidden is \[7, 4\] and student_head \[11, 5\].*one width"),
        ({"teacher_hidden": (2, 7, 3)}, {}, r"teacher_hidden is \[2, 7, 3\].*flatten"),
        ({"teacher_hidden": (6, 3)}, {}, "student_hidden has 7 tokens and teacher_hidden 6"),
        ({"teacher_head": (12, 3)}, {}, "student_head has 11 rows and teacher_head 12.*cut the rows"),
        ({"student_head": (0, 5)}, {}, r"student_head is \[0, 5\]; expected at least one"),
        ({}, {"student_bias": (10,)}, r"student_bias is \[10\] on cpu; expected \[11\]"),
        ({}, {"teacher_bias": (11, 1)}, r"teacher_bias is \[11, 1\]"),
        ({}, {"weights": (6,)}, r"weights is \[6\] on cpu; expected \[7\]"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], settings_: dict[str, Any], message: str) -> None:
    m = models()
    for name, shape in change.items():
        setattr(m, name, torch.zeros(shape, dtype=F64))
    given = {name: torch.zeros(shape, dtype=F64) for name, shape in settings_.items()}
    with pytest.raises(DataError, match=message):
        chunked_divergence(*m.tensors, **given)


def test_dtypes_and_devices_that_do_not_fit() -> None:
    m = models()
    with pytest.raises(DataError, match=r"student_hidden is torch.float32 and student_head torch.float64"):
        chunked_divergence(m.student_hidden.float(), *m.tensors[1:])
    with pytest.raises(DataError, match="expected one floating dtype"):
        chunked_divergence(m.student_hidden.long(), m.student_head.long(), *m.tensors[2:])
    with pytest.raises(DataError, match="student_hidden is on cpu and student_head on meta"):
        chunked_divergence(m.student_hidden, m.student_head.to("meta"), *m.tensors[2:])
    with pytest.raises(DataError, match="student_hidden is on cpu and teacher_hidden on meta"):
        chunked_divergence(*m.tensors[:2], m.teacher_hidden.to("meta"), m.teacher_head.to("meta"))
    with pytest.raises(DataError, match=r"weights has requires_grad.*detach"):
        chunked_divergence(*m.tensors, weights=torch.ones(7, requires_grad=True))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kind": "kl"}, "kind is 'kl'; it can be forward_kl, reverse_kl, jsd, scaled_jsd, trl_jsd"),
        ({"kind": "jsd", "beta": 1.5}, "beta is 1.5; expected 0 to 1"),
        ({"kind": "jsd", "beta": math.nan}, "beta is nan"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'; it can be none, sum, mean"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"student_softcap": -1.0}, "student_softcap is -1.0"),
        ({"teacher_softcap": 0.0}, "teacher_softcap is 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; expected 1 or more"),
        ({"chunk_vocab": 0}, "chunk_vocab is 0; expected 1 or more"),
    ],
)
def test_settings_out_of_range(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chunked_divergence(*models().tensors, **settings_)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 1]), r"token_ids is \[2\] of torch.int64 on cpu; expected \[7\]"),
        (torch.zeros(7), r"token_ids is \[7\] of torch.float32"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 11]), "token_ids holds 0 to 11; expected 0 to 10"),
        (torch.tensor([0, 1, 2, -100, 4, 5, 6]), "token_ids holds -100 to 6"),
    ],
)
def test_token_ids_that_do_not_fit(ids: Tensor, message: str) -> None:
    m = models()
    with pytest.raises(DataError, match=message):
        chunked_logprobs(m.student_hidden, m.student_head, ids)
    with pytest.raises(DataError, match=r"hidden is \[7, 5\] and head \[11, 3\]"):
        chunked_logprobs(m.student_hidden, m.teacher_head, ids)


def test_no_tokens_have_no_logprobs() -> None:
    m = models(0)
    logprobs, entropies = chunked_logprobs(m.student_hidden, m.student_head, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropies.shape == (0,)
    assert not gradients(logprobs.sum(), m.student_head)[0].any()
