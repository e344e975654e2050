"""Cases on rows of tokens: residual and norm, feature cache, queries and keys.

A comment beside `moves` lists what a forward reads and writes, then what a backward does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.memory.case import Draw, Floor, Inputs, MemoryCase, sum_dtype
from vidgen.ops import EAGER, Ops
from vidgen.shapes import TokenShape
from vidgen_kernels import Modulation, QKVStream, reference

EPS = 1e-6
AFFINE_AND_GATE = "scale shift gate"  # what a layer's projection is cut into
DEFINITION = EAGER._replace(mix=reference.mix, segment=reference.segment)


# ---- residual, norm, modulation


@dataclass(frozen=True)
class ResidualNorm(MemoryCase):
    """Gated residual, LayerNorm, modulation; text rows and video rows have vectors of their own."""

    shape: TokenShape
    op = "residual_norm"
    moves = Floor(4, 6)  # x, f -> h, a;  dh, da, h, f -> dx, df

    affine: bool = False

    @property
    def variant(self) -> str:
        return "residual_norm_affine" if self.affine else "residual_norm"

    def tensors(self, draw: Draw) -> Inputs:
        names = "gate scale shift text_gate text_scale text_shift"
        modulation = draw.modulation(self.shape, names)
        affine = draw.vectors(self.shape.hidden, "weight bias") if self.affine else {}
        return {**draw.rows(self.shape, "x f"), **modulation, **affine}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        own, text = _split_modulation(inputs)
        return ops.residual_norm(**own, text=text, text_length=self.shape.text)


def _split_modulation(inputs: Inputs) -> tuple[dict[str, Tensor], Modulation]:
    """Keyword arguments, and the vectors of text rows."""
    own = {name: x for name, x in inputs.items() if not name.startswith("text_")}
    text = {name.removeprefix("text_"): x for name, x in inputs.items() if name not in own}
    return own, Modulation(**text)


# ---- feature cache


@dataclass(frozen=True)
class Mix(MemoryCase):
    """The feature cache alone, with ``n`` entries in its window."""

    shape: TokenShape
    op = "mix"
    moves = Floor(2, 3)  # without the cache: y -> h;  dh, y -> dy
    n_results: ClassVar[int] = 1  # besides the new sum

    n: int = 4

    @property
    def variant(self) -> str:
        return f"{self.op}_n{self.n}"

    def tensors(self, draw: Draw) -> Inputs:
        return {**draw.rows(self.shape, "y"), **self.cached(draw)}

    def cached(self, draw: Draw) -> Inputs:
        """The gate, the older entries and their sum; the sum of one entry is that entry."""
        older = draw.rows(self.shape, " ".join(f"older_{i}" for i in range(self.n - 1)))
        # not near 1, where the gradient of the gate is a small difference of large sums
        gate = draw().detach().fill_(0.3).requires_grad_(self.n > 1)
        found = {"cache_gate": gate, **older}
        if self.n > 2:
            entries = torch.stack([x.detach() for x in older.values()])
            found["total"] = entries.sum(dim=0, dtype=sum_dtype(draw.dtype)).requires_grad_()
        return found

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        total, gate, cache = self.cache_arguments(inputs)
        h, total = ops.mix(inputs["y"], total, gate, self.n, **cache)
        return (h,) if total is None else (h, total)

    def cache_arguments(self, inputs: Inputs) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
        older = self.older(inputs)
        wide = sum_dtype(older[0].dtype) if older else torch.float32
        options = {"older": older, "keep_sum": self.keep_sum, "sum_dtype": wide}
        return inputs.get("total", older[0] if older else None), inputs["cache_gate"], options

    def older(self, inputs: Inputs) -> list[Tensor]:
        return [inputs[f"older_{i}"] for i in range(self.n - 1)]

    def define(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Gradients reach both the older entries and their sum: an implementation keeps either."""
        if "total" in inputs:
            same = sum(x - x.detach() for x in self.older(inputs))
            inputs = {**inputs, "total": inputs["total"] + same}
        return self.call(DEFINITION, inputs)

    def may_lack(self, name: str) -> bool:
        """The gradient of the sum, or those of the older entries."""
        return self.n > 2 and name.startswith(("total", "older"))

    def upstream(self, drawn: list[Tensor]) -> list[Tensor]:
        """Zero for the new sum, which not every implementation returns."""
        return [*drawn[: self.n_results], *(torch.zeros_like(x) for x in drawn[self.n_results :])]

    @property
    def keep_sum(self) -> bool:
        return self.n < 6

    def units(self, wide: float) -> Floor:
        """The cache adds the sum, which is read, and written unless the window ends.

        A backward also reads the older entries, for the gate's gradient, and moves the sum's
        gradient.
        """
        if self.n == 1:
            return self.moves
        read, write = 1 if self.n == 2 else wide, wide * self.keep_sum
        return Floor(self.moves.fwd + read + write, self.moves.bwd + self.n - 1 + write + read)


@dataclass(frozen=True)
class Segment(Mix):
    """Gated residual, feature cache, LayerNorm, modulation, text and video rows apart."""

    op = "segment"
    moves = Floor(4, 6)  # without the cache: x, f -> h, a;  dh, da, y, f -> dx, df
    n_results = 2

    def tensors(self, draw: Draw) -> Inputs:
        return {**ResidualNorm(self.shape, affine=True).tensors(draw), **self.cached(draw)}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        total, cache_gate, cache = self.cache_arguments(inputs)
        others = {n: x for n, x in inputs.items() if not n.startswith(("older", "total", "cache"))}
        own, text = _split_modulation(others)
        h, a, total, _ = ops.segment(
            own.pop("x"),
            own.pop("f"),
            total,
            cache_gate,
            self.n,
            **own,
            text=text,
            text_length=self.shape.text,
            **cache,
        )
        return (h, a) if total is None or self.n == 1 else (h, a, total)


