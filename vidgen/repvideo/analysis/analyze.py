"""`vidgen analyze`: what RepVideo's or CogVideoX's layers do with the frames of a video.

Samples a video in a few steps while `observe` measures, and writes analysis.json, similarity.png,
attention_share.png and attention_frames.png to a new folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.common.checkpoint import check_new, written_whole
from vidgen.common.options import add_common_arguments, read_common
from vidgen.common.progress import Bars

from ..generate import add_model_arguments, load_models, read_sampling, read_size
from ..pipeline import make_latents
from .observe import Observations, observed

N_MAPS = 8  # layers whose maps are drawn, evenly chosen
GREY = "#DDDDDD"
SHARES = ("text", "own frame", "adjacent frames", "other frames")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", required=True, help="a new folder for plots and JSON"
    )
    add_model_arguments(parser.add_argument_group("video"))
    parser.set_defaults(steps=4)


def run(args: argparse.Namespace) -> int:
    """0 when the folder is written, 1 where the request cannot be met."""
    try:
        analyze(args)
    except (OSError, ValueError) as problem:
        sys.stderr.write(f"vidgen analyze: {problem}\n")
        return 1
    sys.stdout.write(f"{args.output}\n")
    return 0


def analyze(args: argparse.Namespace) -> None:
    pyplot = _pyplot()  # first, so that a missing matplotlib is reported before the work
    check_new(args.output, "folder")
    with Bars() as progress:
        common = read_common(args, progress)
        transformer, prompts = load_models(args, common)
        sampling = read_sampling(args, transformer.config)
        with observed(transformer) as found:
            size, generator = read_size(args), common.generator
            make_latents(transformer, prompts, size, sampling, generator, progress)
    args.output.mkdir()
    write_json(args.output / "analysis.json", found)
    for name, plot in PLOTS.items():
        if plot is plot_similarity and found.n_frames == 1:
            continue  # one frame has no adjacent ones
        figure = plot(pyplot, found)
        with written_whole(args.output / name) as path:
            figure.savefig(path, dpi=130)
        pyplot.close(figure)


def write_json(path: Path, found: Observations) -> None:
    """Writes all numbers, with a description of each."""
    similarity, attention = stacked(found)
    data = {
        "timesteps": found.timesteps,
        "groups": ["text", *(f"frame {t}" for t in range(found.n_frames))],
        "similarity": similarity.tolist() if found.n_frames > 1 else None,
        "attention": attention.tolist(),
        "meaning": {
            "similarity": "[timestep][layer]: mean cosine of adjacent frames' tokens after a layer",
            "attention": "[timestep][layer][group of queries][group of keys]: share of attention",
        },
    }
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def stacked(found: Observations) -> tuple[Tensor, Tensor]:
    """Similarity ``[steps, layers]`` and attention ``[steps, layers, G, G]``."""
    similarity = torch.stack([torch.stack(layers) for layers in found.similarity])
    return similarity, torch.stack([torch.stack(layers) for layers in found.attention])


def shares(attention: Tensor) -> Tensor:
    """How the frames' attention ``[..., G, G]`` is shared among `SHARES`, ``[..., 4]``.

    The mean over the frames that queries are in.
    """
    n = attention.shape[-1] - 1
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    from_frames = attention[..., 1:, :]
    parts = [from_frames[..., 0].mean(dim=-1)]
    for is_part in (distance == 0, distance == 1, distance > 1):
        parts.append((from_frames[..., 1:] * is_part).sum(dim=-1).mean(dim=-1))
    return torch.stack(parts, dim=-1)


def plot_similarity(pyplot: Any, found: Observations) -> Any:
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    similarity, _ = stacked(found)
    colours = pyplot.get_cmap("viridis")(torch.linspace(0, 0.9, len(similarity)).tolist())
    for t, layers, colour in zip(found.timesteps, similarity, colours, strict=True):
        axes.plot(range(len(layers)), layers.tolist(), color=colour, marker="o", markersize=3)
        axes.plot([], [], color=colour, label=f"{t:.0f}")
    _dress(axes, "Similarity of adjacent frames", "layer", "mean cosine of their tokens")
    axes.legend(title="timestep", frameon=False, fontsize=8)
    return figure


def plot_shares(pyplot: Any, found: Observations) -> Any:
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    _, attention = stacked(found)
    for name, layers in zip(SHARES, shares(attention).mean(dim=0).T, strict=True):
        axes.plot(range(len(layers)), layers.tolist(), marker="o", markersize=3, label=name)
    axes.set_ylim(bottom=0)
    _dress(axes, "What the frames attend to, mean over steps", "layer", "share of attention")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_frames(pyplot: Any, found: Observations) -> Any:
    """For some layers, a map of the attention from groups of queries to groups of keys."""
    _, attention = stacked(found)
    maps = attention.mean(dim=0)
    n = min(N_MAPS, len(maps))
    chosen = torch.linspace(0, len(maps) - 1, n).round().int().tolist()
    n_columns = min(4, n)
    n_rows = -(-n // n_columns)
    figure, panels = pyplot.subplots(
        n_rows,
        n_columns,
        figsize=(1.2 + 2.2 * n_columns, 0.8 + 2.2 * n_rows),
        squeeze=False,
        layout="constrained",
    )
    image, top = None, maps[chosen].max().item()
    for axes, layer in zip(panels.flat, chosen, strict=False):
        image = axes.imshow(maps[layer].tolist(), cmap="Blues", vmin=0, vmax=top)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.locator_params(integer=True)
    for axes in panels.flat[n:]:
        axes.set_visible(False)
    figure.suptitle("Attention between text (0) and frames (1, 2, ...), mean over steps")
    figure.supxlabel("keys of", fontsize=9)
    figure.supylabel("queries of", fontsize=9)
    figure.colorbar(image, ax=panels, label="share of attention")
    return figure


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.locator_params(axis="x", integer=True)
    axes.grid(color=GREY, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


PLOTS = {
    "similarity.png": plot_similarity,
    "attention_share.png": plot_shares,
    "attention_frames.png": plot_frames,
}
