"""What becomes of a reply: every failure of chat models has a row, and no repair may touch what is right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from omniopd.teachers.continuation import ASKED, END_MARKER, partial_tag, sent_prefix
from omniopd.teachers.overlap import _border, _is_loop, after_echo, is_cut_echo
from omniopd.teachers.repair import Repair, clean_continuation, repairs_of, used_up_by_thinking
from omniopd.types import Continuation, Missing


def clean(prefix: str, text: str, transport: str = "chat", **options: Any) -> Continuation:
    return clean_continuation(prefix, text, transport=transport, **{"finish_reason": "length", **options})


def as_json(text: str) -> str:
    return json.dumps({"continuation": text})


EXACT = ["tokens", "completions", "prefill"]
SHORT = "First add the two numbers, which"
MATH = (
    "Natalia sold 48 clips in April.\nIn May she sold half as many, which is 48/2 = 24 clips.\n"
    "Altogether, over the two months, Natalia sold"
)
NEXT = " 48 + 24 = 72 clips."
LATEX = "We have $\\frac{x}{2} \\times 3 = 12$, so"


@pytest.mark.parametrize(
    ("prefix", "text", "expected", "repairs"),
    [
        # Full echo.
        ("2 + 3 =", "2 + 3 = 5", " 5", [Repair.ECHO]),
        (MATH, MATH + NEXT, NEXT, [Repair.ECHO]),
        (MATH, "\n" + MATH + NEXT, NEXT, [Repair.ECHO]),
        (MATH + " ", MATH + NEXT, NEXT[1:], [Repair.ECHO]),
        # Echo of the end.
        (SHORT, "two numbers, which gives 5", " gives 5", [Repair.END_ECHO]),
        (MATH, "Altogether, over the two months, Natalia sold" + NEXT, NEXT, [Repair.END_ECHO]),
        (MATH, "...the two months, Natalia sold" + NEXT, NEXT, [Repair.END_ECHO]),
        (SHORT, "which gives", "which gives", [Repair.GLUED]),  # 5 characters are chance.
        # Echo with other whitespace, markup and case; with another letter.
        ("2 + 3 =", "2+3= 5", "2+3= 5", []),  # Too short to tell.
        ("So 12 + 13 =", "So 12+13= 25", " 25", [Repair.NEAR_ECHO]),
        (MATH, MATH.replace("\n", "\n\n") + NEXT, NEXT, [Repair.NEAR_ECHO]),
        (MATH, "**Altogether**, over the  two months, natalia sold" + NEXT, NEXT, [Repair.NEAR_ECHO]),
        (MATH + " **72**", "months, Natalia sold 72** clips", " clips", [Repair.NEAR_ECHO]),
        (MATH, MATH.replace("Natalia", "Natalie", 1) + NEXT, NEXT, [Repair.NEAR_ECHO]),
        # An announcement.
        (MATH, "Sure, here is the continuation:\n\n" + NEXT, NEXT, [Repair.PREAMBLE]),
        (MATH, "Certainly!\n" + NEXT, NEXT, [Repair.PREAMBLE]),
        (MATH, "**Continuing from where you left off:**\n" + NEXT, NEXT, [Repair.PREAMBLE]),
        (MATH, "Here's the rest of the answer: 48 + 24", "48 + 24", [Repair.PREAMBLE, Repair.GLUED]),
        (MATH, "Continuation:\n" + MATH + NEXT, NEXT, [Repair.PREAMBLE, Repair.ECHO]),
        (MATH, "\u597d\u7684\uff0c\u4ee5\u4e0b\u662f\u7eed\u5199\uff1a\n" + NEXT, NEXT, [Repair.PREAMBLE]),
        # Fences, quotes, tags, also those that the limit left open.
        (SHORT, "```\n gives 5\n```", " gives 5", [Repair.FENCE]),
        (SHORT, "```latex\n gives 5 and", " gives 5 and", [Repair.FENCE]),
        (SHORT, f"```text\n{SHORT} gives 5\n```", " gives 5", [Repair.FENCE, Repair.ECHO]),
        (SHORT, '" gives 5"', " gives 5", [Repair.QUOTES]),
        (SHORT, '" gives 5 and', " gives 5 and", [Repair.QUOTES]),
        (SHORT, "\u201c gives 5\u201d", " gives 5", [Repair.QUOTES]),
        (SHORT, f'"{SHORT} a "sum" of 5"', ' a "sum" of 5', [Repair.QUOTES, Repair.ECHO]),
        (SHORT, "gives 5</partial>", "gives 5", [Repair.TAGS, Repair.GLUED]),
        (SHORT, f"<partial>{SHORT} gives 5</partial>", " gives 5", [Repair.TAGS, Repair.ECHO]),
        (SHORT, f"{SHORT} gives 5</partial> Done.", " gives 5", [Repair.ECHO, Repair.TAGS]),
        (SHORT, "numbers, which</partial> gives 5", " gives 5", [Repair.TAGS]),
        (SHORT, "<continuation>\n gives 5\n</continuation>", " gives 5", [Repair.TAGS]),
        (SHORT, "<think>2 + 3\n</think>\n\n gives 5", " gives 5", [Repair.THINKING]),
        (
            SHORT,
            "Sure, here is the continuation:\n```\n<partial> gives 5</partial>\n```",
            " gives 5",
            [Repair.PREAMBLE, Repair.FENCE, Repair.TAGS],
        ),
        # The joint.
        ("Answer: ", " 5", "5", []),
        ("Answer: ", "5", "5", []),
        ("Answer:\n", " 5", "5", [Repair.JOINT]),
        ("Answer:\n\n", "\n5", "5", [Repair.JOINT]),
        ("Answer: ", "\n5", "\n5", [Repair.JOINT]),
        ("Answer:", " 5", " 5", []),
        ("The numb", "er is 5", "er is 5", [Repair.GLUED]),
        ("The number", "is 5", "is 5", [Repair.GLUED]),
    ],
)
def test_chat_replies_are_repaired(prefix: str, text: str, expected: str, repairs: list[Repair]) -> None:
    result = clean(prefix, text)
    assert result.text == expected
    assert list(repairs_of(result)) == repairs
    assert result.detail == "; ".join(repairs)
    assert not result.is_exact


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        # A teacher that objects: its text must reach the score whole.
        (MATH, " wait, that is wrong: half of 48 is 24, but she sold"),
        (MATH, " 72 clips... Sorry, that cannot be right."),
        ("So 3 + 4 = 8. That gives", " 3 + 4 = 7, not 8"),
        (MATH, "Altogether, over the 3 months, Natalia sold 96"),
        # A correction of what was quoted is no echo.
        (
            MATH,
            "In May she sold half as many, which is 48/2 = 23 clips.\nAltogether, over the two months, Natalia sold",
        ),
        # Text that repeats itself rightly.
        ("1, 1, 1, 1, 1, 1,", " 1, 1, 1, 1"),
        ("so 3 + 4 = 7. So 3 + 4 = 7", ". So 3 + 4 = 7"),
        ("| 1 | 2 |\n| 1 | 2 |\n", "| 1 | 2 |\n"),
        ("For the first glass he pays 5 * 1/2 = 2.50.\n", "For the second glass he pays 6 * 1/2 = 3.00."),
        # What looks like a wrapper, and is open in the prefix or asked for by it.
        ("```python\n", "```\nx\n```"),
        ("The program is:\n", "```\nprint(5)\n```"),
        (SHORT + ' "so', ' called" sum "5"'),
        ("The \u201csum", "\u201d is 5"),
        ("<think>2 + 3", "<think> and"),
        (MATH + " 72.\n", "The pattern continues as follows:\nIn June"),
        (MATH + " 72.\n", "Continuing the pattern:\nIn June"),
        (MATH + " 72.\n", "Let me continue with June:\nIn June"),
        (MATH + " 72.\n", "Here is the calculation for June:\nIn June"),
        ("Solve it", " step by step:\n1. add"),
        ("We do this:\n", "Sum: 2 + 3 = 5\n"),
        ("a </partial> b", " c </partial> d"),
    ],
)
def test_right_text_is_left_alone(prefix: str, text: str) -> None:
    for transport in ("chat", "chat-turn"):
        result = clean(prefix, text, transport)
        assert result.text == text
        assert set(repairs_of(result)) <= {Repair.GLUED}


@pytest.mark.parametrize(
    ("prefix", "text", "options", "reason", "verdict"),
    [
        (SHORT, "", {}, Missing.EMPTY, Repair.NO_TEXT),
        (SHORT, " \n", {"finish_reason": "stop"}, Missing.EMPTY, Repair.NO_TEXT),
        (SHORT, "", {"reasoning_tokens": 50}, Missing.EMPTY, Repair.THOUGHT),
        (SHORT, "", {"reasoning_tokens": 50, "finish_reason": "stop"}, Missing.EMPTY, Repair.NO_TEXT),
        (SHORT, "<think>Let me see", {}, Missing.EMPTY, Repair.THOUGHT),
        (SHORT, "", {"transport": "prefill", "reasoning_tokens": 50}, Missing.EMPTY, Repair.THOUGHT),
        (SHORT, "", {"transport": "completions"}, Missing.EMPTY, Repair.NO_TEXT),
        ("", "", {"transport": "completions", "finish_reason": "stop"}, Missing.EMPTY, Repair.NO_TEXT),
        (SHORT, "Certainly!\n", {}, Missing.EMPTY, Repair.NO_TEXT),
        (SHORT, "no", {"refusal": "I cannot; help"}, Missing.REFUSED, Repair.REFUSAL),
        (SHORT, "x", {"finish_reason": "content_filter"}, Missing.REFUSED, Repair.FILTERED),
        (
            SHORT,
            "I\u2019m sorry, but I can\u2019t help with that.",
            {"finish_reason": "stop"},
            Missing.REFUSED,
            Repair.REFUSED_IN_WORDS,
        ),
        (SHORT, "I cannot assist with this.", {"finish_reason": "stop"}, Missing.REFUSED, Repair.REFUSED_IN_WORDS),
        (SHORT, "As an AI, I", {"finish_reason": "stop"}, Missing.REFUSED, Repair.REFUSED_IN_WORDS),
        (
            SHORT,
            "It looks like your message was cut off. Could you share the rest?",
            {"finish_reason": "stop"},
            Missing.REFUSED,
            Repair.REFUSED_IN_WORDS,
        ),
        ("", "I'm sorry, but I cannot do that.", {"finish_reason": "stop"}, Missing.REFUSED, Repair.REFUSED_IN_WORDS),
        (SHORT, "\0\0\0a", {}, Missing.GARBAGE, Repair.NOISE),
        (SHORT, "half a \ud83d", {}, Missing.GARBAGE, Repair.NOISE),
        (
            SHORT,
            "\N{REPLACEMENT CHARACTER}" * 3,
            {"transport": "completions"},
            Missing.GARBAGE,
            Repair.NOISE,
        ),
        (SHORT, SHORT, {}, Missing.GARBAGE, Repair.ONLY_ECHO),
        (MATH, "over the two months, Natalia sold", {"finish_reason": "stop"}, Missing.GARBAGE, Repair.ONLY_ECHO),
        (SHORT, SHORT[:12], {}, Missing.GARBAGE, Repair.CUT_ECHO),
        (MATH, MATH[:50].replace("\n", " "), {}, Missing.GARBAGE, Repair.CUT_ECHO),
        (MATH, MATH[32:70], {}, Missing.GARBAGE, Repair.CUT_ECHO),
        (SHORT, "F", {"transport": "prefill", "echoes_prefix": True}, Missing.GARBAGE, Repair.CUT_ECHO),
        (MATH, "Natalia has sold 48 clips in April. In May, she", {}, Missing.GARBAGE, Repair.STARTED_OVER),
        (
            MATH,
            "Natalia sold 48 of her clips in April.\nIn May she sold just half as many, that is 48/2",
            {},
            Missing.GARBAGE,
            Repair.STARTED_OVER,
        ),
        (SHORT, "gives 5", {"transport": "structured"}, Missing.GARBAGE, Repair.NOT_JSON),
        (SHORT, '{"continuation": 5}', {"transport": "structured"}, Missing.GARBAGE, Repair.NOT_JSON),
        (SHORT, '["continuation"]', {"transport": "structured"}, Missing.GARBAGE, Repair.NOT_JSON),
        (SHORT, "[" * 100_000, {"transport": "structured"}, Missing.GARBAGE, Repair.NOT_JSON),
        (
            SHORT,
            as_json("x")[:-1],
            {"transport": "structured", "finish_reason": "stop"},
            Missing.GARBAGE,
            Repair.NOT_JSON,
        ),
        (SHORT, "", {"transport": "structured"}, Missing.EMPTY, Repair.NO_TEXT),
    ],
)
def test_unusable_replies_say_why(
    prefix: str, text: str, options: dict[str, Any], reason: Missing, verdict: Repair
) -> None:
    result = clean(prefix, text, **options)
    assert (result.text, result.missing) == (None, reason)
    assert repairs_of(result)[-1] is verdict
    assert used_up_by_thinking(result) is (verdict is Repair.THOUGHT)


def test_refusals_are_told_from_text_that_holds_their_words() -> None:
    words = "I'm sorry, but I can't"
    assert clean(SHORT, words + " help.", finish_reason="length").text == words + " help."
    assert clean("He said: " + words + " come.\n", words + " stay.", finish_reason="stop").text == words + " stay."
    long = words + " help. " + "Still, the sum is 5. " * 20
    assert clean(SHORT, long, finish_reason="stop").text == long
    assert clean(SHORT, words + " help.", "completions", finish_reason="stop").text == words + " help."


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        (SHORT, " gives 5.\n" + END_MARKER, " gives 5."),
        (SHORT, f" gives 5.{END_MARKER}\n\nLet me know!", " gives 5."),
        (SHORT, f"```\n gives 5.\n```\n{END_MARKER}", " gives 5."),
        (SHORT, " gives 5.<end-of-ans", " gives 5."),
        (f"He wrote {END_MARKER} and", f" {END_MARKER} again {END_MARKER}", f" {END_MARKER} again"),
        (SHORT, END_MARKER, ""),
        (SHORT, f"\n{END_MARKER}\n", ""),
        (SHORT, SHORT + END_MARKER, ""),
    ],
)
def test_the_end_marker_says_that_the_answer_is_complete(prefix: str, text: str, expected: str) -> None:
    for transport in ("chat", "chat-turn"):
        result = clean(prefix, text, transport)
        assert (result.text, result.finish_reason) == (expected, "stop")
        assert Repair.END_MARKER in repairs_of(result)
        assert (repairs_of(result)[-1] is Repair.ENDED) is (expected == "")
    assert clean(prefix, as_json(text), "structured").text == expected
    assert END_MARKER in str(clean(prefix, " " + END_MARKER, "completions").text)


def test_a_teacher_that_stops_at_once_says_that_the_answer_is_complete() -> None:
    for transport in EXACT:
        result = clean(SHORT, "", transport, finish_reason="stop")
        assert (result.text, result.missing) == ("", None)
        assert result.detail == "the teacher ended the answer here"
    assert clean(SHORT, SHORT, "prefill", echoes_prefix=True, finish_reason="stop").text == ""


@pytest.mark.parametrize(
    "command", ["frac", "beta", "times", "right", "theta", "binom", "nabla", "neq", "forall", "rangle"]
)
def test_latex_that_json_read_as_control_characters_is_restored(command: str) -> None:
    text = f" = \\{command} 5"
    result = clean(LATEX, f'{{"continuation": "{text}"}}', "structured")
    assert (result.text, repairs_of(result)) == (text, (Repair.BACKSLASHES,))


@pytest.mark.parametrize("text", [" \\sqrt{2}", " \\(x\\)", " \\underline{x}", " \\alpha \\text{so}", " \\\\alpha"])
def test_backslashes_that_are_no_json_are_kept(text: str) -> None:
    # The last holds two, as JSON wants it: one is meant.
    result = clean(LATEX, f'{{"continuation": "{text}"}}', "structured")
    assert result.text == text.replace("\\\\", "\\")


def test_json_is_read_from_fences_and_with_raw_line_breaks() -> None:
    fenced = clean(LATEX, f"```json\n{as_json(NEXT)}\n```", "structured")
    assert (fenced.text, repairs_of(fenced)) == (NEXT, (Repair.FENCE,))
    raw = clean(LATEX, '{"continuation": " a\nb"}', "structured")
    assert (raw.text, repairs_of(raw)) == (" a\nb", (Repair.RAW_JSON,))
    echoed = clean(MATH, as_json(MATH + NEXT), "structured")
    assert (echoed.text, repairs_of(echoed)) == (NEXT, (Repair.ECHO,))


def test_an_answer_from_the_start_is_left_as_it_is() -> None:
    for transport in ASKED:
        for text in ("Sure, here is the answer:\n5", '"5"', "```\n5\n```", "{5}", "5 " + END_MARKER):
            result = clean("", text, transport)
            assert (result.text, result.detail, result.is_exact) == (text, "", True)


def test_only_a_model_that_was_asked_to_go_on_is_not_exact() -> None:
    assert all(clean("2+2=", "4", transport).is_exact for transport in EXACT)
    assert not any(clean("2+2=", "4", transport).is_exact for transport in ("chat", "chat-turn"))
    assert not clean("2+2=", as_json("4"), "structured").is_exact


def test_other_failures_hold_no_repairs() -> None:
    failed = Continuation(text=None, missing=Missing.FAILED, detail="error 500; code fence taken off")
    assert repairs_of(failed) == ()
    assert repairs_of(Continuation(text="5")) == ()
    own_words = clean(SHORT, "x", refusal="no; quotes taken off")
    assert repairs_of(own_words) == (Repair.REFUSAL,)


# Short alphabets make repetitions, overlaps, wrappers and whitespace at the joint frequent.
WRAPPERS = ['"', "'", "`", "```", "$", "**", "<partial>", "</partial>", "<b>", "<think>", "Sure:\n"]
WORDS = ["a", "b", "3", "\\", "\\frac{1}{2}", "\u00e9", "\u4e8c", "\U0001f600", "so 3 + 4 = 7. "]
PIECES = st.sampled_from([*WRAPPERS, *WORDS, " ", "  ", "\n", "\t"])
ANY = st.characters(exclude_categories=["Cs", "Cc"])
TEXTS = st.lists(PIECES, max_size=30).map("".join) | st.text(ANY, max_size=60)
VISIBLE = TEXTS.filter(str.strip)
PLAIN = st.text("abcdefgh 0123.,+\n", min_size=1, max_size=80).filter(str.strip)
MANY = settings(max_examples=500, suppress_health_check=[HealthCheck.filter_too_much])


@settings(max_examples=400)
@given(text=TEXTS, at=st.integers(0, 60), transport=st.sampled_from(EXACT))
def test_exact_transports_give_back_the_rest_of_any_text(text: str, at: int, transport: str) -> None:
    prefix, rest = text[:at], text[at:]
    # Token ids are handed over whole; everywhere else whitespace at the end of the prefix is held back.
    answer = rest if transport == "tokens" else text[len(sent_prefix(prefix)) :]
    result = clean(prefix, answer, transport, finish_reason="stop")
    assert result.text == (None if not rest and not prefix else rest)
    assert set(repairs_of(result)) <= {Repair.ENDED, Repair.NO_TEXT}


@MANY
@given(prefix=VISIBLE, rest=VISIBLE, transport=st.sampled_from([*sorted(ASKED), "prefill"]))
def test_echoed_answers_give_back_the_rest_of_any_text(prefix: str, rest: str, transport: str) -> None:
    # The closing tag of the quotation ends a reply, as it does where the server takes it as a stop sequence; so do
    # the end marker and its beginning where the limit cut it.
    assume(f"</{partial_tag(prefix)}>" not in rest and "<end-" not in rest)
    text = prefix + rest
    reply = as_json(text) if transport == "structured" else text
    assert clean(prefix, reply, transport, echoes_prefix=True).text == rest


@MANY
@given(prefix=PLAIN, rest=PLAIN, size=st.integers(8, 80))
def test_an_echo_of_the_end_is_cut(prefix: str, rest: str, size: int) -> None:
    sent, held_back = sent_prefix(prefix), prefix[len(sent_prefix(prefix)) :]
    echo = sent[-size:]
    reply = echo + held_back + rest
    assume(len(echo) >= 8 and echo[0].isalnum())
    # Only where one cut is possible: nothing longer fits, the prefix is no loop, and it does not begin as it ends.
    longest = max(k for k in range(1, min(len(sent), len(reply)) + 1) if sent.endswith(reply[:k]))
    assume(longest == len(echo) and not _is_loop(sent, longest) and not is_cut_echo(sent, reply, True))
    assume(echo == sent or not sent.lstrip().startswith(echo))
    result = clean(prefix, reply)
    assert result.text == rest
    assert repairs_of(result)[0] in (Repair.ECHO, Repair.END_ECHO)


@MANY
@given(prefix=VISIBLE, rest=VISIBLE)
def test_structured_is_chat_in_json(prefix: str, rest: str) -> None:
    chat, structured = clean(prefix, rest), clean(prefix, as_json(rest), "structured")
    assert (structured.text, structured.missing, structured.detail) == (chat.text, chat.missing, chat.detail)


@settings(max_examples=400)
@given(
    rest=st.lists(st.sampled_from([" ", "\n", "7", "x", "\\frac{1}", "\\neq", '"', "\\", "\U0001f600"])).map("".join)
)
def test_structured_keeps_every_character(rest: str) -> None:
    assume(rest.strip() and not rest.lstrip().startswith('"'))
    for prefix in ("We have", "We have \n"):
        held_back = prefix[len(sent_prefix(prefix)) :]
        assert clean(prefix, as_json(held_back + rest), "structured").text == rest


@settings(max_examples=400)
@given(rest=st.text('ab\\"\n\u00e9\U0001f600 ', min_size=1, max_size=30), at=st.integers(0, 200))
def test_json_cut_anywhere_gives_the_text_so_far(rest: str, at: int) -> None:
    whole = "x" + rest  # No quotes around the whole.
    text = as_json(whole)
    start = len('{"continuation": "x')
    result = clean("We have,", text[: start + at], "structured")
    assert result.text is not None and whole.startswith(result.text)
    # An escape has at most 12 characters, two halves of an emoji; at least all before the cut one is there.
    assert len(json.dumps(result.text)) - 2 >= min(at, len(text) - start - 2) + 1 - 11


@settings(max_examples=600)
@given(
    prefix=TEXTS,
    text=TEXTS,
    transport=st.sampled_from(["chat", "chat-turn", *EXACT]),
    finish=st.sampled_from(["stop", "length"]),
)
def test_no_repair_invents_a_character(prefix: str, text: str, transport: str, finish: str) -> None:
    result = clean(prefix, text, transport, finish_reason=finish)
    if result.text is not None:
        assert result.text in text
        names = repairs_of(result)
        assert len(set(names)) == len(names)
        assert "; ".join(names) == result.detail
    else:
        assert repairs_of(result)
    assert clean(prefix, text, transport, finish_reason=finish) == result


@settings(max_examples=300)
@given(head=st.text("ab", min_size=1, max_size=30), tail=st.text("ab", max_size=30))
def test_the_longest_overlap_is_found_in_linear_time(head: str, tail: str) -> None:
    assert _border(head, tail) == max(k for k in range(len(head) + 1) if tail.endswith(head[:k]))


def test_loops_are_searched_without_stalling() -> None:
    prefix, echo = "b" + "ab" * 5_000 + "c", "ab" * 20 + "c"  # Each of 5,000 places could begin the echo.
    assert after_echo(prefix, echo + " so") == ("end", " so")
    assert after_echo(prefix, "ab" * 4_000) is None
