"""Rows of training and evaluation data, from files, the Hugging Face hub or mini-math. Renders and tokenises nothing.

A row is a conversation with, if the data has them, a reference answer, a reference response and the teacher to ask.
Every row knows the file and line it came from, so a bad one can be found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from omniopd.errors import ConfigError, DataError, MissingExtraError
from omniopd.types import Message, Value

PROMPT_COLUMNS = ("prompt", "messages")
COLUMNS = (*PROMPT_COLUMNS, "answer", "teacher_id", "domain")
GSM8K_COLUMNS = ("question", "answer")
GSM8K_MARK = "####"
ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
SOURCE_KINDS = "a .jsonl, .json, .parquet or .txt file, gsm8k:FILE, hf:OWNER/NAME[/CONFIG], or mini-math[:held-out]"

MINI_MATH_TRAIN = {"count": 4_000, "seed": 1}
MINI_MATH_HELD_OUT = {"count": 4_000, "seed": 20_000}
"""The problems that the mini-math models never read while they were built; training problems leave them out too."""

_MAX_NAMED_SKIPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Value):
    """One question."""

    messages: tuple[Message, ...]
    """Ends in a user turn."""
    answer: str | None = None
    """The reference answer; None when the data has none."""
    teacher_id: str | None = None
    """Which of several teachers is to be asked."""
    domain: str | None = None
    """What it is about; teachers can be chosen by it."""
    response: str | None = None
    """A worked reference response: the last assistant turn of the data, or the worked solution of GSM8K."""
    source: str
    """`file:line` (`file:item` where there are no lines), both counted from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The rows of one source, in its order."""

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    """(place, reason) of every malformed row that was left out."""

    @property
    def has_answers(self) -> bool:
        """Whether at least one row can be verified."""
        return any(row.answer is not None for row in self.rows)


class _BadRow(Exception):
    """Why one row cannot be used; never leaves this module."""


def load_rows(
    source: str,
    *,
    split: str = "train",
    max_prompts: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> Dataset:
    """Read the rows of `source`.

    Args:
        source: A .jsonl, .json, .parquet or .txt file (one question a line), `gsm8k:FILE`, `hf:OWNER/NAME[/CONFIG]`
            or a local dataset folder after `hf:`, `mini-math[?count=2000&seed=1]`, or `mini-math:held-out`.
            Columns: `prompt` (text or chat messages) or `messages`, and optionally `answer`, `teacher_id` and
            `domain`; other columns are ignored. Rows with `question` and an `answer` that has a `#### 42` line are
            read as GSM8K.
        split: For `hf:` data only.
        max_prompts: Stop after that many usable rows.
        on_bad_row: `stop` raises at the first malformed row; `skip` leaves it out and records it.

    Raises:
        DataError: Nothing at `source`, a malformed row under `stop`, or no usable row at all.
        MissingExtraError: pyarrow or datasets is needed and not installed.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; use stop or skip")
    if max_prompts is not None and max_prompts < 1:
        raise ConfigError(f"max_prompts is {max_prompts}; use 1 or more, or leave it out to read every row")
    skipped: list[tuple[str, str]] = []

    def usable() -> Iterator[Row]:
        for place, raw in _raw_rows(source, split):
            try:
                if isinstance(raw, _BadRow):
                    raise raw
                yield _row(raw, place, as_gsm8k=source.startswith("gsm8k:"))
            except _BadRow as reason:
                if on_bad_row == "stop":
                    raise DataError(f"{place}: {reason}. Mend the row, or set data.on_bad_row: skip") from None
                skipped.append((place, str(reason)))

    rows = tuple(islice(usable(), max_prompts))
    if not rows:
        named = "; ".join(f"{place}: {reason}" for place, reason in skipped[:_MAX_NAMED_SKIPS])
        raise DataError(f"{source!r} has no usable row ({len(skipped)} malformed{': ' + named if named else ''})")
    return Dataset(rows=rows, skipped=tuple(skipped))


