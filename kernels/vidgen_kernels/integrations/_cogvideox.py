"""The fused forward pass of diffusers' CogVideoXBlock and of its attention.

    a    = LN(h) * (1 + scale1) + shift1              text and video with vectors of their own
    q, k = RoPE(LN(q)), RoPE(LN(k))                   text is not rotated
    h    = h + gate1 * attention(a)
    m    = LN(h) * (1 + scale2) + shift2
    y    = h + gate2 * MLP(m)

Parameters stay in the modules of diffusers. Linear layers and the MLP are called as modules, so
adapters, quantisation and casting hooks work; of norms only weight, bias and eps are read.

diffusers passes video and text between modules as two tensors. Here both are views of one joint
tensor, which an attribute of the video view refers to. So `join` copies only if other code has
replaced one of the views.

With gates (RepVideo, 2501.08994) a block leaves the residual after its MLP to the next block, which
fuses it with the feature cache and its first norm. A `Pending` then takes the place of the text.

Legend: B batch, N tokens (L of text first), D hidden size.
"""

from typing import Any, NamedTuple
from weakref import ref

import torch
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import Tensor, nn

from ..attention.interval_attention import interval_attention
from ..attention.intervals import IntervalMask
from ..attention.mask_inputs import require
from ..common.front_door import is_traced
from ..norms.arguments import Modulation
from ..norms.feature_cache import FeatureCache
from ..norms.residual_norm import residual_norm, run
from ..rope.qk_norm_rope import QKVStream, qk_norm_rope

# Hooks of diffusers that move or cast weights and leave the numbers as they are.
HARMLESS_HOOKS = ("diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")


