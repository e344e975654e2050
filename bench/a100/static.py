"""What an A100 can make of our kernels, read from their machine code: no A100 was asked.

    python bench/a100/static.py            the tables
    python bench/a100/static.py --write    renew bench/results/a100/static.md

Every kernel is compiled for sm_80 in its shipped configuration, for bf16 and real rows. The
instructions of its hot loop tell which pipe of a multiprocessor is busy longest
(`tests.aot.pipes`), and what share of the tensor peak or of the DRAM bandwidth can be reached.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

import torch  # noqa: E402
import triton  # noqa: E402

from bench.a100 import measured, models  # noqa: E402
from bench.memory.registry import CASES  # noqa: E402
from tests.aot import attention, pipes, rows  # noqa: E402
from tests.aot.compile import (  # noqa: E402
    Instruction,
    Launch,
    inspect_all,
    machine_code,
    markdown,
    widths,
)
from vidgen.shapes import REAL  # noqa: E402

RESULTS = ROOT / "bench" / "results"
TABLE = RESULTS / "a100" / "static.md"
HEAD_DIMS = (64, 96, 128)  # of the models
KINDS = ("tensor", "xu", "fp32", "integer", "conversion", "shared", "global", "shuffle", "control")
# What published kernels reached on an A100, over the replay of such loops.
MEASURED_OVER_REPLAY = (0.75, 0.9)
USEFUL = {"fwd": 1.0, "dq": 5 / 7, "dkdv": 5 / 7}  # the split backward makes 7 products for 5

INTRODUCTION = f"""\
# A100: not measured

No A100 has run these kernels. This page is read from their machine code for sm_80, as Triton
{{version}} compiles it, by `python bench/a100/static.py --write`; tests renew and compare it. An
owner of an A100 puts measurements beside it: `make gpu` leaves `bench/results/<gpu>/` ready to
commit.

*occupancy* is the warps that a multiprocessor holds, of {pipes.WARPS}. *bound* is the pipe that is
busy longest in the hot loop, and *ceiling*, an upper limit, what it leaves of the tensor peak
({pipes.TENSOR_PEAK / 1e12:.0f} TFLOP/s) or of the DRAM bandwidth ({pipes.DRAM / 1e9:.0f} GB/s).
*replay* runs the loop in order, with the stalls and barriers that the assembler wrote, for the
warps of one sub-partition. Rates are published ones; caches, bank conflicts, tails and clocks are
not modelled.
"""

ON_ATTENTION = f"""\
## Attention

Instructions of the main sweep by kind, per matrix product of a warp (16 x 8 x 16). The
**projection** is {MEASURED_OVER_REPLAY[0]} to {MEASURED_OVER_REPLAY[1]} of the replay, as published
kernels measured on an A100; of the backward kernels it counts the useful work, 5 of 7 products.
"""

ON_MEMORY = """\
## Memory-bound operators

Instructions and bytes of the hot loop, one warp and iteration. A ceiling of 100 % means that DRAM
is slower than any pipe.
"""


def attention_cases() -> list[attention.Case]:
    return [
        attention.Case(kernel, "bfloat16", d, 80) for kernel in attention.KERNELS for d in HEAD_DIMS
    ]


def attention_row(case: attention.Case) -> list[str]:
    kernel = attention.compile_case(case)
    code = machine_code(kernel)
    launch, shared = case.launch, kernel.metadata.shared
    products = attention.products_of_tile(case)
    sweep = attention.main_sweeps(code.sass, products)[-1]
    warps = pipes.occupancy(code.registers, shared, launch.num_warps)
    tensor = 8 * products  # cycles the useful products take
    name, cycles = pipes.bound(sweep)
    replay = tensor / pipes.replay(sweep, max(1, warps // 4))
    low, high = (
        pipes.TENSOR_PEAK / 1e12 * replay * USEFUL[case.kernel] * x for x in MEASURED_OVER_REPLAY
    )
    return [
        f"{case.kernel} D {case.head_dim}",
        f"{launch.block_m} x {launch.block_n}, {launch.num_warps} w, {launch.num_stages} s",
        *map(str, (code.registers, code.stack, shared, warps)),
        *_per_product(sweep, products),
        name,
        f"{tensor / cycles:.0%}",
        f"{replay:.0%}",
        f"{low:.0f} to {high:.0f}",
    ]


def _per_product(sweep: list[Instruction], products: float) -> list[str]:
    found = pipes.mix(sweep)
    return [f"{found[kind] / products:.2f}" for kind in KINDS]


ATTENTION_HEADERS = [
    "kernel",
    "tile, warps, stages",
    "registers",
    "stack",
    "shared",
    "occupancy",
    *KINDS,
    "bound",
    "ceiling",
    "replay",
    "projection, TFLOP/s",
]


def memory_cases() -> list[rows.Case]:
    return [case for case in rows.cases() if case.dtype == "bfloat16" and case.arch == 80]


def memory_rows(case: rows.Case) -> list[list[str]]:
    return [
        _memory_row(f"{name}, {case.memory.name}", launch)
        for name, launch in rows.kernels(case).items()
    ]


def _memory_row(name: str, launch: Launch) -> list[str]:
    code = machine_code(launch.compiled)
    hot, _ = rows.hot_loop(code.sass)
    shared, n_warps = launch.compiled.metadata.shared, launch.compiled.metadata.num_warps
    pipe, cycles = pipes.bound(hot)
    of_a_thread = widths(hot, "LDG") + widths(hot, "STG")  # bits: how many
    n_bytes = 32 * sum(bits * n for bits, n in of_a_thread.items()) // 8
    # bytes that DRAM brings to a sub-partition while its busiest pipe works
    dram = pipes.DRAM / (pipes.N_SM * 4 * pipes.CLOCK) * cycles
    found = pipes.mix(hot)
    return [
        name,
        *map(str, (n_warps, code.registers, code.stack, shared)),
        str(pipes.occupancy(code.registers, shared, n_warps)),
        *(str(found[kind]) for kind in KINDS if kind != "tensor"),
        str(n_bytes),
        "DRAM" if n_bytes > dram else pipe,
        f"{min(1, n_bytes / dram):.0%}",
    ]


MEMORY_HEADERS = [
    "kernel, operator and shape",
    "warps",
    "registers",
    "stack",
    "shared",
    "occupancy",
    *(kind for kind in KINDS if kind != "tensor"),
    "bytes",
    "bound",
    "ceiling",
]


# ---- projection of real calls

# Matrix products of each kernel over the two of the forward.
PRODUCTS = {"fwd": 1.0, "dq": 1.5, "dkdv": 2.0}
PASSES = {"fwd": ("fwd",), "bwd": ("dq", "dkdv")}
COPY = 0.8, 0.9  # share of the DRAM bandwidth that a large copy reaches

ON_CALLS = """\
## Projection of real calls, ms

