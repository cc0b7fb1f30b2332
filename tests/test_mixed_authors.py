"""Batches by several authors: who is drawn when, what the data's own responses become, and that nobody is mistaken."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from omniopd.behavior.base import Behavior
from omniopd.behavior.dataset import DatasetBehavior
from omniopd.behavior.mixed import MixedBehavior
from omniopd.config import DataConfig
from omniopd.errors import ConfigError, DataError
from omniopd.inputs import read_responses
from omniopd.overrides import load_config
from omniopd.records import read_signals
from omniopd.rollout.detokenize import Detokenizer
from omniopd.run import run_training
from omniopd.types import Author, FinishReason, Message, Prompt, Rollout, StepContext

CTX = StepContext(step=3, num_steps=10, seed=5)


@dataclass(frozen=True)
class _Named:
    name: str

    async def rollouts(self, prompts: Sequence[Prompt], ctx: StepContext, *, group_size: int) -> list[Rollout]:
        return [tiny.rollout(name=f"{self.name}/{ctx.step}", of=p) for p in prompts] * group_size


def mixed(**shares: float) -> MixedBehavior:
    return MixedBehavior(tuple((share, _Named(name)) for name, share in shares.items()))


def drawn(behavior: MixedBehavior, *, steps: int, seed: int = 0) -> list[Behavior]:
    return [behavior.pick(StepContext(step=step, num_steps=steps, seed=seed)) for step in range(steps)]


def test_batches_are_drawn_by_share() -> None:
    counts = Counter(drawn(mixed(student=0.5, teacher=0.25, dataset=0.25), steps=4000))
    # Three standard deviations of 4,000 draws at one half are 95.
    assert counts[_Named("student")] == pytest.approx(2000, abs=95)
    assert counts[_Named("teacher")] == pytest.approx(1000, abs=83)
    assert sum(counts.values()) == 4000


def test_draws_depend_on_seed_and_step_alone() -> None:
    behavior = mixed(student=0.5, teacher=0.5)
    assert drawn(behavior, steps=30) == drawn(mixed(student=0.5, teacher=0.5), steps=30)
    assert drawn(behavior, steps=30) != drawn(behavior, steps=30, seed=1)
    assert drawn(mixed(student=1.0), steps=5) == [_Named("student")] * 5


def test_a_whole_batch_has_one_author() -> None:
    prompts = (tiny.prompt("p0"), tiny.prompt("p1"))
    behavior = mixed(student=0.5, teacher=0.5)
    rollouts = asyncio.run(behavior.rollouts(prompts, CTX, group_size=2))
    assert len(rollouts) == 4 and len({r.id for r in rollouts}) == 1


@pytest.mark.parametrize(
    "shares", [{"student": 0.5}, {"student": 1.5, "teacher": -0.5}, {"student": 1.0, "teacher": 0.0}]
)
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be positive and add up to 1"):
        mixed(**shares)


def dataset(responses: dict[tuple[Message, ...], str], *, max_tokens: int = 20) -> DatasetBehavior:
    return DatasetBehavior(
        responses=responses,
        encode=tiny.encode,
        end_id=tiny.EOS,
        detokenize=Detokenizer(tiny.tokenizer()),
        max_tokens=max_tokens,
        verifier=lambda response, answer: response.endswith(f"#{answer}"),
    )


def test_responses_of_the_data_become_rollouts() -> None:
    known, other = tiny.prompt("p0"), tiny.prompt("p1", "Q:7-2?", answer="5")
    behavior = dataset({known.messages: "1+2=3;#3"})
    (rollout,) = asyncio.run(behavior.rollouts((other, known), CTX, group_size=4))
    assert rollout.author is Author.DATASET
    assert rollout.token_ids == (*tiny.encode("1+2=3;#3"), tiny.EOS)
    assert (rollout.id, rollout.text, rollout.finish_reason) == ("000004/1/0", "1+2=3;#3", FinishReason.STOP)
    assert (rollout.sampler_logprobs, rollout.policy_version, rollout.is_correct) == (None, -1, True)
    (cut,) = asyncio.run(dataset({known.messages: "1+2=3;#3"}, max_tokens=4).rollouts((known,), CTX, group_size=1))
    assert (cut.text, cut.finish_reason) == ("1+2=", FinishReason.LENGTH)
    with pytest.raises(DataError, match="step 4: none of the 1 prompts has a worked response"):
        asyncio.run(behavior.rollouts((other,), CTX, group_size=1))
    with pytest.raises(DataError, match=r"no row of data\.train has a worked response"):
        dataset({})


def test_responses_are_found_by_the_conversation_as_it_is_asked(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]},
        {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "three"}]},
        {"prompt": "2+2?"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (Message(role="user", content="Think. 1+2?"),)
    assert read_responses(DataConfig(train=str(file), prompt_template="Think. {prompt}")) == {asked: "3"}


def test_a_short_gkd_run_keeps_its_authors_apart(tmp_path: Path) -> None:
    words = [
        "steps=4",
        "threads=1",
        "save_every=4",
        "trackers=[]",
        "data={train: mini-math, eval: null}",
        "rollout={prompts_per_step: 2, group_size: 2, max_tokens: 12}",
        f"output={tmp_path}",
    ]
    path = run_training(load_config(["gkd"], words))
    authors = []
    for step in range(1, 5):
        signals = read_signals(path / "rollouts" / f"step-{step:06d}.jsonl")
        (author,) = {s.rollout.author for s in signals}
        authors.append(author)
        assert all(s.kl_weights == (1.0,) * s.rollout.num_tokens and s.advantages is None for s in signals)
        assert all((s.rollout.sampler_logprobs is not None) == (author is Author.STUDENT) for s in signals)
    assert set(authors) == {Author.STUDENT, Author.TEACHER}
