"""Frames to and from files: videos through PyAV, images through Pillow."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_new, written_whole
from .finite import HINT, is_finite

if TYPE_CHECKING:
    import PIL.Image

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".mkv", ".mov")


def to_uint8(video: Tensor, *, rounded: bool = True, first: int = 0) -> Tensor:
    """Frames ``[..., T, H, W, 3]`` uint8 from a video ``[..., 3, T, H, W]`` in [-1, 1].

    ``127.5 * video + 127.5``, clamped, and rounded; with ``rounded=False`` its fraction is cut off,
    as in the released code of Pyramid Flow and NOVA.

    Args:
        first: how many frames came before these ones, for the error.

    Raises:
        ValueError: NaN or infinity, which would become black or any other pixels.
    """
    if not is_finite(video):
        finite = video.movedim(-3, 0).flatten(1).isfinite().all(dim=1)
        n = first + 1 + finite.tolist().index(False)
        what = f"expected finite numbers from the VAE, got NaN or infinity from frame {n} on"
        raise ValueError(f"frames: {what}; {HINT}")
    x = video.to(torch.promote_types(video.dtype, torch.float32))
    pixels = (x * 127.5).add_(127.5).clamp_(0, 255).movedim(-4, -1)
    pixels = pixels.round() if rounded else pixels
    return pixels.to(torch.uint8, memory_format=torch.contiguous_format)


def from_uint8(frames: Tensor) -> Tensor:
    """A video ``[3, T, H, W]`` fp32 in [-1, 1] from frames ``[T, H, W, 3]`` uint8."""
    return frames.permute(3, 0, 1, 2).float().div(127.5).sub(1)


def fit(frames: Tensor, height: int, width: int) -> Tensor:
    """Resizes frames ``[T, h, w, 3]`` uint8 to cover the given size, and cuts out the centre.

    Returns a video ``[3, T, height, width]``, fp32 in [-1, 1].
    """
    video = from_uint8(frames).transpose(0, 1)  # [T, 3, h, w]
    h, w = video.shape[-2:]
    if (h, w) != (height, width):
        scale = max(height / h, width / w)
        size = max(round(h * scale), height), max(round(w * scale), width)
        video = F.interpolate(video, size, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        video = video[:, :, top : top + height, left : left + width]
    return video.transpose(0, 1)


def read_frames(path: str | Path, *, first: int | None = None, most: int | None = None) -> Tensor:
    """The frames of a video or image file as a player shows them, ``[T, H, W, 3]`` uint8 sRGB.

    Frames are decoded one by one: orientation (EXIF, display matrix), colour matrix, range and ICC
    profile of the file are applied.

    Args:
        first: stop after so many frames.
        most: the most frames that the caller has a use for.

    Raises:
        ValueError: no file, nothing to see in it, or more than ``most`` frames.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"input: expected a video or image file, {path} does not exist")
    frames = []
    for frame in islice(_still(path) or _decoded(path), first):
        frames.append(torch.from_numpy(np.ascontiguousarray(frame)))
        if most is not None and len(frames) > most:
            raise ValueError(f"input: expected at most {most} frames in {path}, got more")
    if not frames:
        raise ValueError(f"input: expected frames in {path}, found none")
    return torch.stack(frames)


