"""Pyramid Flow's transformers: released sizes, laws of packing, agreement of eager and fused."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vidgen.ops import EAGER, FUSED, IntervalMask
from vidgen.pyramid_flow.checks.example import example_config, example_model, example_step
from vidgen.pyramid_flow.model.config import FluxConfig, MMDiTConfig
from vidgen.pyramid_flow.model.flux import PyramidFluxTransformer
from vidgen.pyramid_flow.model.layers import Stream
from vidgen.pyramid_flow.model.mmdit import PyramidDiffusionMMDiT
from vidgen.pyramid_flow.model.positions import coordinates, sincos_table, spatial_embedding, times
from vidgen.pyramid_flow.model.sequence import pack, pack_patches, patchify, unpatchify
from vidgen.pyramid_flow.model.transformer import PyramidTransformer
from vidgen_kernels.common.launch import is_interpreted

TINY = {
    "flux": FluxConfig(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 4, 4),
    ),
    "mmdit": MMDiTConfig(
        in_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        sample_size=16,
        pos_embed_max_size=16,
    ),
}
every_model = pytest.mark.parametrize("name", TINY)

# (frames, height, width) of the clips of each column, oldest first
COLUMNS = [[(2, 4, 4), (1, 8, 8), (1, 16, 16), (1, 16, 16)], [(1, 4, 8)], [(1, 8, 4), (2, 8, 4)]]


def tiny(name: str, ops=EAGER, dtype=torch.float64, **options) -> PyramidTransformer:
    return example_model(replace(TINY[name], **options), ops, dtype=dtype)


def random_inputs(
    columns=COLUMNS, rows: int = 2, n_text: int = 5, valid: list[int] | None = None
) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n = rows * len(columns)
    lengths = torch.tensor(valid or [1 + 2 * i % n_text for i in range(n)])
    return {
        "columns": [[normal(rows, 4, *clip) for clip in column] for column in columns],
        "timestep": torch.linspace(1000, 1, n, dtype=torch.float64),
        "text": normal(n, n_text, 10),
        "text_mask": (torch.arange(n_text) < lengths[:, None]).long(),
        "pooled": normal(n, 6),
    }


def alone(inputs: dict, i: int) -> dict:
    """The inputs of one column."""
    rows = slice(i, None, len(inputs["columns"]))
    per_sample = {name: x[rows] for name, x in inputs.items() if name != "columns"}
    return {"columns": [inputs["columns"][i]], **per_sample}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- the released sizes


def linear(name: str, n_out: int, n_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def common_keys(d: int, n_pooled: int) -> dict[str, tuple[int, ...]]:
    embedders = (("timestep", 256), ("text", n_pooled))
    keys = {
        k: shape
        for name, n_in in embedders
        for k, shape in (
            linear(f"time_text_embed.{name}_embedder.linear_1", d, n_in)
            | linear(f"time_text_embed.{name}_embedder.linear_2", d, d)
        ).items()
    }
    keys |= linear("context_embedder", d, 4096)
    return keys | linear("norm_out.linear", 2 * d, d) | linear("proj_out", 64, d)


def dual_keys(i: int, d: int, text_norm: str, drops_text: bool = False) -> dict:
    keys = linear("norm1.linear", 6 * d, d)
    keys |= linear("norm1_context.linear", (2 if drops_text else 6) * d, d)
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"):
        keys |= linear(f"attn.{name}", d, d)
    norms = ("norm_q", "norm_k", f"{text_norm}_q", f"{text_norm}_k")
    keys |= {f"attn.{name}.weight": (64,) for name in norms}
    keys |= linear("ff.net.0.proj", 4 * d, d) | linear("ff.net.2", d, 4 * d)
    if not drops_text:
        keys |= linear("attn.to_add_out", d, d)
        keys |= linear("ff_context.net.0.proj", 4 * d, d) | linear("ff_context.net.2", d, 4 * d)
    return {f"transformer_blocks.{i}.{k}": shape for k, shape in keys.items()}


def flux_keys() -> dict[str, tuple[int, ...]]:
    d = 1920
    keys = common_keys(d, 768) | linear("x_embedder", d, 64)
    for i in range(8):
        keys |= dual_keys(i, d, "norm_added")
    for i in range(16):
        block = linear("norm.linear", 3 * d, d) | linear("proj_mlp", 4 * d, d)
        block |= linear("proj_out", d, 5 * d)
        for name in ("to_q", "to_k", "to_v"):
            block |= linear(f"attn.{name}", d, d)
        block |= {"attn.norm_q.weight": (64,), "attn.norm_k.weight": (64,)}
        keys |= {f"single_transformer_blocks.{i}.{k}": shape for k, shape in block.items()}
    return keys


def mmdit_keys() -> dict[str, tuple[int, ...]]:
    d = 1536
    keys = common_keys(d, 2048) | {"pos_embed.pos_embed": (1, 192 * 192, d)}
    keys |= {"pos_embed.proj.weight": (d, 16, 2, 2), "pos_embed.proj.bias": (d,)}
    for i in range(24):
        keys |= dual_keys(i, d, "norm_add", drops_text=i == 23)
    return keys


@pytest.mark.portable_only
@pytest.mark.parametrize(
    ("build", "keys", "n_keys", "n_parameters"),
    [
        (PyramidFluxTransformer, flux_keys(), 496, 1_972_059_200),
        (PyramidDiffusionMMDiT, mmdit_keys(), 779, 2_028_334_144),
    ],
)
def test_released_sizes(build, keys: dict, n_keys: int, n_parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == keys
    assert len(keys) == n_keys
    assert sum(x.numel() for x in model.parameters()) == n_parameters


@pytest.mark.portable_only
@every_model
def test_a_fresh_model_predicts_zero(name: str) -> None:
    build = PyramidFluxTransformer if name == "flux" else PyramidDiffusionMMDiT
    model = build(TINY[name], FUSED).double()
    assert all((x == 0).all() for x in model.predict(**random_inputs()))


# ---- laws


@every_model
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", ["small", pytest.param("all", marks=pytest.mark.portable_only)])
def test_operators_agree(name: str, causal: bool, size: str) -> None:
    options, inputs, found = {}, random_inputs(), {}
    if size == "small":  # seconds where kernels are interpreted
        options = {"num_layers": 2 if name == "mmdit" else 1, "num_attention_heads": 1}
        options |= {"num_single_layers": 1} if name == "flux" else {}
        inputs = random_inputs([[(1, 2, 2), (1, 4, 4)], [(1, 2, 2)]], rows=1)
    for ops in (EAGER, FUSED):
        model = tiny(name, ops, **options)
        out = model.predict(**inputs, causal=causal)
        sum(x.square().mean() for x in out).backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        found[ops] = [*out, *gradients]
        assert [x.shape for x in out] == [column[-1].shape for column in inputs["columns"]]
    assert len(found[EAGER]) > 50
    for actual, expected in zip(found[FUSED], found[EAGER], strict=True):
        assert_near(actual, expected)


@pytest.mark.portable_only
@every_model
@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])
def test_packed_is_each_alone(name: str, ops) -> None:
    model, inputs = tiny(name, ops), random_inputs()
    with torch.no_grad():
        for i, packed in enumerate(model.predict(**inputs)):
            (expected,) = model.predict(**alone(inputs, i))
            assert_near(packed, expected)


@pytest.mark.portable_only
@every_model
def test_padding_is_not_there(name: str) -> None:
    """Removing the padding or changing its numbers changes no result."""
    model, inputs = tiny(name, FUSED), random_inputs(COLUMNS[:1], rows=1, valid=[3])
    with torch.no_grad():
        (padded,) = model.predict(**inputs)
        inputs["text"][:, 3:] = 100.0
        (other,) = model.predict(**inputs)
        inputs |= {"text": inputs["text"][:, :3], "text_mask": None}
        (short,) = model.predict(**inputs)
    assert_near(padded, short)
    assert torch.equal(padded, other)


@pytest.mark.portable_only
@every_model
def test_batch_rows_are_apart(name: str) -> None:
    model, inputs = tiny(name, FUSED), random_inputs(rows=3)
    one = {k: x[3:6] for k, x in inputs.items() if k != "columns"}
    one["columns"] = [[clip[1:2] for clip in column] for column in inputs["columns"]]
    with torch.no_grad():
        for x, expected in zip(model.predict(**inputs), model.predict(**one), strict=True):
            assert_near(x[1:2], expected)


@pytest.mark.portable_only
def test_mask_says_what_the_official_rule_says() -> None:
    """Query and key are no padding, and the key is not later than the query; text is at time 0."""
    columns = (((2, 1, 2), (1, 2, 2)), ((3, 1, 1),))
    n_text, valid = 3, torch.tensor([[1, 3], [2, 0]])  # [B, columns]
    text_mask = (torch.arange(n_text) < valid.reshape(-1, 1)).long()
    for causal in (True, False):
        dense = pack(columns, text_mask, text_mask, causal=causal, n_axes=1).mask.to_dense()
        start = 0
        for i, column in enumerate(columns):
            time = [0] * n_text + times(column).int().tolist()
            for b, q, k in product(range(2), range(len(time)), range(len(time))):
                is_real = [x >= n_text or x < valid[b, i] for x in (q, k)]
                expected = all(is_real) and (not causal or time[q] >= time[k])
                assert dense[b, start + q, start + k] == expected
            assert dense[:, start : start + len(time)].sum() == (
                dense[:, start : start + len(time), start : start + len(time)].sum()
            )
            start += len(time)


@pytest.mark.portable_only
def test_eager_attention_runs_packed_sequences_one_by_one() -> None:
    """The result is that of one dense mask, which is not built."""
    parts = [IntervalMask.block_causal([3, 2]), IntervalMask.full([2, 4], [5, 1])]
    mask = IntervalMask.pack([parts[0], IntervalMask.pad_text(parts[1], 2, [1, 2])])
    dense = mask.to_dense()
    q, k, v = (torch.randn(2, 4, n, 6, dtype=torch.float64) for n in (11, 11, 11))
    out, lse = EAGER.interval_attention(q, k, v, mask, return_lse=True)
    expected, expected_lse = EAGER.interval_attention(
        q, k, v, replace(mask, parts=()), return_lse=True
    )
    assert dense.shape == (2, 11, 11)
    assert_near(out, expected)
    assert_near(lse, expected_lse)


def largest_allocation(run: Callable[[], object]) -> int:
    """The bytes of the largest allocation while ``run`` runs."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return max(e.nbytes() for e in events if e.name() == "[memory]")


