"""Whole runs with open-weight teachers: other tokenizers and chat formats, servers, folders, several at once.

Where a number is compared, it is computed anew from the recorded rollouts and the plain models of transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import scoring_server
from byte_level import save_writer
from loopback import Received, Scripted
from omniopd.cli import main
from omniopd.dry_run import dry_run, estimate
from omniopd.errors import ConfigError
from omniopd.logits.foreign import MatchedVocabulary, hybrid_loss
from omniopd.models import load_tokenizer
from omniopd.overrides import load_config
from omniopd.precompute import StoredKind, precompute
from omniopd.records import is_reproducible, read_metrics, read_signals
from omniopd.report.build import build_report
from omniopd.run import run_training
from omniopd.supervision.routed import RoutedSupervision
from omniopd.teachers.ledger import Ledger
from omniopd.types import Author, Rollout, StepContext, TokenSignal
from omniopd.worlds.mini_math import make_problems, model_path, solution
from scoring_server import ScoringServer

SMALL = (
    "steps=1",
    "threads=1",
    "trackers=[]",
    "data={train: mini-math, eval: null}",
    "rollout={prompts_per_step: 4, group_size: 2, max_tokens: 24}",
)
VOCABULARY = 34
END = 1
FOREIGN = ("method.supervision.alignment=groups",)


def run(output: Path, name: str, *words: str, resume: bool = False) -> Path:
    file = "opd-sampled-token" if "method.supervision.objective=sampled" in words else "opd-reverse-kl"
    return run_training(load_config([file], [*SMALL, f"name={name}", f"output={output}", *words]), resume=resume)


def losses(folder: Path) -> list[float]:
    return [row["optim/loss"] for row in read_metrics(folder / "metrics.jsonl")]


def recorded(folder: Path, step: int = 1) -> list[TokenSignal]:
    return read_signals(folder / "rollouts" / f"step-{step:06d}.jsonl")


def logprobs(model: PreTrainedModel, prompt_ids: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return log-softmax [T, V] in float64, one completion at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0].double()
    return logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path("student"), dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path("teacher"), dtype=torch.float32)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with worked responses."""
    rows = [
        {"messages": [{"role": "user", "content": p.expression}, {"role": "assistant", "content": solution(p)}]}
        for p in make_problems(12, seed=3)
    ]
    file = tmp_path_factory.mktemp("data") / "worked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# Fixed answers, written down once.


@pytest.fixture(scope="module")
def fixed(worked: Path) -> tuple[str, ...]:
    return (
        f"data={{train: {worked}, eval: null}}",
        "steps=3",
        "method.supervision.authors={dataset: 1}",
        "learner.micro_batch_size=2",
    )


@pytest.fixture(scope="module")
def asked_live(fixed: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("live"), "live", *fixed)


@pytest.mark.parametrize("kind", [StoredKind(states=True, dtype="float32"), StoredKind()], ids=["states", "scores"])
def test_a_run_from_a_folder_has_the_losses_of_the_run_that_asks(
    tmp_path: Path, fixed: tuple[str, ...], asked_live: Path, kind: StoredKind
) -> None:
    done = precompute(load_config(["opd-reverse-kl"], [*SMALL, *fixed]), tmp_path / "kept", kind, say=lambda _: None)
    assert (done.counts.written, dict(done.counts.missing)) == (12, {})
    stored = run(tmp_path, "stored", *fixed, *done.settings)
    assert losses(stored) == pytest.approx(losses(asked_live), rel=1e-6)
    assert {s.rollout.author for s in recorded(stored)} == {Author.DATASET}


def test_a_top_k_folder_serves_the_top_k_loss(tmp_path: Path, fixed: tuple[str, ...]) -> None:
    words = (*fixed, "learner.losses.kl={type: teacher_topk_reverse_kl, k: 4, renormalize: true}")
    done = precompute(load_config(["opd-reverse-kl"], [*SMALL, *words]), tmp_path / "kept", StoredKind(), say=str)
    assert json.loads((tmp_path / "kept" / "manifest.json").read_text())["top_k"] == 4
    assert done.settings == (f"teacher.spec=scores:{tmp_path / 'kept'}",)
    live, stored = run(tmp_path, "live", *words), run(tmp_path, "stored", *words, *done.settings)
    assert losses(stored) == pytest.approx(losses(live), rel=1e-6)


