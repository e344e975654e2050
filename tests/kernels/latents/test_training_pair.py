"""Training pairs against their definition; the same tests interpret the Triton kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vidgen_kernels import reference, training_pair
from vidgen_kernels.latents import configs
from vidgen_kernels.testing import check_op

not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=not_interpreted),
]
STAGES = {"first": (1.0, 0.667), "middle": (0.8, 0.334), "last": (0.5, 0.0)}
SHAPES = [(1, 1, 1, 2, 2), (3, 2, 2, 6, 14), (1, 1, 1, 24, 40)]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def training_pair_tuple(**inputs) -> tuple[Tensor, ...]:
    return tuple(x for x in training_pair(**inputs) if x is not None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_pair(dtype: torch.dtype, stage: str, shape: tuple) -> None:
    clean, noise = (normal(*shape, dtype=dtype) for _ in range(2))
    start, end = STAGES[stage]
    inputs = {"clean": clean, "noise": noise, "start_sigma": start, "end_sigma": end}
    inputs["sigma"] = torch.rand(shape[0], dtype=torch.float64).to(dtype)
    for return_endpoints in (False, True):
        given = {**inputs, "return_endpoints": return_endpoints}
        check_op(training_pair_tuple, reference.training_pair, given)


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around those of a tile, several tiles to a plane."""
    monkeypatch.setattr(configs, "INTERPRETER_PIXEL_BLOCK", configs.BlockConfig(16, num_warps=4))
    for height, width in ((2, 32), (2, 30), (4, 18), (6, 22)):
        inputs = {"clean": normal(2, 2, 1, height, width), "noise": normal(2, 2, 1, height, width)}
        inputs |= {"start_sigma": 0.8, "end_sigma": 0.3, "sigma": torch.tensor([0.2, 0.7])}
        check_op(training_pair_tuple, reference.training_pair, inputs)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 2, 1, 5, 8), (1, 2, 3, 7, 9)], ids=str)
def test_the_first_stage_takes_odd_sizes(shape: tuple) -> None:
    inputs = {"clean": normal(*shape), "noise": normal(*shape), "sigma": torch.rand(shape[0])}
    inputs |= {"start_sigma": 1.0, "end_sigma": 0.667, "return_endpoints": True}
    check_op(training_pair, reference.training_pair, inputs)


@pytest.mark.parametrize("used", ["input", "target", "start", "end", "target end"])
def test_a_loss_may_read_some_of_the_results(used: str) -> None:
    leaves = normal(2, 1, 2, 4, 6), normal(2, 1, 2, 4, 6)
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    weight = torch.randn(2, 1, 2, 4, 6, dtype=torch.float64)

    def grads(pair) -> tuple[Tensor, ...]:
        pair = dict(zip(("input", "target", "start", "end"), pair, strict=True))
        loss = sum((weight * pair[name]).sum() for name in used.split())
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    args = (*leaves, 0.8, 0.3, sigma)
    found = grads(training_pair(*args, return_endpoints=True))
    expected = grads(reference.training_pair(*args, return_endpoints=True))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradients_that_are_needed(needed: int) -> None:
    leaves = [normal(1, 2, 1, 4, 6), normal(1, 2, 1, 4, 6)]
    expected = torch.autograd.grad(training_pair(*leaves, 0.8, 0.3, 0.4).input.sum(), leaves)
    others = [x if i == needed else x.detach() for i, x in enumerate(leaves)]
    found = torch.autograd.grad(training_pair(*others, 0.8, 0.3, 0.4).input.sum(), leaves[needed])
    assert torch.equal(found[0], expected[needed])


def test_sigma_may_be_a_number_or_of_any_dtype() -> None:
    x, z = normal(3, 1, 1, 2, 4, dtype=torch.float32), normal(3, 1, 1, 2, 4, dtype=torch.float32)
    number = training_pair(x, z, 0.8, 0.3, 0.75)
    for dtype in (torch.float64, torch.float32, torch.float16):
        rows = training_pair(x, z, 0.8, 0.3, torch.full((3,), 0.75, dtype=dtype))
        assert torch.equal(rows.input, number.input) and torch.equal(rows.target, number.target)
    strided = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    rows = training_pair(x, z, 0.8, 0.3, strided[::2])
    assert torch.equal(rows.input, training_pair(x, z, 0.8, 0.3, strided[::2].clone()).input)
    assert number.start is None and number.end is None


def test_any_strides_and_mixed_dtypes() -> None:
    clean = normal(2, 4, 3, 6, 2).detach().transpose(1, 4).float().requires_grad_()
    noise = torch.randn(1, 1, 1, 12, 12).half()[..., 1::2, ::3].expand(2, 2, 3, 6, 4)
    inputs = {"clean": clean, "noise": noise, "sigma": 0.3, "start_sigma": 0.8, "end_sigma": 0.3}
    check_op(training_pair_tuple, reference.training_pair, inputs)


