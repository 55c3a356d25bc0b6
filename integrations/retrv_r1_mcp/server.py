"""The MCP server: which handler answers what, whose documents a caller may see, and what is said of an error."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from mcp.server import Server
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    BlobResourceContents,
    CallToolRequestParams,
    CallToolResult,
    ListResourcesResult,
    ListResourceTemplatesResult,
    ListToolsResult,
    PaginatedRequestParams,
    ReadResourceRequestParams,
    ReadResourceResult,
    ResourceTemplate,
    TextContent,
    Tool,
)
from pydantic import ValidationError

from retrv_r1_mcp import schema
from retrv_r1_mcp.calls import Calls
from retrv_r1_mcp.pictures import TEMPLATE, document_of, handle_id
from retrv_r1_retriever import __version__
from retrv_r1_retriever.errors import (
    InputError,
    NotIndexedError,
    OptionsError,
    RerankTimeout,
    RetrvR1Error,
    StaleMemoryError,
)
from retrv_r1_retriever.serving.queue import QueueFull

Context = ServerRequestContext[Any, Any]
#: What the caller can mend, or try again, is said; what went wrong here is in the log.
TOLD = (InputError, OptionsError, NotIndexedError, StaleMemoryError, RerankTimeout, QueueFull)
OUR_FAULT = "Something failed in this server; its log says what."
#: Answered before the model is looked at: a client waits for these with a short patience.
_HANDSHAKE = ("initialize", "server/discover", "ping")
log = logging.getLogger(__name__)


class OpeningError(Exception):
    """The model or the collection could not be opened. Said in full: whoever starts a server over stdio is its operator."""


class Opened:
    """What the calls need, opened in a thread when first asked for; after a failure it is tried again."""

    def __init__(self, open: Callable[[], Calls]) -> None:
        self._open = open
        self._opening: asyncio.Task[Calls] | None = None

    def start(self) -> asyncio.Task[Calls]:
        failed = self._opening is not None and self._opening.done() and self._opening.exception() is not None
        if self._opening is None or failed:
            self._opening = asyncio.ensure_future(asyncio.to_thread(self._open))
            self._opening.add_done_callback(_log_failure)
        return self._opening

    async def calls(self) -> Calls:
        """A cancelled call leaves the opening alone. Raises `OpeningError`."""
        try:
            return await asyncio.shield(self.start())
        except RetrvR1Error as error:
            raise OpeningError(str(error)) from error

    @property
    def begun(self) -> bool:
        return self._opening is not None

    @property
    def ready(self) -> bool:
        return self._opening is not None and self._opening.done()

    async def close(self) -> None:
        opening, self._opening = self._opening, None
        if opening is None:
            return
        await asyncio.wait([opening])
        if opening.exception() is None:
            await opening.result().service.close()


@dataclass(frozen=True, slots=True)
class _Tool:
    shown: Tool
    arguments: type[schema.Arguments]
    answer: Callable[[Calls], Callable[[str | None, Any, Any], Awaitable[CallToolResult]]]


_TOOLS: Mapping[str, _Tool] = {
    "search": _Tool(schema.SEARCH, schema.SearchArguments, lambda calls: calls.search),
    "rerank": _Tool(schema.RERANK, schema.RerankArguments, lambda calls: calls.rerank),
    "inspect": _Tool(schema.INSPECT, schema.InspectArguments, lambda calls: calls.inspect),
}


def create_server(open: Callable[[], Calls], tenant_of: Callable[[Context], str | None]) -> Server[Any]:
    """open: blocks while it loads the model, and is not called before the handshake; tenant_of: the caller's, never an argument."""
    opened = Opened(open)
    handlers = _Handlers(opened, tenant_of)

    @asynccontextmanager
    async def lifespan(server: Server[Any]) -> AsyncIterator[None]:
        yield
        await opened.close()

    async def open_after_handshake(ctx: Context, call_next: CallNext) -> HandlerResult:
        answer = await call_next(ctx)
        if (
            ctx.method not in _HANDSHAKE and not opened.begun
        ):  # a failure is tried again by the next call, not behind this one
            opened.start()
        return answer

    server: Server[Any] = Server(
        "retrv-r1",
        version=__version__,
        instructions=schema.INSTRUCTIONS,
        lifespan=lifespan,
        on_list_tools=handlers.list_tools,
        on_call_tool=handlers.call_tool,
        on_list_resources=handlers.list_resources,
        on_list_resource_templates=handlers.list_templates,
        on_read_resource=handlers.read_resource,
    )
    server.middleware.append(open_after_handshake)
    return server


