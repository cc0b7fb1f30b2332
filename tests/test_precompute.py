"""`omniopd scores write`: what is asked, what is kept, what it refuses, and that it goes on where it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import scoring_server
import tiny
from omniopd.assembly import Student
from omniopd.behavior.dataset import DatasetBehavior
from omniopd.cli import main
from omniopd.config import TeacherConfig
from omniopd.errors import ConfigError, DataError
from omniopd.inputs import load_prompts, read_responses
from omniopd.learner.divergences import Evidence
from omniopd.learner.policy import Policy
from omniopd.logit_teachers import LARGEST_WHOLE, check_coverage, open_logit_teacher, wanted_of
from omniopd.logits.scores import Reading
from omniopd.logits.stored_scores import StoredScores
from omniopd.logits.stored_states import StoredStates
from omniopd.method import build_method
from omniopd.overrides import load_config
from omniopd.precompute import StoredKind, describe_precomputed, precompute
from omniopd.rollout.detokenize import Detokenizer
from scoring_server import ScoringServer

ANSWERS = {"1+2": "1+2=3;#3", "9-4": "9-4=5;#5", "7+7": "7+7=14;#14"}
UNKNOWN = "5+5"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and data of which one row has no worked response."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save(folder / "student")
    tiny.save(folder / "teacher", phase=1.0)
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
            "answer": answer.partition("#")[2],
        }
        for asked, answer in ANSWERS.items()
    ]
    rows.append({"prompt": UNKNOWN, "answer": "10"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words_of(world: Path, *words: str) -> list[str]:
    return [
        f"student.model={world / 'student'}",
        f"teacher.spec=hf:{world / 'teacher'}",
        f"data={{train: {world / 'data.jsonl'}, eval: null, verifier: none}}",
        "rollout={prompts_per_step: 2, group_size: 1, max_tokens: 24}",
        "method.supervision={type: logprob}",
        "threads=1",
        *words,
    ]


def write(world: Path, folder: Path, *words: str, said: list[str] | None = None, **kind: Any) -> Any:
    say = (lambda _: None) if said is None else said.append
    return precompute(load_config([], words_of(world, *words)), folder, StoredKind(**kind), say=say)


def reading(asked: str, answer: str, *, ended: bool = True) -> Reading:
    ids = tiny.encode(answer)
    return Reading(prompt_ids=tuple(tiny.encode(asked)), token_ids=(*ids, tiny.EOS) if ended else tuple(ids))


def expected(of: Reading) -> torch.Tensor:
    """Return the teacher's log-softmax [T, V] of a completion."""
    with torch.no_grad():
        ids = torch.tensor([of.prompt_ids + of.token_ids])
        logits = tiny.model(phase=1.0, dtype=torch.float32)(input_ids=ids).logits[0]
    return logits.log_softmax(-1)[len(of.prompt_ids) - 1 : -1]


def test_scores_are_those_of_the_answers_as_a_run_reads_them(world: Path, tmp_path: Path) -> None:
    done = write(world, tmp_path / "kept", top_k=4)
    assert (done.counts.written, done.counts.already_there, done.prompts_without_response) == (3, 0, 1)
    stored = StoredScores(tmp_path / "kept")
    readings = [reading(*pair) for pair in ANSWERS.items()]
    for of, scored in zip(readings, asyncio.run(stored.score(readings, top_k=4)), strict=True):
        assert scored.scores is not None and scored.scores.logprobs_TK is not None
        plain = expected(of)
        own = plain.gather(-1, torch.tensor(of.token_ids)[:, None])[:, 0]
        assert scored.scores.logprobs_T == pytest.approx(own.numpy(), abs=1e-5)
        best = plain.topk(4)
        assert scored.scores.logprobs_TK == pytest.approx(best.values.numpy(), abs=1e-5)
        assert np.array_equal(scored.scores.ids_TK, best.indices.numpy())
    assert done.size_bytes == sum(path.stat().st_size for path in (tmp_path / "kept").iterdir())


def test_answers_are_cut_where_a_run_cuts_them(world: Path, tmp_path: Path) -> None:
    write(world, tmp_path / "kept", "rollout.max_tokens=4", top_k=1)
    cut, whole = reading("1+2", "1+2=", ended=False), reading("1+2", "1+2=3;#3")
    found, absent = asyncio.run(StoredScores(tmp_path / "kept").score([cut, whole]))
    assert found.scores is not None and absent.scores is None


