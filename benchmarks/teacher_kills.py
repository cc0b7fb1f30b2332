"""A scoring job killed with SIGKILL at 50 random moments: the same output, and no more paid than was under way.

    PYTHONPATH=. python benchmarks/teacher_kills.py [--kills 50]

`omniopd score` runs in a process of its own against the loopback server, once to its end and once killed again and
again, from start-up to the last rows. What is billed twice can only be what was under way at a kill: sent, perhaps
answered, and not yet on the disk. Writes `benchmarks/results/teacher_kills.json`; ends with an error if anything does
not add up.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.provenance import provenance
from benchmarks.teacher_load import serving
from tests.teacher_server.kills import CONCURRENCY, N, kill_and_restart

RESULT = Path(__file__).parent / "results" / "teacher_kills.json"
LATENCY_S = 0.03
ROWS = 300
KILLS = 50
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    kills = parser.parse_args().kills
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serving(latency_s=LATENCY_S) as server:
        found = kill_and_restart(Path(folder), server.port, rows=ROWS, kills=kills, seed=SEED, in_start_up=kills // 5)
    report = {
        **provenance(),
        "latency_s": LATENCY_S,
        "seed": SEED,
        "samples_per_request": N,
        "max_concurrency": CONCURRENCY,
        "wall_seconds": round(time.perf_counter() - started),
        **found.figures,
        "errors": found.errors,
    }
    print(json.dumps(report, indent=1))
    if found.errors:
        sys.exit(f"{len(found.errors)} figures do not add up")
    if kills >= KILLS:
        RESULT.write_text(json.dumps({**report, "each_kill": list(map(asdict, found.kills))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
