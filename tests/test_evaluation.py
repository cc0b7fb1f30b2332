from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omniopd.bootstrap import Interval, mean_interval, paired_bootstrap
from omniopd.errors import ConfigError, DataError
from omniopd.evaluation import EvalResult, compare, evaluate, read_result, run_eval_command
from omniopd.types import FinishReason, Message, Prompt

pytest.importorskip("torch", reason="torch is not installed")

from omniopd.generation import Sample, SampleRequest


def make_result(correct: Sequence[Sequence[int]], **changes: Any) -> EvalResult:
    k = len(correct[0])
    fields: dict[str, Any] = {
        "prompt_ids": tuple(f"p{i}" for i in range(len(correct))),
        "k": k,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 8,
        "seed": 0,
        "correct": tuple(tuple(bool(c) for c in row) for row in correct),
        "lengths": tuple(tuple(range(1, k + 1)) for _ in correct),
        "truncated": tuple((True, *([False] * (k - 1))) for _ in correct),
    }
    return EvalResult(**(fields | changes))


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"p{i}", messages=(Message(role="user", content=str(i)),), text=str(i), token_ids=(i + 1,), answer=str(i)
        )
        for i in range(count)
    ]


class ScriptedSampler:
    """Writes what `script` says for (prompt token, sample index, greedy?); keeps the requests."""

    def __init__(self, script: Callable[[int, int, bool], str]) -> None:
        self.script = script
        self.calls: list[list[SampleRequest]] = []

    def sample(self, requests: Sequence[SampleRequest], *, batch_size: int = 512) -> list[list[Sample]]:
        self.calls.append(list(requests))
        return [
            [self._write(self.script(r.token_ids[0], i, r.temperature == 0), r) for i in range(r.num_samples)]
            for r in requests
        ]

    def _write(self, text: str, request: SampleRequest) -> Sample:
        n = min(len(text), request.max_tokens)
        return Sample(
            token_ids=(9,) * n,
            logprobs=(0.0,) * n,
            entropies=(0.0,) * n,
            text=text[:n],
            finish_reason=FinishReason.LENGTH if len(text) > request.max_tokens else FinishReason.STOP,
        )


def ends_in_answer(response: str, answer: str) -> bool:
    return response.endswith(f"#{answer}")


def test_figures_of_a_result_by_hand() -> None:
    result = make_result([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], greedy_correct=(True, False, False))
    assert result.avg_at_k == pytest.approx(3 / 12)
    assert result.greedy == pytest.approx(1 / 3)
    # pass@2 of c = 2, 0, 1 in n = 4: 1 - C(2,2)/C(4,2) = 5/6; 1 - 6/6 = 0; 1 - C(3,2)/6 = 1/2. Mean (5/6 + 1/2) / 3.
    assert result.pass_at_k(2) == pytest.approx((5 / 6 + 1 / 2) / 3)
    assert result.pass_at_k(1) == pytest.approx(result.avg_at_k)
    assert result.pass_at_k() == pytest.approx(2 / 3)
    # Lengths 1, 2, 3, 4 three times; a quarter is cut off.
    assert result.length_mean == 2.5
    assert result.length_quantiles((0.0, 0.5, 1.0)) == (1.0, 2.5, 4.0)
    assert result.truncated_share == 0.25
    assert make_result([[1]]).greedy is None
    with pytest.raises(ConfigError, match="pass@5 needs 1 to 4 samples"):
        result.pass_at_k(5)


def test_summary_has_the_keys_of_the_records() -> None:
    assert make_result([[1, 0], [1, 1]], seconds=2.0).summary() == {
        "k": 2,
        "temperature": 1.0,
        "avg_at_k": 0.75,
        "pass_at_k": 1.0,
        "greedy": None,
        "length_mean": 1.5,
        "truncated": 0.5,
        "num_problems": 2,
        "seconds": 2.0,
    }


def test_result_survives_json() -> None:
    result = make_result([[1, 0], [1, 1]], greedy_correct=(True, False))
    assert EvalResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_result_refuses_tables_of_the_wrong_shape() -> None:
    with pytest.raises(DataError, match=r"EvalResult\.lengths is not a table of 2 problems by 2 samples"):
        make_result([[1, 0], [1, 1]], lengths=((1, 2), (1,)))
    with pytest.raises(DataError, match="greedy_correct has 1 entries, expected 2"):
        make_result([[1, 0], [1, 1]], greedy_correct=(True,))
    with pytest.raises(DataError, match="needs problems and samples"):
        make_result([[1]], k=0)


