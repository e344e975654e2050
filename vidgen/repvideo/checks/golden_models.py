"""Golden cases of CogVideoX's and RepVideo's transformers: recomputes what they record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.golden import check_fixed
from vidgen.ops import Ops

from ..model.config import LAYER_NORM_EPS, OUT_NORM_EPS, QK_NORM_EPS, ROPE_THETA, CogVideoXConfig
from ..model.keys import GATES, SAT_UNUSED, to_diffusers, to_sat
from ..model.layers import Block, Pass, Stream
from ..model.positions import rope_positions
from ..model.weights import load_transformer
from ..sampling.schedules import denoiser_table, shifted_alphas
from ..training.loss import add_noise, training_step

Tensors = dict[str, Tensor]


def sat_config(config: Mapping[str, Any]) -> CogVideoXConfig:
    """The config of a case of the released RepVideo code."""
    check_fixed(config, {"ln_eps": LAYER_NORM_EPS, "qk_ln_eps": QK_NORM_EPS})
    return CogVideoXConfig(
        num_attention_heads=config["heads"],
        attention_head_dim=config["head_dim"],
        in_channels=config.get("in_channels", 16),
        out_channels=config.get("out_channels", 16),
        time_embed_dim=config["time_embed_dim"],
        text_embed_dim=config.get("text_dim", 4096),
        num_layers=config.get("num_layers", 1),
        sample_width=config.get("latent_w", 90),
        sample_height=config.get("latent_h", 60),
        sample_frames=config.get("num_frames", 49),
        patch_size=config.get("patch", 2),
        max_text_seq_length=config["text_len"],
        spatial_interpolation_scale=config.get("sincos_interp_hw", 1.875),
        temporal_interpolation_scale=config.get("sincos_interp_t", 1.0),
        use_rotary_positional_embeddings=config["rope"],
        gates=True,
        window=config.get("window", 6),
        out_norm_eps=config.get("final_norm_eps", OUT_NORM_EPS),
    )


def block(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """One layer: intermediate results, output and gradients."""
    grid = config["latent_frames"], config["grid_h"], config["grid_w"]
    patch = CogVideoXConfig.patch_size
    sizes = {"latent_h": patch * config["grid_h"], "latent_w": patch * config["grid_w"]}
    options = sat_config({**config, **sizes})
    h, emb = inputs["h"].requires_grad_(), inputs["emb"].requires_grad_()
    layer = Block(options).to(h)
    state = to_diffusers({key: x for key, x in w.items() if key not in SAT_UNUSED})
    names = [key.split(".", 2)[2] for key in state]  # without the number of the layer
    layer.load_state_dict(dict(zip(names, state.values(), strict=True)))
    positions = rope_positions(options, grid, h.device) if config["rope"] else None
    shared = Pass(F.silu(emb), config["text_len"], positions)

    attention, found = layer.attn1, Recorded()
    found.inputs(attn_in=attention, attn_ctx=attention.to_out[0], mlp_in=layer.ff)
    found.outputs(q=attention.to_q, k=attention.to_k, v=attention.to_v)
    found.outputs(attn_out=attention, mlp_out=layer.ff)
    y = layer(Stream(h), shared, ops.residual_norm, ops).total(shared.text_length)
    results = found.results
    results |= {"y": y, "qkv": torch.cat([results[name] for name in "qkv"], dim=-1)}
    results |= zip("qkv", attention.heads(results["attn_in"], shared, ops), strict=True)
    weights = dict(zip(state, (layer.get_parameter(name) for name in names), strict=True))
    return results | _gradients(y, inputs["dy"], {"h": h, "emb": emb}, weights)


def rep_dit(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """RepVideo's transformer: input and output of every layer, and gradients."""
    read: list[Tensor] = []
    given: list[Tensor] = []
    model = load_transformer(sat_config(config), w, _recording(ops, read))
    n_text = inputs["context"].shape[1]
    for layer in model.transformer_blocks:
        layer.register_forward_hook(lambda *args: given.append(args[-1].total(n_text)))
    found = Recorded()
    found.outputs(emb=model.time_embedding)
    x, text = inputs["x"].requires_grad_(), inputs["context"].requires_grad_()
    y = model(x, text, inputs["timesteps"])
    results = found.results
    results |= {"y": y, "y_fp32": y}
    results["t_sincos"] = model.time_embedding.sinusoids(inputs["timesteps"])
    results |= {"layer_in": torch.stack(read), "layer_out": torch.stack(given)}
    weights = dict(model.named_parameters())
    return results | _gradients(y, inputs["dy"], {"x": x, "context": text}, weights)


