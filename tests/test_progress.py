"""What a person sees of a run, with and without a terminal. The clock is the test's."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from omniopd.progress import RunProgress, counting, format_seconds, format_usd, is_terminal, track
from omniopd.types import Usage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[tuple[TextIO, int]]:
    """Yield the program's side of a terminal and the descriptor of the person's side."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    person, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(program, "w", encoding="utf-8") as stream:
        yield stream, person
    os.close(person)


def seen(person: int) -> str:
    """Return all that has reached the person; a terminal hands it over in pieces."""
    pieces = []
    while select.select([person], [], [], 0)[0]:
        pieces.append(os.read(person, 65536))
    return b"".join(pieces).decode()


METRICS = {
    "rollout/accuracy": 0.25,
    "score/mean": 0.5,
    "optim/loss": 1.5,
    "rollout/tokens_per_s": 1234.0,
    "teacher/requests": 10.0,
    "cost/usd": 0.5,
}


def test_lines_are_throttled_but_the_first_and_last_are_always_there() -> None:
    out, clock = io.StringIO(), Clock()
    with RunProgress(out, interval_s=10, clock=clock) as progress:
        progress.start(6)
        for _ in range(6):
            clock.now += 4
            progress.step({})
    # Steps end at 4, 8, 12, ...; after the first line at 4 the next one is due at 14, so at 16, and the last is at 24.
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/6", "step 4/6", "step 6/6"]


def test_a_line_holds_the_numbers() -> None:
    out, clock = io.StringIO(), Clock()
    progress = RunProgress(out, clock=clock)
    progress.start(3, 1, spent=Usage(requests=5, cost_usd=0.25))
    clock.now = 90
    progress.step(METRICS)
    # One step took 90 s and one of three is left. Calls 5 + 10, cost 0.25 + 0.50.
    assert out.getvalue() == (
        "step 2/3  accuracy 25.0%  score 0.500  loss 1.5  tokens/s 1,234  teacher 15 calls $0.7500  ETA 1m 30s\n"
    )


def test_what_was_not_measured_is_left_out_and_an_unknown_price_is_not_free() -> None:
    out = io.StringIO()
    progress = RunProgress(out)
    progress.start(1)
    progress.step({**METRICS, "rollout/accuracy": None, "score/mean": None, "cost/usd": None})
    assert "accuracy" not in out.getvalue()
    assert "score" not in out.getvalue()
    assert "teacher 10 calls $?" in out.getvalue()
    assert "ETA" not in out.getvalue()


def test_rollouts_without_scores_are_told_where_there_are_any() -> None:
    out = io.StringIO()
    progress = RunProgress(out)
    progress.start(2)
    progress.step({"optim/loss": 4.197, "teacher/unscored/failed": 3, "teacher/unscored/timeout": 2})
    progress.step({"optim/loss": 4.0})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 1/2  loss 4.197  unscored 5") and "unscored" not in lines[1]


def test_an_evaluation_is_told_and_kept_in_view() -> None:
    out = io.StringIO()
    progress = RunProgress(out)
    progress.start(1)
    progress.evaluation({"step": 0, "when": "before", "k": 16, "avg_at_k": 0.301, "greedy": 0.81})
    progress.step({})
    assert out.getvalue().splitlines() == [
        "evaluation before (step 0): avg@16 30.1%, greedy 81.0%",
        "step 1/1  avg@16 30.1%",
    ]


def test_long_work_is_throttled_and_ends_with_its_last_line() -> None:
    out, clock = io.StringIO(), Clock()
    with counting(100, "problems", stream=out, interval_s=10, clock=clock) as advance:
        for _ in range(100):
            clock.now += 0.25
            advance(1)
    # 25 s in all, a line every 10 s and one at the end.
    assert out.getvalue().splitlines() == ["problems 40/100", "problems 80/100", "problems 100/100"]


def test_track_yields_the_items_in_the_display_of_the_run() -> None:
    out = io.StringIO()
    progress = RunProgress(out, interval_s=0)
    assert list(track("ab", "scoring", progress=progress)) == ["a", "b"]
    assert out.getvalue().splitlines() == ["scoring 0/2", "scoring 1/2", "scoring 2/2"]
    assert list(track((c for c in "ab"), "scoring", total=2, stream=io.StringIO())) == ["a", "b"]
    with pytest.raises(TypeError, match="no len"):
        list(track((c for c in "ab"), "scoring"))


@pytest.mark.parametrize("columns", [1, 8, 200])
def test_a_terminal_of_any_width_shows_the_run(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, columns) as (stream, person):
        with RunProgress(stream) as progress:
            progress.phase("evaluate before", 3, 8)
            progress.start(4)
            progress.phase("generate")
            progress.message("a [bold]message[/bold]")
            progress.step({**METRICS, "cost/usd": None})
            progress.evaluation({"step": 1, "when": "during", "k": 4, "avg_at_k": 0.4})
        progress.stop()
        shown = seen(person)
    assert shown.endswith("\x1b[?25h")  # the cursor is back
    if columns == 200:
        assert "a [bold]message[/bold]" in shown
        assert "evaluate before 3/8" in shown
        assert "step 1/4" in shown
        assert "teacher\u00a010\u00a0calls\u00a0$?" in shown
        assert "avg@4\u00a040.0%" in shown


def test_the_terminal_is_restored_when_the_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as (stream, person):
        with pytest.raises(KeyboardInterrupt), RunProgress(stream) as progress:
            progress.start(4)
            raise KeyboardInterrupt
        assert seen(person).endswith("\x1b[?25h")


def test_long_work_on_a_terminal_leaves_no_bar_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as (stream, person):
        assert list(track([1, 2], "scoring [x]", stream=stream)) == [1, 2]
        shown = seen(person)
    assert "scoring [x]" in shown
    assert "100%" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as (stream, _):
        assert is_terminal(stream)
        monkeypatch.setenv("TERM", "dumb")
        assert not is_terminal(stream)


@pytest.mark.parametrize(
    ("cost", "text"), [(None, "$?"), (0.0, "$0.00"), (0.00412, "$0.0041"), (12.5, "$12.50"), (1234.5, "$1,234.50")]
)
def test_amounts(cost: float | None, text: str) -> None:
    assert format_usd(cost) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
