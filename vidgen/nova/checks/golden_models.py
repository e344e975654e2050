"""Golden cases of NOVA's modules: recomputes what they record."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vidgen.common.checkpoint import load_exactly
from vidgen.common.golden import Results, check_fixed
from vidgen.ops import EAGER, Ops, QKVStream

from ..model.config import Encoder, NovaConfig, rotary_axes
from ..model.denoiser import ADAPTIVE_EPS, DenoisingMLP, timestep_features
from ..model.denoiser import NORM_EPS as DENOISER_NORM_EPS
from ..model.embeddings import N_FREQUENCIES, patchify, rotary_positions, sincos, space_table
from ..model.mixer import Mixer
from ..model.transformer import NovaTransformer
from ..model.video_encoder import VideoEncoder, block_causal_mask
from ..model.vit import NORM_EPS, Block, Pass, take

Tensors = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def config_of(case: dict[str, Any]) -> NovaConfig:
    names = {field.name for field in fields(NovaConfig)}
    return NovaConfig.from_dict({name: x for name, x in case.items() if name in names})


def loaded(module: Module, w: Tensors, prefix: str = "") -> Module:
    """``module`` with its part of the weights ``w``, the keys that begin with ``prefix``."""
    own = {key.removeprefix(prefix): x for key, x in w.items() if key.startswith(prefix)}
    load_exactly(module, own)
    return module


def with_weights(config: NovaConfig, w: Tensors, ops: Ops) -> NovaTransformer:
    """A model with the weights of a case; modules that the case does not hold are fresh."""
    model = NovaTransformer(config, ops).to(next(iter(w.values())))
    state = model.state_dict()
    assert w.keys() <= state.keys(), "a case of another config"
    model.load_state_dict(state | w)
    return model


def prompts(config: dict[str, Any], inputs: Tensors, width: int) -> list[Tensor]:
    """The features of each prompt; a case does not store those of an empty prompt."""
    like = next(x for x in inputs.values() if x.is_floating_point())
    empty = like.new_empty(0, width)
    return [inputs.get(f"prompt{i}", empty) for i in range(len(config["prompt_lens"]))]


def gradients(y: Tensor, grad_y: Tensor, by_name: dict[str, Tensor]) -> Results:
    found = torch.autograd.grad(y, [*by_name.values()], grad_y)
    return {f"grad_{name}": g for name, g in zip(by_name, found, strict=True)}


def embeddings(
    config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops, outputs: list[str]
) -> Results:
    """Position tables, conditions, timesteps, and times for the clip lengths in ``outputs``."""
    sizes = config_of(config)
    model = with_weights(sizes, w, ops)
    text, motion, video = model.text_embed, model.motion_embed, model.video_pos_embed
    assert text is not None
    like = text.proj.weight
    table = like.device, like.dtype
    padded = text.fill_up(prompts(config, inputs, like.shape[1]))
    time_embed = model.image_decoder.embed_time
    results: Results = {
        "image_space": space_table(sizes.width, sizes.image_grid, *table),
        "video_space": space_table(sizes.width, sizes.video_grid, *table),
        "text_padded": padded,
        "text": text(padded),
    }
    if motion is not None:
        results["motion"] = motion(len(padded), inputs.get("flow"), inputs.get("fps"))
        results["motion_default"] = motion(len(padded))
    for schedule in ("fm", "ddpm"):
        timesteps = inputs[f"{schedule}_timesteps"]
        results[f"freq_{schedule}"] = timestep_features(timesteps)
        results[f"temb_{schedule}"] = time_embed(timesteps)
    for name in outputs:
        kind, _, length = name.rpartition("_")
        if video is None:
            continue
        if kind == "time":
            results[name] = video.time_embedding(int(length))
        elif kind == "time_sincos":
            results[name] = sincos(video.times(int(length)))[:, None]
    return results


def vit_block(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """A block's sublayers, its output and all gradients."""
    check_fixed(config, {"mlp_ratio": 4, "ln_eps": NORM_EPS, "mask": None})
    block = loaded(Block(Encoder(1, config["dim"], config["heads"])).to(inputs["x"]), w)
    x, found = inputs["x"].requires_grad_(), {}
    for name in ("attn", "mlp"):
        module = getattr(block, name)
        module.register_forward_hook(lambda *args, name=name: found.update({name: args[-1]}))
    y = block(x, Pass(), ops)
    return (
        {"y": y}
        | found
        | gradients(y, inputs["grad_y"], {"x": x, **dict(block.named_parameters())})
    )


