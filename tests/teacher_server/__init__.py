"""A loopback server of our own that speaks the real dialects and fails on demand.

    with TeacherServer(latency_s=0.05, faults={"429": 0.1, "reset": 0.01}) as server:
        server.base_url("anthropic"), server.log.stats()

or, for benchmarks, in a process of its own:

    python -m tests.teacher_server --port 0 --announce FILE --latency 0.05 --faults '{"429": 0.1}' --seed 0

Unknown fields, wrong keys and wrong shapes are refused in the provider's own words. Answers are a pure function of the
conversation, the prefix and the sample (`expected_continuation`), so a client's results can be checked one by one.
"""

from __future__ import annotations

from .faults import FAULTS, Settings
from .log import Entry, Log
from .server import TeacherServer, base_url
from .world import expected_continuation, identity

__all__ = ["FAULTS", "Entry", "Log", "Settings", "TeacherServer", "base_url", "expected_continuation", "identity"]
