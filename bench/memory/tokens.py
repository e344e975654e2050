"""Cases on rows of tokens: residual and norm, feature cache, queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bench.memory.case import Draw, Floor, Inputs, MemoryCase, sum_dtype
from vidgen.ops import EAGER, Ops
from vidgen.shapes import TokenShape
from vidgen_kernels import Modulation, QKVStream, reference

EPS = 1e-6
DEFINITION = EAGER._replace(mix=reference.mix, segment=reference.segment)


# ---- residual, norm, modulation


@dataclass(frozen=True)
class ResidualNorm(MemoryCase):
    """Residual with a gate, LayerNorm, modulation; text rows and video rows have their own."""

    shape: TokenShape
    op = "residual_norm"

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

    def units(self, wide: float) -> Floor:
        # x, f -> h, a;  dh, da, h, f -> dx, df
        return Floor(4, 6)


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
    n_results: ClassVar[int] = 1  # besides the new sum

    n: int = 4

    @property
    def variant(self) -> str:
        return f"mix_n{self.n}"

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
        """Gradients reach the older entries and their sum alike: some keep one, some the other."""
        if "total" in inputs:
            same = sum(x - x.detach() for x in self.older(inputs))
            inputs = {**inputs, "total": inputs["total"] + same}
        return self.call(DEFINITION, inputs)

    def may_lack(self, name: str) -> bool:
        """That of the sum, or those of the older entries."""
        return self.n > 2 and name.startswith(("total", "older"))

    def upstream(self, drawn: list[Tensor]) -> list[Tensor]:
        """Nothing comes back through the new sum: not every implementation has one."""
        return [*drawn[: self.n_results], *(torch.zeros_like(x) for x in drawn[self.n_results :])]

    @property
    def keep_sum(self) -> bool:
        return self.n < 6

    def units(self, wide: float) -> Floor:
        # y -> h;  dh, y -> dy
        return self.cache_units(wide, Floor(2, 3))

    def cache_units(self, wide: float, others: Floor) -> Floor:
        """What the cache adds: the sum read, and written unless the window ends.

        Backwards the older entries for the gate's gradient, and the sum's gradient.
        """
        if self.n == 1:
            return others
        read, write = 1 if self.n == 2 else wide, wide * self.keep_sum
        return Floor(others.fwd + read + write, others.bwd + self.n - 1 + write + read)


@dataclass(frozen=True)
class Segment(Mix):
    """Gated residual, feature cache, LayerNorm, modulation, text and video rows apart."""

    op = "segment"
    n_results = 2

    @property
    def variant(self) -> str:
        return f"segment_n{self.n}"

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

    def units(self, wide: float) -> Floor:
        # x, f -> h, a;  dh, da, y, f -> dx, df
        return self.cache_units(wide, Floor(4, 6))


# ---- parts of it, and norms after the layer


@dataclass(frozen=True)
class AddRMSNorm(MemoryCase):
    """``h = x + f`` and its RMSNorm, as language models have it."""

    shape: TokenShape
    op = "residual_norm"
    kind = "add_rms_norm"
    liger = "fused_add_rms_norm"

    def tensors(self, draw: Draw) -> Inputs:
        return {**draw.rows(self.shape, "x f"), **draw.vectors(self.shape.hidden, "weight")}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        return ops.residual_norm(**inputs, norm="rms", eps=EPS)

    def units(self, wide: float) -> Floor:
        # x, f -> h, a;  dh, da, h -> dx, which is df
        return Floor(4, 4)


@dataclass(frozen=True)
class LayerNorm(MemoryCase):
    """A norm on its own, with weight and bias."""

    shape: TokenShape
    op = "residual_norm"
    kind = "layer_norm"
    liger = "layer_norm"

    def tensors(self, draw: Draw) -> Inputs:
        return {**draw.rows(self.shape, "x"), **draw.vectors(self.shape.hidden, "weight bias")}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        return ops.residual_norm(**inputs, eps=EPS)[1:]

    def units(self, wide: float) -> Floor:
        # x -> a;  da, x -> dx
        return Floor(2, 3)


@dataclass(frozen=True)
class TokenModulation(MemoryCase):
    """LayerNorm and a modulation for every token."""

    shape: TokenShape
    op = "residual_norm"
    kind = "token_modulation"

    def tensors(self, draw: Draw) -> Inputs:
        modulation = draw.modulation(self.shape, "scale shift", per_token=True)
        return {**draw.rows(self.shape, "x"), **modulation}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        return ops.residual_norm(**inputs, eps=EPS)[1:]

    def units(self, wide: float) -> Floor:
        # x, scale, shift -> a;  da, x, scale -> dx, dscale; dshift is da
        return Floor(4, 5)


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
            modulation = draw.modulation(self.shape, "scale shift gate", per_token=True)
            found["gate"] = modulation["gate"]
        return found

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        return (ops.post_norm_residual(**inputs),)

    def units(self, wide: float) -> Floor:
        # x, f -> out;  dout, f -> df; dx is dout.  A gate: read, read and its gradient written
        return Floor(4, 5) if self.gated else Floor(3, 3)


@dataclass(frozen=True)
class PostNormAdaLN(MemoryCase):
    """``x + gate * LayerNorm(f)``, its LayerNorm and a modulation for every token."""

    shape: TokenShape
    op = "post_norm_adaln"

    def tensors(self, draw: Draw) -> Inputs:
        found = {**draw.rows(self.shape, "x f"), **draw.vectors(self.shape.hidden, "weight bias")}
        # of two projections: that of the layer, and that of the next one
        gate = draw.modulation(self.shape, "scale shift gate", per_token=True)["gate"]
        next_ = draw.modulation(self.shape, "scale shift gate", per_token=True)
        return {**found, "gate": gate, "scale": next_["scale"], "shift": next_["shift"]}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        return ops.post_norm_adaln(**inputs)

    def units(self, wide: float) -> Floor:
        # x, f, gate, scale, shift -> out, a
        # dout, da, out, f, gate, scale -> dx, df, dgate, dscale; dshift is da
        return Floor(7, 10)


# ---- attention's inputs


@dataclass(frozen=True)
class QKNormRope(MemoryCase):
    """Norm per head, rotation, layout. ``joint``: text is a stream of its own."""

    shape: TokenShape
    op = "qk_norm_rope"

    norm: Literal["layer", "rms"] = "layer"
    joint: bool = False

    @property
    def variant(self) -> str:
        return "qk_norm_rope_joint" if self.joint else "qk_norm_rope"

    def tensors(self, draw: Draw) -> Inputs:
        shape = self.shape
        streams = {"": shape.tokens}
        if self.joint:
            streams = {"": shape.video, "text_": shape.text}
        names = "q_weight k_weight" + " q_bias k_bias" * (self.norm == "layer")
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
            norm=self.norm,
        )

    def units(self, wide: float) -> Floor:
        # q, k, v -> the same, but without a join v needs no move;  dq, dk, dv, q, k -> gradients
        return Floor(6 if self.joint else 4, 8)


def _positions(shape: TokenShape, device: torch.device | str) -> Tensor:
    """Coordinates ``[video, axes]``: frame, row and column of 30 x 45 patches."""
    token = torch.arange(shape.video, device=device)
    every = torch.stack([token // 1350, token % 1350 // 45, token % 45], dim=-1)
    return every[:, : len(shape.axes)].float()
