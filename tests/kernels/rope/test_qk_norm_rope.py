"""Norm, rotation and layout of q, k, v against their definition, and the laws of a rotation.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

import pytest
import torch
from torch import Tensor

from vidgen.ops import EAGER
from vidgen_kernels import QKVStream, qk_norm_rope, reference
from vidgen_kernels.testing import check_op

HEADS = 2
AXES = {4: (2, 2), 12: (4, 4, 4), 24: (8, 16), 64: (16, 24, 24), 80: (20, 30, 30), 96: (96,)}
AXES |= {128: (32, 48, 48), 256: (64, 96, 96)}

not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=not_interpreted),
]


def stream(
    n_tokens: int,
    head_dim: int = 12,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    norm: str | None = "rms",
    fused: bool = True,
    view=lambda x: x,
) -> QKVStream:
    """Random values, all of which require grad."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    width = HEADS * head_dim
    given = [view(leaf(batch, n_tokens, n * width)) for n in ([3] if fused else [1, 1, 1])]
    given = [x.detach().requires_grad_() for x in given]
    weights = [leaf(head_dim).requires_grad_() if norm else None for _ in range(2)]
    biases = [leaf(head_dim).requires_grad_() if norm == "layer" else None for _ in range(2)]
    return QKVStream(given[0] if fused else tuple(given), *weights, *biases)


def coordinates(n_tokens: int, axes, batch: int | None = None) -> Tensor:
    shape = (n_tokens, len(axes)) if batch is None else (batch, n_tokens, len(axes))
    return 40 * torch.rand(shape, dtype=torch.float64)


def check(stream, positions=None, axes=(), *, text=None, call=qk_norm_rope, **options) -> None:
    """``call`` is the definition, gradients of projections, weights and biases included."""
    options = {"n_heads": HEADS, **options}

    def bound(f):
        return lambda stream, text: f(stream, positions, axes, text=text, **options)

    check_op(bound(call), bound(reference.qk_norm_rope), {"stream": stream, "text": text})


@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["one", "front", "joint"])
def test_values_and_gradients(kind: str, dtype: torch.dtype, norm: str | None) -> None:
    """Text is absent, the front of the sequence, or a stream of its own."""
    front = 5 if kind == "front" else 0
    text = stream(7, dtype=dtype, norm=norm, fused=False) if kind == "joint" else None
    video = stream(20, dtype=dtype, norm=norm)
    positions = coordinates(20 - front, AXES[12])
    check(video, positions, AXES[12], text=text, text_length=front, norm=norm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", AXES)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    axes = AXES[head_dim]
    norm = "layer" if head_dim % 3 else "rms"
    text = stream(3, head_dim, dtype=dtype, norm=norm)
    video = stream(18, head_dim, dtype=dtype, norm=norm, fused=False)
    check(video, coordinates(18, axes), axes, text=text, norm=norm)


@pytest.mark.parametrize("head_dim", [1, 5, 33])
def test_head_dims_that_cannot_turn(head_dim: int) -> None:
    check(stream(9, head_dim))
    check(stream(9, head_dim), text=stream(2, head_dim))


@pytest.mark.parametrize("n_tokens", [1, 13, 63, 64, 65, 129])
def test_sizes_around_tiles(n_tokens: int) -> None:
    video = stream(n_tokens, 4, batch=1)
    text = stream(n_tokens % 7 + 1, 4, batch=1)
    check(video, coordinates(n_tokens, AXES[4]), AXES[4], text=text)
    front = n_tokens // 2
    check(video, coordinates(n_tokens - front, AXES[4]), AXES[4], text_length=front)


@pytest.mark.parametrize("n_heads", [2, 5, 7])
def test_head_counts(n_heads: int) -> None:
    columns = 70 * 6  # of each of q, k and v
    video = stream(9, columns // HEADS, norm=None)
    weight = torch.rand(columns // n_heads, dtype=torch.float64, requires_grad=True)
    check(video, n_heads=n_heads, norm=None)
    check(video._replace(q_weight=weight), n_heads=n_heads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["q_weight", "k_weight", "q_bias", "k_bias"])
def test_any_weight_may_be_absent(given: str, dtype: torch.dtype) -> None:
    full = stream(9, norm="layer", dtype=dtype)
    alone = QKVStream(full.projections, **{given: getattr(full, given)})
    check(alone, norm="layer", text=full)
    check(full, norm="layer", text=alone)
    check(full._replace(**{given: None}), norm="layer", text_length=4)


@pytest.mark.parametrize("frozen", ["projections", "q_weight", "k_bias", "all vectors"])
def test_frozen_inputs(frozen: str) -> None:
    names = QKVStream._fields[1:] if frozen == "all vectors" else [frozen]
    full = stream(9, norm="layer")
    check(full._replace(**{n: getattr(full, n).detach() for n in names}), norm="layer")


@pytest.mark.parametrize("used", ["q", "k", "v", "qv", "qk"])
@pytest.mark.parametrize("norm", ["rms", None])
def test_gradients_of_some_results(used: str, norm: str | None) -> None:
    def some(f):
        return lambda *args, **options: tuple(
            x if name in used else x.detach()
            for name, x in zip("qkv", f(*args, **options), strict=True)
        )

    positions = coordinates(9, AXES[12])
    options = {"n_heads": HEADS, "norm": norm}

    def bound(f):
        return lambda stream, text: some(f)(stream, positions, AXES[12], text=text, **options)

    inputs = {"stream": stream(9, norm=norm), "text": stream(4, norm=norm)}
    check_op(bound(qk_norm_rope), bound(reference.qk_norm_rope), inputs)


VIEWS = {
    "columns of a wider tensor": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "every second token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "tokens before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded tokens": lambda x: x[:, :1].expand_as(x),
    "at an odd offset": lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["rms", None])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, norm: str | None, dtype: torch.dtype) -> None:
    options = {"dtype": dtype, "norm": norm, "view": VIEWS[view]}
    video, text = stream(9, **options), stream(4, fused=False, **options)
    positions = coordinates(9, AXES[12])
    strided = positions.repeat_interleave(2, dim=0)[::2].T.contiguous().T
    check(video, strided, AXES[12], text=text, norm=norm)
    check(video, strided[4:], AXES[12], text_length=4, norm=norm)
    check(stream(9, fused=False, **options), strided, AXES[12], norm=norm)


def test_gradients_that_arrive_in_another_layout() -> None:
    video = stream(9)

    def gradient(change):
        q, _, v = qk_norm_rope(video, coordinates(9, AXES[12]) * 0, AXES[12], n_heads=HEADS)
        return torch.autograd.grad([q, v], video.projections, [change(q), change(v)])[0]

    expected = gradient(lambda x: torch.ones_like(x))
    assert torch.equal(expected, gradient(lambda x: x.new_ones(()).expand_as(x)))
    assert torch.equal(expected, gradient(lambda x: torch.ones_like(x).mT.contiguous().mT))


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("position_dtype", [torch.float32, torch.float64], ids=str)
def test_positions(batch: int | None, position_dtype: torch.dtype) -> None:
    positions = coordinates(9, AXES[12], batch).to(position_dtype)
    check(stream(9), positions, AXES[12], theta=100.0)
    check(stream(9), positions[..., 5:, :], AXES[12], text_length=5)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 0), (0, 0, 0), (2, 0, 3), (2, 3, 0)])
