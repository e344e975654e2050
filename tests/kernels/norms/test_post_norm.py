"""`post_norm_residual` against its definition: values, gradients, shapes, strides, dtypes.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.contracts import Recorder
from vidgen.ops import EAGER
from vidgen_kernels import post_norm_residual, reference
from vidgen_kernels.testing import check_op

not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=not_interpreted),
]
GATES = {  # shapes of a gate for [B, T, D]
    "no gate": None,
    "one": lambda b, t, d: (d,),
    "per sample": lambda b, t, d: (b, d),
    "per sample, 3 dims": lambda b, t, d: (b, 1, d),
    "per token": lambda b, t, d: (b, t, d),
    "per token, of all samples": lambda b, t, d: (1, t, d),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(
    b: int = 2, t: int = 5, d: int = 12, gate: str = "no gate", dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {"x": leaf(b, t, d, dtype=dtype)}
    found["f"] = leaf(b, t, d, dtype=dtype)
    found["gate"] = None if gate == "no gate" else leaf(*GATES[gate](b, t, d), dtype=dtype)
    return found | {"weight": leaf(d, dtype=dtype), "bias": leaf(d, dtype=dtype)}


def check(tensors: dict, call=post_norm_residual, **options) -> None:
    def bound(f):
        return lambda **tensors: f(**tensors, **options)

    check_op(bound(call), bound(reference.post_norm_residual), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("gate", GATES)
def test_values_and_gradients(gate: str, norm: str, dtype: torch.dtype) -> None:
    check(inputs(gate=gate, dtype=dtype, t=11, d=48), norm=norm)


@pytest.mark.portable_only
@pytest.mark.parametrize("gate", GATES)
def test_chunks_of_many_rows(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are normalised in one call on a CPU."""
    monkeypatch.setattr("vidgen_kernels.norms.post_norm_portable.is_small", lambda *tensors: False)
    check(inputs(gate=gate))


@pytest.mark.parametrize("gate", ["no gate", "per sample", "per token"])
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 129, 257])
def test_sizes_around_tiles(n_tokens: int, gate: str) -> None:
    check(inputs(1, n_tokens, 3, gate))