# Another tokenizer.


@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with the 256 bytes and 3 special tokens: one of its tokens for each of the student's."""
    texts = [(p.expression, solution(p)) for p in make_problems(8, seed=1)]
    return save_writer(tmp_path_factory.mktemp("bytes"), texts, vocabulary=259, hidden=32, seed=0, steps=60)


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokens are up to several characters long."""
    texts = [(p.expression, solution(p)) for p in make_problems(40, seed=1)]
    return save_writer(tmp_path_factory.mktemp("merging"), texts, vocabulary=300, hidden=32, seed=1, steps=20)


def their_reading(folder: Path, of: Rollout, *, end: int = END) -> tuple[list[int], list[int]]:
    """Return question and answer in a byte-level teacher's own tokens."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": m.role, "content": m.content} for m in of.prompt.messages]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(of.text, add_special_tokens=False)["input_ids"]
    ended = [tokenizer.convert_tokens_to_ids("<|im_end|>")] if of.token_ids[-1] == end else []
    return tokenizer(asked, add_special_tokens=False)["input_ids"], [*ids, *ended]


def test_sampled_tokens_of_another_tokenizer_share_the_log_ratio_of_their_group(
    tmp_path: Path, student: PreTrainedModel, merging: Path
) -> None:
    done = run(tmp_path, "run", *FOREIGN, f"teacher.spec=hf:{merging}", "method.supervision.objective=sampled")
    theirs = AutoModelForCausalLM.from_pretrained(merging, dtype=torch.float32)
    fewer = 0
    for signal in recorded(done):
        of = signal.rollout
        asked, ids = their_reading(merging, of)
        fewer += len(of.token_ids) - len(ids)
        teacher_sum = logprobs(theirs, asked, ids).gather(-1, torch.tensor(ids)[:, None]).sum()
        own = logprobs(student, of.prompt.token_ids, of.token_ids)
        student_sum = own.gather(-1, torch.tensor(of.token_ids)[:, None]).sum()
        # Groups cut the whole answer into pieces, so their log-ratios add up to that of the answer.
        assert signal.advantages is not None and signal.pg_weights == (1.0,) * of.num_tokens
        assert sum(signal.advantages) == pytest.approx(float(teacher_sum - student_sum), rel=1e-4)
    assert fewer > 0  # Else nothing was merged and nothing tested.


def test_uld_is_that_of_the_plain_models(tmp_path: Path, student: PreTrainedModel, bytes_only: Path) -> None:
    done = run(tmp_path, "run", *FOREIGN, f"teacher.spec=hf:{bytes_only}", "learner.losses.kl={type: uld}")
    theirs = AutoModelForCausalLM.from_pretrained(bytes_only, dtype=torch.float32)
    total, signals = 0.0, recorded(done)
    for signal in signals:
        of = signal.rollout
        asked, ids = their_reading(bytes_only, of)
        assert len(ids) == of.num_tokens
        own = logprobs(student, of.prompt.token_ids, of.token_ids).exp()
        padded = torch.nn.functional.pad(own, (0, 259 - VOCABULARY)).sort(descending=True).values
        total += float((padded - logprobs(theirs, asked, ids).exp().sort(descending=True).values).abs().sum())
    assert losses(done)[0] == pytest.approx(total / len(signals), rel=1e-4)
    before, after = load_file(model_path("student") / "model.safetensors"), load_file(done / "final/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_hybrid_compares_the_tokens_that_both_hold(tmp_path: Path, bytes_only: Path, merging: Path) -> None:
    # A second end, which the student does not write: the teacher's end stands against the one that it does.
    both_ends = Path(shutil.copytree(bytes_only, tmp_path / "student"))
    (both_ends / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    words = (f"student.model={both_ends}", f"teacher.spec=hf:{merging}", "learner.losses.kl={type: hybrid}")
    done = run(tmp_path, "run", *FOREIGN, *words)
    mine, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (bytes_only, merging))
    ours, other = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (bytes_only, merging))
    end = ours["<|im_end|>"]
    assert (ours["<|endoftext|>"], end) == (0, 2)
    both = sorted(token for token in ours if token in other and token not in ("<|endoftext|>", "<|im_start|>"))
    assert len(both) == 257  # All bytes, and the end.
    matched = MatchedVocabulary(student_ids=tuple(ours[t] for t in both), teacher_ids=tuple(other[t] for t in both))
    spelled = {i: token for token, i in other.items()}
    total, merged, signals = 0.0, 0, recorded(done)
    for signal in signals:
        of = signal.rollout
        asked, ids = their_reading(merging, of, end=end)
        own, teachers = logprobs(mine, of.prompt.token_ids, of.token_ids), logprobs(theirs, asked, ids)
        groups, start = [], 0
        for token_id in ids:
            # One of the teacher's tokens is as many of the student's as it has bytes.
            stop = start + (1 if token_id == other["<|im_end|>"] else len(spelled[token_id]))
            later = sum(own[t, of.token_ids[t]] for t in range(start + 1, stop))
            groups.append(own[start] + later)
            merged, start = merged + (stop - start > 1), stop
        assert start == of.num_tokens
        total += float(hybrid_loss(torch.stack(groups), teachers, matched, beta=0.5).sum())
    assert merged > 0
    assert losses(done)[0] == pytest.approx(total / len(signals), rel=1e-4)


