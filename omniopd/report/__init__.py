"""One self-contained page about a run, and the last lines it prints. Reads records; changes none."""

from __future__ import annotations

from omniopd.report.build import build_report, render_summary

__all__ = ["build_report", "render_summary"]
