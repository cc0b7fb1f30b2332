from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loopback import Loopback, Received, Scripted, chat, error
from omniopd.api import ChunkRewarder
from omniopd.errors import (
    ConfigError,
    DataError,
    RunError,
    TeacherAuthError,
    TeacherBudgetError,
    TeacherConnectionError,
    TeacherRateLimitError,
)
from omniopd.score_file import OUTAGE_ROWS, ScoreSummary, score_file
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.types import Continuation, Missing, Usage
from teacher_server import TeacherServer

_ROWS: list[dict[str, Any]] = [
    {"id": 7, "prompt": "Count.", "response": "one two three", "note": "caf\u00e9"},
    {"prompt": [{"role": "user", "content": "Count."}], "response": "one TWO"},
    {"prompt": "Be silent.", "response": ""},
    {"prompt": "Count on.", "response": "one two three four", "entropies": [0.5, 0, 3, 1]},
]


class CountingTeacher:
    """Counts upwards from any prefix; can fail at a prompt, and refuse some prefixes."""

    id = "scripted:counting"

    def __init__(self, *, dies_at: str = "", refuses: Callable[[str], bool] = lambda prefix: False) -> None:
        self.dies_at = dies_at
        self.refuses = refuses
        self.prefixes: list[str] = []
        self.calls = 0

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        if any(request.messages[0].content == self.dies_at for request in requests):
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


def _questions(count: int) -> list[dict[str, Any]]:
    """Rows of one chunk each that share no request."""
    return [{"id": i, "prompt": f"Question {i}", "response": "one two"} for i in range(count)]


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
    teacher = CountingTeacher(refuses=lambda prefix: prefix == "one two" and len(teacher.prefixes) < 3)
    summary = _run(tmp_path, teacher)
    rows = _read(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "chunks"} for row in rows] == _ROWS
    assert rows[0]["chunks"] == [
        {
            "start": 0,
            "end": 7,
            "text": "one two",
            "score": 1.0,
            "num_continuations": 4,
            "missing": None,
            "detail": "",
        },
        {
            "start": 7,
            "end": 13,
            "text": " three",
            "score": None,
            "num_continuations": 0,
            "missing": "refused",
            "detail": "0 of 4 continuations usable, 2 needed (4 refused)",
        },
    ]
    assert rows[1]["chunks"][0]["score"] == pytest.approx(4 / 7)  # "one TWO" against "one two": 3 of 7 differ
    assert rows[2]["chunks"] == []
    # Entropies: 3 at "three" takes "three four"; then 0.5 at "one" takes "one two".
    assert [c["text"] for c in rows[3]["chunks"]] == ["one two", " three four"]
    assert "caf\u00e9" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert (summary.rows, summary.rows_resumed, summary.chunks, summary.missing) == (4, 0, 5, {"refused": 1})
    assert summary.mean_score == pytest.approx((1 + 4 / 7 + 1 + 1) / 4)
    # Rows 0 and 1 share the request for the empty prefix; row 3 asks something else.
    assert summary.usage.requests == 2 + 2


def test_a_hard_stop_keeps_the_finished_rows_and_the_next_call_goes_on(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [*_ROWS[:3], *_questions(30)])
    _run(tmp_path, CountingTeacher())
    straight = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()

    with pytest.raises(TeacherConnectionError, match=r"gone; 8 of 33 rows are in \S+out\.jsonl; run the same command"):
        _run(tmp_path, CountingTeacher(dies_at="Question 5"))
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(straight.splitlines(keepends=True)[:8])
    again = CountingTeacher()
    summary = _run(tmp_path, again)
    assert (tmp_path / "out.jsonl").read_bytes() == straight
    assert (summary.rows, summary.rows_resumed, summary.chunks) == (33, 8, 25)
    assert len(again.prefixes) == 25

    finished = CountingTeacher()
    assert _run(tmp_path, finished).rows_resumed == 33
    assert finished.calls == 0
    assert source.is_file()


