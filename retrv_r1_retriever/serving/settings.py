"""`[serve]` and `[mcp]` of `retrv.toml`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.http import fits_header
from retrv_r1_retriever.types import MAX_CANDIDATES


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Where the server listens, who may use it, and how much it takes on.

    model_name: what `model` in a request must say, if it says anything
    search: False: no collection is opened; documents come with the request
    api_key_env: environment variable with the one key of all callers
    tenant_field, tenants: payload field, and per value of it the environment variable with that tenant's key
    max_running: calls in the model at the same time; max_waiting: calls that wait behind them, more are refused
    max_text_chars: of one text; max_timeout_s: most that a call may ask for
    body_timeout_s: for a request to arrive; shutdown_s: for running calls to end after SIGTERM
    """

    host: str = "127.0.0.1"
    port: int = 8080
    model_name: str = "retrv-r1"
    search: bool = True
    api_key_env: str | None = None
    tenant_field: str | None = None
    tenants: dict[str, str] = field(default_factory=dict, hash=False)
    max_running: int = 16
    max_waiting: int = 64
    max_body_bytes: int = 32_000_000
    max_documents: int = MAX_CANDIDATES
    max_text_chars: int = 100_000
    max_timeout_s: float = 120.0
    body_timeout_s: float = 30.0
    shutdown_s: float = 30.0

    def __post_init__(self) -> None:
        at_least = {"max_running": 1, "max_waiting": 0, "max_body_bytes": 1, "max_documents": 1, "max_text_chars": 1}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise OptionsError(explain(name, expected=f">= {low}", got=getattr(self, name), fix="Raise it."))
        for name in ("max_timeout_s", "body_timeout_s", "shutdown_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionsError(explain(name, expected="seconds > 0", got=getattr(self, name), fix="Raise it."))
        _check_port(self.port)
        if bool(self.tenants) != (self.tenant_field is not None):
            raise OptionsError(
                explain("tenants", expected="tenant_field and tenants", got="one of them", fix="Give both.")
            )
        if self.tenants and (self.api_key_env or not self.search):
            fix = "Tenants bring their own keys, and share a collection."
            raise OptionsError(explain("tenants", expected="no api_key_env, and search", got="otherwise", fix=fix))

    def keys(self) -> dict[str, str | None]:
        """API key -> its tenant, from the environment; empty = whoever reaches the port may call. Raises `OptionsError`."""
        named = [(variable, tenant) for tenant, variable in self.tenants.items()]
        if self.api_key_env:
            return {_secret(self.api_key_env): None}
        keys = {_secret(variable): tenant for variable, tenant in named}
        if len(keys) < len(named):
            raise OptionsError(
                explain("tenants", expected="a key of its own each", got="one key twice", fix="Make another key.")
            )
        return dict(keys)


@dataclass(frozen=True, slots=True)
class McpConfig:
    """`retrv-r1 mcp`: what agents get, and over HTTP where. Keys, tenants and limits are those of [serve].

    images: pictures of results as content "inline", as a "link" that the client may read, or "none"
    image_tokens: what the pictures of one answer may cost the model that looks at them, an estimate
    max_results: in one answer; hosts: further values of the Host header, origins: of Origin, "*" as the port matches all
    """

    host: str = "127.0.0.1"
    port: int = 8081
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    images: Literal["inline", "link", "none"] = "inline"
    image_tokens: int = 4000
    max_results: int = 10

    def __post_init__(self) -> None:
        for name, low in {"image_tokens": 1, "max_results": 1}.items():
            if getattr(self, name) < low:
                raise OptionsError(explain(name, expected=f">= {low}", got=getattr(self, name), fix="Raise it."))
        _check_port(self.port)


def _check_port(port: int) -> None:
    if not 0 <= port < 2**16:
        raise OptionsError(explain("port", expected="0 to 65535", got=port, fix="0 takes a free one."))


def _secret(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not key or not fits_header(key):
        got = "nothing" if not key else "spaces around it, or characters that no header can carry"
        raise OptionsError(explain(f"environment variable {variable}", expected="an API key", got=got, fix="Set it."))
    return key


def is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
