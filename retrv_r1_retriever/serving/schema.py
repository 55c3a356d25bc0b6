"""Requests and answers as they are on the wire; what OpenAPI shows. Nothing here knows how a call is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from typing_extensions import TypedDict

from retrv_r1_retriever.options import OnStale, Ranking, Think
from retrv_r1_retriever.types import MAX_CANDIDATES, Status


def _whole(text: str) -> str:
    """Half a surrogate pair passes JSON, and nothing behind it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected characters, got half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
#: A path into a payload, as Qdrant writes it.
FieldName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\[\])?(\.[A-Za-z0-9_-]+(\[\])?)*$", max_length=200)]
Scalar = StrictBool | Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | Annotated[StrictStr, AfterValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class ImageUrl(Wire):
    """url: `data:image/...;base64,...`, or http(s) from a host that the server allows"""

    url: Text
    detail: str | None = None


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Parts(Wire):
    """As in chat messages: texts are joined, one picture at most."""

    content: list[Part]


class QueryIn(Wire):
    """image: base64, a data URI, or http(s) from a host that the server allows"""

    text: Text | None = None
    image: Text | None = None
    instruction: Text | None = None


class DocumentIn(Wire):
    """text, image or both; or `id` alone: a document of the server's collection, with the memory made when it was indexed."""

    text: Text | None = None
    image: Text | None = None
    id: Text | None = None


class OptionsIn(TypedDict, total=False):
    """`RerankOptions` for this call; what is not named is as the server's config says."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # how pydantic configures a TypedDict

    think: Think
    think_margin: Annotated[float, Field(ge=0)] | None
    ranking: Ranking
    max_inspections: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)]
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)]
    temperature: Annotated[float, Field(ge=0, le=100)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    timeout_s: Annotated[float, Field(ge=0.05)]
    on_stale: OnStale
    max_recompute: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)]


class Request(BaseModel):
    """Fields of other rerank services that are not known here are named in the answer's `notes`, not refused."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    query: Text | Parts | QueryIn
    top_n: Annotated[int, Field(ge=1)] | None = None
    options: OptionsIn = Field(default_factory=OptionsIn)
    return_trace: bool = False


class RerankRequest(Request):
    documents: list[Text | Parts | DocumentIn]
    return_documents: bool = False


class Condition(Wire):
    """`field` equals a value, is one of several, or lies in a range: one of these."""

    field: FieldName
    equals: Scalar | None = None
    one_of: list[Scalar] | None = None
    gt: Number | None = None
    gte: Number | None = None
    lt: Number | None = None
    lte: Number | None = None


class FilterIn(Wire):
    """All of `must`, at least one of `should`, none of `must_not`."""

    must: list[Condition] = []
    should: list[Condition] = []
    must_not: list[Condition] = []


class SearchRequest(Request):
    top_k: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = None
    filter: FilterIn | None = None
    return_documents: bool = True


class DocumentOut(BaseModel):
    """image: a reference, never the picture itself"""

    text: str | None = None
    image: str | None = None
    metadata: dict[str, Any] = {}


class ResultOut(BaseModel):
    """index: place in `documents` as sent (rerank), in the first stage's order (search); from 0. relevance_score: None on fallback."""

    index: int
    relevance_score: float | None
    id: str | None
    rank: int
    retrieval_score: float | None
    selected: bool
    opened: bool
    match: bool | None
    verdict: str | None
    keep_logprob: float | None
    slot_logprob: float | None
    document: DocumentOut | None = None


class UsageOut(BaseModel):
    total_tokens: int = 0
    prompt_tokens: int = 0
    uncompressed_tokens: int = 0
    sampled_tokens: int = 0
    inspected_tokens: int = 0


class Answer(BaseModel):
    """status, reason: who decided this order, see docs/concepts.md. unranked: indices of what the model did not judge."""

    id: str
    model: str
    status: Status
    reason: str | None
    none_chosen: bool
    unranked: list[int]
    results: list[ResultOut]
    usage: UsageOut
    timings: dict[str, float]
    notes: list[str]
    trace: dict[str, Any] | None = None


class ErrorDetail(BaseModel):
    type: str
    message: str


class ErrorOut(BaseModel):
    id: str
    error: ErrorDetail
