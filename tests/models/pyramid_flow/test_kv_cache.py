"""Pyramid Flow's cache of keys and values: what it stores, its size, and that it is exact."""

import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from bench.studies import pyramid_unit
from vidgen.ops import FUSED
from vidgen.pyramid_flow.checks.example import LATENTS, example_config, example_model
from vidgen.pyramid_flow.model.config import PATCH
from vidgen.pyramid_flow.model.history import settled_frames
from vidgen.pyramid_flow.model.kv_cache import CachePolicy, CacheSizes, KVCache, StageCache, plan
from vidgen.pyramid_flow.model.sequence import Packing, n_tokens, pack_patches
from vidgen.pyramid_flow.model.transformer import PyramidTransformer
from vidgen.pyramid_flow.sampling.config import SamplingConfig
from vidgen.pyramid_flow.sampling.guidance import Guidance
from vidgen.pyramid_flow.sampling.sampler import estimate_cache, sample
from vidgen.pyramid_flow.text import TextFeatures

every_model = pytest.mark.parametrize("name", ["flux", "mmdit"])
TEXT_LENGTH = 128


def tiny(name: str, n_layers: int = 2, **options) -> PyramidTransformer:
    config = replace(example_config(name, 1, n_layers), joint_attention_dim=10)
    config = replace(config, pooled_projection_dim=6, **options)
    if name == "mmdit":
        config = replace(config, sample_size=16, pos_embed_max_size=16)
    return example_model(config, FUSED, dtype=torch.float64)


def sizes(resolution: str, n_units: int, n_heads: int = 30) -> CacheSizes:
    """The cache sizes of a released model with guidance and 10 steps in each stage."""
    config = SamplingConfig(LATENTS[resolution], n_units)
    height, width = config.frame_size(0)
    tokens = height * width // PATCH**2
    steps = config.steps
    return CacheSizes(24, 2, n_heads, 64, TEXT_LENGTH, tokens, steps, n_units, 1, torch.bfloat16)


@pytest.mark.portable_only
def test_settled_frames_are_the_longest_prefix_of_equal_resolution() -> None:
    for unit, stage, per_unit in product(range(1, 9), range(4), (1, 2, 3)):
        config = SamplingConfig((64, 64), 9, per_unit)
        levels = [
            [clip.level for clip in config.clips(u, stage)[:-1] for _ in clip.frames]
            for u in (unit - 1, unit)
        ]
        before, now = levels
        expected = 0
        while expected < len(before) and before[expected] == now[expected]:
            expected += 1
        assert settled_frames(unit, stage, per_unit) == expected
    assert settled_frames(0, 0) == 0


@pytest.mark.portable_only
def test_tokens_of_a_late_unit() -> None:
    """The tokens of a call at unit 30, of a video of ten seconds, with a cache and without."""
    found = {}
    for resolution in LATENTS:
        config = SamplingConfig(LATENTS[resolution], 31)
        cache = KVCache(CachePolicy(), sizes(resolution, 31), torch.device("meta"))
        for stage in range(3):
            for unit in range(30):
                cache.stage(unit, stage, 2)
            kept = cache.stage(30, stage, 2)
            assert kept is not None
            whole = TEXT_LENGTH + n_tokens(config.column(30, stage))
            found[resolution, stage] = whole, whole - kept.n_past
    assert [found["768p", s] for s in range(3)] == [(7568, 480), (9008, 2160), (15488, 8880)]
    assert [found["384p", s][1] for s in range(3)] == [120, 540, 2220]


