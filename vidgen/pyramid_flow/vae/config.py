"""The sizes of the causal video VAE, with the field names of the official config.json files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vidgen.common.config_fields import check_fields


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of a `CausalVideoVAE`, with the official names and defaults.

    Channels are listed from the outermost level to the innermost, for the decoder too. The
    decoder's other lists go from the innermost to the outermost.

    Raises:
        ValueError: lists of different lengths, or values that do not fit each other.
    """

    encoder_in_channels: int = 3
    encoder_out_channels: int = 4
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_spatial_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_temporal_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_norm_num_groups: int = 32
    decoder_in_channels: int = 4
    decoder_out_channels: int = 3
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_spatial_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_temporal_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_norm_num_groups: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        for side, spatial, temporal in (
            ("encoder", "spatial_down_sample", "temporal_down_sample"),
            ("decoder", "spatial_up_sample", "temporal_up_sample"),
        ):
            names = ("block_out_channels", "layers_per_block", spatial, temporal)
            counts = {f"{side}_{name}": len(getattr(self, f"{side}_{name}")) for name in names}
            if len(set(counts.values())) != 1:
                raise ValueError(f"levels: expected as many entries in each, got {counts}")
            groups = getattr(self, f"{side}_norm_num_groups")
            channels = getattr(self, f"{side}_block_out_channels")
            if any(c % groups for c in channels):
                raise ValueError(
                    f"{side}_block_out_channels: expected multiples of {side}_norm_num_groups "
                    f"= {groups}, got {channels}"
                )
        if self.decoder_in_channels != self.encoder_out_channels:
            raise ValueError(
                "decoder_in_channels: expected encoder_out_channels = "
                f"{self.encoder_out_channels}, got {self.decoder_in_channels}"
            )
        up = sum(self.decoder_spatial_up_sample), sum(self.decoder_temporal_up_sample)
        down = sum(self.encoder_spatial_down_sample), sum(self.encoder_temporal_down_sample)
        if up != down:
            raise ValueError(
                "decoder_spatial_up_sample, decoder_temporal_up_sample: expected as many levels "
                f"as the encoder halves, {down}, got {up}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """From the contents of a config.json; missing keys have the official defaults.

        Raises:
            ValueError: an unknown key, or a value that is not supported. The released models have
                neither.
        """
        sizes = {field.name for field in fields(cls)}
        for key, value in config.items():
            if key in sizes or key in IRRELEVANT:
                continue
            if key not in FIXED:
                raise ValueError(f"config: {key} is not known, got {value!r}")
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(x != FIXED[key] for x in values):
                raise ValueError(f"{key}: expected {FIXED[key]!r}, got {value!r}")
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config.items()
            if key in sizes
        }
        own = cls(**given)
        factor = config.get("downsample_scale", own.spatial_factor)
        if factor != own.spatial_factor:
            raise ValueError(
                f"downsample_scale: expected {own.spatial_factor}, the pixels to a latent that "
                f"encoder_spatial_down_sample says, got {factor}"
            )
        return own

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in rows and in columns."""
        return 2 ** sum(self.encoder_spatial_down_sample)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.encoder_temporal_down_sample)


RELEASED = VAEConfig(encoder_out_channels=16, decoder_in_channels=16)

# Keys of config.json that are supported with one value only, which may be repeated in a list.
FIXED = {
    "_class_name": "CausalVideoVAE",
    "add_post_quant_conv": True,
    "decoder_act_fn": "silu",
    "decoder_block_dropout": 0.0,
    "decoder_type": "causal_vae_conv",
    "decoder_up_block_types": "UpDecoderBlockCausal3D",
    "encoder_act_fn": "silu",
    "encoder_block_dropout": 0.0,
    "encoder_double_z": True,
    "encoder_down_block_types": "DownEncoderBlockCausal3D",
    "encoder_type": "causal_vae_conv",
    "interpolate": False,
}
# Keys that change nothing: latents are normalised by `latents.normalize_latents`, the size of tiles
# is an argument, and `from_dict` checks that `downsample_scale` fits the levels.
IRRELEVANT = {
    "_diffusers_version",
    "_name_or_path",
    "downsample_scale",
    "sample_size",
    "scaling_factor",
}
