"""vLLM's own server as an open-weight teacher: its log-probs are those of the same weights in this process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from vllm_server import vllm_server

from byte_level import save_writer
from omniopd.errors import ConfigError
from omniopd.logits.scores import Reading, TokenScores
from omniopd.logits.vllm_scores import VllmScores, open_vllm_scores
from omniopd.types import Missing

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

NAME = "writer"
VOCABULARY = 280
TOLERANCE = 1e-4
"""Nats, float32 on both sides; measured: 1e-5."""
TEXTS = [("How many?", f"Tom has {a} red apples.\n{a} + {b} = {a + b}.") for a in range(1, 8) for b in (2, 5)]

R = TypeVar("R")


@dataclass(frozen=True)
class Served:
    """A server, and the same weights in this process."""

    base_url: str
    model: Any

    def ask(self, use: Callable[[VllmScores], Coroutine[Any, Any, R]], **settings: Any) -> R:
        async def run() -> R:
            teacher = open_vllm_scores(f"vllm:{NAME}@{self.base_url}", **{"vocab_size": VOCABULARY, **settings})
            try:
                return await use(teacher)
            finally:
                await teacher.aclose()

        return asyncio.run(run())

    def records(self, readings: Sequence[Reading], *, top_k: int = 0, **settings: Any) -> list[TokenScores]:
        scored = self.ask(lambda teacher: teacher.score(readings, top_k=top_k), **settings)
        found = [one.scores for one in scored if one.scores is not None]
        assert len(found) == len(readings), [one.detail for one in scored]
        return found

    def expected(self, reading: Reading) -> Any:
        """Return log-probs [T, V] from one unpadded forward pass."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([reading.prompt_ids + reading.token_ids])).logits[0].double()
        return torch.log_softmax(logits, dim=-1)[len(reading.prompt_ids) - 1 : -1].numpy()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("scores")
    save_writer(folder / NAME, TEXTS, vocabulary=VOCABULARY, hidden=64, seed=1, steps=40)
    model = AutoModelForCausalLM.from_pretrained(folder / NAME, dtype=torch.float32).eval()
    assert model.config.vocab_size == VOCABULARY
    # Prompts are read in pieces of 64 tokens, and prefixes are cached, as they are unless somebody says otherwise.
    options = ("--max-logprobs", "-1", "--max-num-batched-tokens", "64", "--enable-prefix-caching")
    with vllm_server(folder / NAME, name=NAME, log=folder / "server.log", options=options) as base_url:
        yield Served(base_url, model)


