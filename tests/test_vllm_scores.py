"""Scores of a vLLM server: the numbers, what it refuses, and what is wrong with an answer."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopback import Received, Scripted, error
from omniopd.errors import (
    ConfigError,
    TeacherAuthError,
    TeacherConnectionError,
    TeacherRateLimitError,
    TeacherResponseError,
)
from omniopd.logits.scores import Reading, Scored, TokenScores
from omniopd.logits.vllm_scores import ScoringUsage, VllmScores, open_vllm_scores
from omniopd.types import Missing
from scoring_server import VOCABULARY, ScoringServer, logprobs_of

KEY = "a-key-of-a-user-0123"
SHORT = Reading(prompt_ids=(3,), token_ids=(1, 4))
LONG = Reading(prompt_ids=(5, 2, 7), token_ids=(0, 11, 11, 6, 2))
READINGS = (SHORT, LONG, Reading(prompt_ids=(3, 1), token_ids=(4, 9, 8)))


async def no_pause(_seconds: float) -> None:
    pass


def score(
    server: ScoringServer, readings: Sequence[Reading] = READINGS, *, top_k: int = 0, **settings: Any
) -> list[Scored]:
    async def run() -> list[Scored]:
        teacher = VllmScores(base_url=server.base_url, model="m", **{"sleep": no_pause, **settings})
        try:
            return await teacher.score(readings, top_k=top_k)
        finally:
            await teacher.aclose()

    return asyncio.run(run())


def records(scored: Sequence[Scored]) -> list[TokenScores]:
    found = [one.scores for one in scored]
    assert None not in found, [one.detail for one in scored]
    return [one for one in found if one is not None]


def expected(reading: Reading, model: Callable[..., Any] = logprobs_of) -> Any:
    """Return log-probs [T, V] of the completion's positions, straight from the model."""
    table = model(reading.prompt_ids + reading.token_ids)
    return table[len(reading.prompt_ids) - 1 : -1]


def own(reading: Reading) -> Any:
    return np.take_along_axis(expected(reading), np.array(reading.token_ids)[:, None], axis=1)[:, 0]


def requesting(reading: Reading, *rows: Sequence[int]) -> Reading:
    return Reading(prompt_ids=reading.prompt_ids, token_ids=reading.token_ids, requested_TK=np.array(rows))


def test_every_token_gets_its_log_prob_after_all_before_it() -> None:
    with ScoringServer() as server:
        scored = records(score(server))
    for reading, scores in zip(READINGS, scored, strict=True):
        np.testing.assert_allclose(scores.logprobs_T, own(reading), atol=1e-6)
        assert scores.known is None and scores.ids_TK is None
    bodies = {tuple(received.body["prompt"]): received.body for received in server.received}
    assert bodies.keys() == {reading.prompt_ids + reading.token_ids for reading in READINGS}
    sent = bodies[(3, 1, 4)]
    salt = sent.pop("cache_salt")
    assert sent == {
        "model": "m",
        "prompt": [3, 1, 4],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
        "add_special_tokens": False,
    }
    # No request may read what another computed.
    assert len({salt, *(body.get("cache_salt", salt) for body in bodies.values())}) == len(READINGS)


def halves(ids: Sequence[int]) -> Any:
    """Tokens 0, 1, 2, ... with probabilities 1/2, 1/4, 1/8, ...; the last one takes the rest."""
    row = [-(i + 1) * math.log(2) for i in range(VOCABULARY - 1)]
    return np.array([[*row, row[-1]]] * len(ids))


def test_top_k_is_the_teachers_own_choice() -> None:
    # The completion's tokens: 0 is the likeliest, 4 is not among three, 2 is the last of three.
    reading = Reading(prompt_ids=(6, 7), token_ids=(0, 4, 2))
    with ScoringServer(model=halves) as server:
        (scores,) = records(score(server, [reading], top_k=3))
    assert scores.known == "teacher_top_k"
    assert scores.ids_TK is not None and scores.logprobs_TK is not None
    assert scores.ids_TK.tolist() == [[0, 1, 2]] * 3
    # log(1/2), log(1/4), log(1/8)
    np.testing.assert_allclose(scores.logprobs_TK, [[-0.693147, -1.386294, -2.079442]] * 3, atol=1e-6)
    # log(1/2), log(1/32), log(1/8)
    np.testing.assert_allclose(scores.logprobs_T, [-0.693147, -3.465736, -2.079442], atol=1e-6)


