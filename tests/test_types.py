"""The values: what they refuse, what they add up to, and that they survive the disk."""

from __future__ import annotations

import dataclasses
import json

import pytest

import tiny
from omniopd.errors import DataError
from omniopd.types import (
    Audit,
    Author,
    Chunk,
    ChunkScore,
    Continuation,
    FinishReason,
    Missing,
    SoftTarget,
    StepContext,
    TeacherContinuations,
    TokenSignal,
    Update,
    Usage,
)


def full_signal() -> TokenSignal:
    """Return a signal with every field set and all kinds of values in it."""
    rollout = tiny.rollout(
        "1+2=3",
        entropies=(0.5, 0.25, 1.0, 0.0, 0.125, 2.0),
        sampler_logprobs=(-0.5, -1.0, -0.25, 0.0, -3.0, -0.125),
        policy_versions=(0, 0, 1, 1, 1, 1),
        is_correct=True,
    )
    chunk = Chunk(rollout_id=rollout.id, index=0, start=2, end=4, prefix="1+", text="2=")
    continuations = (
        Continuation(text="2=", finish_reason="length", detail="echo of the prefix cut"),
        Continuation(text=None, missing=Missing.REFUSED, detail="stopped by a content filter"),
    )
    usage = Usage(requests=1, input_tokens=7, output_tokens=2, cost_usd=0.25, cached_requests=3)
    audit = Audit(
        chunk=chunk,
        continuations=TeacherContinuations(
            chunk=chunk, continuations=continuations, teacher_id="scripted:tiny", usage=usage, seconds=0.5
        ),
        score=ChunkScore(chunk=chunk, value=0.75, similarities=(0.75,), scorer_id="edit"),
        weight=0.5,
    )
    return TokenSignal(
        rollout=rollout,
        advantages=(0.0, 0.0, 0.5, 0.5, 0.0, 0.0),
        pg_weights=(0.0, 0.0, 1.0, 1.0, 0.0, 0.0),
        anchor_weights=(0.125, 0.125, 0.0, 0.0, 0.125, 0.125),
        kl_weights=(1.0,) * 6,
        ce_weights=(0.0,) * 6,
        soft_targets=(SoftTarget(position=2, token_ids=(5, 9), probs=(0.25, 0.25), self_weight=0.5),),
        audits=(audit,),
        notes=("dropped: hit the length limit",),
    )


def test_a_whole_signal_survives_the_disk() -> None:
    signal = full_signal()
    again = TokenSignal.from_json(json.loads(json.dumps(signal.to_json())))
    assert again == signal
    assert again.rollout.finish_reason is FinishReason.STOP
    assert again.rollout.author is Author.STUDENT
    assert again.audits[0].continuations.continuations[1].missing is Missing.REFUSED
    assert hash(again) == hash(signal)


def test_other_values_survive_the_disk() -> None:
    update = Update(step=3, policy_version=3, loss=0.5, grad_norm=1.0, learning_rate=1e-6, metrics={"loss/pg": 0.5})
    assert Update.from_json(json.loads(json.dumps(update.to_json()))) == update
    bare = tiny.rollout("1")
    assert type(bare).from_json(bare.to_json()) == bare
    assert bare.to_json()["entropies"] is None


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(DataError, match="StepContext has no field stepp; it has num_steps, seed, step"):
        StepContext.from_json({"stepp": 1, "num_steps": 2})


@pytest.mark.parametrize("field", ["advantages", "pg_weights", "anchor_weights", "kl_weights", "ce_weights"])
def test_streams_are_as_long_as_the_rollout(field: str) -> None:
    with pytest.raises(DataError, match=rf"TokenSignal of p0/0\.{field} has 2 entries, expected 6"):
        dataclasses.replace(full_signal(), **{field: (0.0, 0.0)})


@pytest.mark.parametrize("field", ["char_starts", "sampler_logprobs", "entropies", "policy_versions"])
def test_figures_of_a_rollout_are_as_long_as_it(field: str) -> None:
    with pytest.raises(DataError, match=rf"Rollout p0/0\.{field} has 1 entries, expected 6"):
        dataclasses.replace(full_signal().rollout, **{field: (0,)})


def test_advantages_and_their_weights_go_together() -> None:
    for field in ("advantages", "pg_weights"):
        with pytest.raises(DataError, match="go together"):
            dataclasses.replace(full_signal(), **{field: None})


def test_text_between_follows_the_starts() -> None:
    rollout = dataclasses.replace(tiny.rollout("1+2=3"), char_starts=(0, 1, 1, 3, 4, 5))
    # Token 1 shares its character with token 2, which owns the text.
    assert [rollout.text_between(t, t + 1) for t in range(6)] == ["1", "", "+2", "=", "3", ""]
    assert rollout.text_between(1, 4) == "+2="
    assert rollout.text_between(0, 6) == rollout.text_between(0, 99) == "1+2=3"
    assert rollout.text_between(6, 9) == ""


def test_chunks_are_not_empty() -> None:
    for start, end in ((2, 2), (3, 1), (-1, 2)):
        with pytest.raises(DataError, match="empty range"):
            Chunk(rollout_id="r", index=0, start=start, end=end, prefix="", text="")
    assert full_signal().audits[0].chunk.num_tokens == 2


def test_usage_adds_up() -> None:
    one = Usage(requests=1, input_tokens=10, output_tokens=4, cost_usd=0.25, cached_requests=2)
    two = Usage(requests=2, input_tokens=5, output_tokens=1, cost_usd=0.5)
    total = Usage(requests=3, input_tokens=15, output_tokens=5, cost_usd=0.75, cached_requests=2)
    assert one + two == total


def test_an_unknown_price_stays_unknown() -> None:
    priced, unpriced = Usage(requests=1, cost_usd=0.25), Usage(requests=1)
    assert (priced + unpriced).cost_usd is None
    assert (unpriced + priced).cost_usd is None
    assert (unpriced + unpriced).cost_usd is None
    # Nothing asked costs nothing, whatever the price.
    assert (Usage() + priced).cost_usd == (priced + Usage(cached_requests=3)).cost_usd == 0.25
    assert (Usage() + Usage()).cost_usd is None


def test_a_continuation_has_text_or_a_reason() -> None:
    with pytest.raises(DataError, match="either text or a reason"):
        Continuation(text=None)
    with pytest.raises(DataError, match="either text or a reason"):
        Continuation(text="a", missing=Missing.EMPTY)
    assert Continuation(text="").text == ""


def test_a_score_has_a_value_or_a_reason() -> None:
    score = full_signal().audits[0].score
    with pytest.raises(DataError, match="a value or a reason"):
        dataclasses.replace(score, value=None)
    with pytest.raises(DataError, match="a value or a reason"):
        dataclasses.replace(score, missing=Missing.TIMEOUT)
    both = dataclasses.replace(score, similarities=(0.75, 0.5))
    assert (both.evidence, both.num_continuations) == (1.25, 2)


def test_continuations_are_sorted_into_texts_and_reasons() -> None:
    evidence = full_signal().audits[0].continuations
    assert evidence.texts == ("2=",)
    assert evidence.missing_reasons == (Missing.REFUSED,)


def test_values_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        full_signal().rollout.text = "1"  # type: ignore[misc]
