"""Examples of what NOVA does, at released sizes, for benchmarks, profiles and tests.

A step of training, one pass of each encoder, the denoising loop of a set, and the first frames of a
video. ``training_example(model)`` and the like draw random inputs; the example that they return is
then called with a model. Where the released code computes the same result in another way, the call
has an ``order``: "sorted" for ours, "official" for the released one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidgen.common.random_inputs import RandomInputs
from vidgen.common.random_weights import with_drawn_weights
from vidgen.ops import Ops

from ..model.config import Arch, Decoder, Encoder, NovaConfig
from ..model.embeddings import patchify
from ..model.transformer import NovaTransformer
from ..model.vit import take
from ..sampling.denoising import SetDenoiser, denoise_latents
from ..sampling.draws import RandomDraws
from ..sampling.frames import SortedFrames
from ..sampling.guidance import Guidance
from ..sampling.sampler import SamplingConfig, sample, text_condition
from ..sampling.schedules import FlowMatching, set_sizes
from ..text import TextFeatures
from ..training.loss import TrainingDraws, draw, frame_conditions, training_step
from .random_weights import SMALL

CONFIGS = {
    "480p": NovaConfig(),  # as released, 0.6B
    "480p_narrow": NovaConfig(
        text_token_dim=256,
        arch=Arch(Encoder(2, 256, 4), Encoder(4, 256, 4, 2), Decoder(3, 320)),
    ),
    "toy": replace(SMALL, image_size=(32, 64), video_base_size=(4, 1, 2)),
}
SCHEDULE, GUIDANCE = FlowMatching(), Guidance()
N_SETS, N_STEPS = SamplingConfig().num_inference_steps, SamplingConfig().num_diffusion_steps


def example_model(config: NovaConfig, ops: Ops, **options: Any) -> NovaTransformer:
    """With gradients; options: those of `with_drawn_weights`."""
    return with_drawn_weights(lambda: NovaTransformer(config, ops), **options)


class TrainingExample(NamedTuple):
    """The inputs of a step of training."""

    latents: Tensor
    text: Tensor
    draws: TrainingDraws

    def __call__(self, model: NovaTransformer, order: str = "sorted") -> Tensor:
        """The loss."""
        condition, official = model.condition(self.text), order == "official"
        losses = training_step(
            model, self.latents, condition, self.draws, SCHEDULE, official_order=official
        )
        return losses.total


class TemporalExample(NamedTuple):
    """The inputs of the video encoder in training: whole clips under the block-causal mask."""

    latents: Tensor
    text: Tensor

    def __call__(self, model: NovaTransformer) -> Tensor:
        """The conditions of all frames, ``[B, T, Nv, D]``."""
        return frame_conditions(model, self.latents, model.condition(self.text))


@dataclass(frozen=True)
class SetOfFrame:
    """Tokens ``first`` to ``last - 1``, in the order in which a frame is made."""

    first: int
    last: int

    @classmethod
    def middle(cls, n_tokens: int) -> SetOfFrame:
        """The set in which half of the frame's tokens are passed: the average amount of work."""
        ends = list(accumulate((n for n in set_sizes(n_tokens, N_SETS) if n), initial=0))
        i = next(i for i, end in enumerate(ends[1:]) if 2 * end > n_tokens)
        return cls(ends[i], ends[i + 1])


class SpatialExample(NamedTuple):
    """The inputs of the image encoder at the `middle` set of a frame, with guidance."""

    latents: Tensor  # of the frame, ``[1, C, h, w]``
    condition: Tensor  # [G, Nv, D]
    seed: int

    def prepared(
        self, model: NovaTransformer, order: str = "sorted"
    ) -> Callable[[NovaTransformer], Tensor]:
        """A function that returns the features ``[G, n, D]`` of the set.

        What a sampler does once for a whole frame is done here, not in that function.
        """
        some, n_branches = SetOfFrame.middle(model.config.n_tokens), len(self.condition)
        draws = _draws(model, self.seed)
        frames = SortedFrames(model, [], GUIDANCE, draws, N_SETS)
        visible = frames.order[:, : some.first].expand(n_branches, -1)
        ids = frames.order[:, some.first : some.last].expand(n_branches, -1)
        placed = frames.encoder.place(frames.encoder.patch_embed(self.latents))
        content = [take(placed.expand(n_branches, -1, -1), visible)]

        def released(model: NovaTransformer) -> Tensor:
            tokens = model.image_encoder.patch_embed(self.latents)
            is_there = torch.zeros_like(frames.order, dtype=torch.bool)
            tokens = model.mask_embed(tokens, is_there.scatter(1, visible[:1], True))
            rows = torch.cat([tokens] * n_branches)
            return take(model.image_encoder(rows, self.condition, visible), ids)

        if order == "official":
            return released
        return lambda _: frames.predict(self.condition, content, some.first, some.last)


