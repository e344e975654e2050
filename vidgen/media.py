"""Frames to and from files: videos through PyAV, images through Pillow."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import written_whole

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".mkv", ".mov")


def to_uint8(pixels: Tensor) -> Tensor:
    """Frames ``[T, H, W, 3]`` uint8 from a video ``[3, T, H, W]`` in [-1, 1], rounded."""
    frames = pixels.float().clamp(-1, 1).add(1).mul(127.5).round()
    return frames.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def from_uint8(frames: Tensor) -> Tensor:
    """A video ``[3, T, H, W]`` fp32 in [-1, 1] from frames ``[T, H, W, 3]`` uint8."""
    return frames.permute(3, 0, 1, 2).float().div(127.5).sub(1)


def read_frames(path: str | Path) -> Tensor:
    """All frames of a video or image file, ``[T, H, W, 3]`` uint8."""
    import av

    path = Path(path)
    if not path.exists():
        raise ValueError(f"input: expected a video or image file, {path} does not exist")
    with av.open(str(path)) as container:
        frames = [
            torch.from_numpy(frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    if not frames:
        raise ValueError(f"input: expected frames in {path}, found none")
    return torch.stack(frames)


def check_output(path: str | Path, n_frames: int) -> None:
    """Before long work: raises ValueError where `write_frames` would.

    One frame makes an image or a video, more make a video.
    """
    path = Path(path)
    known = VIDEOS if n_frames > 1 else (*IMAGES, *VIDEOS)
    if path.suffix not in known:
        raise ValueError(f"output: expected a name that ends in {', '.join(known)}, got {path}")
    if path.exists():
        raise ValueError(f"output: expected a new file, {path} exists")
    if not path.parent.is_dir():
        raise ValueError(f"output: expected an existing folder, got {path.parent}")


def write_frames(path: str | Path, frames: Tensor, fps: float = 1.0) -> None:
    """Frames ``[T, H, W, 3]`` uint8 as H.264 video or, one of them, as an image, by the suffix.

    Raises:
        ValueError: ``path`` exists, another suffix, or several frames for an image.
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
