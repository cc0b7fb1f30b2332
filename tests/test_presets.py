"""The published numbers, and the refusal to call something else the paper's method."""

from __future__ import annotations

import pytest

from omniopd.errors import ConfigError
from omniopd.overrides import load_config
from omniopd.presets import PRESETS

MINIMAL = ["student.model=a", "data.train=b"]


def test_paper_preset_holds_the_published_numbers() -> None:
    config = load_config(overrides=[*MINIMAL, "preset=paper"])
    supervision = config.method.supervision
    # arXiv 2606.01476: M 10, N 10, C 50, alpha 1.0, beta 0.1, lr 1e-6, 50 steps, 20k tokens, evaluated with 32k.
    assert supervision["chunker"] == {"type": "entropy", "chunk_tokens": 50, "max_chunks": 10}
    assert supervision["num_continuations"] == 10
    assert supervision["credit"] == {"type": "smoothed", "alpha": 1.0}
    assert supervision["anchor_beta"] == 0.1
    assert supervision["similarity"] == "edit"
    assert (config.learner.learning_rate, config.learner.schedule, config.learner.micro_batch_size) == (
        1e-6,
        "constant",
        2,
    )
    assert config.learner.aggregation == "sequence_mean_token_sum"
    assert (config.steps, config.rollout.temperature, config.rollout.max_tokens) == (50, 1.0, 20_000)
    assert (config.eval.k, config.eval.temperature, config.eval.max_tokens) == (16, 1.0, 32_768)


def test_every_key_of_a_preset_can_be_overridden() -> None:
    words = [*MINIMAL, "preset=paper", "method.supervision.chunker.max_chunks=5", "steps=7"]
    config = load_config(overrides=words)
    assert config.method.supervision["chunker"] == {"type": "entropy", "chunk_tokens": 50, "max_chunks": 5}
    assert config.steps == 7
    assert config.learner.learning_rate == PRESETS["paper"]["learner"]["learning_rate"]


def test_without_the_preset_nothing_of_it_applies() -> None:
    config = load_config(overrides=MINIMAL)
    assert "num_continuations" not in config.method.supervision
    assert config.rollout.max_tokens == 1024


@pytest.mark.parametrize("zero", ["0", "0.0"])
def test_no_anchor_is_refused_under_the_preset(zero: str) -> None:
    words = [*MINIMAL, "preset=paper", f"method.supervision.anchor_beta={zero}"]
    with pytest.raises(ConfigError, match=r"anchor_beta is 0 under preset: paper.*8\.28.*allow_zero_anchor=true"):
        load_config(overrides=words)
    assert load_config(overrides=[*words, "method.supervision.allow_zero_anchor=true"]).preset == "paper"
    # Nothing but a plain yes will do.
    with pytest.raises(ConfigError, match="anchor_beta"):
        load_config(overrides=[*words, "method.supervision.allow_zero_anchor=false"])


def test_the_refusal_concerns_the_preset_and_its_supervision_only() -> None:
    assert load_config(overrides=[*MINIMAL, "method.supervision.anchor_beta=0"]).preset is None
    words = [*MINIMAL, "preset=paper", "method.supervision={type: logprob}", "teacher.spec=hf:big"]
    other = load_config(overrides=words)
    assert other.method.supervision == {"type": "logprob"}
