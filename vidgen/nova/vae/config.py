"""Sizes of the causal video VAE, read from the official config.json file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vidgen.common.config_fields import check_fields

N_FRAME_STAGES = 2  # the encoder's first stages work on each frame by itself


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a `VideoVAE`, named as in config.json; the defaults are those of the released model.

    ``block_out_channels`` goes from the outermost stage to the innermost one, for the decoder too.
    All stages but the last one halve rows and columns; all but the last two halve frames.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # residual blocks to a stage of the encoder; the decoder has one more
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.block_out_channels) <= N_FRAME_STAGES:
            raise ValueError(
                f"block_out_channels: expected more than {N_FRAME_STAGES} stages, "
                f"got {self.block_out_channels}"
            )
        if any(c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(
                f"block_out_channels: expected multiples of norm_num_groups = "
                f"{self.norm_num_groups}, got {self.block_out_channels}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """From the contents of a config.json; missing keys have the released values.

        Raises:
            ValueError: an unknown key, or a value that we do not support.
        """
        sizes = {field.name for field in fields(cls)}
        own = cls(**{k: _tuple(x) for k, x in config.items() if k in sizes})
        n_stages = len(own.block_out_channels)
        n_clip_stages = n_stages - N_FRAME_STAGES
        fixed = FIXED | {
            "down_block_types": ("DownEncoderBlock2D",) * N_FRAME_STAGES
            + ("DownEncoderBlock3D",) * n_clip_stages,
            "up_block_types": ("UpDecoderBlock3D",) * n_stages,
        }
        for key, value in config.items():
            if key in sizes or key in IRRELEVANT:
                continue
            if key not in fixed:
                raise ValueError(f"config: {key} is not known, got {value!r}")
            if _tuple(value) != fixed[key]:
                raise ValueError(f"{key}: expected {fixed[key]!r}, got {value!r}")
        return own

    @property
    def spatial_factor(self) -> int:
        """Pixels to a latent, in rows and in columns."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames to a latent frame (after the first)."""
        return 2 ** (len(self.block_out_channels) - N_FRAME_STAGES)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


RELEASED = VAEConfig()

# Keys of config.json for which we support one value ...
FIXED = {
    "_class_name": "AutoencoderKLOpenSora",
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
# ... and keys that do not affect results.
IRRELEVANT = {"_diffusers_version", "_name_or_path", "force_upcast", "sample_size"}
