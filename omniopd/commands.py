"""What each command does. Everything heavier than the standard library is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omniopd.score_file import ScoreSummary
    from omniopd.teachers.cache import Stats


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
    from omniopd.run import run_training
    from omniopd.spending import spending_notice

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
    # Without one, answers to rows that are not written yet would be bought again.
    ledger = args.ledger or args.output.with_name(f"{args.output.name}.ledger.sqlite")
    if args.price is not None:
        options["price"] = {"input_usd_per_mtok": args.price[0], "output_usd_per_mtok": args.price[1]}
    options |= {"ledger": ledger, "budget_usd": args.budget_usd, "tokenizer_path": args.tokenizer}
    options |= {"budget_tokens": args.budget_tokens, "budget_calls": args.budget_calls, "batch": args.batch}
    options |= {"max_concurrency": args.max_concurrency}
    with ChunkRewarder(
        teacher=args.teacher,
        teacher_options=options,
        similarity=args.similarity,
        num_continuations=args.num_continuations,
        chunk_words=args.chunk_words,
        max_chunks=args.max_chunks,
    ) as rewarder:
        summary = score_file(
            args.input,
            args.output,
            rewarder,
            resume=not args.overwrite,
            keep_continuations=args.keep_continuations,
            retry_failed=args.retry_failed,
        )
    print(describe_scores(summary))
    print(args.output)
    return 0


def describe_scores(summary: ScoreSummary) -> str:
    """Return what scoring a file came to, for a person."""
    from omniopd.progress import format_seconds, format_usd
    from omniopd.score_file import LOST

    resumed = f", {summary.rows_resumed:,} of them from an earlier call" if summary.rows_resumed else ""
    mean = "none" if summary.mean_score is None else f"{summary.mean_score:.3f}"
    lines = [f"{summary.rows:,} rows{resumed}; {summary.chunks:,} chunks scored now, mean score {mean}"]
    if summary.missing:
        lines.append(
            "without a score: " + ", ".join(f"{count} {why}" for why, count in sorted(summary.missing.items()))
        )
    if any(summary.missing.get(why) for why in LOST):
        lines.append("requests failed: the same command with --retry-failed asks for those rows again")
    usage = summary.usage
    lines.append(
        f"{usage.requests:,} requests ({usage.cached_requests:,} from the ledger), {usage.input_tokens:,} tokens in, "
        f"{usage.output_tokens:,} out, cost {format_usd(usage.cost_usd)}, {format_seconds(summary.seconds)}"
    )
    if usage.reasoning_tokens:
        lines.append(f"{usage.reasoning_tokens:,} of the tokens out were hidden thinking")
    if usage.unanswered_requests:
        lines.append(f"{usage.unanswered_requests:,} requests were never answered and may have been billed")
    return "\n".join(lines)


def scores_write(args: argparse.Namespace) -> int:
    """Write down what an open-weight teacher says of the data's own responses."""
    from omniopd.overrides import is_override, load_config
    from omniopd.precompute import StoredKind, describe_precomputed, precompute
    from omniopd.progress import RunProgress

    kind = StoredKind(top_k=args.top_k, states=args.states, dtype=args.dtype, batch=args.batch)
    files = [word for word in args.settings if not is_override(word)]
    words = [word for word in args.settings if is_override(word)]
    config = load_config(files, words, flags=_train_flags(args))
    with RunProgress() as display:
        done = precompute(config, args.out, kind, say=display.message, progress=partial(display.phase, "answers"))
    print(describe_precomputed(done))
    return 0


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
        if card.price:
            price = f"prices of {card.price.as_of}"
        else:
            price = "prices from litellm's table, if installed" if card.price_table else "prices unknown"
        print(f"{card.id:<{width}}  {card.can.continuations[0]:<11}  {card.base_url or '-':<48}  {key}; {price}")
    return 0


def teachers_show(args: argparse.Namespace) -> int:
    """Print one card as YAML, with every default."""
    import yaml

    from omniopd.teachers.cards import find_card

    card = find_card(args.name)
    print(yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    return 0


def teachers_check(args: argparse.Namespace) -> int:
    """Probe a teacher in every way that is possible and print what it does."""
    from omniopd.inputs import check_text_teacher, raw_ways
    from omniopd.teachers.probe import describe_probe

    result = check_text_teacher(
        args.spec,
        continuation=args.continuation,
        tokenizer=args.tokenizer,
        temperature=args.temperature,
        extra_body=_mapping(args.extra_body, "--extra-body"),
    )
    print(describe_probe(result))
    if args.tokenizer is None and (raw := raw_ways(args.spec)):
        print(f"not tried: {', '.join(raw)}; give the folder of the teacher's tokenizer with --tokenizer")
    return 0 if result.chosen else 1


def _mapping(text: str | None, flag: str) -> dict[str, Any] | None:
    import yaml

    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} is no mapping; expected e.g. {flag} '{{reasoning_effort: none}}'")
    return value


