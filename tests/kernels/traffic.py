"""Bytes that the memory-bound operators move, counted; writes tests/kernels/traffic_table.md.

    python tests/kernels/traffic.py                    every operator at its real shapes
    python tests/kernels/traffic.py --only segment     cases whose name holds a word
    python tests/kernels/traffic.py --write            renew tests/kernels/traffic_table.md

All in fp16, in units of one tensor [B, T, D] (of one latent). Forward is a call that keeps nothing
for gradients, backward what follows one that does:

* floor: what must move once, as `bench.memory.registry` says;
* ours: what the Triton kernels load and store, counted in the interpreter under the launch
  configuration of sm_80, and what the PyTorch operators around them read and write;
* compile: what the kernels that Inductor makes of the eager code access, by its own count;
* eager: inputs and outputs of every PyTorch operator of the eager code.

A load or store counts each address once: caches are taken to serve one instruction and no more.
Eager code and Inductor are traced at the real shape, without data. Kernels run on few tokens: more
tokens are more whole programs, each moving the same bytes, so small counts tell the real one.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

import numpy as np
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

from bench.memory.registry import CASES, MemoryCase  # noqa: E402
from tests.aot.compile import markdown, table_rows  # noqa: E402
from vidgen.ops import EAGER, FUSED  # noqa: E402
from vidgen.shapes import TokenShape  # noqa: E402
from vidgen_kernels.common.launch import architecture  # noqa: E402
from vidgen_kernels.common.registration import OPS  # noqa: E402
from vidgen_kernels.testing import replaced  # noqa: E402

TABLE = Path(__file__).with_name("traffic_table.md")
DTYPE = torch.float16  # bf16 cannot be interpreted
ARCH = 80
# The first real shape of each variant: other shapes move as much in units.
REAL = list({case.variant: case for case in reversed(CASES["real"])}.values())[::-1]


class Moved(NamedTuple):
    """Bytes of one pass each."""

    fwd: float
    bwd: float

    def __add__(self, other):
        return Moved(self.fwd + other.fwd, self.bwd + other.bwd)

    def __mul__(self, factor):
        return Moved(self.fwd * factor, self.bwd * factor)


class Tally(TorchDispatchMode):
    """Adds up what PyTorch operators read and write; kernels add to it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        if op.namespace == "aten":
            self.bytes += _moved(op, args, kwargs, results)
        return results


def _moved(op: Any, args: tuple, kwargs: dict, results: Any) -> int:
    name = op.name().split("::")[1]
    if name.startswith(("empty", "new_empty")):
        return 0
    read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    read += [x for key, x in kwargs.items() if isinstance(x, Tensor) and key != "out"]
    written = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    if name.startswith(("copy_", "fill_", "zero_")):
        read = read[1:]
    elif not op._schema.is_mutable:
        inputs = {x.untyped_storage()._cdata for x in read}
        if all(x.untyped_storage()._cdata in inputs for x in written):
            return 0  # a view
    return sum(map(_nbytes, read)) + sum(map(_nbytes, written))


