"""What a teacher said instead of the teacher itself: records and readings give the losses that the live model gives."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from omniopd.config import LearnerConfig
from omniopd.errors import DataError, LearnerError
from omniopd.learner.divergences import DIVERGENCES, Evidence
from omniopd.learner.learner import Learner
from omniopd.learner.loss_inputs import KnownTokens, TokenSlice
from omniopd.learner.losses import TokenLoss, build_losses
from omniopd.learner.policy import LanguageModel
from omniopd.learner.teachers import LiveTeacher
from omniopd.logits.scores import Reading, Scored, TokenScores
from omniopd.types import Missing, Rollout, TokenSignal
from test_learner import brute_force, gradient_of

NEVER = 10**9
Step = tuple[float, dict[str, Tensor]]


def loss_of(**settings: Any) -> TokenLoss:
    return build_losses({"kl": settings})["kl"]


def rollouts() -> list[Rollout]:
    """Return four rollouts of unlike lengths after prompts of unlike lengths."""
    generator = torch.Generator().manual_seed(3)
    return [
        tiny.rollout_of(
            torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist(),
            prompt_ids=range(3, 5 + i),
            name=f"p{i}/0",
        )
        for i, length in enumerate((5, 2, 7, 1))
    ]


def signals_of(**fields: Any) -> list[TokenSignal]:
    return [
        TokenSignal(rollout=r, kl_weights=tuple(0.5 + 0.25 * (t % 3) for t in range(r.num_tokens)), **fields)
        for r in rollouts()
    ]


def learner(
    teachers: dict[str, Any], kl: dict[str, Any], *, fused_from: int = NEVER, student: Any = None, **settings: Any
) -> Learner:
    """Make a learner with these live teachers."""
    config = LearnerConfig(
        **{"learning_rate": 1e-3, "max_grad_norm": 1e9, "logits_slice_tokens": 3, "losses": {"kl": kl}, **settings}
    )
    live = {
        name: LiveTeacher(LanguageModel(network, compute_dtype=torch.float64)) for name, network in teachers.items()
    }
    return Learner(
        student or tiny.policy(), config, num_steps=10, max_steps_off_policy=100, teachers=live, fused_from=fused_from
    )


def step(signals: Sequence[TokenSignal], kl: dict[str, Any], *, live: bool = False, **settings: Any) -> Step:
    """Return loss and gradients of one step, with one live teacher or none."""
    teachers = {"teacher": tiny.model(phase=1.0)} if live else {}
    return gradient_of(learner(teachers, kl, **settings), signals)


def check_same(found: Step, expected: Step, precision: float = 1e-10) -> None:
    assert found[0] == pytest.approx(expected[0], rel=precision)
    assert tiny.largest_gap(found[1], expected[1]) < precision


def distribution(of: Rollout, network: Any = None) -> np.ndarray[Any, Any]:
    """Return log Q [T, V] of the teacher at a rollout."""
    with torch.no_grad():
        return tiny.naive_logprobs(network or tiny.model(phase=1.0), of).numpy()


def own(of: Rollout, logprobs_TV: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return logprobs_TV[range(of.num_tokens), of.token_ids]


def named(of: Rollout, ids_TK: np.ndarray[Any, Any], known: Any) -> TokenScores:
    """Make the record of a teacher that was asked for these tokens."""
    logprobs_TV = distribution(of)
    return TokenScores(
        logprobs_T=own(of, logprobs_TV),
        known=known,
        ids_TK=ids_TK.astype(np.int32),
        logprobs_TK=np.take_along_axis(logprobs_TV, ids_TK, -1),
    )


def likeliest(logprobs_TV: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    return np.argsort(-logprobs_TV, axis=-1)[:, :k]


def by_teacher(k: int) -> Callable[[Rollout], TokenScores]:
    return lambda of: named(of, likeliest(distribution(of), k), "teacher_top_k")


def by_student(k: int) -> Callable[[Rollout], TokenScores]:
    return lambda of: named(of, likeliest(distribution(of, tiny.model()), k), "requested")


def whole(of: Rollout) -> TokenScores:
    """Make a record of every token, in an order of its own."""
    generator = np.random.default_rng(1)
    ids_TV = np.stack([generator.permutation(tiny.VOCABULARY) for _ in of.token_ids])
    return named(of, ids_TV, "vocabulary")


def token_only(of: Rollout) -> TokenScores:
    return TokenScores(logprobs_T=own(of, distribution(of)))


def recorded(record: Callable[[Rollout], TokenScores]) -> list[TokenSignal]:
    return [dataclasses.replace(s, kl_evidence=record(s.rollout)) for s in signals_of()]


# A record of the live teacher gives the live teacher's step


EVERY: list[dict[str, Any]] = [
    {"type": "reverse_kl"},
    {"type": "forward_kl"},
    {"type": "reverse_kl", "temperature": 2},
    {"type": "jsd", "beta": 0.3},
    {"type": "jsd", "beta": 0.8, "convention": "trl"},
    {"type": "skewed", "alpha": 0.2},
    {"type": "total_variation"},
    {"type": "mixed", "forward": 0.25},
    {"type": "teacher_topk_reverse_kl", "k": 4},
    {"type": "teacher_topk_reverse_kl", "k": 4, "tail": True, "temperature": 2},
    {"type": "teacher_topk_forward_kl", "k": 4},
    {"type": "student_topk_reverse_kl", "k": 4},
    {"type": "student_topk_reverse_kl", "k": 4, "tail": True, "stop_gradient": False},
    {"type": "sampled_token"},
]


def test_no_divergence_is_left_out() -> None:
    assert {settings["type"] for settings in EVERY} == set(DIVERGENCES)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_the_whole_vocabulary_serves_every_loss(settings: dict[str, Any]) -> None:
    expected = step(signals_of(), settings, live=True)
    for micro_batch_size in (1, 3):
        check_same(step(recorded(whole), settings, micro_batch_size=micro_batch_size), expected)


@pytest.mark.parametrize(
    ("settings", "record"),
    [
        ({"type": "teacher_topk_reverse_kl", "k": 4}, by_teacher(4)),
        ({"type": "teacher_topk_reverse_kl", "k": 4}, by_teacher(9)),
        ({"type": "teacher_topk_reverse_kl", "k": 4, "temperature": 2}, by_teacher(4)),
        ({"type": "teacher_topk_forward_kl", "k": 4, "tail": False}, by_teacher(4)),
        ({"type": "teacher_topk_forward_kl", "k": 4, "tail": False, "temperature": 0.5}, by_teacher(6)),
        ({"type": "student_topk_reverse_kl", "k": 4}, by_student(4)),
        ({"type": "student_topk_reverse_kl", "k": 4}, by_student(9)),
        ({"type": "student_topk_reverse_kl", "k": 4, "stop_gradient": False, "temperature": 2}, by_student(4)),
        # With a bucket the mass of the others is 1 minus what is known, exact in float64 where that is not small.
        ({"type": "teacher_topk_reverse_kl", "k": 4, "tail": True}, by_teacher(4)),
        ({"type": "teacher_topk_reverse_kl", "k": 1, "tail": True}, by_teacher(3)),
        ({"type": "teacher_topk_forward_kl", "k": 4}, by_teacher(4)),
        ({"type": "teacher_topk_forward_kl", "k": 1}, by_teacher(2)),
        ({"type": "student_topk_reverse_kl", "k": 4, "tail": True}, by_student(4)),
        ({"type": "student_topk_reverse_kl", "k": 2, "tail": True, "stop_gradient": False}, by_student(5)),
        ({"type": "sampled_token"}, token_only),
        ({"type": "sampled_token", "estimator": "k3", "aim": "forward_kl"}, token_only),
        ({"type": "sampled_token", "estimator": "abs", "aim": "total_variation"}, by_teacher(4)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_few_tokens_serve_the_losses_that_read_no_more(
    settings: dict[str, Any], record: Callable[[Rollout], TokenScores]
) -> None:
    expected = step(signals_of(), settings, live=True)
    for micro_batch_size in (1, 3):
        check_same(step(recorded(record), settings, micro_batch_size=micro_batch_size), expected)


def test_a_record_in_float32_is_exact_to_float32() -> None:
    def narrow(of: Rollout) -> TokenScores:
        scores = by_teacher(4)(of)
        assert scores.logprobs_TK is not None
        return dataclasses.replace(
            scores,
            logprobs_T=scores.logprobs_T.astype(np.float32),
            logprobs_TK=scores.logprobs_TK.astype(np.float32),
        )

    for settings in ({"type": "teacher_topk_forward_kl", "k": 4}, {"type": "teacher_topk_reverse_kl", "k": 4}):
        check_same(step(recorded(narrow), settings), step(signals_of(), settings, live=True), 1e-5)


def test_a_fused_learner_reads_records_too() -> None:
    for settings, record in (
        ({"type": "reverse_kl"}, whole),
        ({"type": "teacher_topk_forward_kl", "k": 3}, by_teacher(3)),
    ):
        check_same(step(recorded(record), settings, fused_from=0), step(signals_of(), settings, live=True))


def test_records_of_unlike_widths_in_one_micro_batch() -> None:
    settings = {"type": "teacher_topk_reverse_kl", "k": 4}
    signals = [
        dataclasses.replace(s, kl_evidence=record(s.rollout))
        for s, record in zip(signals_of(), (by_teacher(6), whole, by_teacher(4), by_teacher(6)), strict=True)
    ]
    expected = step(signals_of(), settings, live=True)
    for micro_batch_size in (2, 4):
        check_same(step(signals, settings, micro_batch_size=micro_batch_size), expected)


# Which evidence a loss asks for


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "reverse_kl"}, Evidence("whole")),
        ({"type": "jsd"}, Evidence("whole")),
        ({"type": "mixed"}, Evidence("whole")),
        ({"type": "teacher_topk_reverse_kl"}, Evidence("teacher_top_k", 32)),
        ({"type": "teacher_topk_reverse_kl", "k": 4, "tail": True}, Evidence("teacher_top_k", 4)),
        ({"type": "teacher_topk_reverse_kl", "k": 4, "temperature": 2}, Evidence("teacher_top_k", 4)),
        # What the others weigh at another temperature cannot be told from their sum.
        ({"type": "teacher_topk_reverse_kl", "k": 4, "tail": True, "temperature": 2}, Evidence("whole")),
        ({"type": "teacher_topk_forward_kl", "k": 4}, Evidence("teacher_top_k", 4)),
        ({"type": "teacher_topk_forward_kl", "k": 4, "temperature": 2}, Evidence("whole")),
        ({"type": "teacher_topk_forward_kl", "k": 4, "tail": False, "temperature": 2}, Evidence("teacher_top_k", 4)),
        ({"type": "student_topk_reverse_kl"}, Evidence("student_top_k", 16)),
        # The rewards are log-ratios over the whole vocabulary, softened before it is cut.
        ({"type": "student_topk_reverse_kl", "temperature": 2}, Evidence("whole")),
        ({"type": "student_topk_reverse_kl", "temperature": 2, "stop_gradient": False}, Evidence("student_top_k", 16)),
        ({"type": "sampled_token"}, Evidence("token")),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_evidence(settings: dict[str, Any], expected: Evidence) -> None:
    assert loss_of(**settings).evidence == expected  # type: ignore[attr-defined]


# The bucket of the others


def evaluate_known(
    loss: TokenLoss, p: Sequence[float], teacher: dict[int, float], *, dtype: torch.dtype = torch.float64
) -> tuple[float, list[float]]:
    """Return value and gradient on the logits where the teacher named these tokens."""
    logits = torch.tensor([p], dtype=dtype).log().requires_grad_(True)
    known = KnownTokens(
        token_logprobs_N=torch.zeros(1, dtype=dtype),
        ids_NK=torch.tensor([list(teacher)]),
        logprobs_NK=torch.tensor([list(teacher.values())], dtype=dtype).log(),
    )
    value = loss(TokenSlice(logprobs_NV=torch.log_softmax(logits, -1), token_ids_N=torch.tensor([0]), known=known))
    value.sum().backward()
    assert logits.grad is not None
    return value.item(), logits.grad[0].tolist()


def test_named_tokens_by_hand() -> None:
    # P = (.2, .3, .5), Q named .6 and .3, so .1 is left for the third.
    p, q = (0.2, 0.3, 0.5), {0: 0.6, 1: 0.3}
    # .6 log 3 + .3 log 1 + .1 log .2 = .659167 - .160944; the slopes are P - Q.
    value, gradient = evaluate_known(loss_of(type="teacher_topk_forward_kl", k=2), p, q)
    assert value == pytest.approx(0.498224, abs=1e-6)
    assert gradient == pytest.approx([-0.4, 0.0, 0.4], abs=1e-12)
    # Renormalized (2/3, 1/3) and (.4, .6): 2/3 log(5/3) + 1/3 log(5/9) = .340550 - .195929
    value, _ = evaluate_known(loss_of(type="teacher_topk_forward_kl", k=2, tail=False), p, q)
    assert value == pytest.approx(0.144622, abs=1e-6)
    # k = 1 of the two: .6 log 3 + .4 log(.4/.8) = .659167 - .277259
    value, _ = evaluate_known(loss_of(type="teacher_topk_forward_kl", k=1), p, q)
    assert value == pytest.approx(0.381908, abs=1e-6)
    # .2 log(1/3) + .3 log 1 + .5 log 5 = -.219722 + .804719
    value, _ = evaluate_known(loss_of(type="teacher_topk_reverse_kl", k=2, tail=True), p, q)
    assert value == pytest.approx(0.584996, abs=1e-6)
    # .4 log .6 + .6 log 1.8
    value, _ = evaluate_known(loss_of(type="teacher_topk_reverse_kl", k=2), p, q)
    assert value == pytest.approx(0.148342, abs=1e-6)


@pytest.mark.parametrize("named_mass", [1.0, 1.0 + 1e-6])
def test_a_teacher_that_names_all_the_mass_leaves_a_little(named_mass: float) -> None:
    p, q = (0.5, 0.3, 0.2), {0: 0.7 * named_mass, 1: 0.3 * named_mass}
    # .5 log(.5/.7) + .3 log 1 + .2 log(.2/1e-7) = -.168236 + .2 * 14.508658
    value, gradient = evaluate_known(loss_of(type="teacher_topk_reverse_kl", k=2, tail=True), p, q)
    assert value == pytest.approx(2.733495, abs=3e-6)
    # P_v (log P_v/Q_v - KL)
    slopes = [0.5 * (math.log(5 / 7) - value), 0.3 * (0 - value), 0.2 * (math.log(2e6) - value)]
    assert gradient == pytest.approx(slopes, abs=2e-6)
    # .7 log 1.4 + .3 log 1 + 1e-7 log(5e-7) = .235531 - 1.5e-6
    value, gradient = evaluate_known(loss_of(type="teacher_topk_forward_kl", k=2), p, q)
    assert value == pytest.approx(0.235529, abs=3e-6)
    assert gradient == pytest.approx([-0.2, 0.0, 0.2], abs=2e-6)


@pytest.mark.parametrize("kind", ["teacher_topk_reverse_kl", "teacher_topk_forward_kl"])
def test_float32_cannot_make_the_bucket_empty(kind: str) -> None:
    for q in ({0: 0.7, 1: 0.3}, {0: 1.0, 1: 1e-30}):
        value, gradient = evaluate_known(loss_of(type=kind, k=2, tail=True), (0.5, 0.3, 0.2), q, dtype=torch.float32)
        assert math.isfinite(value) and value > 0
        assert all(math.isfinite(slope) for slope in gradient)


@pytest.mark.parametrize("kind", ["teacher_topk_reverse_kl", "teacher_topk_forward_kl", "student_topk_reverse_kl"])
@pytest.mark.parametrize("tail", [False, True])
def test_naming_every_token_leaves_no_bucket(kind: str, tail: bool) -> None:
    p, q = (0.2, 0.3, 0.5), {2: 0.1, 0: 0.6, 1: 0.3}
    value, gradient = evaluate_known(loss_of(type=kind, k=5, tail=tail), p, q)
    # .2 log(1/3) + .3 log 1 + .5 log 5, or .6 log 3 + .3 log 1 + .1 log .2
    assert value == pytest.approx(0.498224 if "forward" in kind else 0.584996, abs=1e-6)
    assert all(math.isfinite(slope) for slope in gradient)


# Several teachers


def brute(signals: Sequence[TokenSignal], teacher_of: Callable[[TokenSignal], Tensor]) -> Step:
    """Return the step of the reverse KL to log-probs [T, V] that each signal's teacher gives."""
    network = tiny.model()
    total = torch.zeros((), dtype=torch.float64)
    for signal in signals:
        p = tiny.naive_logprobs(network, signal.rollout)
        q = teacher_of(signal).detach()
        weights = torch.tensor(signal.kl_weights, dtype=torch.float64)
        total = total + (weights * (p.exp() * (p - q)).sum(-1)).sum() / len(signals)
    return brute_force(total, network)


