"""Answers of each provider: good ones exactly, ill-shaped ones as a ValueError, bills as the provider words them."""

from __future__ import annotations

from typing import Any

import pytest

from omniopd.teachers.cards import Transport
from omniopd.teachers.dialects import get_dialect
from omniopd.teachers.dialects.base import Ask, Choice
from omniopd.types import Message, Usage


def read(dialect: str, answer: Any, **fields: Any) -> Any:
    transport: Transport = fields.pop("transport", "chat")
    asked: dict[str, Any] = {"model": "m", "n": 1, "max_tokens": 50, "messages": (Message(role="user", content="Q"),)}
    return get_dialect(dialect).read(answer, Ask(transport=transport, **{**asked, **fields}))


def texts(choices: tuple[Choice, ...]) -> list[tuple[int, str]]:
    return [(choice.index, choice.text) for choice in choices]


def test_openai_chat_answer() -> None:
    parsed = read(
        "openai",
        {
            "choices": [
                {"index": 1, "message": {"content": None, "refusal": "I will not."}, "finish_reason": "content_filter"},
                {"index": 0, "message": {"content": " is 85", "reasoning_content": "hm"}, "finish_reason": "stop"},
            ],
            "usage": {
                "prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 130, "cost": 0.0125,
                "prompt_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 20},
                "completion_tokens_details": {"reasoning_tokens": 12},
            },
        },
        n=2,
    )  # fmt: skip
    assert parsed.choices == (
        Choice(index=0, text=" is 85", finish_reason="stop"),
        Choice(index=1, text="", finish_reason="content_filter", refusal="I will not."),
    )
    assert parsed.usage == Usage(
        requests=1, input_tokens=100, output_tokens=30, cost_usd=0.0125, cached_input_tokens=64, cache_write_tokens=20,
        reasoning_tokens=12,
    )  # fmt: skip


def test_openai_completions_are_numbered_prompt_by_prompt() -> None:
    items = [{"index": i, "text": f"t{i}", "finish_reason": "length"} for i in (3, 1, 0, 2)]
    parsed = read("openai", {"choices": items}, transport="completions", prompts=("a", "b"), n=2)
    assert texts(parsed.choices) == [(0, "t0"), (1, "t1"), (2, "t2"), (3, "t3")]
    # One is missing: the others keep their numbers, so that it is known whose it is.
    parsed = read("openai", {"choices": items[:3]}, transport="completions", prompts=("a", "b"), n=2)
    assert [choice.index for choice in parsed.choices] == [0, 1, 3]
    assert parsed.usage is None


@pytest.mark.parametrize("indices", [(None, None), (0, 0), (1, 2), ("a", "b"), (True, False), (-1, 0)])
def test_indices_that_make_no_sense_give_way_to_the_order(indices: tuple[Any, Any]) -> None:
    items = [{"index": index, "text": text} for index, text in zip(indices, ("x", "y"), strict=True)]
    parsed = read("openai", {"choices": items}, transport="tokens", prompt_ids=(1,), n=2)
    assert texts(parsed.choices) == [(0, "x"), (1, "y")]


def test_an_index_that_is_left_out_means_zero() -> None:
    items = [{"index": 1, "text": "y"}, {"text": "x"}]
    parsed = read("openai", {"choices": items}, transport="completions", prompts=("a",), n=2)
    assert texts(parsed.choices) == [(0, "x"), (1, "y")]


def test_content_may_come_in_parts_without_the_thinking() -> None:
    content = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "8"},
        {"type": "text", "text": "5"},
    ]
    parsed = read("openai", {"choices": [{"message": {"content": content}}]})
    assert parsed.choices == (Choice(index=0, text="85"),)


