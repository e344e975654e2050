"""Options that `vidgen generate`, `analyze` and `train` share, and the objects made from them.

A model's ``generate.py`` is given a `GenerateRun`, its ``train.py`` a `TrainRun`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vidgen.ops import OPS, Ops

from .arguments import MAX_SEED, MAX_SIDE, whole
from .checkpoint import read_safetensors
from .finite import require_finite
from .progress import Progress

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class GenerateRun(NamedTuple):
    """The common options of `vidgen generate`."""

    checkpoint: Path | None  # None: random weights
    prompt: str | None
    negative_prompt: str | None  # None: the model's default
    embeddings: dict[str, Tensor] | None  # instead of a prompt
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator  # on the CPU: the same noise on every device
    progress: Progress


class TrainRun(NamedTuple):
    """The common options of `vidgen train` that concern the model."""

    checkpoint: Path | None  # None: random weights
    ops: Ops
    dtype: torch.dtype  # of autocast
    seed: int
    gradient_checkpointing: bool
    prompt_dropout: float


class Video(NamedTuple):
    frames: Tensor  # [T, H, W, 3] uint8
    fps: float


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for weights, seed, operators and device."""
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, metavar="DIR", help="the official checkpoint")
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="a model of small size with random weights: noise, to try the command",
    )
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED), default=0, metavar="N", help="default: 0"
    )
    add_ops_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda, else cpu)")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `read_common` reads."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what to show")
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="what guidance leads away from (default: what the model is released with)",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="safetensors with the text features, instead of a prompt and text encoders",
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU"
    )


def add_size_arguments(
    group: argparse._ArgumentGroup, multiple: int, *, height: str, width: str
) -> None:
    """Adds `--height` and `--width`, in pixels; the arguments describe their defaults.

    The multiple is only for the help text: each model checks the one of its config.
    """
    for name, default in (("height", height), ("width", width)):
        group.add_argument(
            f"--{name}",
            type=whole(1, MAX_SIDE),
            metavar="N",
            help=f"a multiple of {multiple} (default: {default})",
        )


def check_one_prompt(n_prompts: int) -> None:
    """ValueError unless a file of features holds those of one prompt: a command makes one video."""
    if n_prompts != 1:
        raise ValueError(
            f"embeddings: expected features of one prompt, got {n_prompts}: "
            "write a file for each and call the command for each"
        )


def add_ops_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ops",
        choices=sorted(OPS),
        default="fused",
        help="fused: the kernels; eager: PyTorch as the official models write it "
        "(default: %(default)s)",
    )


def read_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. Raises ValueError for other names."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    known = [*(["cuda"] if gpus else []), *(f"cuda:{i}" for i in gpus), "cpu"]
    if name is not None and name not in known:
        raise ValueError(f"device: expected {' or '.join(known)} on this machine, got {name}")
    return torch.device(name or known[0])


def read_common(args: argparse.Namespace, progress: Progress) -> GenerateRun:
    """Reads the common options. Raises ValueError if they do not fit together."""
    device = read_device(args.device)
    if args.prompt is not None and args.embeddings is not None:
        raise ValueError("prompt: expected a prompt or embeddings, got both")
    instead = args.embeddings is not None or getattr(args, "class_label", None) is not None
    if args.prompt is None and not instead and args.checkpoint is not None:
        raise ValueError("prompt: expected a prompt or embeddings, got neither")
    embeddings = None
    if args.embeddings is not None:
        if not args.embeddings.is_file():
            raise ValueError(f"embeddings: expected a file, {args.embeddings} is none")
        embeddings = read_safetensors(args.embeddings)
        try:
            require_finite(embeddings)
        except ValueError as problem:
            raise ValueError(f"embeddings: {args.embeddings}: {problem}") from problem
    return GenerateRun(
        args.checkpoint,
        args.prompt,
        args.negative_prompt,
        embeddings,
        OPS[args.ops],
        DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")],
        device,
        torch.Generator().manual_seed(args.seed),
        progress,
    )
