"""Compiles the memory-bound kernels for sm_80 and sm_90 without a GPU, and takes them apart.

    python tests/aot/rows.py                              what is shipped
    python tests/aot/rows.py --only segment bfloat16      cases whose names hold all of the words
    python tests/aot/rows.py --write                      renew tests/aot/rows_table.md

The operators of `bench.memory.registry` run forward and backward, on few rows of real length. Their
kernels spend their time in the longest innermost loop; in all of the code where there is none.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

from bench.memory.registry import CASES, MemoryCase  # noqa: E402
from tests.aot import compile as aot_compile  # noqa: E402
from tests.aot.compile import DTYPES, Instruction, Launch  # noqa: E402
from tests.kernels.contracts import few_rows  # noqa: E402
from vidgen.ops import FUSED  # noqa: E402
from vidgen.shapes import TokenShape  # noqa: E402
from vidgen_kernels.common import registration  # noqa: E402
from vidgen_kernels.latents.configs import lookup_block  # noqa: E402
from vidgen_kernels.norms.configs import lookup as lookup_norm  # noqa: E402
from vidgen_kernels.rope.configs import lookup as lookup_rope  # noqa: E402
from vidgen_kernels.testing import replaced  # noqa: E402

TABLE = Path(__file__).with_name("rows_table.md")


@dataclass(frozen=True)
class Case:
    """One operator, forward and backward."""

    memory: MemoryCase  # of few rows
    dtype: str
    arch: int

    def __str__(self) -> str:
        return f"{self.memory.name}-{self.dtype}-sm_{self.arch}"


# The same kernels with the same flags as others.
REPEATED = ("segment_n1", "segment_n2", "mix_n2", "mix_n6", "ddim_step")
IN_FP64 = ("segment_n6", "qk_norm_rope_joint", "renoise_drawn", "dpm_step")
# What no model has, but a configuration is there for.
OTHER_ROWS = {
    "residual_norm_affine": [{"hidden": 1024}, {"hidden": 8192}],
    "post_norm": [{"hidden": 3072}, {"hidden": 8192}],
    "post_norm_adaln": [{"hidden": 1024}, {"hidden": 3072}],
    "qk_norm_rope_joint": [
        {"hidden": 1536, "head_dim": d, "axes": (d // 4, 3 * d // 8, 3 * d // 8)}
        for d in (96, 128, 256)
    ],
}


def cases() -> list[Case]:
    """Every operator at each length of row; few enough for every change."""
    real = [case for case in CASES["real"] if case.variant not in REPEATED]
    by_row = {(case.variant, *row(case)): case for case in real}
    models = [replace(case, shape=few_rows(case.shape)) for case in by_row.values()]
    widest = {case.variant: case for case in sorted(models, key=row)}
    others = [
        replace(widest[name], shape=replace(widest[name].shape, name=_show_sizes(sizes), **sizes))
        for name, all_sizes in OTHER_ROWS.items()
        for sizes in all_sizes
    ]
    return [
        *(Case(case, "bfloat16", 80) for case in [*models, *others]),
        *(Case(case, "bfloat16", 90) for case in widest.values()),
        *(Case(case, "float32", 80) for case in widest.values()),
        *(Case(widest[name], "float64", 80) for name in IN_FP64),
    ]


def row(case: MemoryCase) -> tuple[int, int]:
    """What its kernels are compiled for."""
    shape = case.shape
    return (shape.hidden, shape.head_dim) if isinstance(shape, TokenShape) else (0, 0)


def _show_sizes(sizes: dict) -> str:
    return "_".join(f"{name}{n}" for name, n in sizes.items() if isinstance(n, int))


@dataclass(frozen=True)
class Report:
    """What a kernel takes, in registers and bytes, and counts over the code it spends time in."""

    constants: str  # the sizes it was compiled for
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: int
    loads: str  # of global memory: how many of how many bits a thread
    stores: str
    local: int  # loads and stores of local memory, in all innermost loops
    bar: int

    @property
    def widest(self) -> int:
        """Bits that its widest loads or stores move."""
        return max(int(x.split("x")[1]) for x in f"{self.loads} {self.stores}".split())


def launches(case: Case, *wanted) -> list[Launch]:
    """The kernels of a call and its gradients, on tensors that a CPU holds."""
    inputs = case.memory.inputs(DTYPES[case.dtype], "cpu")
    with ExitStack() as stack:
        compiled = stack.enter_context(aot_compile.launches_compile(case.arch, *wanted))
        # CPU tensors go to the launchers, whose launches compile; nothing is interpreted
        stack.enter_context(mock.patch.object(registration, "is_interpreted", lambda: True))
        stack.enter_context(mock.patch.object(registration, "_refuse_bf16", lambda *_: None))
        outputs = [y for y in case.memory.call(FUSED, inputs) if y is not None and y.requires_grad]
        leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        upstream = [torch.zeros_like(y) for y in outputs]
        torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return compiled


def configurations(case: Case) -> set[tuple[str, int]]:
    """The entries of the families' `configs.py` that a case takes: kernel and identity."""
    asked = set()

    def noted(lookup: Callable) -> Callable:
        def look_up(kernel: str, *args):
            config = lookup(kernel, *args)
            asked.add((kernel, id(config)))
            return config

        return look_up

    with ExitStack() as stack:
        for lookup in (lookup_norm, lookup_rope, lookup_block):
            stack.enter_context(replaced(lookup, noted(lookup)))
        launches(case, None)
    return asked


