"""The mini-math world: its language, and the two models that are shipped with it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from omniopd.generation import SampleRequest, load_sampler
from omniopd.worlds.mini_math import (
    MODELS,
    Problem,
    final_answer,
    is_correct,
    make_problems,
    model_path,
    solution,
)
from omniopd.worlds.mini_math.build import HELD_OUT_SEED, train_model
from omniopd.worlds.mini_math.tokenizer import CHARACTERS, build_tokenizer
from omniopd.worlds.mini_math.world import slip

PROBLEM = Problem(terms=(48, 37, 19), signs=(1, 1, -1))


def test_a_problem_and_its_solution() -> None:
    assert (PROBLEM.expression, PROBLEM.answer) == ("48+37-19", 66)
    # 48 + 37 = 85, 85 - 19 = 66
    assert solution(PROBLEM) == "48+37=85;85-19=66;#66"


def test_problems_stay_in_range_and_are_distinct() -> None:
    problems = make_problems(2000, seed=1)
    assert len({p.expression for p in problems}) == 2000
    for problem in problems:
        assert len(problem.terms) in (2, 3) and problem.signs[0] == 1
        assert all(1 <= term <= 99 for term in problem.terms)
        total = 0
        for term, sign in zip(problem.terms, problem.signs, strict=True):
            total += sign * term
            assert 0 <= total <= 297
        assert problem.answer == total == eval(problem.expression)
    # Two of three have three terms.
    assert 0.62 < sum(len(p.terms) == 3 for p in problems) / 2000 < 0.71


def test_problems_are_the_same_for_a_seed_and_leave_out_what_they_must() -> None:
    first = make_problems(50, seed=3)
    assert make_problems(50, seed=3) == first
    assert make_problems(50, seed=4) != first
    held_out = frozenset(p.expression for p in first[:20])
    others = make_problems(50, seed=3, exclude=held_out)
    assert held_out.isdisjoint(p.expression for p in others)
    assert others[:30] == first[20:]
    assert make_problems(0, seed=1) == []
    with pytest.raises(ValueError, match="count must be 0 or more, got -1"):
        make_problems(-1, seed=1)


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("48+37=85;85-19=66;#66", "66", True),
        ("#66", "66", True),
        ("#066 \n", "66", True),
        ("#-3", "-3", True),
        ("48+37=85;85-19=67;#67", "66", False),
        # The working may be wrong, the answer counts.
        ("48+37=75;75-19=66;#66", "66", True),
        ("48+37=85;85-19=66", "66", False),
        ("#66;", "66", False),
        ("#66#67", "66", False),
        ("#6 6", "66", False),
        ("#", "66", False),
        ("", "66", False),
    ],
)
def test_verifier(response: str, answer: str, verdict: bool) -> None:
    assert is_correct(response, answer) is verdict


def test_final_answer() -> None:
    assert [final_answer(r) for r in ("a#12", "#1#2", "12", "#x")] == ["12", "2", None, None]


def test_every_right_solution_is_correct() -> None:
    for problem in make_problems(200, seed=9):
        assert is_correct(solution(problem), str(problem.answer))


def test_slips_spoil_the_answer_and_carry_on() -> None:
    wrong = solution(PROBLEM, slip_rate=1.0, rng=random.Random(0))
    first, second, answer = wrong.split(";")
    total = first.partition("=")[2]
    assert total in ("75", "84", "86")
    # The next step starts from the wrong total, and the answer repeats the last one.
    assert second.startswith(f"{total}-19=") and answer == f"#{second.partition('=')[2]}"


def test_slips_are_of_two_kinds() -> None:
    rng = random.Random(0)
    # 48 + 37 carries: 75 when the carry is forgotten (3 of 4 times), else 84 or 86.
    carried = [slip(48, 37, 1, rng) for _ in range(400)]
    assert set(carried) == {75, 84, 86} and 0.68 < carried.count(75) / 400 < 0.82
    # 85 - 19 borrows: 76 when it is forgotten.
    assert set(slip(85, 19, -1, rng) for _ in range(200)) == {76, 65, 67}
    # Neither: the count slips by one.
    assert set(slip(41, 37, 1, rng) for _ in range(200)) == {77, 79}
    # A total is never negative.
    assert set(slip(5, 5, -1, rng) for _ in range(50)) == {1}


def test_slip_rate_is_the_share_of_wrong_steps() -> None:
    rng = random.Random(1)
    problems = [p for p in make_problems(1500, seed=5) if len(p.terms) == 2]
    wrong = sum(not is_correct(solution(p, slip_rate=0.4, rng=rng), str(p.answer)) for p in problems)
    assert wrong / len(problems) == pytest.approx(0.4, abs=0.07)
    assert solution(PROBLEM, slip_rate=0.0, rng=rng) == solution(PROBLEM)
    with pytest.raises(ValueError, match="slip_rate needs an rng"):
        solution(PROBLEM, slip_rate=0.1)


def test_tokenizer_writes_one_token_a_character() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(CHARACTERS) + 3 == 34
    assert tokenizer.decode(tokenizer.encode(CHARACTERS)) == CHARACTERS
    assert tokenizer.unk_token_id not in tokenizer.encode(f"Q:48+37-19?{solution(PROBLEM)}")
    turns = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "1+2=3"}]
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False) == "Q:1+2?"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "Q:1+2?1+2=3"


def test_models_are_named() -> None:
    assert MODELS == ("student", "teacher")
    with pytest.raises(ValueError, match="mini-math has the models student and teacher, not 'pupil'"):
        model_path("pupil")


def test_shipped_models_are_there_and_small(student_folder: Path, teacher_folder: Path) -> None:
    files = [f for folder in (student_folder, teacher_folder) for f in folder.rglob("*") if f.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) < 6 * 2**20
    made = {folder.name: json.loads((folder / "build.json").read_text()) for folder in (student_folder, teacher_folder)}
    assert made["teacher"]["slip_rate"] == 0 < made["student"]["slip_rate"]
    assert made["teacher"]["greedy_accuracy"] > made["student"]["greedy_accuracy"] > 0.5


def accuracy(folder: Path, *, temperature: float, num_samples: int = 1) -> float:
    """Return the share of right answers to 50 held-out problems."""
    sampler = load_sampler(folder, device="cpu")
    problems = make_problems(50, seed=HELD_OUT_SEED)
    groups = sampler.sample(
        [
            SampleRequest(
                token_ids=tuple(sampler.tokenizer.encode(f"Q:{p.expression}?")),
                num_samples=num_samples,
                max_tokens=40,
                temperature=temperature,
                seed=i,
            )
            for i, p in enumerate(problems)
        ]
    )
    verdicts = [is_correct(s.text, str(p.answer)) for p, group in zip(problems, groups, strict=True) for s in group]
    return sum(verdicts) / len(verdicts)


def test_the_student_knows_better_than_it_writes(student_folder: Path) -> None:
    """Right when greedy, slipping when sampled: what on-policy distillation can repair."""
    greedy = accuracy(student_folder, temperature=0.0)
    sampled = accuracy(student_folder, temperature=1.0, num_samples=4)
    assert greedy > 0.5
    assert greedy > sampled + 0.2


def test_the_teacher_writes_better_than_the_student(student_folder: Path, teacher_folder: Path) -> None:
    assert accuracy(teacher_folder, temperature=1.0) > 0.6 > accuracy(student_folder, temperature=1.0)


def test_recipe_writes_a_model_that_loads_and_learns(tmp_path: Path) -> None:
    made = train_model("student", steps=3, slip_rate=0.4, seed=5, folder=tmp_path / "student")
    assert made == json.loads((tmp_path / "student" / "build.json").read_text())
    again = train_model("student", steps=3, slip_rate=0.4, seed=5, folder=tmp_path / "again")
    assert again["greedy_accuracy"] == made["greedy_accuracy"]
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("student", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
