"""Our one filter type in the words of Qdrant's two libraries, which differ in nothing but the range class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.schema import RESERVED, lookup
from retrv_r1_retriever.store import Condition, Equals, Filter, OneOf, Range, Scalar
from retrv_r1_retriever.types import Document


@dataclass(frozen=True, slots=True)
class FilterTranslator:
    """sdk: `qdrant_client.models` or `qdrant_edge`; range_type: its class for number ranges

    own: the collection has our layout, in which booleans are matched by name (see `points._bools`)
    """

    sdk: Any
    range_type: Callable[..., Any]
    own: bool

    def __call__(self, asked: Filter | None) -> Any:
        """Their filter, or None where there is nothing to filter by. Raises `InputError`."""
        if asked is None or not (asked.must or asked.should or asked.must_not):
            return None
        return self.sdk.Filter(
            must=[self._condition(c) for c in asked.must] or None,
            should=[self._condition(c) for c in asked.should] or None,
            must_not=[self._condition(c) for c in asked.must_not] or None,
        )

    def _condition(self, condition: Condition) -> Any:
        match condition:
            case Equals(field, value):
                return self._equals(field, value)
            case OneOf(field, values):
                return self._one_of(field, values)
            case Range(field, gt, gte, lt, lte):
                bounds = [bound for bound in (gt, gte, lt, lte) if bound is not None]
                if not bounds or not all(isinstance(b, int | float) and math.isfinite(b) for b in bounds):
                    raise InputError(
                        explain(
                            f"Range({field!r})", expected="at least one number", got=bounds, fix="Pass gte= or lt=."
                        )
                    )
                return self.sdk.FieldCondition(key=field, range=self.range_type(gt=gt, gte=gte, lt=lt, lte=lte))
        raise InputError(
            explain("Filter", expected="Equals, OneOf or Range", got=type(condition).__name__, fix="Use one of these.")
        )

    def _equals(self, field: str, value: Scalar) -> Any:
        check_value(field, value)
        if self.own and isinstance(value, bool):
            field, value = f"{RESERVED}.{'true' if value else 'false'}", field
        return self.sdk.FieldCondition(key=field, match=self.sdk.MatchValue(value=value))

    def _one_of(self, field: str, values: tuple[Scalar, ...]) -> Any:
        if not values:
            raise InputError(
                explain(f"OneOf({field!r})", expected="at least one value", got="none", fix="Leave the condition out.")
            )
        if len({type(value) for value in values}) == 1 and not isinstance(values[0], bool):
            for value in values:
                self._equals(field, value)  # raises where no field can have it
            return self.sdk.FieldCondition(key=field, match=self.sdk.MatchAny(any=list(values)))
        return self.sdk.Filter(should=[self._equals(field, value) for value in values])


def matches(asked: Filter, metadata: Mapping[str, Any]) -> bool:
    """Whether Qdrant would find it: for what was not found, and might have been. Paths into lists (`a[].b`) are not followed."""
    return (
        all(_holds(c, metadata) for c in asked.must)
        and (not asked.should or any(_holds(c, metadata) for c in asked.should))
        and not any(_holds(c, metadata) for c in asked.must_not)
    )


def _holds(condition: Condition, metadata: Mapping[str, Any]) -> bool:
    values = _values(lookup(metadata, condition.field))
    if isinstance(condition, Range):
        bounds = ((condition.gt, gt), (condition.gte, ge), (condition.lt, lt), (condition.lte, le))
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        return any(all(bound is None or within(number, bound) for bound, within in bounds) for number in numbers)
    sought = (condition.value,) if isinstance(condition, Equals) else condition.values
    return any(type(value) is type(one) and value == one for value in values for one in sought)


#: Documents whose values say of what kind a field is, as `index_fields` wants to know.
SAMPLED = 256


def payload_indexes(fields: Sequence[str], documents: Sequence[Document]) -> dict[str, str]:
    """Payload field -> "keyword", "integer" or "float", as Qdrant calls the index that makes filters on it fast.

    Of our own layout, in which booleans are matched by name. Raises `InputError` where the documents do not tell.
    """
    indexes: dict[str, str] = {}
    for field in fields:
        values = [value for document in documents for value in _values(lookup(document.metadata, field))]
        kinds = {_KINDS.get(type(value), "") for value in values}
        if kinds == {"integer", "float"}:
            kinds = {"float"}
        if len(kinds) != 1 or not (kind := kinds.pop()):
            found = ", ".join(sorted({type(value).__name__ for value in values}))
            raise InputError(
                explain(f"index of the field {field!r}", expected="values of one kind: text, whole numbers, numbers or booleans",
                        got=found or f"none in {len(documents)} documents", fix="Name a field of the documents' metadata.")
            )  # fmt: skip
        indexes |= {f"{RESERVED}.{name}": "keyword" for name in ("true", "false")} if kind == "bool" else {field: kind}
    return indexes


_KINDS: dict[type, str] = {str: "keyword", int: "integer", float: "float", bool: "bool"}


def _values(value: object) -> Iterable[object]:
    if value is None:
        return ()
    return value if isinstance(value, list) else (value,)


def check_value(field: str, value: object) -> None:
    """Raises `InputError` for what no payload field can equal."""
    if not isinstance(value, str | int):
        raise InputError(
            explain(f"Equals({field!r})", expected="str, int or bool", got=repr(value), fix="Use Range for floats.")
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(explain(f"Equals({field!r})", expected="a 64-bit integer", got=value, fix="Store it as text."))
