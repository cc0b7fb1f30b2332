"""Hold what clients got and wrote down against what the servers did, choice by choice and cent by cent.

The servers number their choices (`repeats="fresh"`), so that no two of one request are the same text, and every text
that a client returns can be traced to the one choice that was billed for it.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.resolve import open_teacher
from omniopd.types import Continuation, Message, Missing

from .world import expected_continuation, identity

FAULTS: Mapping[str, float] = {
    **{"429": 0.05, "429-bare": 0.05},
    **{"500": 0.01, "503": 0.01, "529": 0.01},
    "hang": 0.02,
    **{"reset": 0.005, "reset-mid": 0.005},
    "truncated": 0.01,
    "echo": 0.05,
    "refusal": 0.02,
    **{"fewer": 0.01, "more": 0.01},
}
"""A bad day: 10% 429, half of them with Retry-After, 3% server errors, 2% hangs, 1% resets, 1% truncated JSON, 5%
echoes, 2% refusals, 2% wrong choice counts."""

PRICE = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 4.0}
"""The servers'."""
MAX_TOKENS = 24

_WITHOUT_CHOICES = frozenset({"429", "429-bare", "500", "503", "529", "hang", "limit", "auth", "quota", "rejected"})
_UNKNOWABLE = frozenset({"hang", "reset", "reset-mid", "truncated"})
"""The client cannot tell whether these are billed."""
_CAUSES: tuple[tuple[str, frozenset[str]], ...] = (
    (r"no answer within|not complete within", frozenset({"hang", "late"})),
    (r"HTTP 429", frozenset({"429", "429-bare"})),
    (r"HTTP 500", frozenset({"500"})),
    (r"HTTP 5(?:03|29)", frozenset({"503", "529"})),
    (r"closed|connection broke", frozenset({"reset", "reset-mid"})),
    (r"no JSON", frozenset({"truncated"})),
    (r"no choice", frozenset({"fewer"})),
)
"""What the client says about a failure, and what the server must have done then."""

_STEPS = (
    "We write down what is known.",
    "First the tens, then the ones.",
    "Half of the boxes are full,\n\nso the rest is",
    "Let us call the price of a pen p. ",
    "Adding both sides gives\n",
    "",
    "There are two cases, and in the first one",
    "Since every box holds a dozen pens, ",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One teacher, how much it is asked, and how fast it may be."""

    spec: str
    """`provider:model`; the address comes with the server."""
    dialect: str
    """The server's name for it."""
    requests: int
    n: int
    takes_n: bool
    """All samples in one HTTP request."""
    requests_per_minute: int

    @property
    def has_own_bodies(self) -> bool:
        """No two of its HTTP requests have the same body, so the server can tell a retry from a sibling."""
        return self.takes_n or self.dialect == "gemini"

    @property
    def key_variable(self) -> str:
        return f"{self.spec.partition(':')[0].upper()}_API_KEY"

    @property
    def faults(self) -> dict[str, float]:
        """What its server does wrong. Anthropic's answer is one message, so it has no count of choices."""
        left_out = {"fewer", "more"} if self.dialect == "anthropic" else set()
        return {name: share for name, share in FAULTS.items() if name not in left_out}

    def make_requests(self) -> list[ContinuationRequest]:
        """Return different requests: prefixes with and without whitespace at their end, some empty."""
        return [
            ContinuationRequest(
                messages=(Message(role="user", content=f"{self.spec} problem {i}: how many pens are in {i} boxes?"),),
                prefix=_STEPS[i % len(_STEPS)],
                n=self.n,
                max_tokens=MAX_TOKENS,
                seed=i,
            )
            for i in range(self.requests)
        ]


def make_clients(requests: int, *, requests_per_minute: int) -> list[Client]:
    """Share requests out over the providers, and the rate by how many HTTP requests each will need."""
    kinds = (
        ("openai:gpt-4o", "openai", 0.6, 4, True),
        ("anthropic:claude-sonnet-4-6", "anthropic", 0.05, 2, False),
        ("anthropic:claude-haiku-4-5", "anthropic", 0.05, 2, False),
        ("gemini:gemini-2.5-flash", "gemini", 0.1, 2, False),
        ("deepseek:deepseek-chat", "deepseek", 0.1, 2, False),
        ("mistral:mistral-small-latest", "mistral", 0.1, 4, True),
    )
    weights = [share * (1 if takes_n else n) for _, _, share, n, takes_n in kinds]
    return [
        Client(
            spec=spec,
            dialect=dialect,
            requests=round(share * requests),
            n=n,
            takes_n=takes_n,
            requests_per_minute=round(requests_per_minute * weight / sum(weights)),
        )
        for (spec, dialect, share, n, takes_n), weight in zip(kinds, weights, strict=True)
    ]


async def ask_all(
    clients: Sequence[Client], base_urls: Sequence[str], *, ledger: Path, timeout_s: float, per_call: int = 250
) -> list[list[TeacherAnswer]]:
    """Ask every client everything, side by side, with one ledger file for all. The keys are in the environment."""

    async def ask(client: Client, base_url: str) -> list[TeacherAnswer]:
        teacher = open_teacher(
            f"{client.spec}@{base_url}",
            ledger=ledger,
            price=PRICE,
            requests_per_minute=client.requests_per_minute,
            timeout_s=timeout_s,
        )
        requests = client.make_requests()
        try:
            parts = [requests[i : i + per_call] for i in range(0, len(requests), per_call)]
            answers = await asyncio.gather(*(teacher.continuations(part) for part in parts))
        finally:
            await teacher.aclose()
        return [answer for part in answers for answer in part]

    return list(await asyncio.gather(*map(ask, clients, base_urls)))


@dataclass(slots=True, kw_only=True)
class Audit:
    """What was found at one client."""

    figures: dict[str, Any] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)
    """Continuations without a text, by reason and cause."""
    errors: list[str] = field(default_factory=list)
    """What does not add up."""

    def require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.errors.append(otherwise)


