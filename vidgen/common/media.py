"""Frames to and from files: videos through PyAV, images through Pillow."""

from __future__ import annotations

import importlib
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_new, written_whole

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".mkv", ".mov")


def to_uint8(video: Tensor, *, rounded: bool = True) -> Tensor:
    """Frames ``[..., T, H, W, 3]`` uint8 from a video ``[..., 3, T, H, W]`` in [-1, 1].

    ``127.5 * video + 127.5``, clamped, and rounded; with ``rounded=False`` its fraction is cut off,
    as in the released code of Pyramid Flow and NOVA.
    """
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


def read_frames(path: str | Path) -> Tensor:
    """All frames of a video or image file, ``[T, H, W, 3]`` uint8.

    Raises:
        ValueError: a missing file, or one without frames.
    """
    import av

    path = Path(path)
    if not path.exists():
        raise ValueError(f"input: expected a video or image file, {path} does not exist")
    try:
        with av.open(str(path)) as container:
            frames = [
                torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)
            ]
    except (av.FFmpegError, IndexError) as problem:  # IndexError: a file with sound only
        raise ValueError(f"input: expected a video or image in {path}: {problem}") from problem
    if not frames:
        raise ValueError(f"input: expected frames in {path}, found none")
    return torch.stack(frames)


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

    Errors: `check_output`.
    """
    path = Path(path)
    check_output(path, len(frames))
    with written_whole(path) as unfinished:
        if path.suffix in IMAGES:
            from PIL import Image

            Image.fromarray(frames[0].cpu().numpy()).save(unfinished)
        else:
            _encode(unfinished, frames, fps)


def _encode(path: Path, frames: Tensor, fps: float) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17"}
        for frame in frames.cpu().numpy():
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
