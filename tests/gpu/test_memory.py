"""Compiled memory-bound kernels on a GPU: precision, CUDA graphs, no waiting, repeatable bits.

They run over the cases of `bench.memory.registry`. `tests/kernels/` tests the same operators
interpreted and in their portable form.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.memory.registry import CASES, MemoryCase
from tests.kernels.contracts import (
    Inputs,
    few_rows,
    launches_are_noted,
    leaves_of,
    step,
    tensors_of,
    upstream_for,
    upstream_of,
)
from vidgen.ops import EAGER, FUSED, Ops
from vidgen.shapes import TokenShape
from vidgen_kernels import block_noise
from vidgen_kernels.testing import assert_close

pytestmark = pytest.mark.gpu

ALL = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def several_programs(case: MemoryCase) -> MemoryCase:
    """Rows as long as the model's; more than a program takes, and no multiple of that."""
    shape = case.shape
    if isinstance(shape, TokenShape):
        return replace(case, shape=replace(shape, batch=2, text=min(shape.text, 37), video=203))
    return replace(case, shape=few_rows(shape))


MODELS = list({case.variant: several_programs(case) for case in CASES["real"]}.values())
every_case = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)


def with_ops(case: MemoryCase, ops: Ops) -> Callable[[Inputs], tuple[Tensor, ...]]:
    return lambda inputs: case.call(ops, inputs)


def in_fp64(inputs: Inputs) -> Inputs:
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }


def results(
    case: MemoryCase, call: Callable, inputs: Inputs
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of the same loss for every dtype; None where there is no gradient."""
    outputs = list(call(inputs))
    upstream = case.upstream(upstream_of(outputs))
    grads = torch.autograd.grad(outputs, leaves_of(inputs), upstream, allow_unused=True)
    return [y.detach() for y in outputs], list(grads)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@every_case
def test_values_and_gradients(case: MemoryCase, dtype: torch.dtype) -> None:
    """The error is at most twice that of eager code in the same dtype, plus one rounding."""
    inputs = case.inputs(dtype, "cuda")
    with launches_are_noted() as launches:
        outputs, grads = results(case, with_ops(case, FUSED), inputs)
    assert launches
    exact_outputs, exact_grads = results(case, case.define, in_fp64(inputs))
    eager_outputs, eager_grads = results(case, with_ops(case, EAGER), inputs)
    if not case.draws_noise:  # eager code draws other noise; a test below checks ours
        # eager code has no running sum to return
        pairs = zip(outputs, exact_outputs, eager_outputs, strict=False)
        for i, (y, exact, eager) in enumerate(pairs):
            assert_close(f"output {i}", y, exact, eager.to(y.dtype))
    for i, (grad, exact, eager) in enumerate(zip(grads, exact_grads, eager_grads, strict=True)):
        if grad is not None and exact is not None:
            plain = torch.zeros_like(grad) if eager is None else eager
            assert_close(f"gradient {i}", grad, exact, plain)


@every_case
def test_repeats_bitwise(case: MemoryCase) -> None:
    inputs, call = case.inputs(torch.bfloat16, "cuda"), with_ops(case, FUSED)
    upstream = upstream_for(call, inputs)
    expected = step(call, inputs, upstream)
    for _ in range(5):
        assert all(map(torch.equal, step(call, inputs, upstream), expected))


@every_case
def test_cuda_graph_without_waiting(case: MemoryCase) -> None:
    """Runs with synchronisation forbidden; captured once, replayed with other values."""
    inputs, call = case.inputs(torch.bfloat16, "cuda"), with_ops(case, FUSED)
    upstream = upstream_for(call, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(call, inputs, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(call, inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, inputs, upstream)
    for turn in range(2):
        others = tensors_of(case.inputs(torch.bfloat16, "cuda", seed=turn))
        with torch.no_grad():
            for x, other in zip(tensors_of(inputs), others, strict=True):
                x.copy_(other)
        graph.replay()
        assert all(map(torch.equal, captured, step(call, inputs, upstream)))


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_draws_the_noise_that_a_cpu_draws(gamma: float) -> None:
    shape = (2, 3, 2, 34, 46)
    found, expected = (
        block_noise(shape, gamma=gamma, seed=2**40 + 7, offset=5, device=device)
        for device in ("cuda", "cpu")
    )
    assert (found.cpu() - expected).abs().max() <= 1e-5  # normals agree to 2e-6


@every_case
def test_peak_memory(case: MemoryCase) -> None:
    """Peak memory is that of the results, and at most one tensor more."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    if isinstance(case.shape, TokenShape):
        case = replace(case, shape=replace(case.shape, video=8192))
    inputs, call = case.inputs(torch.bfloat16, "cuda"), with_ops(case, FUSED)
    upstream = upstream_for(call, inputs)
    n_bytes = sum(x.nbytes for x in step(call, inputs, upstream))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(call, inputs, upstream)
    assert torch.cuda.max_memory_allocated() - before <= n_bytes + 2 * case.shape.numel
