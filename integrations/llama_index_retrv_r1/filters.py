"""LlamaIndex's metadata filters in the words of our own stores."""

from __future__ import annotations

from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.store import Condition, Equals, Filter, OneOf, Range

_BOUNDS = {FilterOperator.GT: "gt", FilterOperator.GTE: "gte", FilterOperator.LT: "lt", FilterOperator.LTE: "lte"}
_OPPOSITE = {FilterOperator.NE: FilterOperator.EQ, FilterOperator.NIN: FilterOperator.IN}


def to_filter(filters: MetadataFilters | Filter | None) -> Filter | None:
    """Raises `InputError` for operators and nestings that our stores do not have."""
    if filters is None or isinstance(filters, Filter):
        return filters
    must: list[Condition] = []
    must_not: list[Condition] = []
    for one in filters.filters:
        if not isinstance(one, MetadataFilter):
            raise _unknown("nested filters", "Flatten them.")
        negated = one.operator in _OPPOSITE
        (must_not if negated else must).append(
            _condition(one.key, _OPPOSITE.get(one.operator, one.operator), one.value)
        )
    match filters.condition:
        case FilterCondition.AND | None:
            return Filter(must=tuple(must), must_not=tuple(must_not))
        case FilterCondition.OR if not must_not:
            return Filter(should=tuple(must))
        case FilterCondition.NOT if not must_not:
            return Filter(must_not=tuple(must))
    raise _unknown(f"!= or nin under {filters.condition.value}", "Combine them with and.")


def _condition(key: str, operator: FilterOperator, value: Any) -> Condition:
    if operator in _BOUNDS:
        return Range(key, **{_BOUNDS[operator]: value})
    match operator:
        case FilterOperator.EQ | FilterOperator.CONTAINS if isinstance(value, float):
            return Range(key, gte=value, lte=value)
        case FilterOperator.EQ | FilterOperator.CONTAINS if isinstance(value, str | int):
            return Equals(key, value)
        case FilterOperator.IN | FilterOperator.ANY if isinstance(value, list):
            return OneOf(key, tuple(value))
    raise _unknown(f"{operator.value} with {value!r}", "Use ==, !=, in, nin, contains, >, >=, < or <=.")


def _unknown(got: str, fix: str) -> InputError:
    return InputError(explain("filters", expected="what our stores can filter by", got=got, fix=fix))
