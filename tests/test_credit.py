"""From evidence to token signals: numbers by hand, expectations by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest

import tiny
from omniopd.errors import ConfigError
from omniopd.signals.credit import (
    AuditedRollout,
    CenteredTarget,
    ChunkCredit,
    RawAgreement,
    SmoothedTarget,
    TeacherText,
)
from omniopd.types import (
    Audit,
    Chunk,
    ChunkScore,
    Continuation,
    Missing,
    Rollout,
    SoftTarget,
    TeacherContinuations,
)

VOCABULARY = tiny.Vocabulary()


def audit(
    rollout: Rollout,
    start: int,
    end: int,
    similarities: Sequence[float] = (),
    continuations: Sequence[Continuation] = (),
) -> Audit:
    """Make an audit; without similarities there is no evidence."""
    chunk = Chunk(
        rollout_id=rollout.id,
        index=0,
        start=start,
        end=end,
        prefix=rollout.text_between(0, start),
        text=rollout.text_between(start, end),
    )
    known = len(similarities) > 0
    return Audit(
        chunk=chunk,
        continuations=TeacherContinuations(chunk=chunk, continuations=tuple(continuations), teacher_id="t"),
        score=ChunkScore(
            chunk=chunk,
            value=sum(similarities) / len(similarities) if known else None,
            similarities=tuple(similarities),
            scorer_id="edit",
            missing=None if known else Missing.TIMEOUT,
        ),
    )


def audited(*audits: Audit, rollout: Rollout, logprobs: Sequence[float] | None = None) -> AuditedRollout:
    given = tuple(logprobs) if logprobs is not None else (-0.5,) * rollout.num_tokens
    return AuditedRollout(rollout=rollout, audits=audits, logprobs=given)


def weights(credits: Sequence[Sequence[ChunkCredit]]) -> list[list[float | None]]:
    return [[credit.weight for credit in row] for row in credits]


ROLLOUT = tiny.rollout("1+2=3;#3")


# The published target


def test_smoothed_target_by_hand() -> None:
    # Ten continuations, k = 4; b = exp(-(.1 + .3 + .2)/3) = .818731; w = (4 + b)/11 = .438066
    chunk = audit(ROLLOUT, 2, 5, (0.4,) * 10)
    logprobs = (-9.0, -9.0, -0.1, -0.3, -0.2, -9.0, -9.0, -9.0, -9.0)
    [[credit]] = SmoothedTarget().assign([audited(chunk, rollout=ROLLOUT, logprobs=logprobs)], VOCABULARY)
    assert credit.weight == pytest.approx(0.438066, abs=5e-7)
    assert credit.soft_targets == ()


@pytest.mark.parametrize(("similarity", "bound"), [(0.0, 0.074430), (1.0, 0.983521)])
def test_smoothed_target_stays_inside_its_bounds(similarity: float, bound: float) -> None:
    chunk = audit(ROLLOUT, 0, 3, (similarity,) * 10)
    logprobs = (-0.1, -0.3, -0.2, *(-9.0,) * 6)
    [[credit]] = SmoothedTarget().assign([audited(chunk, rollout=ROLLOUT, logprobs=logprobs)], VOCABULARY)
    assert credit.weight == pytest.approx(bound, abs=5e-7)


def test_alpha_is_the_weight_of_the_prior() -> None:
    chunk = audited(audit(ROLLOUT, 0, 2, (1.0, 0.5)), rollout=ROLLOUT, logprobs=(0.0,) * 9)
    # b = 1: (1.5 + 4)/(2 + 4)
    assert weights(SmoothedTarget(alpha=4.0).assign([chunk], VOCABULARY)) == [[pytest.approx(5.5 / 6)]]
    with pytest.raises(ConfigError, match="alpha must be positive, got 0"):
        SmoothedTarget(alpha=0)


def test_lost_continuations_are_not_counted_as_disagreement() -> None:
    # Two of ten came back: (1.6 + b)/3 with b = exp(-.5), not (1.6 + b)/11.
    chunk = audited(audit(ROLLOUT, 0, 2, (0.8, 0.8)), rollout=ROLLOUT)
    assert weights(SmoothedTarget().assign([chunk], VOCABULARY)) == [[pytest.approx((1.6 + math.exp(-0.5)) / 3)]]


@pytest.mark.parametrize("credit", [SmoothedTarget(), RawAgreement(), CenteredTarget(), TeacherText()])
def test_a_chunk_without_evidence_has_no_credit(credit: SmoothedTarget) -> None:
    rows = [
        audited(audit(ROLLOUT, 0, 2), audit(ROLLOUT, 3, 5, (0.5,)), rollout=ROLLOUT),
        audited(rollout=ROLLOUT),
        audited(audit(ROLLOUT, 0, 2, (0.25,)), rollout=ROLLOUT),
    ]
    table = credit.assign(rows, VOCABULARY)
    assert [len(row) for row in table] == [2, 0, 1]
    assert table[0][0] == ChunkCredit()


def test_raw_agreement_is_the_mean_similarity() -> None:
    chunk = audited(audit(ROLLOUT, 0, 2, (1.0, 0.5, 0.0)), rollout=ROLLOUT)
    assert weights(RawAgreement().assign([chunk], VOCABULARY)) == [[0.5]]


# The baseline


def test_centered_target_subtracts_the_mean_of_other_rollouts() -> None:
    b = math.exp(-0.5)
    rows = [
        audited(audit(ROLLOUT, 0, 2, (1.0,)), audit(ROLLOUT, 3, 5, (0.6,)), rollout=ROLLOUT),
        audited(audit(ROLLOUT, 0, 2, (0.2,)), audit(ROLLOUT, 2, 4), rollout=ROLLOUT),
        audited(audit(ROLLOUT, 0, 2, (0.4,)), rollout=ROLLOUT),
        audited(rollout=ROLLOUT),
    ]
    # w = (k + b)/2; the b/2 of all chunks cancel. First rollout: minus (.1 + .2)/2; second: minus (.5 + .3 + .2)/3;
    # third: minus (.5 + .3 + .1)/3.
    expected = [[0.5 - 0.15, 0.3 - 0.15], [0.1 - 1 / 3, None], [0.2 - 0.3], []]
    table = weights(CenteredTarget().assign(rows, VOCABULARY))
    assert [[w is None for w in row] for row in table] == [[w is None for w in row] for row in expected]
    flat = [w for row in table for w in row if w is not None]
    assert flat == pytest.approx([w for row in expected for w in row if w is not None])
    # The prior enters through alpha: with a tiny one only the agreement is left.
    assert weights(CenteredTarget(alpha=1e-9).assign(rows, VOCABULARY))[2] == [pytest.approx(0.4 - 1.8 / 3)]
    assert b > 0


def test_centered_weights_of_equal_rollouts_add_up_to_zero() -> None:
    rows = [audited(audit(ROLLOUT, 0, 2, (s,)), rollout=ROLLOUT) for s in (0.1, 0.9, 0.4, 0.75)]
    assert sum(w or 0 for [w] in weights(CenteredTarget().assign(rows, VOCABULARY))) == pytest.approx(0, abs=1e-12)


def test_a_single_audited_rollout_has_no_baseline() -> None:
    rows = [
        audited(audit(ROLLOUT, 0, 2, (0.5,)), audit(ROLLOUT, 3, 5, (0.9,)), rollout=ROLLOUT),
        audited(audit(ROLLOUT, 0, 2), rollout=ROLLOUT),
    ]
    assert weights(CenteredTarget().assign(rows, VOCABULARY)) == [[None, None], [None]]


def expected_gradient(credit: SmoothedTarget | CenteredTarget, num_chunks: int) -> tuple[list[float], float]:
    """Enumerate a bandit: four rollouts of `num_chunks` one-token chunks, two actions, P = (.7, .3) everywhere.

    The second chunk is agreed with only after the first action: what a rollout did early changes its later weights.
    Returns the mean gradient on the first action's logit of chunk 0, chunk 1..., and the variance of chunk 0's.
    """
    probs = (0.7, 0.3)
    rollout = tiny.rollout("1" * num_chunks)
    means, second = [0.0] * num_chunks, 0.0
    plays = list(itertools.product((0, 1), repeat=num_chunks))
    for group in itertools.product(plays, repeat=4):
        chance = math.prod(probs[a] for play in group for a in play)
        rows = []
        for play in group:
            agreement = [0.9 if play[0] == 0 else 0.2]
            agreement += [0.8 if play[0] == 0 and a == 1 else 0.1 for a in play[1:]]
            rows.append(
                audited(
                    *(audit(rollout, c, c + 1, (s,)) for c, s in enumerate(agreement)),
                    rollout=rollout,
                    logprobs=(*(math.log(probs[a]) for a in play), 0.0),
                )
            )
        credits = credit.assign(rows, VOCABULARY)
        for c in range(num_chunks):
            # d log P(a) / d logit_0 = [a = 0] - P(0), summed over the rollouts
            gradient = sum(
                (row[c].weight or 0.0) * ((play[c] == 0) - probs[0]) for row, play in zip(credits, group, strict=True)
            )
            means[c] += chance * gradient
            second += chance * gradient**2 if c == 0 else 0.0
    return means, second - means[0] ** 2


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_the_baseline_keeps_the_expected_gradient_and_lowers_its_variance(num_chunks: int) -> None:
    plain, plain_variance = expected_gradient(SmoothedTarget(), num_chunks)
    centered, centered_variance = expected_gradient(CenteredTarget(), num_chunks)
    assert abs(plain[0]) > 0.01
    assert centered == pytest.approx(plain, abs=1e-12)
    assert centered_variance < plain_variance


# The teacher's text


def said(text: str | None, finish_reason: str = "length") -> Continuation:
    if text is None:
        return Continuation(text=None, missing=Missing.TIMEOUT)
    return Continuation(text=text, finish_reason=finish_reason)


def teacher_text(
    texts: Sequence[Continuation], *, rollout: Rollout = ROLLOUT, start: int = 3, end: int = 6, prior: float = 1.0
) -> tuple[SoftTarget, ...]:
    chunk = audit(rollout, start, end, (0.5,), texts)
    [[credit]] = TeacherText(prior=prior).assign([audited(chunk, rollout=rollout)], VOCABULARY)
    assert credit.weight is None
    return credit.soft_targets


def shares(target: SoftTarget) -> dict[str, float]:
    """Return the shares by character; the end token is '$', the student's own share 'P'."""
    names = {i: c for i, c in enumerate(("<pad>", "$", "<unk>", *tiny.CHARACTERS))}
    return {names[i]: p for i, p in zip(target.token_ids, target.probs, strict=True)} | {"P": target.self_weight}