@pytest.mark.parametrize("fused_from", [0, NEVER])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_each_rollout_is_compared_with_its_own_teacher(fused_from: int, micro_batch_size: int) -> None:
    teachers = {"math": tiny.model(phase=1.0), "code": tiny.model(phase=2.0, vocabulary=30)}
    names = ("math", "code", "math", "code")
    signals = [dataclasses.replace(s, kl_teacher=n) for s, n in zip(signals_of(), names, strict=True)]

    def logprobs(signal: TokenSignal) -> Tensor:
        found = tiny.naive_logprobs(teachers[signal.kl_teacher or ""], signal.rollout)
        return found[:, : tiny.VOCABULARY].log_softmax(-1)

    expected = brute(signals, logprobs)
    for order in itertools.islice(itertools.permutations(signals), 0, 24, 7):
        made = learner(teachers, {"type": "reverse_kl"}, fused_from=fused_from, micro_batch_size=micro_batch_size)
        check_same(gradient_of(made, order), expected)


@pytest.mark.parametrize("fused_from", [0, NEVER])
def test_one_live_and_one_recorded_teacher_in_one_micro_batch(fused_from: int) -> None:
    live = tiny.model(phase=2.0)
    signals = [
        dataclasses.replace(s, kl_teacher="live")
        if i % 2
        else dataclasses.replace(s, kl_teacher="server", kl_evidence=whole(s.rollout))
        for i, s in enumerate(signals_of())
    ]
    server = tiny.model(phase=1.0)
    expected = brute(signals, lambda s: tiny.naive_logprobs(live if s.kl_teacher == "live" else server, s.rollout))
    made = learner({"live": live}, {"type": "reverse_kl"}, fused_from=fused_from, micro_batch_size=4)
    check_same(gradient_of(made, signals), expected)


