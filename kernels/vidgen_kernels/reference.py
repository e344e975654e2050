"""Definitions of all operators in plain PyTorch, to test the kernels against.

They are exact in fp64 and differentiable. Attention builds the whole [Tq, Tk] matrix.

Masks are bool ``[B or 1, Tq, Tk]``, True where the query sees the key.
Legend: B batch, H heads, Tq queries, Tk keys, D head dim, N blocks.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def block_causal_mask(
    block_lengths: Sequence[int],
    query_blocks: range | None = None,
    window: int | None = None,
    sink_blocks: int = 0,
) -> Tensor:
    """A token of block i sees block j iff ``j <= i and (j > i - window or j < sink_blocks)``."""
    j = _block_of_token(block_lengths)
    i = j[:, None]
    seen = (j <= i) & _in_reach(i, j, window, sink_blocks)
    if query_blocks is not None:
        seen = seen[(j >= query_blocks.start) & (j < query_blocks.stop)]
    return seen[None]


def teacher_forcing_mask(
    block_lengths: Sequence[int], window: int | None = None, sink_blocks: int = 0
) -> Tensor:
    """``[clean | noisy]`` copies of the blocks.

    Clean i sees clean j <= i, noisy i sees clean j < i (both within window and sinks) and noisy i.
    """
    j = _block_of_token(block_lengths)
    i = j[:, None]
    reach = _in_reach(i, j, window, sink_blocks)
    clean = torch.cat([(j <= i) & reach, torch.zeros_like(reach)], dim=1)
    noisy = torch.cat([(j < i) & reach, j == i], dim=1)
    return torch.cat([clean, noisy])[None]


def full_mask(q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    """Query i sees key j iff both belong to the same sequence."""
    return (_block_of_token(q_lengths)[:, None] == _block_of_token(k_lengths))[None]


def rank_mask(rank_q: Tensor, rank_k: Tensor | None = None) -> Tensor:
    """Query i sees key j iff ``rank_k[j] <= rank_q[i]``; ranks are ``[T]`` or ``[B, T]``."""
    rank_k = rank_q if rank_k is None else rank_k
    return torch.atleast_2d(rank_k)[:, None, :] <= torch.atleast_2d(rank_q)[:, :, None]


def pack_masks(masks: Sequence[Tensor]) -> Tensor:
    """Block-diagonal: sequences one after another, each under its own mask."""
    n_batch = max(len(m) for m in masks)
    rows = [torch.block_diag(*(m[b % len(m)] for m in masks)) for b in range(n_batch)]
    return torch.stack(rows).bool()


def pad_text_mask(
    mask: Tensor, text_length: int, valid_lengths: Sequence[int], text_queries: bool
) -> Tensor:
    """In batch row b, no query sees the keys ``valid_lengths[b] <= j < text_length``.

    With ``text_queries`` the same tokens are queries too and see nothing.
    """
    valid = torch.tensor(valid_lengths).reshape(-1, 1)

    def is_padding(n_tokens: int) -> Tensor:  # [B, n_tokens]
        token = torch.arange(n_tokens)
        return (token >= valid) & (token < text_length)

    mask = mask & ~is_padding(mask.shape[2])[:, None, :]
    return mask & ~is_padding(mask.shape[1])[:, :, None] if text_queries else mask


def attention(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hkv, Tk, D]
    v: Tensor,  # [B, Hkv, Tk, D]
    dense_mask: Tensor,  # [B or 1, Tq, Tk]
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``out = softmax(softmax_scale * q k^T) v`` over the seen keys, and its log-sum-exp.

    A row that sees nothing gives 0, lse -inf and no gradient. Products and ``out`` are in the dtype
    of q, softmax and lse in fp32 or wider, as in a good eager implementation.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = dense_mask[:, None]
    is_empty = ~seen.any(dim=-1, keepdim=True)
    s = _scores(q, k, softmax_scale)
    # -inf hides a key. A row that sees nothing would be all -inf, and its softmax NaN. It gets 0
    # instead, and its results are replaced below.
    s = s.masked_fill(~seen, float("-inf")).masked_fill(is_empty, 0.0)
    p = s.softmax(dim=-1).masked_fill(is_empty, 0.0)
    lse = s.logsumexp(dim=-1).masked_fill(is_empty[..., 0], float("-inf"))
    return p.to(v.dtype) @ v, lse


def attention_gradients(
    do: Tensor,  # [B, H, Tq, D]
    dlse: Tensor,  # [B, H, Tq]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dense_mask: Tensor,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention` in closed form, from its rounded ``out`` and ``lse``.

    ``p = exp(s - lse)``, ``ds = p (do v^T - do . out + dlse)``,
    ``dq = scale ds k``, ``dk = scale ds^T q``, ``dv = p^T do``.
    Autograd of `attention` defines the gradients. The error of these shows what the dtype allows.
    """
    n_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = _scores(q, k, softmax_scale)
    p = torch.where(dense_mask[:, None], (s - lse[..., None]).exp(), 0.0)
    delta = (do * out.to(s.dtype)).sum(dim=-1) - dlse
    ds = (p * ((do @ v.mT) - delta[..., None])).to(q.dtype)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    dk, dv = scale * (ds.mT @ q), p.to(q.dtype).mT @ do
    dk, dv = (x.unflatten(1, (n_kv_heads, group)).sum(dim=2) for x in (dk, dv))
    return scale * (ds @ k), dk, dv


