"""The transformer of both encoders, with post-norm: each sublayer's result is normalised.

    x <- x + LN(attention(x));  x <- x + LN(MLP(x))

Shapes: B batch rows, L tokens, D width, H heads, hd head dim. Names are those of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen.ops import IntervalMask, Ops, QKVStream

from .config import Encoder, rotary_axes

NORM_EPS = 1e-5

Rows = Tensor | slice  # tokens of a sequence: int64 [B, n], or a slice for all batch rows


class KVCache:
    """Keys and values of all layers, allocated once; the first ``length`` tokens are valid.

    A pass writes the keys and values of its tokens after them, layer by layer (`extend`), then
    declares the first n of these tokens valid (`advance`). The next pass overwrites the others.
    """

    def __init__(
        self,
        encoder: Encoder,
        n_rows: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """``capacity``: the largest number of tokens, those of the running pass included."""
        size = encoder.depth, 2, n_rows, encoder.num_heads, capacity, encoder.head_dim
        # not empty: a mask hides keys that are not written yet, but not NaN values
        self.data = torch.zeros(size, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes n keys and values of a layer; returns all, ``[B, H, length + n, hd]``.

        Raises:
            ValueError: more tokens than the capacity.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache: expected at most {self.capacity} tokens, got {end}")
        keys, values = self.data[layer, :, :, :, :end]
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        return keys, values

    def advance(self, n: int) -> None:
        self.length += n

    def clear(self) -> None:
        self.length = 0


class Pass(NamedTuple):
    """What the layers of one pass over a sequence share."""

    mask: IntervalMask | None = None  # None: full attention, to cached tokens too
    positions: Tensor | None = None  # rotary positions of the last n tokens, [n, 3] or [B, n, 3]
    n_condition: int = 0  # tokens before those, which are not rotated
    cache: KVCache | None = None


def take(x: Tensor, rows: Rows) -> Tensor:
    """Tokens ``rows`` of ``x`` [B, L, D]."""
    if isinstance(rows, slice):
        return x[:, rows]
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        width = encoder.embed_dim
        self.n_heads, self.axes = encoder.num_heads, rotary_axes(encoder.head_dim)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, shared: Pass, ops: Ops, layer: int = 0, rows: Rows | None = None
    ) -> Tensor:
        """``x`` [B, L, D] to ``[B, L, D]``, or to ``[B, n, D]`` with ``rows`` as the queries."""
        q, k, v = self.heads(x, shared, ops, rows)
        if shared.cache is not None:
            k, v = shared.cache.extend(layer, k, v)
        if shared.mask is None:
            out = ops.attention(q, k, v)
        else:
            out = ops.interval_attention(q, k, v, shared.mask)
        return self.proj(out.transpose(1, 2).flatten(2))

    def heads(
        self, x: Tensor, shared: Pass, ops: Ops, rows: Rows | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, H, L or n, hd]``, k and v ``[B, H, L, hd]``."""
        if shared.positions is not None:
            q, k, v = ops.qk_norm_rope(
                QKVStream(self.qkv(x)),
                shared.positions,
                self.axes,
                n_heads=self.n_heads,
                text_length=shared.n_condition,
                norm=None,
            )
            if rows is not None:
                q = self._split(take(q.transpose(1, 2).flatten(2), rows))
            return q, k, v
        if rows is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(take(x, rows), weight[:width], bias[:width])
            k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self._split(q), self._split(k), self._split(v)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.attn = Attention(encoder)
        self.norm1 = nn.LayerNorm(encoder.embed_dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(encoder.embed_dim, eps=NORM_EPS)
        self.mlp = MLP(encoder.embed_dim)

    def forward(
        self, x: Tensor, shared: Pass, ops: Ops, layer: int = 0, rows: Rows | None = None
    ) -> Tensor:
        """``x`` [B, L, D] to ``[B, L, D]``, or to ``[B, n, D]`` for the n tokens ``rows``."""
        f = self.attn(x, shared, ops, layer, rows)
        x = x if rows is None else take(x, rows)
        x = post_norm(ops, x, f, self.norm1)
        return post_norm(ops, x, self.mlp(x), self.norm2)


def post_norm(ops: Ops, x: Tensor, f: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``x + LN(f)``."""
    return ops.post_norm_residual(x, f, weight=norm.weight, bias=norm.bias, eps=norm.eps)


class VisionTransformer(nn.Module):
    """Blocks and the last norm; the two encoders add patches, sequences and masks.

    Attributes:
        gradient_checkpointing: whether training keeps only the input of each block, and runs the
            block again in the backward pass.
    """

    def __init__(self, encoder: Encoder, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(Block(encoder) for _ in range(encoder.depth))
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=NORM_EPS)

    def run(
        self, x: Tensor, layers: Sequence[int], shared: Pass, rows: Rows | None = None
    ) -> Tensor:
        """Runs ``x`` [B, L, D] through the layers; the last one computes only ``rows``, if given.

        With ``rows`` there must be no mask, since a mask is for all queries.
        """
        for i in layers:
            wanted = rows if i == layers[-1] else None
            args = x, shared, self.ops, i, wanted
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[i], *args, use_reentrant=False)
            else:
                x = self.blocks[i](*args)
        return x
