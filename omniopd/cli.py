"""The command line: parse the words, then hand over to `omniopd.commands`. Loads no third-party package itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from omniopd import __version__, commands
from omniopd.errors import OmniOPDError

if TYPE_CHECKING:
    # The type has no public name.
    Subparsers: TypeAlias = argparse._SubParsersAction[Any]

_DESCRIPTION = """\
Train a student model on its own text, from a teacher that is only prompted or one with open weights.

  omniopd train quickstart                                     a small run that needs no key and no GPU
  omniopd train --teacher openai:gpt-4o --student Qwen/Qwen3-1.7B --data prompts.jsonl
  omniopd train opd-reverse-kl teacher.spec=hf:Qwen/Qwen3-4B student.model=Qwen/Qwen3-0.6B data.train=prompts.jsonl
  omniopd train my.yaml learner.learning_rate=2e-6 --dry-run   what would happen, and what it would cost
  omniopd preflight my.yaml                                    whether this teacher suits this student
"""

_TRAIN = """\
Settings come from run files, from left to right, then from `key.path=value` words, whose values are read as YAML:

  omniopd train quickstart steps=100 method.supervision.num_continuations=6
  omniopd train base.yaml mine.yaml teacher.spec=vllm:Qwen/Qwen3-32B@http://host:8001/v1
  omniopd train my.yaml preset=paper          the published settings beneath the file

A FILE is a path, or the name of a run file that comes with omniopd (`omniopd configs list`). Without one, --teacher,
--student and --data are enough. The run is written to OUTPUT/NAME; a folder that exists needs --resume or --overwrite.
"""

_SPEC = (
    "PROVIDER:MODEL[@BASE_URL], e.g. openai:gpt-4o or vllm:Qwen/Qwen3-32B@http://host:8001/v1; keys come from the "
    "environment"
)

_SCORE = """\
Each line of IN is {"prompt": ..., "response": ...}; the prompt is text or a list of messages. Each line of OUT is the
same row with `chunks`: their place in the response, their text and their score. Stopped half-way, the same command
goes on where it was; with --ledger it pays for nothing twice.
"""


_WRITE_SCORES = """\
Asks an open-weight teacher (hf: or vllm:) once about the worked responses of the training data and writes down what it
says, for any number of runs that learn from them. The run file is that of such a run; what it needs next is printed.
Stopped half-way, the same command goes on where it was.

  omniopd scores write opd-precomputed --out teacher-scores
  omniopd scores write my.yaml teacher.spec=hf:Qwen/Qwen3-4B --out teacher-states --states
