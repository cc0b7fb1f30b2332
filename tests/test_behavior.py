"""Who writes the rollouts: the student through the embedded engine, or the teacher."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from omniopd.behavior.base import group_seeds, judge
from omniopd.behavior.student import StudentBehavior
from omniopd.behavior.teacher import TeacherBehavior
from omniopd.config import RolloutConfig
from omniopd.errors import RolloutError, TeacherResponseError
from omniopd.rollout.detokenize import Detokenizer
from omniopd.rollout.embedded import EmbeddedEngine
from omniopd.teachers.base import ContinuationRequest
from omniopd.teachers.metered import MeteredTeacher
from omniopd.timing import StepTimer
from omniopd.types import Author, Continuation, FinishReason, Missing, Prompt, Rollout, StepContext, Usage

CTX = StepContext(step=3, num_steps=10, seed=5)
PROMPTS = (tiny.prompt("p0"), tiny.prompt("p1", "Q:7-2?", answer="5"))


def right(response: str, answer: str) -> bool:
    return response.endswith(f"#{answer}")


def engine(**settings: Any) -> EmbeddedEngine:
    config = RolloutConfig(**{"max_tokens": 6, **settings})
    return EmbeddedEngine(tiny.policy(dtype=torch.float32), config)


def generate(made: EmbeddedEngine, *, seeds: Sequence[int] = (1, 2), group_size: int = 2) -> list[Rollout]:
    return asyncio.run(made.generate(PROMPTS, group_size=group_size, seeds=seeds, tag="000004"))


def test_engine_writes_groups_in_order_with_all_figures() -> None:
    made = engine()
    asyncio.run(made.push_weights(4))
    rollouts = generate(made)
    assert [r.id for r in rollouts] == ["000004/0/0", "000004/0/1", "000004/1/0", "000004/1/1"]
    assert [r.group_index for r in rollouts] == [0, 1, 0, 1]
    for rollout in rollouts:
        assert rollout.policy_version == 4
        assert rollout.author == Author.STUDENT
        assert rollout.sampler_logprobs is not None and all(p <= 0 for p in rollout.sampler_logprobs)
        assert rollout.entropies is not None and all(h > 0 for h in rollout.entropies)
        assert rollout.text == tiny.tokenizer().decode(rollout.token_ids, skip_special_tokens=True)


def test_engine_settings_reach_the_sampler() -> None:
    assert {r.num_tokens for r in generate(engine(max_tokens=2))} <= {1, 2}
    plain = [r.token_ids for r in generate(engine())]
    assert [r.token_ids for r in generate(engine(temperature=3.0))] != plain
    cold = generate(engine(top_p=1e-6))
    assert cold[0].token_ids == cold[1].token_ids
    # How many are decoded together changes nothing.
    assert [r.token_ids for r in generate(engine(batch_size=1))] == plain


def test_seeds_decide_what_is_written() -> None:
    made = engine()
    assert [r.token_ids for r in generate(made)] == [r.token_ids for r in generate(made)]
    assert generate(made, seeds=(1, 9))[0].token_ids == generate(made)[0].token_ids
    assert generate(made, seeds=(9, 2), group_size=4)[:4] != generate(made, group_size=4)[:4]


def test_engine_uses_the_weights_of_the_moment() -> None:
    policy = tiny.policy(dtype=torch.float32)
    made = EmbeddedEngine(policy, RolloutConfig(max_tokens=6))
    before = generate(made)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(-1)
    assert [r.token_ids for r in generate(made)] != [r.token_ids for r in before]


def test_versions_only_grow() -> None:
    made = engine()
    asyncio.run(made.push_weights(2))
    asyncio.run(made.push_weights(2))
    assert made.policy_version == 2
    with pytest.raises(RolloutError, match="version 1 came after version 2"):
        asyncio.run(made.push_weights(1))
    asyncio.run(made.aclose())


def test_group_seeds_depend_on_run_step_place_and_prompt() -> None:
    # The first prompt is drawn twice: two groups, two seeds.
    prompts = (*PROMPTS, PROMPTS[0])
    contexts = [StepContext(step=step, num_steps=9, seed=seed) for step in (0, 1) for seed in (0, 1)]
    seeds = {seed for ctx in contexts for seed in group_seeds(ctx, prompts)}
    assert len(seeds) == 12
    # Every provider takes 32 to 53 bits.
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert group_seeds(CTX, PROMPTS) == group_seeds(StepContext(step=3, num_steps=99, seed=5), PROMPTS)


def test_judging_needs_a_verifier_and_an_answer() -> None:
    rollouts = [
        tiny.rollout("1+2=3;#3"),
        tiny.rollout("1+2=4;#4"),
        tiny.rollout("#3", of=tiny.prompt("free", answer=None), name="free/0"),
    ]
    assert [r.is_correct for r in judge(rollouts, right)] == [True, False, None]
    assert judge(rollouts, None) == rollouts


def test_student_behavior_draws_judges_and_times() -> None:
    timer = StepTimer()
    behavior = StudentBehavior(engine(), timer, lambda response, answer: answer == "5")
    rollouts = asyncio.run(behavior.rollouts(PROMPTS, CTX, group_size=2))
    assert [r.id for r in rollouts] == ["000004/0/0", "000004/0/1", "000004/1/0", "000004/1/1"]
    assert [r.is_correct for r in rollouts] == [False, False, True, True]
    assert set(timer.take()) == {"generate", "verify", "step"}
    expected = generate(engine(), seeds=group_seeds(CTX, PROMPTS))
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]


# The teacher writes


def teacher_behavior(teacher: Any, **settings: Any) -> TeacherBehavior:
    defaults: dict[str, Any] = {
        "encode": tiny.encode,
        "end_id": tiny.EOS,
        "detokenize": Detokenizer(tiny.tokenizer()),
        "max_tokens": 12,
        "timer": StepTimer(),
        "verifier": right,
    }
    return TeacherBehavior(teacher=teacher, **(defaults | settings))


def write(request: ContinuationRequest) -> list[Continuation]:
    if request.messages[0].content == "Q:7-2?":
        return [Continuation(text=None, missing=Missing.REFUSED), Continuation(text="#5", finish_reason="length")]
    return [Continuation(text="1+2=3;#3", finish_reason="stop"), Continuation(text="", finish_reason="stop")]


def test_teacher_text_becomes_student_tokens_with_an_end() -> None:
    teacher = tiny.ScriptedTeacher(write)
    rollouts = asyncio.run(teacher_behavior(teacher).rollouts(PROMPTS, CTX, group_size=2))
    # Refused and empty answers are left out, never filled in.
    assert [(r.id, r.group_index) for r in rollouts] == [("000004/0/0", 0), ("000004/1/1", 1)]
    ended, cut = rollouts
    assert ended.token_ids == (*tiny.encode("1+2=3;#3"), tiny.EOS)
    assert (ended.text, ended.finish_reason, ended.is_correct) == ("1+2=3;#3", FinishReason.STOP, True)
    assert ended.char_starts == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    # Cut off by the length limit: no end token that the teacher did not mean.
    assert (cut.token_ids, cut.finish_reason) == (tuple(tiny.encode("#5")), FinishReason.LENGTH)
    for rollout in rollouts:
        assert (rollout.author, rollout.sampler_logprobs, rollout.entropies) == (Author.TEACHER, None, None)
    assert [(r.prefix, r.n, r.max_tokens) for r in teacher.asked] == [("", 2, 12)] * 2
    assert teacher.asked[0].seed != teacher.asked[1].seed


@pytest.mark.parametrize(
    ("max_tokens", "ids", "reason"),
    [
        (9, (*tiny.encode("1+2=3;#3"), tiny.EOS), FinishReason.STOP),
        # Eight tokens fill the limit, so there is no room for the end.
        (8, tuple(tiny.encode("1+2=3;#3")), FinishReason.LENGTH),
        (3, tuple(tiny.encode("1+2")), FinishReason.LENGTH),
    ],
)
def test_answers_longer_than_the_limit_are_cut(max_tokens: int, ids: tuple[int, ...], reason: FinishReason) -> None:
    behavior = teacher_behavior(tiny.ScriptedTeacher(write), max_tokens=max_tokens)
    rollout = asyncio.run(behavior.rollouts(PROMPTS[:1], CTX, group_size=2))[0]
    assert (rollout.token_ids, rollout.finish_reason) == (ids, reason)


def test_a_student_without_an_end_token_gets_none() -> None:
    behavior = teacher_behavior(tiny.ScriptedTeacher(write), end_id=None)
    rollout = asyncio.run(behavior.rollouts(PROMPTS[:1], CTX, group_size=2))[0]
    assert (rollout.token_ids, rollout.finish_reason) == (tuple(tiny.encode("1+2=3;#3")), FinishReason.LENGTH)


def test_not_one_usable_answer_is_an_error() -> None:
    def refuse(request: ContinuationRequest) -> list[Continuation]:
        return [Continuation(text=None, missing=Missing.REFUSED)] * request.n

    behavior = teacher_behavior(tiny.ScriptedTeacher(refuse))
    with pytest.raises(TeacherResponseError, match="scripted:tiny gave no usable answer to 2 prompts"):
        asyncio.run(behavior.rollouts(PROMPTS, CTX, group_size=2))


# What the teacher costs


def test_metered_teacher_adds_up_and_starts_again() -> None:
    inner = tiny.ScriptedTeacher(write)
    metered = MeteredTeacher(inner)
    request = ContinuationRequest(messages=PROMPTS[0].messages, prefix="1", n=2, max_tokens=4)
    answers = asyncio.run(metered.continuations([request, request]))
    assert [a.continuations for a in answers] == [tuple(write(request))] * 2
    asyncio.run(metered.continuations([request]))
    # One request is 10 tokens in, 4 out, half a dollar.
    assert metered.take() == Usage(requests=3, input_tokens=30, output_tokens=12, cost_usd=1.5)
    assert metered.take() == Usage()
    assert metered.id == "scripted:tiny"
    asyncio.run(metered.aclose())
    assert inner.is_closed


def test_prompts_keep_their_identity() -> None:
    rollouts = generate(engine())
    kept: list[Prompt] = [r.prompt for r in rollouts]
    assert kept == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
