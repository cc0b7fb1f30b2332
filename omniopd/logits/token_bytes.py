"""Which bytes each token writes, exactly, so that two tokenizers can be compared.

Standard library only; a tokenizer of transformers is handed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omniopd.errors import ConfigError, DataError
from omniopd.rollout.detokenize import REPLACEMENT, Detokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialToken:
    """A special token of a completion: it has no text, so nothing on the other side corresponds to it."""

    position: int
    token_id: int
    text: str
    """As the vocabulary spells it; empty for an id that only pads the model's vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """A completion cut by its own tokens. Letters: T all tokens, N those that take part in the alignment."""

    data: bytes
    """The text that the tokens write, byte for byte; the end may be part of a character."""
    ends: tuple[int, ...]
    """[N] where each token ends in `data`; non-decreasing, a token without text ends where the one before it does."""
    positions: tuple[int, ...]
    """[N] where each of them stands among all T tokens."""
    num_tokens: int
    """T"""
    specials: tuple[SpecialToken, ...] = ()
    """Left out, for the records."""
    num_kept: int = 0
    """How many special tokens take part because the caller said so."""

    def __post_init__(self) -> None:
        if len(self.ends) != len(self.positions):
            raise DataError(f"Segments has {len(self.ends)} ends and {len(self.positions)} positions")

    @property
    def text(self) -> str:
        """The text up to the first byte that is no UTF-8: what another tokenizer can be given."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            return self.data[: error.start].decode("utf-8")


class TokenBytes:
    """Tells which bytes each token of one tokenizer writes.

    Exact for byte-level BPE and for SentencePiece, with or without byte fallback, also where a character is split
    across tokens. Other tokenizers (WordPiece, slow ones) are cut between characters: the tokens that share a
    character end where it begins, but for the last of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of transformers."""
        self._tokenizer = tokenizer
        self._detokenize = Detokenizer(tokenizer)
        self._rule, self._space = _rule_of(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(i for i, token in added if token.special) | frozenset(tokenizer.all_special_ids)
        self._pieces: dict[int, bytes] = {}
        self._textless: dict[int, bool] = {}

    def __call__(self, token_ids: Sequence[int], *, keep: Collection[int] = ()) -> Segments:
        """Cut what these tokens write.

        Args:
            token_ids: [T] exactly as drawn.
            keep: ids of special tokens to compare although they have no text, such as the end of the turn. A kept
                token pairs with the other side's kept token at the same byte.
        """
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        pieces = self._exact_pieces(token_ids, text)
        if pieces is None:
            pieces = self._pieces_by_characters(token_ids)
        ends, position = [], 0
        for piece in pieces:
            position += len(piece)
            ends.append(position)
        return self._segments(token_ids, b"".join(pieces), ends, keep)

    def encode(self, text: str) -> tuple[tuple[int, ...], Segments]:
        """Tokenise a text without adding special tokens; return the ids and where they end in this very text.

        A tokenizer that changes the text (lower case, Unicode forms) still gets ends in the text as it was given.

        Raises:
            DataError: part of the text becomes a special token (an unknown character, or a special token that the text
                spells out); what a model says of that token is nothing about the text.
        """
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = tuple(encoding["input_ids"])
        offsets = [(int(a), int(b)) for a, b in encoding["offset_mapping"]]
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            if end > start and not self._has_text(token_id):
                raise DataError(
                    f"the tokenizer reads {text[start:end]!r} as {self._tokenizer.convert_ids_to_tokens(token_id)!r}, "
                    "a special token, which cannot be aligned; leave this completion to a text-only signal"
                )
        segments = self(ids)
        data = text.encode()
        if segments.data == data:
            return ids, segments
        starts = [a for a, _ in offsets[1:]] + [len(text)]
        bytes_before = [0]
        for character in text:
            bytes_before.append(bytes_before[-1] + len(character.encode()))
        ends, last = [], 0
        for (_, end), following in zip(offsets, starts, strict=True):
            last = max(last, min(end, following))
            ends.append(bytes_before[last])
        return ids, self._segments(ids, data, ends, ())

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes of one token, None where only the text around it tells; special tokens have none."""
        if self._rule is None:
            return None
        if token_id not in self._pieces:
            self._pieces[token_id] = self._piece(token_id)
        return self._pieces[token_id]

    def _piece(self, token_id: int) -> bytes:
        if not self._has_text(token_id):
            return b""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._rule == "byte_level":
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:
                return str(token).encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(self._space, " ").encode()

    def _has_text(self, token_id: int) -> bool:
        """Tell special tokens, and the ids that only pad a model's vocabulary, from all others."""
        if token_id not in self._textless:
            self._textless[token_id] = (
                token_id in self._special or self._tokenizer.convert_ids_to_tokens(token_id) is None
            )
        return not self._textless[token_id]

    def _pieces_by_characters(self, token_ids: Sequence[int]) -> list[bytes]:
        own = [i for i, token_id in enumerate(token_ids) if self._has_text(token_id)]
        text, starts = self._detokenize([token_ids[i] for i in own])
        pieces = [b""] * len(token_ids)
        for i, start, end in zip(own, starts, (*starts, len(text))[1:], strict=True):
            pieces[i] = text[start:end].encode()
        return pieces

    def _exact_pieces(self, token_ids: Sequence[int], text: str) -> list[bytes] | None:
        """Return the bytes of every token if they are what the tokenizer itself makes of them."""
        if self._rule is None:
            return None
        pieces = [self.piece(i) or b"" for i in token_ids]
        # What comes after a broken character is spelled differently by every decoder, so it is not compared.
        valid, broken, _ = text.partition(REPLACEMENT)
        expected = valid.encode()
        data = b"".join(pieces)
        if data == expected or (broken and data.startswith(expected)):
            return pieces
        first = next((i for i, piece in enumerate(pieces) if piece), None)
        stripped = data[1:]
        if (
            first is not None
            and data[:1] == b" "
            and (stripped == expected or (broken and stripped.startswith(expected)))
        ):
            # SentencePiece writes a space before the first word and takes it away again when it decodes.
            pieces[first] = pieces[first][1:]
            return pieces
        return None

    def _segments(self, token_ids: Sequence[int], data: bytes, ends: Sequence[int], keep: Collection[int]) -> Segments:
        kept = frozenset(keep)
        textless = [i for i, token_id in enumerate(token_ids) if not self._has_text(token_id)]
        left_out = [i for i in textless if token_ids[i] not in kept]
        positions = tuple(sorted(set(range(len(token_ids))) - set(left_out)))
        return Segments(
            data=data,
            ends=tuple(ends[i] for i in positions),
            positions=positions,
            num_tokens=len(token_ids),
            specials=tuple(
                SpecialToken(
                    position=i,
                    token_id=token_ids[i],
                    text=self._tokenizer.convert_ids_to_tokens(token_ids[i]) or "",
                )
                for i in left_out
            ),
            num_kept=len(textless) - len(left_out),
        )