def test_a_teacher_on_another_device_is_compared_without_the_fused_kernel() -> None:
    kl, signals = {"type": "reverse_kl"}, signals_of(kl_teacher="far")
    expected = gradient_of(learner({"far": tiny.model(phase=1.0)}, kl, fused_from=0), signals)
    far = LiveTeacher(LanguageModel(tiny.model(phase=1.0), compute_dtype=torch.float64))
    assert far.head is not None
    # Stands for a second device: whoever computes with it here fails.
    far.head = dataclasses.replace(far.head, weight_VH=far.head.weight_VH.to("meta"))
    made = Learner(
        tiny.policy(),
        LearnerConfig(learning_rate=1e-3, max_grad_norm=1e9, logits_slice_tokens=3, losses={"kl": kl}),
        num_steps=10,
        teachers={"far": far},
        fused_from=0,
    )
    check_same(gradient_of(made, signals), expected)


@pytest.mark.parametrize(
    ("teachers", "name", "told"),
    [
        ({}, "math", r"asks for the open-weight teacher 'math', but none is loaded"),
        ({}, None, r"asks for an open-weight teacher, but none is loaded; set teacher\.spec"),
        ({"code"}, "math", r"the open-weight teacher 'math', but only 'code' (is|are) loaded"),
        ({"code", "text"}, None, r"asks for an open-weight teacher, but only 'code', 'text' are loaded"),
    ],
)
def test_a_teacher_that_is_not_there_is_an_error(teachers: set[str], name: str | None, told: str) -> None:
    made = learner({n: tiny.model(phase=1.0) for n in sorted(teachers)}, {"type": "reverse_kl"})
    with pytest.raises(LearnerError, match=told):
        made.update(1, signals_of(kl_teacher=name))