@pytest.mark.parametrize("n_cols", [1, 2, 7, 31, 33, 64, 257, 768, 1280, 1537])
def test_row_lengths(n_cols: int) -> None:
    """A row of one column has no variance: its norm is 0."""
    check(inputs(1, 3, n_cols, "per token"), eps=1e-3)
    check(inputs(2, 2, n_cols, "per sample"), norm="rms")


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("gate", ["no gate", "per sample", "per token"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_absent_vectors(norm: str, gate: str, absent: tuple[str, ...]) -> None:
    check(inputs(gate=gate) | dict.fromkeys(absent), norm=norm)


@pytest.mark.parametrize("gate", ["per sample", "per token"])
@pytest.mark.parametrize("only", ["x", "f", "gate", "weight", "bias"])
def test_gradient_of_one_input(only: str, gate: str) -> None:
    check({name: x if name == only else x.detach() for name, x in inputs(gate=gate).items()})


@pytest.mark.parametrize("gate", [None, (12,), (7, 12)], ids=str)
def test_rows_without_a_batch(gate) -> None:
    tensors = {"x": leaf(7, 12), "f": leaf(7, 12), "weight": leaf(12)}
    check(tensors | {"gate": None if gate is None else leaf(*gate)})


def test_the_gradient_of_x_is_that_of_the_result() -> None:
    x, f = leaf(2, 5, 12), leaf(2, 5, 12)
    out = post_norm_residual(x, f)
    do = torch.randn_like(out)
    dx, _ = torch.autograd.grad(out, [x, f], do)
    assert dx.data_ptr() == do.data_ptr()


VIEWS = {
    "a third of a projection": lambda x: x.repeat(1, 1, 3)[..., x.shape[-1] : -x.shape[-1]],
    "every second token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "tokens before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded tokens": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["per sample, 3 dims", "per token"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, gate: str, dtype: torch.dtype) -> None:
    tensors = inputs(gate=gate, dtype=dtype)
    for name in ("x", "f", "gate"):
        tensors[name] = VIEWS[view](tensors[name].detach()).requires_grad_()
    check(tensors)
    assert post_norm_residual(**tensors).is_contiguous()


@pytest.mark.portable_only
@pytest.mark.parametrize("gate", ["no gate", "per sample, 3 dims", "per token"])
def test_fakes_know_what_is_not_needed(gate: str) -> None:
    """Where f, or x and f, need no gradient."""
    for frozen in ("f", "xf"):
        tensors = {k: v.detach() if k in frozen else v for k, v in inputs(gate=gate).items()}
        with Recorder() as recorder:
            post_norm_residual(**tensors).sum().backward()
        op, args, kwargs = recorder.calls["vidgen::post_norm_residual_bwd"]
        torch.library.opcheck(op, args, kwargs, test_utils="test_faketensor")


def test_gradients_that_arrive_in_another_layout() -> None:
    x, f, weight = leaf(2, 5, 12), leaf(2, 5, 12), leaf(12)

    def gradient(do: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(post_norm_residual(x, f, weight=weight), [f, weight], do)

    expected = gradient(torch.ones_like(x))
    for do in (x.new_ones(()).expand_as(x), torch.ones_like(x).mT.contiguous().mT):
        assert all(torch.equal(a, b) for a, b in zip(gradient(do), expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (0, 0, 12)])
@pytest.mark.parametrize("gate", ["no gate", "one", "per sample", "per token"])
def test_empty(gate: str, shape) -> None:
    check(inputs(*shape, gate))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("gate", ["no gate", "one", "per sample", "per token"])
def test_gradcheck(gate: str, norm: str) -> None:
    tensors = {name: x for name, x in inputs(2, 3, 4, gate).items() if x is not None}

    def call(*values):
        return post_norm_residual(**dict(zip(tensors, values, strict=True)), norm=norm)

    torch.autograd.gradcheck(call, list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("gate", ["no gate", "per sample", "per token"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_eager_means_the_same(norm: str, gate: str) -> None:
    check(inputs(gate=gate), call=EAGER.post_norm_residual, norm=norm)


def test_one_gate_per_sample_is_the_same_gate_for_all_its_tokens() -> None:
    tensors = inputs(gate="per sample")
    expected = post_norm_residual(**tensors)
    tensors["gate"] = tensors["gate"][:, None].expand(2, 5, 12)
    torch.testing.assert_close(post_norm_residual(**tensors), expected, atol=1e-12, rtol=0)


def test_a_constant_row_adds_the_bias() -> None:
    x, bias = leaf(2, 3, 12), leaf(12)
    out = post_norm_residual(x, torch.full_like(x, 7.0), bias=bias)
    torch.testing.assert_close(out, x + bias, atol=1e-12, rtol=0)


def test_dtypes_may_differ() -> None:
    x, f = leaf(2, 5, 12, dtype=torch.float16), leaf(2, 5, 12, dtype=torch.float32)
    weight, gate = leaf(12, dtype=torch.float64), leaf(2, 5, 12, dtype=torch.float32)
    out = post_norm_residual(x, f, weight=weight, gate=gate)
    exact = reference.post_norm_residual(
        *(t.double() for t in (x, f)), weight=weight, gate=gate.double()
    )
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), exact, atol=4e-3, rtol=1e-3)
    gradients = torch.autograd.grad(out.sum(), [x, f, weight, gate])
    assert [g.dtype for g in gradients] == [t.dtype for t in (x, f, weight, gate)]


X = torch.zeros(2, 5, 12)
V = torch.zeros(12)
BAD = {
    "one dim": (X[0, 0], X[0, 0], {}, r"x: .*\[T, D\].*\[12\]"),
    "no columns": (X[..., :0], X[..., :0], {}, r"x: .*8192.*\[2, 5, 0\]"),
    "long rows": (X.new_zeros(1, 1, 8193), X.new_zeros(1, 1, 8193), {}, r"x: .*8192.*8193"),
    "integers": (X.long(), X, {}, "x: .*int64"),
    "another shape": (X, X[:1], {}, r"f: .*\[2, 5, 12\].*\[1, 5, 12\]"),
    "another device": (X, X.to("meta"), {}, "f: .*cpu.*meta"),
    "weight": (X, X, {"weight": V[1:]}, r"weight: .*\[12\].*\[11\]"),
    "bias": (X, X, {"bias": V.bool()}, "bias: .*bool"),
    "norm": (X, X, {"norm": "batch"}, "norm: .*layer.*batch"),
    "eps": (X, X, {"eps": 0.0}, "eps: .*0.*0"),
    "gate of another batch": (X, X, {"gate": X[:, :1].repeat(2, 1, 1)}, r"gate: .*\[4, 1, 12\]"),
    "gate of other tokens": (X, X, {"gate": X[:, :3]}, r"gate: .*5.*\[2, 3, 12\]"),
    "gate of other columns": (X, X, {"gate": V[1:]}, r"gate: .*\[12\].*\[11\]"),
    "gate of other rows": (X[0], X[0], {"gate": X[0, :2]}, r"gate: .*\[5, 12\].*\[2, 12\]"),
    "integer gate": (X, X, {"gate": V.int()}, "gate: .*int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    x, f, options, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        post_norm_residual(x, f, **options)


def test_no_second_derivative() -> None:
    x, f = leaf(2, 5, 12), leaf(2, 5, 12)
    (df,) = torch.autograd.grad(post_norm_residual(x, f).sum(), f, create_graph=True)
    with pytest.raises(NotImplementedError, match="post_norm_residual_bwd has no double backward"):
        df.sum().backward()
