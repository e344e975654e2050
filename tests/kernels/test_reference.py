"""The definitions themselves, once, by loops over single numbers."""

import math

import pytest
import torch
from torch import Tensor

from vidgen_kernels import reference

pytestmark = pytest.mark.portable_only


def loop(n_batch: int, n_queries: int, n_keys: int, sees) -> Tensor:
    return torch.tensor(
        [[[sees(b, i, j) for j in range(n_keys)] for i in range(n_queries)] for b in range(n_batch)]
    ).reshape(n_batch, n_queries, n_keys)


LENGTHS = [2, 3, 0, 1, 2]
BLOCK = [0, 0, 1, 1, 1, 3, 4, 4]


def is_near(i: int, j: int, window: int | None, sinks: int) -> bool:
    return window is None or j > i - window or j < sinks


RULES = [(None, 0), (1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize(("window", "sinks"), RULES)
def test_block_causal(window: int | None, sinks: int) -> None:
    def sees(b, i, j):
        i, j = BLOCK[i], BLOCK[j]
        return j <= i and is_near(i, j, window, sinks)

    full = loop(1, 8, 8, sees)
    assert torch.equal(reference.block_causal_mask(LENGTHS, None, window, sinks), full)
    rows = reference.block_causal_mask(LENGTHS, range(1, 4), window, sinks)
    assert torch.equal(rows, full[:, 2:6])


@pytest.mark.parametrize(("window", "sinks"), RULES)
def test_teacher_forcing(window: int | None, sinks: int) -> None:
    def sees(b, i, j):
        noisy_query, noisy_key = i >= 8, j >= 8
        i, j = BLOCK[i % 8], BLOCK[j % 8]
        if noisy_key:
            return noisy_query and i == j
        return (j < i if noisy_query else j <= i) and is_near(i, j, window, sinks)

    mask = reference.teacher_forcing_mask(LENGTHS, window, sinks)
    assert torch.equal(mask, loop(1, 16, 16, sees))


def test_full_and_ranks() -> None:
    sequence_of_key = [0, 1, 1, 1, 2, 2]
    mask = loop(1, 8, 6, lambda b, i, j: [0, 0, 0, 1, 1, 2, 2, 2][i] == sequence_of_key[j])
    assert torch.equal(reference.full_mask([3, 2, 3], [1, 3, 2]), mask)

    rank_q, rank_k = torch.tensor([[3, 0, 1], [2, 2, 5]]), torch.tensor([1, 0, 4, 2])
    mask = loop(2, 3, 4, lambda b, i, j: bool(rank_k[j] <= rank_q[b, i]))
    assert torch.equal(reference.rank_mask(rank_q, rank_k), mask)
    assert torch.equal(
        reference.rank_mask(rank_k), loop(1, 4, 4, lambda b, i, j: bool(rank_k[j] <= rank_k[i]))
    )


def test_pack_and_padded_text() -> None:
    one, two = torch.rand(1, 3, 2) < 0.5, torch.rand(2, 2, 4) < 0.5
    expected = loop(
        2,
        5,
        6,
        lambda b, i, j: bool(
            one[0, i, j] if i < 3 and j < 2 else i >= 3 and j >= 2 and two[b, i - 3, j - 2]
        ),
    )
    assert torch.equal(reference.pack_masks([one, two]), expected)

    valid = [1, 3]
    mask = torch.rand(1, 5, 6) < 0.7
    for text_queries in (False, True):
        expected = loop(
            2,
            5,
            6,
            lambda b, i, j, text_queries=text_queries: bool(
                mask[0, i, j] and not valid[b] <= j < 4 and not (text_queries and valid[b] <= i < 4)
            ),
        )
        assert torch.equal(reference.pad_text_mask(mask, 4, valid, text_queries), expected)


def test_attention() -> None:
    """Two query heads share a key head; the last query sees nothing."""
    q, k, v = (torch.randn(1, h, t, 3).double() for h, t in ((2, 4), (1, 5), (1, 5)))
    mask = torch.rand(1, 4, 5) < 0.6
    mask[0, :3, 0], mask[0, 3] = True, False
    scale = 0.3
    out, lse = reference.attention(q, k, v, mask, scale)
    for h in range(2):
        for i in range(3):
            weights = [
                math.exp(scale * sum(q[0, h, i, d].item() * k[0, 0, j, d].item() for d in range(3)))
                if mask[0, i, j]
                else 0.0
                for j in range(5)
            ]
            assert lse[0, h, i].item() == pytest.approx(math.log(sum(weights)), abs=1e-13)
            for d in range(3):
                mean = sum(w * v[0, 0, j, d].item() for j, w in enumerate(weights)) / sum(weights)
                assert out[0, h, i, d].item() == pytest.approx(mean, abs=1e-13)
    assert not out[:, :, 3].any() and (lse[:, :, 3] == float("-inf")).all()


def test_gradients() -> None:
    """Autograd, finite differences and the closed form agree; empty rows give zero."""
    mask = torch.rand(2, 4, 5) < 0.6
    mask[:, :3, 0], mask[:, 3], mask[:, :, 4] = True, False, False
    q, k, v = (
        torch.randn(2, h, t, 3, dtype=torch.float64, requires_grad=True)
        for h, t in ((4, 4), (2, 5), (2, 5))
    )

    def seen_part(q, k, v):
        out, lse = reference.attention(q, k, v, mask)
        return out, lse[:, :, :3]

    assert torch.autograd.gradcheck(seen_part, (q, k, v))

    out, lse = reference.attention(q, k, v, mask)
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    by_autograd = torch.autograd.grad([out, lse], [q, k, v], [do, dlse])
    closed = reference.attention_gradients(do, dlse, q, k, v, out, lse, mask)
    for a, b in zip(by_autograd, closed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    dq, dk, dv = by_autograd
    assert not dq[:, :, 3].any() and not dk[:, :, 4].any() and not dv[:, :, 4].any()
