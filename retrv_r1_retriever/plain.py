"""Results as plain JSON values: for programs, and for frameworks that carry them beside their own objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from retrv_r1_retriever.images import is_data_uri
from retrv_r1_retriever.trace import ReasoningTrace, finite
from retrv_r1_retriever.types import Content, Query, RankedResult, RankedResults

#: Metadata key under which the frameworks' adapters keep everything that was decided about a document.
RECORD = "retrv_r1"


def marks(results: RankedResults, result: RankedResult, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter adds to a document's metadata. `status` and `reason` of the document's own are not overwritten."""
    ours = RECORD in metadata  # from an earlier reranking: that one's words must not pass for this one's
    state = {"status": results.status.value, "reason": results.reason}
    record = {
        **state,
        "none_chosen": results.none_chosen,
        "judged": bool(results.trace) and result.document.id not in results.unranked,
        **decision_json(result),
    }
    return {
        "relevance_score": result.score,
        "retrieval_score": result.retrieval_score,
        **{key: value for key, value in state.items() if ours or key not in metadata},
        RECORD: finite(record),
    }


def artifact(results: RankedResults) -> dict[str, Any]:
    """`results_json` with the whole trace, as `ReasoningTrace.from_json` reads it; nothing in it is not JSON.

    Values of a document's metadata that JSON does not have, dates say, are there as strings.
    """
    trace = None if results.trace is None else json.loads(results.trace.to_json())
    plain: dict[str, Any] = json.loads(json.dumps(finite({**results_json(results), "trace": trace}), default=str))
    return plain


def results_json(results: RankedResults) -> dict[str, Any]:
    """Plain values for programs; pictures that are not references are left out."""
    return {
        "query": _query_json(results.query),
        "status": results.status.value,
        "reason": results.reason,
        "none_chosen": results.none_chosen,
        "unranked": list(results.unranked),
        "results": [
            {**decision_json(r), **_content_json(r.document.content), "metadata": dict(r.document.metadata)}
            for r in results.results
        ],
        "trace": None if results.trace is None else _trace_json(results.trace),
    }


def _query_json(query: Query) -> dict[str, Any]:
    return {"id": query.id, "instruction": query.instruction, **_content_json(query.content)}


def _content_json(content: Content) -> dict[str, Any]:
    reference = content.image if isinstance(content.image, str) and not is_data_uri(content.image) else None
    return {"text": content.text, "image": reference}


def decision_json(result: RankedResult) -> dict[str, Any]:
    """What was decided about one candidate, without its content."""
    signals = result.signals
    return {
        "rank": result.rank,
        "id": result.document.id,
        "score": result.score,
        "retrieval_score": result.retrieval_score,
        "retrieval_rank": result.candidate.rank,
        "selected": result.selected,
        "opened": signals.opened,
        "match": signals.match,
        "verdict": signals.verdict,
        "keep_logprob": signals.keep_logprob,
        "slot_logprob": signals.slot_logprob,
    }


def _trace_json(trace: ReasoningTrace) -> dict[str, Any]:
    usage = trace.usage
    return {
        "thought": trace.thought,
        "candidates": list(trace.candidates),
        "inspected": list(trace.inspected),
        "answer": trace.answer,
        "stop_reason": trace.stop_reason.value if trace.stop_reason else None,
        "cached": trace.cached,
        "usage": {name: getattr(usage, name) for name in usage.__dataclass_fields__},
        "timings": dict(trace.timings),
        "versions": dict(trace.versions),
        "notes": list(trace.notes),
    }
