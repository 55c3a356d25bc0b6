"""A Qdrant server's REST interface over qdrant-client's local mode: real HTTP and JSON between client and store, not a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic_core import to_jsonable_python
from qdrant_client import QdrantClient, models

ABOUT = {"title": "a stub of Qdrant", "version": "1.16.0"}  # what a server says of itself at its root


@dataclass
class Stub:
    """client: what the server holds; sent: bytes of every answer, by its route; log: requests that change something"""

    url: str
    client: QdrantClient
    sent: dict[str, list[int]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def rest_stub() -> Iterator[Stub]:
    client, lock = QdrantClient(":memory:"), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            route = [part for part in self.path.partition("?")[0].split("/") if part]
            try:
                with lock:
                    result = answer(client, self.command, route, body)
                status, reply = 200, {"result": to_jsonable_python(result), "status": "ok", "time": 0.0, **ABOUT}
            except ValueError as error:
                status, reply = 404, {"status": {"error": str(error)}, "time": 0.0}
            data = json.dumps(reply, separators=(",", ":")).encode()
            stub.sent.setdefault("/".join(route[2:] or route), []).append(len(data))
            if self.command in ("PUT", "DELETE") or (route[-1:] and route[-1] in ("delete", "aliases") and body):
                stub.log.append((self.command, "/".join(route)))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_port}", client)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


def answer(client: QdrantClient, method: str, route: list[str], body: Any) -> Any:
    if not route:
        return {}
    if route == ["aliases"]:
        return client.get_aliases()
    if route == ["collections"]:
        return client.get_collections()
    if route == ["collections", "aliases"]:
        return client.update_collection_aliases(models.ChangeAliasesOperation.model_validate(body).actions)
    name, rest = route[1], "/".join(route[2:])
    if rest == "exists":
        return {"exists": name in [one.name for one in client.get_collections().collections]}
    known: dict[tuple[str, str], Callable[[], Any]] = {
        ("GET", ""): lambda: client.get_collection(name),
        ("DELETE", ""): lambda: client.delete_collection(name),
        ("PUT", ""): lambda: create(client, name, models.CreateCollection.model_validate(body)),
        ("PUT", "points"): lambda: client.upsert(name, models.PointsList.model_validate(body).points),
        ("POST", "points/delete"): lambda: client.delete(name, models.PointIdsList.model_validate(body)),
        ("POST", "points/scroll"): lambda: scroll(client, name, models.ScrollRequest.model_validate(body)),
        ("POST", "points/query"): lambda: query(client, name, models.QueryRequest.model_validate(body)),
        ("POST", "points/count"): lambda: client.count(name, models.CountRequest.model_validate(body).filter),
        ("POST", "points"): lambda: retrieve(client, name, models.PointRequest.model_validate(body)),
    }
    return known[method, rest]()


def create(client: QdrantClient, name: str, asked: models.CreateCollection) -> bool:
    return client.create_collection(name, vectors_config=asked.vectors, metadata=asked.metadata)


def scroll(client: QdrantClient, name: str, asked: models.ScrollRequest) -> Any:
    points, following = client.scroll(
        name, asked.filter, asked.limit or 10, offset=asked.offset,
        with_payload=asked.with_payload or False, with_vectors=asked.with_vector or False,
    )  # fmt: skip
    return {"points": points, "next_page_offset": following}


def query(client: QdrantClient, name: str, asked: models.QueryRequest) -> Any:
    nearest = asked.query.nearest if isinstance(asked.query, models.NearestQuery) else asked.query
    return client.query_points(
        name, nearest, using=asked.using, query_filter=asked.filter, limit=asked.limit or 10,
        with_payload=asked.with_payload or False, with_vectors=asked.with_vector or False,
    )  # fmt: skip


def retrieve(client: QdrantClient, name: str, asked: models.PointRequest) -> Any:
    return client.retrieve(
        name, asked.ids, with_payload=asked.with_payload or False, with_vectors=asked.with_vector or False
    )
