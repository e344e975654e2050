"""`vidgen generate`: a video or an image from a prompt, by one of the reference models.

Models share the options of `vidgen/common/options.py` and add their own in ``generate.py``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from vidgen.common.media import check_output, write_frames
from vidgen.common.options import add_common_arguments, read_common
from vidgen.common.progress import Bars

MODELS = {
    "pyramid-flow": "vidgen.pyramid_flow.generate",
    "repvideo": "vidgen.repvideo.generate",
    "nova": "vidgen.nova.generate",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    for name, path in MODELS.items():
        model = importlib.import_module(path)
        own = models.add_parser(name, help=model.SUMMARY, description=model.SUMMARY)
        add_common_arguments(own)
        own.add_argument(
            "--output",
            type=Path,
            metavar="FILE",
            required=True,
            help="a new .mp4, or .png of one frame",
        )
        model.add_arguments(own.add_argument_group(name))


def run(args: argparse.Namespace) -> int:
    """Generates and writes the video; 0, or 1 if it is not the one that was asked for."""
    try:
        model = importlib.import_module(MODELS[args.model])
        n_asked = model.count_frames(args)
        check_output(args.output, n_asked)
        with Bars() as progress:
            video = model.generate(args, read_common(args, progress))
        write_frames(args.output, video.frames, video.fps)
    except (OSError, ValueError) as problem:
        sys.stderr.write(f"vidgen generate: {problem}\n")
        return 1
    n_frames, height, width, _ = video.frames.shape
    sys.stdout.write(f"{args.output}: {n_frames} frames of {height} x {width}\n")
    if n_frames != n_asked:  # what was made is kept
        sys.stderr.write(f"vidgen generate: expected {n_asked} frames, the model made {n_frames}\n")
        return 1
    return 0