**Not measured.** Attention: visible pairs at the projected rates above. Memory-bound operators:
the bytes they must move at {0:.0%} to {1:.0%} of the DRAM bandwidth, as large copies do. A GPU does
not get below the first figure; launches, tails and clocks come on top of the second.
"""


def replays(table: list[list[str]]) -> dict[str, float]:
    """Shares of the tensor peak in rows of `attention_row`, by kernel and head dim."""
    column = ATTENTION_HEADERS.index("replay")
    return {row[0]: float(row[column].rstrip("%")) / 100 for row in table}


def projections(replay: dict[str, float]) -> list[list[str]]:
    """Rows of shape, forward and backward, for all real shapes of the models."""
    found = []
    for shape in REAL:
        times = []
        for kernels in PASSES.values():
            cycles = sum(PRODUCTS[k] / replay[f"{k} D {shape.head_dim}"] for k in kernels)
            times.append(1e3 * shape.flops("fwd") * cycles / pipes.TENSOR_PEAK)
        found.append([shape.name, *(_range(t, MEASURED_OVER_REPLAY) for t in times)])
    for case in CASES["real"]:
        floor = case.floor(torch.bfloat16)
        times = (1e3 * n_bytes / pipes.DRAM for n_bytes in floor)
        found.append([case.name, *(_range(t, COPY) if t else "-" for t in times)])
    return found


# ---- projection of a model's step

ON_STEPS = f"""\
## Projection of a step of each model, ms

**Not measured.** One evaluation with guidance at released size, in bf16: every operator that it
calls takes as long as the slower of its arithmetic and its memory. Attention and what is bound by
memory: as above, PyTorch's own operators (*other*: activations, copies) included. Linear layers:
{models.CUBLAS[0]:.0%} to {models.CUBLAS[1]:.0%} of the dense tensor peak. Large products
of cuBLAS are assumed to reach that; it was not measured. Launches, tails and clocks come on top.
"""


def step_row(step: models.Step, replay: dict[str, float]) -> list[str]:
    def rates(head_dim: int) -> tuple[float, float]:
        rate = pipes.TENSOR_PEAK / 1e12 * replay[f"fwd D {head_dim}"]
        return MEASURED_OVER_REPLAY[0] * rate, MEASURED_OVER_REPLAY[1] * rate

    return [step.spec.name, *models.projected(models.counted(step), rates, COPY)]


# ---- projection of what was measured elsewhere

ON_MEASURED = """\
## Projection of calls measured on other GPUs, ms

**Not measured on an A100.** Ours in bf16, as if it reached the same share there of what large
matrix products and copies reach, which is assumed as above.
"""


def measured_rows(results: Path) -> list[list[str]]:
    low, high = (share * pipes.TENSOR_PEAK / 1e12 for share in models.CUBLAS)
    copies = COPY[0] * pipes.DRAM / 1e9, COPY[1] * pipes.DRAM / 1e9
    return measured.projections(results, {"tflops": (low, high), "gbps": copies})


def _range(best: float, shares: tuple[float, float]) -> str:
    low, high = shares
    return f"{best / high:.3g} to {best / low:.3g}"


def report(jobs: int) -> str:
    """The page `static.md`; raises RuntimeError where a kernel does not compile."""
    on_attention = list(inspect_all(attention_row, attention_cases(), jobs))
    on_memory = list(inspect_all(memory_rows, memory_cases(), jobs))
    if failed := [row for row in (*on_attention, *on_memory) if isinstance(row, str)]:
        raise RuntimeError("; ".join(failed))
    replay = replays(on_attention)
    steps = [step_row(step, replay) for step in models.STEPS]
    sections = (
        INTRODUCTION.format(version=triton.__version__),
        ON_ATTENTION,
        markdown([ATTENTION_HEADERS, *on_attention]),
        ON_MEMORY,
        markdown([MEMORY_HEADERS, *chain.from_iterable(on_memory)]),
        ON_CALLS.format(*COPY),
        markdown([["call", "fwd", "bwd"], *projections(replay)]),
        ON_STEPS,
        markdown([models.HEADERS, *steps]),
    )
    if elsewhere := measured_rows(RESULTS):
        sections += (ON_MEASURED, markdown([measured.HEADERS, *elsewhere]))
    return "\n".join(sections)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    args = parser.parse_args()
    page = report(args.jobs)
    if args.write:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(page)
    sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
