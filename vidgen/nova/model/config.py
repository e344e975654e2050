"""Sizes of NOVA, by the names of the official config.json files.

NOVA has three networks. The *video encoder* (width D, tokens of 2p x 2p latents) computes features
of the next frame from the frames so far. The *image encoder* (width D, tokens of p x p latents)
computes features of the tokens of that frame, set by set. The *denoising MLP* (width M) samples the
tokens of a set from their features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vidgen.common.config_fields import check_fields

HEADS = {768: 12, 1024: 16, 1536: 16}  # of the encoders, by width
SPATIAL_ATTENTION = ("masked", "set_causal")


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and x > 0


def _check_counts(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if not _is_count(x := getattr(config, name)):
            raise ValueError(f"{name}: expected a whole number above 0, got {x!r}")


@dataclass(frozen=True)
class Encoder:
    depth: int
    embed_dim: int
    num_heads: int
    encoder_depth: int = 0  # image encoder: the first layers, which read only visible tokens

    def __post_init__(self) -> None:
        _check_counts(self, ("depth", "embed_dim", "num_heads"))
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of {self.num_heads} heads, got {self.embed_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class Decoder:
    depth: int
    embed_dim: int

    def __post_init__(self) -> None:
        _check_counts(self, ("depth", "embed_dim"))


@dataclass(frozen=True)
class Arch:
    video_encoder: Encoder = Encoder(16, 1024, 16)
    image_encoder: Encoder = Encoder(32, 1024, 16, 16)
    image_decoder: Decoder = Decoder(3, 1280)

    @classmethod
    def from_names(cls, names: list[str] | tuple[str, ...]) -> Arch:
        """From names such as ``vit_d16w1024``, ``vit_d32w1024``, ``mlp_d3w1280``."""
        sizes = [re.fullmatch(r"(vit|mlp)_d(\d+)w(\d+)", name) for name in names]
        kinds = [size[1] for size in sizes if size]
        if len(names) != 3 or kinds != ["vit", "vit", "mlp"]:
            expected = "vit_d16w1024, vit_d32w1024, mlp_d3w1280 or other sizes"
            raise ValueError(f"arch: expected {expected}, got {list(names)}")
        video, image, decoder = ((int(size[2]), int(size[3])) for size in sizes if size)
        for _, width in (video, image):
            if width not in HEADS:
                raise ValueError(f"arch: expected a width of {sorted(HEADS)}, got {width}")
        return cls(
            Encoder(*video, HEADS[video[1]]),
            Encoder(*image, HEADS[image[1]], image[0] // 2),
            Decoder(*decoder),
        )

    @classmethod
    def from_dict(cls, arch: Mapping[str, Mapping[str, int]]) -> Arch:
        """From numbers by name, for sizes that were not released."""
        if missing := sorted({f.name for f in fields(cls)} - arch.keys()):
            raise ValueError(f"arch: expected all parts, got none for {', '.join(missing)}")
        video, image, decoder = (
            dict(arch[name]) for name in ("video_encoder", "image_encoder", "image_decoder")
        )
        decoder.pop("cond_dim", None)  # always the width of the encoders
        if "depth" in image:
            image.setdefault("encoder_depth", image["depth"] // 2)
        try:
            return cls(Encoder(**video), Encoder(**image), Decoder(**decoder))
        except TypeError as problem:
            expected = "expected depth and embed_dim of all parts, num_heads of encoders"
            raise ValueError(f"arch: {expected}, got {dict(arch)}") from problem


@dataclass(frozen=True)
class NovaConfig:
    """The defaults are those of the released text-to-video model, osp480."""

    image_dim: int = 4  # latent channels
    image_size: tuple[int, int] = (480, 768)  # pixels
    image_stride: int = 8  # pixels per latent
    text_token_dim: int | None = 2560  # of Phi-2; None: conditioned on classes, not on text
    text_token_len: int = 256
    image_base_size: tuple[int, int] | None = None  # tokens; None: computed from image_size
    video_base_size: tuple[int, int, int] = (16, 15, 24)  # frames and tokens of training
    video_mixer_rank: int | None = 24  # below 0: full rank; None: no mixer
    rotary_pos_embed: bool = False
    arch: Arch = field(default_factory=Arch)
    spatial_attention: str = "masked"  # as released; "set_causal": see set_causal.py

    def __post_init__(self) -> None:
        if self.spatial_attention not in SPATIAL_ATTENTION:
            expected = " or ".join(SPATIAL_ATTENTION)
            raise ValueError(
                f"spatial_attention: expected {expected}, got {self.spatial_attention!r}"
            )
        _check_counts(self, ("image_dim", "image_stride", "text_token_len"))
        for name, n in (("image_size", 2), ("video_base_size", 3)):
            sizes = getattr(self, name)
            if not isinstance(sizes, tuple) or len(sizes) != n or not all(map(_is_count, sizes)):
                raise ValueError(f"{name}: expected {n} whole numbers above 0, got {sizes!r}")
        check_fields(self, signed=["video_mixer_rank"])
        side = self.image_stride * self.video_patch
        if any(n % side for n in self.image_size):
            raise ValueError(
                f"image_size: expected multiples of {side}, got {list(self.image_size)}"
            )
        for name, given, grid in (
            ("image_base_size", self.image_base_size, self.image_grid),
            ("video_base_size", self.video_base_size[1:], self.video_grid),
        ):
            if given not in (None, grid):
                expected = f"{list(grid)} tokens for image_size {list(self.image_size)}"
                raise ValueError(f"{name}: expected {expected}, got {list(given)}")
        video, image = self.arch.video_encoder, self.arch.image_encoder
        if video.embed_dim != image.embed_dim:
            widths = f"{video.embed_dim} and {image.embed_dim}"
            raise ValueError(f"arch: expected encoders of one width, got {widths}")
        if self.width % 4:
            raise ValueError(f"embed_dim: expected a multiple of 4, got {self.width}")
        if not 0 <= image.encoder_depth < image.depth:
            raise ValueError(
                f"encoder_depth: expected 0 to {image.depth - 1}, got {image.encoder_depth}"
            )
        for encoder in (video, image) if self.rotary_pos_embed else ():
            if any(n % 2 or n < 2 for n in rotary_axes(encoder.head_dim)):
                raise ValueError(
                    f"rotary_pos_embed: expected a head dim with three even axes, as 64 and 96, "
                    f"got {encoder.head_dim} of {rotary_axes(encoder.head_dim)}"
                )

    @property
    def patch(self) -> int:
        """p: a token of the image encoder is p x p latents."""
        return 15 // self.image_stride + 1

    @property
    def video_patch(self) -> int:
        return 2 * self.patch

    @property
    def latent_size(self) -> tuple[int, int]:
        height, width = self.image_size
        return height // self.image_stride, width // self.image_stride

    @property
    def image_grid(self) -> tuple[int, int]:
        height, width = self.latent_size
        return height // self.patch, width // self.patch

    @property
    def video_grid(self) -> tuple[int, int]:
        height, width = self.latent_size
        return height // self.video_patch, width // self.video_patch

    @property
    def n_tokens(self) -> int:
        """N: tokens of a frame in the image encoder."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def n_video_tokens(self) -> int:
        """Nv: tokens of a frame in the video encoder."""
        return self.video_grid[0] * self.video_grid[1]

    @property
    def n_base_frames(self) -> int:
        """Tb: a clip of any length is given times from 0 to Tb."""
        return self.video_base_size[0]

    @property
    def has_motion(self) -> bool:
        return self.n_base_frames > 1

    @property
    def n_condition(self) -> int:
        """Lc: tokens of the text or class, and two tokens of motion for models of video."""
        return (self.text_token_len if self.text_token_dim else 1) + 2 * self.has_motion

    @property
    def width(self) -> int:
        """D."""
        return self.arch.image_encoder.embed_dim

    @property
    def token_dim(self) -> int:
        """Latent values in a token of the image encoder, p * p * C."""
        return self.patch * self.patch * self.image_dim

    def resized(self, height: int, width: int) -> NovaConfig:
        """The config for frames of another size in pixels; the same weights fit."""
        stride = self.image_stride * self.video_patch
        grid = height // stride, width // stride
        size = (self.n_base_frames, *grid)
        return replace(self, image_size=(height, width), image_base_size=None, video_base_size=size)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NovaConfig:
        """From the contents of a config.json. Raises ValueError for options we do not support."""
        names = {f.name for f in fields(cls)}
        unknown = sorted(n for n in config.keys() - names if not n.startswith("_"))
        if unknown:
            raise ValueError(f"config: expected options of {cls.__name__}, got also {unknown}")
        # what a file leaves out has the default of the official constructor, not osp480's value
        options: dict[str, Any] = {"video_mixer_rank": None, "text_token_dim": None}
        for name, x in config.items():
            if name in names:
                options[name] = tuple(x) if isinstance(x, list) else x
        arch = options.get("arch", Arch())
        if isinstance(arch, tuple):
            options["arch"] = Arch.from_names(arch)
        elif isinstance(arch, Mapping):
            options["arch"] = Arch.from_dict(arch)
        elif not isinstance(arch, Arch):
            raise ValueError(f"arch: expected names or sizes of three parts, got {arch!r}")
        if isinstance(options.get("image_size"), int):
            options["image_size"] = 2 * (options["image_size"],)
        return cls(**options)


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that are rotated by time, by row and by column."""
    time = head_dim // 8
    return time, (head_dim - time) // 2, (head_dim - time) // 2
