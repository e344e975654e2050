"""`vidgen train`: trains the reference models on precomputed latents and text features.

Under torchrun (``torchrun --nproc-per-node 8 -m vidgen.cli train ...``) it trains in several
processes. Models share the options of `add_common_arguments` and add their own in
``vidgen/<model>/train.py``; ``vidgen/<model>/training/objective.py`` describes their samples.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from vidgen.common.arguments import MOST, number, whole
from vidgen.common.checkpoint import check_new
from vidgen.common.options import TrainRun, add_model_arguments, read_device
from vidgen.common.progress import SILENT, Bars
from vidgen.common.samples import Samples
from vidgen.common.trainer import Process, Recipe, Schedule, Trainer, last_checkpoint
from vidgen.ops import OPS

MODELS = {
    "pyramid-flow": "vidgen.pyramid_flow.train",
    "repvideo": "vidgen.repvideo.train",
    "nova": "vidgen.nova.train",
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROMPT_DROPOUT = 0.1  # the same for all three models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    for name, path in MODELS.items():
        model = importlib.import_module(path)
        own = models.add_parser(name, help=model.SUMMARY, description=model.SUMMARY)
        add_common_arguments(own, model.RECIPE)
        model.add_arguments(own.add_argument_group(name))


def add_common_arguments(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    shown = "default: %(default)s"
    add("--dtype", choices=sorted(DTYPES), help="of autocast (default: bf16 on a GPU, else fp32)")
    add("--data", type=Path, metavar="DIR", required=True, help="safetensors, a sample in each")
    add("--output", type=Path, metavar="DIR", required=True, help="a new folder")
    for name, type, default, help in (
        ("steps", whole(), 1000, "of the whole run"),
        ("batch-size", whole(), recipe.batch_size, "of a process"),
        ("warmup-steps", whole(0), recipe.warmup_steps, "in which the learning rate grows from 0"),
        ("save-every", whole(), 500, "steps between checkpoints"),
    ):
        add(f"--{name}", type=type, default=default, metavar="N", help=f"{help} ({shown})")
    for name, most, default, help in (
        ("learning-rate", 1, recipe.learning_rate, "after warm-up"),
        ("weight-decay", 1, recipe.weight_decay, "of matrices and kernels"),
        ("max-gradient-norm", MOST, recipe.max_norm, "gradients above are scaled down, 0: none"),
        ("prompt-dropout", 1, PROMPT_DROPOUT, "share of samples trained without their prompt"),
    ):
        kind, shown = number(0, most), "default: %(default)g"
        add(f"--{name}", type=kind, default=default, metavar="X", help=f"{help} ({shown})")
    add("--gradient-checkpointing", action="store_true", help="less memory for more time")
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in the output, with the same options",
    )


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when all steps are done, or 1 if the request cannot be met."""
    try:
        _check(args)
        with _process(args) as process:
            _train(args, process)
    except (OSError, ValueError) as problem:
        sys.stderr.write(f"vidgen train: {problem}\n")
        return 1
    if process.rank == 0:
        sys.stdout.write(f"{args.output}\n")
    return 0


def _train(args: argparse.Namespace, process: Process) -> None:
    """Checks the whole request, then trains."""
    model = importlib.import_module(MODELS[args.model])
    on_gpu = process.device.type == "cuda"
    run = TrainRun(
        args.checkpoint,
        OPS[args.ops],
        DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")],
        args.seed,
        args.gradient_checkpointing,
        args.prompt_dropout,
    )
    if process.rank == 0:
        _check_output(args)
    recipe = model.RECIPE._replace(
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        weight_decay=args.weight_decay,
        max_norm=args.max_gradient_norm,
        warmup_steps=args.warmup_steps,
    )
    with Bars() if process.rank == 0 else nullcontext(SILENT) as progress:
        objective = model.load(args, run)
        samples = Samples(
            args.data,
            objective.read,
            same=objective.same if args.batch_size > 1 else (),
            seed=args.seed,
            progress=progress,
        )
        schedule = Schedule(args.steps, args.save_every, args.seed)
        trainer = Trainer(objective, samples, recipe, schedule, args.output, process)
        if args.resume:
            trainer.resume()
        elif process.rank == 0:
            args.output.mkdir()
        trainer.train(progress)


def _check(args: argparse.Namespace) -> None:
    if args.checkpoint is not None and not args.checkpoint.is_dir():
        raise ValueError(f"checkpoint: expected a folder, {args.checkpoint} is none")


def _check_output(args: argparse.Namespace) -> None:
    if args.resume:
        last_checkpoint(args.output)
    else:
        check_new(args.output, "folder or --resume")


@contextmanager
def _process(args: argparse.Namespace) -> Iterator[Process]:
    """Joins torchrun's processes, if it started this one; each has a GPU of its own."""
    device = read_device(args.device)
    if not dist.is_torchelastic_launched():
        yield Process(device)
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield Process(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
