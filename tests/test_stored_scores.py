"""Stored scores: what is read back, what a kill leaves, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd.errors import ConfigError, DataError, OmniOPDError, RunError, TeacherConnectionError
from omniopd.logits import shards
from omniopd.logits.score_folder import FolderWriter, Manifest, check_stored, completion_key
from omniopd.logits.scores import Reading, Scored, TokenScores
from omniopd.logits.stored_scores import StoredScores, WriteCounts, write_scores
from omniopd.types import Missing

VOCABULARY = 11


class TableTeacher:
    """Knows a distribution for every position, from a seed that stands for the tokens before it."""

    id = "table:1"

    def __init__(self, *, refuses: Callable[[Reading], bool] = lambda reading: False) -> None:
        self.asked: list[Reading] = []
        self.refuses = refuses

    async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
        self.asked.extend(readings)
        return [
            Scored(missing=Missing.TIMEOUT, detail="too slow") if self.refuses(r) else Scored(scores=record(r, top_k))
            for r in readings
        ]

    async def aclose(self) -> None: ...


def distributions(reading: Reading) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the teacher's log-softmax [T, V]."""
    rows = []
    for t in range(len(reading.token_ids)):
        seed = [*reading.prompt_ids, 99, *reading.token_ids[:t]]
        logits = np.random.default_rng(seed).normal(size=VOCABULARY)
        rows.append(logits - np.log(np.exp(logits).sum()))
    return np.array(rows, np.float32).reshape(-1, VOCABULARY)


def record(reading: Reading, top_k: int) -> TokenScores:
    table_TV = distributions(reading)
    own_T = table_TV[np.arange(len(table_TV)), list(reading.token_ids)]
    if top_k == 0:
        return TokenScores(logprobs_T=own_T)
    ids_TK = np.argsort(-table_TV, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    logprobs_TK = np.take_along_axis(table_TV, ids_TK, axis=1)
    return TokenScores(logprobs_T=own_T, known="teacher_top_k", ids_TK=ids_TK, logprobs_TK=logprobs_TK)


def reading(*token_ids: int, prompt: Sequence[int] = (1, 2), requested: Any = None) -> Reading:
    table = None if requested is None else np.array(requested)
    return Reading(prompt_ids=tuple(prompt), token_ids=token_ids, requested_TK=table)


SIX = tuple(reading(*range(size), prompt=(size, 3)) for size in (4, 1, 7, 2, 3, 5))


def write(folder: Path, teacher: TableTeacher, readings: Sequence[Reading], **settings: Any) -> WriteCounts:
    return asyncio.run(write_scores(folder, teacher, readings, **{"top_k": 3, "batch": 2, **settings}))


def read(folder: Path | StoredScores, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
    teacher = folder if isinstance(folder, StoredScores) else StoredScores(folder)
    return asyncio.run(teacher.score(readings, top_k=top_k))


def assert_same(scored: Scored, expected: TokenScores) -> None:
    """Compare every bit of the arrays."""
    assert scored.scores is not None, scored.detail
    assert scored.scores.known == expected.known
    for name in ("logprobs_T", "ids_TK", "logprobs_TK"):
        ours, theirs = getattr(scored.scores, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes()), name


def assert_holds(folder: Path, readings: Sequence[Reading], *, top_k: int = 3) -> None:
    for one, scored in zip(readings, read(folder, readings, top_k=top_k), strict=True):
        assert_same(scored, record(one, top_k))


def index_of(folder: Path) -> Path:
    return folder / "index.jsonl"


# What is read back


@settings(max_examples=30, deadline=None)
@given(
    completions=st.lists(
        st.tuples(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3),
            st.lists(st.integers(0, VOCABULARY - 1), max_size=9),
        ),
        max_size=7,
    ),
    top_k=st.integers(0, VOCABULARY),
    batch=st.integers(1, 4),
    data=st.data(),
)
def test_every_ragged_record_comes_back_bit_for_bit(
    completions: list[tuple[list[int], list[int]]], top_k: int, batch: int, data: st.DataObject
) -> None:
    readings = [reading(*tokens, prompt=prompt) for prompt, tokens in completions]
    asked_k = data.draw(st.integers(0, top_k))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), TableTeacher(), readings, top_k=top_k, batch=batch)
        assert_holds(Path(folder), readings, top_k=asked_k)


