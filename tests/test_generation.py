"""The sampler: what it draws, that nothing around a sample changes it, and when it stops."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

import tiny
from omniopd import generation
from omniopd.errors import ConfigError, RolloutError
from omniopd.generation import Sample, Sampler, SampleRequest, end_token_ids, load_sampler
from omniopd.types import FinishReason


def request(token_ids: Sequence[int] = (5, 6, 7), **settings: Any) -> SampleRequest:
    return SampleRequest(**{"token_ids": tuple(token_ids), "num_samples": 1, "max_tokens": 8, **settings})


def sampler(**settings: Any) -> Sampler:
    return Sampler(tiny.model(**{"dtype": torch.float32, **settings}), tiny.tokenizer())


class FixedModel(nn.Module):
    """A model that answers with the same distribution whatever it reads, and remembers how it was called."""

    def __init__(self, probs: Sequence[float]) -> None:
        super().__init__()
        network = tiny.model(dtype=torch.float32, layers=1)
        self.config, self.generation_config = network.config, GenerationConfig(eos_token_id=None)
        self.logits = nn.Parameter(torch.full((tiny.VOCABULARY,), -torch.inf))
        self.device = torch.device("cpu")
        self.widths: list[int] = []
        with torch.no_grad():
            self.logits[3 : 3 + len(probs)] = torch.tensor(probs).log()

    def forward(self, *, input_ids: Tensor, past_key_values: DynamicCache, **_: Any) -> Any:
        rows, width = input_ids.shape
        self.widths.append(rows)
        past_key_values.update(torch.zeros(rows, 1, width, 32), torch.zeros(rows, 1, width, 32), 0)
        return type("Output", (), {"logits": self.logits.expand(rows, 1, -1)})


def fixed(*probs: float) -> Sampler:
    """Sample from ids 3, 4, 5... with the given probabilities."""
    return Sampler(FixedModel(probs), tiny.tokenizer())  # type: ignore[arg-type]


def logprobs_after(network: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(network(input_ids=torch.tensor([list(token_ids)])).logits[0, -1].double(), -1)


def drawn(samples: Sequence[Sample]) -> list[int]:
    return [token for sample in samples for token in sample.token_ids]


# What is drawn


def chi_square(counts: Counter[int], probs: Sequence[float]) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probs) if p > 0)


def test_tokens_come_with_the_models_probabilities() -> None:
    made = sampler(vocabulary=8)
    [samples] = made.sample([request(num_samples=4000, max_tokens=1, seed=3)])
    probs = logprobs_after(made.model, (5, 6, 7)).exp().tolist()
    assert min(probs) * 4000 > 5
    # 7 degrees of freedom: 24.32 is passed once in a thousand.
    assert chi_square(Counter(drawn(samples)), probs) < 24.32


def test_second_tokens_are_drawn_given_the_first() -> None:
    made = sampler(vocabulary=8)
    made._end_ids = frozenset()
    [samples] = made.sample([request(num_samples=4000, max_tokens=2, seed=2)])
    first = Counter(s.token_ids[0] for s in samples).most_common(1)[0][0]
    seconds = Counter(s.token_ids[1] for s in samples if s.token_ids[0] == first)
    probs = logprobs_after(made.model, (5, 6, 7, first)).exp().tolist()
    assert seconds.total() > 500
    assert chi_square(seconds, probs) < 24.32
    # The test can fail: the same counts do not fit another prefix.
    assert chi_square(seconds, logprobs_after(made.model, (5, 6, 4)).exp().tolist()) > 24.32


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float) -> None:
    [samples] = fixed(0.5, 0.3, 0.2).sample([request(num_samples=3000, max_tokens=1, temperature=temperature)])
    powers = [p ** (1 / temperature) for p in (0.5, 0.3, 0.2)]
    probs = [p / sum(powers) for p in powers]
    counts = Counter(token - 3 for token in drawn(samples))
    # 2 degrees of freedom: 13.82 is passed once in a thousand.
    assert chi_square(counts, probs) < 13.82
    for sample in samples[:20]:
        assert sample.logprobs[0] == pytest.approx(math.log(probs[sample.token_ids[0] - 3]), abs=1e-5)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        # Mass before each token in falling order: 0, .5, .8, .95. A token is in while that is below top_p.
        (0.3, {3}),
        (0.6, {3, 4}),
        (0.79, {3, 4}),
        (0.85, {3, 4, 5}),
        (0.96, {3, 4, 5, 6}),
        (1.0, {3, 4, 5, 6}),
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: set[int]) -> None:
    probs = {3: 0.5, 4: 0.3, 5: 0.15, 6: 0.05}
    [samples] = fixed(*probs.values()).sample([request(num_samples=400, max_tokens=1, top_p=top_p)])
    assert set(drawn(samples)) == kept
    mass = sum(probs[token] for token in kept)
    for sample in samples:
        # Logprobs are those of the distribution that was drawn from.
        assert sample.logprobs[0] == pytest.approx(math.log(probs[sample.token_ids[0]] / mass), abs=1e-5)


def test_temperature_comes_before_the_nucleus() -> None:
    # At temperature 2 the probabilities go with sqrt(p): .6, .3 and .1 become .473, .334, .193; .6 needs two of them,
    # and so it would without the temperature; .7 needs two without and two with; .85 needs two without, three with.
    [samples] = fixed(0.6, 0.3, 0.1).sample([request(num_samples=300, max_tokens=1, top_p=0.85, temperature=2.0)])
    assert set(drawn(samples)) == {3, 4, 5}


def test_nucleus_of_unordered_probabilities() -> None:
    [samples] = fixed(0.05, 0.3, 0.15, 0.5).sample([request(num_samples=300, max_tokens=1, top_p=0.6)])
    assert set(drawn(samples)) == {4, 6}


@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_the_largest_random_number_still_draws_a_possible_token(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to float32 it would be 1.0, which lies past the last token that has any probability."""
    monkeypatch.setattr(generation, "_uniforms", lambda request, index: np.full(request.max_tokens, 1 - 2.0**-40))
    [[sample]] = fixed(0.5, 0.3, 0.2).sample([request(max_tokens=2, top_p=top_p)])
    assert sample.token_ids == ((4, 4) if top_p < 1 else (5, 5))
    assert all(math.isfinite(p) for p in sample.logprobs)


