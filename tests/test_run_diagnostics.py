"""What a run measures beside its losses: when, of what, under which names, and that it changes nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from omniopd.cli import main
from omniopd.config import DiagnosticsConfig
from omniopd.diagnosis.run_diagnostics import (
    OpenTeacher,
    RunDiagnostics,
    Watched,
    is_due,
    most_likely_known,
    summarize_match,
    within,
)
from omniopd.errors import ConfigError
from omniopd.logits.reading import Read, SameVocabulary
from omniopd.logits.scores import Reading, Scored, TokenScores
from omniopd.logits.stored_scores import StoredScores, write_scores
from omniopd.records import Records, diagnostics_of, read_diagnostics, read_metrics
from omniopd.run_folder import RunFolder
from omniopd.types import Author, Continuation, FinishReason, Missing, Rollout, StepContext, TokenSignal

READER = SameVocabulary("student")


class Match:
    """Stands for the learner: every token's log-ratio is its place in the rollout, and it remembers what it got."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, list[str], list[Any]]] = []

    def __call__(
        self, rollouts: Sequence[Rollout], evidence: Sequence[Any], *, teacher: str, k: int
    ) -> list[dict[str, list[float]]]:
        self.calls.append((teacher, k, [r.id for r in rollouts], list(evidence)))
        widths = [of.ids_TK.shape[1] if isinstance(of, TokenScores) and of.ids_TK is not None else k for of in evidence]
        return [
            {"log_ratio": [float(t) for t in range(r.num_tokens)], "top_k": [float(min(k, width))] * r.num_tokens}
            for r, width in zip(rollouts, widths, strict=True)
        ]


def ctx(step: int, num_steps: int = 30) -> StepContext:
    return StepContext(step=step - 1, num_steps=num_steps)


def signal(name: str = "p0/0", text: str = "1+2=3;#3", **fields: Any) -> TokenSignal:
    evidence = fields.pop("kl_evidence", None)
    question = tiny.prompt(name.partition("/")[0])
    return TokenSignal(rollout=tiny.rollout(text, name=name, of=question, **fields), kl_evidence=evidence)


def diagnostics(match: Match | None = None, **fields: Any) -> RunDiagnostics:
    settings = DiagnosticsConfig(**fields.pop("settings", {}))
    teachers = fields.pop("open_teachers", {"teacher": OpenTeacher(reader=READER, has_weights=True)})
    return RunDiagnostics(settings=settings, match=match or Match(), open_teachers=teachers, **fields)


def look(of: RunDiagnostics, signals: Sequence[TokenSignal], at: StepContext) -> tuple[dict[str, float], Any]:
    asyncio.run(of.look(signals, at))
    return of.take()


def test_due_at_the_first_the_last_and_every_so_many_steps() -> None:
    assert [s for s in range(1, 26) if is_due(10, ctx(s, 25))] == [1, 10, 20, 25]
    assert not any(is_due(0, ctx(s, 25)) for s in range(1, 26))


def test_whole_rollouts_of_many_prompts_are_taken_up_to_the_limit() -> None:
    # 9 tokens each, with the end token.
    signals = [signal(f"p{p}/{g}") for p in range(3) for g in range(2)]

    def names(max_tokens: int) -> list[str]:
        return [s.rollout.id for s in within(signals, max_tokens)]

    assert names(27) == ["p0/0", "p1/0", "p2/0"]
    assert names(35) == ["p0/0", "p1/0", "p2/0"]
    assert names(36) == ["p0/0", "p1/0", "p2/0", "p0/1"]
    assert names(1) == ["p0/0"]  # one at least
    # A short rollout after one that does not fit is not taken instead.
    assert len(within([signal("p0/0"), signal("p1/0"), signal("p2/0", text="1")], 12)) == 1