def _nbytes(x: Tensor) -> int:
    """An expanded tensor lies in memory once."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * x.itemsize


@contextmanager
def launches_count(tally: Tally, largest: dict[str, int]) -> Iterator[None]:
    """Interpreted kernels, launched as on a GPU, add to the tally; so does PyTorch around them.

    ``largest``: constants by name, raised to the largest that a kernel has.
    """
    builder = type(interpreter.interpreter_builder)
    load, store, launch = (
        builder.create_masked_load,
        builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )

    def counted(pointers, mask) -> None:
        addresses = pointers.data[mask.data]
        is_sorted = addresses.size < 2 or (np.diff(addresses) > 0).all()
        n_distinct = addresses.size if is_sorted else np.unique(addresses).size
        tally.bytes += n_distinct * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, pointers, mask, *args):
        counted(pointers, mask)
        return load(self, pointers, mask, *args)

    def counted_store(self, pointers, value, mask, *args):
        counted(pointers, mask)
        return store(self, pointers, value, mask, *args)

    def quiet_launch(self, *args, **options):
        largest.update({name: max(n, options.get(name, 1)) for name, n in largest.items()})
        with _disable_current_modes():  # the interpreter has tensors of its own
            launch(self, *args, **options)

    def inside(function):
        def operator(*args):
            with tally:
                return function(*args)

        return operator

    with ExitStack() as stack:
        for owner, name, function in (
            (builder, "create_masked_load", counted_load),
            (builder, "create_masked_store", counted_store),
            (interpreter.GridExecutor, "__call__", quiet_launch),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        for op in OPS.values():
            stack.enter_context(mock.patch.object(op, "launch", inside(op.launch)))
        stack.enter_context(replaced(architecture, lambda x: ARCH))
        yield


def run_both_ways(
    case: MemoryCase, call: Callable, inputs: dict[str, Any], tally: Tally | None = None
) -> Moved:
    """What a call without gradients moves, and what the gradients of one with them do."""
    counted = tally or nullcontext()
    with torch.no_grad(), counted:
        call(inputs)
    fwd = tally.bytes if tally else 0
    outputs = [y for y in call(inputs) if y.requires_grad]
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    upstream = case.upstream([torch.zeros_like(y) for y in outputs])
    before = tally.bytes if tally else 0
    with counted:
        torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return Moved(fwd, tally.bytes - before if tally else 0)


def kernels(case: MemoryCase) -> Moved:
    """What our operators move; only in a process that interprets."""
    largest = {"ROWS": 1, "TILES": 1}  # constants of the kernels

    def count(**sizes: int) -> Moved:
        small = replace(case, shape=replace(case.shape, **sizes))
        tally = Tally()
        with launches_count(tally, largest):
            return run_both_ways(
                small, lambda x: small.call(FUSED, x), small.inputs(DTYPE, "cpu"), tally
            )

    shape = case.shape
    if isinstance(shape, TokenShape) and shape.batch > 2:  # rows of a batch are alike
        pair = kernels(replace(case, shape=replace(shape, batch=2)))
        return pair * (shape.batch / 2)
    if not isinstance(shape, TokenShape):  # planes are alike
        n_planes = shape.batch * shape.channels * shape.frames
        return _extrapolate(
            lambda channels: count(batch=1, channels=channels, frames=1), channels=(n_planes, 1)
        )
    count(text=min(shape.text, 1), video=1)
    rows, tiles = largest.values()
    if case.op == "qk_norm_rope":  # the tiles of a program are heads
        hidden = shape.hidden, tiles * shape.head_dim
        return _extrapolate(
            count, text=(shape.text, rows), video=(shape.video, rows), hidden=hidden
        )
    period = rows * tiles
    return _extrapolate(count, text=(shape.text, period), video=(shape.video, period))


def _extrapolate(count: Callable[..., Moved], **axes: tuple[int, int]) -> Moved:
    """``count`` at sizes, each with the period after which programs repeat, from small ones."""
    if not axes:
        return count()
    (axis, (size, period)), *others = axes.items()
    first = (size - 1) % period + 1 if size else 0
    sizes = [size] if size <= first + period else [first, first + period]
    a, *b = (_extrapolate(partial(count, **{axis: n}), **dict(others)) for n in sizes)
    if not b:
        return a
    n_periods = (size - first) // period
    return a * (1 - n_periods) + b[0] * n_periods


def eager(case: MemoryCase) -> Moved:
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = case.inputs(DTYPE, "cpu")
        return run_both_ways(case, lambda x: case.call(EAGER, x), inputs, Tally())


def inductor(case: MemoryCase) -> Moved:
    """The sum over the kernels that Inductor would generate, after its fusions, for a CPU."""
    moved = {"fwd": 0, "training": 0, "bwd": 0}

    def count(graph_module, example_inputs, *, is_backward=False, is_inference=False, **options):
        record_original_output_strides(graph_module)
        graph = GraphLowering(graph_module)
        with (
            V.set_graph_handler(graph),
            V.set_real_inputs([]),
            V.set_debug_handler(DebugContext()),
        ):
            graph.run(*example_inputs)
            graph._update_scheduler()
            kind = "bwd" if is_backward else "fwd" if is_inference else "training"
            moved[kind] += graph.count_bytes()[0]
        forward = graph_module.forward
        forward_boxed = lambda args: forward(*args)  # noqa: E731
        forward_boxed._boxed_call = True
        return forward_boxed

    def backend(graph_module, example_inputs):
        return compile_fx(graph_module, example_inputs, inner_compile=count)

    torch._dynamo.reset()
    with (
        functorch_config.patch(enable_autograd_cache=False),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        inputs = case.inputs(DTYPE, "cpu")
        compiled = torch.compile(lambda x: case.call(EAGER, x), backend=backend)
        run_both_ways(case, compiled, inputs)
    return Moved(moved["fwd"], moved["bwd"])


def floor(case: MemoryCase) -> Moved:
    return Moved(*case.floor(DTYPE))


COLUMNS = {"floor": floor, "ours": kernels, "compile": inductor, "eager": eager}
HEADER = ["case", *(f"{name}, {d}" for d in Moved._fields for name in COLUMNS)]


def cells(case: MemoryCase, column: str) -> dict[str, str]:
    """Cells of the table by column: units, and in brackets the ratio to the floor."""
    unit = case.shape.numel * DTYPE.itemsize
    found = {}
    for direction, moved, least in zip(
        Moved._fields, COLUMNS[column](case), floor(case), strict=True
    ):
        ratio = "" if column == "floor" else f" ({moved / least:.2f})"
        found[f"{column}, {direction}"] = f"{moved / unit:.2f}{ratio}"
    return found


def read_table() -> tuple[str, dict[str, dict[str, str]]]:
    """The PyTorch version of the committed table, and its cells by case and column."""
    text = TABLE.read_text()
    rows = {name: dict(zip(HEADER, row, strict=True)) for name, row in table_rows(text).items()}
    return re.search(r"PyTorch (\S+);", text)[1], rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases that hold it")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}, every case")
    args = parser.parse_args()
    if args.write and (args.only or len(args.columns) < len(COLUMNS)):
        parser.error("--write takes every case, no choice of them")
    rows = []
    for case in REAL:
        if all(word in case.name for word in args.only):
            found = {"case": case.name}
            for column in args.columns:
                found |= cells(case, column)
            rows.append([found[name] for name in HEADER if name in found])
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    table = markdown([[name for name in HEADER if name in found], *rows])
    if args.write:
        TABLE.write_text(TITLE.format(version=torch.__version__.split("+")[0]) + table)
    sys.stdout.write(table)
    return 0


TITLE = """# Bytes that the memory-bound operators move

Traced by PyTorch {version}; written by `python tests/kernels/traffic.py --write`, which explains
it. In units of one tensor `[B, T, D]` (of one latent) of 16 bit; in brackets, of the floor.

"""

if __name__ == "__main__":
    sys.exit(main())
