"""Can a similarity tell right from wrong? Measured on real solutions of real models.

    python -m benchmarks.similarity_auc [FOLDER]

FOLDER holds `gsm8k_lm_solutions_600.jsonl` (openai/grade-school-math: 600 problems, each with a reference solution and
four models' own, labelled right or wrong) and `math_samples_50x8.jsonl` (QwenLM/Qwen2.5-Math: 50 problems, 8 sampled
responses each, labelled).

GSM8K: candidate against reference, twice: the line with the final answer removed on both sides, and the last step
removed too. AUC is over all candidates; order is the share of (right, wrong) pairs of one problem that are ordered
right, a tie counting half. Problems are split by the parity of the SHA-256 of the question; `default` was fitted on the
even half (`similarity_default.py`), so the odd half is the one to read.

MATH: every response is cut into chunks, at the first space ("windows") or line end ("steps") after 200 characters; a
chunk's score is the mean over the other 7 responses of its best match among their chunks, a response's
score the mean of its chunks. "whole" takes the response as one chunk. Nothing was fitted on these. Few problems have
wrong responses, which the intervals show.

Scale, on the odd half without answer lines: `unrelated` is the mean similarity of a solution with the reference of
another problem (the floor), `agreeing` that of two right solutions of one problem (the ceiling).

Intervals are 95%, by bootstrap over problems. Writes `benchmarks/results/similarity_auc.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from omniopd import get_similarity

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULT = Path(__file__).parent / "results" / "similarity_auc.json"
NAMES = ("edit", "rouge1", "chrf", "exact", "numbers", "0.5*edit + 0.5*numbers", "default")
CHUNK_NAMES = ("edit", "rouge1", "numbers", "default")
SETTINGS = ("answer removed", "last step removed too")
HALVES = ("even", "odd")
CUTS = ("windows", "steps", "whole")
CHUNK_CHARS = 200
RESAMPLES = 1000

Rows = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One model's solution of one problem."""

    problem: int
    half: str
    question: str
    reference: str
    solution: str
    right: bool


def candidates(path: Path) -> list[Candidate]:
    """Read the labelled GSM8K solutions."""
    found = []
    for problem, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        half = HALVES[int(hashlib.sha256(row["question"].encode()).hexdigest(), 16) % 2]
        for answer in (value for value in row.values() if isinstance(value, dict)):
            found.append(
                Candidate(
                    problem=problem,
                    half=half,
                    question=row["question"],
                    reference=row["ground_truth"],
                    solution=answer["solution"],
                    right=answer["is_correct"],
                )
            )
    return found


def shorten(text: str, setting: str) -> str:
    """Return a solution without its answer line, and without its last step where the setting says so."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("A:")]
    return "\n".join(lines[:-1] if setting == SETTINGS[1] else lines)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the chance that a right solution scores above a wrong one; a tie counts half."""
    right, wrong = scores[labels], np.sort(scores[~labels])
    if not len(right) or not len(wrong):
        return float("nan")
    below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")
    return float(below.sum() / 2 / (len(right) * len(wrong)))


def order(scores: np.ndarray, labels: np.ndarray, groups: Sequence[Rows]) -> float:
    """Return the share of (right, wrong) pairs within a group that are ordered right; a tie counts half."""
    won, total = _pairs_won(scores, labels, groups)
    return float(won.sum() / total.sum()) if total.sum() else float("nan")


