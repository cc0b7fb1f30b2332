"""The run file: YAML and dotted overrides become one validated `RunConfig`. Loads neither torch nor openai.

Precedence: class defaults < preset < files from left to right < `key.path=value`. Unknown keys fail with the nearest
valid one. Signal parts are named here and validated against their own dataclasses, so there is one definition of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the run file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights (peft)."""

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class StudentConfig(Section):
    """The model that learns."""

    model: str
    """A local folder, a Hugging Face name, or `mini-math:student`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """`auto`: bfloat16 where the device computes it fast, else float32."""
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own template."""


class WeightsConfig(Section):
    """How an open-weight teacher is loaded here (`hf:`)."""

    device: str | None = None
    """None: the student's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] | None = None
    """None: the student's."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where its layers wait for their turn. Slower, for a teacher that does not fit beside the student."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """By bitsandbytes; the output layer stays as it is."""


class ScoringConfig(Section):
    """What a vLLM server is asked for where distributions are compared (`vllm:`)."""

    max_logprobs: int = Field(default=20, ge=-1)
    """What the server allows, its `--max-logprobs`; -1: the whole vocabulary."""
    requested_by: Literal["search", "ids"] = "search"
    """How log-probs of the student's tokens are got: found among the likeliest, or `ids` handed over, which needs
    `--enable-scale-out` and vLLM's V2 model runner."""
    tolerance: float = Field(default=0.2, gt=0)
    """Nats by which one token's log-prob may differ alone and in a batch; float32 servers stay below 1e-4, bfloat16
    ones below 0.1."""


class TeacherConfig(Section):
    """The model that is asked. Text in, text out, unless the method compares distributions."""

    spec: str = "openai:gpt-4o"
    """`provider:model[@base_url]`; where distributions are compared `hf:MODEL`, `vllm:MODEL@URL`, `scores:FOLDER` or
    `states:FOLDER`."""
    serve: str | None = None
    """Start `omniopd serve` on this model folder for the length of the run and ask that."""
    continuation: Literal["auto", "tokens", "completions", "prefill", "chat", "chat-turn", "structured"] = "auto"
    """How the student's prefix is handed over; `auto` takes the first way on the card that the probe finds good."""
    probe: bool = True
    """Ask a few fixed questions first, once a day for each teacher, and write what came of it into the run."""
    tokenizer: str | None = None
    """The teacher's tokenizer (a folder or a name): its chat template writes raw prompts for `completions`, and where
    it is the student's own, token ids can be handed over."""
    temperature: float | None = Field(default=1.0, ge=0)
    """None leaves it to the server."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_concurrency: int = Field(default=16, ge=1)
    """Requests under way at most; fewer while the server asks to slow down."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """The stricter of this and the card's holds."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=60.0, gt=0)
    """For one attempt."""
    deadline_s: float = Field(default=300.0, gt=0)
    """For one request with all its attempts and waits; then its samples are missing."""
    max_attempts: int = Field(default=5, ge=1)
    budget_usd: float | None = Field(default=None, gt=0)
    """Stop before this is exceeded. Needs a known price."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Of input and output."""
    budget_calls: int | None = Field(default=None, ge=1)
    """HTTP requests."""
    price: dict[str, float] | None = None
    """Instead of the card's: `{input_usd_per_mtok: ..., output_usd_per_mtok: ...}`."""
    max_missing_fraction: float = Field(default=0.5, ge=0, le=1)
    """Stop the run when a larger share of the continuations of a step is unusable."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Sent with every request, for server-specific fields."""
    chat_format: Literal["student", "teacher"] = "student"
    """Whose chat format an open-weight teacher reads the question in, where its distributions are compared."""
    weights: WeightsConfig = WeightsConfig()
    scoring: ScoringConfig = ScoringConfig()


