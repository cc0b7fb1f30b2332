"""A loopback server that scores prompts as vLLM 0.32 does: same fields, same words when it refuses.

The log-probs are those of a small exact model, so tests compare numbers and not only shapes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopback import Loopback, Received, Scripted

VOCABULARY = 12
CLAMPED = -9999.0

Table = NDArray[np.float64]


def logprobs_of(ids: Sequence[int]) -> Table:
    """Return log-probs [L, V] of what follows each token; every token before it counts, and so does the order."""
    state, rows = 0.0, []
    for token in ids:
        state = np.sin(1.3 * state + 0.7 * token + 1.0)
        logits = 3.0 * np.sin(np.arange(VOCABULARY) * (1.0 + state) + 5.0 * state)
        rows.append(logits - np.log(np.exp(logits).sum()))
    return np.array(rows)


class ScoringServer(Loopback):
    """The server.

    Args:
        model: log-probs [L, V] of what follows each token of a prompt.
        max_logprobs: as --max-logprobs; -1 for the whole vocabulary.
        max_model_len: as --max-model-len.
        can_score_ids: as --enable-scale-out with the V2 model runner; None: with the V1 runner.
        change: replaces an answer's body before it is sent.
        before: answers instead of the server where it returns something.
    """

    def __init__(
        self,
        *,
        model: Callable[[Sequence[int]], Table] = logprobs_of,
        max_logprobs: int = 20,
        max_model_len: int = 512,
        can_score_ids: bool | None = False,
        change: Callable[[dict[str, Any]], Any] = lambda body: body,
        before: Callable[[Received], Scripted | None] = lambda received: None,
    ) -> None:
        self._model = model
        self._max_logprobs = max_logprobs
        self._max_model_len = max_model_len
        self._can_score_ids = can_score_ids
        self._change = change
        self._before = before
        super().__init__(self._answer)

    def _answer(self, received: Received) -> Scripted:
        if (scripted := self._before(received)) is not None:
            return scripted
        if received.path == "/v1/completions":
            return self._completions(received.body)
        if received.path == "/inference/v1/generate":
            return self._generate(received.body)
        return Scripted(status=404, body={"detail": "Not Found"})

    def _completions(self, body: dict[str, Any]) -> Scripted:
        ids, width = body["prompt"], body["prompt_logprobs"]
        if refusal := self._refusal(ids, VOCABULARY if width == -1 else width, body["max_tokens"]):
            return refusal
        choice = {"index": 0, "text": " a", "logprobs": None, "prompt_logprobs": self._rows(ids, width)}
        return Scripted(body=self._change({"id": "cmpl-1", "object": "text_completion", "choices": [choice]}))

    def _generate(self, body: dict[str, Any]) -> Scripted:
        if self._can_score_ids is False:
            words = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
            return Scripted(status=403, body={"error": words})
        if self._can_score_ids is None:
            return _bad_request(
                "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1).",
                "prompt_logprob_token_ids",
            )
        ids, sampling = body["token_ids"], body["sampling_params"]
        wanted, start = np.array(sampling["prompt_logprob_token_ids"]), sampling["prompt_logprob_start"]
        if refusal := self._refusal(ids, wanted.shape[1], sampling["max_tokens"]):
            return refusal
        assert len(wanted) == len(ids) - 1 - start  # As the server insists.
        scores = np.take_along_axis(self._model(ids)[start:-1], wanted, axis=1).astype(np.float32)
        buffer = io.BytesIO()
        np.save(buffer, scores, allow_pickle=False)
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        rows = self._rows(ids, sampling["prompt_logprobs"])
        return Scripted(
            body=self._change({"request_id": "1", "prompt_logprobs": rows, "prompt_token_id_logprobs": encoded})
        )

    def _refusal(self, ids: Sequence[int], width: int, max_tokens: int) -> Scripted | None:
        limit = VOCABULARY if self._max_logprobs == -1 else self._max_logprobs
        room = self._max_model_len - len(ids)
        if room < 0:
            return _bad_request(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your prompt contains "
                f"{len(ids)} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
                "length of the input prompt.",
                "input_tokens",
            )
        if min(room, max_tokens) < 1:
            return _bad_request("max_tokens must be at least 1, got 0.", "max_tokens")
        if width > limit:
            return _bad_request(
                f"Requested prompt logprobs of {width}, which is greater than max allowed: {limit}", "prompt_logprobs"
            )
        if max(ids) >= VOCABULARY:
            return _bad_request(f"Token id {max(ids)} is out of vocabulary", None)
        return None

    def _rows(self, ids: Sequence[int], width: int) -> list[dict[str, Any] | None]:
        count = VOCABULARY if width == -1 else width
        rows: list[dict[str, Any] | None] = [None]
        for logprobs, token in zip(self._model(ids)[:-1], ids[1:], strict=True):
            # The prompt's own token first, with the number of tokens that are at least as likely; where it is among
            # the likeliest, its place there replaces that.
            entries = {str(token): _entry(logprobs[token], int((logprobs >= logprobs[token]).sum()))}
            for rank, one in enumerate(np.argsort(-logprobs, kind="stable")[:count].tolist(), start=1):
                entries[str(one)] = _entry(logprobs[one], rank)
            rows.append(entries)
        return rows


def _entry(logprob: float, rank: int) -> dict[str, Any]:
    said = CLAMPED if logprob == -np.inf else float(np.float32(logprob))
    # What a token decodes to may look like the answer itself.
    return {"logprob": said, "rank": rank, "decoded_token": '"prompt_logprobs":[{"1":{'}


def _bad_request(message: str, parameter: str | None) -> Scripted:
    words = message if parameter is None else f"{message} (parameter={parameter}, value=1)"
    return Scripted(
        status=400, body={"error": {"message": words, "type": "BadRequestError", "param": parameter, "code": 400}}
    )
