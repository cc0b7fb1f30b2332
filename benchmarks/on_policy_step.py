"""A whole on-policy distillation step beside TRL's DistillationTrainer and GKDTrainer, on a CPU.

    pip install --target peers --no-deps trl==1.16.0
    PYTHONPATH=peers python benchmarks/on_policy_step.py

Every contender starts from the same saved Qwen3-shaped models with random weights (student 4 layers of width 128,
teacher 4 of width 256, vocabulary 32,000, logits with a standard deviation of about 1.5) and the same 8 prompts, draws
one completion of each at temperature 1, and takes one AdamW step on the mean reverse KL a token over the whole
vocabulary: float32, two forward passes of 4 rollouts, constant learning rate, no weight decay, clipping at 1. All that
is not named here is left at each library's default; both trainers of TRL are also run without gradient checkpointing,
which is their default and not ours (and with which GKDTrainer also generates without a cache).

Nobody can end early: the tokenizer's end token has the id 32,000, one past the last row of the models' heads, so no
sampler needs a setting that another lacks. The tokens drawn are counted in every step, and another number is an error.
GKDTrainer divides its loss by the number of tokens of the data set's own answers even where it has replaced them, so
these are given as many tokens as are drawn. DistillationTrainer and GKDTrainer agree only because of that.

Before anything is timed every contender takes its first step on the same token ids (what the model's `generate` or the
rollout engine would return is put in its place), and loss, gradient norm and gradient are compared with ours.

Then each contender runs in a process of its own, in turns, round by round; the first step of a process is not timed,
but its loss on the contender's own samples is reported. Seconds are those of the clock, and of the processor over all
threads, which other work on the machine changes less; threads that wait for each other sleep (OMP_WAIT_POLICY). Every
figure is the median over all timed steps. A step goes from the end of the last one to its own end:

- generation: prompts to completions, as token ids and, here, as text;
- optimizer: after the last backward pass to the end of the step, with clipping;
- loss: here all the rest; of TRL only what is in `training_step` without generation, the rest is `other`;
- trunks: the part of `loss` spent in both models below their heads: the forward calls of the trunk modules, and the
  backward pass from the gradient of the student's last hidden state to that of its embeddings.

Memory is the peak of the resident set of the process, and what that adds to the state before the first step, models
and libraries loaded. Prints a table and writes `benchmarks/results/on_policy_step.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.provenance import provenance
from omniopd.timing import StepTimer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from omniopd.learner.learner import Learner
    from omniopd.learner.policy import Policy
    from omniopd.supervision.logprob import LogprobSupervision
    from omniopd.types import Prompt, Rollout, StepContext, TokenSignal, Update

RESULT = Path(__file__).parent / "results" / "on_policy_step.json"
OURS = "omniopd"
PEERS = {
    "trl_distillation": ("distillation", True),
    "trl_distillation_plain": ("distillation", False),
    "trl_gkd": ("gkd", True),
    "trl_gkd_plain": ("gkd", False),
}
"""Trainer and gradient checkpointing."""
CONTENDERS = (OURS, *PEERS)
PHASES = ("total", "generation", "loss", "trunks", "loss_without_trunks", "optimizer", "other")
THREADS = 2
VOCABULARY = 32000
STUDENT_WIDTH, TEACHER_WIDTH = 128, 256
MICRO_BATCH, NUM_MICRO_BATCHES = 4, 2
ROLLOUTS = MICRO_BATCH * NUM_MICRO_BATCHES
LEARNING_RATE = 1e-4
TOLERANCE = 1e-5
MB = 2**20

Spent = tuple[float, float]
"""Seconds of the clock and of the processor."""


def now() -> Spent:
    return time.perf_counter(), time.process_time()


class Clock(StepTimer):
    """Adds up what each phase of a step takes, and lists the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []
        self._spent: dict[str, Spent] = {}

    def start(self) -> None:
        """Begin the first step: models and libraries are loaded."""
        Path("/proc/self/clear_refs").write_text("5")
        self.memory_before = memory("VmRSS")
        self._spent, self._step_began = {}, now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = now()
        yield
        self.add(phase, began)

    def add(self, phase: str, began: Spent) -> None:
        wall, cpu = self._spent.get(phase, (0.0, 0.0))
        at = now()
        self._spent[phase] = (wall + at[0] - began[0], cpu + at[1] - began[1])

    def end_step(self, *, loss: float, num_tokens: int) -> None:
        self.add("total", self._step_began)
        self.steps.append({"loss": loss, "num_tokens": num_tokens, "spent": self._spent})
        self._spent, self._step_began = {}, now()