def _raw_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, columns) of every row; a row that cannot even be read comes as its _BadRow."""
    if _is_mini_math(source):
        return _mini_math(source)
    if source.startswith("hf:"):
        return _hub(source.removeprefix("hf:"), split)
    path = _existing_file(source.removeprefix("gsm8k:"))
    readers = {".jsonl": _json_lines, ".json": _json_array, ".parquet": _parquet, ".txt": _text_lines}
    return readers[path.suffix](path)


def _existing_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    if path.is_file():
        raise DataError(f"{name!r} ends in {path.suffix or 'nothing'!r}; data is {SOURCE_KINDS}")
    if path.is_dir():
        raise DataError(f"{name!r} is a folder; name a file in it, or write hf:{name} for a saved dataset")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, [*siblings, "mini-math", "mini-math:held-out"], n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise DataError(f"there is no data file {name!r} (looked for {path.absolute()}). {hint}Data is {SOURCE_KINDS}")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for place, text in _lines(path):
        if isinstance(text, _BadRow):
            yield place, text
            continue
        try:
            yield place, json.loads(text.rstrip())
        except json.JSONDecodeError as error:
            yield place, _BadRow(f"not valid JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            yield place, _BadRow("not usable JSON (nested too deeply)")


def _text_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for place, text in _lines(path):
        yield place, text if isinstance(text, _BadRow) else {"prompt": text.strip()}


def _lines(path: Path) -> Iterator[tuple[str, str | _BadRow]]:
    """Yield the lines that are not blank. Split at newlines only: JSON text may hold other line separators."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield place, _BadRow(f"not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x})")
                continue
            if text.strip():
                yield place, text


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}){hint}") from error
    if not isinstance(data, list):
        raise DataError(f"{path} holds a JSON {_kind(data)}; expected a list of rows")
    for number, raw in enumerate(data, 1):
        yield f"{path}:{number}", raw


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs pyarrow: pip install 'omniopd[train]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=1024):
            for raw in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", raw


def _hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"reading hf:{name} needs datasets: pip install 'omniopd[train]'") from error
    path, config = name, None
    if not Path(name).is_dir() and name.count("/") == 2:
        path, _, config = name.rpartition("/")
    try:
        data = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            f"cannot load hf:{name}, split {split!r}: {first_line} ({type(error).__name__}). Expected "
            "hf:OWNER/NAME[/CONFIG] with a split that it has, and a connection to the hub or a cached copy"
        ) from error
    for number, raw in enumerate(data, 1):
        yield f"hf:{name}:{number}", raw


def _is_mini_math(source: str) -> bool:
    return source.partition("?")[0] in ("mini-math", "mini-math:held-out")


def _mini_math(source: str) -> Iterator[tuple[str, Any]]:
    from omniopd.worlds.mini_math import make_problems
    from omniopd.worlds.mini_math.world import solution

    name, _, query = source.partition("?")
    held_out = make_problems(MINI_MATH_HELD_OUT["count"], seed=MINI_MATH_HELD_OUT["seed"])
    if name == "mini-math:held-out":
        if query:
            raise DataError(f"{source!r}: the held-out problems are fixed and take no settings; use {name!r}")
        problems = held_out
    else:
        settings = MINI_MATH_TRAIN | _mini_math_settings(source, query)
        exclude = frozenset(problem.expression for problem in held_out)
        problems = make_problems(settings["count"], seed=settings["seed"], exclude=exclude)
    for number, problem in enumerate(problems, 1):
        worked = [
            {"role": "user", "content": problem.expression},
            {"role": "assistant", "content": solution(problem)},
        ]
        yield f"{name}:{number}", {"messages": worked, "answer": str(problem.answer)}


def _mini_math_settings(source: str, query: str) -> dict[str, int]:
    settings: dict[str, int] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in MINI_MATH_TRAIN or not value.isascii() or not value.isdigit():
            raise DataError(f"{source!r}: cannot use {key}={value}; expected e.g. mini-math?count=2000&seed=1")
        settings[key] = int(value)
    if query and not settings:
        raise DataError(f"{source!r}: cannot read {query!r}; expected e.g. mini-math?count=2000&seed=1")
    return settings


