"""Ranges of a recipe's values: the first that is out of its own is an `OptionsError` that says which, and what it may be."""

from __future__ import annotations

import math
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


def check_ranges(of: Any, **ranges: str) -> None:
    """Each named field of the dataclass `of` is to lie in its range: `check_ranges(self, steps="1 or more")`."""
    for name, expected in ranges.items():
        value = getattr(of, name)
        if not (math.isfinite(value) and _RANGES[expected](value)):
            raise OptionsError(explain(name, expected=expected, got=value, fix="Fix the recipe."))
