"""A teacher in this process gives the numbers of a plain float64 forward pass, however it cuts the work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from omniopd.errors import ConfigError
from omniopd.learner.policy import LanguageModel
from omniopd.logits.model_scores import ModelScores
from omniopd.logits.scores import Reading, Scored, TokenScores
from omniopd.types import Missing
from tests import tiny

NETWORK = tiny.model()
READINGS = [
    Reading(prompt_ids=(5, 6, 7), token_ids=(3, 4, 9, 11, 1)),
    Reading(prompt_ids=(8,), token_ids=(12,)),
    Reading(prompt_ids=(4, 4, 4, 4, 20), token_ids=(22, 0, 2, 3, 3, 3, 17, 1)),
    Reading(prompt_ids=(9, 10), token_ids=(7, 8)),
]


class Watched(LanguageModel):
    """Notes what was computed at once."""

    def __init__(self, network: torch.nn.Module = NETWORK) -> None:
        self.batches: list[tuple[int, int]] = []
        self.slices: list[int] = []
        super().__init__(network, compute_dtype=torch.float64)
        self.batches.clear()
        self.slices.clear()

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        self.batches.append(tuple(input_ids_BL.shape))
        return super().hidden(input_ids_BL, attention_mask_BL)

    def logprobs(self, hidden_NH: Tensor) -> Tensor:
        self.slices.append(len(hidden_NH))
        return super().logprobs(hidden_NH)


def reference(reading: Reading) -> Tensor:
    """Return log-softmax [T, V] of one completion, unpadded, from the model's own logits."""
    ids = torch.tensor([reading.prompt_ids + reading.token_ids])
    with torch.no_grad():
        logits = NETWORK(input_ids=ids).logits[0]
    start = len(reading.prompt_ids) - 1
    return torch.log_softmax(logits[start : start + len(reading.token_ids)], dim=-1)


