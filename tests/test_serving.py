"""`omniopd serve`: the API with the openai SDK, and generation that does not depend on who else asks."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from app_server import serving
from omniopd.errors import ConfigError, RolloutError, TeacherConnectionError, TeacherTimeoutError
from omniopd.generation import Sample, Sampler, SampleRequest
from omniopd.serving.app import build_app, serve
from omniopd.serving.batcher import Batcher
from omniopd.teachers.base import ContinuationRequest
from omniopd.teachers.local_server import LocalTeacherServer
from omniopd.teachers.resolve import open_teacher
from omniopd.types import FinishReason, Message

PROMPT = "Q:48+37-19?"


@pytest.fixture(scope="module")
def base_url(sampler: Sampler) -> Iterator[str]:
    with serving(build_app(sampler, sampler.tokenizer, "teacher", max_context_tokens=64)) as url:
        yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=base_url, max_retries=0) as client:
        yield client


def sampled(sampler: Sampler, *, seed: int, n: int = 1, max_tokens: int = 32, text: str = PROMPT) -> list[Sample]:
    ids = tuple(sampler.tokenizer(text).input_ids)
    return sampler.sample([SampleRequest(token_ids=ids, num_samples=n, max_tokens=max_tokens, seed=seed)])[0]


def test_models_and_health(client: openai.OpenAI, base_url: str) -> None:
    assert [model.id for model in client.models.list()] == ["teacher"]
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/health") as response:
        assert json.load(response) == {"status": "ok"}


def test_completions_are_the_samplers_own(client: openai.OpenAI, sampler: Sampler) -> None:
    answer = client.completions.create(model="teacher", prompt=PROMPT, n=3, seed=5, max_tokens=32, logprobs=0)
    expected = sampled(sampler, seed=5, n=3)
    assert [c.text for c in answer.choices] == [s.text for s in expected]
    assert [c.finish_reason for c in answer.choices] == [s.finish_reason.value for s in expected]
    for choice, sample in zip(answer.choices, expected, strict=True):
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert choice.logprobs.token_logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert "".join(choice.logprobs.tokens).startswith(sample.text)
        assert choice.logprobs.text_offset is not None
        assert choice.logprobs.text_offset[:3] == [0, 1, 2]
    assert answer.usage is not None
    # One token a character, the prompt counted once.
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == sum(len(s.token_ids) for s in expected)


def test_the_teacher_can_do_sums(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="teacher", prompt=PROMPT, temperature=0, max_tokens=40)
    assert answer.choices[0].text == "48+37=85;85-19=66;#66"
    assert answer.choices[0].finish_reason == "stop"


def test_prompts_in_every_form(client: openai.OpenAI, sampler: Sampler) -> None:
    def greedy(prompt: Any) -> list[str]:
        answer = client.completions.create(model="teacher", prompt=prompt, temperature=0, max_tokens=6)
        return [choice.text for choice in answer.choices]

    ids = list(sampler.tokenizer(PROMPT).input_ids)
    assert greedy(PROMPT) == greedy(ids) == greedy([PROMPT]) == greedy([ids]) == ["48+37="]
    assert greedy([PROMPT, "Q:1+2?"]) == ["48+37=", "1+2=3;"]


def test_every_prompt_may_have_its_own_seed(client: openai.OpenAI, sampler: Sampler) -> None:
    prompts = [PROMPT, "Q:15+76-28?", PROMPT]
    answer = client.completions.create(
        model="teacher", prompt=prompts, n=2, max_tokens=32, extra_body={"seeds": [1, 2, 1]}
    )
    expected = [
        s.text
        for text, seed in zip(prompts, [1, 2, 1], strict=True)
        for s in sampled(sampler, seed=seed, n=2, text=text)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert expected[:2] == expected[4:]


def test_unseeded_requests_differ(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="teacher", prompt="Q", temperature=3.0).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_stop_texts_and_limits(client: openai.OpenAI) -> None:
    cut = client.completions.create(model="teacher", prompt=PROMPT, temperature=0, max_tokens=40, stop=[";"])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("48+37=85", "stop")
    assert cut.usage is not None
    assert cut.usage.completion_tokens == len("48+37=85;")
    short = client.completions.create(model="teacher", prompt=PROMPT, temperature=0, max_tokens=3)
    assert (short.choices[0].text, short.choices[0].finish_reason) == ("48+", "length")
    default = client.completions.create(model="teacher", prompt=PROMPT, temperature=0)
    assert default.choices[0].text == "48+37=85;85-19=6"


def test_chat_answers_and_continues(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "48+37-19"}
    answer = client.chat.completions.create(
        model="teacher", messages=[question], temperature=0, max_completion_tokens=5, logprobs=True, top_logprobs=0
    )
    assert answer.choices[0].message.content == "48+37"
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert [entry.token for entry in answer.choices[0].logprobs.content] == list("48+37")
    assert all(entry.logprob <= 0 for entry in answer.choices[0].logprobs.content)
    begun = client.chat.completions.create(
        model="teacher",
        messages=[question, {"role": "assistant", "content": "48+37=85;"}],
        temperature=0,
        max_tokens=9,
        n=2,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert [choice.message.content for choice in begun.choices] == ["85-19=66;"] * 2
    unlimited = client.chat.completions.create(model="teacher", messages=[question], temperature=0)
    assert unlimited.choices[0].message.content == "48+37=85;85-19=66;#66"


USER = [{"role": "user", "content": "1+2"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {"prompt": PROMPT, "echo": True}, "echo", "Input should be False"),
        ("completions", {"prompt": PROMPT, "suffix": "x"}, "suffix", "not offered"),
        ("completions", {"prompt": PROMPT, "stream": True}, "stream", "Input should be False"),
        ("completions", {"prompt": PROMPT, "logprobs": 2}, "logprobs", "less than or equal to 1"),
        ("completions", {"prompt": PROMPT, "temperature": -1}, "temperature", "greater than or equal to 0"),
        ("completions", {"prompt": PROMPT, "n": 0}, "n", "greater than or equal to 1"),
        ("completions", {"prompt": PROMPT, "stop": ""}, "stop", "empty text"),
        ("completions", {"prompt": PROMPT, "stop": [""]}, "stop", "empty text"),
        ("completions", {"prompt": []}, "prompt", "prompt is empty"),
        ("completions", {"prompt": ["a", ""]}, "prompt", "no tokens"),
        ("completions", {"prompt": [9999]}, "prompt", "token id 9999; the vocabulary has 0..33"),
        ("completions", {"prompt": PROMPT, "max_tokens": 60}, "max_tokens", "exceeds the context of 64"),
        ("completions", {"prompt": ["a"] * 3, "n": 2000}, "n", "exceed 4096 samples"),
        ("completions", {"prompt": ["a"] * 3, "seeds": [1]}, "seeds", "1 entries for 3 prompts"),
        ("completions", {"prompt": "a", "seeds": [1], "seed": 1}, "seeds", "exclude each other"),
        ("completions", {}, "prompt", "Field required"),
        ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("chat/completions", {"messages": USER, "top_logprobs": 3}, "top_logprobs", "Input should be 0"),
        ("chat/completions", {"messages": USER, "continue_final_message": True}, "messages", "got role 'user'"),
        (
            "chat/completions",
            {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "exclude each other",
        ),
    ],
)
def test_bad_requests_get_openais_error_shape(
    base_url: str, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    status, answer = post(f"{base_url}/{path}", json.dumps({"model": "teacher"} | body).encode())
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]


def post(url: str, data: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_wrong_models_paths_and_bodies(client: openai.OpenAI, base_url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'teacher'"):
        client.completions.create(model="other", prompt="x")
    assert post(f"{base_url}/completions", b"{oops") == (
        400,
        {"error": {"message": "the body is no JSON", "type": "invalid_request_error", "param": None, "code": None}},
    )
    status, answer = post(f"{base_url}/embeddings", b"{}")
    assert (status, answer["error"]["message"]) == (404, "POST /v1/embeddings is not offered by omniopd serve")


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "has no chat template; use /v1/completions"), ("{{ raise_exception('no such role') }}", "no such role")],
)
def test_chat_templates_that_cannot_be_used(sampler: Sampler, template: str | None, words: str) -> None:
    tokenizer = copy.copy(sampler.tokenizer)
    tokenizer.chat_template = template
    with serving(build_app(sampler, tokenizer, "m")) as url:
        body = json.dumps({"model": "m", "messages": USER}).encode()
        status, answer = post(f"{url}/chat/completions", body)
    assert status == 400
    assert words in answer["error"]["message"]


def test_a_failure_of_the_engine_is_a_server_error(sampler: Sampler) -> None:
    class Broken:
        def sample(self, requests: Sequence[SampleRequest], *, batch_size: int = 512) -> list[list[Sample]]:
            raise RolloutError("out of luck")

    with serving(build_app(Broken(), sampler.tokenizer, "m")) as url:
        status, answer = post(f"{url}/completions", json.dumps({"model": "m", "prompt": "Q"}).encode())
    assert status == 500
    assert answer["error"] == {"message": "out of luck", "type": "server_error", "param": None, "code": None}


class Recording:
    """A sampler that writes down its batches and fails on token 13."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()

    def sample(self, requests: Sequence[SampleRequest], *, batch_size: int = 512) -> list[list[Sample]]:
        self.gate.wait(5)
        self.batches.append(len(requests))
        if any(13 in r.token_ids for r in requests):
            raise RolloutError("token 13")
        return [
            [
                Sample(
                    token_ids=r.token_ids,
                    logprobs=(0.0,),
                    entropies=(0.0,),
                    text=f"{r.token_ids[0]}/{i}",
                    finish_reason=FinishReason.STOP,
                )
                for i in range(r.num_samples)
            ]
            for r in requests
        ]


