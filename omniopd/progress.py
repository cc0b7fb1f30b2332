"""What a person sees while a run works: a live display in a terminal, one line a step elsewhere. Writes to stderr.

It shows numbers others measured and keeps none; see `omniopd.records` for those that last.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from omniopd.types import Usage

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

Item = TypeVar("Item")

BAR_CELLS = 24


class RunProgress:
    """The display of one run. Use it as a context manager, so that the terminal is left as it was found."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show on `stream` (stderr when None); without a terminal at most one line every `interval_s` seconds."""
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = interval_s
        self._clock = clock
        self._live: Live | None = None
        self._total = self._first = self._done = 0
        self._phase = ""
        self._metrics: Mapping[str, float | None] = {}
        self._eval: Mapping[str, Any] = {}
        self._spent = Usage()
        self._started = self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, total_steps: int, start_step: int = 0, *, spent: Usage | None = None) -> None:
        """Begin a run of `total_steps`, of which `start_step` are done; `spent` is what they cost."""
        self._total, self._first, self._done = total_steps, start_step, start_step
        self._spent = spent or Usage()
        self._started = self._clock()
        self._open()

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Say what the run is at, e.g. `generate`; with counts for long work. May come before `start`."""
        count = "" if done is None else f" {done:,}" if total is None else f" {done:,}/{total:,}"
        self._phase = name + count
        self._open()
        if self._live is None and count and self._is_due(final=done == total):
            self._write(self._phase)

    def step(self, metrics: Mapping[str, float | None]) -> None:
        """Count one finished step and show its metrics."""
        self._done += 1
        self._phase = ""
        self._metrics = metrics
        self._spent += Usage(
            requests=int(metrics.get("teacher/requests") or 0),
            cost_usd=metrics.get("cost/usd"),
            cached_requests=int(metrics.get("teacher/cached") or 0),
        )
        if self._live is not None:
            self._live.refresh()
        elif self._is_due(final=self._done in (self._first + 1, self._total)):
            self._write(f"{self._position()}  {'  '.join(self._facts())}")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Show one line of evals.jsonl."""
        self._eval = row
        greedy = "" if row.get("greedy") is None else f", greedy {_percent(row['greedy'])}"
        self.message(f"evaluation {row['when']} (step {row['step']}): {_avg_at_k(row)}{greedy}")

    def message(self, text: str) -> None:
        """Print one line above the display."""
        if self._live is None:
            self._write(text)
        else:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the display down and leave its last state on screen. Safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _open(self) -> None:
        """Start the live display where there is a terminal and none is up yet."""
        if self._live is not None or not is_terminal(self._stream):
            return
        from rich.live import Live

        self._live = Live(
            get_renderable=self._render,
            console=_console(self._stream),
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=self._stream is sys.stderr,
        )
        self._live.start()

    def _render(self) -> Text:
        """Lay out one bar and the facts; words wrap, so any width will do."""
        from rich.text import Text

        text = Text(overflow="fold")
        if not self._total:
            return text.append(self._phase, style="cyan")
        filled = round(BAR_CELLS * self._done / self._total)
        text.append(self._position(), style="bold")
        text.append("  ")
        text.append("#" * filled, style="green")
        text.append("." * (BAR_CELLS - filled), style="dim")
        text.append(f"  {self._phase}\n", style="cyan")
        text.append("  ".join(fact.replace(" ", "\u00a0") for fact in self._facts()))
        return text

    def _position(self) -> str:
        return f"step {self._done:,}/{self._total:,}"

    def _facts(self) -> list[str]:
        """The numbers worth a glance; what was not measured is left out."""
        m = self._metrics
        facts = [
            ("accuracy", m.get("rollout/accuracy"), _percent),
            ("score", m.get("score/mean"), lambda v: f"{v:.3f}"),
            ("loss", m.get("optim/loss"), lambda v: f"{v:.4g}"),
            ("tokens/s", m.get("rollout/tokens_per_s"), lambda v: f"{v:,.0f}"),
        ]
        shown = [f"{name} {form(value)}" for name, value, form in facts if value is not None]
        unscored = sum(value or 0 for name, value in m.items() if name.startswith("teacher/unscored/"))
        if unscored:
            shown.append(f"unscored {unscored:,.0f}")
        if self._spent.requests:
            shown.append(f"teacher {self._spent.requests:,} calls {format_usd(self._spent.cost_usd)}")
        if self._eval:
            shown.append(_avg_at_k(self._eval))
        made = self._done - self._first
        if made and self._done < self._total:
            left_s = (self._clock() - self._started) / made * (self._total - self._done)
            shown.append(f"ETA {format_seconds(left_s)}")
        return shown

    def _is_due(self, *, final: bool) -> bool:
        now = self._clock()
        if not final and now - self._last_line < self._interval_s:
            return False
        self._last_line = now
        return True

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


@contextlib.contextmanager
def counting(
    total: int,
    description: str,
    *,
    progress: RunProgress | None = None,
    stream: TextIO | None = None,
    interval_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Show long work of `total` parts and yield the function that counts finished ones.

    With `progress` the count appears in the run's own display; a terminal shows one display at a time.
    """
    done = 0
    if progress is not None:

        def advance_phase(parts: int) -> None:
            nonlocal done
            done += parts
            progress.phase(description, done, total)

        progress.phase(description, 0, total)
        yield advance_phase
        return
    target = stream if stream is not None else sys.stderr
    if not is_terminal(target):
        own = RunProgress(target, interval_s=interval_s, clock=clock)
        with counting(total, description, progress=own) as advance:
            yield advance
        return
    from rich.progress import Progress

    with Progress(console=_console(target), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(_escaped(description), total=total)
        yield lambda parts: bar.advance(task, parts)


def track(
    items: Iterable[Item],
    description: str,
    *,
    total: int | None = None,
    progress: RunProgress | None = None,
    stream: TextIO | None = None,
) -> Iterator[Item]:
    """Yield `items` and show how many are done, as `counting` does; `total` is needed when they have no length."""
    size = total if total is not None else len(items)  # type: ignore[arg-type]
    with counting(size, description, progress=progress, stream=stream) as advance:
        for item in items:
            yield item
            advance(1)


def is_terminal(stream: TextIO) -> bool:
    """Tell whether a live display makes sense on `stream`."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def format_usd(cost: float | None) -> str:
    """Write an amount; `$?` when the price is unknown, which is not free."""
    if cost is None:
        return "$?"
    return f"${cost:,.2f}" if cost >= 1 or cost == 0 else f"${cost:.4f}"


def format_seconds(seconds: float) -> str:
    """Write a duration as 45s, 3m 05s or 2h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _avg_at_k(row: Mapping[str, Any]) -> str:
    return f"avg@{row['k']} {_percent(row['avg_at_k'])}"


def _console(stream: TextIO) -> Any:
    from rich.console import Console

    return Console(file=stream)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