@pytest.mark.parametrize("fused_from", [0, NEVER])
def test_a_rollout_without_weight_needs_no_teacher_and_no_evidence(fused_from: int) -> None:
    first, second, third, fourth = signals_of()
    signals = [
        first,
        dataclasses.replace(second, kl_weights=(0.0,) * 2, kl_teacher="nobody", ce_weights=(1.0, 1.0)),
        dataclasses.replace(third, kl_weights=None, kl_teacher="nobody", ce_weights=(1.0,) * 7),
        dataclasses.replace(fourth, kl_weights=(0.0,), ce_weights=(1.0,)),
    ]
    plain = [dataclasses.replace(s, kl_teacher=None) for s in signals]
    found = [
        step(of, {"type": "reverse_kl"}, live=True, fused_from=fused_from, micro_batch_size=4)
        for of in (signals, plain)
    ]
    check_same(*found)
    # Nobody at all is asked where no token has a weight.
    step([dataclasses.replace(s, kl_weights=None) for s in signals[1:]], {"type": "reverse_kl"})


@pytest.mark.parametrize("record", [None, whole])
@pytest.mark.parametrize("fused_from", [0, NEVER])
def test_a_masked_token_adds_nothing(record: Callable[[Rollout], TokenScores] | None, fused_from: int) -> None:
    signals = [
        dataclasses.replace(
            s,
            kl_weights=tuple(w * (t % 2) for t, w in enumerate(s.kl_weights or ())),
            kl_evidence=None if record is None else record(s.rollout),
        )
        for s in signals_of()
    ]
    teacher = tiny.model(phase=1.0)
    expected = brute(signals, lambda s: tiny.naive_logprobs(teacher, s.rollout))
    check_same(
        step(signals, {"type": "reverse_kl"}, live=record is None, fused_from=fused_from, micro_batch_size=3), expected
    )


