"""`vidgen generate repvideo`: text to video by RepVideo or CogVideoX.

`vidgen/commands/generate.py` calls `add_arguments`, `count_frames` and `generate`. `vidgen analyze`
uses the parts that make latents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.common.arguments import MAX_STEPS, number, whole
from vidgen.common.checkpoint import read_config
from vidgen.common.media import to_uint8
from vidgen.common.options import GenerateRun, Video, add_size_arguments, check_one_prompt

from .checks.random_weights import SMALL, SMALL_SIZE, fresh_model, fresh_vae, random_prompts
from .model.config import CogVideoXConfig
from .model.transformer import CogVideoXTransformer
from .model.weights import is_sat_folder, load_pretrained
from .pipeline import RepVideoPipeline, Sampling, VideoSize
from .sampling.sampler import Guidance
from .sampling.schedules import SAMPLERS, build_scheduler, diffusers_schedule, sat_schedule
from .text import Prompts, load_text_encoder, read_features
from .vae.vae import load_pretrained_vae

SUMMARY = "RepVideo or CogVideoX: text to video"
FPS = 8.0

# Paths beside a SAT folder, as in the released checkpoints.
SAT_VAES = ("vae/vae/3d-vae.pt", "vae/3d-vae.pt")  # as unpacked, and flat
SAT_TEXT_ENCODER = "t5-v1_1-xxl"
LARGE_SCALING = 0.7  # scaling factor of the VAE of the models with rotary positions


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.description = (
        "The checkpoint is a SAT folder, which has a file named latest, or a pipeline of "
        "diffusers. A file of embeddings has prompt_embeds and perhaps negative_prompt_embeds, "
        "[1, S, W] each."
    )
    add_model_arguments(group)
    group.add_argument(
        "--vae",
        type=Path,
        metavar="PATH",
        help=f"folder of diffusers or file of SAT (default: vae of a pipeline; ../{SAT_VAES[0]} "
        "beside a SAT folder)",
    )
    group.add_argument(
        "--tiling",
        action="store_true",
        help="decode in tiles: less memory, and slightly another picture",
    )


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """The options for generating latents."""
    add = group.add_argument
    size = VideoSize()
    add_size_arguments(
        group,
        16,
        height=f"{size.height}; with random weights {SMALL_SIZE.height}",
        width=f"{size.width}; with random weights {SMALL_SIZE.width}",
    )
    add(
        "--frames",
        type=whole(),
        metavar="N",
        help=f"1 + 8 k (default: {size.n_frames}; with random weights {SMALL_SIZE.n_frames})",
    )
    add(
        "--steps",
        type=whole(1, MAX_STEPS),
        default=50,
        metavar="N",
        help="default: %(default)s",
    )
    add(
        "--guidance-scale",
        type=number(),
        default=Guidance.scale,
        metavar="X",
        help="0: none; 1: none, where it is not dynamic (default: %(default)g)",
    )
    add(
        "--dynamic-guidance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a weight that changes from step to step, up to 1 + the scale (default: on)",
    )
    add("--sampler", choices=SAMPLERS, help="default: dpm, or what a pipeline names")
    add(
        "--schedule",
        choices=["sat", "diffusers"],
        help="whose noise levels and precision of latents (default: by the checkpoint's layout)",
    )
    add(
        "--unconditional",
        choices=["zeros", "prompt"],
        help="guidance leads away from zeros, as RepVideo is released, or from the negative "
        "prompt, as diffusers does (default: by the layout; prompt where one is given)",
    )
    add(
        "--text-encoder",
        type=Path,
        metavar="DIR",
        help="T5 with its tokenizer (default: text_encoder and tokenizer of a pipeline; "
        f"../{SAT_TEXT_ENCODER} beside a SAT folder)",
    )


def count_frames(args: argparse.Namespace) -> int:
    return read_size(args).n_frames


def generate(args: argparse.Namespace, run: GenerateRun) -> Video:
    """The video of one prompt; models are loaded one after another, each when it is needed."""
    read_size(args).check_decodable(_config_of(run))
    transformer, prompts = load_models(args, run)
    check_one_prompt(len(prompts.text))
    sampling = read_sampling(args, transformer.config)
    vae = find_vae(args, run, transformer.config)
    if args.tiling:
        vae.enable_tiling()
    make = RepVideoPipeline(transformer, vae)
    pixels = make(prompts, read_size(args), sampling, run.generator, run.progress)
    return Video(to_uint8(pixels[0]), FPS)


def read_size(args: argparse.Namespace) -> VideoSize:
    default = SMALL_SIZE if args.checkpoint is None else VideoSize()
    given = args.height, args.width, args.frames
    known = default.height, default.width, default.n_frames
    return VideoSize(*(b if a is None else a for a, b in zip(given, known, strict=True)))


def read_sampling(args: argparse.Namespace, config: CogVideoXConfig) -> Sampling:
    """The steps and guidance of the request. Raises ValueError for numbers out of range."""
    guidance = _read_guidance(args)
    if not _is_diffusers(args):
        shift = 1.0 if config.use_rotary_positional_embeddings else 3.0
        return Sampling(sat_schedule(args.steps, shift, args.sampler or "dpm"), guidance)
    folder = None if args.checkpoint is None else args.checkpoint / "scheduler"
    if folder is None or not folder.is_dir():
        raise ValueError(
            "schedule: expected sat without the scheduler of a pipeline of diffusers: a converted "
            "RepVideo has none, use --schedule sat"
        )
    scheduler = build_scheduler(read_config(folder, "scheduler_config.json"), args.sampler)
    return Sampling(diffusers_schedule(args.steps, scheduler), guidance, latent_dtype=None)


def _read_guidance(args: argparse.Namespace) -> Guidance:
    if args.dynamic_guidance:
        return Guidance(args.guidance_scale)
    return Guidance(args.guidance_scale or 1.0, None)


def load_models(args: argparse.Namespace, run: GenerateRun) -> tuple[CogVideoXTransformer, Prompts]:
    """The transformer, and the features of the prompts.

    Sizes are checked before anything large is read, and T5 is freed before the transformer loads.
    """
    size, prompts = read_size(args), None
    size.latent_shape(_config_of(run))
    if run.checkpoint is None:
        transformer = fresh_model(run.ops, run.generator.initial_seed())
        if run.embeddings is None:
            prompts = random_prompts(run.generator)
    else:
        if run.embeddings is None:
            prompts = _encode(args, run)
        transformer = load_pretrained(run.checkpoint, run.ops)
    if prompts is None:
        prompts = read_features(run.embeddings or {}, transformer.config.text_embed_dim)
    transformer = transformer.eval().requires_grad_(False).to(run.device, run.dtype)
    text, uncond = (x if x is None else x.to(run.device, run.dtype) for x in prompts)
    assert text is not None
    return transformer, Prompts(text, _uncond(args, text, uncond))


def _config_of(run: GenerateRun) -> CogVideoXConfig:
    """The config of the model, before it is read."""
    if run.checkpoint is None:
        return SMALL
    if not run.checkpoint.is_dir():
        raise ValueError(f"checkpoint: expected a folder, {run.checkpoint} is none")
    return _config_in(run.checkpoint)


def _config_in(folder: Path) -> CogVideoXConfig:
    """The config of a pipeline or transformer; RepVideo's for a SAT folder, which has none."""
    if is_sat_folder(folder):
        return CogVideoXConfig()
    path = folder / "transformer"
    return CogVideoXConfig.from_dict(read_config(path if path.is_dir() else folder))


