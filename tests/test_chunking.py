from __future__ import annotations

import math
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd.chunking import EntropyChunker, UniformChunker, num_words, peak_words, select_chunks, tile_words
from omniopd.errors import ConfigError, RolloutError
from omniopd.types import FinishReason, Message, Prompt, Rollout


def _rollout(
    text: str, char_starts: tuple[int, ...], entropies: tuple[float, ...] | None = None, id: str = "r0"
) -> Rollout:
    prompt = Prompt(id="p", messages=(Message(role="user", content="Q"),), text="Q", token_ids=(1,))
    return Rollout(
        id=id,
        prompt=prompt,
        group_index=0,
        token_ids=tuple(range(len(char_starts))),
        text=text,
        char_starts=char_starts,
        finish_reason=FinishReason.STOP,
        policy_version=0,
        entropies=entropies,
    )


def _letters(length: int, entropies: tuple[float, ...] | None = None, id: str = "r0") -> Rollout:
    return _rollout("".join(chr(97 + i % 26) for i in range(length)), tuple(range(length)), entropies, id)


def test_second_best_that_overlaps_is_skipped() -> None:
    # Descending: 9 at 3 taken; 8 at 4 overlaps [3, 5); 7 at 5 taken.
    assert select_chunks([5, 1, 4, 9, 8, 7, 2], chunk_tokens=2, max_chunks=2) == [3, 5]


def test_start_that_runs_past_the_end_is_skipped() -> None:
    # 9 at 2 would end at 4 of 3; then 1 at 0 and 1 at 1 tie, the earlier wins and the other overlaps.
    assert select_chunks([1, 1, 9], chunk_tokens=2, max_chunks=5) == [0]


def test_ties_go_to_the_earlier_step() -> None:
    assert select_chunks([1, 2, 2, 1], chunk_tokens=1, max_chunks=1) == [1]


def test_shorter_than_a_chunk_has_none() -> None:
    assert select_chunks([1.0, 2.0], chunk_tokens=3, max_chunks=1) == []
    assert select_chunks([], chunk_tokens=1, max_chunks=1) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entropy_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ConfigError, match="at step 1 of 3"):
        select_chunks([1.0, bad, 2.0], chunk_tokens=1, max_chunks=1)


@pytest.mark.parametrize(("chunk_tokens", "max_chunks"), [(0, 1), (1, 0), (-1, 1), (1.5, 1), (True, 1)])
def test_sizes_must_be_positive_whole_numbers(chunk_tokens: int, max_chunks: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        select_chunks([1.0], chunk_tokens=chunk_tokens, max_chunks=max_chunks)
    with pytest.raises(ConfigError, match="at least 1"):
        EntropyChunker(chunk_tokens=chunk_tokens, max_chunks=max_chunks)
    with pytest.raises(ConfigError, match="at least 1"):
        UniformChunker(chunk_tokens=chunk_tokens, max_chunks=max_chunks)


def _select_slowly(entropies: list[int], chunk_tokens: int, max_chunks: int) -> list[int]:
    """The rule word for word, on sets of steps."""
    chosen: list[int] = []
    for start in sorted(range(len(entropies)), key=lambda step: (-entropies[step], step)):
        span = set(range(start, start + chunk_tokens))
        fits = start + chunk_tokens <= len(entropies)
        if len(chosen) < max_chunks and fits and not any(span & set(range(c, c + chunk_tokens)) for c in chosen):
            chosen.append(start)
    return sorted(chosen)


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 6), st.integers(1, 6))
def test_selection_is_the_rule_word_for_word(entropies: list[int], chunk_tokens: int, max_chunks: int) -> None:
    expected = _select_slowly(entropies, chunk_tokens, max_chunks)
    assert select_chunks(entropies, chunk_tokens=chunk_tokens, max_chunks=max_chunks) == expected


