"""Nodes and query bundles to our values, ranked results back to nodes."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel, PrivateAttr
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    MediaResource,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.vector_stores.types import MetadataFilters

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.images import ImageSource, data_uri_bytes, image_reference, is_data_uri
from retrv_r1_retriever.options import RerankOptions, as_options
from retrv_r1_retriever.plain import marks
from retrv_r1_retriever.ranking import NOTHING, with_unreadable
from retrv_r1_retriever.store import Filter
from retrv_r1_retriever.types import Candidate, Content, Document, ImageInput, Query, RankedResult, RankedResults

log = logging.getLogger(__name__)


@dataclass
class RerankQuery(QueryBundle):
    """A query bundle with what only we understand; it goes wherever LlamaIndex takes a bundle, query engines included.

    image: bytes, a Pillow image, a data URI or a path, instead of `image_path`
    instruction: the task in words, see `Query`
    filters: for a vector store or our own store; a wrapped retriever has its own
    options: for this call, in place of the retriever's or postprocessor's
    """

    image: ImageInput | None = field(default=None, repr=False)
    instruction: str | None = None
    filters: MetadataFilters | Filter | None = None
    options: RerankOptions | None = None


class RankedNode(NodeWithScore):
    """Our score around the caller's own node object, which is left as it was.

    score: falls with rank, comparable within one list only; None on fallback, 0 for a node that cannot be read
    retrieval_score: the first stage's; status, reason: of the whole list, see docs/concepts.md
    """

    rank: int
    retrieval_score: float | None = None
    status: str
    reason: str | None = None
    selected: bool = False
    _results: RankedResults = PrivateAttr()
    _result: RankedResult = PrivateAttr()

    @property
    def results(self) -> RankedResults:
        """The list this node is from, with the trace and every candidate's signals."""
        return self._results

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As pydantic does: LlamaIndex's own way leaves out what is private."""
        BaseModel.__setstate__(self, state)

    @property
    def metadata(self) -> dict[str, Any]:
        """The node's own, and how it got here. The node's own dictionary, which prompts are made of, stays without."""
        return {**self.node.metadata, **marks(self._results, self._result, self.node.metadata)}

    @classmethod
    def class_name(cls) -> str:
        return "RankedNode"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCandidate(Candidate):
    """A candidate that remembers the node it was made of."""

    item: NodeWithScore = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Found:
    """unread: nodes with neither text nor picture; they keep their place in the ranks"""

    candidates: tuple[NodeCandidate, ...]
    unread: tuple[NodeCandidate, ...] = ()


def to_query(bundle: QueryBundle | None, instruction: str | None = None) -> Query:
    """instruction: where the bundle brings none. Raises `InputError` where there is neither text nor picture."""
    if not isinstance(bundle, QueryBundle):
        fix = "Pass query_str= or query_bundle=."
        raise InputError(explain("query", expected="a QueryBundle", got=type(bundle).__name__, fix=fix))
    image: ImageInput | None = bundle.image_path
    if isinstance(bundle, RerankQuery) and bundle.image is not None:
        if image is not None:
            raise InputError(explain("query", expected="image or image_path", got="both", fix="Pass one picture."))
        image = bundle.image
    text: str | None = bundle.query_str
    blank = isinstance(text, str) and not text.strip()
    own = bundle.instruction if isinstance(bundle, RerankQuery) else None
    return Query.of(None if blank else text, image, own or instruction)


def options_of(bundle: QueryBundle | None, default: RerankOptions) -> RerankOptions:
    return as_options(bundle.options if isinstance(bundle, RerankQuery) else None, default)


def find_readable(nodes: Sequence[NodeWithScore], mode: MetadataMode) -> Found:
    """Candidates in the order given, ranked by it."""
    candidates: list[NodeCandidate] = []
    unread: list[NodeCandidate] = []
    for rank, item in enumerate(nodes, 1):
        if not isinstance(item, NodeWithScore):
            fix = "Wrap it: NodeWithScore(node=node)."
            raise InputError(explain("nodes", expected="NodeWithScore", got=type(item).__name__, fix=fix))
        content = to_content(item.node, mode)
        document = Document(item.node.node_id, content or NOTHING, item.node.metadata)
        candidate = NodeCandidate(document=document, retrieval_score=_first_score(item), rank=rank, item=item)
        (candidates if content else unread).append(candidate)
    return Found(tuple(candidates), tuple(unread))


def to_content(node: BaseNode, mode: MetadataMode) -> Content | None:
    """The node's text, with the metadata that `mode` lets through, and its picture. None without either."""
    text, image = node.get_content(metadata_mode=mode), _image(node)
    return Content(text if text.strip() else None, image) if text.strip() or image else None


def to_node(document: Document, images: ImageSource) -> TextNode:
    """A document of our own store as a node; a relative picture path is completed, since LlamaIndex knows no root."""
    text, image = document.content.text or "", document.content.image
    common: dict[str, Any] = {"id_": document.id, "text": text, "metadata": dict(document.metadata)}
    if image is None:
        return TextNode(**common)
    reference = image_reference(image)
    if is_data_uri(reference):
        encoded = base64.b64encode(data_uri_bytes(reference)).decode("ascii")
        mimetype = reference[5:].partition(",")[0].partition(";")[0] or None
        return ImageNode(**common, image=encoded, image_mimetype=mimetype)
    if "://" in reference:
        return ImageNode(**common, image_url=reference)
    root = getattr(images, "root", None)
    return ImageNode(**common, image_path=reference if root is None else str(root / reference))


def to_nodes(
    results: RankedResults, unread: Sequence[NodeCandidate] = (), top_n: int | None = None
) -> list[NodeWithScore]:
    """The caller's own nodes in our order; those with nothing to read last, or in their place where nobody ranked anything."""
    results = with_unreadable(results, unread, top_n)
    return [
        _ranked_node(results, result, result.candidate.item)
        for result in results
        if isinstance(result.candidate, NodeCandidate)
    ]


def _ranked_node(results: RankedResults, result: RankedResult, item: NodeWithScore) -> RankedNode:
    node = RankedNode(
        node=item.node, score=result.score, rank=result.rank, retrieval_score=result.retrieval_score,
        status=results.status.value, reason=results.reason, selected=result.selected,
    )  # fmt: skip
    node._results, node._result = results, result
    return node


def _first_score(item: NodeWithScore) -> float | None:
    """The first stage's, also where one of our own lists is reranked once more."""
    return item.retrieval_score if isinstance(item, RankedNode) else item.score


def _image(node: BaseNode) -> ImageInput | None:
    if isinstance(node, ImageNode):
        data, path, url = node.image, node.image_path, node.image_url
        return _reference(data, path, url, node.image_mimetype)
    resource = getattr(node, "image_resource", None)
    if not isinstance(resource, MediaResource):
        return None
    data = resource.data.decode("ascii") if resource.data else None  # base64, whatever it was made with
    found = _reference(data, resource.path, resource.url, resource.mimetype)
    if found is None:
        log.warning(
            "node %s: its picture is empty. LlamaIndex does not store MediaResource.data; give it a path or url, or use "
            "ImageNode(image=...).",
            node.node_id,
        )
    return found


def _reference(data: str | None, path: object, url: object, mimetype: str | None) -> str | None:
    """Bytes stay encoded in a data URI: they are decoded where it does not hold up the event loop."""
    if data:
        return data if is_data_uri(data) else f"data:{mimetype or 'application/octet-stream'};base64,{data}"
    return str(path) if path else str(url) if url else None
