"""``spatial_attention="set_causal"``: the image encoder with a KV cache, by the paper's own mask.

The released models encode all visible tokens anew for every set (`image_encoder.py`), so keys and
values change with each set and cannot be cached. Here a token never attends to later sets, so its
keys and values stay valid. Modules and shapes of weights are the same, but the model has to be
trained this way.

The rule: the N tokens of a frame are put in an order and cut into sets 1 to K. Each token occurs
twice, with the same position: as *content* (its patch) and as *query* (the mask token).

    condition           sees  condition
    content of set k    sees  condition, content of sets <= k
    query of set k      sees  condition, content of sets < k, queries of set k

Queries run through the second half of the layers only, as mask tokens do in the released models.
Their features after the last norm are what tokens are sampled from; they depend on the condition
and on the sets before, never on the token's own content.

Training computes all sets in one pass (`predict_all`): the first half of the layers on ``[condition
| content]`` under a block-causal mask, the second on ``[condition | content | queries]`` under a
teacher-forcing mask. Sampling goes set by set with a cache (`predict_set`): the content of a set
enters together with the queries of the next one. Both give the same features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidgen.ops import IntervalMask

from .image_encoder import ImageEncoder
from .vit import KVCache, Pass, take


def predict_all(
    encoder: ImageEncoder,
    content: Tensor,
    queries: Tensor,
    condition: Tensor,
    order: Tensor,
    set_sizes: Sequence[int],
) -> Tensor:
    """Features ``[B, N, D]`` of all tokens, each from the sets before its own.

    Args:
        content: patches of the whole frame with positions (`place`), ``[B, N, D]``.
        queries: mask tokens with positions, ``[B or 1, N, D]``.
        condition: of the frame, ``[B, Nv, D]``.
        order: int64 ``[B, N]``: the indices of the tokens, set after set.
        set_sizes: their sum is N.

    Raises:
        ValueError: sizes that do not sum to N.
    """
    n_condition, n_tokens = condition.shape[1], content.shape[1]
    if sum(set_sizes) != n_tokens:
        raise ValueError(f"set_sizes: expected {n_tokens} tokens in all, got {sum(set_sizes)}")
    blocks, device = [n_condition, *set_sizes], content.device
    content = take(content, order)
    queries = take(queries.expand_as(content), order)

    h = torch.cat([condition, content], dim=1)
    positions = encoder.positions(h, order)
    mask = IntervalMask.block_causal(blocks, device=device)
    h = encoder.run(h, encoder.first_half, Pass(mask, positions, n_condition))

    h = torch.cat([h, queries], dim=1)
    positions = None if positions is None else torch.cat([positions, positions], dim=1)
    mask = IntervalMask.teacher_forcing(blocks, first_noisy=1, device=device)
    h = encoder.run(h, encoder.second_half, Pass(mask, positions, n_condition))

    return take(encoder.norm(h[:, n_condition + n_tokens :]), order.argsort(dim=1))


def new_cache(encoder: ImageEncoder, n_rows: int, n_condition: int) -> KVCache:
    """A cache for one frame; call `KVCache.clear` before the next frame."""
    n_tokens = encoder.grid[0] * encoder.grid[1]
    weight = encoder.norm.weight
    options = {"dtype": weight.dtype, "device": weight.device}
    return KVCache(encoder.encoder, n_rows, n_condition + n_tokens, **options)


def predict_set(
    encoder: ImageEncoder,
    cache: KVCache,
    new: Tensor,
    queries: Tensor,
    *,
    new_ids: Tensor | None,
    ids: Tensor,
) -> Tensor:
    """Features ``[B, n, D]`` of the tokens of one set; keys and values of ``new`` are cached.

    Args:
        new: what the cache does not have yet: for the first set the condition ``[B, Nv, D]``, then
            the content of the set before, patches with positions ``[B, m, D]``.
        queries: mask tokens with positions, ``[B, n, D]``.
        new_ids: indices of the tokens in ``new``, ``[B, m]``; None for the condition.
        ids: indices of the tokens to predict, ``[B, n]``.
    """
    n_new, n_queries = new.shape[1], queries.shape[1]
    positions = None if new_ids is None else encoder.positions(new, new_ids)
    h = encoder.run(new, encoder.first_half, Pass(None, positions, 0, cache))

    n_unrotated = n_new if new_ids is None else 0
    all_ids = ids if new_ids is None else torch.cat([new_ids, ids], dim=1)
    positions = encoder.positions(new, all_ids)
    blocks = [cache.length, n_new, n_queries]
    mask = IntervalMask.block_causal(blocks, query_blocks=range(1, 3), device=new.device)
    shared = Pass(mask, positions, n_unrotated, cache)
    h = torch.cat([h, queries], dim=1)
    *layers, last = encoder.second_half
    h = encoder.run(h, layers, shared)
    # only the queries of the last layer are read, and they attend to everything: no mask
    h = encoder.run(h, [last], shared._replace(mask=None), slice(n_new, None))
    cache.advance(n_new)  # the next call overwrites the queries
    return encoder.norm(h)
