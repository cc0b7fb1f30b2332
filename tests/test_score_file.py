from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from omniopd import score_file as module
from omniopd.api import ChunkRewarder
from omniopd.errors import ConfigError, DataError, RunError, TeacherConnectionError
from omniopd.score_file import ScoreSummary, score_file
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.types import Continuation, Missing, Usage

_ROWS: list[dict[str, Any]] = [
    {"id": 7, "prompt": "Count.", "response": "one two three", "note": "caf\u00e9"},
    {"prompt": [{"role": "user", "content": "Count."}], "response": "one TWO"},
    {"prompt": "Be silent.", "response": ""},
    {"prompt": "Count.", "response": "one two three four", "entropies": [0.5, 0, 3, 1]},
]


class CountingTeacher:
    """Counts upwards from any prefix; can fail after some calls, and refuse some prefixes."""

    id = "scripted:counting"

    def __init__(self, *, dies_after: int | None = None, refuses: Callable[[str], bool] = lambda prefix: False) -> None:
        self.dies_after = dies_after
        self.refuses = refuses
        self.prefixes: list[str] = []
        self.calls = 0

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        if self.calls == self.dies_after:
            raise TeacherConnectionError("the teacher is gone")
        self.calls += 1
        self.prefixes += [request.prefix for request in requests]
        return [TeacherAnswer(continuations=(self._one(r),) * r.n, usage=Usage(requests=1)) for r in requests]

    def _one(self, request: ContinuationRequest) -> Continuation:
        if self.refuses(request.prefix):
            return Continuation(text=None, missing=Missing.REFUSED)
        words = ["one", "two", "three", "four", "five", "six"]
        return Continuation(text=" ".join(words[len(request.prefix.split()) :]))

    async def aclose(self) -> None: ...


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run(tmp_path: Path, teacher: CountingTeacher, **options: Any) -> ScoreSummary:
    with ChunkRewarder(teacher=teacher, chunk_words=2) as rewarder:
        return score_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", rewarder, **options)


def test_every_row_comes_back_with_exactly_its_chunks(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", _ROWS)
    teacher = CountingTeacher(refuses=lambda prefix: prefix == "one two" and len(teacher.prefixes) < 4)
    summary = _run(tmp_path, teacher)
    rows = _read(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "chunks"} for row in rows] == _ROWS
    assert rows[0]["chunks"] == [
        {"start": 0, "end": 7, "text": "one two", "score": 1.0, "num_continuations": 4, "missing": None},
        {"start": 7, "end": 13, "text": " three", "score": None, "num_continuations": 0, "missing": "refused"},
    ]
    assert rows[1]["chunks"][0]["score"] == pytest.approx(4 / 7)  # "one TWO" against "one two": 3 of 7 differ
    assert rows[2]["chunks"] == []
    # Entropies: 3 at "three" takes "three four"; then 0.5 at "one" takes "one two".
    assert [c["text"] for c in rows[3]["chunks"]] == ["one two", " three four"]
    assert "caf\u00e9" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert (summary.rows, summary.rows_resumed, summary.chunks, summary.missing) == (4, 0, 5, {"refused": 1})
    assert summary.mean_score == pytest.approx((1 + 4 / 7 + 1 + 1) / 4)
    # Rows 0 and 1 share the request for the empty prefix; row 3 is a call of its own.
    assert summary.usage.requests == 2 + 2


def _one_row_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 1)


def test_a_crashed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_row_per_batch(monkeypatch)
    _write(tmp_path / "in.jsonl", _ROWS)
    _run(tmp_path, CountingTeacher())
    straight = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()

    with pytest.raises(TeacherConnectionError):
        _run(tmp_path, CountingTeacher(dies_after=1))
    assert len(_read(tmp_path / "out.jsonl")) == 1  # what was paid for is kept
    again = CountingTeacher()
    summary = _run(tmp_path, again)
    assert (tmp_path / "out.jsonl").read_bytes() == straight
    assert (summary.rows, summary.rows_resumed) == (4, 1)
    assert again.prefixes == ["", "", "one two"]  # row 1; row 2 has no chunk; row 3

    finished = CountingTeacher()
    assert _run(tmp_path, finished).rows_resumed == 4
    assert finished.calls == 0


