"""Generates a frame set by set: features by the image encoder, tokens by the denoising loop.

- `SortedFrames` keeps all tokens in the order in which they are generated. A set, and the tokens
  visible before it, are then slices: the loop gathers and scatters nothing, embeds only the tokens
  of the last set, and computes only the rows of the next set in the last layer.
- `CausalFrames` is the same for models with ``spatial_attention="set_causal"``, with a KV cache.
- `ReleasedFrames` works on whole latents as the released code does, with the same results as
  `SortedFrames`.

`sampler.py` calls `Frames.make` for each frame.

Shapes: G branches of guidance, B samples, N tokens of a frame, n of a set, Nv of the video encoder,
D width, P = p * p * C values of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vidgen.common.progress import SILENT, Progress

from ..model import set_causal
from ..model.embeddings import patchify, unpatchify
from ..model.transformer import NovaTransformer
from ..model.vit import KVCache, Pass, take
from .denoising import SetDenoiser, denoise_latents
from .draws import Draws
from .guidance import Guidance
from .schedules import set_sizes
from .steps import Step


class Frames(ABC):
    """Generates frames with one schedule, one guidance and one order of tokens.

    Args:
        n_sets: steps of the cosine schedule; empty sets are left out.

    Attributes:
        sizes: the number of tokens in each set.
    """

    def __init__(
        self,
        model: NovaTransformer,
        steps: Sequence[Step],
        guidance: Guidance,
        draws: Draws,
        n_sets: int,
        progress: Progress = SILENT,
    ) -> None:
        self.model, self.steps, self.guidance = model, steps, guidance
        self.draws, self.progress = draws, progress
        self.patch, self.grid = model.config.patch, model.config.image_grid
        self.order = draws.order(model.config.n_tokens)
        self.sizes = [n for n in set_sizes(model.config.n_tokens, n_sets) if n]
        self.n_noises = sum(step.needs_noise for step in steps)

    def sets(self) -> Iterator[tuple[int, int, float]]:
        """The sets, as ``first``, ``last`` and the guidance scale: tokens first to last - 1."""
        ends = list(accumulate(self.sizes, initial=0))
        for i in self.progress.track(range(len(self.sizes)), "sets"):
            yield ends[i], ends[i + 1], self.guidance.scale(i, len(self.sizes))

    @abstractmethod
    def make(self, condition: Tensor) -> Tensor:
        """The latents ``[B, C, h, w]`` of a frame from its condition ``[G B, Nv, D]``."""


class SortedFrames(Frames):
    def __init__(
        self,
        model: NovaTransformer,
        steps: Sequence[Step],
        guidance: Guidance,
        draws: Draws,
        n_sets: int,
        progress: Progress = SILENT,
    ) -> None:
        super().__init__(model, steps, guidance, draws, n_sets, progress)
        self.encoder = model.image_encoder
        self.denoise = SetDenoiser(model.image_decoder, steps, guidance)
        self.ids = self._all_branches(self.order)
        tokens = model.mask_embed.mask_token.expand(1, model.config.n_tokens, -1)
        places = self.encoder.place(torch.zeros_like(tokens)).expand(len(self.order), -1, -1)
        self.places = take(places, self.order)  # [B, N, D]
        self.masks = self._all_branches(self.places + tokens)  # [G B, N, D]

    def make(self, condition: Tensor) -> Tensor:
        made, content = [], []
        for first, last, scale in self.sets():
            z = self.predict(condition, content, first, last)
            tokens = self._sample(z, first, last, scale)
            made.append(tokens)
            content.append(self._content(tokens, first, last))
        tokens = take(torch.cat(made, dim=1), self.order.argsort(dim=1))
        return unpatchify(tokens, self.patch, self.grid)

    def predict(self, condition: Tensor, content: list[Tensor], first: int, last: int) -> Tensor:
        """Features ``[G B, n, D]`` of a set.

        Args:
            content: what `_content` gave for each set before it.
        """
        encoder, n_condition = self.encoder, condition.shape[1]
        visible = torch.cat([condition[:, :0], *content], dim=1)
        h = encoder.encode(visible, condition, self.ids[:, :first])
        h = torch.cat([h, self.masks[:, first:]], dim=1)
        shared = Pass(None, encoder.positions(h, self.ids), n_condition)
        rows = slice(n_condition + first, n_condition + last)
        return encoder.norm(encoder.run(h, encoder.second_half, shared, rows))

    def _content(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Embedded patches with positions, ``[G B, n, D]``, of new tokens ``[B, n, P]``."""
        patches = self.encoder.patch_embed.of_tokens(tokens)
        return self._all_branches(patches + self.places[:, first:last])

    def _sample(self, z: Tensor, first: int, last: int, scale: float) -> Tensor:
        """Tokens ``[B, n, P]`` of a set."""
        own = self.order[:, first:last]
        start = patchify(self.draws.start(), self.patch)
        during = self._noise_of_steps()
        others, others_during = None, None
        if self.guidance.guidance_renorm < 1:
            ids = torch.cat([self.order[:, :first], self.order[:, last:]], dim=1)
            others, others_during = take(start, ids), _take_each(during, ids)
        return self.denoise(
            z,
            take(start, own),
            scale,
            noise=_take_each(during, own),
            rest=others,
            rest_noise=others_during,
        )

    def _noise_of_steps(self) -> Tensor | None:
        """``[steps, B, N, P]``."""
        if not self.n_noises:
            return None
        noise = self.draws.during(self.n_noises)
        return patchify(noise.flatten(0, 1), self.patch).unflatten(0, noise.shape[:2])

    def _all_branches(self, x: Tensor) -> Tensor:
        """``[B, ...]`` to ``[G B, ...]``."""
        n_branches = self.guidance.n_branches
        return x if n_branches == 1 else torch.cat([x] * n_branches)