"""

_TAKES_SETTINGS = ("train", "estimate", "preflight", "scores")


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviated options and points to the settings when an option is not known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)
        # Every parser takes it, so it may stand before and after the command; SUPPRESS keeps the one from undoing the
        # other.
        self.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error came from"
        )

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help explains the options\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. Each sets `run` to the function in `omniopd.commands`."""
    parser = _Parser(prog="omniopd", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"omniopd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(subparsers)
    _add_estimate(subparsers)
    _add_preflight(subparsers)
    _add_eval(subparsers)
    _add_score(subparsers)
    _add_scores(subparsers)
    _add_report(subparsers)
    _add_serve(subparsers)
    _add_teachers(subparsers)
    _add_cache(subparsers)
    _add_configs(subparsers)
    return parser


def _add_train(subparsers: Subparsers) -> None:
    train = subparsers.add_parser("train", help="train a student", description="Train a student.\n\n" + _TRAIN)
    _add_run(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and show settings, objective, prompts and cost; no network, no GPU",
    )
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    existing.add_argument("--overwrite", action="store_true", help="delete an existing run folder first")
    train.set_defaults(run=commands.train)


def _add_run(parser: argparse.ArgumentParser) -> None:
    """What names a run, for the commands that take one."""
    parser.add_argument("settings", nargs="*", metavar="FILE|key.path=value", help="run files and single settings")
    parser.add_argument("--teacher", metavar="SPEC", help=_SPEC)
    parser.add_argument("--student", metavar="NAME", help="a local folder or a Hugging Face name (student.model)")
    parser.add_argument("--data", metavar="FILE", help="prompts: .jsonl, .json, .parquet or hf:NAME (data.train)")
    parser.add_argument("--run-name", metavar="NAME", help="name of the run folder (name)")


def _add_estimate(subparsers: Subparsers) -> None:
    estimate = subparsers.add_parser(
        "estimate",
        help="what a run would ask and cost, before anything is spent",
        description="Calls, tokens, USD and time of a run, each as a range. Sends nothing.",
    )
    _add_run(estimate)
    estimate.set_defaults(run=commands.estimate)


def _add_preflight(subparsers: Subparsers) -> None:
    preflight = subparsers.add_parser(
        "preflight",
        help="whether this teacher can teach this student on these prompts",
        description="Draw rollouts of a run's first prompts and see what its teachers make of them: overlap and gap "
        "where distributions can be had, endings and text where a teacher is asked. Spends money where that does; its "
        "answers go into the ledger of the run, whose budget holds for both.",
    )
    _add_run(preflight)
    preflight.add_argument("--prompts", type=int, default=64, metavar="N", help="default: %(default)s")
    preflight.add_argument("--rollouts", type=int, default=4, metavar="N", help="of each prompt (default: %(default)s)")
    preflight.add_argument("--no-text", action="store_true", help="ask no text teacher, so that nothing is paid")
    preflight.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    preflight.set_defaults(run=commands.preflight)


def _add_cache(subparsers: Subparsers) -> None:
    cache = subparsers.add_parser(
        "cache",
        help="look into a ledger of paid answers",
        description="The ledger keeps every paid answer and every bill; nothing in it is asked again.",
    )
    actions = cache.add_subparsers(dest="action", metavar="ACTION", required=True)
    stats = actions.add_parser("stats", help="what it holds and what it cost")
    collect = actions.add_parser("gc", help="delete answers; bills stay")
    export = actions.add_parser("export", help="write all answers as JSON lines")
    for action, run in ((stats, commands.cache_stats), (collect, commands.cache_gc), (export, commands.cache_export)):
        action.add_argument("ledger", type=Path, metavar="LEDGER|RUN", help="a ledger file or a run folder")
        action.set_defaults(run=run)
    collect.add_argument("--older-than-days", type=float, metavar="DAYS", help="answers bought before that")
    collect.add_argument("--teacher", metavar="ID", help="answers of one teacher, e.g. openai:gpt-4o")
    collect.add_argument("--unusable", action="store_true", help="answers without usable text; they may be asked again")
    collect.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.jsonl")


def _add_eval(subparsers: Subparsers) -> None:
    evaluate = subparsers.add_parser(
        "eval",
        help="measure a model on problems with answers",
        description="Measure a model on problems with answers: the mean over K samples, pass@K and greedy accuracy.",
    )
    evaluate.add_argument("model", metavar="MODEL", help="a model folder, a Hugging Face name or a run folder's final/")
    evaluate.add_argument("--data", required=True, metavar="FILE", help="problems with answers, as data.eval")
    evaluate.add_argument("-k", type=int, default=16, help="samples for each problem (default: %(default)s)")
    evaluate.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    evaluate.add_argument("--max-tokens", type=int, help="of each answer (default: 1024, or half of the context)")
    evaluate.add_argument("--num-problems", type=int, default=200, help="the first so many (default: %(default)s)")
    evaluate.add_argument(
        "--compare", metavar="RESULT|MODEL", help="another model, or the JSON of an earlier evaluation"
    )
    evaluate.add_argument("--split", default="test", help="for hf: data (default: %(default)s)")
    evaluate.add_argument("--prompt-template", metavar="TEXT", help="text with {prompt}, put around every problem")
    evaluate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    evaluate.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the result here as JSON")
    evaluate.set_defaults(run=commands.evaluate)


def _add_score(subparsers: Subparsers) -> None:
    score = subparsers.add_parser(
        "score",
        help="reward answers that are already there",
        description="Reward answers that are already there by what a teacher would have written. Spends money.\n\n"
        + _SCORE,
    )
    score.add_argument("input", type=Path, metavar="IN.jsonl")
    score.add_argument("--teacher", required=True, metavar="SPEC", help=_SPEC)
    score.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.jsonl")
    score.add_argument(
        "--similarity", default="edit", help="e.g. edit, rouge1, '0.5*edit + 0.5*numbers' (default: edit)"
    )
    score.add_argument("--num-continuations", type=int, default=4, help="for each chunk (default: %(default)s)")
    score.add_argument("--chunk-words", type=int, default=12, help="length of a chunk (default: %(default)s)")
    score.add_argument("--max-chunks", type=int, help="at most so many chunks of one answer (default: all)")
    score.add_argument("--temperature", type=float, default=1.0, help="of the teacher (default: %(default)s)")
    _add_continuation(score)
    score.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="the teacher's, for --continuation completions")
    score.add_argument(
        "--ledger",
        type=Path,
        metavar="FILE",
        help="keep answers here, so that none is paid twice (default: beside OUT)",
    )
    score.add_argument(
        "--price", type=float, nargs=2, metavar=("IN", "OUT"), help="of the teacher, in USD for a million tokens"
    )
    score.add_argument("--budget-usd", type=float, help="stop before this is exceeded; needs a known price")
    score.add_argument("--budget-tokens", type=int, help="stop before so many are read and written")
    score.add_argument("--budget-calls", type=int, help="stop before so many HTTP requests")
    score.add_argument("--max-concurrency", type=int, default=16, help="requests under way (default: %(default)s)")
    score.add_argument("--batch", action="store_true", help="ask at the half-price endpoint, which may take a day")
    score.add_argument("--keep-continuations", action="store_true", help="write the teacher's texts, too")
    score.add_argument("--retry-failed", action="store_true", help="ask again for rows in which a request failed")
    score.add_argument("--overwrite", action="store_true", help="start afresh instead of going on with OUT.jsonl")
    score.set_defaults(run=commands.score)


