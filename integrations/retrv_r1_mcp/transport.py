"""Over stdio, for a client that starts this process; over HTTP, on loopback, with a key and a check of Host and Origin."""

from __future__ import annotations

import hmac
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from mcp.server import Server
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.context import ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.applications import Starlette

from retrv_r1_retriever.serving.settings import McpConfig, ServeConfig

PATH = "/mcp"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


async def run_stdio(server: Server[Any]) -> None:
    """Until the client closes the line. Whatever else is written to standard output meanwhile goes to standard error: the SDK
    diverts the descriptor, and what Python would keep in its buffer until the descriptor is back must not wait there."""
    async with stdio_server() as (incoming, outgoing):
        with redirect_stdout(sys.stderr):
            await server.run(incoming, outgoing, server.create_initialization_options())


def nobody(context: ServerRequestContext[Any, Any]) -> None:
    """Over stdio there is one caller, and [store] says what it may see."""


def tenant_of(context: ServerRequestContext[Any, Any]) -> str | None:
    """The one whose key came with this very request, None for the key of all. Raises where nobody was let in."""
    user = None if context.request is None else context.request.scope.get("user")
    if not isinstance(user, AuthenticatedUser):
        raise PermissionError("a request without a key got past the door")
    return user.access_token.subject


def create_app(
    server: Server[Any], keys: Mapping[str, str | None], config: McpConfig, limits: ServeConfig
) -> Starlette:
    """keys: API key -> its tenant; sessions belong to the key that opened them."""
    own = AnyHttpUrl(f"http://{_bracketed(config.host)}:{config.port or 80}")
    return server.streamable_http_app(
        streamable_http_path=PATH,
        max_request_body_size=limits.max_body_bytes,
        transport_security=TransportSecuritySettings(
            allowed_hosts=[*(f"{host}:*" for host in _LOOPBACK), *config.hosts],
            allowed_origins=[*(f"http://{host}:*" for host in _LOOPBACK), *config.origins],
        ),
        # The SDK asks for an issuer of tokens; ours are fixed keys, and nothing is published under this address.
        auth=AuthSettings(issuer_url=own, resource_server_url=None),
        token_verifier=_Keys(keys),
    )


class _Keys:
    """The SDK's token verifier over fixed keys."""

    def __init__(self, keys: Mapping[str, str | None]) -> None:
        self._keys = dict(keys)

    async def verify_token(self, token: str) -> AccessToken | None:
        given = token.strip().encode("utf-8", "replace")
        known = [key for key in self._keys if hmac.compare_digest(key.encode(), given)]
        if not known:
            return None
        tenant = self._keys[known[0]]
        return AccessToken(token=known[0], client_id=tenant or "retrv-r1", scopes=[], subject=tenant)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
