"""LangChain's documents to candidates, and ranked results back to LangChain's documents."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.documents import Document

from retrv_r1_retriever import Candidate, InputError, OptionsError, PayloadSchema, RankedResult, RankedResults
from retrv_r1_retriever import Document as CoreDocument
from retrv_r1_retriever.errors import SchemaError, explain
from retrv_r1_retriever.plain import artifact, decision_json, finite
from retrv_r1_retriever.schema import lookup

log = logging.getLogger(__name__)

#: Metadata key with everything that was decided about a document.
RECORD = "retrv_r1"
#: How LangChain's documents are read unless told otherwise: the text alone.
TEXT_ONLY = PayloadSchema(text="page_content")
#: How this package's own documents become LangChain's unless told otherwise.
OWN = PayloadSchema(text="page_content", image="metadata.image")


class RankedDocuments(list[Document]):
    """The documents, best first, as chains expect them; and beside them the ranked results they were made from."""

    results: RankedResults

    @classmethod
    def of(cls, documents: Iterable[Document], results: RankedResults) -> RankedDocuments:
        ranked = cls(documents)
        ranked.results = results
        return ranked

    @property
    def artifact(self) -> dict[str, Any]:
        """Status, decisions and the whole trace as plain JSON values."""
        return artifact(self.results)


def to_candidates(
    found: Iterable[tuple[Document, float | None]], mapping: PayloadSchema
) -> tuple[list[Candidate], dict[int, Document]]:
    """Candidates in the order given, and the documents they stand for by rank.

    A document with nothing to read is left out with a warning; `SchemaError` if that is all of them.
    """
    candidates, originals, problems, count = [], {}, [], 0
    for count, (document, score) in enumerate(found, 1):
        try:
            candidates.append(_to_candidate(document, score, count, mapping))
            originals[count] = document
        except SchemaError as error:
            problems.append(error)
    if problems and not candidates:
        raise problems[0]
    if problems:
        log.warning("%d of %d documents were left out, for example: %s", len(problems), count, problems[0])
    _warn_of_missing_pictures(originals.values(), mapping)
    return candidates, originals


def to_documents(
    results: RankedResults, originals: Mapping[int, Document] | None, mapping: PayloadSchema
) -> RankedDocuments:
    """Copies of the originals (None: documents made from ours), marked, in the new order. The originals stay as they are."""
    documents = []
    for result in results:
        document = _from_own(result.document, mapping) if originals is None else originals[result.candidate.rank]
        metadata = {**document.metadata, **_marks(results, result, document.metadata)}
        documents.append(document.model_copy(update={"metadata": metadata}))
    return RankedDocuments.of(documents, results)


def _to_candidate(document: Document, score: float | None, rank: int, mapping: PayloadSchema) -> Candidate:
    payload = {"id": document.id, "page_content": document.page_content, "metadata": document.metadata}
    id = lookup(payload, mapping.id) if mapping.id else document.id or document.metadata.get("_id")
    id = f"#{rank}" if id is None else str(id)  # `_id` is langchain-qdrant's; identity goes by rank, ids are names
    return Candidate(CoreDocument(id, mapping.content(id, payload)), score, rank)


def _warn_of_missing_pictures(documents: Iterable[Document], mapping: PayloadSchema) -> None:
    field = mapping.image
    if field is None or field == "page_content":
        return
    metadata = [{"metadata": document.metadata} for document in documents]
    if metadata and all(lookup(one, field) is None for one in metadata):
        keys = ", ".join(sorted({str(key) for one in metadata for key in one["metadata"]})) or "(none)"
        log.warning("None of %d documents has a picture at %r; their metadata keys: %s.", len(metadata), field, keys)


def _from_own(document: CoreDocument, mapping: PayloadSchema) -> Document:
    metadata = copy.deepcopy(dict(document.metadata))
    if document.content.image is not None:
        _put_picture(metadata, document, picture_key(mapping))
    return Document(page_content=document.content.text or "", metadata=metadata, id=document.id)


def _put_picture(metadata: dict[str, Any], document: CoreDocument, key: str) -> None:
    if key in metadata:
        raise InputError(
            explain(
                f"metadata of document {document.id!r}", expected=f"no key {key!r}, its picture goes there", got="one",
                fix="Pass mapping=PayloadSchema(text='page_content', image='metadata.<another key>').",
            )
        )  # fmt: skip
    metadata[key] = document.content.image


def picture_key(mapping: PayloadSchema) -> str:
    """The metadata key our own documents' pictures are written to."""
    first, dot, key = (mapping.image or "").partition(".")
    if first != "metadata" or not dot or "." in key:
        raise OptionsError(
            explain("mapping.image", expected="'metadata.<key>', where pictures of our own documents go",
                    got=repr(mapping.image), fix="E.g. PayloadSchema(text='page_content', image='metadata.image').")
        )  # fmt: skip
    return key


def _marks(results: RankedResults, result: RankedResult, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is added to a document's metadata. `status` and `reason` of the document's own are not overwritten."""
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


def check_mapping(mapping: object) -> PayloadSchema:
    if isinstance(mapping, PayloadSchema):
        for field in mapping.fields:
            if field not in ("page_content", "id") and not field.startswith("metadata."):
                raise OptionsError(
                    explain("mapping", expected="'page_content', 'id' or 'metadata.<key>'", got=repr(field),
                            fix="Name the fields of a LangChain Document.")
                )  # fmt: skip
        return mapping
    fix = "E.g. PayloadSchema(text='page_content', image='metadata.image')."
    raise OptionsError(explain("mapping", expected="PayloadSchema", got=type(mapping).__name__, fix=fix))
