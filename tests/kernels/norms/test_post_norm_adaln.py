"""`post_norm_adaln` against its definition: values, gradients, shapes, strides, dtypes.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.ops import EAGER
from vidgen_kernels import post_norm_adaln, post_norm_residual, reference, residual_norm
from vidgen_kernels.testing import check_op

not_interpreted = pytest.mark.portable_only
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=not_interpreted),  # interpreted wrongly
]
FORMS = {  # shapes of a vector for [B, T, D]
    "one": lambda b, t, d: (d,),
    "per sample": lambda b, t, d: (b, d),
    "per sample, 3 dims": lambda b, t, d: (b, 1, d),
    "per token": lambda b, t, d: (b, t, d),
    "per token, of all samples": lambda b, t, d: (1, t, d),
}
NAMES = ("x", "f", "gate", "weight", "bias", "scale", "shift")


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(
    b: int = 2, t: int = 5, d: int = 12, form: str = "per token", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    found = {name: leaf(b, t, d, dtype=dtype) for name in ("x", "f")}
    found |= {name: leaf(d, dtype=dtype) for name in ("weight", "bias")}
    return found | {
        name: leaf(*FORMS[form](b, t, d), dtype=dtype) for name in ("gate", "scale", "shift")
    }


def check(tensors: dict, call=post_norm_adaln, **options) -> None:
    def bound(f):
        return lambda **tensors: f(**tensors, **options)

    check_op(bound(call), bound(reference.post_norm_adaln), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form: str, dtype: torch.dtype) -> None:
    check(inputs(t=11, d=48, form=form, dtype=dtype))


@pytest.mark.portable_only
@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_many_rows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows take one call of each kind on a CPU."""
    monkeypatch.setattr(
        "vidgen_kernels.norms.post_norm_adaln_portable.is_small", lambda *tensors: False
    )
    monkeypatch.setattr("vidgen_kernels.norms.rows_portable.CHUNK_ELEMENTS", 2 * 12)
    check(inputs(form=form))


@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 129])
def test_sizes_around_tiles(n_tokens: int) -> None:
    check(inputs(1, n_tokens, 3))


@pytest.mark.parametrize("n_cols", [1, 2, 31, 64, 257, 1280])
def test_row_lengths(n_cols: int) -> None:
    """A row of one column has no variance: its norm is 0."""
    check(inputs(2, 3, n_cols), eps=1e-3, next_eps=1e-2)


@pytest.mark.parametrize(
    "absent", [("gate",), ("weight",), ("bias",), ("gate", "weight", "bias")], ids=str
)
def test_absent_vectors(absent: tuple[str, ...]) -> None:
    check(inputs() | dict.fromkeys(absent))


@pytest.mark.parametrize(
    "learnt", [*((name,) for name in NAMES), ("scale", "shift"), ("x", "gate")], ids=str
)
def test_gradients_of_some_inputs(learnt: tuple[str, ...]) -> None:
    check({name: x if name in learnt else x.detach() for name, x in inputs().items()})


