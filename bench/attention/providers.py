"""Attention: the implementations compared, each in the best form its users have.

What depends on the layout alone (masks, sort orders) is built in `setup`, which is timed apart.
What depends on q, k, v is part of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.attention.cases import Attention, AttentionCase
from bench.measure.provider import (
    Provider,
    as_table,
    needs_16_bits,
    needs_compiler,
    needs_cuda,
    package,
)
from vidgen.shapes import TOY, Segment

# ---- ours


def _ours(case: AttentionCase) -> Attention:
    from vidgen_kernels import IntervalMask, interval_attention, set_masked_attention

    rank = case.rank
    if rank is not None:
        return lambda q, k, v: set_masked_attention(q, k, v, rank)
    # Masks from a tensor of lengths are never cached, so each setup costs what a first call does.
    lengths = torch.tensor(case.shape.blocks)
    if case.shape.mask == "full":
        mask = IntervalMask.full(lengths, lengths)
    elif case.shape.mask == "teacher_forcing":
        mask = IntervalMask.teacher_forcing(lengths)
    else:
        blocks = range(*case.shape.query_blocks) if case.shape.query_blocks else None
        mask = IntervalMask.block_causal(lengths, query_blocks=blocks)
    mask = mask.to(case.device)
    mask.intervals(case.shape.n_queries, case.shape.n_keys)  # built here, kept by the mask
    return lambda q, k, v: interval_attention(q, k, v, mask)


# ---- PyTorch's scaled_dot_product_attention


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )


def _dense(case: AttentionCase) -> Attention:
    mask = case.dense_mask()
    return lambda q, k, v: _sdpa(q, k, v, mask)


def _sdpa_pinned(backend: SDPBackend | None) -> Callable[[AttentionCase], Attention]:
    def setup(case: AttentionCase) -> Attention:
        per_block = _per_block(case, _sdpa)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend else nullcontext():
                return per_block(q, k, v)

        return attention

    return setup


def _per_block(case: AttentionCase, one_call: Attention) -> Attention:
    """One unmasked call per block, its queries on the slice of keys they see."""
    segments = case.shape.segments

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = [one_call(_rows(q, s.queries), _seen(k, s), _seen(v, s)) for s in segments]
        return torch.cat(blocks, dim=2)

    return _on_sorted_tokens(case, attention)


def _rows(x: Tensor, rows: range) -> Tensor:
    return x[:, :, rows.start : rows.stop]


def _seen(x: Tensor, segment: Segment) -> Tensor:
    pieces = [_rows(x, keys) for keys in segment.keys if len(keys)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _on_sorted_tokens(case: AttentionCase, attention: Attention) -> Attention:
    """Sorted, every set is a block. Finding the order is mask creation; moving rows is not."""
    if case.rank is None:
        return attention
    from vidgen_kernels.attention.tokens import select_tokens

    order = case.rank.argsort(stable=True)[None]
    back = order.argsort(dim=-1)

    def sort_attend_unsort(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return select_tokens(attention(*(select_tokens(x, order) for x in (q, k, v))), back)

    return sort_attend_unsort


def _needs_a_mask(case: AttentionCase, backward: bool) -> str | None:
    return "nothing is masked: see sdpa_full" if case.shape.is_full else None


def _needs_no_mask(case: AttentionCase, backward: bool) -> str | None:
    return None if case.shape.is_full else "only for shapes without a mask"


def _cpu_only(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "on a GPU its backends are measured one by one"


def _needs_cudnn(device: torch.device) -> str | None:
    absent = device.type == "cuda" and not torch.backends.cudnn.is_available()
    return "this PyTorch has no cuDNN" if absent else needs_cuda(device)


# ---- FlexAttention


def _flex(**compile_options) -> Callable[[AttentionCase], Attention]:
    def setup(case: AttentionCase) -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        visible = case.visible if case.rank is None else _visible_when_sorted(case)
        create, flex = create_block_mask, flex_attention
        if case.shape not in TOY:  # toys are not worth compiling
            create = torch.compile(create_block_mask)
            flex = torch.compile(flex_attention, dynamic=False, **compile_options)
        n_queries, n_keys = case.shape.n_queries, case.shape.n_keys
        block_mask = create(
            lambda b, h, query, key: visible(query, key),
            None,
            None,
            n_queries,
            n_keys,
            device=case.device,
        )

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

        return _on_sorted_tokens(case, attention)

    return setup


def _visible_when_sorted(case: AttentionCase) -> Callable[[Tensor, Tensor], Tensor]:
    assert case.rank is not None
    rank = case.rank.sort().values
    return lambda query, key: rank[key] <= rank[query]


def _flex_refuses(case: AttentionCase, backward: bool) -> str | None:
    if backward and case.device.type == "cpu":
        return "FlexAttention has no backward on a CPU"
    return None


# ---- other people's kernels


def _flash_attn(case: AttentionCase) -> Attention:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return _per_block(case, _tokens_before_heads(flash_attn_func))


def _flash_attn_4(case: AttentionCase) -> Attention:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(q, k, v)
        return found[0] if isinstance(found, tuple) else found  # some versions return lse, too

    return _per_block(case, _tokens_before_heads(attention))


def _natten(case: AttentionCase) -> Attention:
    """Frames of equal size: the neighbourhood is the whole video, causal in time."""
    from natten import na3d  # pyright: ignore[reportMissingImports]

    frames, tokens = len(case.shape.blocks), case.shape.blocks[0]
    height, width = near_square(tokens)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = (x.transpose(1, 2).unflatten(1, (frames, height, width)) for x in (q, k, v))
        out = na3d(*grid, kernel_size=(frames, height, width), is_causal=(True, False, False))
        return out.flatten(1, 3).transpose(1, 2)

    return attention


def near_square(n: int) -> tuple[int, int]:
    """The two factors of ``n`` that are nearest to each other, the smaller first."""
    small = next(i for i in range(math.isqrt(n), 0, -1) if n % i == 0)
    return small, n // small


def natten_refuses(case: AttentionCase, backward: bool) -> str | None:
    shape = case.shape
    is_uniform = shape.mask == "block_causal" and len(set(shape.blocks)) == 1
    if not is_uniform or shape.query_blocks or len(shape.blocks) == 1 or shape.kv_heads:
        return "only for several frames of one size that all ask"
    return needs_16_bits(case, backward)


def _xformers(case: AttentionCase) -> Attention:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return _per_block(case, _tokens_before_heads(memory_efficient_attention))


def _tokens_before_heads(function: Attention) -> Attention:
    """For kernels on ``[B, T, H, D]``: views, no copies."""
    return lambda q, k, v: function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


PROVIDERS = as_table(
    Provider("ours", "this package", _ours, compiles=True),
    Provider("sdpa_dense", "SDPA with a dense mask", _dense, refuses=_needs_a_mask),
    Provider(
        "sdpa_full",
        "SDPA without a mask, PyTorch's choice of backend",
        _sdpa_pinned(None),
        refuses=_needs_no_mask,
    ),
    Provider(
        "sdpa_per_block",
        "SDPA once per block",
        _sdpa_pinned(None),
        missing=_cpu_only,
        refuses=_needs_a_mask,
    ),
    Provider(
        "sdpa_flash_per_block",
        "SDPA once per block, FlashAttention-2 backend",
        _sdpa_pinned(SDPBackend.FLASH_ATTENTION),
        missing=needs_cuda,
        refuses=needs_16_bits,
    ),
    Provider(
        "sdpa_cudnn_per_block",
        "SDPA once per block, cuDNN backend",
        _sdpa_pinned(SDPBackend.CUDNN_ATTENTION),
        missing=_needs_cudnn,
        refuses=needs_16_bits,
    ),
    Provider(
        "flex",
        "FlexAttention, compiled, with a compiled BlockMask",
        _flex(),
        missing=needs_compiler,
        refuses=_flex_refuses,
        compiles=True,
    ),
    Provider(
        "flex_max_autotune",
        "FlexAttention, compiled with max-autotune (minutes per shape)",
        _flex(mode="max-autotune-no-cudagraphs"),
        missing=needs_cuda,
        default_on=(),
    ),
    Provider(
        "flash_attn_per_block",
        "flash-attn once per block",
        _flash_attn,
        missing=package("flash-attn", "flash_attn"),
        refuses=needs_16_bits,
    ),
    Provider(
        "flash_attn_4_per_block",
        "flash-attn-4 (CuTe, Hopper and later) once per block",
        _flash_attn_4,
        missing=package("flash-attn-4", "flash_attn.cute"),
        refuses=needs_16_bits,
    ),
    Provider(
        "natten",
        "NATTEN's 3-D neighbourhood attention, causal in time",
        _natten,
        missing=package("natten", "natten"),
        refuses=natten_refuses,
    ),
    Provider(
        "xformers_per_block",
        "xformers once per block",
        _xformers,
        missing=package("xformers", "xformers"),
    ),
)
