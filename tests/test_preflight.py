"""The check before a run: tiny models end to end, a teacher that is the student, one that helps, one that cannot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from omniopd import preflight
from omniopd.cli import main
from omniopd.config import RunConfig
from omniopd.diagnosis.evidence import PromptMean, cost_of
from omniopd.diagnosis.logit_match import LOG_RATIO, OVERLAP, LogitMatch, LogitMatchReport, summarize_match
from omniopd.diagnosis.prefix_probe import PrefixPoint, PrefixProbeSettings, PrefixReport, cut_positions
from omniopd.diagnosis.preflight_report import PreflightSettings, describe_preflight
from omniopd.diagnosis.text_match import TextMatchReport, TextMatchSettings
from omniopd.diagnosis.verdict import Finding, judge_logits, judge_text
from omniopd.errors import ConfigError, DataError, TeacherBudgetError
from omniopd.logits.scores import Scored, TokenScores
from omniopd.method import build_method
from omniopd.preflight import cost_notice, run_preflight
from omniopd.run_folder import RunFolder
from omniopd.teachers.base import ContinuationRequest
from omniopd.teachers.metered import MeteredTeacher
from omniopd.types import Continuation, Missing, Usage

SMALL = PreflightSettings(num_prompts=6, num_rollouts=2)
LOGPROB = {"supervision": {"type": "logprob"}}
CHUNKED = {
    "supervision": {"type": "chunked", "chunker": {"type": "uniform", "chunk_tokens": 3}, "num_continuations": 2}
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("other"), phase=1.0)


def config(tmp_path: Path, student: Path, *, answers: bool = True, **changes: Any) -> RunConfig:
    """Make a run over eight sums whose answer is always 3."""
    data = tmp_path / "data.jsonl"
    rows: list[dict[str, str]] = [{"id": f"p{i}", "prompt": f"Q:{i}+{3 - i}?"} for i in range(8)]
    rows = [{**row, "answer": "3", "domain": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(rows)]
    if not answers:
        rows = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.model_validate(
        {
            "name": "run",
            "output": tmp_path / "runs",
            "student": {"model": str(student), "device": "cpu"},
            "data": {"train": str(data), "verifier": "mini-math" if answers else "none"},
            "rollout": {"max_tokens": 8},
            "learner": {"micro_batch_size": 4},
            **changes,
        }
    )


def scripted(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[ContinuationRequest], list[Continuation]]
) -> tiny.ScriptedTeacher:
    teacher = tiny.ScriptedTeacher(write)

    def open_scripted(role: Any, *_: Any) -> MeteredTeacher | None:
        return MeteredTeacher(teacher) if role.method.needs_text_teacher else None

    monkeypatch.setattr(preflight, "open_text_teacher", open_scripted)
    return teacher


def always(text: str) -> Callable[[ContinuationRequest], list[Continuation]]:
    return lambda request: [Continuation(text=text, finish_reason="stop")] * request.n


def test_a_teacher_that_is_the_student_overlaps_wholly_and_has_nothing_new(tmp_path: Path, student: Path) -> None:
    report = run_preflight(config(tmp_path, student, method=LOGPROB, teacher={"spec": f"hf:{student}"}), SMALL)
    (teacher,) = report.teachers
    assert teacher.logits is not None
    numbers = teacher.logits.numbers
    assert numbers[OVERLAP].mean.value == 1.0 and set(numbers[OVERLAP].tenths) <= {1.0, None}
    assert abs(numbers[LOG_RATIO].mean.value) < 1e-6
    assert numbers["entropy_gap"].mean.value < 1e-6
    assert [v.finding for v in teacher.verdicts] == [Finding.NOTHING_NEW]
    told = describe_preflight(report)
    assert "nothing new to teach" in told and "All thresholds are ours" in told
    assert "log-ratio (teacher minus student)" in told
    # 23 tokens: sets of 16 would overlap whatever the models, so they hold an eighth.
    assert (teacher.logits.top_k, teacher.logits.vocabulary) == (2, 23)
    assert not RunFolder(tmp_path / "runs" / "run").path.exists()


def test_another_model_differs_and_both_prompts_are_shown(tmp_path: Path, student: Path, other: Path) -> None:
    report = run_preflight(config(tmp_path, student, method=LOGPROB, teacher={"spec": f"hf:{other}"}), SMALL)
    (teacher,) = report.teachers
    assert teacher.logits is not None and teacher.logits.num_rollouts == 12
    assert teacher.logits.numbers[OVERLAP].mean.value < 0.9
    assert teacher.logits.numbers[LOG_RATIO].mean.value < -0.05
    assert any("the student reads" in line for line in teacher.reads)
    assert any("the teacher reads" in line for line in teacher.reads)
    assert teacher.verdicts[0].finding is not Finding.NOTHING_NEW


def test_scores_of_a_server_give_the_overlap_that_weights_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: Path, other: Path
) -> None:
    run = config(tmp_path, student, method=LOGPROB, teacher={"spec": f"hf:{other}"})
    whole = run_preflight(run, SMALL).teachers[0].logits
    opened = preflight.open_logit_teacher

    def without_weights(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(opened(*args, **kwargs), model=None)

    monkeypatch.setattr(preflight, "open_logit_teacher", without_weights)
    served = run_preflight(run, SMALL).teachers[0].logits
    assert whole is not None and served is not None
    for name in (OVERLAP, LOG_RATIO, "overlap_advantage"):
        assert served.numbers[name].mean.value == pytest.approx(whole.numbers[name].mean.value, abs=1e-5)
    assert "entropy_gap" in whole.numbers and "entropy_gap" not in served.numbers


def test_another_tokenizer_leaves_the_log_ratio_with_weights_and_with_scores_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: Path, other: Path
) -> None:
    method = {"supervision": {"type": "logprob", "objective": "sampled", "alignment": "groups"}}
    run = config(tmp_path, student, method=method, teacher={"spec": f"hf:{other}"})
    weights = run_preflight(run, SMALL).teachers[0].logits
    opened = preflight.open_logit_teacher
    monkeypatch.setattr(
        preflight,
        "open_logit_teacher",
        lambda *args, **kwargs: dataclasses.replace(opened(*args, **kwargs), model=None),
    )
    scores = run_preflight(run, SMALL).teachers[0].logits
    assert weights is not None and scores is not None
    assert weights.numbers[LOG_RATIO].mean.value < -0.05
    assert set(weights.numbers) == set(scores.numbers) == {LOG_RATIO}
    assert scores.numbers[LOG_RATIO].mean.value == pytest.approx(weights.numbers[LOG_RATIO].mean.value, abs=1e-5)


def test_stored_scores_are_of_other_rollouts(tmp_path: Path, student: Path) -> None:
    run = config(tmp_path, student, method=LOGPROB, teacher={"spec": f"scores:{tmp_path}"})
    (check,) = run_preflight(run, SMALL).teachers
    assert check.logits is None and "other rollouts" in check.left_out[0]


def test_the_notice_names_price_and_budget_and_what_is_free(tmp_path: Path, student: Path) -> None:
    def notice(**teacher: Any) -> str:
        run = config(tmp_path, student, method=CHUNKED, teacher={"spec": "openai:m", **teacher})
        (role,) = build_method(run.method).roles(run)
        return cost_notice(role, run, [cost_of(10, answers_per_request=2, tokens_per_answer=50)])

    # 10 requests x 2 answers x 50 tokens = 1,000 tokens; at 10 USD a million, 0.01 USD.
    priced = notice(price={"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 10.0}, budget_usd=2, budget_calls=9)
    assert "at most 1,000 tokens in 20 answers to 10 requests" in priced
    assert "$0.0100 besides what it reads" in priced and "budget 2 USD and 9 calls" in priced
    assert "price is unknown; no budget limits it" in notice(spec="vllm:m@http://127.0.0.1:1/v1", price=None)
    assert "cost nothing" in notice(price={"input_usd_per_mtok": 0.0, "output_usd_per_mtok": 0.0})
    assert "USD" not in notice(spec="echo:x")


def test_rollouts_without_scores_are_counted_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: Path
) -> None:
    class Server:
        id = "vllm:m"

        async def score(self, readings: Any, *, top_k: int = 0) -> list[Scored]:
            refused = Scored(missing=Missing.FAILED, detail="full")
            known = [Scored(scores=TokenScores(logprobs_T=np.full(r.num_tokens, -1.0))) for r in readings[1:]]
            return [refused, *known]

        async def aclose(self) -> None: ...

    opened = preflight.open_logit_teacher

    def served(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(opened(*args, **kwargs), model=None, scorer=Server())

    monkeypatch.setattr(preflight, "open_logit_teacher", served)
    run = config(tmp_path, student, method=LOGPROB, teacher={"spec": f"hf:{student}"})
    (teacher,) = run_preflight(run, SMALL).teachers
    assert teacher.logits is not None
    assert teacher.logits.missing == {"failed": 1} and teacher.logits.num_rollouts == 11
    # Only the log-ratio is known, so closeness stays open.
    assert set(teacher.logits.numbers) == {LOG_RATIO}
    assert teacher.verdicts[0].finding is Finding.UNCLEAR


def test_a_teacher_that_ends_right_can_teach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: Path) -> None:
    teacher = scripted(monkeypatch, always(";#3"))
    report = run_preflight(config(tmp_path, student, method=CHUNKED, teacher={"spec": "echo:x"}), SMALL)
    (check,) = report.teachers
    assert check.prefix is not None and check.text is not None
    assert [v.finding for v in check.verdicts] == [Finding.CAN_TEACH]
    # The run's audit: two answers of three tokens.
    assert (check.text.settings.num_spans, check.text.settings.span_tokens) == (2, 3)
    assert check.usage is not None and check.usage.requests == len(teacher.asked)
    assert teacher.is_closed


def test_a_teacher_that_cannot_finish_cannot_teach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: Path
) -> None:
    scripted(monkeypatch, always(";#9"))
    report = run_preflight(config(tmp_path, student, method=CHUNKED, teacher={"spec": "echo:x"}), SMALL)
    (verdict,) = report.teachers[0].verdicts
    assert verdict.finding is Finding.CANNOT_TEACH
    assert any("another teacher" in step for step in verdict.next_steps)
    assert any("hint" in step for step in verdict.next_steps)


def test_without_answers_endings_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: Path
) -> None:
    teacher = scripted(monkeypatch, always(";#3"))
    run = config(tmp_path, student, answers=False, method=CHUNKED, teacher={"spec": "echo:x"})
    report = run_preflight(run, SMALL)
    (check,) = report.teachers
    assert check.prefix is None and check.text is not None
    assert any("no answers" in reason for reason in check.left_out)
    assert {request.max_tokens for request in teacher.asked} == {3}
    assert "not checked: prefix probe" in describe_preflight(report)


def test_a_repeated_check_pays_nothing_and_the_run_may_begin(tmp_path: Path, student: Path, other: Path) -> None:
    run = config(tmp_path, student, method=CHUNKED, teacher={"spec": f"hf:{other}"})
    first, again = run_preflight(run, SMALL), run_preflight(run, SMALL)
    paid, repeated = first.teachers[0].usage, again.teachers[0].usage
    assert paid is not None and paid.requests > 0 and paid.output_tokens > 0
    assert repeated is not None and repeated.requests == 0 and repeated.output_tokens == 0
    assert repeated.cached_requests > 0
    assert again.teachers[0].prefix is not None and first.teachers[0].prefix is not None
    assert again.teachers[0].prefix.outcomes == first.teachers[0].prefix.outcomes
    folder = RunFolder(tmp_path / "runs" / "run")
    assert folder.teacher().ledger.is_file() and folder.has_never_begun
    RunFolder.create(folder.path, resume=False, overwrite=False)
    assert folder.teacher().ledger.is_file()


def test_layers_that_wait_on_disk_leave_a_folder_that_a_run_takes(tmp_path: Path, student: Path, other: Path) -> None:
    teacher = {"spec": f"hf:{other}", "weights": {"offload": "disk"}}
    run_preflight(config(tmp_path, student, method=LOGPROB, teacher=teacher), SMALL)
    folder = RunFolder(tmp_path / "runs" / "run")
    assert (folder.path / "offload").is_dir()
    RunFolder.create(folder.path, resume=False, overwrite=False)


def test_the_budget_of_the_run_stops_the_check(tmp_path: Path, student: Path, other: Path) -> None:
    run = config(tmp_path, student, method=CHUNKED, teacher={"spec": f"hf:{other}", "budget_calls": 1})
    with pytest.raises(TeacherBudgetError):
        run_preflight(run, SMALL)


def test_no_text_asks_nobody(tmp_path: Path, student: Path) -> None:
    run = config(tmp_path, student, method=CHUNKED, teacher={"spec": "openai:gpt-4o"})
    report = run_preflight(run, PreflightSettings(num_prompts=2, num_rollouts=1, asks_for_text=False))
    (check,) = report.teachers
    assert (check.prefix, check.text, check.usage, check.verdicts) == (None, None, None, ())
    assert any("--no-text" in reason for reason in check.left_out)
    told = describe_preflight(report)
    assert "next: run it without --no-text" in told and "thresholds" not in told
    assert not (tmp_path / "runs").exists()


def test_each_of_several_teachers_sees_its_own_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: Path
) -> None:
    teacher = scripted(monkeypatch, always(";#3"))
    routes = {
        "white": {"supervision": LOGPROB["supervision"], "domains": ["even"]},
        "black": {"supervision": CHUNKED["supervision"], "domains": ["odd"]},
    }
    run = config(
        tmp_path,
        student,
        method={"supervision": {"type": "routed", "by": "domain", "routes": routes}},
        teachers={"white": {"spec": f"hf:{student}"}, "black": {"spec": "echo:x"}},
    )
    report = run_preflight(run, PreflightSettings(num_prompts=8, num_rollouts=2))
    white, black = report.teachers
    assert (white.name, white.num_rollouts, black.name, black.num_rollouts) == ("white", 8, "black", 8)
    assert white.logits is not None and white.verdicts[0].finding is Finding.NOTHING_NEW
    assert black.prefix is not None and black.verdicts[0].finding is Finding.CAN_TEACH
    assert {r.messages[0].content[2] for r in teacher.asked} == {"1", "3", "5", "7"}
    # Messages are what a text teacher gets, and no other one.
    assert [any("(messages)" in line for line in of.reads) for of in report.teachers] == [False, True]


def test_the_held_out_problems_name_the_verifier_and_are_not_read(tmp_path: Path, student: Path) -> None:
    run = config(tmp_path, student, method=LOGPROB, teacher={"spec": f"hf:{student}"})
    away = run.data.model_copy(update={"eval": str(tmp_path / "away.jsonl"), "verifier": "exact"})
    report = run_preflight(run.model_copy(update={"data": away}), SMALL)
    assert report.num_prompts == 6 and report.accuracy is not None


def test_a_method_without_a_teacher_has_nothing_to_check(tmp_path: Path, student: Path) -> None:
    report = run_preflight(config(tmp_path, student, method={"supervision": {"type": "verifier"}}), SMALL)
    assert report.teachers == ()
    assert describe_preflight(report) == "run: nothing to check, because the method has no teacher"


def test_the_command_prints_and_writes_all_numbers(
    tmp_path: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps({"prompt": "Q:1+2?", "answer": "3"}) + "\n")
    words = ["preflight", "--student", str(student), "--teacher", f"hf:{student}", "--data", str(data)]
    words += [f"output={tmp_path}", "method.supervision.type=logprob", "rollout.max_tokens=6", "student.device=cpu"]
    out = tmp_path / "found.json"
    assert main([*words, "--prompts", "4", "--rollouts", "2", "--json", str(out)]) == 0
    assert "verdict: nothing new to teach" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["num_prompts"] == 1 and found["num_rollouts"] == 2
    assert found["teachers"][0]["logits"]["numbers"][OVERLAP]["mean"]["value"] == 1.0
    assert main([*words, "--prompts", "0"]) == 2
    assert "prompts is 0" in capsys.readouterr().err


def test_cuts_lie_at_quarters_of_a_typical_rollout_in_two_binary_digits() -> None:
    # 21 characters: quarters at 5, 10 and 15 tokens; in binary 101, 1010, 1111, cut to 100, 1000, 1100.
    assert cut_positions([tiny.rollout("1" * 21)]) == (0, 4, 8, 12)
    assert cut_positions([tiny.rollout("1" * 3)]) == (0, 1, 2)
    assert cut_positions([tiny.rollout("")]) == (0,)


def test_means_are_over_prompts_without_masked_and_unknown_tokens() -> None:
    one, two = tiny.prompt("p0"), tiny.prompt("p1")
    rollouts = [
        tiny.rollout("12", name="p0/0", of=one, ended=False, is_correct=True),
        tiny.rollout("34", name="p1/0", of=two, ended=False, is_correct=False),
        tiny.rollout("56", name="p1/1", of=two, ended=False, is_correct=False),
    ]
    nan = float("nan")
    found = [{"log_ratio": [-1.0, -3.0]}, {"log_ratio": [-5.0, nan]}, {"log_ratio": [-9.0, -7.0]}]
    masked = frozenset(tiny.encode("5"))
    report = summarize_match(rollouts, found, teacher_id="t", top_k=1, vocabulary=23, masked_ids=masked)
    # Rollout means -2, -5 and -7 (the 5 is masked, the nan unknown); prompt means -2 and -6; their mean -4.
    assert report.numbers[LOG_RATIO].mean.value == -4.0
    # Wrong rollouts hold the values -5 and -7.
    assert report.numbers[LOG_RATIO].by_verdict == {"correct": -2.0, "wrong": -6.0, "unverified": None}
    with pytest.raises(DataError, match="3 rollouts with the diagnostics of 2"):
        summarize_match(rollouts, found[:2], teacher_id="t", top_k=1, vocabulary=23)


def mean(value: float, low: float, high: float, prompts: int = 64) -> PromptMean:
    return PromptMean(value=value, low=low, high=high, num_prompts=prompts, num_rollouts=prompts)


def logits(
    overlap: PromptMean | None, ratio: PromptMean | None, tenths: tuple[float | None, ...] = (0.7,) * 10
) -> LogitMatchReport:
    given: Mapping[str, PromptMean | None] = {OVERLAP: overlap, LOG_RATIO: ratio}
    return LogitMatchReport(
        teacher_id="hf:t",
        top_k=16,
        vocabulary=1000,
        num_rollouts=64,
        num_tokens=640,
        numbers={n: LogitMatch(mean=m, tenths=tenths, by_verdict={}) for n, m in given.items() if m is not None},
    )


RATIO_SEEN = mean(-0.4, -0.5, -0.3)


@pytest.mark.parametrize(
    ("overlap", "ratio", "finding"),
    [
        (mean(0.99, 0.985, 0.995), mean(0.001, -0.002, 0.004), Finding.NOTHING_NEW),
        # Near in overlap, not in what is drawn, whichever way.
        (mean(0.99, 0.985, 0.995), RATIO_SEEN, Finding.CAN_TEACH),
        (mean(0.99, 0.985, 0.995), mean(0.4, 0.3, 0.5), Finding.CAN_TEACH),
        (mean(0.72, 0.70, 0.74), RATIO_SEEN, Finding.CAN_TEACH),
        (mean(0.40, 0.35, 0.45), RATIO_SEEN, Finding.TOO_FAR),
        # The interval straddles the limit, or too few prompts.
        (mean(0.50, 0.45, 0.55), RATIO_SEEN, Finding.UNCLEAR),
        (mean(0.72, 0.70, 0.74, prompts=5), RATIO_SEEN, Finding.UNCLEAR),
        (None, RATIO_SEEN, Finding.UNCLEAR),
        (None, mean(0.001, -0.002, 0.004), Finding.NOTHING_NEW),
        (None, None, Finding.UNCLEAR),
    ],
)
def test_overlap_and_log_ratio_decide(overlap: PromptMean | None, ratio: PromptMean | None, finding: Finding) -> None:
    assert judge_logits(logits(overlap, ratio)).finding is finding


@pytest.mark.parametrize(
    ("had", "step"),
    [(mean(0.72, 0.70, 0.74, prompts=5), "--prompts 20 or more"), (mean(0.5, 0.45, 0.55), "--prompts more than 64")],
)
def test_an_open_verdict_names_its_limit_and_how_many_prompts(had: PromptMean, step: str) -> None:
    verdict = judge_logits(logits(had, RATIO_SEEN))
    assert "(overlap limit 0.5, at least 20 prompts)" in verdict.says
    assert verdict.next_steps == (f"more prompts: {step}",)


def test_a_falling_tail_asks_for_shorter_completions() -> None:
    overlap = mean(0.72, 0.70, 0.74)
    falling = judge_logits(logits(overlap, RATIO_SEEN, (0.8,) * 8 + (0.6, 0.6)))
    assert any("0.80 in the first half to 0.60" in step for step in falling.next_steps)
    steady = judge_logits(logits(overlap, RATIO_SEEN, (0.8,) * 8 + (0.7, 0.7)))
    assert not any("shorter" in step for step in steady.next_steps)
    short = judge_logits(logits(overlap, RATIO_SEEN, (0.8, *(None,) * 9)))
    assert short.next_steps == ("train",)


def point(label: str, low: float, high: float, *, student: float = 0.4, prompts: int = 64) -> PrefixPoint:
    middle = (low + high) / 2
    return PrefixPoint(
        label=label,
        teacher=None,
        student=mean(student, student, student, prompts),
        advantage=mean(middle, low, high, prompts),
        recovery=None,
        spoiling=None,
        advantage_if_finished=None,
        num_answers=prompts,
        num_truncated=0,
        num_truncated_wrong=0,
        num_asked_to=0,
    )


def prefix(*points: PrefixPoint) -> PrefixReport:
    return PrefixReport(
        teacher_id="t",
        settings=PrefixProbeSettings(),
        points=points,
        outcomes=(),
        num_rollouts=64,
        num_skipped=0,
        num_truncated_rollouts=0,
        usage=Usage(),
    )


def text(overlap: PromptMean | None, own: PromptMean | None) -> TextMatchReport:
    return TextMatchReport(
        teacher_id="t",
        similarity="edit",
        settings=TextMatchSettings(),
        text_overlap=overlap,
        self_overlap=own,
        comparisons=(),
        num_spans=1,
        missing={},
        num_unanswered=0,
        usage=Usage(),
    )


OWN = mean(0.8, 0.7, 0.9)
FAR = text(mean(0.2, 0.1, 0.3), OWN)
ALIKE = text(mean(0.8, 0.79, 0.85), OWN)
SOME = text(mean(0.6, 0.5, 0.7), OWN)
AHEAD, EVEN, OPEN = (0.1, 0.3), (-0.02, 0.02), (-0.1, 0.2)


@pytest.mark.parametrize(
    ("found", "match", "finding", "step"),
    [
        (prefix(point("0t", *AHEAD), point("8t", *AHEAD)), SOME, Finding.CAN_TEACH, "train"),
        (prefix(point("0t", *AHEAD), point("4t", *AHEAD), point("8t", *EVEN)), SOME, Finding.CAN_TEACH, "after 4t"),
        (prefix(point("0t", *AHEAD), point("8t", *AHEAD)), FAR, Finding.CAN_TEACH, "cold start"),
        # It knows the answer and cannot use what the student wrote.
        (prefix(point("0t", *AHEAD), point("8t", *EVEN)), SOME, Finding.TOO_FAR, "cold start"),
        (prefix(point("0t", *AHEAD), point("8t", *OPEN)), SOME, Finding.UNCLEAR, "more prompts"),
        (prefix(point("0t", *EVEN), point("8t", *EVEN)), SOME, Finding.CANNOT_TEACH, "another teacher"),
        (prefix(point("0t", *EVEN), point("8t", *EVEN)), ALIKE, Finding.NOTHING_NEW, "harder"),
        (prefix(point("0t", *EVEN, student=0.97)), SOME, Finding.NOTHING_NEW, "harder"),
        (prefix(point("0t", *OPEN)), SOME, Finding.UNCLEAR, "more prompts"),
        (prefix(point("0t", *AHEAD, prompts=5), point("8t", *AHEAD, prompts=5)), None, Finding.CAN_TEACH, "a hint"),
        (prefix(), SOME, Finding.UNCLEAR, "more prompts"),
        (None, FAR, Finding.TOO_FAR, "cold start"),
        (None, SOME, Finding.UNCLEAR, "answers"),
        (None, text(None, None), Finding.UNCLEAR, "teachers check"),
    ],
)
def test_endings_and_text_decide(
    found: PrefixReport | None, match: TextMatchReport | None, finding: Finding, step: str
) -> None:
    verdict = judge_text(found, match)
    assert verdict.finding is finding
    assert any(step in said for said in verdict.next_steps), verdict.next_steps


def test_settings_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="rollouts is 0"):
        PreflightSettings(num_rollouts=0)
