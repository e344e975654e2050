"""CogVideoX's and RepVideo's transformer: released sizes, agreement with diffusers, the cache."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.contracts import living_tensors
from vidgen.ops import EAGER, FUSED, Ops
from vidgen.repvideo.checks import golden, golden_models
from vidgen.repvideo.model.config import PRESETS, CogVideoXConfig
from vidgen.repvideo.model.keys import to_sat
from vidgen.repvideo.model.layers import AdaptiveNorm, patchify, unpatchify
from vidgen.repvideo.model.transformer import CogVideoXTransformer

TINY = CogVideoXConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=12,
    num_layers=9,
    sample_width=8,
    sample_height=6,
    sample_frames=9,
    max_text_seq_length=5,
)
ROPE = replace(TINY, use_rotary_positional_embeddings=True)
LATER = replace(ROPE, patch_size_t=2, patch_bias=False, ofs_embed_dim=8)  # CogVideoX 1.5
each_ops = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])


def tiny(config: CogVideoXConfig, ops: Ops = EAGER, seed: int = 0) -> CogVideoXTransformer:
    """Random weights in fp64, none of them special."""
    torch.manual_seed(seed)
    model = CogVideoXTransformer(config, ops).double()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=0.3)
        if model.learnable_gating is not None:
            model.learnable_gating.uniform_(-0.3, 1.3)
    return model


def random_inputs(
    config: CogVideoXConfig, size: tuple[int, int, int] = (2, 6, 8), n_text: int = 5
) -> dict[str, Tensor]:
    frames, height, width = size
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "latents": normal(2, frames, config.in_channels, height, width),
        "text": normal(2, n_text, config.text_embed_dim),
        "timestep": torch.tensor([3, 801]),
    }
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = torch.tensor([2.0, 0.5])
    return inputs


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(model: CogVideoXTransformer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of inputs and weights."""
    leaves = {name: inputs[name].requires_grad_() for name in ("latents", "text")}
    leaves |= dict(model.named_parameters())
    y = model(**inputs)
    found = torch.autograd.grad(y.sin().sum(), list(leaves.values()), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


# ---- the released sizes


def of_diffusers(config: CogVideoXConfig):
    from diffusers.models.transformers.cogvideox_transformer_3d import (
        CogVideoXTransformer3DModel,
    )

    own = ("gates", "fixed_gate", "window", "out_norm_eps", "_class_name")
    options = {name: x for name, x in config.to_dict().items() if name not in own}
    return CogVideoXTransformer3DModel(**options)


@pytest.mark.portable_only
@pytest.mark.parametrize(
    ("preset", "n_parameters", "n_keys"),
    [("2b", 1_693_783_872, 736), ("5b", 5_570_283_072, 1024), ("1.5-5b", 5_570_676_352, 1024)],
)
def test_released_sizes(preset: str, n_parameters: int, n_keys: int) -> None:
    with torch.device("meta"):
        plain = CogVideoXTransformer(PRESETS[preset])
        repvideo = CogVideoXTransformer(replace(PRESETS[preset], gates=True))
        theirs = of_diffusers(PRESETS[preset])
    n_layers = PRESETS[preset].num_layers
    shapes = {name: x.shape for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in plain.state_dict().items()} == shapes
    assert sum(x.numel() for x in plain.parameters()) == n_parameters
    assert sum(x.numel() for x in repvideo.parameters()) == n_parameters + n_layers
    assert len(plain.state_dict()) == n_keys == 24 * n_layers + 16
    assert repvideo.state_dict().keys() - plain.state_dict().keys() == {"learnable_gating"}
    # SAT has 18 keys a layer and 18 more, of which one is a table that is computed
    assert len(to_sat(repvideo.state_dict())) == 18 * n_layers + 17


@pytest.mark.portable_only
def test_gates_begin_at_a_half() -> None:
    with torch.device("meta"):
        assert CogVideoXTransformer(TINY).learnable_gating is None
    gates = CogVideoXTransformer(replace(TINY, gates=True)).learnable_gating
    assert gates is not None and gates.shape == (9,) and (gates == 0.5).all()


# ---- the model of diffusers


def rotations(config: CogVideoXConfig, size: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
    """As the pipeline of diffusers makes them for a number of latent frames and latents."""
    from types import SimpleNamespace

    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

    if not config.use_rotary_positional_embeddings:
        return None
    frames, height, width = size
    pipeline = SimpleNamespace(
        vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config)
    )
    make = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return make(pipeline, 8 * height, 8 * width, frames, torch.device("cpu"))  # type: ignore


@pytest.mark.portable_only
@each_ops
def test_cases_of_later_models_and_short_windows(ops: Ops) -> None:
    config = replace(LATER, num_layers=1)
    model, inputs = tiny(config, ops), random_inputs(config)
    given = {
        "x": inputs["latents"],
        "context": inputs["text"],
        "timesteps": inputs["timestep"],
        "ofs": inputs["ofs"],
        "dy": inputs["latents"],
    }
    options = {**config.to_dict(), "run_latent_hw": [6, 8]}
    results = golden_models.diffusers_dit(options, model.state_dict(), given, ops)
    assert_near(results["y"], model(**inputs), 1e-9)

    h = torch.randn(3, 2, 7, 16, dtype=torch.float64)  # windows of one: no gate has an effect
    gates = {"transformer.learnable_gating": torch.rand(3, dtype=torch.float64)}
    chain = {"h0": h[0], "delta": h, "dh": h, "dfinal": h[0]}
    results = golden.mix_chain({"window": 1}, gates, chain, ops)
    assert_near(results["final"], h[0] + h.sum(dim=0), 1e-9)
    assert not results["g_gate"].any()


SIZES = {"trained": (3, 6, 8), "wide": (2, 4, 12), "high": (4, 10, 4), "small": (1, 2, 2)}


@pytest.mark.portable_only
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [TINY, ROPE, LATER], ids=["sincos", "rope", "later"])
def test_diffusers_agrees(config: CogVideoXConfig, size: str) -> None:
    config = replace(config, num_layers=2, out_norm_eps=1e-5)
    frames, height, width = SIZES[size]
    if config.patch_size_t:  # whole patches, within the grid of its table
        frames, height, width = 2 * frames, min(height, 6), min(width, 8)
    model, theirs = tiny(config), of_diffusers(config).double()
    theirs.load_state_dict(model.state_dict())
    inputs = random_inputs(config, (frames, height, width))
    with torch.no_grad():
        expected = theirs(
            inputs["latents"],
            inputs["text"],
            inputs["timestep"],
            ofs=inputs.get("ofs"),
            image_rotary_emb=rotations(config, (frames, height, width)),
        ).sample
        # their cosines and sines are in fp32
        assert_near(model(**inputs), expected, 1e-6)


