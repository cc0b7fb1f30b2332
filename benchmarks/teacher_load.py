"""Requests per second and CPU time of teacher clients against one loopback server with 50 ms latency.

    python -m benchmarks.teacher_load [--quick]

The server runs in a process of its own and answers by a pure function of the request, so every client must get the
same answers; they are checked one by one. Rounds of the clients alternate, so a busy machine slows all of them; a
figure is the median over the rounds. Each run has a warm-up that opens its connections and is not timed. Prints a
table and writes `benchmarks/results/teacher_load.json`.

Clients:
    bare aiohttp      no more than JSON out and in: what the server and the machine can do.
    openai            AsyncOpenAI as it comes. It keeps 100 idle connections; beyond 100 requests at a time it opens
                      new ones all the time, which is its default and part of the figure.
    openai keepalive  the same, told to keep as many connections as there are requests at a time.
    openai aiohttp    the same on aiohttp, the `openai[aiohttp]` extra.
    omniopd           ours: the same requests, and its repairs of the answers.
    omniopd, ledger   the same with every answer on disk before it is used.

Retries are off everywhere, and every client is closed before the next one begins: with an AsyncOpenAI left to the
garbage collector, the next client's requests were seen to hang.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from omniopd.teachers.base import ContinuationRequest
from omniopd.teachers.continuation import continuation_messages
from omniopd.teachers.resolve import open_teacher
from omniopd.types import Message
from tests.teacher_server import expected_continuation

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "teacher_load.json"
LATENCY_S = 0.05
CONCURRENCY = (16, 64, 256)
ROUNDS = 3
KEY = "test-key"
MODEL = "bench"
MAX_TOKENS = 50
TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 180.0
"""A run that takes longer is a hang, and an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One client's way through all requests."""

    seconds: float
    cpu_seconds: float
    """Of this process."""
    answers: list[str | None]


Ask = Callable[[Sequence[ContinuationRequest]], Awaitable[list[str | None]]]
Client = Callable[[str, int, Sequence[ContinuationRequest]], Awaitable[Run]]


def make_requests(n: int) -> list[ContinuationRequest]:
    """Return different requests of the size of a math problem with half a solution."""
    story = "A shop sells pens in boxes. " * 8
    steps = "We write down what is known and count the boxes first. " * 12
    return [
        ContinuationRequest(
            messages=(Message(role="user", content=f"{story}Problem {i}: how many pens are in {i} boxes?"),),
            prefix=f"{steps}For {i} boxes we get {i} * 12 =",
            n=1,
            max_tokens=MAX_TOKENS,
        )
        for i in range(n)
    ]


def expected_answers(requests: Sequence[ContinuationRequest]) -> list[str | None]:
    return [expected_continuation(r.messages, r.prefix, 0, r.max_tokens) for r in requests]


async def run_ours(base_url: str, concurrency: int, requests: Sequence[ContinuationRequest]) -> Run:
    return await _ours(base_url, concurrency, requests, ledger=None)