def test_evaluate_judges_every_sample_and_the_greedy_answer() -> None:
    def script(token: int, index: int, greedy: bool) -> str:
        number = token - 1
        if greedy:
            return f"#{number}" if number == 0 else "#no"
        # Prompt i gets samples 0..i-1 right; sample 2 runs out of room before its answer.
        return "too long" if index == 2 else (f"#{number}" if index < number else "#")

    sampler = ScriptedSampler(script)
    seen: list[tuple[int, int]] = []
    result = evaluate(
        make_prompts(3),
        sampler,  # type: ignore[arg-type]
        ends_in_answer,
        k=3,
        temperature=0.7,
        top_p=0.9,
        max_tokens=4,
        seed=5,
        batch_size=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.correct == ((False, False, False), (True, False, False), (True, True, False))
    assert result.lengths == ((1, 1, 4), (2, 1, 4), (2, 2, 4))
    assert result.truncated == ((False, False, True),) * 3
    assert result.greedy_correct == (True, False, False)
    # 3 prompts x (3 samples + 1 greedy) = 12 answers; 4 batches of 1 hold one prompt of 3 samples, or 4 greedy answers.
    assert seen == [(3, 12), (6, 12), (9, 12), (12, 12)]
    sampled = [request for call in sampler.calls[:3] for request in call]
    assert {(r.temperature, r.top_p, r.max_tokens, r.num_samples) for r in sampled} == {(0.7, 0.9, 4, 3)}
    assert {(r.temperature, r.num_samples) for r in sampler.calls[3]} == {(0.0, 1)}


def seeds_of(prompts: list[Prompt], *, seed: int, batch_size: int) -> dict[int, int]:
    sampler = ScriptedSampler(lambda *_: "#")
    evaluate(
        prompts,
        sampler,  # type: ignore[arg-type]
        ends_in_answer,
        k=2,
        temperature=1.0,
        max_tokens=4,
        seed=seed,
        batch_size=batch_size,
        greedy=False,
    )
    return {r.token_ids[0]: r.seed for call in sampler.calls for r in call}


def test_the_random_stream_of_a_prompt_depends_on_seed_and_prompt_alone() -> None:
    seeds = seeds_of(make_prompts(9), seed=1, batch_size=1)
    assert len(set(seeds.values())) == 9
    assert seeds_of(make_prompts(9)[::-1], seed=1, batch_size=64) == seeds
    assert not set(seeds_of(make_prompts(9), seed=2, batch_size=1).values()) & set(seeds.values())


def test_evaluate_refuses_what_it_cannot_measure() -> None:
    sampler = ScriptedSampler(lambda *_: "#")
    settings: dict[str, Any] = {"k": 2, "temperature": 1.0, "max_tokens": 4, "seed": 0, "batch_size": 4}
    unanswered = Prompt(id="open", messages=(), text="?", token_ids=(1,))
    with pytest.raises(DataError, match=r"got 2; 1 have none, e\.g\. open"):
        evaluate([*make_prompts(1), unanswered], sampler, ends_in_answer, **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="got 0"):
        evaluate([], sampler, ends_in_answer, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature > 0"):
        evaluate(make_prompts(1), sampler, ends_in_answer, **(settings | {"temperature": 0}))  # type: ignore[arg-type]


def test_compare_gives_gain_interval_and_greedy() -> None:
    before = make_result([[0, 0], [1, 0], [1, 1], [0, 0]], greedy_correct=(False, True, True, False))
    after = make_result([[1, 0], [1, 1], [1, 1], [0, 0]], greedy_correct=(True, True, True, False))
    comparison = compare(before, after)
    # 3/8 before, 5/8 after; by problem +1/2, +1/2, 0, 0.
    assert (comparison.before, comparison.after, comparison.gain.estimate) == (0.375, 0.625, 0.25)
    assert comparison.gain.low == 0.0
    assert comparison.gain.high == 0.5
    assert comparison.summary() == {
        "avg_at_k": {"k": 2, "before": 0.375, "after": 0.625, "gain": 0.25, "ci95": [0.0, 0.5]},
        "greedy": {"before": 0.5, "after": 0.75},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "differ in temperature: 1.0 before, 0.5 after"),
        ({"max_tokens": 9}, "differ in max_tokens: 8 before, 9 after"),
        ({"prompt_ids": ("p1", "p2")}, "differ in problems: 2 before, 2 after, 1 shared"),
    ],
)
def test_compare_refuses_different_measurements(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(make_result([[1, 0], [1, 1]]), make_result([[1, 0], [1, 1]], **changes))


def test_bootstrap_agrees_with_normal_theory() -> None:
    rng = np.random.default_rng(7)
    before = rng.normal(0.4, 0.2, 400)
    difference = rng.normal(0.05, 0.1, 400)
    interval = paired_bootstrap(before, before + difference, seed=3)
    # Paired, only the spread of the differences counts: mean +- 1.96 s / sqrt(n), about 0.0098 to each side.
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(400)
    assert interval.estimate == pytest.approx(difference.mean())
    # With 10,000 resamples the Monte-Carlo error of a 2.5% quantile is about 2.7% of the standard error.
    assert interval.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(difference.mean() + half, abs=0.1 * half)
    unpaired = math.hypot(before.std(ddof=1), (before + difference).std(ddof=1)) * 1.96 / math.sqrt(400)
    assert interval.high - interval.low < unpaired


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(300):
        interval = mean_interval(rng.binomial(8, 0.3, 60) / 8, num_resamples=400, confidence=0.9, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    # 270 expected; the standard deviation of the count is sqrt(300 * 0.9 * 0.1) = 5.2. Percentile intervals run short.
    assert 250 <= hits <= 287


def test_bootstrap_is_seeded_and_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0, 1, 50)
    interval = mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) == interval
    assert mean_interval(values, seed=2) != interval
    monkeypatch.setattr("omniopd.bootstrap._INDICES_AT_ONCE", 50 * 333)
    assert mean_interval(values, seed=1) == interval
    assert mean_interval([0.5, 0.5, 0.5]) == Interval(low=0.5, high=0.5, estimate=0.5)


