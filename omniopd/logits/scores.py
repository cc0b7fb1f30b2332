"""What an open-weight teacher says of a completion, token by token: one record that serves every objective.

    Reading -> SequenceTeacher.score -> TokenScores | the reason why there are none

Shape letters: T tokens of the completion, K tokens whose log-probs are known at each of them, k the student's
likeliest. Arrays are numpy and read-only; log-probs are nats at temperature 1. Importing this file loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from omniopd.errors import DataError
from omniopd.types import Missing

Floats = NDArray[np.floating]
Ids = NDArray[np.integer]
Known = Literal["teacher_top_k", "requested", "vocabulary"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reading:
    """A completion as a teacher reads it: token ids of its own vocabulary, after its own prompt."""

    prompt_ids: tuple[int, ...]
    """At least one."""
    token_ids: tuple[int, ...]
    """[T]"""
    requested_TK: Ids | None = None
    """Tokens whose log-probs are asked for at each position, such as the student's likeliest; None: none."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise DataError("a reading has no prompt; a model says nothing about a first token without one before it")
        if self.requested_TK is not None:
            _check_table("requested_TK", self.requested_TK, len(self.token_ids))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenScores:
    """The record of one completion."""

    logprobs_T: Floats
    """log Q(y_t) of the completion's own tokens."""
    known: Known | None = None
    """How the tokens of `ids_TK` were chosen; None: only the completion's own are known."""
    ids_TK: Ids | None = None
    logprobs_TK: Floats | None = None
    """log Q of `ids_TK`; the likeliest first where they are the teacher's own choice."""
    student_logprobs_T: Floats | None = None
    """log P(y_t) when the record was made, of the student's own tokens: as many as the teacher's in one vocabulary."""
    student_ids_Tk: Ids | None = None
    """The student's likeliest tokens when the record was made, the likeliest first."""
    student_logprobs_Tk: Floats | None = None

    def __post_init__(self) -> None:
        size = len(self.logprobs_T)
        if self.logprobs_T.ndim != 1:
            raise DataError(f"logprobs_T has shape {self.logprobs_T.shape}, expected one number a token")
        if (self.known is None) != (self.ids_TK is None) or (self.ids_TK is None) != (self.logprobs_TK is None):
            raise DataError("known, ids_TK and logprobs_TK go together: give all three or none")
        tables = ("ids_TK", "logprobs_TK", "student_ids_Tk", "student_logprobs_Tk")
        for name in tables:
            if (table := getattr(self, name)) is not None:
                _check_table(name, table, size)
        if self.ids_TK is not None and self.logprobs_TK is not None and self.ids_TK.shape != self.logprobs_TK.shape:
            raise DataError(
                f"ids_TK is {self.ids_TK.shape} and logprobs_TK {self.logprobs_TK.shape}; expected one shape"
            )
        for name in ("logprobs_T", *tables, "student_logprobs_T"):
            if (array := getattr(self, name)) is not None:
                array.flags.writeable = False

    @property
    def num_tokens(self) -> int:
        return len(self.logprobs_T)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scored:
    """A record, or the reason why there is none. Absent is never zero."""

    scores: TokenScores | None = None
    missing: Missing | None = None
    detail: str = ""
    """What went wrong. Never holds a key."""

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.missing is None):
            raise DataError("a scored completion has either scores or a reason")


class SequenceTeacher(Protocol):
    """An open-weight teacher that scores token ids of its own vocabulary: in this process, on a server, from disk."""

    @property
    def id(self) -> str:
        """For records."""
        ...

    async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
        """Score every completion, in order.

        With `top_k` the records hold the teacher's likeliest tokens; with `Reading.requested_TK` those tokens instead.
        A completion that fails becomes a `Scored` with a reason. Raises ConfigError for what this teacher cannot give
        at all (too large a `top_k`, requested tokens), TeacherAuthError and TeacherConnectionError where no further
        request would do better.
        """
        ...

    async def aclose(self) -> None: ...


def _check_table(name: str, table: NDArray[np.generic], num_tokens: int) -> None:
    if table.ndim != 2 or len(table) != num_tokens:
        raise DataError(f"{name} has shape {table.shape}, expected [{num_tokens}, any number of tokens]")
