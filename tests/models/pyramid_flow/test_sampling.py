"""Pyramid Flow's sampler: units, stages and guidance, with and without a cache."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.ops import EAGER, FUSED
from vidgen.pyramid_flow.checks.example import example_config, example_model
from vidgen.pyramid_flow.model.history import unit_frames
from vidgen.pyramid_flow.model.kv_cache import CachePolicy
from vidgen.pyramid_flow.model.transformer import PyramidTransformer
from vidgen.pyramid_flow.sampling.config import SamplingConfig
from vidgen.pyramid_flow.sampling.guidance import Guidance, LinearGuidance
from vidgen.pyramid_flow.sampling.noise import DrawnNoise
from vidgen.pyramid_flow.sampling.sampler import StageRecord, sample
from vidgen.pyramid_flow.text import Prompts, TextFeatures

pytestmark = pytest.mark.portable_only  # loops of many calls, each of which other tests interpret

MODELS = ("flux", "mmdit")
every_model = pytest.mark.parametrize("name", MODELS)
VIDEO = SamplingConfig(
    (8, 16), n_units=5, first_steps=(2, 1, 2), steps=(1, 2, 1), guidance=Guidance(3.0, 2.0)
)


def tiny(name: str, ops=FUSED, dtype: torch.dtype = torch.float64, **options) -> PyramidTransformer:
    config = replace(example_config(name, 1, 2), joint_attention_dim=10, pooled_projection_dim=6)
    if name == "mmdit":
        config = replace(config, sample_size=16, pos_embed_max_size=16)
    return example_model(replace(config, **options), ops, dtype=dtype)


def features(n_valid: list[int], n_text: int = 5, seed: int = 0) -> TextFeatures:
    """Features of prompts with these numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(len(n_valid), n_text, 10, generator=generator)
    mask = torch.arange(n_text) < torch.tensor(n_valid)[:, None]
    return TextFeatures(text, mask.long(), torch.randn(len(n_valid), 6, generator=generator))


PROMPTS = Prompts(features([4, 2]), features([1, 5], seed=1))


def make(
    model: PyramidTransformer, config: SamplingConfig = VIDEO, text: Any = PROMPTS, **options: Any
) -> Tensor:
    """Samples a video, always with the same noise."""
    noise = DrawnNoise(torch.Generator().manual_seed(7), torch.float64)
    return sample(model, text, config, **{"noise": noise} | options)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def rows_of_calls(model: PyramidTransformer) -> list[int]:
    """The rows of every forward pass from now on."""
    found: list[int] = []
    model.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    return found


def timesteps_of(model: PyramidTransformer) -> list[Tensor]:
    """The timesteps that the model embeds from now on."""
    found: list[Tensor] = []
    model.time_text_embed.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    return found


@every_model
@pytest.mark.parametrize("per_unit", [1, 2])
def test_operators_and_caches_agree(name: str, per_unit: int) -> None:
    """Eager PyTorch, kernels without a cache, and kernels with each kind of cache agree."""
    config = replace(VIDEO, frames_per_unit=per_unit)
    expected = make(tiny(name, EAGER), config)
    assert expected.shape == (2, 16, config.n_frames, 8, 16)
    assert expected.isfinite().all()
    assert expected.std(dim=(0, 1, 3, 4)).min() > 0.1
    model = tiny(name)
    for policy in (
        CachePolicy(stages=()),
        CachePolicy(),
        CachePolicy(stages=(0, 1)),
        CachePolicy(on_cpu=True),
    ):
        assert_near(make(model, replace(config, cache=policy)), expected)
    assert_near(make(tiny(name, EAGER), replace(config, cache=CachePolicy())), expected)


@every_model
def test_scale_one_is_the_prompt_alone(name: str) -> None:
    """Half as many rows are computed, and no negative prompt is needed."""
    config = replace(VIDEO, n_units=4, guidance=Guidance(1.0, 1.0), cache=CachePolicy())
    model = tiny(name)
    calls = rows_of_calls(model)
    alone = make(model, config)
    assert set(calls) == {2}
    calls.clear()
    assert_near(make(model, replace(config, guidance=Guidance(1.0, 1.0, always=True))), alone)
    assert set(calls) == {4}
    assert_near(make(model, config, PROMPTS.prompt), alone)
    assert_near(make(model, replace(config, guidance=Guidance(0.0, 9.0))), alone)  # turned off
    assert not torch.allclose(make(model, replace(config, guidance=Guidance(1.0, 2.0))), alone)


