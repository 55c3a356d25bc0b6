from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retrv_r1_retriever.errors import InputError, OptionsError, SchemaError
from retrv_r1_retriever.schema import OWN_SCHEMA, PayloadSchema, found_fields, lookup
from retrv_r1_retriever.types import Content, Document

SHOE = {
    "title": "Shoe",
    "attrs": {"color": "red", "sizes": [41, 42], "sale": True, "brand": {"name": "Acme"}},
    "price": 9.5,
    "image": "1.png",
    "note": None,
    "empty": "",
}


def text_of(template: str, payload: dict[str, Any]) -> str | None:
    return PayloadSchema(text=template, image="image").to_document(1, payload).content.text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("title", "Shoe"),
        ("attrs.color", "red"),
        ("attrs.sizes", "41, 42"),
        ("{title} - {attrs.color}", "Shoe - red"),
        ("{title} - {attrs.nope}", "Shoe"),
        ("{nope} - {attrs.color}", "red"),
        ("{title} - {nope} - {attrs.color}", "Shoe - red"),
        ("{title} ({attrs.brand.name}), {price}", "Shoe (Acme), 9.5"),
        ("{title} ({nope}), {price}", "Shoe, 9.5"),
        ("{title} ({nope})", "Shoe"),
        ("Title: {title}. Color: {nope}", "Title: Shoe"),
        ("Title: {nope}. Color: {attrs.color}.", "Color: red."),
        ("{attrs.sale} {attrs} {note}{empty}", "yes"),
        ("{title}{title}", "ShoeShoe"),
        ("{nope}", None),
    ],
)
def test_text(template: str, expected: str | None) -> None:
    assert text_of(template, SHOE) == expected


def test_document() -> None:
    schema = PayloadSchema(text="{title} {attrs.color}", image="image", id="sku.code")
    payload = {**SHOE, "sku": {"code": 17, "ean": 4}, "_retrv": {"x": 1}}
    document = schema.to_document("point", payload)
    assert document.id == "17"
    assert document.content == Content("Shoe red", "1.png")
    assert document.metadata == {k: v for k, v in SHOE.items() if k != "image"} | {"sku": {"ean": 4}}
    assert payload["sku"] == {"code": 17, "ean": 4}  # the payload is left as it was
    assert PayloadSchema(text="title").to_document(99, SHOE).id == "99"
    assert "title" not in PayloadSchema(text="title").to_document(99, SHOE).metadata


@pytest.mark.parametrize(
    ("schema", "payload", "message"),
    [
        (
            PayloadSchema(text="body"),
            SHOE,
            "expected text and/or image in body, got neither .* it has the fields attrs.brand",
        ),
        (PayloadSchema(image="pic"), {}, r"it has the fields \(none\)"),
        (PayloadSchema(text="title", image="price"), SHOE, "an image field of type float"),
        (PayloadSchema(text="title", id="sku"), SHOE, "got no id"),
    ],
)
def test_unusable_payloads(schema: PayloadSchema, payload: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        schema.to_document("p1", payload)


@pytest.mark.parametrize(
    "text",
    [
        "{title.__class__}",
        "{a[0]}",
        "{a!r}",
        "{a:>10}",
        "{}",
        "{a b}",
        "{a..b}",
        "{a} }",
        "{a",
        "{{a}}",
        "a b",
        "",
        "{.a}",
    ],
)
def test_templates_are_not_format_strings(text: str) -> None:
    if text == "{title.__class__}":  # a field name like any other: looked up as a key, never as an attribute
        assert PayloadSchema(text=text, image="image").to_document(1, SHOE).content.text is None
        return
    with pytest.raises(OptionsError, match="PayloadSchema"):
        PayloadSchema(text=text)


def test_something_must_be_mapped() -> None:
    with pytest.raises(OptionsError, match="expected text=, image= or both, got neither"):
        PayloadSchema(id="sku")


names = st.text("abc", min_size=1, max_size=3)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(names, json, max_size=4), st.text(min_size=1).filter(str.strip), st.none() | st.just("p/1.png"))
def test_there_and_back(metadata: dict[str, Any], text: str, image: str | None) -> None:
    document = Document("id-1", Content(text, image), metadata)
    for schema in (OWN_SCHEMA, PayloadSchema(text="x.page", image="x.image", id="doc.id")):
        assert schema.to_document("point", schema.to_payload(document)) == document


@given(st.dictionaries(names, json, max_size=4), names, names)
def test_a_template_never_fails_on_odd_payloads(payload: dict[str, Any], a: str, b: str) -> None:
    schema = PayloadSchema(text=f"{{{a}.{b}}} / {{{b}}}", image="picture")
    schema.to_document(1, {**payload, "picture": "x.png"})
    assert all(isinstance(name, str) for name in found_fields([payload]))


def test_the_way_back_refuses_what_would_be_lost() -> None:
    schema = PayloadSchema(text="page", id="id")
    with pytest.raises(InputError, match="metadata of document '1': expected no field 'page', got one"):
        schema.to_payload(Document("1", Content("t"), {"page": 3}))
    for template in (PayloadSchema(text="{a} {b}"), PayloadSchema(text="a", image="data:;base64,{b}")):
        with pytest.raises(SchemaError, match="can only be read"):
            template.to_payload(Document("1", Content("t")))


def test_a_picture_may_be_a_template_over_fields_that_are_all_there() -> None:
    schema = PayloadSchema(text="title", image="{cdn}/{pic.key}.png")
    assert schema.fields == ("title", "cdn", "pic.key")
    payload = {"title": "a", "cdn": "https://a.example", "pic": {"key": 7}}
    assert schema.to_document(1, payload).content == Content("a", "https://a.example/7.png")
    assert schema.to_document(1, {**payload, "pic": None}).content == Content("a")
    with pytest.raises(OptionsError, match="PayloadSchema template: expected fields in single braces"):
        PayloadSchema(image="data:;base64,{thumb")


def test_lookup_prefers_a_key_that_holds_the_dots() -> None:
    assert lookup({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert lookup({"a": {"b": 2}}, "a.b") == 2
    assert lookup({"a": {"b.c": 3}}, "a.b.c") == 3
    assert lookup({"a": [1]}, "a.b") is None


def test_content_alone_takes_pictures_as_documents_in_memory_hold_them() -> None:
    schema = PayloadSchema(text="title", image="image")
    for image in ("1.png", b"bytes", Path("1.png"), Image.new("RGB", (1, 1))):
        assert schema.content(1, {"title": "Shoe", "image": image, "rest": object()}) == Content("Shoe", image)
    with pytest.raises(
        SchemaError, match=r"payload of point 7: expected text and/or image .* got an image field of type int"
    ):
        schema.content(7, {"image": 3})
