"""Where each token's text starts, with a real byte-level tokenizer that splits characters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from omniopd.rollout.detokenize import Detokenizer

EMOJI = "\N{GRINNING FACE}"
FAMILY = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
CHINESE = "\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587}"
ACCENTS = "caf\N{LATIN SMALL LETTER E WITH ACUTE} nai\N{COMBINING DIAERESIS}ve"
TEXTS = [
    "the sum of 12 and 30 is 42",
    EMOJI,
    f"a{EMOJI}b{EMOJI}{EMOJI} c",
    CHINESE,
    f"{CHINESE} = 42, {ACCENTS}",
    f"{FAMILY} and so on\n\n\tend",
    "",
]


def byte_level(*, merges: int = 60) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on English only: other scripts fall apart into bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the sum of the numbers and the rest of the sum is the end"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


TOKENIZER = byte_level()
DETOKENIZE = Detokenizer(TOKENIZER)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def pieces(text: str, starts: Sequence[int]) -> list[str]:
    """Cut the text at the starts: a token's own text ends where the next token's begins."""
    return [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])]


def check(ids: list[int]) -> tuple[str, tuple[int, ...]]:
    """Decode and check all that holds for any tokens."""
    text, starts = DETOKENIZE(ids)
    assert text == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert len(starts) == len(ids)
    assert list(starts) == sorted(starts)
    assert all(0 <= start <= len(text) for start in starts)
    assert not starts or starts[0] == 0
    assert "".join(pieces(text, starts)) == text
    return text, starts


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole(text: str) -> None:
    assert check(encode(text))[0] == text


def test_tokens_of_a_split_character_start_where_it_does() -> None:
    ids = encode(f"a{EMOJI}b")
    assert len(ids) == 6
    # a, four bytes of one character, b
    assert DETOKENIZE(ids) == (f"a{EMOJI}b", (0, 1, 1, 1, 1, 2))


def test_characters_are_split_one_by_one() -> None:
    ids = encode(CHINESE + "7")
    assert len(ids) == 7
    assert DETOKENIZE(ids)[1] == (0, 0, 0, 1, 1, 1, 2)


def test_plain_text_has_one_start_for_each_piece() -> None:
    ids = encode("the sum of 12")
    starts = DETOKENIZE(ids)[1]
    assert pieces("the sum of 12", starts) == [TOKENIZER.decode([i]) for i in ids]
    assert len(set(starts)) == len(ids)


def test_special_tokens_have_no_text() -> None:
    end = TOKENIZER.eos_token_id
    ids = [*encode("12"), end, *encode(EMOJI), end]
    text, starts = check(ids)
    assert text == f"12{EMOJI}"
    assert starts == (0, 1, 2, 2, 2, 2, 2, 3)


def test_a_completion_cut_inside_a_character() -> None:
    ids = encode(f"1{EMOJI}")[:-1]
    text, starts = check(ids)
    assert text.startswith("1") and EMOJI not in text
    assert starts == (0, 1, 1, 1)


def test_bytes_that_are_no_text_do_not_stop_the_count() -> None:
    broken = encode(EMOJI)[:2]
    ids = [*encode("ab"), *broken, *encode(f" the {EMOJI}end")]
    text, starts = check(ids)
    assert text.endswith(f" the {EMOJI}end")
    # After the broken bytes every boundary is right again.
    assert pieces(text, starts)[-len(encode("end")) :] == [TOKENIZER.decode([i]) for i in encode("end")]


def test_nothing_decodes_to_nothing() -> None:
    assert DETOKENIZE([]) == ("", ())


def test_chunk_boundaries_of_a_rollout_never_cut_a_character() -> None:
    text = f"12{EMOJI}{CHINESE} the {FAMILY}"
    ids = encode(text)
    rollout = tiny.rollout_of(ids)
    starts = DETOKENIZE(ids)[1]
    rollout = type(rollout).from_json({**rollout.to_json(), "text": text, "char_starts": list(starts)})
    for cut in range(len(ids) + 1):
        before, after = rollout.text_between(0, cut), rollout.text_between(cut, len(ids))
        assert before + after == text
        assert "\N{REPLACEMENT CHARACTER}" not in before


class MergingDecoder:
    """A decoder like sentencepiece's: the space of the first token is dropped, so pieces do not add up."""

    words = (" one", " two", " three", "")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.words[i] for i in token_ids).removeprefix(" ")


def test_joining_rules_of_the_decoder_are_respected() -> None:
    text, starts = Detokenizer(MergingDecoder())([0, 1, 2, 1, 3])
    assert text == "one two three two"
    assert pieces(text, starts) == ["one", " two", " three", " two", ""]


def test_decoding_is_linear_in_the_length() -> None:
    """Decode calls read a window, never the whole text again."""

    class Counting:
        tokens = 0

        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            self.tokens += len(token_ids)
            return TOKENIZER.decode(token_ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    ids = encode((EMOJI + "12 ") * 100)
    Detokenizer(counting)(ids)
    assert counting.tokens < 12 * len(ids)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_tiles(text: str) -> None:
    starts = check(encode(text))[1]
    # No boundary inside a character: every start is where some prefix of whole tokens ends.
    assert DETOKENIZE(encode(text))[0] == text
    assert set(starts) <= set(range(len(text) + 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=25))
def test_any_tokens_tile(ids: list[int]) -> None:
    check(ids)
