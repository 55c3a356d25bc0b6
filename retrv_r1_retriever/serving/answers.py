"""From ranked results to the wire, and to the few words that a header may carry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from retrv_r1_retriever.images import is_data_uri
from retrv_r1_retriever.plain import decision_json
from retrv_r1_retriever.serving import schema
from retrv_r1_retriever.serving.requests import Asked
from retrv_r1_retriever.trace import Usage, finite
from retrv_r1_retriever.types import Document, RankedResult, RankedResults, Status

_DECISION = ("id", "rank", "retrieval_score", "selected", "opened", "match", "verdict", "keep_logprob", "slot_logprob")
_REASON_CHARS = 200


def to_answer(
    results: RankedResults, request: schema.Request, *, id: str, model: str, asked: Asked, notes: Sequence[str] = ()
) -> schema.Answer:
    """`results` must be uncut; `request.top_n` is applied here, so that `unranked` names those that were cut, too."""
    trace, unjudged = results.trace, set(results.unranked)
    with_documents = bool(getattr(request, "return_documents", False))
    lines = [_result(one, asked, with_documents) for one in results.results]
    lines += [_blank(i, rank, results.status) for rank, i in enumerate(asked.blank, len(lines) + 1)]
    if results.status is Status.FALLBACK:  # the order as it came, blank ones included
        in_order = sorted(lines, key=lambda line: line.index)
        lines = [line.model_copy(update={"rank": rank}) for rank, line in enumerate(in_order, 1)]
    usage = asdict(trace.usage if trace else Usage())
    total = usage["prompt_tokens"] + usage["sampled_tokens"] + usage["inspected_tokens"]
    status, reason = _status(results, asked)
    return schema.Answer(
        id=id,
        model=model,
        status=status,
        reason=reason,
        none_chosen=results.none_chosen,
        unranked=sorted([*(r.candidate.rank - 1 for r in results if r.document.id in unjudged), *asked.blank]),
        results=lines[: request.top_n],
        usage=schema.UsageOut(total_tokens=total, **{k: v for k, v in usage.items() if k in schema.UsageOut.model_fields}),
        timings=dict(trace.timings) if trace else {},
        notes=[*notes, *(trace.notes if trace else ())],
        trace=finite(json.loads(trace.to_json())) if trace and request.return_trace else None,
    )  # fmt: skip


def header_text(text: str) -> str:
    """On one line, in ASCII, short: a reason may quote anything."""
    line = " ".join(text.encode("ascii", "replace").decode().split())
    printable = "".join(c if c.isprintable() else "?" for c in line)
    return printable if len(printable) <= _REASON_CHARS else f"{printable[: _REASON_CHARS - 3]}..."


def _status(results: RankedResults, asked: Asked) -> tuple[Status, str | None]:
    if not asked.blank:
        return results.status, results.reason
    blank = f"{len(asked.blank)} documents have neither a text nor a picture"
    if not results.results:
        return results.status, f"nothing to rank: {blank}"
    status = Status.PARTIAL if results.status is Status.RERANKED else results.status
    return status, "; ".join(filter(None, (results.reason, blank)))


def _result(result: RankedResult, asked: Asked, with_document: bool) -> schema.ResultOut:
    index = result.candidate.rank - 1
    decision: dict[str, Any] = finite({key: decision_json(result)[key] for key in _DECISION})
    if index in asked.inline:
        decision["id"] = None  # one of our making
    return schema.ResultOut(
        index=index,
        relevance_score=result.score,
        document=_document(result.document) if with_document else None,
        **decision,
    )


def _blank(index: int, rank: int, status: Status) -> schema.ResultOut:
    return schema.ResultOut(
        index=index, relevance_score=None if status is Status.FALLBACK else 0.0, id=None, rank=rank, retrieval_score=None,
        selected=False, opened=False, match=None, verdict=None, keep_logprob=None, slot_logprob=None,
    )  # fmt: skip


def _document(document: Document) -> schema.DocumentOut:
    image = document.content.image
    reference = image if isinstance(image, str) and not is_data_uri(image) else None
    return schema.DocumentOut(text=document.content.text, image=reference, metadata=finite(dict(document.metadata)))
