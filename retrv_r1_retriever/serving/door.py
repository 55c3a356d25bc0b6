"""What every call passes before it is read: request id, API key, a free place, the size of its body; and what is said of it after.

Plain ASGI: the body is read here, counted, and handed on whole. A caller that hangs up ends its call in the model, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from retrv_r1_retriever.serving.metrics import Metrics
from retrv_r1_retriever.serving.queue import Queue, QueueFull
from retrv_r1_retriever.serving.settings import ServeConfig

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Answered without a key, uncounted: they say nothing of any document.
OPEN = ("/healthz", "/readyz", "/metrics", "/openapi.json")
RETRY_AFTER_S = 1
DRAIN_S = 2.0  # for the rest of a refused body
GONE = 499  # the caller hung up; never sent, as nginx logs it
_SAFE_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
log = logging.getLogger("retrv_r1_retriever.serving")


@dataclass(slots=True)
class Call:
    """One call, as its log line tells it: numbers and labels, no content."""

    id: str
    tenant: str | None = None
    started: float = field(default_factory=time.monotonic)
    route: str = "none"
    code: int = 500
    answering: bool = False
    facts: dict[str, object] = field(default_factory=dict)


class Refused(Exception):
    def __init__(self, code: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.kind, self.headers = code, kind, dict(headers or {})


class Door:
    def __init__(
        self, app: App, *, config: ServeConfig, keys: Mapping[str, str | None], queue: Queue, metrics: Metrics
    ) -> None:
        self._app, self._config, self._keys, self._queue, self._metrics = app, config, keys, queue, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        call = Call(_id(headers))
        scope.setdefault("state", {})["call"] = call
        send = _noting(call, send)
        try:
            call.tenant = self._tenant(headers)
            with self._queue.admitted():
                body = await self._body(headers, receive)
                await self._answer(scope, body, call, receive, send)
        except Refused as error:
            await _refuse(receive, send, call, error)
        except QueueFull as error:
            await _refuse(receive, send, call, too_many(error))
        except (
            asyncio.CancelledError
        ):  # only the server does that, when `shutdown_s` is over; raised on, it would log a traceback
            if call.answering:
                raise
            await _send_refusal(send, call, Refused(503, "ShuttingDown", "This server stops. Ask another, or later."))
        finally:
            self._tell(scope, call)

    def _tenant(self, headers: Mapping[str, str]) -> str | None:
        if not self._keys:
            return None
        given = headers.get("authorization", "")
        given = given[7:].strip() if given[:7].lower() == "bearer " else headers.get("x-api-key", "")
        known = [key for key in self._keys if hmac.compare_digest(key.encode(), given.encode("latin-1", "replace"))]
        if not known:
            message = (
                "API key: expected a known one in `Authorization: Bearer ...`, got another or none. Check the key."
            )
            raise Refused(401, "Unauthorized", message, {"www-authenticate": "Bearer"})
        return self._keys[known[0]]

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        limit, body = self._config.max_body_bytes, bytearray()
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(GONE, "Gone", "the caller hung up")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            late = f"body: expected all of it within {self._config.body_timeout_s:g} s, got a part. Send it faster."
            raise Refused(408, "RequestTimeout", late) from None

    async def _answer(self, scope: Scope, body: bytes, call: Call, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(_disconnect(receive))

        async def again() -> Message:
            nonlocal body
            if body is None:
                return await asyncio.shield(left)
            whole, body = body, None  # type: ignore[assignment]  # handed on once
            return {"type": "http.request", "body": whole, "more_body": False}

        work = asyncio.ensure_future(self._app(scope, again, send))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                call.code = GONE
                work.cancel()
                await asyncio.wait({work})
            elif not work.cancelled():
                work.result()
        finally:
            work.cancel()
            left.cancel()

    def _tell(self, scope: Scope, call: Call) -> None:
        seconds = time.monotonic() - call.started
        self._metrics.calls.labels(call.route, str(call.code)).inc()
        self._metrics.seconds.labels(call.route).observe(seconds)
        facts = {"id": call.id, "route": call.route, "code": call.code, "seconds": f"{seconds:.3f}", **call.facts}
        if call.tenant is not None:
            facts["tenant"] = call.tenant
        log.info(" ".join(f"{name}={value}" for name, value in facts.items()))


def too_many(error: QueueFull) -> Refused:
    return Refused(429, "TooManyRequests", f"{error}. Try again later.", {"retry-after": str(RETRY_AFTER_S)})


def error_json(id: str, kind: str, message: str) -> dict[str, object]:
    whole = message.encode("utf-8", "replace").decode()  # a name quoted from the request may hold half a surrogate pair
    return {"id": id, "error": {"type": kind, "message": whole}}


async def _refuse(receive: Receive, send: Send, call: Call, error: Refused) -> None:
    if error.code == GONE:
        call.code = GONE
        return
    with contextlib.suppress(TimeoutError):  # most clients look for an answer only when all is sent
        async with asyncio.timeout(DRAIN_S):
            while (message := await receive()).get("more_body"):
                del message
    await _send_refusal(send, call, error)


async def _send_refusal(send: Send, call: Call, error: Refused) -> None:
    call.code = error.code
    body = json.dumps(error_json(call.id, error.kind, str(error))).encode()
    # Some of the body may be unread, so the connection cannot be used again.
    headers = {
        **error.headers,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.code, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _noting(call: Call, send: Send) -> Send:
    """`send`, that keeps the status and writes the request id."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            call.code, call.answering = message["status"], True
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
        await send(message)

    return noted


def _id(headers: Mapping[str, str]) -> str:
    given = headers.get("x-request-id", "")
    return given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


def _too_large(limit: int) -> Refused:
    message = (
        f"body: expected at most {limit:,} bytes, got more. Send fewer or smaller pictures, or ids of the collection."
    )
    return Refused(413, "TooLarge", message)


async def _disconnect(receive: Receive) -> Message:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message
