"""Byte-exact alignment: invariants on random cuts and tokenizers, and real vocabularies that split characters."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from omniopd.errors import ConfigError, DataError
from omniopd.logits.alignment import (
    Alignment,
    Group,
    align,
    align_ends,
    compare_prompts,
    group_logprobs,
)
from omniopd.logits.token_bytes import Segments, TokenBytes, shared_tokens

EMOJI = "\N{GRINNING FACE}"
FAMILY = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
CHINESE = "\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587}"
ACCENTS = "caf\N{LATIN SMALL LETTER E WITH ACUTE} nai\N{COMBINING DIAERESIS}ve"
CORPUS = "the sum of the numbers and the rest of the sum is the end; 12 + 30 = 42"
TEXTS = ["the sum is 42", f"a{EMOJI}b{EMOJI}{EMOJI} c", f"{CHINESE} = 42, {ACCENTS}", f"{FAMILY} end\n\n\tend  ", "x"]
SPECIAL = ["<pad>", "<eos>"]


def byte_level(merges: int, corpus: Sequence[str] = (CORPUS,)) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(list(corpus) * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Make one like Llama 2's: byte tokens for what the vocabulary lacks, a space sign before the first word."""
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    letters = [*sorted({*CORPUS, "a", "b", "c", "x"} - {" "}), space]
    words = [("t", "h"), ("th", "e"), (space, "the"), (space, "s"), ("u", "m"), (f"{space}s", "um")]
    names = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in words)]
    core = Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=words, unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    names = [*SPECIAL, "[UNK]", "the", "sum", "is", "4", "##2", "end", "##s", "caf", "##e"]
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="[UNK]")


SMALL, LARGE, LLAMA, BERT = byte_level(0), byte_level(60), byte_fallback(), word_piece()
EXACT = [SMALL, LARGE, LLAMA]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def segments(ends: Sequence[int], data: bytes) -> Segments:
    return Segments(data=data, ends=tuple(ends), positions=tuple(range(len(ends))), num_tokens=len(ends))


def check_groups(groups: Sequence[Group], student_ends: Sequence[int], teacher_ends: Sequence[int]) -> None:
    """Check all that holds for any two cuts."""
    assert [i for g in groups for i in range(g.student_start, g.student_end)] == list(range(len(student_ends)))
    assert [j for g in groups for j in range(g.teacher_start, g.teacher_end)] == list(range(len(teacher_ends)))
    assert all(g.is_exact for g in groups[:-1])
    for g in groups:
        if not g.is_exact:
            continue
        assert g.student_start < g.student_end and g.teacher_start < g.teacher_end
        assert student_ends[g.student_end - 1] == teacher_ends[g.teacher_end - 1]
        for i, j in itertools.product(
            range(g.student_start + 1, g.student_end), range(g.teacher_start + 1, g.teacher_end)
        ):
            assert student_ends[i - 1] != teacher_ends[j - 1], f"{g} could be split at {i}, {j}"


@st.composite
def cuts(draw: st.DrawFn, size: int, *, allow_empty: bool) -> list[int]:
    """Draw the ends of tokens that cover `size` bytes, some of them perhaps without text."""
    ends = sorted(draw(st.sets(st.integers(1, size - 1))) | {size}) if size > 1 else [size]
    if allow_empty:
        ends = sorted(ends + draw(st.lists(st.integers(0, size), max_size=3)))
    return ends


@st.composite
def two_cuts(draw: st.DrawFn, *, allow_empty: bool = True) -> tuple[list[int], list[int]]:
    size = draw(st.integers(1, 12))
    return draw(cuts(size, allow_empty=allow_empty)), draw(cuts(size, allow_empty=allow_empty))


@settings(max_examples=300, deadline=None)
@given(two_cuts())
def test_groups_cover_every_token_once_and_cannot_be_split(ends: tuple[list[int], list[int]]) -> None:
    groups = align_ends(*ends)
    check_groups(groups, *ends)
    assert all(g.is_exact for g in groups)
    mirrored = align_ends(ends[1], ends[0])
    assert [(g.teacher_end, g.student_end) for g in mirrored] == [(g.student_end, g.teacher_end) for g in groups]