@pytest.mark.portable_only
def test_patches_of_two_frames() -> None:
    x = torch.arange(2 * 4 * 3 * 4 * 6).view(2, 4, 3, 4, 6)
    patches = patchify(x, 2, 2)
    assert patches.shape == (2, 2 * 2 * 3, 3 * 2 * 2 * 2)
    assert patches[0, 7].tolist() == x[0, 2:4, :, 0:2, 2:4].transpose(0, 1).flatten().tolist()
    assert torch.equal(unpatchify(patches, (2, 2, 3), 2, 2), x)


# ---- operators and the cache


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, gates=True, num_layers=4),
        pytest.param(replace(ROPE, num_layers=2), marks=pytest.mark.portable_only),
        pytest.param(replace(TINY, gates=True), marks=pytest.mark.portable_only),
        pytest.param(replace(ROPE, gates=True, window=3), marks=pytest.mark.portable_only),
        pytest.param(replace(LATER, fixed_gate=0.7), marks=pytest.mark.portable_only),
        pytest.param(replace(LATER, num_layers=2), marks=pytest.mark.portable_only),
    ],
    ids=["gates", "plain", "two windows", "window of 3", "fixed", "later"],
)
def test_operators_agree(config: CogVideoXConfig) -> None:
    inputs = random_inputs(config, (2, 4, 4), n_text=3)
    expected, actual = (gradients(tiny(config, ops), inputs) for ops in (EAGER, FUSED))
    assert len(expected) > 40
    for name, x in expected.items():
        assert x.any() or name == "attn1.to_k.bias", name
        assert_near(actual[name], x)


