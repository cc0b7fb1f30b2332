"""Fit the constants of the `default` similarity.

    python -m benchmarks.similarity_default [FOLDER]

Data: the even half of the GSM8K problems of `similarity_auc.py` (problems whose question's SHA-256 is even; the other
half is for reporting), answer lines removed: whole, without the last step, and both sides cut to one length (a random
share of the shorter one) the way a chunk and a continuation are, which end in the middle of a step. Three means with
equal weight:

- log loss of right against wrong over all candidates;
- ranking loss log(1 + exp(-(z_right - z_wrong))) over the (right, wrong) pairs of a problem;
- the same over (right solution, damaged right solution): one digit of a result, an operator, a sign or the order of
  two operands changed; every line three times; half of the lines; and, in place of the solution, the problem itself,
  the last number alone, the numbers from 1 to 100. Natural mistakes rarely differ in an operator alone, since every
  number after it differs as well, so without these the operators would weigh nothing.

Weights are kept at 0 or above, with an L2 penalty of 1e-3, by projected gradient descent. Prints figures that are
cross-validated by problem within the even half and writes `benchmarks/results/similarity_default.json`.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from benchmarks.similarity_auc import DATA, HALVES, SETTINGS, Candidate, auc, candidates, order, shorten
from omniopd.scoring.default import FEATURES, agreements
from omniopd.scoring.worked import read_worked

RESULT = Path(__file__).parent / "results" / "similarity_default.json"
CUT = "cut to one length"
PENALTY = 1e-3
STEPS = 6000
RATE = 0.5
FOLDS = 5

_NUMBER = r"\d+(?:\.\d+)?"


def damaged(text: str, question: str, rng: random.Random) -> dict[str, str]:
    """Return what was made of a solution, by the name of the damage; a damage that does not apply is left out."""
    lines = text.split("\n")
    numbers = re.findall(_NUMBER, text)
    made = {
        "digit": _one(rf"(?<==)( *\$?)({_NUMBER})", lambda m: m[1] + str((int(m[2][0]) % 9) + 1) + m[2][1:], text, rng),
        "operator": _one(r"(?<=\d)( *)([-+*/])(?= *\$?\d)", lambda m: m[1] + "-+/*"["+-*/".index(m[2])], text, rng),
        "sign": _one(rf"(?<==)( *\$?)({_NUMBER})", lambda m: f"{m[1]}-{m[2]}", text, rng),
        "operands": _one(rf"({_NUMBER})( *[-/] *)({_NUMBER})", lambda m: m[3] + m[2] + m[1], text, rng),
        "repeated": "\n".join([*lines, *lines, *lines]),
        "half": "\n".join(lines[: len(lines) // 2]) if len(lines) > 1 else text,
        "question": question,
        "last number": numbers[-1] if numbers else text,
        "all numbers": ", ".join(map(str, range(1, 101))),
    }
    return {name: other for name, other in made.items() if other != text}


def _one(pattern: str, replace: Any, text: str, rng: random.Random) -> str:
    """Replace one match, chosen at random; the text itself where there is none."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return text
    match = rng.choice(matches)
    return text[: match.start()] + replace(match) + text[match.end() :]


def examples(rows: list[Candidate]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return features, labels, problems and settings of every candidate."""
    rng = random.Random(1)
    features, labels, problems, settings = [], [], [], []
    for setting in (*SETTINGS, CUT):
        for row in rows:
            reference, text = shorten(row.reference, setting), shorten(row.solution, setting)
            if setting == CUT:
                length = round(rng.uniform(0.25, 1) * min(len(reference), len(text)))
                reference, text = reference[:length], text[:length]
            features.append(agreements(read_worked(reference), read_worked(text)))
            labels.append(row.right)
            problems.append(row.problem)
            settings.append(setting)
    return np.array(features), np.array(labels), np.array(problems), np.array(settings)


def damage_differences(rows: list[Candidate]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return features of a right solution minus those of each damaged one, with their problems and kinds."""
    rng = random.Random(0)
    differences, problems, kinds = [], [], []
    for row in rows:
        if not row.right:
            continue
        reference = read_worked(shorten(row.reference, SETTINGS[0]))
        text = re.sub(r"<<[^<>\n]*>>", "", shorten(row.solution, SETTINGS[0]))
        whole = np.array(agreements(reference, read_worked(text)))
        for kind, other in damaged(text, row.question, rng).items():
            differences.append(whole - agreements(reference, read_worked(other)))
            problems.append(row.problem)
            kinds.append(kind)
    return np.array(differences), np.array(problems), kinds


def pair_differences(
    features: np.ndarray, labels: np.ndarray, problems: np.ndarray, settings: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return features of right minus wrong for every such pair of a problem, and the problems."""
    groups = defaultdict(list)
    for i, key in enumerate(zip(problems.tolist(), settings.tolist(), strict=True)):
        groups[key].append(i)
    differences, where = [], []
    for (problem, _), members in groups.items():
        for i in members:
            for j in members:
                if labels[i] and not labels[j]:
                    differences.append(features[i] - features[j])
                    where.append(problem)
    return np.array(differences), np.array(where)


def fit(features: np.ndarray, labels: np.ndarray, *differences: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights of at least 0 and the bias."""
    design = np.hstack([features, np.ones((len(features), 1))])
    signed = np.where(labels[:, None], design, -design)
    parts = [signed, *(np.hstack([part, np.zeros((len(part), 1))]) for part in differences)]
    theta = np.zeros(design.shape[1])
    for _ in range(STEPS):
        gradient = PENALTY * np.append(theta[:-1], 0.0)
        for part in parts:
            gradient -= part.T @ (1 / (1 + np.exp(part @ theta))) / len(part)
        theta -= RATE * gradient
        theta[:-1] = np.maximum(theta[:-1], 0.0)
    return theta[:-1], float(theta[-1])


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    path = folder / "gsm8k_lm_solutions_600.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is not there; give the folder with the data")
    rows = [row for row in candidates(path) if row.half == HALVES[0]]
    features, labels, problems, settings = examples(rows)
    pairs, pair_problems = pair_differences(features, labels, problems, settings)
    damage, damage_problems, kinds = damage_differences(rows)
    logits = np.zeros(len(labels))
    won: dict[str, list[bool]] = defaultdict(list)
    for fold in range(FOLDS):
        inside = problems % FOLDS == fold
        kept = (pairs[pair_problems % FOLDS != fold], damage[damage_problems % FOLDS != fold])
        weights, bias = fit(features[~inside], labels[~inside], *kept)
        logits[inside] = features[inside] @ weights + bias
        for i in np.flatnonzero(damage_problems % FOLDS == fold):
            won[kinds[i]].append(bool(damage[i] @ weights > 0))
    weights, bias = fit(features, labels, pairs, damage)
    validated = {}
    for setting in (*SETTINGS, CUT):
        keep = settings == setting
        groups = [list(np.flatnonzero(problems[keep] == problem)) for problem in set(problems.tolist())]
        scores, right = logits[keep], labels[keep]
        validated[setting] = {"auc": round(auc(scores, right), 4), "order": round(order(scores, right, groups), 4)}
    result = {
        **provenance(),
        "problems": len(set(problems.tolist())),
        "solutions": len(rows),
        "right_wrong_pairs": len(pairs),
        "damaged_pairs": len(damage),
        "weights": dict(zip(FEATURES, (round(float(weight), 2) for weight in weights), strict=True)),
        "bias": round(bias, 2),
        "cross_validated": validated,
        "damage_ranked_lower": {kind: round(float(np.mean(wins)), 3) for kind, wins in won.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