def _rule_of(tokenizer: Any) -> tuple[Literal["byte_level", "sentencepiece"] | None, str]:
    """Return how the vocabulary spells bytes, and its sign for a space."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None, ""
    parts = list(_parts(json.loads(decoder.__getstate__())))
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return "byte_level", ""
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        signs = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
        return "sentencepiece", signs[0] if signs else "\N{LOWER ONE EIGHTH BLOCK}"
    return None, ""


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield decoder
    for part in decoder.get("decoders", ()):
        yield from _parts(part)


def _byte_characters() -> dict[str, int]:
    """Return the character that byte-level vocabularies write for each byte (GPT-2): itself where it is visible."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_characters()


def shared_tokens(
    student: TokenBytes, teacher: TokenBytes, student_size: int, teacher_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the tokens that write the same bytes in both vocabularies, in the student's order.

    The comparison is by bytes, so a byte-level " the" meets SentencePiece's. Of several tokens with the same bytes the
    last one counts (SentencePiece lists its 256 byte tokens first). Special tokens are left out.

    Args:
        student_size: number of ids in the student's tokenizer.
        teacher_size: the same of the teacher.

    Raises:
        ConfigError: a vocabulary without exact bytes.
    """
    tables = []
    for side, tokens, size in (("student", student, student_size), ("teacher", teacher, teacher_size)):
        table: dict[bytes, int] = {}
        for token_id in range(size):
            piece = tokens.piece(token_id)
            if piece is None:
                raise ConfigError(
                    f"the {side}'s tokenizer is neither byte-level nor SentencePiece, so its tokens have no bytes of "
                    "their own; use the uld loss, which needs none"
                )
            if piece:
                table[piece] = token_id
        tables.append(table)
    pairs = sorted((i, tables[1][piece]) for piece, i in tables[0].items() if piece in tables[1])
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)
