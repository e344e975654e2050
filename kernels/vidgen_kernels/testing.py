"""Helpers of tests: random masks and tensors, comparison with `reference`, patching a function.

Random masks are drawn as *recipes*: the name of a constructor and its arguments, which may be
recipes again. `build_mask` turns a recipe into an `IntervalMask`, `dense_mask` into the dense mask
that `reference` defines for it.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import reference
from .attention.intervals import IntervalMask
from .attention.mask_inputs import BlockLengths
from .attention.runs import MAX_INTERVALS

EXACT = 1e-12  # largest error in fp64, where sums may be in another order

Recipe = tuple[str, dict[str, Any]]  # name of a constructor of IntervalMask, its arguments


class Layout(NamedTuple):
    recipe: Recipe
    mask: IntervalMask
    dense: Tensor  # bool [B or 1, Tq, Tk]


def random_layout(
    rng: random.Random, max_tokens: int, device: str = "cpu", as_tensors: bool = False
) -> Layout:
    """A random mask that fits in three intervals, at most ``max_tokens`` queries and keys."""
    while True:
        recipe = random_recipe(rng, max_tokens)
        dense = dense_mask(recipe)
        if intervals_needed(dense) <= MAX_INTERVALS:
            mask = build_mask(recipe, device, as_tensors)
            return Layout(recipe, mask, dense.to(device))


def random_recipe(rng: random.Random, max_tokens: int) -> Recipe:
    return _random_recipe(rng, max_tokens, n_batch=rng.choice([1, 1, 2, 3]), depth=2)


def _random_recipe(rng: random.Random, max_tokens: int, n_batch: int, depth: int) -> Recipe:
    kinds = ["block_causal", "block_causal", "teacher_forcing", "full", "from_ranks"]
    kind = rng.choice([*kinds, "pack", "pad_text", "pad_text"] if depth else kinds)
    if kind == "block_causal":
        lengths = _random_lengths(rng, max_tokens)
        start = rng.choice([0, rng.randint(0, len(lengths))])
        blocks = rng.choice([None, range(start, rng.randint(start, len(lengths)))])
        return kind, {"block_lengths": lengths, "query_blocks": blocks, **_random_window(rng)}
    if kind == "teacher_forcing":
        lengths = _random_lengths(rng, max_tokens // 2)
        return kind, {"block_lengths": lengths, **_random_window(rng)}
    if kind == "full":
        q_lengths = _random_lengths(rng, max_tokens)
        k_lengths = _random_lengths(rng, max_tokens, n_blocks=len(q_lengths))
        return kind, {"q_lengths": q_lengths, "k_lengths": rng.choice([q_lengths, k_lengths])}
    if kind == "from_ranks":
        ranks = [_random_ranks(rng, max_tokens, n_batch) for _ in range(2)]
        return kind, {"rank_q": ranks[0], "rank_k": rng.choice([None, ranks[1]])}
    if kind == "pack":
        n_parts = rng.randint(1, 3)
        parts = [
            _random_recipe(rng, max_tokens // n_parts, n_batch, depth - 1) for _ in range(n_parts)
        ]
        return kind, {"masks": parts}
    inner = _random_recipe(rng, max_tokens, n_batch, depth - 1)
    text_length = rng.randint(0, _text_limit(inner))
    valid = [rng.randint(0, text_length) for _ in range(n_batch)]
    return kind, {"mask": inner, "text_length": text_length, "valid_lengths": valid}


def build_mask(recipe: Recipe, device: str = "cpu", as_tensors: bool = False) -> IntervalMask:
    """The `IntervalMask` of a recipe, built from ints or from tensors on ``device``."""

    def lengths(x: list[int]) -> BlockLengths:
        return torch.tensor(x, dtype=torch.int64, device=device) if as_tensors else x

    kind, args = recipe
    if kind == "pack":
        return IntervalMask.pack([build_mask(m, device, as_tensors) for m in args["masks"]])
    if kind == "pad_text":
        inner = build_mask(args["mask"], device, as_tensors)
        return IntervalMask.pad_text(inner, args["text_length"], lengths(args["valid_lengths"]))
    if kind == "from_ranks":
        ranks = (
            None if x is None else torch.tensor(x, device=device, dtype=torch.int64)
            for x in args.values()
        )
        return IntervalMask.from_ranks(*ranks)  # pyright: ignore[reportArgumentType]
    if kind == "full" and args["q_lengths"] == args["k_lengths"]:
        both = lengths(args["q_lengths"])  # the same object: self-attention
        return IntervalMask.full(both, both, device=device)
    args = {name: lengths(x) if name.endswith("lengths") else x for name, x in args.items()}
    return getattr(IntervalMask, kind)(**args, device=device)


def dense_mask(recipe: Recipe) -> Tensor:
    """The mask of a recipe as `reference` defines it, bool ``[B or 1, Tq, Tk]``."""
    kind, args = recipe
    if kind == "pack":
        return reference.pack_masks([dense_mask(m) for m in args["masks"]])
    if kind == "pad_text":
        inner = args["mask"]
        text = args["text_length"], args["valid_lengths"], _has_text_queries(inner)
        return reference.pad_text_mask(dense_mask(inner), *text)
    if kind == "from_ranks":
        rank_q, rank_k = (
            None if x is None else torch.tensor(x, dtype=torch.int64) for x in args.values()
        )
        return reference.rank_mask(rank_q, rank_k)  # pyright: ignore[reportArgumentType]
    return getattr(reference, f"{kind}_mask")(**args)


def intervals_needed(dense: Tensor) -> int:
    """The largest number of runs of True in any row or column."""

    def runs(x: Tensor) -> int:
        starts = torch.nn.functional.pad(x.int(), (1, 0)).diff(dim=-1) > 0
        return int(starts.sum(dim=-1).max()) if starts.numel() else 0

    return max(runs(dense), runs(dense.mT))


def random_qkv(
    dense: Tensor,
    n_heads: int = 2,
    n_kv_heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normally distributed q, k, v in ``dtype`` for a dense mask, on its device."""
    n_batch, n_queries, n_keys = dense.shape
    rng = torch.Generator().manual_seed(seed)
    shapes = [(n_batch, n_heads, n_queries, head_dim)] + [
        (n_batch, n_kv_heads, n_keys, head_dim)
    ] * 2
    q, k, v = (
        torch.randn(s, generator=rng, dtype=torch.float64).to(dense.device, dtype) for s in shapes
    )
    return q, k, v


