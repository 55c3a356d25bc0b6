"""The Information Compression Module: every candidate as one content and one relation token (arXiv 2510.02745, ICM).

    memory = pool(in_proj(T_c) + P)          once per candidate, at index time
    t_con  = ATT1(e, memory)
    R      = memory + ATT2(memory, T_q)      the sum is ours (`residual`): the paper has ATT2 alone
    t_rel  = ATT1(e, R)                      the same ATT1 and e as for content

Shapes: N candidates, B queries, m memory rows, q query tokens, w = width, H = LM width. What is ours and not the paper's: the
low-dimensional memory, the pooling, the norms and feed-forward layers, the scaling to the LM's embedding norm, the label tag.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrv_r1_retriever.model.configuration import IcmConfig


class Icm(nn.Module):
    def __init__(self, config: IcmConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.in_proj = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))
        self.e = nn.Parameter(torch.randn(width) * 0.05)
        self.memory_norm, self.query_norm, self.relation_norm = (nn.LayerNorm(width) for _ in range(3))
        self.att1, self.att2 = (_Attention(width, config.heads) for _ in range(2))
        self.content_ff, self.relation_ff = (_FeedForward(width) for _ in range(2))
        self.content_out, self.relation_out = (_Output(width, hidden_size) for _ in range(2))
        self.tag_scale = nn.Parameter(torch.ones(()))

    def start_at(self, norm: float, table_norm: float) -> None:
        """Make both outputs as long as `norm`, on average, and the label tag just as long: a shorter one would be drowned."""
        self.content_out.start_at(norm)
        self.relation_out.start_at(norm)
        with torch.no_grad():
            self.tag_scale.fill_(norm / table_norm)

    def rows(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """LM input embeddings of several candidates or queries (n_i, H) -> (n_i, w) each, before pooling; one projection for all."""
        lengths = [len(part) for part in parts]
        projected: Tensor = self.in_proj(torch.cat(list(parts)))
        positions = sinusoid(max(lengths), self.config.width, projected.device, projected.dtype)
        return [row + positions[: len(row)] for row in torch.split(projected, lengths)]

    def memories(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """LM input embeddings of several candidates (n_i, H) -> memories (min(n_i, memory_rows), w)."""
        return [pool(rows, self.config.memory_rows) for rows in self.rows(parts)]

    def forward(
        self, memory: Tensor, memory_mask: Tensor, query: Tensor, query_mask: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """memory (N, m, w), query (B, q, w), masks bool True = valid, row (N,): the query of each candidate -> two (N, H)."""
        memory = self.memory_norm(memory)
        attended = self.att2(memory, self.query_norm(query), query_mask, row)
        return self._tokens(memory, memory_mask, attended)

    def of_one_query(self, memory: Tensor, memory_mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` where all N candidates ask one query (q, w), none of it padding: faster, and the same to rounding."""
        memory = self.memory_norm(memory)
        return self._tokens(memory, memory_mask, self.att2.shared(memory, self.query_norm(query)))

    def _tokens(self, memory: Tensor, memory_mask: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        content = self.att1.pooled(self.e, memory, memory_mask)
        relation_rows = self.relation_norm(memory + attended if self.config.residual else attended)
        relation = self.att1.pooled(self.e, relation_rows, memory_mask)
        return (
            self._unless_blank("content", self.content_out(self.content_ff(content))),
            self._unless_blank("relation", self.relation_out(self.relation_ff(relation))),
        )

    def _unless_blank(self, name: str, tokens: Tensor) -> Tensor:
        return torch.zeros_like(tokens) if self.config.blank == name else tokens


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor, row: Tensor) -> Tensor:
        """query (N, a, w), keys (B, b, w), mask (B, b) True = valid, row (N,): whose keys each one asks -> (N, a, w)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, keys), (self.v, keys))
        )
        attended = F.scaled_dot_product_attention(q, k[row], v[row], attn_mask=mask[row, None, None])
        out: Tensor = self.out(attended.transpose(1, 2).flatten(-2))
        return out

    def shared(self, query: Tensor, keys: Tensor) -> Tensor:
        """The same where every one of query (N, a, w) asks the same keys (b, w) -> (N, a, w), without a projection per row of `query`.

        Both are folded into the few keys: scores = query (W_q' k), out = weights (v W_o'). 4aw^2 + 4abw multiplications for each
        of the N become 4habw. Rows lie last in the softmax, so that it runs over whole vectors.
        """
        heads, b, rows = self.heads, len(keys), query.flatten(0, -2)
        if heads * b > query.shape[-1] + b:  # so many keys that folding is the longer way
            every, first = keys.new_ones(1, b, dtype=torch.bool), keys.new_zeros(1, dtype=torch.long)
            return self(rows[None], keys[None], every, first)[0].view_as(query)  # type: ignore[no-any-return]
        k, v = (layer(keys).unflatten(-1, (heads, -1)).transpose(0, 1) for layer in (self.k, self.v))  # (h, b, d)
        d = k.shape[-1]
        k = k / d**0.5
        into = (k @ self.q.weight.view(heads, d, -1)).flatten(0, 1)  # (hb, w)
        bias = (k @ self.q.bias.view(heads, d, 1)).flatten(0, 1)
        weights = torch.addmm(bias, into, rows.T).view(heads, b, -1).softmax(1)  # (h, b, Na)
        back = (v @ self.out.weight.view(-1, heads, d).permute(1, 2, 0)).flatten(0, 1)  # (hb, w)
        return torch.addmm(self.out.bias, weights.flatten(0, 1).T, back).view_as(query)

    def pooled(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """The same for one query (w,) that all N share -> (N, w), without a key or a value per row.

        Both projections are folded over the softmax: scores = keys (W_k' q), values = W_v (weights' keys). The key's bias adds
        one constant to all scores of a head and drops out. 2mw^2 multiplications become 2mhw + w^2.
        """
        heads, d = self.heads, len(query) // self.heads
        asked = self.q(query).view(heads, 1, d) @ self.k.weight.view(heads, d, -1) / d**0.5  # (h, 1, w)
        scores = (keys @ asked[:, 0].T).transpose(1, 2).masked_fill(~mask[:, None], float("-inf"))  # (N, h, m)
        rows = scores.float().softmax(-1).to(keys.dtype) @ keys  # (N, h, w)
        values = torch.einsum("nhw,hdw->nhd", rows, self.v.weight.view(heads, d, -1)).flatten(1) + self.v.bias
        return self.out(values)  # type: ignore[no-any-return]


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


class _Output(nn.Module):
    """To LM width, starting at the norm of the LM's own embeddings and free to leave it.

    A norm fixed there was tried: the miniature's image tokens are 20 times as long as its words, and what two word-sized
    tokens said of a picture was drowned (docs/experiments.md).
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def start_at(self, norm: float) -> None:
        """Make outputs as long as `norm`, on average."""
        hidden_size, width = self.proj.weight.shape
        self.proj.weight.normal_(0.0, norm / (hidden_size * width) ** 0.5)
        self.proj.bias.zero_()