def test_the_smallest_random_number_skips_impossible_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_uniforms", lambda request, index: np.zeros(request.max_tokens))
    [[sample]] = fixed(0.5, 0.5).sample([request(max_tokens=1)])
    assert sample.token_ids == (3,)


def test_figures_are_those_of_the_model() -> None:
    made = sampler(vocabulary=12)
    [samples] = made.sample([request(num_samples=3, max_tokens=6, seed=5)])
    for sample in samples:
        for t, token in enumerate(sample.token_ids):
            logprobs = logprobs_after(made.model, (5, 6, 7, *sample.token_ids[:t]))
            assert sample.logprobs[t] == pytest.approx(logprobs[token].item(), abs=1e-4)
            entropy = -(logprobs.exp() * logprobs).sum().item()
            assert sample.entropies[t] == pytest.approx(entropy, abs=1e-4)


def test_entropies_are_of_the_whole_distribution_at_temperature_one() -> None:
    # -.5 log .5 - .3 log .3 - .2 log .2
    entropy = 0.5 * math.log(2) - 0.3 * math.log(0.3) - 0.2 * math.log(0.2)
    for settings in ({}, {"temperature": 0.5}, {"top_p": 0.4}, {"temperature": 0.0}):
        [[sample]] = fixed(0.5, 0.3, 0.2).sample([request(max_tokens=2, **settings)])
        assert sample.entropies == pytest.approx([entropy, entropy], abs=1e-5)


# Greedy


def test_greedy_is_what_generate_gives() -> None:
    made = sampler()
    prompts = [(5, 6, 7), (9, 4, 4, 12, 8, 3), (20,)]
    groups = made.sample([request(p, max_tokens=16, temperature=0.0) for p in prompts])
    for prompt, [sample] in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        expected = made.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert list(sample.token_ids) == expected[0, len(prompt) :].tolist()


