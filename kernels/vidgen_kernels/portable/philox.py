"""Philox4x32-10 and its normals on a CPU: the numbers that `vidgen_kernels.philox` has.

32-bit words are kept in int64 tensors; a 64-bit product wraps around to the same bits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four random words of each counter: four words, int64 ``[N]`` with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # What stands above the low word of c1 and c3 is cut with the rest, once per word.
        c0 = (p2 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = p2, p0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return [c0, c1 & WORD, c2, c3 & WORD]


def uniforms(seed: int, first: int, n: int) -> list[Tensor]:
    """Four fp64 ``[n]``, odd multiples of 2^-24, of the counters ``first, first + 1, ...``."""
    index = torch.arange(first, first + n)
    zero = torch.zeros_like(index)
    counter = [index & WORD, (index >> 32) & WORD, zero, zero]
    words = philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))
    return [(word >> 9).double().add_(0.5).mul_(2.0**-23) for word in words]


def normals(seed: int, first: int, n: int) -> list[Tensor]:
    """Four fp32 ``[n]``, two pairs of Box and Muller, of the counters ``first, first + 1, ...``."""
    found = []
    u = uniforms(seed, first, n)
    for size, turns in ((u[0], u[1]), (u[2], u[3])):
        radius = size.log_().mul_(-2.0).sqrt_()
        angle = turns.mul_(2 * math.pi)
        found += [radius * angle.cos(), radius * angle.sin()]
    return [x.float() for x in found]
