"""Speed of batch similarity beside rapidfuzz's own batch call, in one process and one thread.

    python benchmarks/similarity_speed.py

The pairs are made here: worked solutions of equal length with other numbers and words. Rounds of the two sides
alternate, so a busy machine slows both; a figure is the median over the rounds. rapidfuzz is timed up to its array,
ours up to the list of floats. Prints a table and writes `benchmarks/results/similarity_speed.json`.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from omniopd.scoring.similarity import LEXICAL, get_similarity

RESULT = Path(__file__).parent / "results" / "similarity_speed.json"
NUM_PAIRS = 4096
LENGTHS = (16, 50, 200, 1000)
"""Characters; a chunk of 50 tokens has about 200."""
ROUNDS = 31
CONTINUATIONS = 8

Pairs = tuple[list[str], list[str]]


def distinct_pairs(length: int, rng: random.Random) -> Pairs:
    """Return pairs that all differ: the case in which looking for repeats cannot help."""
    pairs = [(_solution(length, rng), _solution(length, rng)) for _ in range(NUM_PAIRS)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def chunk_pairs(length: int, rng: random.Random) -> Pairs:
    """Return pairs as a scorer makes them: each chunk against 8 continuations, half of which are the same text."""
    a: list[str] = []
    b: list[str] = []
    while len(a) < NUM_PAIRS:
        favorite = _solution(length, rng)
        a += [_solution(length, rng)] * CONTINUATIONS
        b += [favorite if i % 2 else _solution(length, rng) for i in range(CONTINUATIONS)]
    return a, b


def _solution(length: int, rng: random.Random) -> str:
    steps: list[str] = []
    while sum(map(len, steps)) < length:
        x, y = rng.randrange(2, 99), rng.randrange(2, 99)
        verb = rng.choice(("so she has", "which makes", "that leaves", "therefore"))
        steps.append(f"{verb} {x} + {y} = {x + y} {rng.choice(('apples', 'dollars', 'cups'))}, ")
    return "".join(steps)[:length]


def compare(pairs: Pairs) -> dict[str, float]:
    """Time `edit` and rapidfuzz on the same pairs, in turns."""
    edit = get_similarity("edit")

    def ours() -> list[float]:
        return edit.pairs(*pairs)

    def theirs() -> list[float]:
        return [float(x) for x in cpdist(*pairs, scorer=Levenshtein.normalized_similarity, dtype=float)]

    def their_array() -> object:
        return cpdist(*pairs, scorer=Levenshtein.normalized_similarity, dtype=float)

    if ours() != theirs():
        raise SystemExit("edit and rapidfuzz disagree; their speed cannot be compared")
    our_times, their_times = [], []
    for _ in range(ROUNDS):
        their_times.append(_seconds(their_array))
        our_times.append(_seconds(ours))
    our_median, their_median = statistics.median(our_times), statistics.median(their_times)
    return {
        "edit_pairs_per_s": NUM_PAIRS / our_median,
        "rapidfuzz_pairs_per_s": NUM_PAIRS / their_median,
        "ratio": their_median / our_median,
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, write."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for kind, make in (("distinct", distinct_pairs), ("chunks", chunk_pairs)):
        for length in LENGTHS:
            rows.append({"pairs": kind, "characters": length, **compare(make(length, rng))})
    pairs = chunk_pairs(200, rng)
    others = {
        name: NUM_PAIRS / statistics.median(_seconds(lambda: similarity.pairs(*pairs)) for _ in range(5))
        for name in LEXICAL
        if (similarity := get_similarity(name))
    }
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "rapidfuzz": version("rapidfuzz"), "numpy": version("numpy")},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads_used": 1},
        "num_pairs": NUM_PAIRS,
        "rounds": ROUNDS,
        "edit_beside_rapidfuzz": rows,
        "lowest_ratio": min(row["ratio"] for row in rows),
        "lexical_pairs_per_s": {"characters": 200, **others},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the result for a person."""
    lines = [f"{'pairs':<10}{'chars':>6}{'edit, pairs/s':>16}{'rapidfuzz, pairs/s':>20}{'ratio':>8}"]
    for row in result["edit_beside_rapidfuzz"]:
        lines.append(
            f"{row['pairs']:<10}{row['characters']:>6}{row['edit_pairs_per_s']:>16,.0f}"
            f"{row['rapidfuzz_pairs_per_s']:>20,.0f}{row['ratio']:>8.2f}"
        )
    speeds = result["lexical_pairs_per_s"]
    lines.append(f"at {speeds['characters']} characters, chunks: ")
    lines[-1] += ", ".join(f"{name} {speeds[name]:,.0f}/s" for name in LEXICAL)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