@settings(max_examples=150, deadline=None)
@given(two_cuts(allow_empty=False))
def test_there_is_one_group_for_each_boundary_that_both_share(ends: tuple[list[int], list[int]]) -> None:
    assert [ends[0][g.student_end - 1] for g in align_ends(*ends)] == sorted(set(ends[0]) & set(ends[1]))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12).flatmap(lambda size: cuts(size, allow_empty=True)))
def test_the_same_cut_gives_groups_of_one(ends: list[int]) -> None:
    groups = align_ends(ends, ends)
    assert [(g.student_start, g.student_end, g.teacher_start, g.teacher_end) for g in groups] == [
        (i, i + 1, i, i + 1) for i in range(len(ends))
    ]


@settings(max_examples=100, deadline=None)
@given(two_cuts(allow_empty=False), two_cuts(allow_empty=False))
def test_texts_one_after_the_other_align_one_after_the_other(
    first: tuple[list[int], list[int]], second: tuple[list[int], list[int]]
) -> None:
    joined = [[*a, *(a[-1] + end for end in b)] for a, b in zip(first, second, strict=True)]
    sizes = [
        [(g.student_end - g.student_start, g.teacher_end - g.teacher_start) for g in align_ends(*ends)]
        for ends in (first, second, joined)
    ]
    assert sizes[2] == sizes[0] + sizes[1]


@settings(max_examples=150, deadline=None)
@given(two_cuts(), st.integers(0, 12))
def test_nothing_closes_beyond_the_limit(ends: tuple[list[int], list[int]], limit: int) -> None:
    groups = align_ends(*ends, limit=limit)
    check_groups(groups, *ends)
    assert all(ends[0][g.student_end - 1] <= limit for g in groups if g.is_exact)
    assert groups[-1].is_exact == (limit >= ends[0][-1])


def test_tokens_without_text_join_what_follows_and_at_the_end_what_precedes() -> None:
    # Student: "", "ab", "", "c", "" against "ab", "c"
    groups = align_ends([0, 2, 2, 3, 3], [2, 3])
    assert [(g.student_start, g.student_end) for g in groups] == [(0, 2), (2, 5)]
    # One without text on both sides is a group of its own.
    assert len(align_ends([2, 2, 3], [2, 2, 3])) == 3
    assert align_ends([0], []) == (
        Group(student_start=0, student_end=1, teacher_start=0, teacher_end=0, is_exact=False),
    )
    assert align_ends([], []) == ()


def test_leftovers_form_a_last_group_that_is_not_exact() -> None:
    groups = align_ends([1, 3, 5], [1, 2])
    assert groups[0].is_exact
    assert groups[1] == Group(student_start=1, student_end=3, teacher_start=1, teacher_end=2, is_exact=False)


def test_leftovers_with_text_never_join_an_exact_group() -> None:
    groups = align_ends([1, 1, 3], [1])
    assert [(g.student_start, g.student_end, g.is_exact) for g in groups] == [(0, 1, True), (1, 3, False)]


def test_ends_never_go_back() -> None:
    with pytest.raises(DataError, match="teacher token 1 ends at byte 1, before byte 2"):
        align_ends([2], [2, 1])


# The tokens of real vocabularies.


@pytest.mark.parametrize("tokenizer", [*EXACT, BERT], ids=["bytes", "bpe", "llama", "bert"])
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_are_the_decoded_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    cut = TokenBytes(tokenizer)(ids_of(tokenizer, text))
    assert cut.data.decode() == tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True)
    if tokenizer is not BERT:
        assert cut.text == text
    assert list(cut.ends) == sorted(cut.ends) and (not cut.ends or cut.ends[-1] == len(cut.data))