def rope3d(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """Rotation along three axes after unrotated tokens, for a clip and for selected tokens."""
    check_fixed(config, {"axis_dims": list(rotary_axes(config["head_dim"]))})
    x, ids = inputs["x"], inputs["ids"][..., 0]
    grid = config["grid_hw"][0], config["grid_hw"][1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    positions = rotary_positions(range(config["t"]), grid, x.device, dtype)

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        heads = x.transpose(1, 2).flatten(2)
        q, _, _ = ops.qk_norm_rope(
            QKVStream((heads, heads, heads)),
            positions,
            rotary_axes(config["head_dim"]),
            n_heads=x.shape[1],
            text_length=config["pad"],
            norm=None,
            theta=config["theta"],
        )
        return q

    return {
        "pos": positions.expand(len(x), -1, -1),
        "y": rotated(x, positions),
        "y_ids": rotated(inputs["xs"], positions[ids]),
    }


def scale_shift(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """The scaling and shift layer and its gradients; in cases rank 0 means full rank."""
    mixer = loaded(Mixer(config["dim"], config["rank"] or -1).to(inputs["z"]), w)
    anchor, z = inputs["anchor"].requires_grad_(), inputs["z"].requires_grad_()
    y = mixer(anchor, z)
    of = {"anchor": anchor, "z": z, **dict(mixer.named_parameters())}
    return {"y": y} | gradients(y, inputs["grad_y"], of)


def diffusion_mlp(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """The denoising MLP on all tokens, with gradients, and on some of them."""
    eps = {"ln_eps_ada": ADAPTIVE_EPS, "ln_eps_post": DENOISER_NORM_EPS}
    check_fixed(config, {**eps, "freq_dim": 2 * N_FREQUENCIES})
    depth, width, patch = config["depth"], config["dim"], config["patch"]
    x, z, ids = inputs["x"].requires_grad_(), inputs["z"].requires_grad_(), inputs["ids"][..., 0]
    model = DenoisingMLP(depth, width, config["cond_dim"], config["channels"], patch, ops)
    model = loaded(model.to(x), w)
    time = model.embed_time(inputs["t_batch"])[:, None]
    c = model.embed_condition(take(z, ids)) + time
    if ops is EAGER:  # in the order of the released code
        y = model.forward_latents(x, inputs["t_tokens"], z)
        y_sel = model.forward_latents(x, inputs["t_batch"], z, ids)
    else:
        tokens = patchify(x, patch)
        all_c = model.embed_condition(z) + model.embed_time(inputs["t_tokens"])
        y = model(tokens, all_c)
        some = model(take(tokens, ids), c)
        y_sel = tokens.scatter(1, ids[..., None].expand_as(some), some)
    of = {"x": x, "z": z, **dict(model.named_parameters())}
    return {"y": y, "y_sel": y_sel, "cond_sel": c} | gradients(y, inputs["grad_y"], of)


def temporal_kvcache(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """Frame conditions, slot by slot with a cache and in one pass under the mask."""
    sizes, x, condition = config_of(config), inputs["x"], inputs["cond"]
    model = with_weights(sizes, w, ops)
    n_rows, n_frames, n_condition = len(x), config["latent_length"], condition.shape[1]
    n_tokens = sizes.n_video_tokens
    encoder: VideoEncoder = model.video_encoder
    results: Results = {}
    cache = encoder.new_cache(n_rows, n_condition + n_frames * n_tokens)
    slots, features, conditions = [], [], []
    with torch.no_grad():
        for t in range(n_frames):
            past = x[:, :, t - 1 : t] if t else None
            slot = model.video_slots(past, n_frames, t, n_rows)
            before = cache.length
            feature = encoder(
                slot[:, 0],
                None if t else condition,
                positions=model.video_positions(range(t, t + 1)),
                cache=cache,
            )
            results[f"q_len_{t}"] = torch.tensor([cache.length - before])
            results[f"kv_len_{t}"] = torch.tensor([cache.length])
            slots.append(slot)
            features.append(feature)
            conditions.append(encoder.mix(features[0], feature) if t else feature)
        clip = model.video_slots(x[:, :, : n_frames - 1], n_frames, 0, n_rows)
        mask = block_causal_mask(n_condition, n_tokens, n_frames, x.device)
        trained = encoder(
            clip.flatten(1, 2),
            condition,
            mask=mask,
            positions=model.video_positions(range(n_frames)),
        ).unflatten(1, (n_frames, -1))
    for i in range(sizes.arch.video_encoder.depth):
        results[f"cache_k_{i}"], results[f"cache_v_{i}"] = cache.data[i]
    results |= {
        "tokens_in": torch.cat(slots, dim=1),
        "features": torch.stack(features, dim=1),
        "frame_cond": torch.stack(conditions, dim=1),
        "features_train": trained,
        "frame_cond_train": encoder.frame_conditions(trained),
    }
    if mask is not None:
        results["mask"] = mask.to_dense()[0].to(torch.uint8)
    return results


def spatial_step(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """Both halves of the image encoder for some numbers of visible tokens."""
    model = with_weights(config_of(config), w, ops)
    encoder, condition, order = model.image_encoder, inputs["cond"], inputs["order"][..., 0]
    results: Results = {}
    with torch.no_grad():
        tokens = encoder.patch_embed(inputs["x"])
        for n in config["visible_counts"]:
            ids = order[:, :n]
            visible = torch.zeros_like(order, dtype=torch.bool).scatter(1, ids, True)
            masked = model.mask_embed(tokens, visible)
            canvas = encoder.place(masked)
            encoded = encoder.encode(take(canvas, ids), condition, ids)
            results |= {
                f"masked_{n}": masked,
                f"enc_{n}": encoded,
                f"decin_{n}": encoder.decoder_input(encoded, canvas, ids),
                f"z_{n}": _by_sets(model, encoded, canvas, ids, order[:, n:]),
            }
    return results


def _by_sets(
    model: NovaTransformer, encoded: Tensor, canvas: Tensor, ids: Tensor, others: Tensor
) -> Tensor:
    """z of all tokens, ``[B, N, D]``; with fused ops in two calls, for visible and masked ones."""
    encoder = model.image_encoder
    if model.ops is EAGER:
        return encoder.decode(encoded, canvas, ids)
    parts = [encoder.decode(encoded, canvas, ids, rows=rows) for rows in (ids, others)]
    back = torch.cat([ids, others], dim=1).argsort(dim=1)
    return take(torch.cat(parts, dim=1), back)


KINDS = {
    "diffusion_mlp": diffusion_mlp,
    "embeddings": embeddings,
    "rope3d": rope3d,
    "scale_shift": scale_shift,
    "spatial_step": spatial_step,
    "temporal_kvcache": temporal_kvcache,
    "vit_block": vit_block,
}