def test_states_and_head_make_the_teachers_distributions(world: Path, tmp_path: Path) -> None:
    write(world, tmp_path / "kept", states=True)
    stored = StoredStates(tmp_path / "kept")
    for pair in ANSWERS.items():
        of = reading(*pair)
        assert (stored.states(of) @ stored.head.weight_VH.T).log_softmax(-1) == pytest.approx(expected(of), abs=1e-5)
    rounded = write(world, tmp_path / "rounded", states=True, dtype="bfloat16")
    assert rounded.counts.written == 3
    states = load_file(tmp_path / "rounded" / "part-00000.safetensors")["states"]
    assert states.dtype == torch.bfloat16


def test_without_a_number_as_many_are_kept_as_the_loss_reads(world: Path, tmp_path: Path) -> None:
    def kept(name: str, loss: str) -> int:
        write(world, tmp_path / name, f"learner.losses.kl={loss}")
        top_k: int = StoredScores(tmp_path / name).manifest.top_k or 0
        return top_k

    assert kept("some", "{type: teacher_topk_reverse_kl, k: 5}") == 5
    assert kept("all", "{type: forward_kl}") == tiny.VOCABULARY
    with pytest.raises(ConfigError, match=r"reads student_top_k of the teacher.*give --top-k"):
        kept("none", "{type: student_topk_reverse_kl, k: 5}")
    # More than there are is all of them.
    write(world, tmp_path / "many", top_k=99)
    assert StoredScores(tmp_path / "many").manifest.top_k == tiny.VOCABULARY


def test_the_same_command_goes_on_where_it_was(world: Path, tmp_path: Path) -> None:
    counted: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        counted.append((done, total))
        raise KeyboardInterrupt

    config, kind = load_config([], words_of(world)), StoredKind(top_k=2, batch=2)
    with pytest.raises(KeyboardInterrupt):
        precompute(config, tmp_path / "kept", kind, say=str, progress=stop)
    done = precompute(config, tmp_path / "kept", kind, say=str, progress=lambda *at: counted.append(at))
    assert (done.counts.written, done.counts.already_there) == (1, 2)
    assert counted == [(2, 3), (3, 3)]
    again = precompute(config, tmp_path / "kept", kind, say=str)
    assert (again.counts.written, again.counts.already_there) == (0, 3)


def test_a_folder_never_holds_two_teachers(world: Path, tmp_path: Path) -> None:
    write(world, tmp_path / "kept", top_k=2)
    tiny.save(tmp_path / "other", phase=2.0)
    moved = tmp_path / "other"
    with pytest.raises(ConfigError, match=r"is written with teacher .*identity"):
        write(world, tmp_path / "kept", f"teacher.spec=hf:{moved}", top_k=2)
    # The same weights computed in another precision are other numbers.
    with pytest.raises(ConfigError, match=r"is written with identity '.* float32 none', asked for '.* bfloat16 none'"):
        write(world, tmp_path / "kept", "teacher.weights.dtype=bfloat16", top_k=2)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["teacher.spec=vllm:m@http://127.0.0.1:9/v1"], {"states": True}, "--states needs the teacher's weights"),
        (
            ["teacher.spec=scores:somewhere", "method.supervision.authors={dataset: 1}"],
            {},
            "is written already; give the teacher",
        ),
        (["method.supervision={type: chunked}", "teacher.spec=openai:gpt-4o"], {}, "gives text only and no log-probs"),
        (["method.supervision={type: verifier}"], {}, "method.supervision.type is verifier, which asks for no"),
        (
            ["method.supervision={type: logprob, alignment: groups, objective: sampled}"],
            {},
            "no loss on fixed answers reads stored scores of another vocabulary",
        ),
        (
            [
                "method.supervision={type: routed, by: weight, routes: {a: {supervision: {type: logprob}}}}",
                "teachers={a: {spec: 'hf:somewhere'}}",
            ],
            {},
            "one teacher is written at a time",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path, words: list[str], kind: dict[str, Any], said: str
) -> None:
    base = words_of(world, "student.model=/nowhere/at/all")
    trimmed = [word for word in base if not any(word.partition("=")[0] == w.partition("=")[0] for w in words)]
    if any("verifier}" in word for word in words):
        trimmed.append("data.verifier=exact")
    with pytest.raises(ConfigError, match=said):
        precompute(load_config([], [*trimmed, *words]), tmp_path / "kept", StoredKind(**kind), say=str)
    assert list(tmp_path.iterdir()) == []


