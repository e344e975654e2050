"""Sampler steps in one pass: classifier-free guidance, the step, and the clean prediction it keeps.

    v   = uncond + guidance * (velocity - uncond)                  or velocity itself
    x'  = c_x x + c_v v + c_p previous + c_z noise
    x0  = a_x x + a_v v                                            if the solver needs it later

All tensors have the shape of x, which may be any. Every sampler here is such a linear step:

    flow-matching Euler   x' = x + step v
    DDIM                  x' = k x + (A+ - k A) x0,  x0 = a x - sqrt(1 - a^2) v
    SDE-DPM-Solver++ 2M   x' = c1 x + c2 [x0 + m (x0 - previous)] + c3 noise

with A = sqrt(alpha_bar) of this step, A+ that of the next step, and a the value that the denoiser
uses for A. Python combines the coefficients in fp64 before the launch; the kernel computes only the
first three lines. It reads every tensor once with its own strides, computes in fp32 (fp64 for fp64)
and rounds the results. Multiply-adds are not fused, so that an fp32 Euler step is bitwise equal to
the official one on every device. The step is linear, so the backward saves no input: one pass
scales the gradients of x' and x0 into all gradients that are needed.

Coefficients reach the operator as a CPU tensor. torch.compile specializes on the floats given to a
custom operator, so floats would recompile at every step; it does not specialize on tensor values.

Used by Pyramid Flow (2410.05954) and NOVA (2412.14169): Euler; by CogVideoX (2408.06072) and
RepVideo (2501.08994): DDIM (2010.02502) and SDE-DPM-Solver++ (2211.01095), with v-prediction
(2202.00512) and guidance (2207.12598).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import check_number, check_tensor, refuse_tangents
from ..common.jit import scalar
from ..common.launch import accumulator_dtype, architecture
from ..common.registration import define_op, refuse_double_backward
from . import sampler_portable as portable
from .configs import lookup_block

# A float, or under torch.compile a 0-dim fp64 tensor on the CPU.
Number = float | Tensor


@triton.jit
def _offsets(index, sizes, stride):
    """Memory offsets of the elements ``index`` [BLOCK]; sizes and strides of `_merge_dims`."""
    offset = index * 0
    for d in tl.static_range(len(sizes) - 1, 0, -1):  # pyright: ignore
        offset += (index % sizes[d]) * stride[d]
        index = index // sizes[d]
    return offset + index * stride[0]


@triton.jit
def _load(ptr, index, is_inside, sizes, stride, ACC: tl.constexpr):
    return tl.load(ptr + _offsets(index, sizes, stride), mask=is_inside, other=0.0).to(ACC)


@triton.jit
def _store(ptr, x, index, is_inside, sizes, stride):
    tl.store(ptr + _offsets(index, sizes, stride), x.to(ptr.dtype.element_ty), mask=is_inside)


# The size stays specialized: 16-byte accesses need to know that it is a multiple of 16.
@triton.jit
def _linear_step_fwd_kernel(
    # uncond, previous, noise and x0 may be None
    x_ptr, velocity_ptr, uncond_ptr, previous_ptr, noise_ptr, out_ptr, x0_ptr,
    sizes, stride_x, stride_velocity, stride_uncond, stride_previous, stride_noise, stride_out,
    n_elements,
    guidance: tl.float64, c_x: tl.float64, c_v: tl.float64, c_p: tl.float64, c_z: tl.float64,
    a_x: tl.float64, a_v: tl.float64,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = index < n_elements
    # all tensors [BLOCK]
    x = _load(x_ptr, index, is_inside, sizes, stride_x, ACC)
    v = _load(velocity_ptr, index, is_inside, sizes, stride_velocity, ACC)
    if uncond_ptr is not None:
        uncond = _load(uncond_ptr, index, is_inside, sizes, stride_uncond, ACC)
        w = scalar(guidance, ACC)
        # Interpolate from the nearer end: guidance 0 gives uncond exactly, 1 velocity.
        v = tl.where(w < 0.5, uncond + w * (v - uncond), v + (w - 1) * (v - uncond))
    out = scalar(c_x, ACC) * x + scalar(c_v, ACC) * v
    if previous_ptr is not None:
        previous = _load(previous_ptr, index, is_inside, sizes, stride_previous, ACC)
        out += scalar(c_p, ACC) * previous
    if noise_ptr is not None:
        out += scalar(c_z, ACC) * _load(noise_ptr, index, is_inside, sizes, stride_noise, ACC)
    _store(out_ptr, out, index, is_inside, sizes, stride_out)
    if x0_ptr is not None:
        x0 = scalar(a_x, ACC) * x + scalar(a_v, ACC) * v
        _store(x0_ptr, x0, index, is_inside, sizes, stride_out)


@triton.jit
def _linear_step_bwd_kernel(
    # at least one of dout and dx0, and at least one output, is not None
    dout_ptr, dx0_ptr, dx_ptr, dvelocity_ptr, duncond_ptr, dprevious_ptr, dnoise_ptr,
    sizes, stride_dout, stride_dx0, stride_grad, n_elements,
    guidance: tl.float64, c_x: tl.float64, c_v: tl.float64, c_p: tl.float64, c_z: tl.float64,
    a_x: tl.float64, a_v: tl.float64,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The transposed step: gradients of all inputs from those of x' and x0."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = index < n_elements
    dout = tl.zeros([BLOCK], ACC)
    dx = tl.zeros([BLOCK], ACC)
    dv = tl.zeros([BLOCK], ACC)
    if dout_ptr is not None:
        dout = _load(dout_ptr, index, is_inside, sizes, stride_dout, ACC)
        dx = scalar(c_x, ACC) * dout
        dv = scalar(c_v, ACC) * dout
    if dx0_ptr is not None:
        dx0 = _load(dx0_ptr, index, is_inside, sizes, stride_dx0, ACC)
        dx += scalar(a_x, ACC) * dx0
        dv += scalar(a_v, ACC) * dx0
    w = scalar(guidance, ACC)
    if dx_ptr is not None:
        _store(dx_ptr, dx, index, is_inside, sizes, stride_grad)
    if dvelocity_ptr is not None:
        _store(dvelocity_ptr, w * dv, index, is_inside, sizes, stride_grad)
    if duncond_ptr is not None:
        _store(duncond_ptr, (1 - w) * dv, index, is_inside, sizes, stride_grad)
    if dprevious_ptr is not None:
        _store(dprevious_ptr, scalar(c_p, ACC) * dout, index, is_inside, sizes, stride_grad)
    if dnoise_ptr is not None:
        _store(dnoise_ptr, scalar(c_z, ACC) * dout, index, is_inside, sizes, stride_grad)


def _launch_fwd(
    x: Tensor, velocity: Tensor, uncond: Tensor | None, previous: Tensor | None,
    noise: Tensor | None, coefficients: Tensor, is_update: bool, return_x0: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, x0 = _empty_fwd(x, velocity, uncond, previous, noise, coefficients, is_update, return_x0)
    config = lookup_block("linear_step_fwd", architecture(x))
    grid = (triton.cdiv(x.numel(), config.block),)
    if grid[0]:
        sizes, strides = _merge_dims(out, [x, velocity, uncond, previous, noise, out])
        _linear_step_fwd_kernel[grid](
            x, velocity, uncond, previous, noise, out, x0 if return_x0 else None,
            sizes, *strides, x.numel(), *coefficients.tolist(),
            ACC=accumulator_dtype(x.dtype), **config.kwargs(), enable_fp_fusion=False,
        )  # fmt: skip
    return out, x0


def _launch_bwd(
    dout: Tensor | None, dx0: Tensor | None, coefficients: Tensor, x_dtype: torch.dtype | None,
    velocity_dtype: torch.dtype | None, uncond_dtype: torch.dtype | None,
    previous_dtype: torch.dtype | None, noise_dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    dtypes = x_dtype, velocity_dtype, uncond_dtype, previous_dtype, noise_dtype
    grads = _empty_bwd(dout, dx0, coefficients, *dtypes)
    given = _either(dout, dx0)
    config = lookup_block("linear_step_bwd", architecture(given))
    grid = (triton.cdiv(given.numel(), config.block),)
    if grid[0]:
        sizes, strides = _merge_dims(grads[0], [dout, dx0, grads[0]])
        wanted = iter(grads)
        _linear_step_bwd_kernel[grid](
            dout, dx0, *(None if dtype is None else next(wanted) for dtype in dtypes),
            sizes, *strides, given.numel(), *coefficients.tolist(),
            ACC=accumulator_dtype(given.dtype), **config.kwargs(), enable_fp_fusion=False,
        )  # fmt: skip
    return grads


def _either(dout: Tensor | None, dx0: Tensor | None) -> Tensor:
    given = dx0 if dout is None else dout
    assert given is not None
    return given


def _merge_dims(like: Tensor, tensors: Sequence[Tensor | None]) -> tuple[tuple, list[tuple]]:
    """Merges dims that are contiguous in all tensors: sizes, and the strides of each tensor.

    Dims are sorted by the strides of ``like``, the output, so that its stores are consecutive.
    """
    if all(x is None or x.is_contiguous() for x in tensors):
        return (like.numel(),), [(1,)] * len(tensors)
    given = [like if x is None else x for x in tensors]
    sizes: list[int] = []
    strides: list[list[int]] = []  # of each dim, those of all tensors
    for dim in sorted(range(like.ndim), key=like.stride, reverse=True):
        size, stride = like.shape[dim], [x.stride(dim) for x in given]
        if size == 1:
            continue
        if sizes and strides[-1] == [size * s for s in stride]:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return tuple(sizes), list(zip(*strides, strict=True))


def _empty_fwd(
    x, velocity, uncond, previous, noise, coefficients, is_update, return_x0
) -> tuple[Tensor, Tensor]:
    """x' and x0. An operator cannot return None: without ``return_x0`` x0 has no elements."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x0 = torch.empty_like(x, dtype=dtype) if return_x0 else x.new_empty(0, dtype=dtype)
    return torch.empty_like(x), x0


