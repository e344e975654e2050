"""The engine against its definition: values, gradients, shapes, strides, dtypes.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

import random
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from vidgen_kernels import IntervalMask, interval_attention
from vidgen_kernels.attention import configs
from vidgen_kernels.common.launch import is_interpreted
from vidgen_kernels.testing import (
    build_mask,
    check_attention,
    dense_mask,
    random_layout,
    random_qkv,
)

kernels_only = pytest.mark.skipif(not is_interpreted(), reason="only the kernels have tiles")
not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly

LOW_PRECISION = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=not_interpreted)]
ALL_DTYPES = [torch.float64, *LOW_PRECISION]
HEAD_DIMS = [1, 12, 24, 40, 64, 80, 96, 128, 256]

RECIPES = {  # one mask of each kind; frames of odd sizes, one to three intervals
    "frames": ("block_causal", {"block_lengths": [20, 17, 0, 13]}),
    "window": ("block_causal", {"block_lengths": [9, 17, 16, 7], "window": 2}),
    "sinks": ("block_causal", {"block_lengths": [5, 16, 15, 9], "window": 1, "sink_blocks": 1}),
    "step": ("block_causal", {"block_lengths": [19, 16, 5], "query_blocks": range(1, 2)}),
    "teacher": (
        "teacher_forcing",
        {"block_lengths": [5, 8, 6, 7], "window": 2, "sink_blocks": 1},
    ),
    "packed": ("full", {"q_lengths": [17, 0, 9], "k_lengths": [3, 5, 33]}),
    "ranks": ("from_ranks", {"rank_q": [[0, 0, 2], [-1, 1, 1]], "rank_k": [0, 1, 1, 2, 3]}),
    "text": (
        "pad_text",
        {
            "mask": ("block_causal", {"block_lengths": [20, 8, 8]}),
            "text_length": 12,
            "valid_lengths": [7, 0],
        },
    ),
}


def attend(mask: IntervalMask, **options):
    return lambda q, k, v: interval_attention(q, k, v, mask, return_lse=True, **options)


def check(recipe, *, use: str = "out lse", softmax_scale: float | None = None, **tensors) -> None:
    dense = dense_mask(recipe)
    call = attend(build_mask(recipe), softmax_scale=softmax_scale)
    check_attention(call, random_qkv(dense, **tensors), dense, softmax_scale, use)


def use_tiles(monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int) -> None:
    monkeypatch.setattr(
        configs, "INTERPRETER", configs.LaunchConfig(block_m, block_n, num_warps=4, num_stages=1)
    )


@pytest.mark.parametrize("seed", range(25))
def test_random_layouts(seed: int) -> None:
    """400 layouts of all kinds and their combinations, at most 64 tokens."""
    rng = random.Random(seed)
    for _ in range(16):
        layout = random_layout(rng, max_tokens=64, as_tensors=rng.random() < 0.5)
        heads, kv_heads = rng.choice([(1, 1), (2, 1), (2, 2)])
        qkv = random_qkv(layout.dense, heads, kv_heads, head_dim=rng.choice([4, 16, 17]))
        use = rng.choice(["out lse", "out", "lse"])
        check_attention(attend(layout.mask), qkv, layout.dense, use=use)


@pytest.mark.parametrize("seed", range(10))
def test_random_layouts_of_many_tiles(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 layouts of about 300 tokens: with tiles of 64 some lie wholly inside an interval."""
    use_tiles(monkeypatch, 64, 64)
    rng = random.Random(100 + seed)
    for _ in range(2):
        layout = random_layout(rng, max_tokens=rng.randint(290, 330))
        check_attention(attend(layout.mask), random_qkv(layout.dense), layout.dense)


@kernels_only
@pytest.mark.parametrize("tiles", [(16, 32), (32, 16), (16, 64), (64, 16)], ids=str)
@pytest.mark.parametrize("kind", RECIPES)
def test_tiles_that_are_not_square(kind: str, tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, *tiles)
    check(RECIPES[kind])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", RECIPES)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    check(RECIPES[kind], dtype=dtype, head_dim=32)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(RECIPES["text"], n_heads=1, dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (3, 1), (6, 2)])
def test_shared_key_heads(heads: int, kv_heads: int) -> None:
    check(RECIPES["window"], n_heads=heads, n_kv_heads=kv_heads)