def test_ends_of_the_path() -> None:
    x, z = normal(2, 2, 1, 4, 4), normal(2, 2, 1, 4, 4)
    first = training_pair(x, z, 0.8, 0.3, 1.0, return_endpoints=True)
    last = training_pair(x, z, 0.8, 0.3, 0.0, return_endpoints=True)
    assert first.start is not None and last.end is not None
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(first.input, first.start, **close)
    torch.testing.assert_close(last.input, last.end, **close)
    torch.testing.assert_close(first.input - first.target, last.end, **close)
    clean = training_pair(x, z, 0.5, 0.0, 0.0)  # the last stage ends at the clean latent
    assert torch.equal(clean.input, x)
    assert torch.equal(training_pair(x, z, 1.0, 0.3, 1.0).input, z)  # the first starts at noise


def test_gradcheck() -> None:
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    for start, end in STAGES.values():
        leaves = normal(2, 1, 1, 2, 2), normal(2, 1, 1, 2, 2)
        assert torch.autograd.gradcheck(
            lambda x, z, s=start, e=end: tuple(
                training_pair(x, z, s, e, sigma, return_endpoints=True)
            ),
            leaves,
        )


@pytest.mark.parametrize("shape", [(0, 1, 1, 2, 2), (1, 2, 0, 4, 4)], ids=str)
def test_empty(shape: tuple) -> None:
    leaves = normal(*shape), normal(*shape)
    for sigma in (0.5, torch.rand(shape[0])):
        pair = training_pair(*leaves, 0.8, 0.3, sigma, return_endpoints=True)
        assert all(x is not None and x.shape == shape for x in pair)
        grads = torch.autograd.grad(pair.input.sum() + pair.target.sum(), leaves)
        assert all(g.shape == shape for g in grads)


@pytest.mark.parametrize("return_endpoints", [False, True])
def test_compiles_as_one_graph(return_endpoints: bool) -> None:
    torch._dynamo.reset()
    leaves = normal(2, 1, 1, 4, 6), normal(2, 1, 1, 4, 6)

    def call(x: Tensor, z: Tensor, sigma: Tensor) -> list[Tensor]:
        pair = training_pair(x, z, 0.8, 0.3, sigma, return_endpoints=return_endpoints)
        return [t for t in pair if t is not None]

    def run(function: Callable) -> list[Tensor]:
        out = function(*leaves, torch.tensor([0.2, 0.7]))
        return [*out, *torch.autograd.grad(sum(x.square().sum() for x in out), leaves)]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(call), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("return_endpoints", [False, True])
def test_opcheck(return_endpoints: bool) -> None:
    leaves = normal(2, 1, 1, 4, 6), normal(2, 1, 1, 4, 6)
    args = (*leaves, torch.tensor([0.2, 0.7]), 0.8, 0.3, return_endpoints)
    torch.library.opcheck(torch.ops.vidgen.training_pair_fwd, args)


def test_double_backward_is_refused() -> None:
    x, z = normal(1, 1, 1, 2, 2), normal(1, 1, 1, 2, 2)
    loss = training_pair(x, z, 0.8, 0.3, 0.5).input.square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


X = torch.randn(2, 2, 1, 4, 6)

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "four dims": (lambda: training_pair(X[0], X, 0.8, 0.3, 0.5), r"clean: .*\[2, 1, 4, 6\]"),
    "integers": (lambda: training_pair(X, X.int(), 0.8, 0.3, 0.5), "noise: .*float.*int32"),
    "device": (lambda: training_pair(X, X.to("meta"), 0.8, 0.3, 0.5), "noise: .*cpu.*meta"),
    "shape": (
        lambda: training_pair(X, X[:1], 0.8, 0.3, 0.5),
        r"noise: .*\[2, 2, 1, 4, 6\].*\[1, 2, 1, 4, 6\]",
    ),
    "odd": (lambda: training_pair(X[..., :5], X[..., :5], 0.8, 0.3, 0.5), r"even.*4, 5\]"),
    "start": (lambda: training_pair(X, X, 1.2, 0.3, 0.5), "start_sigma: .*1.0.*1.2"),
    "end": (lambda: training_pair(X, X, 0.8, -0.1, 0.5), "end_sigma: .*0.0.*-0.1"),
    "end a tensor": (lambda: training_pair(X, X, 0.8, X.sum(), 0.5), "end_sigma: .*tensor"),
    "sigma": (lambda: training_pair(X, X, 0.8, 0.3, float("nan")), "sigma: .*nan"),
    "rows": (lambda: training_pair(X, X, 0.8, 0.3, torch.rand(3)), r"sigma: .*\[2\].*\[3\]"),
    "int sigma": (
        lambda: training_pair(X, X, 0.8, 0.3, torch.ones(2, dtype=torch.int64)),
        "sigma: .*int64",
    ),
    "sigma elsewhere": (
        lambda: training_pair(X, X, 0.8, 0.3, torch.ones(2, device="meta")),
        "sigma: .*cpu.*meta",
    ),
    "gradient": (
        lambda: training_pair(X, X, 0.8, 0.3, torch.rand(2, requires_grad=True)),
        "sigma: .*gradient",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()
