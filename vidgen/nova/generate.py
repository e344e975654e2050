"""`vidgen generate nova`: text or a class to an image or video, an image or clip to video.

`vidgen/commands/generate.py` calls `add_arguments`, `count_frames` and `generate`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vidgen.common.arguments import MAX_STEPS, number, whole
from vidgen.common.checkpoint import read_config
from vidgen.common.media import fit, read_frames
from vidgen.common.options import GenerateRun, Video, add_size_arguments, check_one_prompt

from .checks.random_weights import SMALL, random_features, random_pipeline
from .model.config import NovaConfig
from .model.embeddings import DEFAULT_FLOW, N_CLASSES
from .pipeline import FPS, NovaPipeline, shifted
from .sampling.guidance import Guidance
from .sampling.sampler import ORDERS, SamplingConfig
from .text import TextFeatures, read_features

SUMMARY = "NOVA: text to image or video, an image or the beginning of a video to video"

FRAMES_PER_LATENT = 4
N_LATENTS = 9  # of a video: 33 frames
N_SETS = 64


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add_size_arguments(group, 32, height="that of training", width="that of training")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--latents",
        type=whole(),
        metavar="N",
        help="latent frames, given ones included; more than in training extrapolate "
        f"(default: {N_LATENTS}, for models of images 1)",
    )
    length.add_argument("--frames", type=whole(), metavar="N", help="the same in frames: 1 + 4 k")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--image", type=Path, metavar="FILE", help="the first frame")
    start.add_argument(
        "--video", type=Path, metavar="FILE", help="its last 1 + 4 k frames begin the video"
    )
    add(
        "--class-label",
        type=whole(0, N_CLASSES),
        metavar="N",
        help=f"instead of a prompt, for models of classes; {N_CLASSES}: none of them",
    )
    add(
        "--sets",
        type=whole(),
        metavar="N",
        help=f"into which a frame is divided (default: {N_SETS}, or its tokens if they are fewer)",
    )
    add(
        "--steps",
        type=whole(1, MAX_STEPS),
        metavar="N",
        help="of diffusion for a set (default: 25; 100 for DDPM models)",
    )
    add(
        "--flow-shift",
        type=number(above=True),
        metavar="X",
        help="of the noise levels, for flow-matching models",
    )
    add(
        "--flow",
        type=number(),
        default=DEFAULT_FLOW,
        metavar="X",
        help="how much moves (default: %(default)g)",
    )
    add("--order", choices=ORDERS, default=ORDERS[0], help="official: slow, the same result")
    add("--graphs", action="store_true", help="replay CUDA graphs")
    ratio = number(0, 1, above=True)
    for name, type, help in (
        ("guidance-scale", number(), "1: none (default: %(default)g)"),
        ("min-guidance-scale", number(), "that of the first set (default: --guidance-scale)"),
        ("guidance-trunc", number(), "none at timesteps below (default: %(default)g)"),
        ("guidance-renorm", ratio, "least ratio of norms (default: %(default)g, none)"),
        ("image-guidance-scale", number(), "away from no frames (default: %(default)g)"),
        (
            "spatiotemporal-guidance-scale",
            number(),
            "as released, without effect (default: %(default)g)",
        ),
    ):
        default = getattr(Guidance(), name.replace("-", "_"))
        add(f"--{name}", type=type, default=default, metavar="X", help=help)


def count_frames(args: argparse.Namespace) -> int:
    """The number of frames of the output."""
    return 1 + FRAMES_PER_LATENT * (_count_latents(args) - 1)


def _count_latents(args: argparse.Namespace) -> int:
    if args.frames is not None:
        if (args.frames - 1) % FRAMES_PER_LATENT:
            raise ValueError(f"frames: expected 1 + {FRAMES_PER_LATENT} k, got {args.frames}")
        return 1 + (args.frames - 1) // FRAMES_PER_LATENT
    if args.latents is not None:
        return args.latents
    return N_LATENTS if _transformer_config(args).has_motion else 1


def count_sets(wanted: int | None, config: NovaConfig) -> int:
    """The number of sets of a frame. Raises ValueError for more sets than tokens."""
    if wanted is None:
        return min(N_SETS, config.n_tokens)
    if wanted > config.n_tokens:
        expected = f"expected at most {config.n_tokens}, the tokens of a frame"
        raise ValueError(f"sets: {expected}, got {wanted}")
    return wanted


def _transformer_config(args: argparse.Namespace) -> NovaConfig:
    if args.checkpoint is None:
        return SMALL
    return NovaConfig.from_dict(read_config(args.checkpoint / "transformer"))


def generate(args: argparse.Namespace, run: GenerateRun) -> Video:
    """The video of the request. What can be checked without the models is checked before they load.

    Raises:
        ValueError: a request that cannot be met.
    """
    config = _transformer_config(args)
    size = args.height or config.image_size[0], args.width or config.image_size[1]
    stride = config.image_stride * config.video_patch
    for name, side in zip(("height", "width"), size, strict=True):
        if side % stride:
            raise ValueError(f"{name}: expected a multiple of {stride}, got {side}")
    sampling = SamplingConfig(
        num_inference_steps=count_sets(args.sets, config.resized(*size)),
        max_latent_length=_count_latents(args),
        guidance=Guidance(**{name: getattr(args, name) for name in Guidance.__dataclass_fields__}),
        order=args.order,
        graphs=args.graphs,
    )
    if run.checkpoint is None:
        pipeline = random_pipeline(size, run.ops, dtype=run.dtype, device=run.device)
    else:
        pipeline = NovaPipeline.from_pretrained(
            run.checkpoint,
            ops=run.ops,
            dtype=run.dtype,
            device=run.device,
            size=size,
            with_text_encoder=run.prompt is not None and config.text_token_dim is not None,
        )
    schedule = pipeline.schedule
    sampling = replace(
        sampling,
        num_diffusion_steps=args.steps or pipeline.default_steps,
        schedule=schedule if args.flow_shift is None else shifted(schedule, args.flow_shift),
    )
    given = _given(args, pipeline, size)
    if given is not None:
        given = pipeline.encode_video(given, run.generator)
    parts = pipeline.generate(
        _prompts(args, run, pipeline),
        sampling,
        given=given,
        flow=args.flow,
        generator=run.generator,
        progress=run.progress,
    )
    return Video(torch.cat([part[0] for part in parts]), FPS)


def _prompts(
    args: argparse.Namespace, run: GenerateRun, pipeline: NovaPipeline
) -> TextFeatures | list[int]:
    config = pipeline.transformer.config
    if config.text_token_dim is None:
        if args.class_label is None:
            raise ValueError("class-label: expected one for a model of classes, got none")
        return [args.class_label]
    if args.class_label is not None:
        raise ValueError("class-label: expected none for a model of texts")
    if run.embeddings is not None:
        features = read_features(run.embeddings, config.text_token_dim, config.text_token_len)
        check_one_prompt(len(features.prompt))
        return features
    if run.checkpoint is None:
        return random_features(config)
    assert run.prompt is not None
    return pipeline.encode_prompts([run.prompt], run.negative_prompt or "")


def _given(
    args: argparse.Namespace, pipeline: NovaPipeline, size: tuple[int, int]
) -> Tensor | None:
    """The frames that the video begins with, ``[1, 3, F, H, W]`` in [-1, 1]; None without any."""
    path = args.image or args.video
    if path is None:
        return None
    if args.image:
        return fit(read_frames(path, first=1), *size)[None]
    factor = pipeline.vae.temporal_factor
    # whole latents are taken from the end, and up to factor - 1 frames before them left out
    most = 1 + factor * (_count_latents(args) - 1)
    frames = read_frames(path, most=most + factor - 1)
    n_frames = 1 + (len(frames) - 1) // factor * factor
    return fit(frames[-n_frames:], *size)[None]
