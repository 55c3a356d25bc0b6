"""A real HTTP server on loopback that answers as told, in time or not, whole or not."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reply:
    """body: bytes as they are, anything else as JSON. delay_s: before the first byte; drip_s: between single bytes

    cut: so many bytes of the body are sent, then the connection is reset; None = all
    """

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0
    cut: int | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class HttpStub:
    """url: without a path; requests: in the order they came; connections: open ones; kill(): closes these and the port"""

    url: str
    requests: list[Request]
    connections: set[socket.socket]
    kill: Callable[[], None]


@contextmanager
def http_stub(answer: Callable[[Request], Reply] | Sequence[Reply]) -> Iterator[HttpStub]:
    """answer: from a request to its reply, or replies in order, the last one for ever."""
    replies, requests, lock, closing = answer, [], threading.Lock(), threading.Event()
    connections: set[socket.socket] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            connections.add(self.connection)

        def finish(self) -> None:
            connections.discard(self.connection)
            with suppress(OSError):
                super().finish()

        def _answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Request(self.command, self.path, dict(self.headers), json.loads(data) if data else None)
            with lock:
                requests.append(request)
                number = len(requests) - 1
            reply = replies(request) if callable(replies) else replies[min(number, len(replies) - 1)]
            with suppress(OSError):
                self._send(reply)

        def _send(self, reply: Reply) -> None:
            if closing.wait(reply.delay_s):
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if reply.drip_s:
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    if closing.wait(reply.drip_s):
                        return
            else:
                self.wfile.write(data if reply.cut is None else data[: reply.cut])
            if reply.cut is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True

    def kill() -> None:
        if closing.is_set():
            return
        closing.set()
        server.shutdown()
        server.server_close()
        for connection in list(connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield HttpStub(f"http://127.0.0.1:{server.server_port}", requests, connections, kill)
    finally:
        kill()


@contextmanager
def pictures_stub(folder: Path) -> Iterator[str]:
    """The URL under which the PNG files of a folder are."""
    headers = {"Content-Type": "image/png"}
    with http_stub(lambda request: Reply((folder / request.path[1:]).read_bytes(), headers=headers)) as stub:
        yield stub.url