def test_top_k_holds_k_tokens_where_all_are_as_likely() -> None:
    # Every token has rank 12 by vLLM's count, the completion's own among the three and outside.
    reading = Reading(prompt_ids=(6,), token_ids=(9, 1))
    even = np.full((3, VOCABULARY), -math.log(12))
    with ScoringServer(model=lambda ids: even) as server:
        (scores,) = records(score(server, [reading], top_k=3))
    assert scores.ids_TK is not None and scores.logprobs_TK is not None
    assert sorted(scores.ids_TK[0]) == [0, 1, 2] and sorted(scores.ids_TK[1]) == [0, 1, 2]
    np.testing.assert_allclose(scores.logprobs_TK, -math.log(12), atol=1e-6)


def test_top_k_agrees_with_the_model_at_every_position() -> None:
    with ScoringServer() as server:
        for reading, scores in zip(READINGS, records(score(server, top_k=5)), strict=True):
            assert scores.ids_TK is not None and scores.logprobs_TK is not None
            order = np.argsort(-expected(reading), axis=1)[:, :5]
            assert scores.ids_TK.tolist() == order.tolist()
            np.testing.assert_allclose(
                scores.logprobs_TK, np.take_along_axis(expected(reading), order, axis=1), atol=1e-6
            )


def test_the_whole_vocabulary_comes_in_its_own_order() -> None:
    with ScoringServer(max_logprobs=-1) as server:
        scored = records(score(server, top_k=VOCABULARY, vocab_size=VOCABULARY))
    for reading, scores in zip(READINGS, scored, strict=True):
        assert scores.known == "vocabulary"
        assert scores.ids_TK is not None and scores.ids_TK.tolist() == [list(range(VOCABULARY))] * scores.num_tokens
        np.testing.assert_allclose(scores.logprobs_TK, expected(reading), atol=1e-6)
    assert {received.body["prompt_logprobs"] for received in server.received} == {-1}


def test_a_vocabulary_of_another_size_is_refused() -> None:
    with ScoringServer(max_logprobs=-1) as server, pytest.raises(ConfigError, match=r"12 tokens and vocab_size is 11"):
        score(server, top_k=11, vocab_size=11)


def test_requested_tokens_are_found_among_the_likeliest() -> None:
    # Among the three likeliest, or the completion's own token, which is always there.
    reading = requesting(Reading(prompt_ids=(6, 7), token_ids=(0, 4)), [2, 1], [4, 0])
    with ScoringServer(model=halves) as server:
        (scores,) = records(score(server, [reading], top_k=2, search_top=3))
    assert scores.known == "requested"
    assert scores.ids_TK is not None and scores.ids_TK.tolist() == [[2, 1], [4, 0]]
    # log(1/8), log(1/4); log(1/32), log(1/2)
    np.testing.assert_allclose(scores.logprobs_TK, [[-2.079442, -1.386294], [-3.465736, -0.693147]], atol=1e-6)
    assert server.received[0].body["prompt_logprobs"] == 3
    assert reading.requested_TK is not None and reading.requested_TK.flags.writeable, "the reading is not ours to lock"


def test_a_requested_token_that_is_not_among_them_makes_that_completion_missing() -> None:
    found = requesting(Reading(prompt_ids=(6, 7), token_ids=(0, 4)), [2], [4])
    lost = requesting(Reading(prompt_ids=(6, 7), token_ids=(0, 4)), [4], [4])
    with ScoringServer(model=halves) as server:
        scored = score(server, [found, lost, found], search_top=3)
    assert [one.missing for one in scored] == [None, Missing.FAILED, None]
    assert "at 1 of 2 tokens" in scored[1].detail and "--max-logprobs" in scored[1].detail


def test_no_requested_token_is_missing_in_the_whole_vocabulary() -> None:
    rows = [[11, 3, 0], [7, 8, 9], [1, 1, 2], [0, 5, 10], [6, 4, 2]]
    with ScoringServer(max_logprobs=-1) as server:
        for settings in ({"search_top": -1}, {"search_top": 50, "vocab_size": VOCABULARY}):
            (scores,) = records(score(server, [requesting(LONG, *rows)], **settings))
            np.testing.assert_allclose(
                scores.logprobs_TK, np.take_along_axis(expected(LONG), np.array(rows), axis=1), atol=1e-6
            )
    assert {received.body["prompt_logprobs"] for received in server.received} == {-1}


