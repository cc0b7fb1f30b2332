"""Run the server in a process of its own until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import signal
from pathlib import Path

from .faults import Settings
from .log import Log
from .server import listening
from .teaching import Teaching


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.teacher_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--announce", type=Path, help="written with port and pid once the server listens")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument("--faults", type=json.loads, default={}, help='e.g. {"429": 0.1, "hang": 0.02}')
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--settings", type=json.loads, default={}, help="any other fields of Settings, as JSON")
    parser.add_argument("--log", type=Path, help="a JSON line for each request that has ended")
    parser.add_argument("--lifetime", type=float, default=3600.0, help="seconds after which it ends by itself")
    given = parser.parse_args()
    named = {"latency_s": given.latency, "faults": given.faults, "seed": given.seed}
    settings = Settings(**{**named, **given.settings})
    asyncio.run(_serve(Teaching(settings=settings, log=Log(given.log)), given.port, given.announce, given.lifetime))


async def _serve(teaching: Teaching, port: int, announce: Path | None, lifetime_s: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with listening(teaching, port) as found:
        # The log only grows; walking over it again and again would show as latency.
        gc.freeze()
        gc.set_threshold(100_000, 50, 50)
        if announce is not None:
            draft = announce.with_name(announce.name + ".part")
            draft.write_text(json.dumps({"port": found, "pid": os.getpid()}))
            draft.replace(announce)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), lifetime_s)


if __name__ == "__main__":
    main()
