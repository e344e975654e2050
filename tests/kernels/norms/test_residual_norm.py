"""`residual_norm` against its definition: values, gradients, shapes, strides, dtypes, errors.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen_kernels import Modulation, reference, residual_norm
from vidgen_kernels.common import configs
from vidgen_kernels.norms import rows_portable
from vidgen_kernels.testing import check_op

B, T, D = 2, 13, 24

not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly
LOW_PRECISION = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=not_interpreted)]
ALL_DTYPES = [torch.float64, *LOW_PRECISION]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def vectors(*shape: int, names: str = "gate scale shift", dtype=torch.float64) -> dict[str, Tensor]:
    return {name: leaf(*shape, dtype=dtype) for name in names.split()}


def check(**inputs: Any) -> None:
    check_op(residual_norm, reference.residual_norm, inputs)


def arguments(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Each way in which a model calls it."""

    def x(*shape: int) -> Tensor:
        return leaf(*shape, dtype=dtype)

    def own(*shape: int, names: str = "gate scale shift") -> dict[str, Tensor]:
        return vectors(*shape, names=names, dtype=dtype)

    rows = {"x": x(B, T, D), "f": x(B, T, D)}
    affine = {"weight": x(D), "bias": x(D)}
    return {
        "norm": lambda: {"x": x(B, T, D)},
        "affine norm": lambda: {"x": x(B, T, D), **affine},
        "residual": lambda: rows,
        "residual, weight": lambda: {**rows, "weight": x(D)},
        "residual, bias": lambda: {**rows, "bias": x(D)},
        "shift": lambda: {"x": x(B, T, D), **own(B, D, names="shift")},
        "scale": lambda: {**rows, **own(B, D, names="scale")},
        "one gate": lambda: {**rows, **own(D, names="gate"), **affine},
        "per sample": lambda: {**rows, **own(B, D)},
        "one for all": lambda: {**rows, **own(1, 1, D), **affine},
        "per token": lambda: {**rows, **own(B, T, D), **affine},
        "per token, plain": lambda: {"x": x(B, T, D), **own(B, T, D, names="scale shift")},
        "shift per token": lambda: {**rows, **affine, **own(B, T, D, names="shift")},
        "some per token": lambda: {**rows, **own(D), "scale": x(B, T, D), "weight": x(D)},
        "text": lambda: {
            **rows,
            **affine,
            **own(B, D),
            "text": Modulation(*own(B, 1, D).values()),
            "text_length": 5,
        },
        "text without modulation": lambda: {**rows, "text": Modulation(), "text_length": 5},
        "text per token": lambda: {
            **rows,
            **affine,
            **own(B, T - 1, D),
            "text": Modulation(*own(B, 1, D).values()),
            "text_length": 1,
        },
    }[kind]()


KINDS = [
    "norm",
    "affine norm",
    "residual",
    "residual, weight",
    "residual, bias",
    "shift",
    "scale",
    "one gate",
    "per sample",
    "one for all",
    "per token",
    "per token, plain",
    "shift per token",
    "some per token",
    "text",
    "text without modulation",
    "text per token",
]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, norm: str) -> None:
    check(**arguments(kind), norm=norm)


