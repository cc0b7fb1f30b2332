"""What each command does. Everything heavier than the standard library is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.errors import DataError

if TYPE_CHECKING:
    from omniopd.score_file import ScoreSummary
    from omniopd.teachers.base import TeacherAnswer


def train(args: argparse.Namespace) -> int:
    """Train, or show what would happen with `--dry-run`."""
    from omniopd.overrides import is_override, load_config

    files = [word for word in args.settings if not is_override(word)]
    words = [word for word in args.settings if is_override(word)]
    config = load_config(files, words, flags=_train_flags(args))
    if args.dry_run:
        from omniopd.dry_run import dry_run

        print(dry_run(config))
        return 0
    from omniopd.dry_run import spending_notice
    from omniopd.run import run_training

    if notice := spending_notice(config):
        print(notice, file=sys.stderr)
    folder = run_training(config, resume=args.resume, overwrite=args.overwrite, argv=["omniopd", *args.argv])
    print(describe_result(folder))
    return 0


def _train_flags(args: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    flags: dict[str, Mapping[str, Any]] = {}
    if args.teacher:
        # A run file may start a teacher of its own; the one named here takes its place, unless the same line starts it.
        asks_to_serve = any(word.startswith("teacher.serve=") for word in args.settings)
        teacher = {"spec": args.teacher} if asks_to_serve else {"spec": args.teacher, "serve": None}
        flags[f"--teacher {args.teacher}"] = {"teacher": teacher}
    if args.student:
        flags[f"--student {args.student}"] = {"student": {"model": args.student}}
    if args.data:
        flags[f"--data {args.data}"] = {"data": {"train": args.data}}
    if args.run_name:
        flags[f"--run-name {args.run_name}"] = {"name": args.run_name}
    return flags


def describe_result(folder: Path) -> str:
    """Return the lines that end a run: what it gained, what it cost, where it lies."""
    from omniopd.report.build import render_summary
    from omniopd.run_folder import RunFolder, read_json

    run = RunFolder(folder)
    lines = [f"model   {run.final}", f"report  {run.report}"]
    lines += [render_summary(read_json(run.summary))] if run.summary.is_file() else []
    return "\n".join(lines)


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a model and print its figures."""
    from omniopd.evaluation import run_eval_command
    from omniopd.progress import RunProgress

    with RunProgress() as display:
        result = run_eval_command(
            args.model,
            args.data,
            k=args.k,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            num_problems=args.num_problems,
            compare_with=Path(args.compare) if args.compare else None,
            output=args.output,
            device=args.device,
            seed=args.seed,
            split=args.split,
            prompt_template=args.prompt_template,
            progress=lambda done, total: display.phase("problems", done, total),
        )
    print(describe_evaluation(result))
    return 0


def describe_evaluation(result: Mapping[str, Any]) -> str:
    """Return the figures of one evaluation for a person."""
    interval = result.get("ci95")
    spread = f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    lines = [f"avg@{result['k']}   {result['avg_at_k']:.1%}{spread}", f"pass@{result['k']}  {result['pass_at_k']:.1%}"]
    if result.get("greedy") is not None:
        lines.append(f"greedy   {result['greedy']:.1%}")
    lines.append(
        f"{result['num_problems']} problems, {result['length_mean']:.0f} tokens on average, "
        f"{result['truncated']:.1%} cut off"
    )
    if result.get("too_long"):
        lines.append(f"{result['too_long']} problems were left out: their prompts are too long")
    if comparison := result.get("comparison"):
        gain = comparison["avg_at_k"]
        low, high = gain["ci95"]
        lines.append(
            f"against {comparison['with']}: {gain['before']:.1%} -> {gain['after']:.1%}, "
            f"{100 * gain['gain']:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
        )
    return "\n".join(lines)


def score(args: argparse.Namespace) -> int:
    """Score a file of finished answers and say what came out."""
    from omniopd.api import ChunkRewarder
    from omniopd.score_file import score_file

    options: dict[str, Any] = {"continuation": args.continuation, "temperature": args.temperature}
    options |= {"ledger": args.ledger, "budget_usd": args.budget_usd, "tokenizer_path": args.tokenizer}
    with ChunkRewarder(
        teacher=args.teacher,
        teacher_options=options,
        similarity=args.similarity,
        num_continuations=args.num_continuations,
        chunk_words=args.chunk_words,
        max_chunks=args.max_chunks,
    ) as rewarder:
        summary = score_file(args.input, args.output, rewarder, resume=not args.overwrite)
    print(describe_scores(summary))
    print(args.output)
    return 0