def test_the_means_over_tokens_tenths_and_verdicts() -> None:
    right = tiny.rollout("12", name="p0/0", ended=False, is_correct=True)
    wrong = tiny.rollout("1+23", name="p0/1", ended=False, is_correct=False)
    found = [{"a": [1.0, math.nan]}, {"a": [2.0, 3.0, -math.inf, 6.0], "b": [0.0, 0.0, 0.0, 1.0]}]
    told = summarize_match(found, [right, wrong])
    assert (told["rollouts"], told["tokens"], told["not_finite"]) == (2, 6, 1)
    assert told["means"] == {"a": 3.0, "b": 0.25}  # (1 + 2 + 3 + 6) / 4, 1 / 4
    # Tokens 0 and 1 of 2 lie in tenths 0 and 5; 0 to 3 of 4 in tenths 0, 2, 5 and 7.
    assert told["by_position"]["a"] == [1.5, None, 3.0, None, None, None, None, 6.0, None, None]
    assert told["by_correctness"]["a"] == {"correct": 1.0, "wrong": pytest.approx(11 / 3), "unverified": None}
    assert told["by_correctness"]["b"] == {"correct": None, "wrong": 0.25, "unverified": None}
    # No evidence at all is no mean, and never 0.
    assert summarize_match([{"a": [math.nan, math.nan]}], [right])["means"] == {}


def test_a_due_step_is_matched_and_others_are_not() -> None:
    match = Match()
    of = diagnostics(match, settings={"max_tokens": 20, "top_k": 7})
    signals = [signal("p0/0", is_correct=True), signal("p1/0"), signal("p2/0"), signal("p3/0", author=Author.TEACHER)]
    metrics, row = look(of, signals, ctx(1))
    (call,) = match.calls
    assert call[:3] == ("teacher", 7, ["p0/0", "p1/0"])
    assert [reading.token_ids for reading in call[3]] == [s.rollout.token_ids for s in signals[:2]]
    assert metrics["match/log_ratio"] == 4.0  # 0 to 8 of nine tokens, twice
    assert metrics["match/tokens"] == 18
    assert "match/not_finite" not in metrics
    assert row["match"]["teacher"]["top_k"] == 7
    assert row["match"]["teacher"]["by_correctness"]["log_ratio"]["correct"] == 4.0
    assert of.take() == ({}, None)
    metrics, row = look(of, signals, ctx(2))
    assert row is None and not any(name.startswith("match/") for name in metrics)
    assert len(match.calls) == 1
    assert set(of.timer.take()) == {"match", "step"}


def test_what_nobody_drew_or_finished_is_left_out() -> None:
    match = Match()
    aborted = signal("p0/0", finish_reason=FinishReason.ABORT)
    metrics, row = look(diagnostics(match), [aborted], ctx(1))
    assert (match.calls, row) == ([], None)
    assert metrics["rollout/repetitive"] == 0.0
    assert look(diagnostics(match), [signal(author=Author.TEACHER)], ctx(1)) == ({}, None)

    class Blind:
        def read(self, rollout: Rollout) -> Read:
            return Read(missing=Missing.FAILED)

    metrics, row = look(
        diagnostics(match, open_teachers={"teacher": OpenTeacher(reader=Blind(), has_weights=True)}), [signal()], ctx(1)
    )
    assert (match.calls, row) == ([], None)


def test_masked_tokens_count_for_nothing() -> None:
    plus, end = tiny.encode("+")[0], tiny.EOS
    teacher = OpenTeacher(reader=READER, has_weights=True, masked_ids=frozenset({plus, end}))
    metrics, _ = look(diagnostics(open_teachers={"teacher": teacher}), [signal(text="1+2")], ctx(1))
    assert metrics["match/log_ratio"] == 1.0  # tokens 0 and 2 of 4


