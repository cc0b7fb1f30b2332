"""The mini-math language: problems, solutions (right or with slips) and the verifier."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

MODELS = ("student", "teacher")

_ANSWER = re.compile(r"#(-?\d+)\s*$")


@dataclass(frozen=True, slots=True)
class Problem:
    """One expression of two or three terms; every running total stays in 0..297."""

    terms: tuple[int, ...]
    signs: tuple[int, ...]
    """+1 or -1 before each term; the first is always +1."""

    @property
    def expression(self) -> str:
        text = str(self.terms[0])
        for term, sign in zip(self.terms[1:], self.signs[1:], strict=True):
            text += ("+" if sign > 0 else "-") + str(term)
        return text

    @property
    def answer(self) -> int:
        return sum(term * sign for term, sign in zip(self.terms, self.signs, strict=True))


def make_problem(rng: random.Random) -> Problem:
    """Draw a problem: two or three terms of 1..99, no running total below zero."""
    terms = [rng.randint(1, 99)]
    signs = [1]
    total = terms[0]
    for _ in range(rng.choice((1, 2, 2))):
        term = rng.randint(1, 99)
        sign = -1 if term <= total and rng.random() < 0.5 else 1
        terms.append(term)
        signs.append(sign)
        total += sign * term
    return Problem(tuple(terms), tuple(signs))


def make_problems(count: int, *, seed: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
    """Draw `count` problems with distinct expressions, none of them in `exclude`.

    Deterministic in `seed`. Raises ValueError when `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    rng = random.Random(seed)
    seen = set(exclude)
    problems: list[Problem] = []
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.expression not in seen:
            seen.add(problem.expression)
            problems.append(problem)
    return problems


def slip(left: int, right: int, sign: int, rng: random.Random) -> int:
    """Return a wrong result of one step, the way a pupil gets it wrong.

    A carry or a borrow is forgotten where there is one (off by 10); otherwise the count slips by one.
    """
    result = left + sign * right
    carries = (left % 10 + right % 10 >= 10) if sign > 0 else (left % 10 < right % 10)
    if carries and rng.random() < 0.75:
        return max(0, result - 10 * sign)
    return result - 1 if result > 0 and rng.random() < 0.5 else result + 1


def solution(problem: Problem, *, slip_rate: float = 0.0, rng: random.Random | None = None) -> str:
    """Write the worked solution; with `slip_rate` each step goes wrong with that probability.

    Later steps carry on from the wrong total, so one slip spoils the answer. Raises ValueError when `slip_rate` is
    positive and no `rng` is given.
    """
    if slip_rate > 0 and rng is None:
        raise ValueError("slip_rate needs an rng")
    total = problem.terms[0]
    text = ""
    for term, sign in zip(problem.terms[1:], problem.signs[1:], strict=True):
        result = total + sign * term
        if rng is not None and result >= 0 and rng.random() < slip_rate:
            result = slip(total, term, sign, rng)
        text += f"{total}{'+' if sign > 0 else '-'}{term}={result};"
        total = result
    return f"{text}#{total}"


def final_answer(response: str) -> str | None:
    """Return the number after the last `#`, or None when the response does not end in one."""
    match = _ANSWER.search(response)
    return match.group(1) if match else None


def is_correct(response: str, answer: str) -> bool:
    """Tell whether the response ends in `#answer`."""
    found = final_answer(response)
    return found is not None and int(found) == int(answer)


def model_path(name: str) -> Path:
    """Return the folder of a shipped model, `student` or `teacher`.

    Raises ValueError for any other name.
    """
    if name not in MODELS:
        raise ValueError(f"mini-math has the models {' and '.join(MODELS)}, not {name!r}")
    return Path(__file__).parent / "models" / name
