"""What holds for attention: registration, compilation, autocast, errors, memory, path."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.contracts import Recorder, peak_bytes
from vidgen_kernels import (
    IntervalMask,
    block_causal_attention,
    interval_attention,
    set_masked_attention,
)
from vidgen_kernels.attention import intervals, portable
from vidgen_kernels.common.launch import is_interpreted
from vidgen_kernels.testing import random_qkv

LENGTHS = [5, 9, 0, 4]
N = sum(LENGTHS)
RANK = torch.arange(N).flip(0) // 4  # not sorted


def masked(q: Tensor, k: Tensor, v: Tensor, **options):
    mask = IntervalMask.pad_text(IntervalMask.block_causal(LENGTHS, window=2), 4, [1] * len(q))
    return interval_attention(q, k, v, mask, **options)


def blocks(q: Tensor, k: Tensor, v: Tensor, **options):
    return block_causal_attention(q, k, v, LENGTHS, **options)


def tensor_blocks(q: Tensor, k: Tensor, v: Tensor, **options):
    return block_causal_attention(
        q, k, v, torch.tensor(LENGTHS), window=1, sink_blocks=1, **options
    )


def sets(q: Tensor, k: Tensor, v: Tensor, **options):
    return set_masked_attention(q, k, v, RANK, **options)


def batched_sets(q: Tensor, k: Tensor, v: Tensor, **options):
    ranks = torch.stack([RANK, RANK.flip(0)])
    return set_masked_attention(q, k, v, ranks, ranks + 1, **options)


ATTENTIONS = [masked, blocks, tensor_blocks, sets, batched_sets]
every_attention = pytest.mark.parametrize("attend", ATTENTIONS, ids=lambda f: f.__name__)


def qkv(n_tokens: int = N, **options) -> tuple[Tensor, Tensor, Tensor]:
    return random_qkv(torch.ones(2, n_tokens, n_tokens, dtype=torch.bool), **options)


@every_attention
def test_opcheck(attend: Callable) -> None:
    """Fakes tell true shapes, strides and dtypes; autograd and functionalization are there."""
    leaves = [x.requires_grad_() for x in qkv()]
    with Recorder() as recorder:
        out, lse = attend(*leaves, return_lse=True)
        (out.sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum()).backward()
    assert len(recorder.calls) == 2
    for name, (op, args, kwargs) in recorder.calls.items():
        tensors = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
        if name.endswith("_fwd"):
            tensors[:3] = [x.requires_grad_() for x in tensors[:3]]
        torch.library.opcheck(op, tuple(tensors), kwargs)


@every_attention
@pytest.mark.parametrize("layout", ["contiguous", "tokens before heads"])
def test_compiles_as_one_graph(attend: Callable, layout: str) -> None:
    torch._dynamo.reset()
    tensors = qkv(n_kv_heads=2)
    if layout != "contiguous":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    leaves = [x.detach().requires_grad_() for x in tensors]
    do, dlse = torch.randn_like(leaves[0]), torch.randn(2, 2, N).double()

    def run(call) -> list[Tensor]:
        out, lse = call(*leaves, return_lse=True)
        return [out, lse, *torch.autograd.grad([out, lse], leaves, [do, dlse])]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(attend), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


LAYOUTS = {
    "all changes": [[3 + i, 2 * i, 5, 4 + i % 3][: 2 + i % 3] for i in range(10)],
    "first the sum, then the number": [[5 + i, 7, 3][: 2 + i // 5] for i in range(10)],
    "one block among them": [[5, 6], [7, 7, 7], [12], *([8 + i, 9] for i in range(7))],
}


@pytest.mark.parametrize(
    ("given", "order"),
    [
        *product(["prebuilt mask", "prebuilt sinks"], LAYOUTS),
        # a tensor of lengths is the caller's: its size is learnt when it first changes
        *product(["tensor", "tensor sinks"], ["all changes"]),
    ],
)
def test_new_layouts_hardly_ever_recompile(given: str, order: str) -> None:
    """Ten layouts, other lengths, block counts and sums: two compilations at most."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    rule = {"window": 1, "sink_blocks": 1} if given.endswith("sinks") else {}

    def attend(q, k, v, layout):
        if isinstance(layout, Tensor):
            return block_causal_attention(q, k, v, layout, **rule)
        return interval_attention(q, k, v, layout)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for lengths in LAYOUTS[order]:
        leaves = [x.requires_grad_() for x in qkv(sum(lengths))]
        mask = IntervalMask.block_causal(lengths, **rule)
        layout = torch.tensor(lengths) if given.startswith("tensor") else mask
        out = compiled(*leaves, layout)
        expected = interval_attention(*leaves, mask)
        do = torch.randn_like(out)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        for a, b in zip(
            *(torch.autograd.grad(x, leaves, do) for x in (out, expected)), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert counter.frame_count <= 2


@every_attention
def test_autocast_casts_at_the_front_door(attend: Callable) -> None:
    leaves = [x.requires_grad_() for x in qkv(dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.float16):
        out, lse = attend(*leaves, return_lse=True)
        exact = attend(*(x.double() for x in leaves))
    expected, expected_lse = attend(*(x.half() for x in leaves), return_lse=True)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert exact.dtype == torch.float64  # as in PyTorch's own operators
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.dtype == torch.float32


def wrong(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = dict(zip("qkv", qkv(n_heads=4, n_kv_heads=2), strict=True))
    tensors[name] = change(tensors[name])
    return tensors


BAD_TENSORS = {
    "no tensor": (wrong("q", lambda x: x.tolist()), "q: .*tensor.*list"),
    "k is no tensor": (wrong("k", lambda x: None), "k: .*tensor.*None"),
    "three dims": (wrong("q", lambda x: x[0]), r"q: .*\[4, 18, 16\]"),
    "k of three dims": (wrong("k", lambda x: x[0]), r"k: .*\[2, 18, 16\]"),
    "integers": (wrong("q", lambda x: x.long()), "q: .*float.*int64"),
    "another dtype": (wrong("v", lambda x: x.float()), "v: .*float64.*float32"),
    "another device": (wrong("k", lambda x: x.to("meta")), "k: .*cpu.*meta"),
    "another batch": (wrong("k", lambda x: x[:1]), r"\[1, 2, 18, 16\]"),
    "another head dim": (wrong("q", lambda x: x[..., :8]), r"\[2, 2, 18, 16\]"),
    "other values than keys": (wrong("v", lambda x: x[:, :, 1:]), r"v: .*\[2, 2, 17, 16\]"),
    "heads that do not divide": (wrong("q", lambda x: x[:, :3]), "3.*2"),
    "no key heads": (
        {n: x[:, :0] if n != "q" else x for n, x in wrong("q", lambda x: x).items()},
        "0",
    ),
    "head dim 0": ({n: x[..., :0] for n, x in wrong("q", lambda x: x).items()}, "256.*0"),
    "head dim 257": (
        {n: x.repeat(1, 1, 1, 17)[..., :257] for n, x in wrong("q", lambda x: x).items()},
        "256.*257",
    ),
}


@every_attention
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name: str, attend: Callable) -> None:
    tensors, words = BAD_TENSORS[name]
    with Recorder() as recorder, pytest.raises(ValueError, match=words):
        attend(**tensors)
    assert not recorder.calls


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: block_causal_attention(q, k, v, [N + 1]), "19.*18"),
        (lambda q, k, v: block_causal_attention(q, k, v, torch.tensor([N - 1])), "17.*18|sum"),
        (lambda q, k, v: block_causal_attention(q, k, v, [N], window=0), "window.*0"),
        (lambda q, k, v: blocks(q, k, v, softmax_scale=float("nan")), "softmax_scale.*nan"),
        (lambda q, k, v: sets(q, k, v, softmax_scale=float("inf")), "softmax_scale.*inf"),
        (lambda q, k, v: block_causal_attention(q, k[:, :, 1:], v[:, :, 1:], [N]), "18.*17"),
        (
            lambda q, k, v: interval_attention(
                q, k, v, IntervalMask.pad_text(IntervalMask.block_causal([N]), 2, [1] * 3)
            ),
            "2.*3",
        ),
        (
            lambda q, k, v: interval_attention(q, k, v, IntervalMask.full([N], [N]).to("meta")),
            "meta",
        ),
        (lambda q, k, v: set_masked_attention(q, k, v, RANK[1:]), r"\[18\].*\[1, 17\]|\[17\]"),
        (lambda q, k, v: set_masked_attention(q, k, v, RANK, RANK.repeat(3, 1)), r"\[3, 18\]"),
        (lambda q, k, v: set_masked_attention(q, k, v, RANK.double()), "float64"),
        (lambda q, k, v: set_masked_attention(q, k, v, RANK.to("meta")), "cpu.*meta"),
        (lambda q, k, v: set_masked_attention(q, k, v, RANK[None, None]), r"\[1, 1, 18\]"),
    ],
)
def test_bad_masks(call: Callable, words: str) -> None:
    with Recorder() as recorder, pytest.raises(ValueError, match=words):
        call(*qkv())
    assert not recorder.calls


