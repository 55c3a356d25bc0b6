"""What a stage must compute and move, whatever the code: multiplications and bytes by formula, and what this machine can do of them.

A stage's floor is the larger of FLOPs / matmul rate and bytes / copy rate. Additions and multiplications count as two FLOPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Work:
    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Measured on the machine at hand. flops: per second of a large matmul; bytes: read per second."""

    flops: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Seconds."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


class Counts:
    """Work of one model by its config; `size` is bytes per weight."""

    def __init__(self, config: Any, size: int) -> None:
        text, vision = config.text_config, config.vision_config
        self.size, self.icm = size, config.icm_config
        self.hidden, self.layers, self.vocab = text.hidden_size, text.num_hidden_layers, text.vocab_size
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = text.hidden_size // text.num_attention_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        self.matrices = self.layers * (attention + 3 * self.hidden * text.intermediate_size)
        v, f = vision.hidden_size, vision.intermediate_size
        self.vision_hidden, self.vision_depth = v, vision.depth
        self.full_layers = len(vision.fullatt_block_indexes)
        self.window = (vision.window_size // vision.patch_size) ** 2
        self.vision_matrices = vision.depth * (4 * v * v + 3 * v * f)
        self.patch_matrix = 3 * vision.temporal_patch_size * vision.patch_size**2 * v
        self.merge = vision.spatial_merge_size**2
        self.merge_matrix = (v * self.merge) ** 2 + v * self.merge * self.hidden

    def prefill(self, tokens: int, before: int = 0, *, reads: int = 1) -> Work:
        """`tokens` after `before` cached ones, with the head for `reads` positions."""
        end = before + tokens
        attention = 2 * self.layers * self.heads * self.head_dim * (end**2 - before**2)
        flops = 2 * self.matrices * tokens + attention + 2 * self.hidden * self.vocab * reads
        return Work(flops, self.size * (self.matrices + self.hidden * self.vocab) + self.kv_bytes(end))

    def decode(self, steps: int, before: int) -> Work:
        """`steps` tokens one by one."""
        return sum((self.prefill(1, before + i) for i in range(1, steps)), self.prefill(1, before))

    def tower(self, patches: int, pictures: int) -> Work:
        """`pictures` of `patches` each."""
        v = self.vision_hidden
        attention = 4 * v * patches * (
            patches * self.full_layers + min(self.window, patches) * (self.vision_depth - self.full_layers)
        )  # fmt: skip
        linear = (
            2 * patches * (self.vision_matrices + self.patch_matrix) + 2 * (patches / self.merge) * self.merge_matrix
        )
        return Work(
            pictures * (linear + attention), self.size * (self.vision_matrices + self.patch_matrix + self.merge_matrix)
        )

    def memory(self, tokens: int, candidates: int) -> Work:
        """in_proj over all tokens; pooling is free beside it."""
        return Work(2 * candidates * tokens * self.hidden * self.icm.width, self.size * self.hidden * self.icm.width)

    def compression(self, candidates: int, rows: int, query: int) -> Work:
        """Two tokens per candidate: ATT2 over its rows, ATT1 folded, feed-forward, projection."""
        w, h = self.icm.width, self.icm.heads
        att2 = 4 * rows * w * w + 4 * rows * query * w
        att1 = 2 * (4 * rows * h * w + 4 * w * w)
        out = 2 * (8 * w * w + 2 * w * self.hidden)
        weights = 8 * w * w + 8 * w * w + 2 * w * self.hidden
        return Work(
            candidates * (att2 + att1 + out) + 4 * query * w * w + 8 * w * w,
            self.size * weights + 2 * candidates * rows * w,
        )

    def kv_bytes(self, tokens: int) -> int:
        return int(2 * self.layers * self.kv_heads * self.head_dim * self.size * tokens)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Best of ten: a square matmul, and a sum over a tensor far larger than any cache."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    large = torch.zeros((2**31 if device.type == "cuda" else 2**28) // 4, device=device)
    with torch.inference_mode():
        flops = 2 * side**3 / best_of(10, lambda: a @ b, device)
        moved = 4 * large.numel() / best_of(10, large.sum, device)
    return Ceiling(flops, moved)


def best_of(rounds: int, call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of `rounds` after one to warm up."""
    best = float("inf")
    for attempt in range(rounds + 1):
        wait_for(device)
        started = time.perf_counter()
        call()
        wait_for(device)
        if attempt:
            best = min(best, time.perf_counter() - started)
    return best


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
