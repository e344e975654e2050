"""Pyramid resampling against its definition, and what its noise must be.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.paths import GOLDEN
from vidgen_kernels import (
    block_noise,
    downsample,
    reference,
    renoise_coefficients,
    upsample_renoise,
)
from vidgen_kernels.latents import configs
from vidgen_kernels.latents import philox_portable as philox
from vidgen_kernels.latents.pyramid import draws
from vidgen_kernels.testing import check_op

CASES = GOLDEN / "pyramid_flow"

not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=not_interpreted),
]
GAMMAS = [1 / 3, 0.25, 0.1]

EVEN = [(1, 1, 1, 2, 2), (2, 2, 2, 8, 12), (1, 2, 3, 14, 22), (1, 1, 1, 24, 40), (2, 1, 2, 2, 34)]
ODD = [(1, 1, 1, 3, 3), (2, 2, 1, 15, 22), (1, 2, 2, 6, 11), (1, 1, 3, 17, 5), (1, 1, 1, 2, 31)]
LOW = [(1, 1, 1, 1, 1), (2, 2, 2, 4, 6), (1, 2, 3, 7, 11), (1, 1, 1, 12, 20), (2, 1, 2, 1, 17)]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def upper(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:3], 2 * shape[3], 2 * shape[4])


# ---- values and gradients


@pytest.mark.parametrize("shape", EVEN + ODD, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_downsample(dtype: torch.dtype, shape: tuple) -> None:
    x = normal(*shape, dtype=dtype)
    for noise in (False, True):
        check_op(downsample, reference.downsample, {"x": x, "noise": noise})


@pytest.mark.parametrize("shape", LOW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsample_renoise(dtype: torch.dtype, shape: tuple) -> None:
    inputs = {"x": normal(*shape, dtype=dtype), "alpha": 0.6, "beta": 0.7}
    z = normal(*upper(shape), dtype=dtype)
    for gamma in (1 / 3, 0.1):
        given = {**inputs, "noise": z, "gamma": gamma}
        check_op(upsample_renoise, reference.upsample_renoise, given)
    check_op(upsample_renoise, reference.upsample_renoise, {**inputs, "block_noise": z})


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around those of a tile, several tiles to a plane."""
    monkeypatch.setattr(configs, "INTERPRETER_PIXEL_BLOCK", configs.BlockConfig(16, num_warps=4))
    for height, width in ((2, 32), (2, 30), (4, 18), (6, 22), (5, 33), (9, 10)):
        x = normal(1, 2, 1, height, width)
        check_op(downsample, reference.downsample, {"x": x, "noise": False})
        inputs = {"x": x, "alpha": 0.6, "beta": 0.7, "noise": normal(*upper(x.shape))}
        check_op(upsample_renoise, reference.upsample_renoise, inputs)
        eta = block_noise(upper(x.shape), seed=2)
        inputs = {"x": x.detach(), "alpha": 0.6, "beta": 0.7, "block_noise": eta.double()}
        out = upsample_renoise(x, 0.6, 0.7, seed=2)
        torch.testing.assert_close(out, reference.upsample_renoise(**inputs), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_may_have_a_dtype_of_its_own(dtype: torch.dtype) -> None:
    x, z = normal(1, 2, 1, 3, 4, dtype=dtype), normal(1, 2, 1, 6, 8, dtype=torch.float32)
    inputs = {"x": x, "alpha": 0.6, "beta": 0.7, "noise": z}
    check_op(upsample_renoise, reference.upsample_renoise, inputs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "frames first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "columns first": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, 4).repeat_interleave(3, 3)[..., ::3, ::2],
    "inner part": lambda x: F.pad(x, (1, 2, 3, 0, 1, 0))[:, :, 1:, 3:, 1:-2],
    "one channel": lambda x: x[:, :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    change = LAYOUTS[layout]
    for shape in ((2, 3, 2, 8, 12), (2, 3, 2, 7, 9)):
        x = change(normal(*shape).detach()).requires_grad_()
        assert x.shape == shape
        y = downsample(x)
        torch.testing.assert_close(y, reference.downsample(x), atol=1e-12, rtol=0)
        assert y.is_contiguous()
        dy = change(torch.randn_like(y))
        (dx,) = torch.autograd.grad(y, x, dy)
        (expected,) = torch.autograd.grad(reference.downsample(x), x, dy)
        torch.testing.assert_close(dx, expected, atol=1e-12, rtol=0)

        z = change(normal(*upper(shape)).detach()).requires_grad_()
        out = upsample_renoise(x, 0.6, 0.7, noise=z)
        expected = reference.upsample_renoise(x, 0.6, 0.7, noise=z)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        dout = change(torch.randn_like(out))
        grads = (torch.autograd.grad(o, (x, z), dout) for o in (out, expected))
        torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 6), (1, 0, 1, 4, 6), (1, 2, 0, 4, 6)], ids=str)
