"""`hf:MODEL`: the samples of `omniopd serve` without a server, ordered and settled a batch at a time."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app_server import serving
from omniopd.errors import ConfigError, RolloutError, TeacherBudgetError, TeacherCapabilityError
from omniopd.generation import Sampler, SampleRequest, load_sampler
from omniopd.serving.app import build_app
from omniopd.teachers.base import Bound, ContinuationRequest, Reply, TeacherAnswer
from omniopd.teachers.in_process import HFTeacher, _LazySampler
from omniopd.teachers.resolve import open_teacher
from omniopd.types import Message, Missing, Usage


def open_hf(folder: Path, **settings: Any) -> HFTeacher:
    return HFTeacher("hf:teacher", str(folder), **{"device": "cpu", **settings})


def request(question: str = "48+37-19", prefix: str = "", **settings: Any) -> ContinuationRequest:
    fields = {"n": 2, "max_tokens": 24, "seed": 1, **settings}
    return ContinuationRequest(messages=(Message(role="user", content=question),), prefix=prefix, **fields)


def ask(teacher: Any, requests: Sequence[ContinuationRequest], **settings: Any) -> list[TeacherAnswer]:
    async def run() -> list[TeacherAnswer]:
        try:
            return await teacher.continuations(requests, **settings)
        finally:
            await teacher.aclose()

    return asyncio.run(run())


def texts(answers: Sequence[TeacherAnswer]) -> list[list[str | None]]:
    return [[c.text for c in answer.continuations] for answer in answers]


class Receipt:
    """An order, and how it was settled."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.settled: list[tuple[list[Reply], Usage]] = []

    async def settle(self, replies: Sequence[Reply], usage: Usage, seconds: float) -> None:
        self.settled.append((list(replies), usage))


class Counter:
    """A till that keeps its receipts, and covers only the first `limit` orders."""

    def __init__(self, limit: int = 1000) -> None:
        self.receipts: list[Receipt] = []
        self._limit = limit

    async def order(self, bound: Bound) -> Receipt:
        if len(self.receipts) == self._limit:
            raise TeacherBudgetError("the budget is spent")
        self.receipts.append(Receipt(bound))
        return self.receipts[-1]


@pytest.mark.parametrize("sampling", [{"temperature": 4.0}, {"temperature": 4.0, "top_p": 0.9}])
def test_the_texts_are_those_of_a_server(sampler: Sampler, teacher_folder: Path, sampling: dict[str, float]) -> None:
    requests = [request(f"{10 + i}+37-19", ("", f"{10 + i}+37=")[i % 2], seed=i, n=3) for i in range(5)]
    ours = ask(open_hf(teacher_folder, **sampling), requests)
    app = build_app(sampler, sampler.tokenizer, "teacher", max_context_tokens=256)
    with serving(app) as url:
        theirs = ask(open_teacher(f"local:teacher@{url}", tokenizer_path=teacher_folder, **sampling), requests)
    assert texts(ours) == texts(theirs)
    assert [[c.finish_reason for c in a.continuations] for a in ours] == [
        [c.finish_reason for c in a.continuations] for a in theirs
    ]
    assert len({text for answer in texts(ours) for text in answer}) > 10
    assert all(c.is_exact for answer in ours for c in answer.continuations)


def test_a_sample_depends_on_the_seed_and_its_number_alone(teacher_folder: Path) -> None:
    many = [request(seed=i, n=6) for i in range(4)]
    few = [request(seed=i, n=2) for i in (2, 0)]
    all_texts = texts(ask(open_hf(teacher_folder, temperature=4.0), many))
    assert texts(ask(open_hf(teacher_folder, temperature=4.0, batch_size=1), few)) == [
        all_texts[2][:2],
        all_texts[0][:2],
    ]


def test_requests_without_a_seed_are_repeatable_and_differ_by_their_text(teacher_folder: Path) -> None:
    requests = [request(question, seed=None, n=4) for question in ("1+2", "1+3", "1+2")]
    first = texts(ask(open_hf(teacher_folder, temperature=4.0), requests))
    assert first == texts(ask(open_hf(teacher_folder, temperature=4.0), requests))
    assert first[0] == first[2] != first[1]


