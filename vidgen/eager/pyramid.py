"""The pyramid of latents, resized frame by frame by `interpolate`."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgen_kernels import TrainingPair


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
    """With a seed, the noise differs from that of the kernels: it is drawn by `torch.randn`."""
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
    """As the official sampler draws it: on the CPU, one 2 x 2 block after another.

    The covariance is in fp64, since in fp32 some CPUs find it not positive definite.
    """
    mean, eye = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    block = torch.distributions.MultivariateNormal(mean, (1 + gamma) * eye - gamma)
    drawn = [block.sample() for _ in range(math.prod(shape) // 4)]
    return _from_blocks(torch.stack(drawn).float(), shape)


def _seeded_block_noise(like: Tensor, gamma: float, seed: int) -> Tensor:
    """White noise times the square root of the covariance, for all blocks at once."""
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
    """Applies a function of images ``[B T, C, H, W]`` to ``[B, C, T, H, W]``."""
    frames = resize(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