def test_greedy_beside_sampling_rows_stays_greedy() -> None:
    made = sampler()
    [[alone]] = made.sample([request(temperature=0.0)])
    mixed = made.sample([request(num_samples=5, seed=3), request(temperature=0.0), request(top_p=0.5, seed=4)])
    assert mixed[1][0].token_ids == alone.token_ids


# Independence


def same(ours: Sample, theirs: Sample) -> bool:
    """Tell whether two samples are the same but for the last bits of their figures."""
    return (
        ours.token_ids == theirs.token_ids
        and ours.text == theirs.text
        and ours.finish_reason == theirs.finish_reason
        and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        and ours.entropies == pytest.approx(theirs.entropies, abs=1e-4)
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, 512])
def test_a_sample_does_not_depend_on_what_it_is_batched_with(batch_size: int) -> None:
    made = sampler()
    asked = request(num_samples=3, max_tokens=12, seed=11)
    [alone] = made.sample([asked])
    others = [
        request((4,), num_samples=2, max_tokens=5, seed=1),
        request(range(3, 15), num_samples=2, max_tokens=12, seed=2),
        request((8, 9), max_tokens=20, seed=3, temperature=0.7),
    ]
    crowd = made.sample([others[0], others[1], asked, others[2]], batch_size=batch_size)
    assert [len(group) for group in crowd] == [2, 2, 3, 1]
    assert all(same(a, b) for a, b in zip(alone, crowd[2], strict=True))
    assert all(same(a, b) for a, b in zip(made.sample([others[1]])[0], crowd[1], strict=True))


def test_sample_i_is_the_same_whatever_the_number_of_samples() -> None:
    made = sampler()
    [few] = made.sample([request(num_samples=2, seed=4)])
    [many] = made.sample([request(num_samples=7, seed=4)])
    assert all(same(a, b) for a, b in zip(few, many[:2], strict=True))
    assert len({s.token_ids for s in many}) > 1


def test_a_longer_limit_extends_the_same_sample() -> None:
    made = sampler()
    made._end_ids = frozenset()
    [[short]] = made.sample([request(max_tokens=4, seed=9)])
    [[long]] = made.sample([request(max_tokens=9, seed=9)])
    assert long.token_ids[:4] == short.token_ids


def test_seeds_decide() -> None:
    made = sampler()
    texts = {made.sample([request(max_tokens=12, seed=seed)])[0][0].token_ids for seed in (0, 1, 2**63, -1)}
    assert len(texts) == 4
    assert made.sample([request(seed=1)]) == made.sample([request(seed=1)])


def test_rows_that_end_early_leave_the_others_alone() -> None:
    """Ten samples with limits from 1 to 10: rows leave at every step, and the batch is compacted on the way."""
    made = sampler()
    asked = [request(num_samples=2, max_tokens=limit, seed=limit) for limit in range(1, 11)]
    together = made.sample(asked)
    for one, group in zip(asked, together, strict=True):
        [alone] = made.sample([one])
        assert all(same(a, b) for a, b in zip(alone, group, strict=True))


def test_ended_rows_leave_the_batch() -> None:
    made = fixed(1.0)
    made.sample([request(num_samples=3, max_tokens=2), request(max_tokens=5)])
    model: Any = made.model
    # Two different prompts are read, four rows are written; after two tokens only one of four is left, below 3/4.
    assert model.widths == [2, 4, 1, 1, 1]


def test_a_prompt_with_many_samples_is_read_once() -> None:
    made = fixed(1.0)
    made.sample([request(num_samples=6, max_tokens=2)])
    model: Any = made.model
    assert model.widths == [1, 6]


def test_training_mode_is_given_back() -> None:
    made = sampler()
    made.model.train()
    made.sample([request(max_tokens=1)])
    assert made.model.training


def test_new_weights_are_used_at_once() -> None:
    made = sampler()
    [[before]] = made.sample([request(max_tokens=12, seed=1)])
    with torch.no_grad():
        made.model.get_output_embeddings().weight.mul_(-1)
    [[after]] = made.sample([request(max_tokens=12, seed=1)])
    assert before.token_ids != after.token_ids