# ---- parts of it, and norms after the layer


@dataclass(frozen=True)
class AddRMSNorm(MemoryCase):
    """``h = x + f`` and its RMSNorm, as language models have it."""

    shape: TokenShape
    op = "residual_norm"
    options: ClassVar = {"norm": "rms", "eps": EPS}
    moves = Floor(4, 4)  # x, f -> h, a;  dh, da, h -> dx, which is df
    variant = "add_rms_norm"
    liger = "fused_add_rms_norm"

    def tensors(self, draw: Draw) -> Inputs:
        return {**draw.rows(self.shape, "x f"), **draw.vectors(self.shape.hidden, "weight")}


@dataclass(frozen=True)
class LayerNorm(MemoryCase):
    """A norm on its own, with weight and bias."""

    shape: TokenShape
    op = "residual_norm"
    options: ClassVar = {"eps": EPS}
    moves = Floor(2, 3)  # x -> a;  da, x -> dx
    variant = "layer_norm"
    liger = "layer_norm"

    def tensors(self, draw: Draw) -> Inputs:
        return {**draw.rows(self.shape, "x"), **draw.vectors(self.shape.hidden, "weight bias")}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        return super().call(ops, inputs)[1:]  # without f, h is x


@dataclass(frozen=True)
class TokenModulation(LayerNorm):
    """LayerNorm and a modulation for every token."""

    moves = Floor(4, 5)  # x, scale, shift -> a;  da, x, scale -> dx, dscale; dshift is da
    variant = "token_modulation"
    liger = None

    def tensors(self, draw: Draw) -> Inputs:
        modulation = draw.modulation(self.shape, "scale shift", per_token=True)
        return {**draw.rows(self.shape, "x"), **modulation}


@dataclass(frozen=True)
class PostNorm(MemoryCase):
    """``x + LayerNorm(f)``; ``gated``: times a gate for every token."""

    shape: TokenShape
    op = "post_norm_residual"

    gated: bool = False

    @property
    def variant(self) -> str:
        return "gated_post_norm" if self.gated else "post_norm"

    def tensors(self, draw: Draw) -> Inputs:
        found = {**draw.rows(self.shape, "x f"), **draw.vectors(self.shape.hidden, "weight bias")}
        if self.gated:  # the last third of a projection
            found["gate"] = draw.modulation(self.shape, AFFINE_AND_GATE, per_token=True)["gate"]
        return found

    def units(self, wide: float) -> Floor:
        # x, f -> out;  dout, f -> df; dx is dout.  A gate: read, read and its gradient written
        return Floor(4, 5) if self.gated else Floor(3, 3)


@dataclass(frozen=True)
class PostNormAdaLN(MemoryCase):
    """``x + gate * LayerNorm(f)``, its LayerNorm and a modulation for every token."""

    shape: TokenShape
    op = "post_norm_adaln"
    # x, f, gate, scale, shift -> out, a
    # dout, da, out, f, gate, scale -> dx, df, dgate, dscale; dshift is da
    moves = Floor(7, 10)

    def tensors(self, draw: Draw) -> Inputs:
        found = PostNorm(self.shape, gated=True).tensors(draw)
        after = draw.modulation(self.shape, AFFINE_AND_GATE, per_token=True)  # of the next layer
        return {**found, "scale": after["scale"], "shift": after["shift"]}


# ---- attention's inputs


@dataclass(frozen=True)
class QKNormRope(MemoryCase):
    """Norm per head, rotation and layout, as in CogVideoX.

    ``joint``: as in Pyramid Flow, where text is a stream of its own and the norm is RMSNorm.
    """

    shape: TokenShape
    op = "qk_norm_rope"

    joint: bool = False

    @property
    def variant(self) -> str:
        return "qk_norm_rope_joint" if self.joint else "qk_norm_rope"

    def tensors(self, draw: Draw) -> Inputs:
        shape = self.shape
        streams = {"": shape.tokens}
        if self.joint:
            streams = {"": shape.video, "text_": shape.text}
        names = "q_weight k_weight" if self.joint else "q_weight k_weight q_bias k_bias"
        found = {}
        for prefix, tokens in streams.items():
            found[f"{prefix}projections"] = draw(shape.batch, tokens, 3 * shape.hidden)
            found |= {f"{prefix}{name}": draw(shape.head_dim) for name in names.split()}
        if shape.axes:
            found["positions"] = _positions(shape, draw.device)
        return found

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        inputs = dict(inputs)
        positions = inputs.pop("positions", None)
        text = [n for n in inputs if n.startswith("text_")]
        stream = QKVStream(**{n: x for n, x in inputs.items() if n not in text})
        return ops.qk_norm_rope(
            stream,
            positions,
            self.shape.axes,
            n_heads=self.shape.hidden // self.shape.head_dim,
            text=QKVStream(**{n.removeprefix("text_"): inputs[n] for n in text})
            if self.joint
            else None,
            text_length=0 if self.joint else self.shape.text,
            norm="rms" if self.joint else "layer",
        )

    def units(self, wide: float) -> Floor:
        # q, k, v -> the same, but without a join v needs no move;  dq, dk, dv, q, k -> gradients
        return Floor(6 if self.joint else 4, 8)


def _positions(shape: TokenShape, device: torch.device | str) -> Tensor:
    """Coordinates ``[video, axes]``: frame, row and column in frames of 30 x 45 patches."""
    token = torch.arange(shape.video, device=device)
    every = torch.stack([token // 1350, token % 1350 // 45, token % 45], dim=-1)
    return every[:, : len(shape.axes)].float()