@pytest.mark.parametrize(
    ("said", "means"), [("eos", "stop"), ("model_length", "length"), ("tool_calls", "tool_calls"), (3, None)]
)
def test_openai_finish_reasons(said: Any, means: str | None) -> None:
    parsed = read("openai", {"choices": [{"message": {"content": "x"}, "finish_reason": said}]})
    assert parsed.choices[0].finish_reason == means


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, None),
        ({}, None),
        ("free", None),
        ({"prompt_tokens": 5}, None),
        ({"prompt_tokens": "5", "completion_tokens": 1}, None),
        ({"prompt_tokens": 5, "completion_tokens": -1}, None),
        ({"cost": 0.5}, Usage(requests=1, cost_usd=0.5)),
        (
            {"prompt_tokens": 5, "completion_tokens": 2, "cost": {"total": 1}},
            Usage(requests=1, input_tokens=5, output_tokens=2),
        ),
        (
            {"prompt_tokens": 5, "completion_tokens": 2, "cost": float("nan")},
            Usage(requests=1, input_tokens=5, output_tokens=2),
        ),
        (
            {"prompt_tokens": 5, "completion_tokens": 0, "cost": 0},
            Usage(requests=1, input_tokens=5, cost_usd=0.0),
        ),
        (
            {"prompt_tokens": 90, "completion_tokens": 2, "prompt_cache_hit_tokens": 64},
            Usage(requests=1, input_tokens=90, output_tokens=2, cached_input_tokens=64),
        ),
        (
            {"prompt_tokens": 5, "completion_tokens": 2,
             "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 4}},
            Usage(requests=1, input_tokens=5, output_tokens=2, cached_input_tokens=3, cache_write_tokens=2),
        ),
        (
            # Parts are never more than the whole.
            {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 9},
             "completion_tokens_details": {"reasoning_tokens": 9}},
            Usage(requests=1, input_tokens=5, output_tokens=2, cached_input_tokens=5, reasoning_tokens=2),
        ),
    ],
)  # fmt: skip
def test_what_an_openai_bill_says(usage: Any, expected: Usage | None) -> None:
    assert read("openai", {"choices": [{"message": {"content": "x"}}], "usage": usage}).usage == expected


def test_an_answer_without_choices_is_still_billed() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 0}
    parsed = read("openai", {"choices": [], "usage": usage})
    assert parsed.choices == ()
    assert parsed.usage == Usage(requests=1, input_tokens=5)


def test_anthropic_answer() -> None:
    parsed = read(
        "anthropic",
        {
            "content": [
                {"type": "thinking", "thinking": "hm", "text": "hm"},
                {"type": "text", "text": " is"},
                {"type": "text", "text": " 85"},
            ],
            "stop_reason": "end_turn",
            "usage": {
                "input_tokens": 10, "cache_read_input_tokens": 200, "cache_creation_input_tokens": 30,
                "output_tokens": 40, "output_tokens_details": {"thinking_tokens": 25},
            },
        },
    )  # fmt: skip
    assert parsed.choices == (Choice(index=0, text=" is 85", finish_reason="stop"),)
    # 10 + 200 + 30 = 240
    assert parsed.usage == Usage(
        requests=1, input_tokens=240, output_tokens=40, cached_input_tokens=200, cache_write_tokens=30,
        reasoning_tokens=25,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "details", "means", "refusal"),
    [
        ("stop_sequence", None, "stop", None),
        ("max_tokens", None, "length", None),
        ("model_context_window_exceeded", None, "length", None),
        ("pause_turn", None, "pause_turn", None),
        (None, None, None, None),
        ("refusal", None, "content_filter", ""),
        ("refusal", {"category": "frontier_llm", "explanation": None}, "content_filter", "frontier_llm"),
        ("refusal", {"category": "bio", "explanation": "Not this."}, "content_filter", "Not this."),
    ],
)  # fmt: skip
def test_anthropic_stop_reasons(reason: Any, details: Any, means: str | None, refusal: str | None) -> None:
    answer = {"content": [], "stop_reason": reason, "stop_details": details, "usage": {"input_tokens": 1}}
    parsed = read("anthropic", answer)
    assert parsed.choices == (Choice(index=0, text="", finish_reason=means, refusal=refusal),)
    assert parsed.usage is None


