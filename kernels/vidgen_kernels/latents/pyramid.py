"""Resampling between the stages of a pyramid, with corrective noise: forward and backward.

    downsample        y = mean4(x)                      2 mean4(x) for noise
    upsample_renoise  out = alpha nearest2(x) + beta eta
                      eta = sqrt(1 + gamma) (z - mean4 z) + sqrt(1 - 3 gamma) mean4 z

mean4 is the mean of each 2 x 2 block (if H or W is odd, a bilinear resize), nearest2 repeats each
value over a block. z is white noise. eta has unit variance, covariance -gamma between the pixels of
a block and 0 between blocks; at gamma = 1/3 it sums to 0 over each block. With alpha and beta of
`renoise_coefficients` the noise in ``out`` is white again.

Shapes: x [B, C, T, H, W]; y [B, C, T, H//2, W//2]; out, z, eta [B, C, T, 2H, 2W].

`blocks.py` says how kernels are tiled. mean4 is the transpose of nearest2 divided by 4, so the
backward has the same form as the forward, and nothing is summed across programs. Noise z drawn from
a seed stays in registers: one Philox counter gives the four normals of a block (`philox.py`), so
the values depend neither on the dtype nor on the launch configuration.

Pyramid Flow (arXiv 2410.05954).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import (
    check_number,
    check_tensor,
    check_video,
    is_int_or_symbol,
    refuse_tangents,
)
from ..common.jit import scalar
from ..common.registration import define_op, refuse_double_backward
from . import pyramid_portable as portable
from .blocks import (
    SIZES,
    load_high,
    load_low,
    nearest2,
    plane_offset,
    rows,
    store_high,
    store_low,
    sum4,
    tile,
    tiling,
)
from .philox import normals


@triton.jit(do_not_specialize=SIZES)
def _downsample_fwd_kernel(
    x_ptr, y_ptr, stride_x, n_channels, n_frames, height, width_vectors,
    factor: tl.float64,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = factor mean4(x), for even H and W."""
    shape = (n_channels, n_frames, height, width_vectors * VECTOR)
    plane, low, high = tile(shape, BLOCK)  # pyright: ignore
    # [2, 2 BLOCK]
    x = load_high(x_ptr, stride_x, plane, high, shape, VECTOR, ACC)
    store_low(y_ptr, scalar(factor, ACC) * 0.25 * sum4(x), plane, low, shape)


@triton.jit
def _source(i, n_in, n_out, ACC: tl.constexpr):
    """Output ``i`` reads ``(1 - weight) x[first] + weight x[first + 1]`` along an axis.

    Its centre is at ``(i + 1/2) n_in / n_out - 1/2``; centres are at least 2 inputs apart.
    """
    position = (2 * i.to(tl.int64) + 1) * n_in - n_out  # in units of 1 / (2 n_out)
    first = position // (2 * n_out)
    return first, (position - first * (2 * n_out)).to(ACC) / (2 * n_out)


@triton.jit
def _reader(p, n_in, n_out, ACC: tl.constexpr):
    """The one output that may read input ``p`` (clamped to the range), and the weight it gives."""
    i = ((2 * p.to(tl.int64) - 1) * n_out + n_in - 1) // (2 * n_in)
    distance = tl.abs((2 * i + 1) * n_in - n_out - 2 * n_out * p).to(ACC) / (2 * n_out)  # pyright: ignore
    weight = tl.where((i < n_out) & (distance < 1.0), 1.0 - distance, 0.0)
    return tl.minimum(i, n_out - 1), weight


