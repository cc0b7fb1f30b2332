"""What the page shows of a run's diagnostics, read from its records as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omniopd.records import diagnostics_of, read_diagnostics
from omniopd.run_folder import RunFolder

PROFILES = ("log_ratio", "overlap_ratio", "entropy_gap")
"""Diagnostics that are drawn along the rollout."""
BY_VERDICT = ("log_ratio",)
"""Those that are drawn for right and wrong rollouts apart."""
VERDICTS = ("correct", "wrong")


def collect_diagnostics(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the diagnostics say; `rows` are the run's metrics.

    `teachers` holds for each open-weight teacher the curves over steps (`means`, `by_correctness`) and the profiles
    along the rollout of the first and the last comparison; `alarms` the steps at which each alarm stood, with the
    sentence that was said when it began; `probes` the lines of the last prefix probe of each teacher.
    """
    found = read_diagnostics(diagnostics_of(folder))
    names = list(dict.fromkeys(name for row in found for name in row.get("match", {})))
    said = [
        {"step": row["step"], "name": name, "text": text}
        for row in found
        for name, text in row.get("alarms", {}).items()
    ]
    standing = {
        name.removeprefix("alarm/"): [row["step"] for row in rows if row.get(name)]
        for name in sorted({name for row in rows for name in row if name.startswith("alarm/")})
    }
    return {
        "teachers": [
            _teacher(name, [(row["step"], row["match"][name]) for row in found if name in row.get("match", {})])
            for name in names
        ],
        "alarms": {"steps": standing, "said": said},
        "probes": {
            name: {"step": row["step"], "lines": probe["lines"]}
            for row in found
            for name, probe in row.get("prefix", {}).items()
        },
    }


def _teacher(name: str, matches: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    diagnostics = sorted({of for _, match in matches for of in match["means"]})
    first, last = matches[0], matches[-1]
    ends = [first] if len(matches) == 1 else [first, last]
    return {
        "name": name,
        "top_k": last[1]["top_k"],
        "means": {of: [[step, m["means"][of]] for step, m in matches if of in m["means"]] for of in diagnostics},
        "by_correctness": {
            of: {verdict: _of_verdict(matches, of, verdict) for verdict in VERDICTS}
            for of in BY_VERDICT
            if of in diagnostics
        },
        "profiles": {
            of: [{"step": step, "values": m["by_position"][of]} for step, m in ends if of in m["by_position"]]
            for of in PROFILES
            if of in diagnostics
        },
    }


def _of_verdict(matches: Sequence[tuple[int, Mapping[str, Any]]], of: str, verdict: str) -> list[list[float]]:
    points = [(step, m["by_correctness"].get(of, {}).get(verdict)) for step, m in matches]
    return [[step, value] for step, value in points if value is not None]
