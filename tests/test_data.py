from __future__ import annotations

import json
from pathlib import Path

import pytest

from omniopd.data import load_rows
from omniopd.errors import ConfigError, DataError
from omniopd.types import Message
from omniopd.worlds.mini_math import make_problems

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_jsonl_rows_keep_text_answer_teacher_and_place(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        {"prompt": " 1+1? ", "answer": 2, "teacher_id": "openai:gpt", "level": "easy"},
        {"prompt": "Why?", "answer": None},
    )
    data = load_rows(source)
    first, second = data.rows
    assert first.messages == (Message(role="user", content=" 1+1? "),)
    assert (first.answer, first.teacher_id, first.response) == ("2", "openai:gpt", None)
    assert (first.source, second.source) == (f"{source}:1", f"{source}:2")
    assert (second.answer, second.teacher_id) == (None, None)
    assert data.has_answers
    assert data.skipped == ()


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"prompt": "a"}\n\n   \n{"prompt": "b"}', encoding="utf-8")
    assert [row.source for row in load_rows(str(path)).rows] == [f"{path}:1", f"{path}:4"]


def test_a_line_separator_inside_json_text_does_not_split_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert load_rows(str(path)).rows[0].messages[0].content == "one\u2028two"


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_last_assistant_turn_is_the_reference_response(tmp_path: Path, column: str) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ]
    row = load_rows(write(tmp_path / "chat.jsonl", {column: turns})).rows[0]
    assert [message.role for message in row.messages] == ["system", "user"]
    assert row.response == "Hello!"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"promt": "a"}, "expected a column 'prompt' or 'messages', got 'promt'; did you mean 'prompt' for 'promt'?"),
        ({"prompt": None}, "got 'prompt' (null)"),
        ({}, "got none"),
        ({"prompt": "  "}, "column 'prompt' is empty"),
        ({"prompt": 7}, "column 'prompt' is a number; expected text or a list of chat messages"),
        ({"prompt": []}, "is an empty list"),
        ({"prompt": "a", "messages": []}, "has both 'prompt' and 'messages'"),
        ({"messages": ["a"]}, "messages[0] is a text; expected an object"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'; it has role"),
        ({"messages": [{"role": "human", "content": "a"}]}, "has the role 'human'; expected system, user, assistant"),
        ({"messages": [{"role": "user", "content": [1]}]}, "column 'messages[0].content' is a list; expected text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must ask with a user turn"),
        ({"messages": [{"role": "system", "content": "a"}]}, "but ends in system"),
        ({"prompt": "a", "answer": True}, "column 'answer' is a boolean"),
        ({"prompt": "a", "answer": ""}, "column 'answer' is empty"),
        ({"prompt": "a", "answer": float("nan")}, "column 'answer' is nan"),
        ({"prompt": "a", "teacher_id": 3}, "column 'teacher_id' is a number"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"question": "a", "answer": "3"}, "got 'question', 'answer'"),
        ([1], "expected an object with columns, got a JSON list"),
    ],
)
def test_a_malformed_row_is_named_with_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": "good"}, row, {"prompt": "good too"})
    with pytest.raises(DataError) as caught:
        load_rows(source)
    assert str(caught.value).startswith(f"{source}:2: ")
    assert reason in str(caught.value)
    data = load_rows(source, on_bad_row="skip")
    assert [r.source for r in data.rows] == [f"{source}:1", f"{source}:3"]
    [(place, why)] = data.skipped
    assert place == f"{source}:2"
    assert reason in why


def test_broken_json_and_broken_encoding_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": \n{"prompt": "\xff"}\n{"prompt": "b"}\n')
    data = load_rows(str(path), on_bad_row="skip")
    assert [r.source for r in data.rows] == [f"{path}:1", f"{path}:4"]
    assert data.skipped[0] == (
        f"{path}:2",
        "not valid JSON (Expecting value at column 11)",
    )
    # The quote before the bad byte is byte 12 of the line.
    assert data.skipped[1] == (f"{path}:3", "not UTF-8 (byte 13 is 0xff)")


def test_deep_nesting_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 200_000 + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="nested too deeply"):
        load_rows(str(path))


def test_max_prompts_counts_usable_rows_and_reads_no_further(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": ""})
    data = load_rows(source, max_prompts=2, on_bad_row="skip")
    assert [row.messages[0].content for row in data.rows] == ["a", "b"]
    assert len(data.skipped) == 1


def test_json_array_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}]), encoding="utf-8")
    assert [row.source for row in load_rows(str(path)).rows] == [f"{path}:1", f"{path}:2"]
    path.write_text('{"prompt": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match="holds a JSON object; expected a list of rows"):
        load_rows(str(path))
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json:2: not valid JSON .* is named \.jsonl"):
        load_rows(str(path))
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3\)"):
        load_rows(str(path))


def test_text_file_has_a_question_a_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("What is 1+1?\n\n  And 2+2?\r\n", encoding="utf-8")
    data = load_rows(str(path))
    assert [row.messages[0].content for row in data.rows] == ["What is 1+1?", "And 2+2?"]
    assert not data.has_answers


