"""Counter-based normal random numbers inside a kernel: Philox4x32-10 and Box-Muller.

    r0, r1, r2, r3 = philox4x32-10(counter = (i mod 2^32, i div 2^32, 0, 0), key = seed)
    u_k = (r_k div 2^9 + 1/2) 2^-23                      in (0, 1), exact in fp32
    n_0 + i n_1 = sqrt(-2 ln u_0) exp(2 pi i u_1)        and n_2, n_3 of u_2, u_3

One 64-bit counter i gives four normals with absolute value at most 5.77. Bits and uniforms are
identical on every device (`philox_portable.py` on a CPU), normals agree within 2e-6. The logarithm
is a series, because the hardware's has an error of 3e-4 in sqrt(-2 ln u) for u close to 1.

Used by `pyramid.py`. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

import triton
import triton.language as tl

from ..common.jit import cos_sin


@triton.jit
def uniforms(seed, counter):
    """Four fp32 tensors, uniform in (0, 1), of the shape of the int64 ``counter``."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, high, low * 0, low * 0)  # pyright: ignore
    return _unit(r0), _unit(r1), _unit(r2), _unit(r3)


@triton.jit
def normals(seed, counter):
    """Four fp32 tensors, standard normal, of the shape of the int64 ``counter``."""
    u0, u1, u2, u3 = uniforms(seed, counter)  # pyright: ignore
    n0, n1 = _box_muller(u0, u1)
    n2, n3 = _box_muller(u2, u3)
    return n0, n1, n2, n3


@triton.jit
def _unit(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _box_muller(u, turns):
    radius = tl.sqrt(-2.0 * _log(u))
    cosine, sine = cos_sin(turns, tl.float32)
    return radius * cosine, radius * sine


@triton.jit
def _log(x):
    """Natural logarithm of a normal fp32 number, relative error about 2e-7 also close to 1."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # x = 2^exponent m, m in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    # ln m = 2 artanh(s) = 2 (s + s^3/3 + ... ), |s| < 0.172: terms after s^11 are below 1e-9 s
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    series = s2 * 0 + 1.0 / 11
    for i in tl.static_range(4, -1, -1):  # pyright: ignore
        series = 1.0 / (2 * i + 1) + s2 * series
    return exponent.to(tl.float32) * 0.6931471805599453 + 2.0 * s * series