# Another reading of the rollout


@pytest.mark.parametrize("fused_from", [0, NEVER])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_teacher_with_its_own_prompt(fused_from: int, micro_batch_size: int) -> None:
    teacher = tiny.model(phase=1.0)
    prompts = ((9,), (8, 7, 6, 5, 4, 3, 10, 11), None, (4, 4, 4))
    signals = [
        s if p is None else dataclasses.replace(s, kl_evidence=Reading(prompt_ids=p, token_ids=s.rollout.token_ids))
        for s, p in zip(signals_of(), prompts, strict=True)
    ]

    def logprobs(signal: TokenSignal) -> Tensor:
        reading = signal.kl_evidence
        prompt_ids = reading.prompt_ids if isinstance(reading, Reading) else signal.rollout.prompt.token_ids
        return tiny.naive_logprobs(teacher, tiny.rollout_of(signal.rollout.token_ids, prompt_ids=prompt_ids))

    expected = brute(signals, logprobs)
    assert abs(expected[0] - brute(signals, lambda s: tiny.naive_logprobs(teacher, s.rollout))[0]) > 1e-3
    found = step(signals, {"type": "reverse_kl"}, live=True, fused_from=fused_from, micro_batch_size=micro_batch_size)
    check_same(found, expected)


# Evidence that does not fit