def test_gemini_answer() -> None:
    parsed = read(
        "gemini",
        {
            "candidates": [
                {"finishReason": "STOP", "content": {"role": "model", "parts": [
                    {"text": "hm", "thought": True}, {"text": " is"}, {"text": " 85"}]}},
                {"index": 1, "finishReason": "MAX_TOKENS", "content": {"role": "model"}},
                {"index": 2, "finishReason": "RECITATION", "finishMessage": "Too close."},
                {"index": 3, "finishReason": "OTHER", "finishMessage": "Odd."},
            ],
            "usageMetadata": {
                "promptTokenCount": 100, "candidatesTokenCount": 20, "thoughtsTokenCount": 300,
                "cachedContentTokenCount": 80,
            },
        },
        n=4,
    )  # fmt: skip
    assert parsed.choices == (
        Choice(index=0, text=" is 85", finish_reason="stop"),
        Choice(index=1, text="", finish_reason="length"),
        Choice(index=2, text="", finish_reason="content_filter", refusal="Too close."),
        Choice(index=3, text="", finish_reason="OTHER"),
    )
    # 20 + 300 = 320 are billed as output.
    assert parsed.usage == Usage(
        requests=1, input_tokens=100, output_tokens=320, cached_input_tokens=80, reasoning_tokens=300
    )


@pytest.mark.parametrize("reason", ["SAFETY", "PROHIBITED_CONTENT", "RECITATION", "BLOCKLIST", "SPII"])
def test_gemini_filters(reason: str) -> None:
    (choice,) = read("gemini", {"candidates": [{"finishReason": reason}]}).choices
    assert choice == Choice(index=0, text="", finish_reason="content_filter")


def test_a_blocked_gemini_prompt_is_every_sample_refused() -> None:
    answer = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 9}}
    parsed = read("gemini", answer, n=2)
    assert parsed.choices == tuple(
        Choice(index=i, text="", finish_reason="content_filter", refusal="SAFETY") for i in (0, 1)
    )
    assert parsed.usage == Usage(requests=1, input_tokens=9)
    billed = read("gemini", {"candidates": [], "usageMetadata": {"promptTokenCount": 9}})
    assert (billed.choices, billed.usage) == ((), Usage(requests=1, input_tokens=9))


def test_ollama_answers() -> None:
    chat = {
        "message": {"role": "assistant", "content": " is 85", "thinking": "hm"}, "done": True, "done_reason": "stop",
        "prompt_eval_count": 26, "eval_count": 9,
    }  # fmt: skip
    parsed = read("ollama", chat)
    assert parsed.choices == (Choice(index=0, text=" is 85", finish_reason="stop"),)
    assert parsed.usage == Usage(requests=1, input_tokens=26, output_tokens=9)
    parsed = read(
        "ollama", {"response": " is", "done_reason": "length", "eval_count": 2}, transport="completions", prompts=("a",)
    )
    assert parsed.choices == (Choice(index=0, text=" is", finish_reason="length"),)
    assert parsed.usage == Usage(requests=1, output_tokens=2)
    assert read("ollama", {"message": {"content": "x"}}).usage is None


