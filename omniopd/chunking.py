"""Where a completion is audited: spans of tokens of a rollout, or spans of words of plain text.

Standard library only. It does not call the teacher and does not score; it cuts. Spans never overlap, come back in the
order of the text and are never padded.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omniopd.errors import ConfigError, RolloutError
from omniopd.types import Chunk, Rollout

# A word owns the whitespace before it, so the text before a word never ends in whitespace: subword vocabularies put the
# space on the following word, and some chat endpoints refuse a partial answer that ends in one.
_WORD = re.compile(r"\s*\S+")


def select_chunks(entropies: Sequence[float], *, chunk_tokens: int, max_chunks: int) -> list[int]:
    """Return the starts of the chunks to audit, in ascending order.

    Walks the steps by descending entropy, ties to the earlier step, and keeps a start when its chunk
    `[start, start + chunk_tokens)` fits and overlaps none that was kept; stops at `max_chunks`. Fewer is fine.

    Source: arXiv:2606.01476 section 3; the order of ties is ours.

    Args:
        entropies: [T] nats, one for each step of the completion.
        chunk_tokens: C, the length of every chunk.
        max_chunks: M.

    Raises:
        ConfigError: an entropy is not finite, or C or M is not a positive whole number.

    Example:
        >>> select_chunks([5, 1, 4, 9, 8, 7, 2], chunk_tokens=2, max_chunks=2)
        [3, 5]
    """
    _require_positive(chunk_tokens=chunk_tokens, max_chunks=max_chunks)
    for step, entropy in enumerate(entropies):
        if not math.isfinite(entropy):
            raise ConfigError(f"entropy {entropy} at step {step} of {len(entropies)}; expected a finite number of nats")
    num_starts = len(entropies) - chunk_tokens + 1
    starts: list[int] = []
    taken = bytearray(len(entropies))
    # sorted() is stable, so equal entropies stay in the order of the text.
    for start in sorted(range(max(num_starts, 0)), key=lambda step: -entropies[step]):
        # All chunks are equally long: one that overlaps another covers its first or its last token.
        if taken[start] or taken[start + chunk_tokens - 1]:
            continue
        taken[start : start + chunk_tokens] = b"\x01" * chunk_tokens
        starts.append(start)
        if len(starts) == max_chunks:
            break
    return sorted(starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyChunker:
    """Audit where the student was most uncertain.

    A rollout shorter than `chunk_tokens` has no chunk. The end-of-sequence token may be inside a chunk.

    Source: arXiv:2606.01476 section 3, as published.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    chunk_tokens: int = 50
    """C, the length of every chunk."""
    max_chunks: int = 10
    """M, the most chunks of one rollout."""

    def __post_init__(self) -> None:
        _require_positive(chunk_tokens=self.chunk_tokens, max_chunks=self.max_chunks)

    def split(self, rollout: Rollout) -> list[Chunk]:
        """Return the chunks of one rollout. Raises RolloutError when the rollout has no entropies."""
        if rollout.entropies is None:
            raise RolloutError(
                f"rollout {rollout.id} has no entropies, which EntropyChunker ranks by; "
                "use an engine that records them, or the uniform chunker"
            )
        starts = select_chunks(rollout.entropies, chunk_tokens=self.chunk_tokens, max_chunks=self.max_chunks)
        return _cut(rollout, starts, self.chunk_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformChunker:
    """Audit anywhere: every placement of disjoint chunks is equally likely.

    The same seed and rollout id give the same chunks, on every machine. As many chunks as fit, up to `max_chunks`.

    Source: arXiv:2606.01476 section 5, the ablation of the entropy selection.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    chunk_tokens: int = 50
    max_chunks: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _require_positive(chunk_tokens=self.chunk_tokens, max_chunks=self.max_chunks)

    def split(self, rollout: Rollout) -> list[Chunk]:
        """Return the chunks of one rollout."""
        count = min(self.max_chunks, rollout.num_tokens // self.chunk_tokens)
        # hash() of a string differs between processes; a digest does not.
        digest = hashlib.sha256(f"{self.seed}:{rollout.id}".encode()).digest()
        rng = random.Random(int.from_bytes(digest[:8], "big"))
        # Shrink every chunk to one place, choose distinct places, grow the chunks back: a bijection, hence uniform.
        places = sorted(rng.sample(range(rollout.num_tokens - count * (self.chunk_tokens - 1)), count))
        starts = [place + index * (self.chunk_tokens - 1) for index, place in enumerate(places)]
        return _cut(rollout, starts, self.chunk_tokens)


def num_words(text: str) -> int:
    """Count the whitespace-separated words, as `tile_words` and `peak_words` do."""
    return len(_WORD.findall(text))


def tile_words(text: str, *, words_per_chunk: int) -> list[tuple[int, int]]:
    """Cut text into consecutive spans of that many words; the last span takes what remains.

    The character ranges [start, end) cover the text exactly once. Whitespace belongs to the word after it, trailing
    whitespace to the last span. Text without a word has no span.

    Example:
        >>> tile_words("a bb  c d", words_per_chunk=2)
        [(0, 4), (4, 9)]
    """
    _require_positive(words_per_chunk=words_per_chunk)
    edges = _word_edges(text)
    cuts = [*edges[:-1:words_per_chunk], len(text)]
    return list(itertools.pairwise(cuts))


def peak_words(
    text: str, entropies: Sequence[float], *, words_per_chunk: int, max_chunks: int
) -> list[tuple[int, int]]:
    """Return the spans of `words_per_chunk` words that start at the words of highest entropy, in text order.

    The rule is that of `select_chunks`, with words for tokens; so text with fewer words than one span has none.

    Args:
        text: A completion.
        entropies: One value for each whitespace-separated word, on any scale: only their order counts.
        words_per_chunk: C in words.
        max_chunks: M.

    Raises:
        ConfigError: there is not exactly one entropy for each word.
    """
    edges = _word_edges(text)
    if len(entropies) != len(edges) - 1:
        raise ConfigError(
            f"{len(entropies)} entropies for a text of {len(edges) - 1} words; "
            "expected one for each whitespace-separated word"
        )
    starts = select_chunks(entropies, chunk_tokens=words_per_chunk, max_chunks=max_chunks)
    return [(edges[start], edges[start + words_per_chunk]) for start in starts]


def _word_edges(text: str) -> list[int]:
    """Return where each word starts, its leading whitespace included, and last the end of the text."""
    return [*(match.start() for match in _WORD.finditer(text)), len(text)]


def _cut(rollout: Rollout, starts: Iterable[int], chunk_tokens: int) -> list[Chunk]:
    """Make chunks of token ranges. Tokens without text (special tokens) can leave nothing to compare: no chunk then."""
    chunks: list[Chunk] = []
    for start in starts:
        text = rollout.text_between(start, start + chunk_tokens)
        if text:
            chunk = Chunk(
                rollout_id=rollout.id,
                index=len(chunks),
                start=start,
                end=start + chunk_tokens,
                prefix=rollout.text[: rollout.char_starts[start]],
                text=text,
            )
            chunks.append(chunk)
    return chunks


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
