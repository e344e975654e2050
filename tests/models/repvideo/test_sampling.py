"""RepVideo's schedules, guidance and sampling loops, by both codes that run it."""

import math
from collections.abc import Iterator

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.paths import GOLDEN
from vidgen.commands import verify
from vidgen.ops import EAGER, FUSED, Ops
from vidgen.repvideo.checks import golden_sampling
from vidgen.repvideo.sampling.sampler import Guidance, draw_normal, sample
from vidgen.repvideo.sampling.schedules import (
    SAMPLERS,
    Step,
    build_scheduler,
    diffusers_schedule,
    sat_schedule,
    sat_tables,
    shifted_alphas,
)

CASES = {case.path.stem: case for case in verify.find_cases(GOLDEN / "repvideo")}
BOTH = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])
portable_only = pytest.mark.portable_only

SHAPE = (1, 2, 4, 4, 6)
TEXT = torch.zeros(1, 3, 5)


# ---- schedules


@pytest.mark.parametrize("ops", ["eager", "fused"])
@pytest.mark.parametrize(
    "name",
    [
        "sat_schedule_a",
        "diffusers_sched_a",
        "diffusers_sched_linspace_a",
        *(
            pytest.param(name, marks=portable_only)
            for name in (
                "sat_loop_dpm_a",
                "sat_loop_ddim_a",
                "diffusers_pipe_dpm_a",
                "diffusers_pipe_ddim_a",
                "diffusers_vae_a",
            )
        ),
    ],
)
def test_golden(name: str, ops: str) -> None:
    outcome = verify.check(CASES[name], ops, torch.float32, "cpu")
    assert outcome.status == "PASS", outcome


@portable_only
@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01},
        {"rescale_betas_zero_snr": False, "set_alpha_to_one": False},
    ],
)
def test_all_that_a_case_says_of_the_scheduler_counts(options: dict) -> None:
    case = CASES["diffusers_sched_a"]
    config = {**case.config, **options}
    inputs = case.tensors("in.", "cpu")
    steps = golden_sampling.diffusers_steps(config, {}, inputs, EAGER)["ddim_steps"]
    known = {name: x for name, x in config.items() if name != "n_steps"}
    theirs, x = diffusers.CogVideoXDDIMScheduler(**known), inputs["x"]
    theirs.set_timesteps(config["n_steps"])
    for t, v, step in zip(theirs.timesteps, inputs["v"], steps, strict=True):
        x = theirs.step(v, int(t), x, return_dict=False)[0].float()
        torch.testing.assert_close(step, x, rtol=1e-4, atol=1e-4)


@portable_only
def test_cases_of_something_else() -> None:
    case = CASES["sat_loop_dpm_a"]
    w, inputs = (case.tensors(prefix, "cpu") for prefix in ("w.", "in."))
    with pytest.raises(ValueError, match="sampler: expected dpmpp2m_sde or ddim, got 'euler'"):
        golden_sampling.sat_loop({**case.config, "sampler": "euler"}, w, inputs, FUSED)
    with pytest.raises(ValueError, match=r"ln_eps: expected 1e-05, got 1e-06"):
        golden_sampling.sat_loop({**case.config, "ln_eps": 1e-6}, w, inputs, FUSED)


@portable_only
def test_timesteps_of_sat_are_those_of_numpy() -> None:
    alphas = shifted_alphas(3.0)
    for n in (1, 7, 50, 99, 213, 481, 783, 1000):  # some where rounding decides
        expected = np.linspace(999, 0, n, endpoint=False).astype(int)
        tables = sat_tables(n, alphas)
        assert tables.timesteps.tolist() == expected.tolist()
        levels = tables.sqrt_alphas
        assert (levels[0], levels[-1]) == (0, 1) and (levels.diff() > 0).all()


