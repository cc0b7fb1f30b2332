"""What a model costs: from the user, the card, or litellm's table where that package is installed.

The table is read as a file and litellm never imported. What nobody knows is None, never 0.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniopd.teachers.cards import Card, ModelPrice

_TABLE = "model_prices_and_context_window_backup.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPrice:
    """A price, and who says so."""

    price: ModelPrice
    source: str
    """`your settings`, `card of 2026-11-22` or `litellm 1.109.0`."""


def find_price(card: Card, model: str, *, is_card_host: bool, override: ModelPrice | None = None) -> FoundPrice | None:
    """Return what a model costs; None when nobody knows.

    Args:
        is_card_host: whether the card speaks about the address that is asked. Another address has prices of its own,
            which only the user can tell.
        override: what the user says, which wins.
    """
    if override is not None:
        return FoundPrice(price=override, source="your settings")
    if not is_card_host:
        return None
    if card.price is not None and (price := card.price.of(model)) is not None:
        return FoundPrice(price=price, source=f"card of {card.price.as_of.isoformat()}")
    price = _table_price(_table_entry(card, model))
    return FoundPrice(price=price, source=_table_name()) if price is not None else None


def deprecation_of(card: Card, model: str) -> datetime.date | None:
    """Return the day on which the provider takes the model away, as litellm's table has it; None when unknown."""
    said = _table_entry(card, model).get("deprecation_date")
    if not isinstance(said, str):
        return None
    try:
        return datetime.date.fromisoformat(said)
    except ValueError:
        return None


def _table_entry(card: Card, model: str) -> Mapping[str, Any]:
    provider, path = card.price_table, _table_path()
    if provider is None or path is None:
        return {}
    table = _load_table(path)
    entry = table.get(f"{provider}/{model}")
    if isinstance(entry, dict):
        return entry
    entry = table.get(model)
    # The same name may be sold by several.
    owners = (provider, f"text-completion-{provider}")
    return entry if isinstance(entry, dict) and entry.get("litellm_provider") in owners else {}


def _table_price(entry: Mapping[str, Any]) -> ModelPrice | None:
    inputs = _per_mtok(entry.get("input_cost_per_token"))
    outputs = _per_mtok(entry.get("output_cost_per_token"))
    # The table has zeros for what is free and for what is not known; nobody can tell them apart.
    if inputs is None or outputs is None or inputs == outputs == 0:
        return None
    price = ModelPrice(
        input_usd_per_mtok=inputs,
        # Hidden thinking is part of the output; where it is dearer, nothing is estimated too low.
        output_usd_per_mtok=max(outputs, _per_mtok(entry.get("output_cost_per_reasoning_token")) or 0.0),
        cached_input_usd_per_mtok=_per_mtok(entry.get("cache_read_input_token_cost")),
        cache_write_usd_per_mtok=_per_mtok(entry.get("cache_creation_input_token_cost")),
    )
    batch = [
        (_per_mtok(entry.get("input_cost_per_token_batches")), inputs),
        (_per_mtok(entry.get("output_cost_per_token_batches")), outputs),
    ]
    factors = [reduced / full for reduced, full in batch if reduced and full]
    # The higher of the two, so that nothing is estimated too low.
    return price.model_copy(update={"batch_factor": min(1.0, max(factors))}) if factors else price


def _per_mtok(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        return None
    # 5e-08 * 1e6 is 0.049999999999999996.
    return round(value * 1e6, 9)


def _table_path() -> Path | None:
    spec = importlib.util.find_spec("litellm")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(folders[0]) / _TABLE if folders else None


def _table_name() -> str:
    try:
        return f"litellm {importlib.metadata.version('litellm')}"
    except importlib.metadata.PackageNotFoundError:
        return "litellm"


@functools.cache
def _load_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Another version may keep its table elsewhere. Prices are unknown then, which callers say.
        return {}
    return table if isinstance(table, dict) else {}