def test_token_ids_are_read_as_they_are(sampler: Sampler, teacher_folder: Path) -> None:
    ids = tuple(sampler.tokenizer("Q:48+37-19?48+3").input_ids)
    # The text speaks of another sum: it must not matter.
    asked = request("1+1", "2", token_ids=ids, n=4)
    teacher = open_hf(teacher_folder, continuation="tokens", temperature=2.0)
    assert teacher.reads_token_ids and not open_hf(teacher_folder).reads_token_ids
    (expected,) = sampler.sample([SampleRequest(token_ids=ids, num_samples=4, max_tokens=24, temperature=2.0, seed=1)])
    assert texts(ask(teacher, [asked])) == [[s.text for s in expected]]
    # A prefix of spaces is read with them, so the spaces that follow are all the teacher's own.
    spaces = tuple(sampler.tokenizer("Q:1+2?   ").input_ids)
    wide = request("1+2", "   ", token_ids=spaces, n=64, max_tokens=1)
    hot = open_hf(teacher_folder, continuation="tokens", temperature=100.0)
    assert {" ", "\n"} <= {text for (answer,) in [texts(ask(hot, [wide]))] for text in answer}
    with pytest.raises(TeacherCapabilityError, match="the request has none"):
        ask(teacher, [request()])
    with pytest.raises(TeacherCapabilityError, match=r"token id 5000 and has 0\.\.33"):
        ask(teacher, [request(token_ids=(3, 5000))])


def test_a_batch_is_ordered_written_and_settled(teacher_folder: Path) -> None:
    till = Counter()
    # 2 + 2 sequences fill a batch of 5, the third request has one of its own; so has the 7 of the longest.
    requests = [request("1+2", n=2), request("3+4", n=2), request("5+6", n=2), request("7+8", n=7, max_tokens=30)]
    answers = ask(open_hf(teacher_folder, temperature=3.0, batch_size=5), requests, till=till)
    assert [sorted({r.position for r in receipt.settled[0][0]}) for receipt in till.receipts] == [[0, 1], [2], [3]]
    assert all(len(receipt.settled) == 1 for receipt in till.receipts)
    # "Q:1+2?" are 6 tokens. Batches: 2*6 + 4*24 = 108, 6 + 2*24 = 54, 6 + 7*30 = 216.
    assert [r.bound for r in till.receipts] == [Bound(tokens=t, usd=0.0) for t in (108, 54, 216)]
    for receipt in till.receipts:
        (replies, usage) = receipt.settled[0]
        assert usage.requests == 1 and usage.cost_usd == 0.0
        assert usage.input_tokens + usage.output_tokens <= receipt.bound.tokens
        for reply in replies:
            assert answers[reply.position].continuations[reply.sample] is reply.continuation
    billed = sum((receipt.settled[0][1] for receipt in till.receipts), Usage())
    assert sum((answer.usage for answer in answers), Usage()) == billed
    assert billed.input_tokens == 24
    # One token a character; a stop costs one more.
    stops = [c.finish_reason == "stop" for answer in answers for c in answer.continuations]
    written = [len(c.text or "") for answer in answers for c in answer.continuations]
    assert billed.output_tokens >= sum(written) + sum(stops)


def test_a_prompt_too_long_fails_alone(teacher_folder: Path) -> None:
    till = Counter()
    requests = [request(), request(prefix="1+1=2;" * 40), request(max_tokens=250)]
    answers = ask(open_hf(teacher_folder, temperature=0.0), requests, till=till)
    assert texts(answers)[0] == ["48+37=85;85-19=66;#66"[:24]] * 2
    for answer, words in zip(
        answers[1:], ("251 tokens plus max_tokens=24", "11 tokens plus max_tokens=250"), strict=True
    ):
        assert [c.missing for c in answer.continuations] == [Missing.FAILED] * 2
        assert f"a prompt of {words} exceeds the context of 256 tokens" in answer.continuations[0].detail
        assert answer.usage == Usage(cost_usd=0.0)
    assert len(till.receipts) == 1


def test_nothing_is_written_that_the_budget_does_not_cover(teacher_folder: Path) -> None:
    till = Counter(limit=1)
    with pytest.raises(TeacherBudgetError):
        ask(open_hf(teacher_folder, batch_size=2), [request(), request("1+2")], till=till)
    assert [len(replies) for receipt in till.receipts for replies, _ in receipt.settled] == [2]