def check_attention(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    qkv: tuple[Tensor, Tensor, Tensor],
    dense: Tensor,
    softmax_scale: float | None = None,
    use: str = "out lse",
) -> None:
    """Asserts that ``attend(q, k, v) -> (out, lse)`` is `reference.attention`, gradients included.

    ``use`` names the outputs that the loss depends on.
    """
    q, k, v = qkv
    rng = torch.Generator().manual_seed(1)
    do, dlse = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (q.shape, q.shape[:3]))
    do = do.to(q)
    dlse = dlse.to(q.device, torch.promote_types(q.dtype, torch.float32))

    def results(call, qkv):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out, lse = call(*leaves)
        used = [(x, g) for name, x, g in (("out", out, do), ("lse", lse, dlse)) if name in use]
        outputs, upstream = zip(*((x, g.to(x)) for x, g in used), strict=True)
        grads = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
        return out.detach(), lse.detach(), *grads

    def define(q, k, v):
        return reference.attention(q, k, v, dense, softmax_scale)

    out, lse = define(q, k, v)
    upstream = [
        g if name in use else torch.zeros_like(g) for name, g in (("out", do), ("lse", dlse))
    ]
    grads = reference.attention_gradients(*upstream, q, k, v, out, lse, dense, softmax_scale)
    actual, expected = results(attend, qkv), results(define, [x.double() for x in qkv])
    pytorch = [(out, lse, *grads)]
    if q.dtype != torch.float64 and k.numel():
        pytorch.append(results(lambda *x: _fused_by_pytorch(*x, dense, softmax_scale), qkv))
    names = "out", "lse", "dq", "dk", "dv"
    for name, x, exact, *same_dtype in zip(names, actual, expected, *pytorch, strict=True):
        assert_close(name, x, exact, *same_dtype)


