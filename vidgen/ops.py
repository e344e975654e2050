"""The one seam between models and kernels: a model takes `ops` and calls what it holds.

`EAGER` is plain PyTorch as the official models write it, an honest baseline; `FUSED` the kernels.
Neither holds parameters, so state dicts do not depend on the choice.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidgen_kernels import IntervalMask, interval_attention, set_masked_attention


class Ops(NamedTuple):
    """Tensors are ``[B, H, T, D]``; heads of k and v may be fewer, as in `interval_attention`."""

    interval_attention: Callable[[Tensor, Tensor, Tensor, IntervalMask], Tensor]
    set_masked_attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, rank


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
    dense = mask.to_dense()[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)


def _dense_set_attention(q: Tensor, k: Tensor, v: Tensor, rank: Tensor) -> Tensor:
    dense = rank[..., None, :] <= rank[..., :, None]
    dense = dense[:, None] if dense.ndim == 3 else dense
    return scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)


EAGER = Ops(_dense_attention, _dense_set_attention)
FUSED = Ops(interval_attention, set_masked_attention)