def test_several_teachers_see_their_own_prompts_under_their_own_names() -> None:
    match = Match()
    teachers = {name: OpenTeacher(reader=READER, has_weights=True) for name in ("math", "code", "idle")}

    def route(prompt: Any, at: StepContext) -> str:
        return {"p0": "math", "p1": "code"}[prompt.id]

    metrics, row = look(
        diagnostics(match, open_teachers=teachers, route=route), [signal("p0/0"), signal("p1/0", text="1")], ctx(1)
    )
    assert [(call[0], call[2]) for call in match.calls] == [("math", ["p0/0"]), ("code", ["p1/0"])]
    assert (metrics["match/math/log_ratio"], metrics["match/code/log_ratio"]) == (4.0, 0.5)
    assert set(row["match"]) == {"math", "code"}


class Server:
    """Knows three tokens of any completion; the second one that it is asked about fails."""

    id = "server"

    def __init__(self) -> None:
        self.asked: list[tuple[list[Reading], int]] = []

    async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
        self.asked.append((list(readings), top_k))
        return [
            Scored(missing=Missing.TIMEOUT) if i == 1 else Scored(scores=record(r.num_tokens, top_k))
            for i, r in enumerate(readings)
        ]

    async def aclose(self) -> None: ...


def record(num_tokens: int, width: int) -> TokenScores:
    table = np.zeros((num_tokens, width))
    return TokenScores(
        logprobs_T=np.zeros(num_tokens), known="teacher_top_k", ids_TK=table.astype(int), logprobs_TK=table
    )


def test_a_server_is_asked_only_about_what_the_signals_do_not_tell() -> None:
    match, server = Match(), Server()
    teacher = OpenTeacher(reader=READER, has_weights=False, scorer=server, scorer_top_k=3)
    told = record(9, 4)
    signals = [signal("p0/0", kl_evidence=told), signal("p1/0"), signal("p2/0")]
    metrics, row = look(diagnostics(match, open_teachers={"teacher": teacher}), signals, ctx(1))
    ((readings, top_k),) = server.asked
    assert ([r.token_ids for r in readings], top_k) == ([s.rollout.token_ids for s in signals[1:]], 3)
    assert match.calls[0][2] == ["p0/0", "p1/0"]
    assert match.calls[0][3][0] is told
    assert row["match"]["teacher"]["top_k"] == 3
    assert metrics["match/tokens"] == 18
    # Without a scorer nothing more is known.
    silent = OpenTeacher(reader=READER, has_weights=False)
    assert look(diagnostics(match, open_teachers={"teacher": silent}), signals[1:], ctx(1))[1] is None


def test_how_many_likeliest_tokens_a_teacher_tells(tmp_path: Path) -> None:
    assert most_likely_known(Server(), 20) == 20
    assert most_likely_known(Server(), -1) > 10**6
    asyncio.run(write_scores(tmp_path / "s", Server(), [Reading(prompt_ids=(3,), token_ids=(4, 5))], top_k=2))
    assert most_likely_known(StoredScores(tmp_path / "s"), 20) == 2


STUCK = "1+2=3;" * 12


def test_an_alarm_is_said_when_it_starts_and_not_every_step() -> None:
    said: list[str] = []
    of = diagnostics(say=said.append, settings={"every": 0})
    metrics, row = look(of, [signal()], ctx(1))
    assert row is None
    assert metrics == {
        "rollout/repeated_share": 0.0,
        "rollout/repetitive": 0.0,
        "alarm/repetition": 0.0,
        "alarm/truncation": 0.0,
        "alarm/length": 0.0,
    }
    metrics, row = look(of, [signal(text=STUCK)], ctx(2))
    assert [name for name, on in metrics.items() if name.startswith("alarm/") and on] == [
        "alarm/repetition",
        "alarm/length",
    ]
    assert list(row["alarms"]) == ["length", "repetition"]
    assert said == [f"step 2: {row['alarms']['length']}", f"step 2: {row['alarms']['repetition']}"]
    assert "100% of the rollouts repeat themselves" in said[1]
    metrics, row = look(of, [signal(text=STUCK)], ctx(3))
    assert (row, len(said), metrics["alarm/length"]) == (None, 2, 1.0)
    look(of, [signal()], ctx(4))
    _, row = look(of, [signal(text=STUCK[:20], ended=False)], ctx(5))
    assert "hit the length limit" in row["alarms"]["truncation"]


