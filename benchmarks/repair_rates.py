"""How often is a chat reply repaired rightly, and how often is one altered that needed no repair?

    python benchmarks/repair_rates.py [PATH/gsm8k_lm_solutions_600.jsonl] [--splits 4] [--seed 0]

Every real solution of the file (a reference and four models' for each problem) is split at random word boundaries. The
true rest, fed as a chat reply to the part before, must come back as it is; with a failure put in, the rest must come
back without it (whitespace at the joint aside), or the reply must be declared unusable where nothing can be saved.
Writes `benchmarks/results/repair_rates.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omniopd.teachers.repair import Repair, clean_continuation, repairs_of
from omniopd.types import Continuation, Missing

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_lm_solutions_600.jsonl"
RESULT = Path(__file__).parent / "results" / "repair_rates.json"
REPLY_CHARACTERS = 200
"""About 50 tokens."""
MIN_PREFIX_CHARACTERS = 24
"""Shorter prefixes are split too where nothing is put in; a failure needs something to repeat."""
PREAMBLES = (
    "Sure, here is the continuation:",
    "Here's the continuation of the answer:",
    "Continuing from where you left off:",
    "Certainly! Here is the rest of the solution:",
    "Continuation:",
)
COMMON_WORDS = ("the", "a", "then", "each", "total", "so", "we", "there", "are")


def solutions(path: Path) -> Iterator[str]:
    """Yield every solution of the file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["ground_truth"]
        for name in sorted(row):
            if isinstance(row[name], dict):
                yield row[name]["solution"]


