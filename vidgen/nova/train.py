"""`vidgen train nova`: training on latents and text features; `training/objective.py` has the loss.

`vidgen/commands/train.py` calls `add_arguments` and `load`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from vidgen.common.arguments import whole
from vidgen.common.checkpoint import read_config, read_folder
from vidgen.common.options import TrainRun
from vidgen.common.trainer import Recipe

from .checks.random_weights import SMALL, fresh_model
from .generate import N_SETS, count_sets
from .model.config import SPATIAL_ATTENTION, NovaConfig
from .model.weights import load_transformer
from .sampling.schedules import FlowMatching, read_schedule
from .training.loss import freeze
from .training.objective import NovaObjective

SUMMARY = "NOVA, text or class to image or video"
RECIPE = Recipe(learning_rate=1e-4, batch_size=3, weight_decay=0.02)  # as released, of videos


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.description = (
        "The checkpoint has the folders transformer and scheduler. A sample has latents "
        "[C, T, h, w] and prompt_embeds.0 [n, D], or label [1] instead; flow [1] and fps [1] "
        "where they are known."
    )
    group.add_argument(
        "--spatial-attention",
        choices=SPATIAL_ATTENTION,
        help="within a frame, as released or set by set (default: as the checkpoint says)",
    )
    group.add_argument(
        "--sets",
        type=whole(),
        metavar="N",
        help=f"of a frame, for set_causal (default: {N_SETS}, or its tokens if they are fewer)",
    )


def load(args: argparse.Namespace, run: TrainRun) -> NovaObjective:
    """The model with its loss; weights that the released training kept fixed are frozen.

    Errors: `load_transformer`.
    """
    chosen = {} if args.spatial_attention is None else {"spatial_attention": args.spatial_attention}
    if run.checkpoint is None:
        raw, schedule = {**asdict(SMALL), **chosen}, FlowMatching()
        model = fresh_model(NovaConfig.from_dict(raw), run.ops, seed=run.seed)
        model.requires_grad_(True)
    else:
        folder = run.checkpoint / "scheduler"
        schedule = read_schedule(read_config(folder, "scheduler_config.json"))
        raw, state = read_folder(run.checkpoint / "transformer")
        raw |= chosen
        model = load_transformer(raw, state, run.ops)
    freeze(model)
    for encoder in (model.video_encoder, model.image_encoder):
        encoder.gradient_checkpointing = run.gradient_checkpointing
    options = {"dtype": run.dtype, "prompt_dropout": run.prompt_dropout}
    n_sets = count_sets(args.sets, model.config)
    return NovaObjective(model, raw, schedule, n_sets, **options)