def test_a_slow_row_holds_up_no_other(tmp_path: Path) -> None:
    """Two rows answer only when all others have been answered; one batch after the other, they would wait forever."""
    _write(tmp_path / "in.jsonl", _questions(200))

    class Gated(CountingTeacher):
        answered = 0

        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            if requests[0].messages[0].content in ("Question 3", "Question 90"):
                deadline = time.monotonic() + 10
                while self.answered < 198:
                    assert time.monotonic() < deadline, f"{self.answered} others were answered in 10 s"
                    await asyncio.sleep(0.001)
            answers = await super().continuations(requests)
            self.answered += 1
            return answers

    _run(tmp_path, Gated())
    assert [row["id"] for row in _read(tmp_path / "out.jsonl")] == list(range(200))


def test_finished_rows_are_on_disk_while_a_later_one_is_under_way(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", _questions(6))

    class Watching(CountingTeacher):
        async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
            if requests[0].messages[0].content == "Question 4":
                deadline = time.monotonic() + 10
                while (tmp_path / "out.jsonl").read_bytes().count(b"\n") < 4:
                    assert time.monotonic() < deadline, "the rows before were not written in 10 s"
                    await asyncio.sleep(0.001)
            return await super().continuations(requests)

    assert _run(tmp_path, Watching()).rows == 6


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


def test_progress_counts_rows_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "in.jsonl", _ROWS)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _run(tmp_path, CountingTeacher())
    assert "responses" in capsys.readouterr().err
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


class FailingTeacher(CountingTeacher):
    """Every request to some prompts fails for good."""

    def __init__(self, fails: Callable[[str], bool]) -> None:
        super().__init__()
        self.fails = fails

    def _one(self, request: ContinuationRequest) -> Continuation:
        if self.fails(request.messages[0].content):
            return Continuation(text=None, missing=Missing.FAILED, detail="HTTP 500 (5 attempts)")
        return super()._one(request)


def _after(number: int) -> Callable[[str], bool]:
    return lambda prompt: int(prompt.split()[1]) >= number