def _empty_bwd(dout, dx0, coefficients, *dtypes) -> list[Tensor]:
    like = _either(dout, dx0)
    return [torch.empty_like(like, dtype=dtype) for dtype in dtypes if dtype is not None]


forward_op = define_op("linear_step_fwd", _launch_fwd, portable.linear_step_fwd, _empty_fwd)
backward_op = define_op("linear_step_bwd", _launch_bwd, portable.linear_step_bwd, _empty_bwd)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, coefficients, ctx.is_update, ctx.return_x0 = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in tensors]
    ctx.save_for_backward(coefficients)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dx0):
    dx0 = dx0 if ctx.return_x0 else None
    grads: list[Tensor | None] = [None] * 5
    wanted = list(ctx.needs_input_grad[:5])
    if dx0 is None and dout is not None and ctx.is_update:
        grads[0] = dout  # x' = x + ...
        wanted[0] = False
    if any(wanted) and not (dout is None and dx0 is None):
        dtypes = [dtype if want else None for dtype, want in zip(ctx.dtypes, wanted, strict=True)]
        computed = iter(backward_op(dout, dx0, *ctx.saved_tensors, *dtypes))
        grads = [next(computed) if want else g for want, g in zip(wanted, grads, strict=True)]
    return *grads, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(backward_op)