def test_empty(shape) -> None:
    n_batch, n_video, n_text = shape
    video, text = stream(n_video, batch=n_batch), stream(n_text, batch=n_batch)
    check(video, coordinates(n_video, AXES[12]), AXES[12], text=text)
    both = stream(n_video + n_text, batch=n_batch)
    check(both, coordinates(n_video, AXES[12]), AXES[12], text_length=n_text)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("joint", [False, True])
def test_gradcheck(norm: str, joint: bool) -> None:
    video, text = stream(3, 4, batch=1, norm=norm), stream(2, 4, batch=1, norm=norm, fused=False)
    positions = coordinates(3, AXES[4])

    def call(*leaves):
        first, rest = QKVStream(*leaves[:5]), leaves[5:]
        second = QKVStream(tuple(rest[:3]), *rest[3:]) if joint else None
        return qk_norm_rope(first, positions, AXES[4], text=second, n_heads=HEADS, norm=norm)

    leaves = [*video, *text.projections, *text[1:]] if joint else list(video)
    torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_neighbouring_columns_are_a_pair() -> None:
    """Columns 2i and 2i + 1 turn together; axes take the columns in order."""
    width, quarter = 8, torch.pi / 2
    x = torch.arange(1.0, 1 + 3 * width, dtype=torch.float64).reshape(1, 1, -1)
    positions = torch.tensor([[quarter, 0.0]], dtype=torch.float64)
    q, k, v = qk_norm_rope(QKVStream(x), positions, (4, 4), n_heads=1, norm=None, theta=1e300)
    # of the first axis only pair 0 has a frequency that is not tiny: (a, b) -> (-b, a)
    for result, first in ((q, 1), (k, 9)):
        expected = [-(first + 1), first, *range(first + 2, first + 8)]
        torch.testing.assert_close(result[0, 0, 0], torch.tensor(expected, dtype=torch.float64))
    assert v[0, 0, 0].tolist() == list(range(17, 25))


def rotate(x: Tensor, positions: Tensor, **options) -> Tensor:
    """Of ``x`` [B, T, D], as q of one head."""
    three = (x, x, x)
    return qk_norm_rope(
        QKVStream(three), positions, AXES[x.shape[-1]], n_heads=1, norm=None, **options
    )[0][:, 0]


