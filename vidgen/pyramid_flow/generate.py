"""`vidgen generate pyramid-flow`: text to an image or video, an image or clip to video."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vidgen.common.arguments import MAX_SIDE, MAX_STEPS, number, whole
from vidgen.common.media import IMAGES, fit, read_frames
from vidgen.common.options import GenerateRun, Video, add_size_arguments, check_one_prompt

from .checks.random_weights import SMALL, SMALL_SIZE, random_pipeline, random_prompts
from .model.kv_cache import OFF, CacheEstimate, CachePolicy
from .offload import Placement
from .pipeline import FPS, PyramidFlowPipeline
from .sampling.config import SamplingConfig
from .sampling.guidance import Guidance, LinearGuidance
from .sampling.noise import DrawnNoise
from .sampling.sampler import estimate_cache
from .sampling.state import check_prompts
from .text import NEGATIVE_PROMPT, Prompts, read_features

SUMMARY = "Pyramid Flow: text to image or video, an image or the beginning of a video to video"

# Height and width that a variant is trained for, by the end of its name.
SIZES = {"_384p": (384, 640), "_768p": (768, 1280), "_image": (1024, 1024)}
FRAMES_PER_LATENT = 8
N_UNITS = 16  # of a video: 121 frames
TILE, LOW_MEMORY_TILE = 512, 256  # pixels, as in the released code
TILE_MULTIPLE = 32
CACHES = {"off": OFF, "stages01": CachePolicy(stages=(0, 1)), "all": CachePolicy()}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--variant",
        default="diffusion_transformer_768p",
        metavar="FOLDER",
        help="the transformer, a folder of the checkpoint (default: %(default)s)",
    )
    add_size_arguments(group, 64, height="that of the variant", width="that of the variant")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--units",
        type=whole(),
        metavar="N",
        help=f"the first frame is one, given ones count (default: {N_UNITS}, for an image file 1)",
    )
    length.add_argument(
        "--frames",
        type=whole(),
        metavar="N",
        help="the same in frames: 1 + 8 k times those of a unit",
    )
    add(
        "--frames-per-unit",
        type=whole(),
        default=1,
        metavar="N",
        help="latent frames that are made at once, as the checkpoint was trained; 8 frames each "
        "(default: %(default)s, as released)",
    )
    start = group.add_mutually_exclusive_group()
    start.add_argument("--image", type=Path, metavar="FILE", help="the first frame")
    start.add_argument(
        "--video", type=Path, metavar="FILE", help="its last frames, 1 + 8 k, begin the video"
    )
    add("--new-only", action="store_true", help="write the frames after those of --video only")
    for name, default, unit in (("steps", 20, "the first unit"), ("video-steps", 10, "all others")):
        help = f"per stage of {unit} (default: {default})"
        add(f"--{name}", type=whole(1, MAX_STEPS), default=default, metavar="N", help=help)
    add(
        "--guidance-scale",
        type=number(),
        default=7.0,
        metavar="X",
        help="of the first unit, 1: none; 0: none of any unit (default: %(default)g)",
    )
    add(
        "--video-guidance-scale",
        type=number(),
        metavar="X",
        help="of all others (default: 5, after given frames 4)",
    )
    add(
        "--linear-guidance",
        action="store_true",
        help="from --guidance-scale of the first unit down by 0.5 with each unit, to 2 at last",
    )
    add(
        "--bidirectional",
        action="store_true",
        help="frames also see later ones, for a checkpoint that was trained so; turns --cache off "
        "(default: causal, whatever config.json says, as in the official pipeline)",
    )
    add(
        "--cache",
        default="16e9",
        metavar="|".join([*CACHES, "BYTES"]),
        help="of which stages keys and values are kept from unit to unit, which is exact: none, "
        "the two lower ones, all, or those that fit (default: %(default)s)",
    )
    add(
        "--low-memory",
        action="store_true",
        help="models are on the device only while they are used, the cache is on the CPU, frames "
        f"are decoded at the end in tiles of {LOW_MEMORY_TILE} pixels",
    )
    add(
        "--tiling",
        type=whole(TILE_MULTIPLE, MAX_SIDE, multiple=TILE_MULTIPLE),
        nargs="?",
        const=TILE,
        metavar="PIXELS",
        help="the VAE works in tiles, which needs less memory and changes the result a little "
        f"(default: whole frames; {TILE} where no number is given)",
    )


def count_frames(args: argparse.Namespace) -> int:
    """Frames of the output."""
    n_frames = 1 + _unit_length(args) * (_count_units(args) - 1)
    return n_frames - _n_hidden(args, _read_given(args) if args.new_only else None)


def _unit_length(args: argparse.Namespace) -> int:
    """Frames of every unit but the first, which has one frame."""
    return FRAMES_PER_LATENT * args.frames_per_unit


def _count_units(args: argparse.Namespace) -> int:
    if args.frames is not None:
        length = _unit_length(args)
        if (args.frames - 1) % length:
            raise ValueError(f"frames: expected 1 + {length} k, got {args.frames}")
        return 1 + (args.frames - 1) // length
    if args.units is not None:
        return args.units
    return 1 if args.output.suffix in IMAGES else N_UNITS


def generate(args: argparse.Namespace, run: GenerateRun) -> Video:
    """Makes the video. The whole request is checked before any long work."""
    policy = _cache_policy(args)
    size = _frame_size(args)
    pipeline = _pipeline(args, run)
    given = _read_given(args)
    n_given = 0 if given is None else 1 + len(given) // _unit_length(args)
    config = SamplingConfig(
        size=pipeline.latent_size(*size),
        n_units=_count_units(args),
        frames_per_unit=args.frames_per_unit,
        first_steps=(args.steps,) * 3,
        steps=(args.video_steps,) * 3,
        guidance=guidance_of(args),
        cache=policy,
    )
    if n_given >= config.n_units:
        raise ValueError(f"units: expected more than the {n_given} given, got {config.n_units}")
    prompts = _prompts(pipeline, run)
    check_prompts(prompts, config, n_given)
    _report_cache(estimate_cache(pipeline.transformer, prompts, config, n_given), policy)
    tile = args.tiling or (LOW_MEMORY_TILE if args.low_memory else None)
    latents = None
    if given is not None:
        video = fit(given, *size)[None]
        latents = pipeline.encode_video(video, generator=run.generator, tile=tile)
    frames = pipeline.generate(
        prompts,
        config,
        given=latents,
        noise=DrawnNoise(run.generator),
        tile=tile,
        progress=run.progress,
    )
    return Video(frames[0, _n_hidden(args, given) :], FPS)


def _pipeline(args: argparse.Namespace, run: GenerateRun) -> PyramidFlowPipeline:
    placement = Placement(run.device, args.low_memory)
    if run.checkpoint is None:
        config = replace(SMALL, use_temporal_causal=not args.bidirectional)
        return random_pipeline(config, ops=run.ops, dtype=run.dtype, placement=placement)
    return PyramidFlowPipeline.from_pretrained(
        run.checkpoint,
        args.variant,
        ops=run.ops,
        dtype=run.dtype,
        placement=placement,
        with_text_encoder=run.embeddings is None,
        bidirectional=args.bidirectional,
    )


def guidance_of(args: argparse.Namespace) -> Guidance:
    released = 4.0 if args.image or args.video else 5.0
    video = released if args.video_guidance_scale is None else args.video_guidance_scale
    return Guidance(args.guidance_scale, video, LinearGuidance() if args.linear_guidance else None)


def _report_cache(estimate: CacheEstimate, policy: CachePolicy) -> None:
    if estimate.stages:
        stages = ", ".join(map(str, estimate.stages))
        where = "CPU" if policy.on_cpu else "device"
        size = estimate.n_bytes / 1e6
        sys.stderr.write(f"cache of stages {stages}: {size:,.1f} MB of memory of the {where}\n")


def _frame_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width."""
    known = [size for end, size in SIZES.items() if args.variant.endswith(end)]
    default = SMALL_SIZE if args.checkpoint is None else (*known, None)[0]
    if default is None and None in (args.height, args.width):
        raise ValueError(f"height, width: expected both for the variant {args.variant}, got none")
    height, width = default or (0, 0)
    return args.height or height, args.width or width