def diffusers_dit(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """CogVideoX's transformer, with the rotations of the case if it has any."""
    sizes = ("run_latent_hw", "diffusers")  # of the case, not of the model
    options = {name: x for name, x in config.items() if name not in sizes}
    model = load_transformer(CogVideoXConfig.from_dict(options), w, ops)
    positions = None
    if "rope_cos" in inputs:
        positions = positions_of(inputs["rope_cos"], inputs["rope_sin"], model.config.axes)
    x, text = inputs["x"].requires_grad_(), inputs["context"].requires_grad_()
    y = model(x, text, inputs["timesteps"], ofs=inputs.get("ofs"), positions=positions)
    weights = dict(model.named_parameters())
    gradients = _gradients(y, inputs["dy"], {"x": x, "context": text}, weights, sat=False)
    return {"y": y} | gradients


def train_loss(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """The training loss for given timesteps and noise, and the gradients of its mean."""
    model = load_transformer(sat_config(config), w, ops)
    table = denoiser_table(shifted_alphas(config["shift_scale"])).to(inputs["latent"].device)
    noised = add_noise(inputs["latent"], inputs["noise"], inputs["idx"], table)
    step = training_step(model, noised, inputs["context"])
    results: Tensors = {"noised": noised.latents, "model_timesteps": noised.timestep.float()}
    results |= {"v": step.velocity, "loss": step.loss}
    weights = dict(model.named_parameters())
    return results | _gradients(step.loss.mean(), None, {}, weights)


def _gradients(
    y: Tensor,
    dy: Tensor | None,
    inputs: Tensors,
    weights: Mapping[str, Tensor],
    *,
    sat: bool = True,
) -> Tensors:
    """Gradients by their names in a case: ``g_`` for inputs and gates, ``gw.`` for weights."""
    leaves = [*inputs.values(), *weights.values()]
    grads = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
    named = dict(zip(weights, grads[len(inputs) :], strict=True))
    results: Tensors = {f"g_{name}": x for name, x in zip(inputs, grads, strict=False)}
    if GATES in named:
        results["g_gate"] = named[GATES]
    return results | {f"gw.{key}": x for key, x in (to_sat(named) if sat else named).items()}


class Recorded:
    """Records inputs and outputs of modules, by name."""

    def __init__(self) -> None:
        self.results: Tensors = {}

    def inputs(self, **modules: nn.Module) -> None:
        for name, module in modules.items():
            module.register_forward_pre_hook(partial(self._keep, name))

    def outputs(self, **modules: nn.Module) -> None:
        for name, module in modules.items():
            module.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _: nn.Module, args: tuple, output: Tensor | None = None) -> None:
        self.results[name] = args[0] if output is None else output


def _recording(ops: Ops, read: list[Tensor]) -> Ops:
    """``ops`` with a feature cache that adds the input of each layer to ``read``."""

    class Cache:
        def __init__(self, gates: Tensor, window: int) -> None:
            self.cache = ops.feature_cache(gates, window)

        def segment(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            h, a = self.cache.segment(*args, **options)
            read.append(h)
            return h, a

    return ops._replace(feature_cache=Cache)


def positions_of(cos: Tensor, sin: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The coordinates ``[N, 3]`` that given cosines and sines ``[N, head_dim]`` were computed from.

    The slowest frequency of an axis gives a first estimate, each faster one refines it.
    """
    columns = zip(cos.double().split(axes, -1), sin.double().split(axes, -1), strict=True)
    found = []
    for width, (c, s) in zip(axes, columns, strict=True):
        angle = torch.atan2(s, c)[:, ::2]
        frequency = ROPE_THETA ** (-torch.arange(0, width, 2, device=cos.device).double() / width)
        position = angle[:, -1] / frequency[-1]
        for k in reversed(range(width // 2 - 1)):
            turns = ((position * frequency[k] - angle[:, k]) / (2 * torch.pi)).round()
            position = (angle[:, k] + 2 * torch.pi * turns) / frequency[k]
        found.append(position)
    return torch.stack(found, dim=-1)


KINDS: dict[str, Callable[..., Tensors]] = {
    "block_sincos": block,
    "block_rope": block,
    "rep_dit_sincos": rep_dit,
    "rep_dit_rope": rep_dit,
    "diffusers_dit_sincos": diffusers_dit,
    "diffusers_dit_rope": diffusers_dit,
    "sat_train_loss": train_loss,
}
