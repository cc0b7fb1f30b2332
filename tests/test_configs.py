"""Every run file that comes with omniopd is valid, explained, and passes a dry run without a network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from omniopd.config import RunConfig
from omniopd.dry_run import dry_run
from omniopd.errors import ConfigError, DataError
from omniopd.estimate import estimate_step
from omniopd.logits.score_folder import Manifest
from omniopd.method import build_method
from omniopd.overrides import list_configs, load_config
from omniopd.spending import spending_notice
from omniopd.teachers.cards import card_names

CONFIGS = list_configs()


SMALL = (
    "rollout={prompts_per_step: 2, group_size: 3, max_tokens: 40}",
    "method.supervision.num_continuations=5",
    "method.supervision.chunker={type: entropy, chunk_tokens: 8, max_chunks: 3}",
)
"""Numbers to reckon with, whatever the quickstart's own are."""


def quickstart(*words: str) -> RunConfig:
    return load_config(["quickstart"], words)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_file_is_valid_and_says_for_whom(name: str) -> None:
    config = load_config([name])
    assert config.name == name
    first = CONFIGS[name].read_text().partition("\n")[0]
    assert first.startswith("# For ")
    assert f"omniopd train {name}" in CONFIGS[name].read_text()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_dry_run_needs_no_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    text = dry_run(load_config([name]))
    for part in (
        "== Settings ==",
        "== Objective ==",
        "== Prompts ==",
        "== Teacher calls, at most ==",
    ):
        assert part in text
    assert ("The teacher reads" in text) == build_method(load_config([name]).method).needs_text_teacher


def test_the_expected_files_are_there() -> None:
    assert set(CONFIGS) >= {"quickstart", "openai-gpt-4o", "paper-qwen3-4b", "local-open-weight-teacher"}
    baselines = {"sft-teacher-samples", "gkd", "opd-reverse-kl", "opd-sampled-token", "opd-top-k", "grpo-verifier"}
    assert set(CONFIGS) >= baselines | {"opd-verifier", "minillm"}


def test_paper_file_keeps_the_published_settings() -> None:
    config = load_config(["paper-qwen3-4b"])
    method = build_method(config.method)
    assert config.preset == "paper"
    assert (config.steps, config.learner.learning_rate) == (50, 1e-6)
    assert "SmoothedTarget(alpha=1.0)" in dry_run(config)
    # M 10 chunks of C 50 tokens, N 10: per rollout 10 requests, 100 continuations, 5,000 teacher tokens.
    step = estimate_step(config, method, prompt_tokens=200, paid_per_sample=False)
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    assert step is not None
    _, calls = step
    assert (calls.requests, calls.continuations, calls.output_tokens) == (
        rollouts * 10,
        rollouts * 100,
        rollouts * 5_000,
    )


def test_estimate_by_hand() -> None:
    config = quickstart(*SMALL)
    method = build_method(config.method)
    step = estimate_step(config, method, prompt_tokens=10, paid_per_sample=False)
    assert step is not None
    low, high = step
    # 2 x 3 rollouts x 3 chunks = 18 requests, x 5 = 90 continuations, x 8 tokens = 720.
    assert (high.requests, high.continuations, high.output_tokens) == (18, 90, 720)
    # Latest starts 16, 24, 32: mean 24, so 18 x (10 + 24).
    assert high.input_tokens == 612
    # A third of 40 tokens is 14, which holds one chunk at 0: 6 x 10 tokens read, 30 continuations of 4.
    assert (low.requests, low.input_tokens, low.output_tokens) == (6, 60, 120)


def test_no_more_chunks_than_fit() -> None:
    config = quickstart(*SMALL, "rollout.max_tokens=20")
    step = estimate_step(config, build_method(config.method), prompt_tokens=10, paid_per_sample=False)
    assert step is not None
    # 20 tokens hold two chunks of 8: starts 4, 12 at the latest (mean 8).
    assert (step[1].requests, step[1].input_tokens) == (2 * 3 * 2, 12 * 18)


def test_a_chunk_longer_than_a_rollout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing could be audited.*chunk_tokens is 8, but rollout\.max_tokens is 7"):
        dry_run(quickstart(*SMALL, "rollout.max_tokens=7"))


def test_prompts_are_shown_as_both_models_read_them(student_folder: Path) -> None:
    text = dry_run(quickstart())
    assert "The student reads (10 tokens):\n  | Q:" in text
    assert "The teacher reads (one text):\n  | Q:" in text
    assert "?[what the student wrote before the chunk]" in text
    chat = dry_run(quickstart("teacher.continuation=chat", "data.prompt_template='Think. {prompt}'"))
    assert "| Q:Think." in chat
    assert "<partial>[what the student wrote before the chunk]</partial>" in chat
    prefill = dry_run(quickstart("teacher.continuation=prefill"))
    assert "[assistant] [what the student wrote before the chunk]" in prefill
    echo = dry_run(quickstart("teacher={spec: 'echo:demo', serve: null}"))
    assert "[assistant] [what the student wrote before the chunk]" in echo


def test_a_dry_run_looks_at_what_an_open_weight_teacher_can_tell(tmp_path: Path) -> None:
    def shown(*words: str) -> str:
        return dry_run(load_config(["opd-precomputed"], [*words]))

    folder = tmp_path / "kept"
    with pytest.raises(ConfigError, match=r"there is no folder .*kept"):
        shown(f"teacher.spec=scores:{folder}")
    manifest = Manifest(kind="scores", teacher="t", vocabulary=34, top_k=3)
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    with pytest.raises(ConfigError, match=r"reads 4 tokens .* names 3; write another folder with --top-k 4, or"):
        shown(f"teacher.spec=scores:{folder}")
    assert "Objective" in shown(f"teacher.spec=scores:{folder}", "learner.losses.kl.k=3")
    server = "teacher={spec: 'vllm:m@http://127.0.0.1:9/v1', tokenizer: 'mini-math:teacher'}"
    with pytest.raises(ConfigError, match=r"reads 21 tokens .* names 20; start the server with --max-logprobs 21"):
        shown(server, "learner.losses.kl.k=21")
    assert "scoring requests" in shown(server, "learner.losses.kl.k=20")


