"""No provider is timed that computes something else, or that raises."""

import dataclasses

import pytest
import torch

from bench.measure import timing
from bench.measure.case import as_tuple
from bench.memory.calls import MemoryCall
from bench.memory.registry import CASES, MemoryCase
from bench.suites import ATTENTION, MEMORY
from vidgen.shapes import TOY

pytestmark = pytest.mark.portable_only

CPU = torch.device("cpu")
DENSE, EAGER = ATTENTION.providers["sdpa_dense"], MEMORY.providers["eager"]


def off_by_one_key(case):
    """A provider that flips whether queries see the last key."""
    mask = case.dense_mask()
    mask[:, -1] = ~mask[:, -1]
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def wrong_gradient(case):
    right = DENSE.setup(case)
    return lambda q, k, v: right(q, k, v.detach() + 0.9 * (v - v.detach()))


def raises(case):
    raise RuntimeError("this peer broke\nand says more")


@pytest.mark.parametrize("setup", [off_by_one_key, wrong_gradient])
@pytest.mark.parametrize("shape", [s for s in TOY if not s.is_full], ids=lambda s: s.name)
def test_a_wrong_provider_is_reported_as_wrong(shape, setup) -> None:
    planted = dataclasses.replace(DENSE, name="planted", setup=setup)
    case = ATTENTION.make(shape, torch.float64, CPU)
    outcomes = timing.measure_group(case, True, [DENSE, planted], once=True)
    assert outcomes["sdpa_dense"].status == "measured"
    assert outcomes["planted"].status == "wrong"
    assert not outcomes["planted"].samples


def perturbed(call: MemoryCall):
    """Right outputs, except for one element."""
    right = EAGER.setup(call)

    def function(*leaves):
        first, *others = as_tuple(right(*leaves))
        bump = torch.zeros(first.shape, dtype=first.dtype)
        bump.view(-1)[-1] = 1e-2
        return first + bump, *others

    return function


def without_a_gradient(call: MemoryCall):
    """Right outputs, with a tenth of the first input's gradient."""
    right = EAGER.setup(call)
    return lambda x, *others: right(x.detach() + 0.1 * (x - x.detach()), *others)


PLANTED_IN = ("segment_n4", "qk_norm_rope", "renoise_drawn", "dpm_step")


@pytest.mark.parametrize("setup", [perturbed, without_a_gradient])
@pytest.mark.parametrize("spec", [c for c in CASES["toy"] if c.variant in PLANTED_IN])
def test_a_wrong_memory_provider_is_reported_as_wrong(spec: MemoryCase, setup) -> None:
    planted = dataclasses.replace(EAGER, name="planted", setup=setup)
    case = MEMORY.make(spec, torch.float64, CPU)
    outcomes = timing.measure_group(case, True, [EAGER, planted], once=True)
    assert outcomes["eager"].status == "measured", outcomes["eager"].reason
    assert outcomes["planted"].status == "wrong"


@pytest.mark.parametrize("spec", CASES["toy"], ids=lambda s: s.name)
def test_providers_agree_on_memory_cases(spec: MemoryCase) -> None:
    case = MEMORY.make(spec, torch.float32, CPU)
    chosen = [MEMORY.providers[name] for name in ("ours", "eager", "official")]
    for backward in (False, True):
        outcomes = timing.measure_group(case, backward, chosen, once=True)
        assert {o.status for o in outcomes.values()} <= {"measured", "unavailable"}, outcomes
        assert outcomes["ours"].samples


def test_a_provider_that_raises_is_a_result() -> None:
    planted = dataclasses.replace(DENSE, name="planted", setup=raises)
    case = ATTENTION.make(TOY[0], torch.float32, CPU)
    outcomes = timing.measure_group(case, False, [DENSE, planted], once=True)
    assert outcomes["planted"].status == "failed"
    assert outcomes["planted"].reason == "RuntimeError: this peer broke"
    assert set(outcomes["sdpa_dense"].samples) == {"fwd"}