def test_prompt_and_completion_are_told_apart() -> None:
    # The same six numbers, split in different places, are different completions.
    keys = {completion_key(Reading(prompt_ids=tuple(range(n)), token_ids=tuple(range(n, 6)))) for n in range(1, 7)}
    assert len(keys) == 6
    asked = completion_key(reading(4, 5, requested=[[1], [2]]))
    assert asked == completion_key(reading(4, 5)) and len(asked) == 16


def test_a_smaller_top_k_takes_the_first_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX, top_k=4)
    assert_holds(tmp_path, SIX, top_k=2)
    with pytest.raises(ConfigError, match=r"top_k is 5, but .* stores the teacher's 4 likeliest"):
        read(tmp_path, SIX, top_k=5)
    with pytest.raises(ConfigError, match="top_k is -1"):
        read(tmp_path, SIX, top_k=-1)


def test_the_whole_vocabulary_is_known_as_such(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX[:1], top_k=VOCABULARY, vocabulary=VOCABULARY)
    whole, part = (read(tmp_path, SIX[:1], top_k=k)[0].scores for k in (VOCABULARY, 3))
    assert whole is not None and whole.known == "vocabulary"
    assert np.exp(whole.logprobs_TK.astype(np.float64)).sum(axis=1) == pytest.approx(1.0, abs=1e-6)  # type: ignore[union-attr]
    assert part is not None and part.known == "teacher_top_k"


def test_a_whole_vocabulary_in_the_order_of_its_ids_is_sorted(tmp_path: Path) -> None:
    class ById(TableTeacher):
        async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
            [one] = readings
            ids = np.tile(np.arange(VOCABULARY, dtype=np.int32), (len(one.token_ids), 1))
            own_T = record(one, 0).logprobs_T
            made = TokenScores(logprobs_T=own_T, known="vocabulary", ids_TK=ids, logprobs_TK=distributions(one))
            return [Scored(scores=made)]

    write(tmp_path, ById(), SIX[:1], top_k=VOCABULARY, vocabulary=VOCABULARY)
    assert_holds(tmp_path, SIX[:1], top_k=3)


def test_the_record_says_who_the_teacher_was(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX[:2], identity="cafe")
    teacher = StoredScores(tmp_path, identity="cafe")
    assert (teacher.id, len(teacher)) == ("table:1", 2)
    asyncio.run(teacher.aclose())
    assert_same(read(teacher, SIX[:1])[0], record(SIX[0], 0))
    with pytest.raises(ConfigError, match="identity 'cafe', expected 'beef'"):
        StoredScores(tmp_path, identity="beef")


def test_requested_tokens_come_from_the_stored_ones_or_the_completion_itself(tmp_path: Path) -> None:
    one = reading(6, 6)
    table_TV = distributions(one)
    order_TV = np.argsort(-table_TV, axis=1)
    write(tmp_path, TableTeacher(), [one], top_k=2)
    # Position 0: the second and the first likeliest; position 1: its own token, which is not among the two, twice.
    assert 6 not in order_TV[1, :2]
    wanted = [[order_TV[0, 1], order_TV[0, 0]], [6, 6]]
    scored = read(tmp_path, [reading(6, 6, requested=wanted)], top_k=1)[0].scores
    assert scored is not None and scored.known == "requested" and scored.ids_TK is not None
    assert scored.ids_TK.tolist() == wanted
    assert scored.logprobs_TK is not None
    assert scored.logprobs_TK.tolist() == [
        [table_TV[0, order_TV[0, 1]], table_TV[0, order_TV[0, 0]]],
        [table_TV[1, 6]] * 2,
    ]


def test_a_requested_token_that_is_not_stored_is_missing_with_its_place(tmp_path: Path) -> None:
    one = reading(6, 6, 6)
    order_TV = np.argsort(-distributions(one), axis=1)
    odd = next(i for i in order_TV[1, 2:] if i != 6)
    write(tmp_path, TableTeacher(), [one], top_k=2)
    wanted = [[order_TV[0, 0]], [odd], [order_TV[2, 1]]]
    requested, plain = read(tmp_path, [reading(6, 6, 6, requested=wanted), one], top_k=1)
    assert requested.missing is Missing.FAILED
    assert f"requested token {odd} at position 1 is not among the 2" in requested.detail
    assert "1 of 3 positions" in requested.detail
    assert_same(plain, record(one, 1))


