"""The command line, ``vidgen COMMAND``: finds the command, runs it, and explains its errors.

A command is a module with ``add_arguments(parser)`` and ``run(args)``, which returns the exit
status. Only the chosen one is imported, so that ``vidgen --help`` is fast and needs no extra.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from typing import Any, NamedTuple, NoReturn

from vidgen.common.installation import EXTRAS, CommandError


class Command(NamedTuple):
    summary: str
    module: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        importlib.import_module(self.module).add_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        return importlib.import_module(self.module).run(args)


COMMANDS = {
    "bench": Command("time our kernels against their peers", "vidgen.commands.bench"),
    "generate": Command("a video or an image from a prompt", "vidgen.commands.generate"),
    "train": Command("train a model on latents and text features", "vidgen.commands.train"),
    "convert": Command(
        "CogVideoX and RepVideo weights between key layouts", "vidgen.repvideo.convert"
    ),
    "analyze": Command("what RepVideo's layers do, as plots", "vidgen.repvideo.analysis.analyze"),
    "verify": Command("run the golden cases through our models and ops", "vidgen.commands.verify"),
    "profile": Command(
        "profile one op with Nsight or PyTorch's profiler", "vidgen.commands.profile"
    ),
    "info": Command(
        "versions, device, and which implementations are available", "vidgen.commands.info"
    ),
}
PASSES_ARGUMENTS_ON = ("profile",)

# PyTorch's messages for a GPU and for a CPU; it has no error class for a CPU.
OUT_OF_MEMORY = re.compile("out of memory|allocate memory")


class Parser(argparse.ArgumentParser):
    """Reports an error in one line: some commands have more options than fit on a screen.

    Names of options cannot be shortened, so that a new option breaks nobody's command.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; its exit status, or 1 with one line on stderr for an expected error."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv)
        return COMMANDS[args.command].run(args)
    except CommandError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        found = ((x, name) for x, names in EXTRAS.items() for name in names)
        # without google.protobuf, Python may report google as missing
        needs = ((x, name) for x, name in found if f"{name}.".startswith(f"{error.name}."))
        extra, name = next(needs, (None, None))
        if extra is None:
            raise
        message = f"needs {name}: pip install 'vidgen-kernels[{extra}]'"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        message = f"not enough memory: {error}".partition("\n")[0]
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"vidgen: error: {message}", file=sys.stderr)
    return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="vidgen",
        description="Exact, fast kernels for video-generation transformers, and models on them.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, command in COMMANDS.items():
        own = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            add_help=name not in PASSES_ARGUMENTS_ON,
        )
        if name == chosen:
            command.add_arguments(own)
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command not in PASSES_ARGUMENTS_ON:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
