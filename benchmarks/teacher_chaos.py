"""Ten thousand requests on a bad day: nothing lost, nothing paid twice, everything explained, no limit exceeded.

    PYTHONPATH=. python benchmarks/teacher_chaos.py [--requests 10000]

Five providers' dialects, a server process for each teacher, one ledger file for all. The servers fail as
`tests.teacher_server.audit.FAULTS` says, count requests per minute and answer by a pure function of the request, so
that every continuation is traced to the one choice that was billed for it. The arithmetic, for each teacher:

    HTTP requests received  = requests in the ledger
    choices billed          = samples in the ledger + choices beyond those asked for ("more") + choices never received
    continuations           = samples in the ledger (texts and refusals) + failed ones, each with its cause
    USD and tokens billed   = USD and tokens in the ledger + those of answers never received
    never received          = requests in the ledger that were sent and never answered: hangs, resets, truncated JSON,
                              which this server does not bill, and on a busy machine answers written in full just as
                              the client gave up, which it does; the bounds of all are kept as possibly spent

A second pass over the same ledger then asks for the failed continuations alone and must return all others unchanged.
Writes `benchmarks/results/teacher_chaos.json`; ends with an error if anything does not add up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.teacher_load import KEY, ServerProcess, serving
from omniopd.teachers.base import TeacherAnswer
from omniopd.types import Missing
from tests.teacher_server import base_url
from tests.teacher_server.audit import FAULTS, Client, ask_all, audit, make_clients

RESULT = Path(__file__).parent / "results" / "teacher_chaos.json"
REQUESTS_PER_MINUTE = 12_000
LATENCY_S = 0.02
TIMEOUT_S = 1.0
RUN_TIMEOUT_S = 400.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--requests-per-minute", type=int, default=REQUESTS_PER_MINUTE, help="of all teachers together")
    given = parser.parse_args()
    clients = make_clients(given.requests, requests_per_minute=given.requests_per_minute)
    os.environ.update({client.key_variable: KEY for client in clients})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [
            stack.enter_context(
                serving(
                    latency_s=LATENCY_S,
                    faults=client.faults,
                    repeats="fresh",
                    requests_per_minute=client.requests_per_minute,
                )
            )
            for client in clients
        ]
        report = run(clients, servers, folder / "ledger.sqlite")
    report = {
        **provenance(),
        **report,
    }
    print(json.dumps({name: value for name, value in report.items() if name != "teachers"}, indent=1))
    if report["errors"]:
        sys.exit(f"{len(report['errors'])} figures do not add up")
    if given.requests >= 10_000:
        RESULT.write_text(json.dumps(report, indent=1) + "\n")


def run(clients: Sequence[Client], servers: Sequence[ServerProcess], ledger: Path) -> dict[str, Any]:
    """Ask everything twice and return all figures."""
    urls = [base_url(server.port, client.dialect) for client, server in zip(clients, servers, strict=True)]

    def ask() -> list[list[TeacherAnswer]]:
        asked = ask_all(clients, urls, ledger=ledger, timeout_s=TIMEOUT_S)
        return asyncio.run(asyncio.wait_for(asked, RUN_TIMEOUT_S))

    started, cpu = time.perf_counter(), time.process_time()
    answers = ask()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    teachers, missing, errors = {}, Counter[str](), []
    for client, server, own in zip(clients, servers, answers, strict=True):
        stats = server.stats()
        found = audit(client, own, fetch_log(server), ledger)
        found.require(stats["violations"] == 0, f"{stats['violations']} requests came over the limit")
        if client.has_own_bodies:
            found.require(stats["early_retries"] == 0, f"{stats['early_retries']} requests came again too early")
        figures = {"violations": stats["violations"], "peak_in_flight": stats["peak_in_flight"], **found.figures}
        teachers[client.spec] = {**figures, "missing": dict(found.missing)}
        missing += found.missing
        errors += [f"{client.spec}: {error}" for error in found.errors]
    again, second_errors = second_pass(servers, answers, ask)
    return {
        "faults": FAULTS,
        "latency_s": LATENCY_S,
        "timeout_s": TIMEOUT_S,
        "requests_per_minute": sum(client.requests_per_minute for client in clients),
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "totals": totals(teachers.values()),
        "missing": dict(missing.most_common()),
        "second_pass": again,
        "errors": errors + second_errors,
        "teachers": teachers,
    }


def second_pass(
    servers: Sequence[ServerProcess], answers: Sequence[Sequence[TeacherAnswer]], ask: Any
) -> tuple[dict[str, int], list[str]]:
    """Ask everything again over the same ledger: failed continuations alone may cost anything."""
    before = sum(server.stats()["billed"] for server in servers)
    errors, changed, left = [], 0, 0
    pairs = [
        pair
        for first, second in zip(answers, ask(), strict=True)
        for one, other in zip(first, second, strict=True)
        for pair in zip(one.continuations, other.continuations, strict=True)
    ]
    failed = [(one, other) for one, other in pairs if one.missing in (Missing.FAILED, Missing.TIMEOUT)]
    changed = sum(one != other for one, other in pairs) - sum(one != other for one, other in failed)
    left = sum(other.missing in (Missing.FAILED, Missing.TIMEOUT) for _, other in failed)
    billed = sum(server.stats()["billed"] for server in servers) - before
    if changed:
        errors.append(f"{changed} stored continuations changed")
    if billed > len(failed):
        errors.append(f"the second pass paid {billed} requests for {len(failed)} failed continuations")
    return {"failed_before": len(failed), "failed_after": left, "changed": changed, "http_200_billed": billed}, errors


def totals(figures: Any) -> dict[str, Any]:
    """Sum what can be summed."""
    sums: Counter[str] = Counter()
    for teacher in figures:
        sums.update({name: value for name, value in teacher.items() if isinstance(value, int | float)})
        sums.update({f"decision {name}": count for name, count in teacher["decisions"].items()})
    return {name: round(value, 9) for name, value in sums.items() if name != "most_requests_in_60_s"}


def fetch_log(server: ServerProcess) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/__log", timeout=60) as response:
        found: list[dict[str, Any]] = json.load(response)
    return found


if __name__ == "__main__":
    main()
