"""What others do to an accelerated CogVideoX later: seen, or refused in one line."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from tests.kernels.integrations.cogvideox import (
    GATE_VALUES,
    assert_near,
    inputs,
    output,
    tiny,
    with_and_without_gates,
)
from vidgen_kernels.integrations.diffusers import accelerate as fuse

pytestmark = pytest.mark.portable_only


def halve(video: Tensor, text: Tensor) -> None:
    video.data = video.data / 2


def halve_text(video: Tensor, text: Tensor) -> None:
    text.data = text.data / 2


def halve_in_place(video: Tensor, text: Tensor) -> None:
    video.mul_(0.5)


@pytest.mark.parametrize("change", [halve, halve_text, halve_in_place])
def test_data_that_a_hook_exchanges_is_read(change) -> None:
    """A block hands on two views of one tensor, and remembers that."""
    plain, fused = tiny(), tiny()
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        model.transformer_blocks[1].register_forward_hook(
            lambda module, args, result: change(*result)
        )
    with fuse(fused):
        assert_near(output(fused, inputs()), output(plain, inputs()))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
@pytest.mark.parametrize("first", ["hook", "gates"])
def test_plain_hooks_are_refused_with_gates(kind: str, first: str) -> None:
    """They would see a sum that is not finished."""
    model = tiny()

    def mine(*arguments) -> None: ...

    def register():
        return getattr(model.transformer_blocks[2], f"register_{kind}")(mine)

    expected = rf"transformer_blocks\.2: expected no block cache .* got {kind} mine"
    if first == "hook":
        handle = register()
        with pytest.raises(ValueError, match=expected):
            fuse(model, gates=GATE_VALUES)
        handle.remove()
        fuse(model, gates=GATE_VALUES).restore()
        return
    with fuse(model, gates=GATE_VALUES):
        handle = register()
        with pytest.raises(ValueError, match=expected):
            output(model, inputs())
        handle.remove()
        output(model, inputs())


def offload_leaves_of_diffusers(model: nn.Module) -> None:
    apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )  # fmt: skip


def offload_leaves_of_accelerate(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


OFFLOADS = [offload_leaves_of_diffusers, offload_leaves_of_accelerate]


@with_and_without_gates
@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("first", ["offload", "fuse"])
def test_offloading_of_leaves_is_refused_in_either_order(gates, offload, first: str) -> None:
    model = tiny()
    expected = r"transformer_blocks\.0\.norm1\.norm: expected no hook on a norm, whose weight is"
    if first == "offload":
        offload(model)
        with pytest.raises(ValueError, match=expected):
            fuse(model, gates=gates)
        return
    fuse(model, gates=gates)
    offload(model)
    with pytest.raises(ValueError, match=expected):
        output(model, inputs())


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        ("norm1", "norm", r"transformer_blocks\.1\.norm1\.norm: expected a LayerNorm, got RMSNorm"),
        ("attn1", "norm_q", r"blocks\.1\.attn1\.norm_q: expected a LayerNorm, got RMSNorm"),
        ("", "norm2", r"blocks\.1\.norm2: expected a CogVideoXLayerNormZero, got RMSNorm"),
    ],
)
def test_norms_that_are_exchanged_later(owner: str, name: str, message: str) -> None:
    model = tiny()
    with fuse(model):
        setattr(model.transformer_blocks[1].get_submodule(owner), name, nn.RMSNorm(32))
        with pytest.raises(ValueError, match=message):
            output(model, inputs())
