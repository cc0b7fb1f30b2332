"""Measure a model on problems with answers: samples, a greedy answer, and what two evaluations differ by.

The measure is avg@k, the share of correct samples, with its uncertainty over problems; pass@k and greedy accuracy
stand beside it. Judging single answers is the verifier's job (`omniopd.verify`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from omniopd.bootstrap import Interval, mean_interval, paired_bootstrap
from omniopd.data import load_rows
from omniopd.errors import ConfigError, DataError, RunError
from omniopd.models import read_chat_template
from omniopd.templates import build_prompts
from omniopd.types import FinishReason, Prompt, Value
from omniopd.verify import Verifier, get_verifier

if TYPE_CHECKING:
    from omniopd.generation import Sample, Sampler

DEFAULT_MAX_TOKENS = 1024
QUANTILES = (0.1, 0.5, 0.9)
_BATCHES_PER_CALL = 4
"""How often progress is reported. Fewer would leave the decoder with many half-empty batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult(Value):
    """One evaluation, problem by problem, so that another one can be compared with it later."""

    prompt_ids: tuple[str, ...]
    """[problems]"""
    k: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    correct: tuple[tuple[bool, ...], ...]
    """[problems][k]"""
    lengths: tuple[tuple[int, ...], ...]
    """[problems][k] completion tokens."""
    truncated: tuple[tuple[bool, ...], ...]
    """[problems][k] whether `max_tokens` cut the sample off. A cut sample may still be correct."""
    greedy_correct: tuple[bool, ...] | None = None
    """[problems]; None when no greedy answers were drawn."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt_ids or self.k < 1:
            raise DataError(f"an evaluation needs problems and samples, got {len(self.prompt_ids)} and k {self.k}")
        for name in ("correct", "lengths", "truncated"):
            table = getattr(self, name)
            if len(table) != len(self.prompt_ids) or any(len(row) != self.k for row in table):
                raise DataError(
                    f"EvalResult.{name} is not a table of {len(self.prompt_ids)} problems by {self.k} samples"
                )
        if self.greedy_correct is not None and len(self.greedy_correct) != len(self.prompt_ids):
            raise DataError(
                f"EvalResult.greedy_correct has {len(self.greedy_correct)} entries, expected {len(self.prompt_ids)}"
            )

    @property
    def num_problems(self) -> int:
        return len(self.prompt_ids)

    @property
    def problem_means(self) -> npt.NDArray[np.float64]:
        """[problems] the share of correct samples of each problem."""
        means: npt.NDArray[np.float64] = np.asarray(self.correct, dtype=np.float64).mean(axis=1)
        return means

    @property
    def avg_at_k(self) -> float:
        """The share of correct samples, in [0, 1]: the accuracy of one sample, measured k times."""
        return float(self.problem_means.mean())

    @property
    def greedy(self) -> float | None:
        """The share of correct greedy answers, in [0, 1]; None when none were drawn."""
        return None if self.greedy_correct is None else sum(self.greedy_correct) / len(self.greedy_correct)

    def pass_at_k(self, k: int | None = None) -> float:
        """Return the chance that one of k samples is correct, in [0, 1]; `k` None takes all samples.

        The unbiased estimator 1 - C(n - c, k) / C(n, k) of n samples with c correct, averaged over problems.
        Raises ConfigError unless 1 <= k <= n.

        Source: arXiv:2107.03374 eq. 1.
        """
        k = self.k if k is None else k
        if not 1 <= k <= self.k:
            raise ConfigError(f"pass@{k} needs 1 to {self.k} samples a problem, and {self.k} were drawn")
        misses = [comb(self.k - sum(row), k) / comb(self.k, k) for row in self.correct]
        return 1 - sum(misses) / len(misses)

    @property
    def length_mean(self) -> float:
        """Completion tokens, averaged over samples."""
        return float(np.mean(self.lengths))

    def length_quantiles(self, shares: Sequence[float] = QUANTILES) -> tuple[float, ...]:
        """Return the completion lengths below which these shares of the samples lie."""
        return tuple(float(q) for q in np.quantile(np.asarray(self.lengths), list(shares)))

    @property
    def truncated_share(self) -> float:
        """The share of samples that `max_tokens` cut off, in [0, 1]."""
        return float(np.mean(self.truncated))

    def summary(self) -> dict[str, Any]:
        """Return the figures of an `evals.jsonl` row; the step and the occasion are the caller's to add."""
        return {
            "k": self.k,
            "temperature": self.temperature,
            "avg_at_k": self.avg_at_k,
            "pass_at_k": self.pass_at_k(),
            "greedy": self.greedy,
            "length_mean": self.length_mean,
            "truncated": self.truncated_share,
            "num_problems": self.num_problems,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Value):
    """What changed between two evaluations of the same problems."""

    k: int
    before: float
    """avg@k"""
    after: float
    gain: Interval
    """after - before, with a 95% interval from a paired bootstrap over problems."""
    greedy_before: float | None
    greedy_after: float | None

    def summary(self) -> dict[str, Any]:
        """Return the `avg_at_k` and `greedy` entries of `summary.json`."""
        return {
            "avg_at_k": {
                "k": self.k,
                "before": self.before,
                "after": self.after,
                "gain": self.gain.estimate,
                "ci95": [self.gain.low, self.gain.high],
            },
            "greedy": {"before": self.greedy_before, "after": self.greedy_after},
        }


