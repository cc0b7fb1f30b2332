"""Can a similarity tell right from wrong? AUC on real solutions of real models.

    python benchmarks/similarity_auc.py [PATH/gsm8k_lm_solutions_600.jsonl]

Each of 600 GSM8K problems comes with a reference solution and four models' own, labelled right or wrong; the line with
the final answer is removed on both sides. Writes `benchmarks/results/similarity_auc.json`.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left, bisect_right
from pathlib import Path

from omniopd import get_similarity

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_lm_solutions_600.jsonl"
RESULT = Path(__file__).parent / "results" / "similarity_auc.json"
NAMES = ("edit", "rouge1", "chrf", "exact", "numbers", "0.5*edit + 0.5*numbers")


def solutions(path: Path) -> tuple[list[str], list[str], list[bool]]:
    """Return references, solutions and labels."""
    references, candidates, labels = [], [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for answer in (value for value in row.values() if isinstance(value, dict)):
            references.append(without_answer(row["ground_truth"]))
            candidates.append(without_answer(answer["solution"]))
            labels.append(answer["is_correct"])
    return references, candidates, labels


def without_answer(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith("A:"))


def auc(scores: list[float], labels: list[bool]) -> float:
    """Return the chance that a right solution scores above a wrong one; a tie counts half."""
    right = [score for score, label in zip(scores, labels, strict=True) if label]
    wrong = sorted(score for score, label in zip(scores, labels, strict=True) if not label)
    return sum(bisect_left(wrong, r) + bisect_right(wrong, r) for r in right) / 2 / (len(right) * len(wrong))


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    if not path.is_file():
        sys.exit(f"{path} is not there; give the path of gsm8k_lm_solutions_600.jsonl (openai/grade-school-math)")
    references, candidates, labels = solutions(path)
    measured = {name: round(auc(get_similarity(name).pairs(references, candidates), labels), 3) for name in NAMES}
    RESULT.write_text(json.dumps({"solutions": len(labels), "right": sum(labels), "auc": measured}, indent=1) + "\n")
    for name, value in measured.items():
        print(f"{name:24s} {value:.3f}")


if __name__ == "__main__":
    main()