class _Handlers:
    def __init__(self, opened: Opened, tenant_of: Callable[[Context], str | None]) -> None:
        self._opened, self._tenant_of = opened, tenant_of

    async def list_tools(self, context: Context, params: PaginatedRequestParams | None) -> ListToolsResult:
        return ListToolsResult(tools=[tool.shown for tool in _TOOLS.values()])

    async def call_tool(self, context: Context, params: CallToolRequestParams) -> CallToolResult:
        tool = _TOOLS.get(params.name)
        if tool is None:
            known = ", ".join(_TOOLS)
            raise MCPError(INVALID_PARAMS, f"tool: expected one of {known}, got {params.name[:80]!r}. Fix the name.")
        started, tenant, outcome = time.monotonic(), self._tenant_of(context), "failed"
        try:
            arguments = tool.arguments.model_validate(params.arguments or {})
            calls = await self._calls(context)
            answer = await tool.answer(calls)(tenant, arguments, _report(context))
            outcome = "answered"
            return answer
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except ValidationError as error:
            outcome = "refused"
            return _error(_invalid(error))
        except (*TOLD, OpeningError) as error:
            outcome = f"refused ({type(error).__name__})"
            return _error(str(error))
        except Exception:
            log.exception("tool=%s failed", params.name)
            return _error(OUR_FAULT)
        finally:
            whose = "" if tenant is None else f" tenant={tenant}"
            log.info("tool=%s%s %s seconds=%.3f", params.name, whose, outcome, time.monotonic() - started)

    async def list_resources(self, context: Context, params: PaginatedRequestParams | None) -> ListResourcesResult:
        """None by name: a collection is searched, not listed."""
        return ListResourcesResult(resources=[])

    async def list_templates(
        self, context: Context, params: PaginatedRequestParams | None
    ) -> ListResourceTemplatesResult:
        words = "The picture of a document, by its id."
        shown = ResourceTemplate(name="picture", uri_template=TEMPLATE, description=words, mime_type="image/jpeg")
        return ListResourceTemplatesResult(resource_templates=[shown])

    async def read_resource(self, context: Context, params: ReadResourceRequestParams) -> ReadResourceResult:
        uri = str(params.uri)
        id, tenant = handle_id(uri), self._tenant_of(context)
        if id is None:
            raise MCPError(INVALID_PARAMS, f"resource: expected {TEMPLATE}, got {uri[:120]!r}. Fix the URI.")
        try:
            calls = await self._calls(context)
            pictures = await calls.picture(await document_of(calls.store(tenant), id))
        except (*TOLD, OpeningError) as error:
            raise MCPError(INVALID_PARAMS, str(error)) from error
        if not pictures.shown:
            raise MCPError(INVALID_PARAMS, " ".join(pictures.remarks) or f"document {id[:200]!r} has no picture")
        [picture] = pictures.shown
        blob = base64.b64encode(picture.data).decode("ascii")
        return ReadResourceResult(contents=[BlobResourceContents(uri=uri, blob=blob, mime_type=picture.mime_type)])

    async def _calls(self, context: Context) -> Calls:
        if not self._opened.ready:
            await context.session.report_progress(0, message="loading the model")
        return await self._opened.calls()


def _report(context: Context) -> Callable[[float, str], Awaitable[None]]:
    async def report(step: float, words: str) -> None:
        await context.session.report_progress(step, message=words)

    return report


def _error(message: str) -> CallToolResult:
    """For the model to read, and to do better."""
    return CallToolResult(content=[TextContent(text=message)], is_error=True)


def _invalid(error: ValidationError) -> str:
    """Where and what, without the input: it may be of any size."""
    found = error.errors(include_input=False, include_url=False)
    shown = [f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}" for one in found[:5]]
    return "; ".join(shown) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


def _log_failure(opening: asyncio.Task[Calls]) -> None:
    if not opening.cancelled() and (error := opening.exception()) is not None:
        log.error("the model or the collection could not be opened: %s: %s", type(error).__name__, error)