# Ends


def test_limit_ends_a_sample() -> None:
    [[sample]] = fixed(1.0).sample([request(max_tokens=3)])
    assert (sample.token_ids, sample.text, sample.finish_reason) == ((3, 3, 3), "000", FinishReason.LENGTH)


def test_end_token_ends_a_sample_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fixed(0.5, 0.5)
    made._end_ids = frozenset({4})
    monkeypatch.setattr(generation, "_uniforms", lambda request, index: np.array([0.1, 0.2, 0.9, 0.1]))
    [[sample]] = made.sample([request(max_tokens=4)])
    assert (sample.token_ids, sample.finish_reason) == ((3, 3, 4), FinishReason.STOP)
    assert len(sample.logprobs) == len(sample.entropies) == 3


def test_end_token_at_the_limit_is_a_stop() -> None:
    made = fixed(1.0)
    made._end_ids = frozenset({3})
    [[sample]] = made.sample([request(max_tokens=1)])
    assert sample.finish_reason == FinishReason.STOP


def test_special_tokens_are_no_text() -> None:
    made = fixed(1.0)
    made.model.logits.data[tiny.EOS] = 100.0  # type: ignore[union-attr]
    [[sample]] = made.sample([request(max_tokens=4)])
    assert (sample.token_ids, sample.text, sample.finish_reason) == ((tiny.EOS,), "", FinishReason.STOP)


def test_stop_text_ends_a_sample_and_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fixed(*[0.1] * 10)
    monkeypatch.setattr(generation, "_uniforms", lambda request, index: np.arange(10) / 10 + 0.05)
    settings = {"max_tokens": 10}
    [[free]] = made.sample([request(**settings)])
    assert free.text == "0123456789"
    [[stopped]] = made.sample([request(stop=("89", "45"), **settings)])
    # The end of the stop text ends the sample; the tokens are all that were drawn.
    assert (stopped.text, stopped.finish_reason) == ("0123", FinishReason.STOP)
    assert stopped.token_ids == free.token_ids[:6]


def test_the_earliest_of_several_stop_texts_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fixed(*[0.1] * 10)
    monkeypatch.setattr(generation, "_uniforms", lambda request, index: np.arange(10) / 10 + 0.05)
    [[stopped]] = made.sample([request(max_tokens=10, stop=("5", "345"))])
    assert stopped.text == "012"


def test_all_end_tokens_count() -> None:
    network = tiny.model()
    network.generation_config.eos_token_id = [7, 9]
    assert end_token_ids(network, tiny.tokenizer()) == {7, 9, tiny.EOS}
    network.generation_config.eos_token_id = None
    assert end_token_ids(network, tiny.tokenizer()) == {tiny.EOS}


# What is refused


def test_prompts_that_leave_no_room_are_refused() -> None:
    made = sampler(context=16)
    made.sample([request(range(3, 11), max_tokens=8)])
    with pytest.raises(RolloutError, match="8 tokens plus 9 new ones exceeds the model's context of 16"):
        made.sample([request(range(3, 11), max_tokens=9)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"token_ids": ()}, "at least one token"),
        ({"num_samples": 0}, "num_samples and max_tokens must be 1 or more, got 0, 8"),
        ({"max_tokens": 0}, "got 1, 0"),
        ({"temperature": -0.1}, "got -0.1 and 1.0"),
        ({"top_p": 0.0}, "got 1.0 and 0.0"),
        ({"top_p": 1.1}, "got 1.0 and 1.1"),
    ],
)
def test_requests_that_make_no_sense_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(request(), **change)


def test_a_tokenizer_without_pad_or_end_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(RolloutError, match="neither a pad nor an end token"):
        Sampler(tiny.model(), tokenizer)


def test_a_sampler_is_loaded_from_a_folder(tmp_path: Any) -> None:
    folder = tiny.save(tmp_path / "m")
    [[loaded]] = load_sampler(folder, device="cpu").sample([request(seed=6)])
    [[made]] = sampler().sample([request(seed=6)])
    assert same(loaded, made)
