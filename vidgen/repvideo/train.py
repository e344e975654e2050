"""`vidgen train repvideo`: RepVideo or CogVideoX on latents and T5 features.

`vidgen/commands/train.py` calls `add_arguments` and `load`; `training/objective.py` has the loss.
"""

from __future__ import annotations

import argparse

from vidgen.common.options import TrainRun
from vidgen.common.trainer import Recipe

from .checks.random_weights import fresh_model
from .model.weights import load_pretrained
from .training.objective import RepVideoObjective

SUMMARY = "RepVideo or CogVideoX, text to video"

# AdamW, the learning rate and one sample per GPU are RepVideo's (arXiv 2501.08994); the rest are
# the fine-tuning settings of CogVideoX's released code.
RECIPE = Recipe(learning_rate=1e-5, batch_size=1, weight_decay=1e-4, max_norm=0.1)


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.description = (
        "The checkpoint is a SAT folder, or a pipeline or transformer of diffusers. A sample has "
        "latents [T, C, h, w] and prompt_embeds [1, S, W]."
    )
    group.add_argument(
        "--gates",
        action="store_true",
        help="give plain CogVideoX the gates of RepVideo, 0 at first, which changes nothing yet",
    )


def load(args: argparse.Namespace, run: TrainRun) -> RepVideoObjective:
    """The model with its loss. Errors: `load_pretrained`, `RepVideoObjective`."""
    if run.checkpoint is None:
        model = fresh_model(run.ops, run.seed)
    else:
        model = load_pretrained(run.checkpoint, run.ops, **({"gates": True} if args.gates else {}))
    model.gradient_checkpointing = run.gradient_checkpointing
    return RepVideoObjective(model, dtype=run.dtype, prompt_dropout=run.prompt_dropout)