def test_an_outage_stops_before_rows_are_filed_as_failed(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", _questions(300))
    rows = OUTAGE_ROWS
    with pytest.raises(
        TeacherConnectionError,
        match=rf"failed on all {rows} chunks of {rows} rows in a row, the first with: .*HTTP 500.*; 40 of 300 rows are",
    ):
        _run(tmp_path, FailingTeacher(_after(40)))
    assert [row["chunks"][0]["missing"] for row in _read(tmp_path / "out.jsonl")] == [None] * 40
    assert _run(tmp_path, CountingTeacher()).rows_resumed == 40


def test_a_teacher_that_never_answers_writes_nothing_however_few_the_rows(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", [_ROWS[2], *_questions(3), _ROWS[2]])
    with pytest.raises(TeacherConnectionError, match=r"all 3 chunks of 3 rows in a row.*1 of 5 rows"):
        _run(tmp_path, FailingTeacher(_after(0)))
    assert _read(tmp_path / "out.jsonl") == [{**_ROWS[2], "chunks": []}]


def test_a_short_failure_is_filed_with_its_reason_also_at_the_end(tmp_path: Path) -> None:
    silent = [{"prompt": "Be silent.", "response": ""}] * 2
    rows = [*_questions(10), *silent, *_questions(10)]
    _write(tmp_path / "in.jsonl", rows)
    summary = _run(tmp_path, FailingTeacher(lambda prompt: prompt in ("Question 8", "Question 9")))
    missing = [row["chunks"][0]["missing"] for row in _read(tmp_path / "out.jsonl") if row["chunks"]]
    assert missing == ([None] * 8 + ["failed"] * 2) * 2
    assert summary.missing == {"failed": 4}
    assert [row for row in _read(tmp_path / "out.jsonl")][10]["chunks"] == []


def test_the_sidecar_compares_only_what_shapes_scores(tmp_path: Path) -> None:
    source, output = _write(tmp_path / "in.jsonl", _questions(2)), tmp_path / "out.jsonl"
    sidecar = tmp_path / "out.jsonl.settings.json"

    def echo(**options: Any) -> ChunkRewarder:
        return ChunkRewarder(teacher="echo:one", teacher_options=options)

    with echo(max_concurrency=3, ledger=tmp_path / "a.sqlite") as first:
        score_file(source, output, first, progress=False)
    written = json.loads(sidecar.read_text())
    assert not any(name in key for key in written for name in ("ledger", "budget", "concurrency", "batch", "timeout"))
    # As it was written once: more fields, texts for values, and none for some options.
    older = {**written, "teacher_options.ledger": "a.sqlite", "teacher_options.temperature": "1.0"}
    del older["teacher_options.shares_vocabulary"], older["keep_continuations"]
    sidecar.write_text(json.dumps(older))
    with echo(max_concurrency=5) as second:
        assert score_file(source, output, second, progress=False).rows_resumed == 2
        with pytest.raises(DataError, match="keep_continuations False -> True"):
            score_file(source, output, second, progress=False, keep_continuations=True)
    with echo(temperature=0.5) as third, pytest.raises(DataError, match=r"temperature 1\.0 -> 0\.5"):
        score_file(source, output, third, progress=False)


def test_continuations_are_kept_when_asked_for(tmp_path: Path) -> None:
    _write(tmp_path / "in.jsonl", _ROWS[:1])
    _run(tmp_path, CountingTeacher(refuses=lambda prefix: prefix == "one two"), keep_continuations=True)
    (row,) = _read(tmp_path / "out.jsonl")
    assert [chunk["continuations"] for chunk in row["chunks"]] == [["one two three four five six"] * 4, []]


def test_an_output_that_cannot_be_written_is_named_before_the_teacher_is_asked(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", _ROWS)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    teacher = CountingTeacher()
    for output in (tmp_path / "folder", tmp_path / "file" / "out.jsonl"):
        with (
            ChunkRewarder(teacher=teacher) as rewarder,
            pytest.raises((RunError, DataError, ConfigError), match=r"cannot|no regular"),
        ):
            score_file(source, output, rewarder, resume=False, progress=False)
    assert teacher.calls == 0


def _served(base_url: str, **options: Any) -> ChunkRewarder:
    return ChunkRewarder(
        teacher=f"vllm:m@{base_url}",
        teacher_options={"continuation": "prefill", "max_concurrency": 4, **options},
        num_continuations=2,
        chunk_words=2,
    )


def _asked(received: Received) -> str:
    return str(received.body["messages"][0]["content"])


@pytest.mark.parametrize(
    ("stop", "kind", "message"),
    [
        (error(401, "no such key"), TeacherAuthError, "refuses access"),
        (error(429, "no money", code="insufficient_quota"), TeacherRateLimitError, "quota"),
    ],
    ids=["key", "quota"],
)
def test_a_server_that_stops_in_the_middle_loses_no_finished_row(
    tmp_path: Path, stop: Scripted, kind: type[Exception], message: str
) -> None:
    source, output = _write(tmp_path / "in.jsonl", _questions(40)), tmp_path / "out.jsonl"
    is_over = False

    def script(received: Received) -> Scripted:
        number = int(_asked(received).split()[1])
        return stop if is_over and number >= 20 else chat("one two", "one too")

    with Loopback(script) as server:
        is_over = True
        with _served(server.base_url) as rewarder, pytest.raises(kind, match=f"{message}.*; 20 of 40 rows are in"):
            score_file(source, output, rewarder, progress=False)
        assert [row["id"] for row in _read(output)] == list(range(20))
        # Rows that were under way may each have learned of it; no others were asked.
        assert len(server.received) <= 20 + 4 * 4
        is_over = False
        with _served(server.base_url) as rewarder:
            summary = score_file(source, output, rewarder, progress=False)
    assert (summary.rows_resumed, summary.usage.requests, summary.usage.input_tokens) == (20, 20, 200)
    # "one two" is 1; "one too" differs in one of 7 characters.
    assert summary.mean_score == pytest.approx((1 + 6 / 7) / 2)


def test_a_spent_budget_keeps_what_it_bought(tmp_path: Path) -> None:
    source, output, ledger = (
        _write(tmp_path / "in.jsonl", _questions(30)),
        tmp_path / "out.jsonl",
        tmp_path / "l.sqlite",
    )
    with TeacherServer(key=None, latency_s=0.002) as server:
        url = server.base_url("vllm")
        with (
            _served(url, ledger=ledger, budget_calls=12) as rewarder,
            pytest.raises(TeacherBudgetError, match=r"of 30 rows are in \S+out\.jsonl; run the same command again"),
        ):
            score_file(source, output, rewarder, progress=False)
        rows = len(_read(output))
        assert 12 - 4 < rows <= 12  # of those under way together, one may have been served before another
        assert server.log.received == 12
        with _served(url, ledger=ledger, budget_calls=100) as rewarder:
            summary = score_file(source, output, rewarder, progress=False)
        assert server.log.received == 30
    assert (summary.rows, summary.rows_resumed) == (30, rows)
    assert (summary.usage.requests, summary.usage.cached_requests) == (18, 12 - rows)
    assert [row["id"] for row in _read(output)] == list(range(30))


@pytest.mark.parametrize("with_ledger", [False, True])
def test_half_of_the_prefixes_repeated_send_half_of_the_requests(tmp_path: Path, with_ledger: bool) -> None:
    rows = [{**row, "copy": copy} for copy in (0, 1) for row in _questions(40)]
    source = _write(tmp_path / "in.jsonl", rows)
    options = {"ledger": tmp_path / "l.sqlite"} if with_ledger else {}
    with TeacherServer(key=None) as server, _served(server.base_url("vllm"), **options) as rewarder:
        summary = score_file(source, tmp_path / "out.jsonl", rewarder, progress=False)
        assert server.log.received == 40
        assert set(server.log.choices_billed().values()) == {2}
    assert summary.usage.requests == 40
    first, second = _read(tmp_path / "out.jsonl")[:40], _read(tmp_path / "out.jsonl")[40:]
    assert [row["chunks"] for row in first] == [row["chunks"] for row in second]


def test_the_summary_has_the_whole_bill(tmp_path: Path) -> None:
    def script(received: Received) -> Scripted:
        if _asked(received) == "Question 1":
            return Scripted(drop=True)
        return chat("one two", "one", completion_tokens_details={"reasoning_tokens": 3})

    source = _write(tmp_path / "in.jsonl", _questions(3))
    with Loopback(script) as server, _served(server.base_url, max_attempts=1) as rewarder:
        usage = score_file(source, tmp_path / "out.jsonl", rewarder, progress=False).usage
    # Two are answered with 10 tokens in and 5 out each; what became of the third nobody knows, nor what it costs.
    assert (usage.requests, usage.unanswered_requests) == (len(server.received), len(server.received) - 2)
    assert (usage.input_tokens, usage.output_tokens, usage.reasoning_tokens) == (20, 10, 6)
    assert usage.cost_usd is None
    row = _read(tmp_path / "out.jsonl")[1]
    assert row["chunks"][0]["missing"] == "failed"
    assert "2 failed" in row["chunks"][0]["detail"]


_CHILD = """
import sys
from pathlib import Path
from omniopd.api import ChunkRewarder
from omniopd.score_file import score_file
url, source, output, ledger = sys.argv[1:]
options = {"continuation": "prefill", "max_concurrency": 4, "ledger": Path(ledger)}
with ChunkRewarder(
    teacher=f"vllm:m@{url}", teacher_options=options, num_continuations=2, chunk_words=2
) as rewarder:
    score_file(Path(source), Path(output), rewarder)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_process_goes_on_to_the_same_bytes_and_pays_nothing_twice(
    tmp_path: Path, number: signal.Signals
) -> None:
    rows = [{"id": i, "prompt": f"Question {i}", "response": "one two three four five"} for i in range(40)]
    source = _write(tmp_path / "in.jsonl", rows)
    whole, cut, ledger = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl", tmp_path / "l.sqlite"
    with TeacherServer(key=None, latency_s=0.02) as server:
        url = server.base_url("vllm")
        with _served(url) as rewarder:
            score_file(source, whole, rewarder, progress=False)
        needed = server.log.received
        server.reset()
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, url, str(source), str(cut), str(ledger)], stderr=subprocess.PIPE
        )
        try:
            deadline = time.monotonic() + 30
            while not (cut.exists() and cut.read_bytes().count(b"\n") >= 8):
                assert child.poll() is None and time.monotonic() < deadline, child.communicate()[1].decode()
                time.sleep(0.002)
            os.kill(child.pid, number)
            child.communicate(timeout=20)
        finally:
            child.kill()
            child.wait()
        done = cut.read_bytes().count(b"\n")
        assert 8 <= done < 40
        assert whole.read_bytes().startswith(cut.read_bytes()[: cut.read_bytes().rfind(b"\n") + 1])
        with _served(url, ledger=ledger) as rewarder:
            summary = score_file(source, cut, rewarder, progress=False)
        assert cut.read_bytes() == whole.read_bytes()
        assert summary.rows_resumed == done
        # At most what was under way at the kill is asked again.
        assert needed <= server.log.received <= needed + 4


def test_a_file_goes_through_the_batch_endpoint_as_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniopd.teachers.batch_waiting.FIRST_PAUSE_S", 0.01)
    source = _write(tmp_path / "in.jsonl", _questions(100))
    with TeacherServer(key=None, batch_delay_s=0.05) as server:
        options = {"batch": True, "ledger": tmp_path / "l.sqlite"}
        spec = f"openai:gpt-4o@{server.base_url()}"
        with ChunkRewarder(teacher=spec, teacher_options=options, num_continuations=2) as rewarder:
            summary = score_file(source, tmp_path / "out.jsonl", rewarder)
        batches = {entry.batch for entry in server.log.entries}
    assert len(batches) == 1
    assert None not in batches
    assert summary.usage.requests == 100
    assert [row["id"] for row in _read(tmp_path / "out.jsonl")] == list(range(100))


def test_rows_on_which_requests_failed_can_be_asked_again(tmp_path: Path) -> None:
    source, output = _write(tmp_path / "in.jsonl", _ROWS), tmp_path / "out.jsonl"
    with ChunkRewarder(teacher=CountingTeacher()) as rewarder:
        score_file(source, output, rewarder, progress=False)
    whole = output.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    lost = lines[0]["chunks"][0]
    lost |= {"score": None, "num_continuations": 0, "missing": "failed", "detail": "HTTP 500"}
    output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    teacher = CountingTeacher()
    with ChunkRewarder(teacher=teacher) as rewarder:
        score_file(source, output, rewarder, progress=False)
        assert teacher.calls == 0
        score_file(source, output, rewarder, progress=False, retry_failed=True)
    assert teacher.calls > 0
    assert output.read_bytes() == whole


def test_two_jobs_do_not_write_one_output(tmp_path: Path) -> None:
    import fcntl

    source, output = _write(tmp_path / "in.jsonl", _ROWS), tmp_path / "out.jsonl"
    teacher = CountingTeacher()
    with output.open("ab") as other, ChunkRewarder(teacher=teacher) as rewarder:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is writing"):
            score_file(source, output, rewarder, progress=False)
    assert teacher.calls == 0