def both(**tensors) -> tuple[Tensor, Tensor]:
    """The two operators that it is."""
    scale, shift = tensors.pop("scale"), tensors.pop("shift")
    out = post_norm_residual(**tensors)
    return residual_norm(out, scale=scale, shift=shift, eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "form", [pytest.param("per sample, 3 dims", marks=not_interpreted), "per token"]
)
def test_two_operators_in_one(form: str, dtype: torch.dtype) -> None:
    tensors = inputs(form=form, dtype=dtype)
    check(tensors, call=both)
    for a, b in zip(post_norm_adaln(**tensors), both(**tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("learnt", [NAMES, ("x",), ("f", "shift")], ids=str)
def test_gradients_through_one_result(learnt: tuple[str, ...], used: int) -> None:
    tensors = {name: x if name in learnt else x.detach() for name, x in inputs().items()}
    check_op(
        lambda **tensors: post_norm_adaln(**tensors)[used],
        lambda **tensors: reference.post_norm_adaln(**tensors)[used],
        tensors,
    )


def test_gradients_that_need_no_work_are_the_incoming_ones() -> None:
    x, f, scale, shift = (leaf(2, 5, 12) for _ in range(4))
    out, a = post_norm_adaln(x, f, scale=scale, shift=shift)
    grad = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    (dshift,) = torch.autograd.grad(a, shift, grad)
    assert dx.data_ptr() == dshift.data_ptr() == grad.data_ptr()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        return None


def test_no_gradient_comes_back() -> None:
    tensors = inputs()
    _, a = post_norm_adaln(**tensors)
    total = NoGradient.apply(a).sum()
    found = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    assert found == (None,) * len(tensors)


VIEWS = {
    "a third of a projection": lambda x: x.repeat(1, 1, 3)[..., x.shape[-1] : -x.shape[-1]],
    "every second token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "tokens before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded tokens": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    for name in ("x", "f", "gate", "scale", "shift"):
        tensors[name] = VIEWS[view](tensors[name].detach()).requires_grad_()
    check(tensors)
    assert all(y.is_contiguous() for y in post_norm_adaln(**tensors))


def test_chunks_of_one_projection() -> None:
    """Gate of one layer, scale and shift of the next: their gradients make one tensor."""

    def from_projection(function):
        def call(x, f, projection):
            gate, scale, shift = projection.chunk(3, dim=-1)
            return function(x, f, gate=gate, scale=scale, shift=shift)

        return call

    tensors = {"x": leaf(2, 7, 12), "f": leaf(2, 7, 12), "projection": leaf(2, 7, 36)}
    check_op(from_projection(post_norm_adaln), from_projection(reference.post_norm_adaln), tensors)


def test_gradients_that_arrive_in_another_layout() -> None:
    tensors = inputs()

    def gradients(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(post_norm_adaln(**tensors), list(tensors.values()), [g, g])

    expected = gradients(torch.ones(2, 5, 12).double())
    for g in (torch.ones(()).double().expand(2, 5, 12), torch.ones(2, 12, 5).double().mT):
        assert all(torch.equal(a, b) for a, b in zip(gradients(g), expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
@pytest.mark.parametrize("form", ["one", "per token"])
def test_empty(form: str, shape) -> None:
    check(inputs(*shape, form))


@pytest.mark.parametrize("form", [pytest.param("one", marks=not_interpreted), "per token"])
def test_gradcheck(form: str) -> None:
    tensors = inputs(1, 2, 3, form)

    def call(*values):
        return post_norm_adaln(**dict(zip(tensors, values, strict=True)))

    torch.autograd.gradcheck(call, list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("form", ["one", "per sample", "per token"])
def test_eager_means_the_same(form: str) -> None:
    check(inputs(form=form), call=EAGER.post_norm_adaln)


def test_gate_0_leaves_the_adaptive_norm_of_x() -> None:
    tensors = inputs()
    x, scale, shift = tensors["x"], tensors["scale"], tensors["shift"]
    tensors["gate"] = torch.zeros(12)
    out, a = post_norm_adaln(**tensors)
    assert torch.equal(out, x)
    expected = residual_norm(x, scale=scale, shift=shift, eps=1e-6)[1]
    torch.testing.assert_close(a, expected, atol=1e-12, rtol=0)


def test_the_norm_reads_what_was_rounded() -> None:
    """fp16 of 1000 and some: the steps between are a half, and all that the norm may see."""
    tensors = inputs(1, 3, 64, dtype=torch.float16)
    tensors["x"] = (tensors["x"].detach() + 1000).requires_grad_()
    out, a = post_norm_adaln(**tensors)
    expected = residual_norm(out, scale=tensors["scale"], shift=tensors["shift"], eps=1e-6)[1]
    torch.testing.assert_close(a, expected)


def test_dtypes_may_differ() -> None:
    tensors = inputs()
    dtypes = dict.fromkeys(NAMES, torch.float32) | {"x": torch.float16, "scale": torch.float64}
    tensors: dict[str, Any] = {
        name: x.detach().to(dtypes[name]).requires_grad_() for name, x in tensors.items()
    }
    exact = reference.post_norm_adaln(**{name: x.double() for name, x in tensors.items()})
    results = post_norm_adaln(**tensors)
    for y, expected in zip(results, exact, strict=True):
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.double(), expected, atol=1e-2, rtol=2e-3)
    total = torch.stack(results).sum()
    gradients = torch.autograd.grad(total, list(tensors.values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in tensors.values()]


X = torch.zeros(2, 5, 12)
V = torch.zeros(12)
BAD = {
    "two dims": ({"x": X[0], "f": X[0]}, r"x: .*\[B, T, D\].*\[5, 12\]"),
    "no columns": ({"x": X[..., :0], "f": X[..., :0]}, r"x: .*4096.*\[2, 5, 0\]"),
    "long rows": ({"x": X.new_zeros(1, 1, 4097)}, r"x: .*4096.*4097"),
    "integers": ({"x": X.long()}, "x: .*int64"),
    "another shape": ({"f": X[:1]}, r"f: .*\[2, 5, 12\].*\[1, 5, 12\]"),
    "another device": ({"f": X.to("meta")}, "f: .*cpu.*meta"),
    "weight": ({"weight": V[1:]}, r"weight: .*\[12\].*\[11\]"),
    "bias": ({"bias": V.bool()}, "bias: .*bool"),
    "eps": ({"eps": 0.0}, "eps: .*0.*0"),
    "next eps": ({"next_eps": -1.0}, r"next_eps: .*0.*-1"),
    "infinite eps": ({"eps": float("inf")}, "eps: .*finite.*inf"),
    "gate of another batch": ({"gate": X[:, :1].repeat(2, 1, 1)}, r"gate: .*\[4, 1, 12\]"),
    "scale of other tokens": ({"scale": X[:, :3]}, r"scale: .*5.*\[2, 3, 12\]"),
    "shift of other columns": ({"shift": V[1:]}, r"shift: .*\[12\].*\[11\]"),
    "integer gate": ({"gate": V.int()}, "gate: .*int32"),
    "no scale": ({"scale": None}, "scale: .*NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, words = BAD[name]
    arguments: dict[str, Any] = {"x": X, "f": X, "scale": V, "shift": V, **options}
    with pytest.raises(ValueError, match=words):
        post_norm_adaln(**arguments)


def test_no_second_derivative() -> None:
    tensors = inputs()
    _, a = post_norm_adaln(**tensors)
    (df,) = torch.autograd.grad(a.square().sum(), tensors["f"], create_graph=True)
    with pytest.raises(NotImplementedError, match="post_norm_adaln_bwd has no double backward"):
        df.sum().backward()
