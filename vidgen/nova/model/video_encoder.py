"""The video encoder: features of every frame from the condition and the frames before it.

The sequence is ``[condition | slot 0 | slot 1 | ...]``. Slot 0 holds a learned token, slot t > 0
latent frame t - 1; from the output of slot t, frame t is generated. A slot attends to itself and to
everything before it; condition and slot 0 are one block and attend to each other.

Training runs all slots at once under `block_causal_mask`, sampling slot by slot with a cache. The
results are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidgen.ops import EAGER, IntervalMask, Ops

from .config import NovaConfig
from .embeddings import PatchEmbed
from .mixer import Mixer
from .vit import KVCache, Pass, VisionTransformer


def block_causal_mask(
    n_condition: int, n_tokens: int, n_frames: int, device: torch.device
) -> IntervalMask | None:
    """For all slots at once, ``n_tokens`` each; None for one frame, where attention is full."""
    if n_frames == 1:
        return None
    lengths = [n_condition + n_tokens] + [n_tokens] * (n_frames - 1)
    return IntervalMask.block_causal(lengths, device=device)


class VideoEncoder(VisionTransformer):
    def __init__(self, config: NovaConfig, ops: Ops = EAGER) -> None:
        super().__init__(config.arch.video_encoder, ops)
        self.encoder, self.rank = config.arch.video_encoder, config.video_mixer_rank
        self.patch_embed = PatchEmbed(config.image_dim, config.width, config.video_patch)
        self.mixer = Mixer(config.width, self.rank) if self.rank else None

    def forward(
        self,
        x: Tensor,  # [B, n, D]
        condition: Tensor | None = None,  # [B, Lc, D]
        *,
        mask: IntervalMask | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Features ``[B, n, D]`` of the tokens of some slots.

        Args:
            condition: condition tokens, together with slot 0; None for later slots.
            mask: for condition and slots; None: full attention, to cached tokens too.
            positions: rotary positions of ``x``, ``[n, 3]``, if the model has them.
            cache: keys and values of earlier calls; those of this call are added.
        """
        n_condition = 0 if condition is None else condition.shape[1]
        h = x if condition is None else torch.cat([condition, x], dim=1)
        shared = Pass(mask, positions, n_condition, cache)
        h = self.run(h, range(len(self.blocks)), shared)
        if cache is not None:
            cache.advance(h.shape[1])
        return self.norm(h[:, n_condition:])

    def new_cache(self, n_rows: int, capacity: int) -> KVCache:
        """A cache for ``capacity`` tokens, condition included, in the dtype of the weights."""
        weight = self.norm.weight
        return KVCache(self.encoder, n_rows, capacity, dtype=weight.dtype, device=weight.device)

    def mix(self, anchor: Tensor, features: Tensor) -> Tensor:
        """Conditions of later frames, from their ``features`` [B, T, Nv, D] and slot 0's."""
        return features if self.mixer is None else self.mixer(anchor, features)

    def frame_conditions(self, features: Tensor) -> Tensor:
        """Conditions of all frames of a clip, ``[B, T, Nv, D]``; frame 0's are its features."""
        if self.mixer is None or features.shape[1] == 1:
            return features
        anchor, later = features[:, :1], features[:, 1:]
        return torch.cat([anchor, self.mix(anchor, later)], dim=1)