def test_guidance_may_stop_and_start() -> None:
    """A cache that was filled for other rows is not used."""

    @dataclass(frozen=True)
    class Sometimes(Guidance):
        def scale(self, unit: int) -> float:
            return 1.0 if unit in (3, 4) else 2.0

    config = replace(VIDEO, n_units=8, guidance=Sometimes(), steps=(1, 1, 1))
    model = tiny("flux")
    assert_near(make(model, replace(config, cache=CachePolicy())), make(model, config))


def test_scales_of_guidance() -> None:
    assert [Guidance(7.0, 5.0).scale(u) for u in range(3)] == [7.0, 5.0, 5.0]
    linear = Guidance(3.0, 9.0, LinearGuidance(0.5, 1.8))
    assert [linear.scale(u) for u in range(4)] == [3.0, 2.5, 2.0, 1.8]
    assert [Guidance(-1.0, 5.0, always=True).is_active(u) for u in range(2)] == [False, False]
    assert [Guidance(1.0, 5.0).is_active(u) for u in range(2)] == [False, True]
    with pytest.raises(ValueError, match="video guidance: expected a finite number, got inf"):
        Guidance(7.0, float("inf"))
    with pytest.raises(ValueError, match="slope guidance: expected a finite number, got nan"):
        LinearGuidance(float("nan"))


@dataclass
class Recorded:
    """Noise that is given to the sampler, the same in every run."""

    white: Tensor
    jumps: dict[tuple[int, int], Tensor]

    def initial(self, shape) -> Tensor:
        return self.white

    def jump(self, unit: int, stage: int, shape) -> dict[str, Tensor]:
        return {"noise": self.jumps[unit, stage]}


@every_model
@pytest.mark.parametrize("per_unit", [1, 2])
def test_going_on_is_as_if_never_stopped(name: str, per_unit: int) -> None:
    """Continuing an image or a clip gives the video that would have been made in one run."""
    config = replace(VIDEO, frames_per_unit=per_unit, cache=CachePolicy())
    model = tiny(name)
    shape = (2, 16, config.n_frames, 8, 16)
    sizes = {(u, s): (*shape[:2], len(unit_frames(u, per_unit)), 2 * 2**s, 4 * 2**s)
             for u in range(5) for s in (1, 2)}  # fmt: skip
    jumps = {key: torch.randn(size, dtype=torch.float64) for key, size in sizes.items()}
    white = torch.randn(shape, dtype=torch.float64)
    whole = make(model, config, noise=Recorded(white, jumps))
    for n_given in (1, 2, 4):
        n = unit_frames(n_given - 1, per_unit).stop
        rest = torch.cat([white[:, :, n:], white[:, :, :n]], dim=2)  # unused ones come last
        made: list[Tensor] = []
        options = {"given": whole[:, :, :n], "on_unit": made.append}
        continued = make(model, config, noise=Recorded(rest, jumps), **options)
        assert_near(continued, whole)
        assert_near(torch.cat(made, dim=2), whole[:, :, n:])


def test_stages_follow_one_another() -> None:
    """A jump scales the mean of every block by alpha, for its noise sums to 0 over a block."""
    records: list[StageRecord] = []
    model, config = tiny("flux"), replace(VIDEO, n_units=2)
    latents = make(model, config, on_stage=records.append)
    assert [(r.unit, r.stage) for r in records] == [(u, s) for u in range(2) for s in range(3)]
    for before, after in pairwise(records):
        if after.stage:
            alpha, _ = config.scheduler.renoise_coefficients(after.stage)
            assert_near(FUSED.downsample(after.start), alpha * before.end)
    assert_near(torch.cat([r.end for r in records if r.stage == 2], dim=2), latents)
    assert records[3].first_velocity.shape == (4, 16, 1, 2, 4)
    white = DrawnNoise(torch.Generator().manual_seed(7), torch.float64).initial((2, 16, 2, 8, 16))
    low = FUSED.downsample(FUSED.downsample(white, noise=True), noise=True)
    assert_near(records[0].start, low[:, :, :1])
    assert_near(records[3].start, low[:, :, 1:])


def test_one_negative_prompt_serves_all() -> None:
    model, negative = tiny("flux"), features([3], seed=2)
    repeated = TextFeatures(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in negative if x is not None))
    image = replace(VIDEO, n_units=1)
    expected = make(model, image, Prompts(PROMPTS.prompt, repeated))
    assert expected.shape == (2, 16, 1, 8, 16)
    assert_near(make(model, image, Prompts(PROMPTS.prompt, negative)), expected)