def test_a_resumed_run_knows_its_first_step_and_the_alarms_that_stand() -> None:
    said: list[str] = []
    rows: list[dict[str, Any]] = [
        {"step": 1, "rollout/count": 0, "rollout/truncated": None, "rollout/length_mean": None},
        {"step": 2, "rollout/count": 4, "rollout/truncated": 0.0, "rollout/length_mean": 9.0},
        {"step": 3, "rollout/count": 4, "rollout/truncated": 0.0, "rollout/length_mean": 40.0, "alarm/repetition": 1.0},
    ]
    of = diagnostics(say=said.append, settings={"every": 0})
    of.begin(rows)
    metrics, row = look(of, [signal(text=STUCK)], ctx(4))
    assert metrics["alarm/repetition"] == metrics["alarm/length"] == 1.0
    assert list(row["alarms"]) == ["length"] and "9 in the first step" in said[0]


def ends_right(response: str, answer: str) -> bool:
    return response.rpartition("#")[2] == answer


def writer(write: Callable[[Any], Sequence[Continuation]]) -> tiny.ScriptedTeacher:
    return tiny.ScriptedTeacher(write)


def test_the_prefix_probe_asks_the_text_teacher_and_counts() -> None:
    # The teacher always ends right; the student did in one of two prompts: ahead by 0.5 from every prefix.
    teacher = writer(lambda request: [Continuation(text="#3", finish_reason="stop")] * request.n)
    said: list[str] = []
    probe = {"every": 5, "max_rollouts": 2, "fractions": (0.0, 0.5), "num_continuations": 3}
    of = diagnostics(
        settings={"every": 0, "prefix_probe": probe},
        text_teachers={"teacher": teacher},
        verifier=ends_right,
        answer_tokens=11,
        say=said.append,
    )
    signals = [signal("p0/0", is_correct=True), signal("p0/1", is_correct=True), signal("p1/0", is_correct=False)]
    metrics, row = look(of, signals, ctx(1))
    assert metrics["prefix/advantage@0"] == metrics["prefix/advantage@0.5"] == 0.5
    assert {(r.n, r.max_tokens) for r in teacher.asked} == {(3, 11)}
    assert len(teacher.asked) == 4  # two rollouts of two prompts, two cuts
    assert row["prefix"]["teacher"]["usage"]["requests"] == 4
    assert row["prefix"]["teacher"]["lines"] == said and said[0].startswith("prefix probe of scripted:tiny: 2 rollouts")
    look(of, signals, ctx(2))
    assert len(teacher.asked) == 4
    assert set(of.timer.take()) == {"probe", "step"}


def test_a_probe_without_anything_to_probe_says_so_and_goes_on() -> None:
    said: list[str] = []
    teacher = writer(lambda request: [])
    # Eight characters and the end token, which is nothing to cut off.
    probe: dict[str, Any] = {"every": 1, "fractions": (), "positions": (8,)}
    of = diagnostics(
        settings={"every": 0, "prefix_probe": probe},
        text_teachers={"teacher": teacher},
        verifier=ends_right,
        say=said.append,
    )
    assert look(of, [signal()], ctx(1))[1] is None
    assert look(of, [signal(is_correct=True)], ctx(2))[1] is None
    assert [line.partition(",")[0] for line in said] == [
        "step 1: no rollout with a verdict",
        "step 2: every rollout ends before the first prefix",
    ]
    assert teacher.asked == []


def test_a_probe_that_cannot_be_is_refused_before_anything_is_spent() -> None:
    probing = {"prefix_probe": {"every": 1}}
    with pytest.raises(ConfigError, match="no teacher of this run writes text"):
        diagnostics(settings=probing, verifier=ends_right)
    with pytest.raises(ConfigError, match=r"data\.verifier"):
        diagnostics(settings=probing, text_teachers={"teacher": writer(lambda request: [])})
    teachers = {"teacher": writer(lambda request: [])}
    for cuts, told in (({"fractions": (1.5,)}, "fractions has 1.5"), ({"fractions": ()}, "give at least one")):
        with pytest.raises(ConfigError, match=told):
            diagnostics(settings={"prefix_probe": {"every": 1, **cuts}}, text_teachers=teachers, verifier=ends_right)


