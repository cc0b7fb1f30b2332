"""Ask a teacher a few fixed questions and say what it really does: the first step of a run, and `teachers check`.

What a provider's models accept changes from month to month, so a card is where the search begins and the probe is the
evidence. It uses nothing but the public contract of a teacher, so every kind can be probed.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omniopd.errors import DataError, TeacherResponseError
from omniopd.run_folder import write_json_atomic
from omniopd.scoring.similarity import get_similarity
from omniopd.teachers.base import ContinuationRequest, Teacher
from omniopd.teachers.cards import Transport
from omniopd.teachers.repair import Repair, repairs_of
from omniopd.types import Continuation, Message, Missing, Usage, Value

SAMPLES = 4
"""Of the open question, whose answers should differ."""
ENOUGH = 0.5
"""The share of usable, and of exact, continuations with which a way is taken without looking at the next."""
VERSION = 1
"""Raise it when the questions change: cached results of another version are not used."""

Encode = Callable[[Sequence[Message], str], tuple[int, ...]]
"""Turns a conversation and an open answer into the token ids that a student of the same vocabulary would have."""

_ECHOES = frozenset({Repair.ECHO, Repair.END_ECHO, Repair.NEAR_ECHO, Repair.ONLY_ECHO, Repair.CUT_ECHO})


@dataclass(frozen=True, slots=True)
class Question:
    """A partial answer with, where there is only one way on, how it goes on."""

    prompt: str
    prefix: str
    known: str | None
    max_tokens: int = 24


QUESTIONS = (
    Question("Count from 1 to 20, one number a line.", "1\n2\n3\n4\n5\n6\n7\n8\n9", "\n10"),
    Question("Write the multiplication table of 7.", "7 x 1 = 7\n7 x 2 = 14\n7 x 3 = 21\n7 x 4 =", " 28"),
    # Cut inside a word: only a teacher that goes on from the very character knows how.
    Question("Repeat: The quick brown fox jumps over the lazy dog.", "The quick brown fox jumps over the la", "zy dog"),
)
OPEN_QUESTION = Question(
    "A baker sells 48 rolls in the morning and half as many in the afternoon. How many in all? Think step by step.",
    "In the morning the baker sells 48 rolls. In the afternoon",
    None,
    max_tokens=32,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WayProbe(Value):
    """What one way to hand over a partial answer came to."""

    transport: str
    asked: int = 0
    usable: int = 0
    """Continuations with text."""
    exact_joints: float | None = None
    """Share of the questions with one way on that went on exactly so; None when no sample was usable."""
    echoes: float | None = None
    """Share of the samples that repeated the prefix or its end, repaired or not."""
    repairs: tuple[str, ...] = ()
    """What had to be repaired, with counts."""
    missing: tuple[str, ...] = ()
    """Why samples are missing, with counts."""
    honors_n: bool | None = None
    """Several samples came back in one request; None when one sample at a time was asked for."""
    compared: int = 0
    """Samples of the open question with text."""
    distinct: int = 0
    """Different texts among them."""
    self_agreement: float | None = None
    """Mean similarity of the teacher's samples with each other: no student can be expected to agree more."""
    thinking_tokens: float | None = None
    """Hidden, for each sample."""
    seconds: float | None = None
    """Median for one request."""
    usd_per_usable: float | None = None
    usage: Usage = field(default_factory=Usage)
    error: str = ""
    """Why this way cannot be used at all."""

    @property
    def usable_share(self) -> float:
        return self.usable / self.asked if self.asked else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult(Value):
    """What a teacher does, on one day."""

    teacher: str
    day: str
    chosen: str | None
    """The way that is used; None when no way gave a usable continuation."""
    ways: tuple[WayProbe, ...]
    similarity: str = "edit"
    version: int = VERSION

    @property
    def best(self) -> WayProbe | None:
        """The chosen way's figures."""
        return next((way for way in self.ways if way.transport == self.chosen), None)

    @property
    def usage(self) -> Usage:
        """What the probe cost."""
        return sum((way.usage for way in self.ways), Usage())


