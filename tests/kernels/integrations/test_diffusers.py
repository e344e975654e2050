"""The drop-in for diffusers' CogVideoX: the same video, and RepVideo's golden values."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from tests.kernels.integrations.cogvideox import (
    GATE_VALUES,
    SIZES,
    Operators,
    assert_near,
    every_position,
    gradients,
    inputs,
    output,
    portable_only,
    tables,
    tiny,
    trained_gates,
    with_and_without_gates,
)
from tests.paths import GOLDEN
from vidgen.repvideo.model.keys import GATES, SAT_UNUSED, to_diffusers
from vidgen_kernels.integrations.diffusers import accelerate as fuse

CASES = GOLDEN / "repvideo"


def one_interpreted(rope: bool) -> pytest.MarkDecorator:
    """Both positions, the other one on the portable path alone: the interpreter is slow."""
    marks = {rope: [], not rope: [portable_only]}
    cases = [pytest.param(x, marks=marks[x]) for x in (False, True)]
    return pytest.mark.parametrize("rope", cases, ids=["sincos", "rope"])


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((CASES / f"{name}_a.json").read_text())["config"]
    return config, load_file(CASES / f"{name}_a.safetensors")


def state_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: x for name, x in tensors.items() if name.startswith("w.")}


# ---- the numbers


@pytest.mark.parametrize(
    "rope", [False, pytest.param(True, marks=portable_only)], ids=["sincos", "rope"]
)
def test_cogvideox_golden(rope: bool) -> None:
    """Output and gradients that the released model gave, once each way."""
    config, t = golden(f"diffusers_dit_{'rope' if rope else 'sincos'}")
    for name in ("run_latent_hw", "diffusers"):
        del config[name]
    model = CogVideoXTransformer3DModel(**config)
    model.load_state_dict(state_of(t))
    fuse(model)
    x, text = t["in.x"].requires_grad_(), t["in.context"].requires_grad_()
    rotary = (t["in.rope_cos"], t["in.rope_sin"]) if rope else None
    y = model(x, text, t["in.timesteps"], image_rotary_emb=rotary).sample
    assert_near(y, t["out.y"], 2e-5)
    name = "transformer_blocks.0.norm1.linear.weight"
    leaves = {"g_x": x, "g_context": text, f"gw.{name}": model.get_parameter(name)}
    for key, dx in zip(leaves, torch.autograd.grad(y, [*leaves.values()], t["in.dy"]), strict=True):
        assert_near(dx, t[f"out.{key}"], 2e-5)


@pytest.mark.parametrize(
    "rope", [pytest.param(False, marks=portable_only), True], ids=["sincos", "rope"]
)
def test_repvideo_golden(rope: bool) -> None:
    """Of RepVideo's own code: its weights in diffusers' model, its gates, its eps of the head."""
    c, t = golden(f"rep_dit_{'rope' if rope else 'sincos'}")
    model = CogVideoXTransformer3DModel(
        num_attention_heads=c["heads"],
        attention_head_dim=c["head_dim"],
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        time_embed_dim=c["time_embed_dim"],
        text_embed_dim=c["text_dim"],
        num_layers=c["num_layers"],
        sample_width=c["latent_w"],
        sample_height=c["latent_h"],
        sample_frames=c["num_frames"],
        max_text_seq_length=c["text_len"],
        use_rotary_positional_embeddings=rope,
    )
    state = to_diffusers(state_of(t))
    gates = nn.Parameter(state.pop(GATES))
    state.pop("mixins.pos_embed.pos_embedding", None)
    cos, sin, _ = (state.pop(name, None) for name in SAT_UNUSED)
    model.load_state_dict(state)
    model.norm_out.norm.eps = c["final_norm_eps"]
    fuse(model, gates)
    x, text = t["in.x"].requires_grad_(), t["in.context"].requires_grad_()
    rotary = (cos, sin) if rope else None
    y = model(x, text, t["in.timesteps"], image_rotary_emb=rotary).sample
    assert_near(y, t["out.y"])
    found = torch.autograd.grad(y, (x, text, gates), t["in.dy"])
    for key, dx in zip(("g_x", "g_context", "g_gate"), found, strict=True):
        assert_near(dx, t[f"out.{key}"])


def pipeline(rope: bool) -> Any:
    """All of it, but tiny and random."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("\u2581", -2.0), *letters]
    sizes = T5Config(vocab_size=len(words), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    text_encoder = T5EncoderModel(sizes).eval()
    channels: Any = (4, 4, 4, 4)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=channels,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=32,
        sample_width=48,
    ).eval()
    found = diffusers.CogVideoXPipeline(
        T5Tokenizer(vocab=words, extra_ids=0),
        text_encoder,
        vae,
        tiny(rope),
        diffusers.CogVideoXDDIMScheduler(),
    )
    found.set_progress_bar_config(disable=True)
    return found