def describe_scores(summary: ScoreSummary) -> str:
    """Return what scoring a file came to, for a person."""
    from omniopd.progress import format_seconds, format_usd

    resumed = f", {summary.rows_resumed:,} of them from an earlier call" if summary.rows_resumed else ""
    mean = "none" if summary.mean_score is None else f"{summary.mean_score:.3f}"
    lines = [f"{summary.rows:,} rows{resumed}; {summary.chunks:,} chunks scored now, mean score {mean}"]
    if summary.missing:
        lines.append(
            "without a score: " + ", ".join(f"{count} {why}" for why, count in sorted(summary.missing.items()))
        )
    usage = summary.usage
    lines.append(
        f"{usage.requests:,} requests ({usage.cached_requests:,} from the ledger), {usage.input_tokens:,} tokens in, "
        f"{usage.output_tokens:,} out, cost {format_usd(usage.cost_usd)}, {format_seconds(summary.seconds)}"
    )
    return "\n".join(lines)


def report(args: argparse.Namespace) -> int:
    """Write the report of a run and print where it lies."""
    from omniopd.report.build import build_report

    print(build_report(args.folder))
    return 0


def serve(args: argparse.Namespace) -> int:
    """Serve a model folder until interrupted."""
    from omniopd.models import resolve_model
    from omniopd.serving.app import serve as serve_model

    serve_model(
        Path(resolve_model(args.model)),
        host=args.host,
        port=args.port,
        model_name=args.model_name,
        device=args.device,
        threads=args.threads,
        announce=args.announce,
        exit_with=args.exit_with,
    )
    return 0


def teachers_list(args: argparse.Namespace) -> int:
    """Print one line for each card."""
    from omniopd.teachers.cards import list_cards

    cards = list_cards()
    width = max(len(card.id) for card in cards)
    for card in cards:
        key = f"key from {card.api_key_env}" if card.api_key_env else "no key"
        price = f"prices of {card.price.as_of}" if card.price else "prices unknown"
        print(f"{card.id:<{width}}  {card.continuation:<11}  {card.base_url or '-':<34}  {key}; {price}")
    return 0


def teachers_show(args: argparse.Namespace) -> int:
    """Print one card as YAML, with every default."""
    import yaml

    from omniopd.teachers.cards import find_card

    card = find_card(args.name)
    print(yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    return 0


CHECK_MESSAGES = (("user", "Count from 1 to 20, one number a line."),)
CHECK_PREFIX = "1\n2\n3\n4\n"


def teachers_check(args: argparse.Namespace) -> int:
    """Send one small request and print what came back."""
    from omniopd.teachers.base import ContinuationRequest
    from omniopd.teachers.resolve import open_teacher
    from omniopd.types import Message

    request = ContinuationRequest(
        messages=tuple(Message(role=role, content=content) for role, content in CHECK_MESSAGES),
        prefix=CHECK_PREFIX,
        n=2,
        max_tokens=12,
    )

    async def ask() -> TeacherAnswer:
        teacher = open_teacher(args.spec, continuation=args.continuation, max_attempts=2)
        try:
            return (await teacher.continuations([request]))[0]
        finally:
            await teacher.aclose()

    started = time.perf_counter()
    answer = asyncio.run(ask())
    print(describe_check(answer, prefix=CHECK_PREFIX, seconds=time.perf_counter() - started))
    return 0 if any(c.text is not None for c in answer.continuations) else 1


def describe_check(answer: TeacherAnswer, *, prefix: str, seconds: float) -> str:
    """Return what a teacher made of the check, for a person."""
    from omniopd.progress import format_usd

    lines = [f"given     {prefix!r}"]
    for continuation in answer.continuations:
        if continuation.text is not None:
            note = f"   ({continuation.detail})" if continuation.detail else ""
            lines.append(f"went on   {continuation.text!r}{note}")
        else:
            lines.append(f"missing   {continuation.missing}: {continuation.detail}")
    usage = answer.usage
    lines.append(
        f"{usage.requests} requests, {usage.input_tokens} tokens in, {usage.output_tokens} out, {seconds:.2f} s, "
        f"cost {format_usd(usage.cost_usd)}"
    )
    return "\n".join(lines)


def configs_list(args: argparse.Namespace) -> int:
    """Print the name of each packaged run file with the first line of its comment."""
    from omniopd.overrides import list_configs

    configs = list_configs()
    if not configs:
        raise DataError("this installation holds no run files; install omniopd again, or give a path")
    width = max(map(len, configs))
    for name, path in configs.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('#').strip()}")
    return 0


def configs_show(args: argparse.Namespace) -> int:
    """Print a run file as it is."""
    from omniopd.overrides import find_config

    print(find_config(args.name).read_text(encoding="utf-8"), end="")
    return 0
