"""What a vLLM server is asked for one completion, and its answer as a record. No network.

    Ask -> request_fields -> (the server) -> read_answer -> Scored

Shape letters: T tokens of a completion, N likeliest at each, K tokens of a record, V vocabulary.
"""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from omniopd.errors import ConfigError
from omniopd.logits.scores import Floats, Ids, Known, Reading, Scored, TokenScores
from omniopd.types import Missing

WHOLE_VOCABULARY = -1

_CLAMPED = -9999.0
"""What vLLM writes for -inf, which JSON does not know."""
_ROUNDING = 0.01
"""More than a log-prob may be above 0, or the probabilities of some tokens above 1."""
_SAME = 1e-3
"""Nats between two ways of reading one log-prob from one forward pass."""
_TABLE = re.compile(r'"prompt_logprobs"\s*:\s*\[')
_BY_IDS = re.compile(rb'"prompt_token_id_logprobs"\s*:\s*"([^"]*)"')
_GAP = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ask:
    """One completion, and what is wanted of it."""

    reading: Reading
    known: Known | None
    width: int
    """How many of the likeliest tokens the server is asked for; WHOLE_VOCABULARY for all."""
    num_kept: int
    """K"""
    is_by_ids: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        return self.reading.prompt_ids + self.reading.token_ids