def test_parquet_rows_and_chat_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    path = tmp_path / "rows.parquet"
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    parquet.write_table(pyarrow.table({"prompt": chats, "answer": ["1", None]}), path)
    rows = load_rows(str(path)).rows
    assert [(r.messages[0].content, r.answer, r.source) for r in rows] == [
        ("a", "1", f"{path}:1"),
        ("b", None, f"{path}:2"),
    ]
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_rows(str(path))


def test_gsm8k_rows_are_recognised_and_can_be_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "gsm.jsonl", {"question": "How much?", "answer": "5*250=1250\n#### 1,250"})
    for name in (source, f"gsm8k:{source}"):
        row = load_rows(name).rows[0]
        assert row.messages[0].content == "How much?"
        assert row.answer == "1250"
        assert row.response == "5*250=1250\n#### 1,250"
    bad = write(tmp_path / "bad.jsonl", {"question": "How much?", "answer": "5"})
    with pytest.raises(DataError, match="has no line '#### NUMBER'"):
        load_rows(f"gsm8k:{bad}")
    other = write(tmp_path / "other.jsonl", {"questoin": "How much?", "answer": "#### 5"})
    with pytest.raises(DataError, match="did you mean 'question' for 'questoin'"):
        load_rows(f"gsm8k:{other}")


def test_real_gsm8k() -> None:
    path = SHARED / "gsm8k_test_200.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}, 200 rows of the GSM8K test split")
    data = load_rows(str(path))
    assert len(data.rows) == 200
    assert all(row.answer is not None and float(row.answer).is_integer() for row in data.rows)
    # First row: 50 - 3 - 7 - 21 = 19.
    assert data.rows[0].answer == "19"


def test_mini_math_trains_and_evaluates_on_different_problems() -> None:
    held_out = load_rows("mini-math:held-out")
    train = load_rows("mini-math")
    assert (len(held_out.rows), len(train.rows)) == (4_000, 4_000)
    asked = {row.messages[0].content for row in held_out.rows}
    assert asked == {p.expression for p in make_problems(4_000, seed=20_000)}
    assert not asked & {row.messages[0].content for row in train.rows}
    row = train.rows[0]
    assert row.answer == str(eval(row.messages[0].content))
    assert load_rows("mini-math:held-out", max_prompts=3).rows == held_out.rows[:3]


def test_mini_math_settings() -> None:
    few = load_rows("mini-math?count=5&seed=1").rows
    assert few == load_rows("mini-math", max_prompts=5).rows
    assert few != load_rows("mini-math?count=5&seed=2").rows
    for source in ("mini-math?size=3", "mini-math?count=many", "mini-math?count", "mini-math?&", "mini-math?seed=-1"):
        with pytest.raises(DataError, match=r"expected e\.g\. mini-math\?count=2000&seed=1"):
            load_rows(source)
    with pytest.raises(DataError, match="fixed and take no settings"):
        load_rows("mini-math:held-out?count=3")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"there is no data file .*tran\.jsonl.* Did you mean 'train\.jsonl'\?"):
        load_rows(str(tmp_path / "tran.jsonl"))
    with pytest.raises(DataError, match="Did you mean 'mini-math:held-out'"):
        load_rows("mini-math:heldout")
    with pytest.raises(DataError, match="is a folder"):
        load_rows(str(tmp_path))
    with pytest.raises(DataError, match="has no usable row"):
        load_rows(str(tmp_path / "train.jsonl"))
    (tmp_path / "train.csv").write_text("prompt\na\n")
    with pytest.raises(DataError, match=r"ends in '\.csv'"):
        load_rows(str(tmp_path / "train.csv"))


def test_all_rows_skipped_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": ""}, {"prompt": 3})
    with pytest.raises(DataError, match=r"no usable row \(2 malformed: .*rows\.jsonl:1: column 'prompt' is empty"):
        load_rows(source, on_bad_row="skip")


def test_settings_out_of_range(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": "a"})
    with pytest.raises(ConfigError, match="max_prompts is 0"):
        load_rows(source, max_prompts=0)
    with pytest.raises(ConfigError, match="on_bad_row is 'drop'"):
        load_rows(source, on_bad_row="drop")  # type: ignore[arg-type]


def test_hub_data_from_a_local_folder_and_a_failure_that_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "saved"
    folder.mkdir()
    write(folder / "train.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"})
    data = load_rows(f"hf:{folder}", split="train")
    assert [(row.messages[0].content, row.answer) for row in data.rows] == [("a", "1"), ("b", "2")]
    assert data.rows[1].source == f"hf:{folder}:2"
    with pytest.raises(DataError, match="split 'test'"):
        load_rows(f"hf:{folder}", split="test")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/set/main", ("owner/set", "main", "test")),
        ("owner/set", ("owner/set", None, "test")),
        ("set", ("set", None, "test")),
    ],
)
def test_hub_names_split_into_dataset_and_config(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str | None, str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    calls = []

    def load_dataset(path: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        calls.append((path, config, split))
        return [{"prompt": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(f"hf:{name}", split="test").rows[0].source == f"hf:{name}:1"
    assert calls == [asked]


def test_mini_math_rows_have_worked_responses() -> None:
    (row,) = load_rows("mini-math?count=1&seed=1").rows
    assert row.response is not None and row.answer is not None
    assert row.response.endswith(f"#{row.answer}")
    assert [message.role for message in row.messages] == ["user"]