def _encode(args: argparse.Namespace, run: GenerateRun) -> Prompts:
    assert run.checkpoint is not None and run.prompt is not None
    folder, tokenizer = args.text_encoder, None
    if folder is None and is_sat_folder(run.checkpoint):
        folder = run.checkpoint.resolve().parent / SAT_TEXT_ENCODER
    elif folder is None:
        folder, tokenizer = run.checkpoint / "text_encoder", run.checkpoint / "tokenizer"
    length = _config_in(run.checkpoint).max_text_seq_length
    encoder = load_text_encoder(folder, tokenizer, dtype=run.dtype, length=length)
    encoder.model.to(run.device)
    text = encoder.encode([run.prompt])
    if _read_guidance(args).is_none or _is_zeros(args):
        return Prompts(text, None)
    return Prompts(text, encoder.encode([run.negative_prompt or ""]))


def _uncond(args: argparse.Namespace, text: Tensor, uncond: Tensor | None) -> Tensor | None:
    """The unconditional features for guidance; ``uncond`` are those of the request, if any."""
    if _read_guidance(args).is_none:
        return None
    if args.unconditional == "zeros" or (uncond is None and _is_zeros(args)):
        return torch.zeros_like(text)
    if uncond is None:
        raise ValueError(
            "embeddings: expected negative_prompt_embeds for guidance, got none; "
            "--unconditional zeros does without"
        )
    return uncond


def _is_zeros(args: argparse.Namespace) -> bool:
    if args.checkpoint is None and args.embeddings is None:
        return True  # nothing encodes prompts
    if args.unconditional is not None:
        return args.unconditional == "zeros"
    return args.negative_prompt is None and not _is_pipeline(args)


def _is_diffusers(args: argparse.Namespace) -> bool:
    return _is_pipeline(args) if args.schedule is None else args.schedule == "diffusers"


def _is_pipeline(args: argparse.Namespace) -> bool:
    return args.checkpoint is not None and not is_sat_folder(args.checkpoint)


def find_vae(args: argparse.Namespace, run: GenerateRun, config: CogVideoXConfig) -> Any:
    """The VAE for a transformer, whose config tells the scaling factor that SAT's file lacks."""
    if run.checkpoint is None:
        vae = fresh_vae(run.generator.initial_seed())
    else:
        path = args.vae or run.checkpoint / "vae"
        if args.vae is None and is_sat_folder(run.checkpoint):
            beside = [run.checkpoint.resolve().parent / name for name in SAT_VAES]
            path = next((path for path in beside if path.exists()), beside[0])
        is_large = config.use_rotary_positional_embeddings and not path.is_dir()
        vae = load_pretrained_vae(path, **({"scaling_factor": LARGE_SCALING} if is_large else {}))
    # vae.to would warn about modules to keep in fp32, of which there are none
    return nn.Module.to(vae.eval().requires_grad_(False), run.device, run.dtype)
