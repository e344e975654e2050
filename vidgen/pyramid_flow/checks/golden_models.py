"""Recomputes what the golden cases of the transformers and of training record. See `golden`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vidgen.common.golden import Results, Where, flatten
from vidgen.ops import Ops

from ..model.history import history_layout, training_units
from ..model.layers import Stream
from ..model.positions import sincos_table, spatial_embedding
from ..model.sequence import Packing
from ..model.transformer import PyramidTransformer
from ..model.weights import load_transformer
from ..sampling.scheduler import PyramidFlowScheduler
from ..text import TextFeatures
from ..training.loss import ColumnDraws, TrainingConfig, training_columns, training_step
from ..vae.latents import LatentStats, normalize_latents

Tensors = dict[str, Tensor]


def numbered(inputs: Tensors, prefix: str) -> list[Tensor]:
    """The tensors ``prefix0``, ``prefix1``, ..."""
    found = []
    while f"{prefix}{len(found)}" in inputs:
        found.append(inputs[f"{prefix}{len(found)}"])
    return found


def forward(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """Calls of a transformer: its predictions and the outputs of its parts."""
    model = load_transformer(config, w, ops)
    results: Results = {}
    for call in [name.removesuffix(".timestep") for name in inputs if name.endswith(".timestep")]:
        clips = numbered(inputs, f"{call}.clip")
        text, text_mask = inputs["text"], inputs["text_mask"]
        causal = model.config.use_temporal_causal and not call.endswith("_noncausal")
        packing = model.pack([clips], text, text_mask, causal=causal)
        found: Results = {"mask": attention_mask(packing, text_mask != 0)}
        found |= position_tables(model, packing)
        with recorded(model, packing, text_mask[:1] != 0, found), torch.no_grad():
            (found["pred"],) = model.predict(
                [clips],
                inputs[f"{call}.timestep"],
                text,
                text_mask,
                inputs["pooled"],
                causal=causal,
            )
        results |= {f"{call}.{name}": x for name, x in found.items()}
    return results


def attention_mask(packing: Packing, is_text: Tensor) -> Where:
    """The dense mask ``[B, 1, L, L]``. Rows of padding are not compared."""
    mask = packing.mask.to_dense().expand(len(is_text), -1, -1)
    n_video = mask.shape[1] - packing.text_length
    return Where(mask[:, None].to(torch.uint8), with_video(is_text, n_video)[:, None, :, None])


def with_video(is_text: Tensor, n_video: int) -> Tensor:
    """Which tokens are compared, bool ``[B, L]``: all except padding."""
    return torch.cat([is_text, is_text.new_ones(len(is_text), n_video)], dim=1)


def position_tables(model: PyramidTransformer, packing: Packing) -> Results:
    """Coordinates of text and video, and the cosines and sines of their rotations."""
    positions = packing.positions
    if positions is None:
        return {}
    angles = torch.cat(
        [
            positions[:, i, None].double()
            * 10000.0 ** (-torch.arange(0, d, 2, device=positions.device).double() / d)
            for i, d in enumerate(model.axes)
        ],
        dim=-1,
    )[None]
    return {"ids": positions[None], "rope_cos": angles.cos(), "rope_sin": angles.sin()}


@contextmanager
def recorded(
    model: PyramidTransformer, packing: Packing, is_text: Tensor, found: Results
) -> Iterator[None]:
    """Inside the context, a model's parts write their outputs for batch row 0 to ``found``."""
    in_joint = with_video(is_text, packing.video_lengths[0])

    def dual(name: str) -> Callable[..., None]:
        def hook(module, args, output: tuple[Stream, Stream]) -> None:
            text, video = (stream.total()[0][:1] for stream in output)
            found[f"{name}.text"] = Where(text, is_text[..., None])
            found[f"{name}.hidden"] = video

        return hook

    def single(name: str) -> Callable[..., None]:
        def hook(module, args, output: Stream) -> None:
            found[f"{name}.hidden"] = Where(output.total()[0][:1], in_joint[..., None])

        return hook

    def plain(name: str, rows: slice) -> Callable[..., None]:
        def hook(module, args, output: Tensor) -> None:
            found[name] = output[rows]

        return hook

    hooks = [model.time_text_embed.register_forward_hook(plain("temb", slice(None)))]
    for name, child in model.named_children():
        if name in ("pos_embed", "x_embedder"):
            hooks.append(child.register_forward_hook(plain("patch_tokens", slice(1))))
        for i, block in enumerate(child.children() if name.endswith("blocks") else ()):
            is_dual = name == "transformer_blocks"
            hook = dual(f"block{i}") if is_dual else single(f"single{i}")
            hooks.append(block.register_forward_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pos_embed(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """MM-DiT's position embeddings at the released sizes.

    The case has every 13th token of long frames, and every 7th of the frame being made.
    """
    patch, n_side = config["patch_size"], config["pos_embed_max_size"]
    spacing = config["sample_size"] / patch / n_side
    table = sincos_table(config["embed_dim"], n_side, spacing)
    results = {}
    for name, (height, width) in {"384p": (48, 80), "768p": (96, 160)}.items():
        reference = height // patch, width // patch
        for level in range(3):
            grid = reference[0] >> (2 - level), reference[1] >> (2 - level)
            tokens = spatial_embedding(table, grid, reference)
            results[f"{name}.level{level}"] = tokens[None, :: 13 if len(tokens) > 300 else 1]
        half = reference[0] // 2, reference[1] // 2
        results[f"{name}.stage1_self"] = spatial_embedding(table, half, half)[None, ::7]
    return results


def train(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """A training step with temporal history: inputs, targets, predictions, loss, gradients."""
    return training_case(config, w, inputs, ops, full_sequence=False)


def train_full(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """A training step on all frames at once."""
    return training_case(config, w, inputs, ops, full_sequence=True)


def training_case(
    config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops, full_sequence: bool
) -> Results:
    config = dict(config)
    options = config.pop("training")
    model = load_transformer(config, w, ops)
    scheduler = PyramidFlowScheduler.from_options(options)
    training = TrainingConfig(
        tuple(options["sample_ratios"]),
        options["corrupt_ratio"],
        options.get("frame_per_unit", 1),
        full_sequence,
    )
    stats = LatentStats(**{name: tuple(x) for name, x in options["vae_shift_scale"].items()})
    latents = normalize_latents(inputs["latents"], stats)
    units = [1] * training.n_stages
    if not full_sequence:
        units = training_units(
            training.n_stages,
            options["max_temporal_length"],
            step=options["accumulate_steps_after_call"],
            rank=options["rank"],
            sync_group=options["video_sync_group"],
            frames_per_unit=training.frames_per_unit,
        )
    n_columns = len(training.stages)
    draws = [
        ColumnDraws(
            inputs["noise"][c::n_columns],
            inputs[f"col{c}.u"],
            inputs[f"col{c}.corrupt_u"],
            numbered(inputs, f"col{c}.hist_noise"),
        )
        for c in range(n_columns)
    ]
    columns = training_columns(latents, draws, training, scheduler, units, ops)
    text = TextFeatures(inputs["text"], inputs["text_mask"], inputs["pooled"])
    result = training_step(model, columns, text, full_sequence=full_sequence)
    result.loss.backward()

    timesteps = torch.stack([column.timestep for column in columns], dim=1).flatten()
    results: Results = {"loss": result.loss, "timesteps": timesteps}
    for c, (column, prediction) in enumerate(zip(columns, result.predictions, strict=True)):
        results |= {f"col{c}.clip{i}": x for i, x in enumerate(column.clips)}
        results |= {
            f"col{c}.pred": prediction,
            f"col{c}.target": column.target,
            f"col{c}.timestep": column.timestep,
            f"col{c}.ratio": column.sigma,
        }
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"grad.{name}"] = parameter.grad
    return results


def layouts(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """The clips of history for every unit and stage."""
    tables = []
    for table in config["tables"]:
        n_frames, per_unit = table["total_latent_frames"], table["frame_per_unit"]
        units = []
        for unit in range(1 + (n_frames - 1) // per_unit):
            stages = {
                str(stage): [
                    {"res": clip.level, "frames": list(clip.frames)}
                    for clip in history_layout(unit, stage, per_unit)
                ]
                for stage in range(table["n_stages"])
            }
            units.append({"unit": unit, "history_per_stage": stages})
        tables.append({**table, "units": units})
    return flatten(tables)


KINDS = {
    "forward": forward,
    "pos_embed": pos_embed,
    "train_ar": train,
    "train_full": train_full,
    "history_layout": layouts,
}
