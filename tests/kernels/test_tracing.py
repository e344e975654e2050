"""Tensors that stand for others: fake, functional, traced, meta.

Their shapes are right, and nothing that is built for them is kept for real calls.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from bench.memory.registry import CASES, MemoryCase
from tests.kernels.contracts import Inputs, leaves_of
from vidgen.ops import FUSED
from vidgen_kernels import (
    IntervalMask,
    block_causal_attention,
    interval_attention,
    set_masked_attention,
)
from vidgen_kernels.attention import intervals

pytestmark = pytest.mark.portable_only

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_mask(build: Callable[[torch.device], IntervalMask]) -> Call:
    return lambda q, k, v: interval_attention(q, k, v, build(q.device))


def packed(device: torch.device) -> IntervalMask:
    parts = [IntervalMask.block_causal([3]), IntervalMask.block_causal([2, 3], window=1)]
    return IntervalMask.pack(parts).to(device)


MASKED: dict[str, Call] = {
    "frames": lambda q, k, v: block_causal_attention(q, k, v, [3, 5], window=1, sink_blocks=1),
    "sets": lambda q, k, v: set_masked_attention(q, k, v, torch.arange(8, device=q.device) % 3),
    "teacher forcing": with_mask(lambda at: IntervalMask.teacher_forcing([1, 3], device=at)),
    "full": with_mask(lambda at: IntervalMask.full([8], [8], device=at)),
    "ranks": with_mask(lambda at: IntervalMask.from_ranks(torch.arange(8, device=at) // 2)),
    "pack": with_mask(packed),
    "text": with_mask(
        lambda at: IntervalMask.pad_text(IntervalMask.block_causal([3, 5], device=at), 2, [1])
    ),
}
every_mask = pytest.mark.parametrize("name", MASKED)


def qkv(**options) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, 2, 8, 16, **options).unbind()
    return q, k, v


def functionalized(call: Call) -> Call:
    return torch.func.functionalize(call)


def traced(mode: str) -> Callable[[Call], Call]:
    return lambda call: lambda *tensors: make_fx(call, tracing_mode=mode)(*tensors)(*tensors)


def through_aot_autograd(call: Call) -> Call:
    return aot_function(call, fw_compiler=lambda graph, _: make_boxed_func(graph))


TRACERS = {
    "functionalize": functionalized,
    **{f"make_fx {mode}": traced(mode) for mode in ("real", "fake", "symbolic")},
    "aot": through_aot_autograd,
}


@pytest.fixture(autouse=True)
def _no_mask_was_built_before() -> None:
    intervals._build_on_host.cache_clear()


@pytest.mark.parametrize("tracer", TRACERS)
@every_mask
def test_traced_attention_is_the_same_and_leaves_nothing_behind(name: str, tracer: str) -> None:
    """The first use of a mask is the traced one; an ordinary call comes after."""
    tensors, call = qkv(), MASKED[name]
    found = TRACERS[tracer](call)(*tensors)
    again = call(*tensors)
    assert type(again) is Tensor and not torch._is_functional_tensor(again)
    torch.testing.assert_close(found, again, atol=0, rtol=0)


@every_mask
def test_attention_on_meta_tensors(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(device="meta"))
    out = MASKED[name](q, k, v)
    assert out.is_meta and out.shape == q.shape and out.stride() == q.stride()
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.is_meta and dq.shape == q.shape


@every_mask
def test_attention_on_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        q, k, v = (x.requires_grad_() for x in qkv())
        out = MASKED[name](q, k, v)
        (dq,) = torch.autograd.grad(out.sum(), q)
        assert out.shape == dq.shape == q.shape
    real = qkv()
    assert MASKED[name](*real).isfinite().all()


def test_masks_of_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        mask = IntervalMask.block_causal([3, 5])
        interval_attention(*qkv(), mask)
    q, k, v = (x.requires_grad_() for x in qkv())
    interval_attention(q, k, v, mask).sum().backward()
    assert q.grad is not None


def shapes(case: MemoryCase, inputs: Inputs) -> list[tuple]:
    """Of the outputs, then of the gradients."""
    outputs = [y for y in case.call(FUSED, inputs) if y is not None]
    tracked = [y for y in outputs if y.requires_grad]
    grads = torch.autograd.grad(
        [y.sum() for y in tracked], leaves_of(inputs), materialize_grads=True
    )
    return [(x.shape, x.stride(), x.dtype) for x in (*outputs, *grads)]


@pytest.mark.parametrize("case", CASES["toy"], ids=lambda case: case.name)
def test_memory_bound_operators_on_meta_and_fake_tensors(case: MemoryCase) -> None:
    inputs = case.inputs(torch.float32, "cpu")
    expected = shapes(case, inputs)

    def empty_like(x: Tensor, device: str) -> Tensor:
        empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return empty.requires_grad_(x.requires_grad)

    on_meta = tree_map_only(Tensor, lambda x: empty_like(x, "meta"), inputs)
    assert shapes(case, on_meta) == expected
    with FakeTensorMode():
        fake = tree_map_only(Tensor, lambda x: empty_like(x, "cpu"), inputs)
        assert shapes(case, fake) == expected