@pytest.mark.portable_only
@every_model
def test_a_training_step_holds_no_square_tensor(name: str) -> None:
    """No tensor of L x L elements, even of bytes. The official code has one for each column."""
    frames = [(4, 16, 16), (9, 32, 32)]
    inputs = random_inputs([frames, frames], rows=1)
    inputs = {
        k: x if k == "text_mask" else tree_map(lambda t: t.float(), x) for k, x in inputs.items()
    }
    length = 5 + sum(f * h * w // 4 for f, h, w in frames)
    found = {}
    for ops in (FUSED, EAGER):
        model = tiny(name, ops, torch.float32, num_attention_heads=1)
        found[ops] = largest_allocation(
            lambda model=model: sum(x.square().mean() for x in model.predict(**inputs)).backward()
        )
    assert found[FUSED] < length**2 <= found[EAGER]


@pytest.mark.portable_only
@every_model
def test_checkpointing_changes_no_number(name: str) -> None:
    inputs, found, calls = random_inputs(), {}, {}
    for ratio in (None, 0.0, 0.5):
        options = {"use_gradient_checkpointing": ratio is not None}
        model = tiny(name, FUSED, **options, gradient_checkpointing_ratio=ratio or 0.0)
        counts = calls[ratio] = {}
        for kind in ("transformer_blocks", "single_transformer_blocks"):
            for i, block in enumerate(getattr(model, kind, [])):
                key = f"{kind}.{i}"
                block.register_forward_pre_hook(
                    lambda *_, key=key, counts=counts: counts.update({key: counts.get(key, 0) + 1})
                )
        sum(x.square().mean() for x in model.predict(**inputs)).backward()
        found[ratio] = [x.grad for x in model.parameters() if x.grad is not None]
    for ratio in (0.0, 0.5):
        for actual, expected in zip(found[ratio], found[None], strict=True):
            assert_near(actual, expected, 1e-14)
    twice = {ratio: [k for k, n in counts.items() if n == 2] for ratio, counts in calls.items()}
    assert twice[None] == []
    if name == "flux":  # index <= ratio * blocks
        kinds = ("transformer_blocks", "single_transformer_blocks")
        assert twice[0.0] == [f"{kind}.0" for kind in kinds]
        assert twice[0.5] == [f"{kind}.{i}" for kind in kinds for i in (0, 1)]
    else:  # index >= ratio * blocks
        assert twice[0.0] == [f"transformer_blocks.{i}" for i in range(3)]
        assert twice[0.5] == ["transformer_blocks.1", "transformer_blocks.2"]


@pytest.mark.portable_only
@every_model
def test_a_packing_serves_all_steps(name: str) -> None:
    model, inputs = tiny(name, FUSED), random_inputs()
    packing = model.pack(inputs["columns"], inputs["text"], inputs["text_mask"], causal=False)
    patches = pack_patches(inputs["columns"])
    with torch.no_grad():
        text_tokens, pooled = model.embed_text(inputs["text"], inputs["pooled"])
        for t in (800.0, 400.0):
            inputs["timestep"] = torch.full_like(inputs["timestep"], t)
            condition = model.condition(inputs["timestep"], pooled)
            again = packing.unpack(model(patches, text_tokens, condition, packing))
            for x, expected in zip(again, model.predict(**inputs, causal=False), strict=True):
                assert torch.equal(x, expected)


@pytest.mark.portable_only
@every_model
def test_autocast_is_as_good_as_eager(name: str) -> None:
    """Weights and gradients are in fp32, results in the dtype of autocast."""
    inputs, found = random_inputs(), {}
    for ops, dtype in ((EAGER, torch.float64), (EAGER, torch.float32), (FUSED, torch.float32)):
        given = {k: x if k == "text_mask" else tree_map(lambda t, d=dtype: t.to(d), x)
                 for k, x in inputs.items()}  # fmt: skip
        model = tiny(name, ops, dtype)
        with torch.autocast("cpu", torch.bfloat16 if not is_interpreted() else torch.float16,
                            enabled=dtype == torch.float32):  # fmt: skip
            out = model.predict(**given)
            sum(x.float().square().mean() for x in out).backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        assert all(x.dtype == dtype for x in gradients)
        found[ops, dtype] = [*out, *gradients]
    for x, eager, fused in zip(*found.values(), strict=True):
        assert fused.dtype == eager.dtype
        bound = 2 * (eager - x).abs().max() + 0.01 * x.abs().max()
        assert (fused - x).abs().max() <= bound


@pytest.mark.portable_only
@every_model
def test_compiles_whole(name: str) -> None:
    options = {"num_layers": 1} | ({"num_single_layers": 1} if name == "flux" else {})
    model, inputs = tiny(name, FUSED, **options), random_inputs([[(2, 4, 4), (1, 8, 8)]])
    compiled = torch.compile(model.predict, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for actual, expected in zip(compiled(**inputs), model.predict(**inputs), strict=True):
            assert_near(actual, expected)


@pytest.mark.portable_only
@every_model
def test_half_precision_is_as_good_as_eager(name: str) -> None:
    inputs, found = random_inputs(), {}
    for ops, dtype in ((EAGER, torch.float64), (EAGER, torch.float16), (FUSED, torch.float16)):
        given = {k: x if k == "text_mask" else tree_map(lambda t, d=dtype: t.to(d), x)
                 for k, x in inputs.items()}  # fmt: skip
        with torch.no_grad():
            found[ops, dtype] = tiny(name, ops, dtype).predict(**given)
    exact = found[EAGER, torch.float64]
    for fused, eager, x in zip(
        found[FUSED, torch.float16], found[EAGER, torch.float16], exact, strict=True
    ):
        assert fused.dtype == torch.float16
        bound = 2 * (eager - x).abs().max() + torch.finfo(torch.float16).eps * x.abs().max()
        assert (fused - x).abs().max() <= bound


@pytest.mark.portable_only
def test_clipping_to_fp16() -> None:
    """In fp16, numbers that are too large become the largest number."""
    for dtype, expected in ((torch.float16, 65504.0), (torch.float32, 90000.0)):
        x, gate = torch.full((1, 2, 3), 6e4, dtype=dtype), torch.full((1, 3), 0.5, dtype=dtype)
        (total,) = Stream([x], x, [gate]).clipped().total()
        assert (total == expected).all() and total.dtype == dtype


# ---- positions and patches


@pytest.mark.portable_only
def test_history_lies_where_it_is_in_the_picture() -> None:
    column = ((2, 2, 2), (1, 4, 4), (1, 8, 8))
    places = coordinates(column)
    assert times(column).tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 16 + [3.0] * 64
    assert torch.equal(places[:, 0], times(column))
    assert places[:4, 1:].tolist() == [[1.5, 1.5], [1.5, 5.5], [5.5, 1.5], [5.5, 5.5]]
    assert places[8:12, 1:].tolist() == [[0.5, x] for x in (0.5, 2.5, 4.5, 6.5)]
    assert places[24:32, 2].tolist() == [float(x) for x in range(8)]


@pytest.mark.portable_only
def test_spatial_embedding() -> None:
    table = sincos_table(16, 12, 0.5)
    whole = spatial_embedding(table, (12, 12), (12, 12)).unflatten(0, (12, 12))
    assert torch.equal(whole, table)
    assert torch.equal(table[3, :, :8], table[7, :, :8])  # half of the channels tell the column
    assert torch.equal(table[:, 3, 8:], table[:, 7, 8:])
    middle = spatial_embedding(table, (4, 6), (4, 6)).unflatten(0, (4, 6))
    assert torch.equal(middle, table[4:8, 3:9])
    halved = spatial_embedding(table, (2, 3), (4, 6)).unflatten(0, (2, 3))
    mean = middle.unflatten(1, (3, 2)).mean(2).unflatten(0, (2, 2)).mean(1)
    assert_near(halved, mean, 1e-6)
    plain = spatial_embedding(table, (2, 3), (4, 6), interpolate=False).unflatten(0, (2, 3))
    assert torch.equal(plain, table[5:7, 4:7])
    with pytest.raises(ValueError, match="at most 12 tokens a side, got 4 x 14"):
        spatial_embedding(table, (4, 14), (4, 14))


@pytest.mark.portable_only
def test_patches_come_back() -> None:
    clip = torch.arange(2 * 3 * 2 * 4 * 6).reshape(2, 3, 2, 4, 6)
    tokens = patchify(clip)
    assert tokens.shape == (2, 2 * 2 * 3, 12)
    assert tokens[1, 4].tolist() == [
        clip[1, c, 0, 2 + p, 2 + q].item() for p, q, c in product(range(2), range(2), range(3))
    ]
    assert torch.equal(unpatchify(tokens, (2, 2, 3)), clip)


# ---- options and errors


@pytest.mark.portable_only
@every_model
def test_options_of_positions(name: str) -> None:
    inputs = random_inputs()
    if name == "mmdit":
        with torch.no_grad():
            base = tiny(name).predict(**inputs)
            for option in ("add_temp_pos_embed", "interp_condition_pos"):
                models = [tiny(name, ops, **{option: False}) for ops in (EAGER, FUSED)]
                pairs = [model.predict(**inputs) for model in models]
                assert not torch.allclose(pairs[0][0], base[0])
                assert_near(pairs[0][0], pairs[1][0])
    with torch.no_grad():
        as_configured = tiny(name, use_temporal_causal=False).predict(**inputs)[0]
        assert torch.equal(as_configured, tiny(name).predict(**inputs, causal=False)[0])


BAD_INPUTS = {
    "no columns": ({"columns": []}, "columns"),
    "empty column": ({"columns": [[]]}, "columns"),
    "channels": ({"columns": [[torch.zeros(1, 3, 1, 4, 4)]]}, r"\[1, 4, frames"),
    "odd sides": ({"columns": [[torch.zeros(1, 4, 1, 4, 5)]]}, r"multiples of 2.*\[1, 4, 5\]"),
    "other batch": (
        {"columns": [[torch.zeros(1, 4, 1, 4, 4), torch.zeros(2, 4, 1, 4, 4)]]},
        r"\[2, 4, 1, 4, 4\]",
    ),
    "timesteps": ({"timestep": torch.zeros(3)}, "timestep: expected 1 rows"),
    "pooled": ({"pooled": torch.zeros(2, 6)}, "pooled"),
    "text": ({"text": torch.zeros(2, 5, 10)}, "text"),
    "mask shape": ({"text_mask": torch.ones(1, 4)}, r"text_mask: expected shape \[1, 5\]"),
    "mask order": ({"text_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "padding after the text"),
}


@pytest.mark.portable_only
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_inputs(bad: str) -> None:
    change, message = BAD_INPUTS[bad]
    with pytest.raises(ValueError, match=message):
        tiny("flux").predict(**(random_inputs([[(1, 4, 4)]], rows=1) | change))


@pytest.mark.portable_only
def test_example_steps_have_released_sizes() -> None:
    with torch.device("meta"):
        assert example_config("flux") == PyramidFluxTransformer().config
    assert example_config("mmdit", 2, 1) == replace(
        MMDiTConfig(), num_attention_heads=2, num_layers=1
    )
    with pytest.raises(ValueError, match="'sd3'"):
        example_config("sd3")
    model = example_model(example_config("flux", 1, 1), FUSED)
    run = example_step(model, size="toy", n_frames=3)
    assert run() == run() > 0
