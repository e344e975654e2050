"""NOVA's training loss: a diffusion loss for each masked token of each frame.

One pass of the video encoder over the clip gives the condition of each frame. One pass of the image
encoder over all frames, with most of their tokens masked, gives the feature z of each token. Then
noise is added to the masked tokens, R times with different noise, and the denoising MLP predicts
the target from the noisy token and z:

    flow matching   x_t = sigma noise + (1 - sigma) x,   target noise - x,   sigma = sigmoid(normal)
    DDPM            x_t = sqrt(a_t) x + sqrt(1 - a_t) noise,   target noise,   t uniform

    loss = sum over masked tokens of the mean square error / (their number + 1e-5)

For a clip of T > 1 frames the first frame (text to image) and the later ones (image to video) are
separate terms, each scaled as if all T frames belonged to it.

Shapes: B clips of T frames, frame t of clip b is row ``b * T + t``; N tokens of a frame; latents
[B, C, T, h, w], scaled as the VAE says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import set_causal
from ..model.config import NovaConfig
from ..model.embeddings import N_CLASSES, patchify, unpatchify
from ..model.transformer import NovaTransformer
from ..model.video_encoder import block_causal_mask
from ..model.vit import take
from ..sampling.schedules import DDPM, MaskRatio, Schedule

REPEATS = 4  # R: how often the diffusion loss is computed for each z
CONDITION_DROPOUT = 0.1  # share of samples that are trained without text or class


class TrainingDraws(NamedTuple):
    """All random numbers of a training step.

    The first ``n_visible`` tokens of ``order`` are visible, the others are masked and predicted.
    With ``spatial_attention="set_causal"`` the order is cut into sets, all tokens are predicted and
    ``n_visible`` is 0.
    """

    order: Tensor  # int64 [B * T, N]
    n_visible: int
    noise: Tensor  # [R * B * T, N, p * p * C], the repeats one after another
    index: Tensor  # int64 [R * B * T, N], of the token's noise level in the schedule


class Noised(NamedTuple):
    """Tokens with noise, and what the MLP should predict for them."""

    tokens: Tensor  # [rows, n, p * p * C]
    timestep: Tensor  # [rows, n]
    target: Tensor  # [rows, n, p * p * C]


class Losses(NamedTuple):
    """``terms`` are added to the loss: one for images, two for clips."""

    terms: dict[str, Tensor]
    predictions: Tensor  # for the masked tokens in ascending order, [R * B * T, n, p * p * C]

    @property
    def total(self) -> Tensor:
        return torch.stack([*self.terms.values()]).sum()


def draw(
    latents: Tensor,
    model: NovaTransformer,
    schedule: Schedule,
    seed: int | torch.Generator,
    *,
    ratio: MaskRatio | None = None,
    repeats: int = REPEATS,
) -> TrainingDraws:
    """Draws the random numbers of a step, from a seed or a generator on the latents' device.

    Args:
        ratio: the distribution of the masked share, which is drawn once for all frames.
    """
    if isinstance(seed, int):
        seed = torch.Generator(latents.device).manual_seed(seed)
    config, device = model.config, latents.device
    n_rows, n_tokens = latents.shape[0] * latents.shape[2], config.n_tokens

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=seed, device=device)

    order = uniform(n_rows, n_tokens).argsort(dim=1)
    n_visible = 0
    if config.spatial_attention == "masked":
        share = (ratio or MaskRatio()).quantile(uniform(1)).item()
        n_visible = round((1 - share) * n_tokens)
    shape = repeats * n_rows, n_tokens
    noise = torch.randn(
        *shape, config.token_dim, generator=seed, device=device, dtype=latents.dtype
    )
    if isinstance(schedule, DDPM):
        level = uniform(*shape)
    else:  # most noise levels in the middle
        level = torch.randn(shape, generator=seed, device=device).sigmoid()
    n_levels = schedule.num_train_timesteps
    index = (level * n_levels).long().clamp(max=n_levels - 1)
    return TrainingDraws(order, n_visible, noise, index)


def training_step(
    model: NovaTransformer,
    latents: Tensor,
    condition: Tensor,
    draws: TrainingDraws,
    schedule: Schedule,
    *,
    set_sizes: Sequence[int] = (),
    official_order: bool = False,
) -> Losses:
    """The losses of a batch of clips; T = 1 trains on images.

    Args:
        condition: of `NovaTransformer.condition`, ``[B, Lc, D]``.
        set_sizes: for ``spatial_attention="set_causal"``, the sizes of a frame's sets.
        official_order: run the MLP on all tokens as the released code does, and give visible tokens
            the weight 0. The losses are the same.
    """
    _check(model.config, latents, condition, draws)
    conditions = frame_conditions(model, latents, condition).flatten(0, 1)
    frames = latents.transpose(1, 2).flatten(0, 1)
    z = spatial_features(model, frames, conditions, draws, set_sizes)
    n_frames = latents.shape[2]
    return diffusion_losses(
        model, z, frames, n_frames, draws, schedule, official_order=official_order
    )


def frame_conditions(model: NovaTransformer, latents: Tensor, condition: Tensor) -> Tensor:
    """The condition of each frame, ``[B, T, Nv, D]``, from the text and the frames before it."""
    n_rows, _, n_frames, *_ = latents.shape
    slots = model.video_slots(latents[:, :, :-1], n_frames, 0, n_rows)
    mask = block_causal_mask(condition.shape[1], slots.shape[2], n_frames, latents.device)
    features = model.video_encoder(
        slots.flatten(1, 2),
        condition,
        mask=mask,
        positions=model.video_positions(range(n_frames)),
    )
    return model.video_encoder.frame_conditions(features.unflatten(1, (n_frames, -1)))


def spatial_features(
    model: NovaTransformer,
    frames: Tensor,
    conditions: Tensor,
    draws: TrainingDraws,
    set_sizes: Sequence[int] = (),
) -> Tensor:
    """The features z ``[B * T, N, D]`` of all tokens.

    Args:
        frames: latents ``[B * T, C, h, w]``.
        conditions: ``[B * T, Nv, D]``.
    """
    encoder = model.image_encoder
    tokens = encoder.patch_embed(frames)
    if model.config.spatial_attention == "set_causal":
        masked = model.mask_embed.mask_token.expand(1, tokens.shape[1], -1)
        content, queries = encoder.place(tokens), encoder.place(masked)
        return set_causal.predict_all(encoder, content, queries, conditions, draws.order, set_sizes)
    ids = draws.order[:, : draws.n_visible]
    return encoder(model.mask_embed(tokens, is_visible(draws)), conditions, ids)


def is_visible(draws: TrainingDraws) -> Tensor:
    """Bool ``[B * T, N]``."""
    visible = torch.zeros_like(draws.order, dtype=torch.bool)
    return visible.scatter(1, draws.order[:, : draws.n_visible], True)


def diffusion_losses(
    model: NovaTransformer,
    z: Tensor,
    frames: Tensor,
    n_frames: int,
    draws: TrainingDraws,
    schedule: Schedule,
    *,
    official_order: bool = False,
) -> Losses:
    """The losses, given the features z ``[B * T, N, D]`` of the tokens of ``frames``."""
    tokens = patchify(frames, model.config.patch)
    repeats = len(draws.noise) // len(tokens)
    if official_order:
        noised = add_noise(tokens.repeat(repeats, 1, 1), draws, schedule)
        latents = unpatchify(noised.tokens, model.config.patch, model.config.image_grid)
        z = z.repeat(repeats, 1, 1)
        predictions = model.image_decoder.forward_latents(latents, noised.timestep, z)
        weight = (~is_visible(draws)).repeat(repeats, 1)
    else:
        asked = draws.order[:, draws.n_visible :].sort(dim=1).values
        rows = asked.repeat(repeats, 1)
        some = draws._replace(noise=take(draws.noise, rows), index=draws.index.gather(1, rows))
        noised = add_noise(take(tokens, asked).repeat(repeats, 1, 1), some, schedule)
        c = model.image_decoder.embed_condition(take(z, asked)).repeat(repeats, 1, 1)
        c = c + _embed_times(model, some.index, schedule)
        predictions = model.image_decoder(noised.tokens, c)
        weight = torch.ones_like(rows, dtype=torch.bool)

    dtype = torch.promote_types(predictions.dtype, torch.float32)
    error = (predictions.to(dtype) - noised.target.to(dtype)).square().mean(dim=-1)
    error = error * weight / (weight.sum() + 1e-5)
    terms = {"loss": error.sum()}
    if n_frames > 1:
        by_frame = error.unflatten(0, (-1, n_frames)).sum(dim=(0, 2))
        terms = {
            "loss_t2i": n_frames * by_frame[0],
            "loss_i2i": n_frames / (n_frames - 1) * by_frame[1:].sum(),
        }
    return Losses(terms, predictions)


def add_noise(tokens: Tensor, draws: TrainingDraws, schedule: Schedule) -> Noised:
    """Mixes the clean ``tokens`` [rows, n, p * p * C] with the noise of ``draws``."""
    noise = draws.noise
    timestep, signal, amount = (x[draws.index] for x in _levels(schedule, tokens))
    noised = amount[..., None] * noise + signal[..., None] * tokens
    target = noise if isinstance(schedule, DDPM) else noise - tokens
    return Noised(noised, timestep, target)


class _Levels(NamedTuple):
    """Timestep and amounts of signal and noise, each ``[num_train_timesteps]``."""

    timestep: Tensor
    signal: Tensor
    noise: Tensor


def _levels(schedule: Schedule, like: Tensor) -> _Levels:
    """``signal`` and ``noise`` in the dtype and on the device of ``like``."""
    n = schedule.num_train_timesteps
    if isinstance(schedule, DDPM):
        if schedule.prediction_type != "epsilon":
            expected = f"prediction_type: expected 'epsilon', got {schedule.prediction_type!r}"
            raise ValueError(f"{expected}, which sampling alone is built for")
        alpha = schedule.alphas_cumprod.to(like)
        timestep = torch.arange(n, device=like.device).float()
        return _Levels(timestep, alpha.sqrt(), (1 - alpha).sqrt())
    sigma = schedule.training_sigmas().to(like.device)
    return _Levels(sigma * n, (1 - sigma).to(like), sigma.to(like))


def _embed_times(model: NovaTransformer, index: Tensor, schedule: Schedule) -> Tensor:
    """``[rows, n, M]``. Where tokens outnumber timesteps, each timestep is embedded once."""
    timesteps = _levels(schedule, model.image_decoder.head.weight).timestep
    if index.numel() <= len(timesteps):
        return model.image_decoder.embed_time(timesteps[index])
    return F.embedding(index, model.image_decoder.embed_time(timesteps))


def drop_texts(texts: Sequence[Tensor], drop: Tensor) -> list[Tensor]:
    """Features ``[n, text_token_dim]`` of each text, of the empty text where ``drop`` [B] is true.

    The released training drops a share of `CONDITION_DROPOUT`.
    """
    return [x[:0] if d else x for x, d in zip(texts, drop.tolist(), strict=True)]


def drop_labels(labels: Tensor, drop: Tensor) -> Tensor:
    """``labels`` [B], or the label for no class where ``drop`` [B] is true."""
    return labels.masked_fill(drop, N_CLASSES)


def freeze(model: NovaTransformer) -> list[str]:
    """Turns off the gradients of the weights that the released training kept fixed; their names.

    These are the norm of the text and the motion embedding, for models of images also the
    embeddings of latents and times in the video encoder.
    """
    frozen: list[tuple[str, nn.Module | None]] = [("motion_embed", model.motion_embed)]
    if model.text_embed is not None:
        frozen.append(("text_embed.norm", model.text_embed.norm))
    if not model.config.has_motion:
        frozen.append(("video_pos_embed", model.video_pos_embed))
        frozen.append(("video_encoder.patch_embed", model.video_encoder.patch_embed))
    names = []
    for prefix, module in frozen:
        for name, parameter in [] if module is None else module.named_parameters():
            parameter.requires_grad_(False)
            names.append(f"{prefix}.{name}")
    return names


def _check(config: NovaConfig, latents: Tensor, condition: Tensor, draws: TrainingDraws) -> None:
    size = config.latent_size
    if latents.ndim != 5 or latents.shape[1] != config.image_dim or latents.shape[3:] != size:
        expected = f"[B, {config.image_dim}, T, {size[0]}, {size[1]}]"
        raise ValueError(f"latents: expected shape {expected}, got {list(latents.shape)}")
    n_rows, _, n_frames, *_ = latents.shape
    shape = n_rows, config.width
    if condition.ndim != 3 or (condition.shape[0], condition.shape[2]) != shape:
        expected = f"[{n_rows}, Lc, {config.width}]"
        raise ValueError(f"condition: expected shape {expected}, got {list(condition.shape)}")
    shape = n_rows * n_frames, config.n_tokens
    if draws.order.shape != shape:
        raise ValueError(
            f"draws.order: expected shape {list(shape)}, got {list(draws.order.shape)}"
        )
