"""The routes, and which error becomes which HTTP status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from retrv_r1_retriever import __version__
from retrv_r1_retriever.errors import (
    EngineError,
    InputError,
    NotIndexedError,
    OptionsError,
    RerankTimeout,
    StaleMemoryError,
    StoreError,
    missing_extra,
)

try:
    from fastapi import FastAPI, Request, Response, Security
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise missing_extra("fastapi", "serve") from error

from retrv_r1_retriever.measures import reason_label
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import less_time
from retrv_r1_retriever.serving import schema
from retrv_r1_retriever.serving.answers import header_text, to_answer
from retrv_r1_retriever.serving.door import Call, Door, error_json, too_many
from retrv_r1_retriever.serving.invalid import explain_body
from retrv_r1_retriever.serving.metrics import Metrics
from retrv_r1_retriever.serving.queue import Queue, QueueFull
from retrv_r1_retriever.serving.requests import (
    Asked,
    check_model,
    to_documents,
    to_filter,
    to_options,
    to_query,
    unknown_fields,
)
from retrv_r1_retriever.serving.service import Service
from retrv_r1_retriever.serving.settings import ServeConfig
from retrv_r1_retriever.types import RankedResults

log = logging.getLogger(__name__)

#: Looked through in order. What the caller did wrong is said; what went wrong here is in the log, under the request id.
CODES: tuple[tuple[type[Exception], int], ...] = (
    (NotIndexedError, 404),
    (InputError, 422),
    (OptionsError, 422),
    (StaleMemoryError, 409),
    (RerankTimeout, 504),
    (EngineError, 503),
    (StoreError, 503),
    (Exception, 500),
)
_READY_S = 5.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": schema.ErrorOut, "description": words}
    for code, words in (
        (400, "Not JSON"), (401, "API key missing or unknown"), (404, "Nothing is indexed yet"), (408, "The body took too long"),
        (409, "Stored memory is stale, and on_stale is 'raise'"), (413, "Body too large"), (422, "Input or options wrong"),
        (429, "Too many calls; see Retry-After"), (503, "No answer from the collection, or this server stops"),
        (504, "The first stage took too long"),
    )
}  # fmt: skip

#: FastAPI's own refusals.
_ROUTING = {
    400: "body: expected JSON, got what cannot be read as it. Send what a JSON library writes, less deep, with smaller numbers.",
    404: "route: expected one of /openapi.json, got another. Fix the URL: POST /v1/rerank or /v1/search.",
    405: "method: expected another for this route. Take the one in /openapi.json: POST for /v1/rerank and /v1/search.",
}


def create_app(service: Service, config: ServeConfig, keys: Mapping[str, str | None]) -> FastAPI:
    """The server as an ASGI application; closing it closes `service`."""
    metrics = Metrics()
    queue = Queue(config.max_running, config.max_waiting, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="retrv-r1", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Door, config=config, keys=keys, queue=queue, metrics=metrics)
    _Routes(service, config, queue, metrics).add_to(app, secured=bool(keys))
    for kind, code in CODES:
        app.add_exception_handler(kind, _answer_error(code))
    app.add_exception_handler(QueueFull, _answer_full)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    return app


class _Routes:
    def __init__(self, service: Service, config: ServeConfig, queue: Queue, metrics: Metrics) -> None:
        self._service, self._config, self._queue, self._metrics = service, config, queue, metrics

    def add_to(self, app: FastAPI, *, secured: bool) -> None:
        guard = [Security(HTTPBearer(auto_error=False))] if secured else []  # for OpenAPI; the door has checked
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            app.add_api_route(
                path, self.rerank, methods=["POST"], response_model=schema.Answer, responses=_ERRORS,
                dependencies=guard, include_in_schema=path == "/v1/rerank", summary="Order documents",
            )  # fmt: skip
        app.add_api_route(
            "/v1/search", self.search, methods=["POST"], response_model=schema.Answer, responses=_ERRORS,
            dependencies=guard, summary="Find documents in the collection, and order them",
        )  # fmt: skip
        app.add_api_route("/healthz", self.health, methods=["GET"], summary="The process runs")
        app.add_api_route("/readyz", self.ready, methods=["GET"], summary="The collection answers, too")
        app.add_api_route("/metrics", self.metrics, methods=["GET"], include_in_schema=False)

    async def rerank(self, request: Request, body: schema.RerankRequest, response: Response) -> schema.Answer:
        call, service = _call(request, "rerank"), self._service
        check_model(body.model, self._config)
        options = to_options(body, service.options, self._config)
        query, asked = to_query(body.query, self._config), to_documents(body.documents, self._config)
        async with self._turn(call, options) as remaining:
            results = await service.rerank(call.tenant, query, asked, remaining)
        return self._finish(call, body, results, asked, response)

    async def search(self, request: Request, body: schema.SearchRequest, response: Response) -> schema.Answer:
        call, service = _call(request, "search"), self._service
        check_model(body.model, self._config)
        options = to_options(body, service.options, self._config)
        query, only = to_query(body.query, self._config), to_filter(body.filter)
        service.collection(call.tenant)  # a server without one says so before anybody waits
        async with self._turn(call, options) as remaining:
            results = await service.search(call.tenant, query, remaining, filter=only)
        return self._finish(call, body, results, Asked(), response)

    async def health(self) -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    async def ready(self, response: Response) -> dict[str, str]:
        try:
            async with asyncio.timeout(_READY_S):
                await self._service.check()
        except Exception as error:  # whatever it is, this server is not ready
            log.warning("not ready: %s: %s", type(error).__name__, error)
            response.status_code = 503
            return {"status": "not ready", "reason": "the collection does not answer"}
        return {"status": "ready"}

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

    @asynccontextmanager
    async def _turn(self, call: Call, options: RerankOptions) -> AsyncIterator[RerankOptions]:
        """A place in the model; gives the options with what is left of the time."""
        assert options.timeout_s is not None  # `to_options`
        async with self._queue.turn(options.timeout_s) as waited:
            call.facts["waited"] = f"{waited:.3f}"
            yield less_time(options, waited)

    def _finish(
        self, call: Call, body: schema.Request, results: RankedResults, asked: Asked, response: Response
    ) -> schema.Answer:
        answer = to_answer(
            results, body, id=call.id, model=self._config.model_name, asked=asked, notes=unknown_fields(body)
        )
        reason = reason_label(answer.reason)
        self._metrics.count(results, call.route, reason, answer.status, len(asked.inline))
        trace = results.trace
        call.facts |= {
            "status": answer.status, "reason": reason, "candidates": len(results) + len(asked.blank),
            "opened": len(trace.inspected) if trace else 0, "tokens": answer.usage.total_tokens,
        }  # fmt: skip
        response.headers["x-retrv-status"] = answer.status
        if answer.reason:
            response.headers["x-retrv-reason"] = header_text(answer.reason)
        return answer


def _call(request: Request, route: str) -> Call:
    call: Call = request.state.call
    call.route = route
    return call


def _error(request: Request, code: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    call: Call | None = getattr(request.state, "call", None)
    return JSONResponse(error_json(call.id if call else "", kind, message), code, dict(headers or {}))


def _answer_error(code: int) -> Any:
    async def answer(request: Request, error: Exception) -> Response:
        message = str(error)
        if code >= 500:
            call: Call | None = getattr(request.state, "call", None)
            log.error("id=%s %s: %s", call.id if call else "", type(error).__name__, error)
            message = "Something failed in this server; its log says what, under this id."
        return _error(request, code, type(error).__name__, message)

    return answer


async def _answer_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFull)
    full = too_many(error)
    return _error(request, full.code, full.kind, str(full), full.headers)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    code = 400 if any(one["type"] == "json_invalid" for one in found) else 422
    said = explain_body(found, error.body, request.headers.get("content-type", ""))
    return _error(request, code, "InputError", said)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = _ROUTING.get(error.status_code, str(error.detail))
    return _error(request, error.status_code, "HTTPException", said, error.headers)