def test_counts_of_the_continuations_that_still_agree() -> None:
    # The student wrote "=3;" after "1+2". Four continuations and a prior of 1.
    targets = teacher_text([said("=3;"), said("=4;"), said("=3#"), said("-1;")])
    assert [t.position for t in targets] == [3, 4, 5]
    assert shares(targets[0]) == pytest.approx({"=": 3 / 5, "-": 1 / 5, "P": 1 / 5})
    # Three go on with "=": two say 3, one 4.
    assert shares(targets[1]) == pytest.approx({"3": 2 / 4, "4": 1 / 4, "P": 1 / 4})
    assert shares(targets[2]) == pytest.approx({";": 1 / 3, "#": 1 / 3, "P": 1 / 3})


@pytest.mark.parametrize("prior", [0.0, 0.5, 3.0])
def test_shares_add_up_to_one(prior: float) -> None:
    for target in teacher_text([said("=3;"), said("=4;"), said("-1"), said(None)], prior=prior):
        assert sum(target.probs) + target.self_weight == pytest.approx(1)
        assert target.self_weight > 0 if prior else target.self_weight == 0


def test_a_prior_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="prior must be 0 or more"):
        TeacherText(prior=-1)


def test_targets_end_with_the_last_agreeing_continuation() -> None:
    # All leave at the second token: it is the last one with evidence.
    targets = teacher_text([said("=4;"), said("=5;")], prior=0.0)
    assert [shares(t) for t in targets] == [{"=": 1.0, "P": 0.0}, {"4": 0.5, "5": 0.5, "P": 0.0}]


