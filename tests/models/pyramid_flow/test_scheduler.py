"""Pyramid Flow's scheduler: the official numbers, and what the paper says about the jumps."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.paths import GOLDEN
from vidgen.commands import verify
from vidgen.ops import EAGER, FUSED, Ops
from vidgen.pyramid_flow.sampling.scheduler import PyramidFlowScheduler

pytestmark = pytest.mark.portable_only  # tables of numbers; steps are tested with the sampler

CASES = GOLDEN / "pyramid_flow"
VARIANTS = [
    {},
    {"stages": 2, "stage_range": (0, 0.5, 1)},
    {"stages": 1, "stage_range": (0, 1)},
    {"stages": 4, "stage_range": [0, 0.2, 0.5, 0.6, 1], "gamma": 0.2, "shift": 3.0},
    {"num_train_timesteps": 7, "shift": 0.5, "gamma": 0.01},
]
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=str)


@pytest.mark.parametrize("ops", ["eager", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_official_numbers(ops: str, dtype: torch.dtype) -> None:
    (case,) = (c for c in verify.find_cases(CASES) if c.kind == "scheduler")
    outcome = verify.check(case, ops, dtype, "cpu")
    assert outcome.status == "PASS", outcome.reason


def test_fp32_steps_are_the_official_ones_to_the_bit() -> None:
    (case,) = (c for c in verify.find_cases(CASES) if c.kind == "scheduler")
    inputs, expected = case.tensors("in.", "cpu"), case.tensors("out.", "cpu")
    for i, options in enumerate(case.config["variants"]):
        scheduler = PyramidFlowScheduler.from_options(options)
        x = inputs[f"v{i}.euler.x0"]
        steps = scheduler.set_timesteps(4, scheduler.stages - 1).steps
        for velocity, step in zip(inputs[f"v{i}.euler.v"], steps, strict=True):
            x = scheduler.step(x, velocity, step, ops=FUSED)
        assert torch.equal(x, expected[f"v{i}.euler.x"])


def test_the_released_numbers() -> None:
    scheduler = PyramidFlowScheduler()
    assert scheduler.start_sigmas == pytest.approx([1, 0.8002399489209289, 0.5007496155411024])
    assert scheduler.end_sigmas == pytest.approx([0.667, 0.334, 0])
    assert scheduler.ori_start_sigmas == pytest.approx([1, 0.667, 0.334])
    assert scheduler.renoise_coefficients(1) == pytest.approx((0.5998800, 0.6930281), abs=1e-6)
    assert scheduler.renoise_coefficients(2) == pytest.approx((0.7496252, 0.4336619), abs=1e-6)
    timesteps, sigmas = scheduler.set_timesteps(10, 1)
    assert timesteps[:2].tolist() == pytest.approx([744, 704.262], abs=1e-3)
    assert timesteps[-1].item() == pytest.approx(386.358, abs=1e-3)
    assert sigmas[-2:].tolist() == pytest.approx([0.001, 0], abs=1e-12)


@every_variant
def test_tables(options: dict) -> None:
    scheduler = PyramidFlowScheduler(**options)
    n = scheduler.num_train_timesteps
    ends = scheduler.end_sigmas
    assert ends[-1] == 0 and scheduler.ori_start_sigmas[1:] == ends[:-1]
    for o, start, end in zip(scheduler.ori_start_sigmas, scheduler.start_sigmas, ends, strict=True):
        assert 1 >= start >= o > end
    assert scheduler.timestep_ratios[0][0] == 0 and scheduler.timestep_ratios[-1][1] == 1
    for s in range(scheduler.stages):
        timesteps, sigmas = scheduler.timesteps_per_stage[s], scheduler.sigmas_per_stage[s]
        assert timesteps.dtype == sigmas.dtype == torch.float64
        assert timesteps.shape == sigmas.shape == (n,)
        assert (timesteps.diff() < 0).all() and (sigmas.diff() < 0).all() and sigmas[0] == 1


@every_variant
@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_inference_steps(options: dict, n: int) -> None:
    scheduler = PyramidFlowScheduler(**options)
    for s in range(scheduler.stages):
        steps = scheduler.set_timesteps(n, s)
        assert steps.timesteps.shape == (n,) and steps.sigmas.shape == (n + 1,)
        assert steps.timesteps[0] == scheduler.timesteps_per_stage[s][0]
        assert steps.sigmas[0] == 1 and steps.sigmas[-1] == 0
        assert sum(steps.steps) == pytest.approx(-1)
        if n > 1:
            assert steps.timesteps[-1] == pytest.approx(scheduler.timesteps_per_stage[s][-1].item())
            assert steps.sigmas[-2] == pytest.approx(scheduler.sigmas_per_stage[s][-1].item())


@every_variant
def test_a_jump_lands_on_the_path_of_the_next_stage(options: dict) -> None:
    """After a jump, a block has covariance start_s^2 I and signal 1 - start_s."""
    scheduler = PyramidFlowScheduler(**options)
    for s in range(1, scheduler.stages):
        alpha, beta = scheduler.renoise_coefficients(s)
        o, start = scheduler.ori_start_sigmas[s], scheduler.start_sigmas[s]
        covariance = (alpha * o) ** 2 + beta**2 * scheduler.block_covariance
        torch.testing.assert_close(covariance, start**2 * torch.eye(4).double(), atol=1e-12, rtol=0)
        assert alpha * (1 - o) == pytest.approx(1 - start, abs=1e-12)


def test_block_noise_of_the_released_model_sums_to_zero() -> None:
    covariance = PyramidFlowScheduler().block_covariance
    assert covariance.sum(dim=1).abs().max() < 1e-15
    assert covariance.diagonal().tolist() == pytest.approx([1] * 4)


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])
def test_a_straight_flow_is_integrated_exactly(ops: Ops) -> None:
    scheduler = PyramidFlowScheduler()
    start, end, uncond = torch.randn(3, 2, 4, 1, 6, 8, dtype=torch.float64)
    for n in (1, 7):
        x = start
        for step in scheduler.set_timesteps(n, 1).steps:
            v = uncond + (start - end - uncond) / 4
            x = scheduler.step(x, v, step, uncond=uncond, guidance=4, ops=ops)
        torch.testing.assert_close(x, end, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stages": 2, "stage_range": (0, 0.3, 0.6, 1)},
            r"stage_range: expected 3 bounds of at least one stage, got 4",
        ),
        ({"stages": 0, "stage_range": (0,)}, "at least one stage"),
        ({"stage_range": (0, 0.5, 0.5, 1)}, "stage_range: expected bounds that ascend"),
        ({"stage_range": (0, 0.7, 0.5, 1)}, "stage_range: expected bounds that ascend"),
        ({"stage_range": (-0.5, 0.1, 0.5, 1)}, "stage_range: expected bounds that ascend"),
        ({"stage_range": (0, 0.1, 0.5, 1.5)}, "stage_range: expected bounds that ascend"),
        ({"gamma": 0.5}, "gamma: expected above 0, at most 1/3, got 0.5"),
        ({"gamma": 0.0}, "gamma: expected above 0"),
        ({"shift": 0.0}, "shift: expected a positive number, got 0.0"),
        ({"shift": math.nan}, "shift: expected a positive number, got nan"),
        ({"num_train_timesteps": 0}, "num_train_timesteps: expected >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidFlowScheduler(**options)


def test_bad_calls() -> None:
    scheduler = PyramidFlowScheduler()
    for stage in (-1, 3):
        for call in (lambda s: scheduler.set_timesteps(2, s), scheduler.renoise_coefficients):
            with pytest.raises(ValueError, match=f"stage: expected 0 to 2, got {stage}"):
                call(stage)
    with pytest.raises(ValueError, match="n_steps: expected at least 1, got 0"):
        scheduler.set_timesteps(0, 0)
    with pytest.raises(ValueError, match="stage: expected at least 1"):
        scheduler.renoise_coefficients(0)


def test_options_of_a_training_config() -> None:
    given = {"stage_range": [0, 0.5, 1], "gamma": 0.25, "rank": 0}
    assert PyramidFlowScheduler.from_options(given) == PyramidFlowScheduler(2, (0, 0.5, 1), 0.25)


def test_step_counts_are_read_from_the_names_of_results(tmp_path: Path) -> None:
    """Verify recomputes a case whose step counts are in no stored case."""
    torch_files = pytest.importorskip("safetensors.torch")
    for ending in (".json", ".safetensors"):
        shutil.copy(CASES / f"scheduler{ending}", tmp_path / f"any{ending}")
    data = json.loads((tmp_path / "any.json").read_text())
    path = tmp_path / "any.safetensors"
    timesteps, sigmas = PyramidFlowScheduler.from_options(
        data["config"]["variants"][1]
    ).set_timesteps(7, 1)
    more = {"out.v1.N7.s1.timesteps": timesteps, "out.v1.N7.s1.sigmas": sigmas}
    torch_files.save_file(torch_files.load_file(path) | more, path)
    (case,) = verify.find_cases(tmp_path)
    assert verify.check(case, "fused", torch.float32, "cpu").status == "PASS"
    more["out.v1.N7.s1.sigmas"] = sigmas + 0.1
    torch_files.save_file(torch_files.load_file(path) | more, path)
    assert verify.check(case, "fused", torch.float32, "cpu").status == "FAIL"