@pytest.mark.portable_only
@pytest.mark.parametrize("kind", ["shift", "per token, plain"])
def test_chunks_of_many_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are normalised in one call on a CPU."""
    monkeypatch.setattr(
        "vidgen_kernels.norms.residual_norm_portable.is_small", lambda *tensors: False
    )
    check(**arguments(kind))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kind", ["affine norm", "per sample", "per token", "text"])
def test_dtypes(kind: str, norm: str, dtype: torch.dtype) -> None:
    check(**arguments(kind, dtype), norm=norm)


@pytest.mark.parametrize("n_cols", [1, 2, 7, 31, 32, 33, 127, 129, 5120])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_row_lengths(n_cols: int, norm: str) -> None:
    rows = {"x": leaf(B, 5, n_cols), "f": leaf(B, 5, n_cols)}
    check(**rows, **vectors(B, n_cols), weight=leaf(n_cols), bias=leaf(n_cols), norm=norm, eps=0.1)


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 127, 128, 129, 257])
def test_token_counts(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around tiles, programs and the portable chunks; texts that end inside of them."""
    monkeypatch.setattr(rows_portable, "CHUNK_ELEMENTS", 64 * 8)
    for text_length in {0, 1, n_tokens // 2, n_tokens - 1, n_tokens}:
        x, f = leaf(B, n_tokens, 8), leaf(B, n_tokens, 8)
        text = Modulation(*vectors(B, 8).values())
        check(x=x, f=f, **vectors(B, 8), text=text, text_length=text_length, weight=leaf(8))


@pytest.mark.parametrize("config", [(1, 8), (2, 3), (16, 1)], ids=str)
def test_rows_of_a_program(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "INTERPRETER_ROWS", configs.RowConfig(*config, num_warps=4))
    for kind in ("per sample", "per token", "text"):
        check(**arguments(kind))


def test_strided_inputs() -> None:
    """Rows of a wider tensor, tokens before the batch, chunks of one projection [B, 12 D]."""
    wide = torch.randn(B, T, 2 * D, dtype=torch.float64)
    x, f = wide[..., 1 : D + 1], torch.randn(T, B, D, dtype=torch.float64).transpose(0, 1)
    projection = leaf(B, 12 * D)

    def call(function):
        leaves = [t.detach().requires_grad_() for t in (x, f)]
        shift1, scale1, gate1, *_, shift2, scale2, gate2 = projection.chunk(12, dim=-1)
        h, a = function(
            *leaves,
            gate=gate1,
            scale=scale1,
            shift=shift1,
            text=Modulation(gate2, scale2, shift2),
            text_length=4,
        )
        upstream = torch.ones((), dtype=h.dtype).expand_as(h), torch.randn_like(a.mT).mT
        return h, a, *torch.autograd.grad((h, a), [*leaves, projection], upstream)

    torch.manual_seed(1)
    actual = call(residual_norm)
    torch.manual_seed(1)
    for a, b in zip(actual, call(reference.residual_norm), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_results_are_contiguous() -> None:
    """Whatever the strides of what they are made of."""
    x, f, scale, shift = (torch.randn(T, B, D).transpose(0, 1) for _ in range(4))
    for given in ({"f": f}, {"scale": scale}, {"shift": shift}, {"scale": scale, "shift": shift}):
        h, a = residual_norm(x, **given)
        assert a.is_contiguous() and (h is x or h.is_contiguous())


@pytest.mark.parametrize(
    ("dtype", "of_f", "of_vectors"),
    [
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["residual", "text", "per token"])
def test_mixed_dtypes(kind: str, dtype, of_f, of_vectors) -> None:
    """Results have the dtype of x, gradients those of what they belong to."""
    inputs = arguments(kind, of_vectors)
    dtypes = {"x": dtype, "f": of_f}
    inputs = {
        name: v.detach().to(dtypes[name]).requires_grad_() if name in dtypes else v
        for name, v in inputs.items()
    }
    h, a = residual_norm(**inputs)
    assert h.dtype == a.dtype == dtype
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if "text" in exact:
        exact["text"] = [v.double() for v in exact["text"]]
    expected = reference.residual_norm(**exact)
    eps = max(torch.finfo(d).eps for d in (dtype, of_f, of_vectors))
    leaves = [v for v in inputs.values() if isinstance(v, Tensor)]
    upstream = torch.randn_like(h), torch.randn_like(a)
    grads = torch.autograd.grad((h, a), leaves, upstream)
    exact_grads = torch.autograd.grad(expected, leaves, [g.double() for g in upstream])
    assert [g.dtype for g in grads] == [v.dtype for v in leaves]
    for actual, wanted in zip([h, a, *grads], [*expected, *exact_grads], strict=True):
        error = (actual.double() - wanted.double()).abs().max() / wanted.abs().max()
        assert error <= 8 * eps


@pytest.mark.parametrize("kind", ["norm", "text", "per token", "some per token"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_do(shape, kind: str) -> None:
    n_batch, n_tokens = shape
    x, f = leaf(n_batch, n_tokens, D), leaf(n_batch, n_tokens, D)
    own = {
        "norm": lambda: {},
        "text": lambda: {**vectors(D), "text": Modulation(*vectors(D).values())},
        "per token": lambda: vectors(n_batch, n_tokens, D),
        "some per token": lambda: {**vectors(D), "shift": leaf(n_batch, n_tokens, D)},
    }[kind]()
    weight = leaf(D)
    h, a = residual_norm(x, f, **own, weight=weight)
    assert h.shape == a.shape == x.shape
    leaves = [x, f, weight, *(v for v in own.values() if isinstance(v, Tensor))]
    leaves += own.get("text", ())
    for g, v in zip(torch.autograd.grad((h, a), leaves, (h, a)), leaves, strict=True):
        assert g.shape == v.shape and not g.any()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kind", ["per sample", "per token", "text"])
def test_gradcheck(kind: str, norm: str) -> None:
    n_tokens, n_cols = 3, 3
    n_vectors = n_tokens if kind == "per token" else 1
    tensors = {"x": leaf(1, n_tokens, n_cols), "f": leaf(1, n_tokens, n_cols)}
    tensors |= {**vectors(1, n_vectors, n_cols), "weight": leaf(n_cols), "bias": leaf(n_cols)}
    text = list(vectors(n_cols).values()) if kind == "text" else []
    text_length = 1 if text else 0

    def call(*leaves: Tensor):
        own = dict(zip(tensors, leaves, strict=False))
        of_text = Modulation(*leaves[len(tensors) :]) if text else None
        return residual_norm(**own, text=of_text, text_length=text_length, norm=norm)

    torch.autograd.gradcheck(call, (*tensors.values(), *text), fast_mode=True)


@pytest.mark.parametrize("kind", ["affine norm", "residual", "per sample", "per token", "text"])
def test_any_part_of_the_gradients(kind: str) -> None:
    """One leaf, one output at a time gives the gradient that all of them give together."""
    inputs = arguments(kind)
    leaves = [v for v in inputs.values() if isinstance(v, Tensor)] + list(inputs.get("text", ()))
    for k, output in enumerate(residual_norm(**inputs)):
        expected = torch.autograd.grad(
            output.sin().sum(), leaves, retain_graph=True, materialize_grads=True
        )
        for only, gradient in zip(leaves, expected, strict=True):
            for v in leaves:
                v.requires_grad_(v is only)
            y = residual_norm(**inputs)[k]
            if y.requires_grad:
                actual = torch.autograd.grad(y.sin().sum(), only, materialize_grads=True)[0]
                torch.testing.assert_close(actual, gradient, atol=1e-12, rtol=0)
            else:
                assert not gradient.any()
        for v in leaves:
            v.requires_grad_()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_the_norm_reads_the_rounded_h(dtype: torch.dtype) -> None:
    inputs = arguments("per sample", dtype)
    h, a = residual_norm(**inputs)
    plain = {"scale": inputs["scale"], "shift": inputs["shift"]}
    assert torch.equal(a, residual_norm(h, **plain)[1])


def test_vectors_of_text_get_gradients_of_their_own_precision() -> None:
    """Per token, beside vectors in low precision."""
    x, f = (leaf(1, 5, 8) for _ in "xf")
    own = {n: leaf(1, 3, 8, dtype=torch.float16) for n in ("gate", "scale", "shift")}
    text = Modulation(*(leaf(1, 2, 8) for _ in "gsb"))
    wide = {name: v.detach().double().requires_grad_() for name, v in own.items()}
    upstream = [torch.randn(1, 5, 8).double() for _ in "ha"]
    found, expected = (
        torch.autograd.grad(residual_norm(x, f, **own_, text=text, text_length=2), text, upstream)
        for own_ in (own, wide)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_traced_without_gradients_it_refuses_to_train() -> None:
    x, y, f = (leaf(1, 5, 8) for _ in "xyf")
    gate = leaf(1)
    args = (
        x, f, [y], [], gate, [], [], [], None, None, 0, 2, "", 0.0, x.dtype, x.dtype, False, False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="traced without gradients"):
        torch.ops.vidgen.residual_norm_fwd(*args)


def test_without_f_h_is_x() -> None:
    x = leaf(B, T, D)
    assert residual_norm(x)[0] is x


def test_layer_norm_knows_no_constant_and_no_scale() -> None:
    x = leaf(B, T, D)
    for norm, shift in (("layer", 5), ("rms", 0)):
        _, a = residual_norm(x, norm=norm, eps=1e-14)
        _, b = residual_norm(3 * x + shift, norm=norm, eps=1e-14)
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_each_token_alone() -> None:
    """A token's results do not depend on what is beside it."""
    inputs = arguments("per sample")
    h, a = residual_norm(**inputs)
    for t in range(T):
        rows = {k: v[:, t : t + 1] if k in "xf" else v for k, v in inputs.items()}
        h_t, a_t = residual_norm(**rows)
        assert torch.equal(h_t, h[:, t : t + 1])
        torch.testing.assert_close(a_t, a[:, t : t + 1], atol=1e-13, rtol=0)


def test_text_is_as_its_own_call() -> None:
    inputs = arguments("text")
    text, n = inputs.pop("text"), inputs.pop("text_length")
    h, a = residual_norm(**inputs, text=text, text_length=n)
    affine = {"weight": inputs["weight"], "bias": inputs["bias"]}
    h_text, a_text = residual_norm(
        inputs["x"][:, :n], inputs["f"][:, :n], **text._asdict(), **affine
    )
    torch.testing.assert_close(h[:, :n], h_text, atol=0, rtol=0)
    torch.testing.assert_close(a[:, :n], a_text, atol=1e-13, rtol=0)


def test_gradients_are_repeatable() -> None:
    inputs = arguments("text", torch.float32)
    leaves = [v for v in inputs.values() if isinstance(v, Tensor)] + list(inputs["text"])

    def gradients() -> tuple[Tensor, ...]:
        h, a = residual_norm(**inputs)
        return torch.autograd.grad((h, a), leaves, (h.cos(), a.cos()))

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


def test_autocast_asks_for_the_dtype_of_a() -> None:
    inputs = arguments("per sample", torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        h, a = residual_norm(**inputs)
    expected_h, expected_a = residual_norm(**inputs)
    assert h.dtype == torch.float32 and a.dtype == torch.float16
    assert torch.equal(h, expected_h) and torch.equal(a, expected_a.half())
    a.sum().backward()
    assert inputs["x"].grad.dtype == torch.float32


x = torch.zeros(B, T, D)
v = torch.zeros(D)
BAD = {
    "two dims": ({"x": x[0]}, r"x: .*\[B, T, D\].*\[13, 24\]"),
    "integers": ({"x": x.long()}, "x: .*float.*int64"),
    "long rows": ({"x": torch.zeros(1, 1, 8193)}, r"x: .*8192.*\[1, 1, 8193\]"),
    "rows of nothing": ({"x": x[..., :0]}, r"x: .*\[2, 13, 0\]"),
    "another f": ({"x": x, "f": x[:, 1:]}, r"f: .*\[2, 13, 24\].*\[2, 12, 24\]"),
    "f of integers": ({"x": x, "f": x.long()}, "f: .*int64"),
    "f elsewhere": ({"x": x, "f": x.to("meta")}, "f: .*cpu.*meta"),
    "gate without f": ({"x": x, "gate": v}, "gate: .*None without f"),
    "gate of another length": ({"x": x, "f": x, "gate": v[1:]}, r"gate: .*\[24\].*\[23\]"),
    "gate of another batch": ({"x": x, "f": x, "gate": v.expand(3, D)}, r"gate: .*\[3, 24\]"),
    "scale of other tokens": ({"x": x, "scale": x[:, 1:]}, r"scale: .*13.*\[2, 12, 24\]"),
    "scale elsewhere": ({"x": x, "scale": v.to("meta")}, "scale: .*cpu.*meta"),
    "shift of integers": ({"x": x, "shift": v.long()}, "shift: .*int64"),
    "weight of two dims": ({"x": x, "weight": v[None]}, r"weight: .*\[24\].*\[1, 24\]"),
    "bias elsewhere": ({"x": x, "bias": v.to("meta")}, "bias: .*cpu.*meta"),
    "no such norm": ({"x": x, "norm": "batch"}, "norm: .*layer.*rms.*batch"),
    "no norm": ({"x": x, "norm": ""}, "norm: .*layer.*rms"),
    "eps of 0": ({"x": x, "eps": 0.0}, r"eps: .*0\.0"),
    "eps of infinity": ({"x": x, "eps": float("inf")}, "eps: .*finite.*inf"),
    "half a token": ({"x": x, "text": Modulation(), "text_length": 1.5}, r"text_length: .*1\.5"),
    "too much text": ({"x": x, "text": Modulation(), "text_length": 14}, "text_length: .*13.*14"),
    "negative text": ({"x": x, "text": Modulation(), "text_length": -1}, "text_length: .*-1"),
    "text without vectors": ({"x": x, "text_length": 1}, "text: .*1 text tokens.*None"),
    "text lacks scale": ({"x": x, "scale": v, "text": Modulation()}, r"text\.scale: .*tensor"),
    "text has more": ({"x": x, "text": Modulation(scale=v)}, r"text\.scale: .*None"),
    "text of another length": (
        {"x": x, "scale": v, "text": Modulation(scale=x), "text_length": 2},
        r"text\.scale: .*1 or 2.*\[2, 13, 24\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    inputs, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        residual_norm(**inputs)