def test_requested_tokens_need_stored_ones(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX[:2], top_k=0)
    with pytest.raises(ConfigError, match=r"requested by id, but .* \(top_k 0\)"):
        read(tmp_path, [reading(0, prompt=(1, 3), requested=[[0]])])


def test_an_unknown_completion_is_missing_and_the_others_are_not(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX[:2])
    unknown, known = read(tmp_path, [SIX[5], SIX[1]], top_k=3)
    assert unknown.missing is Missing.FAILED
    assert unknown.detail == f"not in the folder {tmp_path}; write it with `omniopd scores write`"
    assert_same(known, record(SIX[1], 3))


def test_the_same_completion_twice_gives_two_records(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX[:1])
    first, second = read(tmp_path, [SIX[0], SIX[0]], top_k=3)
    assert first.scores is not None and second.scores is not None
    assert not np.shares_memory(first.scores.logprobs_T, second.scores.logprobs_T)


# Writing


def test_only_what_is_not_there_is_asked_for(tmp_path: Path) -> None:
    teacher = TableTeacher()
    assert write(tmp_path, teacher, SIX[:3]) == WriteCounts(written=3, already_there=0)
    seen: list[tuple[int, int]] = []
    twice = [*SIX, SIX[4], reading(prompt=(1,))]
    counts = write(tmp_path, teacher, twice, progress=lambda done, total: seen.append((done, total)))
    # Three of the first run, one that comes twice, one without a token.
    assert counts == WriteCounts(written=3, already_there=5)
    assert seen == [(7, 8), (8, 8)]
    assert [completion_key(r) for r in teacher.asked] == [completion_key(r) for r in SIX]
    assert_holds(tmp_path, twice)


def test_the_teacher_is_not_asked_for_requested_tokens(tmp_path: Path) -> None:
    teacher = TableTeacher()
    write(tmp_path, teacher, [reading(1, requested=[[2]])])
    assert teacher.asked[0].requested_TK is None


def test_what_the_teacher_cannot_score_is_counted_and_asked_again(tmp_path: Path) -> None:
    teacher = TableTeacher(refuses=lambda r: len(r.token_ids) < 4)
    counts = write(tmp_path, teacher, SIX)
    assert (counts.written, counts.missing, counts.first_missing) == (3, {Missing.TIMEOUT: 3}, "too slow")
    assert [s.missing for s in read(tmp_path, SIX)] == [None if len(r.token_ids) >= 4 else Missing.FAILED for r in SIX]
    again = TableTeacher()
    assert write(tmp_path, again, SIX) == WriteCounts(written=3, already_there=3)
    assert sorted(len(r.token_ids) for r in again.asked) == [1, 2, 3]


