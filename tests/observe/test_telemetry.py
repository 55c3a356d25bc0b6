"""Spans and metrics as OpenTelemetry's own in-memory exporters receive them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from openinference.semconv.trace import (
    DocumentAttributes,
    OpenInferenceSpanKindValues,
    RerankerAttributes,
    SpanAttributes,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from retrv_r1_retriever import telemetry
from retrv_r1_retriever.cache import ResultCache
from retrv_r1_retriever.embedders import TextEmbedder
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.images import content_hash
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.observe import Step, Tell, observed
from retrv_r1_retriever.options import BALANCED, FAST, RerankOptions
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.serving.metrics import Metrics
from retrv_r1_retriever.telemetry import Telemetry
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query
from tests.helpers import candidates
from tests.tiny import checkpoint

__all__ = ["checkpoint"]

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"
THOUGHT = Thought(
    "s3cret hypothesis", (Verdict(0, "s3cret"), Verdict(1, "keep")), (Check(1, "s3cret check match", True),), 1
)
SLOTS = (1.0, 2.0, 0.0, 3.0, -1.0)
THINK = BALANCED.with_options(top_k=4, think="always")


class Store:
    async def search(self, vector: np.ndarray, top_k: int, *, filter: Any = None, with_memory: bool = True) -> Any:
        return candidates(top_k)


class Exported:
    """A `Telemetry` and what comes out of it."""

    def __init__(self, **settings: Any) -> None:  # of Telemetry
        self._spans, self._metrics = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        meters = MeterProvider([self._metrics])
        self.tracer = provider.get_tracer("test")
        self.telemetry = Telemetry(tracer_provider=provider, meter_provider=meters, **settings)

    def retriever(self, engine: ScriptedEngine, cache: ResultCache | None = None) -> RetrvR1Retriever:
        return RetrvR1Retriever(
            store=Store(),  # type: ignore[arg-type]
            embedder=TextEmbedder(lambda texts: [[1.0] for _ in texts]),
            engine=engine,
            cache=cache,
            observers=(self.telemetry,),
        )

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._spans.get_finished_spans()

    def span(self, name: str) -> Any:
        [span] = [span for span in self.spans if span.name == name]
        return SimpleNamespace(attributes=dict(span.attributes or {}), raw=span)

    def points(self) -> dict[str, list[tuple[dict[str, Any], float]]]:
        data = self._metrics.get_metrics_data()
        assert data is not None
        [scope] = data.resource_metrics[0].scope_metrics
        return {
            m.name: [
                (dict(p.attributes), getattr(p, "count", None) or getattr(p, "value", 0)) for p in m.data.data_points
            ]  # type: ignore[union-attr]
            for m in scope.metrics
        }


async def test_each_step_is_a_span_under_its_call() -> None:
    out = Exported()
    with out.tracer.start_as_current_span("caller"):
        await out.retriever(ScriptedEngine(THOUGHT, slots=SLOTS)).aretrieve("s3cret query", options=THINK)
    parents = {s.context.span_id: s.name for s in out.spans}
    told = {s.name: parents[s.parent.span_id] if s.parent else None for s in out.spans}
    assert told == {
        "retrv.embed": "retrv.retrieve",
        "retrv.search": "retrv.retrieve",
        "retrv.inspect": "retrv.rerank",
        "retrv.rerank": "retrv.retrieve",
        "retrv.retrieve": "caller",
        "caller": None,
    }
    rerank = out.span("retrv.rerank").attributes
    assert rerank[SpanAttributes.OPENINFERENCE_SPAN_KIND] == OpenInferenceSpanKindValues.RERANKER.value
    assert rerank[RerankerAttributes.RERANKER_MODEL_NAME] == "scripted"
    assert rerank[RerankerAttributes.RERANKER_TOP_K] == 4
    found = [
        [rerank[f"{side}.{n}.{DocumentAttributes.DOCUMENT_ID}"] for n in range(4)]
        for side in (RerankerAttributes.RERANKER_INPUT_DOCUMENTS, RerankerAttributes.RERANKER_OUTPUT_DOCUMENTS)
    ]
    assert found == [["doc-0", "doc-1", "doc-2", "doc-3"], ["doc-1", "doc-3", "doc-2", "doc-0"]]
    score = DocumentAttributes.DOCUMENT_SCORE
    assert rerank[f"{RerankerAttributes.RERANKER_INPUT_DOCUMENTS}.1.{score}"] == 0.995
    assert rerank[f"{RerankerAttributes.RERANKER_OUTPUT_DOCUMENTS}.0.{score}"] == 1.0
    assert (rerank["retrv.status"], rerank["retrv.inspected"], rerank["retrv.stop_reason"]) == (
        "reranked", 1, "answered",
    )  # fmt: skip
    assert out.span("retrv.inspect").attributes["retrv.id"] == "doc-1"
    assert out.span("retrv.embed").attributes[SpanAttributes.EMBEDDING_MODEL_NAME] == "TextEmbedder"
    assert out.span("retrv.search").attributes[f"{SpanAttributes.RETRIEVAL_DOCUMENTS}.0.document.id"] == "doc-0"


def test_the_sync_form_stays_under_the_callers_span() -> None:
    out = Exported()
    with out.tracer.start_as_current_span("caller") as caller:
        out.retriever(ScriptedEngine(slots=SLOTS)).retrieve("q", options=FAST.with_options(top_k=4))
        assert out.span("retrv.retrieve").raw.parent.span_id == caller.get_span_context().span_id


async def test_no_content_unless_asked() -> None:
    for content in (False, True):
        out = Exported(content=content)
        retriever = out.retriever(ScriptedEngine(THOUGHT, slots=SLOTS))
        await retriever.aretrieve("s3cret query", options=THINK)
        failing = out.retriever(ScriptedEngine(failing={"open": EngineError("s3cret words of a server")}))
        await failing.aretrieve("s3cret query", options=THINK)
        with pytest.raises(EngineError):
            await failing.aretrieve("s3cret query", options=THINK.with_options(on_failure="raise"))
        written = "".join(span.to_json() for span in out.spans)
        assert ("s3cret" in written) is content
        assert ("text 1" in written) is content  # a document
        reranks = [span.attributes or {} for span in out.spans if span.name == "retrv.rerank"]
        assert [r.get("retrv.status") for r in reranks] == ["reranked", "fallback", None]
        assert reranks[1]["retrv.reason"] == "engine"
        assert reranks[2]["error.type"] == "EngineError"


async def test_a_long_list_stays_below_the_limit_of_attributes() -> None:
    out = Exported(content=True)
    engine = ScriptedEngine(slots=lambda prompt: [0.0] * len(prompt.slots))
    await out.retriever(engine).aretrieve("q", options=FAST.with_options(top_k=100))
    assert all(span.dropped_attributes == 0 for span in out.spans)
    rerank = out.span("retrv.rerank").attributes
    assert rerank["retrv.candidates"] == 100
    assert sum(key.endswith("document.id") for key in rerank) == 20


async def test_metrics_count_a_call_once_and_a_cached_answer_as_such() -> None:
    out = Exported()
    retriever = out.retriever(ScriptedEngine(THOUGHT, slots=SLOTS), ResultCache())
    results = [await retriever.aretrieve("q", options=THINK) for _ in range(2)]
    points = out.points()
    assert points["retrv_results"] == [({"route": "search", "status": "reranked", "reason": "none"}, 2)]
    assert points["retrv_call_seconds"] == [({"route": "search"}, 2)]
    assert points["retrv_cache_hits"] == [({}, 1)]
    assert (points["retrv_thoughts"], points["retrv_inspections"]) == ([({}, 1)], [({}, 1)])
    assert results[0].trace is not None
    assert ({"kind": "sampled"}, results[0].trace.usage.sampled_tokens) in points["retrv_tokens"]


@pytest.mark.parametrize("share", [1.0, 0.5])
async def test_a_batch_counts_each_of_its_queries_once(share: float) -> None:
    """Also where the direct read of a query and its thought are two passes."""
    out = Exported()
    options = RerankOptions(top_k=4, max_think_share=share)
    await out.retriever(ScriptedEngine(THOUGHT, slots=SLOTS)).aretrieve_batch(["a", "b", "c", "d"], options=options)
    labels = {"route": "search_batch", "status": "reranked", "reason": "none"}
    assert out.points()["retrv_results"] == [(labels, 4)]
    assert out.span("retrv.retrieve_batch").attributes["retrv.queries"] == 4


async def test_the_names_are_those_of_the_server_and_of_the_docs() -> None:
    out = Exported(content=True)
    retriever = out.retriever(ScriptedEngine(THOUGHT, slots=SLOTS))
    await retriever.aretrieve("q", options=THINK)
    await retriever.aretrieve_batch(["a", "b"], options=THINK)
    failing = out.retriever(ScriptedEngine(failing={"open": EngineError("down")}))
    await failing.aretrieve("q", options=THINK)
    with pytest.raises(EngineError):
        await failing.aretrieve("q", options=THINK.with_options(on_failure="raise"))
    metrics = set(out.points())
    assert metrics <= {family.name for family in Metrics().registry.collect()}
    attributes = {
        re.sub(r"\.\d+\.", ".{i}.", key) for span in out.spans for key in span.attributes or {} if span.name != "caller"
    }
    documented = set(re.findall(r"^\| `([^`]+)`", PAGE.read_text(encoding="utf-8"), re.M))
    assert metrics | attributes | {span.name for span in out.spans} == documented


async def test_concurrent_calls_keep_their_own_spans() -> None:
    out = Exported()
    retriever = out.retriever(ScriptedEngine(THOUGHT, slots=SLOTS, delay_s=0.001))
    await asyncio.gather(*(retriever.aretrieve(f"q{n}", options=THINK) for n in range(8)))
    names = {s.context.span_id: s for s in out.spans}
    for span in out.spans:
        if span.name == "retrv.inspect":
            rerank = names[span.parent.span_id]  # type: ignore[union-attr]
            assert rerank.name == "retrv.rerank"
            assert names[rerank.parent.span_id].name == "retrv.retrieve"  # type: ignore[union-attr]
    assert sum(s.name == "retrv.retrieve" and s.parent is None for s in out.spans) == 8


def test_no_sdk_is_noticed() -> None:
    assert telemetry.sends_nothing()


class Counting:
    steps = 0

    @contextmanager
    def watch(self, step: Step) -> Iterator[Tell]:
        self.steps += 1
        yield lambda found: None


def cpu_seconds(call: Callable[[], object], times: int = 1) -> float:
    """Of one call, the quickest of five rounds; CPU time, because other processes may hold the cores."""

    def once() -> float:
        started = time.process_time()
        for _ in range(times):
            call()
        return (time.process_time() - started) / times

    return min(once() for _ in range(5))


def test_switched_off_it_costs_less_than_a_hundredth_of_the_quickest_call(checkpoint: Checkpoint) -> None:
    """Of one pass of a model much smaller than the miniature, over twenty candidates whose memory is stored."""
    engine = LocalEngine(checkpoint)
    texts = [Content(f"two red circle {n}") for n in range(20)]
    found = [
        Candidate(Document(str(n), text), None, n + 1, Memory(c.rows, "m", content_hash(text), c.full_tokens))
        for n, (text, c) in enumerate(zip(texts, engine.compress(texts), strict=True))
    ]

    async def first_stage(query: Query, *, top_k: int, filter: Any = None) -> Sequence[Candidate]:
        return found

    def retriever(*observers: Counting) -> RetrvR1Retriever:
        return RetrvR1Retriever(first_stage=first_stage, engine=engine, options=FAST, observers=observers)

    counting, unwatched = Counting(), retriever()
    assert retriever(counting).retrieve("q").status == "reranked"
    assert counting.steps == 3  # retrieve, search, rerank

    def step() -> None:
        with observed((), Step("rerank", Query.of("q"), FAST, tuple(found))) as tell:
            tell(())

    assert counting.steps * cpu_seconds(step, 1000) < 0.01 * cpu_seconds(lambda: unwatched.retrieve("q"))
