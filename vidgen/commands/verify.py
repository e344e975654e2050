"""`vidgen verify`: recomputes golden cases, which were recorded from the official models.

A case is ``case.json`` with ``case.safetensors``, whose tensors are named ``w.`` (weights), ``in.``
(inputs) and ``out.`` (results). Or it is JSON alone, with the results in ``tables``; the plain
numbers of a table are the inputs. ``model`` and ``kind`` of a case select the function that
recomputes it (`KINDS`, from ``checks/golden.py`` of each model); its file name does not matter.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidgen.common.checkpoint import read_json
from vidgen.common.golden import Pixels, Results, Where, flatten
from vidgen.common.options import add_ops_argument
from vidgen.nova.checks import golden as nova
from vidgen.ops import OPS
from vidgen.pyramid_flow.checks import golden as pyramid_flow
from vidgen.repvideo.checks import golden as repvideo
from vidgen_kernels.common.launch import is_interpreted

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

Tensors = dict[str, Tensor]

# Further parts of a case's JSON, which are added to its `config` under these names.
SECTIONS = ("training", "sampling")


class Case(NamedTuple):
    path: Path
    model: str
    kind: str
    config: dict[str, Any]
    atol: float
    rtol: float
    tables: Tensors
    meanings: dict[str, str]

    def tensors(self, prefix: str, device: str, dtype: torch.dtype | None = None) -> Tensors:
        """The tensors that begin with ``prefix``, without it; floating-point ones in ``dtype``."""
        from safetensors import safe_open

        if not self.path.with_suffix(".safetensors").exists():
            return {}
        found = {}
        with safe_open(self.path.with_suffix(".safetensors"), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(prefix):
                    x = file.get_tensor(name)
                    to = dtype if x.is_floating_point() else None
                    found[name.removeprefix(prefix)] = x.to(device=device, dtype=to)
        return found


class Outcome(NamedTuple):
    status: str  # PASS, FAIL or SKIP
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""


# {model: {kind: function(config, weights, inputs, ops) -> results by name}}. Some cases say what to
# compute only in the names of their results, or in the descriptions of these: functions with the
# parameters `outputs` and `meanings` are given them.
KINDS = {"nova": nova.KINDS, "pyramid_flow": pyramid_flow.KINDS, "repvideo": repvideo.KINDS}


def find_cases(folder: Path) -> Iterator[Case]:
    """The cases below ``folder``: JSON files with a model and a kind. Other files are ignored."""
    for path in sorted(folder.rglob("*.json")):
        data = read_json(path)
        if isinstance(data, dict) and "model" in data and "kind" in data:
            try:
                case = _read_case(path, data)
            except (AttributeError, TypeError, ValueError) as problem:
                raise ValueError(f"expected a case in {path}: {problem}") from problem
            yield case


def _read_case(path: Path, data: dict[str, Any]) -> Case:
    allowed = data.get("suggested_tolerance", {})
    bounds = float(allowed.get("atol", 0.0)), float(allowed.get("rtol", 0.0))
    config = data.get("config", {}) | {k: data[k] for k in SECTIONS if k in data}
    expected: Tensors = {}
    if "tables" in data:
        expected = flatten(data["tables"])
        config["tables"] = [
            {name: x for name, x in table.items() if not isinstance(x, (dict, list))}
            for table in data["tables"]
        ]
    meanings = {
        name.removeprefix("out."): x.get("meaning", "")
        for name, x in data.get("tensors", {}).items()
        if name.startswith("out.")
    }
    return Case(path, str(data["model"]), str(data["kind"]), config, *bounds, expected, meanings)


def check(case: Case, ops: str, dtype: torch.dtype, device: str) -> Outcome:
    """Recomputes a case and compares the results.

    In 16 bits the tolerance grows by twice the error of eager PyTorch, plus one rounding.
    """
    recompute = KINDS.get(case.model, {}).get(case.kind)
    if recompute is None:
        return Outcome("SKIP", reason=f"not built yet: {case.model} {case.kind}")

    names: dict[str, Any] = {}

    def results(name: str) -> Results:
        w = case.tensors("w.", device, dtype)
        inputs = case.tensors("in.", device, dtype)
        return recompute(case.config, w, inputs, OPS[name], **names)

    try:
        expected = case.tensors("out.", device, torch.float64) | case.tables
        told = {"outputs": sorted(expected), "meanings": case.meanings}
        parameters = inspect.signature(recompute).parameters
        names = {name: x for name, x in told.items() if name in parameters}
        actual = results(ops)
        same_dtype = results("eager") if dtype in (torch.float16, torch.bfloat16) else None
    except Exception as problem:  # an error in one case must not end the others
        return Outcome("FAIL", reason=f"{type(problem).__name__}: {problem}")
    if not expected or not expected.keys() <= actual.keys():
        missing = ", ".join(sorted(expected.keys() - actual.keys()))
        return Outcome(
            "FAIL", reason=f"nothing computed for: {missing or 'a case without outputs'}"
        )
    if case.tables and (more := actual.keys() - expected.keys()):
        return Outcome("FAIL", reason=f"not in the tables: {', '.join(sorted(more))}")
    worst = Outcome("PASS", 0.0, case.atol)
    for name, reference in expected.items():
        values = _values(actual[name])
        if values.shape != reference.shape:
            shapes = f"expected {list(reference.shape)}, got {list(values.shape)}"
            return Outcome("FAIL", reason=f"shape of {name}: {shapes}")
        reference = _only_compared(reference, actual[name])
        error = max_error(_only_compared(values, actual[name]), reference)
        is_rounded = reference.is_floating_point() or isinstance(actual[name], Pixels)
        tolerance = 0.0  # integers, masks and indices must be equal
        if is_rounded:
            size = reference.abs().max().item() if reference.numel() else 0.0
            tolerance = case.atol + case.rtol * size if reference.is_floating_point() else 1.0
            if same_dtype is not None:
                rounding = torch.finfo(dtype).eps * size
                eager = _only_compared(_values(same_dtype[name]), actual[name])
                tolerance += 2 * max_error(eager, reference) + rounding
        if not error <= tolerance:  # also where the error is NaN
            return Outcome("FAIL", error, tolerance, f"worst of {name}")
        if worst.error is None or error * (worst.tolerance or 0.0) > worst.error * tolerance:
            worst = Outcome("PASS", error, tolerance)
    return worst


def _values(result: Tensor | Where | Pixels) -> Tensor:
    return result if isinstance(result, Tensor) else result.values


def _only_compared(x: Tensor, result: Tensor | Where | Pixels) -> Tensor:
    """The elements of ``x`` that are compared: with `Where` only some."""
    return x[result.compared.expand_as(x)] if isinstance(result, Where) else x


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; equal infinities have the difference 0."""
    # the tables of schedules are on the CPU even if the case is not
    actual, expected = actual.detach().to(expected.device).double(), expected.double()
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return difference.max().item() if difference.numel() else 0.0