@portable_only
def test_terminal_noise_is_pure_and_the_first_level_stays() -> None:
    alphas = shifted_alphas(3.0)
    for n in (5, 50):
        tables = sat_tables(n, alphas)
        smallest = tables.timesteps[-1]
        torch.testing.assert_close(tables.sqrt_alphas[-2], alphas[smallest].float().sqrt())
        assert (tables.denoiser_sqrt_alphas - tables.sqrt_alphas[:-1]).abs().max() < 1e-3
    assert sat_tables(1, alphas).sqrt_alphas.tolist() == [0, 1]


SCHEDULER = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@BOTH
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (7, {"timestep_spacing": "trailing"}),  # its last step does not reach level 1
        (9, {"timestep_spacing": "linspace", "snr_shift_scale": 1.0}),
        (6, {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1}),
        (5, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_those_of_diffusers(sampler: str, n: int, options: dict, ops: Ops) -> None:
    """With the same generator: as many draws, in the same order."""
    scheduler = build_scheduler({**SCHEDULER, **options}, sampler)
    velocities = torch.randn(n, *SHAPE)
    given = iter(velocities)
    actual = sample(
        lambda x, text, t: next(given),
        draw_normal(SHAPE, torch.float32, generator=torch.Generator().manual_seed(3)),
        TEXT,
        None,
        diffusers_schedule(n, scheduler),
        ops=ops,
    )
    generator = torch.Generator().manual_seed(3)
    x, x0 = torch.randn(SHAPE, generator=generator), None
    for i, (t, v) in enumerate(zip(scheduler.timesteps, velocities, strict=True)):
        if sampler == "ddim":
            x = scheduler.step(v, t, x, return_dict=False)[0]
        else:
            back = scheduler.timesteps[i - 1] if i else None
            x, x0 = scheduler.step(v, x0, t, back, x, generator=generator)
    torch.testing.assert_close(actual, x, atol=2e-5, rtol=2e-5)


@portable_only
def test_bad_schedules() -> None:
    with pytest.raises(ValueError, match="n_steps: expected 1 to 1000, got 0"):
        sat_schedule(0)
    with pytest.raises(ValueError, match="n_steps: expected 1 to 1000, got 1001"):
        diffusers_schedule(1001, build_scheduler(SCHEDULER, "ddim"))
    with pytest.raises(ValueError, match="sampler: expected dpm or ddim, got 'euler'"):
        sat_schedule(5, sampler="euler")
    with pytest.raises(ValueError, match="shift: expected a positive number, got 0"):
        sat_schedule(5, shift=0.0)
    with pytest.raises(ValueError, match="prediction_type: expected 'v_prediction'"):
        diffusers_schedule(5, build_scheduler({"prediction_type": "epsilon"}, "dpm"))
    with pytest.raises(ValueError, match=r"scheduler: expected CogVideoXDPM.*got DDPMScheduler"):
        build_scheduler({"_class_name": "DDPMScheduler"})


# ---- guidance and the loop


@portable_only
def test_dynamic_guidance_jumps() -> None:
    timesteps = sat_tables(50, shifted_alphas(3.0)).timesteps.tolist()
    weights = Guidance().weights(timesteps)
    assert weights[:6] == pytest.approx([2.29, 2.54, 6.97, 6.42, 2.79, 4.27], abs=0.005)
    assert Guidance(4.0, None).weights([1, 2]) == [4.0, 4.0]
    with pytest.raises(ValueError, match="guidance: expected a finite number, got nan"):
        Guidance(math.nan)
    with pytest.raises(ValueError, match=r"exponent: expected a whole number above 0, got 0\.5"):
        Guidance(6.0, 0.5)


@BOTH
@pytest.mark.parametrize("steps", [sat_schedule(6), sat_schedule(6, 1.0, "ddim"), sat_schedule(1)])
def test_a_perfect_model_is_led_to_its_video(steps: list[Step], ops: Ops) -> None:
    """Whatever the noise; and guidance between equal predictions changes nothing."""
    clean = torch.randn(SHAPE, dtype=torch.float64)
    levels = {step.timestep: step.denoiser_sqrt_alpha for step in steps}

    def model(x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        a = levels[int(timestep[0])]
        return (a * x - clean) / math.sqrt(1 - a * a)

    text = TEXT.double()
    noise = draw_normal(SHAPE, torch.float64)
    made = sample(model, noise, text, text, steps, guidance=Guidance(4.0, None), ops=ops)
    torch.testing.assert_close(made, clean, atol=1e-10, rtol=0)


@BOTH
def test_guidance_leads_away_from_the_first_half(ops: Ops) -> None:
    """Against the loop of the released code, written out: x0 of both halves is combined."""
    steps, guidance = sat_schedule(4, 3.0, "ddim"), Guidance(5.0)
    text, uncond = torch.randn(2, 1, 3, 5, dtype=torch.float64)

    def model(x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        return x.sin() * text.mean(dim=(1, 2))[:, None, None, None, None] + timestep[0] / 1000

    start = torch.randn(SHAPE, dtype=torch.float64)
    made = sample(model, iter([start]), text, uncond, steps, guidance=guidance, ops=ops)
    x = start
    for step, w in zip(steps, guidance.weights([s.timestep for s in steps]), strict=True):
        t, a = torch.tensor([step.timestep]), step.denoiser_sqrt_alpha
        x0_uncond, x0_text = (
            a * x - math.sqrt(1 - a * a) * model(x, context, t) for context in (uncond, text)
        )
        x0 = x0_uncond + w * (x0_text - x0_uncond)
        k = math.sqrt((1 - step.sqrt_alpha_next**2) / (1 - step.sqrt_alpha**2))
        x = k * x + (step.sqrt_alpha_next - step.sqrt_alpha * k) * x0
    torch.testing.assert_close(made, x, atol=1e-10, rtol=1e-10)


@portable_only
@pytest.mark.parametrize(
    ("guidance", "rows"), [(Guidance(1.0, None), 1), (Guidance(0.0), 1), (Guidance(2.0, None), 2)]
)
def test_a_weight_of_one_needs_no_second_half(guidance: Guidance, rows: int) -> None:
    seen = []

    def model(x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        seen.append((len(x), len(text), len(timestep)))
        return x

    noise = draw_normal(SHAPE, torch.float32)
    sample(model, noise, TEXT, TEXT, sat_schedule(3), guidance=guidance)
    assert seen == [(rows,) * 3] * 3


@portable_only
@pytest.mark.parametrize(
    ("steps", "n_draws"),
    [(sat_schedule(6), 9), (sat_schedule(6, sampler="ddim"), 0), (sat_schedule(1), 0)],
)
def test_noise_is_drawn_as_the_released_code_draws_it(steps: list[Step], n_draws: int) -> None:
    """One tensor to start from, then so many: all are taken and no other is asked for."""
    given: Iterator[Tensor] = iter(torch.randn(1 + n_draws, *SHAPE))
    sample(lambda x, text, t: x, given, TEXT, None, steps)
    assert next(given, None) is None


@portable_only
def test_latents_are_fp32_between_steps_of_a_half_precision_model() -> None:
    seen = []

    def model(x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    text = TEXT.bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        made = sample(model, draw_normal(SHAPE, dtype), text, None, sat_schedule(3), ops=FUSED)
        assert made.dtype == dtype
    assert set(seen) == {torch.bfloat16}


@portable_only
def test_bad_conditions() -> None:
    noise = draw_normal(SHAPE, torch.float32)
    with pytest.raises(ValueError, match=r"uncond: expected shape \[1, 3, 5\] as text has"):
        sample(lambda *x: x[0], noise, TEXT, TEXT[:, :1], sat_schedule(2))
    with pytest.raises(ValueError, match="uncond: expected a tensor for guidance, got None"):
        sample(lambda *x: x[0], noise, TEXT, None, sat_schedule(2), guidance=Guidance())