async def probe_teacher(
    open_as: Callable[[Transport], Teacher],
    ways: Sequence[Transport],
    *,
    teacher_id: str,
    asks_for_n: bool,
    encode: Encode | None = None,
    is_thorough: bool = False,
    day: datetime.date | None = None,
    similarity: str = "edit",
) -> ProbeResult:
    """Try the ways in their order and choose one. Spends a few hundred tokens.

    Args:
        open_as: opens the teacher with one way; each is closed here.
        ways: those that are possible, the preferred first.
        teacher_id: for the result.
        asks_for_n: the teacher's card says that it takes `n`.
        encode: needed to try `tokens`.
        is_thorough: try all ways; else stop at the first that is good enough.
        day: answers of one day may come from the ledger, those of another are asked again; None: today.
        similarity: what measures the teacher's agreement with itself.

    Raises TeacherAuthError, TeacherConnectionError, TeacherRateLimitError and TeacherBudgetError. A way that the server
    refuses is a result.
    """
    today = day or datetime.date.today()
    probes: list[WayProbe] = []
    for way in ways:
        teacher = open_as(way)
        try:
            probes.append(await _probe_way(teacher, way, asks_for_n, encode, today.toordinal(), similarity))
        except TeacherResponseError as error:
            probes.append(WayProbe(transport=way, error=str(error)))
        finally:
            await teacher.aclose()
        if not is_thorough and _is_good(probes[-1]):
            break
    best = choose(probes)
    return ProbeResult(
        teacher=teacher_id,
        day=today.isoformat(),
        chosen=best.transport if best else None,
        ways=tuple(probes),
        similarity=similarity,
    )


def choose(probes: Sequence[WayProbe]) -> WayProbe | None:
    """Return the first way that is good enough, else the one with the most usable and exact continuations.

    A small model may know none of the answers; then nothing speaks against the preferred way.
    """
    usable = [probe for probe in probes if probe.usable > 0]
    for probe in usable:
        if _is_good(probe):
            return probe
    return max(usable, key=lambda p: (p.usable_share >= ENOUGH, p.exact_joints or 0.0), default=None)


def _is_good(probe: WayProbe) -> bool:
    """Say whether there is no need to look further. Raw prompts go on exactly, whatever the model knows."""
    is_raw = probe.transport in ("tokens", "completions")
    return probe.usable_share >= ENOUGH and (is_raw or (probe.exact_joints or 0.0) >= ENOUGH)


async def _probe_way(
    teacher: Teacher, way: Transport, asks_for_n: bool, encode: Encode | None, seed: int, name: str
) -> WayProbe:
    asked = [(question, 2) for question in QUESTIONS] + [(OPEN_QUESTION, SAMPLES)]
    answers = await teacher.continuations([_request(question, n, seed, encode) for question, n in asked])
    *closed, opened = answers
    samples = [c for answer in answers for c in answer.continuations]
    # To end an answer at once is evidence elsewhere; here every answer obviously goes on.
    usable = [c for c in samples if c.text is not None and c.text.strip()]
    repairs = [repair for c in samples for repair in repairs_of(c)]
    exact = [
        c.text.startswith(question.known)
        for question, answer in zip(QUESTIONS, closed, strict=True)
        for c in answer.continuations
        if c.text is not None and c.text.strip() and question.known is not None
    ]
    usage = sum((answer.usage for answer in answers), Usage())
    # One request for all of them; a repeated one or two does not hide that.
    honors_n = 0 < opened.usage.requests < SAMPLES
    texts = [c.text for c in opened.continuations if c.text is not None]
    was_asked_now = usage.requests > 0
    return WayProbe(
        transport=way,
        asked=len(samples),
        usable=len(usable),
        exact_joints=sum(exact) / len(exact) if exact else None,
        echoes=sum(bool(_ECHOES & set(repairs_of(c))) for c in samples) / len(samples),
        repairs=_counted(str(repair) for repair in repairs),
        missing=_counted(_reason(c) for c in samples if c not in usable),
        honors_n=honors_n if asks_for_n and opened.usage.requests else None,
        compared=len(texts),
        distinct=len(set(texts)),
        self_agreement=_agreement(texts, name),
        thinking_tokens=usage.reasoning_tokens / len(samples) if was_asked_now else None,
        seconds=statistics.median(answer.seconds for answer in answers) if was_asked_now else None,
        usd_per_usable=usage.cost_usd / len(usable) if usage.cost_usd is not None and usable else None,
        usage=usage,
    )


def _request(question: Question, n: int, seed: int, encode: Encode | None) -> ContinuationRequest:
    messages = (Message(role="user", content=question.prompt),)
    return ContinuationRequest(
        messages=messages,
        prefix=question.prefix,
        n=n,
        max_tokens=question.max_tokens,
        seed=seed,
        token_ids=encode(messages, question.prefix) if encode else None,
    )