def _pairs_won(scores: np.ndarray, labels: np.ndarray, groups: Sequence[Rows]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each group how many of its pairs are ordered right, and how many it has."""
    won, total = [], []
    for rows in groups:
        right, wrong = scores[rows][labels[rows]][:, None], scores[rows][~labels[rows]][None]
        won.append(((right > wrong) + 0.5 * (right == wrong)).sum())
        total.append(right.size * wrong.size)
    return np.array(won), np.array(total)


def measure(columns: dict[str, np.ndarray], labels: np.ndarray, problems: np.ndarray) -> dict[str, Any]:
    """Return AUC and order of every similarity with intervals, and how much `default` leads, on the same resamples."""
    groups = [list(np.flatnonzero(problems == problem)) for problem in dict.fromkeys(problems.tolist())]
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(groups), len(groups)) for _ in range(RESAMPLES)]
    rows = [np.concatenate([groups[i] for i in draw]) for draw in draws]
    sampled: dict[str, dict[str, np.ndarray]] = {}
    table: dict[str, Any] = {}
    for name, scores in columns.items():
        won, total = _pairs_won(scores, labels, groups)
        with np.errstate(invalid="ignore"):
            orders = np.array([won[draw].sum() / total[draw].sum() for draw in draws])
        sampled[name] = {"auc": np.array([auc(scores[row], labels[row]) for row in rows]), "order": orders}
        values = {"auc": auc(scores, labels), "order": order(scores, labels, groups)}
        table[name] = {key: _with_interval(value, sampled[name][key]) for key, value in values.items()}
    for name in columns:
        if name != "default" and "default" in columns:
            for key in ("auc", "order"):
                lead = table["default"][key]["value"] - table[name][key]["value"]
                table[name][f"default_leads_{key}"] = _with_interval(lead, sampled["default"][key] - sampled[name][key])
    return table


def _with_interval(value: float, resampled: np.ndarray) -> dict[str, Any]:
    low, high = np.nanpercentile(resampled, (2.5, 97.5))
    return {"value": round(value, 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def gsm8k(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Measure every setting on either half."""
    rows = candidates(path)
    labels, problems = np.array([row.right for row in rows]), np.array([row.problem for row in rows])
    halves = np.array([row.half for row in rows])
    result: dict[str, Any] = {}
    for setting in SETTINGS:
        references = [shorten(row.reference, setting) for row in rows]
        texts = [shorten(row.solution, setting) for row in rows]
        columns = {name: np.array(get_similarity(name).pairs(references, texts)) for name in names}
        for half in HALVES:
            keep = halves == half
            table = measure({name: column[keep] for name, column in columns.items()}, labels[keep], problems[keep])
            result[f"{setting}, {half} half"] = {
                "problems": len(set(problems[keep].tolist())),
                "solutions": int(keep.sum()),
                "right": int(labels[keep].sum()),
                "similarities": table,
            }
    return result


def scale(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return what unrelated and what agreeing solutions score, on the odd half."""
    rows = [row for row in candidates(path) if row.half == HALVES[1]]
    texts = [shorten(row.solution, SETTINGS[0]) for row in rows]
    # Rows of one problem are neighbors, so half the list away is another problem.
    others = [shorten(rows[i - len(rows) // 2].reference, SETTINGS[0]) for i in range(len(rows))]
    right = [
        (texts[i], texts[j])
        for i in range(len(rows))
        for j in range(i + 1, min(i + 4, len(rows)))
        if rows[i].problem == rows[j].problem and rows[i].right and rows[j].right
    ]
    table = {}
    for name in names:
        pairs = get_similarity(name).pairs
        unrelated, agreeing = pairs(texts, others), pairs([a for a, _ in right], [b for _, b in right])
        table[name] = {"unrelated": round(float(np.mean(unrelated)), 3), "agreeing": round(float(np.mean(agreeing)), 3)}
    return table


def chunks(text: str, cut: str) -> list[str]:
    """Cut a text at the first space or line end past every `CHUNK_CHARS` characters; `whole` does not cut."""
    if cut == "whole":
        return [text]
    end = " " if cut == "windows" else "\n"
    found = [""]
    for piece in text.split(end):
        if len(found[-1]) >= CHUNK_CHARS:
            found.append("")
        found[-1] += piece + end
    return [chunk for chunk in found if chunk.strip()]


def math_samples(path: Path, names: Sequence[str], how: str) -> dict[str, Any]:
    """Score the chunks of every response against those of the other responses to the same problem."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    per_chunk: dict[str, list[float]] = {name: [] for name in names}
    per_response: dict[str, list[float]] = {name: [] for name in names}
    chunk_labels, labels, chunk_problems, problems = [], [], [], []
    for problem, row in enumerate(rows):
        cut = [chunks(response, how) for response in row["responses"]]
        for name in names:
            score = _best_matches(get_similarity(name).pairs, cut)
            per_chunk[name] += [value for response in score for value in response]
            per_response[name] += [sum(response) / len(response) for response in score]
        for right, response in zip(row["is_correct"], cut, strict=True):
            labels.append(right)
            problems.append(problem)
            chunk_labels += [right] * len(response)
            chunk_problems += [problem] * len(response)
    result: dict[str, Any] = {"problems": len(rows), "problems_with_wrong": sum(not all(r["is_correct"]) for r in rows)}
    parts = (("responses", per_response, labels, problems), ("chunks", per_chunk, chunk_labels, chunk_problems))
    # A whole response is its only chunk.
    for key, scores, right, where in parts[:1] if how == "whole" else parts:
        columns = {name: np.array(column) for name, column in scores.items()}
        table = measure(columns, np.array(right), np.array(where))
        result[key] = {"count": len(right), "wrong": len(right) - sum(right), "similarities": table}
    return result


def _best_matches(
    pairs: Callable[[Sequence[str], Sequence[str]], list[float]], cut: list[list[str]]
) -> list[list[float]]:
    """Return for each chunk of each response the mean over the other responses of its best match there."""
    left: list[str] = []
    right: list[str] = []
    for i, mine in enumerate(cut):
        for chunk in mine:
            for j, theirs in enumerate(cut):
                if i != j:
                    left += [chunk] * len(theirs)
                    right += theirs
    scores = iter(pairs(left, right))
    return [
        [float(np.mean([max(next(scores) for _ in theirs) for j, theirs in enumerate(cut) if i != j])) for _ in mine]
        for i, mine in enumerate(cut)
    ]


def table_lines(title: str, part: dict[str, Any]) -> list[str]:
    """Return one block of the printed table."""
    lines = [
        title,
        f"  {'similarity':24s} {'AUC':>5s} {'interval':15s} {'order':>5s} {'interval':15s} default leads AUC by",
    ]
    for name, row in part["similarities"].items():
        cells = [
            f"{row[k]['value']:.3f} [{row[k]['interval'][0]:.3f}, {row[k]['interval'][1]:.3f}]"
            for k in ("auc", "order")
        ]
        lead = row.get("default_leads_auc")
        led = f"{lead['value']:+.3f} [{lead['interval'][0]:+.3f}, {lead['interval'][1]:+.3f}]" if lead else ""
        lines.append(f"  {name:24s} {cells[0]} {cells[1]} {led}".rstrip())
    return lines


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    if not (folder / "gsm8k_lm_solutions_600.jsonl").is_file():
        sys.exit(f"{folder} holds no gsm8k_lm_solutions_600.jsonl; give the folder with the data")
    solutions = gsm8k(folder / "gsm8k_lm_solutions_600.jsonl", NAMES)
    samples = {cut: math_samples(folder / "math_samples_50x8.jsonl", CHUNK_NAMES, cut) for cut in CUTS}
    scales = scale(folder / "gsm8k_lm_solutions_600.jsonl", NAMES)
    result = {**provenance(), "resamples": RESAMPLES, "gsm8k": solutions, "math_chunks": samples, "scale": scales}
    # An interval on one line.
    text = re.sub(r"\[\s+([-.\d]+),\s+([-.\d]+)\s+\]", r"[\1, \2]", json.dumps(result, indent=1))
    RESULT.write_text(text + "\n", encoding="utf-8")
    for title, part in solutions.items():
        print("\n".join(table_lines(f"GSM8K, {title} ({part['solutions']} solutions)", part)))
    for cut, sample in samples.items():
        for key in ("responses", "chunks") if cut != "whole" else ("responses",):
            part = sample[key]
            print("\n".join(table_lines(f"MATH, {cut}, {key} ({part['count']}, {part['wrong']} wrong)", part)))
    print("Scale, odd half")
    for name, row in scales.items():
        print(f"  {name:24s} unrelated {row['unrelated']:.3f}, agreeing {row['agreeing']:.3f}")


if __name__ == "__main__":
    main()