def audit(
    client: Client, answers: Sequence[TeacherAnswer], entries: Sequence[Mapping[str, Any]], ledger: Path
) -> Audit:
    """Trace every continuation to a choice of the server, and every request and cent of the server to the ledger.

    `entries` are the server's, as JSON.
    """
    found = Audit()
    requests = client.make_requests()
    names = [identity(request.messages, request.prefix) for request in requests]
    per_identity: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries:
        per_identity[entry["identities"][0] if entry["identities"] else ""].append(entry)
    found.require(set(per_identity) <= set(names), "the server was asked for what nobody wanted")
    found.require(len(answers) == len(requests), f"{len(answers)} answers to {len(requests)} requests")
    counts: Counter[str] = Counter()
    late: list[Mapping[str, Any]] = []
    for request, name, answer in zip(requests, names, answers, strict=True):
        mine = per_identity[name]
        delivered = _delivered(request, mine)
        left = Counter(text for _, texts in delivered for text in texts)
        found.require(len(answer.continuations) == request.n, f"{name}: {len(answer.continuations)} continuations")
        failed = [c for c in answer.continuations if c.missing in (Missing.FAILED, Missing.TIMEOUT)]
        for continuation in answer.continuations:
            if continuation not in failed:
                counts[_trace(continuation, left, found)] += 1
        own_late = _take_late(delivered, left)
        did = {entry["decision"] for entry in mine}
        if own_late or any(e["outcome"] == "abandoned" and e["decision"] not in _UNKNOWABLE for e in mine):
            did.add("late")
        for continuation in failed:
            _explain(continuation, did, found)
        counts["failed"] += len(failed)
        unasked = sum(e["choices"] > e["n"] for e, _ in delivered if e not in own_late)
        counts["unasked"] += unasked
        late += own_late
        # Of what the client received nothing was thrown away, so nothing was bought again.
        found.require(left.total() == unasked, f"{name}: {left.total() - unasked} choices were billed and not used")
    found.figures |= {
        "requests": len(requests),
        "continuations": counts["text"] + counts["refused"] + counts["failed"],
        "texts_equal_to_expected": counts["text"],
        "refused": counts["refused"],
        "failed": counts["failed"],
        "choices_beyond_those_asked_for": counts["unasked"],
    }
    _check_bills(client, entries, late, ledger, counts, found)
    return found


def _delivered(
    request: ContinuationRequest, entries: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], list[str | None]]]:
    """Return the billed answers to one request with their choices, as a client has to read them; None is a refusal."""
    answers = []
    first = 0
    for entry in entries:
        if entry["decision"] in _WITHOUT_CHOICES:
            continue
        numbers = range(first, first + entry["choices"])
        first += entry["n"]
        if not entry["billed"]:
            continue
        texts = [
            expected_continuation(
                request.messages,
                request.prefix,
                number,
                request.max_tokens,
                seed=entry["seeds"][0],
                is_instructed=entry["how"] in ("chat", "chat-turn"),
            )
            for number in numbers
        ]
        answers.append((entry, [None if entry["decision"] == "refusal" else text for text in texts]))
    return answers


def _take_late(
    answers: Sequence[tuple[Mapping[str, Any], Sequence[str | None]]], left: Counter[str | None]
) -> list[Mapping[str, Any]]:
    """Take whole answers off `left`: written in full when the client had just given up waiting."""
    late = []
    for entry, texts in answers:
        if texts and Counter(texts) <= left:
            left.subtract(texts)
            late.append(entry)
    return late


