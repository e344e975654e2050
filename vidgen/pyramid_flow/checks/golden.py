"""Recomputes what the golden cases of Pyramid Flow record.

`KINDS` maps each kind of case to a function of its config, weights and inputs. `vidgen verify`
compares the results with the recorded ones.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vidgen.common.golden import Results
from vidgen.ops import Ops

from ..sampling.scheduler import PyramidFlowScheduler
from ..vae.weights import load_vae
from . import golden_models, golden_sampling

Tensors = dict[str, Tensor]


def scheduler(
    config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops, outputs: Sequence[str]
) -> Results:
    """Tables, the steps of inference, and a few Euler steps, for each variant of the options.

    Outputs named ``v{i}.N{n}.s{stage}...`` say which variants have n steps in a stage.
    """
    results: Results = {}
    for i, options in enumerate(config["variants"]):
        tables = PyramidFlowScheduler.from_options(options)
        found: dict[str, Any] = {
            "start_sigmas": tables.start_sigmas,
            "end_sigmas": tables.end_sigmas,
            "ori_start_sigmas": tables.ori_start_sigmas,
            "timestep_ratios": tables.timestep_ratios,
            "block_cov": tables.block_covariance,
            "block_cov_eig": torch.linalg.eigvalsh(tables.block_covariance),
        }
        jumps = [tables.renoise_coefficients(s) for s in range(1, tables.stages)]
        found["alpha"], found["beta"] = [a for a, _ in jumps], [b for _, b in jumps]
        for s in range(tables.stages):
            found[f"timesteps_per_stage.{s}"] = tables.timesteps_per_stage[s][::37]
            found[f"sigmas_per_stage.{s}"] = tables.sigmas_per_stage[s][::37]
        for name in outputs:
            if named := re.match(rf"v{i}\.N(\d+)\.s(\d+)\.timesteps$", name):
                n, s = map(int, named.groups())
                steps = tables.set_timesteps(n, s)
                found[f"N{n}.s{s}.timesteps"], found[f"N{n}.s{s}.sigmas"] = steps
        if f"v{i}.euler.x0" in inputs:
            x, velocities = inputs[f"v{i}.euler.x0"], inputs[f"v{i}.euler.v"]
            steps = tables.set_timesteps(len(velocities), tables.stages - 1).steps
            for velocity, step in zip(velocities, steps, strict=True):
                x = tables.step(x, velocity, step, ops=ops)
            found["euler.x"] = x
        for name, x in found.items():
            results[f"v{i}.{name}"] = torch.as_tensor(x, dtype=getattr(x, "dtype", torch.float64))
    return results


def vae(
    config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops, outputs: Sequence[str]
) -> Results:
    """Moments and decoded video. The names say whether of an image, in chunks, or in tiles."""
    named = r"(moments|decoded)(_image)?(_tiled)?(?:_chunk(\d+))?(?:_frames((?:_\d+)+))?"
    model = load_vae(config, w)
    results: Results = {}
    for name in outputs:
        if not (form := re.fullmatch(named, name)):
            continue
        what, image, tiled, window, frames = form.groups()
        x = inputs[("video" if what == "moments" else "z") + (tiled or "")]
        options = {
            "window": int(window) if window else None,
            "tile": config.get("sample_size", 256) if tiled else None,
        }
        with torch.no_grad():
            x = x[:, :, :1] if image else x
            encode = what == "moments"
            y = model.encode(x, **options).moments if encode else model.decode(x, **options)
        results[name] = y[:, :, [int(t) for t in frames[1:].split("_")]] if frames else y
    return results


def pyramid_ops(
    config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops, outputs: Sequence[str]
) -> Results:
    """Levels of latents and noise, jumps between stages, and the covariance of block noise."""
    stages = config["stages"]
    tables = PyramidFlowScheduler.from_options(
        {"stage_range": [s / stages for s in range(stages + 1)], **config}
    )
    results: Results = {}
    for name, x, noise in (
        ("latent", inputs["x"], False),
        ("noise", inputs["x"], True),
        ("odd", inputs["y_odd"], False),
    ):
        for level in reversed(range(stages)):
            results[f"{name}_level{level}"] = x
            x = ops.downsample(x, noise=noise) if level else x
    for s in range(1, stages):
        noise, jump = inputs[f"block_noise.s{s}"], tables.renoise_coefficients(s)
        low = results[f"latent_level{s - 1}"]
        results[f"renoised.s{s}"] = ops.upsample_renoise(
            low, *jump, gamma=tables.gamma, block_noise=noise
        )
    results["chol"] = _cholesky(tables.block_covariance)
    results["z_cholesky"] = inputs["z"] @ results["chol"].to(inputs["z"]).mT
    return results


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor. The matrix may be singular, as it is for gamma = 1/3."""
    factor = torch.zeros_like(matrix)
    for i in range(len(matrix)):
        rest = matrix - factor @ factor.mT
        if rest[i, i] > 0:
            factor[i:, i] = rest[i:, i] / rest[i, i].sqrt()
    return factor


KINDS: dict[str, Callable[..., Results]] = {
    **golden_models.KINDS,
    **golden_sampling.KINDS,
    "pyramid_ops": pyramid_ops,
    "scheduler": scheduler,
    "vae": vae,
}
