"""Similarity of meaning: the cosine of sentence embeddings. The only scorer that loads a model, and only when used.

Embeddings barely encode numbers, signs and negation; for mathematics blend them with `numbers`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omniopd.errors import ConfigError, MissingExtraError, ScoringError

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BATCH_SIZE = 256
CACHE_SIZE = 65_536
"""Texts whose vectors are kept for one model; 100 MB at 384 dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSimilarity:
    """The cosine of two sentence embeddings, with everything below 0 taken as 0.

    Clipping keeps the scale of the cosine, which for sentence encoders is rarely negative; (1 + cos) / 2 would put
    unrelated texts at 0.5. Texts on one topic still score 0.6 to 0.9: consider `| floor`. Identical texts score 1, an
    empty text against any other 0. Text beyond the model's `max_seq_length` (256 tokens for MiniLM) is not seen.
    """

    model: str = DEFAULT_MODEL
    """A sentence-transformers name or a local folder."""
    device: str | None = None
    """None leaves the choice to sentence-transformers."""

    @property
    def name(self) -> str:
        return f"embedding:{self.model}" + (f" | device {self.device}" if self.device else "")

    def __call__(self, a: str, b: str) -> float:
        return self.pairs((a,), (b,))[0]

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """Compare a[i] with b[i]; every distinct text is encoded once, all in one batch."""
        if len(a) != len(b):
            raise ScoringError(f"cannot pair {len(a)} texts with {len(b)}; expected as many on both sides")
        open_pairs = [(left, right) for left, right in zip(a, b, strict=True) if _needs_model(left, right)]
        texts = dict.fromkeys(text for pair in open_pairs for text in pair)
        vectors = _encoder(self.model, self.device).encode(list(texts)) if texts else {}
        scores: list[float] = []
        for left, right in zip(a, b, strict=True):
            if _needs_model(left, right):
                scores.append(min(1.0, max(0.0, float(vectors[left] @ vectors[right]))))
            else:
                scores.append(1.0 if left == right else 0.0)
        return scores


def _needs_model(a: str, b: str) -> bool:
    return a != b and bool(a.strip()) and bool(b.strip())


@dataclass(slots=True, kw_only=True)
class _Encoder:
    """A loaded model with the vectors it made last. Safe to share between threads."""

    model: Any
    vectors: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    """text -> [E] float64, unit length; the least recently used first."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return the unit vector [E] of every text."""
        with self.lock:
            new = [text for text in texts if text not in self.vectors]
            if new:
                rows = self.model.encode(
                    new,
                    batch_size=BATCH_SIZE,
                    normalize_embeddings=True,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                )
                self.vectors.update(zip(new, rows.astype(float), strict=True))
            found = {text: self.vectors[text] for text in texts}
            for text in texts:
                self.vectors.move_to_end(text)
            while len(self.vectors) > CACHE_SIZE:
                self.vectors.popitem(last=False)
            return found


_encoders: dict[tuple[str, str | None], _Encoder] = {}
_loading = threading.Lock()


def _encoder(model: str, device: str | None) -> _Encoder:
    """Return the encoder of a model, loaded once for the process."""
    with _loading:
        if (model, device) not in _encoders:
            _encoders[model, device] = _Encoder(model=_load(model, device))
        return _encoders[model, device]


def _load(model: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError(
            "the embedding similarity needs sentence-transformers: pip install 'omniopd[similarity]'"
        ) from error
    try:
        return SentenceTransformer(model, device=device)
    except (OSError, ValueError, RuntimeError) as error:
        where = f" on device {device!r}" if device else ""
        raise ConfigError(
            f"cannot load the embedding model {model!r}{where}: {error}; "
            "expected a sentence-transformers name that is cached or reachable, or a local folder"
        ) from error
