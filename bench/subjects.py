"""What `tune.py` can tune: entries of the tables in `vidgen_kernels/configs.py`, and on what."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch

import vidgen_kernels
from bench.cases import Case
from bench.suites import ATTENTION, MEMORY, Suite
from vidgen.shapes import TokenShape
from vidgen_kernels import configs

# Shapes to tune on: long, and as ragged as the models are. By head dim, or by name of an operator;
# of its shapes, an entry of its table takes the one whose rows are as long as the entry allows.
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

    lookup: str  # the function of `configs` that finds it
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
        """Configurations worth a try; compiling finds out what does not fit the GPU."""
        if self.lookup == "lookup":
            return attention_candidates(self.kernel, self.size)
        if self.lookup == "lookup_rows":
            return row_candidates(self.size)
        return block_candidates(1 if self.lookup == "lookup_block" else 4)

    def snippet(self, config: Any, arch: int) -> str:
        """The entry for `configs.py`."""
        numbers = ", ".join(map(str, astuple(config)))
        if self.lookup == "lookup":
            return f'("{self.kernel}", 16): {{{self.size}: {{{arch}: C({numbers})}}}},'
        if self.lookup == "lookup_rows":
            return f'"{self.kernel}": {{{self.size}: {{{arch}: R({numbers})}}}},'
        key = f'"{self.kernel}"' if self.lookup == "lookup_block" else 16
        return f"{key}: {{{arch}: BlockConfig({numbers})}},"

    @contextmanager
    def forced(self, config: Any) -> Iterator[None]:
        """The kernel launches with ``config``, the others as the library says."""
        library = getattr(configs, self.lookup)

        def lookup(kernel: str | torch.dtype, *args):
            is_this = kernel in (self.kernel, torch.bfloat16)
            return config if is_this else library(kernel, *args)

        with ExitStack() as stack:
            for info in pkgutil.iter_modules(vidgen_kernels.__path__, "vidgen_kernels."):
                module = importlib.import_module(info.name)
                if getattr(module, self.lookup, None) is library:
                    stack.enter_context(mock.patch.object(module, self.lookup, lookup))
            yield


def attention_candidates(kernel: str, head_dim: int) -> list[configs.LaunchConfig]:
    rows, columns = (
        ((32, 64, 128), (64, 128)) if kernel == "dkdv" else ((64, 128, 256), (32, 64, 128))
    )
    blocks = (64, 128) if head_dim == 128 else (64,)
    grid = product(rows, columns, (4, 8), (2, 3), blocks)
    found = [configs.LaunchConfig(*c) for c in grid]
    # 16 rows per warp at least, and 32 KB of scores in registers at most
    return [
        c for c in found if c.block_m >= 16 * c.num_warps / 2 and c.block_m * c.block_n <= 128 * 128
    ]


def row_candidates(size: int) -> list[configs.RowConfig]:
    grid = product((1, 2, 4, 8, 16, 32), (2, 4, 6, 8, 16, 32), (2, 4, 8, 16))
    # a thread holds 4 to 32 elements of a tensor: 8 are one load of 16 bytes
    return [configs.RowConfig(*c) for c in grid if 4 <= c[0] * size / (32 * c[2]) <= 32]


def block_candidates(n_pixels: int) -> list[configs.BlockConfig]:
    """``n_pixels``: elements that stand in a tensor for one of the block."""
    grid = product((64, 128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8))
    return [configs.BlockConfig(*c) for c in grid if 4 <= n_pixels * c[0] / (32 * c[1]) <= 32]


def subjects() -> list[Subject]:
    """Everything that has a shape to be tuned on."""
    found = [
        Subject("lookup", kernel, head_dim, ATTENTION, shape)
        for kernel, (head_dim, shape) in product(("fwd", "dq", "dkdv"), ATTENTION_SHAPES.items())
    ]
    for kernel, by_length in configs.ROW_WISE.items():
        for shape in _shapes(kernel):
            spec = MEMORY.find(shape)
            length = _row_length(kernel, spec.shape)
            size = min(limit for limit in by_length if length <= limit)
            found.append(Subject("lookup_rows", kernel, size, MEMORY, shape))
    found += [
        Subject("lookup_block", kernel, 0, MEMORY, shape)
        for kernel in configs.ELEMENTWISE
        for shape in _shapes(kernel)
    ]
    return [*found, Subject("lookup_pixel_blocks", "pixel_blocks_fwd", 0, MEMORY, PIXELS)]


def _shapes(kernel: str) -> tuple[str, ...]:
    return MEMORY_SHAPES[kernel.rpartition("_")[0]]


def _row_length(kernel: str, shape: TokenShape) -> int:
    return shape.head_dim if kernel.startswith("qk_norm_rope") else shape.hidden