def test_rounding_of_the_released_code() -> None:
    """With `round_official` latents and timesteps are in the model's dtype, without it in fp32."""
    model = tiny("flux", dtype=torch.bfloat16)
    timesteps = timesteps_of(model)
    config = replace(VIDEO, n_units=2, first_steps=(10, 1, 1), round_official=True)
    noise = torch.randn(2, 16, 2, 8, 16)
    jumps = {(u, s): torch.randn(2, 16, 1, 2 * 2**s, 4 * 2**s) for u in (0, 1) for s in (1, 2)}
    records: list[StageRecord] = []
    latents = make(model, config, noise=Recorded(noise, jumps), on_stage=records.append)
    assert latents.dtype == torch.bfloat16
    assert timesteps[1].tolist() == [972.0] * 4  # of 971.584

    _, after, last = records[:3]
    alpha, beta = config.scheduler.renoise_coefficients(2)
    up = after.end[:, :, 0].repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, None]
    z = jumps[0, 2].bfloat16()
    eta = FUSED.upsample_renoise(torch.zeros_like(after.end), 0.0, 1.0, noise=z)
    close = (alpha * up + beta * eta - last.start).abs().max()
    assert close <= 2 * torch.finfo(torch.bfloat16).eps * last.start.abs().max()
    uncond, v = last.first_velocity.chunk(2)
    guided = uncond + 3.0 * (v - uncond)  # each operation rounds
    assert torch.equal((last.start.float() - guided).bfloat16(), last.end)

    timesteps.clear()
    exact = make(model, replace(config, round_official=False), noise=Recorded(noise, jumps))
    assert exact.dtype == torch.float32
    assert timesteps[1].tolist() == pytest.approx([971.584] * 4)
    assert 0 < (exact - latents).abs().max() < 0.3 * exact.abs().max()


def test_progress_is_told_of_units_stages_and_steps() -> None:
    class Counts(dict):
        def track(self, steps, description: str):
            for step in steps:
                self[description] = self.get(description, 0) + 1
                yield step

    counts, model = Counts(), tiny("flux")
    calls, timesteps = rows_of_calls(model), timesteps_of(model)
    make(model, replace(VIDEO, n_units=3), progress=counts)
    assert counts == {"units": 3, "stages": 9, "steps": 5 + 2 * 4}
    assert len(calls) == counts["steps"]
    assert len(timesteps) == 5 + 4  # all units but the first have the same timesteps


def test_bad_arguments() -> None:
    for options, message in (
        ({"size": (8, 12)}, r"size: expected .* multiples of 8 latents, got \[8, 12\]"),
        ({"steps": (1, 1)}, r"steps: expected at least 1 step for each of 3 stages, got \[1, 1\]"),
        ({"first_steps": (1, 0, 1)}, "first_steps: "),
        ({"n_units": 0}, "n_units: expected at least 1, got 0"),
        ({"frames_per_unit": 0}, "frames_per_unit: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(VIDEO, **options)
    model = tiny("flux", use_temporal_causal=False)
    given = torch.zeros(2, 16, 2, 8, 16)
    shorter = Prompts(PROMPTS.prompt, features([1, 1], n_text=4))
    partial = Prompts(PROMPTS.prompt, features([1, 1])._replace(mask=None))
    for config, options, message in (
        (VIDEO, {"text": PROMPTS.prompt}, "text: expected negative prompts for guidance, got none"),
        (VIDEO, {"text": shorter}, r"negative features: expected \[2, 5, 10\].* got \[2, 4, 10\]"),
        (VIDEO, {"text": partial}, "mask: expected of both prompts or of neither"),
        (VIDEO, {"given": given[:, :, :, :4]}, r"given: expected \[2, 16, frames, 8, 16\], got"),
        (replace(VIDEO, n_units=2), {"given": given}, "more than the 2 given, got 2"),
        (replace(VIDEO, frames_per_unit=2), {"given": given}, "frames: expected 1 and a multiple"),
        (replace(VIDEO, cache=CachePolicy()), {}, "cache: expected a model with causal attention"),
        (VIDEO, {"noise": Recorded(given, {})}, r"noise: expected \[2, 16, 5, 8, 16\], got"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model, config, **options)


def test_nothing_is_drawn_for_a_bad_request() -> None:
    """All checks run before the first random number is drawn."""
    one_way, both_ways = tiny("flux"), tiny("flux", use_temporal_causal=False)
    for model, cache in ((one_way, CachePolicy(stages=(3,))), (both_ways, CachePolicy())):
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="expected"):
            sample(model, PROMPTS, replace(VIDEO, cache=cache))
        assert torch.equal(torch.get_rng_state(), state)