def test_empty(shape: tuple) -> None:
    x = normal(*shape)
    for out in (
        downsample(x),
        upsample_renoise(x, 1.0, 1.0, noise=normal(*upper(shape))),
        upsample_renoise(x, 1.0, 1.0, seed=1),
    ):
        assert out.shape[:3] == shape[:3] and out.numel() == 0
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape
    assert block_noise(shape, seed=0).shape == shape and draws(shape) == 0


def test_gradcheck() -> None:
    for x in (normal(1, 1, 1, 2, 4), normal(1, 1, 1, 3, 3)):
        assert torch.autograd.gradcheck(lambda x: downsample(x, noise=True), (x,))
    x, z = normal(1, 1, 1, 1, 2), normal(1, 1, 1, 2, 4)
    for gamma in (1 / 3, 0.1):
        assert torch.autograd.gradcheck(
            lambda x, z, g=gamma: upsample_renoise(x, 0.6, 0.7, gamma=g, noise=z), (x, z)
        )
    assert torch.autograd.gradcheck(
        lambda x, z: upsample_renoise(x, 0.6, 0.7, block_noise=z), (x, z)
    )
    assert torch.autograd.gradcheck(lambda x: upsample_renoise(x, 0.6, 0.7, seed=5), (x,))


@pytest.mark.parametrize("needed", ["x", "noise"])
def test_only_the_gradients_that_are_needed(needed: str) -> None:
    leaves = {"x": normal(1, 2, 1, 3, 4), "noise": normal(1, 2, 1, 6, 8)}
    dout = torch.randn_like(leaves["noise"])
    leaf = leaves[needed]
    both = upsample_renoise(alpha=0.6, beta=0.7, **leaves)
    expected = torch.autograd.grad(both, list(leaves.values()), dout)[list(leaves).index(needed)]
    others = {n: x if n == needed else x.detach() for n, x in leaves.items()}
    out = upsample_renoise(alpha=0.6, beta=0.7, **others)
    assert torch.equal(torch.autograd.grad(out, leaf, dout)[0], expected)


# ---- laws of resampling


def test_down_after_up_is_the_identity() -> None:
    x = normal(2, 3, 2, 8, 12)
    up = upsample_renoise(x, 1.0, 0.0, block_noise=normal(2, 3, 2, 16, 24))
    assert torch.equal(downsample(up), x)
    noisy = upsample_renoise(x, 0.6, 0.7, seed=1)  # each block of the noise sums to 0
    torch.testing.assert_close(downsample(noisy), 0.6 * x, atol=1e-12, rtol=0)


def test_levels_of_noise_are_functions_of_the_highest() -> None:
    """Twice by 2 is once by 4, and the variance stays."""
    x = normal(4, 16, 1, 64, 64)
    y = downsample(downsample(x, noise=True), noise=True)
    expected = F.avg_pool2d(x.flatten(0, 2), 4).view_as(y) * 4
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    n = y.numel()
    assert abs(y.square().mean().item() - 1) <= 5.5 * math.sqrt(2 / n)


def test_linear_and_alone() -> None:
    """A batch row, channel or frame does not feel the others."""
    x, z = normal(2, 3, 2, 4, 6), normal(2, 3, 2, 8, 12)
    out = upsample_renoise(x, 0.6, 0.7, noise=z)
    alone = upsample_renoise(x[1:, 2:, :1], 0.6, 0.7, noise=z[1:, 2:, :1])
    assert torch.equal(out[1:, 2:, :1], alone)
    torch.testing.assert_close(
        upsample_renoise(2 * x, 0.6, 0.7, noise=2 * z), 2 * out, atol=1e-12, rtol=0
    )


# ---- the noise


def blocks(x: Tensor) -> Tensor:
    """[B, C, T, 2H, 2W] as [blocks, 4], row by row within a block."""
    x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return x.transpose(-3, -2).flatten(-2).flatten(0, -2)


