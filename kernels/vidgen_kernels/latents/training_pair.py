"""Input and velocity target of one stage of a pyramid, in one pass: forward and backward.

    start = s noise + (1 - s) nearest2(mean4(clean))         end = e noise + (1 - e) clean
    input = r start + (1 - r) end                         target = start - end

    dstart += r dinput + dtarget                    dnoise = s dstart + e dend
    dend += (1 - r) dinput - dtarget                dclean = (1 - e) dend
                                                             + (1 - s) nearest2(mean4(dstart))

mean4 is the mean of each 2 x 2 block, nearest2 repeats each value over a block. s and e are the
noise levels where the stage starts and ends (`start_sigma`, `end_sigma`), r goes from 1 to 0 in
between (`sigma`). Both ends share their noise, so the path of a stage is a straight line.

Shapes: all tensors [B, C, T, H, W]; r [B]. The kernels go over blocks as `blocks.py` says.

Pyramid Flow (arXiv 2410.05954).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import check_number, check_tensor, check_video, refuse_tangents
from ..common.jit import scalar
from ..common.registration import define_op, refuse_double_backward
from . import training_pair_portable as portable
from .blocks import SIZES, load_high, nearest2, store_high, sum4, tile, tiling


@triton.jit(do_not_specialize=SIZES)
def _training_pair_fwd_kernel(
    clean_ptr, noise_ptr, sigma_ptr, input_ptr, target_ptr, start_ptr, end_ptr,
    stride_clean, stride_noise, stride_sigma, n_channels, n_frames, height, width_vectors,
    start_sigma: tl.float64, end_sigma: tl.float64,
    HAS_LOW: tl.constexpr, HAS_ENDPOINTS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    shape = (n_channels, n_frames, height, width_vectors * VECTOR)
    plane, _, pixel = tile(shape, BLOCK)  # pyright: ignore
    # [2, 2 BLOCK]
    clean = load_high(clean_ptr, stride_clean, plane, pixel, shape, VECTOR, ACC)
    noise = load_high(noise_ptr, stride_noise, plane, pixel, shape, VECTOR, ACC)
    r = _load_sigma(sigma_ptr, stride_sigma, plane, shape, ACC)
    s, e = scalar(start_sigma, ACC), scalar(end_sigma, ACC)
    start, end = s * noise, e * noise + (1.0 - e) * clean
    if HAS_LOW:
        start += nearest2((1.0 - s) * 0.25 * sum4(clean))
    store_high(input_ptr, r * start + (1.0 - r) * end, plane, pixel, shape)
    store_high(target_ptr, start - end, plane, pixel, shape)
    if HAS_ENDPOINTS:
        store_high(start_ptr, start, plane, pixel, shape)
        store_high(end_ptr, end, plane, pixel, shape)


@triton.jit(do_not_specialize=SIZES)
def _training_pair_bwd_kernel(
    dinput_ptr, dtarget_ptr, dstart_ptr, dend_ptr, sigma_ptr, dclean_ptr, dnoise_ptr,
    stride_dinput, stride_dtarget, stride_dstart, stride_dend, stride_sigma,
    n_channels, n_frames, height, width_vectors,
    start_sigma: tl.float64, end_sigma: tl.float64,
    HAS_DINPUT: tl.constexpr, HAS_DTARGET: tl.constexpr,
    HAS_DSTART: tl.constexpr, HAS_DEND: tl.constexpr,
    HAS_DCLEAN: tl.constexpr, HAS_DNOISE: tl.constexpr,
    HAS_LOW: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    shape = (n_channels, n_frames, height, width_vectors * VECTOR)
    plane, _, pixel = tile(shape, BLOCK)  # pyright: ignore
    dstart, dend = tl.zeros([2, 2 * BLOCK], ACC), tl.zeros([2, 2 * BLOCK], ACC)
    if HAS_DINPUT:
        dinput = load_high(dinput_ptr, stride_dinput, plane, pixel, shape, VECTOR, ACC)
        r = _load_sigma(sigma_ptr, stride_sigma, plane, shape, ACC)
        dstart, dend = dstart + r * dinput, dend + (1.0 - r) * dinput
    if HAS_DTARGET:
        dtarget = load_high(dtarget_ptr, stride_dtarget, plane, pixel, shape, VECTOR, ACC)
        dstart, dend = dstart + dtarget, dend - dtarget
    if HAS_DSTART:
        dstart += load_high(dstart_ptr, stride_dstart, plane, pixel, shape, VECTOR, ACC)
    if HAS_DEND:
        dend += load_high(dend_ptr, stride_dend, plane, pixel, shape, VECTOR, ACC)
    s, e = scalar(start_sigma, ACC), scalar(end_sigma, ACC)
    if HAS_DNOISE:
        store_high(dnoise_ptr, s * dstart + e * dend, plane, pixel, shape)
    if HAS_DCLEAN:
        dclean = (1.0 - e) * dend
        if HAS_LOW:
            dclean += nearest2((1.0 - s) * 0.25 * sum4(dstart))
        store_high(dclean_ptr, dclean, plane, pixel, shape)


@triton.jit
def _load_sigma(ptr, stride, plane, shape, ACC: tl.constexpr):
    """r of the batch row of a plane."""
    return tl.load(ptr + plane // shape[1] // shape[0] * stride).to(ACC)


def _launch_fwd(
    clean: Tensor, noise: Tensor, sigma: Tensor, start_sigma: float, end_sigma: float,
    return_endpoints: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    results = _empty_fwd(clean, noise, sigma, start_sigma, end_sigma, return_endpoints)
    grid, sizes, constants = tiling(clean, [clean, noise])
    if grid[0]:
        _training_pair_fwd_kernel[grid](
            clean, noise, sigma, *results, clean.stride(), noise.stride(), sigma.stride(0), *sizes,
            start_sigma, end_sigma, HAS_LOW=start_sigma != 1.0, HAS_ENDPOINTS=return_endpoints,  # pyright: ignore
            **constants,
        )  # fmt: skip
    return results


def _launch_bwd(
    dinput: Tensor | None, dtarget: Tensor | None, dstart: Tensor | None, dend: Tensor | None,
    sigma: Tensor, start_sigma: float, end_sigma: float,
    clean_dtype: torch.dtype | None, noise_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    upstream = dinput, dtarget, dstart, dend
    given = [d for d in upstream if d is not None]
    dclean, dnoise = _empty_bwd(*upstream, sigma, start_sigma, end_sigma, clean_dtype, noise_dtype)
    grid, sizes, constants = tiling(given[0], given)
    if grid[0]:
        _training_pair_bwd_kernel[grid](
            *upstream, sigma, dclean, dnoise,
            *((given[0] if d is None else d).stride() for d in upstream), sigma.stride(0), *sizes,
            start_sigma, end_sigma,
            **{
                f"HAS_D{name}": d is not None
                for name, d in zip(("INPUT", "TARGET", "START", "END"), upstream, strict=True)
            },
            HAS_DCLEAN=clean_dtype is not None, HAS_DNOISE=noise_dtype is not None,
            HAS_LOW=start_sigma != 1.0, **constants,
        )  # fmt: skip
    return dclean, dnoise


def _empty_fwd(
    clean: Tensor, noise: Tensor, sigma: Tensor, start_sigma: float, end_sigma: float,
    return_endpoints: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """An operator cannot return None: without ``return_endpoints`` start, end have no elements."""
    end = clean.shape if return_endpoints else (0,)
    pair = clean.new_empty(clean.shape), clean.new_empty(clean.shape)
    return *pair, clean.new_empty(end), clean.new_empty(end)


def _empty_bwd(
    dinput: Tensor | None, dtarget: Tensor | None, dstart: Tensor | None, dend: Tensor | None,
    sigma: Tensor, start_sigma: float, end_sigma: float,
    clean_dtype: torch.dtype | None, noise_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dclean and dnoise; a dtype of None means not needed: no elements."""
    like = next(d for d in (dinput, dtarget, dstart, dend) if d is not None)
    dclean, dnoise = (
        like.new_empty(0 if dtype is None else like.shape, dtype=dtype)
        for dtype in (clean_dtype, noise_dtype)
    )
    return dclean, dnoise


