from __future__ import annotations

import math
from typing import Any

import pytest

from retrv_r1_retriever.errors import OptionsError, RetrvR1Error
from retrv_r1_retriever.options import BALANCED, FAST, THOROUGH, RerankOptions, as_options, check_reach


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0), ("top_k", 128), ("top_k", True), ("top_k", 5.0), ("top_n", 0), ("think", "maybe"), ("ranking", ""),
        ("max_inspections", -1), ("max_new_tokens", 0), ("max_recompute", -1), ("timeout_s", 0), ("timeout_s", math.nan),
        ("max_think_share", 1.1), ("max_think_share", math.nan), ("temperature", -1), ("temperature", math.nan),
        ("think_margin", -0.1), ("think_margin", math.nan), ("on_failure", None), ("on_stale", "ignore"),
        ("timeout_s", "30"), ("temperature", "hot"), ("temperature", math.inf), ("think_margin", []), ("seed", "x"), ("seed", -1),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=f"{name}: expected .*, got "):
        RerankOptions(**{name: value})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(OptionsError, match=r"top_k.*got 'top_m'"):
        BALANCED.with_options(top_m=3)


def test_with_options_leaves_the_original() -> None:
    assert BALANCED.with_options(top_n=3).top_n == 3
    assert BALANCED.top_n is None


def test_errors_are_the_builtin_ones_too() -> None:
    assert issubclass(OptionsError, ValueError)
    assert issubclass(OptionsError, RetrvR1Error)


def test_presets_differ_in_effort() -> None:
    assert (FAST.think, FAST.ranking, THOROUGH.think) == ("never", "logits", "always")


def test_a_call_takes_options_whole_or_the_default() -> None:
    assert as_options(None, FAST) is FAST
    assert as_options(THOROUGH, FAST) is THOROUGH
    for given, default in (({"top_n": 1}, FAST), (None, {"top_n": 1}), ({}, FAST)):
        with pytest.raises(OptionsError, match=r"options: expected RerankOptions, got dict\. E\.g\. BALANCED"):
            as_options(given, default)  # type: ignore[arg-type]


def test_more_than_can_ever_be_ranked() -> None:
    with pytest.raises(
        OptionsError, match=r"k: expected at most top_k=127, got 200\. Raise options\.top_k, to 127 at most"
    ):
        check_reach("k", RerankOptions(top_k=127, top_n=200))