def by_definition(model: CogVideoXTransformer, inputs: dict[str, Tensor]) -> Tensor:
    """RepVideo's loop around plain blocks: a list of outputs that restarts after 0, 6, 12, ..."""
    from vidgen.repvideo.model.layers import Stream

    n_text, outputs = inputs["text"].shape[1], []
    assert model.learnable_gating is not None
    gates = iter(model.learnable_gating)

    def mixed(module, args):
        nonlocal outputs
        stream, shared, _, ops = args
        y, gate = stream.total(n_text), next(gates)
        outputs.append(y)
        h = gate * torch.stack(outputs).mean(dim=0) + (1 - gate) * y
        if len(seen) in (0, 1, 7):  # the first entry is what layer 0, 6, ... gives
            outputs = [y] if len(seen) else []
            h = y
        seen.append(h)
        return Stream(h), shared, ops.residual_norm, ops

    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(mixed) for block in model.transformer_blocks]
    y = model(**inputs)
    for hook in hooks:
        hook.remove()
    return y


@pytest.mark.portable_only
@each_ops
def test_the_cache_is_as_defined(ops: Ops) -> None:
    model = tiny(replace(TINY, gates=True), ops)
    inputs = random_inputs(TINY)
    assert_near(model(**inputs), by_definition(model, inputs))


@pytest.mark.portable_only
@each_ops
def test_gates_of_zero_are_plain(ops: Ops) -> None:
    plain, inputs = tiny(TINY, ops), random_inputs(TINY)
    for gate in (0.0, 0.375):
        model = tiny(replace(TINY, gates=True), ops)
        gates = torch.full((TINY.num_layers,), gate)
        model.load_state_dict({**plain.state_dict(), "learnable_gating": gates})
        fixed = tiny(replace(TINY, fixed_gate=gate), ops)
        assert fixed.state_dict().keys() == plain.state_dict().keys()
        with torch.no_grad():
            expected, y = plain(**inputs), model(**inputs)
            assert_near(y, fixed(**inputs))
        assert ((y - expected).abs().max() < 1e-11) == (gate == 0)


@pytest.mark.portable_only
def test_modulation_is_not_copied() -> None:
    norm = AdaptiveNorm(32, 8)
    projected = []
    norm.linear.register_forward_hook(lambda *args: projected.append(args[-1]))
    vectors = norm.vectors(torch.randn(2, 8))
    storage = projected[0].untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == storage for x in vectors)
    assert [x.storage_offset() for x in vectors] == [32 * i for i in range(6)]


# ---- gradient checkpointing


@pytest.mark.parametrize("gates", [True, pytest.param(False, marks=pytest.mark.portable_only)])
@pytest.mark.parametrize(
    "ops",
    [
        pytest.param(EAGER, id="eager", marks=pytest.mark.portable_only),
        pytest.param(FUSED, id="fused"),
    ],
)
def test_checkpointing_changes_nothing(ops: Ops, gates: bool) -> None:
    config = replace(TINY, gates=gates, num_layers=3)
    model, inputs = tiny(config, ops), random_inputs(config, (1, 4, 4), n_text=3)
    expected = gradients(model, inputs)
    model.gradient_checkpointing = True
    for name, x in gradients(model, inputs).items():
        assert_near(x, expected[name])


def kept(config: CogVideoXConfig, inputs: dict[str, Tensor], is_checkpointed: bool) -> int:
    """Tensors of the whole sequence that wait for the backward, saved by autograd or alive."""
    model = tiny(config, FUSED)
    model.gradient_checkpointing = is_checkpointed
    shape = (2, 5 + 2 * 3 * 4, config.width)
    storages: set[int] = set()

    def pack(x: Tensor) -> Tensor:
        if x.shape[:2] == shape[:2]:
            storages.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = model(**inputs)
    storages |= {x.untyped_storage().data_ptr() for x in living_tensors() if x.shape == shape}
    y.sum().backward()  # with these hooks as well
    return len(storages)