def test_bootstrap_refuses_what_has_no_interval() -> None:
    with pytest.raises(DataError, match=r"got \(2,\) before and \(3,\) after"):
        paired_bootstrap([0, 1], [0, 1, 1])
    with pytest.raises(DataError, match="2 or more problems"):
        mean_interval([0.5])
    with pytest.raises(DataError, match="1 of 3 values are not finite"):
        mean_interval([0.5, math.nan, 1.0])
    with pytest.raises(ConfigError, match="confidence"):
        mean_interval([0.5, 1.0], confidence=95)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model with random weights and the mini-math tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from omniopd.worlds.mini_math.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_eval_command_writes_a_result_that_a_later_one_compares_with(tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"k": 2, "temperature": 1.0, "max_tokens": 5, "num_problems": 4, "device": "cpu"}
    output = tmp_path / "results" / "first.json"
    first = run_eval_command(str(tiny_model), "mini-math:held-out", output=output, **settings)
    assert json.loads(output.read_text()) == first
    assert (first["num_problems"], first["too_long"], first["k"]) == (4, 0, 2)
    assert first["greedy"] is not None
    assert set(first["length_quantiles"]) == {"0.1", "0.5", "0.9"}
    assert read_result(output).max_tokens == 5
    for other in (output, tiny_model):
        second = run_eval_command(str(tiny_model), "mini-math:held-out", compare_with=other, **settings)
        assert second["result"]["correct"] == first["result"]["correct"]
        assert second["result"]["lengths"] == first["result"]["lengths"]
        assert second["comparison"]["with"] == str(other)
        assert second["comparison"]["avg_at_k"]["gain"] == 0.0
        assert second["comparison"]["avg_at_k"]["ci95"] == [0.0, 0.0]
    with pytest.raises(DataError, match="differ in max_tokens: 5 before, 6 after"):
        run_eval_command("no/such/model", "mini-math:held-out", compare_with=output, **(settings | {"max_tokens": 6}))
    plain = run_eval_command(str(tiny_model), "mini-math:held-out", greedy=False, **settings)
    assert plain["greedy"] is None
    assert "comparison" not in plain


def test_eval_command_errors_come_before_the_model(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"k": 1, "temperature": 1.0, "max_tokens": 5, "num_problems": 4}
    questions = tmp_path / "q.txt"
    questions.write_text("Why?\n")
    with pytest.raises(ConfigError, match="nothing judges the answers"):
        run_eval_command("no/such/model", str(questions), **settings)
    broken = tmp_path / "old.json"
    for text, message in [("{", "cannot read the evaluation"), ("{}", "holds no evaluation"), ("[]", "holds no")]:
        broken.write_text(text)
        with pytest.raises(DataError, match=message):
            run_eval_command("no/such/model", "mini-math:held-out", compare_with=broken, **settings)
    result = make_result([[1, 0]])
    broken.write_text(json.dumps(result.to_json()))
    assert read_result(broken) == result
    broken.write_text('{"result": {"k": 1, "correct": []}}')
    with pytest.raises(DataError, match="holds an incomplete evaluation"):
        read_result(broken)