def path_taken() -> str:
    if is_interpreted():
        return "interpreted"
    return "cuda" if torch.cuda.is_available() else "portable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="DIR",
        help="folder with the cases (default: $VIDGEN_GOLDEN, else tests/golden)",
    )
    add_ops_argument(parser)
    parser.add_argument(
        "--dtype",
        type=lambda name: SHORT.get(name, name),
        choices=sorted(DTYPES),
        default="float32",
        help="or fp32, bf16 ... for short (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints a line per case; 0 if none failed, 1 otherwise."""
    folder = args.golden or Path(os.environ.get("VIDGEN_GOLDEN") or GOLDEN)
    path = path_taken()
    if path == "interpreted" and args.dtype == "bfloat16":
        return _error(
            "dtype: bfloat16 cannot be interpreted, Triton's interpreter computes it wrongly"
        )
    try:
        cases = list(find_cases(folder))
    except (OSError, ValueError) as problem:
        return _error(f"golden: {problem}")
    if not cases:
        hint = "name their folder with --golden DIR or VIDGEN_GOLDEN"
        return _error(f"golden: expected cases below {folder}, found none; {hint}")
    device = "cuda" if path == "cuda" else "cpu"
    sys.stdout.write(f"path: {path}, ops: {args.ops}, dtype: {args.dtype}, cases: {folder}\n")
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    for case in cases:
        outcome = check(case, args.ops, DTYPES[args.dtype], device)
        counts[outcome.status] += 1
        numbers = ("-" if x is None else f"{x:.2e}" for x in (outcome.error, outcome.tolerance))
        words = (outcome.status, f"{case.model}/{case.path.stem}", *numbers, outcome.reason)
        sys.stdout.write(" ".join(filter(None, words)) + "\n")
        sys.stdout.flush()
    passed, failed, skipped = counts.values()
    sys.stdout.write(f"{passed} passed, {failed} failed, {skipped} skipped\n")
    return 1 if failed else 0


def _error(message: str) -> int:
    sys.stderr.write(f"vidgen verify: {message}\n")
    return 1
