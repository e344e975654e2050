"""NOVA's transformer: the embeddings, both encoders and the denoising MLP in one module.

It has no forward of its own, since training and sampling run its parts differently.
`training/loss.py` runs the encoders on whole clips. `sampling/sampler.py` goes frame by frame: the
video encoder with a cache on the tokens of `video_slots`, then, set by set, the image encoder and
the denoising MLP. Weights and results do not depend on `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidgen.ops import EAGER, Ops

from .config import NovaConfig
from .denoiser import DenoisingMLP
from .embeddings import (
    N_CLASSES,
    LabelEmbed,
    MaskEmbed,
    MotionEmbed,
    TextEmbed,
    VideoPosEmbed,
    rotary_positions,
)
from .image_encoder import ImageEncoder
from .video_encoder import VideoEncoder


class NovaTransformer(nn.Module):
    def __init__(self, config: NovaConfig, ops: Ops = EAGER) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        width, decoder = config.width, config.arch.image_decoder
        self.video_encoder = VideoEncoder(config, ops)
        self.image_encoder = ImageEncoder(config, ops)
        self.image_decoder = DenoisingMLP(
            decoder.depth, decoder.embed_dim, width, config.image_dim, config.patch, ops
        )
        self.mask_embed = MaskEmbed(width)
        self.text_embed = self.label_embed = None
        if config.text_token_dim:
            self.text_embed = TextEmbed(config.text_token_dim, width, config.text_token_len)
        else:
            self.label_embed = LabelEmbed(width)
        self.video_pos_embed = None
        if not config.rotary_pos_embed:
            grid = config.video_grid
            self.video_pos_embed = VideoPosEmbed(width, (config.n_base_frames, *grid))
        self.motion_embed = MotionEmbed(width) if config.has_motion else None

    def condition(
        self,
        text: Tensor | Sequence[Tensor] | None = None,
        *,
        labels: Tensor | None = None,
        flow: Tensor | None = None,
        fps: Tensor | None = None,
    ) -> Tensor:
        """The condition tokens ``[B, Lc, D]``: text or class, then motion.

        Args:
            text: features of `TextEmbed.fill_up`, ``[B, text_token_len, text_token_dim]``, or of
                each text, ``[n, text_token_dim]``.
            labels: classes 0 to 999 or 1000 for none, int64 ``[B]``, for models without text.
            flow, fps: amount of motion and frames per second, ``[B]``; None for the defaults.

        Raises:
            ValueError: arguments that this model does not take, or a missing one.
        """
        if self.text_embed is not None:
            if text is None or labels is not None:
                raise ValueError(f"text: expected features and no labels, got {_given(text)}")
            text = text if isinstance(text, Tensor) else self.text_embed.fill_up(text)
            tokens = self.text_embed(text)
        else:
            assert self.label_embed is not None
            if labels is None or text is not None:
                raise ValueError(f"labels: expected 0 to {N_CLASSES} alone, got {_given(labels)}")
            tokens = self.label_embed(labels)
        if self.motion_embed is None:
            if flow is not None or fps is not None:
                raise ValueError("flow, fps: expected None for a model of images, got values")
            return tokens
        return torch.cat([tokens, self.motion_embed(len(tokens), flow, fps)], dim=1)

    def video_slots(self, past: Tensor | None, n_frames: int, first: int, n_rows: int) -> Tensor:
        """Input tokens ``[B, t, Nv, D]`` of the video encoder for slots from ``first`` on.

        Slot 0 holds the learned `bos_token`, slot s > 0 latent frame s - 1.

        Args:
            past: latents ``[B, C, t, h, w]`` of those slots but slot 0; None for slot 0 alone.
            n_frames: of the whole clip; the times of the slots depend on it.
        """
        parts = []
        if first == 0:
            bos = self.mask_embed.bos_token
            parts.append(bos.expand(n_rows, 1, self.config.n_video_tokens, -1))
        if past is not None and past.shape[2]:
            frames = self.video_encoder.patch_embed(past.transpose(1, 2).flatten(0, 1))
            parts.append(frames.unflatten(0, (n_rows, -1)))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.video_pos_embed is None:
            return x
        time = self.video_pos_embed.time_embedding(n_frames)
        return self.video_pos_embed(x, time[first : first + x.shape[1]])

    def video_positions(self, frames: range) -> Tensor | None:
        """Rotary positions of slots, ``[t * Nv, 3]``; None where positions are added to tokens."""
        if not self.config.rotary_pos_embed:
            return None
        weight = self.mask_embed.bos_token
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return rotary_positions(frames, self.config.video_grid, weight.device, dtype)


def _given(x: object) -> str:
    return "none" if x is None else "both"