def _cache_policy(args: argparse.Namespace) -> CachePolicy:
    if args.bidirectional:  # what a frame sees changes with every unit
        policy = OFF
    elif args.cache in CACHES:
        policy = CACHES[args.cache]
    else:
        try:
            policy = CachePolicy(max_bytes=int(number(most=float("inf"))(args.cache)))
        except (argparse.ArgumentTypeError, OverflowError):
            expected = f"{', '.join(CACHES)} or a number of bytes"
            raise ValueError(f"cache: expected {expected}, got {args.cache}") from None
    return replace(policy, on_cpu=args.low_memory)


def _read_given(args: argparse.Namespace) -> Tensor | None:
    """The frames that the video begins with, uint8 ``[T, h, w, 3]``; of a clip, its last units."""
    if args.image is not None:
        return read_frames(args.image, first=1)
    if args.video is None:
        return None
    # a unit more than there is room for: the request is then refused in units
    frames = read_frames(args.video, most=_unit_length(args) * _count_units(args))
    return frames[(len(frames) - 1) % _unit_length(args) :]


def _n_hidden(args: argparse.Namespace, given: Tensor | None) -> int:
    """How many of the first frames are left out of the output."""
    if not args.new_only:
        return 0
    if args.video is None or given is None:
        raise ValueError("new-only: expected a clip in --video, got none")
    return len(given)


def _prompts(pipeline: PyramidFlowPipeline, run: GenerateRun) -> Prompts:
    config = pipeline.transformer.config
    if run.embeddings is not None:
        prompts = read_features(run.embeddings, config)
        check_one_prompt(len(prompts.prompt.features))
        return prompts
    if run.checkpoint is None:
        return random_prompts(config)
    assert run.prompt is not None
    negative = NEGATIVE_PROMPT if run.negative_prompt is None else run.negative_prompt
    prompts = pipeline.encode_prompts([run.prompt], negative)
    pipeline.text_encoder = None  # frees the largest part, which is not used again
    return prompts
