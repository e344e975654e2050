"""Golden cases of NOVA's training steps: recomputes what they record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.common.golden import Results, Where
from vidgen.ops import EAGER, Ops

from ..model.embeddings import patchify, unpatchify
from ..model.transformer import NovaTransformer
from ..model.video_encoder import block_causal_mask
from ..model.weights import load_transformer
from ..sampling.schedules import DDPM, FlowMatching, Schedule
from ..training.loss import TrainingDraws, add_noise, diffusion_losses, frame_conditions, is_visible
from .golden_models import Tensors, config_of, prompts


def training_schedule(options: dict[str, Any]) -> Schedule:
    options = dict(options)
    kind, kinds = options.pop("class"), {"ddpm": DDPM, "flow_matching": FlowMatching}
    if kind not in kinds:
        raise ValueError(f"class: expected {' or '.join(kinds)}, got {kind!r}")
    return kinds[kind].from_config(options)


def train_step(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """A training step: intermediate results, losses, gradients and their norms."""
    sizes, official = config_of(config), ops is EAGER
    model = load_transformer(sizes, w, ops).train()
    schedule = training_schedule(config["noise_schedule"])
    x = inputs["x"] if inputs["x"].ndim == 5 else inputs["x"][:, :, None]
    n_frames, n_tokens = x.shape[2], sizes.n_tokens
    draws = _recorded_draws(inputs, n_tokens)

    text = prompts(config, inputs, sizes.text_token_dim or 0)
    condition = model.condition(text, flow=inputs.get("flow"), fps=inputs.get("fps"))
    frames = x.transpose(1, 2).flatten(0, 1)
    found: Results = {"cond": condition}
    with _recorded(model, found):
        conditions = frame_conditions(model, x, condition).flatten(0, 1)
        encoder, ids = model.image_encoder, draws.order[:, : draws.n_visible]
        tokens = encoder.patch_embed(frames)
        masked = model.mask_embed(tokens, is_visible(draws))
        z = encoder(masked, conditions, ids)
    losses = diffusion_losses(model, z, frames, n_frames, draws, schedule, official_order=official)
    losses.total.backward()

    repeats = len(draws.noise) // len(frames)
    clean = patchify(frames, sizes.patch).repeat(repeats, 1, 1)
    noised = add_noise(clean, draws, schedule)
    asked = (~is_visible(draws)).repeat(repeats, 1)
    if official:
        predictions: Tensor | Where = losses.predictions
    else:
        values = torch.zeros_like(clean)
        values[asked] = losses.predictions.detach().flatten(0, 1)
        predictions = Where(values, asked[..., None])
    mask = block_causal_mask(condition.shape[1], sizes.n_video_tokens, n_frames, x.device)
    norms = [p.grad for _, p in sorted_like(model, config["grad_norm_names"])]
    found |= {
        "frame_cond": conditions,
        "tokens": tokens,
        "masked_tokens": masked,
        "mask": (~is_visible(draws))[..., None].to(x.dtype),
        "spatial_out": z,
        "x_t": unpatchify(noised.tokens, sizes.patch, sizes.image_grid),
        "timestep": noised.timestep,
        "model_pred": predictions,
        "grad_norms": torch.stack([x.new_zeros(()) if g is None else g.norm() for g in norms]),
    }
    if mask is not None:
        found["attn_mask"] = mask.to_dense()[0].to(torch.uint8)
    found |= {name: loss.reshape(1) for name, loss in losses.terms.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"grad.{name}"] = parameter.grad
    return found


def sorted_like(model: nn.Module, names: list[str]) -> list[tuple[str, nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return [(name, parameters[name]) for name in names]


def _recorded_draws(inputs: Tensors, n_tokens: int) -> TrainingDraws:
    """The draws of a case. Visible tokens come first in the order, then the others, ascending."""
    ids = inputs["prev_ids"][..., 0]
    visible = torch.zeros(len(ids), n_tokens, dtype=torch.bool, device=ids.device)
    visible.scatter_(1, ids, True)
    others = visible.int().argsort(dim=1, stable=True)[:, : n_tokens - ids.shape[1]]
    return TrainingDraws(
        torch.cat([ids, others], dim=1), ids.shape[1], inputs["noise"], inputs["t_index"]
    )


@contextmanager
def _recorded(model: NovaTransformer, found: Results) -> Iterator[None]:
    """Adds the inputs and intermediate results of the encoders to ``found``."""
    first, second = model.image_encoder.first_half, model.image_encoder.second_half
    blocks = model.image_encoder.blocks

    def gets(name: str):
        return lambda module, args: found.update({name: args[0]})

    def gives(name: str):
        return lambda module, args, output: found.update({name: output})

    hooks = [
        model.video_encoder.register_forward_pre_hook(gets("temporal_in")),
        model.video_encoder.blocks[0].register_forward_hook(gives("temporal_block0")),
        model.video_encoder.register_forward_hook(gives("temporal_out")),
        blocks[second[0]].register_forward_pre_hook(gets("dec_half_in")),
    ]
    if first:
        hooks.append(blocks[first[-1]].register_forward_hook(gives("enc_half_out")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


KINDS = {"train_step_t2i": train_step, "train_step_t2v": train_step}
