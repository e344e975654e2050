"""Sizes of the transformer, by the names in diffusers' config.json, and the released `PRESETS`.

The defaults are those of CogVideoX-2B, which RepVideo is trained from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vidgen.common.config_fields import check_fields

# Constants of the released code.
LAYER_NORM_EPS = 1e-5
QK_NORM_EPS = 1e-6
OUT_NORM_EPS = 1e-6  # of the output head in the SAT code, CogVideoX's and RepVideo's
DIFFUSERS_OUT_NORM_EPS = 1e-5
ROPE_THETA = 10000.0

# Options of a config.json that affect results, with the only value that we support.
FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "norm_eps": LAYER_NORM_EPS,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
}

COUNTS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "time_embed_dim",
    "text_embed_dim",
    "num_layers",
    "sample_width",
    "sample_height",
    "sample_frames",
    "patch_size",
    "temporal_compression_ratio",
    "max_text_seq_length",
    "window",
)


@dataclass(frozen=True)
class CogVideoXConfig:
    """CogVideoX, or RepVideo if it has gates."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None  # image-to-video models of 1.5 also embed an offset
    text_embed_dim: int = 4096
    num_layers: int = 30
    sample_width: int = 90  # in latents; with the next two, the size that it was trained on
    sample_height: int = 60
    sample_frames: int = 49  # in frames of the video
    patch_size: int = 2
    patch_size_t: int | None = None  # latent frames in a patch of 1.5; None: one, by a convolution
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    patch_bias: bool = True  # of the convolution
    gates: bool = False  # RepVideo: a learnable gate for each layer
    fixed_gate: float | None = None  # RepVideo's cache with one constant gate for all layers
    window: int = 6  # the most layer outputs that the cache averages
    out_norm_eps: float = OUT_NORM_EPS

    def __post_init__(self) -> None:
        for name in COUNTS:
            x = getattr(self, name)
            if not isinstance(x, int) or x < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {x!r}")
        check_fields(self)
        name, size = "width, num_attention_heads * attention_head_dim", self.width
        if self.use_rotary_positional_embeddings:
            name, size = "attention_head_dim", self.attention_head_dim
        if size % 16:
            raise ValueError(f"{name}: expected a multiple of 16, got {size}")
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise ValueError(
                f"ofs_embed_dim: expected time_embed_dim {self.time_embed_dim}, which it is added "
                f"to, got {self.ofs_embed_dim}"
            )
        if self.gates and self.fixed_gate is not None:
            raise ValueError(f"fixed_gate: expected None beside gates, got {self.fixed_gate}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def sample_latent_frames(self) -> int:
        return (self.sample_frames - 1) // self.temporal_compression_ratio + 1

    @property
    def axes(self) -> tuple[int, ...]:
        """Channels of a head that are rotated by time, row and column; () without rotation."""
        if not self.use_rotary_positional_embeddings:
            return ()
        eighth = self.attention_head_dim // 8
        return 2 * eighth, 3 * eighth, 3 * eighth

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CogVideoXConfig:
        """From the contents of a config.json. Raises ValueError for options we do not support.

        ``out_norm_eps`` has diffusers' value unless the file names it, which diffusers' do not.
        """
        names = {field.name for field in fields(cls)}
        unknown = config.keys() - names - FIXED.keys()
        unknown = sorted(name for name in unknown if not name.startswith("_"))
        if unknown:
            raise ValueError(f"config: expected options of {cls.__name__}, got also {unknown}")
        for name, expected in FIXED.items():
            if config.get(name, expected) != expected:
                raise ValueError(f"{name}: expected {expected!r}, got {config[name]!r}")
        options = {name: x for name, x in config.items() if name in names}
        return cls(**{"out_norm_eps": DIFFUSERS_OUT_NORM_EPS, **options})

    def to_dict(self) -> dict[str, Any]:
        """For a config.json that `from_dict` and diffusers read; diffusers ignores our options."""
        return {"_class_name": "CogVideoXTransformer3DModel", **FIXED, **asdict(self)}


PRESETS = {
    "2b": CogVideoXConfig(),
    "5b": CogVideoXConfig(
        num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
    ),
    "1.5-5b": CogVideoXConfig(
        num_attention_heads=48,
        num_layers=42,
        sample_width=300,
        sample_height=300,
        sample_frames=81,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    ),
}