class DenoisingExample(NamedTuple):
    """The inputs of the denoising loop of the `middle` set, with guidance."""

    z: Tensor  # of all tokens, [G, N, D]
    noise: Tensor  # [1, C, h, w]
    seed: int

    def prepared(
        self, model: NovaTransformer, order: str = "sorted"
    ) -> Callable[[NovaTransformer], Tensor]:
        """A function that returns the tokens ``[1, n, P]`` of the set.

        What a sampler does once for a whole frame is done here, not in that function.
        """
        config, steps = model.config, SCHEDULE.steps(N_STEPS)
        some = SetOfFrame.middle(config.n_tokens)
        ids = _draws(model, self.seed).order(config.n_tokens)[:, some.first : some.last]
        scale = GUIDANCE.scale(0, 1)
        if order == "official":

            def released(model: NovaTransformer) -> Tensor:
                latents = denoise_latents(
                    model.image_decoder,
                    steps,
                    GUIDANCE,
                    self.z,
                    self.noise,
                    ids,
                    config.image_grid,
                    scale,
                )
                return take(patchify(latents, config.patch), ids)

            return released
        denoise = SetDenoiser(model.image_decoder, steps, GUIDANCE)
        z = take(self.z, ids.expand(len(self.z), -1))
        start = take(patchify(self.noise, config.patch), ids)
        return lambda _: denoise(z, start, scale)


class FramesExample(NamedTuple):
    """The inputs of a sampling run that makes the first frames of a clip."""

    text: TextFeatures
    sampling: SamplingConfig
    seed: int

    def __call__(self, model: NovaTransformer, order: str = "sorted") -> Tensor:
        """Latents ``[1, C, T, h, w]``."""
        config = replace(self.sampling, order=order)
        with torch.inference_mode():
            condition = text_condition(model, self.text, config.guidance)
        frames = sample(model, condition, config, _draws(model, self.seed))
        return torch.cat(list(frames), dim=2)


def training_example(
    model: NovaTransformer, *, rows: int = 3, n_frames: int = 9, seed: int = 0
) -> TrainingExample:
    """In the dtype and on the device of the model; by default the released batch of a GPU."""
    inputs = _Inputs(model, seed)
    latents = inputs.latents(rows, n_frames)
    draws = draw(latents, model, SCHEDULE, inputs.generator)
    return TrainingExample(latents, inputs.text(rows), draws)


def temporal_example(
    model: NovaTransformer, *, rows: int = 3, n_frames: int = 9, seed: int = 0
) -> TemporalExample:
    inputs = _Inputs(model, seed)
    return TemporalExample(inputs.latents(rows, n_frames), inputs.text(rows))


def spatial_example(model: NovaTransformer, *, seed: int = 0) -> SpatialExample:
    inputs, config = _Inputs(model, seed), model.config
    condition = inputs(GUIDANCE.n_branches, config.n_video_tokens, config.width)
    return SpatialExample(inputs.latents(1, 1)[:, :, 0], condition, seed)


def denoising_example(model: NovaTransformer, *, seed: int = 0) -> DenoisingExample:
    inputs, config = _Inputs(model, seed), model.config
    z = inputs(GUIDANCE.n_branches, config.n_tokens, config.width)
    return DenoisingExample(z, inputs.latents(1, 1)[:, :, 0], seed)


def frames_example(
    model: NovaTransformer, sampling: SamplingConfig | None = None, *, seed: int = 0
) -> FramesExample:
    """A prompt and the empty one."""
    sampling = sampling or SamplingConfig()
    prompt = list(_Inputs(model, seed).text(1)[:, : model.config.text_token_len // 2])
    return FramesExample(TextFeatures(prompt, [prompt[0][:0]]), sampling, seed)


def _draws(model: NovaTransformer, seed: int) -> RandomDraws:
    inputs = _Inputs(model, seed)
    size = 1, model.config.image_dim, *model.config.latent_size
    return _OneDtype(size, inputs.generator, inputs.dtype, inputs.device)


class _OneDtype(RandomDraws):
    """Drawn in fp32, so that a seed gives the same numbers in every dtype."""

    def _normal(self, *size: int) -> Tensor:
        noise = torch.randn(size, generator=self.generator, device=self._source)
        return noise.to(self.device, self.dtype)


class _Inputs(RandomInputs):
    def latents(self, rows: int, n_frames: int) -> Tensor:
        """``[rows, C, T, h, w]``"""
        return self(rows, self.config.image_dim, n_frames, *self.config.latent_size)

    def text(self, rows: int) -> Tensor:
        """``[rows, text_token_len, text_token_dim]``"""
        return self(rows, self.config.text_token_len, self.config.text_token_dim or 0)