@triton.jit(do_not_specialize=SIZES)
def _downsample_odd_fwd_kernel(
    x_ptr, y_ptr, stride_x, n_channels, n_frames, height, width_vectors,
    factor: tl.float64,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = factor times the bilinear resize of x, for any H and W."""
    shape = (n_channels, n_frames, height, width_vectors * VECTOR)
    plane, low, _ = tile(shape, BLOCK)  # pyright: ignore
    n_rows, n_columns = height // 2, shape[3] // 2
    # [BLOCK]
    row, down = _source(low // n_columns, height, n_rows, ACC)
    column, right = _source(low % n_columns, shape[3], n_columns, ACC)
    ptrs = x_ptr + plane_offset(plane, shape, stride_x)
    y = tl.zeros([BLOCK], ACC)
    for i in tl.static_range(4):  # pyright: ignore
        corner = ptrs + (row + i // 2) * stride_x[3] + (column + i % 2) * stride_x[4]
        weight = (down if i // 2 else 1.0 - down) * (right if i % 2 else 1.0 - right)
        y += weight * tl.load(corner, mask=low < n_rows * n_columns, other=0.0).to(ACC)
    store_low(y_ptr, scalar(factor, ACC) * y, plane, low, shape)


@triton.jit(do_not_specialize=SIZES)
def _downsample_odd_bwd_kernel(
    dy_ptr, dx_ptr, stride_dy, n_channels, n_frames, height, width_vectors,
    factor: tl.float64,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx: the transpose of `_downsample_odd_fwd_kernel`. Each input has at most one reader."""
    shape = (n_channels, n_frames, height, width_vectors * VECTOR)
    plane, _, high = tile(shape, BLOCK)  # pyright: ignore
    # [2, 2 BLOCK], and [2 BLOCK] for columns
    row, down = _reader(rows(high, shape), height, height // 2, ACC)
    column, right = _reader(high % shape[3], shape[3], shape[3] // 2, ACC)
    ptrs = dy_ptr + plane_offset(plane, shape, stride_dy)
    ptrs += row * stride_dy[3] + (column * stride_dy[4])[None, :]
    dy = tl.load(ptrs, mask=rows(high, shape) < height, other=0.0).to(ACC)
    dx = scalar(factor, ACC) * down * right[None, :] * dy
    store_high(dx_ptr, dx, plane, high, shape)


@triton.jit(do_not_specialize=(*SIZES, "offset"))
def _upsample_fwd_kernel(
    x_ptr, noise_ptr, seed_ptr, out_ptr, stride_x, stride_noise,
    n_channels, n_frames, height, width_vectors,
    offset: tl.int64, alpha: tl.float64, noise_factor: tl.float64, mean_factor: tl.float64,
    HAS_X: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_SEED: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = nearest2(alpha x + mean_factor mean4(z)) + noise_factor z."""
    shape = (n_channels, n_frames, height, width_vectors * VECTOR)
    plane, low, high = tile(shape, BLOCK)  # pyright: ignore
    base = tl.zeros([BLOCK], ACC)
    if HAS_X:
        base += scalar(alpha, ACC) * load_low(x_ptr, stride_x, plane, low, shape, VECTOR, ACC)
    noise_factor, mean_factor = scalar(noise_factor, ACC), scalar(mean_factor, ACC)
    if HAS_NOISE:
        # [2, 2 BLOCK]
        z = load_high(noise_ptr, stride_noise, plane, high, shape, VECTOR, ACC)
        out = nearest2(base + mean_factor * 0.25 * sum4(z)) + noise_factor * z
    elif HAS_SEED:
        counter = offset + plane.to(tl.int64) * ((height // 2) * (shape[3] // 2)) + low
        # [BLOCK] each: top left, top right, bottom left, bottom right of a block
        z0, z1, z2, z3 = normals(tl.load(seed_ptr), counter)
        z0, z1, z2, z3 = z0.to(ACC), z1.to(ACC), z2.to(ACC), z3.to(ACC)
        base += mean_factor * 0.25 * ((z0 + z2) + (z1 + z3))
        # [2 BLOCK]
        top = tl.interleave(base + noise_factor * z0, base + noise_factor * z1)
        bottom = tl.interleave(base + noise_factor * z2, base + noise_factor * z3)
        # [2, 2 BLOCK]
        out = tl.trans(tl.join(top, bottom))
    else:
        out = tl.broadcast_to(nearest2(base), [2, 2 * BLOCK])
    store_high(out_ptr, out, plane, high, shape)


@triton.jit(do_not_specialize=SIZES)
def _upsample_bwd_kernel(
    dout_ptr, dx_ptr, dnoise_ptr, stride_dout, n_channels, n_frames, height, width_vectors,
    alpha: tl.float64, noise_factor: tl.float64, mean_factor: tl.float64,
    HAS_DX: tl.constexpr, HAS_DNOISE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = alpha sum4(dout), dz = noise_factor dout + mean_factor nearest2(mean4(dout))."""
    shape = (n_channels, n_frames, height, width_vectors * VECTOR)
    plane, low, high = tile(shape, BLOCK)  # pyright: ignore
    # [2, 2 BLOCK]
    dout = load_high(dout_ptr, stride_dout, plane, high, shape, VECTOR, ACC)
    # [BLOCK]
    total = sum4(dout)
    if HAS_DX:
        store_low(dx_ptr, scalar(alpha, ACC) * total, plane, low, shape)
    if HAS_DNOISE:
        mean = nearest2(scalar(mean_factor, ACC) * 0.25 * total)
        store_high(dnoise_ptr, mean + scalar(noise_factor, ACC) * dout, plane, high, shape)


def _launch_downsample_fwd(x: Tensor, factor: float) -> Tensor:
    y = _empty_downsample_fwd(x, factor)
    kernel = _downsample_fwd_kernel if _has_even_sizes(x) else _downsample_odd_fwd_kernel
    grid, sizes, constants = tiling(y, [x])
    if grid[0]:
        kernel[grid](x, y, x.stride(), *sizes, factor, **constants)
    return y


def _launch_downsample_bwd(dy: Tensor, height: int, width: int, factor: float) -> Tensor:
    dx = _empty_downsample_bwd(dy, height, width, factor)
    if _has_even_sizes(dx):
        return _upsample(dx, dy, None, None, 0, factor / 4, 0.0, 0.0)
    grid, sizes, constants = tiling(dx, [dx])
    if grid[0]:
        _downsample_odd_bwd_kernel[grid](dy, dx, dy.stride(), *sizes, factor, **constants)
    return dx


def _launch_upsample_renoise_fwd(
    x: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int,
    alpha: float, noise_factor: float, mean_factor: float,
) -> Tensor:  # fmt: skip
    out = _empty_upsample_renoise_fwd(x)
    return _upsample(out, x, noise, seed, offset, alpha, noise_factor, mean_factor)


def _launch_block_noise(
    seed: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype,
    noise_factor: float, mean_factor: float,
) -> Tensor:  # fmt: skip
    out = seed.new_empty(shape, dtype=dtype)
    return _upsample(out, None, None, seed, offset, 0.0, noise_factor, mean_factor)


def _upsample(
    out: Tensor, x: Tensor | None, noise: Tensor | None, seed: Tensor | None, offset: int,
    alpha: float, noise_factor: float, mean_factor: float,
) -> Tensor:  # fmt: skip
    high = [out] if noise is None else [out, noise]
    grid, sizes, constants = tiling(out, high, [] if x is None else [x])
    if grid[0]:
        _upsample_fwd_kernel[grid](
            x, noise, seed, out, *((out if t is None else t).stride() for t in (x, noise)),
            *sizes, offset, alpha, noise_factor, mean_factor,
            HAS_X=x is not None, HAS_NOISE=noise is not None, HAS_SEED=seed is not None,
            **constants,
        )  # fmt: skip
    return out


def _launch_upsample_renoise_bwd(
    dout: Tensor, needs_dx: bool, noise_dtype: torch.dtype | None,
    alpha: float, noise_factor: float, mean_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dnoise = _empty_upsample_renoise_bwd(dout, needs_dx, noise_dtype)
    grid, sizes, constants = tiling(dout, [dout])
    if grid[0]:
        _upsample_bwd_kernel[grid](
            dout, dx, dnoise, dout.stride(), *sizes, alpha, noise_factor, mean_factor,
            HAS_DX=needs_dx, HAS_DNOISE=noise_dtype is not None, **constants,  # pyright: ignore
        )  # fmt: skip
    return dx, dnoise


def _has_even_sizes(x: Tensor) -> bool:
    return x.shape[3] % 2 == x.shape[4] % 2 == 0


def _empty_downsample_fwd(x: Tensor, factor: float) -> Tensor:
    return x.new_empty(*x.shape[:3], x.shape[3] // 2, x.shape[4] // 2)


def _empty_downsample_bwd(dy: Tensor, height: int, width: int, factor: float) -> Tensor:
    return dy.new_empty(*dy.shape[:3], height, width)


def _empty_upsample_renoise_fwd(x: Tensor, *args) -> Tensor:
    return x.new_empty(*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])


def _empty_upsample_renoise_bwd(
    dout: Tensor, needs_dx: bool, noise_dtype: torch.dtype | None, *args
) -> tuple[Tensor, Tensor]:
    """dx and dnoise. An operator cannot return None: one not needed has no elements."""
    low = (*dout.shape[:3], dout.shape[3] // 2, dout.shape[4] // 2)
    dx = dout.new_empty(low if needs_dx else 0)
    return dx, dout.new_empty(0 if noise_dtype is None else dout.shape, dtype=noise_dtype)


def _empty_block_noise(seed: Tensor, offset: int, shape, dtype: torch.dtype, *args) -> Tensor:
    return seed.new_empty(shape, dtype=dtype)


downsample_op = define_op(
    "downsample_fwd", _launch_downsample_fwd, portable.downsample_fwd, _empty_downsample_fwd
)
downsample_bwd_op = define_op(
    "downsample_bwd", _launch_downsample_bwd, portable.downsample_bwd, _empty_downsample_bwd
)
upsample_renoise_op = define_op(
    "upsample_renoise_fwd",
    _launch_upsample_renoise_fwd,
    portable.upsample_renoise_fwd,
    _empty_upsample_renoise_fwd,
)
upsample_renoise_bwd_op = define_op(
    "upsample_renoise_bwd",
    _launch_upsample_renoise_bwd,
    portable.upsample_renoise_bwd,
    _empty_upsample_renoise_bwd,
)
block_noise_op = define_op(
    "block_noise", _launch_block_noise, portable.block_noise, _empty_block_noise
)


def _setup_downsample(ctx, inputs, output):
    x, ctx.factor = inputs
    ctx.height, ctx.width = x.shape[3:]


def _downsample_backward(ctx, dy):
    return downsample_bwd_op(dy, ctx.height, ctx.width, ctx.factor), None


def _setup_upsample_renoise(ctx, inputs, output):
    _, noise, _, _, *ctx.factors = inputs
    ctx.noise_dtype = None if noise is None else noise.dtype


def _upsample_renoise_backward(ctx, dout):
    needs_dx, needs_dnoise, *_ = ctx.needs_input_grad
    noise_dtype = ctx.noise_dtype if needs_dnoise else None
    dx, dnoise = upsample_renoise_bwd_op(dout, needs_dx, noise_dtype, *ctx.factors)
    return dx if needs_dx else None, dnoise if needs_dnoise else None, *[None] * 5


downsample_op.register_autograd(_downsample_backward, setup_context=_setup_downsample)
refuse_double_backward(downsample_bwd_op)
upsample_renoise_op.register_autograd(
    _upsample_renoise_backward, setup_context=_setup_upsample_renoise
)
refuse_double_backward(upsample_renoise_bwd_op)


def downsample(x: Tensor, *, noise: bool = False) -> Tensor:
    """Half the resolution: the mean of each 2 x 2 block, times 2 for noise, which stays white.

    Odd sizes are resized bilinearly, without antialiasing, as ``F.interpolate`` does.

    Args:
        x: ``[B, C, T, H, W]``, bf16, fp16, fp32 or fp64, any strides; H and W at least 2.

    Returns:
        ``[B, C, T, H//2, W//2]`` in the dtype of x, contiguous; calculated in fp32 or wider.

    Raises:
        ValueError: another shape, dtype or device.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_video("x", x)
    if min(x.shape[3:]) < 2:
        raise ValueError(f"x: expected H and W of at least 2, got {list(x.shape)}")
    refuse_tangents(x)
    return downsample_op(x, 2.0 if noise else 1.0)


def upsample_renoise(
    x: Tensor,  # [B, C, T, H, W]
    alpha: float,
    beta: float,
    *,
    gamma: float = 1 / 3,
    noise: Tensor | None = None,  # [B, C, T, 2H, 2W]
    block_noise: Tensor | None = None,  # [B, C, T, 2H, 2W]
    seed: int | Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """``alpha nearest2(x) + beta eta``, the jump from one stage of a pyramid to the next.

    Exactly one of ``noise``, ``block_noise`` and ``seed`` says where eta comes from.

    Args:
        x: bf16, fp16, fp32 or fp64, any strides; so are noise and block_noise, on the device of x.
        alpha, beta: see `renoise_coefficients`.
        gamma: eta has covariance -gamma between the pixels of a block; above 0, at most 1/3.
        noise: white noise z from which eta is made.
        block_noise: eta itself; ``gamma`` is then not used.
        seed: draws z inside the kernel: an int of 64 bits, or an int64 tensor ``[]`` or ``[1]`` on
            the device of x, whose value may change between replays of a CUDA graph.
        offset: first counter of the stream of ``seed``. A call takes ``draws(out.shape)`` of them,
            one for each 2 x 2 block, in the order of B, C, T, H, W.

    Returns:
        ``[B, C, T, 2H, 2W]`` in the dtype of x, contiguous; calculated in fp32 or wider.
        Differentiable in x, noise and block_noise.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; not exactly one source.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_video("x", x)
    check_number("alpha", alpha)
    check_number("beta", beta)
    zero_sum, mean = _mixing(gamma)
    sources = {"noise": noise, "block_noise": block_noise, "seed": seed}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"expected exactly one of noise, block_noise and seed, got {got}")
    shape = (*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])
    z = block_noise if noise is None else noise
    if z is not None:
        check_video(given[0], z, ("x", x))
        if z.shape != shape:
            raise ValueError(f"{given[0]}: expected shape {list(shape)}, got {list(z.shape)}")
    if block_noise is not None:
        zero_sum = mean = 1.0
    seed = None if seed is None else _seed_tensor(seed, offset, shape, x.device)
    if seed is None and offset:
        raise ValueError(f"offset: expected 0 without a seed, got {offset}")
    refuse_tangents(x, noise, block_noise)
    return upsample_renoise_op(x, z, seed, offset, alpha, beta * zero_sum, beta * (mean - zero_sum))


def block_noise(
    shape: Sequence[int],
    *,
    gamma: float = 1 / 3,
    seed: int | Tensor,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The eta that `upsample_renoise` draws: normal noise, correlated within 2 x 2 blocks.

    Args:
        shape: ``[B, C, T, H, W]``, H and W even.
        gamma, seed, offset: as in `upsample_renoise`.
        dtype: bf16, fp16, fp32 or fp64; the normals are fp32 numbers in each.
        device: default that of a seed tensor, else the CPU.

    Returns:
        Noise of this shape with variance 1, covariance -gamma within a block and 0 elsewhere.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit.
    """
    is_shape = len(shape) == 5 and all(is_int_or_symbol(n) and n >= 0 for n in shape)
    if not is_shape or shape[3] % 2 or shape[4] % 2:
        raise ValueError(f"shape: expected [B, C, T, H, W], H and W even, got {list(shape)}")
    zero_sum, mean = _mixing(gamma)
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    # A device without an index is the current one, as for torch.empty.
    check_tensor("block_noise", torch.empty(0, dtype=dtype, device=device))
    seed = _seed_tensor(seed, offset, shape, torch.empty(0, device=device).device)
    return block_noise_op(seed, offset, shape, dtype, zero_sum, mean - zero_sum)


def draws(shape: Sequence[int]) -> int:
    """How many counters noise of this shape takes; add it to ``offset`` for the next call."""
    return math.prod(shape[:3]) * (shape[3] // 2) * (shape[4] // 2)


def renoise_coefficients(sigma: float, gamma: float = 1 / 3) -> tuple[float, float]:
    """``alpha`` and ``beta`` of `upsample_renoise` at noise level ``sigma`` of the finished stage.

    ``alpha = 1 / (sqrt(1 + 1/gamma) sigma + 1 - sigma)``, ``beta = alpha sigma / sqrt(gamma)``:
    for x with signal (1 - sigma) and noise sigma, the noise in ``out`` is white, of weight
    ``1 - alpha (1 - sigma)``.

    Raises:
        ValueError: sigma outside [0, 1] or gamma outside (0, 1/3].
    """
    check_number("sigma", sigma, 0.0, 1.0)
    _mixing(gamma)
    alpha = 1 / (math.sqrt(1 + 1 / gamma) * sigma + 1 - sigma)
    return alpha, alpha * sigma / math.sqrt(gamma)


def _mixing(gamma: float) -> tuple[float, float]:
    """Factors of ``z - mean4 z`` and of ``mean4 z`` in eta."""
    check_number("gamma", gamma)
    if not (gamma > 0 and 3 * gamma <= 1 + 1e-6):  # 1/3, also rounded up in fp32
        raise ValueError(f"gamma: expected above 0 and at most 1/3, got {gamma}")
    return math.sqrt(1 + gamma), math.sqrt(max(1 - 3 * gamma, 0.0))


def _seed_tensor(
    seed: int | Tensor, offset: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """int64 [1] or [] on the device; an int is filled in there, without synchronizing."""
    end = 2**63 - draws(shape)
    if not is_int_or_symbol(offset) or not 0 <= offset < end:
        raise ValueError(f"offset: expected from 0 to {end - 1}, got {offset}")
    if not isinstance(seed, Tensor):
        if not is_int_or_symbol(seed) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        got = f"{seed.dtype} {list(seed.shape)} on {seed.device}"
        raise ValueError(f"seed: expected torch.int64 [] or [1] on {device}, got {got}")
    return seed
