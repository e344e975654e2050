"""The command line, ``vidgen COMMAND``.

Only the chosen command is imported, so that ``vidgen --help`` is fast and works without any extra
installed. Benchmarks and profiles live in the source tree, not in the wheel, and run as processes
of their own.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from vidgen.common.arguments import names, output_folder

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
PROFILER = ROOT / "profiling" / "run.py"

# The modules that each extra brings; one of several is asked of the first.
EXTRAS = {
    "models": (
        *("diffusers", "transformers", "safetensors", "sentencepiece", "google.protobuf"),
        *("av", "rich", "matplotlib"),
    ),
    "bench": ("pytest", "pytest_benchmark", "rich", "matplotlib", "markdown_it", "safetensors"),
    "profiling": ("nvtx",),
    "peers": ("flash_attn", "liger_kernel", "natten", "xformers"),
}

# A finished test in pytest's verbose output: its parameters and how far the run is.
FINISHED = re.compile(r"\[(?P<case>\S+)\] [A-Z]+.*\[ *(?P<percent>\d+)%\]")

# What PyTorch says of a GPU and of a CPU; a CPU's has no class of its own.
OUT_OF_MEMORY = re.compile("out of memory|allocate memory")

Run = Callable[[argparse.Namespace], int]


class CommandError(Exception):
    """What the user can do something about, said in one line."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong: some commands have more options than fit on a screen.

    Names of options are not completed, so that a new option breaks nobody's command.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv)
        return COMMANDS[args.command][2](args)
    except CommandError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        found = ((x, name) for x, names in EXTRAS.items() for name in names)
        # of google.protobuf python may miss google
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
    for name, (summary, configure, _) in COMMANDS.items():
        add_help = name not in PASSES_ARGUMENTS_ON
        command = subparsers.add_parser(name, help=summary, description=summary, add_help=add_help)
        if name == chosen and configure:
            configure(command)
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command not in PASSES_ARGUMENTS_ON:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    return args


# ---- bench


def configure_bench(parser: argparse.ArgumentParser) -> None:
    ops = ["all", *sorted(p.stem.removeprefix("bench_") for p in BENCH.glob("bench_*.py"))]
    parser.add_argument(
        "op",
        nargs="?",
        default="all",
        choices=ops if BENCH.is_dir() else None,  # without the source, `run_bench` explains
        help=f"what to time, of {', '.join(ops)} (default: all)",
    )
    parser.add_argument(
        "--shapes", type=names, metavar="PATTERN", help="shapes by name, e.g. 'wan_*' (commas: or)"
    )
    parser.add_argument(
        "--shape-set",
        choices=["real", "reduced", "toy"],
        help="real (default on a GPU), or reduced: minutes on a CPU (default there)",
    )
    parser.add_argument(
        "--providers", type=names, metavar="NAMES", help="comma-separated; `vidgen info` lists them"
    )
    parser.add_argument(
        "--dtype",
        type=names,
        metavar="NAMES",
        help="bf16, fp16, fp32, fp64 (default: bf16, CPU fp32)",
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="results and plots (default: bench/results/<gpu>)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE.json", "AFTER.json"),
        help="measure nothing, show what changed between two results",
    )


def run_bench(args: argparse.Namespace) -> int:
    """Drives ``pytest bench/ --benchmark-json``, then reports: there is one way of measuring."""
    _require_source(BENCH / "report" / "report.py", "the benchmarks")
    _require_extra("bench")
    if args.compare:
        command = [sys.executable, str(BENCH / "report" / "compare.py"), *map(str, args.compare)]
        return subprocess.run(command, env=_source_environment(), check=False).returncode
    targets = [BENCH] if args.op == "all" else [BENCH / f"bench_{args.op}.py"]
    filters = [
        f"--{name.replace('_', '-')}={value}"
        for name in ("shapes", "shape_set", "providers", "dtype")
        if (value := getattr(args, name))
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-p",
            "no:cacheprovider",
            f"--rootdir={ROOT}",
        ]
        command = [
            *pytest,
            f"--config-file={ROOT / 'pyproject.toml'}",
            f"--benchmark-json={results}",
        ]
        status, log = _run_with_progress([*command, *filters, *map(str, targets)])
        if status:
            print(_explanation(log), file=sys.stderr)
        if not results.exists() or not results.stat().st_size:
            raise CommandError(f"nothing was measured (pytest exit status {status})")
        report = [sys.executable, str(BENCH / "report" / "report.py"), str(results)]
        report += [f"--output={args.output}"] if args.output else []
        report += ["--merge"] if filters or args.op != "all" else []
        reported = subprocess.run(report, env=_source_environment(), check=False).returncode
    return 1 if status or reported else 0