@pytest.mark.parametrize("fused_from", [0, NEVER])
@pytest.mark.parametrize("length", [4, 6])
def test_evidence_of_another_length_is_an_error(fused_from: int, length: int) -> None:
    other = tiny.rollout_of([4, 5, 6, 7, 8, 9][:length])
    for evidence in (whole(other), Reading(prompt_ids=(3,), token_ids=other.token_ids)):
        signal = dataclasses.replace(signals_of()[0], kl_evidence=evidence)
        made = learner({"teacher": tiny.model(phase=1.0)}, {"type": "reverse_kl"}, fused_from=fused_from)
        with pytest.raises(LearnerError, match=rf"p0/0.*{length} tokens.*5"):
            made.update(1, [signal])


@pytest.mark.parametrize(
    ("settings", "record"),
    [
        ({"type": "reverse_kl"}, by_teacher(4)),
        ({"type": "jsd"}, token_only),
        ({"type": "teacher_topk_reverse_kl", "k": 4}, token_only),
        ({"type": "teacher_topk_reverse_kl", "k": 4}, by_teacher(3)),
        ({"type": "teacher_topk_forward_kl", "k": 4}, by_student(4)),
        ({"type": "student_topk_reverse_kl", "k": 4}, by_teacher(4)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_record_that_says_less_than_the_loss_reads_is_an_error(
    settings: dict[str, Any], record: Callable[[Rollout], TokenScores]
) -> None:
    with pytest.raises(LearnerError, match=r"p\d/0.*(whole|likeliest)"):
        step(recorded(record), settings)


def test_a_record_of_a_longer_vocabulary_is_cut_and_renormalized() -> None:
    teacher = tiny.model(phase=1.0, vocabulary=30)

    def padded(of: Rollout) -> TokenScores:
        logprobs_TW = distribution(of, teacher)
        ids_TW = likeliest(logprobs_TW, 30)
        return TokenScores(
            logprobs_T=own(of, logprobs_TW),
            known="vocabulary",
            ids_TK=ids_TW,
            logprobs_TK=np.take_along_axis(logprobs_TW, ids_TW, -1),
        )

    for settings in ({"type": "reverse_kl"}, {"type": "teacher_topk_forward_kl", "k": 4}):
        expected = gradient_of(learner({"teacher": teacher}, settings), signals_of())
        check_same(step(recorded(padded), settings), expected)


# The records themselves


def table(rows: int, columns: int, dtype: Any = np.float64) -> np.ndarray[Any, Any]:
    return np.zeros((rows, columns), dtype=dtype)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"logprobs_T": np.zeros((2, 1))}, r"logprobs_T has shape \(2, 1\), expected one number a token"),
        ({"ids_TK": table(2, 3, np.int64)}, "known, ids_TK and logprobs_TK go together"),
        ({"known": "vocabulary"}, "known, ids_TK and logprobs_TK go together"),
        ({"known": "requested", "ids_TK": table(2, 3, np.int64)}, "known, ids_TK and logprobs_TK go together"),
        (
            {"known": "requested", "ids_TK": table(2, 3, np.int64), "logprobs_TK": table(2, 4)},
            r"ids_TK is \(2, 3\) and logprobs_TK \(2, 4\); expected one shape",
        ),
        (
            {"known": "requested", "ids_TK": table(3, 3, np.int64), "logprobs_TK": table(3, 3)},
            r"ids_TK has shape \(3, 3\), expected \[2, any number of tokens\]",
        ),
        ({"student_ids_Tk": np.zeros(2, dtype=np.int64)}, r"student_ids_Tk has shape \(2,\)"),
    ],
)
def test_records_that_contradict_themselves_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        TokenScores(**{"logprobs_T": np.zeros(2), **fields})