class LinearStep(NamedTuple):
    """The coefficients of a step; see the formulas at the top of this file."""

    c_x: Number = 1
    c_v: Number = 0
    c_p: Number = 0
    c_z: Number = 0
    a_x: Number = 0
    a_v: Number = 0


def linear_step(
    x: Tensor,
    velocity: Tensor,
    step: LinearStep,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    is_update: bool = False,  # c_x = 1, a_x = 0: known without reading them
    return_x0: bool = False,
) -> tuple[Tensor, Tensor]:
    """``x'`` in the dtype of x and ``x0`` in fp32 (fp64 for fp64), empty without return_x0."""
    check_tensor("x", x)
    _check_like("velocity", velocity, x)
    for name, other in (("uncond", uncond), ("previous", previous), ("noise", noise)):
        if other is not None:
            _check_like(name, other, x)
    check_number("guidance", guidance)
    if uncond is None and guidance != 1:
        raise ValueError(f"guidance: expected 1 without uncond, got {guidance}")
    refuse_tangents(x, velocity, uncond, previous, noise)
    coefficients = _as_tensor([guidance, *step])
    return forward_op(x, velocity, uncond, previous, noise, coefficients, is_update, return_x0)


def _check_like(name: str, other: Tensor, x: Tensor) -> None:
    check_tensor(name, other, ("x", x))
    if other.shape != x.shape:
        expected = f"expected shape {list(x.shape)} as x has"
        raise ValueError(f"{name}: {expected}, got {list(other.shape)}")