def _row(raw: Any, place: str, *, as_gsm8k: bool) -> Row:
    if not isinstance(raw, Mapping):
        raise _BadRow(f"expected an object with columns, got a JSON {_kind(raw)}")
    # Tables that mix row kinds fill the columns a row does not have with null.
    columns = {str(name): value for name, value in raw.items() if value is not None}
    if as_gsm8k or _looks_like_gsm8k(columns):
        return _gsm8k_row(columns, place, seen=raw)
    named = [name for name in PROMPT_COLUMNS if name in columns]
    if len(named) == 2:
        raise _BadRow("has both 'prompt' and 'messages'; keep one")
    if not named:
        raise _BadRow(_wrong_columns(raw, expected=COLUMNS))
    messages = _messages(columns[named[0]], named[0])
    response = None
    if messages[-1].role == "assistant":
        messages, response = messages[:-1], messages[-1].content
    if not messages or messages[-1].role != "user":
        last = messages[-1].role if messages else "nothing"
        raise _BadRow(f"column {named[0]!r} must ask with a user turn before any answer, but ends in {last}")
    return Row(
        messages=messages,
        answer=_answer(columns.get("answer")),
        teacher_id=_named(columns, "teacher_id"),
        domain=_domain(columns.get("domain")),
        response=response,
        source=place,
    )


def _looks_like_gsm8k(columns: Mapping[str, Any]) -> bool:
    answer = columns.get("answer")
    return (
        "question" in columns
        and not any(name in columns for name in PROMPT_COLUMNS)
        and isinstance(answer, str)
        and any(line.startswith(GSM8K_MARK) for line in answer.splitlines())
    )


def _gsm8k_row(columns: Mapping[str, Any], place: str, *, seen: Mapping[Any, Any]) -> Row:
    if any(name not in columns for name in GSM8K_COLUMNS):
        raise _BadRow(_wrong_columns(seen, expected=GSM8K_COLUMNS))
    worked = _text(columns["answer"], "answer")
    marked = [line.removeprefix(GSM8K_MARK) for line in worked.splitlines() if line.startswith(GSM8K_MARK)]
    if not marked or not marked[-1].strip():
        raise _BadRow(f"column 'answer' has no line '{GSM8K_MARK} NUMBER', which a GSM8K answer ends in")
    return Row(
        messages=(Message(role="user", content=_text(columns["question"], "question")),),
        answer=marked[-1].strip().replace(",", ""),
        teacher_id=_named(columns, "teacher_id"),
        domain=_domain(columns.get("domain")),
        response=worked,
        source=place,
    )


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role="user", content=_text(value, column)),)
    if not isinstance(value, list):
        raise _BadRow(f"column {column!r} is a {_kind(value)}; expected text or a list of chat messages")
    if not value:
        raise _BadRow(f"column {column!r} is an empty list; expected chat messages")
    return tuple(_message(turn, f"{column}[{i}]") for i, turn in enumerate(value))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise _BadRow(f"{where} is a {_kind(turn)}; expected an object with 'role' and 'content'")
    for key in ("role", "content"):
        if key not in turn:
            raise _BadRow(f"{where} has no {key!r}; it has {', '.join(map(str, turn)) or 'nothing'}")
    if turn["role"] not in ROLES:
        raise _BadRow(f"{where} has the role {turn['role']!r}; expected {', '.join(ROLES)}")
    return Message(role=turn["role"], content=_text(turn["content"], f"{where}.content"))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"column {where!r} is a {_kind(value)}; expected text")
    if not value.strip():
        raise _BadRow(f"column {where!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow(f"column {where!r} holds half of a surrogate pair, which no tokenizer can read") from None
    return value


def _named(columns: Mapping[str, Any], name: str) -> str | None:
    return _text(columns[name], name) if name in columns else None


def _domain(value: Any) -> str | None:
    # Other people's tables call all sorts of things a domain; routing says so where it needs one and finds none.
    return value if isinstance(value, str) and value.strip() else None


def _answer(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _BadRow(f"column 'answer' is a {_kind(value)}; expected text or a number")
    if isinstance(value, str):
        return _text(value, "answer").strip()
    if not math.isfinite(value):
        raise _BadRow(f"column 'answer' is {value}; expected text or a finite number")
    return str(value)


def _wrong_columns(seen: Mapping[Any, Any], *, expected: tuple[str, ...]) -> str:
    wanted = "a column 'prompt' or 'messages'" if expected == COLUMNS else "the columns 'question' and 'answer'"
    listed = ", ".join(f"{name!r}{' (null)' if value is None else ''}" for name, value in seen.items()) or "none"
    near = {str(name): get_close_matches(str(name), expected, n=1) for name in seen if name not in expected}
    hints = [f"{match[0]!r} for {name!r}" for name, match in near.items() if match]
    return f"expected {wanted}, got {listed}" + (f"; did you mean {' and '.join(hints)}?" if hints else "")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