@pytest.mark.parametrize("card", [name for name in card_names() if name not in ("replay", "hf")])
def test_a_dry_run_shows_what_every_kind_of_teacher_reads(card: str) -> None:
    address = "@https://resource.test/openai/v1" if card == "azure" else ""
    text = dry_run(quickstart(f"teacher={{spec: '{card}:some-model{address}', serve: null}}"))
    assert "[what the student wrote before the chunk]" in text


@pytest.fixture
def dear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ten small steps with a teacher whose card has a price."""
    (tmp_path / "teachers").mkdir()
    card = "id: dear\ndialect: openai\nbase_url: https://dear.test/v1\napi_key_env: DEAR_API_KEY\n"
    card += "can: {continuations: [chat, prefill], n: true}\nprice:\n  as_of: 2026-11-22\n"
    card += "  models: {big: {input_usd_per_mtok: 10.0, output_usd_per_mtok: 20.0}}\n"
    (tmp_path / "teachers" / "dear.yaml").write_text(card)
    monkeypatch.chdir(tmp_path)
    return ["teacher={spec: 'dear:big', serve: null, continuation: prefill}", "steps=10", *SMALL]


def test_cost_is_shown_when_the_card_has_a_price(dear: list[str]) -> None:
    text = dry_run(quickstart(*dear))
    # As in the estimate by hand, ten steps: 7,200 tokens out at $20 and 6,120 in at $10 the million are 0.144 + 0.0612;
    # at the lower end 1,200 out and 600 in are 0.024 + 0.006.
    assert "$0.0300 to $0.2052" in text
    assert "may stop the run" not in text
    assert "may stop the run before its last step" in dry_run(quickstart(*dear, "teacher.budget_usd=0.2"))
    # A proxy at another address has other prices.
    with pytest.raises(ConfigError, match=r"budget_usd is 1\.0, but the price of"):
        dry_run(quickstart(*dear, "teacher.spec='dear:big@https://proxy.test/v1'", "teacher.budget_usd=1.0"))


def test_a_run_says_what_it_may_buy_before_it_begins(dear: list[str]) -> None:
    # 10 steps x 6 rollouts x 3 chunks = 180 requests, x 5 continuations x 8 tokens = 7,200 tokens at $20 the million.
    bought = "dear:big writes at most 7,200 tokens in 180 requests, up to $0.1440 besides what it reads"
    assert spending_notice(quickstart(*dear)) == f"{bought}; no budget limits it"
    assert spending_notice(quickstart(*dear, "teacher.budget_usd=0.1")) == f"{bought}; budget 0.1 USD"
    unknown = spending_notice(quickstart(*dear, "teacher.spec=openai:gpt-4o"))
    assert unknown is not None and "its price is unknown, so no budget limits it" in unknown
    # Nothing to say where nothing is billed.
    assert spending_notice(quickstart()) is None
    assert spending_notice(quickstart("method={supervision: {type: verifier}, transforms: []}")) is None


def test_methods_without_a_text_teacher_ask_for_nothing() -> None:
    text = dry_run(quickstart("method={supervision: {type: verifier}, transforms: []}", "teacher.serve=null"))
    assert "none: this method asks for no text" in text
    assert "The teacher reads" not in text
    with pytest.raises(ConfigError, match=r"'local:teacher' only gives text; use teacher\.spec=hf:MODEL"):
        dry_run(quickstart("method={supervision: {type: logprob}, transforms: []}"))


def test_whole_answers_of_the_teacher_are_counted() -> None:
    config = quickstart(SMALL[0], "method={supervision: {type: imitation}, transforms: []}")
    step = estimate_step(config, build_method(config.method), prompt_tokens=10, paid_per_sample=False)
    assert step is not None
    # 2 prompts of 10 tokens, 3 answers each, 40 tokens at most.
    _, calls = step
    assert (calls.requests, calls.continuations, calls.output_tokens, calls.input_tokens) == (2, 6, 240, 20)
    assert "The teacher reads (messages)" in dry_run(config)


def test_own_data_is_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"1+{i}"}) + "\n" for i in range(3)))
    text = dry_run(quickstart(f"data.train={file}", "data.eval=null"))
    assert f"{file}: 3 prompts without answers" in text
    assert "off: data.eval is not set" in text
    with pytest.raises(ConfigError, match="has no answers"):
        dry_run(quickstart(f"data.train={file}", f"data.eval={file}"))
    file.write_text('{"promt": "1+1"}\n')
    with pytest.raises(DataError, match="did you mean 'prompt'"):
        dry_run(quickstart(f"data.train={file}"))
    with pytest.raises(ConfigError, match="floor"):
        dry_run(quickstart("data.sampler={type: frontier, floor: 2}"))


def test_a_folder_that_exists_is_mentioned(tmp_path: Path) -> None:
    words = [f"output={tmp_path}", "name=old"]
    assert "--resume" not in dry_run(quickstart(*words))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "resolved.yaml").write_text("name: old\n")
    assert "--resume" not in dry_run(quickstart(*words))  # It stopped before its first result.
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    assert "needs --resume, --overwrite or another --run-name" in dry_run(quickstart(*words))


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry_run(quickstart())
    assert list(tmp_path.iterdir()) == []