def estimate(args: argparse.Namespace) -> int:
    """Print what a run would ask of its teacher and what that costs."""
    from omniopd.dry_run import estimate as estimate_config
    from omniopd.overrides import is_override, load_config

    files = [word for word in args.settings if not is_override(word)]
    words = [word for word in args.settings if is_override(word)]
    print(estimate_config(load_config(files, words, flags=_train_flags(args))))
    return 0


def preflight(args: argparse.Namespace) -> int:
    """Check a run's teachers on fresh rollouts of its student, and print what they can teach."""
    from omniopd.diagnosis.preflight_report import PreflightSettings, describe_preflight
    from omniopd.overrides import is_override, load_config
    from omniopd.preflight import run_preflight
    from omniopd.run_folder import write_json_atomic

    files = [word for word in args.settings if not is_override(word)]
    words = [word for word in args.settings if is_override(word)]
    settings = PreflightSettings(num_prompts=args.prompts, num_rollouts=args.rollouts, asks_for_text=not args.no_text)
    found = run_preflight(load_config(files, words, flags=_train_flags(args)), settings)
    print(describe_preflight(found))
    if args.json is not None:
        write_json_atomic(args.json, found.to_json())
    return 0


def cache_stats(args: argparse.Namespace) -> int:
    """Print what a ledger holds and what it cost."""
    from omniopd.teachers.cache import stats

    print(describe_ledger(stats(ledger_file(args.ledger))))
    return 0


def describe_ledger(held: Stats) -> str:
    """Return what a ledger holds, for a person."""
    from omniopd.progress import format_usd

    spent = held.spent
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in held.by_reason)
    lines = [
        f"{held.path}, {held.size_bytes / 2**20:.1f} MiB",
        f"{held.samples:,} samples of {held.keys:,} requests{': ' + reasons if reasons else ''}",
        f"{held.calls:,} calls, {spent.input_tokens:,} tokens in ({spent.cached_input_tokens:,} from the provider's "
        f"cache), {spent.output_tokens:,} out ({spent.reasoning_tokens:,} of them hidden thinking), cost "
        f"{format_usd(spent.cost_usd) if spent.requests else '$0.00'}",
    ]
    if spent.unanswered_requests:
        lines.append(
            f"{spent.unanswered_requests:,} requests were never answered and may have been billed: at most "
            f"{format_usd(held.possible_usd)}, {held.possible_tokens:,} tokens"
        )
    if held.in_flight:
        lines.append(f"{held.in_flight:,} requests are under way")
    lines += [
        f"  {one.teacher}: {one.samples:,} samples, {one.calls:,} calls, {format_usd(one.cost_usd)}"
        for one in held.teachers
    ]
    return "\n".join(lines)


def cache_gc(args: argparse.Namespace) -> int:
    """Delete samples from a ledger; bills stay."""
    from omniopd.teachers.cache import gc

    if args.older_than_days is None and args.teacher is None and not args.unusable:
        raise ConfigError(
            "nothing says what to delete; give --older-than-days DAYS, --teacher ID, --unusable, or several of them"
        )
    done = gc(
        ledger_file(args.ledger),
        older_than_days=args.older_than_days,
        teacher=args.teacher,
        unusable=args.unusable,
        dry_run=args.dry_run,
    )
    would = "would be deleted" if done.is_dry_run else f"deleted, {done.freed_bytes / 2**20:.1f} MiB freed"
    print(f"{done.samples:,} samples {would}; {done.kept:,} stay, and so do all bills")
    return 0


def cache_export(args: argparse.Namespace) -> int:
    """Write every sample of a ledger as a line of JSON."""
    from omniopd.teachers.cache import export

    done = export(ledger_file(args.ledger), args.output)
    print(f"{done.samples:,} samples of {done.calls:,} calls\n{done.path}")
    return 0


def ledger_file(path: Path) -> Path:
    """Return the ledger that a path names: the file itself, or the one in a run folder. Raises ConfigError."""
    from omniopd.run_folder import RunFolder

    ledgers = [files.ledger for files in RunFolder(path).teachers] if path.is_dir() else [path]
    if len(ledgers) > 1:
        raise ConfigError(f"{path} has the ledgers of several teachers; give one: {', '.join(map(str, ledgers))}")
    file = ledgers[0] if ledgers else RunFolder(path).teacher().ledger
    if not file.is_file():
        raise ConfigError(f"there is no ledger at {file}; give a ledger file or the folder of a run")
    return file


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
