"""The losses of single tokens, against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from omniopd.errors import ConfigError
from omniopd.learner.divergences import TeacherForwardKL, TeacherReverseKL
from omniopd.learner.loss_inputs import Fused, TokenSlice
from omniopd.learner.losses import (
    LOSSES,
    STREAMS,
    ForwardKL,
    PolicyGradient,
    SoftCrossEntropy,
    TokenCrossEntropy,
    build_losses,
)

P = (0.5, 0.3, 0.15, 0.05)
R = (0.4, 0.45, 0.1, 0.05)


def slice_of(*rows: tuple[float, ...], **fields: object) -> tuple[torch.Tensor, TokenSlice]:
    """Return logits that are the logs of the rows, and a slice of their log-softmax."""
    logits = torch.tensor(rows, dtype=torch.float64).log().requires_grad_(True)
    fields.setdefault("token_ids_N", torch.zeros(len(rows), dtype=torch.long))
    return logits, TokenSlice(logprobs_NV=torch.log_softmax(logits, -1), **fields)  # type: ignore[arg-type]


def logs(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_forward_kl_and_its_gradient_on_the_logits() -> None:
    logits, tokens = slice_of(P, reference_logprobs_NV=logs(R))
    loss = ForwardKL()(tokens)
    # .4 log(.4/.5) + .45 log(.45/.3) + .1 log(.1/.15) + .05 log 1 = -.089257 + .182459 - .040547 + 0
    assert loss.item() == pytest.approx(0.052655, abs=5e-7)
    loss.sum().backward()
    # P - R
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.10, -0.15, 0.05, 0.0], abs=1e-12)


def test_forward_kl_is_zero_where_the_student_is_the_reference() -> None:
    logits, tokens = slice_of(P, R, reference_logprobs_NV=logs(P, R))
    loss = ForwardKL()(tokens)
    loss.sum().backward()
    assert logits.grad is not None
    assert loss.abs().max() < 1e-15
    assert logits.grad.abs().max() < 1e-15


def test_teacher_forward_kl_is_the_same_divergence_on_another_stream() -> None:
    _, tokens = slice_of(P, reference_logprobs_NV=logs(R))
    assert TeacherForwardKL()(tokens).item() == ForwardKL()(tokens).item()
    assert (TeacherForwardKL.stream, TeacherForwardKL.needs) == ("kl", "teacher")


def test_reverse_kl_and_its_gradient_on_the_logits() -> None:
    logits, tokens = slice_of(P, reference_logprobs_NV=logs(R))
    loss = TeacherReverseKL()(tokens)
    # .5 log(.5/.4) + .3 log(.3/.45) + .15 log(.15/.1) + 0 = .111572 - .121640 + .060820
    expected = 0.5 * math.log(1.25) + 0.3 * math.log(2 / 3) + 0.15 * math.log(1.5)
    assert expected == pytest.approx(0.050752, abs=5e-7)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.sum().backward()
    # P_v (log P_v/R_v - KL)
    by_hand = [p * (math.log(p / r) - expected) for p, r in zip(P, R, strict=True)]
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(by_hand, abs=1e-12)


def test_policy_gradient_takes_minus_the_advantage_as_slope() -> None:
    logprobs = logs(P, R).requires_grad_(True)
    weights = torch.tensor([0.438066, -0.25], dtype=torch.float64)
    tokens = TokenSlice(logprobs_NV=logprobs, token_ids_N=torch.tensor([1, 2]), advantages_N=weights)
    loss = PolicyGradient()(tokens)
    # -.438066 log .3 and +.25 log .1
    assert loss.tolist() == pytest.approx([-0.438066 * math.log(0.3), 0.25 * math.log(0.1)], abs=1e-12)
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0, -0.438066, 0, 0], [0, 0, 0.25, 0]]


def test_a_chunk_of_the_published_objective_by_hand() -> None:
    # b = exp((-.1-.3-.2)/3) = exp(-.2) = .818731, w = (4 + b)/11 = .438066; loss = .6 w = .262840
    w = (4 + math.exp(-0.2)) / 11
    logprobs = torch.tensor([[-0.1, -9.0], [-0.3, -9.0], [-0.2, -9.0]], dtype=torch.float64)
    tokens = TokenSlice(
        logprobs_NV=logprobs,
        token_ids_N=torch.zeros(3, dtype=torch.long),
        advantages_N=torch.full((3,), w, dtype=torch.float64),
    )
    assert PolicyGradient()(tokens).sum().item() == pytest.approx(0.262840, abs=5e-7)


def test_cross_entropy_of_a_token() -> None:
    _, tokens = slice_of(P, R, token_ids_N=torch.tensor([3, 0]))
    assert TokenCrossEntropy()(tokens).tolist() == pytest.approx([-math.log(0.05), -math.log(0.4)])


def test_soft_cross_entropy_without_a_prior_pulls_to_the_target() -> None:
    logits, tokens = slice_of(
        P,
        target_ids_NK=torch.tensor([[2, 0, 0]]),
        target_probs_NK=torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64),
    )
    loss = SoftCrossEntropy()(tokens)
    # -.75 log .15 - .25 log .5
    assert loss.item() == pytest.approx(-0.75 * math.log(0.15) - 0.25 * math.log(0.5))
    loss.sum().backward()
    # P - target, target = (.25, 0, .75, 0); the third place is padding
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.25, 0.3, -0.6, 0.05], abs=1e-12)


def test_the_students_own_share_of_a_soft_target_pulls_nowhere() -> None:
    logits, tokens = slice_of(
        P,
        target_ids_NK=torch.tensor([[2]]),
        target_probs_NK=torch.tensor([[0.6]], dtype=torch.float64),
        self_weights_N=torch.tensor([0.4], dtype=torch.float64),
    )
    loss = SoftCrossEntropy()(tokens)
    entropy = -sum(p * math.log(p) for p in P)
    assert loss.item() == pytest.approx(-0.6 * math.log(0.15) + 0.4 * entropy)
    loss.sum().backward()
    # P - (.6 e_2 + .4 P) = .6 (P - e_2): all pull comes from what the teacher said
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.3, 0.18, -0.51, 0.03], abs=1e-12)


def test_every_stream_has_a_default_loss_that_says_what_it_needs() -> None:
    losses = build_losses({})
    assert tuple(losses) == STREAMS
    assert [losses[s].needs for s in STREAMS] == [None, "reference", "teacher", None, None]
    for stream, table in LOSSES.items():
        assert {loss.stream for loss in table.values()} == {stream}


def test_what_the_losses_call_themselves_in_the_fused_kernel() -> None:
    losses = build_losses({})
    assert {stream: loss.fused for stream, loss in losses.items()} == {
        "pg": Fused("logprob", uses_advantages=True),
        "anchor": Fused("forward_kl"),
        "kl": Fused("reverse_kl"),
        "ce": Fused("logprob"),
        "soft": None,
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "forward_kl", "temperature": 2.0}, Fused("forward_kl", temperature=2.0)),
        ({"type": "jsd", "beta": 0.3}, Fused("scaled_jsd", beta=0.3)),
        ({"type": "jsd", "beta": 0.3, "convention": "trl"}, Fused("trl_jsd", beta=0.3)),
        # At its ends it is a KL; right beside them the kernel's float32 is too coarse, without the division it is not.
        ({"type": "jsd", "beta": 0.0}, Fused("scaled_jsd", beta=0.0)),
        ({"type": "jsd", "beta": 0.01}, Fused("scaled_jsd", beta=0.01)),
        ({"type": "jsd", "beta": 0.009}, None),
        ({"type": "jsd", "beta": 0.995}, None),
        ({"type": "jsd", "beta": 0.001, "convention": "trl"}, Fused("trl_jsd", beta=0.001)),
        ({"type": "skewed"}, None),
        ({"type": "mixed"}, None),
        ({"type": "total_variation"}, None),
        ({"type": "teacher_topk_forward_kl"}, None),
        ({"type": "sampled_token"}, None),
    ],
    ids=str,
)
def test_what_a_divergence_calls_itself_in_the_fused_kernel(
    settings: dict[str, object], expected: Fused | None
) -> None:
    assert build_losses({"kl": settings})["kl"].fused == expected


def test_a_loss_is_chosen_by_name() -> None:
    assert isinstance(build_losses({})["kl"], TeacherReverseKL)
    assert isinstance(build_losses({"kl": {"type": "forward_kl"}})["kl"], TeacherForwardKL)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"klx": {"type": "reverse_kl"}}, r"no stream 'klx'; did you mean 'kl'\? Allowed: pg, anchor, kl, ce, soft"),
        ({"kl": {"type": "jds"}}, r"learner\.losses\.kl\.type: there is no value 'jds'; did you mean 'jsd'\?"),
        ({"kl": {}}, r"learner\.losses\.kl\.type: there is no value None"),
        ({"kl": {"type": "reverse_kl", "beta": 1}}, r"learner\.losses\.kl\.beta: there is no setting of reverse_kl"),
        ({"kl": {"type": "jsd", "beta": "half"}}, r"learner\.losses\.kl\.beta: .*got 'half'"),
        ({"kl": {"type": "jsd", "convention": "tlr"}}, r"learner\.losses\.kl\.convention: .*got 'tlr'"),
        ({"kl": {"type": "jsd", "beta": 1.5}}, r"learner\.losses\.kl: beta must be in \[0, 1\], got 1\.5$"),
        ({"kl": {"type": "mixed", "forward": -0.1}}, r"forward must be in \[0, 1\], got -0\.1"),
        ({"kl": {"type": "skewed", "alpha": 1}}, r"alpha must be at least 0 and less than 1"),
        ({"kl": {"type": "reverse_kl", "temperature": 0}}, r"temperature must be positive, got 0"),
        ({"kl": {"type": "teacher_topk_reverse_kl", "k": 0}}, r"k must be 1 or more, got 0"),
        ({"kl": {"type": "teacher_topk_reverse_kl", "k": 2.5}}, r"learner\.losses\.kl\.k: .*got 2\.5"),
        ({"anchor": {"type": "reverse_kl"}}, r"learner\.losses\.anchor\.type: there is no value 'reverse_kl'"),
    ],
)
def test_unknown_losses_are_refused(overrides: dict[str, dict[str, object]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_losses(overrides)
