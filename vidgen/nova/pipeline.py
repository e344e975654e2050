"""Prompts, classes, images and clips to images and video: text encoder, sampler and VAE together.

Latent frames are decoded as soon as enough of them are sampled for a tile of time (`vae.py`).

Shapes: B samples; F pixel frames, T latent frames; H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vidgen.common.checkpoint import read_config
from vidgen.common.media import to_uint8
from vidgen.common.progress import SILENT, Progress
from vidgen.ops import FUSED, Ops

from .model.embeddings import DEFAULT_FLOW
from .model.transformer import NovaTransformer
from .model.weights import load_pretrained
from .sampling.draws import RandomDraws
from .sampling.sampler import SamplingConfig, class_condition, sample, text_condition
from .sampling.schedules import FlowMatching, Schedule, read_schedule
from .text import TextEncoder, TextFeatures, load_text_encoder
from .vae.vae import VAE, load_pretrained_vae

FPS = 12


class NovaPipeline:
    """The networks of a released checkpoint, in eval mode.

    Args:
        text_encoder: not needed for prompts that are given as features, nor for models of classes.
    """

    def __init__(
        self,
        transformer: NovaTransformer,
        vae: VAE,
        schedule: Schedule,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.transformer, self.vae = transformer.eval(), vae.eval()
        self.schedule, self.text_encoder = schedule, text_encoder

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        ops: Ops = FUSED,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        size: tuple[int, int] | None = None,
        with_text_encoder: bool = True,
    ) -> NovaPipeline:
        """Loads the folder of a released checkpoint.

        Args:
            dtype: of the networks. With fp16, a VAE that overflows in it (`VAE.overflows_in_fp16`)
                is kept in fp32.
            size: height and width of the frames in pixels; default those of training.
            with_text_encoder: False saves loading the largest part, for prompts that are given as
                features.

        Raises:
            ValueError: files that are missing or do not fit.
        """
        folder = Path(folder)
        schedule = read_schedule(read_config(folder / "scheduler", "scheduler_config.json"))
        transformer = load_pretrained(folder / "transformer", ops, size=size).to(device, dtype)
        text_encoder = None
        if with_text_encoder:
            length = transformer.config.text_token_len  # longer prompts are cut
            text_encoder = load_text_encoder(folder, dtype, length)
            text_encoder.model.to(device)
        vae = load_pretrained_vae(folder / "vae")
        is_wide = dtype == torch.float16 and vae.overflows_in_fp16
        return cls(
            transformer,
            vae.to(device, torch.float32 if is_wide else dtype),
            schedule,
            text_encoder,
        )

    @property
    def device(self) -> torch.device:
        return self.transformer.mask_embed.bos_token.device

    @property
    def default_steps(self) -> int:
        """Diffusion steps of a set; DDPM needs more than flow matching."""
        return 25 if isinstance(self.schedule, FlowMatching) else 100

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompts: str | Sequence[str] = ""
    ) -> TextFeatures:
        """Features of the prompts. Raises ValueError without a text encoder."""
        if self.text_encoder is None:
            raise ValueError("prompt: expected features, for no text encoder was loaded")
        return self.text_encoder.encode_pairs(prompts, negative_prompts)

    @torch.inference_mode()
    def encode_video(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents ``[B, C, T, h, w]`` of ``[B, 3, F, H, W]`` in [-1, 1]; an image has one frame.

        Raises:
            ValueError: a size other than the transformer's, or a number of frames that is not
                4 k + 1.
        """
        size = self.transformer.config.image_size
        if tuple(video.shape[-2:]) != size:
            got = " x ".join(map(str, video.shape[-2:]))
            raise ValueError(f"video: expected {size[0]} x {size[1]} pixels, got {got}")
        latents = self.vae.encode(video.to(self.device, self.vae.dtype), generator)
        return latents.to(self.transformer.mask_embed.bos_token.dtype)

    def generate(
        self,
        prompts: TextFeatures | Sequence[int],
        config: SamplingConfig | None = None,
        *,
        given: Tensor | None = None,
        flow: float | None = DEFAULT_FLOW,
        fps: float | None = None,
        generator: torch.Generator | None = None,
        progress: Progress = SILENT,
    ) -> Iterator[Tensor]:
        """Generates B clips; yields their frames ``[B, F, H, W, 3]``, uint8 on the CPU, in parts.

        Args:
            prompts: features of B texts, or B classes.
            config: default the schedule and the `default_steps` of the checkpoint.
            given: latents ``[B, C, t, h, w]`` of the first frames, from `encode_video`.
            flow, fps: amount of motion and frames per second, for models of video.

        Raises:
            ValueError: as `sample`.
        """
        latents = self.latents(
            prompts, config, given=given, flow=flow, fps=fps, generator=generator, progress=progress
        )
        return self._decode(latents)

    def latents(
        self,
        prompts: TextFeatures | Sequence[int],
        config: SamplingConfig | None = None,
        *,
        given: Tensor | None = None,
        flow: float | None = DEFAULT_FLOW,
        fps: float | None = None,
        generator: torch.Generator | None = None,
        progress: Progress = SILENT,
    ) -> Iterator[Tensor]:
        """As `generate`, but yields latents: ``given``, then ``[B, C, 1, h, w]`` for each frame."""
        model = self.transformer
        if config is None:
            config = SamplingConfig(num_diffusion_steps=self.default_steps, schedule=self.schedule)
        is_text = isinstance(prompts, TextFeatures)
        with torch.inference_mode():
            if is_text:
                condition = text_condition(model, prompts, config.guidance, flow, fps)
            else:
                condition = class_condition(model, prompts, config.guidance, flow, fps)
        n_samples = len(prompts.prompt) if is_text else len(prompts)
        size = n_samples, model.config.image_dim, *model.config.latent_size
        draws = RandomDraws(size, generator, condition.dtype, self.device)
        return sample(model, condition, config, draws, given=given, progress=progress)

    @torch.inference_mode()
    def _decode(self, latents: Iterator[Tensor]) -> Iterator[Tensor]:
        n_decoded = 0
        for part in self.vae.decode_chunks(x.to(self.vae.dtype) for x in latents):
            yield to_uint8(part.cpu(), rounded=False, first=n_decoded)
            n_decoded += part.shape[2]


def shifted(schedule: Schedule, shift: float) -> Schedule:
    """The schedule with another shift, set as the option of the released pipeline sets it.

    That is after construction, see `FlowMatching.sigmas`.

    Raises:
        ValueError: a DDPM schedule, which has no shift.
    """
    if not isinstance(schedule, FlowMatching):
        raise ValueError(f"flow_shift: expected none for a DDPM schedule, got {shift}")
    table_shift = schedule.shift if schedule.table_shift is None else schedule.table_shift
    return replace(schedule, shift=shift, table_shift=table_shift)
