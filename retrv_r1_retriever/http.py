"""JSON over HTTP to a model server: one pooled client per event loop, limits on everything, retries only where they are safe.

    http = JsonHttp("http://127.0.0.1:8000/v1", api_key="...")
    answer = await http.post("chat/completions", body, idempotent=True)

What is tried again, with jittered, growing pauses: a connection that never came about, and 429 and 503 with a short `Retry-After`
(the server did no work); 500, 502, 504, and an answer cut in the middle, only for calls marked `idempotent`. Silence is never
tried again: a server that is too slow would only get slower. Needs the extra `http`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from retrv_r1_retriever.errors import OptionsError, ServerError, explain, missing_extra

if TYPE_CHECKING:
    import httpx

_NO_WORK_DONE = (429, 503)
_MAYBE_WORKED = (500, 502, 504)
_SHOWN = 300  # characters of a server's own words in an error


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """connect_s: until connected; answer_s: from sending to the last byte of the answer, per try.

    retries: further tries, at most; pause_s: before the first one, doubled each time, jittered; longest_wait_s: a longer
    `Retry-After` is an error at once; max_bytes: of an answer
    """

    connect_s: float = 5.0
    answer_s: float = 120.0
    retries: int = 2
    pause_s: float = 0.5
    longest_wait_s: float = 20.0
    max_bytes: int = 32_000_000


class JsonHttp:
    """Requests below one base URL. Usable from any number of event loops; redirects are not followed (they would get the key)."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        limits: HttpLimits | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            fix = "Pass the URL up to the version, e.g. http://127.0.0.1:8000/v1."
            raise OptionsError(explain("base_url", expected="http://... or https://...", got=repr(base_url), fix=fix))
        try:
            self._httpx: Any = importlib.import_module("httpx")
        except ImportError as error:
            raise missing_extra("httpx", "http") from error
        if api_key and not fits_header(api_key):  # an HTTP library's own error would quote it
            got = "spaces or a line's end around it, or characters that no header can carry"
            raise OptionsError(explain("api_key", expected="an API key", got=got, fix="Pass the key alone."))
        self.base_url = base_url.rstrip("/")
        self.limits = limits or HttpLimits()
        self._api_key = api_key
        self._headers = {**(headers or {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        self._clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

    async def get(self, path: str) -> Any:
        """The decoded JSON. Raises `ServerError`."""
        return await self._call("GET", path, None, idempotent=True)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | bytes,
        *,
        idempotent: bool,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """body: bytes are JSON already; idempotent: whether the server may be asked twice, because it keeps nothing of the call

        headers: beside those of every request. Raises `ServerError`.
        """
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self._call("POST", path, data, idempotent=idempotent, headers=headers)

    async def aclose(self) -> None:
        """Give back the connections, of every loop that still runs."""
        clients, self._clients = self._clients, {}
        for loop, client in clients.items():
            if loop is asyncio.get_running_loop():
                await client.aclose()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(client.aclose(), loop))

    async def _call(
        self, method: str, path: str, body: bytes | None, *, idempotent: bool, headers: Mapping[str, str] | None = None
    ) -> Any:
        typed = {**(headers or {}), **({"Content-Type": "application/json"} if body is not None else {})}
        for attempt in range(self.limits.retries + 1):
            try:
                return await self._once(method, f"{self.base_url}/{path}", body, typed)
            except ServerError as error:
                wait = self._pause(error, attempt, idempotent)
                if wait is None:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def _pause(self, error: ServerError, attempt: int, idempotent: bool) -> float | None:
        """Seconds until the next try; None = do not try again."""
        safe = error.unsent or error.status in _NO_WORK_DONE
        maybe = error.cut or error.status in _MAYBE_WORKED
        if attempt >= self.limits.retries or not (safe or (maybe and idempotent)):
            return None
        if error.retry_after_s is not None:
            too_long = error.retry_after_s > self.limits.longest_wait_s
            return None if too_long else error.retry_after_s + random.uniform(0, self.limits.pause_s)
        doubled: float = self.limits.pause_s * 2**attempt
        return doubled * random.uniform(0.5, 1.5)

    async def _once(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> Any:
        httpx, limits = self._httpx, self.limits
        try:
            async with asyncio.timeout(limits.answer_s) as limit:
                status, told, data = await self._exchange(method, url, body, headers)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise self._error(url, f"no answer within {limits.answer_s:g} s", "Is it overloaded?") from error
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            got = str(error) or f"no connection within {limits.connect_s:g} s"
            raise self._error(url, got, "Is the server running, and the URL right?", unsent=True) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            got = f"the answer broke off ({type(error).__name__}: {error})"
            raise self._error(url, got, "Look at the server's log.", cut=True) from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise self._error(url, f"{type(error).__name__}: {error}", "Fix the URL.") from error
        if not 200 <= status < 300:
            raise self._refusal(url, status, told, data)
        try:
            return json.loads(data)
        except ValueError as error:
            got = f"status {status} with {self._shown(data) or 'an empty body'}"
            raise self._error(url, got, "Is this the API's base URL?") from error

    async def _exchange(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        data = bytearray()
        async with self._client().stream(method, url, content=body, headers=headers) as answer:
            async for chunk in answer.aiter_bytes():
                data += chunk
                if len(data) > self.limits.max_bytes:
                    raise self._error(url, f"more than {self.limits.max_bytes:,} bytes", "Is this the right server?")
            return answer.status_code, answer.headers, bytes(data)

    def _client(self) -> httpx.AsyncClient:
        """Of the running loop: a pool cannot be used from another one."""
        loop = asyncio.get_running_loop()
        for known in [known for known in self._clients if known.is_closed()]:
            del self._clients[known]
        if loop not in self._clients:
            # One limit covers the whole answer (`_once`): read timeouts alone never end a body that drips.
            timeout = self._httpx.Timeout(None, connect=self.limits.connect_s)
            self._clients[loop] = self._httpx.AsyncClient(timeout=timeout, headers=self._headers)
        return self._clients[loop]

    def _refusal(self, url: str, status: int, headers: Mapping[str, str], data: bytes) -> ServerError:
        fix = _FIXES.get(status, "Look at the server's log." if status >= 500 else "Fix the request.")
        got, wait = f"status {status}", _seconds(headers.get("retry-after"))
        if status in (301, 302, 303, 307, 308):
            got, fix = f"{got} to {headers.get('location')}", "Use the URL it leads to; redirects are not followed."
        if wait is not None:
            fix = f"It asks to wait {wait:g} s."
        detail = self._shown(data)
        return self._error(url, f"{got}: {detail.removesuffix('.')}" if detail else got, fix, status, detail, wait)

    def _error(
        self,
        url: str,
        got: str,
        fix: str,
        status: int | None = None,
        detail: str = "",
        retry_after_s: float | None = None,
        *,
        unsent: bool = False,
        cut: bool = False,
    ) -> ServerError:
        message = explain(url, expected="an answer", got=self._without_key(got), fix=fix)
        return ServerError(message, status=status, detail=detail, retry_after_s=retry_after_s, unsent=unsent, cut=cut)

    def _shown(self, data: bytes) -> str:
        """The server's own words, short."""
        text = data[:20_000].decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            text = _message(json.loads(text)) or text
        text = self._without_key(" ".join(text.split()))
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


def fits_header(key: str) -> bool:
    return key.isascii() and key.isprintable() and key == key.strip()


_FIXES = {
    401: "Check the API key.",
    403: "Check the API key and its rights.",
    404: "Check the base URL and the model's name.",
    413: "Send less at once.",
    429: "Send less often, or raise the quota.",
}


def _message(body: Any) -> str | None:
    """The sentence in the shapes servers use: `{"error": {"message"}}`, `{"error"}`, `{"message"}`, `{"detail"}`."""
    if not isinstance(body, Mapping):
        return None
    for key in ("error", "message", "detail"):
        value = body.get(key)
        if value:
            return _message(value) or (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return None


def _seconds(retry_after: str | None) -> float | None:
    """Of a `Retry-After` header, which names seconds or a date."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
