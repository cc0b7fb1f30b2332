"""The loopback teacher fails as it is told to, keeps its limits, and remembers all of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from omniopd.teachers.repair import clean_continuation
from omniopd.types import Message, Missing
from teacher_server import FAULTS, Settings, TeacherServer, expected_continuation, identity
from teacher_server.asked import Asked
from teacher_server.client import PREFIX, TASK, asking, chat, expected, get, post, until
from teacher_server.faults import PREAMBLE, applies, draw_fault, make_samples
from teacher_server.world import find_prefix, split_raw


@pytest.mark.parametrize("transport", ["chat", "chat-turn", "structured"])
def test_a_plain_answer_survives_the_repair(transport: str) -> None:
    body: dict[str, Any] = {"model": "m", "max_tokens": 12}
    if transport == "structured":
        schema = {"type": "object", "properties": {"continuation": {"type": "string"}}}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}
    with TeacherServer() as server:
        for prefix in (PREFIX, "Now we have ", "So 3 * 4 = 12. "):
            body["messages"] = asking(transport, prefix)
            choice = post(f"{server.base_url()}/chat/completions", body)[1]["choices"][0]
            read = clean_continuation(
                prefix, choice["message"]["content"], transport=transport, finish_reason=choice["finish_reason"]
            )
            assert read.text == expected(prefix), prefix


@pytest.mark.parametrize("fault", ["echo", "partial-echo", "preamble", "fence"])
def test_a_repairable_fault_is_repaired(fault: str) -> None:
    with TeacherServer(faults={fault: 1.0}) as server:
        body = chat(max_tokens=12) | {"messages": asking("chat")}
        text = post(f"{server.base_url()}/chat/completions", body)[1]["choices"][0]["message"]["content"]
        assert server.log.entries[0].decision == fault
    assert text != expected(PREFIX)
    assert (text.startswith(PREFIX), text.startswith(PREAMBLE)) == (fault == "echo", fault == "preamble")
    read = clean_continuation(PREFIX, text, transport="chat", finish_reason="length")
    assert (read.text or "").strip() == expected(PREFIX).strip()


def test_faults_without_text() -> None:
    body = chat(n=2, max_tokens=12)
    with TeacherServer() as server:
        url = f"{server.base_url()}/chat/completions"

        def choices(**faults: float) -> list[dict[str, Any]]:
            server.change(faults={name.replace("_", "-"): share for name, share in faults.items()})
            found: list[dict[str, Any]] = post(url, body)[1]["choices"]
            return found

        assert len(choices(fewer=1.0)) == 1
        assert len(choices(more=1.0)) == 3
        refused = choices(refusal=1.0)[0]
        assert refused["message"]["content"] is None and refused["message"]["refusal"]
        assert refused["finish_reason"] == "content_filter"
        in_words = choices(refusal_words=1.0)[0]
        read = clean_continuation("", in_words["message"]["content"], transport="chat", finish_reason="stop")
        assert read.missing is Missing.REFUSED
        assert choices(empty_thinking=1.0)[0] == {
            "index": 0,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
        assert server.log.entries[-1].output_tokens == 24  # 2 samples of 12, all of it thinking


def test_thinking_counts_towards_the_limit() -> None:
    with TeacherServer(thinking_tokens=8) as server:
        url = f"{server.base_url('deepseek')}/chat/completions"
        thought = post(url, chat(max_tokens=12))[1]
        spoke = post(url, chat(max_tokens=12, thinking={"type": "disabled"}))[1]
        nothing = post(url, chat(max_tokens=8))[1]
    assert thought["choices"][0]["message"]["content"] == expected("", max_tokens=4)
    assert thought["usage"]["completion_tokens"] == 12
    assert thought["usage"]["completion_tokens_details"]["reasoning_tokens"] == 8
    assert spoke["choices"][0]["message"]["content"] == expected("", max_tokens=12)
    assert (nothing["choices"][0]["message"]["content"], nothing["choices"][0]["finish_reason"]) == ("", "length")


def test_a_broken_wire_bills_nothing() -> None:
    with TeacherServer() as server:
        url = f"{server.base_url()}/chat/completions"
        for fault, error in (
            ("reset", ConnectionError),
            ("reset-mid", (ConnectionError, http.client.IncompleteRead)),
            ("truncated", json.JSONDecodeError),
            ("hang", TimeoutError),
        ):
            server.change(faults={fault: 1.0})
            with pytest.raises(error):
                post(url, chat(), timeout=0.2 if fault == "hang" else 5.0)
        until(lambda: server.log.in_flight == 0)
        outcomes = [(entry.decision, entry.outcome, entry.billed) for entry in server.log.entries]
        server.change(faults={})
        assert post(url, chat())[0] == 200
        assert len(server.log.billed) == 1
    assert outcomes == [
        ("reset", "broken", False),
        ("reset-mid", "broken", False),
        ("truncated", "broken", False),
        ("hang", "abandoned", False),
    ]


def test_a_client_that_dies_is_not_billed() -> None:
    content = json.dumps(chat()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer test-key\r\ncontent-length: {len(content)}\r\n"
    with TeacherServer(latency_s=0.2) as server:
        peer = socket.create_connection(("127.0.0.1", server.port))
        peer.sendall(head.encode() + b"\r\n" + content)
        until(lambda: server.log.in_flight == 1)
        peer.close()
        until(lambda: server.log.in_flight == 0)
        assert [(entry.outcome, entry.billed) for entry in server.log.entries] == [("abandoned", False)]


def test_faults_come_as_often_as_they_are_set_and_pass_on_retry() -> None:
    settings = Settings(faults={"429": 0.1, "hang": 0.02, "echo": 0.05}, seed=1)
    drawn = Counter(draw_fault(settings, f"body {i}", 0) for i in range(20_000))
    # Four standard deviations of a share p of 20,000: 4 * sqrt(20_000 * p * (1 - p)) = 170, 79, 123.
    assert abs(drawn["429"] - 2000) < 170
    assert abs(drawn["hang"] - 400) < 79
    assert abs(drawn["echo"] - 1000) < 123
    assert set(drawn) == {"429", "hang", "echo", None}
    unlucky = [f"body {i}" for i in range(20_000) if draw_fault(settings, f"body {i}", 0) is not None]
    again = sum(draw_fault(settings, body, 1) is not None for body in unlucky)
    assert 0.1 < again / len(unlucky) < 0.24  # 0.17, whatever came before
    other = Settings(faults=settings.faults, seed=2)
    assert any(draw_fault(settings, f"body {i}", 0) != draw_fault(other, f"body {i}", 0) for i in range(100))


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="no faults"):
        Settings(faults={"418": 0.1})
    with pytest.raises(ValueError, match="at most 1"):
        Settings(faults=dict.fromkeys(FAULTS, 0.2))


def test_a_prefill_never_echoes() -> None:
    handed = find_prefix([("user", "x"), ("assistant", PREFIX)], is_prefill=True)
    asked = Asked(model="m", prompts=(handed,), max_tokens=5)
    assert not any(applies(fault, asked) for fault in ("echo", "partial-echo", "preamble", "fence"))
    assert applies("refusal", asked)
    assert make_samples(asked, Settings(), None, 0)[0].text == expected_continuation(
        [Message(role="user", content="x")], PREFIX, 0, 5
    )


def test_limits_are_enforced_and_told() -> None:
    with TeacherServer(requests_per_minute=120, window_s=1.0) as server:  # 2 in any second
        url = f"{server.base_url()}/chat/completions"
        first = post(url, chat())
        second = post(url, chat())
        third = post(url, chat())
        assert (first[0], second[0], third[0]) == (200, 200, 429)
        assert first[2]["x-ratelimit-limit-requests"] == "120"
        assert [answer[2]["x-ratelimit-remaining-requests"] for answer in (first, second)] == ["1", "0"]
        wait = float(third[2]["retry-after"])
        assert 0.5 < wait <= 1.0
        assert server.log.stats()["violations"] == 1
        assert server.log.stats()["decisions"] == {"served": 2, "limit": 1}
        time.sleep(wait)
        assert post(url, chat())[0] == 200
        assert server.log.early_retries == 0
        server.change(requests_per_minute=None, tokens_per_minute=60, window_s=10.0)  # 10 tokens in any 10 seconds
        # Several, because on a busy machine the second may come after the wait it was told.
        assert [post(url, chat(max_tokens=100))[0] for _ in range(6)] == [429] * 6
        assert 1 <= server.log.early_retries <= 5


def test_the_log_tells_everything_and_a_file_keeps_it(tmp_path: Path) -> None:
    log_path = tmp_path / "log.jsonl"
    with TeacherServer(log_path=log_path, faults={"429-bare": 1.0}) as server:
        url = f"{server.base_url()}/chat/completions"
        post(url, chat(n=2, seed=5, max_tokens=12) | {"messages": asking("chat-turn")})
        server.change(faults={})
        post(url, chat(n=2, seed=5, max_tokens=12) | {"messages": asking("chat-turn")})
        first, second = server.log.entries
        until(lambda: log_path.read_text().count("\n") == 2)  # Written once the answer is out.
        kept = [json.loads(line) for line in log_path.read_text().splitlines()]
        over_http = json.loads(get(server, "/__log?since=1")[1])
        assert json.loads(get(server, "/__stats")[1]) == server.log.stats()
    assert (first.decision, first.status, first.billed, first.times_seen) == ("429-bare", 429, False, 0)
    assert (second.decision, second.status, second.billed, second.times_seen) == ("served", 200, True, 1)
    assert first.body_hash == second.body_hash
    assert second.identities == (identity(TASK, PREFIX),)
    assert (second.how, second.n, second.seeds, second.choices, second.output_tokens) == ("chat-turn", 2, (5,), 2, 24)
    assert server.log.choices_billed() == {identity(TASK, PREFIX): 2}
    assert kept[1] == over_http[0]
    assert [entry["decision"] for entry in kept] == ["429-bare", "served"]


def test_fresh_samples_go_on_where_the_last_request_stopped() -> None:
    with TeacherServer(repeats="fresh") as server:
        url = f"{server.base_url()}/chat/completions"
        texts = [
            choice["message"]["content"] for n in (1, 2) for choice in post(url, chat(n=n, max_tokens=12))[1]["choices"]
        ]
        greedy = post(url, chat(n=2, max_tokens=12, temperature=0))[1]["choices"]
    assert texts == [expected("", i) for i in range(3)]
    assert [choice["message"]["content"] for choice in greedy] == [expected("")] * 2


def test_300_connections_at_once() -> None:
    import aiohttp

    async def run(url: str) -> list[tuple[int, str]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, headers={"authorization": "Bearer test-key"}, timeout=aiohttp.ClientTimeout(10)
        ) as session:

            async def one(i: int) -> tuple[int, str]:
                async with session.post(url, json=chat(("user", f"{i}?"), max_tokens=12)) as response:
                    answer = await response.json()
                return i, answer["choices"][0]["message"]["content"]

            return await asyncio.gather(*map(one, range(300)))

    with TeacherServer(latency_s=0.05) as server:
        answers = asyncio.run(run(f"{server.base_url()}/chat/completions"))
        assert server.log.peak_in_flight > 100
        assert server.log.stats()["billed"] == 300
    assert [text for _, text in answers] == [
        expected_continuation([Message(role="user", content=f"{i}?")], "", 0, 12) for i, _ in answers
    ]


def test_a_process_of_its_own(tmp_path: Path) -> None:
    announce = tmp_path / "where.json"
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "tests.teacher_server", "--announce", str(announce), "--faults", '{"503": 1}']
    process = subprocess.Popen([*command, "--settings", '{"key": "k2"}'], cwd=root, env={**os.environ})
    try:
        until(announce.exists, 20)
        url = f"http://127.0.0.1:{json.loads(announce.read_text())['port']}"
        assert post(f"{url}/v1/chat/completions", chat())[0] == 401
        assert post(f"{url}/v1/chat/completions", chat(), authorization="Bearer k2")[0] == 503
        assert post(f"{url}/__settings", {"faults": {}})[0] == 200
        assert post(f"{url}/__settings", {"faults": {"418": 1}})[0] == 400
        assert post(f"{url}/v1/chat/completions", chat(), authorization="Bearer k2")[0] == 200
        assert post(f"{url}/__stats", {})[1]["decisions"] == {"auth": 1, "503": 1, "served": 1}
        assert post(f"{url}/__reset", {})[0] == 200
        assert post(f"{url}/__stats", {})[1]["received"] == 0
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_the_world() -> None:
    assert expected("1, 2, 3,", max_tokens=3) == " 4, 5, 6"
    assert expected("1, 2, 3", max_tokens=2) == ", 4, 5"
    assert expected("so 12 + 35 =", max_tokens=1) == " 47."
    assert expected("so 12 + 35 = ", max_tokens=1) == "47."
    assert expected("so 12 - 35 =", max_tokens=1) == " -23."
    assert expected("Hm.", 0) != expected("Hm.", 1)
    assert expected("Hm.", 0, seed=1) != expected("Hm.", 0)
    assert expected("Hm.", 0, max_tokens=5) == expected("Hm.", 0, max_tokens=9)[: len(expected("Hm.", 0, max_tokens=5))]
    corpus = {TASK[0].content: "It is 47, because 12 and 35 make 47."}
    assert expected("It is 47,", max_tokens=2, corpus=corpus) == " because 12"
    assert expected("It is 48,", max_tokens=2, corpus=corpus) == expected("It is 48,", max_tokens=2)
    assert identity(TASK, "a ") == identity([Message(role="system", content="s"), *TASK], "a")
    assert split_raw("no mark here") == split_raw("no mark here")
    assert split_raw("no mark here").sent == "no mark here"