@every_model
@pytest.mark.portable_only
def test_the_model_is_given_new_tokens_alone(name: str) -> None:
    """A call has the frames that are not settled; the last block has the tokens being made only."""
    config = SamplingConfig((8, 8), 6, steps=(1, 1, 1), first_steps=(1, 1, 1))
    config = replace(config, guidance=Guidance(1.0, 1.0), cache=CachePolicy(stages=(0, 1)))
    model = tiny(name)
    n_frames: list[int] = []
    outputs: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args: n_frames.append(sum(grid[0] for grid in args[3].columns[0]))
    )
    blocks = model.single_transformer_blocks if name == "flux" else model.transformer_blocks
    blocks[-1].register_forward_hook(
        lambda *args: outputs.append((args[-1] if name == "flux" else args[-1][1]).x[0].shape[1])
    )
    text = TextFeatures(torch.randn(1, 4, 10), torch.ones(1, 4), torch.randn(1, 6))
    sample(model, text, config)
    expected = [
        unit + 1 - (settled_frames(unit, stage) if stage < 2 else 0)
        for unit in range(6)
        for stage in range(3)
    ]
    assert n_frames == expected
    assert n_frames[-3:] == [2, 3, 6]
    assert outputs == [1, 4, 16] * 6  # the tokens of the frame being made


