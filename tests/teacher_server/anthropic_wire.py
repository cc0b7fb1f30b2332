"""Anthropic's Messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any

from .asked import Answer, Asked, RejectedError, Sample, estimate, names, number, schema_field, stops
from .world import find_prefix

_FIELDS = names(
    "model messages max_tokens system temperature top_p top_k stop_sequences stream thinking metadata service_tier "
    "output_config cache_control container diagnostics inference_geo speed tools tool_choice user_profile_id "
    "workspace_id"
)
_BLOCK = frozenset({"type", "text", "cache_control", "citations"})
_NO_PREFILL = re.compile(r"no-prefill|claude-(opus|sonnet)-4-[6-9]|claude-(opus|sonnet|haiku)-5|fable|mythos")
_NO_SAMPLING = re.compile(r"claude-(opus|sonnet)-4-[7-9]|claude-(opus|sonnet|haiku)-5|fable|mythos")
_ALWAYS_THINKS = re.compile(r"opus-5-5|sonnet-5-5|fable|mythos")
CACHE_MIN_TOKENS = 1024
_LOOKBACK = 20


class AnthropicWire:
    """Keeps the heads of prompts that were marked for caching, as the provider does."""

    name = "anthropic"

    def __init__(self) -> None:
        self._cached: set[str] = set()

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        return headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ") or None

    def read(self, body: Any, path: str, headers: Mapping[str, str]) -> Asked:
        if "anthropic-version" not in headers:
            raise RejectedError("anthropic-version: header is required")
        if not isinstance(body, dict):
            raise RejectedError("The request body is not valid JSON")
        for name in body.keys() - _FIELDS:
            raise RejectedError(f"{name}: Extra inputs are not permitted", param=name)
        for name in ("model", "messages", "max_tokens"):
            if name not in body:
                raise RejectedError(f"{name}: Field required", param=name)
        if body.get("stream"):
            raise RejectedError("stream: this server does not stream", param="stream")
        marks: list[tuple[str, int, bool]] = []
        head = blake2b(body["model"].encode(), digest_size=8)
        characters = sum(len(text) for text in self._blocks(body.get("system") or [], "system", head, marks))
        turns: list[tuple[str, str]] = []
        for i, message in enumerate(body["messages"]):
            turn = self._turn(message, i, head, marks, characters)
            characters += len(turn[1])
            turns.append(turn)
        if not turns or turns[0][0] != "user":
            raise RejectedError("messages: first message must use the 'user' role")
        if sum(is_marked for *_, is_marked in marks) > 4:
            raise RejectedError("A maximum of 4 blocks with cache_control may be provided.")
        self._check(body, turns)
        handed = find_prefix(turns, is_prefill=turns[-1][0] == "assistant")
        form = (body.get("output_config") or {}).get("format") or {}
        return Asked(
            model=body["model"],
            prompts=(handed,),
            max_tokens=number(body, "max_tokens", 0, 1 << 20, whole=True),
            stop=stops(body.get("stop_sequences"), most=64, name="stop_sequences"),
            is_greedy=number(body, "temperature", 0, 1) == 0,
            thinks=(body.get("thinking") or {}).get("type") not in ("disabled", "between_tools"),
            schema_field=schema_field(form.get("schema")) if form.get("type") == "json_schema" else None,
            input_tokens=estimate(len(turns), characters),
            cache_key=tuple(marks),
        )

    def _turn(
        self, message: Any, i: int, head: Any, marks: list[tuple[str, int, bool]], before: int
    ) -> tuple[str, str]:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise RejectedError(f"messages.{i}.role: Input should be 'user' or 'assistant'")
        for name in message.keys() - {"role", "content"}:
            raise RejectedError(f"messages.{i}.{name}: Extra inputs are not permitted")
        blocks = self._blocks(message.get("content"), f"messages.{i}.content", head, marks, before)
        text = "".join(blocks)
        if not text:
            raise RejectedError(f"messages.{i}: text content blocks must be non-empty")
        return message["role"], text

    def _blocks(
        self, content: Any, where: str, head: Any, marks: list[tuple[str, int, bool]], before: int = 0
    ) -> list[str]:
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise RejectedError(f"{where}: Input should be a valid list")
        texts: list[str] = []
        for i, block in enumerate(blocks):
            if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
                raise RejectedError(f"{where}.{i}: Input should be a text block")
            for name in block.keys() - _BLOCK:
                raise RejectedError(f"{where}.{i}.{name}: Extra inputs are not permitted")
            head.update(f"{where}{block['text']}".encode())
            texts.append(block["text"])
            before += len(block["text"])
            marks.append((head.hexdigest(), (before + 3) // 4, block.get("cache_control") is not None))
        return texts

    def _check(self, body: Mapping[str, Any], turns: list[tuple[str, str]]) -> None:
        model, thinking = body["model"], (body.get("thinking") or {}).get("type")
        if _NO_SAMPLING.search(model):
            for name in ("temperature", "top_p", "top_k"):
                if name in body:
                    raise RejectedError(f"{name}: this model does not support sampling parameters", param=name)
        if thinking == "disabled" and _ALWAYS_THINKS.search(model):
            raise RejectedError('thinking.type: "disabled" is not supported for this model')
        role, last = turns[-1]
        if role != "assistant":
            return
        if _NO_PREFILL.search(model):
            raise RejectedError(
                "This model does not support assistant message prefill. The conversation must end with a user message."
            )
        if last != last.rstrip():
            raise RejectedError("messages: final assistant content cannot end with trailing whitespace")
        if thinking in ("enabled", "adaptive"):
            raise RejectedError(
                "messages: Expected `thinking` or `redacted_thinking`, but found `text`. When `thinking` is enabled, "
                "a final `assistant` message must start with a thinking block."
            )

    def _cache(self, asked: Asked) -> tuple[int, int]:
        """Return the tokens read from the cache and written into it."""
        marked = [i for i, (_, tokens, is_marked) in enumerate(asked.cache_key) if is_marked and tokens]
        if not marked:
            return 0, 0
        last = marked[-1]
        near = asked.cache_key[max(0, last - _LOOKBACK + 1) : last + 1]
        read = max((tokens for key, tokens, _ in near if key in self._cached), default=0)
        write = max((asked.cache_key[i][1] for i in marked), default=0)
        if write < CACHE_MIN_TOKENS:
            return read, 0
        self._cached.update(asked.cache_key[i][0] for i in marked if asked.cache_key[i][1] >= CACHE_MIN_TOKENS)
        return read, max(0, write - read)

    def answer(self, asked: Asked, samples: list[Sample], number: int) -> dict[str, Any]:
        sample = samples[0]
        read, written = self._cache(asked)
        reason = {"stop": "end_turn", "length": "max_tokens", "sequence": "stop_sequence"}.get(sample.finish, "refusal")
        usage: dict[str, Any] = {
            "input_tokens": max(0, asked.input_tokens - read - written),
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read,
            "output_tokens": sample.tokens + sample.thinking_tokens,
            "service_tier": "standard",
        }
        if sample.thinking_tokens:
            usage["output_tokens_details"] = {"thinking_tokens": sample.thinking_tokens}
        return {
            "id": f"msg_{number}",
            "type": "message",
            "role": "assistant",
            "model": asked.model,
            "content": [{"type": "text", "text": sample.text}] if sample.text else [],
            "stop_reason": "refusal" if sample.refusal is not None else reason,
            "stop_sequence": sample.stop_sequence,
            "usage": usage,
        }

    def reject(self, error: RejectedError) -> Answer:
        kind = "not_found_error" if error.status == 404 else "invalid_request_error"
        return self._error(error.status, kind, error.message)

    def fail(self, kind: str, *, retry_after_s: float | None = None) -> Answer:
        if kind == "auth":
            return self._error(401, "authentication_error", "invalid x-api-key")
        if kind == "quota":
            text = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."
            return self._error(400, "invalid_request_error", text)
        headers = {} if retry_after_s is None else {"retry-after": f"{retry_after_s:g}"}
        if kind == "rate":
            text = "This request would exceed your organization's rate limit."
            return self._error(429, "rate_limit_error", text, headers)
        if kind == "529":
            return self._error(529, "overloaded_error", "Overloaded", headers)
        return self._error(int(kind), "api_error", "Internal server error", headers)

    def _error(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
        body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_0"}
        return Answer(status=status, body=body, headers=headers or {})

    def limits(self, limit: int, remaining: int, reset_s: float) -> dict[str, str]:
        at = datetime.now(UTC) + timedelta(seconds=reset_s)
        return {
            "anthropic-ratelimit-requests-limit": str(limit),
            "anthropic-ratelimit-requests-remaining": str(remaining),
            "anthropic-ratelimit-requests-reset": at.isoformat().replace("+00:00", "Z"),
        }
