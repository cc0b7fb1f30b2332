"""Student against teacher, token by token: every way of knowing a teacher tells the same numbers, or none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from omniopd.errors import LearnerError
from omniopd.learner.learner import Learner
from omniopd.learner.matching import Evidence, TokenDiagnostics, top_set_size
from omniopd.learner.policy import LanguageModel, Policy
from omniopd.learner.teachers import ForeignTeacher
from omniopd.logits.alignment import align
from omniopd.logits.diagnostics import match_diagnostics
from omniopd.logits.reading import Read
from omniopd.logits.scores import Reading, TokenScores
from omniopd.logits.token_bytes import Segments
from omniopd.types import Missing, Rollout

K = 2  # the most of 23 tokens, an eighth
ROLLOUTS = (tiny.rollout("1+2=3;#3", name="p0/0"), tiny.rollout("6-2=4;4+4=8;#8", name="p0/1"))


def teacher_network() -> LanguageModel:
    return LanguageModel(tiny.model(phase=0.4, scale=0.3), compute_dtype=torch.float64)


@pytest.fixture(scope="module")
def learner() -> Learner:
    return tiny.learner(teacher=teacher_network(), logits_slice_tokens=16)


def reading(rollout: Rollout) -> Reading:
    return Reading(prompt_ids=rollout.prompt.token_ids, token_ids=rollout.token_ids)


def both(rollout: Rollout) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        student = tiny.naive_logprobs(tiny.model(), rollout)
        teacher = tiny.naive_logprobs(tiny.model(phase=0.4, scale=0.3), rollout)
    return student, teacher


def own(logprobs_TV: Tensor, rollout: Rollout) -> Tensor:
    return logprobs_TV[torch.arange(rollout.num_tokens), torch.tensor(rollout.token_ids)]


def record(rollout: Rollout, known: str, size: int) -> TokenScores:
    """What a server would say: of the teacher's likeliest, of the student's, or of all tokens by id."""
    student, teacher = both(rollout)
    chosen = {"teacher_top_k": teacher, "requested": student}.get(known)
    ids = (
        torch.arange(tiny.VOCABULARY).expand(rollout.num_tokens, -1)
        if chosen is None
        else chosen.topk(size, dim=-1).indices
    )
    return TokenScores(
        logprobs_T=own(teacher, rollout).numpy(),
        known=known,  # type: ignore[arg-type]
        ids_TK=ids.numpy().copy(),
        logprobs_TK=teacher.gather(-1, ids).numpy(),
    )


def match(learner: Learner, evidence: Sequence[Evidence], k: int = K) -> list[TokenDiagnostics]:
    return learner.match(ROLLOUTS[: len(evidence)], evidence, teacher="teacher", k=k)


def expect(found: TokenDiagnostics, wanted: dict[str, list[float]], *, names: set[str] | None = None) -> None:
    assert set(found) == (set(wanted) if names is None else names)
    for name, values in found.items():
        assert values == pytest.approx(wanted[name], rel=1e-9, abs=1e-12, nan_ok=True), name


def wanted_of(rollout: Rollout, k: int = K) -> dict[str, list[float]]:
    student, teacher = both(rollout)
    outside = [
        float(token not in row.topk(k).indices.tolist()) for row, token in zip(teacher, rollout.token_ids, strict=True)
    ]
    return {
        **{name: values.tolist() for name, values in match_diagnostics(student, teacher, k=k).items()},
        "log_ratio": (own(teacher, rollout) - own(student, rollout)).tolist(),
        "sampled_outside_top_k": outside,
        "top_k": [float(k)] * rollout.num_tokens,
    }


def test_a_teacher_with_weights_is_compared_as_without_padding_and_slices(learner: Learner) -> None:
    # Slices of 16 // 4 = 4 tokens: rollouts of 9 and 15 tokens cross several.
    found = match(learner, [reading(r) for r in ROLLOUTS])
    for rollout, of in zip(ROLLOUTS, found, strict=True):
        expect(of, wanted_of(rollout))
    assert {value for of in found for value in of["sampled_outside_top_k"]} == {0.0, 1.0}


def test_a_small_vocabulary_has_small_sets(learner: Learner) -> None:
    # 34 // 8 = 4; sets of 16 of 34 tokens would overlap whatever the models.
    assert [top_set_size(16, of) for of in (7, 34, 128, 150_000)] == [1, 4, 16, 16]
    expect(match(learner, [reading(ROLLOUTS[0])], k=16)[0], wanted_of(ROLLOUTS[0], k=2))


def test_a_record_of_the_whole_vocabulary_tells_as_much(learner: Learner) -> None:
    found = match(learner, [record(r, "vocabulary", tiny.VOCABULARY) for r in ROLLOUTS])
    for rollout, of in zip(ROLLOUTS, found, strict=True):
        expect(of, wanted_of(rollout))


def test_models_that_compute_in_bfloat16_come_close() -> None:
    student = Policy(tiny.model(dtype=torch.float32), tiny.tokenizer(), compute_dtype=torch.bfloat16, lora=False)
    network = tiny.model(phase=0.4, scale=0.3, dtype=torch.bfloat16)
    learner = tiny.learner(student=student, teacher=LanguageModel(network, compute_dtype=torch.bfloat16))
    found = match(learner, [reading(ROLLOUTS[0])])[0]
    wanted = wanted_of(ROLLOUTS[0])
    assert found["log_ratio"] == pytest.approx(wanted["log_ratio"], abs=0.1)
    assert found["log_ratio"] != pytest.approx(wanted["log_ratio"], abs=1e-6)
    assert found["entropy_gap_signed"] == pytest.approx(wanted["entropy_gap_signed"], abs=0.1)


UNTOLD = {"entropy_gap", "entropy_gap_signed", "teacher_mass_on_student_top_k"}


def test_the_teachers_likeliest_tell_all_but_entropies_and_its_mass_elsewhere(learner: Learner) -> None:
    # One record is wider than k: its first k tokens are the teacher's k likeliest.
    evidence = [record(ROLLOUTS[0], "teacher_top_k", K), record(ROLLOUTS[1], "teacher_top_k", K + 3)]
    for rollout, of in zip(ROLLOUTS, match(learner, evidence), strict=True):
        wanted = wanted_of(rollout)
        expect(of, wanted, names=set(wanted) - UNTOLD)


def test_a_narrow_record_is_compared_at_its_own_size(learner: Learner) -> None:
    found = match(learner, [record(ROLLOUTS[0], "teacher_top_k", 1)])[0]
    wanted = wanted_of(ROLLOUTS[0], k=1)
    expect(found, wanted, names=set(wanted) - UNTOLD)


def test_the_students_candidates_tell_two_masses_and_the_ratio(learner: Learner) -> None:
    found = match(learner, [record(r, "requested", K) for r in ROLLOUTS])
    names = {"log_ratio", "student_mass_on_student_top_k", "teacher_mass_on_student_top_k", "top_k"}
    for rollout, of in zip(ROLLOUTS, found, strict=True):
        expect(of, wanted_of(rollout), names=names)


def test_a_record_of_the_sampled_tokens_tells_the_ratio_alone(learner: Learner) -> None:
    rollout = ROLLOUTS[0]
    _, teacher = both(rollout)
    found = match(learner, [TokenScores(logprobs_T=own(teacher, rollout).numpy())])[0]
    expect(found, wanted_of(rollout), names={"log_ratio"})
    # So does one that claims the vocabulary, but lacks a part of it.
    part = TokenScores(
        logprobs_T=own(teacher, rollout).numpy(),
        known="vocabulary",
        ids_TK=np.zeros((rollout.num_tokens, 1), dtype=np.int64),
        logprobs_TK=teacher[:, :1].numpy().copy(),
    )
    expect(match(learner, [part])[0], wanted_of(rollout), names={"log_ratio"})


def test_another_tokenizer_leaves_the_ratio_of_whole_groups() -> None:
    rollout = ROLLOUTS[0]  # 1+2=3;#3 and the end, a token each
    # The teacher's tokens: `1+`, `2`, `=3;#3`; ids are any of its vocabulary.
    cuts = Segments(data=b"1+2=3;#3", ends=(2, 3, 8), positions=(0, 1, 2), num_tokens=3)
    mine = Segments(data=b"1+2=3;#3", ends=tuple(range(1, 9)), positions=tuple(range(8)), num_tokens=9)
    theirs = Reading(prompt_ids=(4, 9, 2), token_ids=(7, 11, 3))
    network = tiny.model(phase=0.4, scale=0.3)
    learner = tiny.learner(logits_slice_tokens=8)
    learner._teachers["teacher"] = ForeignTeacher(LanguageModel(network, compute_dtype=torch.float64))
    found = match(learner, [Read(reading=theirs, alignment=align(mine, cuts))])[0]
    assert set(found) == {"log_ratio"}
    p = own(both(rollout)[0], rollout).tolist()
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([[4, 9, 2, 7, 11, 3]])).logits[0, 2:5]
    q = torch.log_softmax(logits, -1)[torch.arange(3), torch.tensor([7, 11, 3])].tolist()
    first, second, third = (q[0] - p[0] - p[1]) / 2, q[1] - p[2], (q[2] - sum(p[3:8])) / 5
    assert found["log_ratio"][:8] == pytest.approx([first] * 2 + [second] + [third] * 5)
    assert math.isnan(found["log_ratio"][8])  # The end token has no partner.


def test_evidence_of_something_else_is_refused(learner: Learner) -> None:
    short = tiny.rollout("1+2", name="p0/0")
    with pytest.raises(LearnerError, match="has 4 tokens and the rollout 9"):
        match(learner, [reading(short)])
    with pytest.raises(LearnerError, match="of another completion"):
        match(learner, [record(short, "requested", 2)])
    with pytest.raises(LearnerError, match="another completion"):
        match(learner, [Read(reading=reading(short))])
    with pytest.raises(LearnerError, match="could not read it"):
        match(learner, [Read(missing=Missing.FAILED)])
    with pytest.raises(LearnerError, match="no teacher is there"):
        learner.match(ROLLOUTS[:1], [reading(ROLLOUTS[0])], teacher="nobody", k=K)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_student_is_left_as_it_was(is_training: bool) -> None:
    learner = tiny.learner(teacher=teacher_network())
    learner.policy.model.train(is_training)
    before = {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}
    state = torch.get_rng_state()
    match(learner, [Read(reading=reading(r)) for r in ROLLOUTS])
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in learner.policy.model.modules()} == {is_training}
    for name, parameter in learner.policy.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
