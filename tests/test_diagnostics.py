"""Diagnostics against the numbers of their definitions, brute force, and rollouts that went wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from omniopd.errors import ConfigError, DataError
from omniopd.logits.diagnostics import (
    AlarmLimits,
    TopTokens,
    by_correctness,
    by_position,
    entropy,
    loop_length,
    match_diagnostics,
    mean_of,
    overlap_advantage,
    overlap_ratio,
    overlap_reward,
    repeated_share,
    rollout_alarms,
    rollout_health,
    student_top_k_rewards,
    text_overlap,
    top_k_masses,
)
from omniopd.scoring.similarity import get_similarity
from omniopd.types import FinishReason, Message, Prompt, Rollout

P, Q = (0.2, 0.3, 0.5), (0.6, 0.3, 0.1)


def logs(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_logprobs(rows: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def test_the_numbers_of_the_definitions() -> None:
    # S = {2, 1}, U = {0, 1}: one of two is shared, and there P = Q
    top = TopTokens.of(logs(P), logs(Q), k=2)
    assert overlap_ratio(top).tolist() == [0.5]
    assert overlap_advantage(top).tolist() == pytest.approx([0.0])
    # rho = (.5, .3) / .8: .625 log(.1 / .5) = -1.005899 and .375 log 1
    assert top.student_ids_Nk.tolist() == [[2, 1]]
    assert student_top_k_rewards(top).tolist() == [pytest.approx([-1.005899, 0.0], abs=1e-6)]
    assert overlap_reward(top).tolist() == pytest.approx([0.0])
    masses = {name: value.item() for name, value in top_k_masses(top).items()}
    assert masses == {
        "student_mass_on_student_top_k": pytest.approx(0.8),
        "teacher_mass_on_student_top_k": pytest.approx(0.4),
        "student_mass_on_teacher_top_k": pytest.approx(0.5),
        "teacher_mass_on_teacher_top_k": pytest.approx(0.9),
    }


def test_the_two_advantages_weigh_differently() -> None:
    top = TopTokens.of(logs((0.8, 0.1, 0.1)), logs((0.4, 0.35, 0.25)), k=1)
    # -.4 log(.4 / .8) = .277259; rho = 1: log(.4 / .8) = -.693147
    assert overlap_advantage(top).tolist() == pytest.approx([0.277259], abs=1e-6)
    assert overlap_reward(top).tolist() == pytest.approx([-0.693147], abs=1e-6)


def test_the_same_model_agrees_with_itself() -> None:
    logprobs = random_logprobs(6, 20, 1)
    got = {name: mean_of(values.tolist()) for name, values in match_diagnostics(logprobs, logprobs, k=4).items()}
    assert got["overlap_ratio"] == 1.0
    assert got["overlap_advantage"] == got["overlap_reward"] == got["entropy_gap"] == got["entropy_gap_signed"] == 0.0
    assert got["student_mass_on_teacher_top_k"] == got["teacher_mass_on_teacher_top_k"]


def test_disjoint_tops_have_no_advantage() -> None:
    student, teacher = logs((0.5, 0.5, 0.0, 0.0)), logs((0.0, 0.0, 0.5, 0.5))
    got = match_diagnostics(student, teacher, k=2)
    assert got["overlap_ratio"].tolist() == [0.0]
    assert math.isnan(got["overlap_advantage"].item()) and math.isnan(got["overlap_reward"].item())
    assert mean_of(got["overlap_advantage"].tolist()) == 0.0
    # Where only some positions are empty the mean is over the others.
    assert mean_of([math.nan, -0.5, -0.25]) == -0.375


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 999), st.data())
def test_diagnostics_against_brute_force(size: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    student, teacher = random_logprobs(3, size, seed), random_logprobs(3, size, seed + 1000)
    got = match_diagnostics(student, teacher, k=k)
    for row in range(3):
        p, q = student[row].exp().tolist(), teacher[row].exp().tolist()
        mine = sorted(range(size), key=lambda v: -p[v])[:k]
        theirs = sorted(range(size), key=lambda v: -q[v])[:k]
        shared = sorted(set(mine) & set(theirs))
        assert got["overlap_ratio"][row].item() == pytest.approx(len(shared) / k)
        if shared:
            verl = sum(-q[v] * math.log(q[v] / p[v]) for v in shared) / len(shared)
            thunlp = sum(p[v] / sum(p[u] for u in mine) * math.log(q[v] / p[v]) for v in shared) / len(shared)
            assert got["overlap_advantage"][row].item() == pytest.approx(verl, rel=1e-9)
            assert got["overlap_reward"][row].item() == pytest.approx(thunlp, rel=1e-9)
        assert got["student_mass_on_teacher_top_k"][row].item() == pytest.approx(sum(p[v] for v in theirs))
        assert got["teacher_mass_on_student_top_k"][row].item() == pytest.approx(sum(q[v] for v in mine))
        gap = sum(x * math.log(x) for x in p) - sum(x * math.log(x) for x in q)
        assert got["entropy_gap_signed"][row].item() == pytest.approx(gap, rel=1e-9)
        assert got["entropy_gap"][row].item() == pytest.approx(abs(gap), rel=1e-9)


def test_names_of_tokens_do_not_matter() -> None:
    student, teacher = random_logprobs(5, 9, 3), random_logprobs(5, 9, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    plain, renamed = (
        match_diagnostics(student, teacher, k=4),
        match_diagnostics(student[:, order], teacher[:, order], k=4),
    )
    for name, values in plain.items():
        assert torch.allclose(values, renamed[name], equal_nan=True), name


def test_entropy_of_certainty_is_zero() -> None:
    # log 2 and 0
    assert entropy(logs((0.5, 0.5, 0.0), (1.0, 0.0, 0.0))).tolist() == pytest.approx([math.log(2), 0.0])


def test_a_teacher_without_mass_on_an_unshared_token_does_no_harm() -> None:
    top = TopTokens.of(logs((0.6, 0.3, 0.1)), logs((0.8, 0.0, 0.2)), k=2)
    assert overlap_reward(top).tolist() == pytest.approx([0.6 / 0.9 * math.log(0.8 / 0.6)])


def test_what_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="one vocabulary"):
        TopTokens.of(random_logprobs(1, 3, 1), random_logprobs(1, 4, 1))
    with pytest.raises(ConfigError, match="k is 4; expected 1 to the 3"):
        TopTokens.of(random_logprobs(1, 3, 1), random_logprobs(1, 3, 1), k=4)


def test_by_position() -> None:
    # Four tokens fill four halves: [1, 2], [3, 4]; two tokens: [5], [7]
    assert by_position([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0]], bins=2) == (pytest.approx(8 / 3), pytest.approx(14 / 3))
    assert by_position([[1.0, math.nan]], bins=4) == (1.0, None, None, None)
    assert by_position([list(range(20))]) == tuple(2 * i + 0.5 for i in range(10))
    with pytest.raises(ConfigError, match="bins is 0"):
        by_position([[1.0]], bins=0)


def test_by_correctness() -> None:
    got = by_correctness([[1.0, 3.0], [5.0], [math.nan]], [True, True, None])
    assert got == {"correct": 3.0, "wrong": None, "unverified": None}
    assert by_correctness([[1.0], [2.0]], [False, None]) == {"correct": None, "wrong": 1.0, "unverified": 2.0}
    with pytest.raises(DataError, match="1 rollouts with 2 verdicts"):
        by_correctness([[1.0]], [True, False])


def test_text_overlap_takes_the_best_match() -> None:
    exact = get_similarity("exact")
    # Prefix 1: "a" is met, "b" is not: .5. Prefix 2: met: 1. Prefix 3 has no teacher span: no evidence.
    assert text_overlap([["a", "b"], ["c"], []], [["x", "a"], ["c"], ["d"]], exact) == 0.75
    assert text_overlap([["a"], []], [[], ["a"]], exact) is None
    assert text_overlap([["3 + 14 = 17"]], [["3 + 14 = 18", "so"]], get_similarity("edit")) == pytest.approx(
        get_similarity("edit")("3 + 14 = 18", "3 + 14 = 17")
    )
    with pytest.raises(DataError, match="1 prefixes with teacher spans, 2"):
        text_overlap([["a"]], [["a"], ["b"]], exact)


def test_repetition_of_n_grams() -> None:
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share(range(50)) == 0.0
    # 1 1 1 1 1 1: three 4-grams, one of them new
    assert repeated_share([1] * 6) == pytest.approx(2 / 3)
    # 1 2 1 2 1: 12, 21, 12, 21
    assert repeated_share([1, 2, 1, 2, 1], n=2) == 0.5


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        (list(range(30)), 0),
        ([7, 8, 9, 5, 5], 0),
        ([7, 8, 9, 5, 5, 5], 3),
        ([9, 1, 2, 1, 2, 1, 2, 1], 7),
        ([1, 2, 3] * 4, 12),
        ([1, 2, 3] * 4 + [9], 0),
    ],
)
def test_loops_at_the_end(tokens: list[int], expected: int) -> None:
    assert loop_length(tokens) == expected
    assert loop_length(tokens, max_period=0) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(3, 6))
def test_a_block_repeated_is_found(head: list[int], block: list[int], times: int) -> None:
    assert loop_length(head + block * times) >= len(block) * times


def rollout(token_ids: Sequence[int], finish: FinishReason = FinishReason.STOP) -> Rollout:
    prompt = Prompt(id="p", messages=(Message(role="user", content="?"),), text="?", token_ids=(1,))
    return Rollout(
        id="r",
        prompt=prompt,
        group_index=0,
        token_ids=tuple(token_ids),
        text="",
        char_starts=(0,) * len(token_ids),
        finish_reason=finish,
        policy_version=0,
    )


def test_healthy_rollouts_raise_no_alarm() -> None:
    health = rollout_health([rollout(range(20)), rollout(range(40))])
    assert health == {
        "rollout/repeated_share": 0.0,
        "rollout/repetitive": 0.0,
        "rollout/truncated": 0.0,
        "rollout/mean_tokens": 30.0,
    }
    assert rollout_alarms(health, health) == ()


def test_alarms_name_what_went_wrong() -> None:
    first = rollout_health([rollout(range(20))])
    # Stuck: no n-gram share to speak of, but the last 33 tokens loop over 11.
    stuck = rollout([*range(100, 200), *[*range(11)] * 3], FinishReason.LENGTH)
    assert repeated_share(stuck.token_ids) < 0.5 and loop_length(stuck.token_ids) == 33
    repetition, truncation, length = rollout_alarms(rollout_health([stuck, stuck]), first)
    assert "100% of the rollouts repeat themselves (limit 10%)" in repetition
    assert "100% of the rollouts hit the length limit (limit 50%, first step 0%)" in truncation
    assert "133 tokens on average, 20 in the first step (limit a factor of 2)" in length
    shorter = rollout_alarms(rollout_health([rollout(range(9))]), first)
    assert len(shorter) == 1 and "9 tokens on average" in shorter[0]
    # A run that starts cut off is not told again at every step, and limits are the caller's.
    cut = rollout_health([rollout(range(20), FinishReason.LENGTH)])
    assert rollout_alarms(cut, cut) == ()
    loose = AlarmLimits(max_affected=1.0, max_truncated=1.0, max_length_ratio=10.0)
    assert rollout_alarms(rollout_health([stuck], loose), first, loose) == ()


def test_the_end_token_hides_no_loop() -> None:
    looped = [*range(100, 200), *[5, 6] * 20, tiny.EOS]
    assert repeated_share(looped) < 0.5
    assert rollout_health([rollout(looped)])["rollout/repetitive"] == 1.0


def test_no_rollouts_are_no_health() -> None:
    with pytest.raises(DataError, match="no rollouts"):
        rollout_health([])
