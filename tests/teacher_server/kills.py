"""Kill a scoring job with SIGKILL again and again, start it again, and count what that cost at the teacher."""

from __future__ import annotations

import http.client
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniopd.teachers.order_notes import noting_owners, read_notes
from omniopd.teachers.owners import owners_folder

ROOT = Path(__file__).resolve().parents[2]
KEY = "test-key"
N = 4
WORDS_PER_CHUNK = 8
CONCURRENCY = 8
_POLL_S = 0.005
_ONE_RUN_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One end of the job."""

    after_requests: int
    """HTTP requests that the server had received by then."""
    seconds: float
    """Since the job was started."""
    open_orders: int
    """Requests that the ledger holds as ordered and not settled, without those of earlier kills."""
    in_flight: int
    """Requests that the server was still at work on."""
    rows: int
    """Complete rows of the output."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """A job that was killed and restarted until it was done."""

    kills: list[Kill] = field(default_factory=list)
    orders: set[tuple[str, int]] = field(default_factory=set)
    """Of all kills: owner and number."""
    figures: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    """What does not add up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`omniopd score` as a user would type it."""

    folder: Path
    port: int
    name: str

    @property
    def output(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def ledger(self) -> Path:
        return self.folder / f"{self.name}.sqlite"

    def start(self) -> subprocess.Popen[bytes]:
        """Start it; what it says goes to NAME.log."""
        words = [
            *(sys.executable, "-m", "omniopd", "score", str(self.folder / "in.jsonl")),
            *("-o", str(self.output), "--ledger", str(self.ledger)),
            *("--teacher", f"openai:gpt-4o@http://127.0.0.1:{self.port}/v1"),
            *("--num-continuations", str(N), "--chunk-words", str(WORDS_PER_CHUNK)),
            *("--max-concurrency", str(CONCURRENCY)),
        ]
        environment = {**os.environ, "OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
        with (self.folder / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=self.folder)

    def finish(self) -> float:
        """Run it to its end; return the seconds. Raises RuntimeError with its words if it fails."""
        started = time.monotonic()
        process = self.start()
        try:
            code = process.wait(_ONE_RUN_S)
        finally:
            process.kill()
            process.wait()
        if code != 0:
            raise RuntimeError(f"exit code {code}: {(self.folder / f'{self.name}.log').read_text()[-2000:]}")
        return time.monotonic() - started


def write_rows(path: Path, rows: int) -> None:
    """Write different problems with solutions of three chunks."""
    with path.open("w") as file:
        for i in range(rows):
            steps = (
                f"We count the pens in all {i} boxes first.",
                f"Each box holds twelve, so {i} hold {12 * i}.",
                f"Therefore the shop has {12 * i} pens in total.",
            )
            row = {"prompt": f"How many pens are in {i} boxes of a dozen?", "response": " ".join(steps)}
            file.write(json.dumps(row) + "\n")


def kill_and_restart(folder: Path, port: int, *, rows: int, kills: int, seed: int = 0, in_start_up: int = 0) -> Outcome:
    """Score `rows` rows without a kill, and again with `kills` of them, and compare.

    The moments are random: `in_start_up` of them at any time before the first request, the others at any number of
    requests and up to one latency later. The server must answer the same to the same request.
    """
    rng, found = random.Random(seed), Outcome()
    write_rows(folder / "in.jsonl", rows)
    whole = Job(folder=folder, port=port, name="whole")
    control(port, "/__reset")
    seconds = whole.finish()
    first = min(entry["arrived"] for entry in control(port, "/__log"))
    start_up_s = seconds - (time.time() - first)
    unique = control(port, "/__stats")["billed"]
    control(port, "/__reset")
    job = Job(folder=folder, port=port, name="killed")
    moments: list[tuple[float | None, int]] = [(rng.uniform(0.0, start_up_s), 0) for _ in range(in_start_up)]
    moments += [(None, rng.randrange(1, unique)) for _ in range(kills - in_start_up)]
    moments.sort(key=lambda m: m[1] if m[0] is None else rng.randrange(unique))
    for at_s, at_request in moments:
        kill = _kill(job, at_s, at_request, rng.uniform(0.0, 0.03), found.orders)
        if kill is None:
            found.errors.append(f"the job ended before kill {len(found.kills) + 1} of {kills}")
            break
        found.kills.append(kill)
    job.finish()
    _count(whole, job, unique, found)
    found.figures |= {"rows": rows, "seconds_uninterrupted": round(seconds, 2), "start_up_s": round(start_up_s, 2)}
    return found


def _kill(job: Job, at_s: float | None, at_request: int, more_s: float, known: set[tuple[str, int]]) -> Kill | None:
    """Start the job and kill it at its moment; None if it ended by itself. Adds the open orders to the known ones."""
    started = time.monotonic()
    process = job.start()
    try:
        if at_s is not None:
            time.sleep(at_s)
        else:
            # What was received by earlier attempts counts, so the moments lie all over the job.
            received = control(job.port, "/__stats")["received"]
            while received < at_request or received == 0:
                if process.poll() is not None or time.monotonic() - started > _ONE_RUN_S:
                    return None
                time.sleep(_POLL_S)
                received = control(job.port, "/__stats")["received"]
            time.sleep(more_s)
    finally:
        killed = time.time()
        process.kill()
        code = process.wait()
    if code != -9:
        return None
    seconds = time.monotonic() - started
    entries = control(job.port, "/__log")
    # A job that is killed as it starts leaves the orders of the one before as they are.
    orders = open_orders(job.ledger) - known
    known |= orders
    return Kill(
        after_requests=len(entries),
        seconds=round(seconds, 3),
        open_orders=len(orders),
        in_flight=sum(entry["ended"] is None or entry["ended"] > killed for entry in entries),
        rows=job.output.read_bytes().count(b"\n") if job.output.exists() else 0,
    )


def open_orders(ledger: Path) -> set[tuple[str, int]]:
    """Return owner and number of the orders in a ledger, whoever they belong to, without changing it."""
    if not ledger.exists():
        return set()
    folder = owners_folder(ledger)
    noted = {(owner, note[0]) for owner in noting_owners(folder) for note in read_notes(folder, owner)}
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
        try:
            return noted | set(db.execute("SELECT owner, id FROM orders"))
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return set()  # Killed before there was anything in it.
            raise


def _count(whole: Job, job: Job, unique: int, found: Outcome) -> None:
    """Compare the outputs, and what the server billed with what was under way at the kills."""
    entries = control(job.port, "/__log")
    billed = [entry for entry in entries if entry["billed"]]
    identities = Counter(entry["identities"][0] for entry in billed)
    with closing(sqlite3.connect(job.ledger)) as db:
        requests, unanswered = db.execute("SELECT SUM(requests), SUM(unanswered) FROM calls").fetchone()
        (samples,) = db.execute("SELECT COUNT(*) FROM samples").fetchone()
    in_flight, ordered = sum(kill.in_flight for kill in found.kills), len(found.orders)
    is_equal = whole.output.read_bytes() == job.output.read_bytes()
    beyond = len(billed) - len(identities)
    found.figures |= {
        "kills": len(found.kills),
        "kills_with_nothing_under_way": sum(kill.open_orders == kill.in_flight == 0 for kill in found.kills),
        "output_equal_byte_for_byte": is_equal,
        "unique_requests": unique,
        "received": len(entries),
        "received_beyond_the_ledger": len(entries) - requests,
        "requests_billed": len(billed),
        "requests_billed_beyond_the_unique": beyond,
        "choices_billed": sum(entry["choices"] for entry in billed),
        "choices_billed_beyond_the_unique": sum(entry["choices"] for entry in billed) - N * len(identities),
        "open_orders_at_kills": ordered,
        "in_flight_at_server_at_kills": in_flight,
        "samples_in_ledger": samples,
        "requests_in_ledger": requests,
        "unanswered_in_ledger": unanswered,
    }
    _require(is_equal, "the outputs differ", found)
    _require(len(identities) == unique, f"{len(identities)} requests were answered, expected {unique}", found)
    _require(samples == N * unique, f"{samples} samples are in the ledger, expected {N * unique}", found)
    _require(beyond <= ordered, f"{beyond} requests were paid twice, and {ordered} were under way", found)
    _require(unanswered == ordered, f"{unanswered} requests were written off, expected {ordered}", found)
    _require(max(identities.values()) <= 1 + len(found.kills), "a request was paid more often than killed", found)


def _require(holds: bool, otherwise: str, found: Outcome) -> None:
    if not holds:
        found.errors.append(otherwise)


def control(port: int, path: str) -> Any:
    """Ask the server about itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
