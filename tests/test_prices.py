"""Who says what a model costs: the user, the card, litellm's table. What nobody says is not free."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omniopd.teachers.cards import Card, ModelPrice
from omniopd.teachers.prices import FoundPrice, deprecation_of, find_price

MINE = ModelPrice(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)
TABLE: dict[str, Any] = {
    "gpt-x": {
        "litellm_provider": "openai",
        "input_cost_per_token": 2.5e-06,
        "output_cost_per_token": 1e-05,
        "cache_read_input_token_cost": 5e-08,
        "cache_creation_input_token_cost": 3.125e-06,
        "input_cost_per_token_batches": 1.25e-06,
        "output_cost_per_token_batches": 6e-06,
        "deprecation_date": "2026-10-23",
    },
    "old-instruct": {
        "litellm_provider": "text-completion-openai",
        "input_cost_per_token": 1.5e-06,
        "output_cost_per_token": 2e-06,
    },
    "openai/gpt-y": {"litellm_provider": "openai", "input_cost_per_token": 1e-06, "output_cost_per_token": 3e-06},
    "gpt-y": {"litellm_provider": "somebody", "input_cost_per_token": 9e-06, "output_cost_per_token": 9e-06},
    "theirs": {"litellm_provider": "vertex", "input_cost_per_token": 1e-06, "output_cost_per_token": 3e-06},
    "zero": {"litellm_provider": "openai", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0},
    "half": {"litellm_provider": "openai", "input_cost_per_token": 1e-06, "deprecation_date": "soon"},
    "odd": {"litellm_provider": "openai", "input_cost_per_token": "1e-06", "output_cost_per_token": -1},
    "dear-batch": {
        "litellm_provider": "openai",
        "input_cost_per_token": 1e-06,
        "output_cost_per_token": 2e-06,
        "input_cost_per_token_batches": 2e-06,
    },
    "text": "no entry",
}


def make_card(**fields: Any) -> Card:
    return Card.model_validate({"id": "x", "dialect": "openai", "price_table": "openai", **fields})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path with a litellm that must not be imported."""
    package = tmp_path / "site" / "litellm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('litellm was imported')\n")
    write_table(tmp_path / "site", json.dumps(TABLE))
    info = tmp_path / "site" / "litellm-1.109.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: litellm\nVersion: 1.109.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def write_table(site: Path, text: str) -> None:
    (site / "litellm" / "model_prices_and_context_window_backup.json").write_text(text)


def test_the_user_wins_over_the_card_and_the_card_over_the_table(site: Path) -> None:
    models = {"gpt-x": {"input_usd_per_mtok": 7.0, "output_usd_per_mtok": 8.0}}
    card = make_card(price={"as_of": "2026-11-22", "models": models})
    assert find_price(card, "gpt-x", is_card_host=True, override=MINE) == FoundPrice(price=MINE, source="your settings")
    found = find_price(card, "gpt-x", is_card_host=True)
    assert found == FoundPrice(price=ModelPrice.model_validate(models["gpt-x"]), source="card of 2026-11-22")
    # The card does not know this one.
    found = find_price(card, "old-instruct", is_card_host=True)
    assert found is not None
    assert found.source == "litellm 1.109.0"
    assert (found.price.input_usd_per_mtok, found.price.output_usd_per_mtok) == (1.5, 2.0)


def test_the_table_is_per_token_and_prices_are_per_million(site: Path) -> None:
    found = find_price(make_card(), "gpt-x", is_card_host=True)
    assert found is not None
    assert found.price == ModelPrice(
        input_usd_per_mtok=2.5,
        output_usd_per_mtok=10.0,
        cached_input_usd_per_mtok=0.05,
        cache_write_usd_per_mtok=3.125,
        # 1.25 / 2.5 = 0.5 for input, 6 / 10 = 0.6 for output: the higher.
        batch_factor=0.6,
    )
    assert "litellm" not in sys.modules


def test_another_address_has_prices_of_its_own(site: Path) -> None:
    models = {"*": {"input_usd_per_mtok": 7.0, "output_usd_per_mtok": 8.0}}
    card = make_card(price={"as_of": "2026-11-22", "models": models})
    assert find_price(card, "gpt-x", is_card_host=False) is None
    found = find_price(card, "gpt-x", is_card_host=False, override=MINE)
    assert found is not None
    assert found.price == MINE


@pytest.mark.parametrize("model", ["theirs", "zero", "half", "odd", "text", "unheard-of"])
def test_what_the_table_does_not_say_is_unknown(site: Path, model: str) -> None:
    assert find_price(make_card(), model, is_card_host=True) is None


def test_a_card_without_a_table_name_is_not_looked_up(site: Path) -> None:
    assert find_price(make_card(price_table=None), "gpt-x", is_card_host=True) is None
    assert deprecation_of(make_card(price_table=None), "gpt-x") is None


def test_the_providers_own_entry_comes_before_one_of_the_same_name(site: Path) -> None:
    found = find_price(make_card(), "gpt-y", is_card_host=True)
    assert found is not None
    assert found.price.output_usd_per_mtok == 3.0


def test_a_batch_never_costs_more_than_the_plain_request_and_half_where_nothing_is_said(site: Path) -> None:
    factors = []
    for model in ("dear-batch", "gpt-y"):
        found = find_price(make_card(), model, is_card_host=True)
        assert found is not None
        factors.append(found.price.batch_factor)
    assert factors == [1.0, 0.5]


def test_the_day_a_model_goes_away(site: Path) -> None:
    assert deprecation_of(make_card(), "gpt-x") == datetime.date(2026, 10, 23)
    assert deprecation_of(make_card(), "half") is None
    assert deprecation_of(make_card(), "unheard-of") is None


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_table_that_cannot_be_read_is_no_table(site: Path, text: str) -> None:
    path = site / "litellm" / "model_prices_and_context_window_backup.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert find_price(make_card(), "gpt-x", is_card_host=True) is None


def test_a_litellm_that_does_not_say_its_version(site: Path) -> None:
    (site / "litellm-1.109.0.dist-info" / "METADATA").unlink()
    (site / "litellm-1.109.0.dist-info").rmdir()
    found = find_price(make_card(), "gpt-x", is_card_host=True)
    assert found is not None
    assert found.source == "litellm"


def test_without_litellm_the_price_is_unknown() -> None:
    # A fresh interpreter: nothing of the fakes above, and nothing heavy is loaded.
    code = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'litellm' else real(name, *a)\n"
        "from omniopd.teachers.cards import find_card\n"
        "from omniopd.teachers.dialects import get_dialect\n"
        "from omniopd.teachers.prices import find_price\n"
        "assert find_price(find_card('openai'), 'gpt-4o', is_card_host=True) is None\n"
        "assert find_price(find_card('local'), 'm', is_card_host=True).price.cost_usd(10, 10) == 0.0\n"
        "get_dialect('anthropic')\n"
        "heavy = {'litellm', 'openai', 'anthropic', 'aiohttp', 'httpx', 'torch', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
