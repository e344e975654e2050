"""`vidgen verify`: numbers recorded from the official models, recomputed by ours.

A case is ``case.json`` with ``case.safetensors``: ``w.`` weights, ``in.`` inputs, ``out.`` results.
Its ``model`` and ``kind`` choose the function of `KINDS` that recomputes it, its name never does.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.ops import EAGER, FUSED, Ops
from vidgen_kernels import IntervalMask
from vidgen_kernels._triton import is_interpreted

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    path: Path
    model: str
    kind: str
    config: dict[str, Any]
    atol: float
    rtol: float

    def tensors(self, prefix: str, device: str, dtype: torch.dtype | None = None) -> Tensors:
        """The tensors below ``prefix``, names without it; floating-point ones in ``dtype``."""
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


def set_mask(rank: Tensor) -> Tensor:
    """What the sorted intervals mean for the tokens in their own order, bool [B or 1, T, T]."""
    order = torch.atleast_2d(rank).argsort(dim=-1, stable=True)
    dense = IntervalMask.from_ranks(torch.atleast_2d(rank).gather(1, order)).to_dense()
    back = order.argsort(dim=-1)
    by_query = dense.gather(1, back[:, :, None].expand_as(dense))
    return by_query.gather(2, back[:, None, :].expand_as(dense))


OPS = {"eager": EAGER, "fused": FUSED}


def set_attention(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """NOVA's attention between sets: the call, the module around it, and tokens in any order."""
    if config.get("scale", "1/sqrt(head_dim)") != "1/sqrt(head_dim)":
        raise ValueError(f"scale: expected 1/sqrt(head_dim), got {config['scale']}")
    rank = inputs["rank"]
    results = {"mask": set_mask(rank).squeeze(0)}

    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    out, lse = ops.set_masked_attention(q, k, v, rank, return_lse=True)
    results |= {"o": out, "lse": lse}
    grads = torch.autograd.grad(out, (q, k, v), inputs["grad_o"])
    results |= zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)

    if "x" in inputs:
        x = inputs["x"].requires_grad_()
        qkv = F.linear(x, w["qkv.weight"], w.get("qkv.bias"))
        heads = qkv.unflatten(-1, (3, config["heads"], -1)).permute(2, 0, 3, 1, 4)
        out = ops.set_masked_attention(*heads.unbind(), rank)
        y = F.linear(out.transpose(1, 2).flatten(2), w["proj.weight"], w.get("proj.bias"))
        results |= {"y": y, "grad_x": torch.autograd.grad(y, x, inputs["grad_y"])[0]}

    if "perm" in inputs:
        perm = inputs["perm"]
        rank_perm = rank.expand(perm.shape).gather(1, perm)
        index = perm[:, None, :, None].expand(q.shape)
        permuted = (x.detach().gather(2, index) for x in (q, k, v))
        o_perm = ops.set_masked_attention(*permuted, rank_perm)
        results |= {"rank_perm": rank_perm, "o_perm": o_perm}
    return results


KINDS = {("nova", "set_attention"): set_attention}


def find_cases(folder: Path) -> Iterator[Case]:
    """JSON files below ``folder`` that say model and kind; others are tables, not cases."""
    for path in sorted(folder.rglob("*.json")):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and "model" in data and "kind" in data:
            allowed = data.get("suggested_tolerance", {})
            bounds = float(allowed.get("atol", 0.0)), float(allowed.get("rtol", 0.0))
            yield Case(path, data["model"], data["kind"], data.get("config", {}), *bounds)


def check(case: Case, ops: str, dtype: torch.dtype, device: str) -> Outcome:
    """Recomputes a case; below fp32 a tensor may also be twice as far off as eager PyTorch is."""
    recompute = KINDS.get((case.model, case.kind))
    if recompute is None:
        return Outcome("SKIP", reason=f"not built yet: {case.model} {case.kind}")

    def results(name: str) -> Tensors:
        w = case.tensors("w.", device, dtype)
        return recompute(case.config, w, case.tensors("in.", device, dtype), OPS[name])

    try:
        expected = case.tensors("out.", device, torch.float64)
        actual = results(ops)
        same_dtype = results("eager") if dtype in (torch.float16, torch.bfloat16) else None
    except Exception as problem:  # whatever is wrong with one case, the others still run
        return Outcome("FAIL", reason=f"{type(problem).__name__}: {problem}")
    if not expected or not expected.keys() <= actual.keys():
        missing = ", ".join(sorted(expected.keys() - actual.keys()))
        return Outcome(
            "FAIL", reason=f"nothing computed for: {missing or 'a case without outputs'}"
        )
    worst = Outcome("PASS", 0.0, case.atol)
    for name, reference in expected.items():
        if actual[name].shape != reference.shape:
            shapes = f"expected {list(reference.shape)}, got {list(actual[name].shape)}"
            return Outcome("FAIL", reason=f"shape of {name}: {shapes}")
        error = max_error(actual[name], reference)
        tolerance = 0.0  # integers, masks and indices must be equal
        if reference.is_floating_point():
            size = reference.abs().max().item() if reference.numel() else 0.0
            tolerance = case.atol + case.rtol * size
            if same_dtype is not None:
                rounding = torch.finfo(dtype).eps * size
                tolerance += 2 * max_error(same_dtype[name], reference) + rounding
        if not error <= tolerance:  # also where the error is NaN
            return Outcome("FAIL", error, tolerance, f"worst of {name}")
        if worst.error is None or error * (worst.tolerance or 0.0) > worst.error * tolerance:
            worst = Outcome("PASS", error, tolerance)
    return worst


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference; equal infinities do not differ."""
    actual, expected = actual.detach().double(), expected.double()
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
    parser.add_argument("--ops", choices=sorted(OPS), default="fused", help="default: fused")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="default: float32"
    )


def run(args: argparse.Namespace) -> int:
    """Prints a line per case; 0 when none failed, 1 otherwise."""
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
