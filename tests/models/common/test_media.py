"""Files of frames: the colours and the orientation that players show, and no more than is used."""

import io
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vidgen.common import media
from vidgen.common.media import read_frames, write_frames

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.portable_only

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "brown": (150, 90, 40),
}
SIZES = {"SD": (96, 128), "HD": (768, 1280)}


def plain(colour: tuple[int, int, int], height: int, width: int, n_frames: int = 2) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).expand(n_frames, height, width, 3).contiguous()


def corners(height: int = 64, width: int = 96, n_frames: int = 2) -> Tensor:
    """Red top left, green top right, blue bottom left, white bottom right: orientation shows."""
    frames = torch.empty(n_frames, height, width, 3, dtype=torch.uint8)
    y, x = height // 2, width // 2
    for rows, cols, name in (
        (slice(None, y), slice(None, x), "red"),
        (slice(None, y), slice(x, None), "green"),
        (slice(y, None), slice(None, x), "blue"),
        (slice(y, None), slice(x, None), "white"),
    ):
        frames[:, rows, cols] = torch.tensor(COLOURS[name], dtype=torch.uint8)
    return frames


def named_corners(frame: Tensor) -> tuple[str, ...]:
    """The colours in the corners, row by row."""
    found = []
    for y, x in ((8, 8), (8, -8), (-8, 8), (-8, -8)):
        pixel = frame[y, x].int()
        found.append(min(COLOURS, key=lambda c: (pixel - torch.tensor(COLOURS[c])).abs().sum()))
    return tuple(found)


def through_filters(path: Path) -> np.ndarray:
    """The first frame as FFmpeg's own scaler turns it to RGB, by the tags of the file."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        graph = av.filter.Graph()
        chain = (
            graph.add_buffer(template=container.streams.video[0]),
            graph.add("scale", "out_range=full"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        )
        for before, after in pairwise(chain):
            before.link_to(after)
        graph.configure()
        graph.push(frame)
        return graph.pull().to_ndarray()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_come_back(tmp_path: Path, colour: str, size: str) -> None:
    path = tmp_path / "a.mp4"
    frames = plain(COLOURS[colour], *SIZES[size])
    write_frames(path, frames, fps=8)
    centre = slice(8, -8)
    for found in (read_frames(path)[0].int(), torch.from_numpy(through_filters(path)).int()):
        assert (found - frames[0].int())[centre, centre].abs().max() <= 2


@pytest.mark.parametrize("size", SIZES)
def test_videos_say_how_their_colours_are_meant(tmp_path: Path, size: str) -> None:
    write_frames(tmp_path / "a.mp4", plain((1, 2, 3), *SIZES[size]), fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = [context.colorspace, context.color_primaries, context.color_trc]
        assert (tags, context.color_range) == ([1, 1, 1], 1)  # BT.709, limited range


@pytest.mark.parametrize("colorspace", [1, 5])  # BT.709, BT.601
@pytest.mark.parametrize("color_range", [1, 2])  # limited, full
def test_tags_of_other_peoples_videos_are_read(
    tmp_path: Path, colorspace: int, color_range: int
) -> None:
    frames = plain(COLOURS["red"], 64, 96)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.colorspace = colorspace
        stream.codec_context.color_range = color_range
        for frame in frames.numpy():
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=colorspace,
                src_color_range=2,
                dst_color_range=color_range,
            )
            picture.colorspace, picture.color_range = colorspace, color_range
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    assert (read_frames(path)[0].int() - frames[0].int()).abs().max() <= 3


# x' = a x + c y, y' = b x + d y: (a, b, c, d), and the corners that a player shows
MATRICES = {
    "as it is": ((1, 0, 0, 1), ("red", "green", "blue", "white")),
    "clockwise": ((0, 1, -1, 0), ("blue", "red", "white", "green")),
    "anticlockwise": ((0, -1, 1, 0), ("green", "white", "red", "blue")),
    "upside down": ((-1, 0, 0, -1), ("white", "blue", "green", "red")),
    "mirrored": ((-1, 0, 0, 1), ("green", "red", "white", "blue")),
    "transposed": ((0, 1, 1, 0), ("red", "blue", "green", "white")),
}


@pytest.mark.parametrize("turn", MATRICES)
def test_videos_are_turned_as_a_phone_says(tmp_path: Path, turn: str) -> None:
    (a, b, c, d), expected = MATRICES[turn]
    path = tmp_path / "a.mp4"
    write_frames(path, corners(), fps=8)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # behind version, times, id, duration, layer, volume
    one = 1 << 16
    data[matrix : matrix + 20] = struct.pack(">5i", a * one, b * one, 0, c * one, d * one)
    path.write_bytes(data)
    frames = read_frames(path)
    assert frames.shape[1:3] == ((64, 96) if a else (96, 64))
    assert named_corners(frames[0]) == expected


ORIENTATIONS = {
    1: ("red", "green", "blue", "white"),
    2: ("green", "red", "white", "blue"),
    3: ("white", "blue", "green", "red"),
    6: ("blue", "red", "white", "green"),
    8: ("green", "white", "red", "blue"),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_photos_are_turned_as_exif_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = Image.fromarray(corners()[0].numpy())
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a{suffix}", exif=exif)
    (frame,) = read_frames(tmp_path / f"a{suffix}")
    assert named_corners(frame) == ORIENTATIONS[orientation]


def test_colours_of_a_profile_are_converted(tmp_path: Path) -> None:
    """A profile with red and blue exchanged is as good as any to see that it is read."""
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(srgb)
    tags = {srgb[i : i + 4]: i for i in range(132, 132 + 12 * srgb[131], 12)}
    red, blue = (slice(tags[name] + 4, tags[name] + 12) for name in (b"rXYZ", b"bXYZ"))
    swapped[red], swapped[blue] = srgb[blue], srgb[red]
    ImageCms.ImageCmsProfile(io.BytesIO(bytes(swapped)))
    image = Image.fromarray(plain(COLOURS["red"], 16, 16)[0].numpy())
    image.save(tmp_path / "a.png", icc_profile=bytes(swapped))
    image.save(tmp_path / "b.png", icc_profile=b"none")
    image.save(tmp_path / "c.png", icc_profile=srgb)
    found = [read_frames(tmp_path / f"{name}.png")[0, 0, 0].tolist() for name in "abc"]
    assert found == [[0, 0, 255], [255, 0, 0], [255, 0, 0]]


def test_images_are_tagged_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    frames = torch.randint(256, (1, 24, 32, 3), dtype=torch.uint8)
    write_frames(tmp_path / "a.png", frames)
    assert b"sRGB" in (tmp_path / "a.png").read_bytes()
    assert torch.equal(read_frames(tmp_path / "a.png"), frames)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_any_kind(tmp_path: Path, mode: str) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    grey = 255 if mode in ("1", "P") else 200  # which these can say without dithering
    image = Image.fromarray(np.full((16, 16), grey, dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 200 * 257, dtype=np.uint16))
    else:
        image = image.convert("RGB" if mode in ("CMYK", "P") else "L").convert(mode)
    image.save(tmp_path / f"a{suffix}")
    (frame,) = read_frames(tmp_path / f"a{suffix}")
    assert frame.shape == (16, 16, 3) and (frame.int() - grey).abs().max() <= 2


class Counted:
    """`media._decoded`, counting the frames that are taken from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_frames, original = 0, media._decoded

        def decoded(path: Path):
            for frame in original(path):
                self.n_frames += 1
                yield frame

        monkeypatch.setattr(media, "_decoded", decoded)