def write_models(folder: Path) -> None:
    """Save student, teacher and tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    for name, width, seed in (("student", STUDENT_WIDTH, 0), ("teacher", TEACHER_WIDTH, 1)):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            # The final norm leaves states of length sqrt(width): logits near 0 would make the divergence one of noise.
            model.lm_head.weight.normal_(std=1.5 / width**0.5)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Make a byte-level BPE of 32,000 tokens (padding, bytes, pairs and triples) and an end token past them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "etaoinshrdlucmfwypvbgkqjxz,.!?'" + "\u0120"  # The last one is how byte-level BPE writes a space.
    parts = [*letters, *(a + b for a, b in itertools.product(letters, repeat=2))]
    merges = list(itertools.islice(itertools.product(parts, letters), VOCABULARY - 1 - 256))
    tokens = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="left")
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    assert tokenizer.eos_token_id == VOCABULARY
    return tokenizer


def prompt_texts() -> list[str]:
    """Return 8 prompts of 20 to 41 words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=20 + 3 * place)) for place in range(ROLLOUTS)]


def fixed_completion(place: int, num_tokens: int) -> list[int]:
    """Return the completion of a prompt that stands for a sample where contenders are compared."""
    rng = torch.Generator().manual_seed(place)
    return torch.randint(1, VOCABULARY, (num_tokens,), generator=rng).tolist()


def time_trunk(model: PreTrainedModel, clock: Clock, *, is_student: bool) -> None:
    """Count what a model spends below its head, outside of generation."""
    began: list[Spent] = []

    def enter(*_: object) -> None:
        began.append(now())

    def leave(_module: object, _inputs: object, output: Any) -> None:
        entered = began.pop()
        if not is_student:
            clock.add("trunks", entered)
        elif torch.is_grad_enabled():
            clock.add("trunks", entered)
            output.last_hidden_state.register_hook(enter)

    model.base_model.register_forward_pre_hook(enter)
    model.base_model.register_forward_hook(leave)
    if is_student:
        embeddings = model.get_input_embeddings().weight
        embeddings.register_post_accumulate_grad_hook(lambda _: clock.add("trunks", began.pop()))


# Ours.


def run_ours(folder: Path, clock: Clock, num_tokens: int, num_steps: int, gradient: Path | None) -> None:
    """Take some steps through the training loop of `omniopd train`. With `gradient`, one on the fixed completions."""
    from omniopd.behavior.student import StudentBehavior
    from omniopd.config import RolloutConfig, StudentConfig
    from omniopd.learner.policy import Policy
    from omniopd.loop import Run, train
    from omniopd.rollout.embedded import EmbeddedEngine

    policy = Policy.load(StudentConfig(model=str(folder / "student"), device="cpu", dtype="float32"))
    time_trunk(policy.model, clock, is_student=True)
    learner, supervision = our_method(policy, folder / "teacher", clock, num_steps, 1.0 if gradient is None else 1e9)
    rollout = RolloutConfig(prompts_per_step=ROLLOUTS, group_size=1, max_tokens=num_tokens)
    engine = EmbeddedEngine(policy, rollout) if gradient is None else FixedEngine(num_tokens)
    run = Run(
        num_steps=num_steps,
        prompts_per_step=ROLLOUTS,
        group_size=1,
        seed=0,
        prompts=SamePrompts(policy.tokenizer),
        behavior=StudentBehavior(engine, clock),
        supervision=supervision,
        transforms=(),
        learner=learner,
        engine=engine,
        observers=(StepEnd(clock, policy.model, gradient),),
        timer=clock,
    )
    clock.start()
    asyncio.run(train(run))


