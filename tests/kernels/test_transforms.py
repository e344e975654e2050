"""`torch.func.grad` and `vjp` of every operator give autograd's gradients; the rest is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.memory.registry import CASES, MemoryCase
from tests.kernels.contracts import leaves_of, upstream_of
from vidgen.ops import FUSED
from vidgen_kernels import block_causal_attention, interval_attention, set_masked_attention
from vidgen_kernels.attention.intervals import IntervalMask

Call = Callable[..., tuple[Tensor, ...]]
RANKS = torch.tensor([2, 0, 1, 1, 0, 2, 3, 0])
MASK = IntervalMask.teacher_forcing([1, 3])
ATTENTION: dict[str, Call] = {
    "block_causal": lambda q, k, v: (block_causal_attention(q, k, v, [3, 5], softmax_scale=0.3),),
    "sets": lambda q, k, v: (set_masked_attention(q, k, v, RANKS),),
    "lse": lambda q, k, v: interval_attention(q, k, v, MASK, return_lse=True),
}


def attention_leaves() -> list[Tensor]:
    return list(torch.randn(3, 1, 2, 8, 4, dtype=torch.float64).unbind())


def of_case(case: MemoryCase) -> tuple[Call, list[Tensor]]:
    """A call of the differentiable inputs alone, to the outputs that depend on them."""
    inputs = case.inputs(torch.float64, "cpu")
    leaves = leaves_of(inputs)
    differentiable = [y is not None and y.requires_grad for y in case.call(FUSED, inputs)]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        by_id = {id(x): y for x, y in zip(leaves, values, strict=True)}
        outputs = case.call(FUSED, tree_map_only(Tensor, lambda x: by_id.get(id(x), x), inputs))
        return tuple(y for y, wanted in zip(outputs, differentiable, strict=True) if wanted)

    return call, [x.detach() for x in leaves]


def assert_is_autograd(call: Call, leaves: list[Tensor]) -> None:
    tracked = [x.clone().requires_grad_() for x in leaves]
    outputs = call(*tracked)
    upstream = upstream_of(list(outputs))
    expected = torch.autograd.grad(outputs, tracked, upstream, materialize_grads=True)

    def loss(*values: Tensor) -> Tensor:
        return sum((y * g).sum() for y, g in zip(call(*values), upstream, strict=True))

    everything = tuple(range(len(leaves)))
    found = torch.func.grad(loss, argnums=everything)(*leaves)
    results, vjp = torch.func.vjp(call, *leaves)
    for name, grads in (("grad", found), ("vjp", vjp(tuple(upstream)))):
        for x, y in zip(grads, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=0, msg=name)
    for x, y in zip(results, outputs, strict=True):
        torch.testing.assert_close(x, y.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES["toy"], ids=lambda case: case.name)
def test_memory_bound_operators(case: MemoryCase) -> None:
    assert_is_autograd(*of_case(case))


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    assert_is_autograd(ATTENTION[name], attention_leaves())


@pytest.mark.parametrize("name", ATTENTION)
def test_what_is_not_there_says_so(name: str) -> None:
    q, k, v = attention_leaves()

    def loss(q: Tensor) -> Tensor:
        return sum(y.square().sum() for y in ATTENTION[name](q, k, v))

    with pytest.raises(NotImplementedError, match=r"vidgen::.*_bwd has no double backward"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())(q)
    with pytest.raises(NotImplementedError, match=r"vidgen::.* has no vmap"):
        torch.func.vmap(loss)(torch.stack([q, q]))
    with pytest.raises(NotImplementedError, match=r"vidgen::.* has no vmap"):
        torch.func.jacrev(lambda q: ATTENTION[name](q, k, v)[0])(q)


def test_inside_a_graph_that_autograd_records() -> None:
    """A gradient by torch.func of one argument, and by autograd of another."""
    q, k, v = attention_leaves()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    out, vjp = torch.func.vjp(lambda q: ATTENTION["block_causal"](q, k, v)[0], q)
    (weight * vjp(torch.ones_like(out))[0].sum()).backward()
    assert weight.grad is not None