def _add_scores(subparsers: Subparsers) -> None:
    scores = subparsers.add_parser(
        "scores",
        help="ask an open-weight teacher once, for many runs",
        description="What an open-weight teacher says of answers that never change, in a folder.",
    )
    actions = scores.add_subparsers(dest="action", metavar="ACTION", required=True)
    write = actions.add_parser(
        "write", help="ask, and write it down", description="Write a teacher down.\n\n" + _WRITE_SCORES
    )
    _add_run(write)
    write.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where it is kept; may be there")
    kept = write.add_mutually_exclusive_group()
    kept.add_argument(
        "--top-k", type=int, metavar="K", help="its likeliest tokens at each place (default: what the loss reads)"
    )
    kept.add_argument("--states", action="store_true", help="its hidden states, for whole distributions; hf: only")
    write.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the states (default: that of its output layer)"
    )
    write.add_argument(
        "--batch", type=int, metavar="N", help="answers that a kill loses at most (default: 64, of states 16)"
    )
    write.set_defaults(run=commands.scores_write)


def _add_continuation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--continuation",
        default="auto",
        choices=("auto", "tokens", "completions", "prefill", "chat", "chat-turn", "structured"),
        help="how a partial answer is handed over (default: what the teacher's card says)",
    )


def _add_report(subparsers: Subparsers) -> None:
    report = subparsers.add_parser(
        "report", help="write a run's report.html", description="Write RUN/report.html: one file, no network needed."
    )
    report.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    report.set_defaults(run=commands.report)


def _add_serve(subparsers: Subparsers) -> None:
    serve = subparsers.add_parser(
        "serve",
        help="serve an open-weight teacher",
        description="Serve a model folder as a teacher over an OpenAI-compatible API, on this machine.",
    )
    serve.add_argument("model", metavar="MODEL_DIR", help="a model folder, or mini-math:teacher")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    serve.add_argument(
        "--model-name", metavar="NAME", help="what requests have to ask for (default: the folder's name)"
    )
    serve.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    serve.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    serve.add_argument("--announce", type=Path, metavar="FILE", help="write the base URL here once requests are taken")
    serve.add_argument("--exit-with", type=int, metavar="PID", help="stop when that process ends")
    serve.set_defaults(run=commands.serve)


def _add_teachers(subparsers: Subparsers) -> None:
    teachers = subparsers.add_parser(
        "teachers",
        help="the teachers that omniopd knows",
        description="The teachers that omniopd knows: teacher cards.",
    )
    actions = teachers.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="all cards").set_defaults(run=commands.teachers_list)
    show = actions.add_parser("show", help="one card")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(run=commands.teachers_show)
    check = actions.add_parser("check", help="ask a few short questions and say what the teacher really does")
    check.add_argument("spec", metavar="SPEC", help=_SPEC)
    _add_continuation(check)
    check.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="the teacher's, to try raw prompts too")
    check.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    check.add_argument("--extra-body", metavar="YAML", help="fields for every request, e.g. '{reasoning_effort: none}'")
    check.set_defaults(run=commands.teachers_check)


def _add_configs(subparsers: Subparsers) -> None:
    configs = subparsers.add_parser(
        "configs", help="the run files that come with omniopd", description="The run files that come with omniopd."
    )
    actions = configs.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="names and what each is for").set_defaults(run=commands.configs_list)
    show = actions.add_parser("show", help="print one, to copy from")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(run=commands.configs_show)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. What takes settings may mix options, files and settings in any order."""
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    # argparse stops collecting positional words at the first option that follows one.
    is_setting = args.command in _TAKES_SETTINGS and not any(word.startswith("-") for word in rest)
    if rest and not is_setting:
        unknown = next((word for word in rest if word.startswith("-")), rest[0])
        hint = "; settings are written key.path=value, without dashes" if args.command in _TAKES_SETTINGS else ""
        parser.error(f"{args.command}: unknown argument {unknown!r}{hint}")
    if rest:
        args.settings += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 an error that is explained, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    args.argv = words
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except OmniOPDError as error:
        if "traceback" in args:
            raise
        print(f"omniopd: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has enough of it. What Python still holds back must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        hints = {
            "train": "; the same command with --resume goes on from the last checkpoint",
            "score": "; finished rows are kept and the same command goes on from there",
            "scores": "; what is written stays and the same command goes on from there",
        }
        hint = hints.get(args.command, "")
        print(f"\nomniopd: interrupted{hint}", file=sys.stderr)
        return 130
    return code
