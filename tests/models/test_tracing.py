"""Models on `meta` and under FakeTensorMode, for shapes and estimates of memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from vidgen.nova.checks import example as nova
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.ops import EAGER, FUSED, Ops
from vidgen.pyramid_flow.checks import example as pyramid_flow
from vidgen.pyramid_flow.model.flux import PyramidFluxTransformer
from vidgen.pyramid_flow.model.mmdit import PyramidDiffusionMMDiT
from vidgen.repvideo.checks import example as repvideo
from vidgen.repvideo.model.transformer import CogVideoXTransformer

pytestmark = pytest.mark.portable_only

OPS = {"eager": EAGER, "fused": FUSED}
every_ops = pytest.mark.parametrize("ops", OPS.values(), ids=OPS)


class Family(NamedTuple):
    """A model, and inputs to call it with."""

    network: Callable[..., Any]
    config: Any
    filled: Callable[..., Any]  # (config, ops) -> network with random weights
    inputs: Callable[[Any], Any]  # (network) -> an example, called with a network


def _pyramid_inputs(model: Any) -> Any:
    return pyramid_flow.training_example(model, size="toy", n_frames=2)


FLUX, MMDIT = (pyramid_flow.example_config(name, 2, 1) for name in ("flux", "mmdit"))
FAMILIES = {
    "flux": Family(PyramidFluxTransformer, FLUX, pyramid_flow.example_model, _pyramid_inputs),
    "mmdit": Family(PyramidDiffusionMMDiT, MMDIT, pyramid_flow.example_model, _pyramid_inputs),
    "repvideo": Family(
        CogVideoXTransformer,
        repvideo.example_config("2b", 2, 2),
        repvideo.example_model,
        lambda model: repvideo.training_example(model, size="toy"),
    ),
    "nova": Family(NovaTransformer, nova.CONFIGS["toy"], nova.example_model, nova.training_example),
}


def _gradients(model: nn.Module, example: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    example(model).backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@every_ops
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_needs_no_values(name: str, ops: Ops) -> None:
    family, fake = FAMILIES[name], FakeTensorMode()
    model = family.filled(family.config, ops)
    example = family.inputs(model)
    with fake:
        network = family.network(family.config, ops)
        of_fakes = _gradients(network, tree_map_only(Tensor, fake.from_tensor, example))
    with torch.device("meta"):
        network = family.network(family.config, ops)
    on_meta = _gradients(network, tree_map_only(Tensor, lambda x: x.to("meta"), example))

    expected = _gradients(model, example)  # last: nothing that was kept may stand for values
    for name, gradient in expected.items():
        assert torch.isfinite(gradient).all()
        assert on_meta[name].shape == of_fakes[name].shape == gradient.shape
    assert expected.keys() == on_meta.keys() == of_fakes.keys()
