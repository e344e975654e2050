"""`vidgen train pyramid-flow`, on normalised latents and text features (see `objective`)."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from vidgen.common.arguments import whole
from vidgen.common.checkpoint import read_folder
from vidgen.common.options import TrainRun
from vidgen.common.trainer import Recipe

from .checks.example import example_model
from .checks.random_weights import SMALL
from .model.config import causality
from .model.weights import load_transformer
from .training.loss import TrainingConfig
from .training.objective import PyramidFlowObjective

SUMMARY = "Pyramid Flow, text to image or video"
RECIPE = Recipe(  # as released
    learning_rate=5e-5, batch_size=4, weight_decay=1e-4, max_norm=1.0, warmup_steps=1000
)
RATIOS = (1, 2, 1)
MAX_RATIO = 1000


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.description = (
        "A sample has latents [C, T, h, w], prompt.text [1, S, W], prompt.text_mask [1, S] and "
        "prompt.pooled [1, P], and the same three of negative, for the empty prompt."
    )
    add = group.add_argument
    add(
        "--variant",
        default="diffusion_transformer_768p",
        metavar="FOLDER",
        help="the transformer, a folder of the checkpoint (default: %(default)s)",
    )
    add(
        "--ratios",
        type=whole(0, MAX_RATIO),
        nargs="+",
        default=RATIOS,
        metavar="N",
        help="samples of each stage, lowest resolution first, as many numbers as stages (default: "
        "1 2 1); processes have the same work where the batch size is a multiple of their sum",
    )
    add(
        "--frames-per-unit",
        type=whole(),
        default=1,
        metavar="N",
        help="latent frames (default: %(default)s)",
    )
    add(
        "--full-sequence",
        action="store_true",
        help="all frames at once, each seeing all, instead of one after the other",
    )


def load(args: argparse.Namespace, run: TrainRun) -> PyramidFlowObjective:
    """The model and its loss. Raises ValueError as `load_transformer` does, and for bad ratios."""
    ratios = tuple(args.ratios)
    if not any(ratios):
        raise ValueError(f"ratios: expected numbers that are not all 0, got {list(ratios)}")
    per_unit = args.frames_per_unit
    columns = TrainingConfig(ratios, frames_per_unit=per_unit, full_sequence=args.full_sequence)
    if run.checkpoint is None:
        raw = asdict(SMALL)
        state = example_model(SMALL, run.ops, seed=run.seed).state_dict()
    else:
        raw, state = read_folder(run.checkpoint / args.variant, within="model")
    options = {
        "use_gradient_checkpointing": run.gradient_checkpointing,
        **causality(bidirectional=False),  # as the official code; --full-sequence says otherwise
    }
    model = load_transformer(raw | options, state, run.ops)
    return PyramidFlowObjective(
        model, raw, columns, dtype=run.dtype, prompt_dropout=run.prompt_dropout
    )