class CausalFrames(SortedFrames):
    cache: KVCache | None = None

    def make(self, condition: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = set_causal.new_cache(self.encoder, *condition.shape[:2])
        self.cache.clear()
        return super().make(condition)

    def predict(self, condition: Tensor, content: list[Tensor], first: int, last: int) -> Tensor:
        assert self.cache is not None
        new = content[-1] if content else condition
        new_ids = self.ids[:, first - new.shape[1] : first] if content else None
        return set_causal.predict_set(
            self.encoder,
            self.cache,
            new,
            self.masks[:, first:last],
            new_ids=new_ids,
            ids=self.ids[:, first:last],
        )


class ReleasedFrames(Frames):
    """As the released code does it, to compare with."""

    def make(self, condition: Tensor) -> Tensor:
        model, n_branches = self.model, self.guidance.n_branches
        n_samples, (rows, cols) = len(self.order), self.grid
        size = n_samples, model.config.image_dim, self.patch * rows, self.patch * cols
        x = condition.new_zeros(size)
        for first, last, scale in self.sets():
            visible, ids = self.order[:, :first], self.order[:, first:last]
            is_visible = torch.zeros_like(self.order, dtype=torch.bool).scatter(1, visible, True)
            tokens = model.mask_embed(model.image_encoder.patch_embed(x), is_visible)
            z = model.image_encoder(
                torch.cat([tokens] * n_branches), condition, visible.repeat(n_branches, 1)
            )
            noise = self.draws.start()
            during = self.draws.during(self.n_noises) if self.n_noises else None
            sample = denoise_latents(
                model.image_decoder,
                self.steps,
                self.guidance,
                z,
                noise,
                ids,
                self.grid,
                scale,
                during,
            )
            chosen = torch.zeros_like(self.order, dtype=x.dtype).scatter(1, ids, 1)
            tokens = patchify(sample, self.patch) * chosen[:, :, None]
            x = x + unpatchify(tokens, self.patch, self.grid)
        return x


def _take_each(noise: Tensor | None, ids: Tensor) -> Tensor | None:
    """Tokens ``ids`` [B, n] of ``[steps, B, N, P]``."""
    if noise is None:
        return None
    index = ids[None, :, :, None].expand(len(noise), -1, -1, noise.shape[-1])
    return noise.gather(2, index)