def _still(path: Path) -> Iterator[np.ndarray] | None:
    """The one frame of an image file, by Pillow; None for what is no image, or is animated."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.suffix.lower() not in IMAGES:
        return None
    try:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False):
                return None
            return iter([_srgb(ImageOps.exif_transpose(image))])
    except (OSError, SyntaxError, UnidentifiedImageError) as problem:  # a broken PNG: SyntaxError
        raise ValueError(f"input: expected a video or image in {path}: {problem}") from problem


def _srgb(image: PIL.Image.Image) -> np.ndarray:
    """[H, W, 3] uint8; colours of a profile are converted, without one they are sRGB already."""
    from PIL import ImageCms

    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 255
        image = image.point(lambda level: level / 257.0).convert("L")
    profile = image.info.get("icc_profile")
    if profile and image.mode != "P":
        try:
            colours = image.convert("RGB") if image.mode in ("RGBA", "LA") else image
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(colours, given, srgb, outputMode="RGB") or image
        except (OSError, ImageCms.PyCMSError):
            pass  # a profile that cannot be read, or of other channels: as viewers do, none
    return np.array(image.convert("RGB"))


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, by FFmpeg."""
    import av
    from av.video.reformatter import ColorRange

    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                picture = frame.reformat(
                    format="rgb24",
                    src_color_range=frame.color_range,
                    dst_color_range=ColorRange.JPEG,
                )
                yield _upright(picture.to_ndarray(), frame.side_data.get("DISPLAYMATRIX"))
    except (av.FFmpegError, IndexError) as problem:  # IndexError: sound, and nothing to see
        raise ValueError(f"input: expected a video or image in {path}: {problem}") from problem


def _upright(pixels: np.ndarray, matrix: Any | None) -> np.ndarray:
    """[h, w, 3] turned and mirrored as a display matrix says, in steps of 90 degrees.

    The matrix has nine int32, row by row; x' = m0 x + m3 y and y' = m1 x + m4 y, y downwards.
    """
    if matrix is None:
        return pixels
    m = np.frombuffer(bytes(matrix), dtype=np.int32)
    if abs(m[1]) + abs(m[3]) > abs(m[0]) + abs(m[4]):
        pixels, from_right, from_below = pixels.transpose(1, 0, 2), m[3] < 0, m[1] < 0
    else:
        from_right, from_below = m[0] < 0, m[4] < 0
    return pixels[:: -1 if from_below else 1, :: -1 if from_right else 1]


def check_output(path: str | Path, n_frames: int) -> None:
    """Raises the errors that `write_frames` would raise; called before long work.

    One frame can be written as an image or a video, several only as a video.

    Raises:
        ValueError: ``path`` exists or has another suffix, or its folder cannot be written.
        ModuleNotFoundError: the package that writes such files is not installed.
    """
    path = Path(path)
    known = VIDEOS if n_frames > 1 else (*IMAGES, *VIDEOS)
    if path.suffix not in known:
        raise ValueError(f"output: expected a name that ends in {', '.join(known)}, got {path}")
    check_new(path)
    importlib.import_module("PIL" if path.suffix in IMAGES else "av")


def write_frames(path: str | Path, frames: Tensor, fps: float = 1.0) -> None:
    """Writes frames ``[T, H, W, 3]`` uint8 as H.264 video, or one frame as image, by the suffix.

    Videos of any size are converted by the matrix of BT.709 to limited range, and say so in their
    tags; without tags players guess by the size. Images are sRGB.

    Raises:
        ValueError: ``path`` exists, another suffix, or several frames for an image.
    """
    path = Path(path)
    check_output(path, len(frames))
    with written_whole(path) as unfinished:
        if path.suffix in IMAGES:
            from PIL import Image, PngImagePlugin

            image = Image.fromarray(frames[0].cpu().numpy())
            chunks = PngImagePlugin.PngInfo()
            chunks.add(b"sRGB", b"\0")  # JPEG and WebP without a profile are sRGB by convention
            image.save(unfinished, pnginfo=chunks)
        else:
            _encode(unfinished, frames, fps)


def _encode(path: Path, frames: Tensor, fps: float) -> None:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17"}
        tags = {
            "colorspace": Colorspace.ITU709,
            "color_primaries": ColorPrimaries.BT709,
            "color_trc": ColorTrc.BT709,
            "color_range": ColorRange.MPEG,
        }
        for name, tag in tags.items():
            setattr(stream.codec_context, name, tag)
        for frame in frames.cpu().numpy():
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            for name, tag in tags.items():
                setattr(picture, name, tag)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
