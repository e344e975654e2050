"""The sizes of the two transformers, with the field names of the official config.json files.

The defaults are those of the released 2B models, with the flags that the released code sets when
it loads them. `weights` builds a model from such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from vidgen.common.config_fields import check_fields

PATCH = 2  # a token is a patch of 2 x 2 latents

Config = TypeVar("Config", "FluxConfig", "MMDiTConfig")


@dataclass(frozen=True)
class FluxConfig:
    """miniFLUX, `PyramidFluxTransformer`."""

    in_channels: int = 64  # of a patch: latent channels x 2 x 2
    num_layers: int = 8  # blocks with separate weights for text and video
    num_single_layers: int = 16  # blocks on text and video as one sequence
    attention_head_dim: int = 64
    num_attention_heads: int = 30
    joint_attention_dim: int = 4096  # T5 features
    pooled_projection_dim: int = 768  # CLIP features
    axes_dims_rope: tuple[int, ...] = (16, 24, 24)  # head dims rotated by time, row, column
    use_temporal_causal: bool = True
    use_gradient_checkpointing: bool = False
    gradient_checkpointing_ratio: float = 0.6

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.axes_dims_rope) != 3 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                "axes_dims_rope: expected three widths that sum to attention_head_dim "
                f"{self.attention_head_dim}, got {list(self.axes_dims_rope)}"
            )
        _check_channels(self.in_channels, PATCH * PATCH)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels // (PATCH * PATCH)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FluxConfig:
        """From the contents of a config.json; ValueError for an option that is not supported."""
        # The official model never reads interp_condition_pos; patch_size sizes its output only.
        return _from_dict(cls, config, unused=("interp_condition_pos",), fixed={"patch_size": 1})


@dataclass(frozen=True)
class MMDiTConfig:
    """The SD3-type model, `PyramidDiffusionMMDiT`."""

    in_channels: int = 16  # of the latent
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    sample_size: int = 128  # side, in latents, at which position embeddings have unit spacing
    pos_embed_max_size: int = 192  # tokens per side of the table
    use_temporal_causal: bool = True
    add_temp_pos_embed: bool = True  # queries and keys are rotated by time
    interp_condition_pos: bool = True  # smaller frames of history span the whole picture
    use_gradient_checkpointing: bool = False
    gradient_checkpointing_ratio: float = 0.6

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MMDiTConfig:
        """From the contents of a config.json; ValueError for an option that is not supported."""
        fixed = {
            "patch_size": PATCH,
            "qk_norm": "rms_norm",
            "pos_embed_type": "sincos",
            "temp_pos_embed_type": "rope",
        }
        # The official model never reads these: it uses the text mask whenever there is one.
        unused = "max_num_frames", "use_t5_mask"
        own = _from_dict(cls, config, unused=(*unused, "caption_projection_dim"), fixed=fixed)
        width = config.get("caption_projection_dim", own.width)
        if width != own.width:
            raise ValueError(f"caption_projection_dim: expected {own.width}, got {width!r}")
        return own


def is_flux(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of miniFLUX: only its positions have several rotary axes."""
    return "axes_dims_rope" in config


def causality(bidirectional: bool) -> dict[str, bool]:
    """The options of a config.json that decide whether frames see later ones."""
    return {"use_temporal_causal": not bidirectional, "use_flash_attn": False}


def _from_dict(
    cls: type[Config], config: Mapping[str, Any], unused: tuple[str, ...], fixed: dict[str, Any]
) -> Config:
    """Builds ``cls`` from its options; those in ``fixed`` must be absent or have that value.

    A config that asks for flash attention gives a model that is not causal: in the official code,
    flash attention runs without the mask.
    """
    names = {field.name for field in fields(cls)}
    unknown = config.keys() - names - fixed.keys() - {*unused, "use_flash_attn"}
    unknown = sorted(name for name in unknown if not name.startswith("_"))
    if unknown:
        raise ValueError(f"config: expected options of {cls.__name__}, got also {unknown}")
    for name, expected in fixed.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {config[name]!r}")
    options: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in config.items() if name in names
    }
    if config.get("use_flash_attn"):
        options["use_temporal_causal"] = False
    return cls(**options)


def _check_channels(n_channels: int, divisor: int) -> None:
    if n_channels % divisor:
        raise ValueError(f"in_channels: expected a multiple of {divisor}, got {n_channels}")