def test_an_id_that_no_vocabulary_has_is_never_found() -> None:
    rows = [[0], [-1]]
    with ScoringServer(max_logprobs=-1) as server:
        (scored,) = score(server, [requesting(SHORT, *rows)], search_top=-1)
    assert scored.missing is Missing.FAILED and "at 1 of 2 tokens" in scored.detail


ROWS = [[11, 3], [7, 8], [1, 1], [0, 5], [6, 4]]


def test_requested_tokens_can_be_handed_to_the_server() -> None:
    with ScoringServer(can_score_ids=True, max_logprobs=3) as server:
        (scores,) = records(score(server, [requesting(LONG, *ROWS)], requested_by="ids", api_key=KEY))
    assert scores.known == "requested" and scores.ids_TK is not None and scores.ids_TK.tolist() == ROWS
    np.testing.assert_allclose(scores.logprobs_T, own(LONG), atol=1e-6)
    np.testing.assert_allclose(
        scores.logprobs_TK, np.take_along_axis(expected(LONG), np.array(ROWS), axis=1), atol=1e-6
    )
    (received,) = server.received
    assert received.path == "/inference/v1/generate" and received.headers["authorization"] == f"Bearer {KEY}"
    sampling = received.body["sampling_params"]
    # The first scored row predicts the first token of the completion: prompt_ids has three.
    assert sampling["prompt_logprob_start"] == 2
    assert sampling["prompt_logprob_token_ids"][1] == [7, 8, 11]


def shift_scores(body: dict[str, Any]) -> dict[str, Any]:
    scores = np.load(io.BytesIO(base64.b64decode(body["prompt_token_id_logprobs"])))
    buffer = io.BytesIO()
    np.save(buffer, np.roll(scores, 1, axis=0))
    return {**body, "prompt_token_id_logprobs": base64.b64encode(buffer.getvalue()).decode()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shift_scores, "disagree about the completion's own tokens"),
        (lambda body: {**body, "prompt_token_id_logprobs": None}, "does not hold the log-probs"),
        (lambda body: {**body, "prompt_token_id_logprobs": "AAAA"}, "does not hold the log-probs"),
        (lambda body: {**body, "prompt_token_id_logprobs": ""}, "does not hold the log-probs"),
    ],
)
def test_rows_that_are_not_where_they_should_be_are_noticed(change: Callable[..., Any], words: str) -> None:
    with ScoringServer(can_score_ids=True, change=change) as server:
        (scored,) = score(server, [requesting(LONG, *ROWS)], requested_by="ids")
    assert scored.missing is Missing.FAILED and words in scored.detail


@pytest.mark.parametrize("can_score_ids", [False, None])
def test_a_server_that_takes_no_ids_is_named_with_its_option(can_score_ids: bool | None) -> None:
    with ScoringServer(can_score_ids=can_score_ids) as server, pytest.raises(ConfigError, match="--enable-scale-out"):
        score(server, [requesting(LONG, *ROWS)], requested_by="ids")


def test_more_than_the_server_allows_is_a_setting_to_change() -> None:
    with ScoringServer(max_logprobs=4) as server:
        with pytest.raises(ConfigError, match=r"max allowed: 4.*--max-logprobs"):
            score(server, top_k=5)
        with pytest.raises(ConfigError, match=r"--max-logprobs"):
            score(server, [requesting(SHORT, [1], [2])])
        assert records(score(server, top_k=4))


@pytest.mark.parametrize("max_model_len", [8, 7, 3])
def test_a_completion_that_is_too_long_is_missing_and_the_others_are_not(max_model_len: int) -> None:
    with ScoringServer(max_model_len=max_model_len) as server:
        scored = score(server, [SHORT, LONG] if max_model_len > 3 else [LONG])
    assert [one.missing for one in scored][-1] is Missing.FAILED
    assert all(one.scores is not None for one in scored[:-1])
    # Eight tokens, and the one that the server insists on writing.
    assert "--max-model-len 9" in scored[-1].detail


