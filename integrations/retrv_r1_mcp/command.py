"""`retrv-r1 mcp`: the tools for an agent, until the client hangs up or the server is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from retrv_r1_retriever.cli.search import load_config
from retrv_r1_retriever.cli.serve import listen
from retrv_r1_retriever.config import Config, local_images
from retrv_r1_retriever.errors import OptionsError, explain, missing_extra
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.serving.settings import McpConfig, is_local

if TYPE_CHECKING:
    from retrv_r1_mcp.calls import Calls

log = logging.getLogger(__name__)


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Search, rerank and inspect as tools of an agent (Model Context Protocol). See docs/agents.md."
    parser.add_argument("--http", action="store_true", help="serve over streamable HTTP (default: stdio)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: 8081; 0 takes a free one")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="the agent may name pictures below this folder")
    kinds = get_args(get_type_hints(McpConfig)["images"])
    parser.add_argument("--images", choices=kinds, help="how pictures come with results (default: inline)")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    try:
        import mcp.server
    except ImportError as error:
        raise missing_extra("mcp", "mcp") from error
    del mcp
    config = _asked(args, load_config(args))
    _check(args, config)
    files = None if args.image_root is None else local_images(config, args.image_root)
    _log_to_stderr()
    if args.http:
        return _serve(config, lambda: _open(config, files))
    from retrv_r1_mcp.server import create_server
    from retrv_r1_mcp.transport import nobody, run_stdio

    log.info("waiting for a client on standard input; --http serves over HTTP")
    asyncio.run(run_stdio(create_server(lambda: _open(config, files), nobody)))
    return 0


def _open(config: Config, files: LocalImages | None) -> Calls:
    """Loads the model and opens the collection."""
    from retrv_r1_mcp.calls import Calls
    from retrv_r1_mcp.pictures import ClientPictures
    from retrv_r1_retriever.serving.metrics import Metrics
    from retrv_r1_retriever.serving.queue import Queue
    from retrv_r1_retriever.serving.service import open_service

    limits = config.serve
    queue = Queue(limits.max_running, limits.max_waiting, Metrics())
    return Calls(open_service(config), limits, config.mcp, ClientPictures(files), queue)


def _serve(config: Config, open: Callable[[], Calls]) -> int:
    from retrv_r1_mcp.server import create_server
    from retrv_r1_mcp.transport import PATH, create_app, tenant_of

    keys = config.serve.keys()
    calls = open()  # before the port is: whoever starts a server wants to hear of it
    app = create_app(create_server(lambda: calls, tenant_of), keys, config.mcp, config.serve)
    log.info("tools at the path %s, for callers with a key", PATH)
    return listen(app, config.mcp.host, config.mcp.port, config.serve.shutdown_s)


def _asked(args: argparse.Namespace, config: Config) -> Config:
    given = {"host": args.host, "port": args.port, "images": args.images}
    return replace(
        config, mcp=replace(config.mcp, **{name: value for name, value in given.items() if value is not None})
    )


def _check(args: argparse.Namespace, config: Config) -> None:
    """What would only show with the first call, or never."""
    serve, mcp = config.serve, config.mcp
    if not args.http and (args.host is not None or args.port is not None):
        raise OptionsError(explain("--host, --port", expected="--http beside it", got="none", fix="Add --http."))
    if not args.http and serve.tenants:
        fix = "Name the one tenant with [store] tenant_field and tenant_value, or serve with --http."
        raise OptionsError(explain("[serve] tenants", expected="none over stdio", got="some", fix=fix))
    if args.http and not (serve.tenants or serve.api_key_env):
        fix = "Set api_key_env in [serve], or tenant_field and tenants."
        raise OptionsError(explain("--http", expected="an API key for its callers", got="none", fix=fix))
    if args.http and not is_local(mcp.host) and not mcp.hosts:
        fix = "Say under which names clients reach it: hosts in [mcp], e.g. ['shop.example.com']."
        raise OptionsError(explain(f"--host {mcp.host}", expected="hosts beside it", got="none", fix=fix))
    if args.image_root is not None and serve.tenants:
        fix = "Leave it out: a path would be somebody else's picture."
        raise OptionsError(explain("--image-root", expected="none beside [serve] tenants", got="one", fix=fix))


def _log_to_stderr() -> None:
    """One line per call, without what was asked or found; of everybody else warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for name in ("retrv_r1_mcp", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
