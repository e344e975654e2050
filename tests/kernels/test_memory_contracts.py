"""What holds for every memory-bound operator: registration, compilation, errors, memory, path.

Over the cases of `bench.memory.registry` at toy shapes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._guards import CompileContext
from torch.utils._pytree import tree_map_only

from bench.memory.registry import CASES, MemoryCase
from tests.kernels.contracts import (
    Inputs,
    Recorder,
    launches_are_noted,
    leaves_of,
    peak_bytes,
    run,
    step,
    tensors_of,
    upstream_for,
    upstream_of,
)
from vidgen.ops import FUSED
from vidgen.shapes import TokenShape
from vidgen_kernels.common.launch import is_interpreted

TOY = CASES["toy"]
every_case = pytest.mark.parametrize("case", TOY, ids=lambda case: case.name)


def outputs_of(case: MemoryCase, inputs: Inputs) -> list[Tensor]:
    return [y for y in case.call(FUSED, inputs) if y is not None]


def fused(case: MemoryCase) -> Callable[[Inputs], Any]:
    return lambda inputs: case.call(FUSED, inputs)


@every_case
def test_opcheck(case: MemoryCase) -> None:
    """Fakes tell true shapes, strides and dtypes; autograd and functionalization are there."""
    with Recorder() as recorder:
        run(fused(case), case.inputs(torch.float64, "cpu"))
    assert recorder.calls
    for name, (op, args, kwargs) in recorder.calls.items():

        def copy(x: Tensor, name: str = name) -> Tensor:
            return x.detach().requires_grad_(x.requires_grad and not name.endswith("_bwd"))

        copies = tree_map_only(Tensor, copy, args)
        torch.library.opcheck(op, copies, kwargs)


@every_case
def test_compiles_as_one_graph(case: MemoryCase) -> None:
    torch._dynamo.reset()
    inputs = case.inputs(torch.float64, "cpu")
    compiled = torch.compile(fused(case), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs), run(fused(case), inputs), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@every_case
def test_double_backward_is_refused(case: MemoryCase) -> None:
    inputs = case.inputs(torch.float64, "cpu")
    outputs = [y for y in outputs_of(case, inputs) if y.requires_grad]
    upstream = [g.requires_grad_() for g in upstream_of(outputs)]
    grads = torch.autograd.grad(
        outputs, leaves_of(inputs), upstream, create_graph=True, allow_unused=True
    )
    with pytest.raises(NotImplementedError, match=r"vidgen::.*double backward"):
        torch.autograd.grad(sum(g.sum() for g in grads if g is not None), upstream)


@every_case
# PyTorch scripts its own decompositions for it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused(case: MemoryCase) -> None:
    """For whichever input has the tangent."""
    inputs = case.inputs(torch.float64, "cpu")
    outputs = [y for y in outputs_of(case, inputs) if y.requires_grad]
    leaves = leaves_of(inputs)
    grads = torch.autograd.grad(outputs, leaves, upstream_of(outputs), allow_unused=True)
    for leaf in [x for x, grad in zip(leaves, grads, strict=True) if grad is not None]:

        def call(x: Tensor, leaf: Tensor = leaf):
            changed = tree_map_only(Tensor, lambda y: x if y is leaf else y.detach(), inputs)
            return tuple(y for y in case.call(FUSED, changed) if y is not None)

        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(call, (leaf.detach(),), (torch.ones_like(leaf),))


@pytest.mark.portable_only  # refused before a path is taken
@every_case
def test_vmap_is_refused(case: MemoryCase) -> None:
    inputs = case.inputs(torch.float32, "cpu")
    leaf = leaves_of(inputs)[0]

    def call(x: Tensor):
        changed = tree_map_only(Tensor, lambda y: x if y is leaf else y.detach(), inputs)
        return tuple(y for y in case.call(FUSED, changed) if y is not None)

    with pytest.raises(NotImplementedError, match=r"vidgen::.*vmap"):
        torch.func.vmap(call)(torch.stack([leaf.detach()] * 2))


@every_case
def test_inputs_are_not_written(case: MemoryCase) -> None:
    inputs = case.inputs(torch.float32, "cpu")
    tensors = tensors_of(inputs)
    before = [(x._version, x.detach().clone()) for x in tensors]
    outputs = [y for y in outputs_of(case, inputs) if y.requires_grad]
    upstream = upstream_of(outputs)
    copies = [g.clone() for g in upstream]
    torch.autograd.grad(outputs, leaves_of(inputs), upstream, allow_unused=True)
    for x, (version, copy) in zip(tensors, before, strict=True):
        assert x._version == version and torch.equal(x, copy)
    assert all(map(torch.equal, upstream, copies))


@every_case
def test_a_cpu_tensor_takes_the_path_that_was_asked_for(case: MemoryCase) -> None:
    """Portable, unless TRITON_INTERPRET=1 asks for the kernels."""
    with launches_are_noted() as forward:
        inputs = case.inputs(torch.float32, "cpu")
        outputs = [y for y in outputs_of(case, inputs) if y.requires_grad]
    with launches_are_noted() as backward:
        torch.autograd.grad(outputs, leaves_of(inputs), upstream_of(outputs), allow_unused=True)
    assert bool(forward) == bool(backward) == is_interpreted()


@every_case
def test_bitwise_repeatable(case: MemoryCase) -> None:
    first, second = (run(fused(case), case.inputs(torch.float32, "cpu")) for _ in range(2))
    assert all(map(torch.equal, first, second))


@every_case
def test_empty_batch(case: MemoryCase) -> None:
    empty = replace(case, shape=replace(case.shape, batch=0))
    inputs = empty.inputs(torch.float32, "cpu")
    for y in run(fused(empty), inputs):
        assert y.numel() == 0 or not y.any()  # gradients of what the batch shares


@every_case
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(case: MemoryCase, mode) -> None:
    """The same values, and nothing is left behind that spoils training."""
    inputs = case.inputs(torch.float32, "cpu")
    with mode():
        plain = outputs_of(case, inputs)
    trained = run(fused(case), inputs)
    for a, b in zip(plain, trained[: len(plain)], strict=True):
        assert a.grad_fn is None and torch.equal(a, b)


@every_case
def test_new_sizes_hardly_ever_recompile(case: MemoryCase) -> None:
    """Five token counts or heights: two compilations at most."""
    torch._dynamo.reset()
    compilations = set()  # one may call its backend more than once

    def backend(graph, example_inputs):
        compilations.add(str(CompileContext.current_compile_id()))
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(lambda c, x: c.call(FUSED, x), fullgraph=True, backend=backend)
    field = "video" if isinstance(case.shape, TokenShape) else "height"
    for i in range(5):
        size = getattr(case.shape, field) + 4 * i
        other = replace(case, shape=replace(case.shape, **{field: size}))
        inputs = other.inputs(torch.float64, "cpu")
        found, expected = (
            run(call, inputs) for call in (lambda x, c=other: compiled(c, x), fused(other))
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert len(compilations) <= 2


# What feeds a matrix product has the dtype that autocast asks for, all else that of the input.
FEEDS_A_PRODUCT = {
    "post_norm_adaln": [1],
    "qk_norm_rope": [0, 1, 2],
    "residual_norm": [-1],
    "segment": [1],
}


@every_case
def test_autocast(case: MemoryCase) -> None:
    inputs = case.inputs(torch.float32, "cpu")
    plain = run(fused(case), inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = outputs_of(case, inputs)
    expected = [torch.float32] * len(outputs)
    for i in FEEDS_A_PRODUCT.get(case.op, []):
        expected[i] = torch.float16
    assert [y.dtype for y in outputs] == expected
    for a, b in zip(outputs, plain, strict=False):
        torch.testing.assert_close(a.float(), b, atol=4e-3, rtol=2e-3)


@every_case
def test_a_backward_in_autocast_is_as_exact(case: MemoryCase) -> None:
    inputs = case.inputs(torch.float32, "cpu")
    outputs = [y for y in outputs_of(case, inputs) if y.requires_grad]
    upstream, leaves = upstream_of(outputs), leaves_of(inputs)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, leaves, upstream, retain_graph=True, materialize_grads=True
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients()
    assert all(map(torch.equal, inside, gradients()))


def strided(x: Tensor) -> Tensor:
    """Batch inside of tokens or channels, and rows that do not lie side by side."""
    if x.ndim < 3:
        return x
    size = (x.shape[1], x.shape[0], *x.shape[2:-1], x.shape[-1] + 3)
    other = x.new_zeros(size).transpose(0, 1)[..., : x.shape[-1]]
    return other.copy_(x.detach()).requires_grad_(x.requires_grad)


@every_case
def test_strided_inputs(case: MemoryCase) -> None:
    inputs = case.inputs(torch.float64, "cpu")
    others = tree_map_only(Tensor, strided, inputs)
    for a, b in zip(run(fused(case), others), run(fused(case), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.portable_only  # a launcher fills what its fake makes
@every_case
def test_fakes_know_the_results_of_strided_inputs(case: MemoryCase) -> None:
    with Recorder() as recorder:
        run(fused(case), tree_map_only(Tensor, strided, case.inputs(torch.float64, "cpu")))
    for op, args, kwargs in recorder.calls.values():
        args = tree_map_only(Tensor, Tensor.detach, args)
        torch.library.opcheck(op, args, kwargs, test_utils="test_faketensor")


@pytest.mark.portable_only  # the interpreter's own arrays are not PyTorch's
@pytest.mark.parametrize("case", CASES["reduced"], ids=lambda case: case.name)
def test_peak_memory(case: MemoryCase) -> None:
    """Results, at most two tensors more, and a chunk at work."""
    torch.use_deterministic_algorithms(False)
    inputs, call = case.inputs(torch.float32, "cpu"), fused(case)
    upstream = upstream_for(call, inputs)
    n_bytes = sum(x.nbytes for x in step(call, inputs, upstream))
    allowed = n_bytes + 2 * 4 * case.shape.numel + 2**20  # chunks that stay in cache
    assert peak_bytes(lambda: step(call, inputs, upstream)) <= allowed