def kernels(case: Case) -> dict[str, Launch]:
    """The launches of a case by kernel, numbered where one is compiled more than once."""
    found = {}
    for launch in launches(case):
        found.setdefault(launch.kernel.__name__.strip("_").removesuffix("_kernel"), {})[
            launch.compiled.hash
        ] = launch
    return {
        name + f" {i + 1}" * (i > 0): launch
        for name, by_hash in found.items()
        for i, launch in enumerate(by_hash.values())
    }


def hot_loop(sass: str) -> tuple[list[Instruction], list[list[Instruction]]]:
    """Where a kernel spends its time, and all innermost loops; all of the code if it has none."""
    loops = aot_compile.loops(sass) or [aot_compile.instructions(sass)]
    return max(loops, key=len), loops


def inspect(case: Case) -> dict[str, Report]:
    """Reports by kernel."""
    return {name: report(launch) for name, launch in kernels(case).items()}


def report(launch: Launch) -> Report:
    registers, stack, sass = aot_compile.machine_code(launch.compiled)
    hot, loops = hot_loop(sass)
    sizes = {k: v for k, v in launch.options.items() if k.isupper() and type(v) is int}
    return Report(
        constants=" ".join(f"{name}={value}" for name, value in sizes.items()),
        warps=launch.compiled.metadata.num_warps,
        registers=registers,
        stack=stack,
        shared=launch.compiled.metadata.shared,
        instructions=len(hot),
        loads=_show(aot_compile.widths(hot, "LDG")),
        stores=_show(aot_compile.widths(hot, "STG")),
        local=sum(aot_compile.count(loop, "LDL", "STL") for loop in loops),
        bar=aot_compile.count(hot, "BAR"),
    )


def _show(widths: Counter[int]) -> str:
    return " ".join(f"{number}x{bits}" for bits, number in sorted(widths.items(), reverse=True))


HEADER = ["kernel, case", *(f.name for f in fields(Report))]


def table_rows(case: Case, reports: dict[str, Report]) -> list[list[str]]:
    return [
        [f"{kernel}, {case}", *(str(getattr(r, f.name)) for f in fields(Report))]
        for kernel, r in reports.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases that hold it")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}, all that ships")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write takes all that ships, no choice of it")
    chosen = [case for case in cases() if all(word in str(case) for word in args.only)]
    found = list(zip(chosen, aot_compile.inspect_all(inspect, chosen, args.jobs), strict=True))
    reports = [(case, found) for case, found in found if isinstance(found, dict)]
    lines = [row for pair in reports for row in table_rows(*pair)]
    table = aot_compile.markdown([HEADER, *lines])
    failures = [f"{case}: {problem}" for case, problem in found if isinstance(problem, str)]
    if args.write and not failures:
        title = "What the compiler makes of the memory-bound kernels"
        aot_compile.write_table(TABLE, title, "rows.py", table)
    sys.stdout.write(table)
    sys.stderr.writelines(f"FAILED {line}\n" for line in failures)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
