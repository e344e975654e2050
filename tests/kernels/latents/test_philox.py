"""The random stream: published test vectors, the same numbers wherever it runs, and their shape."""

import math
import random

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from vidgen_kernels.common.launch import is_interpreted
from vidgen_kernels.latents import philox
from vidgen_kernels.latents import philox_portable as portable

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
FIRST = [0, 2**32 - 5, 2**40 + 7]

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.portable_only
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    found = portable.philox4x32([torch.tensor([word]) for word in words(counter)], (k0, k1))
    assert [int(word) for word in found] == words(expected)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """As the paper has it, on Python's integers."""
    c, k, mask = list(counter), list(key), 2**32 - 1
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & mask, a >> 32 ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


@pytest.mark.portable_only
def test_words_are_those_of_exact_integers() -> None:
    rng = random.Random(0)
    key = (rng.getrandbits(32), rng.getrandbits(32))
    counters = [[rng.getrandbits(32) for _ in range(4)] for _ in range(200)]
    found = portable.philox4x32(list(torch.tensor(counters).T), key)
    assert torch.stack(found, dim=1).tolist() == [scalar_philox(c, list(key)) for c in counters]


@pytest.mark.portable_only
def test_key_is_the_seed_and_counter_the_index() -> None:
    for seed in SEEDS:
        for first in FIRST:
            found = torch.stack(portable.uniforms(seed, first, 9), dim=1)
            key = [seed % 2**32, seed % 2**64 >> 32]
            for i, row in enumerate(found.tolist()):
                bits = scalar_philox([(first + i) % 2**32, first + i >> 32, 0, 0], key)
                assert row == [((word >> 9) + 0.5) / 2**23 for word in bits]


@triton.jit
def _draw_kernel(seed_ptr, uniforms_ptr, normals_ptr, first: tl.int64, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    u0, u1, u2, u3 = philox.uniforms(seed, first + offs)
    n0, n1, n2, n3 = philox.normals(seed, first + offs)
    tl.store(uniforms_ptr + offs, u0)
    tl.store(uniforms_ptr + BLOCK + offs, u1)
    tl.store(uniforms_ptr + 2 * BLOCK + offs, u2)
    tl.store(uniforms_ptr + 3 * BLOCK + offs, u3)
    tl.store(normals_ptr + offs, n0)
    tl.store(normals_ptr + BLOCK + offs, n1)
    tl.store(normals_ptr + 2 * BLOCK + offs, n2)
    tl.store(normals_ptr + 3 * BLOCK + offs, n3)


@triton.jit
def _box_muller_kernel(size_ptr, turns_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    cosine, sine = philox._box_muller(tl.load(size_ptr + offs), tl.load(turns_ptr + offs))
    tl.store(out_ptr + offs, cosine)
    tl.store(out_ptr + BLOCK + offs, sine)


def check_draws(device: str) -> None:
    """Uniforms are equal, normals within 2e-6."""
    n = 1 << 12
    for seed in SEEDS:
        for first in FIRST:
            drawn = torch.empty(2, 4, n, device=device)
            _draw_kernel[(1,)](torch.tensor([seed], device=device), *drawn, first, BLOCK=n)
            uniforms, normals = drawn.double().cpu()
            assert torch.equal(uniforms, torch.stack(portable.uniforms(seed, first, n)))
            expected = torch.stack(portable.normals(seed, first, n)).double()
            assert (normals - expected).abs().max() <= 2e-6


def check_box_muller(device: str) -> None:
    """Also where the radius is smallest and largest, and at all octants."""
    near = torch.arange(1, 2049, 2, dtype=torch.float64) * 2.0**-24
    size = torch.cat([near, 1 - near, torch.linspace(0.01, 0.99, 2048, dtype=torch.float64)])
    turns = torch.linspace(2.0**-24, 1 - 2.0**-24, 4096, dtype=torch.float64).float()
    size, turns = size.float(), turns[torch.randperm(4096)]
    out = torch.empty(2, 4096, device=device)
    _box_muller_kernel[(1,)](size.to(device), turns.to(device), out, BLOCK=4096)
    radius, angle = (-2 * size.double().log()).sqrt(), 2 * math.pi * turns.double()
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()])
    error = (out.double().cpu() - expected).abs()
    assert (error <= 4e-7 * radius).all()  # so at most 2e-6 at the largest, 5.77


kernels_only = pytest.mark.skipif(not is_interpreted(), reason="needs interpreted kernels")


@kernels_only
def test_interpreted_kernels_draw_the_same() -> None:
    check_draws("cpu")


@kernels_only
def test_interpreted_logarithm_and_angles() -> None:
    check_box_muller("cpu")


@pytest.mark.gpu
def test_compiled_kernels_draw_the_same(device: str) -> None:
    check_draws(device)


@pytest.mark.gpu
def test_compiled_logarithm_and_angles(device: str) -> None:
    check_box_muller(device)


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return torch.stack(portable.normals(7, 0, 1 << 18)).double()  # [4, N]


@pytest.mark.portable_only
def test_normals_are_standard_and_independent(sample: Tensor) -> None:
    """Moments and correlations within 5.5 standard errors: false alarms 4e-8 for each of 30."""
    n = sample.shape[1]
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (sample**power).mean(dim=1) - moment
        assert (error.abs() <= 5.5 * math.sqrt(variance / n)).all()
    for x in (sample, sample.square() - 1):  # within a counter
        correlation = x @ x.T / n / x.square().mean()
        assert (correlation.triu(1).abs() <= 5.5 / math.sqrt(n)).all()
    following = (sample[:, 1:] * sample[:, :-1]).mean(dim=1)  # from one to the next
    assert (following.abs() <= 5.5 / math.sqrt(n)).all()


@pytest.mark.portable_only
def test_normals_have_the_normal_distribution(sample: Tensor) -> None:
    """Kolmogorov and Smirnov: P(sqrt(n) D > 2.7) < 1e-6."""
    x = sample.flatten().sort().values
    below = torch.special.ndtr(x)
    n = len(x)
    distance = max(
        (torch.arange(1, n + 1) / n - below).max().item(),
        (below - torch.arange(n) / n).max().item(),
    )
    assert math.sqrt(n) * distance < 2.7
