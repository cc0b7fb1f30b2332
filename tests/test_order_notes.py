"""Orders noted in a plain file: what a killed process leaves behind, and what nobody may count twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

from omniopd.teachers.base import Bound
from omniopd.teachers.ledger import Ledger
from omniopd.teachers.ledger_entries import Ordered
from omniopd.teachers.order_notes import OrderNotes, noting_owners, read_notes, take_notes
from omniopd.types import Usage

BOUND = Bound(tokens=20, usd=0.5)


def order(number: int) -> Ordered:
    return Ordered(number, "t", BOUND)


def test_notes_are_what_was_added_and_not_struck(tmp_path: Path) -> None:
    notes = OrderNotes(tmp_path, "me")
    assert list(noting_owners(tmp_path)) == [] and read_notes(tmp_path, "me") == []
    for number in (1, 2, 3):
        notes.add(order(number))
    notes.strike([2, 9])
    assert [note[0] for note in read_notes(tmp_path, "me")] == [1, 3] == list(notes.open)
    assert list(noting_owners(tmp_path)) == ["me"]
    with (tmp_path / "me.orders").open("a") as file:
        file.write('[4, "t", 1.0, 2')  # Killed while it wrote: never sent.
    assert [note[0] for note in take_notes(tmp_path, "me")] == [1, 3]
    assert take_notes(tmp_path, "me") == []
    assert list(tmp_path.iterdir()) == []
    notes.close()
    notes.close()


def test_a_dead_owners_notes_are_possibly_spent_once(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    folder = Path(f"{path}.owners")
    folder.mkdir()
    dead = OrderNotes(folder, "0" * 32)
    dead.add(order(1))
    dead.add(order(2))
    dead.strike([1])
    # Who only reads tidies nothing up.
    reader = Ledger(path)
    assert [(o.owner, o.is_alive, o.bound) for o in reader.in_flight()] == [("0" * 32, False, BOUND)]
    assert reader.possible() == (0.5, 20)
    reader.close()

    async def go() -> None:
        ledger = Ledger(path)
        await ledger.order(BOUND, teacher_id="t")
        ledger.add("t", [], Usage(requests=1, cost_usd=0.0), 0.0)
        assert [o.is_alive for o in ledger.in_flight()] == [True]
        assert ledger.possible() == (0.5, 20)
        ledger.close()

    asyncio.run(go())
    # One of the dead, and the one that was still open when its own ledger was closed.
    assert Ledger(path).possible() == (1.0, 40)
    assert Ledger(path).spent().unanswered_requests == 2
    assert not folder.exists()
