"""`vidgen train nova`: reads samples, and computes the loss of a batch.

A sample is a safetensors file with ``latents`` [C, T, h, w], scaled by the VAE's scaling factor, T
= 1 for an image, and ``prompt_embeds.0`` [n, D], as in a file of features for `vidgen generate`;
for models of classes ``label`` [1] instead. ``flow`` [1] and ``fps`` [1] of a video are optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vidgen.common.samples import Sample, take_latents
from vidgen.common.trainer import Batch, Objective

from ..model.embeddings import DEFAULT_FLOW, DEFAULT_FPS, N_CLASSES
from ..model.transformer import NovaTransformer
from ..sampling.schedules import Schedule, set_sizes
from ..text import read_features
from .loss import TrainingDraws, draw, drop_labels, drop_texts, training_step

MOTION = {"flow": DEFAULT_FLOW, "fps": DEFAULT_FPS}


class NovaObjective(Objective):
    """NOVA with its loss.

    Args:
        n_sets: of a frame, for models with set-causal attention.
    """

    same = ("latents",)

    def __init__(
        self,
        model: NovaTransformer,
        raw: Mapping[str, Any],
        schedule: Schedule,
        n_sets: int,
        **options: Any,
    ) -> None:
        super().__init__(model, raw, **options)
        self.schedule = schedule
        by_sets = model.config.spatial_attention == "set_causal"
        sizes = set_sizes(model.config.n_tokens, n_sets) if by_sets else []
        self.set_sizes = [n for n in sizes if n]

    def read(self, tensors: Sample) -> Sample:
        config = self.model.config
        n_frames = None if config.has_motion else 1
        size = config.image_dim, n_frames, *config.latent_size
        latents, others = take_latents(tensors, size)
        sample = {"latents": latents}
        for name in MOTION if config.has_motion else ():
            if (x := others.pop(name, None)) is not None:
                sample[name] = _one(name, x)
        if config.text_token_dim is None:
            if others.keys() != {"label"}:
                got = ", ".join(sorted(others)) or "nothing"
                raise ValueError(f"label: expected it beside the latents, got {got}")
            label = sample["label"] = _one("label", others["label"]).long()
            if not label.is_meta and not 0 <= label < N_CLASSES:
                raise ValueError(f"label: expected 0 to {N_CLASSES - 1}, got {label.item()}")
            return sample
        text = read_features(others, config.text_token_dim, config.text_token_len).prompt
        if len(text) != 1:
            raise ValueError(f"prompt_embeds: expected one prompt, got {len(text)}")
        return {**sample, "text": text[0]}

    def forward(self, batch: Batch) -> Tensor:
        latents = torch.stack([x["latents"] for x in batch.samples])
        draws = self._draw(latents, batch)
        conditions = self._conditions(batch)
        with self.autocast():
            condition = self.model.condition(**conditions)
            losses = training_step(
                self.model, latents, condition, draws, self.schedule, set_sizes=self.set_sizes
            )
            return losses.total + self._untouched(latents)

    def _untouched(self, latents: Tensor) -> Tensor:
        """0, computed from the weights that a single frame does not use.

        Training in several processes waits for the gradients of all weights.
        """
        encoder = self.model.video_encoder
        if latents.shape[2] > 1 or not self.model.config.has_motion:
            return latents.new_zeros(())
        modules = [encoder.patch_embed, *([] if encoder.mixer is None else [encoder.mixer])]
        return 0 * torch.stack([p.sum() for m in modules for p in m.parameters()]).sum()

    def _conditions(self, batch: Batch) -> dict[str, Any]:
        """Arguments of `NovaTransformer.condition`."""
        drop, config = batch.dropped(self.prompt_dropout), self.model.config
        found: dict[str, Any] = {}
        if config.text_token_dim is None:
            found["labels"] = drop_labels(torch.stack([x["label"] for x in batch.samples]), drop)
        else:
            found["text"] = drop_texts([x["text"] for x in batch.samples], drop)
        for name, usual in MOTION.items() if config.has_motion else ():
            values = [x.get(name, x["latents"].new_tensor(usual)) for x in batch.samples]
            found[name] = torch.stack(values)
        return found

    def _draw(self, latents: Tensor, batch: Batch) -> TrainingDraws:
        """As `draw`, but each clip has its own generator; the masked share is the same for all."""
        n_frames = latents.shape[2]
        n_visible = draw(latents[:1, :, :1], self.model, self.schedule, batch.shared).n_visible
        order, noise, index = [], [], []
        for clip, generator in zip(latents, batch.generators, strict=True):
            drawn = draw(clip[None], self.model, self.schedule, generator)
            order.append(drawn.order)
            noise.append(drawn.noise.unflatten(0, (-1, n_frames)))  # by repeat
            index.append(drawn.index.unflatten(0, (-1, n_frames)))
        joined = (torch.cat(x, dim=1).flatten(0, 1) for x in (noise, index))
        return TrainingDraws(torch.cat(order), n_visible, *joined)


def _one(name: str, x: Tensor) -> Tensor:
    """``x`` as a scalar tensor. Raises ValueError unless it is one number."""
    if x.numel() != 1:
        raise ValueError(f"{name}: expected shape [1], got {list(x.shape)}")
    return x.reshape(())