@pytest.mark.portable_only
def test_the_cache_keeps_nothing_more_for_the_backward() -> None:
    """Under checkpointing one tensor a layer, which plain CogVideoX keeps as well."""
    inputs = random_inputs(TINY)
    plain = kept(TINY, inputs, is_checkpointed=True)
    assert kept(replace(TINY, gates=True), inputs, is_checkpointed=True) == plain
    assert TINY.num_layers <= plain <= TINY.num_layers + 3
    assert kept(TINY, inputs, is_checkpointed=False) > 5 * plain


@pytest.mark.portable_only
def test_it_compiles_as_one_graph() -> None:
    """The cache and checkpointing included."""
    model = tiny(replace(TINY, gates=True, num_layers=3), FUSED)
    model.gradient_checkpointing = True
    inputs = random_inputs(TINY, (1, 4, 4), n_text=3)
    expected = gradients(model, inputs)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    y = compiled(**inputs)
    y.sin().sum().backward()
    assert_near(y, expected["y"])
    for name, x in model.named_parameters():
        assert x.grad is not None
        assert_near(x.grad, expected[name])


# ---- errors


@pytest.mark.portable_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4, 1, 6, 8)}, r"latents: expected shape \[B, T, 4, h, w\]"),
        ({"latents": torch.zeros(2, 1, 4, 5, 8)}, "latents: expected T, h, w to be multiples"),
        ({"latents": torch.zeros(2, 0, 4, 6, 8)}, "latents: expected T, h, w to be multiples"),
        ({"text": torch.zeros(1, 5, 12)}, r"text: expected shape \[2, S, 12\], got \[1, 5, 12\]"),
        ({"text": torch.zeros(2, 5, 10)}, r"text: expected shape \[2, S, 12\]"),
        ({"timestep": torch.tensor(3)}, r"timestep: expected shape \[2\], got \[\]"),
        ({"ofs": torch.zeros(2)}, "ofs: expected None"),
        ({"positions": torch.zeros(12, 3)}, "positions: expected None without rotary"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, message: str) -> None:
    model = tiny(replace(TINY, num_layers=1))
    with pytest.raises(ValueError, match=message):
        model(**{**random_inputs(TINY, (1, 6, 8)), **change})


@pytest.mark.portable_only
def test_inputs_of_the_later_models_that_do_not_fit() -> None:
    model, inputs = tiny(replace(LATER, num_layers=1)), random_inputs(LATER)
    with pytest.raises(ValueError, match=r"positions: expected shape \[12, 3\], got \[13, 3\]"):
        model(**inputs, positions=torch.zeros(13, 3))
    with pytest.raises(ValueError, match=r"ofs: expected shape \[2\], got None"):
        model(**{**inputs, "ofs": None})
    with pytest.raises(ValueError, match=r"multiples of 2, 2, 2, got \[3, 6, 8\]"):
        model(**{**inputs, "latents": torch.zeros(2, 3, 4, 6, 8)})


@pytest.mark.portable_only
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_head_dim": 12}, "width, num_attention_heads .*: expected a multiple of 16"),
        (
            {"attention_head_dim": 24, "use_rotary_positional_embeddings": True},
            "attention_head_dim: expected a multiple of 16, got 24",
        ),
        ({"ofs_embed_dim": 4}, "ofs_embed_dim: expected time_embed_dim 8"),
        ({"gates": True, "fixed_gate": 0.5}, "fixed_gate: expected None beside gates, got 0.5"),
        ({"window": 0}, "window: expected a whole number above 0, got 0"),
        ({"sample_frames": "49"}, "sample_frames: expected a whole number above 0, got '49'"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings: exp"),
        ({"norm_eps": 1e-6}, "norm_eps: expected 1e-05, got 1e-06"),
        ({"speed": 1}, r"config: expected options of CogVideoXConfig, got also \['speed'\]"),
    ],
)
def test_options_that_are_not_built(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CogVideoXConfig.from_dict({**TINY.to_dict(), **options})


@pytest.mark.portable_only
def test_config_of_diffusers() -> None:
    config = CogVideoXConfig.from_dict({"num_layers": 3, "_class_name": "x", "dropout": 0.0})
    assert config == CogVideoXConfig(num_layers=3, out_norm_eps=1e-5)
    assert CogVideoXConfig.from_dict(LATER.to_dict()) == LATER
