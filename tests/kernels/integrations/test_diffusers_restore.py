"""The drop-in for diffusers' CogVideoX: the way back, and models that are left alone."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import accelerate.hooks
import diffusers
from diffusers.models.attention_processor import AttnProcessor2_0, CogVideoXAttnProcessor2_0

from tests.kernels.integrations.cogvideox import (
    CACHES,
    GATE_VALUES,
    Shifted,
    assert_same,
    inputs,
    output,
    snapshot,
    tiny,
    trained_gates,
    with_and_without_gates,
)
from vidgen_kernels.integrations.diffusers import SUPPORTED
from vidgen_kernels.integrations.diffusers import accelerate as fuse

pytestmark = pytest.mark.portable_only


@with_and_without_gates
def test_restore(gates: list[float] | None) -> None:
    model, given = tiny(), inputs()
    before, expected = snapshot(model), output(model, given)
    handle = fuse(model, None if gates is None else trained_gates())
    assert not torch.equal(output(model, given), expected)
    for _ in range(2):
        handle.restore()
        assert_same(model, before)
        assert torch.equal(output(model, given), expected)
    with pytest.raises(KeyError), fuse(model, gates):
        raise KeyError
    assert_same(model, before)


def test_restore_keeps_what_others_have_set() -> None:
    model = tiny()
    handle = fuse(model)
    mine = CogVideoXAttnProcessor2_0()
    model.transformer_blocks[1].attn1.set_processor(mine)
    handle.restore()
    assert model.transformer_blocks[1].attn1.processor is mine


@with_and_without_gates
def test_check(gates: list[float] | None) -> None:
    model, given = tiny(rope=True, dropout=0.5).train(), inputs(rope=True)
    handle = fuse(model, None if gates is None else trained_gates())
    before, random_state = snapshot(model), torch.get_rng_state()
    del given["return_dict"]
    difference = handle.check(**given)
    assert 0 < difference < 1e-5
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    if gates is not None:
        assert model.feature_cache.gates.tolist() == pytest.approx(GATE_VALUES)
    model.transformer_blocks[2].attn1.processor.angles = lambda tables, like: torch.zeros(18, 8)
    assert handle.check(**given) > 1e-3
    handle.restore()
    with pytest.raises(ValueError, match="expected an accelerated one"):
        handle.check(**given)


def test_no_check_with_a_block_cache() -> None:
    model = tiny()
    handle = fuse(model)
    model.enable_cache(CACHES["first_block"]())
    with pytest.raises(ValueError, match="expected no block cache"):
        handle.check(**inputs())


# ---- errors


class Wrapper(nn.Module):
    pass


def wrap_forward(model: Any) -> None:
    block = model.transformer_blocks[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)


def hook_norm(model: Any) -> None:
    accelerate.hooks.add_hook_to_module(model.transformer_blocks[0].norm1.norm, Shifted())


def replace_norm(model: Any) -> None:
    model.transformer_blocks[3].attn1.norm_k = nn.RMSNorm(16)


def set_processor(model: Any) -> None:
    model.set_attn_processor(AttnProcessor2_0())


BAD_MODELS = {
    "twice": (fuse, r"transformer_blocks\.0: expected a model that is not accelerated"),
    "another forward": (wrap_forward, r"transformer_blocks\.1: expected the forward method"),
    "hook on a norm": (hook_norm, r"blocks\.0\.norm1\.norm: expected no hook on a norm"),
    "another norm": (replace_norm, r"expected a LayerNorm, got RMSNorm"),
    "another processor": (set_processor, r"transformer_blocks\.0.*AttnProcessor2_0"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_are_refused_stay_as_they_are(name: str) -> None:
    change, message = BAD_MODELS[name]
    model = tiny()
    change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fuse(model, 0.5)
    assert_same(model, before)


BAD_GATES = {
    "few": ([0.5, 0.5], r"expected shape \[4\], got \[2\]"),
    "two dims": (torch.zeros(1, 4), r"expected shape \[4\], got \[1, 4\]"),
    "integers": (torch.zeros(4, dtype=torch.int64), "expected a floating-point dtype"),
    "not finite": ([0.5, 0.5, 0.5, float("nan")], "expected finite numbers"),
    "one that is not finite": (float("inf"), "expected finite numbers"),
    "another device": (
        nn.Parameter(torch.zeros(4, device="meta")),
        "expected a Parameter on cpu.*meta",
    ),
}


@pytest.mark.parametrize("name", BAD_GATES)
def test_gates_that_do_not_fit(name: str) -> None:
    gates, message = BAD_GATES[name]
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"gates: {message}"):
        fuse(model, gates)
    assert_same(model, before)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, Wrapper()], ids=lambda x: str(x))
def test_other_models(model: Any) -> None:
    with pytest.raises(ValueError, match="model: expected a CogVideoXTransformer3DModel"):
        fuse(model)


def test_attention_masks_are_refused() -> None:
    model = tiny()
    fuse(model)
    x = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        model.transformer_blocks[0].attn1(x, x, attention_mask=torch.zeros(1, 8))


def test_other_versions_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before = snapshot(model)
    assert diffusers.__version__ in SUPPORTED
    monkeypatch.setattr(diffusers, "__version__", "0.30.0")
    with pytest.raises(ImportError, match=rf"expected version {SUPPORTED[0]}, got 0\.30\.0"):
        fuse(model)
    assert_same(model, before)
