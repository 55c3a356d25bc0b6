"""From the wire to the core's values: queries, documents, options and filters, checked against the server's limits."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.images import is_data_uri
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.serving import schema
from retrv_r1_retriever.serving.settings import ServeConfig
from retrv_r1_retriever.store import Condition, Equals, Filter, OneOf, Range
from retrv_r1_retriever.types import MAX_CANDIDATES, Candidate, Content, Document, ImageInput, Query

ID_PREFIX = "#"  # of the ids that documents sent along get: `#3` is documents[3]
RemoteDocument = str | schema.Parts | schema.DocumentIn
#: Where the caller named a picture, and how -> what an image source reads.
ToImage = Callable[[str, str], ImageInput]


@dataclass(frozen=True, slots=True)
class Asked:
    """What `documents` came to, by index: sent along, named by their id in the collection, without any content."""

    inline: Mapping[int, Document] = field(default_factory=dict)
    stored: Mapping[int, str] = field(default_factory=dict)
    blank: tuple[int, ...] = ()

    def candidates(self, found: Sequence[Candidate]) -> list[Candidate]:
        """In input order; `rank - 1` is the index. Raises `InputError` for an id that is not among `found`."""
        by_id = {c.document.id: c for c in found}
        missing = [id for id in self.stored.values() if id not in by_id]
        if missing:
            shown = ", ".join(map(repr, missing[:5]))
            got = f"{len(missing)} that are not in it ({shown}{', ...' if len(missing) > 5 else ''})"
            fix = "Index them first, or send their content."
            raise InputError(explain("documents", expected="ids of the collection", got=got, fix=fix))
        made = {i: Candidate(document, None, i + 1) for i, document in self.inline.items()}
        for i, id in self.stored.items():
            made[i] = Candidate(by_id[id].document, None, i + 1, by_id[id].memory)
        return [made[i] for i in sorted(made)]


def to_image(name: str, image: str) -> str:
    """A data URI or URL as it is, base64 as a data URI. Never a path: what lies on the server's disk is not the caller's to name."""
    if is_data_uri(image) or image[:8].lower().startswith(("http://", "https://")):
        return image
    try:
        base64.b64decode(image, validate=True)
    except (ValueError, binascii.Error):
        fix = "Send the picture's bytes in base64."
        raise InputError(
            explain(f"{name}: image", expected="base64, a data URI or a URL", got=repr(image[:40]), fix=fix)
        ) from None
    return f"data:;base64,{image}"


def check_model(name: str | None, config: ServeConfig) -> None:
    if name not in (None, config.model_name):
        fix = "Use that name, or leave it out."
        raise OptionsError(explain("model", expected=repr(config.model_name), got=repr(name), fix=fix))


def to_query(query: str | schema.Parts | schema.QueryIn, config: ServeConfig, to_image: ToImage = to_image) -> Query:
    content = to_content("query", query, config, to_image)
    if content is None:
        raise InputError(explain("query", expected="a text or a picture", got="neither", fix="Pass one or both."))
    instruction = query.instruction if isinstance(query, schema.QueryIn) else None
    _check_text("query.instruction", instruction, config)
    return Query(content, instruction)


def to_documents(documents: Sequence[RemoteDocument], config: ServeConfig, to_image: ToImage = to_image) -> Asked:
    if len(documents) > config.max_documents:
        fix = "Send the best of a first stage."
        raise InputError(explain("documents", expected=f"at most {config.max_documents}", got=len(documents), fix=fix))
    inline, stored, blank = {}, {}, []
    for i, document in enumerate(documents):
        id = document.id if isinstance(document, schema.DocumentIn) else None
        content = to_content(f"documents[{i}]", document, config, to_image)
        if id is not None and content is not None:
            fix = "An id alone names a document of the collection."
            raise InputError(explain(f"documents[{i}]", expected="id, or text and image", got="both", fix=fix))
        if id is not None:
            stored[i] = id
        elif content is None:
            blank.append(i)
        else:
            inline[i] = Document(f"{ID_PREFIX}{i}", content)
    return Asked(inline, stored, tuple(blank))


def to_content(
    name: str,
    value: str | schema.Parts | schema.QueryIn | schema.DocumentIn,
    config: ServeConfig,
    to_image: ToImage = to_image,
) -> Content | None:
    """None where there is neither a text nor a picture."""
    text, image = _text_and_image(name, value)
    _check_text(name, text, config)
    if not (text and text.strip()):
        text = None
    return None if text is None and not image else Content(text, to_image(name, image) if image else None)


def to_options(request: schema.Request, defaults: RerankOptions, config: ServeConfig) -> RerankOptions:
    """The server's options with what the request says, uncut, with a timeout; a model failure is an answer, not an error."""
    options = defaults.with_options(on_failure="fallback", top_n=None, **request.options)
    if isinstance(request, schema.SearchRequest) and request.top_k is not None:
        options = options.with_options(top_k=request.top_k)
    limit = config.max_timeout_s
    if "timeout_s" in request.options and request.options["timeout_s"] > limit:
        got = request.options["timeout_s"]
        raise OptionsError(explain("timeout_s", expected=f"at most {limit:g}", got=got, fix="Ask for less."))
    return options.with_options(timeout_s=min(options.timeout_s or limit, limit))