@every_model
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.portable_only)])
def test_one_call_with_a_cache(name: str, causal: bool) -> None:
    """With a cache that another call has filled, the velocity is the same; padding is not seen."""
    model = tiny(name, n_layers=1, use_temporal_causal=causal)
    grids = ((2, 1, 2), (1, 1, 2), (1, 2, 4))  # frames, rows and columns of tokens
    clips = [torch.randn(2, 16, f, 2 * h, 2 * w, dtype=torch.float64) for f, h, w in grids]
    features = torch.randn(2, 5, 10, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    text_mask = (torch.arange(5) < torch.tensor([[2], [5]])).long()
    timestep = torch.tensor([800.0, 800.0], dtype=torch.float64)

    with torch.no_grad():
        (expected,) = model.predict([clips], timestep, features[0], text_mask, features[1])
        text, pooled = model.embed_text(*features)
        condition = model.condition(timestep, pooled)
        pack = partial(model.pack_for_sampling, grids, text, text_mask)

        def velocity(clips, packing: Packing, cache: StageCache | None = None) -> Tensor:
            caches = None if cache is None else cache.blocks(0)
            patches = model(pack_patches([clips]), text, condition, packing, caches)
            return packing.unpack(patches)[0]

        alone = velocity(clips, pack(only_current=True))
        torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)
        if not causal:
            return
        tokens = 2  # of a frame at the lowest level
        layout = CacheSizes(model.n_blocks, 2, 1, 64, 5, tokens, (1,), 5, 1, torch.float64)
        cache = KVCache(CachePolicy(), layout, torch.device("cpu"))
        first = cache.stage(3, 0, 2)  # reads nothing, stores text and three frames
        assert first is not None and (first.n_past, first.past_frames) == (0, 0)
        other = [*clips[:2], torch.randn_like(clips[2])]
        velocity(other, pack(), first)
        second = cache.stage(4, 0, 2)
        assert second is not None and (second.n_past, second.past_frames) == (11, 3)
        for only_current in (False, True):
            packing = pack(past_frames=3, only_current=only_current)
            cached = velocity(clips[2:], packing, second)
            torch.testing.assert_close(cached, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.portable_only
def test_bytes_of_the_released_models() -> None:
    """K and V of 24 blocks in bf16, 10 steps a stage, both branches of guidance."""
    for resolution, n_units, expected in (
        ("384p", 16, 10.0),
        ("768p", 16, 35.9),
        ("768p", 31, 75.7),
    ):
        for n_heads, share in ((30, 1.0), (24, 0.8)):
            estimate = plan(CachePolicy(), sizes(resolution, n_units, n_heads))
            assert estimate.n_bytes / 1e9 == pytest.approx(share * expected, rel=5e-3)
    assert plan(CachePolicy(), sizes("384p", 2)).stages == ()  # nothing can be reused


@pytest.mark.portable_only
def test_a_budget_takes_the_lowest_stages() -> None:
    layout = sizes("384p", 16)
    by_stage = layout.stage_bytes()
    assert by_stage == sorted(by_stage, reverse=True)
    two = by_stage[0] + by_stage[1]
    for max_bytes, stages in ((two - 1, (0,)), (two, (0, 1)), (0, ()), (10**12, (0, 1, 2))):
        estimate = plan(CachePolicy(max_bytes=max_bytes), layout)
        assert estimate.stages == stages
        assert estimate.n_bytes <= max_bytes
    assert plan(CachePolicy(stages=(2, 1), max_bytes=by_stage[1]), layout).stages == (1,)
    for policy, message in (
        (CachePolicy(stages=(3,)), "stages: expected 0 to 2, got 3"),
        (CachePolicy(max_bytes=-1), "max_bytes: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(policy, layout)


@pytest.mark.portable_only
def test_the_estimate_is_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has the estimated size, and every entry is filled."""
    caches: list[KVCache] = []
    build = KVCache.__init__

    def remembered(self, *args) -> None:
        build(self, *args)
        caches.append(self)

    monkeypatch.setattr(KVCache, "__init__", remembered)
    model = tiny("mmdit")
    config = SamplingConfig((8, 8), 6, steps=(1, 2, 1), first_steps=(1, 1, 1), cache=CachePolicy())
    config = replace(config, guidance=Guidance(1.0, 1.0))
    text = TextFeatures(torch.randn(2, 4, 10), None, torch.randn(2, 6))
    sample(model, text, config)
    (cache,) = caches
    entries = [entry for stage in cache._entries.values() for entry in stage]
    estimate = estimate_cache(model, text, config)
    assert estimate == cache.estimate
    assert sum(x.numel() * x.itemsize for x in entries) == estimate.n_bytes > 0
    assert len(entries) == 4 and all(x.isfinite().all() for x in entries)
    given = torch.randn(2, model.config.latent_channels, 5, 8, 8)
    sample(model, text, config, given=given)  # only one unit is made, so nothing can be reused
    assert caches[1].estimate == estimate_cache(model, text, config, n_given=5)
    assert caches[1].estimate.n_bytes == 0 and not caches[1]._entries


@pytest.mark.portable_only
def test_benchmark_of_a_unit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs, its providers agree, and it reports the tokens of a unit."""
    arguments = "--size toy --unit 4 --heads 1 --layers 1 --repeats 1"
    monkeypatch.setattr("sys.argv", ["pyramid_unit", *arguments.split()])
    pyramid_unit.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == [
        "tokens 138/150/204",
        "tokens 138/150/204",
        "tokens 4/18/204",
        "tokens 4/18/74",
    ]
    assert all(re.search(r"\d\.\d{3} s +\d+\.\d\d x", line) for line in lines[1:])


@pytest.mark.portable_only
def test_what_lies_in_the_cpus_memory_is_copied_in_one_piece() -> None:
    """In the CPU's memory the past of a block is contiguous, even in a half-empty entry."""
    layout = CacheSizes(2, 2, 3, 8, 5, 4, (1,), 9, 1, torch.float32)
    for on_cpu in (False, True):
        cache = KVCache(CachePolicy(on_cpu=on_cpu), layout, torch.device("cpu"))
        for unit in range(5):
            stage = cache.stage(unit, 0, 2)
        assert stage is not None and stage.n_past == 5 + 3 * 4
        block = stage.blocks(0)[1]
        assert block.entry.shape == (2, 2, 3, layout.capacity(0), 8)
        k, v = torch.randn(2, 2, 3, 40, 8)
        block._replace(n_past=0, n_new=17).write(k, v)
        past = torch.stack(block.read(torch.device("cpu")))
        assert torch.equal(past, torch.stack([k, v])[..., :17, :])
        addresses = block.entry[..., :17, :]
        n_elements = 1 + sum(
            (n - 1) * stride for n, stride in zip(addresses.shape, addresses.stride(), strict=True)
        )
        assert (n_elements == addresses.numel()) is on_cpu
