"""The loopback teacher speaks the real dialects: their own SDKs read it, and it takes what our cards ask for."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from omniopd.teachers.base import ContinuationRequest
from omniopd.teachers.cards import find_card
from omniopd.teachers.continuation import ASKED, continuation_messages
from omniopd.teachers.dialects import get_dialect
from omniopd.teachers.plan import Plan
from omniopd.types import Message
from teacher_server import TeacherServer, expected_continuation, identity
from teacher_server.client import PREFIX, TASK, asking, chat, expected, get, post
from teacher_server.world import find_prefix


def chatml(messages: Sequence[Message]) -> str:
    turns = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
    return f"{turns}<|im_start|>assistant\n"


def test_openai_sdk_reads_chat_answers() -> None:
    import openai
    from openai.types.chat import ChatCompletion

    with (
        TeacherServer() as server,
        openai.OpenAI(base_url=server.base_url(), api_key="test-key", max_retries=0, timeout=5) as client,
    ):
        raw = client.chat.completions.with_raw_response.create(
            model="m",
            messages=asking("chat"),  # type: ignore[arg-type]
            n=3,
            seed=7,
            max_completion_tokens=12,
        )
        answer = ChatCompletion.model_validate(raw.http_response.json())
    assert [choice.message.content for choice in answer.choices] == [expected(PREFIX, i, seed=7) for i in range(3)]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36  # 3 samples of 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 36
    assert not answer.model_extra and not answer.choices[0].message.model_extra


def test_openai_sdk_reads_raw_completions() -> None:
    import openai
    from openai.types import Completion

    render = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12 + 35?<|im_end|>\n"
    prompts = [f"{render}<|im_start|>assistant\n{PREFIX}", f"{render}<|im_start|>assistant\n"]
    with (
        TeacherServer() as server,
        openai.OpenAI(base_url=server.base_url(), api_key="test-key", max_retries=0, timeout=5) as client,
    ):
        create = client.completions.with_raw_response.create
        both = Completion.model_validate(create(model="m", prompt=prompts, n=2, max_tokens=12).http_response.json())
        ids = list(prompts[0].encode())
        tokens = client.completions.create(model="m", prompt=ids, max_tokens=12)
    assert [c.text for c in both.choices] == [expected(p, i) for p in (PREFIX, "") for i in range(2)]
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert tokens.choices[0].text == expected(PREFIX)
    assert not both.model_extra


def test_anthropic_sdk_reads_messages() -> None:
    import anthropic
    from anthropic.types import Message as Answer

    with (
        TeacherServer() as server,
        anthropic.Anthropic(
            base_url=server.base_url("anthropic-sdk"), api_key="test-key", max_retries=0, timeout=5
        ) as client,
    ):
        raw = client.messages.with_raw_response.create(
            model="claude-no-such-4-5",
            max_tokens=12,
            messages=[{"role": "user", "content": TASK[0].content}, {"role": "assistant", "content": PREFIX}],
        )
        answer = Answer.model_validate(raw.http_response.json())
        with pytest.raises(anthropic.BadRequestError, match="does not support assistant message prefill"):
            client.messages.create(
                model="claude-no-prefill",
                max_tokens=12,
                messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            )
        with pytest.raises(anthropic.BadRequestError, match="trailing whitespace"):
            client.messages.create(
                model="claude-no-such-4-5",
                max_tokens=12,
                messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y "}],
            )
    assert answer.content[0].type == "text" and answer.content[0].text == expected(PREFIX)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 12)
    assert answer.usage.cache_read_input_tokens == 0
    assert not answer.model_extra


def test_failures_become_the_sdk_exceptions_they_are_made_for() -> None:
    import anthropic
    import openai

    with TeacherServer() as server:
        url = server.base_url()
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0, timeout=5) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
            assert refused.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=url, api_key="test-key", max_retries=0, timeout=5) as client:
            with pytest.raises(openai.NotFoundError) as missing:
                client.chat.completions.create(model="missing-model", messages=[{"role": "user", "content": "x"}])
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as unknown:
                client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "x"}], extra_body={"top_k": 3}
                )
            assert (unknown.value.code, unknown.value.param) == ("unknown_parameter", "top_k")
            server.change(mode="quota")
            with pytest.raises(openai.RateLimitError) as quota:
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
            assert quota.value.code == "insufficient_quota"
        server.change(mode="ok", faults={"529": 1.0})
        root = server.base_url("anthropic-sdk")
        with anthropic.Anthropic(base_url=root, api_key="test-key", max_retries=0, timeout=5) as claude:
            with pytest.raises(anthropic.APIStatusError) as overloaded:
                claude.messages.create(model="c", max_tokens=5, messages=[{"role": "user", "content": "x"}])
            assert overloaded.value.status_code == 529
            assert overloaded.value.body == {
                "type": "error",
                "error": {"type": "overloaded_error", "message": "Overloaded"},
                "request_id": "req_0",
            }


def test_openai_sdk_runs_a_batch_at_half_price() -> None:
    import openai
    from openai.types import Batch

    lines = [
        {"custom_id": f"q{i}", "method": "POST", "url": "/v1/chat/completions", "body": chat(("user", f"{i}?"))}
        for i in range(3)
    ]
    lines.append({**lines[0], "custom_id": "bad", "body": chat(top_k=1)})
    content = "\n".join(map(json.dumps, lines)).encode()
    with (
        TeacherServer(batch_delay_s=0.05) as server,
        openai.OpenAI(base_url=server.base_url(), api_key="test-key", max_retries=0, timeout=5) as client,
    ):
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"run": "a"}
        )
        assert (batch.status, server.log.received) == ("in_progress", 0)
        deadline = time.monotonic() + 5
        while batch.status != "completed" and time.monotonic() < deadline:
            time.sleep(0.02)
            batch = client.batches.retrieve(batch.id)
        Batch.model_validate(batch.model_dump())
        assert batch.request_counts is not None and batch.output_file_id and batch.error_file_id
        assert batch.request_counts.model_dump() == {"total": 4, "completed": 3, "failed": 1}
        rows = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
        errors = [json.loads(row) for row in client.files.content(batch.error_file_id).text.splitlines()]
        stats = server.log.stats()
        assert [listed.id for listed in client.batches.list()] == [batch.id]
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}
    asked = [[Message(role="user", content=f"{i}?")] for i in range(3)]
    assert texts == {f"q{i}": expected_continuation(asked[i], "", 0, 1000) for i in range(3)}
    assert [(row["custom_id"], row["response"]["status_code"]) for row in errors] == [("bad", 400)]
    full = (stats["billed_input_tokens"] * 1.0 + stats["billed_output_tokens"] * 4.0) / 1e6
    assert stats["billed"] == 3
    assert stats["billed_usd"] == pytest.approx(full / 2)


def test_anthropic_sdk_runs_a_batch() -> None:
    import anthropic

    with (
        TeacherServer() as server,
        anthropic.Anthropic(
            base_url=server.base_url("anthropic-sdk"), api_key="test-key", max_retries=0, timeout=5
        ) as client,
    ):
        params: Any = {"model": "claude-x", "max_tokens": 12, "messages": [{"role": "user", "content": "7?"}]}
        wrong: Any = {**params, "n": 2}
        made = client.messages.batches.create(
            requests=[{"custom_id": "a", "params": params}, {"custom_id": "b", "params": wrong}]
        )
        deadline = time.monotonic() + 5
        while made.processing_status != "ended" and time.monotonic() < deadline:
            time.sleep(0.02)
            made = client.messages.batches.retrieve(made.id)
        _, results, _ = get(server, f"/v1/messages/batches/{made.id}/results")
    rows = {row["custom_id"]: row["result"] for row in map(json.loads, results.splitlines())}
    wanted = expected_continuation([Message(role="user", content="7?")], "", 0, 12)
    assert rows["a"]["message"]["content"][0]["text"] == wanted
    assert (rows["b"]["type"], rows["b"]["error"]["error"]["type"]) == ("errored", "invalid_request_error")
    assert made.request_counts.model_dump() == {
        "processing": 0,
        "succeeded": 1,
        "errored": 1,
        "canceled": 0,
        "expired": 0,
    }


def test_gemini() -> None:
    contents = [
        {"role": "user", "parts": [{"text": TASK[0].content}]},
        {"role": "model", "parts": [{"text": PREFIX}]},
    ]
    body = {"contents": contents, "generationConfig": {"candidateCount": 2, "max_output_tokens": 12, "seed": 3}}
    with TeacherServer() as server:
        url = f"{server.base_url('gemini')}/models/gemini-2.5-flash:generateContent"
        status, answer, _ = post(url, body, x_goog_api_key="test-key")
        refused = post(url.replace("2.5-flash", "3.6-flash"), body, x_goog_api_key="test-key")
        unknown = post(url, {**body, "max_tokens": 3}, x_goog_api_key="test-key")
        wrong_key = post(url, body, x_goog_api_key="wrong")
        server.change(faults={"429": 1.0}, retry_after_s=3.0)
        limited = post(url, body, x_goog_api_key="test-key")
    assert status == 200
    texts = [candidate["content"]["parts"][0]["text"] for candidate in answer["candidates"]]
    assert texts == [expected(PREFIX, i, seed=3) for i in range(2)]
    assert {candidate["finishReason"] for candidate in answer["candidates"]} == {"MAX_TOKENS"}
    assert answer["usageMetadata"]["candidatesTokenCount"] == 24
    assert refused[0] == 400 and "model turn" in refused[1]["error"]["message"]
    assert unknown[1]["error"]["status"] == "INVALID_ARGUMENT" and '"max_tokens"' in unknown[1]["error"]["message"]
    assert wrong_key[1]["error"]["details"][0]["reason"] == "API_KEY_INVALID"
    assert limited[0] == 429 and "retry-after" not in limited[2]
    assert limited[1]["error"]["details"][1]["retryDelay"] == "3s"


def test_who_continues_and_how() -> None:
    open_answer = [*TASK, Message(role="assistant", content=PREFIX)]
    turns = [message.to_json() for message in open_answer]
    flagged = [turns[0], {**turns[1], "prefix": True}]
    new_turn = expected_continuation(open_answer, "", 0, 12)
    body = {"model": "m", "max_tokens": 12}
    with TeacherServer() as server:

        def ask(dialect: str, messages: Any, **fields: Any) -> tuple[int, Any]:
            url = f"{server.base_url(dialect)}/chat/completions"
            status, answer, _ = post(url, {**body, "messages": messages, **fields})
            return status, answer["choices"][0]["message"]["content"] if status == 200 else answer

        assert ask("openai", turns) == (200, new_turn)
        assert ask("deepseek", turns) == (200, new_turn)
        assert ask("deepseek", flagged) == (200, expected(PREFIX))
        assert ask("mistral", flagged) == (200, PREFIX + expected(PREFIX))
        assert ask("openrouter", turns) == (200, expected(PREFIX))
        continues = {"continue_final_message": True, "add_generation_prompt": False}
        assert ask("vllm", turns, **continues) == (200, expected(PREFIX))
        assert ask("vllm", turns) == (200, new_turn)
        assert ask("vllm", turns, continue_final_message=True)[0] == 400
        assert ask("mistral", turns)[0] == 400
        assert ask("openai", flagged)[0] == 400
        status, error = ask("mistral", flagged, seed=1)
        assert (status, error["message"]["detail"][0]["loc"]) == (422, ["body", "seed"])
        # No `n`: one choice, and nobody says so.
        url = f"{server.base_url('deepseek')}/chat/completions"
        assert len(post(url, {**body, "messages": flagged, "n": 4})[1]["choices"]) == 1
        assert post(f"{server.base_url()}/chat/completions", chat(max_tokens=3) | {"model": "o3"})[0] == 400


@pytest.mark.parametrize("transport", ["chat", "chat-turn", "structured"])
@pytest.mark.parametrize("prefix", [PREFIX, "Say </partial> and go on. Then ", "1, 2, 3,", "A line.\n\n", "x" * 9])
def test_the_prefix_is_found_in_our_own_wordings(transport: str, prefix: str) -> None:
    asked = [(m.role, m.content) for m in continuation_messages(TASK, prefix, max_tokens=9, transport=transport)]
    handed = find_prefix(asked, is_prefill=False)
    assert (handed.turns, handed.sent) == ((("user", TASK[0].content),), prefix.rstrip())
    assert handed.how == ("chat-turn" if transport == "chat-turn" else "chat")


MODELS = {
    "openai": ("gpt-4o", "o3", "gpt-5.1", "gpt-5", "gpt-3.5-turbo-instruct"),
    "anthropic": ("claude-haiku-4-5", "claude-opus-4-8", "claude-opus-5-5", "claude-sonnet-5-5", "claude-opus-5"),
    "gemini": ("gemini-2.5-flash", "gemini-2.5-pro", "gemini-3-pro", "gemini-3.6-flash", "gemini-3.5-flash-lite"),
    "deepseek": ("deepseek-chat",),
    "mistral": ("mistral-large",),
    "vllm": ("Qwen3-8B", "m"),
    "openrouter": ("qwen/x", "anthropic/claude-opus-4.6", "openai/o3"),
}


@pytest.mark.parametrize("provider", MODELS)
def test_what_our_cards_ask_for_is_taken_and_comes_back_whole(provider: str) -> None:
    messages = (Message(role="system", content="Be brief."), *TASK)
    with TeacherServer() as server:
        for model in MODELS[provider]:
            card = find_card(provider).for_model(model)
            dialect = get_dialect(card.dialect)
            headers: Any = {name.replace("-", "_").lower(): v for name, v in dialect.headers(card, "test-key").items()}
            for transport, prefix in itertools.product(card.can.continuations, ("", PREFIX, "So ", "A line.\n\n")):
                plan = Plan(
                    teacher_id="t",
                    model=model,
                    base_url=server.base_url(provider),
                    card=card,
                    dialect=dialect,
                    transport=transport,
                    render=chatml,
                )
                ids = tuple((chatml(messages) + prefix).encode())
                request = ContinuationRequest(
                    messages=messages, prefix=prefix, n=2, max_tokens=12, seed=5, token_ids=ids
                )
                for ask, samples in plan.asks(request):
                    call = plan.call(ask)
                    status, answer, _ = post(server.base_url(provider) + call.path, dict(call.body), **headers)
                    assert status == 200, (model, transport, answer)
                    replies = plan.replies(0, request, samples, dialect.read(answer, ask))
                    assert [reply.continuation.text for reply in replies] == [
                        expected_continuation(
                            messages,
                            prefix,
                            i,
                            ask.max_tokens,
                            seed=ask.seeds[0] if ask.seeds else None,
                            is_instructed=transport in ASKED,
                        )
                        for i in range(len(samples))
                    ], (model, transport, prefix)
        assert {entry.identities for entry in server.log.entries} == {
            (identity(TASK, prefix),) for prefix in ("", PREFIX, "So ", "A line.\n\n")
        }


def test_anthropic_prompt_cache() -> None:
    def ask(*chunks: str) -> dict[str, int]:
        blocks: list[dict[str, Any]] = [{"type": "text", "text": chunk} for chunk in chunks]
        blocks[-1]["cache_control"] = {"type": "ephemeral"}
        turns = [{"role": "user", "content": "x" * 4000}, {"role": "assistant", "content": blocks}]
        body = {"model": "claude-no-such-4-5", "max_tokens": 5, "messages": turns}
        _, answer, _ = post(f"{server.base_url('anthropic')}/messages", body, anthropic_version="2023-06-01")
        found: dict[str, int] = answer["usage"]
        return found

    with TeacherServer() as server:
        first = ask("a" * 400)
        second = ask("a" * 400, "b" * 400)
    # 4,400 characters are 1,100 tokens: over the minimum of 1,024. Then 400 characters more.
    assert (first["cache_read_input_tokens"], first["cache_creation_input_tokens"]) == (0, 1100)
    assert (second["cache_read_input_tokens"], second["cache_creation_input_tokens"]) == (1100, 100)


USER = [{"role": "user", "content": "x"}]
CLAUDE = {"model": "claude-haiku-4-5", "max_tokens": 5, "messages": USER}
OPEN = [*USER, {"role": "assistant", "content": "y"}]
CONTENTS = [{"role": "user", "parts": [{"text": "x"}]}]


@pytest.mark.parametrize(
    ("dialect", "path", "body", "said"),
    [
        ("openai", "/chat/completions", b"{", "parse the JSON"),
        ("openai", "/chat/completions", [], "parse the JSON"),
        ("openai", "/chat/completions", {"model": "m"}, "Missing required parameter: 'messages'"),
        ("openai", "/chat/completions", {"model": "m", "messages": []}, "'messages'"),
        ("openai", "/chat/completions", {"model": "m", "messages": USER, "stream": True}, "stream"),
        ("openai", "/chat/completions", {"model": "m", "messages": USER, "n": 0}, "not between"),
        ("openai", "/chat/completions", {"model": "m", "messages": USER, "n": "2"}, "Invalid type for 'n'"),
        ("openai", "/chat/completions", {"model": "m", "messages": USER, "stop": ["a"] * 5}, "'stop'"),
        ("openai", "/chat/completions", {"model": "m", "messages": [{"role": "user", "content": 3}]}, "content"),
        ("openai", "/chat/completions", {"model": "m", "messages": [{"role": "boss", "content": "x"}]}, "role"),
        ("openai", "/chat/completions", {"model": "o3", "messages": USER, "temperature": 0.5}, "temperature"),
        ("openai", "/completions", {"model": "m", "prompt": []}, "'prompt'"),
        ("vllm", "/completions", {"model": "m", "prompt": ["a", "b"], "seeds": [1]}, "'seeds' must be 2"),
        ("vllm", "/chat/completions", {"model": "m", "messages": USER, "continue_final_message": True}, "both"),
        ("mistral", "/chat/completions", {"model": "m", "messages": OPEN}, "last role"),
        ("openrouter", "/chat/completions", {"model": "openai/gpt-4o", "messages": OPEN}, "prefill"),
        ("anthropic", "/messages", {"model": "c", "messages": USER}, "max_tokens: Field required"),
        ("anthropic", "/messages", CLAUDE | {"n": 2}, "n: Extra inputs are not permitted"),
        ("anthropic", "/messages", CLAUDE | {"stream": True}, "stream"),
        ("anthropic", "/messages", CLAUDE | {"messages": OPEN[1:]}, "first message must use the 'user' role"),
        ("anthropic", "/messages", CLAUDE | {"messages": [{"role": "system", "content": "x"}]}, "role"),
        ("anthropic", "/messages", CLAUDE | {"messages": [{**USER[0], "prefix": True}]}, "prefix: Extra inputs"),
        ("anthropic", "/messages", CLAUDE | {"messages": [{"role": "user", "content": ""}]}, "non-empty"),
        ("anthropic", "/messages", CLAUDE | {"messages": [{"role": "user", "content": 3}]}, "valid list"),
        ("anthropic", "/messages", CLAUDE | {"system": [{"type": "image"}]}, "text block"),
        ("anthropic", "/messages", CLAUDE | {"system": [{"type": "text", "text": "x", "id": 1}]}, "id: Extra inputs"),
        ("anthropic", "/messages", CLAUDE | {"model": "claude-opus-4-8", "temperature": 1}, "sampling parameters"),
        ("anthropic", "/messages", CLAUDE | {"model": "claude-opus-5-5", "thinking": {"type": "disabled"}}, "disabled"),
        ("anthropic", "/messages", CLAUDE | {"messages": OPEN, "thinking": {"type": "enabled"}}, "thinking block"),
        (
            "anthropic",
            "/messages",
            CLAUDE | {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}] * 5},
            "maximum of 4",
        ),
        ("gemini", "/models/g:generateContent", {"contents": []}, "contents is not specified"),
        ("gemini", "/models/g:generateContent", {"contents": [{"role": "boss", "parts": []}]}, "valid role"),
        ("gemini", "/models/g:generateContent", {"contents": [{"parts": [{"inline": 1}]}]}, 'Unknown name "inline"'),
        ("gemini", "/models/g:generateContent", {"contents": [{"parts": "x"}]}, "parts"),
        (
            "gemini",
            "/models/g:generateContent",
            {
                "contents": CONTENTS,
                "generationConfig": {"thinkingConfig": {"thinkingBudget": 0, "thinkingLevel": "LOW"}},
            },
            "only one",
        ),
        (
            "gemini",
            "/models/gemini-3.6-flash:generateContent",
            {"contents": CONTENTS, "generationConfig": {"temperature": 1}},
            "Sampling",
        ),
        (
            "gemini",
            "/models/g:generateContent",
            {"contents": CONTENTS, "generationConfig": {"responseSchema": {"properties": {"a": {}}}}},
            "response_mime_type",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_the_providers_words(dialect: str, path: str, body: Any, said: str) -> None:
    with TeacherServer() as server:
        keys: Any = {"x_api_key": "test-key", "x_goog_api_key": "test-key", "anthropic_version": "2023-06-01"}
        status, answer, _ = post(server.base_url(dialect) + path, body, **keys)
        assert [entry.decision for entry in server.log.entries] == ["rejected"]
    assert status == 400
    assert said in (answer["message"] if dialect == "mistral" else answer["error"]["message"])


@pytest.mark.parametrize(
    ("dialect", "path", "body", "wanted"),
    [
        ("openai", "/chat/completions", {"model": "m", "messages": USER}, {"quota": 429, "500": 500, "auth": 401}),
        ("deepseek", "/chat/completions", {"model": "m", "messages": USER}, {"quota": 402, "503": 503, "auth": 401}),
        ("mistral", "/chat/completions", {"model": "m", "messages": USER}, {"429-bare": 429, "auth": 401}),
        ("openrouter", "/chat/completions", {"model": "m", "messages": USER}, {"429": 429, "quota": 402}),
        ("anthropic", "/messages", CLAUDE, {"quota": 400, "429": 429, "500": 500, "529": 529, "auth": 401}),
        ("gemini", "/models/g:generateContent", {"contents": CONTENTS}, {"quota": 429, "529": 503, "auth": 400}),
    ],
)
def test_failures_by_provider(dialect: str, path: str, body: Any, wanted: dict[str, int]) -> None:
    keys: Any = {"x_api_key": "test-key", "x_goog_api_key": "test-key", "anthropic_version": "2023-06-01"}
    with TeacherServer() as server:
        for what, status in wanted.items():
            is_mode = what in ("quota", "auth")
            server.change(mode=what if is_mode else "ok", faults={} if is_mode else {what: 1.0})
            found, answer, headers = post(server.base_url(dialect) + path, body, **keys)
            assert (found, "retry-after" in headers) == (status, what == "429"), (what, answer)
            assert server.log.entries[-1].decision == what