def _run_with_progress(command: list[str]) -> tuple[int, list[str]]:
    """The exit status and the output of pytest; a bar meanwhile, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    percent = TextColumn("[progress.percentage]{task.percentage:>3.0f}%")
    columns = (percent, BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    log = []
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_source_environment(),
        ) as process,
    ):
        task = progress.add_task("starting", total=100)
        for line in process.stdout or ():
            log.append(line.rstrip())
            if done := FINISHED.search(line):
                progress.update(task, completed=int(done["percent"]), description=done["case"])
    return process.returncode, log


def _explanation(log: list[str]) -> str:
    """What pytest says went wrong: a usage error or its summary, else the end of its output."""
    errors = [line for line in log if line.startswith(("ERROR:", "FAILED", "ERROR "))]
    return "\n".join(errors or log[-15:])


# ---- profile


def run_profile(args: argparse.Namespace) -> int:
    _require_source(PROFILER, "the profiling scripts")
    command = [sys.executable, str(PROFILER), *args.rest]
    return subprocess.run(command, env=_source_environment(), check=False).returncode


# ---- commands that are modules of the package


def _module(path: str) -> tuple[Callable[[argparse.ArgumentParser], None], Run]:
    """The two halves of a command, imported when they are called."""

    def configure(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(path).add_arguments(parser)

    def run(args: argparse.Namespace) -> int:
        return importlib.import_module(path).run(args)

    return configure, run


# ---- info


def run_info(args: argparse.Namespace) -> int:
    """Versions, the device, and which implementation a call would take."""
    import torch

    facts = {
        "vidgen-kernels": _version("vidgen-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gpu": _describe_gpu(),
        "interpreter": "on"
        if os.environ.get("TRITON_INTERPRET") == "1"
        else "off (TRITON_INTERPRET=1)",
    }
    for extra, modules in EXTRAS.items():
        absent = _absent(modules)
        facts[f"extra {extra}"] = f"without {', '.join(absent)}" if absent else "complete"
    for name, fact in facts.items():
        print(f"{name:16} {fact}")
    if not (BENCH / "report" / "report.py").exists():
        print("benchmarks       in the source tree only, not in the wheel")
        return 0
    print("benchmark providers", flush=True)
    return subprocess.run(
        [sys.executable, str(BENCH / "suites.py")], env=_source_environment(), check=False
    ).returncode


def _describe_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: CPU tensors take the portable PyTorch implementation"
    found = torch.cuda.get_device_properties(0)
    memory = found.total_memory / 2**30
    return (
        f"{found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    )


# ---- shared


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "source tree, not installed"


def _require_extra(extra: str) -> None:
    if absent := _absent(EXTRAS[extra]):
        raise CommandError(f"needs {', '.join(absent)}: pip install 'vidgen-kernels[{extra}]'")


def _absent(modules: Sequence[str]) -> list[str]:
    def is_found(name: str) -> bool:
        try:
            return find_spec(name) is not None
        except ModuleNotFoundError:  # not even the package that it is in
            return False

    return [name for name in modules if not is_found(name)]


def _require_source(path: Path, what: str) -> None:
    if not path.exists():
        raise CommandError(
            f"{what} are not part of the installed package: get the source with `git clone` "
            "and run this command there"
        )


def _source_environment() -> dict[str, str]:
    """So that scripts of the source tree find both packages, installed or not."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }


# name -> summary, adds its arguments (if it has any), runs
COMMANDS = {
    "bench": ("time our kernels against their peers", configure_bench, run_bench),
    "generate": ("a video or an image from a prompt", *_module("vidgen.commands.generate")),
    "train": ("train a model on latents and text features", *_module("vidgen.commands.train")),
    "convert": (
        "CogVideoX and RepVideo weights between key layouts",
        *_module("vidgen.repvideo.convert"),
    ),
    "analyze": (
        "what RepVideo's layers do, as plots",
        *_module("vidgen.repvideo.analysis.analyze"),
    ),
    "verify": (
        "run the golden cases through our models and ops",
        *_module("vidgen.commands.verify"),
    ),
    "profile": ("profile one op with Nsight or PyTorch's profiler", None, run_profile),
    "info": ("versions, device, and which implementations are available", None, run_info),
}
PASSES_ARGUMENTS_ON = ("profile",)

if __name__ == "__main__":
    sys.exit(main())
