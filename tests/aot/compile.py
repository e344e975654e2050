"""Compiles kernels for GPUs that are not at hand, and reads what the compiler made of them.

The real launchers run, with a driver that only knows its target: kernels get the argument types,
alignments and constants of a real call, and compile where they would be launched. Registers and
stack are the cubin's own; what a loop does is counted in its machine code.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vidgen_kernels.common.launch import architecture
from vidgen_kernels.testing import replaced

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

ARCHS = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may ask for
DTYPES = {x: getattr(torch, x) for x in ("bfloat16", "float16", "float32", "float64")}


class Target:
    """All of a Triton driver that compiling takes; each architecture is a device of its own."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"aot sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


class Launch(NamedTuple):
    """One launch that was compiled instead."""

    kernel: JITFunction
    options: dict[str, Any]  # keyword arguments: constants, warps, stages
    compiled: Any


@contextmanager
def launches_compile(arch: int, *wanted: JITFunction) -> Iterator[list[Launch]]:
    """Launches of the wanted kernels, by default all, compile into the list; others do nothing.

    Every module of `vidgen_kernels` believes its tensors to be on a GPU of this architecture.
    """
    launches = []

    def launch(self: JITFunction, grid):
        def run(*args, **options):
            if not wanted or self in wanted:
                compiled = self.run(*args, grid=grid, warmup=True, **options)
                launches.append(Launch(self, options, compiled))

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", Target(arch)))
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", launch))
        stack.enter_context(replaced(architecture, lambda x: arch))
        yield launches


class MachineCode(NamedTuple):
    registers: int
    stack: int  # bytes
    sass: str


def machine_code(compiled: Any) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        resources = cuobjdump("--dump-resource-usage", cubin.name)
        sass = cuobjdump("--dump-sass", cubin.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    return MachineCode(registers, stack, sass)


def cuobjdump(*args: str) -> str:
    return subprocess.run([CUOBJDUMP, *args], capture_output=True, text=True, check=True).stdout


class Instruction(NamedTuple):
    address: int
    opcode: str
    operands: str
    control: int  # what the assembler decided about timing, bits 105 to 125 of the code

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]


def instructions(sass: str) -> list[Instruction]:
    """Every instruction; the control bits begin at bit 41 of the second word of its code."""
    code = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)([^;]*);"
        r"(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* (0x[0-9a-f]{16}) \*/)?",
        sass,
    )
    return [
        Instruction(int(address, 16), opcode, operands, int(word or "0", 16) >> 41)
        for address, opcode, operands, word in code
    ]


def loops(sass: str) -> list[list[Instruction]]:
    """Each innermost loop: from the target of a backward branch to the branch."""
    code = instructions(sass)
    spans = []
    for line in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", line.operands)
        if line.opcode.startswith("BRA") and target and int(target[1], 16) < line.address:
            spans.append((int(target[1], 16), line.address))
    return [
        [line for line in code if first <= line.address <= last]
        for first, last in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]


def count(code: Iterable[Instruction], *kinds: str) -> int:
    return sum(line.kind in kinds for line in code)


def widths(code: Iterable[Instruction], kind: str) -> Counter[int]:
    """How many loads (`LDG`) or stores (`STG`) of global memory move how many bits a thread."""
    found = Counter()
    for line in code:
        name, *modifiers = line.opcode.split(".")
        if name == kind or (name, kind) == ("LDGSTS", "LDG"):  # LDGSTS: straight to shared memory
            known = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
            found[next((known[m] for m in modifiers if m in known), 32)] += 1
    return found


def inspect_all(inspect: Callable[[Any], Any], cases: Sequence, jobs: int) -> Iterable[Any]:
    """Reports, or what went wrong as a string, in order, by `jobs` processes."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(_try, [inspect] * len(cases), cases)
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            yield from results
        else:
            console = Console(stderr=True)
            yield from track(results, "Compiling", len(cases), console=console, transient=True)


def _try(inspect: Callable[[Any], Any], case: Any) -> Any:
    try:
        return inspect(case)
    except Exception as error:  # one bad configuration does not stop a search for good ones
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"
        for cells in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def table_rows(text: str) -> dict[str, list[str]]:
    """The rows of a table as `markdown` writes it, by their first cells."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    return {cells[0]: cells for cells in rows}


def read_table(path: Path) -> tuple[str, dict[str, list[str]]]:
    """The Triton version of a committed table, and its rows by case."""
    text = path.read_text()
    return re.search(r"Triton ([\w.]+)", text)[1], table_rows(text)


def write_table(path: Path, title: str, script: str, table: str) -> None:
    version = f"Compiled by Triton {triton.__version__}"
    source = f"written by `python tests/aot/{script} --write`, whose `Report` explains the columns"
    path.write_text(f"# {title}\n\n{version}; {source}.\n\n{table}")
