"""Unusual inputs that have a right answer: strides, no heads, extreme scales."""

import pytest
import torch
from torch import Tensor, nn

from vidgen_kernels import IntervalMask, block_causal_attention, set_masked_attention
from vidgen_kernels import interval_attention as attend_intervals

BLOCKS = [3, 5]
RANKS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
ATTENTION = {
    "block_causal": lambda q, k, v, **o: block_causal_attention(q, k, v, BLOCKS, **o),
    "sets": lambda q, k, v, **o: set_masked_attention(q, k, v, RANKS, **o),
    "intervals": lambda q, k, v, **o: attend_intervals(q, k, v, IntervalMask.full([8], [8]), **o),
}
every_attention = pytest.mark.parametrize("name", ATTENTION)


def qkv(dtype: torch.dtype = torch.float64, heads: int = 2) -> list[Tensor]:
    return list(torch.randn(3, 2, heads, 8, 16, dtype=dtype).unbind())


@every_attention
@pytest.mark.parametrize("strided", ["q", "k", "v", "qkv"])
def test_a_last_dim_that_is_not_contiguous_is_copied(name: str, strided: str) -> None:
    """As a transposed view of a convolution's output has it."""
    rows = [x.requires_grad_() for x in qkv()]
    columns = [x.detach().mT.contiguous().mT.requires_grad_() for x in rows]
    mixed = [c if n in strided else r for n, r, c in zip("qkv", rows, columns, strict=True)]
    out, expected = ATTENTION[name](*mixed), ATTENTION[name](*rows)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    do = torch.randn_like(out)
    grads = (torch.autograd.grad(y, x, do) for y, x in ((out, mixed), (expected, rows)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@every_attention
def test_no_heads_give_empty_results(name: str) -> None:
    """As on a rank that was given none."""
    q, k, v = (x.requires_grad_() for x in qkv(heads=0))
    out, lse = ATTENTION[name](q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape


@every_attention
def test_no_key_heads_for_heads_that_ask_are_refused(name: str) -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="multiple of k's, got 2 and 0"):
        ATTENTION[name](q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match="multiple of k's, got 0 and 2"):
        ATTENTION[name](q[:, :0], k, v)


@every_attention
@pytest.mark.parametrize("scale", [1e-46, 1e-42, 1e-38, -1e-46, 0.0])
def test_scales_that_fp32_rounds_to_nothing(name: str, scale: float) -> None:
    """All keys that a query sees have the same weight."""
    q, k, v = qkv(torch.float32)
    out, lse = ATTENTION[name](q, k, v, softmax_scale=scale, return_lse=True)
    expected, expected_lse = ATTENTION[name](*(x.double() for x in (q, k, v)), softmax_scale=0.0,
                                             return_lse=True)  # fmt: skip
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=0)


def test_fp64_has_smaller_scales() -> None:
    q, k, v = (1e30 * x for x in qkv())
    out = ATTENTION["intervals"](q, k, v / 1e30, softmax_scale=1e-60)
    expected = ATTENTION["intervals"](q / 1e30, k / 1e30, v / 1e30, softmax_scale=1.0)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


@every_attention
@pytest.mark.parametrize("scale", [nn.Parameter(torch.tensor(0.1)), torch.tensor(0.1), "0.1"])
def test_a_scale_is_a_number(name: str, scale) -> None:
    """A tensor's gradient would be lost."""
    with pytest.raises(ValueError, match="softmax_scale: expected a finite number, got"):
        ATTENTION[name](*qkv(), softmax_scale=scale)
