"""NOVA's schedules and guidance: recorded tables, diffusers' steps, laws, errors."""

from typing import Any

import pytest
import torch

from tests.paths import GOLDEN
from vidgen.commands.verify import check, find_cases
from vidgen.nova.checks.golden_sampling import KINDS
from vidgen.nova.pipeline import shifted
from vidgen.nova.sampling.guidance import Guidance
from vidgen.nova.sampling.schedules import (
    DDPM,
    FlowMatching,
    MaskRatio,
    masked_counts,
    read_schedule,
    set_sizes,
)
from vidgen.ops import EAGER, FUSED

CASES = {case.path.stem: case for case in find_cases(GOLDEN / "nova") if case.kind in KINDS}


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ops", ["eager", "fused"])
@pytest.mark.parametrize("name", ["schedules", "sampler_guidance"])
def test_recorded_tables(name, ops):
    outcome = check(CASES[name], ops, torch.float32, "cpu")
    assert outcome.status == "PASS", outcome


# ---- schedules


@pytest.mark.portable_only
def test_set_sizes():
    sizes = set_sizes(1440, 64)
    assert sizes[:12] == [0, 2, 2, 3, 4, 5, 5, 7, 7, 8, 9, 10] and sizes[-3:] == [35, 36, 35]
    for n_tokens, n_steps in ((1440, 64), (4096, 128), (7, 20), (1, 1)):
        sizes = set_sizes(n_tokens, n_steps)
        assert sum(sizes) == n_tokens and min(sizes) >= 0
    assert masked_counts(3, 3) == [3, 3, 2, 0]  # 3 cos(30 and 60 degrees) is 2.6 and 1.5
    with pytest.raises(ValueError, match="n_steps: expected at least 1, got 0"):
        set_sizes(4, 0)


@pytest.mark.portable_only
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "epsilon", "clip_sample": False, "beta_schedule": "scaled_linear"},
        {"prediction_type": "v_prediction", "clip_sample_range": 0.5, "beta_schedule": "sigmoid"},
        {"prediction_type": "sample", "variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log", "clip_sample": False},
    ],
)
def test_ddpm_is_that_of_diffusers(spacing, options):
    from diffusers import DDPMScheduler

    options = {**options, "timestep_spacing": spacing, "num_train_timesteps": 50}
    theirs: Any = DDPMScheduler(**options)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    theirs.set_timesteps(7)
    steps = read_schedule({**options, "_class_name": "DDPMScheduler"}).steps(7)
    assert [step.timestep for step in steps] == theirs.timesteps.tolist()
    for ops in (EAGER, FUSED):
        expected = actual = x
        for i, (step, t) in enumerate(zip(steps, theirs.timesteps, strict=True)):
            prediction = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).double()
            generator = torch.Generator().manual_seed(100 + i)
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            generator.manual_seed(100 + i)
            expected = theirs.step(prediction, t, expected, generator=generator).prev_sample
            actual = step(actual, prediction, ops, noise=noise)
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.portable_only
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "_class_name: expected one of FlowMatch.*got 'PNDM"),
        ({"_class_name": "DDPMScheduler", "thresholding": True}, "thresholding: expected False"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "log"}, "beta_schedule: expected one"),
        ({"_class_name": "DDPMScheduler", "depth": 3}, r"got also \['depth'\]"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1}, "shift: expected a pos"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting: expected False, got True",
        ),
    ],
)
def test_schedules_that_are_not_built(config, message):
    with pytest.raises(ValueError, match=message):
        read_schedule(config)


@pytest.mark.portable_only
def test_a_schedule_as_diffusers_saves_it():
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    saved: Any = FlowMatchEulerDiscreteScheduler(shift=2.0).config
    assert read_schedule({**saved, "_class_name": "FlowMatchEulerDiscreteScheduler"}) == (
        FlowMatching(shift=2.0)
    )
    saved = DDPMScheduler(clip_sample=False, steps_offset=1).config
    assert read_schedule({**saved, "_class_name": "DDPMScheduler"}) == (
        DDPM(clip_sample=False, steps_offset=1)
    )
    with pytest.raises(ValueError, match="flow_shift: expected none for a DDPM schedule, got 3"):
        shifted(DDPM(), 3.0)
    assert shifted(FlowMatching(), 3.0) == FlowMatching(shift=3.0, table_shift=1.0)


@pytest.mark.portable_only
def test_mask_ratio_is_within_its_ends():
    ratio = MaskRatio()
    drawn = ratio.quantile(torch.linspace(0, 1, 2001, dtype=torch.float64))
    torch.testing.assert_close(drawn[[0, -1]], torch.tensor([0.7, 1.0], dtype=torch.float64))
    assert (drawn.diff() > 0).all()
    mean, std = ratio.mean_and_std
    assert abs(drawn.mean() - mean) < 1e-4 and abs(drawn.std() - std) < 1e-3


# ---- guidance


@pytest.mark.portable_only
@pytest.mark.parametrize("options", [{}, {"image_guidance_scale": 1.5}])
def test_norms_of_a_set_count_the_rest_of_the_latent(options):
    guidance = Guidance(3.0, guidance_renorm=0.2, **options)
    rest = torch.randn(2, 7, 4, dtype=torch.float64)
    branches = torch.randn(2 * guidance.n_branches, 3, 4, dtype=torch.float64)
    whole = torch.cat([branches, rest.repeat(guidance.n_branches, 1, 1)], dim=1)
    expected, _ = guidance.combine(whole, 3.0)
    guided, passed = guidance.combine(branches, 3.0, rest)
    assert passed is not None
    assert_same(torch.cat([guided, passed], dim=1), expected)


@pytest.mark.portable_only
def test_guidance_options():
    ramp = Guidance(5.0, min_guidance_scale=1.0)
    assert [ramp.scale(i, 4) for i in range(4)] == [2.0, 3.0, 4.0, 5.0]
    assert Guidance(1.0).n_branches == 1 and Guidance().n_branches == 2
    assert Guidance(guidance_trunc=300).n_guided([900.0, 400.0, 200.0, 100.0]) == 2
    for name in ("guidance_scale", "min_guidance_scale", "guidance_trunc"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number, got nan"):
            Guidance(**{name: float("nan")})
    with pytest.raises(ValueError, match="guidance_renorm: expected above 0, at most 1, got 2"):
        Guidance(guidance_renorm=2)
    with pytest.raises(ValueError, match="image_guidance_scale, spatiotemporal"):
        Guidance(image_guidance_scale=1, spatiotemporal_guidance_scale=1)