def video(pipe: Any) -> Tensor:
    return pipe(
        "a cat",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        max_sequence_length=8,
    ).frames


@portable_only
@every_position
def test_pipeline(rope: bool) -> None:
    pipe = pipeline(rope)
    expected = video(pipe)
    with fuse(pipe) as handle:
        assert handle.transformer is pipe.transformer
        torch.testing.assert_close(video(pipe), expected, rtol=0, atol=1e-4)
    assert torch.equal(video(pipe), expected)
    with fuse(pipe, gates=0.5):
        changed = video(pipe)
        assert (changed - expected).abs().max() > 1e-2
    assert torch.equal(video(pipe), expected)


@portable_only
@with_and_without_gates
def test_every_block_runs_on_the_kernels(gates: list[float] | None) -> None:
    model, given = tiny(rope=True), inputs(rope=True)
    with Operators() as own:
        output(model, given)
    handle = fuse(model, gates)
    output(model, given)  # builds what is kept
    with Operators() as fused:
        output(model, given)
    n = SIZES["num_layers"]
    # of a block: two norms and a residual, which gates leave to the next block's norm
    assert fused.names.count("residual_norm_fwd") == (3 * n if gates is None else 2 * n + 1)
    assert fused.names.count("qk_norm_rope_fwd") == n
    assert fused.names.count("interval_attention_fwd") == n
    # blocks join text and video no more, but for the first; the head has two norms
    assert fused.names.count("cat") == own.names.count("cat") - 2 * n + 1
    assert fused.names.count("native_layer_norm") == 2
    assert len(fused.names) < 0.6 * len(own.names)
    handle.restore()
    with Operators() as again:
        output(model, given)
    assert again.names == own.names


@portable_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_position
def test_low_precision(rope: bool, dtype: torch.dtype) -> None:
    """Not further from the result in fp64 than diffusers' own pass is."""
    model = tiny(rope)
    exact = output(copy.deepcopy(model).to(torch.float64), inputs(rope, torch.float64))
    model, given = model.to(dtype), inputs(rope, dtype)
    own_error = (output(model, given) - exact).abs().max()
    fuse(model)
    found = output(model, given)
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 1.5 * own_error


