"""``spatial_attention="set_causal"``: sets of a frame with a cache, the paper's own spatial mask.

The released models look at a frame anew for every set (`image_encoder.py`), so what a visible token
is changes with each set and no key can be kept. Here a token is what it was when its set was made.
It needs a model trained so; modules and weights are the same.

The rule. A frame has a condition and N tokens in an order, cut into sets 1 to K. A token is there
twice, both at its place in the frame: as *content*, its patch, and as *query*, the mask token.

    condition           sees  condition
    content of set k    sees  condition, content of sets <= k
    query of set k      sees  condition, content of sets < k, queries of set k

Queries only run through the second half of the layers, as mask tokens do in the released models.
The last norm of a query is what its token is sampled from: it depends on the sets before its own,
never on its own content. Training has all sets in one pass (`predict_all`): the first half is block
causal on ``[condition | content]``, the second on ``[condition | content | queries]`` under the
mask of teacher forcing. Sampling goes set by set with a cache (`predict_set`), where the content of
a set enters together with the queries of the next. Both give the same.
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
        content: placed patches of the whole frame, ``[B, N, D]``.
        queries: placed mask tokens, ``[B or 1, N, D]``.
        condition: of the frame, ``[B, Nv, D]``.
        order: int64 ``[B, N]``: which tokens the sets have, set after set.
        set_sizes: N in all.

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
    """For one frame at a time: `KVCache.clear` before the next."""
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
    """Features ``[B, n, D]`` of the tokens of one set; ``new`` stays in the cache.

    Args:
        new: what was not there before: for the first set the condition ``[B, Nv, D]``, then the
            content of the set before, placed patches ``[B, m, D]``.
        queries: placed mask tokens ``[B, n, D]``.
        new_ids: which tokens ``new`` are, ``[B, m]``; None for the condition.
        ids: which tokens to predict, ``[B, n]``.
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
    # queries see all that is there, so the last layer, of which they alone are read, has no mask
    h = encoder.run(h, [last], shared._replace(mask=None), slice(n_new, None))
    cache.advance(n_new)  # queries are written over
    return encoder.norm(h)
