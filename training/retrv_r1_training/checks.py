"""Ranges of values, a recipe's above all: the first that is out of its own is an `OptionsError` that says which, and what it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retrv_r1_retriever.errors import OptionsError, explain

#: Name of a range, as people read it -> whether a number lies in it. NaN and infinity lie in none.
_RANGES = {
    "1 or more": lambda value: value >= 1,
    "2 or more": lambda value: value >= 2,
    "0 or more": lambda value: value >= 0,
    "more than 0": lambda value: value > 0,
    "a share, 0 to 1": lambda value: 0 <= value <= 1,
}


def check_ranges(of: Any, ranges: Mapping[str, str], fix: str = "Fix the recipe.") -> None:
    """The fields of the dataclass `of` are to lie in their ranges: `check_ranges(self, {"1 or more": "steps batch_size"})`."""
    for expected, names in ranges.items():
        for name in names.split():
            value = getattr(of, name)
            if not (math.isfinite(value) and _RANGES[expected](value)):
                raise OptionsError(explain(name, expected=expected, got=value, fix=fix))