def check_covariance(x: Tensor, expected: Tensor) -> None:
    """That of the blocks within 5.5 standard errors: false alarms 4e-8 for each of 10 entries.

    Of N normal vectors, entry ij has variance ``(S_ii S_jj + S_ij^2) / N``. Between neighbours it
    is 0 in the same way.
    """
    x = blocks(x).double()
    diagonal = expected.diagonal()
    scale = diagonal[:, None] * diagonal
    allowed = 5.5 * ((scale + expected.square()) / len(x)).sqrt()
    assert ((x.T @ x / len(x) - expected).abs() <= allowed).all()
    neighbours = x[1:].T @ x[:-1] / (len(x) - 1)
    assert (neighbours.abs() <= 5.5 * (scale / len(x)).sqrt()).all()


def covariance(gamma: float) -> Tensor:
    return (1 + gamma) * torch.eye(4, dtype=torch.float64) - gamma


@pytest.mark.parametrize("gamma", [1 / 3, 0.1])
@pytest.mark.parametrize("source", ["seed", "noise", "block_noise"])
def test_covariance_of_a_block(source: str, gamma: float) -> None:
    shape = (2, 4, 2, 64, 128)  # 32768 blocks
    x = torch.zeros(*shape[:3], 32, 64)
    if source == "block_noise":
        eta = block_noise(shape, gamma=gamma, seed=11)
    else:
        given = {"seed": 12} if source == "seed" else {"noise": torch.randn(shape)}
        eta = upsample_renoise(x, 1.0, 1.0, gamma=gamma, **given)
    check_covariance(eta, covariance(gamma))
    if gamma == 1 / 3:
        assert blocks(eta).sum(dim=1).abs().max() <= 2e-6


@pytest.mark.parametrize(("sigma", "gamma"), [(0.667, 1 / 3), (0.334, 0.1)])
def test_white_noise_stays_white(sigma: float, gamma: float) -> None:
    """x = (1 - o) signal + o noise becomes (1 - s) signal + s noise, the noise white again."""
    alpha, beta = renoise_coefficients(sigma, gamma)
    weight = 1 - alpha * (1 - sigma)
    mixed = alpha**2 * sigma**2 + beta**2 * covariance(gamma)
    torch.testing.assert_close(
        mixed, weight**2 * torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0
    )
    noise, signal = torch.randn(2, 4, 2, 32, 64), torch.randn(2, 4, 2, 32, 64)
    x = (1 - sigma) * signal + sigma * noise
    out = upsample_renoise(x, alpha, beta, gamma=gamma, seed=3)
    left = out - (1 - weight) * signal.repeat_interleave(2, -1).repeat_interleave(2, -2)
    check_covariance(left / weight, torch.eye(4, dtype=torch.float64))


def test_noise_drawn_is_that_of_the_stream() -> None:
    """Counters in the order of B, C, T, H, W; four normals each, row by row."""
    shape, offset = (2, 3, 2, 6, 10), 2**33 + 5
    z = torch.stack(philox.normals(-7, offset, draws(shape)), dim=1)
    for gamma in GAMMAS:
        mean = z.mean(dim=1, keepdim=True)
        expected = math.sqrt(1 + gamma) * (z - mean) + math.sqrt(max(1 - 3 * gamma, 0)) * mean
        eta = block_noise(shape, gamma=gamma, seed=-7, offset=offset)
        torch.testing.assert_close(blocks(eta), expected, atol=5e-6, rtol=0)


# Normals of the first two blocks of seed 1: runs that were recorded rely on them.
STREAM = [
    [0.3804006875, -0.2962777913, -0.2492330968, -1.0038373470],
    [0.6269478798, -0.6339836717, -0.6782714128, -1.0130807161],
]


def test_the_stream_never_changes() -> None:
    z = torch.tensor(STREAM, dtype=torch.float64)
    expected = math.sqrt(4 / 3) * (z - z.mean(dim=1, keepdim=True))
    eta = blocks(block_noise((1, 1, 1, 2, 4), seed=1, dtype=torch.float64))
    torch.testing.assert_close(eta, expected, atol=4e-6, rtol=0)


