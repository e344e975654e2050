"""Golden cases of RepVideo's schedules, sampling loops and VAE: recomputes what they record."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vidgen.ops import Ops

from ..model.config import CogVideoXConfig
from ..model.weights import load_transformer
from ..sampling.sampler import Guidance, sample
from ..sampling.schedules import (
    SAMPLERS,
    build_scheduler,
    denoiser_table,
    diffusers_schedule,
    sat_schedule,
    sat_tables,
    shifted_alphas,
)
from ..vae.vae import load_vae
from .golden_models import sat_config

Tensors = dict[str, Tensor]

SAT_SAMPLERS = {"dpmpp2m_sde": "dpm", "ddim": "ddim"}  # their names in the cases


def sat_tables_case(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """Timesteps, noise levels and guidance weights for several numbers of steps."""
    alphas = shifted_alphas(
        config["shift_scale"], config["num_train"], config["linear_start"], config["linear_end"]
    )
    guidance = Guidance(config["cfg_scale"], config["cfg_exp"])
    results = {"table1000": denoiser_table(alphas)}
    for n in config["n_steps"]:
        tables = sat_tables(n, alphas)
        found = {
            "timesteps": tables.timesteps,
            "alpha_sqrt": tables.sqrt_alphas,
            "alpha_quant": tables.denoiser_sqrt_alphas,
            "cfg_scale": torch.tensor(guidance.weights(tables.timesteps.tolist())).float(),
        }
        results |= {f"n{n}.{name}": x for name, x in found.items()}
    return results


def sat_loop(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """A whole sampling loop of the released code, with the results of each step."""
    if config["sampler"] not in SAT_SAMPLERS:
        expected = " or ".join(SAT_SAMPLERS)
        raise ValueError(f"sampler: expected {expected}, got {config['sampler']!r}")
    recorder = Recorder(ops)
    final = sample(
        load_transformer(sat_config(config), w, recorder.ops),
        iter([inputs["x0"], *inputs.get("noise", ())]),
        inputs["context"],
        inputs["uncond"],
        sat_schedule(config["n_steps"], config["shift_scale"], SAT_SAMPLERS[config["sampler"]]),
        guidance=Guidance(config["cfg_scale"], config["cfg_exp"]),
        ops=recorder.ops,
    )
    x, x0, _ = recorder.stacked()
    return {"x_steps": x, "denoised_steps": x0, "final": final}


def diffusers_steps(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """Both schedulers of diffusers: their tables, and steps with given predictions."""
    velocities, results = inputs["v"], {}
    text = inputs["x"].new_zeros(len(inputs["x"]), 1, 1)
    for sampler in SAMPLERS:
        scheduler = build_scheduler(options_of(config), sampler)
        given = iter(velocities)
        recorder = Recorder(ops)
        sample(
            lambda x, text, t, given=given: next(given),
            iter([inputs["x"], *inputs["noise"]]),
            text,
            None,
            diffusers_schedule(config["n_steps"], scheduler),
            ops=recorder.ops,
        )
        results[f"{sampler}_steps"], results[f"{sampler}_x0"], _ = recorder.stacked()
        results["timesteps"] = scheduler.timesteps
        results["alphas_cumprod"] = scheduler.alphas_cumprod
    t = torch.tensor([0, 500, 999])
    x, noise = inputs["x"].expand(3, *inputs["x"].shape), velocities[0]
    roots = results["alphas_cumprod"].sqrt()[t].view(3, *[1] * inputs["x"].ndim).to(x)
    spread = (1 - roots.square()).sqrt()
    return results | {
        "add_noise": roots * x + spread * noise,
        "velocity": roots * noise - spread * x,
    }


def diffusers_loop(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """A whole sampling loop of diffusers' pipeline."""
    own = CogVideoXConfig.__dataclass_fields__
    model = CogVideoXConfig.from_dict({k: x for k, x in config.items() if k in own})
    steps = diffusers_schedule(
        config["n_steps"], build_scheduler(options_of(config), config["scheduler"])
    )
    guidance = Guidance(config["guidance_scale"], 5 if config["dynamic_cfg"] else None)
    is_guided = config["guidance_scale"] > 1  # else diffusers runs no unconditional half
    recorder = Recorder(ops)
    final = sample(
        load_transformer(model, w, recorder.ops),
        iter([inputs["latents"], *inputs.get("noise", ())]),
        inputs["prompt"],
        inputs["negative"] if is_guided else None,
        steps,
        guidance=guidance if is_guided else None,
        ops=recorder.ops,
    )
    weights = guidance.weights([step.timestep for step in steps])
    return {
        "steps": recorder.stacked()[0],
        "final": final,
        "guidance": torch.tensor(weights),
    }


def vae(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """Moments, and latents decoded with and without tiling."""
    from diffusers import AutoencoderKLCogVideoX

    known = inspect.signature(AutoencoderKLCogVideoX).parameters
    model = load_vae({k: x for k, x in config.items() if k in known}, w)
    with torch.no_grad():
        moments = model.encode(inputs["video"]).latent_dist
        results = {
            "moments_mean": moments.mean,
            "moments_logvar": moments.logvar,
            "decoded": model.decode(moments.mean).sample,
        }
        model.enable_tiling(*config.get("tile_sample_min", ()))
        return results | {"decoded_tiled": model.decode(inputs["z_tiled"]).sample}


class Recorder:
    """``ops`` that record each step: the latents after it, x0, and the guidance weight."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.ops = ops._replace(ddim_step=self._ddim_step, dpm_step=self._dpm_step)

    def stacked(self) -> list[Tensor]:
        return [torch.stack(column) for column in zip(*self._rows, strict=True)]

    def _ddim_step(self, x: Tensor, velocity: Tensor, *levels: float, **options: Any) -> Tensor:
        out = self._ops.ddim_step(x, velocity, *levels, **options)
        # a step to level 1 gives x0
        self._add(out, self._ops.ddim_step(x, velocity, levels[0], 1.0, **options), options)
        return out

    def _dpm_step(
        self, x: Tensor, velocity: Tensor, *levels: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        out, x0 = self._ops.dpm_step(x, velocity, *levels, **options)
        self._add(out, x0, options)
        return out, x0

    def _add(self, out: Tensor, x0: Tensor, options: Mapping[str, Any]) -> None:
        self._rows.append((out, x0, torch.tensor(options["guidance"])))


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a case for diffusers' schedulers."""
    from diffusers import CogVideoXDDIMScheduler

    names = inspect.signature(CogVideoXDDIMScheduler).parameters
    return {name: config[name] for name in names if name in config}


KINDS: dict[str, Callable[[dict[str, Any], Tensors, Tensors, Ops], Tensors]] = {
    "sat_schedule": sat_tables_case,
    "sat_loop_dpm": sat_loop,
    "sat_loop_ddim": sat_loop,
    "diffusers_sched": diffusers_steps,
    "diffusers_sched_linspace": diffusers_steps,
    "diffusers_pipe_dpm": diffusers_loop,
    "diffusers_pipe_ddim": diffusers_loop,
    "diffusers_vae": vae,
}
