"""`retrv-r1 serve`: reranking and search over HTTP, until told to stop."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from dataclasses import replace

from retrv_r1_retriever.cli.search import load_config
from retrv_r1_retriever.errors import OptionsError, explain, missing_extra
from retrv_r1_retriever.serving.settings import ServeConfig, is_local


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: 8080; 0 takes a free one")
    parser.add_argument("--rerank-only", action="store_true", help="open no collection: documents come with the call")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_extra("uvicorn", "serve") from error
    from retrv_r1_retriever.serving.app import create_app
    from retrv_r1_retriever.serving.service import open_service

    config = load_config(args)
    serve = _asked(args, config.serve)
    keys = serve.keys()
    _log_to_stderr()
    if not keys and not is_local(serve.host):
        logging.getLogger("retrv_r1_retriever.serving").warning(
            "listening on %s without an API key: whoever reaches the port may call. Set api_key_env in [serve].",
            serve.host,
        )
    service = open_service(replace(config, serve=serve))
    return listen(create_app(service, serve, keys), serve.host, serve.port, serve.shutdown_s)


def listen(app: object, host: str, port: int, shutdown_s: float) -> int:
    """Until told to stop; `app` is any ASGI application. Raises `OptionsError` for a port that is taken."""
    import uvicorn

    settings = uvicorn.Config(
        app,  # type: ignore[arg-type]  # uvicorn has its own types for ASGI
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(shutdown_s),
    )
    try:
        uvicorn.Server(settings).run()
    except SystemExit as error:  # how uvicorn says that the port is taken, after it has logged it
        fix = "Take another port, or stop what listens there."
        got = "an error, see above"
        raise OptionsError(explain(f"{host}:{port}", expected="a free port", got=got, fix=fix)) from error
    return 0


def _asked(args: argparse.Namespace, config: ServeConfig) -> ServeConfig:
    given = {"host": args.host, "port": args.port, "search": False if args.rerank_only else None}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _log_to_stderr() -> None:
    """Our lines and uvicorn's warnings; nothing that shows what was asked or found."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("retrv_r1_retriever", "uvicorn"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