def _trace(continuation: Continuation, left: Counter[str | None], found: Audit) -> str:
    """Find what an answered continuation came from and take it off `left`. Returns `text` or `refused`."""
    is_refusal = continuation.missing is Missing.REFUSED
    found.require(
        is_refusal or continuation.text is not None, f"{continuation.missing}: {continuation.detail!r} unexplained"
    )
    found.require(left[continuation.text] > 0, f"the server never sent {continuation.text!r} ({continuation.detail})")
    left[continuation.text] -= 1
    if is_refusal:
        found.missing[f"{continuation.missing}: refusal"] += 1
    return "refused" if is_refusal else "text"


def _explain(continuation: Continuation, did: set[str], found: Audit) -> None:
    """Hold what the client says about a failure against what the server did to the request."""
    said = next((causes for words, causes in _CAUSES if re.search(words, continuation.detail)), frozenset())
    found.require(bool(said & did), f"{continuation.missing}: {continuation.detail!r} but the server did {sorted(did)}")
    found.missing[f"{continuation.missing}: {' or '.join(sorted(said & did))}"] += 1


def _check_bills(
    client: Client,
    entries: Sequence[Mapping[str, Any]],
    late: Sequence[Mapping[str, Any]],
    ledger: Path,
    counts: Counter[str],
    found: Audit,
) -> None:
    """Compare the ledger's sums with the server's. What came late is billed and, in the ledger, never answered."""
    billed = [entry for entry in entries if entry["billed"]]
    received = [entry for entry in billed if entry not in late]
    never = [e for e in entries if e["decision"] in _UNKNOWABLE or e["outcome"] == "abandoned"]
    with closing(sqlite3.connect(ledger)) as db:
        sums = db.execute(
            "SELECT SUM(requests), SUM(unanswered), SUM(input_tokens), SUM(output_tokens), SUM(cost_usd), "
            "SUM(possible_usd) FROM calls WHERE teacher = ?",
            (client.spec,),
        ).fetchone()
        (stored,) = db.execute(
            "SELECT COUNT(*) FROM samples JOIN calls ON id = call WHERE teacher = ?", (client.spec,)
        ).fetchone()
        open_orders = db.execute("SELECT COUNT(*) FROM orders").fetchone()[0]
    requests, unanswered, inputs, outputs, usd, possible = sums
    choices = sum(entry["choices"] for entry in billed)
    found.figures |= {
        "http_requests": len(entries),
        "http_requests_in_ledger": requests,
        "http_200_billed": len(billed),
        "choices_billed": choices,
        "samples_in_ledger": stored,
        "never_received": len(never) + len(late),
        "never_received_but_billed": len(late),
        "usd_never_received_but_billed": sum(entry["usd"] for entry in late),
        "unanswered_in_ledger": unanswered,
        "billed_without_a_choice": sum(entry["choices"] == 0 for entry in billed),
        "usd_billed": sum(entry["usd"] for entry in billed),
        "usd_in_ledger": usd,
        "usd_possible_in_ledger": possible,
        "most_requests_in_60_s": most_in_window([entry["arrived"] for entry in entries], 60.0),
        "requests_per_minute": client.requests_per_minute,
        "decisions": dict(sorted(Counter(entry["decision"] for entry in entries).items())),
    }
    # On a machine too busy to accept connections in time, an attempt may end before the server hears of it.
    unheard = requests - len(entries)
    found.figures["requests_the_server_never_heard_of"] = unheard
    found.require(unheard >= 0, f"the ledger has {requests} requests, the server {len(entries)}")
    known = len(never) + len(late)
    found.require(known <= unanswered <= known + unheard, f"{unanswered} unanswered, not {known} (+ {unheard})")
    kept = sum(entry["choices"] for entry in received) - counts["unasked"]
    found.require(stored == kept, f"{stored} samples of {kept} choices received are stored")
    found.require(stored == counts["text"] + counts["refused"], f"{stored} samples are stored, other ones were used")
    found.require(inputs == sum(entry["input_tokens"] for entry in received), f"{inputs} input tokens in the ledger")
    found.require(
        outputs == sum(entry["output_tokens"] for entry in received), f"{outputs} output tokens in the ledger"
    )
    found.require(abs(usd - sum(entry["usd"] for entry in received)) < 1e-9, f"{usd} USD in the ledger")
    found.require(
        sum(entry["usd"] for entry in late) <= possible, f"{possible} USD possible do not cover what was late"
    )
    found.require(open_orders == 0, f"{open_orders} orders were never settled")


def most_in_window(times: Sequence[float], seconds: float) -> int:
    """Return how many of these moments lie in one window of this length, at most."""
    ordered, first, most = sorted(times), 0, 0
    for last, time in enumerate(ordered):
        while ordered[first] <= time - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most