def test_seed_and_offset() -> None:
    x = torch.randn(2, 2, 1, 4, 6)
    shape = upper(x.shape)
    out = upsample_renoise(x, 0.6, 0.7, seed=9)
    for seed in (torch.tensor(9), torch.tensor([9])):
        assert torch.equal(upsample_renoise(x, 0.6, 0.7, seed=seed), out)
        assert torch.equal(block_noise(shape, seed=seed), block_noise(shape, seed=9))
    assert not torch.equal(upsample_renoise(x, 0.6, 0.7, seed=10), out)
    eta = block_noise(shape, seed=9)
    torch.testing.assert_close(
        upsample_renoise(x, 0.6, 0.7, block_noise=eta), out, atol=2e-6, rtol=0
    )
    halves = [x[:1], x[1:]]
    n = draws(upper(halves[0].shape))
    parts = [upsample_renoise(h, 0.6, 0.7, seed=9, offset=i * n) for i, h in enumerate(halves)]
    assert n == 2 * 1 * 4 * 6 and torch.equal(torch.cat(parts), out)


def test_the_same_noise_in_every_dtype() -> None:
    shape = (1, 2, 1, 6, 8)
    eta = block_noise(shape, seed=4, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16):
        other = block_noise(shape, seed=4, dtype=dtype)
        error = (other.double() - eta).abs().max()
        assert other.dtype == dtype and error <= 4 * torch.finfo(dtype).eps


def test_coefficients_of_the_official_schedule() -> None:
    """Recorded ones, from noise levels in fp32."""
    with safe_open(CASES / "scheduler.safetensors", framework="pt") as file:
        for variant in ("v0", "v1"):
            names = ("ori_start_sigmas", "alpha", "beta")
            sigmas, *expected = (file.get_tensor(f"out.{variant}.{name}") for name in names)
            found = [renoise_coefficients(sigma) for sigma in sigmas[1:].tolist()]
            assert len(found) in (1, 2)
            torch.testing.assert_close(
                torch.tensor(found, dtype=torch.float64),
                torch.stack(expected, dim=1),
                atol=1e-12,
                rtol=0,
            )


def test_coefficients_of_no_noise_change_nothing() -> None:
    assert renoise_coefficients(0.0) == (1.0, 0.0)


# ---- operators


def calls() -> dict[str, Callable[[], Tensor]]:
    x, z = normal(1, 2, 1, 4, 6), normal(1, 2, 1, 8, 12)
    odd = normal(1, 2, 1, 5, 6)
    return {
        "down": lambda: downsample(x),
        "down noise": lambda: downsample(odd, noise=True),
        "white": lambda: upsample_renoise(x, 0.6, 0.7, gamma=0.2, noise=z),
        "block": lambda: upsample_renoise(x, 0.6, 0.7, block_noise=z),
        "seed": lambda: upsample_renoise(x, 0.6, 0.7, seed=3, offset=2),
        "noise": lambda: block_noise((1, 2, 1, 4, 6), seed=3, offset=2) * x,
    }


@pytest.mark.parametrize("name", calls())
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    call = calls()[name]
    leaves = [c.cell_contents for c in call.__closure__ or ()]
    leaves = [x for x in leaves if isinstance(x, Tensor)]
    out = call()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert torch.equal(out, compiled) and out.stride() == compiled.stride()
    dout = torch.randn_like(out)
    grads = (torch.autograd.grad(o, leaves, dout) for o in (out, compiled))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_new_offsets_and_seeds_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(1, 2, 1, 4, 6)

    def draw(seed, offset: int) -> Tensor:
        return upsample_renoise(x, 0.6, 0.7, seed=seed, offset=offset)

    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    for i in range(6):
        seed = torch.tensor([i])
        assert torch.equal(compiled(seed, 48 * i), draw(seed, 48 * i))
    assert counter.frame_count <= 3  # offset 0, another, any


def test_inputs_stay_as_they_are() -> None:
    x, z, seed = normal(1, 1, 1, 2, 2), normal(1, 1, 1, 4, 4), torch.tensor([5])
    copies = [t.detach().clone() for t in (x, z, seed)]
    out = upsample_renoise(x, 0.6, 0.7, noise=z).sum() + upsample_renoise(x, 1, 1, seed=seed).sum()
    (out + downsample(x).sum()).backward()
    for a, b in zip((x, z, seed), copies, strict=True):
        assert torch.equal(a.detach(), b)