def pool(rows: Tensor, memory_rows: int) -> Tensor:
    """(n, w) -> means over min(n, memory_rows) equal chunks; 0 keeps every row."""
    n = len(rows)
    if memory_rows == 0 or n <= memory_rows:
        return rows
    chunk = (torch.arange(n, device=rows.device) * memory_rows) // n
    sums = torch.zeros(memory_rows, rows.shape[1], device=rows.device, dtype=rows.dtype).index_add(0, chunk, rows)
    return sums / torch.bincount(chunk, minlength=memory_rows)[:, None].to(rows.dtype)


def pad(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """N tensors (n_i, w) -> (N, max n, w), zeros behind, and its mask (N, max n) bool.

    One gather: the gradient of torch's own `pad_sequence` copies the whole result once for every part.
    """
    lengths = torch.tensor([len(part) for part in parts], device=parts[0].device)
    columns = torch.arange(int(lengths.max()), device=lengths.device)
    mask = columns < lengths[:, None]
    index = torch.where(mask, columns + (lengths.cumsum(0) - lengths)[:, None], 0)
    flat = torch.cat(list(parts))
    return flat.index_select(0, index.flatten()).view(*index.shape, -1) * mask[..., None], mask


def sinusoid(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """P: (length, width), sines then cosines by token index (Vaswani et al., 2017)."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device).float() * (-9.210340371976184 / width))
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width].to(dtype)