def test_rotation_keeps_lengths_and_position_zero() -> None:
    x = torch.randn(2, 17, 64, dtype=torch.float64)
    turned = rotate(x, coordinates(17, AXES[64]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-12, rtol=0)
    assert torch.equal(rotate(x, torch.zeros(17, 3)), x)


def test_products_depend_on_differences_of_positions() -> None:
    a, b = torch.randn(2, 1, 17, 64, dtype=torch.float64)
    at, to = coordinates(17, AXES[64]), coordinates(17, AXES[64])

    def products(shift: float) -> Tensor:
        return rotate(a, at + shift) @ rotate(b, to + shift).mT

    torch.testing.assert_close(products(0.0), products(-123.25), atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_positions_lose_nothing(dtype: torch.dtype) -> None:
    """An angle of 1e5 in fp32 would be off by up to 4e-3."""
    x = torch.randn(1, 50, 64, dtype=torch.float64).to(dtype)
    positions = 1e5 + torch.arange(150.0).reshape(50, 3)
    exact = rotate(x.double(), positions.double() - 1e5)
    one = rotate(exact, torch.full((50, 3), 1e5))
    bound = 5e-10 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(rotate(x, positions).double(), one, atol=bound, rtol=0)


def test_text_rows_do_not_turn() -> None:
    video, text = stream(9), stream(4)
    positions = coordinates(9, AXES[12])
    joint = qk_norm_rope(video, positions, AXES[12], text=text, n_heads=HEADS)
    alone = qk_norm_rope(text, n_heads=HEADS)
    for a, b in zip(joint, alone, strict=True):
        assert torch.equal(a[:, :, :4], b)


@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_ways_to_give_the_same_tokens(norm: str | None) -> None:
    """Fused and apart, one sequence and two streams of it, give the same bits."""
    whole = stream(13, norm=norm)
    options = {"axes": AXES[12], "n_heads": HEADS, "norm": norm}
    positions = coordinates(9, AXES[12])
    apart = whole._replace(projections=whole.projections.chunk(3, dim=-1))
    text = whole._replace(projections=whole.projections[:, :4])
    video = whole._replace(projections=whole.projections[:, 4:])
    expected = qk_norm_rope(whole, positions, text_length=4, **options)
    for other in (
        qk_norm_rope(apart, positions, text_length=4, **options),
        qk_norm_rope(video, positions, text=text, **options),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_v_is_a_view_where_nothing_is_joined_or_differentiated() -> None:
    video = stream(9)
    with torch.no_grad():
        expected = qk_norm_rope(video, n_heads=HEADS, text_length=3)
        joined = qk_norm_rope(video, n_heads=HEADS, text=stream(4))
    storage = video.projections.untyped_storage().data_ptr()
    assert expected[2].untyped_storage().data_ptr() == storage
    assert joined[2].untyped_storage().data_ptr() != storage
    recorded = qk_norm_rope(video, n_heads=HEADS, text_length=3)
    assert all(torch.equal(a, b) for a, b in zip(recorded, expected, strict=True))
    assert all(x.is_contiguous() for x in (*recorded, *joined))


def test_autocast() -> None:
    video = stream(9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        results = qk_norm_rope(video, n_heads=HEADS)
        with torch.no_grad():
            unrecorded = qk_norm_rope(video, n_heads=HEADS)
    exact = qk_norm_rope(video, n_heads=HEADS)
    for x, y, z in zip(results, exact, unrecorded, strict=True):
        assert x.dtype == torch.float16 and torch.equal(x, y.half()) and torch.equal(x, z)
    gradient = torch.autograd.grad(sum(x.sum() for x in results), video.projections)[0]
    assert gradient.dtype == torch.float32


def test_weights_of_another_dtype() -> None:
    video = stream(9, dtype=torch.float16)
    weights = [torch.rand(12, requires_grad=True) for _ in range(2)]
    q, k, v = qk_norm_rope(video._replace(q_weight=weights[0], k_weight=weights[1]), n_heads=HEADS)
    assert q.dtype == k.dtype == v.dtype == torch.float16
    grads = torch.autograd.grad(q.sum() + k.sum(), [video.projections, *weights])
    assert [g.dtype for g in grads] == [torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize("kind", ["one", "front", "joint"])
def test_eager_means_the_same(kind: str, norm: str | None) -> None:
    front = 5 if kind == "front" else 0
    text = stream(7, norm=norm) if kind == "joint" else None
    positions = coordinates(11 - front, AXES[12])
    options = {"text": text, "text_length": front, "norm": norm}
    check(stream(11, norm=norm), positions, AXES[12], call=EAGER.qk_norm_rope, **options)


P = stream(6).projections.detach()
W = torch.ones(12)
POSITIONS = torch.zeros(6, 3)

BAD = {
    "not a stream": ((P,), {}, "stream: .*QKVStream.*Tensor"),
    "text not a stream": ((QKVStream(P),), {"text": P}, "text: .*QKVStream.*Tensor"),
    "half a head": ((QKVStream(P),), {"n_heads": 1.5}, "n_heads: .*int.*1.5"),
    "no heads": ((QKVStream(P),), {"n_heads": 0}, "n_heads: .*1.*0"),
    "two projections": ((QKVStream((P, P)),), {}, "three.*2"),
    "two dims": ((QKVStream(P[0]),), {}, r"\[B, T, H \* D\].*\[6, 72\]"),
    "integers": ((QKVStream(P.long()),), {}, "int64"),
    "columns": ((QKVStream(P[..., :-1]),), {}, "multiple of 6 .*71"),
    "other v": ((QKVStream((P, P, P[..., 1:])),), {}, r"\[2, 6, 72\].*\[2, 6, 71\]"),
    "dtypes": ((QKVStream((P, P, P.float())),), {}, "float64.*float32"),
    "wide heads": ((QKVStream(P.repeat(1, 1, 22)),), {}, "256.*264"),
    "devices": ((QKVStream(P),), {"text": QKVStream(P.to("meta"))}, "cpu.*meta"),
    "batch of text": ((QKVStream(P),), {"text": QKVStream(P[:1])}, r"\(2, 12\).*\(1, 12\)"),
    "heads of text": ((QKVStream(P),), {"text": QKVStream(P[..., :66])}, r"\(2, 12\).*\(2, 11\)"),
    "both texts": ((QKVStream(P),), {"text": QKVStream(P), "text_length": 1}, "text_length.*0.*1"),
    "long text": ((QKVStream(P),), {"text_length": 7}, "text_length.*6.*7"),
    "negative text": ((QKVStream(P),), {"text_length": -1}, "text_length.*6.*-1"),
    "norm": ((QKVStream(P),), {"norm": "group"}, "norm: .*rms.*group"),
    "half a token": ((QKVStream(P),), {"text_length": 1.5}, "text_length.*6.*1.5"),
    "eps": ((QKVStream(P),), {"eps": -1.0}, "eps: .*0.*-1"),
    "eps of infinity": ((QKVStream(P),), {"eps": float("inf")}, "eps: .*finite.*inf"),
    "theta of infinity": ((QKVStream(P),), {"theta": float("inf")}, "theta: .*finite.*inf"),
    "theta": ((QKVStream(P),), {"theta": 0.0}, "theta: .*0.*0"),
    "weight": ((QKVStream(P, q_weight=W[1:]),), {}, r"q_weight: .*\[12\].*\[11\]"),
    "weight without norm": ((QKVStream(P, k_weight=W),), {"norm": None}, "k_weight: .*None"),
    "bias of rms": ((QKVStream(P, q_bias=W),), {}, "q_bias: .*None.*rms"),
    "weight dtype": ((QKVStream(P, k_weight=W.int()),), {}, "k_weight: .*int32"),
    "axes without positions": ((QKVStream(P), None, (12,)), {}, "positions: .*None"),
    "no axes": ((QKVStream(P), POSITIONS), {}, r"axes: .*12.*\[\]"),
    "odd axes": ((QKVStream(P), POSITIONS, (3, 3, 6)), {}, r"axes: .*even.*\[3, 3, 6\]"),
    "axes of a float": ((QKVStream(P), POSITIONS, (4.5, 4, 4)), {}, r"axes: .*integers.*4\.5"),
    "short axes": ((QKVStream(P), POSITIONS, (4, 4, 2)), {}, r"axes: .*12.*\[4, 4, 2\]"),
    "integer positions": ((QKVStream(P), POSITIONS.long(), (4, 4, 4)), {}, "positions: .*int64"),
    "half positions": ((QKVStream(P), POSITIONS.half(), (4, 4, 4)), {}, "positions: .*float16"),
    "too many": ((QKVStream(P), POSITIONS, (4, 4, 4)), {"text_length": 1}, r"\[5, 3\].*\[6, 3\]"),
    "number of axes": ((QKVStream(P), POSITIONS, (4, 8)), {}, r"\[6, 2\].*\[6, 3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    args, options, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        qk_norm_rope(*args, **{"n_heads": HEADS, **options})


def test_no_second_derivative_and_no_tangents() -> None:
    video = stream(3)
    q, _, _ = qk_norm_rope(video, n_heads=HEADS)
    (gradient,) = torch.autograd.grad(q.sum(), video.projections, create_graph=True)
    with pytest.raises(NotImplementedError, match="qk_norm_rope_bwd has no double backward"):
        gradient.sum().backward()
