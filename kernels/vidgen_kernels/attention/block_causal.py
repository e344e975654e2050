"""`block_causal_attention`: frames that see themselves and the past."""

from torch import Tensor

from ..common.front_door import check_tensor
from .interval_attention import interval_attention
from .intervals import IntervalMask
from .mask_inputs import BlockLengths


def block_causal_attention(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, Hkv, T, D]
    v: Tensor,  # [B, Hkv, T, D]
    block_lengths: BlockLengths,
    *,
    window: int | None = None,
    sink_blocks: int = 0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention between blocks of tokens (frames): block i sees block j iff j <= i.

    Text that all frames see and that sees frame 0 is part of block 0 (Pyramid Flow, NOVA):
    ``[text + n0, n1, n2, ...]``; text that sees only itself is a block of its own.

    Args:
        block_lengths: tokens per block, summing to T: ints, or an int tensor ``[N]`` on the device
            of q (then a new layout never recompiles anything).
        window: a block sees only the last ``window`` blocks, itself included ...
        sink_blocks: ... and these first ones.

    Other arguments, returns and errors: see `interval_attention`. To build the mask once for all
    layers, call that with an `IntervalMask.block_causal`.
    """
    check_tensor("q", q)  # whose device the mask is put on
    mask = IntervalMask.block_causal(
        block_lengths, window=window, sink_blocks=sink_blocks, device=q.device
    )
    return interval_attention(q, k, v, mask, softmax_scale=softmax_scale, return_lse=return_lse)