def test_what_was_written_before_the_teacher_went_away_stays(tmp_path: Path) -> None:
    class Leaving(TableTeacher):
        async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
            if self.asked:
                raise TeacherConnectionError("gone")
            return await super().score(readings, top_k=top_k)

    with pytest.raises(TeacherConnectionError):
        write(tmp_path, Leaving(), SIX)
    assert write(tmp_path, TableTeacher(), SIX) == WriteCounts(written=4, already_there=2)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"top_k": 2}, "top_k 3, asked for 2"),
        ({"identity": "b"}, "identity 'a', asked for 'b'"),
        ({"vocabulary": 12}, "vocabulary 11, asked for 12"),
        ({"id": "table:2"}, "teacher 'table:1', asked for 'table:2'"),
    ],
)
def test_a_folder_is_of_one_teacher_and_one_top_k(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    write(tmp_path, TableTeacher(), SIX[:2], identity="a", vocabulary=VOCABULARY)
    before = index_of(tmp_path).read_bytes()
    other = TableTeacher()
    other.id = changed.pop("id", other.id)
    with pytest.raises(ConfigError, match=told):
        write(tmp_path, other, SIX, **{"identity": "a", "vocabulary": VOCABULARY, **changed})
    assert not other.asked and index_of(tmp_path).read_bytes() == before


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for wrong in ({"top_k": -1}, {"batch": 0}):
        with pytest.raises(ConfigError, match="expected 0 or more, and 1 or more"):
            write(tmp_path, TableTeacher(), SIX, **wrong)


def broken(**fields: Any) -> TokenScores:
    values = {
        "logprobs_T": np.array([-1.0, -2.0]),
        "known": "teacher_top_k",
        "ids_TK": np.array([[4, 5], [6, 7]]),
        "logprobs_TK": np.array([[-1.0, -1.5], [-0.5, -0.5]]),
    }
    return TokenScores(**{**values, **fields})


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (broken(logprobs_T=np.array([np.nan, 0.0])), "not a number"),
        (broken(logprobs_TK=np.array([[-1.0, np.nan], [0, 0]])), "not a number"),
        (broken(logprobs_TK=np.array([[-1.5, -1.0], [0, 0]])), "out of order"),
        (broken(known="requested"), "other tokens than the 2 likeliest .* requested, 2 a token"),
        (broken(known=None, ids_TK=None, logprobs_TK=None), "None, 0 a token"),
        (broken(ids_TK=np.array([[4, 5], [6, 11]])), "ids 4 to 11; expected 0 to 10"),
        (broken(ids_TK=np.array([[4, 5], [6, -1]])), "ids -1 to 6"),
        (TokenScores(logprobs_T=np.zeros(3)), "2 tokens with 3 log-probs"),
    ],
)
def test_a_record_that_is_not_what_was_asked_for_is_not_stored(tmp_path: Path, made: TokenScores, told: str) -> None:
    class Odd(TableTeacher):
        async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
            return [Scored(scores=made)]

    with pytest.raises(DataError, match=told):
        write(tmp_path, Odd(), [reading(4, 6)], top_k=2, vocabulary=VOCABULARY)
    assert read(tmp_path, [reading(4, 6)])[0].missing is Missing.FAILED


def test_wider_log_probs_are_rounded_to_float32(tmp_path: Path) -> None:
    class Wide(TableTeacher):
        async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
            return [Scored(scores=broken(logprobs_T=np.array([-0.1, -1 / 3])))]

    write(tmp_path, Wide(), [reading(4, 6)], top_k=2)
    scores = read(tmp_path, [reading(4, 6)])[0].scores
    assert scores is not None and scores.logprobs_T.tolist() == [float(np.float32(-0.1)), float(np.float32(-1 / 3))]


