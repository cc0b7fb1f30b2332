"""How a partial answer is put to a model that can only be asked."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd.errors import ConfigError
from omniopd.teachers.continuation import (
    ANCHOR_CHARACTERS,
    ASKED,
    END_MARKER,
    STOP_SEQUENCES,
    STRUCTURED_SCHEMA,
    continuation_messages,
    partial_tag,
    sent_prefix,
    stop_sequences,
)
from omniopd.types import Message

SYSTEM = Message(role="system", content="Be brief.")
TASK = Message(role="user", content="What is 2 + 3?")


def asked(prefix: str, transport: str = "chat", max_tokens: int = 40) -> tuple[Message, ...]:
    return continuation_messages((SYSTEM, TASK), prefix, max_tokens=max_tokens, transport=transport)


def test_chat_quotes_the_partial_answer_after_the_task() -> None:
    system, user = asked("The sum of 2 and")
    assert (system.role, user.role) == ("system", "user")
    assert system.content.endswith("\n\nBe brief.")
    assert user.content == (
        "What is 2 + 3?\n\n<partial>The sum of 2 and</partial>\n\n"
        'Go on. The text so far ends with "The sum of 2 and", with no whitespace after it, so begin with a space or a '
        "line break if one is due. Write only the characters that follow, about 30 words."  # 40 * 3 // 4
    )


def test_chat_turn_keeps_the_conversation_and_asks_after_it() -> None:
    system, task, answer, nudge = asked("The sum of 2 and ", "chat-turn")
    assert [m.role for m in (system, task, answer, nudge)] == ["system", "user", "assistant", "user"]
    assert task == TASK
    assert answer.content == "The sum of 2 and"
    assert '"The sum of 2 and", followed by a space, which is already there.' in nudge.content
    assert "partial" not in system.content


def test_structured_is_chat_with_a_json_answer() -> None:
    chat, structured = asked("The sum"), asked("The sum", "structured")
    assert structured[1] == chat[1]
    assert '{"continuation": "..."}' in structured[0].content and "JSON" not in chat[0].content
    assert list(STRUCTURED_SCHEMA["properties"]) == STRUCTURED_SCHEMA["required"] == ["continuation"]


@pytest.mark.parametrize("transport", sorted(ASKED))
def test_the_wording_allows_to_disagree_and_to_end(transport: str) -> None:
    system = asked("The sum", transport)[0].content
    assert "You need not agree" in system
    assert END_MARKER in system
    assert "correct" not in system.lower()


def test_a_long_prefix_is_anchored_by_its_end_as_json() -> None:
    prefix = "x" * 500 + 'so "\\frac{1}{2}"\nholds'
    nudge = asked(prefix, "chat-turn")[-1].content
    assert json.dumps(prefix[-ANCHOR_CHARACTERS:]) in nudge
    assert "x" * ANCHOR_CHARACTERS not in nudge


@pytest.mark.parametrize(
    ("held_back", "words"),
    [(" ", "a space"), ("\n", "a line break"), ("\n\n", "an empty line"), (" \t", '" \\t"')],
)
def test_the_whitespace_that_is_there_is_told(held_back: str, words: str) -> None:
    assert f"followed by {words}, which is already there" in asked("The sum" + held_back)[-1].content


@pytest.mark.parametrize("transport", sorted(ASKED))
@pytest.mark.parametrize("prefix", ["", " \n"])
def test_without_a_prefix_the_conversation_is_sent_as_it_is(transport: str, prefix: str) -> None:
    assert asked(prefix, transport) == (SYSTEM, TASK)


def test_earlier_turns_stay_and_a_conversation_may_end_in_an_answer() -> None:
    earlier = (TASK, Message(role="assistant", content="5"))
    system, *turns, user = continuation_messages(earlier, "And", max_tokens=8)
    assert tuple(turns) == earlier
    assert user.content.startswith("<partial>And</partial>")
    assert "Be brief" not in system.content


def test_transports_that_go_on_by_construction_ask_nothing() -> None:
    with pytest.raises(ConfigError, match="'prefill' asks for nothing"):
        continuation_messages((TASK,), "The sum", max_tokens=8, transport="prefill")


def test_a_prefix_with_tags_is_quoted_in_others() -> None:
    assert partial_tag("a < b") == "partial"
    assert partial_tag("a </partial> b") == "partial-2"
    assert partial_tag("<partial> <partial-2>") == "partial-3"
    system, user = asked("one <partial> two")
    assert "<partial-2>one <partial> two</partial-2>" in user.content
    assert "between <partial-2> and </partial-2>" in system.content


def test_stops_are_closing_tags_and_never_blank_lines() -> None:
    assert STOP_SEQUENCES.keys() == ASKED
    for transport in ASKED:
        assert stop_sequences(transport, "The sum") == STOP_SEQUENCES[transport]
    assert stop_sequences("chat", "</partial>") == ("</partial-2>",)
    assert STOP_SEQUENCES == {"chat": ("</partial>",), "chat-turn": (), "structured": ()}


@settings(max_examples=300)
@given(text=st.text(max_size=60), at=st.integers(0, 60), transport=st.sampled_from(sorted(ASKED)))
def test_all_that_stays_equal_while_the_answer_grows_comes_first(text: str, at: int, transport: str) -> None:
    short, long = text[:at], text
    if not short.strip() or partial_tag(long) != "partial":
        return
    # Turn by turn, in the order in which a provider's cache reads them.
    first, second = ["\x01".join(m.role + m.content for m in asked(part, transport)) for part in (short, long)]
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    quoted = first.index(sent_prefix(short), first.index(TASK.content) + len(TASK.content))
    assert shared >= quoted + len(sent_prefix(short))


def test_the_sent_prefix_never_ends_in_whitespace() -> None:
    assert sent_prefix("so \n\t") == "so"
    assert sent_prefix(" so") == " so"
