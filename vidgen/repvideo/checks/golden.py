"""Golden cases of RepVideo: the feature cache, and `KINDS` for `vidgen verify`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidgen.ops import EAGER, Modulation, Ops

from . import golden_models, golden_sampling

Tensors = dict[str, Tensor]


def mix_chain(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """The feature cache over all layers, where layer i adds ``delta[i]``."""
    gates = w["transformer.learnable_gating"].requires_grad_()
    h0, delta = inputs["h0"].requires_grad_(), inputs["delta"].requires_grad_()
    h, y = _chain(ops, gates, config["window"], h0, delta)
    upstream = [*inputs["dh"], inputs["dfinal"]]
    leaves = h0, delta, gates  # gates of layers with one output in the window are unused
    grads = torch.autograd.grad([*h, y[-1]], leaves, upstream, materialize_grads=True)
    results = {"h": torch.stack(h), "y": torch.stack(y), "final": y[-1]}
    results |= zip(("g_h0", "g_delta", "g_gate"), grads, strict=True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        # rounded as in the official code, bit for bit
        low = (x.detach().to(dtype) for x in (h0, delta))
        h, _ = _chain(EAGER, gates.detach().to(dtype), config["window"], *low)
        results[f"{name}.h"] = torch.stack(h)
    return results


def _chain(
    ops: Ops, gates: Tensor, window: int, h0: Tensor, delta: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    cache = ops.feature_cache(gates, window)
    h, y = [], []
    for layer, increment in enumerate(delta):
        h.append(cache(layer, y[-1] if y else h0))
        y.append(h[-1] + increment)
    return h, y


def segment(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """Gated residual, feature cache, norm and modulation, for several numbers of outputs."""
    results = {}
    for n in config["ns"]:
        prefix = f"n{n}."
        given = {k.removeprefix(prefix): x for k, x in inputs.items() if k.startswith(prefix)}
        upstream = given.pop("dh"), given.pop("da")
        leaves = {name: x.requires_grad_() for name, x in given.items()}
        older = leaves["cache"].unbind() if n > 1 else ()
        h, a, total, y = ops.segment(
            leaves["x"],
            leaves["m"],
            None,
            leaves["g"],
            n,
            older=older,
            gate=leaves["gate_img"],
            scale=leaves["scale_img"],
            shift=leaves["shift_img"],
            text=Modulation(*(leaves[f"{part}_txt"] for part in Modulation._fields)),
            text_length=config["text_len"],
            weight=leaves["ln_w"],
            bias=leaves["ln_b"],
            eps=config["eps"],
        )
        mean = torch.stack([*older, y]).mean(dim=0) if total is None else total / n
        grads = torch.autograd.grad((h, a), list(leaves.values()), upstream, materialize_grads=True)
        found = {"y": y, "h": h, "a": a, "mean": mean}
        found |= zip((f"g_{name}" for name in leaves), grads, strict=True)
        results |= {prefix + name: x for name, x in found.items()}
    return results


KINDS: dict[str, Callable[..., Any]] = {
    **golden_models.KINDS,
    **golden_sampling.KINDS,
    "mix_chain": mix_chain,
    "segment": segment,
}