def test_an_answer_that_ends_says_end_token_and_one_cut_off_says_nothing() -> None:
    ended = teacher_text([said("=3", "stop"), said("=3;")], prior=0.0)
    assert shares(ended[2]) == {"$": 0.5, ";": 0.5, "P": 0.0}
    cut = teacher_text([said("=3", "length"), said("=3;")], prior=0.0)
    assert shares(cut[2]) == {";": 1.0, "P": 0.0}
    # Nothing at all, and an end: the teacher says that the answer is complete here.
    assert [shares(t) for t in teacher_text([said("", "stop")], prior=0.0)] == [{"$": 1.0, "P": 0.0}]
    assert teacher_text([said("", "length")]) == ()


def test_agreement_with_the_end_token_of_the_student() -> None:
    # "#3" and the end token are the last three tokens.
    targets = teacher_text([said("#3", "stop"), said("#3;", "length")], start=6, end=9, prior=0.0)
    assert shares(targets[2]) == {"$": 0.5, ";": 0.5, "P": 0.0}


def test_a_missing_continuation_has_no_vote() -> None:
    assert teacher_text([said(None), said("=3;")]) == teacher_text([said("=3;")])


class Words:
    """A vocabulary of whole pieces, longest first; unknown text encodes to nothing."""

    end_id = 1
    end_ids = frozenset({1})
    pieces = ("", "$", "", "the", "re", "for", "e", "fore", " the", "t", "h", " ", "f", "o", "r")

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            found = [i for i, piece in enumerate(self.pieces) if i > 2 and text.startswith(piece)]
            if not found:
                return ids
            ids.append(max(found, key=lambda i: len(self.pieces[i])))
            text = text[len(self.pieces[ids[-1]]) :]
        return ids