def test_split_characters_have_exact_bytes() -> None:
    assert TokenBytes(SMALL)(ids_of(SMALL, f"a{EMOJI}b")).ends == (1, 2, 3, 4, 5, 6)
    # Llama writes a space sign before the first word and takes it away again: a token without text.
    llama = ids_of(LLAMA, f"a{EMOJI}b")
    assert TokenBytes(LLAMA)(llama).ends == (0, 1, 2, 3, 4, 5, 6)
    assert TokenBytes(LLAMA).piece(llama[2]) == EMOJI.encode()[:1]


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from([*"the sum42 \n", EMOJI, *CHINESE, "\u00e9", "\u0308"]), min_size=1, max_size=20))
def test_real_tokenizers_align(text: str) -> None:
    for student, teacher in itertools.product(EXACT, EXACT):
        _, ours = TokenBytes(student).encode(text)
        _, theirs = TokenBytes(teacher).encode(text)
        alignment = align(ours, theirs)
        check_groups(alignment.groups, ours.ends, theirs.ends)
        assert all(g.is_exact for g in alignment.groups)
        if student is teacher:
            assert len(alignment.groups) == len(ours.ends)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab c\u00e9" + EMOJI), min_size=3, max_size=20), min_size=2, max_size=4),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_trained_tokenizers_align(texts: list[str], first: int, second: int) -> None:
    student, teacher = byte_level(first, texts[:1]), byte_level(second, texts[1:])
    for text in texts:
        ours, theirs = TokenBytes(student).encode(text)[1], TokenBytes(teacher).encode(text)[1]
        check_groups(align(ours, theirs).groups, ours.ends, theirs.ends)
        bytes_of = [
            [cut.data[a:b] for a, b in zip((0, *cut.ends[:-1]), cut.ends, strict=True)] for cut in (ours, theirs)
        ]
        for group in align(ours, theirs).groups:
            assert b"".join(bytes_of[0][group.student_start : group.student_end]) == b"".join(
                bytes_of[1][group.teacher_start : group.teacher_end]
            )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 317), max_size=12))
def test_any_tokens_at_all_have_bytes(ids: list[int]) -> None:
    cut = TokenBytes(LARGE)(ids)
    text = LARGE.decode(ids, skip_special_tokens=True)
    assert cut.data.decode("utf-8", errors="replace") == text
    theirs = TokenBytes(LLAMA).encode(cut.text)[1]
    groups = align(cut, theirs).groups
    check_groups(groups, cut.ends, theirs.ends)
    is_whole = cut.text.encode() == cut.data
    assert all(g.is_exact for g in groups) == (is_whole or not groups)


def test_a_completion_cut_inside_a_character() -> None:
    for tokenizer in (SMALL, LLAMA):
        ids = ids_of(tokenizer, f"a {EMOJI}")[:-1]
        ours = TokenBytes(tokenizer)(ids)
        assert ours.data == b"a " + EMOJI.encode()[:3] and ours.text == "a "
        # Whether the teacher is given the valid part or what decoding made of the rest.
        for text in ("a ", tokenizer.decode(ids)):
            theirs = TokenBytes(LARGE).encode(text)[1]
            groups = align(ours, theirs).groups
            assert [g.is_exact for g in groups][-1] is False and sum(g.is_exact for g in groups) == 2
            logprobs = group_logprobs(
                Alignment(student=ours, teacher=theirs, groups=groups),
                [-1.0] * len(ids),
                [-0.25] * theirs.num_tokens,
            )
            assert logprobs.weights[-3:] == (0.0, 0.0, 0.0) and logprobs.differences[-1] is None


