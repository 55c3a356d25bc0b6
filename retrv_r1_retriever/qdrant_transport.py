"""How a Qdrant server is talked to. Memory is heavy: as JSON several times what it is over gRPC, so gRPC is taken where it answers."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from retrv_r1_retriever.points import Found

GRPC_PORT = 6334
_HEAVY = 100_000  # bytes of JSON in one answer
_log = logging.getLogger(__name__)


def connect(qdrant_client: Any, url: str, api_key: str | None, grpc: bool | None) -> Any:
    """A sync client. grpc: None = if the port answers within a second."""
    use_grpc = _answers(url) if grpc is None else grpc
    return qdrant_client.QdrantClient(
        url=url, api_key=api_key, check_compatibility=False, prefer_grpc=use_grpc, grpc_port=GRPC_PORT
    )


def _answers(url: str) -> bool:
    host = urlsplit(url if "://" in url else f"//{url}").hostname
    try:
        with socket.create_connection((host or "localhost", GRPC_PORT), timeout=1.0):
            return True
    except OSError:
        return False


def is_remote(client: Any) -> bool:
    """Whether the client talks to a server, and is not a local mode."""
    return hasattr(getattr(client, "_client", None), "_prefer_grpc")


def over_rest(client: Any) -> bool:
    """True for a client of a server that was not told to prefer gRPC."""
    return is_remote(client) and client._client._prefer_grpc is False


class Scales:
    """Weighs the first memory that comes over REST, and warns once if it is heavy."""

    def __init__(self, client: Any, where: str) -> None:
        self._wanted, self._where = over_rest(client), where

    async def weigh(self, found: Sequence[Found]) -> None:
        if not self._wanted or not any(point.rows for point in found):
            return
        self._wanted = False
        as_json, as_floats = await asyncio.to_thread(_weights, found)
        if as_json > _HEAVY:
            _log.warning(
                "%s: the memory of %d candidates came as %.1f MB of JSON; gRPC sends %.1f MB. Open the server's port %d, "
                "or pass a client made with prefer_grpc=True.",
                self._where, len(found), as_json / 1e6, as_floats / 1e6, GRPC_PORT,
            )  # fmt: skip


def json_bytes(rows: object) -> int:
    """What vectors weigh in a REST answer."""
    return len(json.dumps(rows, separators=(",", ":")))


def _weights(found: Sequence[Found]) -> tuple[int, int]:
    rows = [point.rows for point in found if point.rows]
    return sum(map(json_bytes, rows)), sum(4 * len(row) for one in rows for row in one)
