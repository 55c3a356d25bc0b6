"""OpenTelemetry spans and metrics of every call; the only module that imports it. Needs the extra `otel`.

Spans carry OpenInference's attributes, and `retrv.*` for what that has no name for. All names: docs/observability.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from retrv_r1_retriever import __version__
from retrv_r1_retriever.errors import OptionsError, explain, missing_extra
from retrv_r1_retriever.measures import CALL_SECONDS, OF_RESULTS, SECONDS, Measure, counted, reason_label
from retrv_r1_retriever.observe import Found, Step, StepName, Tell
from retrv_r1_retriever.types import Candidate, RankedResult, RankedResults

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Span, Status, StatusCode
except ImportError as error:
    raise missing_extra("opentelemetry", "otel") from error

Attributes: TypeAlias = dict[str, str | bool | int | float]

#: Step -> (span, OpenInference kind, `route` of the metrics).
SPANS: dict[StepName, tuple[str, str, str]] = {
    "retrieve": ("retrv.retrieve", "CHAIN", "search"),
    "retrieve_batch": ("retrv.retrieve_batch", "CHAIN", "search_batch"),
    "embed": ("retrv.embed", "EMBEDDING", ""),
    "search": ("retrv.search", "RETRIEVER", ""),
    "rerank": ("retrv.rerank", "RERANKER", "rerank"),
    "rerank_batch": ("retrv.rerank_batch", "CHAIN", "rerank_batch"),
    "inspect": ("retrv.inspect", "CHAIN", ""),
}
KIND = "openinference.span.kind"
INPUT, OUTPUT = "input.value", "output.value"
EMBEDDING_MODEL = "embedding.model_name"
FOUND_DOCUMENTS = "retrieval.documents"
QUERY, MODEL, TOP_K = "reranker.query", "reranker.model_name", "reranker.top_k"
INPUT_DOCUMENTS, OUTPUT_DOCUMENTS = "reranker.input_documents", "reranker.output_documents"
#: Versions of a trace that may name the model, the best first.
_MODEL_NAMES = ("model", "checkpoint", "engine")


class Telemetry:
    """For `RetrvR1Retriever(observers=(Telemetry(),))`; several retrievers may share one.

    content: also put into spans what was asked, found and thought; without it only ids, numbers and states
    max_documents: documents named in one span, at most; 10 stay below OpenTelemetry's limit of 128 attributes
    tracer_provider, meter_provider: default to the process's own
    """

    def __init__(
        self,
        *,
        content: bool = False,
        max_documents: int = 10,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        if max_documents < 0:
            raise OptionsError(explain("max_documents", expected="at least 0", got=max_documents, fix="0 names none."))
        self._content, self._max_documents = content, max_documents
        self._tracer = trace.get_tracer("retrv_r1_retriever", __version__, tracer_provider)
        meter = metrics.get_meter("retrv_r1_retriever", __version__, meter_provider)
        self._instruments = {m: _instrument(meter, m) for m in (CALL_SECONDS, *OF_RESULTS)}

    @contextmanager
    def watch(self, step: Step) -> Iterator[Tell]:
        name, kind, route = SPANS[step.name]
        started = time.perf_counter()
        attributes = {**self._beginning(step), KIND: kind}  # the kind last: of too many, the first are dropped
        # An exception's words may hold what was asked or found: only its class is told.
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=self._content, set_status_on_exception=False
        ) as span:
            try:
                yield lambda found: self._told(step, span, found)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR, str(error) if self._content else type(error).__name__))
                raise
            finally:
                if step.outermost and route:
                    self._instruments[CALL_SECONDS].record(time.perf_counter() - started, {"route": route})

    def _told(self, step: Step, span: Span, found: Found) -> None:
        if not isinstance(found, RankedResults):
            span.set_attributes(self._documents(FOUND_DOCUMENTS, found) | {"retrv.candidates": len(found)})
            return
        if step.queries == 1:
            span.set_attributes(self._answer(step, found))
        if step.outermost:
            self._count(found, SPANS[step.name][2])

    def _count(self, results: RankedResults, route: str) -> None:
        reason, status = reason_label(results.reason), results.status.value
        for measure, amount, values in counted(results, route, reason, status):
            labels = dict(zip(measure.labels, values, strict=True))
            instrument = self._instruments[measure]
            (instrument.add if measure.kind == "counter" else instrument.record)(amount, labels)

    # -- attributes ----------------------------------------------------------------------------------------------------

    def _beginning(self, step: Step) -> Attributes:
        told: Attributes = {}
        asked = step.query.content.text if step.query and self._content else None
        if asked:
            told |= {INPUT: asked} | ({QUERY: asked} if step.name == "rerank" else {})
        if step.model is not None:
            told[EMBEDDING_MODEL] = step.model
        if step.queries > 1:
            told["retrv.queries"] = step.queries
        if step.name == "inspect":
            [opened] = step.candidates
            return told | {"retrv.index": step.index or 0, "retrv.rank": opened.rank, "retrv.id": opened.document.id}
        if step.name == "rerank":
            told |= self._documents(INPUT_DOCUMENTS, step.candidates)
            told |= {"retrv.candidates": len(step.candidates)}
        if step.options is not None:
            options = step.options
            told |= {"retrv.think": options.think, "retrv.ranking": options.ranking}
            if step.name == "rerank":
                told[TOP_K] = len(step.candidates) if options.top_n is None else options.top_n
            else:
                told["retrv.top_k"] = options.top_k
        return told

    def _answer(self, step: Step, results: RankedResults) -> Attributes:
        told = self._documents(OUTPUT_DOCUMENTS, results.results) if step.name == "rerank" else {}
        told |= {"retrv.status": results.status.value, "retrv.reason": reason_label(results.reason)}
        told["retrv.none_chosen"] = results.none_chosen
        made = results.trace
        if made is not None:
            told |= {"retrv.inspected": len(made.inspected), "retrv.cached": made.cached}
            told |= {"retrv.tokens.prompt": made.usage.prompt_tokens, "retrv.tokens.sampled": made.usage.sampled_tokens}
            told["retrv.tokens.uncompressed"] = made.usage.uncompressed_tokens
            if made.stop_reason is not None:
                told["retrv.stop_reason"] = made.stop_reason.value
            model = next((made.versions[name] for name in _MODEL_NAMES if name in made.versions), None)
            if model is not None and step.name == "rerank":
                told[MODEL] = model
            if self._content:
                told[OUTPUT] = made.thought
        if self._content and results.reason:
            told["retrv.reason.text"] = results.reason
        return told

    def _documents(self, prefix: str, found: Sequence[Candidate | RankedResult]) -> Attributes:
        """Candidates with the first stage's score, results with ours; the other one is in the metadata."""
        told: Attributes = {}
        for place, item in enumerate(found[: self._max_documents]):
            at = f"{prefix}.{place}.document"
            told[f"{at}.id"] = item.document.id
            score = item.score if isinstance(item, RankedResult) else item.retrieval_score
            if score is not None:
                told[f"{at}.score"] = score
            if isinstance(item, RankedResult):
                told[f"{at}.metadata"] = json.dumps(_decision(item))
            if self._content and item.document.content.text:
                told[f"{at}.content"] = item.document.content.text
        return told


def _decision(result: RankedResult) -> dict[str, Any]:
    """What is known of a result without its content; the model's verdict is words about it, and left out."""
    return {
        "retrieval_rank": result.candidate.rank,
        "retrieval_score": result.retrieval_score,
        "selected": result.selected,
        "opened": result.signals.opened,
        "match": result.signals.match,
    }


def _instrument(meter: metrics.Meter, measure: Measure) -> Any:
    if measure.kind == "counter":
        return meter.create_counter(measure.name, description=measure.words)
    return meter.create_histogram(
        measure.name, unit="s", description=measure.words, explicit_bucket_boundaries_advisory=SECONDS
    )


def sends_nothing() -> bool:
    """Whether this process has no OpenTelemetry SDK set up, so that spans go nowhere."""
    return isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider)
