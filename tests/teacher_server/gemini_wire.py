"""Gemini's generateContent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .asked import Answer, Asked, RejectedError, Sample, estimate, names, number, schema_field, stops
from .world import find_prefix

_FIELDS = names("contents systemInstruction generationConfig safetySettings tools toolConfig cachedContent labels")
_CONFIG = names(
    "candidateCount maxOutputTokens temperature topP topK seed stopSequences presencePenalty frequencyPenalty "
    "responseMimeType responseSchema responseJsonSchema responseLogprobs logprobs thinkingConfig responseModalities "
    "mediaResolution speechConfig"
)
_THINKING = frozenset({"thinkingBudget", "thinkingLevel", "includeThoughts"})
_NO_PREFILL = re.compile(r"no-prefill|gemini-3\.5-flash-lite|gemini-3\.[6-9]")
_NO_SAMPLING = re.compile(r"no-sampling|gemini-3\.5-flash-lite|gemini-3\.[6-9]")
_STATUS = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}
_RPC = "type.googleapis.com/google.rpc."


class GeminiWire:
    """Field names as in the REST reference, in camel case or with underscores."""

    name = "gemini"

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        return headers.get("x-goog-api-key") or query.get("key")

    def read(self, body: Any, path: str, headers: Mapping[str, str]) -> Asked:
        if not isinstance(body, dict):
            raise RejectedError("Invalid JSON payload received.")
        model = path.rpartition("/")[2].partition(":")[0]
        body = _known(body, _FIELDS, "")
        if not body.get("contents"):
            raise RejectedError("* GenerateContentRequest.contents: contents is not specified")
        turns = [_turn(content, i) for i, content in enumerate(body["contents"])]
        system = _parts(body.get("systemInstruction") or {"parts": []}, "system_instruction")
        config = _known(body.get("generationConfig") or {}, _CONFIG, "generation_config")
        thinking = _known(config.get("thinkingConfig") or {}, _THINKING, "generation_config.thinking_config")
        if "thinkingBudget" in thinking and "thinkingLevel" in thinking:
            raise RejectedError("You can only set only one of thinking budget and thinking level.")
        if turns[-1][0] == "assistant" and _NO_PREFILL.search(model):
            raise RejectedError("Requests ending with a model turn are not supported for this model.")
        if _NO_SAMPLING.search(model) and config.keys() & {"temperature", "topP", "topK"}:
            raise RejectedError("Sampling parameters are not supported for this model.")
        schema = config.get("responseJsonSchema") or config.get("responseSchema")
        if schema is not None and config.get("responseMimeType") != "application/json":
            raise RejectedError("response_schema requires response_mime_type application/json")
        return Asked(
            model=model,
            prompts=(find_prefix(turns, is_prefill=turns[-1][0] == "assistant"),),
            n=number(config, "candidateCount", 1, 8, whole=True) or 1,
            max_tokens=number(config, "maxOutputTokens", 1, 1 << 20, whole=True),
            stop=stops(config.get("stopSequences"), most=5, name="stop_sequences"),
            seeds=(number(config, "seed", -(1 << 31), (1 << 31) - 1, whole=True),),
            is_greedy=number(config, "temperature", 0, 2) == 0,
            thinks=thinking.get("thinkingBudget") != 0,
            schema_field=None if schema is None else schema_field(schema),
            input_tokens=estimate(len(turns), len(system) + sum(len(text) for _, text in turns)),
        )

    def answer(self, asked: Asked, samples: list[Sample], number: int) -> dict[str, Any]:
        thinking = sum(sample.thinking_tokens for sample in samples)
        output = sum(sample.tokens for sample in samples)
        usage = {
            "promptTokenCount": asked.input_tokens,
            "candidatesTokenCount": output,
            "totalTokenCount": asked.input_tokens + output + thinking,
        }
        if thinking:
            usage["thoughtsTokenCount"] = thinking
        return {
            "candidates": [_candidate(i, sample) for i, sample in enumerate(samples)],
            "usageMetadata": usage,
            "modelVersion": asked.model,
            "responseId": f"r{number}",
        }

    def reject(self, error: RejectedError) -> Answer:
        violation = {"description": error.message}
        return _error(error.status, error.message, [{"@type": f"{_RPC}BadRequest", "fieldViolations": [violation]}])

    def fail(self, kind: str, *, retry_after_s: float | None = None) -> Answer:
        if kind == "auth":  # A wrong key is a 400 here, not a 401.
            info = {"@type": f"{_RPC}ErrorInfo", "reason": "API_KEY_INVALID", "domain": "googleapis.com"}
            return _error(400, "API key not valid. Please pass a valid API key.", [info])
        if kind in ("quota", "rate"):
            period = "Day" if kind == "quota" else "Minute"
            violation = {"quotaId": f"GenerateRequestsPer{period}PerProjectPerModel", "quotaValue": "1"}
            details: list[dict[str, Any]] = [{"@type": f"{_RPC}QuotaFailure", "violations": [violation]}]
            if retry_after_s is not None:
                details.append({"@type": f"{_RPC}RetryInfo", "retryDelay": f"{retry_after_s:g}s"})
            return _error(429, "You exceeded your current quota, please check your plan and billing details.", details)
        # Google has no 529; what others mean by it is its 503.
        status = 503 if kind == "529" else int(kind)
        return _error(status, "An internal error has occurred." if status == 500 else "The model is overloaded.", [])

    def limits(self, limit: int, remaining: int, reset_s: float) -> dict[str, str]:
        return {}


def _error(status: int, message: str, details: list[dict[str, Any]]) -> Answer:
    error: dict[str, Any] = {"code": status, "message": message, "status": _STATUS[status]}
    return Answer(status=status, body={"error": {**error, "details": details} if details else error})


def _candidate(index: int, sample: Sample) -> dict[str, Any]:
    reason = {"stop": "STOP", "sequence": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}[sample.finish]
    content: dict[str, Any] = {"role": "model"}
    if sample.text:
        content["parts"] = [{"text": sample.text}]
    if sample.refusal is not None or sample.finish == "content_filter":
        return {"finishReason": "SAFETY", "index": index}
    return {"content": content, "finishReason": reason, "index": index}


def _known(body: Any, known: frozenset[str], where: str) -> dict[str, Any]:
    """Return the fields in camel case. Raises RejectedError for one that does not exist."""
    if not isinstance(body, dict):
        raise RejectedError(f"Invalid value at '{where}'")
    found: dict[str, Any] = {}
    for name, value in body.items():
        camel = re.sub(r"_([a-z])", lambda match: match[1].upper(), name)
        if camel not in known:
            at = f" at '{where}'" if where else ""
            raise RejectedError(f'Invalid JSON payload received. Unknown name "{name}"{at}: Cannot find field.')
        found[camel] = value
    return found


def _turn(content: Any, i: int) -> tuple[str, str]:
    where = f"contents[{i}]"
    role = _known(content, frozenset({"role", "parts"}), where).get("role", "user")
    if role not in ("user", "model"):
        raise RejectedError("Please use a valid role: user, model.")
    return "assistant" if role == "model" else role, _parts(content, where)


def _parts(content: Any, where: str) -> str:
    parts = _known(content, frozenset({"role", "parts"}), where).get("parts")
    if not isinstance(parts, list):
        raise RejectedError(f"Invalid value at '{where}.parts'")
    texts = [_known(part, frozenset({"text"}), f"{where}.parts").get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RejectedError(f"Invalid value at '{where}.parts.text'")
    return "".join(text for text in texts if isinstance(text, str))
