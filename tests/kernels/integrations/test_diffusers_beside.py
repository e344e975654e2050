"""The drop-in for diffusers' CogVideoX beside LoRA, torch.compile, block caches and hooks."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import accelerate.hooks
from diffusers.hooks import HookRegistry, ModelHook, apply_first_block_cache
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from tests.kernels.integrations.cogvideox import (
    CACHES,
    GATE_VALUES,
    SIZES,
    Operators,
    Shifted,
    assert_near,
    every_position,
    gradients,
    inputs,
    output,
    tiny,
    two_steps,
    with_and_without_gates,
)
from vidgen_kernels.integrations.diffusers import accelerate as fuse

pytestmark = pytest.mark.portable_only


@pytest.mark.parametrize("before", [True, False], ids=["lora_first", "lora_after"])
@with_and_without_gates
def test_lora(gates: list[float] | None, before: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "norm1.linear", "net.2"],
        init_lora_weights=False,
    )
    adapted, given = tiny(), inputs()
    model = copy.deepcopy(adapted)
    plain = output(model, given)
    handle = None if before else fuse(model, gates)
    for x in (model, adapted):
        torch.manual_seed(2)
        x.add_adapter(config)
    handle = handle or fuse(model, gates)
    with nullcontext() if gates is None else fuse(adapted, gates):
        expected = output(adapted, given)
        of_adapted = gradients(adapted, given)
    assert_near(output(model, given), expected)
    for found, x in zip(gradients(model, given), of_adapted, strict=True):
        assert_near(found, x)
    model.disable_adapters()
    handle.restore()
    assert torch.equal(output(model, given), plain)


@pytest.mark.parametrize("before", [True, False], ids=["fused_first", "fused_after"])
@every_position
def test_fused_qkv_projections(rope: bool, before: bool) -> None:
    model, given = tiny(rope), inputs(rope)
    handle = None if before else fuse(model)
    with torch.no_grad():
        model.fuse_qkv_projections()
    for block in model.transformer_blocks:  # whichever is not used must not be
        for name in ("to_q", "to_k", "to_v"):
            nn.init.constant_(getattr(block.attn1, name).weight, torch.nan)
    processors = model.attn_processors
    expected = output(model, given)
    handle = handle or fuse(model)
    assert_near(output(model, given), expected)
    handle.restore()
    assert all(x is processors[name] for name, x in model.attn_processors.items())
    model.unfuse_qkv_projections()  # puts back what it found, of which nothing may be ours
    assert {type(x) for x in model.attn_processors.values()} == {CogVideoXAttnProcessor2_0}


@with_and_without_gates
def test_compile(gates: list[float] | None) -> None:
    """One graph, whatever comes first; a compiled model sees when it is restored."""
    torch._dynamo.reset()
    n_layers = 3 if gates else 2  # the third is the first that reads a mix
    model, given = tiny(rope=True, num_layers=n_layers), inputs(rope=True)
    plain = output(model, given)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with fuse(compiled, gates and gates[:n_layers]):
        expected = output(model, given)
        torch.testing.assert_close(output(compiled, given), expected)
    assert torch.equal(output(compiled, given), plain)


def test_compiled_gradients() -> None:
    torch._dynamo.reset()
    model, given = tiny(rope=True, num_layers=3), inputs(rope=True)
    fuse(model, nn.Parameter(torch.tensor(GATE_VALUES[:3])))
    expected = gradients(model, given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for found, x in zip(gradients(compiled, given), expected, strict=True):
        assert_near(found, x)


def test_compiled_block_by_block() -> None:
    torch._dynamo.reset()
    model, given = tiny(rope=True, num_layers=2), inputs(rope=True)
    fuse(model)
    expected = output(model, given)
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(output(model, given), expected)


@pytest.mark.parametrize("before", [True, False], ids=["cache_first", "cache_after"])
@pytest.mark.parametrize("name", CACHES)
def test_block_caches_work_without_gates(name: str, before: bool) -> None:
    model, given = tiny(rope=True), inputs(rope=True)
    without_cache = two_steps(model, given)
    if before:
        model.enable_cache(CACHES[name]())
    handle = fuse(model)
    if not before:
        model.enable_cache(CACHES[name]())
    found = two_steps(model, given)
    handle.restore()
    model._reset_stateful_cache()
    expected = two_steps(model, given)
    assert (expected[1] - without_cache[1]).abs().max() > 1e-3  # it was on
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y)
    model.disable_cache()
    assert torch.equal(two_steps(model, given)[1], without_cache[1])


def test_no_block_cache_with_gates() -> None:
    model, given = tiny(), inputs()
    model.enable_cache(CACHES["first_block"]())
    refused = pytest.raises(ValueError, match=r"expected no block cache.*FirstBlockCacheConfig")
    with refused:
        fuse(model, 0.5)
    model.disable_cache()
    fuse(model, 0.5)
    model.enable_cache(CACHES["first_block"]())
    with refused:
        two_steps(model, given)
    model.disable_cache()
    apply_first_block_cache(model, CACHES["first_block"]())
    with pytest.raises(ValueError, match=r"transformer_blocks\.0: expected no block cache"):
        two_steps(model, given)


def test_casting_hooks_work_with_gates() -> None:
    """They change weights, not what blocks exchange."""
    model, given = tiny(), inputs()
    fuse(model, GATE_VALUES)
    expected = output(model, given)
    model.enable_layerwise_casting(torch.float64, torch.float32)
    assert_near(output(model, given), expected)


class Scaled(ModelHook):
    """diffusers' kind of hook, that shows whether it runs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def post_forward(self, module: nn.Module, output: tuple) -> tuple:
        return tuple(self.factor * x for x in output)


