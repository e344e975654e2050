"""The one seam between models and kernels: a model takes `ops` and calls what it holds.

`EAGER` is plain PyTorch as the official models write it, an honest baseline; `FUSED` the kernels.
Neither holds parameters, so state dicts do not depend on the choice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidgen_kernels import IntervalMask, interval_attention, set_masked_attention


class Ops(NamedTuple):
    """Functions of the shapes, meaning and returns of those in `vidgen_kernels`."""

    interval_attention: Callable[..., Any]
    set_masked_attention: Callable[..., Any]


def _eager_interval_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    return _dense_attention(q, k, v, mask.to_dense(), return_lse)


def _eager_set_masked_attention(
    q: Tensor, k: Tensor, v: Tensor, rank: Tensor, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    rank = torch.atleast_2d(rank)
    return _dense_attention(q, k, v, rank[:, None, :] <= rank[:, :, None], return_lse)


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``mask`` is bool ``[B or 1, Tq, Tk]``."""
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    if not return_lse:
        return out
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    return out, scores.masked_fill(~mask[:, None], float("-inf")).logsumexp(dim=-1)


EAGER = Ops(_eager_interval_attention, _eager_set_masked_attention)
FUSED = Ops(interval_attention, set_masked_attention)