def test_readings_and_results_that_say_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="a reading has no prompt"):
        Reading(prompt_ids=(), token_ids=(3,))
    with pytest.raises(DataError, match=r"requested_TK has shape \(2, 4\), expected \[1,"):
        Reading(prompt_ids=(3,), token_ids=(3,), requested_TK=table(2, 4, np.int64))
    assert Reading(prompt_ids=(3,), token_ids=(3, 4), requested_TK=table(2, 4, np.int64)).num_tokens == 2
    scores = TokenScores(logprobs_T=np.zeros(2))
    assert Scored(scores=scores).missing is None and scores.num_tokens == 2
    for fields in ({}, {"scores": scores, "missing": Missing.FAILED}):
        with pytest.raises(DataError, match="either scores or a reason"):
            Scored(**fields)


def test_the_arrays_of_a_record_cannot_be_written() -> None:
    scores = TokenScores(
        logprobs_T=np.zeros(2),
        known="requested",
        ids_TK=table(2, 3, np.int64),
        logprobs_TK=table(2, 3),
        student_logprobs_T=np.zeros(2),
        student_ids_Tk=table(2, 1, np.int64),
        student_logprobs_Tk=table(2, 1),
    )
    arrays = [a for f in dataclasses.fields(scores) if isinstance(a := getattr(scores, f.name), np.ndarray)]
    assert len(arrays) == 6
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_step_leaves_records_as_they_were() -> None:
    signals = recorded(by_teacher(4))
    before = [s.kl_evidence.logprobs_TK.copy() for s in signals if isinstance(s.kl_evidence, TokenScores)]  # type: ignore[union-attr]
    made = learner({}, {"type": "teacher_topk_forward_kl", "k": 3})
    first = made.update(1, signals).loss
    after = [s.kl_evidence.logprobs_TK for s in signals if isinstance(s.kl_evidence, TokenScores)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))  # type: ignore[arg-type]
    # The record stays, the student moves: the same evidence serves the next step.
    assert made.update(2, signals).loss < first


def test_a_recorded_signal_leaves_its_evidence_out() -> None:
    signal = dataclasses.replace(signals_of(kl_teacher="math")[0], kl_evidence=whole(rollouts()[0]))
    plain = signal.to_json()
    assert "kl_evidence" not in plain and plain["kl_teacher"] == "math"
    assert TokenSignal.from_json(plain) == dataclasses.replace(signal, kl_evidence=None)
