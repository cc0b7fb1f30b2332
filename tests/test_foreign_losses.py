"""Losses across vocabularies against brute force in float64, and the numbers of their papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniopd.errors import ConfigError, DataError
from omniopd.logits.foreign import MatchedVocabulary, generalized_jsd, hybrid_loss, merge_groups, uld_loss


def logs(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_logprobs(rows: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


HALVES, SURE = (0.5, 0.5), (0.9, 0.1)


def test_uld_sees_no_identity() -> None:
    # |.9 - .5| + |.1 - .5| = .8 either way
    assert uld_loss(logs(HALVES), logs(SURE)).tolist() == pytest.approx([0.8])
    assert uld_loss(logs(HALVES), logs(SURE[::-1])).tolist() == pytest.approx([0.8])
    assert uld_loss(logs(SURE), logs(SURE[::-1])).tolist() == pytest.approx([0.0], abs=1e-15)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_uld_against_sorted_lists(student_size: int, teacher_size: int) -> None:
    student, teacher = random_logprobs(4, student_size, 1), random_logprobs(4, teacher_size, 2)
    for row, got in enumerate(uld_loss(student, teacher).tolist()):
        p = sorted(student[row].exp().tolist(), reverse=True)
        q = sorted(teacher[row].exp().tolist(), reverse=True)
        pairs = itertools.zip_longest(p, q, fillvalue=0.0)
        assert got == pytest.approx(math.fsum(abs(a - b) for a, b in pairs), rel=1e-12)
        assert 0 <= got <= 2


def test_uld_is_the_least_cost_of_pairing_the_tokens() -> None:
    student, teacher = random_logprobs(1, 4, 3), random_logprobs(1, 4, 4)
    p, q = student[0].exp(), teacher[0].exp()
    least = min(float((p - q[list(order)]).abs().sum()) for order in itertools.permutations(range(4)))
    assert uld_loss(student, teacher).item() == pytest.approx(least, rel=1e-12)


def test_merge_by_hand() -> None:
    # P(x0) = (.6, .3, .1); the second token was token 1 with probability .9
    logprobs = logs((0.6, 0.3, 0.1), (0.05, 0.9, 0.05))
    written = torch.tensor([0, 1])
    assert merge_groups(logprobs, written, [(0, 2)]).exp().tolist() == [pytest.approx([0.54, 0.27, 0.09])]
    # The last distribution times P(x0 = 0) = .6
    bayesian = merge_groups(logprobs, written, [(0, 2)], merge="bayesian").exp().tolist()
    assert bayesian == [pytest.approx([0.03, 0.54, 0.03])]


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_groups_of_one_token_stay_as_they_are(merge: str) -> None:
    logprobs = random_logprobs(5, 4, 5)
    merged = merge_groups(logprobs, torch.tensor([0, 1, 2, 3, 0]), [(t, t + 1) for t in range(5)], merge=merge)  # type: ignore[arg-type]
    assert torch.equal(merged, logprobs)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5), st.sampled_from(["observed", "bayesian"]), st.integers(0, 99)
)
def test_merge_against_products(sizes: list[int], merge: str, seed: int) -> None:
    num_tokens, size = sum(sizes), 3
    logprobs = random_logprobs(num_tokens, size, seed)
    written = torch.randint(size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    ends = list(itertools.accumulate(sizes))
    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    merged = merge_groups(logprobs, written, ranges, merge=merge)  # type: ignore[arg-type]
    probs = logprobs.exp()
    for row, (start, end) in zip(merged.exp(), ranges, strict=True):
        base, rest = (start, range(start + 1, end)) if merge == "observed" else (end - 1, range(start, end - 1))
        expected = probs[base].clone()
        for t in rest:
            expected *= probs[t, written[t]]
        assert torch.allclose(row, expected, rtol=1e-12, atol=0)
        # What was written has the probability of the whole group, whichever way it is merged.
        own = row[written[base]]
        product = math.prod(float(probs[t, written[t]]) for t in range(start, end))
        assert float(own) == pytest.approx(product, rel=1e-12)


def test_merge_refuses_what_is_no_group() -> None:
    logprobs, written = random_logprobs(2, 3, 6), torch.tensor([0, 1])
    for bad in ((1, 1), (0, 3), (-1, 1)):
        with pytest.raises(DataError, match="empty or outside the 2 tokens"):
            merge_groups(logprobs, written, [bad])
    with pytest.raises(ConfigError, match="merge is 'mean'"):
        merge_groups(logprobs, written, [(0, 1)], merge="mean")  # type: ignore[arg-type]
    assert merge_groups(logprobs, written, []).shape == (0, 3)


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.0, 0.368064), (1.0, 0.510826), (0.5, 0.101749), (0.1, 0.033603), (0.9, 0.043074)]
)
def test_generalized_jsd_of_distributions(beta: float, expected: float) -> None:
    assert generalized_jsd(logs(HALVES), logs(SURE), beta=beta).item() == pytest.approx(expected, abs=1e-6)
    assert generalized_jsd(logs(SURE), logs(SURE), beta=beta).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_jsd_of_partial_measures_is_never_negative(beta: float) -> None:
    student, teacher = logs((0.2, 0.3)), logs((0.6, 0.3))
    assert generalized_jsd(student, teacher, beta=beta).item() > 0
    # .2 log(.2/.6) + .3 log 1 = -0.219722, minus .2 + .3, plus .6 + .3: 0.180278
    if beta == 1.0:
        assert generalized_jsd(student, teacher, beta=beta).item() == pytest.approx(0.180278, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_tokens_without_mass_leave_values_and_gradients_finite(beta: float) -> None:
    logits = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    teacher = logs((0.7, 0.3, 0.0))
    if beta == 1.0:
        # KL(S || T) is infinite there, and says so.
        assert generalized_jsd(logits.log_softmax(-1), teacher, beta=beta).item() == math.inf
        return
    loss = generalized_jsd(logits.log_softmax(-1), teacher, beta=beta)
    assert math.isfinite(loss.item())
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(gradient).all()


MATCHED = MatchedVocabulary(student_ids=(0, 2), teacher_ids=(3, 1))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weights", [None, (0.7, 2.0)])
def test_hybrid_against_brute_force(beta: float, weights: tuple[float, float] | None) -> None:
    student, teacher = random_logprobs(3, 4, 7), random_logprobs(3, 5, 8)
    named = {} if weights is None else {"matched_weight": weights[0], "unmatched_weight": weights[1]}
    got = hybrid_loss(student, teacher, MATCHED, beta=beta, **named)
    on_matched, on_others = weights or (2 / 5, 3 / 5)
    for row, value in enumerate(got.tolist()):
        p, q = student[row].exp().tolist(), teacher[row].exp().tolist()
        same = 0.0
        for s, t in ((p[0], q[3]), (p[2], q[1])):
            m = beta * t + (1 - beta) * s
            if beta == 0.0:
                same += t * math.log(t / s) - t + s
            elif beta == 1.0:
                same += s * math.log(s / t) - s + t
            else:
                same += beta * t * math.log(t / m) + (1 - beta) * s * math.log(s / m)
        ours = sorted((p[1], p[3]), reverse=True)
        theirs = sorted((q[0], q[2], q[4]), reverse=True)
        others = math.fsum(abs(a - b) for a, b in itertools.zip_longest(ours, theirs, fillvalue=0.0))
        assert value == pytest.approx(on_matched * same + on_others * others, rel=1e-12)


def test_hybrid_sees_the_identity_of_matched_tokens_alone() -> None:
    everything = MatchedVocabulary(student_ids=(0, 1), teacher_ids=(0, 1))
    nothing = MatchedVocabulary(student_ids=(), teacher_ids=())
    assert hybrid_loss(logs(HALVES), logs(SURE), everything).item() == pytest.approx(0.101749, abs=1e-6)
    assert hybrid_loss(logs(SURE), logs(SURE[::-1]), everything).item() > 0.1
    assert hybrid_loss(logs(SURE), logs(SURE[::-1]), nothing).item() == pytest.approx(0.0, abs=1e-15)
    assert hybrid_loss(logs(HALVES), logs(SURE), nothing).item() == pytest.approx(0.8)


def test_ids_become_indices_once_and_tables_of_other_widths_get_their_own() -> None:
    matched = MatchedVocabulary(student_ids=(0, 2), teacher_ids=(3, 1))
    device = torch.device("cpu")
    columns = matched.columns(device, student_size=4, teacher_size=5)
    assert columns.student_M.tolist() == [0, 2] and columns.teacher_M.tolist() == [3, 1]
    assert columns.student_others.tolist() == [1, 3] and columns.teacher_others.tolist() == [0, 2, 4]
    assert matched.columns(device, student_size=4, teacher_size=5) is columns
    assert matched.columns(device, student_size=6, teacher_size=5).student_others.tolist() == [1, 3, 4, 5]
    assert matched == MATCHED and hash(matched) == hash(MATCHED)


@pytest.mark.parametrize("sizes", [[(4, 5), (4, 5)], [(4, 5), (6, 4), (4, 5)]])
def test_a_vocabulary_that_was_used_before_gives_the_same_losses(sizes: list[tuple[int, int]]) -> None:
    used = MatchedVocabulary(student_ids=(0, 2), teacher_ids=(3, 1))
    with torch.inference_mode():
        hybrid_loss(random_logprobs(3, sizes[0][0], 1), random_logprobs(3, sizes[0][1], 2), used)
    for number, (ours, theirs) in enumerate(sizes):
        student = random_logprobs(3, ours, number).requires_grad_()
        teacher = random_logprobs(3, theirs, 10 + number)
        fresh = hybrid_loss(student, teacher, MatchedVocabulary(student_ids=(0, 2), teacher_ids=(3, 1)))
        again = hybrid_loss(student, teacher, used)
        assert torch.equal(again, fresh)
        (expected,) = torch.autograd.grad(fresh.sum(), student)
        (got,) = torch.autograd.grad(again.sum(), student)
        assert torch.equal(got, expected) and expected.abs().sum() > 0


def test_unmatched_tokens_of_one_side_alone_count() -> None:
    # The teacher knows all of the student's tokens; its own third token holds .2 that nothing answers to.
    matched = MatchedVocabulary(student_ids=(0, 1), teacher_ids=(0, 1))
    loss = hybrid_loss(logs(HALVES), logs((0.4, 0.4, 0.2)), matched, matched_weight=0.0, unmatched_weight=1.0)
    assert loss.item() == pytest.approx(0.2)


def test_only_the_student_gets_a_gradient_and_it_is_right() -> None:
    student = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    teacher = random_logprobs(3, 5, 9).requires_grad_()
    written = torch.tensor([1, 2])

    def losses(logits: Tensor) -> tuple[Tensor, ...]:
        merged = merge_groups(logits.log_softmax(-1), written, [(0, 2)])
        other = merge_groups(teacher, torch.tensor([0, 4, 1]), [(0, 3)], merge="bayesian")
        return uld_loss(merged, other), *(hybrid_loss(merged, other, MATCHED, beta=b) for b in (0.0, 0.5, 1.0))

    assert torch.autograd.gradcheck(losses, (student,))
    sum(losses(student)).sum().backward()  # type: ignore[union-attr]
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="2 rows of the student against 3"):
        uld_loss(random_logprobs(2, 3, 1), random_logprobs(3, 3, 1))
    with pytest.raises(DataError, match="a teacher id is matched twice"):
        MatchedVocabulary(student_ids=(0, 1), teacher_ids=(2, 2))
    with pytest.raises(DataError, match="1 student ids matched with 2"):
        MatchedVocabulary(student_ids=(0,), teacher_ids=(2, 3))
    one = logs(HALVES)
    with pytest.raises(ConfigError, match="beta is 2"):
        hybrid_loss(one, one, MatchedVocabulary((), ()), beta=2)
    with pytest.raises(ConfigError, match="go together"):
        hybrid_loss(one, one, MatchedVocabulary((), ()), matched_weight=1.0)