def wish(token: int, **settings: Any) -> SampleRequest:
    return SampleRequest(**{"token_ids": (token,), "num_samples": 1, "max_tokens": 1, **settings})


def test_waiting_requests_are_generated_together_and_kept_apart() -> None:
    recording = Recording()
    batcher = Batcher(recording)
    first = batcher.submit([wish(0)])
    time.sleep(0.05)
    jobs = [batcher.submit([wish(1), wish(2)]), batcher.submit([wish(3)]), batcher.submit([wish(4, top_p=0.5)])]
    dropped = batcher.submit([wish(5)])
    assert dropped.cancel()
    recording.gate.set()
    assert [[s.text for one in job.result(5) for s in one] for job in [first, *jobs]] == [
        ["0/0"],
        ["1/0", "2/0"],
        ["3/0"],
        ["4/0"],
    ]
    # The first alone; then what waited, without the one that was taken back: plain rows, then those with a nucleus.
    assert recording.batches == [1, 3, 1]
    batcher.close()


def test_a_request_that_fails_does_not_fail_its_neighbors() -> None:
    recording = Recording()
    batcher = Batcher(recording)
    jobs = [batcher.submit([wish(token)]) for token in (1, 13, 2)]
    recording.gate.set()
    assert jobs[0].result(5)[0][0].text == "1/0"
    assert jobs[2].result(5)[0][0].text == "2/0"
    with pytest.raises(RolloutError, match="token 13"):
        jobs[1].result(5)
    batcher.close()


