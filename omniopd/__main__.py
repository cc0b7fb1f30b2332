"""`python -m omniopd` is `omniopd`."""

from __future__ import annotations

from omniopd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
