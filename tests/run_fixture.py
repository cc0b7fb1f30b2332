"""A run folder as a real run leaves it: mini-math rollouts with audits, metrics, evaluations. Seeded, no model."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from omniopd.records import Records
from omniopd.run_folder import RunFolder, write_json_atomic
from omniopd.types import (
    Audit,
    Chunk,
    ChunkScore,
    Continuation,
    FinishReason,
    Message,
    Missing,
    Prompt,
    Rollout,
    TeacherContinuations,
    TokenSignal,
    Update,
    Usage,
)

CHUNK_TOKENS = 8
CONTINUATIONS = 4


def config(**changes: Any) -> dict[str, Any]:
    """Return a small resolved run file."""
    return {
        "name": "mini-math-omniopd",
        "output": "runs",
        "seed": 0,
        "steps": 40,
        "student": {"model": "mini-math:student", "device": "auto", "lora": None},
        "teacher": {"spec": "mini-math:teacher", "temperature": 1.0},
        "data": {"train": "mini-math", "eval": "mini-math"},
        "method": {
            "supervision": {
                "type": "chunked",
                "chunker": {"type": "entropy", "max_chunks": 3, "chunk_tokens": 8},
                "num_continuations": 4,
                "min_continuations": 2,
                "similarity": "edit",
                "credit": {"type": "smoothed"},
            },
            "transforms": [{"type": "drop_truncated"}],
        },
        "learner": {
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup_steps": 10,
            "aggregation": "sequence_mean_token_sum",
        },
        "eval": {"every": 10, "k": 16},
        **changes,
    }


def rollout(
    name: str = "p0/0",
    question: str = "48+37-19",
    text: str = "48+37=75;75-19=56;#56",
    *,
    answer: str | None = "66",
    is_correct: bool | None = False,
    rng: random.Random | None = None,
) -> Rollout:
    """Make a rollout with one token a character and an end token; results are where the student doubts."""
    rng = rng or random.Random(0)
    prompt = Prompt(
        id=name.split("/")[0],
        messages=(Message(role="user", content=question),),
        text=f"Q:{question}?",
        token_ids=tuple(range(len(question) + 3)),
        answer=answer,
    )
    entropies = []
    doubtful = False
    for character in text:
        entropies.append(rng.uniform(0.5, 1.6) if doubtful else rng.uniform(0.0, 0.25))
        doubtful = character == "=" or (doubtful and rng.random() < 0.5)
    size = len(text) + 1
    return Rollout(
        id=name,
        prompt=prompt,
        group_index=int(name.split("/")[1]),
        token_ids=tuple(range(3, 3 + size)),
        text=text,
        char_starts=tuple(range(size)),
        finish_reason=FinishReason.STOP,
        policy_version=0,
        sampler_logprobs=tuple(-0.1 for _ in range(size)),
        entropies=(*entropies, 0.01),
        is_correct=is_correct,
    )


def audit(
    source: Rollout, index: int, start: int, similarities: tuple[float | None, ...], *, weight: float | None = None
) -> Audit:
    """Audit the tokens start..start+7 with continuations about that similar; None makes a missing one."""
    end = min(start + CHUNK_TOKENS, source.num_tokens)
    text = source.text_between(start, end)
    chunk = Chunk(
        rollout_id=source.id, index=index, start=start, end=end, prefix=source.text_between(0, start), text=text
    )
    continuations = tuple(
        Continuation(text=None, missing=Missing.TIMEOUT, detail="no answer in 60 s")
        if similarity is None
        else Continuation(text=_alike(text, similarity), finish_reason="length")
        for similarity in similarities
    )
    known = tuple(_similarity(text, c.text) for c in continuations if c.text is not None)
    enough = len(known) >= 2
    score = ChunkScore(
        chunk=chunk,
        value=sum(known) / len(known) if enough else None,
        similarities=known,
        scorer_id="edit",
        missing=None if enough else Missing.TOO_FEW,
        detail="" if enough else f"{len(known)} usable continuations of {len(similarities)}, 2 are needed",
    )
    answers = TeacherContinuations(chunk=chunk, continuations=continuations, teacher_id="mini-math:teacher")
    return Audit(
        chunk=chunk,
        continuations=answers,
        score=score,
        weight=(sum(known) + 0.5) / (len(known) + 1) if enough and weight is None else weight,
    )


def signal(source: Rollout, audits: tuple[Audit, ...]) -> TokenSignal:
    """Spread the audits' weights over their tokens; the anchor holds the rest."""
    weights = [0.0] * source.num_tokens
    for item in audits:
        if item.weight is not None:
            weights[item.chunk.start : item.chunk.end] = [item.weight] * item.chunk.num_tokens
    return TokenSignal(
        rollout=source,
        advantages=tuple(weights),
        pg_weights=tuple(float(w > 0) for w in weights),
        anchor_weights=tuple(0.1 * (w == 0) for w in weights),
        audits=audits,
    )


def step_signals(step: int, *, num_rollouts: int = 8, skill: float = 0.5, audited: bool = True) -> list[TokenSignal]:
    """Make the signals of one step; the same arguments give the same signals."""
    rng = random.Random(1000 + step)
    return [_random_signal(rng, i, skill=skill, audited=audited) for i in range(num_rollouts)]