def test_samples_do_not_depend_on_who_else_asks(base_url: str, sampler: Sampler) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(api_key="none", base_url=base_url, max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="teacher", prompt=f"Q:{10 + i}+37-19?", seed=i, n=2, max_tokens=24 + i % 2
                    )
                    for i in range(8)
                )
            )
        return [choice.text for answer in answers for choice in answer.choices]

    expected = [
        s.text
        for i in range(8)
        for s in sampled(sampler, seed=i, n=2, max_tokens=24 + i % 2, text=f"Q:{10 + i}+37-19?")
    ]
    assert asyncio.run(ask_all()) == expected


def test_the_three_transports_agree_on_a_greedy_answer(base_url: str, teacher_folder: Path) -> None:
    request = ContinuationRequest(
        messages=(Message(role="user", content="48+37-19"),), prefix="48+37=85;", n=2, max_tokens=20, seed=1
    )

    async def ask(continuation: str) -> tuple[str | None, ...]:
        teacher = open_teacher(
            f"local:teacher@{base_url}", temperature=0.0, continuation=continuation, tokenizer_path=teacher_folder
        )
        (answer,) = await teacher.continuations([request])
        await teacher.aclose()
        assert answer.usage.cost_usd == 0.0
        return tuple(c.text for c in answer.continuations)

    assert asyncio.run(ask("auto")) == asyncio.run(ask("prefill")) == ("85-19=66;#66",) * 2