def split(joint: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
    """Video and text as views of [B, N, D]; `join` undoes it without a copy."""
    text, video = joint[:, :text_length], joint[:, text_length:]
    video._vidgen_joint = (text, joint)  # pyright: ignore[reportAttributeAccessIssue]
    return video, text


def join(video: Tensor, text: Tensor) -> Tensor:
    """[B, N, D], text first."""
    remembered = getattr(video, "_vidgen_joint", None)
    if remembered is not None and remembered[0] is text:
        joint = remembered[1]
        if torch.compiler.is_compiling() or (
            text.shape[1] + video.shape[1] == joint.shape[1]
            and _is_part(text, joint, 0)
            and _is_part(video, joint, text.shape[1])
        ):
            return joint
    return torch.cat([text, video], dim=1)


def _is_part(x: Tensor, joint: Tensor, first: int) -> bool:
    """Whether ``x`` is a view of ``joint`` from token ``first`` on; not after ``x.data = ...``."""
    return (
        x.untyped_storage()._cdata == joint.untyped_storage()._cdata
        and x.storage_offset() == joint.storage_offset() + first * joint.stride(1)
        and x.stride() == joint.stride()
        and (x.shape[0], x.shape[2]) == (joint.shape[0], joint.shape[2])
    )


class RotaryAngles:
    """Angles [T, D / 2] of tables of cosines and sines, cached for the next layer and step."""

    def __init__(self) -> None:
        # tables, their versions and the device, angles
        self._last: tuple[tuple[ref, ref], tuple, Tensor] | None = None

    def __call__(self, tables: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
        """``tables``: cos and sin [T, D], each value for two neighbouring columns. [T, D / 2]."""
        cos, sin = tables
        if is_traced():
            return _angles(cos, sin, like)
        state = _version(cos), _version(sin), like.device
        if self._last is not None:
            (last_cos, last_sin), last_state, angles = self._last
            if last_cos() is cos and last_sin() is sin and last_state == state:
                return angles
        with torch.inference_mode(False), torch.no_grad():  # the cache must serve training
            angles = _angles(cos, sin, like)
        self._last = (ref(cos), ref(sin)), state, angles
        return angles

    def __reduce__(self) -> tuple:
        """Copies and pickles begin with nothing kept."""
        return RotaryAngles, ()


def _version(x: Tensor) -> int | None:
    """Changes when x is written to; None for inference tensors, which have no version."""
    return None if x.is_inference() else x._version


def _angles(cos: Tensor, sin: Tensor, like: Tensor) -> Tensor:
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] % 2:
        got = f"{list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(f"image_rotary_emb: expected cos and sin of one shape [T, D], got {got}")
    cos, sin = cos.to(like.device, torch.float64), sin.to(like.device, torch.float64)
    (a, b), (c, d) = (x.unflatten(-1, (-1, 2)).unbind(-1) for x in (cos, sin))
    # tables in bf16 miss the unit circle by up to 0.008
    is_rotation = ((a == b) & (c == d) & ((a * a + c * c - 1).abs() < 0.01)).all()
    require(is_rotation, "image_rotary_emb: expected rotations of neighbouring columns, got others")
    return torch.atan2(c, a)


class FusedProcessor:
    """CogVideoX's attention for ``set_attn_processor``: norm, rotation and layout in one pass.

    Args:
        angles: shared by the layers of a model.
        fused: read ``attn.to_qkv`` instead of ``to_q``, ``to_k`` and ``to_v``, as the processor
            that diffusers' ``fuse_qkv_projections`` puts in does.
    """

    def __init__(self, angles: RotaryAngles, fused: bool) -> None:
        self.angles, self.fused = angles, fused

    def __call__(
        self,
        attn: Any,  # Attention of diffusers
        hidden_states: Tensor,  # [B, N - L, D]
        encoder_hidden_states: Tensor,  # [B, L, D]
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, as CogVideoX has it, got a tensor")
        x = join(hidden_states, encoder_hidden_states)
        text_length = encoder_hidden_states.shape[1]
        projections = attn.to_qkv(x) if self.fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        positions, axes = None, ()
        if image_rotary_emb is not None:
            positions = self.angles(image_rotary_emb, x)
            axes = (2,) * positions.shape[-1]  # an axis for each pair: its position is the angle
        q_weight, q_bias, eps = affine(attn.norm_q)
        k_weight, k_bias, _ = affine(attn.norm_k)
        q, k, v = qk_norm_rope(
            QKVStream(projections, q_weight, k_weight, q_bias, k_bias),
            positions,
            axes,
            n_heads=attn.heads,
            text_length=0 if positions is None else text_length,
            norm=None if attn.norm_q is None else "layer",
            eps=eps,
        )
        out = interval_attention(q, k, v, _full_mask(x))
        assert isinstance(out, Tensor)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return split(out, text_length)


def _full_mask(x: Tensor) -> IntervalMask:
    """All tokens of ``x`` [B, N, D] see all."""
    lengths = [x.shape[1]]
    if torch.compiler.is_compiling():  # avoids a host-to-device copy in the graph
        lengths = torch.full((1,), x.shape[1], device=x.device)
    return IntervalMask.full(lengths, lengths, device=x.device)


class Pending(NamedTuple):
    """The residual ``y = x + gate * f`` that a block leaves to the next; replaces the text."""

    f: Tensor | None  # [B, N, D]; None: x is y
    gate: Tensor | None  # [B, D], of video
    text_gate: Tensor | None
    text_length: int


class Plan:
    """What the blocks of one model share."""

    def __init__(
        self, transformer: CogVideoXTransformer3DModel, cache: FeatureCache | None
    ) -> None:
        self.transformer, self.cache = transformer, cache


class FusedBlock:
    """Replaces ``block.forward``; without a feature cache the signature is the same."""

    def __init__(self, block: Any, layer: int, plan: Plan) -> None:
        self.block, self.layer, self.plan = block, layer, plan
        self.name = f"transformer_blocks.{layer}"
        self.is_last = layer + 1 == len(plan.transformer.transformer_blocks)

    def forward(
        self,
        hidden_states: Tensor,  # [B, N - L, D]; after the first of gated blocks [B, N, D]
        encoder_hidden_states: Tensor | Pending,  # [B, L, D]
        temb: Tensor,  # [B, time embedding]
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | Pending]:
        block = self.block
        if isinstance(encoder_hidden_states, Pending):
            x, before = hidden_states, encoder_hidden_states
        else:
            x = join(hidden_states, encoder_hidden_states)
            before = Pending(None, None, None, encoder_hidden_states.shape[1])
        check_norms(block, self.name)
        video, text = _modulations(block.norm1, temb)
        h, a = self._enter(x, before, video, text)
        parts = split(a, before.text_length)
        out = block.attn1(
            hidden_states=parts[0],
            encoder_hidden_states=parts[1],
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )
        own, of_text = _modulations(block.norm2, temb)
        h, m = residual_norm(
            h,
            join(*out),
            gate=video.gate,
            scale=own.scale,
            shift=own.shift,
            text=of_text._replace(gate=text.gate),
            text_length=before.text_length,
            **_norm_options(block.norm2),
        )
        after = Pending(block.ff(m), own.gate, of_text.gate, before.text_length)
        if self.plan.cache is None or self.layer + 1 == len(
            self.plan.transformer.transformer_blocks
        ):
            return split(_residual(h, after), before.text_length)
        if torch.is_grad_enabled() and self.plan.transformer.gradient_checkpointing:
            # so that a checkpoint saves only y of a block
            return _residual(h, after), Pending(None, None, None, before.text_length)
        return h, after

    def _enter(
        self, x: Tensor, before: Pending, video: Modulation, text: Modulation
    ) -> tuple[Tensor, Tensor]:
        """The block's input and its norm, modulated; through the feature cache if there is one."""
        options = {
            "gate": before.gate,
            "scale": video.scale,
            "shift": video.shift,
            "text": text._replace(gate=before.text_gate),
            "text_length": before.text_length,
            **_norm_options(self.block.norm1),
        }
        if self.plan.cache is None:
            return residual_norm(x, before.f, **options)
        if self.layer == 0:
            refuse_caches(self.plan.transformer)
        return self.plan.cache.segment(self.layer, x, before.f, **options)


def refuse_caches(transformer: CogVideoXTransformer3DModel) -> None:
    """ValueError for hooks that skip blocks or change their outputs: the cache would not see it."""
    expected = "expected no block cache and no hook on blocks with gates"
    if transformer.is_cache_enabled:
        got = type(transformer._cache_config).__name__
        raise ValueError(f"transformer: {expected}, got {got}: call transformer.disable_cache()")
    if torch.compiler.is_compiling():
        return
    for i, block in enumerate(transformer.transformer_blocks):
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for hook in getattr(block, kind).values():
                got = f"{kind.strip('_').removesuffix('s')} {getattr(hook, '__name__', hook)}"
                raise ValueError(f"transformer_blocks.{i}: {expected}, got {got}")
    for name, module in transformer.named_modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if type(hook).__module__ not in HARMLESS_HOOKS:
                raise ValueError(f"{name or 'transformer'}: {expected}, got {type(hook).__name__}")


def affine(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps of a LayerNorm; for None (None, None, 1e-6)."""
    if norm is None:
        return None, None, 1e-6
    assert isinstance(norm, nn.LayerNorm)  # `check_norms`
    return norm.weight, norm.bias, norm.eps


def check_norms(block: Any, name: str) -> None:
    """ValueError if a norm is of another class or has a hook: norms are read here, not called.

    Called at acceleration and at every forward, because norms and hooks may change in between.
    """
    for n in ("norm1", "norm2"):
        if not isinstance(norm := getattr(block, n), CogVideoXLayerNormZero):
            got = type(norm).__name__
            raise ValueError(f"{name}.{n}: expected a CogVideoXLayerNormZero, got {got}")
    norms = {"norm1.norm": block.norm1.norm, "norm2.norm": block.norm2.norm}
    norms |= {"attn1.norm_q": block.attn1.norm_q, "attn1.norm_k": block.attn1.norm_k}
    for n, norm in norms.items():
        if norm is None:
            continue
        if not isinstance(norm, nn.LayerNorm):
            raise ValueError(f"{name}.{n}: expected a LayerNorm, got {type(norm).__name__}")
        if torch.compiler.is_compiling():
            continue
        hooks = getattr(getattr(norm, "_diffusers_hook", None), "hooks", {})
        if hooks or hasattr(norm, "_hf_hook"):
            raise ValueError(
                f"{name}.{n}: expected no hook on a norm, whose weight is read, got one: "
                "offload models or blocks, not leaf modules"
            )


def _norm_options(norm: CogVideoXLayerNormZero) -> dict[str, Any]:
    weight, bias, eps = affine(norm.norm)
    return {"weight": weight, "bias": bias, "eps": eps}


def _modulations(norm: CogVideoXLayerNormZero, temb: Tensor) -> tuple[Modulation, Modulation]:
    """Modulations of video and of text; views [B, D] of one projection."""
    vectors = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    shift, scale, gate, text_shift, text_scale, text_gate = vectors
    return Modulation(gate, scale, shift), Modulation(text_gate, text_scale, text_shift)


def _residual(x: Tensor, pending: Pending) -> Tensor:
    """``y = x + gate * f`` [B, N, D]."""
    video, text = Modulation(pending.gate), Modulation(pending.text_gate)
    return run(x, pending.f, video, text, pending.text_length)[0]