async def run_ours_with_ledger(base_url: str, concurrency: int, requests: Sequence[ContinuationRequest]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return await _ours(base_url, concurrency, requests, ledger=Path(folder) / "ledger.sqlite")


async def _ours(
    base_url: str, concurrency: int, requests: Sequence[ContinuationRequest], *, ledger: Path | None
) -> Run:
    os.environ["OPENAI_API_KEY"] = KEY
    teacher = open_teacher(
        f"openai:{MODEL}@{base_url}",
        continuation="chat",
        temperature=None,
        max_concurrency=concurrency,
        timeout_s=TIMEOUT_S,
        max_attempts=1,
        ledger=ledger,
    )

    async def ask(asked: Sequence[ContinuationRequest]) -> list[str | None]:
        return [answer.continuations[0].text for answer in await teacher.continuations(asked)]

    try:
        return await _timed(ask, concurrency, requests)
    finally:
        await teacher.aclose()


async def run_openai(base_url: str, concurrency: int, requests: Sequence[ContinuationRequest]) -> Run:
    return await _openai(base_url, concurrency, requests)


async def run_openai_keepalive(base_url: str, concurrency: int, requests: Sequence[ContinuationRequest]) -> Run:
    import httpx2
    import openai

    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    return await _openai(base_url, concurrency, requests, http_client=openai.DefaultAsyncHttpx2Client(limits=limits))


async def run_openai_aiohttp(base_url: str, concurrency: int, requests: Sequence[ContinuationRequest]) -> Run:
    import openai

    return await _openai(base_url, concurrency, requests, http_client=openai.DefaultAioHttpClient())


async def run_bare(base_url: str, concurrency: int, requests: Sequence[ContinuationRequest]) -> Run:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    timeout = aiohttp.ClientTimeout(TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:

        async def one(request: ContinuationRequest) -> str | None:
            data = json.dumps({"model": MODEL, "messages": _wording(request), "max_completion_tokens": MAX_TOKENS})
            async with session.post(f"{base_url}/chat/completions", data=data.encode()) as response:
                answer = json.loads(await response.read())
                text: str | None = answer["choices"][0]["message"]["content"]
                return text

        return await _timed(_workers(one, concurrency), concurrency, requests)


CLIENTS: dict[str, Client] = {
    "bare aiohttp": run_bare,
    "openai": run_openai,
    "openai keepalive": run_openai_keepalive,
    "openai aiohttp": run_openai_aiohttp,
    "omniopd": run_ours,
    "omniopd, ledger": run_ours_with_ledger,
}


async def _openai(
    base_url: str, concurrency: int, requests: Sequence[ContinuationRequest], *, http_client: Any = None
) -> Run:
    import openai

    async with openai.AsyncOpenAI(
        api_key=KEY, base_url=base_url, max_retries=0, timeout=TIMEOUT_S, http_client=http_client
    ) as client:

        async def one(request: ContinuationRequest) -> str | None:
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=_wording(request),  # type: ignore[arg-type]
                max_completion_tokens=MAX_TOKENS,
            )
            return answer.choices[0].message.content

        return await _timed(_workers(one, concurrency), concurrency, requests)


def _wording(request: ContinuationRequest) -> list[dict[str, Any]]:
    asked = continuation_messages(request.messages, request.prefix, max_tokens=request.max_tokens)
    return [{"role": message.role, "content": message.content} for message in asked]


def _workers(one: Callable[[ContinuationRequest], Awaitable[str | None]], concurrency: int) -> Ask:
    """Ask one by one, `concurrency` at a time."""

    async def ask(requests: Sequence[ContinuationRequest]) -> list[str | None]:
        answers: list[str | None] = [None] * len(requests)
        left = iter(enumerate(requests))

        async def work() -> None:
            for i, request in left:
                answers[i] = await one(request)

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return answers

    return ask


async def _timed(ask: Ask, concurrency: int, requests: Sequence[ContinuationRequest]) -> Run:
    # Other requests than the timed ones, so that nothing can be remembered.
    await ask(make_requests(len(requests) + concurrency)[len(requests) :])
    start, cpu = time.perf_counter(), time.process_time()
    answers = await ask(requests)
    return Run(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, answers=answers)


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """The server, in a process of its own."""

    pid: int
    port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/__stats", timeout=10) as response:
            found: dict[str, Any] = json.load(response)
        return found

    def reset(self) -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}/__reset", timeout=10).close()

    def cpu_seconds(self) -> float | None:
        """Return the CPU time that the server used so far; None where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(**settings: Any) -> Iterator[ServerProcess]:
    """Run the server with `Settings`; it is gone when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        announce = Path(folder) / "announce.json"
        command = [sys.executable, "-m", "tests.teacher_server", "--announce", str(announce)]
        process = subprocess.Popen([*command, "--settings", json.dumps(settings)], cwd=ROOT)
        try:
            deadline = time.monotonic() + 30
            while not announce.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the teacher server did not start (exit code {process.poll()})")
                time.sleep(0.02)
            yield ServerProcess(process.pid, json.loads(announce.read_text())["port"])
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def measure(server: ServerProcess, client: Client, concurrency: int, num_requests: int) -> dict[str, Any] | None:
    """Return the figures of one run; None when there is no such client. Raises RuntimeError for a wrong answer."""
    requests = make_requests(num_requests)
    server.reset()
    server_cpu = server.cpu_seconds()
    run = asyncio.run(asyncio.wait_for(client(server.base_url, concurrency, requests), RUN_TIMEOUT_S))
    if run is None:
        return None
    wrong = [
        i for i, pair in enumerate(zip(run.answers, expected_answers(requests), strict=True)) if len(set(pair)) > 1
    ]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {num_requests} answers are wrong, the first is {run.answers[wrong[0]]!r}")
    stats, later_cpu = server.stats(), server.cpu_seconds()
    sent = num_requests + concurrency
    return {
        "requests_per_second": num_requests / run.seconds,
        "client_cpu_ms_per_request": run.cpu_seconds / num_requests * 1e3,
        "server_cpu_ms_per_request": None
        if server_cpu is None or later_cpu is None
        else (later_cpu - server_cpu) / sent * 1e3,
        "requests_received": stats["received"] - concurrency,
        "peak_in_flight": stats["peak_in_flight"],
        "answers_sha256": hashlib.sha256(json.dumps(run.answers).encode()).hexdigest()[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round with few requests; writes nothing")
    quick = parser.parse_args().quick
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    started = time.perf_counter()
    with serving(latency_s=LATENCY_S) as server:
        for _ in range(1 if quick else ROUNDS):
            for concurrency in CONCURRENCY:
                num_requests = concurrency * 2 if quick else max(600, concurrency * 12)
                for name, client in CLIENTS.items():
                    figures = measure(server, client, concurrency, num_requests)
                    if figures is not None:
                        runs.setdefault((concurrency, name), []).append(figures)
    results = [_row(concurrency, name, figures) for (concurrency, name), figures in runs.items()]
    plain = {row["concurrency"]: row["requests_per_second"] for row in results if row["client"] == "openai"}
    for row in results:
        row["times_openai"] = row["requests_per_second"] / plain[row["concurrency"]]
        print(
            f"{row['concurrency']:>4}  {row['client']:<17} {row['requests_per_second']:>7.0f} requests/s "
            f"{row['client_cpu_ms_per_request']:>7.3f} ms CPU   {row['times_openai']:>5.2f} x openai"
        )
    if not quick:
        _write(results, time.perf_counter() - started)


def _row(concurrency: int, name: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"concurrency": concurrency, "client": name, "rounds": len(figures)}
    for field, value in figures[0].items():
        values = [figure[field] for figure in figures]
        row[field] = statistics.median(values) if isinstance(value, int | float) else value
    row["requests_per_second_of_rounds"] = [round(figure["requests_per_second"], 1) for figure in figures]
    return row


def _write(results: list[dict[str, Any]], seconds: float) -> None:
    packages = ("openai", "httpx2", "aiohttp")
    RESULT.parent.mkdir(exist_ok=True)
    report = {
        **provenance(),
        "packages": {name: version(name) for name in packages},
        "latency_s": LATENCY_S,
        "wall_seconds": round(seconds),
        "results": results,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
