"""A pool of KV rows, and the view of it that one forward pass of transformers sees as its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class KvPool:
    """keys and values: per layer (rows, kv_heads, capacity, head_dim); grows by doubling, never shrinks."""

    def __init__(
        self, config: Any, device: torch.device, dtype: torch.dtype, rows: int = 4, capacity: int = 512
    ) -> None:
        self._shape: tuple[int, int] = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
        self._device, self._dtype = device, dtype
        self._rows, self._capacity = rows, capacity
        # zeros, not empty: masked columns are multiplied by 0, and 0 * NaN is NaN
        self.layers = [self._zeros(rows, capacity) for _ in range(2 * config.num_hidden_layers)]
        self._free = list(range(rows - 1, -1, -1))

    def take(self) -> int:
        if not self._free:
            rows = self._rows
            self._resize(2 * rows, self._capacity)  # may run out of memory: only rows that exist are free
            self._free = list(range(2 * rows - 1, rows - 1, -1))
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self._free.append(row)
        self._free.sort(reverse=True)  # low rows first: active rows stay together, and together they need no copy

    def reserve(self, capacity: int) -> None:
        if capacity > self._capacity:
            self._resize(self._rows, max(capacity, 2 * self._capacity))

    def _zeros(self, rows: int, capacity: int) -> Tensor:
        heads, head_dim = self._shape
        return torch.zeros(rows, heads, capacity, head_dim, device=self._device, dtype=self._dtype)

    def _resize(self, rows: int, capacity: int) -> None:
        for i, old in enumerate(self.layers):
            # at least as large as it is: a resize that ran out of memory half-way has left layers of two sizes
            new = self._zeros(max(rows, old.shape[0]), max(capacity, old.shape[2]))
            new[: old.shape[0], :, : old.shape[2]] = old
            self.layers[i] = new
        self._rows, self._capacity = rows, capacity


class StepCache:
    """What transformers' attention calls `past_key_values` for one pass over some rows of the pool.

    rows, lengths: pool row and tokens already held, per batch row; new: tokens added now (queries are padded on the right)
    """

    def __init__(self, pool: KvPool, rows: Sequence[int], lengths: Sequence[int], new: Sequence[int]) -> None:
        self._pool = pool
        self._rows, self._lengths, self._new = list(rows), list(lengths), list(new)
        self._total = max(a + b for a, b in zip(lengths, new, strict=True))
        pool.reserve(self._total)
        self._at: tuple[Tensor, Tensor] | None = None
        if len(self._rows) > 1 and max(new) == 1:  # as tensors: lists would be made tensors in every layer
            device = pool.layers[0].device
            self._at = torch.tensor(self._rows, device=device), torch.tensor(self._lengths, device=device)
        self._together = self._rows == list(range(self._rows[0], self._rows[0] + len(self._rows)))

    def mask(self, queries: int) -> Tensor | None:
        """(B, 1, queries, total) bool: a token sees its row's past and itself.

        None where no row has a past: plain causal attention, which needs no mask and on long prompts takes six tenths of the time
        (docs/experiments.md).
        """
        if not any(self._lengths):
            return None
        device = self._pool.layers[0].device
        position = torch.tensor(self._lengths, device=device)[:, None] + torch.arange(queries, device=device)
        return (torch.arange(self._total, device=device) <= position[..., None])[:, None]

    def update(
        self,
        keys: Tensor,
        values: Tensor,
        layer: int,
        *args: Any,
        **kwargs: Any,  # transformers': from 5.24 on it passes what attention was called with
    ) -> tuple[Tensor, Tensor]:
        """keys, values (B, kv_heads, queries, head_dim) -> all of them so far (B, kv_heads, total, head_dim)."""
        return self._put(2 * layer, keys), self._put(2 * layer + 1, values)

    def _put(self, index: int, new: Tensor) -> Tensor:
        store = self._pool.layers[index]
        if self._at is not None:
            store[self._at[0], :, self._at[1]] = new[:, :, 0]
        else:
            for b, (row, start, count) in enumerate(zip(self._rows, self._lengths, self._new, strict=True)):
                store[row, :, start : start + count] = new[b, :, :count]
        if self._together:
            return store[self._rows[0] : self._rows[0] + len(self._rows), :, : self._total]
        return store[self._rows, :, : self._total]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._total