def test_double_backward_is_refused() -> None:
    x, z = normal(1, 1, 1, 2, 2), normal(1, 1, 1, 4, 4)
    for out in (downsample(x), upsample_renoise(x, 0.6, 0.7, noise=z)):
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward"):
            dx.sum().backward()


X, Z = torch.randn(1, 2, 1, 4, 6), torch.randn(1, 2, 1, 8, 12)

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "four dims": (lambda: downsample(X[0]), r"x: .*\[B, C, T, H, W\].*\[2, 1, 4, 6\]"),
    "one row": (lambda: downsample(X[..., :1, :]), r"at least 2.*\[1, 2, 1, 1, 6\]"),
    "integers": (lambda: downsample(X.long()), "float.*int64"),
    "no tensor": (lambda: downsample([1.0]), "tensor.*list"),
    "device": (lambda: upsample_renoise(X, 1, 1, noise=Z.to("meta")), "noise: .*cpu.*meta"),
    "shape of noise": (lambda: upsample_renoise(X, 1, 1, noise=X), r"\[1, 2, 1, 8, 12\].*4, 6"),
    "shape of block_noise": (
        lambda: upsample_renoise(X, 1, 1, block_noise=Z[:, :1]),
        r"block_noise: .*\[1, 2, 1, 8, 12\].*\[1, 1, 1, 8, 12\]",
    ),
    "no source": (lambda: upsample_renoise(X, 1, 1), "exactly one .*none"),
    "two sources": (lambda: upsample_renoise(X, 1, 1, noise=Z, seed=0), "noise and seed"),
    "gamma 0": (lambda: upsample_renoise(X, 1, 1, gamma=0.0, noise=Z), "gamma: .*1/3.*0.0"),
    "gamma above 1/3": (lambda: block_noise(Z.shape, gamma=0.34, seed=0), "gamma: .*0.34"),
    "gamma NaN": (lambda: block_noise(Z.shape, gamma=math.nan, seed=0), "gamma: .*nan"),
    "alpha": (lambda: upsample_renoise(X, math.inf, 1, noise=Z), "alpha: .*finite.*inf"),
    "beta a tensor": (lambda: upsample_renoise(X, 1, X.sum(), noise=Z), "beta: .*number.*tensor"),
    "offset below 0": (lambda: upsample_renoise(X, 1, 1, seed=0, offset=-1), "offset: .*-1"),
    "offset too large": (
        lambda: block_noise(Z.shape, seed=0, offset=2**63 - 48),
        f"offset: .*{2**63 - 49}.*{2**63 - 48}",
    ),
    "offset of nothing": (lambda: upsample_renoise(X, 1, 1, noise=Z, offset=1), "offset: .*0.*1"),
    "seed too large": (lambda: block_noise(Z.shape, seed=2**63), f"seed: .*64 bits.*{2**63}"),
    "seed of a float": (lambda: block_noise(Z.shape, seed=1.5), "seed: .*integer.*1.5"),
    "seed None": (lambda: block_noise(Z.shape, seed=None), "seed: .*integer.*None"),
    "offset of a float": (lambda: block_noise(Z.shape, seed=0, offset=1.5), "offset: .*1.5"),
    "seed of int32": (
        lambda: upsample_renoise(X, 1, 1, seed=torch.tensor(1, dtype=torch.int32)),
        "seed: .*int64.*int32",
    ),
    "seeds": (lambda: upsample_renoise(X, 1, 1, seed=torch.tensor([1, 2])), r"seed: .*\[2\]"),
    "seed elsewhere": (
        lambda: upsample_renoise(X, 1, 1, seed=torch.tensor(1, device="meta")),
        "seed: .*cpu.*meta",
    ),
    "size of a float": (lambda: block_noise((1, 1, 1, 4.0, 4), seed=0), r"shape: .*4\.0"),
    "odd noise": (lambda: block_noise((1, 1, 1, 4, 5), seed=0), "even"),
    "noise of integers": (lambda: block_noise(Z.shape, seed=0, dtype=torch.int32), "float.*int32"),
    "sigma": (lambda: renoise_coefficients(1.5), r"sigma: .*0.0 to 1.0.*1.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_gamma_of_a_third_may_be_rounded() -> None:
    third = torch.tensor(1 / 3).item()
    assert third > 1 / 3
    torch.testing.assert_close(
        block_noise(Z.shape, gamma=third, seed=0), block_noise(Z.shape, seed=0)
    )