@pytest.mark.parametrize(
    ("dialect", "answer", "words"),
    [
        *((name, odd, "the answer is") for name in ("openai", "anthropic", "gemini", "ollama")
          for odd in (None, [], "no", 3, True)),
        ("openai", {}, "choices is null, expected a list"),
        ("openai", {"choices": {"0": {}}}, "choices is an object"),
        ("openai", {"choices": ["x"]}, "a choice is text"),
        ("openai", {"choices": [{}]}, "message is null"),
        ("openai", {"choices": [{"message": [1]}]}, "message is a list"),
        ("openai", {"choices": [{"message": {"content": 3}}]}, "content is a number"),
        ("openai", {"choices": [{"message": {"content": ["x"]}}]}, "a part of a message's content is text"),
        ("openai", {"choices": [{"message": {"content": [{"text": 1}]}}]}, "expected a list"),
        ("openai", {"error": {"message": "key sk-abc", "code": 502}}, r"is an error \(502\)"),
        ("openai", {"error": {"message": "x", "code": None, "type": "server_error"}}, r"\(server_error\)"),
        ("openai", {"error": "key sk-abc is wrong"}, r"\(no code\)"),
        ("openai", {"error": {"code": "key sk-abc is wrong"}}, r"\(no code\)"),
        ("anthropic", {}, "content is null"),
        ("anthropic", {"content": ["x"]}, "content block is text"),
        ("anthropic", {"content": [{"type": "text", "text": 3}]}, "text block is a number"),
        ("anthropic", {"type": "error", "error": {"type": "overloaded_error"}}, r"\(overloaded_error\)"),
        ("gemini", {}, "neither candidates nor"),
        ("gemini", {"candidates": {"a": 1}}, "candidates is an object"),
        ("gemini", {"candidates": [3]}, "a candidate is a number"),
        ("gemini", {"candidates": [{"content": {"parts": "x"}}]}, "parts is text"),
        ("gemini", {"candidates": [{"content": {"parts": [None]}}]}, "a part is null"),
        ("ollama", {}, "message is null"),
        ("ollama", {"message": {"content": True}}, "content is a boolean"),
        ("ollama", {"error": "model not found"}, "is an error"),
    ],
)  # fmt: skip
def test_answers_of_the_wrong_shape_are_told_in_a_few_words(dialect: str, answer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(dialect, answer)
    assert "sk-abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("dialect", "answer", "words"),
    [
        ("openai", {"choices": [{"message": {"content": "x"}}]}, "has no text"),
        ("openai", {"choices": [{"text": 3}]}, "text is a number"),
        ("ollama", {"message": {"content": "x"}}, "has no response"),
    ],
)
def test_raw_answers_of_the_wrong_shape(dialect: str, answer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(dialect, answer, transport="completions", prompts=("a",))


# Junk of every kind at every place of a good answer: either it is read, or it is a ValueError.
JUNK: tuple[Any, ...] = (None, True, -1, 3.5, "x", [], [1], {}, {"a": 1}, [[]], [{}], {"text": 1})
GOOD: dict[str, Any] = {
    "openai": {
        "choices": [{"index": 0, "message": {"content": [{"type": "text", "text": "x"}]}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 1, "completion_tokens": 1, "cost": 1.0, "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    },
    "anthropic": {
        "content": [{"type": "text", "text": "x"}], "stop_reason": "refusal", "stop_details": {"explanation": "x"},
        "usage": {"input_tokens": 1, "output_tokens": 1, "output_tokens_details": {"thinking_tokens": 1}},
    },
    "gemini": {
        "candidates": [{"index": 0, "content": {"parts": [{"text": "x", "thought": False}]}, "finishReason": "STOP"}],
        "promptFeedback": {"blockReason": "x"}, "usageMetadata": {"promptTokenCount": 1, "thoughtsTokenCount": 1},
    },
    "ollama": {"message": {"content": "x"}, "done_reason": "stop", "prompt_eval_count": 1, "eval_count": 1},
}  # fmt: skip


def with_junk(value: Any) -> list[Any]:
    variants: list[Any] = list(JUNK)
    if isinstance(value, dict):
        variants += [{**value, name: odd} for name, inner in value.items() for odd in with_junk(inner)]
        variants += [{k: v for k, v in value.items() if k != name} for name in value]
    if isinstance(value, list) and value:
        variants += [[odd, *value[1:]] for odd in with_junk(value[0])]
    return variants


@pytest.mark.parametrize("dialect", list(GOOD))
def test_no_junk_gets_past_a_value_error(dialect: str) -> None:
    num_read = 0
    for answer in with_junk(GOOD[dialect]):
        try:
            parsed = read(dialect, answer)
        except ValueError:
            continue
        num_read += 1
        assert all(isinstance(choice.text, str) for choice in parsed.choices)
        assert [choice.index for choice in parsed.choices] == list(range(len(parsed.choices)))
    assert num_read > 20