def compare(before: EvalResult, after: EvalResult, *, seed: int = 0) -> Comparison:
    """Compare two evaluations, problem by problem.

    Raises DataError when they differ in problems or sampling settings: such a difference would not be the model's.
    """
    _require_settings(before, k=after.k, temperature=after.temperature, top_p=after.top_p, max_tokens=after.max_tokens)
    if before.prompt_ids != after.prompt_ids:
        shared = len(set(before.prompt_ids) & set(after.prompt_ids))
        raise DataError(
            f"the evaluations differ in problems: {before.num_problems} before, {after.num_problems} after, {shared} "
            "shared; evaluate both on the same data with the same prompt settings"
        )
    return Comparison(
        k=before.k,
        before=before.avg_at_k,
        after=after.avg_at_k,
        gain=paired_bootstrap(before.problem_means, after.problem_means, seed=seed),
        greedy_before=before.greedy,
        greedy_after=after.greedy,
    )


def _require_settings(before: EvalResult, **settings: float) -> None:
    for name, new in settings.items():
        old = getattr(before, name)
        if old != new:
            raise DataError(f"the evaluations differ in {name}: {old} before, {new} after; repeat one with the other's")


def evaluate(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    verifier: Verifier,
    *,
    k: int,
    temperature: float,
    top_p: float = 1.0,
    max_tokens: int,
    seed: int,
    batch_size: int,
    greedy: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Draw k samples of every prompt, and a greedy answer, and judge them.

    The random stream of a prompt depends on the seed and the prompt alone, so two models that are evaluated with the
    same seed share their luck and a paired comparison gains from it.

    Args:
        prompts: Problems, each with an answer.
        sampler: Writes the samples.
        verifier: Judges them.
        k: Samples for each problem.
        temperature: Of the k samples, above 0.
        top_p: Of the k samples.
        max_tokens: Length limit of an answer.
        seed: Of the samples.
        batch_size: Sequences decoded together.
        greedy: Whether to draw the likeliest answer too.
        progress: Called with (answers written, answers in all).

    Raises:
        DataError: No prompts, or prompts without an answer.
    """
    unanswered = [prompt.id for prompt in prompts if prompt.answer is None]
    if not prompts or unanswered:
        named = f"; {len(unanswered)} have none, e.g. {unanswered[0]}" if unanswered else ""
        raise DataError(f"evaluation needs problems with answers, got {len(prompts)}{named}")
    if k < 1 or temperature <= 0 or batch_size < 1:
        raise ConfigError(
            f"need k >= 1, temperature > 0 (the greedy answer comes besides) and batch_size >= 1, got {k}, "
            f"{temperature} and {batch_size}"
        )
    from omniopd.generation import SampleRequest

    started = time.perf_counter()
    total = len(prompts) * (k + greedy)
    done = 0

    def draw(count: int, at_temperature: float) -> Iterator[tuple[_Verdict, ...]]:
        nonlocal done
        per_call = max(1, _BATCHES_PER_CALL * batch_size // count)
        for first in range(0, len(prompts), per_call):
            part = prompts[first : first + per_call]
            requests = [
                SampleRequest(
                    token_ids=prompt.token_ids,
                    num_samples=count,
                    max_tokens=max_tokens,
                    temperature=at_temperature,
                    top_p=top_p if at_temperature > 0 else 1.0,
                    seed=_prompt_seed(seed, prompt.id),
                )
                for prompt in part
            ]
            for prompt, samples in zip(part, sampler.sample(requests, batch_size=batch_size), strict=True):
                yield tuple(_Verdict.of(sample, prompt, verifier) for sample in samples)
            done += len(part) * count
            if progress is not None:
                progress(done, total)

    drawn = list(draw(k, temperature))
    likeliest = list(draw(1, 0.0)) if greedy else None
    return EvalResult(
        prompt_ids=tuple(prompt.id for prompt in prompts),
        k=k,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        correct=tuple(tuple(v.is_correct for v in row) for row in drawn),
        lengths=tuple(tuple(v.length for v in row) for row in drawn),
        truncated=tuple(tuple(v.is_truncated for v in row) for row in drawn),
        greedy_correct=None if likeliest is None else tuple(row[0].is_correct for row in likeliest),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What is kept of one sample."""

    is_correct: bool
    length: int
    is_truncated: bool

    @classmethod
    def of(cls, sample: Sample, prompt: Prompt, verifier: Verifier) -> _Verdict:
        assert prompt.answer is not None
        is_truncated = sample.finish_reason == FinishReason.LENGTH
        return cls(bool(verifier(sample.text, prompt.answer)), len(sample.token_ids), is_truncated)


def run_eval_command(
    model: str,
    data: str,
    *,
    k: int,
    temperature: float,
    max_tokens: int | None = None,
    num_problems: int,
    greedy: bool = True,
    compare_with: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    verifier: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    top_p: float = 1.0,
    split: str = "test",
    max_prompt_tokens: int = 2048,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model as `omniopd eval` does, and return the result as JSON-able values. Prints nothing.

    Settings that a run file has too (`verifier`, `prompt_template`, ...) mean the same here.

    Args:
        model: A model folder, a Hugging Face name, or `mini-math:student|teacher`.
        data: As `load_rows` takes it; the first `num_problems` rows are used.
        max_tokens: Length limit of an answer; None: that of the earlier result, else `DEFAULT_MAX_TOKENS`, or half of
            a model's context when that is less. Prompts that then do not fit are left out and counted.
        compare_with: The result file of an earlier evaluation, or another model to evaluate the same way. It is the
            `before` of the comparison.
        output: Where to write the result, for a later `compare_with`.
        progress: As in `evaluate`, for one model after the other.

    Raises:
        ConfigError: A setting that cannot be used, or nothing to judge with.
        DataError: The data cannot be read, or the two evaluations cannot be compared.
    """
    dataset = load_rows(data, split=split, max_prompts=num_problems)
    judge = get_verifier(verifier, source=data, has_answers=dataset.has_answers)
    if judge is None:
        raise ConfigError(f"nothing judges the answers of {data!r} (verifier {verifier!r}); it needs an answer column")
    earlier: EvalResult | None = None
    if compare_with is not None and compare_with.is_file():
        # Checked before the model runs: a wrong file should not cost an evaluation.
        earlier = read_result(compare_with)
        max_tokens = earlier.max_tokens if max_tokens is None else max_tokens
        _require_settings(earlier, k=k, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    template = None if chat_template is None else read_chat_template(chat_template)
    limit = _default_max_tokens(model) if max_tokens is None else max_tokens
    if output is not None:
        _require_writable(output)

    def measure(name: str) -> tuple[EvalResult, int]:
        from omniopd.generation import load_sampler
        from omniopd.models import resolve_model, room_for_prompts

        sampler = load_sampler(resolve_model(name), device=device, dtype=dtype)
        prompt_set = build_prompts(
            dataset,
            sampler.tokenizer,
            prompt_template=prompt_template,
            system_prompt=system_prompt,
            max_prompt_tokens=room_for_prompts(sampler.model.config, limit, max_prompt_tokens),
            chat_template=template,
        )
        result = evaluate(
            prompt_set.prompts,
            sampler,
            judge,
            k=k,
            temperature=temperature,
            top_p=top_p,
            max_tokens=limit,
            seed=seed,
            batch_size=batch_size,
            greedy=greedy,
            progress=progress,
        )
        return result, prompt_set.too_long

    if compare_with is not None and earlier is None:
        earlier, _ = measure(str(compare_with))
    result, too_long = measure(model)
    report: dict[str, Any] = {"model": model, "data": data, "too_long": too_long, **result.summary()}
    report["length_quantiles"] = dict(zip(map(str, QUANTILES), result.length_quantiles(), strict=True))
    if result.num_problems > 1:
        interval = mean_interval(result.problem_means, seed=seed)
        report["ci95"] = [interval.low, interval.high]
    if earlier is not None:
        report["comparison"] = {"with": str(compare_with), **compare(earlier, result, seed=seed).summary()}
    report["result"] = result.to_json()
    if output is not None:
        _write_json(output, report)
    return report


def _default_max_tokens(model: str) -> int:
    from transformers import AutoConfig

    from omniopd.models import context_length, resolve_model

    try:
        config = AutoConfig.from_pretrained(resolve_model(model))
    except (OSError, ValueError):
        return DEFAULT_MAX_TOKENS  # Loading the model explains what is wrong with it.
    context = context_length(config)
    return DEFAULT_MAX_TOKENS if context is None else min(DEFAULT_MAX_TOKENS, context // 2)


def _require_writable(path: Path) -> None:
    """Raise RunError now rather than after the whole evaluation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise RunError(f"cannot write the result to {path}: {error.strerror}; give another file") from error


def read_result(path: Path) -> EvalResult:
    """Read an evaluation that `run_eval_command` or a run wrote. Raises DataError when the file holds none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the evaluation {path}: {error}") from error
    result = stored.get("result", stored) if isinstance(stored, dict) else None
    if not isinstance(result, dict) or "correct" not in result:
        raise DataError(
            f"{path} holds no evaluation; expected what `omniopd eval --output` wrote, or eval_*.json of a run"
        )
    try:
        return EvalResult.from_json(result)
    except TypeError as error:
        raise DataError(f"{path} holds an incomplete evaluation: {error}") from error


def _prompt_seed(seed: int, prompt_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()[:6], "big")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