def test_other_users_may_read_what_one_wrote(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write(tmp_path, TableTeacher(), SIX[:2])
    finally:
        os.umask(mask)
    assert {(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {0o644}


# Kills and damage

KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from omniopd.logits import score_folder, shards
from test_stored_scores import SIX, TableTeacher, write

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Half(TableTeacher):
    async def score(self, readings, *, top_k=0):
        if len(self.asked) == 2:
            {point}
        return await super().score(readings, top_k=top_k)

def torn(writer, lines):
    with open(writer.folder / "index.jsonl", "ab") as file:
        file.write(lines[:{torn}])
    die()

write(Path({folder!r}), Half(), SIX)
"""


@pytest.mark.parametrize(
    ("point", "torn", "lost"),
    [
        ("shards.os.rename = die", 0, 4),
        ("shards._sync_folder = die", 0, 2),
        ("score_folder.FolderWriter._append = torn", 40, 2),
        # A line is 87 bytes: one whole and a part of the next.
        ("score_folder.FolderWriter._append = torn", 100, 2),
    ],
)
def test_a_kill_loses_at_most_the_shard_that_was_being_written(
    tmp_path: Path, point: str, torn: int, lost: int
) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), point=point, torn=torn)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_holds(tmp_path, SIX[:2])
    assert read(tmp_path, SIX[4:])[0].missing is Missing.FAILED
    teacher = TableTeacher()
    assert write(tmp_path, teacher, SIX) == WriteCounts(written=lost, already_there=6 - lost)
    assert [completion_key(r) for r in teacher.asked] == [completion_key(r) for r in SIX[6 - lost :]]
    assert_holds(tmp_path, SIX)
    assert not list(tmp_path.glob(".*.partial"))
    assert all(json.loads(line)["tokens"] for line in index_of(tmp_path).read_bytes().splitlines())


def test_a_torn_last_line_is_dropped_and_then_cut_off(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX[:4])
    with index_of(tmp_path).open("ab") as file:
        file.write(b'{"key": "00112233')
    leftover = tmp_path / ".part-00077.safetensors.partial"
    leftover.write_bytes(b"half")
    assert_holds(tmp_path, SIX[:4])
    assert write(tmp_path, TableTeacher(), SIX) == WriteCounts(written=2, already_there=4)
    assert_holds(tmp_path, SIX)
    assert not leftover.exists()


@pytest.mark.parametrize("line", [b"nonsense", b"{}", b'{"key": "00", "shard": 0, "rows": [0, 2], "tokens": 1}'])
def test_a_whole_line_of_something_else_is_told(tmp_path: Path, line: bytes) -> None:
    write(tmp_path, TableTeacher(), SIX[:2])
    size = index_of(tmp_path).stat().st_size
    with index_of(tmp_path).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=rf"index.jsonl, byte {size}: no line of an index; delete the file"):
        StoredScores(tmp_path)


def test_a_lost_index_is_rebuilt_without_asking_the_teacher(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX)
    before = index_of(tmp_path).read_bytes()
    open_before = StoredScores(tmp_path)
    index_of(tmp_path).unlink()
    assert read(tmp_path, SIX)[0].missing is Missing.FAILED
    teacher = TableTeacher()
    assert write(tmp_path, teacher, SIX) == WriteCounts(written=0, already_there=6)
    assert not teacher.asked and index_of(tmp_path).read_bytes() == before
    assert_same(read(open_before, SIX, top_k=3)[5], record(SIX[5], 3))


@pytest.mark.parametrize("damage", ["short", "empty", "gone", "other", "headless"])
def test_a_damaged_shard_is_told_and_only_its_completions_are_written_again(tmp_path: Path, damage: str) -> None:
    write(tmp_path, TableTeacher(), SIX)
    shard = tmp_path / "part-00001.safetensors"
    match damage:
        case "short":
            os.truncate(shard, shard.stat().st_size - 1)
        case "empty":
            os.truncate(shard, 0)
        case "gone":
            shard.unlink()
        case "other":
            # Of the same sizes: nothing but the header tells it from the right one.
            write(tmp_path / "b", TableTeacher(), [reading(*r.token_ids, prompt=(9, 9)) for r in SIX])
            shard.write_bytes((tmp_path / "b" / shard.name).read_bytes())
        case "headless":
            shards.write_safetensors(shard, {"logprobs": np.zeros(3, np.float32)}, "numpy", {})
    with pytest.raises(DataError, match=r"part-00001.safetensors cannot be read: .*; delete it and run the same"):
        read(tmp_path, SIX, top_k=3)
    assert_holds(tmp_path, [*SIX[:2], *SIX[4:]])
    shard.unlink(missing_ok=True)
    teacher = TableTeacher()
    assert write(tmp_path, teacher, SIX) == WriteCounts(written=2, already_there=4)
    assert [completion_key(r) for r in teacher.asked] == [completion_key(r) for r in SIX[2:4]]
    assert_holds(tmp_path, SIX)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_a_folder_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write(tmp_path, TableTeacher(), SIX[:2])
    calls: list[int] = []
    real = os.fsync

    def full(handle: int) -> None:
        # The files of a shard, in order: itself, its folder, the index.
        calls.append(handle)
        if len(calls) == (1 if failing == 1 else 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*: No space left on device; free the disk"):
        write(tmp_path, TableTeacher(), SIX)
    monkeypatch.undo()
    assert_holds(tmp_path, SIX[:2])
    assert read(tmp_path, SIX[2:3])[0].missing is Missing.FAILED
    # The second time the shard itself was whole, and is found.
    assert write(tmp_path, TableTeacher(), SIX).written == (4 if failing == 1 else 2)
    assert_holds(tmp_path, SIX)


def test_an_index_the_disk_takes_a_part_of_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TableTeacher(), SIX[:2])
    before = index_of(tmp_path).read_bytes()
    manifest = Manifest.read(tmp_path)
    with FolderWriter(tmp_path, manifest) as writer:
        real_open = Path.open

        def short(path: Path, *args: Any, **kwargs: Any) -> Any:
            file = real_open(path, *args, **kwargs)
            if path.name != "index.jsonl" or "a" not in args[0]:
                return file

            class Short:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def write(self, content: bytes) -> int:
                    return int(file.write(content[:9]))

            return Short()

        monkeypatch.setattr(Path, "open", short)
        with pytest.raises(RunError, match="took only a part"):
            writer.add([(b"k" * 16, 1)], {"logprobs": np.zeros(1, np.float32)})
        monkeypatch.undo()
    assert index_of(tmp_path).read_bytes() == before


# Two at a time


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    manifest = Manifest(kind="scores", teacher="table:1", top_k=3)
    with FolderWriter(tmp_path, manifest) as writer:
        with pytest.raises(RunError, match="another process is writing"):
            write(tmp_path, TableTeacher(), SIX)
        writer.close()
        writer.close()
        assert write(tmp_path, TableTeacher(), SIX).written == 6


def test_a_reader_sees_each_batch_once_it_is_written(tmp_path: Path) -> None:
    class Watched(TableTeacher):
        async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
            if not self.asked:
                self.reader = StoredScores(tmp_path)
            there = [s.missing is None for s in await self.reader.score(SIX, top_k=3)]
            assert there == [i < len(self.asked) for i in range(6)]
            return await super().score(readings, top_k=top_k)

    teacher = Watched()
    write(tmp_path, teacher, SIX)
    assert [s.missing for s in read(teacher.reader, SIX)] == [None] * 6


def test_a_reader_in_another_thread_never_sees_half_a_record(tmp_path: Path) -> None:
    readings = [reading(*range(i % 7 + 1), prompt=(i, 1)) for i in range(60)]
    write(tmp_path, TableTeacher(), readings[:1], batch=1)
    reader, expected = StoredScores(tmp_path), [record(r, 3) for r in readings]
    counts, failures = [], []
    done = threading.Event()

    def watch() -> None:
        try:
            while True:
                last = done.is_set()
                scored = read(reader, readings, top_k=3)
                for one, wanted in zip(scored, expected, strict=True):
                    if one.scores is not None:
                        assert_same(one, wanted)
                counts.append(sum(one.scores is not None for one in scored))
                if last:
                    return
        except (AssertionError, OmniOPDError) as error:
            failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    write(tmp_path, TableTeacher(), readings, batch=1)
    done.set()
    thread.join(timeout=60)
    assert not failures and counts == sorted(counts) and counts[-1] == 60


# What is no such folder


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no stored scores: it has no manifest.json"):
        StoredScores(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder .*nope"):
        check_stored(f"scores:{tmp_path / 'nope'}")
    states = Manifest(kind="states", teacher="t", width=4)
    with (
        FolderWriter(tmp_path / "states", states),
        pytest.raises(ConfigError, match=r"holds states, expected scores; read it with teacher\.spec=states:.*states"),
    ):
        StoredScores(tmp_path / "states")
    assert check_stored(f"states:{tmp_path / 'states'}") == states
    assert check_stored(f"hf:{tmp_path / 'nope'}") is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"format": 2}', "format 2, expected 1"),
        ("[]", r"format \[\]"),
        ('{"format": 1, "kind": "scores"}', "no manifest"),
    ],
)
def test_a_manifest_of_another_format_is_refused(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=told):
        StoredScores(tmp_path)


def test_shards_of_nobody_are_not_adopted(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="shards and no manifest"):
        write(tmp_path, TableTeacher(), SIX)


def test_a_place_that_takes_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="give another folder"):
        write(tmp_path / "file", TableTeacher(), SIX)


def test_reading_scores_loads_no_torch(tmp_path: Path) -> None:
    write(tmp_path, TableTeacher(), SIX[:2])
    code = (
        "import asyncio, sys; from omniopd.logits.stored_scores import StoredScores; "
        "from omniopd.logits.scores import Reading; "
        f"teacher = StoredScores({str(tmp_path)!r}); "
        "got = asyncio.run(teacher.score([Reading(prompt_ids=(1, 3), token_ids=(0,))], top_k=3)); "
        "assert got[0].missing is None; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