def _agreement(texts: Sequence[str], name: str) -> float | None:
    pairs = list(itertools.combinations(texts, 2))
    if not pairs:
        return None
    similarity = get_similarity(name)
    return math.fsum(similarity(a, b) for a, b in pairs) / len(pairs)


def _reason(continuation: Continuation) -> str:
    words = [str(continuation.missing or Missing.EMPTY), continuation.detail]
    return ": ".join(filter(None, words))


def _counted(words: object) -> tuple[str, ...]:
    counts = Counter(words)  # type: ignore[call-overload]
    return tuple(f"{count} x {word}" for word, count in counts.most_common())


def describe_probe(result: ProbeResult) -> str:
    """Return what a probe found, for a person."""
    from omniopd.progress import format_usd

    lines = [f"{result.teacher} on {result.day}"]
    for way in result.ways:
        mark = "->" if way.transport == result.chosen else "  "
        if way.error:
            lines.append(f"{mark} {way.transport}: cannot be used: {way.error}")
            continue
        lines.append(
            f"{mark} {way.transport}: {way.usable} of {way.asked} continuations usable, exact joint "
            f"{_percent(way.exact_joints)}, echo {_percent(way.echoes)}"
        )
        n = {True: "honored", False: "ignored", None: "not used"}[way.honors_n]
        lines.append(
            f"     n {n}; {way.distinct} of {way.compared} samples differ; agreement with itself "
            f"{_figure(way.self_agreement)} ({result.similarity}), the ceiling of the reward"
        )
        cost = f"{format_usd(way.usd_per_usable)} for each usable continuation"
        thinking = "unknown" if way.thinking_tokens is None else f"{way.thinking_tokens:.0f} tokens a sample"
        seconds = "from the ledger" if way.seconds is None else f"{way.seconds:.2f} s a request"
        lines.append(f"     hidden thinking {thinking}; {seconds}; {cost}")
        lines += [f"     repaired {repair}" for repair in way.repairs]
        lines += [f"     missing {reason}" for reason in way.missing]
    lines += [f"     warning: {warning}" for warning in warnings_of(result)]
    usage = result.usage
    lines.append(
        f"{usage.requests} requests, {usage.input_tokens} tokens in, {usage.output_tokens} out, "
        f"cost {format_usd(usage.cost_usd if usage.requests else 0.0)}"
    )
    return "\n".join(lines)


def summarize_probe(result: ProbeResult) -> str:
    """Return what a run says of its teacher: one line, and one for each warning."""
    way = result.best
    if way is None:
        return f"teacher {result.teacher}: no way gave a usable continuation"
    seconds = "" if way.seconds is None else f", {way.seconds:.2f} s a request"
    line = (
        f"teacher {result.teacher} is asked by {way.transport}: {way.usable} of {way.asked} continuations usable, "
        f"agreement with itself {_figure(way.self_agreement)}{seconds}"
    )
    return "\n".join([line, *(f"  warning: {warning}" for warning in warnings_of(result))])


def warnings_of(result: ProbeResult) -> list[str]:
    """Return what a user should know before paying this teacher."""
    best = result.best
    if best is None:
        return ["no way gave a usable continuation"]
    found = []
    if best.distinct == 1 and best.compared > 1:
        found.append("all samples are equal: more than one continuation for each chunk buys nothing")
    if best.honors_n is False:
        found.append("`n` is ignored: every sample pays for its prompt")
    visible = best.usage.output_tokens - best.usage.reasoning_tokens
    if best.usage.reasoning_tokens > 5 * max(1, visible):
        found.append("more than five hidden thinking tokens for each visible one: the continuations are dear")
    if not _is_good(best):
        found.append("few continuations go on exactly where the prefix ends (or the model does not know the answers)")
    return found


class ProbeCache:
    """Results of today, by teacher. Servers on this machine are not remembered: their ports tell nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self._folder = folder or Path(home).expanduser() / "omniopd" / "probes"

    def find(self, key: object, day: datetime.date | None = None) -> ProbeResult | None:
        """Return the result of the day, if there is one that can be read."""
        try:
            data = json.loads(self._path(key).read_text(encoding="utf-8"))
            result = ProbeResult.from_json(data)
        except (OSError, ValueError, DataError, TypeError):
            return None
        today = (day or datetime.date.today()).isoformat()
        return result if result.day == today and result.version == VERSION else None

    def add(self, key: object, result: ProbeResult) -> None:
        """Remember a result; a folder that cannot be written is no reason to stop."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path(key), result.to_json())
        except OSError:
            return

    def _path(self, key: object) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return self._folder / f"{digest}.json"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
