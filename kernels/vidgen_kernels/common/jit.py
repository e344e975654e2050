"""Functions that kernels of several families call: row statistics, norms, angles, typed scalars."""

import triton
import triton.language as tl


@triton.jit
def scalar(x, dtype: tl.constexpr):
    """``x``, a float argument of a kernel, as ``dtype``.

    The argument is fp64 in compiled kernels and a Python float in interpreted ones.
    """
    return tl.full([], x, dtype)


@triton.jit
def statistics(x, is_col, n_cols, eps, IS_RMS: tl.constexpr):
    """Mean (0 for RMSNorm) and rstd [ROWS, 1] of rows ``x`` [ROWS, BLOCK_D] over ``n_cols``.

    ``rstd = 1 / sqrt(variance + eps)``. ``x`` is 0 outside ``is_col`` [1, BLOCK_D].
    """
    if IS_RMS:
        mean = tl.zeros([x.shape[0], 1], x.dtype)
    else:
        mean = tl.sum(x, axis=1, keep_dims=True) / n_cols
        x = tl.where(is_col, x - mean, 0.0)
    variance = tl.sum(x * x, axis=1, keep_dims=True) / n_cols
    return mean, 1.0 / tl.sqrt(variance + scalar(eps, x.dtype))


@triton.jit
def normalize(x, is_col, n_cols, eps, IS_RMS: tl.constexpr):
    """``(x - mean) * rstd`` [ROWS, BLOCK_D], 0 outside ``is_col``, and rstd [ROWS, 1].

    Arguments as in `statistics`.
    """
    mean, rstd = statistics(x, is_col, n_cols, eps, IS_RMS)  # pyright: ignore
    x = x if IS_RMS else tl.where(is_col, x - mean, 0.0)
    return x * rstd, rstd


@triton.jit
def normalize_backward(dxhat, xhat, rstd, is_col, n_cols, IS_RMS: tl.constexpr):
    """The gradient dx [ROWS, BLOCK_D] of `normalize`, whose result is ``xhat``.

    dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)), without mean(dxhat) for RMSNorm.
    """
    dx = dxhat - xhat * (tl.sum(dxhat * xhat, axis=1, keep_dims=True) / n_cols)
    if not IS_RMS:
        dx -= tl.sum(dxhat, axis=1, keep_dims=True) / n_cols
    return tl.where(is_col, dx * rstd, 0.0)


@triton.jit
def cos_sin(turns, ACC: tl.constexpr):
    """Cosine and sine of ``turns`` full turns, in ``ACC``.

    Whole turns are removed in the dtype of ``turns``, so large angles lose no accuracy here.
    Taylor series take the place of libdevice, which reduces huge arguments with an array in local
    memory.
    """
    turns = turns - tl.floor(turns + 0.5)  # [-1/2, 1/2)
    quarter = tl.floor(4 * turns + 0.5)  # -2, -1, 0, 1 or 2
    x = ((turns - 0.25 * quarter) * 6.283185307179586).to(ACC)  # [-pi/4, pi/4]
    x2 = x * x
    # Terms up to x^11 and x^10 have errors of 7e-12 and 1e-10, up to x^17 and x^16 below 1e-16.
    sine = x * 0 + 1
    cosine = x * 0 + 1
    n_terms: tl.constexpr = 8 if tl.float64 == ACC else 5  # pyright: ignore
    for i in tl.static_range(n_terms, 0, -1):  # pyright: ignore
        # Horner: 1 - x2 / ((2i)(2i + 1)) (1 - ...)
        sine = 1 - x2 * sine * (1.0 / (2 * i * (2 * i + 1)))
        cosine = 1 - x2 * cosine * (1.0 / (2 * i * (2 * i - 1)))
    sine = x * sine
    quarter = quarter.to(tl.int32)
    swapped = (quarter & 1) == 1
    a = tl.where(swapped, sine, cosine)
    b = tl.where(swapped, cosine, sine)
    # 1/4 turn maps (cos, sin) to (-sin, cos), -1/4 turn to (sin, -cos), 1/2 turn negates both.
    cosine = tl.where((quarter == 1) | (quarter == 2) | (quarter == -2), -a, a)
    sine = tl.where((quarter == -1) | (quarter == 2) | (quarter == -2), -b, b)
    return cosine, sine
