"""What `tune.py` can tune: entries of the families' `configs.py`, each with a shape to tune on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import torch

from bench.measure.case import Case
from bench.suites import ATTENTION, MEMORY, Suite
from vidgen.shapes import TokenShape
from vidgen_kernels.attention.configs import LaunchConfig
from vidgen_kernels.attention.configs import lookup as lookup_attention
from vidgen_kernels.common.configs import BlockConfig, RowConfig
from vidgen_kernels.latents.configs import ELEMENTWISE, lookup_block, lookup_pixel_blocks
from vidgen_kernels.norms.configs import ROW_WISE as NORMS
from vidgen_kernels.norms.configs import lookup as lookup_norm
from vidgen_kernels.rope.configs import ROW_WISE as ROPE
from vidgen_kernels.rope.configs import lookup as lookup_rope
from vidgen_kernels.testing import replaced

# Shapes to tune on: long, and as ragged as those of the models. Attention has one for each head
# dim; another operator may have several, for the entries of its table for rows of other lengths.
ATTENTION_SHAPES = {
    64: "pyramid_768p_u15_s2_h30",
    96: "frames_16x1024_d96",
    128: "wan_1.3b_block_causal",
}
MEMORY_SHAPES = {
    "residual_norm": ("segment_n4-repvideo_2b", "segment_n4-cogvideox_5b"),
    "post_norm": ("post_norm-nova_0.6b_1024px", "post_norm-nova_1.4b_1024px"),
    "post_norm_adaln": ("post_norm_adaln-nova_mlp_train",),
    "qk_norm_rope": ("qk_norm_rope_joint-flux_768p_u15_s2",),
    "linear_step": ("euler_step-cogvideox15_81f_b8",),
}
PIXELS = "renoise-pyramid_768p_b64"  # one configuration serves all kernels on blocks of pixels


@dataclass(frozen=True)
class Subject:
    """One entry: the configuration of a kernel, for heads or rows up to a size."""

    lookup: Callable[..., Any]  # the function of the family's `configs.py` that finds the entry
    kernel: str
    size: int  # 0 where it does not matter
    suite: Suite
    shape: str

    @property
    def name(self) -> str:
        return f"{self.kernel}-{self.size}" if self.size else self.kernel

    @property
    def backward(self) -> bool:
        return not self.kernel.endswith("fwd")

    def case(self) -> Case:
        spec = self.suite.find(self.shape)
        return self.suite.make(spec, torch.bfloat16, torch.device("cuda"))

    def candidates(self) -> list[Any]:
        """Configurations worth trying; those that do not fit the GPU fail to compile."""
        if self.lookup is lookup_attention:
            return attention_candidates(self.kernel, self.size)
        if self.lookup in (lookup_norm, lookup_rope):
            return row_candidates(self.size)
        return block_candidates(1 if self.lookup is lookup_block else 4)

    def snippet(self, config: Any, arch: int) -> str:
        """The entry, after the name of its file."""
        numbers = ", ".join(map(str, astuple(config)))
        if self.lookup is lookup_attention:
            entry = f'("{self.kernel}", 16): {{{self.size}: {{{arch}: C({numbers})}}}},'
        elif self.lookup in (lookup_norm, lookup_rope):
            entry = f'"{self.kernel}": {{{self.size}: {{{arch}: R({numbers})}}}},'
        else:
            key = f'"{self.kernel}"' if self.lookup is lookup_block else 16
            entry = f"{key}: {{{arch}: BlockConfig({numbers})}},"
        *_, family, _ = self.lookup.__module__.split(".")
        return f"{family}/configs.py: {entry}"

    def forced(self, config: Any) -> AbstractContextManager[None]:
        """Launches the kernel with ``config``, and the others as the library does."""

        def lookup(kernel: str | torch.dtype, *args):
            is_this = kernel in (self.kernel, torch.bfloat16)
            return config if is_this else self.lookup(kernel, *args)

        return replaced(self.lookup, lookup)


def attention_candidates(kernel: str, head_dim: int) -> list[LaunchConfig]:
    rows, columns = (
        ((32, 64, 128), (64, 128)) if kernel == "dkdv" else ((64, 128, 256), (32, 64, 128))
    )
    blocks = (64, 128) if head_dim == 128 else (64,)
    grid = product(rows, columns, (4, 8), (2, 3), blocks)
    found = [LaunchConfig(*c) for c in grid]
    # at least 8 rows per warp, and at most 128 x 128 scores in registers
    return [
        c for c in found if c.block_m >= 16 * c.num_warps / 2 and c.block_m * c.block_n <= 128 * 128
    ]


def row_candidates(size: int) -> list[RowConfig]:
    grid = product((1, 2, 4, 8, 16, 32), (2, 4, 6, 8, 16, 32), (2, 4, 8, 16))
    # a thread holds 4 to 32 elements of a tensor: 8 are one load of 16 bytes
    return [RowConfig(*c) for c in grid if 4 <= c[0] * size / (32 * c[2]) <= 32]


def block_candidates(n_pixels: int) -> list[BlockConfig]:
    """``n_pixels``: elements of a tensor for one element of a block."""
    grid = product((64, 128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8))
    return [BlockConfig(*c) for c in grid if 4 <= n_pixels * c[0] / (32 * c[1]) <= 32]


def subjects() -> list[Subject]:
    """All entries that can be tuned."""
    found = [
        Subject(lookup_attention, kernel, head_dim, ATTENTION, shape)
        for kernel, (head_dim, shape) in product(("fwd", "dq", "dkdv"), ATTENTION_SHAPES.items())
    ]
    for lookup, table in ((lookup_norm, NORMS), (lookup_rope, ROPE)):
        for kernel, by_length in table.items():
            for shape in _shapes(kernel):
                length = _row_length(kernel, MEMORY.find(shape).shape)
                size = min(limit for limit in by_length if length <= limit)
                found.append(Subject(lookup, kernel, size, MEMORY, shape))
    found += [
        Subject(lookup_block, kernel, 0, MEMORY, shape)
        for kernel in ELEMENTWISE
        for shape in _shapes(kernel)
    ]
    return [*found, Subject(lookup_pixel_blocks, "pixel_blocks_fwd", 0, MEMORY, PIXELS)]


def _shapes(kernel: str) -> tuple[str, ...]:
    return MEMORY_SHAPES[kernel.rpartition("_")[0]]


def _row_length(kernel: str, shape: TokenShape) -> int:
    return shape.head_dim if kernel.startswith("qk_norm_rope") else shape.hidden
