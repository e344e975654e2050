"""Names of the weights in checkpoints of SwissArmyTransformer (SAT) and of diffusers.

Our modules have the names of diffusers; RepVideo's gates are `GATES`.

    SAT                                             diffusers
    mixins.patch_embed.*                            patch_embed.*
    time_embed.0, .2                                time_embedding.linear_1, linear_2
    transformer.learnable_gating                    learnable_gating
    transformer.layers.i
        .input_layernorm                            transformer_blocks.i.norm1.norm
        .attention.query_key_value                  transformer_blocks.i.attn1.to_q, to_k, to_v
        .attention.dense                            transformer_blocks.i.attn1.to_out.0
        .post_attention_layernorm                   transformer_blocks.i.norm2.norm
        .mlp.dense_h_to_4h, dense_4h_to_h           transformer_blocks.i.ff.net.0.proj, net.2
    mixins.adaln_layer
        .query_layernorm_list.i, key_...            transformer_blocks.i.attn1.norm_q, norm_k
        .adaLN_modulations.i.1                      transformer_blocks.i.norm1.linear, norm2.linear
    transformer.final_layernorm                     norm_final
    mixins.final_layer.norm_final                   norm_out.norm
    mixins.final_layer.adaLN_modulation.1           norm_out.linear
    mixins.final_layer.linear                       proj_out

The rows of ``query_key_value`` are those of q, then k, then v. The rows of ``adaLN_modulations``
are shift, scale and gate of attention, then of the feed-forward, for the video, then the same six
for the text. diffusers has one tensor with the six of attention (``norm1``) and one with the six of
the feed-forward (``norm2``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

GATES = "learnable_gating"
SAT_GATES = f"transformer.{GATES}"
SAT_PREFIX = "model.diffusion_model."

# Not weights: tables computed from sizes, and a tensor that is never read.
SAT_TABLE = "mixins.pos_embed.pos_embedding"
SAT_UNUSED = (
    "mixins.pos_embed.freqs_cos",
    "mixins.pos_embed.freqs_sin",
    "transformer.position_embeddings.weight",
)

# SAT's name: diffusers' name. {i} stands for the layer, {p} for weight or bias.
NAMES = {
    "mixins.patch_embed.proj.{p}": "patch_embed.proj.{p}",
    "mixins.patch_embed.text_proj.{p}": "patch_embed.text_proj.{p}",
    "time_embed.0.{p}": "time_embedding.linear_1.{p}",
    "time_embed.2.{p}": "time_embedding.linear_2.{p}",
    "ofs_embed.0.{p}": "ofs_embedding.linear_1.{p}",
    "ofs_embed.2.{p}": "ofs_embedding.linear_2.{p}",
    "transformer.layers.{i}.input_layernorm.{p}": "transformer_blocks.{i}.norm1.norm.{p}",
    "transformer.layers.{i}.post_attention_layernorm.{p}": "transformer_blocks.{i}.norm2.norm.{p}",
    "transformer.layers.{i}.attention.dense.{p}": "transformer_blocks.{i}.attn1.to_out.0.{p}",
    "mixins.adaln_layer.query_layernorm_list.{i}.{p}": "transformer_blocks.{i}.attn1.norm_q.{p}",
    "mixins.adaln_layer.key_layernorm_list.{i}.{p}": "transformer_blocks.{i}.attn1.norm_k.{p}",
    "transformer.layers.{i}.mlp.dense_h_to_4h.{p}": "transformer_blocks.{i}.ff.net.0.proj.{p}",
    "transformer.layers.{i}.mlp.dense_4h_to_h.{p}": "transformer_blocks.{i}.ff.net.2.{p}",
    "transformer.final_layernorm.{p}": "norm_final.{p}",
    "mixins.final_layer.norm_final.{p}": "norm_out.norm.{p}",
    "mixins.final_layer.adaLN_modulation.1.{p}": "norm_out.linear.{p}",
    "mixins.final_layer.linear.{p}": "proj_out.{p}",
}
SAT_QKV = "transformer.layers.{i}.attention.query_key_value.{p}"
QKV = tuple(f"transformer_blocks.{{i}}.attn1.to_{x}.{{p}}" for x in "qkv")
SAT_MODULATION = "mixins.adaln_layer.adaLN_modulations.{i}.1.{p}"
MODULATION = tuple(f"transformer_blocks.{{i}}.norm{n}.linear.{{p}}" for n in (1, 2))
# the numbers of SAT's 12 vectors that each of diffusers' two tensors has
VECTORS = ((0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11))
ORDER = torch.tensor(VECTORS).flatten().argsort().tolist()


class _Rule(NamedTuple):
    sat: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]


def _split_vectors(x: Tensor) -> list[Tensor]:
    vectors = x.chunk(12)
    return [torch.cat([vectors[j] for j in half]) for half in VECTORS]


def _join_vectors(halves: list[Tensor]) -> Tensor:
    vectors = [vector for half in halves for vector in half.chunk(6)]
    return torch.cat([vectors[j] for j in ORDER])


RULES = [
    *(
        _Rule(sat, (name,), lambda x: [x], lambda parts: parts[0])
        for sat, name in {**NAMES, SAT_GATES: GATES}.items()
    ),
    _Rule(SAT_QKV, QKV, lambda x: list(x.chunk(3)), torch.cat),
    _Rule(SAT_MODULATION, MODULATION, _split_vectors, _join_vectors),
]
FROM_SAT = {rule.sat: rule for rule in RULES}
FROM_OURS = {name: rule for rule in RULES for name in rule.ours}
LAYER = re.compile(r"\b(layers|\w+_list|adaLN_modulations|transformer_blocks)\.(\d+)\.")


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames from SAT's names, without prefix, to ours; other names stay."""
    found = {}
    for key, x in state.items():
        form, place = _form(key)
        rule = FROM_SAT.get(form)
        if rule is None:
            found[key] = x
        else:
            names = (name.format(**place) for name in rule.ours)
            found |= zip(names, rule.split(x), strict=True)
    return found


def to_sat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames from our names to SAT's, without prefix; other names stay.

    Raises:
        ValueError: a missing part of what is one tensor in SAT.
    """
    found = {}
    for key, x in state.items():
        form, place = _form(key)
        rule = FROM_OURS.get(form)
        if rule is None:
            found[key] = x
        elif (name := rule.sat.format(**place)) not in found:
            parts = [part.format(**place) for part in rule.ours]
            if absent := [part for part in parts if part not in state]:
                raise ValueError(f"checkpoint: expected {', '.join(parts)}, got no {absent[0]}")
            found[name] = rule.join([state[part] for part in parts])
    return found


def _form(key: str) -> tuple[str, dict[str, str]]:
    """The key with {i} and {p} in place of layer and weight or bias, and the values of these."""
    place = {}
    if layer := LAYER.search(key):
        place["i"] = layer[2]
        key = LAYER.sub(r"\1.{i}.", key)
    stem, _, last = key.rpartition(".")
    if last in ("weight", "bias"):
        place["p"] = last
        key = f"{stem}.{{p}}"
    return key, place
