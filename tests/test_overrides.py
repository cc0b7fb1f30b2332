"""Merging of files, words, flags and presets, and what the errors say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd.errors import ConfigError
from omniopd.overrides import find_config, is_override, list_configs, load_config, nearest_name

MINIMAL = ["student.model=a", "data.train=b"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text("student: {model: s}\ndata: {train: d.jsonl}\nlearner: {learning_rate: 1e-5}\nsteps: 10\n")
    return file


def error_of(*words: str, files: tuple[Path, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(files, [*MINIMAL, *words])
    return str(caught.value)


def test_later_files_words_and_flags_win_in_that_order(base: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("steps: 20\nseed: 1\nlearner: {warmup_steps: 3}\n")
    config = load_config([base, second], ["seed=2", "name=word"], flags={"--run-name flag": {"name": "flag"}})
    assert (config.steps, config.seed, config.name) == (20, 2, "flag")
    # Sections merge key by key: the second file leaves the first one's learning rate alone.
    assert (config.learner.learning_rate, config.learner.warmup_steps) == (1e-5, 3)
    assert load_config([second, base]).steps == 10


def test_later_words_win() -> None:
    assert load_config(overrides=[*MINIMAL, "steps=3", "steps=4"]).steps == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("2.5E-3", 2.5e-3), ("1", 1.0), (".5", 0.5)],
)
def test_numbers_are_read_as_yaml_1_2(text: str, value: float) -> None:
    # PyYAML itself reads 1e-6 as text.
    assert load_config(overrides=[*MINIMAL, f"learner.learning_rate={text}"]).learner.learning_rate == value


@pytest.mark.parametrize("text", ["on", "no", "2026-01-02", "1:30", "0x1F", "1_000", "007"])
def test_text_stays_text(text: str) -> None:
    assert load_config(overrides=[*MINIMAL, f"name={text}"]).name == text


def test_lists_are_replaced_and_null_is_a_value() -> None:
    config = load_config(overrides=[*MINIMAL, "trackers=[]", "teacher.temperature=null", "student.lora={rank: 4}"])
    assert config.trackers == []
    assert config.teacher.temperature is None
    assert config.student.lora is not None
    assert config.student.lora.rank == 4


def test_a_part_of_another_type_replaces_the_whole_part(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: {supervision: {type: chunked, credit: {type: smoothed, alpha: 2.0}}}\n")
    kept = load_config([file], [*MINIMAL, "method.supervision.credit.alpha=3.0"])
    assert kept.method.supervision["credit"] == {"type": "smoothed", "alpha": 3.0}
    # `alpha` is a setting of smoothed; raw has none.
    replaced = load_config([file], [*MINIMAL, "method.supervision.credit.type=raw"])
    assert replaced.method.supervision == {"type": "chunked", "credit": {"type": "raw"}}


@pytest.mark.parametrize("flip", [False, True])
def test_the_order_of_type_and_its_settings_does_not_matter(flip: bool) -> None:
    words = ["method.supervision.credit.type=centered", "method.supervision.credit.alpha=0.5", "preset=paper"]
    config = load_config(overrides=MINIMAL + (words[::-1] if flip else words))
    assert config.method.supervision["credit"] == {"type": "centered", "alpha": 0.5}


def test_a_file_may_set_one_field_of_a_default_part() -> None:
    config = load_config(overrides=[*MINIMAL, "method.supervision.num_continuations=3"])
    assert config.method.supervision == {"type": "chunked", "num_continuations": 3}


def test_unknown_keys_name_the_nearest_and_the_place(base: Path) -> None:
    base.write_text(base.read_text() + "rollout: {grup_size: 4}\n")
    message = error_of(files=(base,))
    assert message == (f"rollout.grup_size: unknown key ({base}: rollout.grup_size). Did you mean rollout.group_size?")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("learner.lr=1", "Did you mean learner.learning_rate?"),  # initials
        ("learning_rate=1", "Did you mean learner.learning_rate?"),  # another section
        ("stepps=1", "Did you mean steps?"),
        ("temperature=1", "Did you mean teacher.temperature or rollout.temperature or eval.temperature?"),
        ("teachers.big.temprature=1", "Did you mean teachers.big.temperature?"),  # a section by name
        ("teachers.big.weights.dtyp=auto", "Did you mean teachers.big.weights.dtype?"),
        ("teachers.big.group_size=1", "Did you mean rollout.group_size?"),
        ("student.zzz=1", "student has model, device, dtype, lora, gradient_checkpointing, chat_template"),
    ],
)
def test_hints_for_unknown_keys(word: str, hint: str) -> None:
    message = error_of(word)
    assert message.endswith(hint)
    assert f"(override {word!r})" in message


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("steps=fast", "steps: got the text 'fast', expected a whole number"),
        ("steps=true", "steps: got true (true/false), expected a whole number"),
        ("steps=2.0", "steps: got the number 2.0, expected a whole number"),
        ("steps=0", "steps: got the number 0, expected a number of 1 or more"),
        ("learner.learning_rate=-1", "learner.learning_rate: got the number -1, expected a number above 0.0"),
        ("learner.learning_rate=null", "learner.learning_rate: got nothing (null), expected a number"),
        ("teacher.top_p=2", "teacher.top_p: got the number 2, expected a number of 1.0 or less"),
        ("student.lora.dropout=1", "student.lora.dropout: got the number 1, expected a number below 1.0"),
        ("student.gradient_checkpointing=yes", "expected true or false"),
        ("name=3", "name: got the number 3, expected text (put it in quotes if it looks like a number)"),
        ("learner.schedule=cosin", "expected 'constant', 'linear' or 'cosine'"),
        ("learner=3", "learner: got the number 3, expected a section of `key: value`"),
        ("method.supervision=[a]", "method.supervision: got a list of 1, expected a mapping of `key: value`"),
        ("trackers=wandb", "trackers: got the text 'wandb', expected a list"),
        ("trackers=[foo]", "trackers.0: got the text 'foo', expected 'tensorboard', 'wandb' or 'trackio'"),
        ("learner.betas=[0.9]", "learner.betas: the list is too short; entry 1 is missing"),
        ("student.lora.target_modules=3", "expected text (put it in quotes if it looks like a number) or a list"),
        ("data.system_prompt={a: 1}", "data.system_prompt: got a mapping with a, expected text"),
        ("preset=papr", "preset: got the text 'papr', expected 'paper'"),
    ],
)
def test_type_errors_in_plain_words(word: str, complaint: str) -> None:
    message = error_of(word)
    assert complaint in message
    assert "\n" not in message
    if "too short" not in complaint:
        assert f"(override {word!r})" in message


def test_all_problems_are_told_at_once() -> None:
    message = error_of("steps=0", "learner.lr=1")
    assert message.startswith("2 settings cannot be used:")
    assert "steps: got the number 0" in message
    assert "learner.lr: unknown key" in message


def test_what_is_required_is_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert "student: required and not set. Name the model that learns: --student" in str(caught.value)
    assert "data.train: required and not set. Name the prompts: --data" in str(caught.value)


def test_the_last_place_that_set_a_value_is_named(base: Path) -> None:
    assert error_of("steps=-1", files=(base,)).endswith("(override 'steps=-1')")
    base.write_text("steps: -1\n")
    assert error_of(files=(base,)).endswith(f"({base}: steps)")
    with pytest.raises(ConfigError, match="--teacher 3"):
        load_config(overrides=MINIMAL, flags={"--teacher 3": {"teacher": {"spec": 3}}})


def test_unknown_keys_fail_in_under_a_second() -> None:
    started = time.perf_counter()
    error_of("learner.lr=1")
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("steps: 1\nsteps: 2\n", "the key 'steps' stands twice in one mapping (line 2)"),
        ("- a\n", "holds a list of 1, expected `key: value` lines"),
        ("a: [1\n", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML: mapping values are not allowed here (line 1)"),
        ("method: {supervision: {1: 2}}\n", "the key 1 in method.supervision is not text"),
        ("student: !!python/object:os.system {}\n", "is not valid YAML"),
        ("name: !!binary aGk=\n", "neither text, number, true/false, list nor mapping"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    message = error_of(files=(file,))
    assert complaint in message


def test_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("eval: &e {k: 3, temperature: 0.5}\nrollout: {<<: *e, temperature: 0.7, k: 1}\n")
    assert "rollout.k: unknown key" in error_of(files=(file,))
    file.write_text("rollout: &r {temperature: 0.5}\neval: {<<: *r, k: 2}\n")
    config = load_config([file], MINIMAL)
    assert (config.eval.temperature, config.eval.k) == (0.5, 2)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert load_config([file], MINIMAL) == load_config((), MINIMAL)


def test_undecodable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"name: \xff\n")
    assert f"cannot read {file}" in error_of(files=(file,))


@pytest.mark.parametrize("word", ["a.b=1", "x=", "learner.betas=[1, 2]", "a_b.c1=x=y"])
def test_words_with_a_key_are_overrides(word: str) -> None:
    assert is_override(word)


@pytest.mark.parametrize("word", ["run.yaml", "./a=b.yaml", "/x/y=z", "quickstart", "=1", "a..b=1", "-x=1"])
def test_other_words_are_files(word: str) -> None:
    assert not is_override(word)


def test_bad_words_are_told_from_bad_values() -> None:
    assert "is not a setting; expected key.path=value" in error_of("1x=2")
    message = error_of("data.system_prompt=a: b: c")
    assert "is not valid YAML: mapping values are not allowed here" in message
    assert "in quotes" in message


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30))
def test_quoted_text_survives(text: str) -> None:
    word = "name='" + text.replace("'", "''") + "'"
    assert load_config(overrides=[*MINIMAL, word]).name == text


def test_packaged_files_are_found_by_name_and_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_config("quickstart") == list_configs()["quickstart"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("steps: 1\n")
    assert find_config("quickstart") == Path("quickstart")
    with pytest.raises(ConfigError, match=r"no run file 'quickstrt'.*did you mean quickstart\?"):
        find_config("quickstrt")


def test_nearest_name() -> None:
    assert nearest_name("group-size", ["group_size", "steps"]) == "group_size"
    assert nearest_name("mt", ["max_tokens", "steps"]) == "max_tokens"
    assert nearest_name("qqq", ["steps"]) is None


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("method.supervision.num_continuation=3", "method.supervision.num_continuation"),
        ("method.supervision.credit={type: teacher_text, alhpa: 1}", "method.supervision.credit.alhpa"),
        ("method.supervision.chunker.type=entrpy", "method.supervision.chunker.type"),
        ("method.transforms=[{type: drop_truncatd}]", "method.transforms[0].type"),
        ("method.supervision.num_continuations=many", "method.supervision.num_continuations"),
    ],
)
def test_parts_of_the_method_are_checked_at_once_with_their_place(word: str, key: str) -> None:
    message = error_of(word)
    assert message.startswith(key)
    assert message.endswith(f"(override {word!r})")


def test_parts_in_files_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: {supervision: {credit: {type: smoothed, alhpa: 2}}}\n")
    message = error_of(files=(file,))
    assert "alpha" in message
    assert message.endswith(f"({file}: method.supervision.credit.alhpa)")


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (
            ("method.supervision={type: logprob, objective: sampled}", "rollout.temperature=0.7", "teacher.spec=hf:a"),
            "which holds whatever was drawn (override 'rollout.temperature=0.7')",
        ),
        (
            ("teachers.big.spec=hf:a", "steps=3"),
            "use `teacher` for one (override 'teachers.big.spec=hf:a')",
        ),
        # No key is named first, so no word is blamed.
        (
            (
                "method.supervision={type: routed, by: domain, routes: {a: {domains: [x]}, b: {domains: [x]}}}",
                "steps=3",
            ),
            "listed by the routes a and b; expected one of them",
        ),
    ],
)
def test_a_refusal_of_what_does_not_go_together_blames_the_word_it_names(words: tuple[str, ...], written: str) -> None:
    assert error_of(*words).endswith(written)
