"""Train the mini-math models from nothing: `python -m omniopd.worlds.mini_math.build`.

The teacher reads clean solutions; the student reads solutions in which a share of the steps slips, so it knows the
right step but often writes a wrong one when sampled. Both are Qwen3-shaped, about half a million parameters each.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from omniopd.worlds.mini_math.tokenizer import build_tokenizer
from omniopd.worlds.mini_math.world import MODELS, Problem, make_problem, make_problems, model_path, solution

HELD_OUT_SEED = 20_000
"""Problems drawn with this seed and above are kept out of the training text."""
NUM_HELD_OUT = 4_000


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """Make a model with random weights. `head_dim` 32 is the smallest that vLLM's CPU attention takes."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def batch_of(
    problems: list[Problem], tokenizer: PreTrainedTokenizerFast, *, slip_rate: float, rng: random.Random
) -> dict[str, torch.Tensor]:
    """Tokenise problems with their solutions, right-padded; labels cover the solution and its end token."""
    rows, labels = [], []
    for problem in problems:
        question = tokenizer.encode(f"Q:{problem.expression}?")
        answer = [*tokenizer.encode(solution(problem, slip_rate=slip_rate, rng=rng)), tokenizer.eos_token_id]
        rows.append(question + answer)
        labels.append([-100] * len(question) + answer)
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    }


def greedy_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> float:
    """Share of problems whose greedy answer is right."""
    from omniopd.worlds.mini_math.world import is_correct

    prompts = tokenizer([f"Q:{p.expression}?" for p in problems], return_tensors="pt", padding=True)
    prompts.pop("token_type_ids", None)
    model.eval()
    output = model.generate(**prompts, max_new_tokens=40, do_sample=False)
    model.train()
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_correct(text, str(p.answer)) for text, p in zip(texts, problems, strict=True)) / len(problems)


def train_model(name: str, *, steps: int, slip_rate: float, seed: int, folder: Path) -> dict[str, float]:
    """Pretrain one model and save it with its tokenizer. Returns the figures that go into its build record."""
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    held_out = make_problems(NUM_HELD_OUT, seed=HELD_OUT_SEED)
    forbidden = {problem.expression for problem in held_out}
    rng = random.Random(seed)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        problems: list[Problem] = []
        while len(problems) < 96:
            problem = make_problem(rng)
            if problem.expression not in forbidden:
                problems.append(problem)
        loss = model(**batch_of(problems, tokenizer, slip_rate=slip_rate, rng=rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            print(f"{name}: step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f}s", flush=True)
    accuracy = greedy_accuracy(model, tokenizer, held_out[:400])
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"steps": steps, "slip_rate": slip_rate, "seed": seed, "greedy_accuracy": accuracy}
    (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{name}: greedy accuracy {accuracy:.3f}, saved in {folder}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="student, teacher or both")
    parser.add_argument("--out", type=Path, help="write here instead of over the shipped models")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's own number)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = {
        "teacher": {"steps": 5_000, "slip_rate": 0.0, "seed": 1},
        "student": {"steps": 2_800, "slip_rate": 0.4, "seed": 2},
    }
    for name in args.models:
        settings = recipe[name] | ({"steps": args.steps} if args.steps else {})
        train_model(name, **settings, folder=(args.out / name) if args.out else model_path(name))


if __name__ == "__main__":
    main()
