"""`vidgen convert`: weights of CogVideoX and RepVideo between SAT's layout and that of diffusers.

diffusers knows no gates. They are written as the key ``learnable_gating`` of the weights and the
option ``gates`` of config.json: our models read both, diffusers ignores them with a warning. SAT's
table of positions is not written, since the released code computes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from vidgen.common.checkpoint import FILES, check_new, publish, read_config, write_state_dict

from .model.keys import SAT_PREFIX, to_sat
from .model.transformer import CogVideoXTransformer
from .model.weights import SAT_FILE, is_sat_folder, load_transformer, read_pretrained

WEIGHTS = FILES[0]
ITERATION = "1"  # the folder of a SAT checkpoint that `latest` names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        help="folder of SAT (with a file latest), of a diffusers transformer or of a pipeline",
    )
    parser.add_argument(
        "output", type=Path, help="new folder, in the layout that the source does not have"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="for a SAT source: a config.json whose options replace what its weights tell, such "
        "as the sizes of the videos (default: those of CogVideoX-2B)",
    )


def run(args: argparse.Namespace) -> int:
    """0 when the output is written, 1 otherwise."""
    from safetensors import SafetensorError

    try:
        convert(args.source, args.output, config=args.config)
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as problem:
        sys.stderr.write(f"vidgen convert: {problem}\n")
        return 1
    sys.stdout.write(f"{args.output}\n")
    return 0


def convert(source: Path, output: Path, *, config: Path | None = None) -> None:
    """Writes ``source`` to the new folder ``output`` in the other layout.

    Raises:
        ValueError: ``output`` exists, or the source is not a complete checkpoint.
    """
    check_new(output, "folder")
    options = {} if config is None else read_config(config.parent, config.name)
    found, state = read_pretrained(source, **options)
    model = load_transformer(found, state)  # raises for missing and unknown keys
    unfinished = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        write = write_diffusers if is_sat_folder(source) else write_sat
        write(unfinished / output.name, model)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    publish(unfinished / output.name, output)
    unfinished.rmdir()


def write_diffusers(folder: Path, model: CogVideoXTransformer) -> None:
    """Writes config.json and the weights to a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    write_state_dict(folder / WEIGHTS, model.state_dict())


def write_sat(folder: Path, model: CogVideoXTransformer) -> None:
    """Writes the weights to a new folder, and the text file ``latest`` that names their folder."""
    (folder / ITERATION).mkdir(parents=True)
    state = {SAT_PREFIX + key: x.contiguous() for key, x in to_sat(model.state_dict()).items()}
    torch.save({"module": state}, folder / ITERATION / SAT_FILE)
    (folder / "latest").write_text(ITERATION)