@portable_only
def test_autocast() -> None:
    model, given = tiny(), inputs()
    expected = output(model, given)
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = output(model, given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


@portable_only
@pytest.mark.parametrize("change", ["theta", "half"])
def test_rotary_tables_of_any_kind(change: str) -> None:
    """What counts is in the tables: they are not taken for those of CogVideoX."""
    model = tiny(rope=True)
    cos, sin = tables(theta=50)
    if change == "half":  # later frames turn as earlier ones do
        cos, sin = (torch.cat([x[:12], x[6:12]]) for x in (cos, sin))
    given = {**inputs(rope=True), "image_rotary_emb": (cos, sin)}
    expected = output(model, given)
    fuse(model)
    assert_near(output(model, given), expected)


@portable_only
def test_rotary_tables_may_be_written_to() -> None:
    model, given = tiny(rope=True), inputs(rope=True)
    handle = fuse(model)
    output(model, given)
    for x, new in zip(given["image_rotary_emb"], tables(theta=50), strict=True):
        x.copy_(new)
    found = output(model, given)
    handle.restore()
    assert_near(found, output(model, given))


@portable_only
def test_rotary_tables_may_take_turns() -> None:
    """As those of two pipelines that share a model do."""
    model, given = tiny(rope=True), inputs(rope=True)
    cases = [{**given, "image_rotary_emb": tables(theta)} for theta in (10000, 50)]
    expected = [output(model, case) for case in cases]
    fuse(model)
    for i in (0, 1, 0):
        assert_near(output(model, cases[i]), expected[i])


@portable_only
def test_rotary_tables_that_are_none() -> None:
    cos, sin = tables()
    model = tiny(rope=True)
    fuse(model)
    for bad in ((cos, cos), (cos, sin[:, :8]), (cos.roll(1, dims=-1), sin)):
        with pytest.raises(ValueError, match="image_rotary_emb: expected"):
            output(model, {**inputs(), "image_rotary_emb": bad})


# ---- gates


@portable_only
@pytest.mark.parametrize("kind", ["list", "tensor", "parameter"])
def test_ways_to_give_gates(kind: str) -> None:
    model, given = tiny(), inputs()
    keys = list(model.state_dict())
    values = {"list": GATE_VALUES, "tensor": torch.tensor(GATE_VALUES), "parameter": None}[kind]
    with fuse(model, trained_gates()):
        expected = output(model, given)
    with fuse(model, trained_gates() if values is None else values):
        assert torch.equal(output(model, given), expected)
        more = ["feature_cache.gates"] if kind == "parameter" else []
        assert sorted(model.state_dict()) == sorted([*keys, *more])
        assert model.to(torch.float64).feature_cache.gates.dtype == torch.float64
        model.to(torch.float32)
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "feature_cache")


@portable_only
def test_gates_of_zero_change_nothing_and_one_number_is_for_all() -> None:
    model, given = tiny(), inputs()
    expected = output(model, given)
    with fuse(model, 0.0):
        assert_near(output(model, given), expected)
    with fuse(model, 1):
        for_all = output(model, given)
    with fuse(model, [1.0] * SIZES["num_layers"]):
        assert torch.equal(output(model, given), for_all)


@portable_only
def test_gates_train() -> None:
    model, given, gates = tiny(), inputs(), trained_gates()
    model.requires_grad_(False)
    fuse(model, gates)
    assert [x for x in model.parameters() if x.requires_grad] == [gates]
    optimizer = torch.optim.SGD([gates], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(**given)[0].square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert gates[:2].tolist() == pytest.approx(GATE_VALUES[:2])  # windows of one output


@portable_only
@with_and_without_gates
@every_position
def test_gradient_checkpointing(rope: bool, gates: list[float] | None) -> None:
    model, given = tiny(rope), inputs(rope)
    fuse(model, None if gates is None else trained_gates())
    expected = gradients(model, given)
    model.enable_gradient_checkpointing()
    for found, x in zip(gradients(model, given), expected, strict=True):
        assert torch.equal(found, x)


@portable_only
@with_and_without_gates
def test_checkpoints_keep_one_tensor_of_a_block(gates: list[float] | None) -> None:
    """With gates, layers of a window share what they keep: the outputs of layers."""
    model, given = tiny(), inputs()
    fuse(model, None if gates is None else trained_gates())
    model.enable_gradient_checkpointing()
    kept: dict[int, int] = {}

    def recording(forward: Callable) -> Callable:
        def recorded(*args, **options):
            for x in tree_leaves(args):
                if isinstance(x, Tensor) and x.ndim == 3:
                    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return forward(*args, **options)

        return recorded

    for block in model.transformer_blocks:
        block.forward = recording(block.forward)
    model(**given)[0].sum().backward()
    n_tokens, width = 8 + 3 * 2 * 3, 2 * 16
    assert sum(kept.values()) == SIZES["num_layers"] * 2 * n_tokens * width * 4