def our_method(
    policy: Policy, teacher: Path, clock: Clock, num_steps: int, max_grad_norm: float
) -> tuple[Learner, LogprobSupervision]:
    """Return what learns and what asks for the divergence, with the teacher in the same process."""
    from omniopd.config import LearnerConfig
    from omniopd.learner.learner import Learner
    from omniopd.learner.policy import load_frozen
    from omniopd.learner.teachers import LiveTeacher
    from omniopd.logits.reading import SameVocabulary
    from omniopd.supervision.logprob import LogprobSupervision

    weights = load_frozen(str(teacher), device="cpu", dtype="float32")
    time_trunk(weights.model, clock, is_student=False)
    config = LearnerConfig(
        learning_rate=LEARNING_RATE,
        micro_batch_size=MICRO_BATCH,
        aggregation="token_mean",
        max_grad_norm=max_grad_norm,
        losses={"kl": {"type": "reverse_kl"}},
    )
    teachers = {"teacher": LiveTeacher(weights)}
    learner = Learner(policy, config, num_steps=num_steps, keep_reference=False, teachers=teachers, timer=clock)
    return learner, LogprobSupervision(reader=SameVocabulary("student"), name="teacher")


class SamePrompts:
    """The 8 prompts, in every step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from omniopd.types import Message, Prompt

        self._prompts = tuple(
            Prompt(
                id=str(place),
                messages=(Message(role="user", content=text),),
                text=text,
                token_ids=tuple(tokenizer(text)["input_ids"]),
            )
            for place, text in enumerate(prompt_texts())
        )

    def draw(self, step: int, count: int) -> tuple[Prompt, ...]:
        return self._prompts


class FixedEngine:
    """Returns the fixed completions as if the student had drawn them."""

    policy_version = 0

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    async def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, seeds: Sequence[int], tag: str
    ) -> list[Rollout]:
        from omniopd.types import FinishReason, Rollout

        return [
            Rollout(
                id=f"{tag}/{place}",
                prompt=prompt,
                group_index=0,
                token_ids=tuple(fixed_completion(place, self._num_tokens)),
                text="",
                char_starts=(0,) * self._num_tokens,
                finish_reason=FinishReason.LENGTH,
                policy_version=0,
            )
            for place, prompt in enumerate(prompts)
        ]

    async def push_weights(self, version: int) -> None:
        return None

    async def aclose(self) -> None:
        return None


class StepEnd:
    """Closes our steps on the clock and keeps the gradient where it is asked for."""

    def __init__(self, clock: Clock, model: PreTrainedModel, gradient: Path | None) -> None:
        self._clock = clock
        self._model = model
        self._gradient = gradient

    def after_step(self, update: Update, signals: Sequence[TokenSignal], ctx: StepContext) -> None:
        if self._gradient is not None:
            save_gradient(self._model, self._gradient)
        self._clock.end_step(loss=update.loss, num_tokens=sum(s.rollout.num_tokens for s in signals))


def save_gradient(model: PreTrainedModel, path: Path) -> None:
    torch.save({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, path)


# TRL.


def run_peer(name: str, folder: Path, clock: Clock, num_tokens: int, num_steps: int, gradient: Path | None) -> None:
    """Take some steps of one of TRL's trainers. With `gradient`, one on the fixed completions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, checkpointing = PEERS[name]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / part, dtype=torch.float32) for part in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    options = {
        "output_dir": str(folder / "trainer"),
        "max_steps": num_steps,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0 if gradient is None else 1e9,
        "gradient_checkpointing": checkpointing,
        "beta": 1.0,
        "temperature": 1.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    build = _distillation_trainer if kind == "distillation" else _gkd_trainer
    trainer, generation = build(student, teacher, tokenizer, options, num_tokens)
    if gradient is not None:
        student.generate = functools.partial(_fixed_generate, tokenizer, num_tokens)
    time_trunk(student, clock, is_student=True)
    time_trunk(teacher, clock, is_student=False)
    _watch(trainer, generation, clock, gradient)
    clock.start()
    trainer.train()


def _distillation_trainer(
    student: Any, teacher: Any, tokenizer: Any, options: dict[str, Any], num_tokens: int
) -> tuple[Any, str]:
    """Return the trainer and the method of it that generates."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    data = Dataset.from_list([{"prompt": text} for text in prompt_texts()] * options["max_steps"])
    config = DistillationConfig(**options, max_completion_length=num_tokens, shuffle_dataset=False)
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=config, train_dataset=data, processing_class=tokenizer
    )
    return trainer, "_generate_and_score_completions"


def _gkd_trainer(
    student: Any, teacher: Any, tokenizer: Any, options: dict[str, Any], num_tokens: int
) -> tuple[Any, str]:
    """Return the trainer and the method of it that generates."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = []
    for text in prompt_texts():
        ids = tokenizer(text)["input_ids"]
        mask = [0] * len(ids) + [1] * num_tokens
        rows.append({"prompt": text, "input_ids": ids + [1] * num_tokens, "completion_mask": mask})
    config = GKDConfig(**options, max_new_tokens=num_tokens, lmbda=1.0, train_sampling_strategy="sequential")
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows * options["max_steps"]),
        processing_class=tokenizer,
    )
    return trainer, "generate_on_policy_outputs"


