"""Recomputes what the golden cases of whole sampling loops record. See `golden`.

Every loop runs twice. The first run is that of the released code, with both prompts at every step
and no cache; the results of its stages are compared. The second run has a cache of keys and values
and leaves out the negative prompt at scale 1; its final latents are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidgen.common.golden import Pixels, Results
from vidgen.common.media import to_uint8
from vidgen.ops import Ops

from ..model.kv_cache import CachePolicy
from ..model.transformer import PyramidTransformer
from ..model.weights import load_transformer
from ..sampling.config import SamplingConfig
from ..sampling.guidance import Guidance, LinearGuidance
from ..sampling.sampler import StageRecord, sample
from ..sampling.scheduler import PyramidFlowScheduler
from ..text import Prompts, TextFeatures
from ..vae.latents import LatentStats, denormalize_latents, normalize_latents
from ..vae.weights import load_vae

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class RecordedNoise:
    """The recorded random numbers of a case."""

    inputs: Tensors

    def initial(self, shape: Sequence[int]) -> Tensor:
        return self.inputs["init_noise"][:, :, : shape[2]]

    def jump(self, unit: int, stage: int, shape: Sequence[int]) -> dict[str, Any]:
        return {"block_noise": self.inputs[f"block_noise.u{unit}.s{stage}"]}


def text_to_video(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """Start, end and first prediction of every stage, and the final latents."""
    config = dict(config)
    options = config.pop("sampling")
    *_, height, width = inputs["init_noise"].shape
    model = load_transformer(config, w, ops)
    return both_loops(model, sampling_config(options, (height, width)), inputs)


def image_to_video(
    config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops, outputs: Sequence[str]
) -> Results:
    """The same for a video that continues an image, with the VAE's encoding and decoding.

    A case has the frames ``decoded_frames_{i}_{j}...`` of the video and, as uint8
    ``[frames, H, W, C]``, every n-th frame in ``frames_every{n}``.
    """
    options = config["sampling"]
    stats = LatentStats(*(tuple(options["vae_shift_scale"][x]) for x in ("image", "video")))
    vae = load_vae(config["vae"], below("vae.", w))
    model = load_transformer(config["transformer"], below("dit.", w), ops)
    image = inputs["image"].to(inputs["posterior_noise"]) / 255 * 2 - 1  # [H, W, C]
    with torch.no_grad():
        posterior = vae.encode(image.movedim(-1, 0)[None, :, None])
        latent = posterior.sample(noise=inputs["posterior_noise"])
        latent = normalize_latents(latent, stats)
    size = latent.shape[3], latent.shape[4]
    results: Results = {"image_latent": latent}
    results |= both_loops(model, sampling_config(options, size), inputs, latent)
    with torch.no_grad():
        latents = results["latents"]
        assert isinstance(latents, Tensor)
        video = vae.decode(denormalize_latents(latents.to(latent), stats), window=1)
    for name in outputs:
        if named := re.fullmatch(r"decoded_frames((?:_\d+)+)", name):
            results[name] = video[:, :, [int(i) for i in named[1][1:].split("_")]]
        elif named := re.fullmatch(r"frames_every(\d+)", name):
            results[name] = Pixels(to_uint8(video, rounded=False)[0, :: int(named[1])])
    return results


def both_loops(
    model: PyramidTransformer, config: SamplingConfig, inputs: Tensors, given: Tensor | None = None
) -> Results:
    """The results of the two runs."""
    prompt, negative = (
        TextFeatures(
            inputs[f"{name}.text"], inputs.get(f"{name}.text_mask"), inputs[f"{name}.pooled"]
        )
        if f"{name}.text" in inputs
        else None
        for name in ("prompt", "negative")
    )
    assert prompt is not None
    results: Results = {}

    def record(stage: StageRecord) -> None:
        name = f"u{stage.unit}.s{stage.stage}"
        results[f"{name}.start"], results[f"{name}.end"] = stage.start, stage.end
        results[f"{name}.pred0"] = stage.first_velocity

    def run(config: SamplingConfig, on_stage: Callable[[StageRecord], None] | None) -> Tensor:
        return sample(
            model,
            Prompts(prompt, negative),
            config,
            noise=RecordedNoise(inputs),
            given=given,
            on_stage=on_stage,
        )

    run(replace(config, guidance=replace(config.guidance, always=True)), record)
    cache = CachePolicy() if model.config.use_temporal_causal else config.cache
    results["latents"] = run(replace(config, cache=cache), None)
    return results


def sampling_config(options: dict[str, Any], size: tuple[int, int]) -> SamplingConfig:
    """From the arguments of the released code's ``generate`` and its scheduler."""
    scheduler = PyramidFlowScheduler.from_options(options)
    first = steps_per_stage(options["num_inference_steps"], scheduler.stages)
    others = options.get("video_num_inference_steps", first)
    linear = None
    if options.get("use_linear_guidance"):
        linear = LinearGuidance(options.get("alpha", 0.5), options.get("min_guidance_scale", 2.0))
    per_unit = options.get("frame_per_unit", 1)
    return SamplingConfig(
        size,
        1 + (options["temp"] - 1) // per_unit,
        per_unit,
        first,
        steps_per_stage(others, scheduler.stages),
        Guidance(options["guidance_scale"], options["video_guidance_scale"], linear),
        scheduler,
    )


def steps_per_stage(n_steps: int | Sequence[int], n_stages: int) -> tuple[int, ...]:
    """A single number applies to all stages."""
    return (n_steps,) * n_stages if isinstance(n_steps, int) else tuple(n_steps)


def below(prefix: str, w: Tensors) -> Tensors:
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


KINDS = {"t2v": text_to_video, "i2v": image_to_video}
