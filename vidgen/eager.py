"""Plain PyTorch as the official models write it: the baseline that the kernels are held against."""

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from vidgen_kernels import IntervalMask, Modulation, QKVStream, TrainingPair
from vidgen_kernels.feature_cache import Segment
from vidgen_kernels.sampler import LinearStep


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Without a mask."""
    return _dense_attention(q, k, v, None, return_lse)


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed sequences run one by one, as the official models run them."""
    if not mask.parts or mask.n_queries is None or mask.n_keys is None:
        return _dense_attention(q, k, v, _dense_mask(mask), return_lse)
    results, i, j = [], 0, 0
    for part in mask.parts:
        n_queries, n_keys = part.n_queries or 0, part.n_keys or 0
        qkv = q.narrow(2, i, n_queries), k.narrow(2, j, n_keys), v.narrow(2, j, n_keys)
        results.append(interval_attention(*qkv, part, return_lse=return_lse))
        i, j = i + n_queries, j + n_keys
    if not return_lse:
        return torch.cat(results, dim=2)
    out, lse = zip(*results, strict=True)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)


_dense_masks: WeakKeyDictionary[IntervalMask, Tensor] = WeakKeyDictionary()


def _dense_mask(mask: IntervalMask) -> Tensor:
    """Bool ``[B or 1, Tq, Tk]``, built once for all layers; the few of one forward are kept."""
    if torch.compiler.is_compiling():
        return mask.to_dense()
    if mask not in _dense_masks:
        if len(_dense_masks) >= 8:
            _dense_masks.clear()
        with torch.inference_mode(False):
            _dense_masks[mask] = mask.to_dense()
    return _dense_masks[mask]


def set_masked_attention(
    q: Tensor, k: Tensor, v: Tensor, rank: Tensor, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    rank = torch.atleast_2d(rank)
    return _dense_attention(q, k, v, rank[:, None, :] <= rank[:, :, None], return_lse)


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``mask`` is bool ``[B or 1, Tq, Tk]``; None: every query sees every key."""
    mask = None if mask is None else mask[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    if not return_lse:
        return out
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return out, scores.logsumexp(dim=-1)


def qk_norm_rope(
    stream: QKVStream,
    positions: Tensor | None = None,
    axes: Sequence[int] = (),
    *,
    n_heads: int,
    text: QKVStream | None = None,
    text_length: int = 0,
    norm: str | None = "rms",
    eps: float = 1e-6,
    theta: float = 10000.0,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _normed_heads(stream, n_heads, norm, eps)
    if text is not None:
        joined = zip(_normed_heads(text, n_heads, norm, eps), (q, k, v), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in joined)
    if positions is not None:
        angles = torch.cat(
            [
                position.double() * theta ** (-torch.arange(0, d, 2).to(position.double()) / d)
                for position, d in zip(positions.split(1, dim=-1), axes, strict=True)
            ],
            dim=-1,
        )
        angles = angles.unsqueeze(-3)  # the same for all heads
        if text is not None:  # text has position 0
            angles = F.pad(angles, (0, 0, q.shape[2] - angles.shape[-2], 0))
        dtype = torch.promote_types(q.dtype, torch.float32)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        if text_length:
            q[:, :, text_length:] = _rotate_pairs(q[:, :, text_length:], cos, sin)
            k[:, :, text_length:] = _rotate_pairs(k[:, :, text_length:], cos, sin)
        else:
            q, k = _rotate_pairs(q, cos, sin), _rotate_pairs(k, cos, sin)
    return q, k, v


def _normed_heads(
    stream: QKVStream, n_heads: int, norm: str | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, T, D]; q and k are new tensors."""
    qkv = stream.projections
    qkv = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in qkv)
    if norm == "layer":
        q = F.layer_norm(q, q.shape[-1:], stream.q_weight, stream.q_bias, eps)
        k = F.layer_norm(k, k.shape[-1:], stream.k_weight, stream.k_bias, eps)
    elif norm == "rms":
        q, k = _rms_norm(q, stream.q_weight, eps), _rms_norm(k, stream.k_weight, eps)
    else:
        q, k = q.clone(), k.clone()
    return q, k, v


