"""What a run is expected to ask, by hand and against what runs really ask."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from omniopd.config import MethodConfig, RunConfig
from omniopd.dry_run import estimate
from omniopd.errors import ConfigError
from omniopd.estimate import Calls, estimate_run, estimate_step, probe_calls
from omniopd.method import build_method
from omniopd.overrides import find_config, load_config
from omniopd.spending import describe_calls, spending_notice
from omniopd.teachers.probe import ProbeResult, WayProbe
from omniopd.teachers.resolve import find_target

PRICE = {"input_usd_per_mtok": 2.0, "output_usd_per_mtok": 8.0}


def config(spec: str = "openai:m", *, steps: int = 10, **teacher: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": "none"},
            "data": {"train": "none.jsonl"},
            "steps": steps,
            "teacher": {"spec": spec, **teacher},
            "rollout": {"prompts_per_step": 4, "group_size": 2, "max_tokens": 90},
            "method": {
                "supervision": {
                    "type": "chunked",
                    "num_continuations": 3,
                    "chunker": {"type": "entropy", "chunk_tokens": 10, "max_chunks": 4},
                }
            },
        }
    )


def probe(**figures: Any) -> ProbeResult:
    way = WayProbe(transport="chat", asked=10, usable=10, **figures)
    return ProbeResult(teacher="openai:m", day=datetime.date.today().isoformat(), chosen="chat", ways=(way,))


def test_both_ends_of_a_step_by_hand() -> None:
    run = config()
    step = estimate_step(run, build_method(run.method), prompt_tokens=100, paid_per_sample=False)
    assert step is not None
    low, high = step
    # 8 rollouts of 90 tokens hold 4 chunks of 10; late chunks start on average at 3 * 10 / 2 + 90 - 40 = 65.
    # 32 audits, 96 continuations of 10 tokens, 32 * (100 + 65) tokens read.
    assert high == Calls(requests=32, continuations=96, output_tokens=960, input_tokens=5280)
    # Rollouts of 30 tokens hold 3 chunks, which start on average at 2 * 10 / 2 = 10; continuations of 5 tokens.
    assert low == Calls(requests=24, continuations=72, output_tokens=360, input_tokens=2640)


def test_without_n_every_sample_pays_for_its_prompt() -> None:
    run = config()
    method = build_method(run.method)
    shared = estimate_step(run, method, prompt_tokens=100, paid_per_sample=False)
    alone = estimate_step(run, method, prompt_tokens=100, paid_per_sample=True, thinking_tokens=7)
    assert shared is not None and alone is not None
    assert alone[1].requests == 3 * shared[1].requests
    assert alone[1].input_tokens == 3 * shared[1].input_tokens
    assert alone[1].output_tokens == 96 * (10 + 7)


def test_a_run_is_priced_at_both_ends_and_timed_by_the_probe() -> None:
    run = config(price=PRICE, max_concurrency=16)
    expected = estimate_run(
        run,
        build_method(run.method),
        find_target("openai:m", price=PRICE),
        prompt_tokens=100,
        transport="chat",
        probe=probe(seconds=2.0, honors_n=True, thinking_tokens=0.0),
    )
    assert expected is not None and expected.usd is not None and expected.seconds is not None
    # (26,400 * 2 + 3,600 * 8) / 1e6 and (52,800 * 2 + 9,600 * 8) / 1e6
    assert expected.usd == pytest.approx((0.0816, 0.1824))
    # 240 requests, 16 at a time, are 15 rounds of 2 s; 320 are 20.
    assert expected.seconds == pytest.approx((30.0, 40.0))
    assert expected.price_source == "your settings"


def test_rates_bound_the_time() -> None:
    run = config(requests_per_minute=60)
    method, target = build_method(run.method), find_target("openai:m")
    expected = estimate_run(run, method, target, prompt_tokens=100, transport="chat")
    assert expected is not None
    assert (expected.usd, expected.seconds) == (None, (240.0, 320.0))
    unknown = estimate_run(config(), method, target, prompt_tokens=100, transport="chat")
    assert unknown is not None and unknown.seconds is None
    assert "teachers check openai:m" in unknown.seconds_source


def test_a_teacher_that_ignores_n_is_paid_for_each_sample() -> None:
    run = config(price=PRICE)
    method, target = build_method(run.method), find_target("openai:m", price=PRICE)
    ignored = estimate_run(run, method, target, prompt_tokens=100, transport="chat", probe=probe(honors_n=False))
    assert ignored is not None
    assert ignored.high.requests == 960


def test_the_words_name_what_is_unknown_and_what_may_stop_the_run() -> None:
    run = config()
    told = describe_calls(run, build_method(run.method), prompt_tokens=100, transport="chat", is_assumed=True)
    assert "price of openai:m is unknown" in told and "(assumed: the data is not at hand)" in told
    limited = config(price=PRICE, budget_usd=0.1, budget_tokens=1000, budget_calls=9)
    told = describe_calls(limited, build_method(limited.method), prompt_tokens=100, transport="chat", is_assumed=False)
    for name in ("budget_usd 0.1", "budget_tokens 1,000", "budget_calls 9"):
        assert f"teacher.{name} may stop the run" in told
    assert "Price: your settings." in told


def test_a_server_that_scores_is_asked_once_for_each_rollout() -> None:
    run = config("vllm:big@http://localhost:8000/v1").model_copy(
        update={"method": MethodConfig(supervision={"type": "logprob"})}
    )
    told = describe_calls(run, build_method(run.method), prompt_tokens=100, transport="", is_assumed=False)
    figures = {row.split("  ")[0]: row.split()[-2:] for row in told.splitlines()[1:3]}
    # 4 prompts x 2 rollouts, each with 100 + 90 tokens, 10 steps.
    assert figures == {"scoring requests": ["8", "80"], "tokens read": ["1,520", "15,200"]}
    weights = run.model_copy(update={"teacher": config("hf:big").teacher})
    told = describe_calls(weights, build_method(run.method), prompt_tokens=0, transport="", is_assumed=False)
    assert told == "none: this method asks for no text"


def test_shares_by_weight_are_told() -> None:
    told = estimate(load_config(["opd-several-teachers"]))
    assert "weights (hf:mini-math:teacher), 75% of the prompts by weight; if every prompt went to it:" in told
    assert "text (local:teacher), 25% of the prompts by weight; if every prompt went to it:" in told


def test_the_notice_before_a_run() -> None:
    notice = spending_notice(config(budget_calls=9))
    assert notice is not None and "price is unknown, so budget 9 calls" in notice
    notice = spending_notice(config(price=PRICE))
    assert notice is not None and "no budget limits it" in notice
    assert spending_notice(config("echo:demo")) is None
    assert spending_notice(config("local:x")) is None


def test_a_budget_in_usd_needs_a_price() -> None:
    with pytest.raises(ConfigError, match=r"set teacher.price"):
        spending_notice(config(budget_usd=1.0))


def test_nothing_fits(tmp_path: Path) -> None:
    run = config()
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"max_tokens": 9})})
    with pytest.raises(ConfigError, match="nothing could be audited"):
        estimate_step(run, build_method(run.method), prompt_tokens=1, paid_per_sample=False)


def test_the_prefix_probe_is_part_of_the_estimate() -> None:
    quickstart = find_config("quickstart")
    probe = "diagnostics.prefix_probe={every: 10, fractions: [0.0, 0.5], num_continuations: 3}"
    probed = load_config([quickstart], ["steps=20", probe])
    low, high = probe_calls(probed, prompt_tokens=10, paid_per_sample=False, thinking_tokens=2)
    # Steps 1, 10 and 20; 16 of the 64 rollouts at 2 prefixes, 3 answers each of up to 40 tokens after 40.
    assert (high.requests, high.continuations) == (3 * 16 * 2, 3 * 16 * 2 * 3)
    assert high.output_tokens == 288 * (40 + 2)
    assert high.input_tokens == 96 * (10 + 40)
    assert low.output_tokens == 288 * (20 + 2)
    off = load_config([quickstart])
    assert probe_calls(off, prompt_tokens=10, paid_per_sample=False, thinking_tokens=2)[1].requests == 0