def test_the_signals_pass_untouched() -> None:
    signals = [signal("p0/0"), signal("p1/0")]

    class Supervision:
        async def signals(self, rollouts: Sequence[Rollout], at: StepContext) -> list[TokenSignal]:
            return signals

    of = diagnostics()
    got = asyncio.run(Watched(supervision=Supervision(), diagnostics=of).signals([], ctx(1)))
    assert got is signals
    assert of.take()[0]["match/tokens"] == 18


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", resume=False, overwrite=False)
    records = Records(folder)
    for step in (1, 10, 20):
        records.diagnostics({"step": step, "match": {}})
    with diagnostics_of(folder).open("a") as file:
        file.write('{"step": 21, "ma')
    records.truncate_after(10)
    assert [row["step"] for row in read_diagnostics(diagnostics_of(folder))] == [1, 10]
    assert diagnostics_of(folder).read_text().endswith("}\n")


WHITE = ["method.supervision={type: logprob}", "teacher.spec=hf:mini-math:teacher", "teacher.serve=null"]


def train(output: Path, name: str, *overrides: str) -> Path:
    words = ["train", "quickstart", "--run-name", name, f"output={output}", "trackers=[]", "data.eval=null"]
    assert main([*words, "rollout.prompts_per_step=4", "rollout.group_size=2", "steps=2", *overrides]) == 0
    return output / name


def test_a_run_ends_with_the_same_weights_with_and_without_them(tmp_path: Path) -> None:
    plain = train(tmp_path, "plain", *WHITE, "diagnostics.every=0")
    watched = train(tmp_path, "watched", *WHITE, "diagnostics.every=1")
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (plain, watched)]
    assert weights[0] == weights[1]
    rows = read_metrics(watched / "metrics.jsonl")
    assert [row["optim/loss"] for row in rows] == [row["optim/loss"] for row in read_metrics(plain / "metrics.jsonl")]
    assert not diagnostics_of(RunFolder(plain)).exists()
    found = read_diagnostics(diagnostics_of(RunFolder(watched)))
    assert [row["step"] for row in found] == [1, 2]
    for row, of in zip(rows, found, strict=True):
        assert 0.0 < row["match/overlap_ratio"] < 1.0 and row["match/log_ratio"] < 0
        assert row["match/tokens"] == row["tokens/kl"]
        assert row["time/match_s"] > 0
        assert of["match"]["teacher"]["means"]["log_ratio"] == row["match/log_ratio"]


def test_a_run_with_a_text_teacher_is_probed_and_the_bill_counts(tmp_path: Path) -> None:
    chunker = "method.supervision.chunker={type: entropy, chunk_tokens: 8, max_chunks: 1}"
    probe = "diagnostics.prefix_probe={every: 2, max_rollouts: 2, fractions: [0.0, 0.5], num_continuations: 2}"
    run = train(tmp_path, "run", chunker, probe, "method.supervision.num_continuations=1")
    first, second = read_metrics(run / "metrics.jsonl")
    for row in (first, second):
        assert -1 <= row["prefix/advantage@0.5"] <= 1 and "match/log_ratio" not in row
        assert row["time/probe_s"] > 0
    # What the probe's own row says it was answered is part of the step's bill.
    rows = read_diagnostics(diagnostics_of(RunFolder(run)))
    for row, of in zip((first, second), rows, strict=True):
        usage = of["prefix"]["teacher"]["usage"]
        audited = row["teacher/continuations"]
        assert usage["output_tokens"] > 0 and row["teacher/output_tokens"] > usage["output_tokens"]
        assert audited == 8