class DataConfig(Section):
    """Where prompts come from."""

    train: str
    """A .jsonl, .json or .parquet file, `gsm8k:FILE`, `hf:NAME[/CONFIG]`, or `mini-math`."""
    eval: str | None = None
    """Held-out problems with answers; None switches evaluation off."""
    split: str = "train"
    """For `hf:` data."""
    eval_split: str = "test"
    max_prompts: int | None = Field(default=None, ge=1)
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer prompts are left out and counted."""
    prompt_template: str | None = None
    """Text with `{prompt}`, put around every prompt."""
    system_prompt: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    verifier: Literal["auto", "math", "mini-math", "exact", "none"] = "auto"
    sampler: dict[str, Any] = Field(default_factory=lambda: {"type": "shuffled"})
    """The prompt sampler, a part of `omniopd.prompts`."""


class RolloutConfig(Section):
    """How the student writes."""

    engine: Literal["embedded"] = "embedded"
    prompts_per_step: int = Field(default=16, ge=1)
    group_size: int = Field(default=4, ge=1)
    """Rollouts of the same prompt."""
    max_tokens: int = Field(default=1024, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=64, ge=1)
    """Sequences decoded together."""
    max_steps_off_policy: int = Field(default=0, ge=0)
    """The learner refuses rollouts drawn with weights that are more steps old."""


class MethodConfig(Section):
    """What supervises the student: parts of `omniopd.signals`, each `{type: NAME, ...}` in YAML."""

    supervision: dict[str, Any] = Field(default_factory=lambda: {"type": "chunked"})
    transforms: list[dict[str, Any]] = Field(default_factory=list)
    """Filters and token weightings, applied in the order written."""


class LearnerConfig(Section):
    """The optimiser step."""

    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    micro_batch_size: int = Field(default=2, ge=1)
    """Rollouts in one forward pass; the step does not depend on it."""
    aggregation: Literal["sequence_mean_token_sum", "token_mean"] = "sequence_mean_token_sum"
    """`sequence_mean_token_sum` is the published objective: token sums, averaged over rollouts."""
    logits_slice_tokens: int = Field(default=1024, ge=1)
    """Tokens whose logits are in memory at once."""
    losses: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides of the loss of a stream, e.g. `{kl: {type: reverse_kl}}`; a part of `omniopd.learner.losses`."""


class EvalConfig(Section):
    """Measurement on held-out problems."""

    every: int = Field(default=0, ge=0)
    """Also during training, every that many steps; 0: only before and after."""
    num_problems: int = Field(default=200, ge=1)
    k: int = Field(default=16, ge=1)
    """Samples for each problem."""
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)
    """None: as in rollouts."""
    k_during: int = Field(default=4, ge=1)
    """Samples for each problem in the evaluations during training."""


class PrefixProbeConfig(Section):
    """During the run, let the text teacher finish what the student began. Asks the teacher, so it costs money."""

    every: int = Field(default=0, ge=0)
    """Steps between two probes, the first and the last step among them; 0: none."""
    max_rollouts: int = Field(default=16, ge=1)
    """Rollouts of a step that are probed, of as many prompts as there are."""
    fractions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    """Where they are cut, as shares of their length."""
    positions: tuple[int, ...] = ()
    """And after so many tokens; only these tell whether the teacher is ahead at all."""
    num_continuations: int = Field(default=2, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    """Of each answer; None: `rollout.max_tokens`."""


class DiagnosticsConfig(Section):
    """What is measured beside the losses. Nothing here changes what the student learns."""

    every: int = Field(default=10, ge=0)
    """Steps between two comparisons with open-weight teachers, the first and the last step among them; 0: none."""
    max_tokens: int = Field(default=4096, ge=1)
    """Tokens of a step's rollouts that are compared with a teacher; whole rollouts, at least one."""
    top_k: int = Field(default=16, ge=1)
    """Size of the sets of likeliest tokens that are compared."""
    prefix_probe: PrefixProbeConfig = PrefixProbeConfig()


class RunConfig(Section):
    """One run, complete."""

    name: str = "run"
    output: Path = Path("runs")
    """The run folder is `output/name`."""
    preset: Literal["paper"] | None = None
    """`paper`: the published settings, field by field; the file may still override them."""
    seed: int = 0
    steps: int = Field(default=50, ge=1)
    """Optimiser steps."""
    save_every: int = Field(default=25, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    record_every: int = Field(default=1, ge=1)
    """Steps between full rollout records."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the learner; None leaves it to torch."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    student: StudentConfig
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """Several teachers by name, for `method.supervision.type: routed`; then `teacher` is not used."""
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    method: MethodConfig = MethodConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