def add_hook(block: nn.Module, name: str) -> None:
    if name == "accelerate":
        accelerate.hooks.add_hook_to_module(block, Shifted())
    else:
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(Scaled({"half": 0.5, "double": 2.0}[name]), name)


def remove_hook(block: nn.Module, name: str) -> None:
    if name == "accelerate":
        accelerate.hooks.remove_hook_from_module(block)
    else:
        HookRegistry.check_if_exists_or_initialize(block).remove_hook(name)


ORDERS = {
    "before": ["+half", "+accelerate", "fuse", "restore"],
    "after": ["fuse", "+accelerate", "+double", "restore"],
    "around": ["+half", "fuse", "+accelerate", "restore"],
    "gone before restoring": ["+half", "+accelerate", "fuse", "-accelerate", "-half", "restore"],
    "gone after restoring": ["fuse", "+half", "+double", "restore", "-half", "-double"],
    "one of two": ["+half", "fuse", "+double", "-half", "restore"],
    "twice": ["fuse", "+half", "restore", "fuse", "-half", "restore"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_hooks_on_blocks_in_any_order(order: str) -> None:
    """At every point the model does what one with the same hooks does that is never accelerated."""
    model, given = tiny(), inputs()
    other, handle = copy.deepcopy(model), None
    for step in ORDERS[order]:
        if step == "fuse":
            handle = fuse(model)
        elif step == "restore":
            assert handle is not None
            handle.restore()
            handle = None
        else:
            change = add_hook if step[0] == "+" else remove_hook
            for x in (model, other):
                change(x.transformer_blocks[1], step[1:])
        found, expected = output(model, given), output(other, given)
        assert_near(found, expected)
        assert handle is not None or torch.equal(found, expected)
        if handle is not None:
            with Operators() as fused:
                output(model, given)
            assert fused.names.count("interval_attention_fwd") == SIZES["num_layers"]
            assert fused.names.count("residual_norm_fwd") == 3 * SIZES["num_layers"]


def test_inference_mode_before_training() -> None:
    """What is kept of an inference tensor serves training too."""
    model, given = tiny(rope=True), inputs(rope=True)
    fuse(model)
    with torch.inference_mode():
        found = model(**given)[0]
    assert torch.equal(found, output(model, given))
    assert all(x.isfinite().all() for x in gradients(model, given))


def test_copies_are_models_of_their_own() -> None:
    model, given = tiny(rope=True), inputs(rope=True)
    handle = fuse(model, GATE_VALUES)
    expected = output(model, given)
    other = copy.deepcopy(model)
    handle.restore()
    for x in model.parameters():
        nn.init.zeros_(x)
    assert torch.equal(output(other, given), expected)