def test_a_teachers_samples_do_not_depend_on_the_number_asked_for(base_url: str, teacher_folder: Path) -> None:
    def requests(n: int) -> list[ContinuationRequest]:
        return [
            ContinuationRequest(
                messages=(Message(role="user", content=f"{10 + i}+37-19"),), prefix="", n=n, max_tokens=24, seed=i
            )
            for i in range(5)
        ]

    async def ask(n: int) -> list[list[str | None]]:
        teacher = open_teacher(f"local:teacher@{base_url}", temperature=4.0, tokenizer_path=teacher_folder)
        answers = await teacher.continuations(requests(n))
        await teacher.aclose()
        return [[c.text for c in answer.continuations] for answer in answers]

    few, many = asyncio.run(ask(2)), asyncio.run(ask(4))
    assert few == [texts[:2] for texts in many]
    assert len({text for texts in many for text in texts}) > 10


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_local_teacher_lives_as_long_as_its_block(teacher_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    server = LocalTeacherServer(teacher_folder, log=log, device="cpu", threads=1)
    with pytest.raises(TeacherConnectionError, match="is not running"):
        _ = server.base_url
    with server:
        pid = server.pid
        assert pid is not None
        with openai.OpenAI(api_key="none", base_url=server.base_url, max_retries=0) as client:
            answer = client.completions.create(model="teacher", prompt=PROMPT, temperature=0, max_tokens=5)
        assert answer.choices[0].text == "48+37"
    assert not is_alive(pid)
    assert server.pid is None
    assert "serving teacher at http://127.0.0.1:" in log.read_text()


PARENT = """
import sys, time
from pathlib import Path
from omniopd.teachers.local_server import LocalTeacherServer
with LocalTeacherServer(sys.argv[1], log=Path(sys.argv[2]), device="cpu", threads=1) as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


def test_a_local_teacher_does_not_outlive_a_killed_parent(teacher_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(teacher_folder), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
    wait_until_gone(pid)


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    server = LocalTeacherServer(nowhere, log=tmp_path / "log", device="cpu")
    with pytest.raises(TeacherConnectionError, match="ended with code") as caught, server:
        pass
    assert f"there is no model folder {str(nowhere)!r}" in str(caught.value).split("the end of")[1]


def test_a_server_that_takes_too_long_is_stopped(teacher_folder: Path, tmp_path: Path) -> None:
    server = LocalTeacherServer(teacher_folder, log=tmp_path / "log", timeout_s=0.05)
    with pytest.raises(TeacherTimeoutError, match=r"within 0\.05 s"), server:
        pass
    assert server.pid is None


def test_a_server_announces_itself_and_stops_with_the_process_it_was_given(
    teacher_folder: Path, tmp_path: Path
) -> None:
    announce = tmp_path / "base_url"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as companion:
        settings = {"port": 0, "model_name": "named", "threads": 1, "announce": announce, "exit_with": companion.pid}
        thread = threading.Thread(target=serve, args=(teacher_folder,), kwargs=settings)
        thread.start()
        while not announce.exists():
            assert thread.is_alive()
            time.sleep(0.02)
        status, answer = post(announce.read_text() + "/completions", json.dumps({"model": "x", "prompt": "Q"}).encode())
        assert status == 404
        assert "this server has 'named'" in answer["error"]["message"]
        companion.kill()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_a_port_in_use_is_named(teacher_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
            serve(teacher_folder, port=port)