def splits(text: str, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Split a text before the whitespace of up to `count` random words."""
    places = [m.start() for m in re.finditer(r"\s+(?=\S)", text) if m.start() > 0]
    for at in sorted(rng.sample(places, min(count, len(places)))):
        yield text[:at], text[at:]


def last_sentence(prefix: str) -> str:
    """Return the last sentence or line of a prefix, at least 16 characters of it."""
    starts = [m.end() for m in re.finditer(r"[.!?]\s+|\n+", prefix) if len(prefix) - m.end() >= 16]
    return prefix[starts[-1] :] if starts else prefix


def reworded(text: str, rng: random.Random) -> str:
    """Replace about one word of ten without a number, as a model does that writes a text again."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if i and word.isalpha() and rng.random() < 0.1:
            words[i] = rng.choice(COMMON_WORDS)
    return " ".join(words)


def respaced(text: str) -> str:
    """Write a text as markdown models do: lines joined, numbers bold."""
    return re.sub(r"(?<![\w.*])(\d+)(?![\w.*])", r"**\1**", text.replace("\n", "\n\n"))


Injection = Callable[[str, str, random.Random], str]
REPAIRABLE: dict[str, Injection] = {
    "full echo": lambda prefix, rest, rng: prefix + rest,
    "full echo, other whitespace and bold numbers": lambda prefix, rest, rng: respaced(prefix) + rest,
    "last sentence echoed": lambda prefix, rest, rng: last_sentence(prefix) + rest,
    "last 8 to 40 characters echoed": lambda prefix, rest, rng: prefix[-rng.randint(8, 40) :] + rest,
    "preamble": lambda prefix, rest, rng: f"{rng.choice(PREAMBLES)}\n\n{rest}",
    "preamble and last sentence": lambda prefix, rest, rng: f"{rng.choice(PREAMBLES)}\n{last_sentence(prefix)}{rest}",
    "code fence": lambda prefix, rest, rng: f"```{rng.choice(['', 'text', 'latex'])}\n{rest}\n```",
    "quotes": lambda prefix, rest, rng: f'"{rest}"',
    "tags": lambda prefix, rest, rng: f"<partial>{prefix}{rest}</partial>",
    "closing tag": lambda prefix, rest, rng: f"{rest}</partial>",
    "end marker": lambda prefix, rest, rng: f"{rest}\n<end-of-answer>",
    "JSON": lambda prefix, rest, rng: json.dumps({"continuation": rest}),
    "JSON cut by the limit": lambda prefix, rest, rng: json.dumps({"continuation": rest}).removesuffix('"}'),
}
HOPELESS: dict[str, Injection] = {
    "started over": lambda prefix, rest, rng: reworded(prefix, rng)[: max(24, len(prefix) - 12)],
    "cut during the echo": lambda prefix, rest, rng: prefix[: rng.randint(12, len(prefix) - 1)],
    "nothing but the last sentence": lambda prefix, rest, rng: last_sentence(prefix),
    "refusal": lambda prefix, rest, rng: "I'm sorry, but I can't help with that.",
}


def repaired(prefix: str, reply: str, *, is_json: bool = False, finish: str = "length") -> Continuation:
    """Clean one chat reply."""
    transport = "structured" if is_json else "chat"
    return clean_continuation(prefix, reply, transport=transport, finish_reason=finish)


def false_cuts(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Count replies without a failure that came back altered."""
    counts: dict[str, Any] = {}
    for name, strips in (("as they are", False), ("leading whitespace lost", True)):
        altered: list[tuple[str, str, str]] = []
        kinds: Counter[str] = Counter()
        for prefix, rest in pairs:
            reply = rest[:REPLY_CHARACTERS].lstrip() if strips else rest[:REPLY_CHARACTERS]
            result = repaired(prefix, reply, finish="length" if len(rest) > REPLY_CHARACTERS else "stop")
            if result.text != reply:
                altered.append((prefix[-80:], reply[:80], result.detail))
                kinds.update(repair.value for repair in repairs_of(result) if repair is not Repair.GLUED)
        share = len(altered) / len(pairs)
        counts[name] = {"replies": len(pairs), "altered": len(altered), "share": share, "by_repair": dict(kinds)}
        counts[name]["examples"] = altered[:5]
    return counts


def repair_rates(pairs: list[tuple[str, str]], rng: random.Random) -> dict[str, Any]:
    """Count replies with a failure that were repaired, or declared unusable, rightly."""
    rates: dict[str, Any] = {}
    for name, inject in {**REPAIRABLE, **HOPELESS}.items():
        right, examples = 0, list[tuple[str, ...]]()
        for prefix, rest in pairs:
            rest = rest[:REPLY_CHARACTERS].rstrip()
            reply = inject(prefix, rest, rng)
            has_end = name in ("code fence", "quotes", "JSON", "refusal")
            result = repaired(prefix, reply, is_json=name.startswith("JSON"), finish="stop" if has_end else "length")
            if name in HOPELESS:
                is_right = result.missing in (Missing.GARBAGE, Missing.REFUSED)
            else:
                is_right = result.text is not None and result.text.strip() == rest.strip()
            right += is_right
            if not is_right and len(examples) < 3:
                examples.append((prefix[-80:], reply[:80], (result.text or "")[:80], result.detail))
        rates[name] = {"replies": len(pairs), "right": right, "share": right / len(pairs), "examples": examples}
    return rates


def microseconds(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Time single calls on prefixes and replies of about 200 characters, on a long prefix, and on a loop."""
    typical = [(p[-200:], r[:200]) for p, r in pairs if len(p) >= 180 and len(r) >= 150][:500]
    times = []
    for prefix, reply in typical * 4:
        start = time.perf_counter()
        repaired(prefix, reply)
        times.append(1e6 * (time.perf_counter() - start))
    longest = (" ".join(p for p, _ in pairs))[:10_000]
    cases = {
        "prefix of 10,000 characters": (longest, typical[0][1]),
        "prefix of 10,000 characters, echoed whole": (longest, longest + typical[0][1]),
        "loop of 10,000 characters, reply of 1,000": ("a" * 9_999 + "b", "a" * 1_000),
    }
    slow = {}
    for name, (prefix, reply) in cases.items():
        rounds = []
        for _ in range(20):
            start = time.perf_counter()
            repaired(prefix, reply)
            rounds.append(1e6 * (time.perf_counter() - start))
        slow[name] = statistics.median(rounds)
    return {"typical, median": statistics.median(times), "typical, p99": sorted(times)[len(times) * 99 // 100], **slow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=DATA)
    parser.add_argument("--splits", type=int, default=4, help="places in each solution")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pairs = [pair for text in solutions(args.data) for pair in splits(text, args.splits, rng)]
    long_pairs = [
        (p, r) for p, r in pairs if len(p) >= MIN_PREFIX_CHARACTERS and len(r.strip()) >= MIN_PREFIX_CHARACTERS
    ]
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {"rapidfuzz": version("rapidfuzz")},
        "data": args.data.name,
        "seed": args.seed,
        "false_cuts": false_cuts(pairs),
        "repairs": repair_rates(long_pairs, rng),
        "microseconds": microseconds(long_pairs),
    }
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
    for name, count in result["false_cuts"].items():
        print(f"unharmed replies, {name}: {count['altered']} of {count['replies']} altered ({count['share']:.3%})")
        print(f"    {count['by_repair']}")
    for name, rate in result["repairs"].items():
        print(f"{name:<46} {rate['right']:>6} of {rate['replies']} right ({rate['share']:.2%})")
    for name, value in result["microseconds"].items():
        print(f"{name:<46} {value:8.1f} us")


if __name__ == "__main__":
    main()
