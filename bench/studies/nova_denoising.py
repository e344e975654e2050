"""NOVA's denoising loop and whole frame, in our order and in the released one.

    python bench/studies/nova_denoising.py               # a loop's two widths, and whole frames
    python bench/studies/nova_denoising.py --widths 320 --rounds 5

The loop is that of all sets of a frame, `SetDenoiser` against `denoise_latents`; a frame runs the
image encoder too. All orders start from the same numbers, and their results are compared. They are
timed in turns, and ratios are those of medians. `calls` counts the operators that Python calls in
one set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vidgen.nova.checks.random_weights import fresh_model
from vidgen.nova.model.config import Arch, Decoder, Encoder, NovaConfig
from vidgen.nova.model.embeddings import patchify
from vidgen.nova.model.vit import take
from vidgen.nova.sampling.denoising import SetDenoiser, denoise_latents
from vidgen.nova.sampling.draws import RandomDraws
from vidgen.nova.sampling.frames import Frames, ReleasedFrames, SortedFrames
from vidgen.nova.sampling.guidance import Guidance
from vidgen.nova.sampling.schedules import FlowMatching
from vidgen.ops import EAGER, FUSED

ORDERS = {"released": EAGER, "eager": EAGER, "ours": FUSED}  # "eager": our order of work
SCALE = 5.0
TOLERANCE = 1e-4  # fp32, of latents of size 1 to 10

# 480 x 768 pixels are 1440 tokens; one sample and two branches.
CONFIG = NovaConfig(video_mixer_rank=None, video_base_size=(1, 15, 24), text_token_dim=16)

Loop = Callable[[], Tensor]


class Work:
    """The sets of one frame, the same for all orders."""

    def __init__(self, args: argparse.Namespace, width: int) -> None:
        encoder = Encoder(args.encoder_depth, args.condition, args.heads)
        arch = Arch(
            replace(encoder, depth=1),
            replace(encoder, encoder_depth=args.encoder_depth // 2),
            Decoder(args.depth, width),
        )
        self.config = replace(CONFIG, arch=arch)
        self.steps, self.n_sets = FlowMatching().steps(args.steps), args.sets
        self.guidance, self.device = Guidance(SCALE), torch.device(args.device)
        n_tokens = self.config.n_tokens
        self.z = torch.randn(2, n_tokens, args.condition, device=self.device)
        self.condition = torch.randn(
            2, self.config.n_video_tokens, args.condition, device=self.device
        )

    def frames(self, order: str) -> Frames:
        kind = ReleasedFrames if order == "released" else SortedFrames
        model = fresh_model(self.config, ORDERS[order], device=self.device)
        size = 1, self.config.image_dim, *self.config.latent_size
        generator = torch.Generator().manual_seed(0)
        draws = RandomDraws(size, generator, torch.float32, self.device)
        return kind(model, self.steps, self.guidance, draws, self.n_sets)

    def frame(self, order: str) -> Loop:
        """Whole frames; all orders draw the same numbers in every turn."""
        frames = self.frames(order)

        def make() -> Tensor:
            assert isinstance(frames.draws, RandomDraws) and frames.draws.generator is not None
            frames.draws.generator.manual_seed(0)
            return frames.make(self.condition)

        return make

    def sets(self, order: str) -> list[Loop]:
        """The denoising loop of every set; returns tokens."""
        frames = self.frames(order)
        mlp, ends = frames.model.image_decoder, [0]
        denoise = SetDenoiser(mlp, self.steps, self.guidance)
        start = frames.draws.start()
        tokens = patchify(start, self.config.patch)
        loops = []
        for n in frames.sizes:
            ends.append(ends[-1] + n)
            ids = frames.order[:, ends[-2] : ends[-1]]
            loops.append(self._loop(order, denoise, start, tokens, ids))
        return loops

    def _loop(
        self, order: str, denoise: SetDenoiser, start: Tensor, tokens: Tensor, ids: Tensor
    ) -> Loop:
        if order == "released":

            def whole() -> Tensor:
                latents = denoise_latents(
                    denoise.mlp, self.steps, self.guidance, self.z, start, ids,
                    self.config.image_grid, SCALE,
                )  # fmt: skip
                return take(patchify(latents, self.config.patch), ids)

            return whole
        z = take(self.z, ids.repeat(2, 1))
        return lambda: denoise(z, take(tokens, ids), SCALE)


def n_calls(loop: Loop) -> int:
    """Operators called from Python."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loop()
    names = "aten::", "vidgen::"
    events = [event for event in profiled.events() or () if event.name.startswith(names)]
    return sum(
        event.cpu_parent is None or not event.cpu_parent.name.startswith(names) for event in events
    )


def medians(loops: dict[str, Loop], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds, in turns; the first round is not counted. Raises where results differ."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    reference = None
    for i in range(rounds + 1):
        for name, loop in loops.items():
            begin = time.perf_counter()
            result = loop()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
            reference = result if reference is None else reference
            error = float((result - reference).abs().max() / reference.abs().max())
            if not error <= TOLERANCE:
                raise RuntimeError(f"{name}: off by {error:.1e} of the released order's largest")
        if i == 0:
            seconds = {name: [] for name in loops}
    return {name: statistics.median(times) for name, times in seconds.items()}


def all_sets(loops: list[Loop]) -> Loop:
    return lambda: torch.cat([loop() for loop in loops], dim=1)


def report(title: str, found: dict[str, float], unit: str) -> None:
    cells = []
    for name, value in found.items():
        ratio = f" ({found['released'] / value:.2f} x)" if name != "released" else ""
        cells.append(f"{name} {value:.3g} {unit}{ratio}")
    sys.stdout.write(f"{title:24} " + "   ".join(cells) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of NOVA's denoising loop and frame")
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[320, 1280], help="of the MLP")
    add("--depth", type=int, default=3, help="of the MLP")
    add("--condition", type=int, default=256, help="width of the encoder")
    add("--heads", type=int, default=4)
    add("--encoder-depth", type=int, default=4, help="of whole frames")
    add("--sets", type=int, default=64)
    add("--steps", type=int, default=25)
    add("--rounds", type=int, default=5)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--only", choices=["loop", "frame"])
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for width in args.widths:
            work = Work(args, width)
            if args.only != "frame":
                sets = {order: work.sets(order) for order in ORDERS}
                calls = {order: float(n_calls(loops[-1])) for order, loops in sets.items()}
                report(f"loop, width {width}", calls, "calls")
                loops = {order: all_sets(loops) for order, loops in sets.items()}
                report(f"loop, width {width}", medians(loops, args.rounds, work.device), "s")
            if args.only != "loop":
                frames = {order: work.frame(order) for order in ORDERS}
                report(f"frame, width {width}", medians(frames, args.rounds, work.device), "s")


if __name__ == "__main__":
    main()