def test_another_vocabulary_is_refused_where_tokens_would_be_compared(tmp_path: Path, merging: Path) -> None:
    with pytest.raises(ConfigError, match=r"another id or none in the vocabulary.*alignment: groups"):
        run(tmp_path, "run", f"teacher.spec=hf:{merging}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Chat formats, masks, and what stops a run.


def other_format(folder: Path, template: str, **tokens: str) -> Path:
    """Save the mini-math teacher with another chat template, or other special tokens."""
    AutoModelForCausalLM.from_pretrained(model_path("teacher"), dtype=torch.float32).save_pretrained(folder)
    tokenizer = load_tokenizer("mini-math:teacher")
    tokenizer.chat_template = template
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_teacher_reads_its_own_format_and_masked_tokens_teach_nothing(
    tmp_path: Path, student: PreTrainedModel, teacher: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = other_format(tmp_path / "teacher", "{% for m in messages %}Q: {{ m.content }}=?{% endfor %}")
    words = ("teacher.chat_format=teacher", "method.supervision.mask_tokens=['=']")
    done = run(tmp_path, "run", f"teacher.spec=hf:{folder}", *words)
    tokenizer = load_tokenizer(str(folder))
    total, masked, signals = 0.0, 0, recorded(done)
    for signal in signals:
        of = signal.rollout
        theirs = tokenizer(f"Q: {of.prompt.messages[0].content}=?")["input_ids"]
        each = reverse_kl(logprobs(student, of.prompt.token_ids, of.token_ids), logprobs(teacher, theirs, of.token_ids))
        is_kept = torch.tensor(of.token_ids) != tokenizer.convert_tokens_to_ids("=")
        masked += int((~is_kept).sum())
        total += float(each[is_kept].sum())
    assert masked > 0
    assert losses(done)[0] == pytest.approx(total / len(signals), rel=1e-4)
    said = capsys.readouterr().err
    assert "teacher: the student reads (" in said and "'Q:" in said
    assert "teacher: the teacher reads (" in said and "'Q: " in said and "=?'" in said


def test_a_teacher_that_would_judge_another_text_costs_nothing(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if not loop.last %}<unk>{% endif %}{% endfor %}"
    folder = other_format(tmp_path / "teacher", template, eos_token="<unk>")
    with ScoringServer() as server:
        spec = (f"teacher.spec=vllm:teacher@{server.base_url}", f"teacher.tokenizer={folder}")
        with pytest.raises(ConfigError, match=r"student ends with '<eos>', the teacher's turns end with '<unk>'"):
            run(tmp_path, "run", *spec, "teacher.chat_format=teacher")
        assert server.received == []
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    # What the message proposes is enough.
    words = ("teacher.chat_format=teacher", "method.supervision.mask_tokens=[<eos>]")
    done = run(tmp_path, "run", f"teacher.spec=hf:{folder}", *words)
    ends = [w for s in recorded(done) for w, i in zip(s.kl_weights or (), s.rollout.token_ids, strict=True) if i == END]
    assert ends and set(ends) == {0.0}


# A server.


OBJECTIVES: dict[str, tuple[str, ...]] = {
    "sampled": ("method.supervision.objective=sampled",),
    "teacher's top k": ("learner.losses.kl={type: teacher_topk_reverse_kl, k: 4, renormalize: true}",),
    "student's top k": ("learner.losses.kl={type: student_topk_reverse_kl, k: 4}",),
    "whole vocabulary": (),
}


@pytest.fixture
def serve(teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make servers that answer from the mini-math teacher's weights."""
    monkeypatch.setattr(scoring_server, "VOCABULARY", VOCABULARY)

    def table(ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        with torch.no_grad():
            rows: np.ndarray[Any, np.dtype[np.float64]] = (
                teacher(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1).numpy()
            )
        return rows

    return lambda **settings: ScoringServer(model=table, max_logprobs=-1, **settings)


def at(server: ScoringServer) -> tuple[str, ...]:
    spec = f"spec: 'vllm:teacher@{server.base_url}'"
    return (f"teacher={{{spec}, tokenizer: 'mini-math:teacher', scoring: {{max_logprobs: -1}}}}",)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_server_of_the_same_weights_gives_the_same_first_loss(tmp_path: Path, serve: Any, objective: str) -> None:
    here = run(tmp_path, "here", *OBJECTIVES[objective])
    with serve() as server:
        there = run(tmp_path, "there", *OBJECTIVES[objective], *at(server))
        lengths = {len(r.body["prompt"]) for r in server.received}
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    assert [s.rollout for s in recorded(there)] == [s.rollout for s in recorded(here)]
    assert max(lengths) >= max(len(s.rollout.prompt.token_ids) + s.rollout.num_tokens for s in recorded(there))


@pytest.mark.parametrize("objective", ["sampled", "teacher's top k"])
def test_answers_that_never_come_are_counted_and_left_out(tmp_path: Path, serve: Any, objective: str) -> None:
    def refuse(received: Received) -> Scripted | None:
        ids = received.body["prompt"]
        # A prompt alone, as the check asks before the run, has no end token; neither has an answer that was cut off.
        if ids[-1] != END or sum(ids) % 3:
            return None
        said = "This model's maximum context length is 8 tokens."
        return Scripted(status=400, body={"error": {"message": said, "type": "BadRequestError", "code": 400}})

    with serve(before=refuse) as server:
        done = run(tmp_path, "run", "steps=2", *OBJECTIVES[objective], *at(server))
    rows = read_metrics(done / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        signals = recorded(done, row["step"])
        lost = [s for s in signals if s.unscored is not None]
        expected = [
            s
            for s in signals
            if s.rollout.token_ids[-1] == END and not sum(s.rollout.prompt.token_ids + s.rollout.token_ids) % 3
        ]
        assert lost == expected and row.get("teacher/unscored/failed", 0) == len(lost) < len(signals)
        for signal in signals:
            weights = signal.pg_weights if objective == "sampled" else signal.kl_weights
            assert weights is not None and any(weights) == (signal.unscored is None)
    assert rows[0]["teacher/unscored/failed"] > 0


# Several teachers.


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of which every third goes to the teacher that only writes."""
    rows = [
        {"prompt": p.expression, "answer": str(p.answer), "teacher_id": "black" if i % 3 == 0 else "white"}
        for i, p in enumerate(make_problems(12, seed=5))
    ]
    file = tmp_path_factory.mktemp("named") / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def several(named: Path, by: str) -> tuple[str, ...]:
    chunked = "{type: chunked, chunker: {type: uniform, chunk_tokens: 6, max_chunks: 2}, num_continuations: 2}"
    return (
        f"data={{train: {named}, eval: null}}",
        "teachers={white: {spec: 'hf:mini-math:teacher'}, black: {spec: 'hf:mini-math:teacher', probe: false}}",
        f"method.supervision={{type: routed, by: {by}, routes: {{white: {{supervision: {{type: logprob}}}}, "
        f"black: {{supervision: {chunked}}}}}}}",
        "save_every=2",
    )


def is_white(signal: TokenSignal) -> bool:
    return signal.kl_weights is not None and any(signal.kl_weights)


def test_two_teachers_in_one_run_by_name(tmp_path: Path, named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = several(named, "teacher_id")
    straight = run(tmp_path, "straight", *words, "steps=4")
    whites = 0
    for step in range(1, 5):
        for signal in recorded(straight, step):
            assert is_white(signal) == (signal.rollout.prompt.teacher_id == "white") == (not signal.audits)
            assert signal.kl_teacher == ("white" if is_white(signal) else None)
            whites += is_white(signal)
    assert 0 < whites < 32
    # Only the one that writes has a bill, and its ledger lies in its own folder.
    teachers = straight / "teachers"
    assert (teachers / "black" / "ledger.sqlite").is_file() and (teachers / "black" / "estimate.json").is_file()
    assert not (teachers / "white" / "ledger.sqlite").exists() and not (straight / "ledger.sqlite").exists()
    summary = json.loads((straight / "summary.json").read_text())
    spent = Ledger(teachers / "black" / "ledger.sqlite").spent()
    assert summary["teacher_requests"] == spent.requests > 0
    assert summary["teacher_tokens"] == spent.output_tokens > 0
    assert "white" in summary["method"] and "black" in summary["method"]
    report = build_report(straight).read_text()
    assert "white" in report and "black" in report

    # Stopped in its third step and resumed it is the same run.
    signals = RoutedSupervision.signals

    async def stop(self: RoutedSupervision, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        if ctx.step == 2:
            raise KeyboardInterrupt
        return await signals(self, rollouts, ctx)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RoutedSupervision, "signals", stop)
        run(tmp_path, "resumed", *words, "steps=4")
    assert len(read_metrics(tmp_path / "resumed" / "metrics.jsonl")) == 2
    resumed = run(tmp_path, "resumed", *words, "steps=4", resume=True)
    kept = [
        [{name: value for name, value in row.items() if is_reproducible(name)} for row in read_metrics(path)]
        for path in (straight / "metrics.jsonl", resumed / "metrics.jsonl")
    ]
    assert kept[0] == kept[1]
    one, other = (load_file(path / "final" / "model.safetensors") for path in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_teachers_in_one_run_by_weight(tmp_path: Path, named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(tmp_path, "run", *several(named, "weight"), "steps=2")
    signals = [*recorded(done, 1), *recorded(done, 2)]
    by_prompt = {}
    for place, signal in enumerate(signals):
        by_prompt.setdefault((place // 8, signal.rollout.prompt.id), set()).add(is_white(signal))
    # Only the one that is asked for text reads messages.
    told = capsys.readouterr().err
    assert told.count("The teacher reads") == 1 and "black: The teacher reads (messages):" in told
    # All rollouts of a prompt go to one teacher, and both are asked.
    assert all(len(whose) == 1 for whose in by_prompt.values())
    assert {white for whose in by_prompt.values() for white in whose} == {True, False}


def test_several_teachers_are_shown_and_reckoned_before_a_run(
    tmp_path: Path, named: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, *several(named, "teacher_id"), f"output={tmp_path}"]
    shown = dry_run(load_config(["opd-reverse-kl"], words))
    assert "each prompt goes to one of 2 teachers, by its teacher_id" in shown
    assert "white: Beside an open-weight teacher:" in shown and "both read the same text" in shown
    assert "black: The teacher reads" in shown
    reckoned = estimate(load_config(["opd-reverse-kl"], words))
    assert "white (hf:mini-math:teacher), if every prompt went to it:" in reckoned
    # 8 rollouts x 2 chunks, at most.
    assert "black (hf:mini-math:teacher), if every prompt went to it:" in reckoned and "16" in reckoned
    assert main(["train", "opd-reverse-kl", *words, "--dry-run"]) == 0
    assert shown in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_whose_layers_wait_on_disk_gives_the_same_losses(tmp_path: Path) -> None:
    here = run(tmp_path, "here", "steps=2")
    away = run(tmp_path, "away", "steps=2", "teacher.weights.offload=disk")
    assert losses(away) == pytest.approx(losses(here), rel=1e-6)
