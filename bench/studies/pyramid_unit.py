"""One late unit of a Pyramid Flow video, sampled: what kernels save, and what the cache saves.

    python -m bench.studies.pyramid_unit                  384p, unit 15, a narrow miniFLUX
    python -m bench.studies.pyramid_unit --heads 30 --layers 24 --dtype bfloat16 --device cuda

A unit runs through all stages at real token counts, with guidance. All providers have the same
weights and noise, and are first compared with the eager one. The unit before it is sampled too, but
not timed: it leaves its keys and values in the cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.measure.case import relative_error
from vidgen.ops import EAGER, FUSED, Ops
from vidgen.pyramid_flow.checks.example import LATENTS, TEXT_LENGTH, example_config, example_model
from vidgen.pyramid_flow.model.history import settled_frames
from vidgen.pyramid_flow.model.kv_cache import OFF, CachePolicy
from vidgen.pyramid_flow.model.sequence import n_tokens
from vidgen.pyramid_flow.sampling.config import SamplingConfig
from vidgen.pyramid_flow.sampling.noise import DrawnNoise
from vidgen.pyramid_flow.sampling.sampler import sample
from vidgen.pyramid_flow.text import Prompts, TextFeatures

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Provider:
    name: str
    ops: Ops
    cache: CachePolicy


PROVIDERS = (
    Provider("eager, dense mask", EAGER, OFF),
    Provider("ours", FUSED, OFF),
    Provider("ours, cache of stages 0 and 1", FUSED, CachePolicy(stages=(0, 1))),
    Provider("ours, cache", FUSED, CachePolicy()),
)


@dataclass(frozen=True)
class UnitCase:
    """A unit of a video, whose history is noise."""

    model: str
    size: str
    unit: int
    n_steps: int  # per stage
    n_heads: int
    n_layers: int  # of a kind
    dtype: torch.dtype
    device: str

    @property
    def config(self) -> SamplingConfig:
        steps = (self.n_steps,) * 3
        return SamplingConfig(LATENTS[self.size], self.unit + 1, first_steps=steps, steps=steps)

    def prepare(self, provider: Provider) -> Callable[[], tuple[Tensor, float]]:
        """A run of ``provider``: the latents of the unit, and its seconds."""
        config = example_config(self.model, self.n_heads, self.n_layers)
        model = example_model(config, provider.ops, device=self.device, dtype=self.dtype)
        text = Prompts(self._text(config, 3), self._text(config, 4))
        shape = 1, config.latent_channels, self.unit - 1, *LATENTS[self.size]
        given = self._normal(shape, 5)
        sampling = replace(self.config, cache=provider.cache)

        def run() -> tuple[Tensor, float]:
            finished: list[float] = []

            def on_unit(latents: Tensor) -> None:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                finished.append(time.perf_counter())

            noise = DrawnNoise(torch.Generator().manual_seed(6))
            latents = sample(model, text, sampling, noise=noise, given=given, on_unit=on_unit)
            before, after = finished
            return latents[:, :, -1:], after - before

        return run

    def tokens(self, provider: Provider) -> list[int]:
        """Tokens of text and video that the model is given at each stage, per row."""
        cached = () if provider.cache == OFF else provider.cache.stages or range(3)
        found = []
        for stage in range(3):
            column = self.config.column(self.unit, stage)
            n_frames = settled_frames(self.unit, stage) if stage in cached else 0
            n_past = n_frames * n_tokens((column[0],)) // column[0][0]  # of equal, oldest frames
            n_past += TEXT_LENGTH if n_frames else 0
            found.append(TEXT_LENGTH + n_tokens(column) - n_past)
        return found

    def _text(self, config, seed: int) -> TextFeatures:
        mask = (torch.arange(TEXT_LENGTH) < 20 * seed).long()[None]
        features = self._normal((1, TEXT_LENGTH, config.joint_attention_dim), seed)
        return TextFeatures(features, mask, self._normal((1, config.pooled_projection_dim), seed))

    @staticmethod
    def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("flux", "mmdit"), default="flux")
    parser.add_argument("--size", choices=sorted(LATENTS), default="384p")
    parser.add_argument("--unit", type=int, default=15, help="of 4 or more")
    parser.add_argument("--steps", type=int, default=1, help="per stage (default: 1)")
    parser.add_argument("--heads", type=int, default=4, help="of 64 (default: 4)")
    parser.add_argument("--layers", type=int, default=3, help="of a kind (default: 3)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    case = UnitCase(
        args.model,
        args.size,
        args.unit,
        args.steps,
        args.heads,
        args.layers,
        getattr(torch, args.dtype),
        args.device,
    )
    runs = {provider: case.prepare(provider) for provider in PROVIDERS}
    results = {provider: run()[0].cpu() for provider, run in runs.items()}
    eager, *others = PROVIDERS
    for provider in others:
        error = relative_error(results[provider], results[eager])
        if error > TOLERANCE[case.dtype]:
            raise SystemExit(f"{provider.name}: wrong, {error:.1e} from eager PyTorch")
    seconds: dict[Provider, list[float]] = {provider: [] for provider in PROVIDERS}
    for _ in range(args.repeats):  # in turns, as clocks drift
        for provider, run in runs.items():
            seconds[provider].append(run()[1])
    print(f"{case.model} {case.size}, unit {case.unit}, {args.heads} heads, {args.dtype}")
    base = statistics.median(seconds[eager])
    for provider in PROVIDERS:
        median = statistics.median(seconds[provider])
        tokens = "/".join(map(str, case.tokens(provider)))
        print(f"{provider.name:32} {median:8.3f} s  {base / median:5.2f} x  tokens {tokens}")


if __name__ == "__main__":
    main()
