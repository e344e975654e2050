"""Tensors whose last dim is not contiguous, as in ``conv(x).mT``, are copied."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vidgen_kernels import (
    Modulation,
    QKVStream,
    feature_cache,
    post_norm_adaln,
    post_norm_residual,
    qk_norm_rope,
    residual_norm,
)

ROWS, COLUMNS, HEAD = (2, 6, 24), (24,), (8,)
PER_BATCH = (2, 24)


def _residual_norm(x, f, gate, scale, shift, weight, bias):
    vectors = Modulation(gate, scale, shift)
    return residual_norm(
        x, f, **vectors._asdict(), text=vectors, text_length=2, weight=weight, bias=bias
    )


def _segment(x, f, total, scale, shift):
    gate = torch.tensor(0.3, dtype=x.dtype)
    return feature_cache.segment(x, f, total, gate, 2, scale=scale, shift=shift)


def _mix(y, oldest, older):
    gate = torch.tensor(0.3, dtype=y.dtype)
    return feature_cache.mix(y, None, gate, 3, older=[oldest, older])


def _post_norm_residual(x, f, gate, weight, bias):
    return [post_norm_residual(x, f, gate=gate, weight=weight, bias=bias)]


def _post_norm_adaln(x, f, gate, scale, shift, weight, bias):
    return post_norm_adaln(x, f, gate=gate, scale=scale, shift=shift, weight=weight, bias=bias)


def _qk_norm_rope(q, k, v, text, weight, bias):
    stream = QKVStream((q, k, v), weight, weight, bias, bias)
    positions = torch.arange(6.0, dtype=torch.float64)[:, None]
    text = QKVStream((text, text, text), weight, bias)
    return qk_norm_rope(stream, positions, HEAD, n_heads=3, text=text, norm="layer")


OPERATORS = {
    "residual_norm": (_residual_norm, [ROWS] * 2 + [PER_BATCH] * 3 + [COLUMNS] * 2),
    "segment": (_segment, [ROWS] * 5),
    "mix": (_mix, [ROWS] * 3),
    "post_norm_residual": (_post_norm_residual, [ROWS, ROWS, PER_BATCH, COLUMNS, COLUMNS]),
    "post_norm_adaln": (_post_norm_adaln, [ROWS] * 5 + [COLUMNS] * 2),
    "qk_norm_rope": (_qk_norm_rope, [ROWS] * 4 + [HEAD] * 2),
}


def _strided(x: Tensor) -> Tensor:
    x = torch.stack([x, x], -1)[..., 0] if x.ndim == 1 else x.mT.contiguous().mT
    assert x.stride(-1) > 1
    return x


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_like_contiguous(name: str) -> None:
    call: Callable[..., list[Tensor]]
    call, shapes = OPERATORS[name]
    rows = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    columns = [_strided(x.detach()).requires_grad_() for x in rows]
    expected, results = ([y for y in call(*given) if y is not None] for given in (rows, columns))
    gradients = [torch.randn_like(y) for y in expected]
    expected = [*expected, *torch.autograd.grad(expected, rows, gradients)]
    gradients = list(map(_strided, gradients))
    results = [*results, *torch.autograd.grad(results, columns, gradients)]
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
