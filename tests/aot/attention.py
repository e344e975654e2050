"""Compiles the attention kernels for sm_80 and sm_90 without a GPU, and takes them apart.

    python tests/aot/attention.py                                  what is shipped
    python tests/aot/attention.py --kernel fwd --head-dim 64 --arch 80 --config 128,64,4,3
    python tests/aot/attention.py --write                          renew attention_table.md

`compile` runs the real launchers, here on meta tensors. The *main sweep* is found in machine
code: innermost loops that hold all products of a tile come in pairs, with and without masks for the
ragged edges; it is the longest of those without.

A product, `mma`, is 16 x 8 x 16 multiply-adds of one warp, one HMMA.16816: work rather than
instructions, so that Hopper's wide HGMMA, TF32 and fp64 compare too.
"""

import argparse
import importlib
import re
import sys
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

from tests.aot import compile as aot_compile  # noqa: E402
from tests.aot.compile import ARCHS, DTYPES, Instruction, launches_compile, loops  # noqa: E402
from vidgen_kernels.attention.configs import LaunchConfig, lookup  # noqa: E402
from vidgen_kernels.attention.head_tiles import block_widths  # noqa: E402

# The package also has a function of this name.
attention = importlib.import_module("vidgen_kernels.attention.interval_attention")

TABLE = Path(__file__).with_name("attention_table.md")
KERNELS = {
    "fwd": attention._interval_attention_fwd_kernel,
    "dq": attention._interval_attention_bwd_dq_kernel,
    "dkdv": attention._interval_attention_bwd_dkdv_kernel,
}
DOTS = {"fwd": 2, "dq": 3, "dkdv": 4}  # matrix products per tile


@dataclass(frozen=True)
class Case:
    """One compilation; the shipped configuration unless another is given."""

    kernel: str
    dtype: str
    head_dim: int
    arch: int
    intervals: int = 1
    dlse: bool = False  # the caller differentiates lse
    config: LaunchConfig | None = None

    @property
    def launch(self) -> LaunchConfig:
        return self.config or lookup(self.kernel, self.head_dim, DTYPES[self.dtype], self.arch)

    def __str__(self) -> str:
        extra = f"-i{self.intervals}" * (self.intervals > 1) + "-dlse" * self.dlse
        return f"{self.kernel}-{self.dtype}-d{self.head_dim}-sm_{self.arch}{extra}"


def cases() -> list[Case]:
    """What is shipped, each path of the code at least once; few enough for every change."""
    every = [
        *product(("bfloat16",), (12, 32, 64, 80, 96, 128, 256), (1,)),  # 12: rows not aligned
        *product(("bfloat16",), (64, 128), (2, 3)),
        *product(("float16",), (64, 128), (1,)),
        *product(("float32", "float64"), (64, 128, 256), (1,)),
    ]
    shipped = [
        Case(kernel, dtype, head_dim, arch, intervals)
        for kernel, (dtype, head_dim, intervals), arch in product(KERNELS, every, ARCHS)
    ]
    return shipped + [Case("dq", "bfloat16", 64, arch, dlse=True) for arch in ARCHS]


@dataclass(frozen=True)
class Report:
    """What a kernel takes, in registers and bytes, and counts over its main sweep."""

    tile: str  # queries x keys
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    tensor: str  # the matrix instruction
    instructions: int
    mma: float  # products a warp needs
    repeated: float  # products that another warp has made, too
    mufu: int  # exponentials
    ldsm: int  # loads of matrices from shared memory
    lds: int
    sts: int
    local: int  # loads and stores of local memory, in all sweeps without masks
    bar: int

    @property
    def per_mma(self) -> float:
        return self.instructions / self.mma


def compile_case(case: Case):
    """The kernel of a call on contiguous tensors."""
    n_batch, n_heads, n_tokens = 2, 30, 5000  # not a multiple of 16, as most token counts
    dtype = DTYPES[case.dtype]
    x = torch.empty(n_batch, n_heads, n_tokens, case.head_dim, dtype=dtype, device="meta")
    table = torch.empty(case.intervals, 1, n_tokens, dtype=torch.int32, device="meta")
    lse = attention._empty_fwd(x)[1]
    shipped = mock.patch.object(attention, "lookup", lambda *args: case.launch)
    with shipped, launches_compile(case.arch, KERNELS[case.kernel]) as launches:
        if case.kernel == "fwd":
            attention._launch_fwd(x, x, x, table, table, 0.125)
        else:
            dlse = lse if case.dlse else None
            attention._launch_bwd(x, dlse, x, x, x, x, lse, *(table,) * 4, 0.125)
    (launch,) = launches
    return launch.compiled