def with_room(options: RerankOptions, inline: int) -> RerankOptions:
    """Documents sent along have no memory yet; they must not use up what is allowed for stale ones."""
    if not inline:
        return options
    allowed = options.max_recompute if options.on_stale == "recompute" else 0
    return options.with_options(on_stale="recompute", max_recompute=min(inline + allowed, MAX_CANDIDATES))


def to_filter(asked: schema.FilterIn | None) -> Filter | None:
    if asked is None:
        return None
    kinds = (asked.must, asked.should, asked.must_not)
    return Filter(*(tuple(_condition(condition) for condition in kind) for kind in kinds))


def unknown_fields(request: schema.Request) -> list[str]:
    return [
        f"{ascii(name)[:80]} is not known here and was not applied" for name in list(request.model_extra or ())[:20]
    ]


def _text_and_image(
    name: str, value: str | schema.Parts | schema.QueryIn | schema.DocumentIn
) -> tuple[str | None, str | None]:
    if isinstance(value, str):
        return value, None
    if not isinstance(value, schema.Parts):
        return value.text, value.image
    texts = [part.text for part in value.content if isinstance(part, schema.TextPart)]
    images = [part.image_url.url for part in value.content if isinstance(part, schema.ImagePart)]
    if len(images) > 1:
        fix = "Send each picture as a document of its own."
        raise InputError(explain(name, expected="one picture at most", got=len(images), fix=fix))
    return "\n".join(texts) or None, images[0] if images else None


def _check_text(name: str, text: str | None, config: ServeConfig) -> None:
    if text is not None and len(text) > config.max_text_chars:
        fix = "Send the part that matters."
        raise InputError(
            explain(name, expected=f"at most {config.max_text_chars:,} characters", got=len(text), fix=fix)
        )


def _condition(asked: schema.Condition) -> Condition:
    bounds = {name: getattr(asked, name) for name in ("gt", "gte", "lt", "lte") if getattr(asked, name) is not None}
    given = [name for name in ("equals", "one_of") if getattr(asked, name) is not None] + (
        ["a range"] if bounds else []
    )
    if len(given) != 1:
        fix = "Use several conditions."
        got = " and ".join(given) or "none of them"
        raise InputError(explain(f"filter on {asked.field!r}", expected="equals, one_of or a range", got=got, fix=fix))
    if asked.equals is not None:
        return Equals(asked.field, asked.equals)
    return OneOf(asked.field, tuple(asked.one_of)) if asked.one_of is not None else Range(asked.field, **bounds)
