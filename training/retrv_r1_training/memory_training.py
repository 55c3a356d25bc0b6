"""Memory that goes on learning after `align`: in_proj in every pass, instead of stored rows. The recipe's `freeze_memory: false`.

In training a candidate's "memory" is then what it is made of, T_c, and the module makes the rest of it. Served, it is stored as ever.
"""

from __future__ import annotations

from typing import Any

from retrv_r1_retriever.model.icm import Icm, pad
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration


def learn_memory(model: RetrvR1ForConditionalGeneration) -> RetrvR1ForConditionalGeneration:
    """The model, which from now on takes T_c (N, n, H) for memory (N, m, w)."""
    model.model.icm.register_forward_pre_hook(_make)
    return model


def learns_memory(model: RetrvR1ForConditionalGeneration) -> bool:
    return _make in model.model.icm._forward_pre_hooks.values()


def _make(icm: Icm, args: tuple[Any, ...]) -> tuple[Any, ...]:
    embeds, mask, *rest = args
    return (*pad(icm.memories([row[valid] for row, valid in zip(embeds, mask, strict=True)])), *rest)
