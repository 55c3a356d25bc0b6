"""What an evaluation may be asked for."""

from __future__ import annotations

from collections.abc import Sequence

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.options import RerankOptions


def check_modes(modes: Sequence[RerankOptions]) -> None:
    """A share of a batch may think or not by who else is in the batch; an evaluation judges each query by itself."""
    for options in modes:
        if options.think == "auto" and options.ranking != "logits" and options.max_think_share < 1:
            fix = "Set it to 1; think_margin bounds thinking query by query."
            got = f"{options.max_think_share} with think='auto'"
            raise OptionsError(explain("max_think_share", expected="1 in an evaluation", got=got, fix=fix))