def mma_work(opcode: str) -> float:
    """What one instruction adds to the products of a warp."""
    # HMMA.16816.F32.BF16, HMMA.1688.F32.TF32, DMMA.884, DMMA.8x8x4, HGMMA.64x128x16.F32.BF16
    if not (found := re.match(r"(HMMA|HGMMA|DMMA)\.(\w+)", opcode)):
        return 0
    packed = {"16816": (16, 8, 16), "1688": (16, 8, 8), "884": (8, 8, 4)}
    m, n, k = packed.get(found[2]) or map(int, found[2].split("x"))
    n_warps = 4 if found[1] == "HGMMA" else 1
    return m * n * k / (16 * 8 * 16) / n_warps


def products_of_tile(case: Case) -> float:
    """What one tile takes of each warp."""
    launch = case.launch
    width, last = block_widths(case.head_dim, launch.block_d).values()
    n_columns = (case.head_dim - 1) // width * width + last
    n_passes = 3 if case.dtype == "float32" else 1  # tf32x3
    macs = DOTS[case.kernel] * n_passes * launch.block_m * launch.block_n * n_columns
    return macs / (16 * 8 * 16) / launch.num_warps


def products(code: list[Instruction]) -> float:
    return sum(mma_work(line.opcode) for line in code)


def main_sweeps(sass: str, mma: float) -> list[list[Instruction]]:
    """The sweeps without masks, shortest first; a tile takes `mma` products a warp."""
    found = [(products(loop), loop) for loop in loops(sass)]
    # More than it takes where a tile has too few rows for its warps, which then repeat products.
    whole = sorted((loop for work, loop in found if work >= mma), key=len)
    if not whole:
        raise ValueError(f"no loop holds {mma:g} products, only {[work for work, _ in found]}")
    return whole[: max(1, len(whole) // 2)]  # the other half are their twins with masks


def inspect(case: Case) -> Report:
    """Compiles a case and takes it apart."""
    kernel = compile_case(case)
    registers, stack, sass = aot_compile.machine_code(kernel)
    launch = case.launch
    mma = products_of_tile(case)
    *others, sweep = main_sweeps(sass, mma)

    def count(*kinds: str, of: list[Instruction] = sweep) -> int:
        return aot_compile.count(of, *kinds)

    return Report(
        tile=f"{launch.block_m} x {launch.block_n}",
        warps=launch.num_warps,
        stages=launch.num_stages,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        tensor=next(line.opcode for line in sweep if mma_work(line.opcode)),
        instructions=len(sweep),
        mma=mma,
        repeated=products(sweep) - mma,
        mufu=count("MUFU"),
        ldsm=count("LDSM"),
        lds=count("LDS"),
        sts=count("STS"),
        local=sum(count("LDL", "STL", of=loop) for loop in (*others, sweep)),
        bar=count("BAR"),
    )


HEADER = ["case", *(f.name for f in fields(Report)), "instr / mma"]


def row(case: Case, report: Report) -> list[str]:
    values = [getattr(report, f.name) for f in fields(Report)]
    cells = [f"{x:g}" if isinstance(x, float) else str(x) for x in values]
    return [str(case), *cells, f"{report.per_mma:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument("--arch", type=int, choices=ARCHS, nargs="+", default=list(ARCHS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="default: bfloat16")
    parser.add_argument("--head-dim", type=int, nargs="+", help="default: 64")
    parser.add_argument("--intervals", type=int, choices=(1, 2, 3), nargs="+", help="default: 1")
    parser.add_argument(
        "--config", nargs="+", metavar="M,N,WARPS,STAGES", help="instead of the shipped one"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}, all that ships")
    args = parser.parse_args()

    chosen = cases()
    if not args.write:
        chosen = [c for c in chosen if c.kernel in args.kernel and c.arch in args.arch]
    if args.dtype or args.head_dim or args.intervals or args.config:
        if args.write:
            parser.error("--write takes all that ships, no choice of it")
        configs = [LaunchConfig(*map(int, c.split(","))) for c in args.config or ()] or [None]
        axes = (args.kernel, args.dtype or ["bfloat16"], args.head_dim or [64], args.arch)
        chosen = [
            replace(Case(*axis, intervals), config=config)
            for *axis, intervals, config in product(*axes, args.intervals or [1], configs)
        ]

    results = list(zip(chosen, aot_compile.inspect_all(inspect, chosen, args.jobs), strict=True))
    table = aot_compile.markdown(
        [HEADER, *(row(c, r) for c, r in results if isinstance(r, Report))]
    )
    failures = [f"{c} {c.launch}: {r}" for c, r in results if isinstance(r, str)]
    if args.write and not failures:
        title = "What the compiler makes of the kernels"
        aot_compile.write_table(TABLE, title, "attention.py", table)
    sys.stdout.write(table)
    sys.stderr.writelines(f"FAILED {line}\n" for line in failures)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
