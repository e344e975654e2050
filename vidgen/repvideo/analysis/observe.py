"""Measures what the layers do with the frames of a video, while latents are sampled.

- Similarity: the cosine between a layer's outputs at the same place in adjacent frames, mean over
  places and pairs of frames. RepVideo is motivated by it (2501.08994, section 3).
- Attention: the share of its attention that a query gives to the text and to each frame, mean over
  heads and over the queries of the text and of each frame. The attention map of all tokens is not
  computed: with ``lse_g = log sum exp(s q k^T)`` over the keys of group g, which the attention
  operator returns, the share of group g is

      mass_g = exp(lse_g - log sum_g exp(lse_g))

Modules are observed by hooks: without them nothing changes and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.ops import Ops

from ..model.layers import Attention, Stream
from ..model.positions import grid_of
from ..model.transformer import CogVideoXTransformer


@dataclass
class Observations:
    """One list per call of the model, with one fp32 CPU tensor per layer; G = 1 + frames."""

    timesteps: list[float] = field(default_factory=list)
    similarity: list[list[Tensor]] = field(default_factory=list)  # []
    attention: list[list[Tensor]] = field(default_factory=list)  # [G, G]: from queries to keys
    n_frames: int = 0  # frames of patches


@contextmanager
def observed(transformer: CogVideoXTransformer) -> Iterator[Observations]:
    """Observes the transformer's calls inside the context, for the last sample of each batch.

    With guidance that is the conditional half.
    """
    found = Observations()

    def begin(module: Any, args: tuple, options: dict) -> None:
        latents, _, timestep = args
        found.n_frames = grid_of(transformer.config, latents)[0]
        found.timesteps.append(float(timestep[-1]))
        found.similarity.append([])
        found.attention.append([])

    def attend(module: Attention, args: tuple) -> None:
        a, shared, ops = args
        q, k, v = module.heads(a[-1:], shared, ops)
        n_video = q.shape[2] - shared.text_length
        lengths = [shared.text_length, *[n_video // found.n_frames] * found.n_frames]
        found.attention[-1].append(attention_mass(q, k, v, lengths, ops)[0].cpu())

    def compare(module: Any, args: tuple, output: Stream) -> None:
        n_text = args[1].text_length
        video = output.total(n_text)[-1:, n_text:]
        found.similarity[-1].append(adjacent_similarity(video, found.n_frames)[0].cpu())

    hooks = [transformer.register_forward_pre_hook(begin, with_kwargs=True)]
    blocks: Any = transformer.transformer_blocks
    for block in blocks:
        hooks.append(block.attn1.register_forward_pre_hook(attend))
        hooks.append(block.register_forward_hook(compare))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_mass(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], ops: Ops) -> Tensor:
    """The share of attention from group to group, ``[B, G, G]``; rows sum to 1.

    Args:
        q, k, v: ``[B, H, N, D]``
        lengths: the number of tokens in each of the G groups, in the order of the sequence.
    """
    groups = zip(k.split(list(lengths), dim=2), v.split(list(lengths), dim=2), strict=True)
    lse = [ops.attention(q, *kv, return_lse=True)[1] for kv in groups]
    mass = torch.stack(lse, dim=-1).softmax(dim=-1).mean(dim=1)  # [B, N, G]
    return torch.stack([x.mean(dim=1) for x in mass.split(list(lengths), dim=1)], dim=1).float()


@torch.no_grad()
def adjacent_similarity(video: Tensor, n_frames: int) -> Tensor:
    """``[B]`` for tokens ``[B, T H W, D]``, frame after frame; NaN for a single frame."""
    frames = video.float().unflatten(1, (n_frames, -1))
    return F.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1).mean(dim=(1, 2))