def test_special_tokens_are_left_out_and_reported() -> None:
    eos = LARGE.eos_token_id
    ids = [eos, *ids_of(LARGE, "the sum"), eos]
    cut = TokenBytes(LARGE)(ids)
    assert [(s.position, s.text) for s in cut.specials] == [(0, "<eos>"), (len(ids) - 1, "<eos>")]
    assert cut.positions == tuple(range(1, len(ids) - 1)) and cut.num_tokens == len(ids)
    theirs = TokenBytes(LLAMA).encode("the sum")[1]
    got = group_logprobs(align(cut, theirs), [-9.0, *[-1.0] * (len(ids) - 2), -9.0], [-0.5] * theirs.num_tokens)
    assert got.weights == (0.0, *[1.0] * (len(ids) - 2), 0.0)
    assert got.advantages[0] == got.advantages[-1] == 0.0


def test_the_end_of_the_turn_can_be_compared() -> None:
    ids = [*ids_of(LARGE, "the sum"), LARGE.eos_token_id]
    ours = TokenBytes(LARGE)(ids, keep=[LARGE.eos_token_id])
    their_ids = [*ids_of(LLAMA, "the sum"), LLAMA.eos_token_id]
    theirs = TokenBytes(LLAMA)(their_ids, keep=[LLAMA.eos_token_id])
    alignment = align(ours, theirs)
    last = alignment.groups[-1]
    assert (last.student_start, last.student_end) == (len(ids) - 1, len(ids))
    assert (last.teacher_start, last.teacher_end) == (len(their_ids) - 1, len(their_ids))
    got = group_logprobs(alignment, [-1.0] * len(ids), [*[-1.0] * (len(their_ids) - 1), -3.0])
    assert got.advantages[-1] == -2.0
    with pytest.raises(DataError, match="keeps 1 special tokens and the teacher 0"):
        align(ours, TokenBytes(LLAMA)(their_ids))


def test_different_texts_are_never_aligned() -> None:
    ours, theirs = TokenBytes(LARGE).encode("the sum")[1], TokenBytes(LLAMA).encode("the sun")[1]
    with pytest.raises(DataError, match=r"from byte 6 on it is b'm' and b'n'"):
        align(ours, theirs)
    with pytest.raises(DataError, match="do not write the same text"):
        align(ours, TokenBytes(LLAMA).encode("the sum ")[1])
    with pytest.raises(DataError, match="do not write the same text"):
        align(TokenBytes(LARGE).encode("the sum ")[1], TokenBytes(LLAMA).encode("the sum")[1])


def test_a_tokenizer_that_rewrites_text_still_has_ends_in_it() -> None:
    text = "The SUM is 42"
    ids, cut = TokenBytes(BERT).encode(text)
    assert BERT.convert_ids_to_tokens(list(ids)) == ["the", "sum", "is", "4", "##2"]
    assert cut.data.decode() == text and cut.ends == (3, 7, 10, 12, 13)
    ours = TokenBytes(SMALL).encode(text)[1]
    assert [g.student_end for g in align(ours, cut).groups] == [3, 7, 10, 12, 13]


def test_rewritten_text_with_split_characters_is_cut_between_them() -> None:
    core = Tokenizer.from_str(SMALL.backend_tokenizer.to_str())
    core.normalizer = normalizers.Lowercase()
    lower = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    ids, cut = TokenBytes(lower).encode(f"A{EMOJI}B")
    # Six tokens of one byte; the four of the emoji end where it begins, but for the last.
    assert len(ids) == 6 and cut.ends == (1, 1, 1, 1, 5, 6)


def test_ids_that_only_pad_the_vocabulary_are_left_out() -> None:
    cut = TokenBytes(LARGE)([*ids_of(LARGE, "the"), 10**6])
    assert cut.data == b"the" and [(s.token_id, s.text) for s in cut.specials] == [(10**6, "")]


@pytest.mark.parametrize(
    ("tokenizer", "text", "piece"), [(BERT, "the \u20ac sum", "\u20ac"), (LARGE, "the <eos> sum", "<eos>")]
)
def test_text_that_becomes_a_special_token_is_refused(
    tokenizer: PreTrainedTokenizerFast, text: str, piece: str
) -> None:
    with pytest.raises(DataError, match=f"reads '{piece}' as '.*a special token"):
        TokenBytes(tokenizer).encode(text)


