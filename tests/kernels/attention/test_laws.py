"""What must hold for attention whatever the numbers are: laws that need no reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen_kernels import (
    IntervalMask,
    block_causal_attention,
    interval_attention,
    set_masked_attention,
)
from vidgen_kernels.testing import random_qkv

LENGTHS = [6, 17, 0, 5, 16]
N = sum(LENGTHS)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def qkv(n_queries: int = N, n_keys: int = N, **options) -> tuple[Tensor, Tensor, Tensor]:
    return random_qkv(torch.ones(2, n_queries, n_keys, dtype=torch.bool), **options)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> tuple[Tensor, Tensor]:
    return interval_attention(q, k, v, mask, return_lse=True)


MASKS = {
    "causal": lambda: IntervalMask.block_causal(LENGTHS),
    "window": lambda: IntervalMask.block_causal(LENGTHS, window=2),
    "sinks": lambda: IntervalMask.block_causal(LENGTHS, window=1, sink_blocks=1),
    "teacher": lambda: IntervalMask.teacher_forcing([9, 13], window=1, sink_blocks=1),
    "packed": lambda: IntervalMask.full(LENGTHS, LENGTHS),
    "text": lambda: IntervalMask.pad_text(IntervalMask.block_causal(LENGTHS), 6, [2, 5]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_constant_values_come_back(kind: str) -> None:
    mask = MASKS[kind]()
    q, k, _ = qkv()
    v = torch.randn(2, 1, 1, 16).double().expand_as(k)
    out, lse = attend(q, k, v, mask)
    seen = (lse > float("-inf"))[..., None]
    close(out, torch.where(seen, v[:, :, :1], 0.0))


@pytest.mark.parametrize("kind", MASKS)
def test_linear_in_values(kind: str) -> None:
    mask = MASKS[kind]()
    q, k, v = qkv()
    w = torch.randn_like(v)
    close(
        interval_attention(q, k, 2 * v - 3 * w, mask),
        2 * interval_attention(q, k, v, mask) - 3 * interval_attention(q, k, w, mask),
    )


@pytest.mark.parametrize("kind", MASKS)
def test_a_shift_of_all_keys_moves_only_lse(kind: str) -> None:
    """q . (k + u) = q . k + q . u: the same for all keys of a query."""
    mask = MASKS[kind]()
    q, k, v = qkv()
    u = torch.randn(16).double()
    out, lse = attend(q, k, v, mask)
    shifted, shifted_lse = attend(q, k + u, v, mask)
    close(shifted, out)
    close(shifted_lse, lse + (q @ u) * 16**-0.5)


@pytest.mark.parametrize("kind", MASKS)
def test_unseen_keys_do_not_matter(kind: str) -> None:
    """The first query's output and gradient know only the keys that it sees."""
    mask = MASKS[kind]()
    q, k, v = qkv()
    unseen = ~mask.to_dense()[:, 0].expand(2, -1)[:, None, :, None]
    close(
        interval_attention(q, k, v, mask)[:, :, 0],
        interval_attention(q, k + 9 * unseen, v - 9 * unseen, mask)[:, :, 0],
    )


def test_keys_of_one_rank_in_any_order() -> None:
    q, k, v = qkv()
    rank = torch.arange(N) // 7
    order = torch.cat([7 * i + torch.randperm(len(x)) for i, x in enumerate(rank.split(7))])
    assert torch.equal(rank[order], rank) and not torch.equal(order, torch.arange(N))
    mask = IntervalMask.from_ranks(rank)
    close(
        interval_attention(q, k[:, :, order], v[:, :, order], mask),
        interval_attention(q, k, v, mask),
    )


def test_equal_ranks_are_plain_attention() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(n_kv_heads=2))
    rank = torch.full((N,), 5)
    plain = F.scaled_dot_product_attention(q, k, v)
    do = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (q, k, v), do)
    for out in (
        interval_attention(q, k, v, IntervalMask.from_ranks(rank)),
        interval_attention(q, k, v, IntervalMask.full([N], [N])),
        set_masked_attention(q, k, v, rank),
        block_causal_attention(q, k, v, [N]),
    ):
        close(out, plain)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), do), expected, strict=True):
            close(a, b)