def test_data_without_worked_responses_are_refused(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "bare.jsonl"
    file.write_text('{"prompt": "1+1"}\n')
    with pytest.raises(DataError, match="has a worked response, so there is nothing to ask about"):
        write(world, tmp_path / "kept", f"data.train={file}")
    assert not (tmp_path / "kept").exists()


def test_states_longer_than_the_teachers_context_are_refused(world: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path / "short", phase=1.0, context=8)
    spec = f"teacher.spec=hf:{tmp_path / 'short'}"
    with pytest.raises(ConfigError, match=r"have 14 tokens, but the context of .* has 8"):
        write(world, tmp_path / "states", spec, states=True)
    # Scores are kept one by one, so those that fit would be; here none does.
    done = write(world, tmp_path / "scores", spec, top_k=1)
    assert {str(why): count for why, count in done.counts.missing.items()} == {"failed": 3}
    told = describe_precomputed(done)
    assert "missing: 3 failed; the first says: prompt and completion have 12 tokens, the teacher's context 8" in told


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"states": True, "top_k": 3}, "--states and --top-k 3 exclude each other"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16 is for hidden states"),
        ({"top_k": 0}, "--top-k is 0; expected 1 or more"),
        ({"batch": -1}, "--batch is -1"),
    ],
)
def test_flags_that_mean_nothing_together(kind: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        StoredKind(**kind)


def test_settings_make_the_run_file_that_reads(world: Path, tmp_path: Path) -> None:
    mixed = "method.supervision={type: logprob, authors: {student: 0.5, dataset: 0.5}, verifier: {weight: 1.0}}"
    words = (mixed, "data.verifier=exact", "learner.losses.kl={type: reverse_kl}")
    done = write(world, tmp_path / "kept", *words, top_k=3)
    assert done.settings == (
        f"teacher.spec=scores:{tmp_path / 'kept'}",
        "method.supervision.authors={student: 0, dataset: 1}",
        "method.supervision.verifier=null",
        "learner.losses.kl={type: teacher_topk_reverse_kl, k: 3}",
    )
    reads = load_config([], [*words_of(world, *words), *done.settings])
    assert reads.teacher.spec == f"scores:{tmp_path / 'kept'}"
    sampled = write(world, tmp_path / "sampled", "method.supervision.objective=sampled", top_k=23)
    assert "method.supervision.objective=divergence" in sampled.settings
    load_config([], [*words_of(world, "method.supervision.objective=sampled"), *sampled.settings])
    own = write(world, tmp_path / "own", "teacher.chat_format=teacher", states=True)
    assert own.settings[:2] == (f"teacher.spec=states:{tmp_path / 'own'}", f"teacher.tokenizer={world / 'teacher'}")


def test_a_server_is_asked_once_and_closed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_server, "VOCABULARY", tiny.VOCABULARY)
    model = tiny.model(phase=1.0, dtype=torch.float32)

    def table(ids: Sequence[int]) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1).numpy()

    with ScoringServer(model=table) as server:
        spec = (f"teacher.spec=vllm:m@{server.base_url}", f"teacher.tokenizer={world / 'teacher'}")
        done = write(world, tmp_path / "there", *spec, top_k=4)
        before = len(server.received)
        again = write(world, tmp_path / "there", *spec, top_k=4)
        asked = [r.body["prompt"] for r in server.received[before:]]
    assert (done.counts.written, again.counts.written) == (3, 0)
    # The check before every start is all that is asked the second time.
    answers = [[*of.prompt_ids, *of.token_ids] for of in (reading(*pair) for pair in ANSWERS.items())]
    assert not any(ids in answers for ids in asked)
    write(world, tmp_path / "here", top_k=4)
    readings = [reading(*pair) for pair in ANSWERS.items()]
    here, there = (asyncio.run(StoredScores(tmp_path / name).score(readings, top_k=4)) for name in ("here", "there"))
    for one, other in zip(here, there, strict=True):
        assert one.scores is not None and other.scores is not None
        assert one.scores.logprobs_TK == pytest.approx(other.scores.logprobs_TK, abs=1e-5)


