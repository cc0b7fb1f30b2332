"""Log-probs of fixed completions from disk: written once from any teacher, read by any number of runs.

Letters: T tokens of a completion, N of several completions one after the other, S tokens stored at each position,
K tokens asked for. A completion takes 4 bytes a token and 8 more for each stored token: 516 bytes at S 64.
Log-probs are float32. Importing this file loads no torch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omniopd.errors import ConfigError, DataError
from omniopd.logits.score_folder import (
    FolderReader,
    FolderWriter,
    Manifest,
    WriteCounts,
    completion_key,
    unwritten,
)
from omniopd.logits.scores import Floats, Ids, Known, Reading, Scored, SequenceTeacher, TokenScores
from omniopd.logits.shards import WRITE_COMMAND
from omniopd.types import Missing


class StoredScores:
    """A teacher whose answers lie in a folder; a `SequenceTeacher`. Maps the files, so the folder may exceed memory.

    A writer may add to the folder meanwhile. A completion that is not there is missing; tokens asked for by id come
    from the stored likeliest ones, and one that is not among them makes the record missing: its log-prob is unknown,
    not small.

    Args:
        identity: what the folder must be of, see `Manifest.identity`; None: whatever it is of.

    Raises:
        ConfigError: no such folder, or one of something else.
        DataError: its manifest or index cannot be read.
    """

    def __init__(self, folder: Path | str, *, identity: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.manifest.expect("scores", identity, self.folder)
        self._reader = FolderReader(self.folder, "numpy")

    def __repr__(self) -> str:
        return f"StoredScores({str(self.folder)!r})"

    def __len__(self) -> int:
        """Return how many completions were there when last looked."""
        return len(self._reader)

    def __contains__(self, reading: Reading) -> bool:
        return not reading.token_ids or self._reader.find(completion_key(reading)) is not None

    @property
    def id(self) -> str:
        """That of the teacher that was written down."""
        return self.manifest.teacher

    async def score(self, readings: Sequence[Reading], *, top_k: int = 0) -> list[Scored]:
        """Read the records of the completions, in order.

        Raises ConfigError for more tokens than are stored, DataError for a damaged file.
        """
        stored = self.manifest.top_k or 0
        if not 0 <= top_k <= stored:
            raise ConfigError(
                f"top_k is {top_k}, but {self.folder} stores the teacher's {stored} likeliest tokens; ask for 0 to "
                f"{stored}, or write another folder with a larger top_k"
            )
        if stored == 0 and any(reading.requested_TK is not None for reading in readings):
            raise ConfigError(
                f"tokens are requested by id, but {self.folder} stores the completions' own log-probs only (top_k 0); "
                "write another folder with a top_k that covers them"
            )
        return await asyncio.to_thread(self._score, readings, top_k)

    async def aclose(self) -> None:
        """Do nothing: no file stays open between two calls."""

    def _score(self, readings: Sequence[Reading], top_k: int) -> list[Scored]:
        keys = [completion_key(reading) for reading in readings]
        is_requested = any(reading.requested_TK is not None for reading in readings)
        columns = (self.manifest.top_k or 0) if is_requested else top_k
        names: dict[str, int | None] = {"logprobs": None}
        if columns:
            names |= {"top_ids": columns, "top_logprobs": columns}
        found = self._reader.read([key for key, r in zip(keys, readings, strict=True) if r.token_ids], names)
        nothing = {"logprobs": np.empty(0, np.float32), "top_ids": np.empty((0, columns), np.int32)}
        nothing["top_logprobs"] = nothing["top_ids"].astype(np.float32)
        return [
            self._scored(reading, found.get(key) if reading.token_ids else nothing, top_k)
            for key, reading in zip(keys, readings, strict=True)
        ]

    def _scored(self, reading: Reading, arrays: Mapping[str, Any] | None, top_k: int) -> Scored:
        if arrays is None:
            detail = f"not in the folder {self.folder}; write it with `{WRITE_COMMAND}`"
            return Scored(missing=Missing.FAILED, detail=detail)
        # Two readings may be one completion, and whoever gets a record may set its arrays read-only.
        logprobs_T, requested_TK = np.array(arrays["logprobs"]), reading.requested_TK
        if requested_TK is None and top_k == 0:
            return Scored(scores=TokenScores(logprobs_T=logprobs_T))
        ids_TS, logprobs_TS = arrays["top_ids"], arrays["top_logprobs"]
        if requested_TK is None:
            known: Known = "vocabulary" if top_k == self.manifest.vocabulary else "teacher_top_k"
            ids_TK, logprobs_TK = np.array(ids_TS[:, :top_k]), np.array(logprobs_TS[:, :top_k])
        else:
            known, ids_TK = "requested", np.array(requested_TK)
            own_T = np.array(reading.token_ids, dtype=np.int64)
            logprobs_TK = _gather(requested_TK, own_T, logprobs_T, ids_TS, logprobs_TS)
            if np.isnan(logprobs_TK).any():
                return Scored(missing=Missing.FAILED, detail=self._unknown(requested_TK, np.isnan(logprobs_TK)))
        return Scored(scores=TokenScores(logprobs_T=logprobs_T, known=known, ids_TK=ids_TK, logprobs_TK=logprobs_TK))

    def _unknown(self, requested_TK: Ids, is_unknown_TK: NDArray[np.bool_]) -> str:
        position, column = np.argwhere(is_unknown_TK)[0]
        return (
            f"requested token {requested_TK[position, column]} at position {position} is not among the "
            f"{self.manifest.top_k} that {self.folder} stores ({is_unknown_TK.any(axis=1).sum()} of "
            f"{len(is_unknown_TK)} positions lack one); ask for the teacher's likeliest, or store a larger top_k"
        )


async def write_scores(
    folder: Path | str,
    teacher: SequenceTeacher,
    readings: Sequence[Reading],
    *,
    top_k: int,
    identity: str = "",
    vocabulary: int | None = None,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> WriteCounts:
    """Ask a teacher for what the folder does not have yet, and write it down. Run it again to go on after a kill.

    Spends what the teacher costs. Log-probs are rounded to float32; tokens that a reading requests play no part.

    Args:
        top_k: the teacher's likeliest tokens to store at each position; 0: the completion's own alone.
        identity: see `Manifest.identity`.
        vocabulary: of the teacher; ids are checked against it, and a `top_k` of that size is the whole distribution.
        batch: completions of one call and one shard: what a kill loses at most.
        progress: called with completions done and all of them.

    Raises:
        ConfigError: the folder is of another teacher or top_k, or the teacher cannot give what is asked.
        RunError: another process is writing the folder, or the disk refuses.
        TeacherError: as the teacher has it; what was written stays.
        DataError: the teacher's record is not what was asked for.
    """
    if top_k < 0 or batch < 1:
        raise ConfigError(f"top_k is {top_k} and batch {batch}; expected 0 or more, and 1 or more")
    manifest = Manifest(kind="scores", teacher=teacher.id, identity=identity, vocabulary=vocabulary, top_k=top_k)
    missing: Counter[Missing] = Counter()
    first_missing, written = "", 0
    with FolderWriter(Path(folder), manifest) as writer:
        new = list(unwritten(writer, readings).items())
        done = len(readings) - len(new)
        for start in range(0, len(new), batch):
            asked = dict(new[start : start + batch])
            answers = await teacher.score(list(asked.values()), top_k=top_k)
            scored = zip(asked, answers, strict=True)
            said = {key: _likeliest_first(a.scores) for key, a in scored if a.scores is not None}
            missing.update(a.missing for a in answers if a.missing is not None)
            first_missing = first_missing or next((a.detail for a in answers if a.missing is not None), "")
            for key, scores in said.items():
                _check(scores, asked[key], top_k, vocabulary, teacher.id)
            if said:
                lengths = [(key, scores.num_tokens) for key, scores in said.items()]
                await asyncio.to_thread(writer.add, lengths, _arrays(list(said.values()), top_k))
            written, done = written + len(said), done + len(asked)
            if progress is not None:
                progress(done, len(readings))
    return WriteCounts(
        written=written, already_there=len(readings) - len(new), missing=dict(missing), first_missing=first_missing
    )


def _gather(requested_TK: Ids, own_T: Ids, logprobs_T: Floats, ids_TS: Ids, logprobs_TS: Floats) -> Floats:
    """Return the log-probs of the requested tokens [T, K]; NaN where nobody knows."""
    logprobs_TK = np.full(requested_TK.shape, np.nan, dtype=logprobs_T.dtype)
    for column, ids_T in enumerate(requested_TK.T):
        rows_N, places_N = np.nonzero(ids_TS == ids_T[:, None])
        logprobs_TK[rows_N, column] = logprobs_TS[rows_N, places_N]
        # The completion's own token is known wherever it stands in the teacher's order.
        is_own_T = ids_T == own_T
        logprobs_TK[is_own_T, column] = logprobs_T[is_own_T]
    return logprobs_TK


def _likeliest_first(scores: TokenScores) -> TokenScores:
    """Sort a record of the whole vocabulary, which may come in the order of the ids."""
    if scores.known != "vocabulary" or scores.ids_TK is None or scores.logprobs_TK is None:
        return scores
    order_TK = np.argsort(-scores.logprobs_TK, axis=1, kind="stable")
    ids_TK = np.take_along_axis(scores.ids_TK, order_TK, axis=1)
    return replace(scores, ids_TK=ids_TK, logprobs_TK=np.take_along_axis(scores.logprobs_TK, order_TK, axis=1))


def _check(scores: TokenScores, reading: Reading, top_k: int, vocabulary: int | None, teacher: str) -> None:
    """Raise DataError for a record that later readers could not rely on."""
    said = f"{teacher} scored a completion of {len(reading.token_ids)} tokens"
    if scores.num_tokens != len(reading.token_ids):
        raise DataError(f"{said} with {scores.num_tokens} log-probs; expected one a token")
    ids_TK, logprobs_TK = scores.ids_TK, scores.logprobs_TK
    if np.isnan(scores.logprobs_T).any() or (logprobs_TK is not None and np.isnan(logprobs_TK).any()):
        raise DataError(f"{said}, and a log-prob is not a number; nothing that is learned from it would be")
    if top_k == 0:
        return
    if ids_TK is None or logprobs_TK is None or scores.known == "requested" or ids_TK.shape[1] != top_k:
        got = f"{scores.known}, {0 if ids_TK is None else ids_TK.shape[1]} a token"
        raise DataError(f"{said} with other tokens than the {top_k} likeliest that were asked for: {got}")
    if (logprobs_TK[:, 1:] > logprobs_TK[:, :-1]).any():
        raise DataError(f"{said} with likeliest tokens out of order; the likeliest must come first")
    if vocabulary is not None and (ids_TK.min() < 0 or ids_TK.max() >= vocabulary):
        raise DataError(f"{said} with ids {ids_TK.min()} to {ids_TK.max()}; expected 0 to {vocabulary - 1}")


def _arrays(records: Sequence[TokenScores], top_k: int) -> dict[str, Any]:
    """Return what a shard holds: the records one after the other."""
    arrays: dict[str, Any] = {"logprobs": np.concatenate([r.logprobs_T for r in records]).astype(np.float32)}
    if top_k:
        arrays["top_ids"] = np.concatenate([r.ids_TK for r in records if r.ids_TK is not None]).astype(np.int32)
        tables = [r.logprobs_TK for r in records if r.logprobs_TK is not None]
        arrays["top_logprobs"] = np.concatenate(tables).astype(np.float32)
    return arrays