def _as_number(x: float) -> Number:
    """A tensor under torch.compile, which computes with changing floats only in tensors."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device="cpu") * x
    return float(x)


def _as_tensor(numbers: Sequence[Number]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.stack([_as_number(x) for x in numbers])  # pyright: ignore
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _log(x: Number) -> Number:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def _clean_prediction(
    sqrt_alpha: float, denoiser_sqrt_alpha: float | None
) -> tuple[Number, Number]:
    """``x0 = a x - sqrt(1 - a^2) v`` as the coefficients of x and v."""
    a = sqrt_alpha if denoiser_sqrt_alpha is None else denoiser_sqrt_alpha
    check_number("denoiser_sqrt_alpha", a, 0, 1)
    a = _as_number(a)
    return a, -(((1 - a) * (1 + a)) ** 0.5)


def euler_step(
    x: Tensor,
    velocity: Tensor,
    step: float,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """One step of the flow-matching ODE: ``x + step * v``, ``step = sigma_next - sigma``.

    Args:
        x: bf16, fp16, fp32 or fp64, any shape, any strides.
        velocity: dx / dsigma as the model predicts it, shape and device of x, any such dtype.
        step: a number, not a tensor: no step may wait for the GPU.
        uncond: the prediction without the condition: then
            ``v = uncond + guidance * (velocity - uncond)``, else ``v = velocity``.

    Returns:
        x' in the dtype of x, with its strides where they are dense, differentiable.

    Raises:
        ValueError: shapes, dtypes, devices that do not fit; numbers that are not finite; a guidance
            other than 1 without uncond.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_number("step", step)
    linear = LinearStep(c_v=step)
    out, _ = linear_step(x, velocity, linear, uncond=uncond, guidance=guidance, is_update=True)
    return out


