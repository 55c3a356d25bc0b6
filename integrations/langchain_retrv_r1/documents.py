"""LangChain's documents to candidates, and ranked results back to LangChain's documents."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document

from retrv_r1_retriever import Candidate, InputError, OptionsError, PayloadSchema, RankedResults
from retrv_r1_retriever import Document as CoreDocument
from retrv_r1_retriever.errors import SchemaError, explain
from retrv_r1_retriever.plain import RECORD, artifact, marks
from retrv_r1_retriever.ranking import NOTHING, with_unreadable
from retrv_r1_retriever.schema import lookup

log = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Found:
    """originals: every document found, by first-stage rank; unread: those with nothing to read"""

    candidates: tuple[Candidate, ...]
    originals: Mapping[int, Document]
    unread: tuple[Candidate, ...] = ()


def to_candidates(found: Iterable[tuple[Document, float | None]], mapping: PayloadSchema) -> Found:
    """Candidates in the order given. `SchemaError` if there is nothing to read in any document."""
    candidates, unread, originals, problems = [], [], {}, []
    for rank, (document, score) in enumerate(found, 1):
        if not isinstance(document, Document):
            fix = "Wrap it: Document(page_content=...)."
            raise InputError(explain("documents", expected="LangChain Documents", got=type(document).__name__, fix=fix))
        originals[rank] = document
        score = _earlier_score(document) if score is None else score
        try:
            candidates.append(_to_candidate(document, score, rank, mapping))
        except SchemaError as error:
            problems.append(error)
            unread.append(Candidate(CoreDocument(_id(document, rank, mapping), NOTHING), score, rank))
    if problems and not candidates:
        raise problems[0]
    if problems:
        log.warning("%d of %d documents cannot be read, for example: %s", len(problems), len(originals), problems[0])
    _warn_of_missing_pictures(originals.values(), mapping)
    return Found(tuple(candidates), originals, tuple(unread))


def to_documents(
    results: RankedResults, found: Found | None, mapping: PayloadSchema, top_n: int | None = None
) -> RankedDocuments:
    """Copies of the originals (None: documents made from ours), marked, in the new order. The originals stay as they are."""
    results = with_unreadable(results, found.unread if found else (), top_n)
    documents = []
    for result in results:
        document = _from_own(result.document, mapping) if found is None else found.originals[result.candidate.rank]
        metadata = {**document.metadata, **marks(results, result, document.metadata)}
        documents.append(document.model_copy(update={"metadata": metadata}))
    return RankedDocuments.of(documents, results)


def _to_candidate(document: Document, score: float | None, rank: int, mapping: PayloadSchema) -> Candidate:
    id = _id(document, rank, mapping)
    return Candidate(CoreDocument(id, mapping.content(id, _payload(document))), score, rank)


def _id(document: Document, rank: int, mapping: PayloadSchema) -> str:
    id = lookup(_payload(document), mapping.id) if mapping.id else document.id or document.metadata.get("_id")
    return f"#{rank}" if id is None else str(id)  # `_id` is langchain-qdrant's; identity goes by rank, ids are names


def _earlier_score(document: Document) -> float | None:
    """The first stage's, where one of our own lists is reranked once more."""
    record = document.metadata.get(RECORD)
    return record.get("retrieval_score") if isinstance(record, Mapping) else None


def _payload(document: Document) -> dict[str, Any]:
    return {"id": document.id, "page_content": document.page_content, "metadata": document.metadata}


def _warn_of_missing_pictures(documents: Iterable[Document], mapping: PayloadSchema) -> None:
    metadata = [{"metadata": document.metadata} for document in documents]
    for field in mapping.image_fields:
        if field != "page_content" and metadata and all(lookup(one, field) is None for one in metadata):
            keys = ", ".join(sorted({str(key) for one in metadata for key in one["metadata"]})) or "(none)"
            log.warning(
                "None of %d documents has a picture at %r; their metadata keys: %s.", len(metadata), field, keys
            )


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