forward_op = define_op("training_pair_fwd", _launch_fwd, portable.training_pair_fwd, _empty_fwd)
backward_op = define_op("training_pair_bwd", _launch_bwd, portable.training_pair_bwd, _empty_bwd)


def _setup_context(ctx, inputs, output):
    clean, noise, sigma, *ctx.levels, ctx.return_endpoints = inputs
    ctx.save_for_backward(sigma)
    ctx.dtypes = clean.dtype, noise.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, *upstream):
    needed = ctx.needs_input_grad[:2]
    if not ctx.return_endpoints:  # a tracer may supply empty gradients for them
        upstream = *upstream[:2], None, None
    if all(d is None for d in upstream):
        return (None,) * 6
    dtypes = (dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True))
    grads = backward_op(*upstream, *ctx.saved_tensors, *ctx.levels, *dtypes)
    return *(d if need else None for d, need in zip(grads, needed, strict=True)), *[None] * 4


forward_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(backward_op)


class TrainingPair(NamedTuple):
    """Tensors of the shape of ``clean``; start and end only with ``return_endpoints``."""

    input: Tensor
    target: Tensor
    start: Tensor | None = None
    end: Tensor | None = None


def training_pair(
    clean: Tensor,  # [B, C, T, H, W]
    noise: Tensor,  # [B, C, T, H, W]
    start_sigma: float,
    end_sigma: float,
    sigma: Tensor | float,  # [B]
    *,
    return_endpoints: bool = False,
) -> TrainingPair:
    """Noisy input and velocity target of one stage, from its clean latent and coupled noise.

    Args:
        clean: bf16, fp16, fp32 or fp64, any strides; so is noise, on the same device.
        start_sigma: noise level at the start, 0 to 1. Below 1, H and W must be even, because the
            start holds the downsampled clean latent. The first stage has 1.
        end_sigma: noise level at the end, 0 to 1.
        sigma: where between start (1) and end (0) the input lies: floating point ``[B]`` on the
            device of clean, or a number for all rows. It gets no gradient.
        return_endpoints: also return start and end.

    Returns:
        Contiguous tensors in the dtype of clean, calculated in fp32 or wider; differentiable in
        clean and noise.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; a sigma that requires grad.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_video("clean", clean)
    check_video("noise", noise, ("clean", clean))
    if noise.shape != clean.shape:
        expected = f"{list(clean.shape)} as clean has"
        raise ValueError(f"noise: expected shape {expected}, got {list(noise.shape)}")
    check_number("start_sigma", start_sigma, 0.0, 1.0)
    check_number("end_sigma", end_sigma, 0.0, 1.0)
    if start_sigma != 1.0 and (clean.shape[3] % 2 or clean.shape[4] % 2):
        raise ValueError(f"clean: expected even H and W, got {list(clean.shape)}")
    sigma = _sigma_tensor(sigma, clean)
    refuse_tangents(clean, noise, sigma)
    results = forward_op(clean, noise, sigma, start_sigma, end_sigma, return_endpoints)
    return TrainingPair(*results) if return_endpoints else TrainingPair(*results[:2])


def _sigma_tensor(sigma: Tensor | float, clean: Tensor) -> Tensor:
    n_batch = clean.shape[0]
    if not isinstance(sigma, Tensor):
        check_number("sigma", sigma, 0.0, 1.0)
        dtype = torch.promote_types(clean.dtype, torch.float32)
        return torch.full((1,), sigma, dtype=dtype, device=clean.device).expand(n_batch)
    check_tensor("sigma", sigma, ("clean", clean))
    if sigma.shape != (n_batch,):
        raise ValueError(f"sigma: expected shape [{n_batch}], got {list(sigma.shape)}")
    if sigma.requires_grad:
        raise ValueError("sigma: expected a tensor that needs no gradient, got one that does")
    return sigma