def _watch(trainer: Any, generation: str, clock: Clock, gradient: Path | None) -> None:
    """Time a trainer's methods and count the tokens that it draws."""
    from transformers import TrainerCallback

    losses: list[float] = []
    counts: list[int] = []
    after_backward = [now()]
    generate, train = getattr(trainer, generation), trainer.training_step

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        with clock("generate"):
            result = generate(*args, **kwargs)
        drawn = result["completion_mask"] if isinstance(result, dict) else result[2] != -100
        counts.append(int(drawn.sum()))
        return result

    def timed_training_step(*args: Any, **kwargs: Any) -> Tensor:
        with clock("training_step"):
            loss: Tensor = train(*args, **kwargs)
        losses.append(float(loss))
        after_backward[0] = now()
        return loss

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if gradient is not None:
                save_gradient(trainer.model, gradient)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.add("optimizer", after_backward[0])
            clock.end_step(loss=sum(losses), num_tokens=sum(counts))
            losses.clear()
            counts.clear()

    setattr(trainer, generation, timed_generate)
    trainer.training_step = timed_training_step
    trainer.add_callback(Steps())


def _fixed_generate(
    tokenizer: Any,
    num_tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    return_dict_in_generate: bool = False,
    **_: Any,
) -> Any:
    """Return the fixed completions of the prompts in the place of `model.generate`."""
    places = {tuple(tokenizer(text)["input_ids"]): place for place, text in enumerate(prompt_texts())}
    prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
    completions = torch.tensor([fixed_completion(places[prompt], num_tokens) for prompt in prompts])
    sequences = torch.cat([input_ids, completions], dim=1)
    return SimpleNamespace(sequences=sequences) if return_dict_in_generate else sequences


# Measuring.


def run_contender(name: str, folder: Path, num_tokens: int, num_steps: int, gradient: Path | None) -> dict[str, Any]:
    """Run one contender; this process does nothing else."""
    clock = Clock()
    if name == OURS:
        run_ours(folder, clock, num_tokens, num_steps, gradient)
    else:
        run_peer(name, folder, clock, num_tokens, num_steps, gradient)
    for step in clock.steps:
        if step["num_tokens"] != ROLLOUTS * num_tokens:
            raise RuntimeError(f"{name} drew {step['num_tokens']} tokens in a step, expected {ROLLOUTS * num_tokens}")
    split = [_split(step["spent"], is_ours=name == OURS) for step in clock.steps]
    peak = memory("VmHWM")
    return {
        "loss": clock.steps[0]["loss"],
        "steps": split,
        "peak_mb": peak,
        "extra_mb": peak - clock.memory_before,
    }


def _split(spent: dict[str, Spent], *, is_ours: bool) -> dict[str, list[float]]:
    """Return the phases of a step by the definitions above, in seconds of the clock and of the processor."""
    phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for unit in range(2):
        taken = {phase: seconds[unit] for phase, seconds in spent.items()}
        total, generation, optimizer = taken["total"], taken["generate"], taken["optimizer"]
        loss = (total - optimizer if is_ours else taken["training_step"]) - generation
        trunks = taken["trunks"]
        other = total - generation - loss - optimizer
        found = (total, generation, loss, trunks, loss - trunks, optimizer, other)
        for phase, seconds in zip(PHASES, found, strict=True):
            phases[phase].append(seconds)
    return phases


