"""Philox4x32-10 and its normals on a CPU: the same stream as `philox.py`.

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
    del counter  # frees its memory for the next round
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # c1 and c3 stay unmasked: the masks of c0 and c2 in the next round cover them.
        c0 = (p2 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = p2, p0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return [c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)]


def uniforms(seed: int, first: int, n: int) -> list[Tensor]:
    """Four fp64 ``[n]``, odd multiples of 2^-24, of the counters ``first, first + 1, ...``."""
    words = philox4x32(_counter(first, n), (seed & WORD, (seed >> 32) & WORD))
    words.reverse()
    found = []
    while words:  # frees each word once it is converted
        found.append(words.pop().bitwise_right_shift_(9).double().add_(0.5).mul_(2.0**-23))
    return found


def _counter(first: int, n: int) -> list[Tensor]:
    index = torch.arange(first, first + n)
    zero = torch.zeros_like(index)
    high = (index >> 32).bitwise_and_(WORD)
    return [index.bitwise_and_(WORD), high, zero, zero]


def normals(seed: int, first: int, n: int) -> list[Tensor]:
    """Four fp32 ``[n]``, two pairs of Box and Muller, of the counters ``first, first + 1, ...``."""
    u0, u1, u2, u3 = uniforms(seed, first, n)
    return [*_box_muller(u0, u1), *_box_muller(u2, u3)]


def _box_muller(u: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = turns.mul_(2 * math.pi)
    return angle.cos().mul_(radius).float(), angle.sin_().mul_(radius).float()