@pytest.mark.parametrize("kept", [0, 1, 40, -2, -1])
def test_a_torn_last_line_is_dropped_wherever_it_tore(tmp_path: Path, kept: int) -> None:
    _write(tmp_path / "in.jsonl", _ROWS)
    _run(tmp_path, CountingTeacher())
    straight = (tmp_path / "out.jsonl").read_bytes()
    first, rest = straight.split(b"\n", 1)
    second = rest.split(b"\n")[0] + b"\n"
    (tmp_path / "out.jsonl").write_bytes(first + b"\n" + second[:kept])
    assert _run(tmp_path, CountingTeacher()).rows_resumed == 1
    assert (tmp_path / "out.jsonl").read_bytes() == straight


def test_output_torn_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", _ROWS)
    _run(tmp_path, CountingTeacher())
    straight = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(straight[:20])
    assert _run(tmp_path, CountingTeacher()).rows_resumed == 0
    assert (tmp_path / "out.jsonl").read_bytes() == straight


@pytest.mark.parametrize(
    "changed",
    [
        [{**_ROWS[0], "response": "one two four"}, *_ROWS[1:]],
        [{**_ROWS[0], "note": "other"}, *_ROWS[1:]],
        [_ROWS[1], _ROWS[0], *_ROWS[2:]],
        _ROWS[:2],
    ],
    ids=["response", "other field", "order", "fewer rows"],
)
def test_a_changed_input_is_refused_and_the_output_left_alone(tmp_path: Path, changed: list[dict[str, Any]]) -> None:
    _write(tmp_path / "in.jsonl", _ROWS)
    _run(tmp_path, CountingTeacher())
    before = (tmp_path / "out.jsonl").read_bytes()
    _write(tmp_path / "in.jsonl", changed)
    teacher = CountingTeacher()
    with pytest.raises(DataError, match="the input has changed"):
        _run(tmp_path, teacher)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert teacher.calls == 0


