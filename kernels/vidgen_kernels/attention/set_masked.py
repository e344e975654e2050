"""`set_masked_attention`: sets of tokens, in any order, that see their own and earlier sets.

Tokens are sorted by rank, attended to under the mask of the sorted ranks (`sorted_ranks`), and the
results are put back in the order of the arguments.
"""

from torch import Tensor

from ..common.front_door import prepare, resolve_scale
from ..common.registration import define_op
from . import portable
from .interval_attention import backward_op, forward_op, register_autograd
from .intervals import sorted_ranks
from .mask_inputs import check_ranks
from .tokens import select_tokens


def _set_forward(
    q: Tensor, k: Tensor, v: Tensor, order_q: Tensor, order_k: Tensor,
    q_begin: Tensor, q_end: Tensor, k_begin: Tensor, k_end: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sort, attend, put back."""
    q, k, v = select_tokens(q, order_q), select_tokens(k, order_k), select_tokens(v, order_k)
    out, lse = forward_op(q, k, v, q_begin, q_end, k_begin, k_end, softmax_scale)
    back = order_q.argsort(dim=-1)
    return select_tokens(out, back), select_tokens(lse, back)


def _set_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    order_q: Tensor, order_k: Tensor,
    q_begin: Tensor, q_end: Tensor, k_begin: Tensor, k_end: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sorts again what the forward sorted, which is cheaper than keeping four tensors a layer."""
    dlse = None if dlse is None else select_tokens(dlse, order_q)
    do, q, out, lse = (select_tokens(x, order_q) for x in (do, q, out, lse))
    k, v = select_tokens(k, order_k), select_tokens(v, order_k)
    dq, dk, dv = backward_op(
        do, dlse, q, k, v, out, lse, q_begin, q_end, k_begin, k_end, softmax_scale
    )
    del do, q, k, v, out  # frees their memory for the gradients below
    back_q, back_k = order_q.argsort(dim=-1), order_k.argsort(dim=-1)
    dq = select_tokens(dq, back_q)
    dk = select_tokens(dk, back_k)
    return dq, dk, select_tokens(dv, back_k)


# Only the kernels read the interval tables of the keys.


def _portable_fwd(q, k, v, order_q, order_k, q_begin, q_end, k_begin, k_end, softmax_scale):
    return portable.set_attention_fwd(q, k, v, order_q, order_k, q_begin, q_end, softmax_scale)


def _portable_bwd(
    do, dlse, q, k, v, out, lse, order_q, order_k, q_begin, q_end, k_begin, k_end, softmax_scale
):
    return portable.set_attention_bwd(
        do, dlse, q, k, v, out, lse, order_q, order_k, q_begin, q_end, softmax_scale
    )


# The launchers are also the fakes: every operation in them has a fake itself.
_set_forward_op = define_op("set_masked_attention_fwd", _set_forward, _portable_fwd, _set_forward)
_set_backward_op = define_op(
    "set_masked_attention_bwd", _set_backward, _portable_bwd, _set_backward
)
register_autograd(_set_forward_op, _set_backward_op)


def set_masked_attention(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hkv, Tk, D]
    v: Tensor,  # [B, Hkv, Tk, D]
    rank_q: Tensor,  # [Tq] or [B, Tq]
    rank_k: Tensor | None = None,  # [Tk] or [B, Tk]
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention between sets of tokens in any order: query i sees key j iff rank_k[j] <= rank_q[i].

    Tokens are sorted by rank on the way in, and results are put back on the way out. A model that
    keeps its tokens sorted saves both: it calls `interval_attention` under
    `IntervalMask.from_ranks`.

    Args:
        rank_q, rank_k: integers, any order and values; ``rank_k`` defaults to ``rank_q``. A query
            ranked below all keys sees nothing (output 0); no query sees a key ranked above all.

    Other arguments, returns and errors: see `interval_attention`.
    """
    q, k, v = prepare(q, k, v)
    ranks_q = check_ranks("rank_q", rank_q)
    ranks_k = ranks_q if rank_k is None else check_ranks("rank_k", rank_k)
    given_k = rank_q if rank_k is None else rank_k
    for name, given, ranks, x in (("rank_q", rank_q, ranks_q, q), ("rank_k", given_k, ranks_k, k)):
        n_batch, _, n_tokens, _ = x.shape
        if len(ranks) not in (1, n_batch) or ranks.shape[1] != n_tokens:
            expected = f"[{n_tokens}] or [{n_batch}, {n_tokens}]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(given.shape)}")
        if ranks.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q has, got {ranks.device}")
    sorted_q, order_q = ranks_q.sort(dim=-1, stable=True)
    sorted_k, order_k = (sorted_q, order_q) if rank_k is None else ranks_k.sort(dim=-1, stable=True)
    intervals = sorted_ranks(sorted_q, sorted_k).intervals(q.shape[2], k.shape[2])
    q, scale = resolve_scale(q, softmax_scale)
    out, lse = _set_forward_op(q, k, v, order_q, order_k, *intervals, scale)
    return (out, lse) if return_lse else out