def test_the_event_loop_stays_free_and_a_cancelled_order_is_settled(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, till, started = threading.Event(), Counter(), threading.Event()

    def wait(self: _LazySampler, requests: Any, *, batch_size: int = 512) -> Any:
        started.set()
        assert gate.wait(10), "the event loop was held up"
        raise RolloutError("too late")

    monkeypatch.setattr(_LazySampler, "sample", wait)

    async def run() -> None:
        teacher = open_hf(teacher_folder)
        task = asyncio.create_task(teacher.continuations([request()], till=till))
        while not started.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await teacher.aclose()

    asyncio.run(run())
    ((settled,),) = [receipt.settled for receipt in till.receipts]
    assert settled == ([], Usage(requests=1, cost_usd=0.0))


def test_broken_weights_stop_the_run_and_settle_the_order(teacher_folder: Path, tmp_path: Path) -> None:
    folder = copy_with(teacher_folder, tmp_path / "nan", lambda t: t.fill_(float("nan")))
    till = Counter()
    with pytest.raises(RolloutError, match="NaN"):
        ask(open_hf(folder), [request()], till=till)
    assert [receipt.settled for receipt in till.receipts] == [[([], Usage(requests=1, cost_usd=0.0))]]


def test_weights_come_late_and_go_with_a_close(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    torch.set_num_threads(2)
    # Each thread takes the process-wide figure when it first asks; this one asks now.
    assert torch.get_num_threads() == 2

    def load(folder: str, **settings: Any) -> Sampler:
        loads.append(folder)
        assert torch.get_num_threads() == 1
        return load_sampler(folder, **settings)

    monkeypatch.setattr("omniopd.generation.load_sampler", load)

    async def run() -> list[list[str | None]]:
        teacher = open_hf(teacher_folder, temperature=0.0, threads=1)
        assert teacher.fingerprint["teacher"] == teacher.id == "hf:teacher"
        assert loads == []
        answers = []
        for _ in range(2):
            answers += await teacher.continuations([request(n=1)])
            answers += await teacher.continuations([request(n=1)])
            await teacher.aclose()
            await teacher.aclose()
        return texts(answers)

    assert asyncio.run(run()) == [["48+37=85;85-19=66;#66"]] * 4
    assert len(loads) == 2
    # The student of this process keeps its own.
    assert torch.get_num_threads() == 2


def copy_with(source: Path, folder: Path, change: Any, *, name: str = "model.norm.weight") -> Path:
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_fingerprint_knows_weights_template_and_sampling(teacher_folder: Path, tmp_path: Path) -> None:
    same = copy_with(teacher_folder, tmp_path / "same", lambda t: None)
    os.utime(same / "model.safetensors", (0, 0))
    trained = copy_with(teacher_folder, tmp_path / "trained", lambda t: t.add_(1e-3))
    other = copy_with(teacher_folder, tmp_path / "other", lambda t: None)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ending = copy_with(teacher_folder, tmp_path / "ending", lambda t: None)
    config = json.loads((ending / "generation_config.json").read_text())
    (ending / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, 5]}))
    pickled = copy_with(teacher_folder, tmp_path / "pickled", lambda t: None)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")

    def mark(folder: Path, **settings: Any) -> dict[str, Any]:
        marks = open_hf(folder, **settings).fingerprint
        assert json.loads(json.dumps(marks)) == marks
        return {name: value for name, value in marks.items() if name != "model"}

    plain = mark(same)
    assert mark(teacher_folder) == plain
    changed = [mark(folder) for folder in (trained, other, ending, pickled)]
    changed += [mark(same, temperature=0.5), mark(same, top_p=0.5), mark(same, continuation="tokens")]
    assert all(marks != plain for marks in changed)
    assert {"weights"} == {name for name in plain if changed[0][name] != plain[name]}
    assert {"template"} == {name for name in plain if changed[1][name] != plain[name]}


HUB = """
from omniopd.teachers.in_process import HFTeacher
print(HFTeacher("hf:org/teacher", "org/teacher").fingerprint["weights"])
"""


def test_a_model_of_the_hub_is_known_by_its_commit(teacher_folder: Path, tmp_path: Path) -> None:
    commit, cached = "0123456789" * 4, tmp_path / "models--org--teacher"
    shutil.copytree(teacher_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    # The library reads where its cache is when it is imported.
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert told.stdout.strip() == commit


def test_what_cannot_be_used_is_said(teacher_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model folder"):
        open_hf(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="takes completions or tokens"):
        open_hf(teacher_folder, continuation="chat")
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        open_hf(teacher_folder, batch_size=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot load the teacher"):
        ask(open_hf(tmp_path / "empty"), [request()])
    bare = copy_with(teacher_folder, tmp_path / "bare", lambda t: None)
    (bare / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load the model"):
        ask(open_hf(bare), [request()])