def some_readings() -> list[Reading]:
    """Completions of 1 to 300 tokens, some behind one prompt of 150 tokens: longer than a block of the cache."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    shared = ids(150)
    readings = [Reading(prompt_ids=ids(p), token_ids=ids(t)) for p, t in ((1, 1), (5, 40), (90, 7), (130, 300))]
    return readings + [Reading(prompt_ids=shared, token_ids=ids(t)) for t in (3, 64, 65, 20)]


READINGS = some_readings()


def own(table: Any, reading: Reading) -> Any:
    return np.take_along_axis(table, np.array(reading.token_ids)[:, None], axis=1)[:, 0]


def test_token_log_probs_are_the_models_in_any_order_and_behind_a_shared_prefix(served: Served) -> None:
    expected = [own(served.expected(reading), reading) for reading in READINGS]
    # A model that is sure of nothing would hide a shift by one token.
    assert max(float(np.ptp(one)) for one in expected) > 3.0
    for order in (range(len(READINGS)), reversed(range(len(READINGS)))):
        order = list(order)
        for i, scores in zip(order, served.records([READINGS[i] for i in order]), strict=True):
            np.testing.assert_allclose(scores.logprobs_T, expected[i], rtol=0, atol=TOLERANCE)


def test_the_five_likeliest_are_the_models(served: Served) -> None:
    for reading, scores in zip(READINGS, served.records(READINGS, top_k=5), strict=True):
        table = served.expected(reading)
        assert scores.known == "teacher_top_k"
        assert scores.ids_TK is not None and scores.logprobs_TK is not None
        assert scores.ids_TK.shape == (scores.num_tokens, 5)
        best = -np.sort(-table, axis=1)[:, :5]
        np.testing.assert_allclose(scores.logprobs_TK, best, rtol=0, atol=TOLERANCE)
        named = np.take_along_axis(table, scores.ids_TK, axis=1)
        np.testing.assert_allclose(scores.logprobs_TK, named, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(scores.logprobs_T, own(table, reading), rtol=0, atol=TOLERANCE)


def test_the_whole_vocabulary_is_the_models(served: Served) -> None:
    for reading, scores in zip(READINGS, served.records(READINGS, top_k=VOCABULARY), strict=True):
        assert scores.known == "vocabulary"
        np.testing.assert_allclose(scores.logprobs_TK, served.expected(reading), rtol=0, atol=TOLERANCE)


def with_requests(reading: Reading, table: Any, *, likeliest: int) -> Reading:
    """Ask for three tokens at each position: of the `likeliest`, in no order."""
    draw = np.random.default_rng(len(reading.token_ids))
    ranked = np.argsort(-table, axis=1)[:, :likeliest]
    return Reading(
        prompt_ids=reading.prompt_ids,
        token_ids=reading.token_ids,
        requested_TK=np.array([draw.choice(row, 3, replace=False) for row in ranked]),
    )


@pytest.mark.parametrize(("likeliest", "search_top"), [(VOCABULARY, -1), (10, 20)])
def test_requested_tokens_are_the_models(served: Served, likeliest: int, search_top: int) -> None:
    tables = [served.expected(reading) for reading in READINGS]
    asked = [with_requests(r, table, likeliest=likeliest) for r, table in zip(READINGS, tables, strict=True)]
    for reading, table, scores in zip(asked, tables, served.records(asked, search_top=search_top), strict=True):
        assert scores.known == "requested" and reading.requested_TK is not None
        assert scores.ids_TK is not None and scores.ids_TK.tolist() == reading.requested_TK.tolist()
        named = np.take_along_axis(table, reading.requested_TK, axis=1)
        np.testing.assert_allclose(scores.logprobs_TK, named, rtol=0, atol=TOLERANCE)


def test_a_token_beyond_the_search_is_missing(served: Served) -> None:
    table = served.expected(READINGS[1])
    least = np.argsort(table, axis=1)[:, :1]
    lost = Reading(prompt_ids=READINGS[1].prompt_ids, token_ids=READINGS[1].token_ids, requested_TK=least)
    (scored,) = served.ask(lambda teacher: teacher.score([lost]), search_top=20)
    assert scored.missing is Missing.FAILED and "--max-logprobs" in scored.detail


def test_the_server_passes_its_check(served: Served) -> None:
    assert served.ask(lambda teacher: teacher.check(READINGS, tolerance=TOLERANCE)) <= TOLERANCE


def test_what_the_server_refuses_is_told_with_its_option(served: Served) -> None:
    long = [Reading(prompt_ids=(5,) * 500, token_ids=(7,) * count) for count in (11, 12, 40)]
    scored = served.ask(lambda teacher: teacher.score(long))
    assert [one.missing for one in scored] == [None, Missing.FAILED, Missing.FAILED]
    assert "--max-model-len 513" in scored[1].detail and "--max-model-len 541" in scored[2].detail
    with pytest.raises(ConfigError, match=rf"max allowed: {VOCABULARY}.*--max-logprobs"):
        served.ask(lambda teacher: teacher.score(READINGS, top_k=VOCABULARY + 1), vocab_size=None)
    asked = [Reading(prompt_ids=(5,), token_ids=(7, 8), requested_TK=np.array([[1], [2]]))]
    with pytest.raises(ConfigError, match="--enable-scale-out"):
        served.ask(lambda teacher: teacher.score(asked), requested_by="ids")