def post_norm_residual(
    x: Tensor,
    f: Tensor,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    if norm == "layer":
        n = F.layer_norm(f, f.shape[-1:], weight, bias, eps)
    else:
        n = _rms_norm(f, weight, eps)
        n = n if bias is None else n + bias
    if gate is None:
        return x + n
    return x + n * (gate[:, None] if x.ndim == 3 and gate.ndim == 2 else gate)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def euler_step(
    x: Tensor,
    velocity: Tensor,
    step: float,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    v = _guided(velocity, uncond, guidance)
    return (x.to(torch.promote_types(x.dtype, torch.float32)) + step * v).to(x.dtype)


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
    v = _guided(velocity, uncond, guidance)
    x0 = _clean_prediction(x, v, sqrt_alpha if denoiser_sqrt_alpha is None else denoiser_sqrt_alpha)
    k = ((1 - sqrt_alpha_next**2) / (1 - sqrt_alpha**2)) ** 0.5
    return (k * x + (sqrt_alpha_next - sqrt_alpha * k) * x0).to(x.dtype)


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
    v = _guided(velocity, uncond, guidance)
    x0 = _clean_prediction(x, v, sqrt_alpha if denoiser_sqrt_alpha is None else denoiser_sqrt_alpha)
    if sqrt_alpha_next == 1:
        return x0.to(x.dtype), x0
    h = _log_snr(sqrt_alpha_next) - _log_snr(sqrt_alpha)
    estimate = x0
    if previous is not None and sqrt_alpha_previous is not None:
        r = (_log_snr(sqrt_alpha) - _log_snr(sqrt_alpha_previous)) / h
        estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
    k = ((1 - sqrt_alpha_next**2) / (1 - sqrt_alpha**2)) ** 0.5
    from_x0 = math.expm1(-2 * h) * sqrt_alpha_next
    from_noise = (1 - sqrt_alpha_next**2) ** 0.5 * (1 - math.exp(-2 * h)) ** 0.5
    out = k * math.exp(-h) * x - from_x0 * estimate + from_noise * noise
    return out.to(x.dtype), x0


def linear_step(
    x: Tensor,
    velocity: Tensor,
    step: LinearStep,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    is_update: bool = False,
    return_x0: bool = False,
) -> tuple[Tensor, Tensor]:
    v = _guided(velocity, uncond, guidance)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = step.c_x * wide + step.c_v * v
    if previous is not None:
        out = out + step.c_p * previous
    if noise is not None:
        out = out + step.c_z * noise
    x0 = step.a_x * wide + step.a_v * v if return_x0 else wide.new_empty(0)
    return out.to(x.dtype), x0


def _guided(velocity: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    return velocity if uncond is None else uncond + guidance * (velocity - uncond)


def _clean_prediction(x: Tensor, v: Tensor, sqrt_alpha: float) -> Tensor:
    """In fp32 or wider, where the official loops keep their latents."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return sqrt_alpha * x - (1 - sqrt_alpha**2) ** 0.5 * v


def _log_snr(sqrt_alpha: float) -> float:
    """Half of it: log(A / sqrt(1 - A^2))."""
    return math.log(sqrt_alpha / (1 - sqrt_alpha**2) ** 0.5) if sqrt_alpha else -math.inf


def downsample(x: Tensor, *, noise: bool = False) -> Tensor:
    size = (x.shape[3] // 2, x.shape[4] // 2)
    y = _frame_by_frame(x, lambda frames: F.interpolate(frames, size=size, mode="bilinear"))
    return 2 * y if noise else y


def upsample_renoise(
    x: Tensor,
    alpha: float,
    beta: float,
    *,
    gamma: float = 1 / 3,
    noise: Tensor | None = None,
    block_noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """A seed draws all blocks at once: another stream than that of the kernels."""
    up = _frame_by_frame(x, lambda frames: F.interpolate(frames, scale_factor=2, mode="nearest"))
    if seed is not None:
        block_noise = _seeded_block_noise(up, gamma, int(seed) + offset)
    elif noise is not None:
        mean = _frame_by_frame(noise, lambda frames: F.avg_pool2d(frames, 2))
        mean = _frame_by_frame(mean, lambda frames: F.interpolate(frames, scale_factor=2))
        mean_part = math.sqrt(max(1 - 3 * gamma, 0)) * mean
        block_noise = math.sqrt(1 + gamma) * (noise - mean) + mean_part
    assert block_noise is not None
    return alpha * up + beta * block_noise.to(x.dtype)


def training_pair(
    clean: Tensor,
    noise: Tensor,
    start_sigma: float,
    end_sigma: float,
    sigma: Tensor | float,
    *,
    return_endpoints: bool = False,
) -> TrainingPair:
    if start_sigma == 1:
        start = noise
    else:
        low = downsample(clean)
        low = _frame_by_frame(low, lambda frames: F.interpolate(frames, scale_factor=2))
        start = start_sigma * noise + (1 - start_sigma) * low
    end = clean if end_sigma == 0 else end_sigma * noise + (1 - end_sigma) * clean
    r = sigma.to(clean.dtype)[:, None, None, None, None] if isinstance(sigma, Tensor) else sigma
    pair = TrainingPair(r * start + (1 - r) * end, start - end)
    return pair._replace(start=start, end=end) if return_endpoints else pair


def official_block_noise(shape: Sequence[int], gamma: float = 1 / 3) -> Tensor:
    """As the official sampler draws it: on the CPU, one 2 x 2 block after the other.

    The covariance is in fp64: in fp32 not every CPU finds it positive definite.
    """
    mean, eye = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    block = torch.distributions.MultivariateNormal(mean, (1 + gamma) * eye - gamma)
    drawn = [block.sample() for _ in range(math.prod(shape) // 4)]
    return _from_blocks(torch.stack(drawn).float(), shape)


def _seeded_block_noise(like: Tensor, gamma: float, seed: int) -> Tensor:
    """White noise times a root of the covariance, all blocks at once."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    generator = torch.Generator(like.device).manual_seed(seed)
    z = torch.randn(like.numel() // 4, 4, generator=generator, dtype=dtype, device=like.device)
    mean = torch.full((4, 4), 0.25, dtype=dtype, device=like.device)
    eye = torch.eye(4, dtype=dtype, device=like.device)
    root = math.sqrt(1 + gamma) * (eye - mean) + math.sqrt(max(1 - 3 * gamma, 0)) * mean
    return _from_blocks(z @ root, like.shape)


def _from_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """[blocks, 4] to [B, C, T, H, W]."""
    *outer, height, width = shape
    blocks = blocks.reshape(*outer, height // 2, width // 2, 2, 2)
    return blocks.transpose(-3, -2).reshape(tuple(shape))


def _frame_by_frame(x: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, C, T, H, W] through a function of images [B T, C, H, W]."""
    frames = resize(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def residual_norm(
    x: Tensor,
    f: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: Modulation | None = None,
    text_length: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    own = Modulation(gate, scale, shift)
    h = _gated_residual(x, f, own, text, text_length)
    return h, _norm_modulate(h, own, text, text_length, weight, bias, norm, eps)


def mix(
    y: Tensor,
    total: Tensor | None,
    gate: Tensor,
    n: int,
    *,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, None]:
    """There is no running sum: RepVideo's code takes the mean of all outputs, also for n = 1."""
    mean = torch.stack([*older, y]).mean(dim=0)
    return gate * mean + (1 - gate) * y, None


def segment(
    x: Tensor,
    f: Tensor | None,
    total: Tensor | None,
    cache_gate: Tensor,
    n: int,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: Modulation | None = None,
    text_length: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> Segment:
    own = Modulation(gate, scale, shift)
    y = _gated_residual(x, f, own, text, text_length)
    h, _ = mix(y, total, cache_gate, n, older=older)
    a = _norm_modulate(h, own, text, text_length, weight, bias, norm, eps)
    return Segment(h, a, None, y)


class CacheWindow:
    """The outputs of a window in a list, as in RepVideo's code."""

    def __init__(self, gates: Tensor, window: int = 6) -> None:
        self.gates, self.window = gates, window
        self.reset()

    def reset(self) -> None:
        self._outputs: list[Tensor] = []
        # {y: the outputs before it}, for a checkpoint that runs a layer again
        self._before: Any = None

    def __call__(self, layer: int, y: Tensor) -> Tensor:
        n, older = self._enter(layer, y)
        h, _ = mix(y, None, self.gates[layer], n, older=older)
        self._outputs = [*older, y]
        return h

    def segment(
        self, layer: int, x: Tensor, f: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        n, older = self._enter(layer, x)
        h, a, _, y = segment(x, f, None, self.gates[layer], n, older=older, **options)
        assert y is not None
        self._outputs = [*older, y]
        return h, a

    def _enter(self, layer: int, key: Tensor) -> tuple[int, list[Tensor]]:
        n = 1 if layer == 0 else (layer - 1) % self.window + 1
        if torch.compiler.is_compiling():
            return n, [] if n == 1 else self._outputs
        if self._before is None:
            self._before = WeakTensorKeyDictionary()
        older = [] if n == 1 else self._before.get(key, self._outputs)
        self._before[key] = older
        return n, older


def _gated_residual(
    x: Tensor, f: Tensor | None, own: Modulation, text: Modulation | None, text_length: int
) -> Tensor:
    if f is None:
        return x
    if text is None:
        return x + f if own.gate is None else x + _of_tokens(own.gate) * f
    parts = []
    for part, m in ((slice(0, text_length), text), (slice(text_length, None), own)):
        gated = f[:, part] if m.gate is None else _of_tokens(m.gate) * f[:, part]
        parts.append(x[:, part] + gated)
    return torch.cat(parts, dim=1)


def _norm_modulate(
    h: Tensor,
    own: Modulation,
    text: Modulation | None,
    text_length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor:
    """CogVideoX slices, norms and modulates text and video apart, and joins them again."""
    if text is not None:
        options = weight, bias, norm, eps
        return torch.cat(
            [
                _norm_modulate(h[:, :text_length], text, None, 0, *options),
                _norm_modulate(h[:, text_length:], own, None, 0, *options),
            ],
            dim=1,
        )
    if norm == "layer":
        a = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    else:
        a = _rms_norm(h, weight, eps)
        a = a if bias is None else a + bias
    a = a if own.scale is None else a * (1 + _of_tokens(own.scale))
    return a if own.shift is None else a + _of_tokens(own.shift)


def _of_tokens(vector: Tensor) -> Tensor:
    """[B, D] as [B, 1, D]."""
    return vector[:, None] if vector.ndim == 2 else vector
