"""What the interpreter cannot do is refused; the portable forms of the same operators can."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.memory.registry import CASES, MemoryCase
from vidgen.ops import FUSED
from vidgen_kernels import block_causal_attention, set_masked_attention
from vidgen_kernels.common.launch import is_interpreted

REFUSED = pytest.raises(NotImplementedError, match=r"vidgen::.* under TRITON_INTERPRET=1, got bfl")


def refuses(call) -> None:
    if is_interpreted():
        with REFUSED:
            call()
    else:
        assert all(y.isfinite().all() for y in call() if y is not None)


@pytest.mark.parametrize("case", CASES["toy"], ids=lambda case: case.name)
def test_bf16_is_not_interpreted(case: MemoryCase) -> None:
    inputs = case.inputs(torch.bfloat16, "cpu")
    inputs = tree_map_only(Tensor, Tensor.detach, inputs)
    refuses(lambda: case.call(FUSED, inputs))


def test_bf16_attention_is_not_interpreted() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 16, dtype=torch.bfloat16).unbind()
    refuses(lambda: [block_causal_attention(q, k, v, [3, 5])])
    refuses(lambda: [set_masked_attention(q, k, v, torch.arange(8))])


def test_bf16_of_autocast_is_not_interpreted() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refuses(lambda: [block_causal_attention(q, k, v, [3, 5])])