def check_op(call: Callable[..., Any], define: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Asserts that ``call(**inputs)`` is ``define(**inputs)`` in fp64, gradients included.

    Both return a tensor or a tuple of tensors and None. The gradients are those of a random
    weighted sum of all outputs, for every input tensor, also in tuples and lists, that requires
    grad.
    """
    expected = _with_gradients(define, inputs, torch.float64)
    same_dtype = _with_gradients(define, inputs, None)
    actual = _with_gradients(call, inputs, None)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        plain = same_dtype[name].to(x.dtype)  # eager code may return a wider dtype
        assert_close(name, x, expected[name], plain)


def _with_gradients(
    call: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    leaves = {}

    def leaf(name: str, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            items = [leaf(f"{name}[{i}]", item) for i, item in enumerate(x)]
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        copy = x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad)
        if x.requires_grad:
            leaves[name] = copy
        return copy

    outputs = call(**{name: leaf(name, x) for name, x in inputs.items()})
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    found = {f"output {i}": x for i, x in enumerate(outputs) if x is not None}
    rng = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in found.values()]
    used = [(x, g.to(x)) for x, g in zip(found.values(), upstream, strict=True) if x.requires_grad]
    if leaves and used:
        differentiated, gradients = zip(*used, strict=True)
        grads = torch.autograd.grad(
            differentiated, list(leaves.values()), gradients, materialize_grads=True
        )
        found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def assert_close(name: str, actual: Tensor, expected: Tensor, *same_dtype: Tensor) -> None:
    """Asserts an error of at most 1e-12 in fp64, else twice that of PyTorch plus one rounding.

    Args:
        expected: the fp64 result.
        same_dtype: results of PyTorch in the dtype of the inputs; the largest error counts.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == same_dtype[0].dtype, f"{name}: {actual.dtype}, not {same_dtype[0].dtype}"
    if actual.numel() == 0:
        return
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: not finite where it should be"
    assert torch.equal(actual[~finite].double(), expected[~finite]), f"{name}: wrong infinities"
    expected = expected[finite]
    budget = EXACT
    if actual.dtype != torch.float64:
        rounding = torch.finfo(actual.dtype).eps * max_error(expected, 0 * expected)
        budget = 2 * max(max_error(x[finite], expected) for x in same_dtype) + rounding
    error = max_error(actual[finite], expected)
    assert error <= budget, f"{name}: max error {error:.3e} above {budget:.3e}"


def max_error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).abs().max().item() if expected.numel() else 0.0


def _fused_by_pytorch(
    q: Tensor, k: Tensor, v: Tensor, dense: Tensor, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention. Some of its kernels approximate exp."""
    is_empty = ~dense.any(dim=-1, keepdim=True)[:, None]
    seen = dense[:, None] | is_empty
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True
    )
    _, lse = reference.attention(q, k, v, dense, softmax_scale)
    return out.masked_fill(is_empty, 0.0), lse


def _random_lengths(rng: random.Random, max_tokens: int, n_blocks: int | None = None) -> list[int]:
    """Block lengths, some of them 0. Their sum is at most ``max_tokens``, often that or 1."""
    n_tokens = rng.choice([rng.randint(0, max_tokens), max_tokens, min(1, max_tokens)])
    n_blocks = rng.randint(0, 6) if n_blocks is None else n_blocks
    if n_blocks == 0:
        return []
    cuts = sorted(rng.randint(0, n_tokens) for _ in range(n_blocks - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, n_tokens], strict=True)]


def _random_window(rng: random.Random) -> dict[str, Any]:
    return {"window": rng.choice([None, 1, 2, 3]), "sink_blocks": rng.choice([0, 0, 1, 2])}


def _random_ranks(rng: random.Random, max_tokens: int, n_batch: int) -> list:
    """Sorted ranks, some negative, ``[T]`` or ``[B, T]``."""
    n_tokens = rng.choice([rng.randint(0, max_tokens), max_tokens])
    rows = [sorted(rng.randint(-2, 5) for _ in range(n_tokens)) for _ in range(n_batch)]
    return rng.choice([rows, rows[0]])


def _has_text_queries(recipe: Recipe) -> bool:
    """Whether block 0 is among the queries, so that padded text tokens are queries as well."""
    kind, args = recipe
    if kind == "block_causal":
        blocks = args.get("query_blocks") or range(len(args["block_lengths"]))
        return blocks.start == 0 < blocks.stop
    if kind == "full":
        return args["q_lengths"] == args["k_lengths"]
    if kind == "from_ranks":
        return args.get("rank_k") is None
    if kind == "teacher_forcing":
        return True
    return _has_text_queries(args["masks"][0] if kind == "pack" else args["mask"])


def _text_limit(recipe: Recipe) -> int:
    """The longest text: all keys; in a pack, at most the first mask's keys and its queries."""
    kind, args = recipe
    if kind != "pack":
        return dense_mask(recipe).shape[2]
    first = args["masks"][0]
    return min(_text_limit(first), dense_mask(first).shape[1])


@contextmanager
def replaced(function: Callable, by: Callable) -> Iterator[None]:
    """Replaces ``function`` by ``by`` in every module of the package that has imported it."""
    with ExitStack() as stack:
        for module in [m for n, m in sys.modules.items() if n.startswith("vidgen_kernels.")]:
            if getattr(module, function.__name__, None) is function:
                stack.enter_context(mock.patch.object(module, function.__name__, by))
        yield
