"""`set_masked_attention` against the rank rule: ranks in any order, per batch row or shared."""

import random

import pytest
import torch
from torch import Tensor

from vidgen_kernels import IntervalMask, interval_attention, reference, set_masked_attention
from vidgen_kernels.testing import check_attention, random_qkv

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.portable_only)


def check(rank_q: Tensor, rank_k: Tensor | None = None, scale=None, **options) -> None:
    dense = reference.rank_mask(rank_q, rank_k)

    def attend(q, k, v):
        return set_masked_attention(q, k, v, rank_q, rank_k, softmax_scale=scale, return_lse=True)

    check_attention(attend, random_qkv(dense, **options), dense, scale)


SETS = torch.arange(37) // 5
SHUFFLED = SETS[torch.randperm(37, generator=torch.Generator().manual_seed(0))]
PER_ROW = torch.stack([SETS, SHUFFLED, SHUFFLED.flip(0)])
KEYS = torch.tensor([9, -1, 3, 0, 0, 7, 2])  # the first key is seen by nobody


@pytest.mark.parametrize(
    ("rank_q", "rank_k"),
    [
        (SETS, None),
        (SHUFFLED, None),
        (PER_ROW, None),
        (SHUFFLED, KEYS),
        (PER_ROW, KEYS),
        (SHUFFLED, PER_ROW),
        (PER_ROW - 3, PER_ROW.flip(0)),  # some queries see nothing
        (1000 * SHUFFLED - 10**12, None),
        (SHUFFLED.to(torch.int8), None),
        (SHUFFLED[:1], None),
        (SHUFFLED[:0], None),
        (SHUFFLED, SHUFFLED[:0]),
        (SHUFFLED[:0], SHUFFLED),
    ],
)
def test_ranks(rank_q: Tensor, rank_k: Tensor | None) -> None:
    check(rank_q, rank_k, n_heads=4, n_kv_heads=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(PER_ROW, KEYS, dtype=dtype, head_dim=32)
    check(SHUFFLED, dtype=dtype, head_dim=24)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scales(scale: float) -> None:
    check(SHUFFLED, KEYS, scale)


@pytest.mark.parametrize("seed", range(8))
def test_random_ranks(seed: int) -> None:
    rng = random.Random(seed)
    n_q, n_k = rng.randint(1, 40), rng.randint(1, 40)
    n_sets = rng.choice([1, 3, 50])
    check(torch.randint(n_sets, (2, n_q)), torch.randint(n_sets, (rng.choice([1, 2]), n_k)))


def test_strided_tensors() -> None:
    dense = reference.rank_mask(PER_ROW)
    qkv = tuple(
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(dense, n_kv_heads=2)
    )
    check_attention(lambda *x: set_masked_attention(*x, PER_ROW, return_lse=True), qkv, dense)


def test_sorted_ranks_are_the_interval_mask() -> None:
    q, k, v = random_qkv(reference.rank_mask(SETS), dtype=torch.float32)
    expected = interval_attention(q, k, v, IntervalMask.from_ranks(SETS))
    assert torch.equal(set_masked_attention(q, k, v, SETS), expected)


def test_tokens_may_come_in_any_order() -> None:
    """Permuting the tokens with their ranks permutes the output."""
    q, k, v = random_qkv(reference.rank_mask(SETS))
    order = torch.randperm(37)
    out = set_masked_attention(q, k, v, SETS)
    shuffled = set_masked_attention(*(x[:, :, order] for x in (q, k, v)), SETS[order])
    torch.testing.assert_close(shuffled, out[:, :, order], atol=1e-12, rtol=0)


def test_sorting_is_stable() -> None:
    """Tokens of one set stay in their order, so equal inputs give bitwise equal results."""
    rank = torch.arange(37) % 3
    q, k, v = random_qkv(reference.rank_mask(rank), dtype=torch.float32)
    order = rank.argsort(stable=True)
    out = set_masked_attention(q, k, v, rank)
    by_hand = set_masked_attention(*(x[:, :, order] for x in (q, k, v)), rank[order])
    assert torch.equal(out[:, :, order], by_hand)


def test_inputs_are_never_written() -> None:
    q, k, v = random_qkv(reference.rank_mask(PER_ROW))
    rank = PER_ROW.clone()
    before = [x.clone() for x in (q, k, v, rank)]
    out = set_masked_attention(*(x.requires_grad_() for x in (q, k, v)), rank)
    out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, rank), before, strict=True))
