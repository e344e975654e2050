"""From prompts, images and clips to video: text encoders, sampler and VAE together.

`vidgen generate` calls it, and so can a program. The VAE decodes a unit as soon as it is made, as
the next chunk of the video; up to rounding, the frames are the same as if all were decoded at the
end.

Shapes: B prompts; F pixel frames, T latent frames, F = 1 + 8 (T - 1); H x W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vidgen.common.media import to_uint8
from vidgen.common.progress import SILENT, Progress
from vidgen.ops import FUSED, Ops

from .model.config import PATCH, causality
from .model.flux import PyramidFluxTransformer
from .model.transformer import PyramidTransformer
from .model.weights import load_pretrained
from .offload import Placement
from .sampling.config import SamplingConfig
from .sampling.noise import Noise
from .sampling.sampler import sample
from .text import (
    NEGATIVE_PROMPT,
    PROMPT_SUFFIX,
    Prompts,
    TextEncoder,
    TextFeatures,
    load_text_encoder,
)
from .vae.latents import LATENT_STATS, LatentStats, denormalize_latents, normalize_latents
from .vae.tiling import decode_tiling
from .vae.vae import CausalVideoVAE
from .vae.weights import load_pretrained_vae

FPS = 24
VAE_FOLDER = "causal_video_vae"
ENCODE_WINDOW, DECODE_WINDOW = 16, 2  # frames and latent frames at once


class PyramidFlowPipeline:
    """The models of a released checkpoint.

    `generate` makes a video from encoded prompts (`encode_prompts`). To continue an image or a
    clip, it also takes the latents of that (`encode_video`).

    Args:
        text_encoder: None if prompts come as features.
        placement: the device of the models; default the CPU.
    """

    def __init__(
        self,
        transformer: PyramidTransformer,
        vae: CausalVideoVAE,
        text_encoder: TextEncoder | None = None,
        *,
        placement: Placement | None = None,
    ) -> None:
        self.transformer, self.vae = transformer.eval(), vae.eval()
        self.text_encoder = text_encoder
        self.placement = placement or Placement()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        variant: str,
        *,
        ops: Ops = FUSED,
        dtype: torch.dtype = torch.bfloat16,
        placement: Placement | None = None,
        with_text_encoder: bool = True,
        bidirectional: bool = False,
    ) -> PyramidFlowPipeline:
        """Reads the folder of a released checkpoint to the CPU.

        Args:
            variant: the folder of the transformer within it, such as diffusion_transformer_384p.
            with_text_encoder: False if prompts come as features; the encoders are the largest part.
            bidirectional: frames also see later ones. Otherwise the model is causal, whatever its
                config.json says, as in the official pipeline.

        Raises:
            ValueError: files that are missing or of other models.
        """
        folder = Path(folder)
        return cls(
            load_pretrained(folder / variant, ops, **causality(bidirectional)).to(dtype),
            load_pretrained_vae(folder / VAE_FOLDER).to(dtype),
            load_text_encoder(folder, dtype) if with_text_encoder else None,
            placement=placement,
        )

    @property
    def stats(self) -> LatentStats:
        """The normalisation of the latents that the transformer was trained on."""
        is_flux = isinstance(self.transformer, PyramidFluxTransformer)
        return LATENT_STATS["pyramid_flux" if is_flux else "pyramid_mmdit"]

    def latent_size(self, height: int, width: int, n_stages: int = 3) -> tuple[int, int]:
        """Height and width of the latents of frames of ``height`` x ``width`` pixels.

        Raises:
            ValueError: unless every resolution of the pyramid is a whole number of tokens. For the
                released models, sides must be multiples of 64.
        """
        factor = self.vae.config.spatial_factor
        multiple = factor * 2 ** (n_stages - 1) * PATCH
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % multiple:
                raise ValueError(f"{name}: expected a multiple of {multiple}, got {side}")
        return height // factor, width // factor

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], negative_prompt: str = NEGATIVE_PROMPT
    ) -> Prompts:
        """Features of B prompts, each with the released suffix, and of one negative prompt.

        Raises:
            ValueError: there are no text encoders.
        """
        if self.text_encoder is None:
            raise ValueError("prompt: expected features, for no text encoders were loaded")
        texts = [*(prompt + PROMPT_SUFFIX for prompt in prompts), negative_prompt]
        with self.placement.use(self.text_encoder):
            found = self.text_encoder(texts)
        n = len(prompts)
        return Prompts(
            TextFeatures(*(x[:n] for x in found)),
            TextFeatures(*(x[n:] for x in found)),
        )

    @torch.no_grad()
    def encode_video(
        self, video: Tensor, *, generator: torch.Generator | None = None, tile: int | None = None
    ) -> Tensor:
        """The normalised latents of the beginning of a video, drawn from the VAE's posterior.

        Args:
            video: ``[B, 3, F, H, W]`` in [-1, 1]; an image has one frame.
            tile: as for the VAE.

        Returns:
            ``[B, C, T, H / 8, W / 8]``.

        Raises:
            ValueError: F is not 1 + 8 k, H or W not a multiple of 64.
        """
        self.latent_size(*video.shape[-2:])
        with self.placement.use(self.vae):
            x = _for_vae(self.vae, video)
            posterior = self.vae.encode(x, window=ENCODE_WINDOW, tile=tile)
            return normalize_latents(posterior.sample(generator), self.stats)

    def generate(
        self,
        prompts: Prompts,
        config: SamplingConfig,
        *,
        given: Tensor | None = None,
        noise: Noise | None = None,
        tile: int | None = None,
        progress: Progress = SILENT,
        on_frames: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Videos as uint8 frames ``[B, F, H, W, 3]`` on the CPU, including given frames.

        Units are decoded as they are made, so that VAE and transformer are on the device together.
        With low memory all units are decoded at the end, one tile after another.

        Args:
            given: from `encode_video`, for each prompt or one for all.
            tile: as for the VAE.
            on_frames: called with frames ``[B, f, H, W, 3]`` as they are decoded, given ones first.

        Raises:
            ValueError: as for `sample`; a size of tiles that does not fit.
        """
        if tile is not None:
            decode_tiling(tile, self.vae.config.spatial_factor)  # raises before any long work
        if given is not None and len(given) == 1:
            given = given.expand(len(prompts.prompt.features), *given.shape[1:])
        chunks: list[Tensor] = []

        def keep(frames: Tensor) -> None:
            chunks.append(frames)
            if on_frames is not None:
                on_frames(frames)

        run = {"noise": noise, "given": given, "progress": progress}
        if self.placement.low_memory:
            with self.placement.use(self.transformer):
                latents = sample(self.transformer, prompts, config, **run)
            keep(self.decode(latents, window=1, tile=tile))
        else:
            with self.placement.use(self.vae), self.placement.use(self.transformer):
                decode = UnitDecoder(self.vae, self.stats, tile)

                def on_unit(unit: Tensor) -> None:
                    if given is not None and not chunks:
                        for chunk in given.split(DECODE_WINDOW, dim=2):
                            keep(decode(chunk))
                    keep(decode(unit))

                sample(self.transformer, prompts, config, **run, on_unit=on_unit)
        return torch.cat(chunks, dim=1)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, *, window: int = DECODE_WINDOW, tile: int | None = None
    ) -> Tensor:
        """uint8 frames ``[B, F, H, W, 3]`` on the CPU, of the normalised latents of whole videos.

        Args:
            window, tile: as for the VAE.
        """
        with self.placement.use(self.vae):
            x = _for_vae(self.vae, denormalize_latents(latents, self.stats))
            video = self.vae.decode(x, window=window, tile=tile)
            # A part at a time: the conversion to 8 bits makes copies in fp32.
            parts = [
                to_uint8(part, rounded=False, first=i * ENCODE_WINDOW).cpu()
                for i, part in enumerate(video.split(ENCODE_WINDOW, dim=2))
            ]
            return torch.cat(parts, dim=1)