def test_what_vllm_writes_for_minus_infinity_is_read_as_that() -> None:
    def masked(ids: Sequence[int]) -> Any:
        table = halves(ids)
        table[:, 3] = -np.inf
        return table

    with ScoringServer(model=masked, max_logprobs=-1) as server:
        (scores,) = records(
            score(server, [Reading(prompt_ids=(1,), token_ids=(3, 0))], top_k=VOCABULARY, vocab_size=VOCABULARY)
        )
    assert scores.logprobs_T.tolist() == [-np.inf, pytest.approx(math.log(0.5))]
    assert scores.logprobs_TK is not None and np.isneginf(scores.logprobs_TK).sum(axis=1).tolist() == [1, 1]


@pytest.mark.parametrize("top_k", [0, 4])
def test_logits_are_not_taken_for_log_probs(top_k: int) -> None:
    # A server with --logprobs-mode raw_logits; with top_k 4 only their sum shows it: 4 * exp(-1) = 1.47
    shift = 5.0 if top_k == 0 else math.log(12) - 1.0
    table = np.full((3, VOCABULARY), -math.log(12) + shift)
    with ScoringServer(model=lambda ids: table) as server, pytest.raises(ConfigError, match="--logprobs-mode"):
        score(server, [SHORT], top_k=top_k)


