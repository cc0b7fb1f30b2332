"""Whether a response reaches the reference answer. Judges final answers, never the way there.

`python -m omniopd.verify` is the worker that `MathVerifier` talks to, one JSON object a line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TextIO

from omniopd.errors import ConfigError, DataError, MissingExtraError, RunError

Verifier = Callable[[str, str], bool]
"""(response, reference answer) -> is it right?"""

VERIFIERS = ("auto", "math", "mini-math", "exact", "none")

MAX_RESPONSE_CHARS = 4_000
"""Final answers stand at the end; the rest only costs time."""
MAX_ANSWER_CHARS = 1_000

_READY = "ready"
_START_TIMEOUT_S = 120.0
_WHOLE_NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)
_GSM8K_ANSWER = re.compile(r"^####[ \t]*(\S[^\n]*)$")


def resolve_verifier(name: str, *, source: str = "", has_answers: bool = True) -> str:
    """Say which verifier `auto` stands for: mini-math for its own data, math where there are answers, else none.

    Raises ConfigError for an unknown name, and when answers are asked for but the data has none.
    """
    if name not in VERIFIERS:
        near = get_close_matches(name, VERIFIERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"data.verifier is {name!r}; expected {', '.join(VERIFIERS)}{hint}")
    if name == "auto":
        if not has_answers:
            return "none"
        return "mini-math" if source.startswith("mini-math") else "math"
    if name != "none" and not has_answers:
        raise ConfigError(f"data.verifier is {name!r} but no row has an answer; add an answer column or use none")
    return name


def get_verifier(name: str, *, source: str = "", has_answers: bool = True) -> Verifier | None:
    """Make the verifier that `data.verifier` names; None for `none`, which judges nothing.

    `math` compares mathematically (1/2 is 0.5), `mini-math` reads the number after the last `#`, `exact` compares the
    text without surrounding blanks. All are deterministic, may be called from any thread and never raise on garbage.
    """
    resolved = resolve_verifier(name, source=source, has_answers=has_answers)
    if resolved == "math":
        return MathVerifier()
    if resolved == "mini-math":
        return _is_mini_math_correct
    return None if resolved == "none" else _is_exact


class MathVerifier:
    """Compare final answers with math-verify, in a worker process that is killed when it takes too long.

    math-verify's own time limit is an alarm signal: it works in the main thread only and cannot interrupt one long
    operation in C. A response such as `9^{9^{9^9}}` would otherwise hang the run. A response that runs into the limit
    is wrong. The worker starts with the first call and ends with this object.

    Raises:
        MissingExtraError: math-verify is not installed.
        RunError: The worker does not start.
    """

    def __init__(self, *, timeout_s: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingExtraError("the verifier 'math' needs math-verify: pip install 'omniopd[train]'")
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[[subprocess.Popen[str]], MathVerifier] | None = None

    def __call__(self, response: str, answer: str) -> bool:
        request = json.dumps([response[-MAX_RESPONSE_CHARS:], answer[:MAX_ANSWER_CHARS]])
        with self._lock:
            # A worker may have died between two calls, which says nothing about this response: ask a fresh one.
            for _ in range(2):
                worker = self._worker if self._worker is not None else self._start()
                verdict, timed_out = _ask(worker, request, self.timeout_s)
                if timed_out or not verdict:
                    self._stop()
                if timed_out or verdict:
                    break
        return verdict == "true"

    def close(self) -> None:
        """End the worker. A later call starts a new one."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        # The worker must find this very package, installed or not, and nothing in the working directory (-P).
        package_root = str(Path(__file__).parents[1])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "omniopd.verify"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
        )
        self._worker = worker
        self._finalizer = weakref.finalize(self, _end, worker)
        if _ask(worker, None, _START_TIMEOUT_S) != (_READY, False):
            self._stop()
            raise RunError("the answer checker did not start; `python -m omniopd.verify` shows why")
        return worker

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None


def _ask(worker: subprocess.Popen[str], request: str | None, timeout_s: float) -> tuple[str, bool]:
    """Return the worker's next line, empty when it is dead, and whether it was killed for taking too long."""
    assert worker.stdin is not None and worker.stdout is not None
    timed_out = threading.Event()

    def give_up() -> None:
        timed_out.set()
        worker.kill()

    # Killing the process ends the blocking read on every platform; a pipe has no portable read with a time limit.
    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        if request is not None:
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
        line = worker.stdout.readline().strip()
    except OSError:
        line = ""
    finally:
        timer.cancel()
    return line, timed_out.is_set()


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        assert stream is not None
        try:
            stream.close()
        except OSError:
            # Closing flushes, which fails when the worker died with a request half written.
            continue


def _is_mini_math_correct(response: str, answer: str) -> bool:
    from omniopd.worlds.mini_math import is_correct

    if not _WHOLE_NUMBER.fullmatch(answer.strip()):
        raise DataError(f"the verifier 'mini-math' needs whole numbers as answers, got {answer!r}; use verifier: math")
    # Python refuses to read numbers of more than 4,300 digits.
    return is_correct(response[-MAX_RESPONSE_CHARS:], answer)


def _is_exact(response: str, answer: str) -> bool:
    return response.strip() == answer.strip()


def is_equivalent(response: str, answer: str) -> bool:
    """Tell whether the last answer in the response equals the reference; no time limit.

    A `#### 42` in the last line is the answer (GSM8K); else the last \\boxed{}, else what math-verify finds last. Boxes
    joined by "and", "or" or a comma are one answer of several parts, so offering several is not answering right.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # A heading such as `#### Step 2` is no answer, hence the last line only.
    marked = _GSM8K_ANSWER.match(response.rstrip().rpartition("\n")[2])
    target = f"\\boxed{{{marked.group(1).strip()}}}" if marked else response
    gold = answer if answer.count("$") > 1 or "\\boxed" in answer else f"\\boxed{{{answer}}}"
    return bool(
        verify(
            parse(gold, extraction_config=extraction, parsing_timeout=None),
            parse(target, extraction_config=extraction, parsing_timeout=None),
            timeout_seconds=None,
        )
    )


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer `[response, answer]` lines with `true` or `false` until the requests end."""
    import logging

    import math_verify  # noqa: F401  (so that "ready" means ready)

    # math-verify warns on every call that it has no time limit; the parent process is the limit.
    logging.disable(logging.CRITICAL)
    answers.write(f"{_READY}\n")
    answers.flush()
    for line in requests:
        response, answer = json.loads(line)
        answers.write(json.dumps(is_equivalent(response, answer)) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