class UnitDecoder:
    """Decodes the units of a video one after another, as chunks of the same video."""

    def __init__(self, vae: CausalVideoVAE, stats: LatentStats, tile: int | None = None) -> None:
        self.vae, self.stats = vae, stats
        self._waiting: deque[Tensor] = deque()
        self._n_decoded = self._n_frames = 0  # latent frames given, frames made
        self._video = vae.decode_chunks(self._units(), tile=tile)

    @torch.no_grad()
    def __call__(self, unit: Tensor) -> Tensor:
        """uint8 frames ``[B, f, H, W, 3]`` on the CPU, of normalised latents ``[B, C, t, h, w]``.

        A latent frame gives 8 frames, the first of the video 1.
        """
        unit_latents = denormalize_latents(unit, self.stats, start=self._n_decoded)
        self._waiting.append(_for_vae(self.vae, unit_latents))
        self._n_decoded += unit.shape[2]
        frames = to_uint8(next(self._video), rounded=False, first=self._n_frames).cpu()
        self._n_frames += frames.shape[1]
        return frames

    def _units(self) -> Iterator[Tensor]:
        while True:
            yield self._waiting.popleft()


def _for_vae(vae: CausalVideoVAE, x: Tensor) -> Tensor:
    return x.to(next(vae.parameters()))