def test_added_tokens_write_what_they_say() -> None:
    tokenizer = byte_level(0)
    tokenizer.add_tokens(["<\u4e2d call>"])
    ids = ids_of(tokenizer, "a<\u4e2d call>b")
    assert len(ids) == 3
    cut = TokenBytes(tokenizer)(ids)
    # "<", three bytes of the character, " call>"
    assert cut.text == "a<\u4e2d call>b" and cut.ends == (1, 11, 12)


def test_a_tokenizer_without_a_decoder_is_cut_between_characters() -> None:
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "ab": 2, "\u4e2d": 3}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    cut = TokenBytes(plain)([2, 3, 1])
    assert TokenBytes(plain).piece(2) is None
    assert cut.data.decode() == plain.decode([2, 3]) and cut.ends[-1] == len(cut.data) and len(cut.specials) == 1


# Log-probs of groups.


def random_logprobs(size: int, rng: random.Random) -> list[float]:
    return [-rng.expovariate(0.5) for _ in range(size)]


@settings(max_examples=200, deadline=None)
@given(two_cuts(), st.integers(0, 10**6))
def test_advantages_add_up_to_the_exact_differences(ends: tuple[list[int], list[int]], seed: int) -> None:
    rng = random.Random(seed)
    student, teacher = random_logprobs(len(ends[0]), rng), random_logprobs(len(ends[1]), rng)
    data = b"x" * max(ends[0])
    alignment = align(segments(ends[0], data), segments(ends[1], data))
    shared = group_logprobs(alignment, student, teacher)
    whole = group_logprobs(alignment, student, teacher, spread="whole")
    for group, difference in zip(alignment.groups, shared.differences, strict=True):
        span = slice(group.student_start, group.student_end)
        total = 0.0
        for share in shared.advantages[span]:
            total += share
        assert total == difference
        assert max(shared.advantages[span]) - min(shared.advantages[span]) <= 1e-12 * max(1.0, abs(total))
        assert set(whole.advantages[span]) == {difference}
    assert math.fsum(d for d in shared.differences if d is not None) == pytest.approx(
        math.fsum(teacher) - math.fsum(student), abs=1e-9
    )
    assert set(shared.weights) == {1.0}


def test_the_same_tokenizer_gives_the_unaligned_advantages() -> None:
    rng = random.Random(1)
    cut = TokenBytes(LARGE).encode(" ".join(TEXTS))[1]
    student, teacher = random_logprobs(cut.num_tokens, rng), random_logprobs(cut.num_tokens, rng)
    got = group_logprobs(align(cut, cut), student, teacher)
    assert got.advantages == tuple(q - p for p, q in zip(student, teacher, strict=True))


def test_group_logprobs_by_hand() -> None:
    # Student "a", "bc"; teacher "ab", "c": one group; -1 - 2 = -3 against -4 - 1 = -5
    alignment = align(segments([1, 3], b"abc"), segments([2, 3], b"abc"))
    got = group_logprobs(alignment, [-1.0, -2.0], [-4.0, -1.0])
    assert got.differences == (-2.0,) and got.advantages == (-1.0, -1.0)


def test_spread_whole_has_the_gradient_of_the_reverse_kl_over_groups() -> None:
    # The student writes two tokens of one byte each, the teacher one token for both: 4 texts, one group.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    alignment = align(segments([1, 2], b"xy"), segments([2], b"xy"))
    exact, surrogates = torch.zeros(()), {"whole": torch.zeros(()), "share": torch.zeros(())}
    for i, (a, b) in enumerate(itertools.product(range(2), repeat=2)):
        tokens = torch.stack([logprobs[0, a], logprobs[1 + a, b]])
        exact = exact + tokens.sum().exp() * (tokens.sum() - teacher[i])
        for spread in surrogates:
            got = group_logprobs(alignment, tokens.tolist(), [float(teacher[i])], spread=spread)  # type: ignore[arg-type]
            weighted = (torch.tensor(got.advantages, dtype=torch.float64) * tokens).sum()
            surrogates[spread] = surrogates[spread] - tokens.sum().exp().detach() * weighted
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (whole,) = torch.autograd.grad(surrogates["whole"], logits, retain_graph=True)
    (share,) = torch.autograd.grad(surrogates["share"], logits)
    assert torch.allclose(whole, expected, atol=1e-12)
    assert torch.allclose(2 * share, expected, atol=1e-12)