def qk_norm_rope(
    stream,  # QKVStream
    positions: Tensor | None = None,  # [T_video, A] or [B, T_video, A]
    axes: Sequence[int] = (),
    *,
    n_heads: int,
    text=None,
    text_length: int = 0,
    norm: str | None = "rms",
    eps: float = 1e-6,
    theta: float = 10000.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, T, D]: q and k are normalized per head, then rotated in pairs of columns.

    Text rows come first and are not rotated.
    """
    parts = []
    for s in (stream,) if text is None else (text, stream):
        fused = isinstance(s.projections, Tensor)
        qkv = s.projections.chunk(3, dim=-1) if fused else s.projections
        q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in qkv)
        wide = torch.promote_types(q.dtype, torch.float32)
        q = _normed(q.to(wide), s.q_weight, s.q_bias, norm, eps)
        k = _normed(k.to(wide), s.k_weight, s.k_bias, norm, eps)
        parts.append((q, k, v))
    q, k, v = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    if positions is not None:
        n_text = q.shape[2] - positions.shape[-2]
        q, k = (_rotated(x, positions, axes, theta, n_text) for x in (q, k))
    return q.to(v.dtype), k.to(v.dtype), v


def post_norm_residual(
    x: Tensor,  # [B, T, D] or [T, D]
    f: Tensor,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """``x + gate * (norm(f) * weight + bias)``, in fp32 or wider, rounded to the dtype of x."""
    wide = torch.promote_types(torch.promote_types(x.dtype, f.dtype), torch.float32)
    n = _normed(f.to(wide), weight, bias, norm, eps)
    if gate is not None:
        n = n * (gate[:, None] if x.ndim == 3 and gate.ndim == 2 else gate).to(wide)
    return (x + n).to(x.dtype)


def post_norm_adaln(
    x: Tensor, f: Tensor, *, scale: Tensor, shift: Tensor, next_eps: float = 1e-6, **options
) -> tuple[Tensor, Tensor]:
    """``out = post_norm_residual(x, f, **options)``, ``norm(out) * (1 + scale) + shift``."""
    out = post_norm_residual(x, f, **options)
    return residual_norm(out, scale=scale, shift=shift, eps=next_eps)


def _normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str | None, eps: float
) -> Tensor:
    """``norm(x) * weight + bias`` over the last dim, in the dtype of ``x``; norm None: x alone."""
    if norm is None:
        return x
    x = x - x.mean(dim=-1, keepdim=True) if norm == "layer" else x
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def _rotated(
    x: Tensor, positions: Tensor, axes: Sequence[int], theta: float, n_text: int
) -> Tensor:
    """``(a, b) -> (a cos - b sin, a sin + b cos)`` for columns a = 2i, b = 2i + 1.

    The first ``n_text`` rows stay as they are.
    """
    angles = torch.cat(
        [
            positions[..., i, None].double() * theta ** (-torch.arange(0, d, 2).double() / d)
            for i, d in enumerate(axes)
        ],
        dim=-1,
    )
    if angles.ndim == 3:
        angles = angles[:, None]  # the same for all heads
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[:, :, n_text:, ::2], x[:, :, n_text:, 1::2]
    video = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([x[:, :, :n_text], video], dim=2)


def euler_step(
    x: Tensor,
    velocity: Tensor,
    step: float,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """``x + step * v``, rounded to the dtype of x; v is the guided velocity (`_guided`)."""
    return (_wide(x) + step * _guided(velocity, uncond, guidance)).to(x.dtype)


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
    """``k x + (A' - k A) x0``, with ``k = sqrt((1 - A'^2) / (1 - A^2))``.

    A is ``sqrt_alpha``, A' is ``sqrt_alpha_next`` and x0 the predicted clean sample.
    """
    v = _guided(velocity, uncond, guidance)
    x0 = _clean(x, v, sqrt_alpha if denoiser_sqrt_alpha is None else denoiser_sqrt_alpha)
    k = math.sqrt((1 - sqrt_alpha_next**2) / (1 - sqrt_alpha**2))
    return (k * _wide(x) + (sqrt_alpha_next - k * sqrt_alpha) * x0).to(x.dtype)


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
    """``c1 x + c2 [x0 + (x0 - previous) / (2 r)] + c3 noise``, and ``x0``.

    With ``lam = log(A / sqrt(1 - A^2))`` of each sqrt_alpha A: ``h = lam_next - lam`` and
    ``r = (lam - lam_previous) / h``. Without noise, or if ``sqrt_alpha_next`` is 1 (the last step),
    both results are x0, the first in the dtype of x.
    """
    v = _guided(velocity, uncond, guidance)
    x0 = _clean(x, v, sqrt_alpha if denoiser_sqrt_alpha is None else denoiser_sqrt_alpha)
    if noise is None or sqrt_alpha_next == 1:
        return x0.to(x.dtype), x0
    lam = [
        -math.inf if not a else math.log(a / math.sqrt(1 - a**2))
        for a in (sqrt_alpha_previous, sqrt_alpha, sqrt_alpha_next)
    ]
    h = lam[2] - lam[1]
    estimate = x0
    if previous is not None and lam[0] > -math.inf:
        estimate = x0 + (x0 - previous) * h / (2 * (lam[1] - lam[0]))
    c1 = math.sqrt((1 - sqrt_alpha_next**2) / (1 - sqrt_alpha**2)) * math.exp(-h)
    c2 = -math.expm1(-2 * h) * sqrt_alpha_next
    c3 = math.sqrt(1 - sqrt_alpha_next**2) * math.sqrt(-math.expm1(-2 * h))
    return (c1 * _wide(x) + c2 * estimate + c3 * noise).to(x.dtype), x0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _guided(velocity: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """Classifier-free guidance: ``uncond + guidance * (velocity - uncond)``."""
    if uncond is None:
        return _wide(velocity)
    return _wide(uncond) + guidance * (_wide(velocity) - _wide(uncond))


def _clean(x: Tensor, v: Tensor, sqrt_alpha: float) -> Tensor:
    """The clean sample x0 that the v-prediction ``v`` implies."""
    return sqrt_alpha * _wide(x) - math.sqrt(1 - sqrt_alpha**2) * v


def downsample(x: Tensor, *, noise: bool = False) -> Tensor:
    """Bilinear resize to half the resolution, without antialiasing; times 2 for noise."""
    size = (x.shape[3] // 2, x.shape[4] // 2)
    y = F.interpolate(x.flatten(0, 2)[:, None], size, mode="bilinear", align_corners=False)
    return y.reshape(*x.shape[:3], *size) * (2 if noise else 1)


def upsample_renoise(
    x: Tensor,
    alpha: float,
    beta: float,
    *,
    gamma: float = 1 / 3,
    noise: Tensor | None = None,
    block_noise: Tensor | None = None,
) -> Tensor:
    """``alpha nearest2(x) + beta eta``; eta is ``block_noise`` or made from white ``noise``.

    Made from noise, two values of eta in a 2 x 2 block have covariance -gamma.
    """
    if noise is not None:
        mean = _repeated(_mean4(noise))
        zero_sum = noise - mean
        block_noise = math.sqrt(1 + gamma) * zero_sum + math.sqrt(max(1 - 3 * gamma, 0)) * mean
    assert block_noise is not None
    return (alpha * _repeated(x) + beta * block_noise).to(x.dtype)


def training_pair(
    clean: Tensor,
    noise: Tensor,
    start_sigma: float,
    end_sigma: float,
    sigma: Tensor | float,  # [B]
    *,
    return_endpoints: bool = False,
) -> tuple[Tensor, ...]:
    """Input and target of a training step and, on request, start and end of the stage."""
    start = start_sigma * noise
    if start_sigma != 1:
        start = start + (1 - start_sigma) * _repeated(_mean4(clean))
    end = end_sigma * noise + (1 - end_sigma) * clean
    r = sigma.to(clean.dtype)[:, None, None, None, None] if isinstance(sigma, Tensor) else sigma
    pair = r * start + (1 - r) * end, start - end
    return tuple(x.to(clean.dtype) for x in ((*pair, start, end) if return_endpoints else pair))


def _mean4(x: Tensor) -> Tensor:
    """Means of the 2 x 2 blocks of the last two dims."""
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(dim=(-3, -1))


def _repeated(x: Tensor) -> Tensor:
    """Repeats each value of the last two dims over a 2 x 2 block."""
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def residual_norm(
    x: Tensor,  # [B, T, D]
    f: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: tuple[Tensor | None, ...] | None = None,  # gate, scale, shift of the text tokens
    text_length: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``h = x + gate * f`` and ``a = (norm(h) * weight + bias) * (1 + scale) + shift``."""
    gate, scale, shift = (
        _of_every_token(v, of_text, x, text_length)
        for v, of_text in zip((gate, scale, shift), text or (None,) * 3, strict=True)
    )
    gated = f if f is None or gate is None else gate * f
    h = x if gated is None else (x + gated).to(x.dtype)
    wide = h.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "layer":
        a = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    else:
        a = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    a = a if weight is None else a * weight
    a = a if bias is None else a + bias
    a = a if scale is None else a * (1 + scale)
    a = a if shift is None else a + shift
    return h, a.to(x.dtype)


