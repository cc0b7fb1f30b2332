"""The API of `omniopd serve`: the part of OpenAI's that a teacher needs, and nothing that would only pretend.

A field that cannot take effect is refused with status 400. Streaming, `echo`, penalties and alternatives
(`top_logprobs` above 0) are not offered. Logprobs are those of the sampled tokens, in nats, under the distribution they
were drawn from, and cover all tokens of a sample, the end token and those of a stop text included. Own additions:
`seeds`, one for each prompt of `/v1/completions`, and sample i of a seed is the same whatever else is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from omniopd.errors import ConfigError, OmniOPDError
from omniopd.models import render_chat
from omniopd.serving.batcher import Batcher, Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from omniopd.generation import Sample, SampleRequest

MAX_SAMPLES = 4096
"""In one HTTP request: prompts times n."""
DEFAULT_COMPLETION_TOKENS = 16
EXIT_POLL_S = 0.5

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _BadRequest(Exception):
    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code

    def response(self) -> JSONResponse:
        return _error(str(self), status=self.status, param=self.param, code=self.code)


class _Body(BaseModel):
    """What both endpoints take. Fields of other servers are accepted at the value at which they change nothing."""

    model_config = ConfigDict(extra="forbid")

    model: str
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not all(texts):
            raise _BadRequest("stop holds an empty text, which would end every answer at once", param="stop")
        return tuple(texts)


class _CompletionBody(_Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=1)
    seeds: list[Seed] | None = None
    logprobs: int | None = Field(default=None, ge=0, le=1)
    """0 and 1 give the same: the sampled tokens' own; `top_logprobs` stays null."""
    add_special_tokens: bool = True
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class _ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str


class _ChatBody(_Body):
    messages: list[_ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None


_B = TypeVar("_B", bound=_Body)


class _Api:
    """The endpoints of one model."""

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: PreTrainedTokenizerBase,
        model_name: str,
        max_context_tokens: int | None,
    ) -> None:
        self.batcher = batcher
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.max_context_tokens = max_context_tokens
        self.created = int(time.time())

    async def health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> JSONResponse:
        model = {"id": self.model_name, "object": "model", "created": self.created, "owned_by": "omniopd"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> JSONResponse:
        body = await self._read(request, _CompletionBody)
        prompts = self._prompts(body)
        seeds = self._seeds(body, len(prompts))
        asked = self._requests(prompts, seeds, body, body.max_tokens or DEFAULT_COMPLETION_TOKENS)
        results = await self._generate(asked)
        samples = [sample for one in results for sample in one]
        choices = [
            {
                "index": i,
                "text": sample.text,
                "finish_reason": sample.finish_reason.value,
                "logprobs": None if body.logprobs is None else self._completion_logprobs(sample),
            }
            for i, sample in enumerate(samples)
        ]
        return JSONResponse(self._envelope("text_completion", "cmpl", choices, prompts, samples))

    async def chat(self, request: Request) -> JSONResponse:
        body = await self._read(request, _ChatBody)
        prompt = self._chat_prompt(body)
        limit = body.max_completion_tokens or body.max_tokens
        room = None if self.max_context_tokens is None else self.max_context_tokens - len(prompt)
        seed = secrets.randbits(31) if body.seed is None else body.seed
        (samples,) = await self._generate(self._requests([prompt], [seed], body, limit or max(1, room or 1024)))
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "finish_reason": sample.finish_reason.value,
                "logprobs": {"content": self._chat_logprobs(sample), "refusal": None} if body.logprobs else None,
            }
            for i, sample in enumerate(samples)
        ]
        return JSONResponse(self._envelope("chat.completion", "chatcmpl", choices, [prompt], samples))

    async def _read(self, request: Request, kind: type[_B]) -> _B:
        try:
            body = kind.model_validate_json(await request.body())
        except ValidationError as error:
            raise _bad_body(error) from error
        if body.model != self.model_name:
            raise _BadRequest(
                f"the model {body.model!r} is not served here; this server has {self.model_name!r}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return body

    def _prompts(self, body: _CompletionBody) -> list[tuple[int, ...]]:
        prompt = body.prompt
        if not prompt:
            raise _BadRequest("prompt is empty; a model needs at least one token to go on from", param="prompt")
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        many = cast("list[str | list[int]]", [prompt] if is_one else prompt)
        return [self._tokens(one, add_special_tokens=body.add_special_tokens) for one in many]

    def _tokens(self, prompt: str | list[int], *, add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            ids = tuple(self.tokenizer(prompt, add_special_tokens=add_special_tokens).input_ids)
        else:
            ids = tuple(prompt)
            size = len(self.tokenizer)
            if bad := [i for i in ids if not 0 <= i < size]:
                raise _BadRequest(
                    f"prompt holds the token id {bad[0]}; the vocabulary has 0..{size - 1}", param="prompt"
                )
        if not ids:
            raise _BadRequest("prompt has no tokens; a model needs at least one to go on from", param="prompt")
        return ids

    def _chat_prompt(self, body: _ChatBody) -> tuple[int, ...]:
        import jinja2

        # As elsewhere: without the flag a trailing assistant message is history and a new turn begins.
        opens_turn = (
            not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
        )
        if body.continue_final_message and opens_turn:
            raise _BadRequest(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
                param="continue_final_message",
            )
        if body.continue_final_message and body.messages[-1].role != "assistant":
            raise _BadRequest(
                f"continue_final_message needs an assistant message at the end, got role {body.messages[-1].role!r}",
                param="messages",
            )
        if self.tokenizer.chat_template is None:
            raise _BadRequest(f"{self.model_name} has no chat template; use /v1/completions", param="messages")
        try:
            text = render_chat(
                self.tokenizer,
                [message.model_dump() for message in body.messages],
                add_generation_prompt=opens_turn,
                continue_final_message=body.continue_final_message,
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise _BadRequest(f"the chat template does not take these messages: {error}", param="messages") from error
        return self._tokens(text, add_special_tokens=False)

    def _seeds(self, body: _CompletionBody, num_prompts: int) -> list[int]:
        if body.seeds is None:
            # One seed for a list of prompts serves them all, as at other servers.
            return [secrets.randbits(31) if body.seed is None else body.seed for _ in range(num_prompts)]
        if body.seed is not None:
            raise _BadRequest("seed and seeds exclude each other; give one seed, or one for each prompt", param="seeds")
        if len(body.seeds) != num_prompts:
            raise _BadRequest(f"seeds has {len(body.seeds)} entries for {num_prompts} prompts", param="seeds")
        return body.seeds

    def _requests(
        self, prompts: list[tuple[int, ...]], seeds: list[int], body: _Body, max_tokens: int
    ) -> list[SampleRequest]:
        from omniopd.generation import SampleRequest

        if len(prompts) * body.n > MAX_SAMPLES:
            raise _BadRequest(
                f"{len(prompts)} prompts times n={body.n} exceed {MAX_SAMPLES} samples; send several requests",
                param="n",
            )
        longest = max(map(len, prompts))
        if self.max_context_tokens is not None and longest + max_tokens > self.max_context_tokens:
            raise _BadRequest(
                f"a prompt of {longest} tokens plus max_tokens={max_tokens} exceeds the context of "
                f"{self.max_context_tokens} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return [
            SampleRequest(
                token_ids=prompt,
                num_samples=body.n,
                max_tokens=max_tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=seed,
                stop=body.stops,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    async def _generate(self, requests: list[SampleRequest]) -> list[list[Sample]]:
        return await asyncio.wrap_future(self.batcher.submit(requests))

    def _envelope(
        self,
        kind: str,
        prefix: str,
        choices: list[dict[str, Any]],
        prompts: list[tuple[int, ...]],
        samples: list[Sample],
    ) -> dict[str, Any]:
        inputs, outputs = sum(map(len, prompts)), sum(len(sample.token_ids) for sample in samples)
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
            "choices": choices,
            "usage": {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs},
        }

    def _completion_logprobs(self, sample: Sample) -> dict[str, Any]:
        tokens = [self.tokenizer.decode([i]) for i in sample.token_ids]
        offsets = [0]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        return {"tokens": tokens, "token_logprobs": sample.logprobs, "top_logprobs": None, "text_offset": offsets}

    def _chat_logprobs(self, sample: Sample) -> list[dict[str, Any]]:
        return [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(map(self._text_of, sample.token_ids), sample.logprobs, strict=True)
        ]

    def _text_of(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id]))


def build_app(
    sampler: Samples,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    *,
    max_context_tokens: int | None = None,
    batch_size: int = 512,
) -> Starlette:
    """Return the application. Its thread for generation ends with the application's lifespan.

    Args:
        sampler: nothing else may use its model meanwhile.
        model_name: what requests must ask for.
        max_context_tokens: longer requests are refused; None leaves it to the sampler.
        batch_size: sequences decoded together.
    """
    batcher = Batcher(sampler, batch_size=batch_size)
    api = _Api(batcher, tokenizer, model_name, max_context_tokens)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    return Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
        ],
        exception_handlers={
            _BadRequest: _on_bad_request,
            OmniOPDError: _on_own_error,
            404: _on_no_route,
            405: _on_no_route,
        },
        lifespan=lifespan,
    )


def serve(
    model_dir: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    announce: Path | None = None,
    exit_with: int | None = None,
) -> None:
    """Serve a model folder until interrupted.

    There is no key: whoever reaches the address may ask. Keep `host` on this machine, or behind something that checks.

    Args:
        port: 0 picks a free one.
        model_name: by default the folder's name.
        threads: CPU threads of torch.
        announce: file that gets the base URL once requests are taken.
        exit_with: process id; the server stops when that process ends.
    """
    from omniopd.generation import load_sampler

    listener = _listen(host, port)
    with listener:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        sampler = load_sampler(model_dir, device=device, dtype=dtype)
        limit = getattr(sampler.model.config, "max_position_embeddings", None)
        name = model_name or model_dir.resolve().name
        app = build_app(sampler, sampler.tokenizer, name, max_context_tokens=limit)
        shown = f"[{host}]" if ":" in host else host
        base_url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        server = _Server(config, base_url=base_url, model_name=name, announce=announce)
        if exit_with is not None:
            threading.Thread(target=_stop_with, args=(server, exit_with), daemon=True).start()
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says where it is as soon as requests are taken."""

    def __init__(self, config: uvicorn.Config, *, base_url: str, model_name: str, announce: Path | None) -> None:
        super().__init__(config)
        self._base_url = base_url
        self._model_name = model_name
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.should_exit:
            return
        sys.stderr.write(f"serving {self._model_name} at {self._base_url}\n")
        sys.stderr.flush()
        if self._announce is not None:
            # Readers must never see half of it.
            part = self._announce.with_name(self._announce.name + ".part")
            part.write_text(self._base_url, encoding="utf-8")
            part.replace(self._announce)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port, 0 for any"
        ) from error
    return listener


def _stop_with(server: uvicorn.Server, pid: int) -> None:
    is_parent = os.getppid() == pid
    # A parent that was killed may stay behind as a zombie, which still answers to signal 0.
    while os.getppid() == pid if is_parent else _exists(pid):
        time.sleep(EXIT_POLL_S)
    server.should_exit = True


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _bad_body(error: ValidationError) -> _BadRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return _BadRequest("the body is no JSON")
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return _BadRequest(f"{param} is not offered by omniopd serve; leave it out", param=param)
    return _BadRequest(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}", param=param)


def _error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status_code=status)


async def _on_bad_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, _BadRequest)
    return error.response()


async def _on_own_error(request: Request, error: Exception) -> JSONResponse:
    return _error(str(error), status=500)


async def _on_no_route(request: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 404)
    return _error(f"{request.method} {request.url.path} is not offered by omniopd serve", status=status)