def ddim_step(
    x: Tensor,
    velocity: Tensor,
    sqrt_alpha: float,
    sqrt_alpha_next: float,
    *,
    denoiser_sqrt_alpha: float | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """One deterministic DDIM step of a v-prediction model.

    With ``A = sqrt_alpha``, ``A+ = sqrt_alpha_next``, ``a = denoiser_sqrt_alpha``:
    ``x0 = a x - sqrt(1 - a^2) v``, ``k = sqrt((1 - A+^2) / (1 - A^2))``,
    ``x' = k x + (A+ - k A) x0``.

    Args:
        x, velocity, uncond, guidance: as in `euler_step`.
        sqrt_alpha, sqrt_alpha_next: sqrt(alpha_bar) of this step, 0 to below 1, and of the next.
        denoiser_sqrt_alpha: the value used for ``x0`` if the denoiser has another one than the
            sampler, e.g. the nearest entry of a table; default: ``sqrt_alpha``.

    Returns and raises: as `euler_step`; ValueError also for an alpha out of range.
    """
    check_number("sqrt_alpha", sqrt_alpha, 0, 1)
    check_number("sqrt_alpha_next", sqrt_alpha_next, 0, 1)
    if sqrt_alpha == 1:
        raise ValueError(f"sqrt_alpha: expected a number below 1, got {sqrt_alpha}")
    a_x, a_v = _clean_prediction(sqrt_alpha, denoiser_sqrt_alpha)
    now, then = _as_number(sqrt_alpha), _as_number(sqrt_alpha_next)
    k = ((1 - then) * (1 + then) / ((1 - now) * (1 + now))) ** 0.5
    rest = then - k * now
    linear = LinearStep(c_x=k + rest * a_x, c_v=rest * a_v)
    out, _ = linear_step(x, velocity, linear, uncond=uncond, guidance=guidance)
    return out


def dpm_step(
    x: Tensor,
    velocity: Tensor,
    sqrt_alpha: float,
    sqrt_alpha_next: float,
    *,
    noise: Tensor | None = None,
    previous: Tensor | None = None,
    sqrt_alpha_previous: float | None = None,
    denoiser_sqrt_alpha: float | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One SDE-DPM-Solver++ 2M step of a v-prediction model.

    With A, A+, a as in `ddim_step`, ``lam = log(A / sqrt(1 - A^2))``, ``h = lam+ - lam`` and
    ``r = (lam - lam_previous) / h``: ``x0 = a x - sqrt(1 - a^2) v``,
    ``x' = c1 x + c2 [x0 + (x0 - previous) / (2 r)] + c3 noise``, ``c1 = k exp(-h)``,
    ``c2 = A+ (1 - exp(-2 h))``, ``c3 = sqrt(1 - A+^2) sqrt(1 - exp(-2 h))``.
    The first step has no ``previous``; a step to ``A+ = 1`` gives ``x' = x0``.

    Args:
        x, velocity, uncond, guidance: as in `euler_step`.
        sqrt_alpha, sqrt_alpha_next, denoiser_sqrt_alpha: as in `ddim_step`, with A <= A+, A+ > 0.
        noise: standard normal; needed unless ``A+ = 1``, where it has no weight.
        previous: ``x0`` of the step before, which was at ``sqrt_alpha_previous`` < A.

    Returns:
        x' as `euler_step` does, and x0 in fp32 (fp64 for fp64), ``previous`` of the next step.

    Raises: as `ddim_step`; ValueError also for missing noise, or one of previous and
    sqrt_alpha_previous without the other.
    """
    check_number("sqrt_alpha", sqrt_alpha, 0, 1)
    check_number("sqrt_alpha_next", sqrt_alpha_next, 0, 1)
    if sqrt_alpha == 1:
        raise ValueError(f"sqrt_alpha: expected a number below 1, got {sqrt_alpha}")
    if sqrt_alpha_next < sqrt_alpha or sqrt_alpha_next == 0:
        expected = f"expected above 0, at least {sqrt_alpha}"
        raise ValueError(f"sqrt_alpha_next: {expected}, got {sqrt_alpha_next}")
    if (previous is None) != (sqrt_alpha_previous is None):
        raise ValueError("previous, sqrt_alpha_previous: expected both or neither, got one")
    a_x, a_v = _clean_prediction(sqrt_alpha, denoiser_sqrt_alpha)
    now, then = _as_number(sqrt_alpha), _as_number(sqrt_alpha_next)
    # Without exponentials, which overflow at A = 0 and A+ = 1: exp(-2 h) = snr / snr+.
    noise_now, noise_then = (1 - now) * (1 + now), (1 - then) * (1 + then)
    grown = (then - now) * (then + now) / (then * noise_now)  # c2
    c_x, c_z, correction = (
        now / then * noise_then / noise_now,
        (noise_then * grown / then) ** 0.5,
        0,
    )
    if sqrt_alpha_previous is not None:
        check_number("sqrt_alpha_previous", sqrt_alpha_previous, 0, 1)
        if not sqrt_alpha_previous < sqrt_alpha:
            expected = f"expected below {sqrt_alpha}"
            raise ValueError(f"sqrt_alpha_previous: {expected}, got {sqrt_alpha_previous}")
        if sqrt_alpha_previous > 0 and sqrt_alpha_next < 1:  # else r or h is infinite
            before = _as_number(sqrt_alpha_previous)
            snr_before = before**2 / ((1 - before) * (1 + before))
            snr, snr_then = now**2 / noise_now, then**2 / noise_then
            correction = _log(snr_then / snr) / _log(snr / snr_before) / 2
    if sqrt_alpha_next == 1:
        noise = None
    elif noise is None:
        raise ValueError(f"noise: expected a tensor for a step to {sqrt_alpha_next}, got None")
    c_x0 = grown * (1 + correction)
    linear = LinearStep(
        c_x + c_x0 * a_x, c_x0 * a_v, c_p=-grown * correction, c_z=c_z, a_x=a_x, a_v=a_v
    )
    return linear_step(
        x, velocity, linear, uncond=uncond, guidance=guidance,
        previous=previous, noise=noise, return_x0=True,
    )  # fmt: skip