def worded(*ids: int) -> Rollout:
    texts = [Words.pieces[i] for i in ids]
    starts = [0, *itertools.accumulate(len(t) for t in texts)][:-1]
    return dataclasses.replace(tiny.rollout_of(ids), text="".join(texts), char_starts=tuple(starts))


def votes(rollout: Rollout, *texts: Continuation, start: int = 0) -> list[dict[str, float]]:
    chunk = audit(rollout, start, rollout.num_tokens, (0.5,), texts)
    [[credit]] = TeacherText(prior=0.0).assign([audited(chunk, rollout=rollout)], Words())
    return [{Words.pieces[i]: p for i, p in zip(t.token_ids, t.probs, strict=True)} for t in credit.soft_targets]


def test_tokens_of_several_characters() -> None:
    # The student wrote the|re|for|e; the continuations say therefore, there, theft.
    found = votes(worded(3, 4, 5, 6), said("therefore"), said("therefo"), said("thefor"))
    assert found[0] == {"the": 1.0}
    # "for" is the only text left of the third and may be the head of a longer word: no vote.
    assert found[1] == {"re": 1.0}
    # Of "fore" the student's own piece counts; "fo" is cut off, and its last piece is not known: f, then o.
    assert found[2] == {"for": 0.5, "f": 0.5}
    assert found[3] == {"e": 1.0}


def test_a_cut_off_last_piece_is_ignored_unless_the_teacher_ended_there() -> None:
    rollout = worded(3, 6)
    assert votes(rollout, said("thefor", "length")) == [{"the": 1.0}]
    assert votes(rollout, said("thefor", "stop")) == [{"the": 1.0}, {"for": 1.0}]
    # One character cannot be cut.
    assert votes(rollout, said("thef", "length")) == [{"the": 1.0}, {"f": 1.0}]


def by_chat(text: str, finish_reason: str = "stop") -> Continuation:
    """What a chat model wrote that was only asked to go on."""
    return Continuation(text=text, finish_reason=finish_reason, is_exact=False)


def test_whitespace_that_a_chat_model_leaves_out_at_the_joint_is_not_held_against_the_student() -> None:
    rollout = worded(5, 8, 4)  # for| the|re, audited from " the"
    assert votes(rollout, by_chat("there"), start=1) == [{" the": 1.0}, {"re": 1.0}]
    # A server that goes on from the prefix itself means what it writes: "the" without a space.
    assert votes(rollout, said("there"), start=1) == [{"the": 1.0}]
    # Whitespace that is there is not doubled, and none is added where the student wrote none.
    assert votes(rollout, by_chat(" there"), start=1) == [{" the": 1.0}, {"re": 1.0}]
    assert votes(worded(3, 4), by_chat("there")) == [{"the": 1.0}, {"re": 1.0}]


def test_the_end_of_a_chat_reply_is_not_the_end_of_the_answer() -> None:
    rollout = worded(3, 6)  # the|e
    assert votes(rollout, said("the", "stop")) == [{"the": 1.0}, {"$": 1.0}]
    assert votes(rollout, by_chat("the")) == [{"the": 1.0}]
    # Nor does it tell that its last word is whole.
    assert votes(rollout, by_chat("thefor")) == [{"the": 1.0}]


def test_text_that_the_student_cannot_write_has_no_vote() -> None:
    assert votes(worded(3, 6), said("!!"), said("thee")) == [{"the": 1.0}, {"e": 1.0}]


class Bytes:
    """Token = byte + 3: every character outside ASCII is split."""

    end_id = 1
    end_ids = frozenset({1})

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]


