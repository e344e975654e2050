"""One step of each model on an A100, projected from the operators that it calls.

`static.py` shows the result. Nothing is computed: a model of released size runs on fake tensors,
and the arithmetic and the memory traffic of each operator are counted. An operator takes as long as
the slower of the two.

* linear layers: their operations, at the share of the dense tensor peak that cuBLAS is assumed to
  reach; their weights and rows, moved once
* attention: visible pairs, at the projected rate of our kernel
* our other operators, and PyTorch's: tensors read and written, once per call
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.models.case import TokenStep, Way
from bench.models.nova import NovaSet
from bench.models.pyramid_flow import TOY, PyramidEvaluation
from bench.models.repvideo import RepVideoEvaluation
from bench.report.columns import three_digits
from tests.aot import pipes
from vidgen.nova.checks.example import CONFIGS
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.ops import FUSED, Ops
from vidgen.pyramid_flow.model.config import FluxConfig
from vidgen.pyramid_flow.model.flux import PyramidFluxTransformer
from vidgen.repvideo.checks.example import example_config
from vidgen.repvideo.model.transformer import CogVideoXTransformer
from vidgen.shapes import REAL

CUBLAS = 0.7, 0.85  # share of the dense tensor peak: an assumption
PARTS = ("linear", "attention", "ours", "other")

Range = tuple[float, float]


class Step(NamedTuple):
    """An evaluation with guidance, and how its model is built on fake tensors."""

    spec: TokenStep
    build: Callable[[Ops], nn.Module]
    way: Way = "ours"
    mask: str = ""  # the shape with as many visible pairs; without one, all are visible
    thin: TokenStep | None = None  # makes real inputs, where the model looks at their values


FLUX = PyramidEvaluation("flux", "768p", unit=15, stage=2)
STEPS = (
    Step(
        FLUX,
        lambda ops: PyramidFluxTransformer(FluxConfig(), ops),
        "released",
        mask="pyramid_768p_u15_s2_h30",
        thin=replace(FLUX, less=TOY),
    ),
    Step(RepVideoEvaluation("2b"), lambda ops: CogVideoXTransformer(example_config("2b"), ops)),
    Step(NovaSet("480p"), lambda ops: NovaTransformer(CONFIGS["480p"], ops)),
)


@dataclass
class Call:
    """The work of one operator."""

    part: str  # of `PARTS`
    flops: float
    n_bytes: float
    head_dim: int = 0


class Counted(TorchDispatchMode):
    """Counts every operator that runs inside; views and empty tensors cost nothing."""

    def __init__(self, pairs: Callable[[Tensor, Tensor], float]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.pairs = pairs  # how many are visible, of q and k

    def ops(self) -> Ops:
        """Ours, but attention is only counted: a mask cannot be built of fake tensors."""
        return FUSED._replace(attention=self.attention, interval_attention=self.attention)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> Tensor:
        batch, heads, _, head_dim = q.shape
        flops = 4 * batch * heads * head_dim * self.pairs(q, k)
        self.calls.append(Call("attention", flops, 2 * q.nbytes + k.nbytes + v.nbytes, head_dim))
        return torch.empty_like(q)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim" or "empty" in func.__name__:  # prim: asks for a device
            return out
        read, written = _tensors((args, kwargs)), _tensors(out)
        if not written or _is_view(func, read, written):
            return out
        flops = 0.0
        if count := flop_registry.get(func.overloadpacket):
            flops = count(*args, **kwargs, out_val=out)
        part = "linear" if flops else "ours" if func.namespace == "vidgen" else "other"
        moved = sum(x.nbytes for x in {id(x): x for x in (*read, *written)}.values())
        self.calls.append(Call(part, flops, moved))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _is_view(func: Any, read: Sequence[Tensor], written: Sequence[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    inputs = {x.untyped_storage()._cdata for x in read}
    return all(x.untyped_storage()._cdata in inputs for x in written)


def counted(step: Step) -> list[Call]:
    """The operators of a step, in bf16."""
    (shape,) = [s for s in REAL if s.name == step.mask] or [None]

    def pairs(q: Tensor, k: Tensor) -> float:
        n_queries, n_keys = q.shape[2], k.shape[2]
        if shape is None:
            return n_queries * n_keys
        assert (shape.n_queries, shape.n_keys) == (n_queries, n_keys)
        return shape.visible_pairs

    mode = Counted(pairs)
    with _bf16(), torch.no_grad():
        example = None
        if thin := step.thin:
            example = thin.example(thin.model(torch.device("cpu"), torch.bfloat16))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = step.build(mode.ops())
            example = example or step.spec.example(model)
            run = step.spec.prepare(example, model, step.way)
            with mode:
                run(model)
    return mode.calls


@contextmanager
def _bf16() -> Iterator[None]:
    """Makes bf16 the default dtype: fake parameters cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def projected(calls: Sequence[Call], attention: Callable[[int], Range], copy: Range) -> list[str]:
    """A row under `HEADERS`: TFLOP and GB of the parts, then milliseconds of parts and step.

    ``attention(head_dim)`` is in TFLOP/s, ``copy`` in shares of the DRAM bandwidth; both are a low
    and a high value.
    """
    flops: dict[str, float] = {part: 0.0 for part in PARTS}
    n_bytes = dict(flops)
    # with the low rates, with the high ones
    times: dict[str, list[float]] = {part: [0.0, 0.0] for part in PARTS}
    for call in calls:
        flops[call.part] += call.flops
        n_bytes[call.part] += call.n_bytes
        for i in range(2):
            rate = CUBLAS[i] * pipes.TENSOR_PEAK
            if call.part == "attention":
                rate = attention(call.head_dim)[i] * 1e12
            seconds = max(call.flops / rate, call.n_bytes / (copy[i] * pipes.DRAM))
            times[call.part][i] += 1e3 * seconds
    total = [math.fsum(times[part][i] for part in PARTS) for i in range(2)]
    return [
        *(three_digits(flops[part] / 1e12) for part in ("linear", "attention")),
        *(three_digits(n_bytes[part] / 1e9) for part in ("ours", "other")),
        *(f"{three_digits(high)} to {three_digits(low)}" for low, high in (*times.values(), total)),
    ]


HEADERS = [
    "step",
    "linear, TFLOP",
    "attention, TFLOP",
    "ours, GB",
    "other, GB",
    *(f"{part}, ms" for part in PARTS),
    "step, ms",
]