def score(teacher: ModelScores, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
    return asyncio.run(teacher.score(readings, top_k=top_k))


def record(scored: Scored) -> TokenScores:
    assert scored.scores is not None, scored.detail
    return scored.scores


@pytest.mark.parametrize(("batch_tokens", "chunk_tokens"), [(1, 1), (16, 3), (8192, 128)])
def test_logprobs_are_those_of_a_plain_forward_pass_however_the_work_is_cut(
    batch_tokens: int, chunk_tokens: int
) -> None:
    teacher = ModelScores(Watched(), id="t", batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
    for scored, reading in zip(score(teacher, READINGS), READINGS, strict=True):
        found, expected_TV = record(scored), reference(reading)
        own = expected_TV.gather(-1, torch.tensor(reading.token_ids)[:, None])[:, 0]
        assert found.logprobs_T.dtype == np.float64
        np.testing.assert_allclose(found.logprobs_T, own, rtol=0, atol=1e-12)
        assert found.known is None


def test_top_k_is_the_likeliest_tokens_in_order() -> None:
    teacher = ModelScores(Watched(), id="t", chunk_tokens=2)
    for scored, reading in zip(score(teacher, READINGS, top_k=4), READINGS, strict=True):
        found, best = record(scored), reference(reading).topk(4, dim=-1)
        assert found.known == "teacher_top_k" and found.ids_TK is not None
        np.testing.assert_array_equal(found.ids_TK, best.indices)
        np.testing.assert_allclose(found.logprobs_TK, best.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [tiny.VOCABULARY, 1000])
def test_a_top_k_of_the_whole_vocabulary_is_known_as_such(top_k: int) -> None:
    for scored, reading in zip(score(ModelScores(Watched(), id="t"), READINGS, top_k=top_k), READINGS, strict=True):
        found = record(scored)
        assert found.known == "vocabulary" and found.ids_TK is not None and found.logprobs_TK is not None
        dense = np.full((len(reading.token_ids), tiny.VOCABULARY), np.nan)
        np.put_along_axis(dense, found.ids_TK.astype(np.int64), found.logprobs_TK, axis=-1)
        np.testing.assert_allclose(dense, reference(reading), rtol=0, atol=1e-12)
        assert (np.diff(found.logprobs_TK, axis=-1) <= 0).all()


def without_padding(reading: Reading, size: int) -> Tensor:
    """Return the probabilities of the first tokens over their sum, as log-probs [T, size]."""
    probs = reference(reading).exp()[:, :size]
    return (probs / probs.sum(-1, keepdim=True)).log()


def own_with_padding(reading: Reading) -> np.ndarray:
    return reference(reading).gather(-1, torch.tensor(reading.token_ids)[:, None])[:, 0].numpy()


# 0 to 19 are tokens, 20 to 22 pad the table: READINGS[2] holds some.
PADDED = [READINGS[0], READINGS[1], READINGS[3]]


@pytest.mark.parametrize("top_k", [0, 4, 20])
def test_rows_that_pad_the_table_take_no_part(top_k: int) -> None:
    teacher = ModelScores(Watched(), id="t", vocabulary=20, chunk_tokens=2)
    assert teacher.vocabulary == 20
    for scored, reading in zip(score(teacher, PADDED, top_k=top_k), PADDED, strict=True):
        found, expected = record(scored), without_padding(reading, 20)
        own = expected.gather(-1, torch.tensor(reading.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(found.logprobs_T, own, rtol=0, atol=1e-12)
        # Each gains what the padding had.
        assert (found.logprobs_T > own_with_padding(reading)).all()
        if not top_k:
            continue
        assert found.known == ("vocabulary" if top_k == 20 else "teacher_top_k")
        assert found.ids_TK is not None and found.ids_TK.max() < 20
        np.testing.assert_allclose(found.logprobs_TK, expected.topk(top_k, dim=-1).values, rtol=0, atol=1e-12)


def test_requested_tokens_are_among_those_that_there_are() -> None:
    wanted = np.array([[19, 4]])
    asked = [Reading(prompt_ids=(8,), token_ids=(12,), requested_TK=ids) for ids in (wanted, wanted + 1)]
    inside, outside = score(ModelScores(Watched(), id="t", vocabulary=20), asked)
    np.testing.assert_allclose(record(inside).logprobs_TK, without_padding(asked[0], 20)[:, [19, 4]], atol=1e-12)
    assert outside.detail == "requested token 20 is not in the teacher's vocabulary of 20"


@pytest.mark.parametrize("vocabulary", [tiny.VOCABULARY, 1000])
def test_a_table_without_padding_is_read_as_it_is(vocabulary: int) -> None:
    plain, told = ModelScores(Watched(), id="t"), ModelScores(Watched(), id="t", vocabulary=vocabulary)
    assert told.vocabulary == tiny.VOCABULARY
    for one, other in zip(score(plain, READINGS, top_k=3), score(told, READINGS, top_k=3), strict=True):
        np.testing.assert_array_equal(record(one).logprobs_T, record(other).logprobs_T)
        np.testing.assert_array_equal(record(one).logprobs_TK, record(other).logprobs_TK)


def test_requested_tokens_come_instead_of_the_likeliest_and_only_where_they_were_asked_for() -> None:
    wanted = np.array([[3, 1], [22, 22], [0, 5], [7, 8], [2, 20]], dtype=np.int32)
    asked = Reading(prompt_ids=READINGS[0].prompt_ids, token_ids=READINGS[0].token_ids, requested_TK=wanted)
    teacher = ModelScores(Watched(), id="t", chunk_tokens=2)
    first, second = (record(s) for s in score(teacher, [asked, READINGS[2]], top_k=3))
    assert (first.known, second.known) == ("requested", "teacher_top_k")
    np.testing.assert_array_equal(first.ids_TK, wanted)
    expected = reference(asked).gather(-1, torch.tensor(wanted.astype(np.int64)))
    np.testing.assert_allclose(first.logprobs_TK, expected, rtol=0, atol=1e-12)
    assert wanted.flags.writeable, "the record froze the caller's array"


def test_neither_a_batch_nor_a_slice_of_logits_is_larger_than_asked() -> None:
    model = Watched()
    # 13, 8, 4 and 2 tokens with prompts: 13 alone, since 2 x 13 > 16; then 8 and 4, 2 x 8 = 16; then 2 alone.
    score(ModelScores(model, id="t", batch_tokens=16, chunk_tokens=3), READINGS)
    assert model.batches == [(1, 1), (1, 13), (2, 8), (1, 2)]
    # The first is the one token that tells the vocabulary; then 8 = 3 + 3 + 2, 5 = 3 + 2, 2, and 1 tokens.
    assert model.slices == [1, 3, 3, 2, 3, 2, 2, 1]


def test_a_completion_that_cannot_be_scored_becomes_a_reason_and_the_others_are_scored() -> None:
    readings = [
        Reading(prompt_ids=(5,), token_ids=(3, 23)),
        READINGS[0],
        Reading(prompt_ids=(-1,), token_ids=(3,)),
        Reading(prompt_ids=(5,), token_ids=(3,), requested_TK=np.array([[4, 99]])),
        Reading(prompt_ids=(5,) * 9, token_ids=(3,)),
    ]
    scored = score(ModelScores(Watched(), id="t", context=9), readings)
    assert [s.missing for s in scored] == [Missing.FAILED, None, *[Missing.FAILED] * 3]
    assert scored[0].detail == "token 23 is not in the teacher's vocabulary of 23"
    assert "token -1" in scored[2].detail
    assert "requested token 99" in scored[3].detail
    assert scored[4].detail == "prompt and completion have 10 tokens, the teacher's context 9"
    assert record(scored[1]).num_tokens == 5


def test_a_logprob_that_is_no_number_is_a_reason() -> None:
    network = tiny.model()
    model = Watched(network)
    with torch.no_grad():
        network.model.norm.weight[0] = float("nan")
    (scored,) = score(ModelScores(model, id="t"), [READINGS[0]])
    assert scored.missing is Missing.FAILED and "token 0 is nan" in scored.detail


def test_a_completion_without_tokens_has_an_empty_record() -> None:
    (scored,) = score(ModelScores(Watched(), id="t"), [Reading(prompt_ids=(5, 6), token_ids=())], top_k=3)
    found = record(scored)
    assert found.num_tokens == 0 and found.ids_TK is not None and found.ids_TK.shape == (0, 3)


def test_nothing_to_score_costs_nothing() -> None:
    model = Watched()
    assert score(ModelScores(model, id="t"), []) == []
    assert model.batches == []


def test_other_tasks_run_between_two_batches() -> None:
    model = Watched()
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(len(model.batches))
            await asyncio.sleep(0)

    async def both() -> None:
        watching = asyncio.create_task(watch())
        await ModelScores(model, id="t", batch_tokens=1).score(READINGS)
        watching.cancel()

    asyncio.run(both())
    # One pass for the vocabulary before the first of four batches.
    assert {2, 3, 4} <= set(seen)


def test_a_reduced_precision_is_computed_in_and_reported_in_float32() -> None:
    network = tiny.model(dtype=torch.bfloat16)
    teacher = ModelScores(LanguageModel(network, compute_dtype=torch.bfloat16), id="t")
    found = record(score(teacher, [READINGS[2]])[0])
    own = reference(READINGS[2]).gather(-1, torch.tensor(READINGS[2].token_ids)[:, None])[:, 0]
    assert found.logprobs_T.dtype == np.float32
    np.testing.assert_allclose(found.logprobs_T, own, atol=0.2)


def test_settings_out_of_range_are_refused() -> None:
    model = Watched()
    with pytest.raises(ConfigError, match="batch_tokens is 0"):
        ModelScores(model, id="t", batch_tokens=0)
    with pytest.raises(ConfigError, match="chunk_tokens is -1"):
        ModelScores(model, id="t", chunk_tokens=-1)
    with pytest.raises(ConfigError, match="vocabulary is 0"):
        ModelScores(model, id="t", vocabulary=0)
    with pytest.raises(ConfigError, match="top_k is -1"):
        score(ModelScores(model, id="t"), READINGS, top_k=-1)


def test_it_says_who_it_is_and_leaves_the_model_to_the_caller() -> None:
    teacher = ModelScores(Watched(), id="hf:some/model")
    assert (teacher.id, repr(teacher)) == ("hf:some/model", "ModelScores('hf:some/model')")
    asyncio.run(teacher.aclose())
    assert record(score(teacher, [READINGS[1]])[0]).num_tokens == 1
