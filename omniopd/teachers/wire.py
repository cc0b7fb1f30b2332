"""One POST over HTTP. Every failure is a `RequestFault` in our words: the library's exceptions hold the request.

No redirects, no cookies, no netrc, no retries: a redirect could carry the prompt to another host, and whether to ask
again is decided in `retry`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import urllib.request
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omniopd.teachers.retry import FaultKind, RequestFault

if TYPE_CHECKING:
    import aiohttp

MAX_ANSWER_BYTES = 64 << 20
CONNECT_TIMEOUT_S = 10.0

# Uvicorn, and so vLLM and `omniopd serve`, closes idle connections after 5 s; to be earlier avoids the race.
_KEEP_ALIVE_S = 4.0
# aiohttp warns of larger bodies that come as bytes.
_LARGE_BODY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HttpReply:
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case; of several with one name, the last."""
    body: bytes
    """Decompressed."""


@dataclass(slots=True)
class _Progress:
    """How far a request got."""

    is_sent: bool = False
    is_reused: bool = False
    has_head: bool = False


@dataclass(frozen=True, slots=True)
class _Pool:
    """What belongs to one event loop."""

    session: aiohttp.ClientSession
    slots: contextlib.AbstractAsyncContextManager[Any]


class HttpClient:
    """Send POST requests and read the answers.

    There is one connection pool for each running event loop, made when it is first needed, so a client may be used from
    several `asyncio.run` calls and from several threads; close it in each loop.

    Args:
        trust_env: whether to use the proxies that the environment names (HTTPS_PROXY, NO_PROXY).
        connections: the most open at a time in one event loop; 0 for no limit.
    """

    def __init__(self, *, trust_env: bool, connections: int = 0) -> None:
        self._trust_env = trust_env
        self._connections = connections
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = weakref.WeakKeyDictionary()
        self._timeouts: dict[float, aiohttp.ClientTimeout] = {}
        self._proxies: dict[str, dict[str, Any]] = {}

    async def post(self, url: str, *, headers: Mapping[str, str], body: bytes, timeout_s: float) -> HttpReply:
        """Send one request and return the answer, whatever its status; a redirect is an answer too.

        `timeout_s` is for connecting, sending and the whole answer, not for the wait for one of the `connections`.
        Raises RequestFault: UNREACHABLE, LOST, TIMEOUT, NONSENSE (no HTTP, or an answer beyond 64 MB), AUTH (a key
        that cannot be part of a header) and REJECTED (no URL).
        """
        import aiohttp

        pool = self._pool()
        progress = _Progress()
        options = self._proxy_options(url) if self._trust_env else {}
        try:
            async with (
                pool.slots,
                pool.session.post(
                    url,
                    data=body if len(body) < _LARGE_BODY_BYTES else io.BytesIO(body),
                    headers={**headers, **options.get("headers", {})},
                    allow_redirects=False,
                    timeout=self._timeout(timeout_s),
                    trace_request_ctx=progress,
                    proxy=options.get("proxy"),
                    proxy_headers=options.get("proxy_headers"),
                ) as response,
            ):
                progress.has_head = True
                answer = await _read(response)
                return HttpReply(
                    response.status, {name.lower(): text for name, text in response.headers.items()}, answer
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            fault = _fault_of(error, progress, timeout_s)
        # Outside of the handler, so that the fault has no context: the library's error holds the headers.
        raise fault

    async def aclose(self) -> None:
        """Close the connections of the running event loop. Safe to call twice; a later request opens new ones."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.session.close()

    def _pool(self) -> _Pool:
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            # A pool holds its loop, so the dictionary's weak keys alone never let go of a loop that is over.
            for over in [known for known in list(self._pools) if known.is_closed()]:
                del self._pools[over]
            pool = self._pools[loop] = _new_pool(self._connections)
        return pool

    def _timeout(self, timeout_s: float) -> aiohttp.ClientTimeout:
        import aiohttp

        timeout = self._timeouts.get(timeout_s)
        if timeout is None:
            timeout = self._timeouts[timeout_s] = aiohttp.ClientTimeout(
                total=timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s), ceil_threshold=float("inf")
            )
        return timeout

    def _proxy_options(self, url: str) -> dict[str, Any]:
        from yarl import URL

        # aiohttp's own trust_env asks a thread for each request, and reads netrc.
        origin = url.partition("://")[0] + "://" + url.partition("://")[2].partition("/")[0]
        if origin not in self._proxies:
            self._proxies[origin] = _proxy_of(URL(url))
        return self._proxies[origin]


def _new_pool(connections: int) -> _Pool:
    import aiohttp

    async def note_sent(_session: object, progress: _Progress, _params: object) -> None:
        progress.is_sent = True

    async def note_reused(_session: object, progress: _Progress, _params: object) -> None:
        progress.is_reused = True

    trace = aiohttp.TraceConfig(trace_config_ctx_factory=_own_context)  # type: ignore[arg-type]
    trace.on_request_headers_sent.append(note_sent)  # type: ignore[arg-type]
    trace.on_connection_reuseconn.append(note_reused)  # type: ignore[arg-type]
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S, ttl_dns_cache=300),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Content-Type": "application/json", "User-Agent": "omniopd"},
        trace_configs=[trace],
        trust_env=False,
    )
    return _Pool(session, asyncio.Semaphore(connections) if connections else contextlib.nullcontext())


def _own_context(trace_request_ctx: object = None) -> object:
    return trace_request_ctx


async def _read(response: aiohttp.ClientResponse) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise RequestFault(
                FaultKind.NONSENSE,
                f"HTTP {response.status}: the answer is larger than {MAX_ANSWER_BYTES >> 20} MB",
                was_sent=True,
                status=response.status,
            )
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _proxy_of(url: Any) -> dict[str, Any]:
    """Return what `post` must be given for the proxy that the environment names for this URL; empty for none."""
    from yarl import URL

    named = urllib.request.getproxies().get(url.scheme)
    if not named or urllib.request.proxy_bypass(url.host or ""):
        return {}
    proxy = URL(named if "://" in named else f"http://{named}")
    options: dict[str, Any] = {"proxy": proxy.with_user(None)}
    if proxy.user is not None:
        login = base64.b64encode(f"{proxy.user}:{proxy.password or ''}".encode()).decode()
        # An https request asks the proxy for a tunnel first; an http request goes to the proxy as it is.
        place = "proxy_headers" if url.scheme == "https" else "headers"
        options[place] = {"Proxy-Authorization": f"Basic {login}"}
    return options


def _fault_of(error: Exception, progress: _Progress, timeout_s: float) -> RequestFault:
    import aiohttp

    if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
        return RequestFault(FaultKind.REJECTED, "the address is no http(s) URL")
    if isinstance(error, UnicodeError):
        return RequestFault(FaultKind.REJECTED, "the address holds a host name that is none")
    if isinstance(error, ValueError) and not isinstance(error, aiohttp.ClientError):
        return RequestFault(
            FaultKind.AUTH, "a header cannot be sent; the key may hold a line break or a control character"
        )
    if not progress.is_sent:
        return RequestFault(FaultKind.UNREACHABLE, _why_unreachable(error, timeout_s))
    if isinstance(error, TimeoutError):
        what = "the answer was not complete" if progress.has_head else "no answer"
        return RequestFault(FaultKind.TIMEOUT, f"{what} within {timeout_s:g} s", was_sent=True)
    if isinstance(error, aiohttp.ClientResponseError):
        return RequestFault(FaultKind.NONSENSE, "what the server sent is no HTTP", was_sent=True)
    if progress.has_head:
        detail = "the connection broke before the answer was complete"
    elif progress.is_reused:
        detail = "the server closed a kept-alive connection without an answer"
    else:
        detail = "the server closed the connection without an answer"
    return RequestFault(FaultKind.LOST, detail, was_sent=True)


def _why_unreachable(error: Exception, timeout_s: float) -> str:
    import aiohttp

    if isinstance(error, TimeoutError):
        return f"no connection within {min(CONNECT_TIMEOUT_S, timeout_s):g} s"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy refuses to connect (HTTP {error.status})"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return "no connection to the proxy could be made"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "the server's TLS certificate is not trusted"
    if isinstance(error, aiohttp.ClientSSLError):
        return "no TLS connection could be made; is the address https where the server speaks http?"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the host name is not known"
    if isinstance(error, ConnectionRefusedError) or isinstance(
        getattr(error, "os_error", None), ConnectionRefusedError
    ):
        return "connection refused"
    return "no connection could be made"
