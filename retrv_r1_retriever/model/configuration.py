"""Sizes of the compression module, and the model's config class."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import Qwen2_5_VLConfig

#: Bumped when P, pooling or the order of operations in `Icm.rows` changes; part of the memory digest.
MEMORY_VERSION = 1


@dataclass(frozen=True, slots=True)
class IcmConfig:
    """Compression module (arXiv 2510.02745, ICM).

    width: of stored memory and of both attention layers; heads divides width
    memory_rows: rows kept per candidate (chunk means); 0 keeps every row, as the paper does
    residual: the relation rows keep the candidate's own beside what they found in the query (docs/experiments.md)
    blank: the token that says nothing of the candidate, its label's tag alone: to measure what the other one is worth

    Stored bytes per candidate = memory_rows * width * 2. Both numbers and the residual are ours, not the paper's.
    """

    width: int = 128
    heads: int = 4
    memory_rows: int = 64
    residual: bool = True
    blank: Literal["", "content", "relation"] = ""

    @classmethod
    def fast(cls) -> IcmConfig:
        """16 kB a candidate; memory is made at index time."""
        return cls()

    @classmethod
    def paper(cls, hidden_size: int, heads: int = 4) -> IcmConfig:
        """Every token at LM width: too large to store, computed at query time. For comparison."""
        return cls(width=hidden_size, heads=heads, memory_rows=0, residual=False)


class RetrvR1Config(Qwen2_5_VLConfig):
    """Qwen2.5-VL's config and `icm`, the compression module's sizes as a plain dict (`IcmConfig`)."""

    model_type = "retrv_r1"

    icm: dict[str, Any] | None = None

    @property
    def icm_config(self) -> IcmConfig:
        return IcmConfig(**(self.icm or asdict(IcmConfig())))