def test_long_rollouts_do_not_cost_steps_times_chunks() -> None:
    # Ascending entropy with tied plateaus and M out of reach: every start is visited. 20,000 x 400 checks of C tokens
    # would take minutes.
    entropies = [float(step // 7) for step in range(20_000)]
    started = time.perf_counter()
    starts = select_chunks(entropies, chunk_tokens=50, max_chunks=10_000)
    assert time.perf_counter() - started < 1.0
    assert all(b - a >= 50 for a, b in pairwise(starts))


def test_entropy_chunks_carry_their_prefix_and_text() -> None:
    rollout = _letters(7, (5, 1, 4, 9, 8, 7, 2))
    first, second = EntropyChunker(chunk_tokens=2, max_chunks=2).split(rollout)
    assert (first.index, first.start, first.end, first.prefix, first.text) == (0, 3, 5, "abc", "de")
    assert (second.index, second.start, second.end, second.prefix, second.text) == (1, 5, 7, "abcde", "fg")


def test_chunks_end_on_whole_characters_and_may_hold_the_end_token() -> None:
    # "a", the euro sign in two byte tokens (the first has no text yet), "b", end of sequence without text.
    rollout = _rollout("a\u20acb", (0, 1, 1, 2, 3), (0, 0, 0, 9, 0))
    (chunk,) = EntropyChunker(chunk_tokens=2, max_chunks=1).split(rollout)
    assert (chunk.prefix, chunk.text, chunk.end) == ("a\u20ac", "b", 5)


def test_chunk_without_text_is_dropped_and_indices_stay_dense() -> None:
    # Token 0 has no text (it starts where token 1 does), so the chunk [0, 1) has nothing to compare.
    rollout = _rollout("ab", (0, 0, 1), (9, 8, 7))
    chunks = EntropyChunker(chunk_tokens=1, max_chunks=3).split(rollout)
    assert [(c.index, c.start, c.text) for c in chunks] == [(0, 1, "a"), (1, 2, "b")]


def test_entropy_chunker_needs_entropies() -> None:
    with pytest.raises(RolloutError, match=r"r0 has no entropies.*uniform chunker"):
        EntropyChunker().split(_letters(3))


def test_uniform_chunks_are_reproducible_disjoint_and_differ_by_rollout_and_seed() -> None:
    chunker = UniformChunker(chunk_tokens=3, max_chunks=4, seed=1)
    starts = [c.start for c in chunker.split(_letters(60))]
    assert starts == [c.start for c in chunker.split(_letters(60))]
    assert len(starts) == 4 and all(b - a >= 3 for a, b in pairwise(starts)) and starts[-1] <= 57
    assert starts != [c.start for c in chunker.split(_letters(60, id="r1"))]
    assert starts != [c.start for c in UniformChunker(chunk_tokens=3, max_chunks=4, seed=2).split(_letters(60))]


def test_uniform_takes_as_many_as_fit() -> None:
    assert [c.start for c in UniformChunker(chunk_tokens=2, max_chunks=9).split(_letters(6))] == [0, 2, 4]
    assert UniformChunker(chunk_tokens=7, max_chunks=9).split(_letters(6)) == []


def test_every_placement_is_equally_likely() -> None:
    # Two chunks of 2 in 5 tokens: (0,2), (0,3), (1,3). 3000 draws, 1000 each, standard deviation 26.
    chunker = UniformChunker(chunk_tokens=2, max_chunks=2)
    seen = Counter(tuple(c.start for c in chunker.split(_letters(5, id=str(i)))) for i in range(3000))
    assert set(seen) == {(0, 2), (0, 3), (1, 3)}
    assert all(abs(count - 1000) < 130 for count in seen.values())


@given(st.text(alphabet="ab \n\t\u00e9", max_size=40), st.integers(1, 4))
def test_tiles_cover_text_once_and_never_leave_a_bare_space_behind(text: str, size: int) -> None:
    spans = tile_words(text, words_per_chunk=size)
    assert "".join(text[start:end] for start, end in spans) == (text if text.strip() else "")
    assert [len(text[start:end].split()) for start, end in spans[:-1]] == [size] * (len(spans) - 1)
    assert all(text[:start] == text[:start].rstrip() for start, _ in spans)
    assert num_words(text) == len(text.split())


def test_peak_words_start_at_the_most_uncertain_words() -> None:
    text = "one two  three four five "
    # 9 at "three" (2 words fit: three, four); 8 at "four" overlaps; 3 at "one" takes "one two".
    spans = peak_words(text, [3, 1, 9, 8, 2], words_per_chunk=2, max_chunks=3)
    assert [text[a:b] for a, b in spans] == ["one two", "  three four"]
    last = peak_words(text, [0, 0, 0, 9, 0], words_per_chunk=2, max_chunks=1)
    assert [text[a:b] for a, b in last] == [" four five "]


def test_peak_words_name_both_counts() -> None:
    with pytest.raises(ConfigError, match="2 entropies for a text of 3 words"):
        peak_words("a b c", [1, 2], words_per_chunk=1, max_chunks=1)