def test_the_command_says_what_it_did_and_what_to_do_next(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a folder"
    assert main(["scores", "write", *words_of(world), "--out", str(out), "--top-k", "3", "--batch", "2"]) == 0
    said = capsys.readouterr()
    assert "3 answers written, 0 were there or repeat another" in said.out
    assert "1 prompts have no worked response and are left out" in said.out
    assert f"'teacher.spec=scores:{out}' 'method.supervision.authors={{dataset: 1}}'" in said.out
    assert "k: 3}" in said.out
    assert "both read the same text" in said.err and "answers 3/3" in said.err
    assert main(["scores", "write", *words_of(world), "--out", str(out), "--states"]) == 2
    assert f"{out} holds scores, asked for states; give another folder (--out)" in capsys.readouterr().err


# What a run is told of a folder


def covered(world: Path, folder: Path, *words: str, data: Path | None = None) -> list[str]:
    """Return what a run over some data is told of a folder."""
    kind = "states" if (folder / "head.safetensors").exists() else "scores"
    spec = (f"teacher.spec={kind}:{folder}", f"data.train={data or world / 'data.jsonl'}")
    config = load_config([], [*words_of(world, *words), "method.supervision.authors={dataset: 1}", *spec])
    (role,) = build_method(config.method).roles(config)
    policy, said = Policy.load(config.student), list[str]()
    _, prompts, _ = load_prompts(config, policy, lambda _: None)
    student = Student(policy, Detokenizer(policy.tokenizer))
    teacher = open_logit_teacher(role, config, policy, prompts, end_ids=student.end_ids, offload_folder=folder, say=str)
    behavior = DatasetBehavior(
        responses=read_responses(config.data),
        encode=student.encode,
        end_id=student.end_id,
        detokenize=student.detokenize,
        max_tokens=config.rollout.max_tokens,
    )
    check_coverage(role, teacher, lambda: behavior, prompts, said.append)
    return said


@pytest.mark.parametrize("kind", [{"states": True}, {}], ids=["states", "scores"])
def test_a_run_is_told_how_many_answers_the_folder_has(world: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    folder = tmp_path / "kept"
    write(world, folder, **kind)
    assert covered(world, folder) == [f"teacher: {folder} has all 3 answers of the data"]
    # The fourth row of the data has no answer, so the fifth makes four of them.
    row = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "1+1=2;#2"}]}
    more = tmp_path / "more.jsonl"
    more.write_text((world / "data.jsonl").read_text() + json.dumps({**row, "answer": "2"}) + "\n")
    flags = "--states --dtype float32" if kind else f"--top-k {tiny.VOCABULARY}"
    if kind:
        with pytest.raises(ConfigError, match=r"has 3 of the 4 answers of the data, and all of them are needed"):
            covered(world, folder, data=more)
    else:
        (told,) = covered(world, folder, data=more)
        assert f"WARNING: {folder} has 3 of the 4 answers of the data" in told and f"--out {folder} {flags}`" in told
        with pytest.raises(ConfigError, match=r"3 of the 4 .* stop at the others .*max_missing_fraction is 0\.2"):
            covered(world, folder, "teacher.max_missing_fraction=0.2", data=more)
    # Cut after four tokens they are other answers, none of which was written.
    with pytest.raises(ConfigError, match=r"has 0 of the 3 answers of the data.*`omniopd scores write RUN_FILE"):
        covered(world, folder, "rollout.max_tokens=4")


def test_a_loss_that_reads_too_much_is_told_what_the_folder_holds(world: Path, tmp_path: Path) -> None:
    write(world, tmp_path / "five", top_k=5)
    said = r"reads 34 tokens.*names 5.*--top-k 34, or use .*reverse_kl, k: 5\}, or .*--states` and use"
    with pytest.raises(ConfigError, match=said.replace("34", str(tiny.VOCABULARY))):
        covered(world, tmp_path / "five")
    large, whole = LARGEST_WHOLE + 1, Evidence("whole")

    def advice(spec: str, most: int) -> str:
        with pytest.raises(ConfigError) as caught:
            wanted_of(whole, TeacherConfig(spec=spec), large, most=most)
        return str(caught.value)

    assert "k: 64}" in advice("scores:S", 64) and "states:OUT" in advice("scores:S", 64)
    assert "k:" not in advice("scores:S", 1)
    assert "k: 50}" in advice("vllm:m@http://127.0.0.1:1/v1", 50) and "hf:MODEL" in advice("vllm:m", 50)
    assert "k: 20}" in advice("vllm:m", large)