def request_fields(ask: Ask) -> dict[str, Any]:
    """Return what a request says besides the model."""
    if not ask.is_by_ids:
        drawn = {"max_tokens": 1, "temperature": 0, "add_special_tokens": False}
        return {**drawn, "prompt": ask.ids, "prompt_logprobs": ask.width}
    assert ask.reading.requested_TK is not None
    # The completion's own tokens too: their log-probs come twice, which shows whether the rows are where they should.
    rows = np.column_stack([ask.reading.requested_TK, ask.reading.token_ids]).tolist()
    wanted = {"prompt_logprob_token_ids": rows, "prompt_logprob_start": len(ask.reading.prompt_ids) - 1}
    sampling = {**wanted, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    return {"token_ids": ask.ids, "sampling_params": sampling}


class UnreadableError(Exception):
    """An answer that is not what was asked for."""


def read_answer(body: bytes, ask: Ask) -> Scored:
    """Turn an answer into a record. Raises UnreadableError and ConfigError."""
    own_T, ids_TN, logprobs_TN = _read_table(body.decode("utf-8", "replace"), ask)
    if own_T.max() > _ROUNDING or (np.exp(np.minimum(logprobs_TN, 1.0)).sum(axis=1) > 1.0 + _ROUNDING).any():
        raise ConfigError(
            "the server's numbers are no log-probs: they add up to more than 1; start it without --logprobs-mode"
        )
    requested = ask.reading.requested_TK
    if ask.known == "vocabulary":
        expected = np.arange(ask.num_kept)
        if ids_TN.shape[1] != ask.num_kept or (np.sort(ids_TN, axis=1) != expected).any():
            raise ConfigError(
                f"the server's model has {ids_TN.shape[1]} tokens and vocab_size is {ask.num_kept}; set vocab_size to "
                "the number of its logits (vocab_size in its config.json)"
            )
        logprobs_TV = np.empty_like(logprobs_TN)
        np.put_along_axis(logprobs_TV, ids_TN, logprobs_TN, axis=1)
        return Scored(scores=as_record(ask, own_T, np.broadcast_to(expected, ids_TN.shape), logprobs_TV))
    if requested is None:
        return Scored(scores=as_record(ask, own_T, ids_TN, logprobs_TN))
    wanted_TK = np.array(requested, dtype=np.int64)
    if ask.is_by_ids:
        return Scored(scores=as_record(ask, own_T, wanted_TK, _read_scores(body, own_T, wanted_TK.shape)))
    own_ids = np.array(ask.reading.token_ids)
    found_TK = _find(np.column_stack([own_ids, ids_TN]), np.column_stack([own_T, logprobs_TN]), wanted_TK)
    if num_lacking := int(np.isnan(found_TK).any(axis=1).sum()):
        detail = f"at {num_lacking} of {len(own_T)} tokens a requested id is not among the {ids_TN.shape[1]} likeliest "
        detail += "that the server gave; raise search_top and the server's --max-logprobs (-1 for the whole vocabulary)"
        return Scored(missing=Missing.FAILED, detail=detail)
    return Scored(scores=as_record(ask, own_T, wanted_TK, found_TK))


def as_record(ask: Ask, own_T: Floats, ids_TK: Ids, logprobs_TK: Floats) -> TokenScores:
    """Return a record of what was asked for; without tables where that was the completion's own tokens alone."""
    if ask.known is None:
        return TokenScores(logprobs_T=own_T)
    return TokenScores(logprobs_T=own_T, known=ask.known, ids_TK=ids_TK, logprobs_TK=logprobs_TK)


def _read_table(text: str, ask: Ask) -> tuple[Floats, Ids, Floats]:
    """Return the log-probs [T] of the completion's tokens, and ids and log-probs [T, N] of the likeliest, in order.

    One position is parsed at a time: 64 of each of 4,096 tokens then peak at 31 MB, and at 106 MB all at once.
    """
    start = _TABLE.search(text)
    if start is None:
        raise UnreadableError("the answer holds no prompt_logprobs, which vLLM's server gives")
    parse, at = json.JSONDecoder().raw_decode, start.end()
    own: list[float] = []
    ids: list[Ids] = []
    logprobs: list[Floats] = []
    width = ask.width
    for position, token in enumerate(ask.ids):
        try:
            row, at = parse(text, _GAP.match(text, at).end())  # type: ignore[union-attr]
            if position == 0:
                continue  # Nothing precedes the first token.
            entry = row[str(token)]
            if position < len(ask.reading.prompt_ids):
                continue
            width = len(row) if width == WHOLE_VOCABULARY else width
            if len(row) == width + 1:
                del row[str(token)]  # It is always there, also where it is not among the likeliest.
            if len(row) != width:
                raise ValueError
            ids.append(np.fromiter(map(int, row), np.int64, width))
            logprobs.append(np.fromiter((e["logprob"] for e in row.values()), np.float32, width))
            own.append(float(entry["logprob"]))
        except (KeyError, TypeError, ValueError):
            raise UnreadableError(
                f"prompt_logprobs does not have token {token} at position {position}, or not with {width} likeliest"
            ) from None
    if not text.startswith("]", _GAP.match(text, at).end()):  # type: ignore[union-attr]
        raise UnreadableError(f"prompt_logprobs goes on after the {len(ask.ids)} tokens that were sent")
    own_T, logprobs_TN = np.array(own, np.float32), np.stack(logprobs)
    if np.isnan(own_T).any() or np.isnan(logprobs_TN).any():
        raise UnreadableError("prompt_logprobs holds what is no number")
    for array in (own_T, logprobs_TN):
        array[array == _CLAMPED] = -np.inf
    order = np.argsort(-logprobs_TN, axis=1, kind="stable")
    return own_T, np.take_along_axis(np.stack(ids), order, axis=1), np.take_along_axis(logprobs_TN, order, axis=1)


def largest_gap(ours_T: Floats, theirs_T: Floats) -> float:
    """Return the largest difference; tokens that are impossible to both agree."""
    finite = np.isfinite(ours_T) & np.isfinite(theirs_T)
    gaps_T = np.abs(np.where(finite, ours_T, 0.0) - np.where(finite, theirs_T, 0.0))
    return float(np.where(finite | (ours_T == theirs_T), gaps_T, np.inf).max(initial=0.0))


def _read_scores(body: bytes, own_T: Floats, shape: tuple[int, ...]) -> Floats:
    """Return the log-probs [T, K] of the ids that the server was handed."""
    found = _BY_IDS.search(body)
    try:
        scores = np.load(io.BytesIO(base64.b64decode(found[1])), allow_pickle=False) if found else None
    except (ValueError, EOFError):
        scores = None
    if scores is None or scores.shape != (shape[0], shape[1] + 1) or np.isnan(scores).any():
        raise UnreadableError("prompt_token_id_logprobs does not hold the log-probs that were asked for")
    if largest_gap(scores[:, -1], own_T) > _SAME:
        raise UnreadableError("prompt_token_id_logprobs and prompt_logprobs disagree about the completion's own tokens")
    return np.array(scores[:, :-1])


def _find(ids_TN: Ids, logprobs_TN: Floats, wanted_TK: Ids) -> Floats:
    """Return the log-prob of each wanted id at its own position; NaN where it is not there."""
    order = np.argsort(ids_TN, axis=1)
    # One search for all rows: each in a range of numbers of its own.
    rows = np.arange(len(ids_TN))[:, None] * (1 + max(ids_TN.max(), wanted_TK.max(initial=0)))
    known = (np.take_along_axis(ids_TN, order, axis=1) + rows).ravel()
    places = np.searchsorted(known, wanted_TK + rows).clip(max=len(known) - 1)
    is_found = (known[places] == wanted_TK + rows) & (wanted_TK >= 0)
    return np.where(is_found, np.take_along_axis(logprobs_TN, order, axis=1).ravel()[places], np.float32(np.nan))