def test_appended_rows_are_scored_and_resume_off_starts_afresh(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", _ROWS[:2])
    _run(tmp_path, CountingTeacher())
    _write(tmp_path / "in.jsonl", _ROWS)
    assert _run(tmp_path, CountingTeacher()).rows_resumed == 2
    _write(tmp_path / "in.jsonl", _ROWS[1:2])
    assert _run(tmp_path, CountingTeacher(), resume=False).rows_resumed == 0
    assert len(_read(tmp_path / "out.jsonl")) == 1


def test_output_that_is_no_output_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", _ROWS)
    _write(tmp_path / "out.jsonl", _ROWS)  # the rows, but without chunks
    with pytest.raises(DataError, match=r"out\.jsonl:1 is not row 1"):
        _run(tmp_path, CountingTeacher())
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(DataError, match=r"out\.jsonl:1: not a line of JSON"):
        _run(tmp_path, CountingTeacher())
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{torn", "not a line of JSON"),
        ('{"prompt": "p", "response": "r", "x": NaN}', "NaN is no JSON number"),
        ("[1]", "holds list; expected an object"),
        ('{"response": "r"}', "no 'prompt'; it has response"),
        ('{"prompt": "p"}', "no 'response'; it has prompt"),
        ("{}", "no 'prompt'; it has nothing"),
        ('{"prompt": "p", "response": null}', "'response' is NoneType; expected text"),
        ('{"prompt": 3, "response": "r"}', "prompt is 3"),
        ('{"prompt": [{"role": "user"}], "response": "r"}', "a message is"),
        ('{"prompt": "p", "response": "r", "chunks": []}', "'chunks' already"),
        ('{"prompt": "p", "response": "a b", "entropies": [1]}', "1 entropies for a response of 2 words"),
        ('{"prompt": "p", "response": "a b", "entropies": [1, null]}', "not a list of numbers"),
        ('{"prompt": "p", "response": "a", "entropies": [1e999]}', "finite"),
        ('{"prompt": "p", "response": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not a line of JSON"),
        (b"\xff".decode("latin-1"), "not a line of JSON"),
    ],
)
def test_a_malformed_row_is_named_before_any_money_is_spent(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps(_ROWS[0])
    (tmp_path / "in.jsonl").write_bytes(f"{good}\n\n{line}\n".encode("latin-1"))
    teacher = CountingTeacher()
    with pytest.raises(DataError, match=message) as caught:
        _run(tmp_path, teacher)
    assert f"{tmp_path / 'in.jsonl'}:3: " in str(caught.value)  # the blank line counts
    assert teacher.calls == 0
    assert not (tmp_path / "out.jsonl").exists()


def test_files_must_exist_and_differ(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        _run(tmp_path, CountingTeacher())
    path = _write(tmp_path / "in.jsonl", _ROWS)
    with ChunkRewarder(teacher=CountingTeacher()) as rewarder, pytest.raises(ConfigError, match="expected two files"):
        score_file(path, tmp_path / "." / "in.jsonl", rewarder)
    assert _read(path) == _ROWS


def test_byte_order_mark_crlf_and_a_missing_final_newline_are_read(tmp_path: Path) -> None:
    text = "\r\n".join(json.dumps(row) for row in _ROWS[:2])
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert _run(tmp_path, CountingTeacher()).rows == 2
    assert _run(tmp_path, CountingTeacher()).rows_resumed == 2


def test_an_empty_input_gives_an_empty_output(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", [])
    summary = _run(tmp_path, CountingTeacher())
    assert (summary.rows, summary.chunks, summary.mean_score) == (0, 0, None)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_rows_are_on_disk_as_each_batch_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_row_per_batch(monkeypatch)
    _write(tmp_path / "in.jsonl", _ROWS)
    on_disk: list[int] = []

    class Watching(CountingTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            on_disk.append((tmp_path / "out.jsonl").read_bytes().count(b"\n"))
            return await super().continuations(requests)

    _run(tmp_path, Watching())
    assert on_disk == [0, 1, 3]  # row 2 has nothing to ask


def test_progress_counts_rows_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "in.jsonl", _ROWS)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _run(tmp_path, CountingTeacher())
    assert "scoring rows" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    _run(tmp_path, CountingTeacher(), progress=False)
    assert capsys.readouterr().err == ""


def test_going_on_with_other_settings_is_refused_and_names_them(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", _ROWS)
    output = tmp_path / "out.jsonl"
    with ChunkRewarder(teacher=CountingTeacher(), similarity="edit") as first:
        score_file(source, output, first, progress=False)
    before = output.read_bytes()
    with ChunkRewarder(teacher=CountingTeacher(), similarity="exact", num_continuations=2) as other:
        with pytest.raises(DataError, match=r"similarity 'edit' -> 'exact', num_continuations 4 -> 2"):
            score_file(source, output, other, progress=False)
        assert output.read_bytes() == before
        score_file(source, output, other, resume=False, progress=False)
    assert output.read_bytes() != before


def test_an_outage_stops_before_rows_are_filed_as_failed(tmp_path: Path) -> None:
    class Broken(CountingTeacher):
        def _one(self, request: ContinuationRequest) -> Continuation:
            return Continuation(text=None, missing=Missing.FAILED, detail="HTTP 500")

    source, output = _write(tmp_path / "in.jsonl", _ROWS), tmp_path / "out.jsonl"
    with (
        ChunkRewarder(teacher=Broken()) as rewarder,
        pytest.raises(TeacherConnectionError, match=r"failed on all 2 chunks of 3 rows .*4 failed.* again to go on"),
    ):
        score_file(source, output, rewarder, progress=False)
    assert output.read_bytes() == b""
    with ChunkRewarder(teacher=CountingTeacher()) as rewarder:
        assert score_file(source, output, rewarder, progress=False).rows_resumed == 0


def test_an_output_that_cannot_be_written_is_named_before_the_teacher_is_asked(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", _ROWS)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    teacher = CountingTeacher()
    for output in (tmp_path / "folder", tmp_path / "file" / "out.jsonl"):
        with ChunkRewarder(teacher=teacher) as rewarder, pytest.raises((RunError, DataError), match="cannot"):
            score_file(source, output, rewarder, resume=False, progress=False)
    assert teacher.calls == 0