def memory(field: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")) / MB


def in_a_process(*arguments: object) -> dict[str, Any]:
    """Run this file with some arguments and return what it prints last."""
    settings = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment = os.environ | settings | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(folder: Path, num_tokens: int) -> dict[str, Any]:
    """Compare the first step of all contenders on the same tokens. Exits when one differs."""
    losses, gradients = {}, {}
    for name in CONTENDERS:
        path = folder / f"{name}.pt"
        arguments = ("--contender", name, "--folder", folder, "--tokens", num_tokens, "--steps", 1)
        losses[name] = in_a_process(*arguments, "--gradient", path)["loss"]
        named: dict[str, Tensor] = torch.load(path)
        gradients[name] = torch.cat([named[key].flatten().double() for key in sorted(named)])
        path.unlink()
    ours = gradients[OURS]
    found = {}
    for name, gradient in gradients.items():
        errors = {
            "loss": abs(losses[name] / losses[OURS] - 1),
            "gradient_norm": abs(float(gradient.norm() / ours.norm()) - 1),
            "gradient": float((gradient - ours).norm() / ours.norm()),
        }
        found[name] = {"loss": losses[name], "gradient_norm": float(gradient.norm()), "differences": errors}
        print(f"same {num_tokens} tokens, {name:<24} {losses[name]:.7f} {errors}", flush=True)
    worst = max(error for values in found.values() for error in values["differences"].values())
    if not worst < TOLERANCE:
        sys.exit(f"the first steps differ by {worst:.1e}, more than {TOLERANCE:g}: the contenders do different work")
    return found


def measure(folder: Path, num_tokens: int, *, rounds: int, steps: int) -> dict[str, Any]:
    """Measure all contenders in turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    arguments = ("--folder", folder, "--tokens", num_tokens, "--steps", steps + 1)
    for _ in range(rounds):
        for name in CONTENDERS:
            runs[name].append(in_a_process("--contender", name, *arguments))
    found = {name: _summary(results) for name, results in runs.items()}
    return {"new_tokens": num_tokens, "ratios": _ratios(found), "contenders": found}


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    timed = [step for result in results for step in result["steps"][1:]]
    totals = [step["total"][0] for step in timed]
    return {
        "seconds": {phase: statistics.median(step[phase][0] for step in timed) for phase in PHASES},
        "cpu_seconds": {phase: statistics.median(step[phase][1] for step in timed) for phase in PHASES},
        "total_seconds_range": [min(totals), max(totals)],
        "num_timed_steps": len(timed),
        "first_step_losses": [result["loss"] for result in results],
        **{key: statistics.median(result[key] for result in results) for key in ("peak_mb", "extra_mb")},
    }


def _ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return our time as a share of the fastest peer's, which need not be the same one in each phase."""
    ratios = {}
    for unit in ("seconds", "cpu_seconds"):
        for phase in ("total", "generation", "loss", "loss_without_trunks", "optimizer"):
            best = min(found[name][unit][phase] for name in PEERS)
            ratios[f"{phase}_{unit}"] = found[OURS][unit][phase] / best
    for key in ("peak_mb", "extra_mb"):
        ratios[key] = found[OURS][key] / min(found[name][key] for name in PEERS)
    return ratios


def table(cell: dict[str, Any]) -> str:
    """Return a Markdown table; every time is in seconds, in brackets those of the processor."""
    columns = {phase: phase.replace("_", " ") for phase in PHASES}
    lines = [
        f"| {cell['new_tokens']} new tokens | {' | '.join(columns.values())} | peak MB (extra) | first-step loss |",
        "|---" * (len(PHASES) + 3) + "|",
    ]
    for name, found in cell["contenders"].items():
        times = [f"{found['seconds'][p]:.3f} ({found['cpu_seconds'][p]:.3f})" for p in PHASES]
        memory_used = f"{found['peak_mb']:.0f} ({found['extra_mb']:.0f})"
        losses = statistics.fmean(found["first_step_losses"])
        lines.append(f"| {name} | {' | '.join(times)} | {memory_used} | {losses:.4f} |")
    shares = ", ".join(f"{key} {value:.2f}" for key, value in cell["ratios"].items())
    return "\n".join([*lines, "", f"Ours over the best of the peers: {shares}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="new tokens of a completion")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    if given.contender is not None:
        print(json.dumps(run_contender(given.contender, given.folder, given.tokens[0], given.steps, given.gradient)))
        return
    cells = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        for num_tokens in given.tokens:
            same = check(folder, num_tokens)
            cells.append({**measure(folder, num_tokens, rounds=given.rounds, steps=given.steps), "check": same})
            print(table(cells[-1]), flush=True)
    packages = ("torch", "transformers", "trl", "accelerate")
    record = {
        **provenance(),
        "versions": {package: version(package) for package in packages},
        "threads": THREADS,
        "load_average": os.getloadavg()[1],
        "rounds": given.rounds,
        "cells": cells,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
