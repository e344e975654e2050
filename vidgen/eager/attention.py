"""Attention under dense masks, by `scaled_dot_product_attention`."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidgen_kernels import IntervalMask
from vidgen_kernels.common.front_door import is_traced


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Full attention."""
    return _dense_attention(q, k, v, None, return_lse)


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed sequences run one after another, as in the official models."""
    if not mask.parts or mask.n_queries is None or mask.n_keys is None:
        return _dense_attention(q, k, v, _dense_mask(mask, q.shape[2], k.shape[2]), return_lse)
    results, i, j = [], 0, 0
    for part in mask.parts:
        n_queries, n_keys = part.n_queries or 0, part.n_keys or 0
        qkv = q.narrow(2, i, n_queries), k.narrow(2, j, n_keys), v.narrow(2, j, n_keys)
        results.append(interval_attention(*qkv, part, return_lse=return_lse))
        i, j = i + n_queries, j + n_keys
    if not return_lse:
        return torch.cat(results, dim=2)
    out, lse = zip(*results, strict=True)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)


_dense_masks: WeakKeyDictionary[IntervalMask, Tensor] = WeakKeyDictionary()


def _dense_mask(mask: IntervalMask, n_queries: int, n_keys: int) -> Tensor:
    """Bool ``[B or 1, Tq, Tk]``; cached, since all layers of a forward use the same few masks."""
    if is_traced():
        return mask.to_dense(n_queries, n_keys)
    if mask not in _dense_masks:
        if len(_dense_masks) >= 8:
            _dense_masks.clear()
        with torch.inference_mode(False):
            _dense_masks[mask] = mask.to_dense(n_queries, n_keys)
    return _dense_masks[mask]


def set_masked_attention(
    q: Tensor, k: Tensor, v: Tensor, rank: Tensor, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    rank = torch.atleast_2d(rank)
    return _dense_attention(q, k, v, rank[:, None, :] <= rank[:, :, None], return_lse)


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``mask`` is bool ``[B or 1, Tq, Tk]``; None: every query sees every key."""
    mask = None if mask is None else mask[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    if not return_lse:
        return out
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return out, scores.logsumexp(dim=-1)