@pytest.mark.parametrize("n", [1, 2, 3, 13, 15, 16, 17, 31, 32, 33, 47, 61])
def test_sizes_around_tiles(n: int) -> None:
    check(("block_causal", {"block_lengths": [1] * n}))
    check(("full", {"q_lengths": [n], "k_lengths": [17]}))
    check(("full", {"q_lengths": [17], "k_lengths": [n]}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "recipe",
    [
        ("block_causal", {"block_lengths": []}),
        ("block_causal", {"block_lengths": [0, 0]}),
        ("block_causal", {"block_lengths": [5, 4], "query_blocks": range(1, 1)}),
        ("full", {"q_lengths": [0], "k_lengths": [5]}),
        ("full", {"q_lengths": [5], "k_lengths": [0]}),
        ("from_ranks", {"rank_q": [], "rank_k": []}),
        ("from_ranks", {"rank_q": [0, 0], "rank_k": []}),
        ("pad_text", {"mask": ("full", {"q_lengths": [3], "k_lengths": [3]}), "text_length": 3}),
    ],
    ids=str,
)
def test_nothing_to_see(recipe, dtype: torch.dtype) -> None:
    """No queries, no keys, or no query that sees a key: zeros, lse -inf, zero gradients."""
    kind, args = recipe
    recipe = kind, {**args, "valid_lengths": [0, 0]} if kind == "pad_text" else args
    dense = dense_mask(recipe)
    assert not dense.any()
    mask = build_mask(recipe)
    qkv = [x.requires_grad_() for x in random_qkv(dense, dtype=dtype)]
    out, lse = attend(mask)(*qkv)
    assert out.shape == qkv[0].shape and not out.any()
    assert lse.shape == out.shape[:3] and (lse == float("-inf")).all()
    for gradient in torch.autograd.grad([out.sum() + lse.sum()], qkv):
        assert not gradient.any()


@pytest.mark.parametrize("use", ["out", "lse", "out lse"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_gradient_of_either_output(use: str, dtype: torch.dtype) -> None:
    """The ranks have a query that sees nothing and a key that nobody sees."""
    check(RECIPES["ranks"], dtype=dtype, use=use)
    check(RECIPES["teacher"], dtype=dtype, use=use)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_lse_of_a_row_that_sees_nothing_is_constant(dtype: torch.dtype) -> None:
    """Partial results that are joined by logaddexp give it a gradient of nan."""
    dense = dense_mask(RECIPES["ranks"])
    is_empty = ~dense.any(dim=-1)
    assert is_empty.any()
    qkv = [x.requires_grad_() for x in random_qkv(dense, dtype=dtype)]
    out, lse = attend(build_mask(RECIPES["ranks"]))(*qkv)
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad([out, lse], qkv, [do, dlse], retain_graph=True)
    dlse = dlse.masked_fill(lse == float("-inf"), float("nan"))
    for a, b in zip(torch.autograd.grad([out, lse], qkv, [do, dlse]), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [-0.7, 0, 0.0, 1e-3, 2, 3.0])
def test_softmax_scales(scale: float) -> None:
    check(RECIPES["text"], softmax_scale=scale)
    if abs(scale) < 1:  # large scores leave fp32 too few digits for a bound that means anything
        check(RECIPES["text"], softmax_scale=scale, dtype=torch.float32)


# hidden keys may overflow before they are masked; the interpreter warns, the result is exact
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_scores_far_beyond_what_exp_can_take() -> None:
    dense = dense_mask(RECIPES["frames"])
    q, k, v = random_qkv(dense, dtype=torch.float16, head_dim=64)
    assert (16 * q @ (16 * k).mT).double().abs().max() / 8 > 500
    check_attention(attend(build_mask(RECIPES["frames"])), (16 * q, 16 * k, v), dense)


def fused(x: Tensor) -> Tensor:
    """The same values as a slice of a fused ``[B, T, 3, H, D]`` projection."""
    storage = x.new_zeros(x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3])
    storage[:, :, 1] = x.transpose(1, 2)
    return storage[:, :, 1].transpose(1, 2)


VIEWS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of fused qkv": fused,
    "slice of wider heads": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "every second token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "batch before last": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "expanded tokens": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, dtype: torch.dtype) -> None:
    dense = dense_mask(RECIPES["text"])
    qkv = random_qkv(dense, n_kv_heads=2, head_dim=24, dtype=dtype)
    qkv = tuple(VIEWS[view](x) for x in qkv)
    assert all(x.stride(-1) == 1 and not x.is_contiguous() for x in qkv)
    check_attention(attend(build_mask(RECIPES["text"])), qkv, dense)


@pytest.mark.parametrize("view", ["sum", "expanded tokens", "transposed", "one head"])
def test_strides_of_gradients(view: str) -> None:
    """The gradient of a sum has stride 0 everywhere, that of a transposed output no unit stride."""
    mask = build_mask(RECIPES["sinks"])
    qkv = [x.requires_grad_() for x in random_qkv(mask.to_dense(), n_kv_heads=2)]
    out, lse = attend(mask)(*qkv)
    do, dlse = {
        "sum": lambda: (torch.ones(()).double().expand_as(out), torch.ones(()).expand_as(lse)),
        "expanded tokens": lambda: (
            torch.randn_like(out)[:, :, :1].expand_as(out),
            torch.randn_like(lse)[:, :, :1].expand_as(lse),
        ),
        "transposed": lambda: (
            torch.randn_like(out.mT.contiguous()).mT,
            torch.randn_like(lse.mT.contiguous()).mT,
        ),
        "one head": lambda: (
            torch.randn_like(out)[:, :1].expand_as(out),
            torch.randn_like(lse)[:, :1].expand_as(lse),
        ),
    }[view]()
    dlse = dlse.double()
    strided = torch.autograd.grad([out, lse], qkv, [do, dlse], retain_graph=True)
    dense = torch.autograd.grad([out, lse], qkv, [do.contiguous(), dlse.contiguous()])
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


SMALL = {  # a handful of tokens, with rows and keys that see nothing
    "sinks": ("block_causal", {"block_lengths": [1, 1, 2], "window": 1, "sink_blocks": 1}),
    "ranks": ("from_ranks", {"rank_q": [-1, 0, 2], "rank_k": [0, 1, 3]}),
    "text": (
        "pad_text",
        {
            "mask": ("teacher_forcing", {"block_lengths": [2]}),
            "text_length": 2,
            "valid_lengths": [1],
        },
    ),
}


@pytest.mark.parametrize("kind", SMALL)
def test_gradcheck(kind: str) -> None:
    dense, mask = dense_mask(SMALL[kind]), build_mask(SMALL[kind])
    sees_something = dense.any(-1)[:, None].expand(-1, 2, -1)

    def outputs(q, k, v):
        out, lse = attend(mask)(q, k, v)
        return out, lse[sees_something]  # -inf has no finite difference

    qkv = [x.requires_grad_() for x in random_qkv(dense, head_dim=2)]
    assert torch.autograd.gradcheck(outputs, qkv)


def test_no_double_backward() -> None:
    mask = IntervalMask.block_causal([3, 2])
    q, k, v = (x.requires_grad_() for x in random_qkv(mask.to_dense()))
    out = interval_attention(q, k, v, mask)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="interval_attention_bwd"):
        torch.autograd.grad(dq.sum(), k)


def test_inputs_are_never_written() -> None:
    mask = build_mask(RECIPES["text"])
    tables = mask.intervals(36, 36)
    qkv = random_qkv(mask.to_dense())
    do, dlse = torch.randn_like(qkv[0]), torch.randn(qkv[0].shape[:3]).double()
    held = [*qkv, do, dlse, *tables]
    before = [(x.clone(), x._version) for x in held]
    leaves = [x.requires_grad_() for x in qkv]
    out, lse = attend(mask)(*leaves)
    kept = out.detach().clone(), lse.detach().clone()
    torch.autograd.grad([out, lse], leaves, [do, dlse])
    for x, (value, version) in zip(held, before, strict=True):
        assert torch.equal(x, value) and x._version == version
    assert torch.equal(out, kept[0]) and torch.equal(lse, kept[1])


@pytest.mark.parametrize("kind", RECIPES)
def test_bitwise_repeatable(kind: str) -> None:
    mask = build_mask(RECIPES[kind])
    qkv = [x.requires_grad_() for x in random_qkv(mask.to_dense(), dtype=torch.float32)]

    def run() -> list[Tensor]:
        out, lse = attend(mask)(*qkv)
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        return [out, lse, *torch.autograd.grad((out * out).sum() + finite.sum(), qkv)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


PAST_32_BITS = textwrap.dedent(
    """
    # Views of a few rows that lie far apart: the buffer is reserved, hardly any of it is used.
    import torch
    from vidgen_kernels import IntervalMask, interval_attention

    n_batch, n_heads, n_tokens, strides = {case}
    head_dim = 16
    last = sum((n - 1) * s for n, s in zip((n_batch, n_heads, n_tokens), strides))
    assert last >= 2**31, last
    buffer = torch.empty(last + 4 * head_dim, dtype=torch.float16)
    shape, strides = (n_batch, n_heads, n_tokens, head_dim), (*strides, 1)
    strided = [buffer.as_strided(shape, strides, i * head_dim) for i in range(4)]
    torch.manual_seed(0)
    for x in strided:
        x.copy_(torch.randn(shape))
    mask = IntervalMask.block_causal([n_tokens // 2, n_tokens - n_tokens // 2])

    def run(q, k, v, do):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, lse = interval_attention(q, k, v, mask, return_lse=True)
        return out, lse, *torch.autograd.grad(out, (q, k, v), do)

    far = run(*strided)
    near = run(*(x.contiguous() for x in strided))
    for a, b in zip(far, near):
        assert torch.isfinite(a).all() and torch.equal(a, b)
    print("same")
    """
)


@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 33, (0, 0, 2**26)),  # the last token is exactly 2^31 elements in
        (1, 2, 20, (0, 2**31, 64)),
        (2, 1, 20, (2**31, 0, 64)),
        (2, 2, 17, (2**30, 2**29, 2**25)),  # only the sum passes 2^31
    ],
    ids=["tokens", "heads", "batch", "sum"],
)
def test_offsets_past_32_bits(case) -> None:
    """In a process of its own: filling fresh memory, as tests do, would commit all of it."""
    script = PAST_32_BITS.format(case=case)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "same\n", run.stderr
