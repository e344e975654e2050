"""What every operator means, in plain PyTorch: exact in fp64, differentiable, T x T. For tests.

Masks are bool ``[B or 1, Tq, Tk]``, True where the query sees the key.
Legend: B batch, H heads, Tq queries, Tk keys, D head dim, N blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def block_causal_mask(
    block_lengths: Sequence[int],
    query_blocks: range | None = None,
    window: int | None = None,
    sink_blocks: int = 0,
) -> Tensor:
    """Token of block i sees block j iff ``j <= i and (j > i - window or j < sink_blocks)``."""
    j = _block_of_token(block_lengths)
    i = j[:, None]
    seen = (j <= i) & _in_reach(i, j, window, sink_blocks)
    if query_blocks is not None:
        seen = seen[(j >= query_blocks.start) & (j < query_blocks.stop)]
    return seen[None]


def teacher_forcing_mask(
    block_lengths: Sequence[int], window: int | None = None, sink_blocks: int = 0
) -> Tensor:
    """``[clean | noisy]`` copies of the blocks.

    Clean i sees clean j <= i, noisy i sees clean j < i (both within window and sinks) and noisy i.
    """
    j = _block_of_token(block_lengths)
    i = j[:, None]
    reach = _in_reach(i, j, window, sink_blocks)
    clean = torch.cat([(j <= i) & reach, torch.zeros_like(reach)], dim=1)
    noisy = torch.cat([(j < i) & reach, j == i], dim=1)
    return torch.cat([clean, noisy])[None]


def full_mask(q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    """Sequence by sequence: query i sees key j iff they belong to the same one."""
    return (_block_of_token(q_lengths)[:, None] == _block_of_token(k_lengths))[None]


def rank_mask(rank_q: Tensor, rank_k: Tensor | None = None) -> Tensor:
    """Query i sees key j iff ``rank_k[j] <= rank_q[i]``; ranks are ``[T]`` or ``[B, T]``."""
    rank_k = rank_q if rank_k is None else rank_k
    return torch.atleast_2d(rank_k)[:, None, :] <= torch.atleast_2d(rank_q)[:, :, None]


def pack_masks(masks: Sequence[Tensor]) -> Tensor:
    """Sequences one after another, each under its own mask, unseen by the others."""
    n_batch = max(len(m) for m in masks)
    rows = [torch.block_diag(*(m[b % len(m)] for m in masks)) for b in range(n_batch)]
    return torch.stack(rows).bool()


def pad_text_mask(
    mask: Tensor, text_length: int, valid_lengths: Sequence[int], text_queries: bool
) -> Tensor:
    """In batch row b, nobody sees the keys ``valid_lengths[b] <= j < text_length``.

    With ``text_queries`` the same tokens are queries too, and see nothing.
    """
    valid = torch.tensor(valid_lengths).reshape(-1, 1)

    def is_padding(n_tokens: int) -> Tensor:  # [B, n_tokens]
        token = torch.arange(n_tokens)
        return (token >= valid) & (token < text_length)

    mask = mask & ~is_padding(mask.shape[2])[:, None, :]
    return mask & ~is_padding(mask.shape[1])[:, :, None] if text_queries else mask


def attention(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hkv, Tk, D]
    v: Tensor,  # [B, Hkv, Tk, D]
    dense_mask: Tensor,  # [B or 1, Tq, Tk]
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``out = softmax(softmax_scale * q k^T) v`` over the seen keys, and its log-sum-exp.

    A row that sees nothing gives 0, lse -inf and no gradient. Products and ``out`` are in the dtype
    of q, softmax and lse in fp32 or wider, as a good eager implementation has them.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = dense_mask[:, None]
    is_empty = ~seen.any(dim=-1, keepdim=True)
    s = _scores(q, k, softmax_scale)
    # -inf hides a key; an empty row gets zeros, so that nothing becomes NaN, and is cut below
    s = s.masked_fill(~seen, float("-inf")).masked_fill(is_empty, 0.0)
    p = s.softmax(dim=-1).masked_fill(is_empty, 0.0)
    lse = s.logsumexp(dim=-1).masked_fill(is_empty[..., 0], float("-inf"))
    return p.to(v.dtype) @ v, lse


def attention_gradients(
    do: Tensor,  # [B, H, Tq, D]
    dlse: Tensor,  # [B, H, Tq]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dense_mask: Tensor,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention` in closed form, from its rounded ``out`` and ``lse``.

    ``p = exp(s - lse)``, ``ds = p (do v^T - do . out + dlse)``,
    ``dq = scale ds k``, ``dk = scale ds^T q``, ``dv = p^T do``.
    Autograd of `attention` is the definition; this says what the dtype allows.
    """
    n_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = _scores(q, k, softmax_scale)
    p = torch.where(dense_mask[:, None], (s - lse[..., None]).exp(), 0.0)
    delta = (do * out.to(s.dtype)).sum(dim=-1) - dlse
    ds = (p * ((do @ v.mT) - delta[..., None])).to(q.dtype)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    dk, dv = scale * (ds.mT @ q), p.to(q.dtype).mT @ do
    dk, dv = (x.unflatten(1, (n_kv_heads, group)).sum(dim=2) for x in (dk, dv))
    return scale * (ds @ k), dk, dv


def _scores(q: Tensor, k: Tensor, softmax_scale: float | None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return scale * (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))


def _block_of_token(block_lengths: Sequence[int]) -> Tensor:
    lengths = torch.tensor(block_lengths, dtype=torch.int64)
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _in_reach(i: Tensor, j: Tensor, window: int | None, sink_blocks: int) -> Tensor:
    if window is None:
        return torch.ones_like(i >= j)
    return (j > i - window) | (j < sink_blocks)
