"""When and where a figure was measured."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime


def provenance() -> dict[str, str]:
    """Return the head of every record: a figure without it compares with nothing."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