@pytest.mark.portable_only  # the interpreter's own arrays are not PyTorch's
@pytest.mark.parametrize("n_tokens", [1440, 8 * 1440])  # chunks of 256 rows are small beside it
@pytest.mark.parametrize("kind", ["frames", "short frames", "sinks", "teacher", "text", "sets"])
def test_peak_memory(kind: str, n_tokens: int) -> None:
    """Forward and backward together stay within ten times q at any length, so nothing is T x T."""
    torch.use_deterministic_algorithms(False)
    leaves = [torch.randn(1, 8, n_tokens, 64, requires_grad=True) for _ in range(3)]
    do = torch.randn_like(leaves[0])
    frames, short = [n_tokens // 8] * 8, [7] * (n_tokens // 7) + [n_tokens % 7]
    mask = {
        "frames": lambda: IntervalMask.block_causal(frames),
        "short frames": lambda: IntervalMask.block_causal(short),
        "sinks": lambda: IntervalMask.block_causal(short, window=20, sink_blocks=2),
        "teacher": lambda: IntervalMask.teacher_forcing([n // 2 for n in frames], window=2),
        "text": lambda: IntervalMask.pad_text(IntervalMask.block_causal(frames), 50, [9]),
    }
    rank = torch.randint(64, (n_tokens,))

    def run() -> None:
        if kind == "sets":
            out = set_masked_attention(*leaves, rank)
        else:
            out = interval_attention(*leaves, mask[kind]())
        torch.autograd.grad(out, leaves, do)

    run()
    assert peak_bytes(run) <= 10 * leaves[0].nbytes


@pytest.mark.portable_only
def test_peak_memory_notices_a_dense_mask() -> None:
    q, k, v = (torch.randn(1, 2, 4096, 64) for _ in range(3))
    mask = torch.ones(4096, 4096).tril()
    assert peak_bytes(lambda: (q @ k.mT) @ v) > 10 * q.nbytes
    assert peak_bytes(lambda: mask.log()) == mask.nbytes


@every_attention
def test_a_cpu_tensor_takes_the_path_that_was_asked_for(attend: Callable, monkeypatch) -> None:
    """Portable, unless TRITON_INTERPRET=1 asks for the kernels."""
    calls = []
    for name in ("interval_attention_fwd", "interval_attention_bwd"):
        function = getattr(portable, name)

        def counted(*args, function=function, name=name, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(portable, name, counted)
    leaves = [x.requires_grad_() for x in qkv()]
    attend(*leaves).sum().backward()
    expected = [] if is_interpreted() else ["interval_attention_fwd", "interval_attention_bwd"]
    assert calls == expected


@every_attention
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_first_call_without_gradients_leaves_training_alone(attend: Callable, mode) -> None:
    """Masks are kept, so they must not be tensors of inference mode."""
    intervals._build_on_host.cache_clear()
    with mode():
        attend(*qkv())
    leaves = [x.requires_grad_() for x in qkv()]
    torch.autograd.grad(attend(*leaves).sum(), leaves)


@pytest.mark.parametrize(
    "build",
    [
        lambda: IntervalMask.from_ranks(RANK.expand(2, -1).sort().values),
        lambda: IntervalMask.pad_text(IntervalMask.block_causal(LENGTHS), 4, [1, 3]),
    ],
)
def test_a_mask_of_inference_mode_trains(build: Callable) -> None:
    with torch.inference_mode():
        mask = build()
    leaves = [x.requires_grad_() for x in qkv()]
    torch.autograd.grad(interval_attention(*leaves, mask).sum(), leaves)


@every_attention
def test_a_result_may_be_written_unless_backward_reads_it(attend: Callable) -> None:
    out = attend(*(x.requires_grad_() for x in qkv()))
    out.add_(1.0)  # refused if it were a view that the operator made
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_attention
# PyTorch scripts its own decompositions for it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused(attend: Callable) -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: attend(q, k, v), (q,), (q,))


@pytest.mark.portable_only  # refused before a path is taken
@every_attention
def test_vmap_is_refused(attend: Callable) -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"vidgen::.*vmap"):
        torch.func.vmap(lambda q: attend(q, k, v))(torch.stack([q, q]))


@pytest.mark.parametrize("attend", [blocks, tensor_blocks, sets])
def test_empty_batch(attend: Callable) -> None:
    leaves = [x[:0].detach().requires_grad_() for x in qkv()]
    out = attend(*leaves)
    assert out.shape == leaves[0].shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]