def mix(
    y: Tensor,  # [B, T, D]
    total: Tensor | None,
    gate: Tensor,
    n: int,
    *,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """``total += y``, ``h = gate * total / n + (1 - gate) * y``; both results as ``(h, total)``.

    If total is None, it starts as the sum of ``older``.
    """
    if n == 1:
        return y, y if keep_sum else None
    total = sum(older[1:], start=older[0]) if total is None else total
    total = total.to(torch.promote_types(sum_dtype, y.dtype)) + y
    h = (gate * total / n + (1 - gate) * y).to(y.dtype)
    return h, total if keep_sum else None


def segment(
    x: Tensor,
    f: Tensor | None,
    total: Tensor | None,
    cache_gate: Tensor,
    n: int,
    *,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
    gate: Tensor | None = None,
    text: tuple[Tensor | None, ...] | None = None,
    text_length: int = 0,
    **norm,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``y = x + gate * f``, then h and total from `mix` of y, then a = norm and modulation of h."""
    of_gate = None if text is None else (text[0], None, None)
    y, _ = residual_norm(x, f, gate=gate, text=of_gate, text_length=text_length)
    sums = {"older": older, "keep_sum": keep_sum, "sum_dtype": sum_dtype}
    h, total = mix(y, total, cache_gate, n, **sums)
    of_norm = None if text is None else (None, *text[1:])
    _, a = residual_norm(h, text=of_norm, text_length=text_length, **norm)
    return h, a, total, y


def _of_every_token(
    vector: Tensor | None, of_text: Tensor | None, x: Tensor, text_length: int
) -> Tensor | None:
    """Expands vectors [D], [B, D], [B, 1, D] or [B, T, D] to [B, T, D], text tokens first."""
    if vector is None:
        return None
    parts = [
        (vector, x.shape[1] - text_length),
        *([] if of_text is None else [(of_text, text_length)]),
    ]
    rows = [
        (v[:, None] if v.ndim == 2 else v).expand(len(x), n_tokens, -1) for v, n_tokens in parts
    ]
    return torch.cat(rows[::-1], dim=1)


def _scores(q: Tensor, k: Tensor, softmax_scale: float | None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return scale * (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))


def _block_of_token(block_lengths: Sequence[int]) -> Tensor:
    lengths = torch.tensor(block_lengths, dtype=torch.int64)
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _in_reach(i: Tensor, j: Tensor, window: int | None, sink_blocks: int) -> Tensor:
    if window is None:
        return torch.ones_like(i >= j)
    return (j > i - window) | (j < sink_blocks)
