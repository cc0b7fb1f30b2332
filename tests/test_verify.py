from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from omniopd.errors import ConfigError, DataError, MissingExtraError, RunError
from omniopd.verify import MathVerifier, get_verifier, is_equivalent, resolve_verifier, serve

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="module")
def math() -> Iterator[MathVerifier]:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    verifier = MathVerifier()
    yield verifier
    verifier.close()


def rows_of(name: str) -> list[dict[str, object]]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"Hence \boxed{\frac12}.", "0.5"),
        ("I got \\boxed{3}.\n\nThat is wrong. Checking the second step\n\\[ \\boxed{4} \\]", "4"),
        (r"So $x$ is \boxed{3} or \boxed{4}.", r"\{3, 4\}"),
        ("The answer is $x = 3$.", "3"),
        ("It costs $1,234.", "1234"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"$\boxed{7}$", r"$7$"),
        ("3 * 4 = 12\n#### 12", "12"),
        ("5 * 250 = 1250\n#### $1,250\n", "1250"),
        # math-verify alone takes the percentage here.
        ("32 / 96 * 100% = 33.333...%, which rounds down to 33%\n#### 33", "33"),
    ],
)
def test_math_accepts(math: MathVerifier, response: str, answer: str) -> None:
    assert math(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{5}", "4"),
        (r"It is \boxed{3} or \boxed{4}.", "4"),
        ("", "4"),
        ("no idea", "4"),
        ("#### Step 4\nSo it is 7.", "4"),
        (r"\boxed{" * 500, "4"),
        ("(1+" * 1000, "4"),
        ("$" * 4000, "4"),
        ("\x00\ud800\n\r", "4"),
        (r"\boxed{\text{Evelyn}}", r"\text{Carla}"),
    ],
)
def test_math_rejects_wrong_answers_and_garbage(math: MathVerifier, response: str, answer: str) -> None:
    assert not math(response, answer)


def test_an_endless_comparison_is_wrong_after_the_time_limit_and_the_next_one_works() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    verifier = MathVerifier(timeout_s=0.5)
    try:
        assert verifier(r"\boxed{42}", "42")
        started = time.perf_counter()
        assert not verifier(r"\boxed{9^{9^{9^9}}}", "42")
        assert time.perf_counter() - started < 5
        assert verifier(r"\boxed{42}", "42")
    finally:
        verifier.close()


def test_math_works_in_threads(math: MathVerifier) -> None:
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda i: math(rf"\boxed{{{i}}}", str(i - i % 2)), range(20)))
    assert verdicts == [i % 2 == 0 for i in range(20)]


def test_a_worker_that_died_between_two_calls_is_replaced(math: MathVerifier) -> None:
    assert math(r"\boxed{1}", "1")
    assert math._worker is not None
    math._worker.kill()
    math._worker.wait()
    assert math(r"\boxed{1}", "1")


def test_only_the_end_of_a_response_is_read(math: MathVerifier) -> None:
    assert math("la " * 100_000 + r"\boxed{8}", "8")


def test_worker_protocol() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    import logging

    answers = io.StringIO()
    try:
        serve(io.StringIO('["\\\\boxed{2}", "2"]\n["\\\\boxed{3}", "2"]\n'), answers)
    finally:
        logging.disable(logging.NOTSET)
    assert answers.getvalue() == "ready\ntrue\nfalse\n"


def test_agreement_with_the_labels_of_real_math_responses(math: MathVerifier) -> None:
    verdicts = []
    for row in rows_of("math_samples_50x8.jsonl"):
        for response, label in zip(row["responses"], row["is_correct"], strict=True):  # type: ignore[call-overload]
            verdicts.append(math(response, str(row["answer"])) == label)
    assert len(verdicts) == 400
    assert sum(verdicts) / len(verdicts) >= 0.97


def test_every_gsm8k_reference_solution_is_right_and_no_neighbor_is(math: MathVerifier) -> None:
    rows = rows_of("gsm8k_test_200.jsonl")
    answers = [str(row["answer"]).rpartition("####")[2].strip().replace(",", "") for row in rows]
    assert all(math(str(row["answer"]), answer) for row, answer in zip(rows, answers, strict=True))
    assert not any(math(str(row["answer"]), str(float(answer) + 1)) for row, answer in zip(rows, answers, strict=True))


def test_is_equivalent_keeps_an_answer_that_brings_its_own_delimiters() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert is_equivalent(r"\boxed{5}", r"\boxed{5}")
    assert is_equivalent(r"\boxed{5}", "$5")


def test_mini_math_reads_the_last_mark() -> None:
    verify = get_verifier("mini-math")
    assert verify is not None
    assert verify("48+37=85;85-19=66;#66", "66")
    assert not verify("48+37=75;75-19=56;#56", "66")
    assert not verify("48+37=85;85-19=66;", "66")
    assert not verify("#" + "1" * 5_000, "66")
    with pytest.raises(DataError, match="needs whole numbers as answers, got '1/2'"):
        verify("#1", "1/2")


def test_exact_and_none() -> None:
    verify = get_verifier("exact")
    assert verify is not None
    assert verify(" Paris\n", "Paris")
    assert not verify("paris", "Paris")
    assert get_verifier("none") is None
    assert get_verifier("auto", has_answers=False) is None
    assert isinstance(get_verifier("auto"), MathVerifier)


def test_auto_depends_on_the_data() -> None:
    assert resolve_verifier("auto", source="mini-math?count=9") == "mini-math"
    assert resolve_verifier("auto", source="rows.jsonl") == "math"
    assert resolve_verifier("auto", source="rows.jsonl", has_answers=False) == "none"
    with pytest.raises(ConfigError, match="did you mean 'mini-math'"):
        resolve_verifier("minimath")
    with pytest.raises(ConfigError, match="no row has an answer"):
        resolve_verifier("math", has_answers=False)


def test_a_checker_that_cannot_start_says_how_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(RunError, match=r"did not start; `python -m omniopd\.verify` shows why"):
        MathVerifier()("1", "1")


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'omniopd\[train\]'"):
        MathVerifier()
