"""From token ids to text with an offset for every token. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """Decodes completions and tells where each token's text starts."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Return the text without special tokens and [T] where each token's text starts in it.

        Tokens that share a character (byte-level vocabularies split some) all start where the character does, so a
        boundary never falls inside one. Tokens without text start where the next text does.
        """
        ids = list(token_ids)
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        pieces = [self._piece(i) for i in ids]
        if "".join(pieces) == text and REPLACEMENT not in text:
            starts, position = [], 0
            for piece in pieces:
                starts.append(position)
                position += len(piece)
            return text, tuple(starts)
        return text, self._starts_by_growing(ids, text)

    def _piece(self, token_id: int) -> str:
        if token_id not in self._pieces:
            self._pieces[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=True)
        return self._pieces[token_id]

    def _starts_by_growing(self, ids: list[int], text: str) -> tuple[int, ...]:
        """Decode ever longer pieces; a piece that ends inside a character waits for the rest of it.

        The window restarts at the last clean boundary (one token earlier, so that joining rules see their context),
        which keeps the work linear in T.
        """
        starts: list[int] = []
        anchor, settled, position = 0, 0, 0
        for i in range(len(ids)):
            starts.append(position)
            before = self._tokenizer.decode(ids[anchor:settled], skip_special_tokens=True)
            after = self._tokenizer.decode(ids[anchor : i + 1], skip_special_tokens=True)
            if after.endswith(REPLACEMENT) and i + 1 < len(ids):
                continue
            position = min(position + max(0, len(after) - len(before)), len(text))
            anchor, settled = settled, i + 1
        return tuple(starts)
