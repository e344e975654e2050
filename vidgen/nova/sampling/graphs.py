"""CUDA graphs for generating a frame: two launches per set instead of thousands.

A graph has fixed shapes, but the number of visible tokens and the size of a set change from set to
set. Both are rounded up to a bucket size. There is a graph of the image encoder for each pair of
bucket sizes, and a graph of the whole denoising loop for each bucket of set sizes.

The results are exact. A mask hides padded keys; its bounds are computed inside the graph from the
number of visible tokens. Padded rows of the last layer and of the denoising loop, which influence
no other rows, are dropped.

Graphs hold the token order of their run, so they are not reused for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.ops import IntervalMask

from ..model.vit import Pass
from .frames import SortedFrames

VISIBLE, ROWS = 128, 16  # bucket sizes of visible tokens and of sets are multiples of these

Function = Callable[..., Tensor]


class Graphed:
    """A function of CUDA tensors of fixed shapes; the first call captures it, later ones replay it.

    Every call returns the same tensor, which the next call overwrites.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            self._capture(inputs)
        assert self.graph is not None
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first run compiles kernels and builds tables
            self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self.function(*self.inputs)
        self.graph = graph


class BucketedFrames(SortedFrames):
    """`SortedFrames` with shapes rounded up to buckets, captured by ``capture``.

    Guidance may have one or two branches and the same scale for all sets (`has_one_scale`).
    """

    capture: Callable[[Function], Function] = Graphed

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.functions: dict[Hashable, Function] = {}
        self.loop = self.denoise
        # on the device, so that the loop copies nothing to it
        self.indices = torch.arange(self.order.shape[1], device=self.order.device)

    def predict(self, condition: Tensor, content: list[Tensor], first: int, last: int) -> Tensor:
        n_visible, n = self._visible(first), self._rows(last - first)
        visible = torch.cat([condition[:, :0], *content], dim=1)
        visible = F.pad(visible, (0, 0, 0, n_visible - first))
        features = self._captured(("features", n_visible, n), partial(self._features, n=n))
        return features(condition, visible, self.indices[first : first + 1])[:, : last - first]

    def _features(self, condition: Tensor, visible: Tensor, first: Tensor, *, n: int) -> Tensor:
        """Features ``[G B, n, D]`` of n tokens from ``first`` [1] on; those before are visible."""
        encoder, n_condition = self.encoder, condition.shape[1]
        n_visible, n_tokens = visible.shape[1], len(self.indices)
        mask = None
        if n_visible:
            mask = IntervalMask.block_causal(torch.cat([n_condition + first, n_visible - first]))
        h = encoder.encode(visible, condition, self.ids[:, :n_visible], mask=mask)
        is_visible = (self.indices[:n_visible] < first)[:, None]
        known = torch.where(is_visible, h[:, n_condition:], self.masks[:, :n_visible])
        h = torch.cat([h[:, :n_condition], known, self.masks[:, n_visible:]], dim=1)
        shared = Pass(None, encoder.positions(h, self.ids), n_condition)
        rows = (self.indices[:n] + first).clamp(max=n_tokens - 1) + n_condition
        rows = rows.expand(len(h), -1)
        return encoder.norm(encoder.run(h, encoder.second_half, shared, rows))

    def _sample(self, z: Tensor, first: int, last: int, scale: float) -> Tensor:
        self.denoise = partial(self._padded_loop, self._rows(last - first))  # type: ignore
        return super()._sample(z, first, last, scale)

    def _padded_loop(
        self, n: int, z: Tensor, x: Tensor, scale: float, *, noise: Tensor | None, **_: None
    ) -> Tensor:
        def loop(z: Tensor, x: Tensor, *noise: Tensor) -> Tensor:
            return self.loop(z, x, scale, noise=noise[0] if noise else None)

        inputs = [z, x] if noise is None else [z, x, noise]
        padded = [F.pad(tensor, (0, 0, 0, n - x.shape[1])) for tensor in inputs]
        return self._captured(("loop", n, scale), loop)(*padded)[:, : x.shape[1]].clone()

    def _captured(self, key: Hashable, function: Function) -> Function:
        if key not in self.functions:
            self.functions[key] = type(self).capture(function)
        return self.functions[key]

    def _visible(self, n: int) -> int:
        return min(-(-n // VISIBLE) * VISIBLE, len(self.indices))

    def _rows(self, n: int) -> int:
        return min(-(-n // ROWS) * ROWS, len(self.indices))