def test_the_tokens_of_a_split_character_are_voted_one_by_one() -> None:
    student, other = "\N{GRINNING FACE}", "\N{GRINNING CAT FACE WITH SMILING EYES}"
    ids = Bytes().encode(student + "a")
    # Both share the first two bytes, f0 9f, and part at the third.
    assert Bytes().encode(other)[:2] == ids[:2] and Bytes().encode(other)[2] == ids[2]
    rollout = dataclasses.replace(tiny.rollout_of(ids), text=student + "a", char_starts=(0, 0, 0, 0, 1))
    texts = [said(student + "a"), said(other + "b"), said("a")]
    chunk = audit(rollout, 0, 5, (0.5,), texts)
    [[credit]] = TeacherText(prior=0.0).assign([audited(chunk, rollout=rollout)], Bytes())
    found = [dict(zip(t.token_ids, t.probs, strict=True)) for t in credit.soft_targets]
    last, last_of_other = ids[3], Bytes().encode(other)[3]
    assert found == [
        {ids[0]: pytest.approx(2 / 3), ord("a") + 3: pytest.approx(1 / 3)},
        {ids[1]: 1.0},
        {ids[2]: 1.0},
        {last: 0.5, last_of_other: 0.5},
        {ord("a") + 3: 1.0},
    ]


def test_a_chunk_that_starts_inside_a_character() -> None:
    student = "\N{GRINNING FACE}"
    ids = Bytes().encode(student)
    rollout = dataclasses.replace(tiny.rollout_of(ids), text=student, char_starts=(0, 0, 0, 0))
    texts = [said(student), said("a", "stop"), said("", "stop")]
    chunk = audit(rollout, 2, 4, (0.5,), texts)
    [[credit]] = TeacherText(prior=0.0).assign([audited(chunk, rollout=rollout)], Bytes())
    # The student has begun another character than the "a" of the teacher, which then has nothing to say.
    found = [dict(zip(t.token_ids, t.probs, strict=True)) for t in credit.soft_targets]
    assert found == [{ids[2]: 1.0}, {ids[3]: 1.0}]


def test_a_token_without_text_before_the_chunk_is_no_part_of_its_first_character() -> None:
    ids = [tiny.EOS, *tiny.encode("12")]
    rollout = dataclasses.replace(tiny.rollout_of(ids), text="12", char_starts=(0, 0, 1))
    targets = teacher_text([said("12"), said("32")], rollout=rollout, start=1, end=3, prior=0.0)
    assert [shares(t) for t in targets] == [{"1": 0.5, "3": 0.5, "P": 0.0}, {"2": 1.0, "P": 0.0}]


def test_many_continuations_give_the_teachers_distribution() -> None:
    """Enumerate the teacher: the expected gradient P - target becomes P - Q at both tokens of the chunk.

    Q(first) = (.5, .3, .2) over "1", "2", "3"; Q(second | first) = (.6, .4) over "4", "5" after "1". All texts come
    in exactly these shares, which is what N -> infinity is.
    """
    first, second = {"1": 5, "2": 3, "3": 2}, {"4": 6, "5": 4}
    texts = [said(a + b) for a, n in first.items() for b, m in second.items() for _ in range(n * m)]
    rollout = tiny.rollout("14", ended=False)
    targets = teacher_text(texts, rollout=rollout, start=0, end=2, prior=0.0)
    assert shares(targets[0]) == pytest.approx({"1": 0.5, "2": 0.3, "3": 0.2, "P": 0.0})
    assert shares(targets[1]) == pytest.approx({"4": 0.6, "5": 0.4, "P": 0.0})


def test_the_expected_target_is_unbiased_with_few_continuations() -> None:
    """Over all pairs of continuations the first target's mean is Q itself; a prior only scales the step towards Q."""
    q = {"1": 0.5, "2": 0.3, "3": 0.2}
    rollout = tiny.rollout("1", ended=False)
    for prior in (0.0, 1.0):
        mean = dict.fromkeys(q, 0.0)
        own = 0.0
        for a, b in itertools.product(q, repeat=2):
            [target] = teacher_text([said(a), said(b)], rollout=rollout, start=0, end=1, prior=prior)
            found = shares(target)
            own += q[a] * q[b] * found.pop("P")
            for character, share in found.items():
                mean[character] += q[a] * q[b] * share
        # E[target] = (1 - s) Q + s P with s = prior / (2 + prior), so the gradient is (1 - s) (P - Q).
        assert own == pytest.approx(prior / (2 + prior))
        assert mean == pytest.approx({c: (1 - own) * p for c, p in q.items()})
