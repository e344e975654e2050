"""One attention call with real tensors, and the reference that every provider is compared with.

The reference derives visibility from block numbers, not from our masks, so that it checks them too.
It computes sampled query rows only: nothing here is T x T, except the dense mask of a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.measure.case import TOLERANCE, relative_error, worst
from vidgen.shapes import AttentionShape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SAMPLED_ROWS = 48


@dataclass(frozen=True, eq=False)
class AttentionCase:
    """A shape with inputs ``q, k, v`` and a gradient ``do``, all ``[B, H, T, D]``."""

    shape: AttentionShape
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    rank: Tensor | None  # int64 [T] for `sets`, in image order, so not sorted

    @classmethod
    def make(cls, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> AttentionCase:
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int, tokens: int) -> Tensor:
            size = (shape.batch, heads, tokens, shape.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        kv_heads = shape.kv_heads or shape.heads
        q, do = (draw(shape.heads, shape.n_queries) for _ in range(2))
        k, v = (draw(kv_heads, shape.n_keys) for _ in range(2))
        rank = shuffled_ranks(shape).to(device) if shape.mask == "sets" else None
        return cls(shape, dtype, q, k, v, do, rank)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.do]

    def allowed(self, backward: bool) -> float:
        return TOLERANCE[self.dtype]

    @cached_property
    def visible(self) -> Callable[[Tensor, Tensor], Tensor]:
        """``visible(query, key) -> bool``, broadcasting; FlexAttention compiles it too."""
        shape = self.shape
        if self.rank is not None:
            rank = self.rank
            return lambda query, key: rank[key] <= rank[query]
        lengths = torch.tensor(shape.blocks, device=self.device)
        block = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
        if shape.mask == "full":
            return lambda query, key: block[query] == block[key]
        if shape.mask == "teacher_forcing":
            n_clean = len(block)
            block = torch.cat([block, block])

            def visible(query: Tensor, key: Tensor) -> Tensor:
                past = block[key] + (query >= n_clean).to(block.dtype) <= block[query]
                itself = (query >= n_clean) & (block[key] == block[query])
                return torch.where(key < n_clean, past, itself)

            return visible
        first_query = sum(shape.blocks[: shape.query_blocks[0]]) if shape.query_blocks else 0
        return lambda query, key: block[key] <= block[query + first_query]

    def dense_mask(self) -> Tensor:
        """Bool ``[Tq, Tk]``, by rows so that temporaries stay small."""
        query = torch.arange(self.shape.n_queries, device=self.device)[:, None]
        key = torch.arange(self.shape.n_keys, device=self.device)[None]
        mask = torch.empty(
            self.shape.n_queries, self.shape.n_keys, dtype=torch.bool, device=self.device
        )
        for rows, out in zip(query.split(1024), mask.split(1024), strict=True):
            out.copy_(self.visible(rows, key))
        return mask

    def disagreement(self, function: Attention, backward: bool) -> float:
        """Largest error of the output (and dq, dk, dv), in units of the reference's largest value.

        The incoming gradient is zero outside the sampled rows, so that dk and dv, over all keys,
        are sums over those rows alone and the reference stays small.
        """
        reference = self.reference
        q, k, v = (x.detach().requires_grad_(backward) for x in self.leaves)
        out = function(q, k, v)
        if out.shape != self.q.shape or out.dtype != self.dtype:
            raise ValueError(
                f"out: expected {self.dtype} {list(self.q.shape)}, "
                f"got {out.dtype} {list(out.shape)}"
            )
        errors = [relative_error(out.detach()[:, :, reference.rows], reference.out)]
        if backward:
            do = torch.zeros_like(out)
            do[:, :, reference.rows] = self.do[:, :, reference.rows]
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
            elsewhere = dq.clone()
            elsewhere[:, :, reference.rows] = 0
            errors += [
                relative_error(dq[:, :, reference.rows], reference.dq),
                float(elsewhere.abs().max() / reference.dq.abs().max()),
                relative_error(dk, reference.dk),
                relative_error(dv, reference.dv),
            ]
        return worst(errors)

    @cached_property
    def reference(self) -> Reference:
        return Reference.of(self)


@dataclass(frozen=True, eq=False)
class Reference:
    """Attention of the sampled query rows and its gradients, in fp64 by its definition."""

    rows: Tensor
    out: Tensor  # [B, H, rows, D]
    dq: Tensor
    dk: Tensor  # [B, Hkv, Tk, D]
    dv: Tensor

    @classmethod
    def of(cls, case: AttentionCase) -> Reference:
        rows = _sample_rows(case.shape).to(case.device)
        key = torch.arange(case.shape.n_keys, device=case.device)
        visible = case.visible(rows[:, None], key[None])
        parts = []
        for b in range(case.shape.batch):  # by rows of the batch: fp64 copies of k and v are large
            q, do = (x[b][:, rows].double() for x in (case.q, case.do))
            k, v = (x[b].double() for x in (case.k, case.v))
            parts.append(_dense_rows(q, k, v, do, visible))
        return cls(rows, *(torch.stack(x) for x in zip(*parts, strict=True)))


def _dense_rows(q: Tensor, k: Tensor, v: Tensor, do: Tensor, visible: Tensor):
    """out = softmax(q k^T / sqrt(D)) v on visible pairs, and dq, dk, dv; all ``[H, T, D]``."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    out = scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def shuffled_ranks(shape: AttentionShape) -> Tensor:
    """Condition tokens first (rank 0), then each token's set in image order, drawn at random."""
    sizes = torch.tensor(shape.blocks)
    rank = torch.arange(len(sizes)).repeat_interleave(sizes)
    n_condition = shape.blocks[0]
    order = torch.randperm(len(rank) - n_condition, generator=torch.Generator().manual_seed(0))
    return torch.cat([rank[:n_condition], rank[n_condition:][order]])


def _sample_rows(shape: AttentionShape) -> Tensor:
    """Random rows, and first and last queries of a few blocks, where masks go wrong first."""
    generator = torch.Generator().manual_seed(1)
    edges = torch.tensor(
        [edge for s in shape.segments for edge in (s.queries.start, s.queries.stop - 1)]
    )
    edges = edges[torch.randperm(len(edges), generator=generator)[: SAMPLED_ROWS // 2]]
    anywhere = torch.randint(shape.n_queries, (SAMPLED_ROWS // 2,), generator=generator)
    return torch.cat([edges, anywhere]).unique()
