"""Blocks and warps of the kernels on latents, as data; see `attention/configs.py`."""

import torch

from ..common.configs import BlockConfig, of_arch

INTERPRETER_BLOCK = BlockConfig(4096, num_warps=4)

# {kernel: {oldest architecture: configuration}}; 16-byte loads of bf16 take 8 elements a thread
ELEMENTWISE: dict[str, dict[int, BlockConfig]] = {
    "linear_step_fwd": {80: BlockConfig(1024, num_warps=4)},
    "linear_step_bwd": {80: BlockConfig(1024, num_warps=4)},
}


def lookup_block(kernel: str, arch: int | None) -> BlockConfig:
    """The configuration of an elementwise kernel; ``arch`` None: the interpreter."""
    if arch is None:
        return INTERPRETER_BLOCK
    return of_arch(ELEMENTWISE[kernel], arch)


INTERPRETER_PIXEL_BLOCK = BlockConfig(512, num_warps=4)  # four pixels each

# {bits of the dtype: {oldest architecture: configuration}} of kernels on 2 x 2 blocks of pixels; a
# program owns ``block`` blocks. A thread loads and stores 16 bytes of a row.
PIXEL_BLOCKS: dict[int, dict[int, BlockConfig]] = {
    16: {80: BlockConfig(256, num_warps=2)},
    32: {80: BlockConfig(128, num_warps=2)},
    64: {80: BlockConfig(64, num_warps=2)},
}


def lookup_pixel_blocks(dtype: torch.dtype, arch: int | None) -> BlockConfig:
    """The configuration of kernels on 2 x 2 blocks of pixels; ``arch`` None: the interpreter."""
    if arch is None:
        return INTERPRETER_PIXEL_BLOCK
    return of_arch(PIXEL_BLOCKS[8 * dtype.itemsize], arch)
