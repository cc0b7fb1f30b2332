from __future__ import annotations

import json
from collections import Counter

import pytest

from omniopd.errors import ConfigError, DataError
from omniopd.prompts import (
    FrontierPrompts,
    LearnsFromRollouts,
    PromptSource,
    SequentialPrompts,
    ShuffledPrompts,
    build_sampler,
)
from omniopd.types import FinishReason, Message, Prompt, Rollout


def make_prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(id=f"p{i}", messages=(Message(role="user", content=str(i)),), text=str(i), token_ids=(i,))
        for i in range(count)
    )


def outcomes(prompt: Prompt, *verdicts: bool | None, finish: FinishReason = FinishReason.STOP) -> list[Rollout]:
    return [
        Rollout(
            id=f"{prompt.id}-{i}",
            prompt=prompt,
            group_index=i,
            token_ids=(1,),
            text="x",
            char_starts=(0,),
            finish_reason=finish,
            policy_version=0,
            is_correct=verdict,
        )
        for i, verdict in enumerate(verdicts)
    ]


def ids(prompts: tuple[Prompt, ...]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_sequential_wraps_around() -> None:
    source = SequentialPrompts(prompts=make_prompts(3))
    # Step 1 of 2 holds stream positions 2 and 3; position 3 is prompt 0 again.
    assert ids(source.draw(1, 2)) == ["p2", "p0"]
    assert ids(source.draw(0, 4)) == ["p0", "p1", "p2", "p0"]


def test_shuffled_covers_each_epoch_once_even_when_a_draw_straddles() -> None:
    prompts = make_prompts(10)
    source = ShuffledPrompts(prompts=prompts, seed=3)
    stream = [prompt for step in range(5) for prompt in ids(source.draw(step, 4))]
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == sorted(ids(prompts))
    assert first != second
    assert first != ids(prompts)


def test_shuffled_is_a_function_of_seed_and_step() -> None:
    prompts = make_prompts(10)
    source = ShuffledPrompts(prompts=prompts, seed=3)
    later = source.draw(7, 4)
    source.draw(0, 4)
    assert source.draw(7, 4) == later == ShuffledPrompts(prompts=prompts, seed=3).draw(7, 4)
    assert later != ShuffledPrompts(prompts=prompts, seed=4).draw(7, 4)


@pytest.mark.parametrize("start", [0, 5])
def test_frontier_without_observations_is_shuffled(start: int) -> None:
    prompts = make_prompts(7)
    plain, frontier = ShuffledPrompts(prompts=prompts, seed=1), FrontierPrompts(prompts=prompts, seed=1)
    for step in range(start, start + 6):
        assert frontier.draw(step, 3) == plain.draw(step, 3)


def test_frontier_with_floor_one_is_shuffled_whatever_it_saw() -> None:
    prompts = make_prompts(7)
    plain, frontier = ShuffledPrompts(prompts=prompts, seed=1), FrontierPrompts(prompts=prompts, seed=1, floor=1)
    frontier.observe([r for p in prompts for r in outcomes(p, True, True)])
    for step in range(6):
        assert frontier.draw(step, 3) == plain.draw(step, 3)


def test_frontier_draws_in_proportion_to_the_learnability() -> None:
    prompts = make_prompts(4)
    source = FrontierPrompts(prompts=prompts, seed=0, floor=0.1)
    source.observe(outcomes(prompts[0], True, True, True, True))  # p 1: weight 0, floor 0.1
    source.observe(outcomes(prompts[1], True, False))  # p 1/2: weight 1
    source.observe(outcomes(prompts[2], True, False, False, False))  # p 1/4: weight 4 * 3/16 = 0.75
    drawn = Counter(prompt.id for step in range(1_000) for prompt in source.draw(step, 4))
    # p3 was never observed: weight 1. Shares of 4000 draws by weights .1, 1, .75, 1 (sum 2.85): 140, 1404, 1053, 1404.
    expected = {"p0": 140, "p1": 1404, "p2": 1053, "p3": 1404}
    for prompt_id, count in expected.items():
        # Four standard deviations of a binomial count are at most 4 * sqrt(4000 / 4) = 126.
        assert abs(drawn[prompt_id] - count) < 126, (prompt_id, drawn)


def test_frontier_discounts_older_evidence() -> None:
    prompts = make_prompts(2)
    source = FrontierPrompts(prompts=prompts, seed=0, decay=0.5)
    assert source.pass_rate("p0") is None
    source.observe(outcomes(prompts[0], False, False))
    assert source.pass_rate("p0") == 0.0
    source.observe(outcomes(prompts[0], True, True))
    # Passes 0.5 * 0 + 2, trials 0.5 * 2 + 2.
    assert source.pass_rate("p0") == pytest.approx(2 / 3)


def test_frontier_learns_nothing_from_unverified_and_aborted_rollouts() -> None:
    prompts = make_prompts(2)
    source = FrontierPrompts(prompts=prompts, seed=0)
    source.observe([*outcomes(prompts[0], None, None), *outcomes(prompts[1], True, finish=FinishReason.ABORT)])
    assert source.pass_rate("p0") is None
    assert source.pass_rate("p1") is None


def test_frontier_resumes_where_it_stopped() -> None:
    prompts = make_prompts(9)
    straight = FrontierPrompts(prompts=prompts, seed=5)
    states, draws = {}, []
    for step in range(12):
        if step == 6:
            states = json.loads(json.dumps(straight.state_dict()))
        drawn = straight.draw(step, 4)
        draws.append(drawn)
        straight.observe([r for p in drawn for r in outcomes(p, p.token_ids[0] % 2 == 0, p.token_ids[0] % 3 == 0)])
    resumed = FrontierPrompts(prompts=prompts, seed=5)
    resumed.load_state_dict(states)
    for step in range(6, 12):
        drawn = resumed.draw(step, 4)
        assert drawn == draws[step]
        resumed.observe([r for p in drawn for r in outcomes(p, p.token_ids[0] % 2 == 0, p.token_ids[0] % 3 == 0)])
    fresh = FrontierPrompts(prompts=prompts, seed=5)
    assert fresh.draw(6, 4) != draws[6]


def test_frontier_refuses_the_state_of_other_prompts() -> None:
    source = FrontierPrompts(prompts=make_prompts(3), seed=0)
    source.observe(outcomes(make_prompts(3)[2], True))
    with pytest.raises(DataError, match=r"knows 1 prompts that the data lacks \(e\.g\. p2\)"):
        FrontierPrompts(prompts=make_prompts(2), seed=0).load_state_dict(source.state_dict())


def test_build_sampler_makes_what_the_spec_names() -> None:
    prompts = make_prompts(5)
    assert build_sampler({"type": "sequential"}, prompts, 2) == SequentialPrompts(prompts=prompts)
    assert build_sampler({"type": "shuffled"}, list(prompts), 2) == ShuffledPrompts(prompts=prompts, seed=2)
    frontier = build_sampler({"type": "frontier", "floor": 0.3}, prompts, 2)
    assert isinstance(frontier, FrontierPrompts)
    assert (frontier.floor, frontier.decay, frontier.stream.seed) == (0.3, 0.5, 2)
    assert isinstance(frontier, LearnsFromRollouts)
    plain: PromptSource = build_sampler({"type": "shuffled"}, prompts, 2)
    assert not isinstance(plain, LearnsFromRollouts)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "shufled"}, "data.sampler.type is 'shufled'; expected frontier, sequential, shuffled; did you mean"),
        ({}, "data.sampler.type is None"),
        ({"type": "frontier", "flor": 0.1}, "no key 'flor' for type 'frontier'; .* did you mean 'floor'"),
        ({"type": "shuffled", "seed": 1}, "no key 'seed' for type 'shuffled'; expected type"),
        ({"type": "frontier", "floor": "low"}, "data.sampler.floor is 'low'; expected a number"),
        ({"type": "frontier", "floor": 0}, "floor is 0; expected a share above 0"),
        ({"type": "frontier", "decay": 1.5}, "decay is 1.5; expected a share from 0 to 1"),
    ],
)
def test_build_sampler_errors_teach(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_sampler(spec, make_prompts(2), 0)


def test_nothing_to_draw() -> None:
    with pytest.raises(DataError, match="no prompts"):
        SequentialPrompts(prompts=())
    with pytest.raises(ConfigError, match="cannot draw 0 prompts for step 3"):
        ShuffledPrompts(prompts=make_prompts(1), seed=0).draw(3, 0)
    with pytest.raises(DataError, match="2 prompts share 1 ids"):
        FrontierPrompts(prompts=make_prompts(1) * 2, seed=0)