def with_rows(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a change of an answer that changes its rows; SHORT has three: None, token 1, token 4."""

    def apply(body: dict[str, Any]) -> dict[str, Any]:
        (choice,) = body["choices"]
        return {**body, "choices": [{**choice, "prompt_logprobs": change(choice["prompt_logprobs"])}]}

    return apply


def entry(logprob: float | None) -> dict[str, Any]:
    return {"logprob": logprob, "rank": 1, "decoded_token": "a"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_rows(lambda rows: None), "holds no prompt_logprobs"),
        (lambda body: "hello", "holds no prompt_logprobs"),
        (with_rows(lambda rows: rows[:-1]), "token 4 at position 2"),
        (with_rows(lambda rows: [*rows, rows[-1]]), "goes on after the 3 tokens"),
        (with_rows(lambda rows: [None, *rows]), "token 1 at position 1"),  # The server put a token before the prompt.
        (with_rows(lambda rows: [*rows[:2], {"5": entry(-1.0)}]), "token 4 at position 2"),
        (with_rows(lambda rows: [*rows[:2], {"4": entry(None)}]), "token 4 at position 2"),
        (with_rows(lambda rows: [*rows[:2], {"4": entry(math.nan)}]), "no number"),
        (with_rows(lambda rows: [*rows[:2], {"4": entry(-1), "5": entry(-1), "6": entry(-1)}]), "0 likeliest"),
        (with_rows(lambda rows: [*rows[:2], {"4": -1.0}]), "token 4 at position 2"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_no_score(change: Callable[..., Any], words: str) -> None:
    with ScoringServer(change=change) as server:
        (scored,) = score(server, [SHORT])
        assert len(server.received) == 2, "nonsense is asked for once more, and not again"
    assert scored.missing is Missing.FAILED and words in scored.detail


def failing(*answers: Scripted) -> Callable[[Received], Scripted | None]:
    """Return what sends these answers first."""
    left = list(answers)
    lock = threading.Lock()

    def before(_received: Received) -> Scripted | None:
        with lock:
            return left.pop(0) if left else None

    return before


def test_a_busy_server_is_asked_again() -> None:
    with ScoringServer(before=failing(error(503, "starting"), Scripted(drop=True))) as server:
        (scores,) = records(score(server, [SHORT]))
        assert len(server.received) == 3
    np.testing.assert_allclose(scores.logprobs_T, own(SHORT), atol=1e-6)


def test_a_failure_after_all_attempts_is_a_reason() -> None:
    with ScoringServer(before=lambda received: error(500, "broken")) as server:
        (scored,) = score(server, [SHORT], max_attempts=3)
        assert len(server.received) == 3
    assert scored.missing is Missing.FAILED and scored.detail == "HTTP 500: broken (3 attempts)"


def test_a_server_that_is_too_slow_is_a_timeout() -> None:
    with ScoringServer(before=lambda received: Scripted(delay_s=0.4)) as server:
        (scored,) = score(server, [SHORT], timeout_s=0.1, max_attempts=1)
    assert scored.missing is Missing.TIMEOUT and "within 0.1 s" in scored.detail


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (error(401, f"bad key {KEY}"), TeacherAuthError, "check the key"),
        (error(404, "The model `m` does not exist."), TeacherResponseError, "--served-model-name"),
        (error(402, "pay"), TeacherRateLimitError, "later"),
        (error(429, "slow", headers={"retry-after": "900"}), TeacherRateLimitError, "later"),
        # Some gateways send their errors with status 200.
        (Scripted(body={"error": {"message": "who are you", "code": 401}}), TeacherAuthError, "who are you"),
    ],
)
def test_what_no_further_request_would_survive_is_raised(answer: Scripted, kind: type[Exception], words: str) -> None:
    with ScoringServer(before=lambda received: answer) as server, pytest.raises(kind, match=words) as caught:
        score(server, api_key=KEY)
    assert KEY not in str(caught.value) and caught.value.__cause__ is None


def test_a_missing_key_is_told_apart_from_a_wrong_one() -> None:
    with (
        ScoringServer(before=lambda received: error(401, "Unauthorized")) as server,
        pytest.raises(TeacherAuthError, match="api_key_env"),
    ):
        score(server)


def test_a_server_that_is_not_there_is_named_with_how_to_start_it() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    async def run() -> None:
        teacher = VllmScores(base_url=f"http://127.0.0.1:{port}/v1", model="m", sleep=no_pause)
        try:
            await teacher.score(READINGS, top_k=64)
        finally:
            await teacher.aclose()

    with pytest.raises(TeacherConnectionError, match=r"after 5 attempts") as caught:
        asyncio.run(run())
    assert f"start it with: vllm serve m --port {port} --max-logprobs 64" in str(caught.value)


def test_an_error_for_all_ends_what_is_under_way() -> None:
    def before(received: Received) -> Scripted | None:
        return error(401, "no") if received.body["prompt"] == [3, 1, 4] else Scripted(delay_s=0.3)

    async def run() -> int:
        teacher = VllmScores(base_url=server.base_url, model="m", max_concurrency=2, sleep=no_pause)
        with pytest.raises(TeacherAuthError):
            await teacher.score([SHORT, LONG, LONG, LONG, LONG])
        left = len(asyncio.all_tasks()) - 1
        await teacher.aclose()
        return left

    with ScoringServer(before=before) as server:
        assert asyncio.run(run()) == 0
        assert len(server.received) < 5, "what had not begun is not sent any more"


def test_no_more_requests_are_under_way_than_allowed() -> None:
    with ScoringServer(before=lambda received: time.sleep(0.02)) as server:
        readings = [Reading(prompt_ids=(1, i), token_ids=(2, 3)) for i in range(10)]
        scored = records(score(server, readings, max_concurrency=3))
        assert server.most_in_flight == 3
    for reading, scores in zip(readings, scored, strict=True):
        np.testing.assert_allclose(scores.logprobs_T, own(reading), atol=1e-6)


def test_a_long_answer_is_read_beside_the_event_loop() -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCABULARY, 500).tolist()
    reading = Reading(prompt_ids=tuple(ids[:20]), token_ids=tuple(ids[20:]))
    with ScoringServer(max_model_len=512) as server:
        (scores,) = records(score(server, [reading], top_k=11))
    np.testing.assert_allclose(scores.logprobs_T, own(reading), atol=1e-6)


def test_an_answer_beyond_all_bounds_is_not_asked_for() -> None:
    # 1,000 tokens with 2,001 entries of at least 50 bytes are 100 MB.
    reading = Reading(prompt_ids=(1,) * 500, token_ids=(2,) * 500)
    with ScoringServer(max_logprobs=-1, max_model_len=2000) as server:
        (scored,) = score(server, [reading], top_k=2000)
        assert server.received == []
    assert scored.missing is Missing.FAILED and "lower top_k" in scored.detail


@pytest.mark.parametrize("top_k", [0, 3])
def test_an_empty_completion_has_an_empty_record(top_k: int) -> None:
    with ScoringServer() as server:
        (scores,) = records(score(server, [Reading(prompt_ids=(1,), token_ids=())], top_k=top_k))
        assert server.received == [] and scores.num_tokens == 0
    assert (scores.known, scores.ids_TK is None) == ((None, True) if top_k == 0 else ("teacher_top_k", False))


def check(server: ScoringServer, tolerance: float = 1e-4) -> float:
    async def run() -> float:
        teacher = VllmScores(base_url=server.base_url, model="m", sleep=no_pause)
        try:
            return await teacher.check([*READINGS, Reading(prompt_ids=(8,), token_ids=(2,))], tolerance=tolerance)
        finally:
            await teacher.aclose()

    return asyncio.run(run())


def test_a_server_that_always_says_the_same_passes_the_check() -> None:
    with ScoringServer() as server:
        assert check(server) == 0.0


def test_a_server_whose_numbers_depend_on_what_it_read_before_does_not() -> None:
    seen: set[tuple[int, ...]] = set()

    def leaking(ids: Sequence[int]) -> Any:
        table = logprobs_of(ids)
        if tuple(ids) in seen:  # Its first token's numbers come from a stale cache: 0.25 nats off.
            table[0] -= 0.25
        seen.add(tuple(ids))
        return table

    with ScoringServer(model=leaking) as server:
        with pytest.raises(TeacherResponseError, match=r"0\.25 nats apart.*--no-enable-prefix-caching"):
            check(server)
        assert check(server, tolerance=0.3) < 0.3


def test_a_check_that_cannot_be_done_is_no_success() -> None:
    with (
        ScoringServer(before=lambda received: error(500, "broken")) as server,
        pytest.raises(TeacherResponseError, match="broken"),
    ):
        check(server)


def test_a_token_that_is_impossible_on_one_replica_only_fails_the_check() -> None:
    calls = iter(range(100))

    def torn(ids: Sequence[int]) -> Any:
        table = halves(ids)
        table[:, 1 if next(calls) < 4 else 2] = -np.inf
        return table

    with ScoringServer(model=torn) as server, pytest.raises(TeacherResponseError, match="inf nats apart"):
        check(server, tolerance=1e9)


def test_usage_counts_requests_and_what_they_read() -> None:
    async def run() -> tuple[ScoringUsage, ScoringUsage]:
        teacher = VllmScores(base_url=server.base_url, model="m", sleep=no_pause)
        await teacher.score([SHORT, LONG])
        first = teacher.take_usage()
        await teacher.aclose()
        return first, teacher.take_usage()

    with ScoringServer(before=failing(error(503, "wait"))) as server:
        first, second = asyncio.run(run())
    # Two answers and one refusal; 1 + 2 and 3 + 5 tokens.
    assert (first.requests, first.prompt_tokens) == (3, 11) and first.seconds > 0
    assert second == ScoringUsage()


CARD = """
id: mine
dialect: openai
base_url: http://127.0.0.1:8000/v1
api_key_env: MINE_API_KEY
can: {continuations: [completions]}
"""


def test_the_key_comes_from_the_cards_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "mine.yaml").write_text(CARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE_API_KEY", KEY)

    async def run(base_url: str) -> None:
        teacher = open_vllm_scores(f"mine:m@{base_url}", max_concurrency=2)
        assert teacher.id == "mine:m" and KEY not in repr(teacher)
        await teacher.score([SHORT])
        await teacher.aclose()

    with ScoringServer() as server:
        asyncio.run(run(server.base_url))
        assert server.received[0].headers["authorization"] == f"Bearer {KEY}"
    with pytest.raises(ConfigError, match="unencrypted"):
        open_vllm_scores("mine:m@http://example.org/v1")


def test_a_vllm_server_has_a_default_address_and_no_key() -> None:
    assert repr(open_vllm_scores("vllm:qwen")) == "VllmScores('vllm:qwen', base_url='http://127.0.0.1:8000/v1')"
    with pytest.raises(ConfigError, match="no vLLM server"):
        open_vllm_scores("anthropic:claude")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrency": 0},
        {"max_attempts": 0},
        {"vocab_size": 0},
        {"search_top": 0},
        {"search_top": -2},
        {"requested_by": "guess"},
        {"base_url": "127.0.0.1:8000"},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        VllmScores(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings})


@pytest.mark.parametrize("top_k", [-1, 13])
def test_a_top_k_that_cannot_be_is_refused(top_k: int) -> None:
    with ScoringServer() as server, pytest.raises(ConfigError, match=f"top_k is {top_k}; expected 0 to 12"):
        score(server, top_k=top_k, vocab_size=VOCABULARY)
