"""What the ledger saves, and what it costs.

    PYTHONPATH=. python benchmarks/teacher_cache.py [--quick]

Savings: HTTP requests that the loopback server counts when half of the prefixes are repeated, in one call of the
teacher, in many at once and through `ChunkRewarder`, with and without a ledger file; in a second run over the same
file; and in two processes that share one file at the same time.

Costs: wall and CPU time of the same requests with a ledger file and without any ledger, against a server with 50 ms
latency in a process of its own. Rounds of both alternate and each ledger is a new file; a figure is the median over
the rounds. The overhead is the time with the ledger over the time without it in the same round, less one; where one
core cannot keep so many requests under way that is a ratio of CPU times. The time of one bare fsync on the same disk
is given besides, since every answer waits for one, shared by all that arrive meanwhile.

Writes `benchmarks/results/teacher_cache.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.teacher_load import KEY, ROOT, ServerProcess, expected_answers, make_requests, serving
from omniopd.api import ChunkRewarder
from omniopd.teachers.base import ContinuationRequest
from omniopd.teachers.resolve import open_teacher

RESULT = Path(__file__).parent / "results" / "teacher_cache.json"
LATENCY_S = 0.05
CONCURRENCY = (16, 64, 256)
ROUNDS = 7
UNIQUE = 600
CALLS = 24
RUN_TIMEOUT_S = 120.0
_SHARED_FLAG = "--ask-all-with"


async def ask(
    base_url: str,
    parts: Sequence[Sequence[ContinuationRequest]],
    *,
    ledger: Path | None,
    concurrency: int = 64,
    warm_up: Sequence[ContinuationRequest] = (),
) -> tuple[float, float]:
    """Ask all parts at once, a call each; return wall and CPU seconds. Raises RuntimeError for a wrong answer."""
    teacher = open_teacher(f"openai:bench@{base_url}", ledger=ledger, max_concurrency=concurrency, timeout_s=30.0)
    try:
        if warm_up:
            await teacher.continuations(warm_up)
        wall, cpu = time.perf_counter(), time.process_time()
        answers = await asyncio.gather(*(teacher.continuations(part) for part in parts))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        await teacher.aclose()
    for part, own in zip(parts, answers, strict=True):
        texts = [answer.continuations[0].text for answer in own]
        if texts != expected_answers(part):
            raise RuntimeError("an answer is wrong")
    return wall, cpu


def run(base_url: str, parts: Sequence[Sequence[ContinuationRequest]], **options: Any) -> tuple[float, float]:
    return asyncio.run(asyncio.wait_for(ask(base_url, parts, **options), RUN_TIMEOUT_S))


# What it saves.


def savings(server: ServerProcess, folder: Path) -> list[dict[str, Any]]:
    """Count the HTTP requests of every way to ask for 600 different requests twice."""
    unique = make_requests(UNIQUE)
    twice = random.Random(0).sample([*unique, *unique], 2 * UNIQUE)
    many = [twice[i::CALLS] for i in range(CALLS)]
    rows: list[dict[str, Any]] = []

    def count(name: str, asked: int, expected: int, work: Any) -> None:
        before = server.stats()["received"]
        work()
        sent = server.stats()["received"] - before
        rows.append({"how": name, "requests": asked, "sent": sent, "expected": expected})
        print(f"{name:<62} {asked:>5} requests, {sent:>5} sent")

    asked, url = len(twice), server.base_url
    for name, calls in (("one call", [twice]), (f"{CALLS} calls at once", many)):
        ledger = folder / f"{len(calls)}.sqlite"
        # Without a ledger nothing is kept from call to call; that is what `ChunkRewarder` sees to by itself.
        alone = sum(len(set(part)) for part in calls)
        count(f"{name}, no ledger", asked, alone, lambda calls=calls: run(url, calls, ledger=None))
        count(f"{name}, ledger", asked, UNIQUE, lambda calls=calls, path=ledger: run(url, calls, ledger=path))
        count(f"{name}, same ledger again", asked, 0, lambda calls=calls, path=ledger: run(url, calls, ledger=path))
    for path in (None, folder / "rewarder.sqlite"):
        name = "ChunkRewarder, no ledger" if path is None else "ChunkRewarder, ledger"
        count(name, 4 * UNIQUE // 2, UNIQUE, lambda path=path: reward(url, path))
    count("ChunkRewarder, same ledger again", 4 * UNIQUE // 2, 0, lambda: reward(url, folder / "rewarder.sqlite"))
    count(
        "two processes at once, each asking for everything, one ledger",
        2 * UNIQUE,
        UNIQUE,
        lambda: two_processes(url, folder / "shared.sqlite"),
    )
    return rows


def reward(base_url: str, ledger: Path | None) -> None:
    """Score every response twice: two chunks each, so half of the prefixes are repeated."""
    words = "one two three four five six seven eight nine ten"
    prompts = [f"Count to {i}." for i in range(UNIQUE // 2)]
    responses = [f"{words} {i} and so on" for i in range(UNIQUE // 2)]
    options = {"ledger": ledger, "max_concurrency": 64}
    with ChunkRewarder(
        teacher=f"openai:bench@{base_url}", teacher_options=options, num_continuations=1, chunk_words=8
    ) as rewarder:
        rewards = rewarder.score(prompts * 2, responses * 2)
    chunks = [one.chunks for one in rewards]
    if {*map(len, chunks)} != {2} or chunks[: len(prompts)] != chunks[len(prompts) :]:
        raise RuntimeError("a response was not scored the same twice")


def two_processes(base_url: str, ledger: Path) -> None:
    """Ask for the same requests in two processes at the same time, each in an order of its own."""
    command = [sys.executable, "-m", "benchmarks.teacher_cache", _SHARED_FLAG, str(ledger), "--base-url", base_url]
    with _children([[*command, "--seed", str(seed)] for seed in (1, 2)]) as children:
        if any(child.wait(RUN_TIMEOUT_S) for child in children):
            raise RuntimeError("a process failed")


@contextmanager
def _children(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    children = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def ask_everything(base_url: str, ledger: Path, seed: int) -> None:
    """What each of two processes does."""
    requests = random.Random(seed).sample(make_requests(UNIQUE), UNIQUE)
    run(base_url, [requests[i::CALLS] for i in range(CALLS)], ledger=ledger)


# What it costs.


def overhead(server: ServerProcess, folder: Path, *, rounds: int) -> list[dict[str, Any]]:
    """Time the same requests with and without a ledger."""
    rows = []
    for concurrency in CONCURRENCY:
        size = min(max(960, concurrency * 48), 6144)
        everything = make_requests(size + concurrency)
        requests, warm_up = everything[:size], everything[size:]
        times: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
        for number in range(rounds):
            # Who goes first alternates: the second finds the caches warm.
            for name in ("without", "with") if number % 2 else ("with", "without"):
                server.reset()
                ledger = folder / f"{concurrency}-{number}.sqlite" if name == "with" else None
                options = {"ledger": ledger, "concurrency": concurrency, "warm_up": warm_up}
                times[name].append(run(server.base_url, [requests], **options))
        rows.append(_row(concurrency, size, times))
        last = rows[-1]
        print(
            f"{concurrency:>4} in flight: a request takes {last['request_ms_without']:.1f} ms without a ledger, "
            f"{last['overhead_of_request_time']:+.1%} with; CPU {last['cpu_ms_per_request_without']:.3f} -> "
            f"{last['cpu_ms_per_request_with']:.3f} ms"
        )
    return rows


def _row(concurrency: int, size: int, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    wall = {name: statistics.median(wall for wall, _ in rounds) for name, rounds in times.items()}
    cpu = {name: statistics.median(cpu for _, cpu in rounds) for name, rounds in times.items()}
    ratios = [with_[0] / without[0] - 1 for with_, without in zip(times["with"], times["without"], strict=True)]
    # A worker's request takes as long as its share of the whole.
    per_request = {name: seconds * 1e3 * concurrency / size for name, seconds in wall.items()}
    return {
        "concurrency": concurrency,
        "requests": size,
        "rounds": len(ratios),
        **{f"wall_ms_per_request_{name}": seconds * 1e3 / size for name, seconds in wall.items()},
        **{f"request_ms_{name}": value for name, value in per_request.items()},
        **{f"cpu_ms_per_request_{name}": seconds * 1e3 / size for name, seconds in cpu.items()},
        "overhead_of_rounds": [round(ratio, 4) for ratio in ratios],
        "cpu_overhead_ms_per_request": (cpu["with"] - cpu["without"]) * 1e3 / size,
        "overhead_of_request_time": statistics.median(ratios),
    }


def fsync_ms(folder: Path) -> float:
    """Return the median time of one append and fsync."""
    times = []
    with (folder / "fsync").open("ab", buffering=0) as file:
        for _ in range(50):
            started = time.perf_counter()
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round; writes nothing")
    parser.add_argument(_SHARED_FLAG, type=Path, metavar="LEDGER", dest="shared", help=argparse.SUPPRESS)
    parser.add_argument("--base-url", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = KEY
    if given.shared is not None:
        ask_everything(given.base_url, given.shared, given.seed)
        return
    started, load = time.perf_counter(), os.getloadavg()
    with tempfile.TemporaryDirectory() as name, serving(latency_s=LATENCY_S) as server:
        folder = Path(name)
        saved = savings(server, folder)
        costs = overhead(server, folder, rounds=1 if given.quick else ROUNDS)
        flush = fsync_ms(folder)
    report = {
        **provenance(),
        "load_average_before": round(load[0], 2),
        "latency_s": LATENCY_S,
        "fsync_ms": round(flush, 3),
        "wall_seconds": round(time.perf_counter() - started),
        "savings": saved,
        "overhead": costs,
    }
    if not given.quick:
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    if wrong := [row["how"] for row in saved if row["sent"] != row["expected"]]:
        sys.exit(f"another number of requests than expected: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
