"""OpenAI's chat and raw completions, and those who speak nearly the same: vLLM, OpenRouter, DeepSeek, Mistral."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .asked import Answer, Asked, RejectedError, Sample, estimate, names, number, require, schema_field, stops, text_of
from .world import find_prefix, split_raw, text_of_ids

_COMMON = names(
    "model messages max_tokens temperature top_p stop stream n seed frequency_penalty presence_penalty "
    "response_format tools tool_choice parallel_tool_calls logprobs top_logprobs"
)
_OPENAI_CHAT = _COMMON | names(
    "max_completion_tokens logit_bias metadata modalities audio prediction prompt_cache_key prompt_cache_options "
    "prompt_cache_retention reasoning_effort safety_identifier service_tier store stream_options user verbosity "
    "web_search_options function_call functions moderation"
)
_OPENAI_RAW = names(
    "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream "
    "stream_options suffix temperature top_p user"
)
_VLLM = names(
    "top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids include_stop_str_in_output "
    "skip_special_tokens spaces_between_special_tokens add_special_tokens prompt_logprobs return_token_ids "
    "return_prompt_text cache_salt priority request_id truncate_prompt_tokens length_penalty bad_words "
    "thinking_token_budget include_reasoning seeds"
)
_VLLM_CHAT = names("continue_final_message add_generation_prompt chat_template chat_template_kwargs documents echo")
_DEEPSEEK = _COMMON - {"n", "seed", "parallel_tool_calls"} | {"thinking", "stream_options", "reasoning_effort"}
_MISTRAL = _COMMON - {"seed", "logprobs", "top_logprobs"} | names(
    "random_seed safe_prompt prediction prompt_mode prompt_cache_key metadata reasoning_effort guardrails"
)
_OPENROUTER = _OPENAI_CHAT - {"n"} | names(
    "provider models route transforms reasoning usage top_k min_p top_a repetition_penalty plugins session_id"
)
_MESSAGE = names("role content name refusal tool_calls tool_call_id function_call audio")
_FIELDS = {
    "openai": _OPENAI_CHAT,
    "vllm": _OPENAI_CHAT | _VLLM | _VLLM_CHAT,
    "openrouter": _OPENROUTER,
    "deepseek": _DEEPSEEK,
    "mistral": _MISTRAL,
}
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_REASONS = re.compile(r"^(o\d|gpt-5)")
_NO_PREFILL = re.compile(r"no-prefill|^anthropic/claude.*(4[.-][6-9]|-5)|^openai/")


class OpenAIWire:
    """`flavor`: openai, vllm, openrouter, deepseek or mistral."""

    def __init__(self, flavor: str) -> None:
        self.name = flavor

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return key if scheme.lower() == "bearer" else headers.get("api-key")

    def read(self, body: Any, path: str, headers: Mapping[str, str]) -> Asked:
        if not isinstance(body, dict):
            raise RejectedError("We could not parse the JSON body of your request.")
        if body.get("stream"):
            raise RejectedError("This server does not stream.", param="stream", code="unsupported_value")
        if path.endswith("/chat/completions"):
            return self._read_chat(body)
        return self._read_raw(body)

    def _read_raw(self, body: dict[str, Any]) -> Asked:
        self._only(body, _OPENAI_RAW | (_VLLM if self.name == "vllm" else frozenset()))
        require(body, "model", "prompt")
        prompt = body["prompt"]
        prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, (str, list)) and p for p in prompts):
            raise RejectedError(f"Invalid 'prompt': {prompt!r:.80}.", param="prompt", code="invalid_value")
        texts = [p if isinstance(p, str) else text_of_ids(p) for p in prompts]
        seeds = self._seeds(body, len(texts))
        return Asked(
            model=body["model"],
            prompts=tuple(split_raw(text) for text in texts),
            n=number(body, "n", 1, 128, whole=True) or 1,
            max_tokens=16 if (limit := number(body, "max_tokens", 0, 1 << 20, whole=True)) is None else limit,
            stop=stops(body.get("stop")),
            seeds=seeds,
            is_greedy=number(body, "temperature", 0, 2) == 0,
            thinks=False,
            input_tokens=sum(estimate(0, len(text)) for text in texts),
            echoes=bool(body.get("echo")),
        )

    def _read_chat(self, body: dict[str, Any]) -> Asked:
        self._only(body, _FIELDS[self.name])
        require(body, "model", "messages")
        messages = body["messages"]
        if not isinstance(messages, list) or not messages:
            raise RejectedError("Invalid 'messages': empty or no array.", param="messages", code="invalid_value")
        turns = [self._turn(message, i) for i, message in enumerate(messages)]
        reasons = self.name == "openai" and _REASONS.match(body["model"]) is not None
        effort = body.get("reasoning_effort")
        if reasons:
            self._check_reasoning(body)
        prefilled = self._is_prefill(body, messages)
        handed = find_prefix(turns, is_prefill=prefilled)
        limit = number(body, "max_tokens", 1, 1 << 20, whole=True)
        longer = number(body, "max_completion_tokens", 1, 1 << 20, whole=True)
        samples = number(body, "n", 1, 128, whole=True) or 1
        form = body.get("response_format") or {}
        return Asked(
            model=body["model"],
            prompts=(handed,),
            n=samples,
            max_tokens=limit if longer is None else longer,
            stop=stops(body.get("stop"), most=16 if self.name == "deepseek" else 4),
            seeds=self._seeds(body, 1),
            is_greedy=number(body, "temperature", 0, 2) == 0,
            thinks=effort not in ("none", "minimal") and not self._thinking_is_off(body),
            schema_field=schema_field((form.get("json_schema") or {}).get("schema"))
            if form.get("type") == "json_schema"
            else None,
            input_tokens=estimate(len(turns), sum(len(text) for _, text in turns)),
            honors_n=self.name in ("openai", "vllm", "mistral"),
            echoes=handed.how == "prefill" and (self.name == "mistral" or bool(body.get("echo"))),
        )

    def _only(self, body: Mapping[str, Any], known: frozenset[str]) -> None:
        # DeepSeek takes no `n`; resellers of it answer 200 with one choice, which is the trap worth having.
        ignored = {"n", "seed"} if self.name in ("deepseek", "openrouter") else set()
        for name in body.keys() - known - ignored:
            if self.name == "mistral":
                raise RejectedError("Extra inputs are not permitted", status=422, param=name, code="extra_forbidden")
            raise RejectedError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")

    def _turn(self, message: Any, i: int) -> tuple[str, str]:
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise RejectedError(f"Invalid value for '{where}.role'.", param=f"{where}.role", code="invalid_value")
        extra = {"prefix", "reasoning_content"} if self.name in ("deepseek", "mistral") else set()
        for name in message.keys() - _MESSAGE - extra:
            raise RejectedError(
                f"Unknown parameter: '{where}.{name}'.", param=f"{where}.{name}", code="unknown_parameter"
            )
        return message["role"], text_of(message.get("content"), f"{where}.content")

    def _is_prefill(self, body: Mapping[str, Any], messages: list[dict[str, Any]]) -> bool:
        """Whether the last message is an open answer. Raises RejectedError where the provider refuses one."""
        ends_open = messages[-1]["role"] == "assistant"
        if self.name == "vllm":
            continues, begins = body.get("continue_final_message", False), body.get("add_generation_prompt", True)
            if continues and begins:
                raise RejectedError(
                    "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                    code="invalid_value",
                )
            if continues and not ends_open:
                raise RejectedError("continue_final_message: the last message is not the assistant's.")
            return bool(continues)
        if self.name in ("deepseek", "mistral"):
            flagged = [i for i, message in enumerate(messages) if message.get("prefix")]
            if flagged and (flagged != [len(messages) - 1] or not ends_open):
                raise RejectedError(
                    "The last message must be an assistant message with prefix", param="prefix", code="invalid_value"
                )
            if ends_open and not flagged and self.name == "mistral":
                raise RejectedError(
                    "Expected last role User or Tool (or Assistant with prefix True) for serving but got assistant",
                    param="messages",
                    code="invalid_request_message_order",
                )
            return bool(flagged)
        if self.name == "openrouter" and ends_open:
            if _NO_PREFILL.search(body["model"]):
                raise RejectedError("This model does not support assistant message prefill.", param="messages")
            return True
        return False

    def _check_reasoning(self, body: Mapping[str, Any]) -> None:
        if body.get("max_tokens") is not None:
            raise RejectedError(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
                "instead.",
                param="max_tokens",
                code="unsupported_parameter",
            )
        if body.get("reasoning_effort") != "none":
            for name in ("temperature", "top_p"):
                if body.get(name) not in (None, 1, 1.0):
                    raise RejectedError(
                        f"Unsupported value: '{name}' does not support {body[name]} with this model. Only the "
                        "default (1) value is supported.",
                        param=name,
                        code="unsupported_value",
                    )

    def _thinking_is_off(self, body: Mapping[str, Any]) -> bool:
        return (
            (body.get("thinking") or {}).get("type") == "disabled"
            or (body.get("chat_template_kwargs") or {}).get("enable_thinking") is False
            or (body.get("reasoning") or {}).get("effort") == "none"
        )

    def _seeds(self, body: Mapping[str, Any], prompts: int) -> tuple[int | None, ...]:
        seeds = body.get("seeds")
        if seeds is not None:
            if not isinstance(seeds, list) or len(seeds) != prompts:
                raise RejectedError(f"'seeds' must be {prompts} integers.", param="seeds", code="invalid_value")
            return tuple(seeds)
        if self.name == "deepseek":
            return (None,) * prompts
        name = "random_seed" if self.name == "mistral" else "seed"
        return (number(body, name, -(1 << 63), (1 << 63) - 1, whole=True),) * prompts

    def answer(self, asked: Asked, samples: list[Sample], number: int) -> dict[str, Any]:
        is_raw = asked.prompts[0].how == "raw"
        choices: list[dict[str, Any]] = []
        for i, sample in enumerate(samples):
            choice: dict[str, Any] = {"index": i, "logprobs": None, "finish_reason": _finish(sample)}
            if is_raw:
                choice["text"] = sample.text
            else:
                content = None if sample.refusal is not None else sample.text
                choice["message"] = {"role": "assistant", "content": content}
                if self.name != "mistral":
                    choice["message"]["refusal"] = sample.refusal
            choices.append(choice)
        thinking = sum(sample.thinking_tokens for sample in samples)
        output = sum(sample.tokens for sample in samples) + thinking
        usage: dict[str, Any] = {
            "prompt_tokens": asked.input_tokens,
            "completion_tokens": output,
            "total_tokens": asked.input_tokens + output,
        }
        if self.name == "deepseek":
            usage |= {"prompt_cache_hit_tokens": 0, "prompt_cache_miss_tokens": asked.input_tokens}
        if self.name == "openrouter":
            usage["cost"] = (asked.input_tokens + 4 * output) / 1e6
        if self.name != "mistral":
            usage["prompt_tokens_details"] = {"cached_tokens": 0}
            usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
        return {
            "id": f"{'cmpl' if is_raw else 'chatcmpl'}-{number}",
            "object": "text_completion" if is_raw else "chat.completion",
            "created": 1_790_000_000 + number,
            "model": asked.model,
            "choices": choices,
            "usage": usage,
        }

    def reject(self, error: RejectedError) -> Answer:
        if self.name == "mistral":
            detail = [{"type": error.code, "loc": ["body", error.param], "msg": error.message, "input": None}]
            message: Any = {"detail": detail} if error.status == 422 else error.message
            return Answer(
                status=error.status,
                body={
                    "object": "error",
                    "message": message,
                    "type": error.code or "invalid_request_error",
                    "param": error.param,
                    "code": None,
                },
            )
        return self._error(error.status, error.message, "invalid_request_error", error.code, param=error.param)

    def fail(self, kind: str, *, retry_after_s: float | None = None) -> Answer:
        headers = {} if retry_after_s is None else {"retry-after": f"{retry_after_s:g}"}
        if kind == "auth" and self.name == "mistral":
            return Answer(status=401, body={"detail": "Unauthorized"})
        if kind == "auth":
            return self._error(401, "Incorrect API key provided.", "invalid_request_error", "invalid_api_key")
        if kind == "quota" and self.name in ("deepseek", "openrouter"):
            return self._error(402, "Insufficient Balance", "unknown_error", "invalid_request_error")
        if kind == "quota":
            text = "You exceeded your current quota, please check your plan and billing details."
            return self._error(429, text, "insufficient_quota", "insufficient_quota")
        if kind == "rate":
            return self._error(429, "Rate limit reached for requests.", "requests", "rate_limit_exceeded", headers)
        text = "The server is currently overloaded." if kind != "500" else "The server had an error."
        return self._error(int(kind), text, "server_error", None, headers)

    def _error(
        self,
        status: int,
        message: str,
        kind: str,
        code: str | None,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
    ) -> Answer:
        if self.name == "mistral":
            body: dict[str, Any] = {"object": "error", "message": message, "type": kind, "param": param, "code": code}
        elif self.name == "openrouter":
            body = {"error": {"message": message, "code": status}}
        else:
            body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        return Answer(status=status, body=body, headers=headers or {})

    def limits(self, limit: int, remaining: int, reset_s: float) -> dict[str, str]:
        return {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(remaining),
            "x-ratelimit-reset-requests": f"{reset_s:.3f}s",
        }


def _finish(sample: Sample) -> str:
    return "stop" if sample.finish == "sequence" else sample.finish
