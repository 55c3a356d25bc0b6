"""A process under `opentelemetry-instrument`, set up as docs/observability.md says: its spans and metrics reach a collector."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.cli.conftest import Run, checkpoint, checkpoint_folder, run, workplace

__all__ = ["checkpoint", "checkpoint_folder", "run", "workplace"]

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"
KINDS: dict[str, Any] = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its address, and the messages that arrived, decoded."""
    arrived: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            arrived.append(KINDS[self.path].FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", arrived
        finally:
            server.shutdown()


def settings() -> dict[str, str]:
    """The environment that the page tells an operator to set."""
    [line] = re.findall(r"^export (OTEL_.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    return dict(one.split("=", 1) for one in line.split())


def test_spans_and_metrics_reach_a_collector(run: Run, workplace: Path) -> None:
    assert run("index", "items").code == 0
    config = workplace / "retrv.toml"
    config.write_text(config.read_text() + "[observe]\notel = true\n")
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    argv = [sys.executable, "-m", "retrv_r1_retriever.cli", "search", "--text", "s3cret", "--think", "always"]
    with collector() as (url, arrived):
        environment = {**os.environ, **settings(), "OTEL_EXPORTER_OTLP_ENDPOINT": url}
        done = subprocess.run([instrument, *argv], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no OpenTelemetry SDK is set up" not in done.stderr
    of_spans = [
        scope for message in arrived for sent in getattr(message, "resource_spans", ()) for scope in sent.scope_spans
    ]
    spans = [span for scope in of_spans if scope.scope.name == "retrv_r1_retriever" for span in scope.spans]
    assert {span.name for span in spans} >= {"retrv.retrieve", "retrv.embed", "retrv.search", "retrv.rerank"}
    assert len({span.trace_id for span in spans}) == 1
    of_metrics = [sent for message in arrived for sent in getattr(message, "resource_metrics", ())]
    names = {metric.name for sent in of_metrics for scope in sent.scope_metrics for metric in scope.metrics}
    assert {"retrv_results", "retrv_call_seconds", "retrv_tokens"} <= names
    attributes = {one.key: one.value.string_value for sent in of_metrics for one in sent.resource.attributes}
    assert attributes["service.name"] == settings()["OTEL_SERVICE_NAME"]
    assert "s3cret" not in str(arrived)