def test_logprobs_that_cannot_be_used() -> None:
    alignment = align(segments([1], b"a"), segments([1], b"a"))
    with pytest.raises(DataError, match="2 student log-probs for 1 tokens"):
        group_logprobs(alignment, [-1.0, -1.0], [-1.0])
    with pytest.raises(DataError, match="teacher log-prob of token 0 is -inf"):
        group_logprobs(alignment, [-1.0], [-math.inf])
    with pytest.raises(ConfigError, match="spread is 'mean'"):
        group_logprobs(alignment, [-1.0], [-1.0], spread="mean")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 ends and 0 positions"):
        Segments(data=b"a", ends=(1,), positions=(), num_tokens=1)


# Vocabularies and prompts.


def test_shared_tokens_are_the_same_bytes() -> None:
    ours, theirs = TokenBytes(LARGE), TokenBytes(LLAMA)
    student_ids, teacher_ids = shared_tokens(ours, theirs, len(LARGE), len(LLAMA))
    pairs = dict(zip(student_ids, teacher_ids, strict=True))
    assert all(ours.piece(i) == theirs.piece(j) for i, j in pairs.items())
    # " the" is spelled differently in the two vocabularies and means the same.
    spelled = [LARGE.convert_tokens_to_ids("\u0120the"), LLAMA.convert_tokens_to_ids("\u2581the")]
    assert pairs[spelled[0]] == spelled[1]
    # "t" is also byte 0x74; the letter counts.
    assert pairs[ids_of(SMALL, "t")[0]] == LLAMA.convert_tokens_to_ids("t")
    assert LARGE.eos_token_id not in pairs and len(set(teacher_ids)) == len(teacher_ids) >= 256
    with pytest.raises(ConfigError, match="the teacher's tokenizer is neither"):
        shared_tokens(ours, TokenBytes(BERT), len(LARGE), len(BERT))


def test_prompts_are_compared_and_printed() -> None:
    chat = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    llama = "<s>[INST] How many? [/INST]"
    got = compare_prompts(chat, llama, contents=["How many?\n"])
    assert got.problems == ()
    assert "-<|im_start|>user\\n" in got.difference and "+<s>[INST] How many? [/INST]" in got.difference
    assert "only the student has <|im_end|>, <|im_start|>" in got.difference
    assert "only the teacher has <s>, [/INST], [INST]" in got.difference
    assert repr(chat) in str(got) and repr(llama) in str(got)
    same = compare_prompts(chat, chat)
    assert same.difference == "" and str(same).endswith("the prompts are the same")


def test_a_template_that_drops_a_message_is_a_problem() -> None:
    contents = ["Be brief.", "How many?"]
    got = compare_prompts("system: Be brief.\nuser: How many?", "user: How many?", contents=contents)
    assert got.problems == ("the teacher's prompt does not contain the message 'Be brief.'",)
    turned = compare_prompts("Be brief. How many?", "How many? Be brief.", contents=contents)
    assert turned.problems == ("the teacher's prompt has out of order the message 'How many?'",)
    assert "problem: the teacher's" in str(turned)


def test_trailing_spaces_show() -> None:
    assert "-user: \\u00a0\\n" in compare_prompts("user: \u00a0\nx", "user:\nx").difference


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, json, omniopd.logits.alignment, omniopd.logits.estimators, omniopd.logits.diagnostics;"
        "print(json.dumps(sorted({'torch', 'transformers'} & set(sys.modules))))"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []
