"""The half-price batch endpoints of OpenAI-compatible servers and of Anthropic, behind one protocol.

Says what was submitted, how far it is and what came of it; what is submitted, and when, is decided in `batch`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, Self

from omniopd.errors import TeacherAuthError, TeacherError, TeacherRateLimitError, TeacherResponseError
from omniopd.types import Value

if TYPE_CHECKING:
    import aiohttp

TOKEN_FIELD = "omniopd_token"
"""The metadata field of an OpenAI batch that holds the token of its intent."""
CLOCK_SKEW_S = 600.0
"""How much earlier than the intent a batch may seem to be made: the server's clock is another one."""
_BUSY = frozenset({408, 409, 425, 429})
_QUOTA_CODES = frozenset({"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached"})
_PAGE = 100


class TryAgainError(Exception):
    """No answer, or one that says to come back. Whether the request took effect is not known."""


class NotYetKnownError(TryAgainError):
    """The server can answer, but not before a batch has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchState(Value):
    """How far a batch is."""

    ended: bool
    done: int = 0
    """Requests that have succeeded or failed, as far as the server says before the end."""
    sources: tuple[str, ...] = ()
    """Where the results are."""
    num_results: int = 0
    """At least so many results are there once it has ended."""
    reason: str = ""
    """Why a request without a result has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Value):
    """What came of one request: the JSON of its answer, or why there is none."""

    body: Any = None
    failure: str = ""


class BatchEndpoint(Protocol):
    """One provider's batch endpoint. Every call may raise TryAgainError, and TeacherError when trying is no use."""

    max_requests: ClassVar[int]
    max_bytes: ClassVar[int]

    def line(self, custom_id: str, path: str, body: Mapping[str, Any]) -> bytes:
        """Write one request the way the endpoint reads it, without a line end."""
        ...

    async def stage(self, lines: Sequence[bytes]) -> Any:
        """Hand over what can be handed over without buying anything; returns what `create` needs."""
        ...

    async def create(self, path: str, staged: Any, token: str) -> str:
        """Start the batch, which spends money, and return its id."""
        ...

    async def find(self, path: str, token: str, num_requests: int, since: float, known: Collection[str]) -> str | None:
        """Return the id of the batch that was made for this token after `since` (Unix seconds), if there is one.

        Args:
            known: ids that belong to other tokens.
        """
        ...

    async def state(self, path: str, batch_id: str) -> BatchState: ...

    async def results(self, state: BatchState) -> dict[str, Outcome]:
        """Return what there is, by custom id."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class OpenAIBatches:
    """`/files` and `/batches` of an OpenAI-compatible server, through its SDK with the SDK's own retries off."""

    max_requests: ClassVar[int] = 50_000
    max_bytes: ClassVar[int] = 200_000_000

    def __init__(self, *, base_url: str, headers: Mapping[str, str], api_key: str | None, timeout_s: float) -> None:
        import openai

        # The SDK writes the content type itself (a file is no JSON), and a bearer token unless each call says no.
        fixed = {name: value for name, value in headers.items() if name.lower() != "content-type"}
        has_bearer = any(name.lower() == "authorization" for name in fixed)
        self._headers: dict[str, Any] = fixed if has_bearer else {**fixed, "Authorization": openai.Omit()}
        self._secret = api_key
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=timeout_s
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def line(self, custom_id: str, path: str, body: Mapping[str, Any]) -> bytes:
        return _compact({"custom_id": custom_id, "method": "POST", "url": f"/v1{path}", "body": body})

    async def stage(self, lines: Sequence[bytes]) -> str:
        with self._faults("the upload of the requests"):
            file = await self._client.files.create(
                file=("omniopd.jsonl", b"\n".join(lines) + b"\n"), purpose="batch", extra_headers=self._headers
            )
        return file.id

    async def create(self, path: str, staged: str, token: str) -> str:
        with self._faults("the batch"):
            batch = await self._client.batches.create(
                completion_window="24h",
                endpoint=f"/v1{path}",  # type: ignore[arg-type]
                input_file_id=staged,
                metadata={TOKEN_FIELD: token},
                extra_headers=self._headers,
            )
        return batch.id

    async def find(self, path: str, token: str, num_requests: int, since: float, known: Collection[str]) -> str | None:
        with self._faults("the list of batches"):
            async for batch in self._client.batches.list(limit=_PAGE, extra_headers=self._headers):
                if batch.metadata and batch.metadata.get(TOKEN_FIELD) == token:
                    return batch.id
                if batch.created_at < since - CLOCK_SKEW_S:
                    break
        return None

    async def state(self, path: str, batch_id: str) -> BatchState:
        import openai

        try:
            with self._faults(f"batch {batch_id}"):
                batch = await self._client.batches.retrieve(batch_id, extra_headers=self._headers)
        except openai.NotFoundError:
            return _gone(batch_id)
        counts = batch.request_counts
        problems = batch.errors.data if batch.errors and batch.errors.data else ()
        why = "; ".join(_clean(problem.message or problem.code or "", self._secret) for problem in problems[:3])
        return BatchState(
            ended=batch.status in ("completed", "failed", "expired", "cancelled"),
            done=counts.completed + counts.failed if counts else 0,
            num_results=counts.completed if counts else 0,
            sources=tuple(file for file in (batch.output_file_id, batch.error_file_id) if file),
            reason=f"batch {batch_id} ended as {batch.status}" + (f": {why}" if why else ""),
        )

    async def results(self, state: BatchState) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        for source in state.sources:
            with self._faults(f"the result file {source}"):
                content = (await self._client.files.content(source, extra_headers=self._headers)).content
            for row in _rows(content, source):
                # A success is never replaced by what the file of errors says.
                if found.get(row["custom_id"], Outcome()).body is None:
                    found[row["custom_id"]] = self._outcome(row)
        return found

    def _outcome(self, row: Mapping[str, Any]) -> Outcome:
        response = row.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        if status == 200 and body is not None:
            return Outcome(body=body)
        said = row.get("error") or (body.get("error") if isinstance(body, Mapping) else None) or {}
        about = (
            " ".join(str(said[name]) for name in ("code", "message") if said.get(name)) if said else "no reason given"
        )
        return Outcome(failure=_clean(f"status {status}: {about}" if status else about, self._secret))

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Turn the SDK's exceptions, which hold the request and its key, into ours; only NotFoundError passes."""
        import openai

        try:
            yield
        except openai.NotFoundError as error:
            if what.startswith("batch "):
                raise
            _refuse(what, 404, error.code, _clean(str(error.message), self._secret))
        except openai.APIStatusError as error:
            _refuse(what, error.status_code, error.code, _clean(str(error.message), self._secret))
        except openai.APIConnectionError as error:
            raise TryAgainError(f"{what}: {type(error).__name__}") from None
        except (openai.APIError, ValueError) as error:
            raise TryAgainError(f"{what}: an answer that could not be read ({type(error).__name__})") from None


class AnthropicBatches:
    """`/messages/batches` of Anthropic over plain HTTP. It keeps no metadata: `find` has to read results."""

    max_requests: ClassVar[int] = 100_000
    max_bytes: ClassVar[int] = 256_000_000

    def __init__(self, *, base_url: str, headers: Mapping[str, str], api_key: str | None, timeout_s: float) -> None:
        self._base_url = base_url
        self._headers = {name: value for name, value in headers.items() if name.lower() != "content-type"}
        self._secret = api_key
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def line(self, custom_id: str, path: str, body: Mapping[str, Any]) -> bytes:
        return _compact({"custom_id": custom_id, "params": body})

    async def stage(self, lines: Sequence[bytes]) -> bytes:
        return b'{"requests":[' + b",".join(lines) + b"]}"

    async def create(self, path: str, staged: bytes, token: str) -> str:
        content = await self._send("POST", f"{path}/batches", "the batch", data=staged)
        return str(_object(content, "the batch").get("id"))

    async def find(self, path: str, token: str, num_requests: int, since: float, known: Collection[str]) -> str | None:
        running = ""
        async for batch in self._recent(path, since - CLOCK_SKEW_S):
            if batch["id"] in known or sum(batch["request_counts"].values()) != num_requests:
                continue
            state = self._read(batch)
            if not state.ended:
                running = str(batch["id"])
            elif any(custom_id.endswith(token) for custom_id in await self.results(state)):
                return str(batch["id"])
        if running:
            raise NotYetKnownError(f"whose requests batch {running} holds shows when it has ended")
        return None

    async def _recent(self, path: str, since: float) -> AsyncIterator[dict[str, Any]]:
        after = ""
        while True:
            url = f"{path}/batches?limit={_PAGE}{after}"
            page = _object(await self._send("GET", url, "the list of batches"), "the list of batches")
            for batch in page["data"]:
                if datetime.datetime.fromisoformat(batch["created_at"]).timestamp() < since:
                    return
                yield batch
            if not page.get("has_more"):
                return
            after = f"&after_id={page['last_id']}"

    async def state(self, path: str, batch_id: str) -> BatchState:
        try:
            content = await self._send("GET", f"{path}/batches/{batch_id}", f"batch {batch_id}")
        except _NotFoundError:
            return _gone(batch_id)
        return self._read(_object(content, f"batch {batch_id}"))

    def _read(self, batch: Mapping[str, Any]) -> BatchState:
        counts = dict(batch.get("request_counts") or {})
        # The address that is told may lie behind a proxy's back; this one is documented, and where the key may go.
        source = f"{self._base_url}/messages/batches/{batch['id']}/results" if batch.get("results_url") else None
        return BatchState(
            ended=batch.get("processing_status") == "ended",
            done=sum(counts.values()) - counts.get("processing", 0),
            sources=(source,) if source else (),
            num_results=sum(counts.values()) if source else 0,
            reason=f"batch {batch['id']} ended" + ("" if source else " and its results are no longer kept"),
        )

    async def results(self, state: BatchState) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        for source in state.sources:
            for row in _rows(await self._send("GET", source, "the results"), source):
                found[row["custom_id"]] = self._outcome(row["result"])
        return found

    def _outcome(self, result: Mapping[str, Any]) -> Outcome:
        if result.get("type") == "succeeded":
            return Outcome(body=result["message"])
        said = (result.get("error") or {}).get("error") or {}
        about = " ".join(str(said[name]) for name in ("type", "message") if said.get(name))
        return Outcome(failure=_clean(f"{result.get('type')}{': ' if about else ''}{about}", self._secret))

    async def _send(self, method: str, path: str, what: str, *, data: bytes | None = None) -> bytes:
        async with self._response(method, path, what, data) as response:
            content = await response.read()
            status = response.status
        if status == 200:
            return content
        if status == 404 and what.startswith("batch "):
            raise _NotFoundError(what)
        try:
            said = json.loads(content)["error"]
            code, message = said.get("type"), str(said.get("message"))
        except (ValueError, KeyError, TypeError, AttributeError):
            code, message = None, content[:200].decode(errors="replace")
        _refuse(what, status, code, _clean(message, self._secret))

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, what: str, data: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp

        if self._session is None:
            raise RuntimeError("the endpoint is used outside `async with`")
        url = path if path.startswith(("http://", "https://")) else self._base_url + path
        # No cause and no redirects: the one may hold the headers, the other would carry them on.
        sent = {"Content-Type": "application/json"} if data is not None else {}
        try:
            async with self._session.request(method, url, data=data, headers=sent, allow_redirects=False) as response:
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise TryAgainError(f"{what}: {type(error).__name__}") from None


class _NotFoundError(TeacherError):
    pass


def _refuse(what: str, status: int, code: str | None, message: str) -> NoReturn:
    """Raise what an error status means. The server's words about a refused key are left out: they may quote it."""
    if status in (401, 403):
        raise TeacherAuthError(f"{what} was refused with status {status}; check the key and what it may do") from None
    if status == 402 or code in _QUOTA_CODES:
        raise TeacherRateLimitError(
            f"{what} was refused with status {status}, {code}: the account's quota is used up; add credit, then run "
            "the same command again"
        ) from None
    if status in _BUSY or status >= 500:
        raise TryAgainError(f"{what}: status {status} {message}") from None
    raise TeacherResponseError(
        f"{what} was refused with status {status}: {message}; expected an endpoint for batches at this address "
        "(ask the teacher without batches if it has none)"
    ) from None


def _gone(batch_id: str) -> BatchState:
    return BatchState(ended=True, reason=f"the server no longer knows batch {batch_id}")


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _object(content: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise TryAgainError(f"{what}: an answer that is no JSON object")
    return value


def _rows(content: bytes, source: str) -> Iterator[dict[str, Any]]:
    """Read JSON lines whole or not at all: a download that broke off must not look like requests that failed."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            row = _object(line, f"line {number} of {source}")
            if not isinstance(row.get("custom_id"), str):
                raise TryAgainError(f"line {number} of {source} has no custom_id")
            yield row


def _clean(text: str, secret: str | None) -> str:
    """Shorten a server's words, without the key if they quote it."""
    return (text.replace(secret, "***") if secret else text)[:300]