def test_no_more_is_decoded_than_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    write_frames(tmp_path / "a.mp4", corners(n_frames=20), fps=8)
    counted = Counted(monkeypatch)
    assert len(read_frames(tmp_path / "a.mp4", first=3)) == 3
    assert counted.n_frames == 3
    counted.n_frames = 0
    with pytest.raises(ValueError, match=r"expected at most 5 frames in .*a\.mp4, got more"):
        read_frames(tmp_path / "a.mp4", most=5)
    assert counted.n_frames == 6
    assert len(read_frames(tmp_path / "a.mp4", most=20)) == 20


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.mp4"])
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing" * 9)
    with pytest.raises(ValueError, match=f"input: expected a video or image in .*{name}"):
        read_frames(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        read_frames(tmp_path / "absent.png")


@pytest.mark.parametrize("model", ["nova", "pyramid-flow"])
def test_commands_decode_what_they_begin_with(tmp_path: Path, monkeypatch, model: str) -> None:
    """One frame for an image; a clip that is too long is left before all of it is in memory."""
    pytest.importorskip("diffusers")
    from vidgen import cli

    write_frames(tmp_path / "long.mp4", corners(64, 96, n_frames=60), fps=8)
    counted = Counted(monkeypatch)
    size = ["--height", "64", "--width", "96"] if model == "nova" else []
    command = ["generate", model, "--random-weights", "--frames", "9", *size]
    if model == "nova":
        command += ["--sets", "2", "--steps", "1"]
    else:
        command += ["--steps", "1", "--video-steps", "1"]
    output = ["--output", str(tmp_path / "a.mp4")]
    assert cli.main([*command, "--image", str(tmp_path / "long.mp4"), *output]) == 0
    assert counted.n_frames == 1
    output = ["--output", str(tmp_path / "b.mp4")]
    assert cli.main([*command, "--video", str(tmp_path / "long.mp4"), *output]) == 1
    assert counted.n_frames < 20
