"""NOVA's sampling loop: frame after frame, and each frame set by set (`frames.py`).

Frame t is generated from the video encoder's features of slot t. Slot 0 holds a learned token, slot
t > 0 frame t - 1; keys and values of earlier slots are cached. The times of frames depend on the
length of the clip, so it must be known before the first frame; it may exceed that of training.
Given frames run through the video encoder in one pass under the block-causal mask.

Autoregressive Video Generation without Vector Quantization, arXiv 2412.14169.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgen.common.finite import FiniteSteps
from vidgen.common.progress import SILENT, Progress

from ..model.embeddings import N_CLASSES
from ..model.transformer import NovaTransformer
from ..model.video_encoder import block_causal_mask
from ..text import TextFeatures
from .draws import Draws
from .frames import CausalFrames, Frames, ReleasedFrames, SortedFrames
from .graphs import BucketedFrames
from .guidance import Guidance
from .schedules import FlowMatching, Schedule

ORDERS = ("sorted", "official")


@dataclass(frozen=True)
class SamplingConfig:
    """Options by the names of the released pipeline.

    Raises:
        ValueError: numbers out of range.
    """

    num_inference_steps: int = 64  # sets of a frame
    num_diffusion_steps: int = 25  # 100 for DDPM models
    max_latent_length: int = 1  # latent frames
    guidance: Guidance = field(default_factory=Guidance)
    schedule: Schedule = field(default_factory=FlowMatching)
    order: str = "sorted"  # or "official": as the released code works, to compare with
    graphs: bool = False  # replay CUDA graphs (`graphs.py`); needs `Guidance.has_one_scale`

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "num_diffusion_steps", "max_latent_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.order not in ORDERS:
            raise ValueError(f"order: expected {' or '.join(ORDERS)}, got {self.order!r}")
        if self.graphs and self.order == "official":
            raise ValueError("graphs: expected False for the official order, got True")
        if self.graphs and not self.guidance.has_one_scale:
            raise ValueError(
                "graphs: expected guidance of at most two branches, without renorm and "
                f"min_guidance_scale, got {self.guidance}"
            )


def text_condition(
    model: NovaTransformer,
    features: TextFeatures,
    guidance: Guidance,
    flow: float | None = None,
    fps: float | None = None,
) -> Tensor:
    """Condition tokens ``[G B, Lc, D]`` of all branches of guidance, the conditional one first.

    Raises:
        ValueError: another number of negative prompts than of prompts.
    """
    rows = list(features.prompt)
    if len(features.negative) != len(rows):
        n_negative = len(features.negative)
        raise ValueError(f"negative prompts: expected {len(rows)}, got {n_negative}")
    if guidance.n_branches > 1:
        rows += features.negative
    if guidance.n_branches > 2:
        rows += features.negative if guidance.hides_frames else features.prompt
    return model.condition(rows, **_motion(model, len(rows), flow, fps))


def class_condition(
    model: NovaTransformer,
    labels: Sequence[int],
    guidance: Guidance,
    flow: float | None = None,
    fps: float | None = None,
) -> Tensor:
    """`text_condition` for classes 0 to 999; the other branches have the label for no class."""
    for label in labels:
        if not 0 <= label <= N_CLASSES:
            raise ValueError(f"labels: expected 0 to {N_CLASSES}, got {label}")
    given, none = list(labels), [N_CLASSES] * len(labels)
    third = none if guidance.hides_frames else given
    rows = [given, given + none, given + none + third][guidance.n_branches - 1]
    tensor = torch.tensor(rows, device=model.mask_embed.bos_token.device)
    return model.condition(labels=tensor, **_motion(model, len(rows), flow, fps))


def _motion(
    model: NovaTransformer, n_rows: int, flow: float | None, fps: float | None
) -> dict[str, Tensor | None]:
    if model.motion_embed is None:  # models of images ignore the default values
        return {}
    device = model.mask_embed.bos_token.device
    for name, x in (("flow", flow), ("fps", fps)):
        if x is not None and not math.isfinite(x):
            raise ValueError(f"{name}: expected a finite number, got {x}")
    return {
        name: None if x is None else torch.full((n_rows,), float(x), device=device)
        for name, x in (("flow", flow), ("fps", fps))
    }


def sample(
    model: NovaTransformer,
    condition: Tensor,
    config: SamplingConfig,
    draws: Draws,
    *,
    given: Tensor | None = None,
    progress: Progress = SILENT,
) -> Iterator[Tensor]:
    """Generates the latents of a clip, frame after frame.

    Args:
        condition: ``[G B, Lc, D]``, from `text_condition` or `class_condition`.
        given: latents ``[B, C, t, h, w]`` of the first frames, which the clip continues.

    Yields:
        ``given``, if there is one, then ``[B, C, 1, h, w]`` for every new frame.

    Raises:
        ValueError: shapes that do not fit, more given frames than frames of the clip, or an order
            that the model does not support.
    """
    _check(model, condition, config, given)
    return _sample(model, condition, config, draws, given, progress)


@torch.inference_mode()
def _sample(
    model: NovaTransformer,
    condition: Tensor,
    config: SamplingConfig,
    draws: Draws,
    given: Tensor | None,
    progress: Progress,
) -> Iterator[Tensor]:
    n_frames, n_given = config.max_latent_length, 0 if given is None else given.shape[2]
    frames = make_frames(model, config, draws, progress)
    slots = _Slots(model, condition, config.guidance, n_frames)
    if given is not None:
        yield given
        if n_given == n_frames:
            return
    frame_condition = slots.first(given)
    finite = FiniteSteps("latents")
    for t in progress.track(range(n_given, n_frames), "frames"):
        latents = frames.make(frame_condition)[:, :, None]
        finite.note(f"frame {t + 1} of {n_frames}", latents)
        finite.check()
        yield latents
        if t + 1 < n_frames:
            frame_condition = slots.next(latents)


def make_frames(
    model: NovaTransformer, config: SamplingConfig, draws: Draws, progress: Progress = SILENT
) -> Frames:
    kind = BucketedFrames if config.graphs else SortedFrames
    kind = CausalFrames if model.config.spatial_attention == "set_causal" else kind
    kind = ReleasedFrames if config.order == "official" else kind
    steps = config.schedule.steps(config.num_diffusion_steps)
    return kind(model, steps, config.guidance, draws, config.num_inference_steps, progress)


class _Slots:
    """The video encoder during sampling: its cache, and slot 0's features for the mixer.

    With image guidance the second branch has the bare `bos_token` in place of every slot.
    """

    def __init__(
        self, model: NovaTransformer, condition: Tensor, guidance: Guidance, n_frames: int
    ) -> None:
        self.model, self.condition, self.guidance = model, condition, guidance
        self.encoder, self.n_frames, self.t = model.video_encoder, n_frames, 0
        self.cache = None
        if n_frames > 1:
            capacity = condition.shape[1] + n_frames * model.config.n_video_tokens
            self.cache = self.encoder.new_cache(len(condition), capacity)

    def first(self, given: Tensor | None) -> Tensor:
        """Runs slot 0 and the slots of given frames.

        Returns the condition ``[G B, Nv, D]`` of the frame after them.
        """
        n_slots = 1 if given is None else 1 + given.shape[2]
        x = self._tokens(given)
        n_tokens = self.model.config.n_video_tokens
        mask = block_causal_mask(self.condition.shape[1], n_tokens, n_slots, x.device)
        features = self._run(x, n_slots, condition=self.condition, mask=mask)
        self.anchor = features[:, :1]
        return features[:, 0] if n_slots == 1 else self._mix(features)

    def next(self, latents: Tensor) -> Tensor:
        """The condition of the frame after ``latents`` [B, C, 1, h, w]."""
        return self._mix(self._run(self._tokens(latents), 1))

    def _mix(self, features: Tensor) -> Tensor:
        return self.encoder.mix(self.anchor, features[:, -1:])[:, 0]

    def _tokens(self, past: Tensor | None) -> Tensor:
        """Input tokens ``[G B, slots * Nv, D]`` of the next slots, which hold ``past``."""
        n_branches = self.guidance.n_branches
        n_samples = len(self.condition) // n_branches
        x = self.model.video_slots(past, self.n_frames, self.t, n_samples)
        x = torch.cat([x] * n_branches)
        if self.guidance.hides_frames:
            x[n_samples : 2 * n_samples] = self.model.mask_embed.bos_token
        return x.flatten(1, 2)

    def _run(self, x: Tensor, n_slots: int, **options) -> Tensor:
        """``[G B, n_slots, Nv, D]``."""
        positions = self.model.video_positions(range(self.t, self.t + n_slots))
        self.t += n_slots
        features = self.encoder(x, positions=positions, cache=self.cache, **options)
        return features.unflatten(1, (n_slots, -1))


def _check(
    model: NovaTransformer, condition: Tensor, config: SamplingConfig, given: Tensor | None
) -> None:
    n_branches = config.guidance.n_branches
    expected = ("G B", model.config.n_condition, model.config.width)
    if condition.ndim != 3 or len(condition) % n_branches or condition.shape[1:] != expected[1:]:
        shape = f"[{n_branches} B, {expected[1]}, {expected[2]}]"
        raise ValueError(f"condition: expected shape {shape}, got {list(condition.shape)}")
    if given is not None:
        n_samples, n_frames = len(condition) // n_branches, config.max_latent_length
        size = n_samples, model.config.image_dim, *model.config.latent_size
        if given.ndim != 5 or (*given.shape[:2], *given.shape[3:]) != size:
            shape = f"[{size[0]}, {size[1]}, frames, {size[2]}, {size[3]}]"
            raise ValueError(f"given: expected shape {shape}, got {list(given.shape)}")
        if not 1 <= given.shape[2] <= n_frames:
            raise ValueError(f"given: expected 1 to {n_frames} frames, got {given.shape[2]}")
    if model.config.spatial_attention != "masked":
        if config.order == "official":
            raise ValueError("order: expected sorted for a set-causal model, got official")
        if config.graphs:
            raise ValueError("graphs: expected False for a set-causal model, got True")
    if config.graphs and condition.device.type != "cuda":
        raise ValueError(f"graphs: expected False on {condition.device.type}, got True")