def write_run(
    path: Path,
    *,
    num_steps: int = 40,
    evaluated: bool = True,
    audited: bool = True,
    finished: bool = True,
    hostile_text: str | None = None,
) -> RunFolder:
    """Write a run folder through the public interfaces, `summary.json` included when it is finished."""
    folder = RunFolder.create(path, resume=False, overwrite=False)
    folder.write_resolved(config(steps=num_steps if finished else 2 * num_steps))
    folder.write_environment(["omniopd", "train", "configs/mini-math.yaml"])
    records = Records(folder, record_every=max(1, num_steps // 8))
    rng = random.Random(7)
    if evaluated:
        records.evaluation(_evaluation(0, "before", 0.301, 16))
    for step in range(1, num_steps + 1):
        skill = 0.30 + 0.18 * (1 - math.exp(-3 * step / num_steps))
        signals = step_signals(step, skill=skill, audited=audited)
        if hostile_text is not None:
            signals[0] = signal(rollout(text=hostile_text, question=hostile_text), ())
        records.step(_update(step, rng), signals, _timings(rng), _usage(audited), {"memory/peak_rss_mb": 812.0})
        if evaluated and step % 10 == 0 and step < num_steps:
            records.evaluation(_evaluation(step, "during", skill + rng.uniform(-0.02, 0.02), 4))
    if evaluated and finished:
        records.evaluation(_evaluation(num_steps, "after", 0.479, 16))
    records.close()
    if finished:
        write_json_atomic(folder.summary, summary(num_steps, evaluated=evaluated))
    return folder


def summary(num_steps: int, *, evaluated: bool = True) -> dict[str, Any]:
    """Return the summary of the fixture's run."""
    gain = {"k": 16, "before": 0.301, "after": 0.479, "gain": 0.178, "ci95": [0.156, 0.200]}
    return {
        "name": "mini-math-omniopd",
        "seed": 0,
        "steps": num_steps,
        "avg_at_k": gain if evaluated else None,
        "greedy": {"before": 0.81, "after": 0.86} if evaluated else None,
        "teacher_tokens": 1_234_567,
        "teacher_requests": 24 * num_steps,
        "cost_usd": None,
        "train_seconds": 131.0,
        "method": "chunked",
    }


def _random_signal(rng: random.Random, index: int, *, skill: float, audited: bool) -> TokenSignal:
    a, b, c = rng.randint(10, 60), rng.randint(10, 40), rng.randint(1, 20)
    is_correct = rng.random() < skill
    first = a + b + (0 if is_correct else rng.choice((-10, 10, 1)))
    text = f"{a}+{b}={first};{first}-{c}={first - c};#{first - c}"
    source = rollout(
        f"p{index // 4}/{index % 4}",
        f"{a}+{b}-{c}",
        text,
        answer=str(a + b - c),
        is_correct=is_correct,
        rng=rng,
    )
    if not audited:
        return TokenSignal(rollout=source, kl_weights=(1.0,) * source.num_tokens)
    starts = (text.index("=") - 2, text.index(";") + 2, text.index("#") - 1)
    quality = (0.92, 0.85, 0.9) if is_correct else (0.35, 0.55, 0.2)
    audits = tuple(
        audit(source, i, start, _similarities(rng, mean))
        for i, (start, mean) in enumerate(zip(_apart(starts), quality, strict=True))
        if start < len(text)
    )
    return signal(source, audits)


def _apart(starts: tuple[int, ...]) -> list[int]:
    placed: list[int] = []
    for start in starts:
        placed.append(max(start, placed[-1] + CHUNK_TOKENS) if placed else start)
    return placed


def _similarities(rng: random.Random, mean: float) -> tuple[float | None, ...]:
    share_missing = rng.choice((0.0, 0.0, 0.0, 0.25, 0.7))
    return tuple(
        None if rng.random() < share_missing else min(1.0, max(0.0, round(rng.gauss(mean, 0.12), 3)))
        for _ in range(CONTINUATIONS)
    )


def _alike(text: str, similarity: float) -> str:
    """Keep a share of the characters; the others become what a teacher might write instead."""
    kept = round(similarity * len(text))
    return text[:kept] + "".join(str((ord(c) * 7 + 3) % 10) if c.isdigit() else c for c in text[kept:])


def _similarity(text: str, other: str) -> float:
    """The share of equal characters, position by position."""
    return sum(a == b for a, b in zip(text, other, strict=True)) / len(text)


def _update(step: int, rng: random.Random) -> Update:
    return Update(
        step=step,
        policy_version=step,
        loss=2.4 * math.exp(-step / 30) + rng.uniform(0, 0.3),
        grad_norm=0.8 + rng.uniform(-0.2, 0.4),
        learning_rate=1e-4 * min(1.0, step / 10),
        metrics={"loss/pg": 1.1, "loss/anchor": 0.2, "tokens/pg": 190.0, "tokens/anchor": 150.0},
    )


def _timings(rng: random.Random) -> dict[str, float]:
    phases = {"generate": 0.9, "teacher": 1.3, "score": 0.05, "loss": 0.6, "optimizer": 0.1, "sync": 0.02}
    noisy = {name: seconds * rng.uniform(0.85, 1.2) for name, seconds in phases.items()}
    return {**noisy, "step": sum(noisy.values())}


def _usage(audited: bool) -> Usage:
    if not audited:
        return Usage()
    return Usage(requests=24, input_tokens=2_400, output_tokens=768, cost_usd=0.00412, cached_requests=3)


def _evaluation(step: int, when: str, avg_at_k: float, k: int) -> dict[str, Any]:
    return {
        "step": step,
        "when": when,
        "k": k,
        "temperature": 1.0,
        "avg_at_k": avg_at_k,
        "pass_at_k": min(1.0, avg_at_k + 0.4),
        "greedy": 0.81 if when == "before" else 0.86 if when == "after" else None,
        "length_mean": 21.4,
        "truncated": 0.0,
        "num_problems": 200,
        "seconds": 9.3,
    }
