"""Profiles one op at one shape: ``vidgen profile``, or ``python profiling/run.py``.

    --mode torch   a table and a trace, by torch.profiler (the default, on a CPU too)
    --mode nsys    a timeline, by Nsight Systems
    --mode ncu     counters and source lines of each kernel, by Nsight Compute

Compilation and warm-up come first. Nsight records only what runs between cudaProfilerStart and
cudaProfilerStop; torch.profiler records the same calls.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from shutil import which

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent / "kernels")]  # run by path

import ranges  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from bench.measure.case import Case, Function, as_tuple  # noqa: E402
from bench.suites import SUITES, directions  # noqa: E402
from vidgen.common.arguments import output_folder, whole  # noqa: E402

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
DEFAULTS = {  # dtype, shape of each suite
    "cuda": (
        "bf16",
        {
            "attention": "pyramid_768p_u15_s2_h30",
            "memory": "segment_n4-repvideo_2b",
            "models": "flux_train_384p",
            "samplers": "nova_video_480p",
            "scaling": "scaling_frames_16x1024",
        },
    ),
    "cpu": (
        "fp32",
        {
            "attention": "cpu_frames_8x512",
            "memory": "segment_n4-cpu_repvideo",
            "models": "cpu_flux_train_384p",
            "samplers": "cpu_nova_video",
            "scaling": "cpu_scaling_frames_16x256",
        },
    ),
}
WARM_UP = 3
MAX_CALLS = 1000
CALLS = {"torch": 5, "nsys": 5, "ncu": 1}  # ncu replays each kernel as often as its counters ask


def parse(argv: list[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, shapes = DEFAULTS[device]
    parser = argparse.ArgumentParser(prog="vidgen profile", description=__doc__.split(":")[0] + ".")
    parser.add_argument(
        "--op",
        choices=SUITES,
        default="attention",
        help="memory: any other operator; models: a whole step; samplers: a video, or part of one",
    )
    parser.add_argument(
        "--shape", help=f"a shape that `vidgen bench` names (default: {', '.join(shapes.values())})"
    )
    parser.add_argument("--provider", default="ours", help="or a baseline, to compare")
    parser.add_argument(
        "--direction",
        choices=("fwd", "bwd", "fwd+bwd"),
        help="(default: fwd+bwd, or fwd where there is no backward)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help="(default: %(default)s)")
    parser.add_argument(
        "--mode",
        choices=("torch", "nsys", "ncu", "region"),
        default="torch",
        help="the profiler; region: only the recorded calls, what nsys.sh and ncu.sh run",
    )
    parser.add_argument(
        "--calls",
        type=whole(1, MAX_CALLS),
        metavar="N",
        help="recorded calls (default: 5, with Nsight Compute 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command of nsys or ncu")
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        default=Path(tempfile.gettempdir()) / "vidgen-profile",
        help="where reports go (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.shape = args.shape or shapes[args.op]
    suite = SUITES[args.op]
    for name, known in (("shape", suite.names), ("provider", suite.providers)):
        if (chosen := getattr(args, name)) not in known:
            parser.error(f"--{name}: expected one of {', '.join(known)}; got {chosen}")
    known = directions(suite.find(args.shape))
    args.direction = args.direction or known[-1]
    if args.direction not in known:
        parser.error(
            f"--direction: expected {' or '.join(known)} for {args.shape}, got {args.direction}"
        )
    if args.dry_run and args.mode not in ("nsys", "ncu"):
        parser.error("--dry-run: only nsys and ncu have a command to print")
    args.device = torch.device(device)
    args.calls = args.calls or CALLS.get(args.mode, 1)
    return args


def prepare(case: Case, function: Function, direction: str) -> Callable[[int], Callable[[], None]]:
    """``prepare(...)(n)`` does all that is not profiled, and returns the ``n`` calls that are."""
    leaves = [x.detach().requires_grad_(direction != "fwd") for x in case.leaves]

    def forward() -> tuple[torch.Tensor, ...]:
        return as_tuple(function(*leaves))

    upstream = case.upstream(forward()) if direction != "fwd" else []

    def backward(outputs: tuple[torch.Tensor, ...]) -> None:
        torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    def calls(n: int) -> Callable[[], None]:
        outs = [forward() for _ in range(n)] if direction == "bwd" else []

        def run() -> None:
            for i in range(n):
                out = outs[i] if outs else forward()
                if direction != "fwd":
                    backward(out)

        return run

    return calls


@contextmanager
def recorded(device: torch.device, model: nn.Module | None) -> Iterator[None]:
    """The region that nsys and ncu record, with named ranges; it waits for all its kernels."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    with ranges.enabled(model):
        yield
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def by_torch(work: Callable[[], None], record: AbstractContextManager, stem: Path) -> None:
    """Prints the table of costs; writes it and a trace for chrome://tracing or ui.perfetto.dev."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities, acc_events=True) as profiler, record:
        work()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".txt").write_text(table)
    profiler.export_chrome_trace(str(stem.with_suffix(".json.gz")))
    print(table)
    print(f"{stem}.txt and {stem}.json.gz (open in ui.perfetto.dev)")


def by_script(args: argparse.Namespace, stem: Path) -> int:
    """nsys.sh or ncu.sh, which run this file again with ``--mode region``."""
    if not args.dry_run and not which(args.mode):
        print(f"{args.mode}: not on PATH, see profiling/README.md", file=sys.stderr)
        return 127
    command = ["bash", str(FOLDER / f"{args.mode}.sh"), *["--dry-run"] * args.dry_run, str(stem)]
    for name in ("op", "shape", "provider", "direction", "dtype", "calls"):
        command.append(f"--{name}={getattr(args, name)}")
    if not args.dry_run:
        stem.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    words = (args.op, args.shape, args.provider, args.dtype, args.direction.replace("+", "_"))
    stem = args.output / "-".join(words).replace(".", "p")
    if args.mode in ("nsys", "ncu"):
        return by_script(args, stem)
    suite = SUITES[args.op]
    case = suite.make(suite.find(args.shape), DTYPES[args.dtype], args.device)
    function = suite.providers[args.provider].setup(case)
    calls = prepare(case, function, args.direction)
    for _ in range(WARM_UP):
        calls(1)()
    work = calls(args.calls)
    record = recorded(args.device, getattr(function, "model", None))  # whole steps have a model
    if args.mode == "torch":
        by_torch(work, record, stem)
    else:
        with record:
            work()
    return 0


if __name__ == "__main__":
    sys.exit(main())