def test_blocks_of_one_are_causal_attention() -> None:
    q, k, v = qkv(n_kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(block_causal_attention(q, k, v, [1] * N), expected)
    close(set_masked_attention(q, k, v, torch.arange(N)), expected)


def test_packed_is_each_alone() -> None:
    parts = [
        IntervalMask.block_causal([5, 12]),
        IntervalMask.teacher_forcing([4, 3], window=1),
        IntervalMask.full([3], [10]),
    ]
    q, k, v = (x.requires_grad_() for x in qkv(34, 41))
    packed, packed_lse = attend(q, k, v, IntervalMask.pack(parts))
    q_parts, k_parts, v_parts = q.split([17, 14, 3], 2), *(x.split([17, 14, 10], 2) for x in (k, v))
    alone = [attend(*x) for x in zip(q_parts, k_parts, v_parts, parts, strict=True)]
    out, lse = (torch.cat(x, dim=2) for x in zip(*alone, strict=True))
    close(packed, out)
    close(packed_lse, lse)
    do = torch.randn_like(out)
    gradients = (torch.autograd.grad(x, (q, k, v), do, retain_graph=True) for x in (packed, out))
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (2, 0), (2, 1)])
def test_frame_by_frame_is_all_at_once(window: int | None, sinks: int) -> None:
    """A KV cache that grows by a block at a time."""
    q, k, v = (x.requires_grad_() for x in qkv())
    rule = {"window": window, "sink_blocks": sinks}
    at_once = block_causal_attention(q, k, v, LENGTHS, **rule)
    steps, past = [], 0
    for i, n in enumerate(LENGTHS):
        mask = IntervalMask.block_causal(LENGTHS[: i + 1], query_blocks=range(i, i + 1), **rule)
        rows = slice(past, past := past + n)
        steps.append(interval_attention(q[:, :, rows], k[:, :, :past], v[:, :, :past], mask))
    stepwise = torch.cat(steps, dim=2)
    close(stepwise, at_once)
    do = torch.randn_like(at_once)
    for a, b in zip(
        *(torch.autograd.grad(x, (q, k, v), do) for x in (stepwise, at_once)), strict=True
    ):
        close(a, b)


def test_a_wide_window_is_no_window() -> None:
    q, k, v = qkv()
    expected = block_causal_attention(q, k, v, LENGTHS)
    n = len(LENGTHS)
    for rule in ({"window": n}, {"window": 99}, {"window": 1, "sink_blocks": n}):
        close(block_causal_attention(q, k, v, LENGTHS, **rule), expected)


def test_the_clean_half_of_teacher_forcing_is_block_causal() -> None:
    lengths = [9, 0, 13]
    q, k, v = qkv(44, 44)
    out = interval_attention(q, k, v, IntervalMask.teacher_forcing(lengths))
    clean = block_causal_attention(*(x[:, :, :22] for x in (q, k, v)), lengths)
    close(out[:, :, :22], clean)


def test_padded_text_is_shorter_text() -> None:
    """What is left of a row with padding is the same row without it."""
    q, k, v = qkv()
    mask = IntervalMask.pad_text(IntervalMask.block_causal(LENGTHS), 6, [2, 6])
    out, lse = attend(q, k, v, mask)
    kept = [0, 1, *range(6, N)]
    short = block_causal_attention(*(x[:1, :, kept] for x in (q, k, v)), [2, *LENGTHS[1:]])
    close(out[:1, :, kept], short)
    close(out[1:], block_causal_attention(*(x[1:] for x in (q, k, v)), LENGTHS))
    assert not out[0, :, 2:6].any() and (lse[0, :, 2:6] == float("-inf")).all()


def test_lengths_may_be_a_tensor() -> None:
    q, k, v = qkv()
    for rule in ({}, {"window": 2}, {"window": 1, "sink_blocks": 2}):
        a, b = (
            block_causal_attention(q, k, v, lengths, **rule)
            for lengths in (LENGTHS, torch.tensor(LENGTHS))
        )
        assert torch.equal(a, b)


def test_two_halves_of_the_keys_join_by_lse() -> None:
    """lse is what lets partial results be added up."""
    q, k, v = qkv()
    whole, lse = attend(q, k, v, IntervalMask.full([N], [N]))
    parts = [
        attend(q, k[:, :, s], v[:, :, s], IntervalMask.full([N], [n]))
        for s, n in ((slice(0, 20), 20), (slice(20, N), N - 20))
    ]
    close(torch.logaddexp(parts[0][1], parts[1][1]), lse)
    close(sum(out * (part - lse).exp()[..., None] for out, part in parts), whole)
