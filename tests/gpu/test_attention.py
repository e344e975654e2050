"""Compiled attention on a GPU: low precision, CUDA graphs, no synchronisation, repeatable bits."""

import random
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vidgen_kernels import (
    IntervalMask,
    block_causal_attention,
    interval_attention,
    reference,
    set_masked_attention,
)
from vidgen_kernels.testing import (
    build_mask,
    check_attention,
    dense_mask,
    random_layout,
    random_qkv,
)

pytestmark = pytest.mark.gpu

LOW = [torch.bfloat16, torch.float16]
ALL = [*LOW, torch.float32, torch.float64]

FRAMES = [368, 240, 240, 333, 512, 1]
RECIPES = {
    "frames": ("block_causal", {"block_lengths": FRAMES}),
    "window": ("block_causal", {"block_lengths": FRAMES, "window": 2}),
    "sinks": ("block_causal", {"block_lengths": FRAMES, "window": 2, "sink_blocks": 1}),
    "step": ("block_causal", {"block_lengths": FRAMES, "query_blocks": range(4, 5)}),
    "teacher": (
        "teacher_forcing",
        {"block_lengths": FRAMES[:4], "window": 2, "sink_blocks": 1},
    ),
    "full": ("full", {"q_lengths": [1111], "k_lengths": [1300]}),
    "packed": ("full", {"q_lengths": [700, 0, 333], "k_lengths": [128, 64, 901]}),
    "ranks": (
        "from_ranks",
        {"rank_q": [[i // 37 for i in range(1001)], [i // 5 for i in range(1001)]], "rank_k": None},
    ),
    "text": (
        "pad_text",
        {
            "mask": ("block_causal", {"block_lengths": FRAMES}),
            "text_length": 128,
            "valid_lengths": [77, 0],
        },
    ),
    "mixed": (
        "pack",
        {
            "masks": [
                ("block_causal", {"block_lengths": [300, 200], "window": 1}),
                ("teacher_forcing", {"block_lengths": [129, 128]}),
            ]
        },
    ),
}


def attend(mask: IntervalMask):
    return lambda q, k, v: interval_attention(q, k, v, mask, return_lse=True)


def check(recipe, as_tensors: bool = False, **options) -> None:
    dense = dense_mask(recipe).cuda()
    check_attention(
        attend(build_mask(recipe, "cuda", as_tensors)), random_qkv(dense, **options), dense
    )


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("kind", RECIPES)
def test_masks(kind: str, head_dim: int, dtype: torch.dtype) -> None:
    check(RECIPES[kind], n_heads=4, n_kv_heads=2, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("head_dim", [1, 12, 24, 32, 80, 160, 192, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(RECIPES["text"], head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("kind", RECIPES)
def test_lengths_on_the_gpu(kind: str) -> None:
    check(RECIPES[kind], as_tensors=True, head_dim=64, dtype=torch.bfloat16)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_random_layouts(seed: int, as_tensors: bool) -> None:
    """In fp64, where rounding hides no error; launches have the same shape for every dtype."""
    rng = random.Random(seed)
    for _ in range(10):
        layout = random_layout(rng, rng.choice([64, 300]), "cuda", as_tensors)
        check_attention(attend(layout.mask), random_qkv(layout.dense), layout.dense)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_sets(dtype: torch.dtype) -> None:
    rank = torch.randint(40, (2, 777), device="cuda")
    dense = reference.rank_mask(rank)
    qkv = random_qkv(dense, head_dim=64, dtype=dtype)
    check_attention(lambda *x: set_masked_attention(*x, rank, return_lse=True), qkv, dense)


def step(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lengths: Tensor, rank: Tensor
) -> list[Tensor]:
    """Three ways to give a mask, forward and backward; the host need not wait for any of it."""
    results = []
    for call in (
        lambda: block_causal_attention(q, k, v, lengths),
        lambda: block_causal_attention(q, k, v, lengths, window=2, sink_blocks=1),
        lambda: set_masked_attention(q, k, v, rank),
    ):
        out = call()
        results += [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]
    return results


@pytest.fixture
def tensors() -> list[Tensor]:
    n_tokens = sum(FRAMES)
    dense = torch.ones(1, n_tokens, n_tokens, dtype=torch.bool, device="cuda")
    qkv = random_qkv(dense, n_heads=8, n_kv_heads=8, head_dim=64, dtype=torch.bfloat16)
    rank = torch.randint(40, (n_tokens,), device="cuda")
    return [
        *(x.requires_grad_() for x in qkv),
        torch.randn_like(qkv[0]),
        torch.tensor(FRAMES, device="cuda"),
        rank,
    ]


def test_bitwise_repeatable(tensors: list[Tensor]) -> None:
    expected = step(*tensors)
    for _ in range(10):
        for a, b in zip(step(*tensors), expected, strict=True):
            assert torch.equal(a, b)


def test_the_host_never_waits(tensors: list[Tensor]) -> None:
    mask = IntervalMask.block_causal(FRAMES, device="cuda")
    q, k, v, do, *_ = tensors
    step(*tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors)
        padded = IntervalMask.pad_text(mask, 100, torch.tensor([50]).cuda(non_blocking=True))
        for known in (mask, IntervalMask.block_causal([*FRAMES[::-1]], device="cuda"), padded):
            out, lse = interval_attention(q, k, v, known, return_lse=True)
            torch.autograd.grad([out, lse], (q, k, v), [do, torch.ones_like(lse)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(tensors: list[Tensor]) -> None:
    """Captured once with lengths and ranks as tensors, replayed with other values."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*tensors)
    for turn in range(2):
        with torch.no_grad():
            tensors[0].normal_()
            tensors[4].copy_(torch.tensor(FRAMES[::-1] if turn else FRAMES))
            tensors[5].copy_(tensors[5].flip(0))
        graph.replay()
        for a, b in zip(captured, step(*tensors), strict=True):
            assert torch.equal(a, b)


def test_cuda_graph_with_kept_masks(tensors: list[Tensor]) -> None:
    """Lengths as ints and prebuilt masks are kept after one call, so a capture copies nothing."""
    q, k, v, do = tensors[:4]
    mask = IntervalMask.block_causal(FRAMES, window=2, device="cuda")

    def attend() -> list[Tensor]:
        out = block_causal_attention(q, k, v, FRAMES) + interval_attention(q, k, v, mask)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]

    expected = attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_gpu() -> None:
    q, k, v = (torch.randn(1, 2, 50, 64, device="cuda:1") for _ in range(3))
    out = block_causal_attention(q, k, v, [20, 30])
    expected = block_causal_attention(*(x.to("cuda:0") for x in (q, k, v)), [20, 30])
    assert torch.equal(out.to("cuda:0"), expected)


@pytest.mark.parametrize("given", ["prebuilt mask", "tensor"])
def test_compiles_with_inductor(given: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def attend(q, k, v, layout):
        if isinstance(layout, Tensor):
            return block_causal_attention(2 * q, k, v, layout) + 1
        return interval_attention(2 * q, k, v, layout) + 1

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for i in range(10):
        lengths = [100 + i, 64, 33 + 2 * i][: 2 + i % 2]
        mask = IntervalMask.block_causal(lengths, device="cuda")
        layout = torch.tensor(lengths, device="cuda") if given == "tensor" else mask
        dense = reference.block_causal_mask(lengths).cuda()
        leaves = [x.requires_grad_() for x in random_qkv(dense, head_dim=64, dtype=torch.float32)]
        out, expected = compiled(*leaves, layout), attend(*leaves, mask)
        do = torch.randn_like(out)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            *(torch.autograd.grad(x, leaves, do) for x in (out, expected)), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_autocast() -> None:
    dense = torch.ones(1, 100, 100, dtype=torch.bool, device="cuda")
    q, k, v = random_qkv(dense, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = block_causal_attention(q, k, v, [60, 40])
    expected = block_causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), [60, 40])
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["frames", "sets"])
@pytest.mark.parametrize("n_tokens", [4096, 32768])
def test_peak_memory(kind: str, n_tokens: int) -> None:
    leaves = [
        torch.randn(1, 8, n_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    do, rank = torch.randn_like(leaves[0]), torch.randint(64, (n_tokens,), device="cuda")

    def run() -> None:
        if kind == "sets":
            out = set_masked_attention(*leaves, rank)
        else:
            out = block_causal_attention(*leaves, [n_tokens // 8] * 8)
        torch.autograd.grad(out, leaves, do)

    torch.utils.deterministic.fill_uninitialized_memory = False
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    assert torch.cuda.max_memory_allocated() - before <= 10 * leaves[0].nbytes


def test_other_devices_are_refused() -> None:
    q, k, v = random_qkv(torch.ones(1, 8, 8, dtype=torch.bool, device="cuda"))
    with pytest.raises(ValueError, match=r"cuda.*cpu"):
        interval_attention(q, k, v, IntervalMask.block_causal([8]))
    with pytest.raises(ValueError, match=r"cuda.*cpu"):
        set_masked_attention(q, k, v, torch.arange(8))


TRIPS = """
    import torch
    from vidgen_kernels import IntervalMask, block_causal_attention

    q, k, v = torch.randn(3, 1, 1, 16, 64, device="cuda")
    {call}
    try:
        torch.cuda.synchronize()
    except RuntimeError as problem:
        print("tripped", problem)
"""


@pytest.mark.parametrize(
    ("call", "trips"),
    [
        ("block_causal_attention(q, k, v, torch.tensor([9, 7]).cuda())", False),
        ("block_causal_attention(q, k, v, torch.tensor([9, 8]).cuda())", True),
        ("block_causal_attention(q, k, v, torch.tensor([19, -3]).cuda())", True),
        ("IntervalMask.from_ranks(torch.tensor([1, 0]).cuda())", True),
        (
            "IntervalMask.pad_text(IntervalMask.block_causal([16], device='cuda'), 4, "
            "torch.tensor([5]).cuda())",
            True,
        ),
    ],
)
def test_bad_values_trip_an_assertion(call: str, trips: bool) -> None:
    """In a process of its own, as an assertion on the device ends the CUDA context."""
    script = textwrap.dedent(TRIPS).format(call=call)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ("tripped" in run.stdout) == trips, run.stderr
    assert trips or run.returncode == 0


def test_offsets_past_32_bits() -> None:
    """Rows are 2^26 elements apart, in a buffer of 4 GiB."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    buffer = torch.empty(2**31 + 1024, dtype=torch.float16, device="cuda")
    far = [buffer.as_strided((1, 1, 33, 64), (0, 0, 2**26, 1), 64 * i) for i in range(4)]
    for x in far:
        x.normal_()
    mask = IntervalMask.block_causal([16, 17], device="cuda")

    def run(q, k, v, do):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = interval_attention(*leaves, mask)
        return out, *torch.autograd.grad(out, leaves, do)

    for a, b in zip(run(*far), run(*(x.contiguous() for x in far)), strict=True):
        assert torch.equal(a, b)
