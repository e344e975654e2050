"""Sampler steps against their definition, the official schedulers' numbers, and their laws.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.paths import GOLDEN
from vidgen.ops import EAGER
from vidgen_kernels import ddim_step, dpm_step, euler_step, reference
from vidgen_kernels.latents import sampler
from vidgen_kernels.testing import check_op

not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly
LOW_PRECISION = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=not_interpreted)]
F16, F32, F64 = torch.float16, torch.float32, torch.float64
ALL_DTYPES = [torch.float64, *LOW_PRECISION]

EULER = {"step": -0.1}
DDIM = {"sqrt_alpha": 0.3, "sqrt_alpha_next": 0.5}
DPM = {**DDIM, "sqrt_alpha_previous": 0.1}
STEPS = {  # name: function, definition, eager, its numbers, tensors it takes
    "euler": (euler_step, reference.euler_step, EAGER.euler_step, EULER, "x velocity"),
    "ddim": (ddim_step, reference.ddim_step, EAGER.ddim_step, DDIM, "x velocity"),
    "dpm": (
        dpm_step, reference.dpm_step, EAGER.dpm_step, DPM, "x velocity noise previous",
    ),
}  # fmt: skip
every_step = pytest.mark.parametrize("kind", STEPS)


def tensors(
    names: str, shape=(2, 3, 5), dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in names.split())
    return {
        name: x.to(dtype).requires_grad_() for name, x in zip(names.split(), values, strict=True)
    }


def inputs(kind: str, guided: bool = True, **options) -> dict:
    *_, numbers, names = STEPS[kind]
    found = tensors(names + " uncond" * guided, **options)
    return found | numbers | ({"guidance": 3.5} if guided else {})


def check(kind: str, given: dict) -> None:
    call, define, eager, *_ = STEPS[kind]
    check_op(call, define, given)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    check_op(eager, define, wide)


@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@every_step
def test_values_and_gradients(kind: str, dtype: torch.dtype, guided: bool) -> None:
    check(kind, inputs(kind, guided, dtype=dtype))


LONG = [pytest.param(n, marks=pytest.mark.portable_only) for n in (2**18 + 1, 2**19 - 1)]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 5, *LONG])
def test_sizes_around_blocks_and_pieces(n: int) -> None:
    check("dpm", inputs("dpm", shape=(n,)))
    check("euler", inputs("euler", shape=(n,), dtype=torch.float16))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (1, 2, 1, 3, 1, 2)], ids=str)
@every_step
def test_any_shape(kind: str, shape) -> None:
    check(kind, inputs(kind, shape=shape))


@every_step
def test_mixed_dtypes(kind: str) -> None:
    """Results are in the dtype of x, gradients each in that of its tensor."""
    for dtypes in (F32, F16), (F16, F32), (F64, F32):
        given = inputs(kind)
        for j, (name, x) in enumerate(given.items()):
            if isinstance(x, Tensor):
                given[name] = x.detach().to(dtypes[j % 2]).requires_grad_()
        call, define, *_ = STEPS[kind]
        check_op(call, define, given)
        out = call(**given)
        outs = out if isinstance(out, tuple) else (out,)
        assert outs[0].dtype == given["x"].dtype
        wide = torch.promote_types(given["x"].dtype, torch.float32)
        assert all(x0.dtype == wide for x0 in outs[1:])


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "one frame of many": lambda x: x.repeat_interleave(3, dim=2)[:, :, 1::3],
    "cut at the end": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
    "half of a batch": lambda x: torch.cat([x, x]).chunk(2)[1],
    "expanded": lambda x: x[:1, :, :1].expand_as(x),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize(("first", "second"), [*product(LAYOUTS, ["contiguous", "channels last"])])
def test_layouts(first: str, second: str) -> None:
    for views in ((first, second), (second, first)):
        given = inputs("dpm", shape=(2, 3, 4, 5, 6))
        for i, (name, x) in enumerate(given.items()):
            if isinstance(x, Tensor):
                given[name] = LAYOUTS[views[i % 2]](x.detach()).requires_grad_()
        call, define, *_ = STEPS["dpm"]
        expected = define(**given)
        actual = call(**given)
        upstream = [torch.randn_like(x).mT.contiguous().mT for x in expected]
        leaves = [x for x in given.values() if isinstance(x, Tensor)]
        for a, b in zip(
            (*actual, *torch.autograd.grad(actual, leaves, upstream)),
            (*expected, *torch.autograd.grad(expected, leaves, upstream)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        for out in actual:
            assert out.stride() == torch.empty_like(given["x"]).stride()


@pytest.mark.parametrize("use", ["out", "x0", "both"])
@pytest.mark.parametrize("needs", ["x", "velocity", "uncond", "previous", "noise", "x velocity"])
def test_gradients_of_what_is_asked_for(use: str, needs: str) -> None:
    given = inputs("dpm")
    given = {
        name: x.detach().requires_grad_(name in needs.split()) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }
    pick = {"out": lambda r: r[0], "x0": lambda r: r[1], "both": lambda r: r}[use]
    if use == "x0" and needs in ("previous", "noise"):
        grad = torch.autograd.grad(dpm_step(**given)[1].sum(), given[needs], allow_unused=True)
        assert grad[0] is None or not grad[0].any()
    else:
        check_op(
            lambda **kw: pick(dpm_step(**kw)), lambda **kw: pick(reference.dpm_step(**kw)), given
        )


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("ddim", {"sqrt_alpha": 0.0, "sqrt_alpha_next": 0.2}),  # zero terminal SNR
        ("ddim", {"sqrt_alpha": 0.9, "sqrt_alpha_next": 1.0}),
        ("ddim", {"sqrt_alpha": 0.6, "sqrt_alpha_next": 0.4}),  # inversion
        ("ddim", {"sqrt_alpha": 0.6, "sqrt_alpha_next": 0.7, "denoiser_sqrt_alpha": 0.61}),
        ("dpm", {"sqrt_alpha": 0.0, "sqrt_alpha_next": 0.2}),
        ("dpm", {"sqrt_alpha": 0.2, "sqrt_alpha_next": 0.3, "sqrt_alpha_previous": 0.0}),
        ("dpm", {"sqrt_alpha": 0.9, "sqrt_alpha_next": 1.0, "sqrt_alpha_previous": 0.8}),
        ("dpm", {"sqrt_alpha": 0.9, "sqrt_alpha_next": 1.0}),
        ("dpm", {"sqrt_alpha": 0.9, "sqrt_alpha_next": 0.9}),  # goes nowhere
        ("dpm", {"sqrt_alpha": 0.999, "sqrt_alpha_next": 0.9999, "sqrt_alpha_previous": 0.99}),
        ("dpm", {**DPM, "denoiser_sqrt_alpha": 0.29}),
    ],
    ids=str,
)
def test_first_and_last_steps(kind: str, numbers: dict) -> None:
    given = {k: v for k, v in inputs(kind).items() if isinstance(v, Tensor) or k == "guidance"}
    if "sqrt_alpha_previous" not in numbers:
        given.pop("previous", None)
    for dtype in (torch.float64, torch.float32):
        cast = {
            k: v.detach().to(dtype).requires_grad_() if isinstance(v, Tensor) else v
            for k, v in given.items()
        }
        check(kind, cast | numbers)


@every_step
def test_gradcheck(kind: str) -> None:
    given = inputs(kind, shape=(2, 2))
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    leaves = [given.pop(name) for name in names]
    call = STEPS[kind][0]
    assert torch.autograd.gradcheck(
        lambda *xs: call(**dict(zip(names, xs, strict=True)), **given), leaves
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@every_step
def test_guidance_0_and_1(kind: str, dtype: torch.dtype) -> None:
    """1 is the conditional prediction alone, 0 the other one alone, to the last bit."""
    call = STEPS[kind][0]
    given = inputs(kind, dtype=dtype)
    uncond = given.pop("uncond")
    del given["guidance"]

    def same(a, b) -> None:
        for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (a, b)), strict=True):
            assert torch.equal(x, y)

    same(call(**given, uncond=uncond, guidance=1), call(**given))
    same(call(**given, uncond=uncond, guidance=0), call(**given | {"velocity": uncond}))


@pytest.mark.parametrize("n", [1, 5, 1000])
def test_an_fp32_euler_step_has_the_bits_of_the_official_one(n: int) -> None:
    x, v = tensors("x v", shape=(n,), dtype=F32).values()
    assert torch.equal(euler_step(x, v, -0.1), x + -0.1 * v)


def test_no_step_is_the_identity() -> None:
    x, v, u = tensors("x v u", dtype=torch.float32).values()
    assert torch.equal(euler_step(x, v, 0.0, uncond=u, guidance=7), x)
    assert torch.equal(euler_step(x, v, 0), x)
    x, v = x.double(), v.double()
    torch.testing.assert_close(ddim_step(x, v, 0.4, 0.4), x, atol=1e-15, rtol=0)


def test_a_constant_velocity_integrates_exactly() -> None:
    x, v = tensors("x v").values()
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64).tolist()
    y = x
    for sigma, then in pairwise(sigmas):
        y = euler_step(y, v, then - sigma)
    torch.testing.assert_close(y, x - v, atol=1e-14, rtol=0)


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_a_perfect_prediction_arrives(kind: str) -> None:
    """With v = A eps - sigma x0 of the present x, every step keeps x0 and the last one is it."""
    x0, x, *noise = tensors("x0 x a b c d e f").values()
    alphas = [0.0, 0.1, 0.3, 0.6, 0.8, 0.97, 1.0]
    previous, before = None, None
    for (now, then), z in zip(pairwise(alphas), noise, strict=True):
        sigma = math.sqrt(1 - now**2)
        eps = (x - now * x0) / sigma
        v = now * eps - sigma * x0
        if kind == "ddim":
            x = ddim_step(x, v, now, then)
        else:
            x, previous = dpm_step(
                x, v, now, then, noise=z, previous=previous, sqrt_alpha_previous=before
            )
            torch.testing.assert_close(previous, x0, atol=1e-13, rtol=0)
        before = now
    torch.testing.assert_close(x, x0, atol=1e-13, rtol=0)


def test_dpm_keeps_the_variance() -> None:
    """c1^2 (1 - A^2) + c3^2 = 1 - A+^2, c1 A + c2 = A+: x stays A x0 + sqrt(1 - A^2) eps."""
    zero, one = torch.zeros(1).double(), torch.ones(1).double()

    def coefficients(now: float, then: float) -> tuple[float, float, float]:
        """c1, c2, c3: v is chosen so that x0 is 0, or 1."""
        sigma = math.sqrt(1 - now**2)
        c1 = dpm_step(one, now / sigma * one, now, then, noise=zero)[0].item()
        c2 = dpm_step(zero, -1 / sigma * one, now, then, noise=zero)[0].item()
        c3 = dpm_step(zero, zero, now, then, noise=one)[0].item()
        return c1, c2, c3

    for now, then in pairwise([0.0, 1e-3, 0.2, 0.5, 0.9, 0.999]):
        c1, c2, c3 = coefficients(now, then)
        assert c1 * now + c2 == pytest.approx(then, abs=1e-12)
        assert c1**2 * (1 - now**2) + c3**2 == pytest.approx(1 - then**2, abs=1e-12)


@pytest.mark.parametrize("case", ["diffusers_sched_a", "diffusers_sched_linspace_a"])
def test_diffusers_numbers(case: str) -> None:
    """Every recorded step of CogVideoXDDIMScheduler and CogVideoXDPMScheduler."""
    golden = load(f"repvideo/{case}")
    t = golden["out.timesteps"].tolist()
    n = len(t)
    table = [math.sqrt(a) for a in golden["out.alphas_cumprod"].double().tolist()]
    then = [table[k] if (k := i - 1000 // n) >= 0 else 1.0 for i in t]
    draws = [0, *range(2, 2 * n - 2, 2), 2 * n - 3]  # of two draws the second one is used
    x_ddim = x_dpm = golden["in.x"]
    previous = None
    for k in range(n):
        v, now = golden["in.v"][k], table[t[k]]
        x_ddim = ddim_step(x_ddim, v, now, then[k])
        is_second_order = k > 0 and then[k] < 1
        x_dpm, previous = dpm_step(
            x_dpm, v, now, then[k], noise=golden["in.noise"][draws[k]],
            previous=previous if is_second_order else None,
            sqrt_alpha_previous=table[t[k - 1]] if is_second_order else None,
        )  # fmt: skip
        for actual, name in ((x_ddim, "ddim_steps"), (x_dpm, "dpm_steps"), (previous, "dpm_x0")):
            torch.testing.assert_close(actual, golden[f"out.{name}"][k], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["sat_loop_ddim_a", "sat_loop_dpm_a"])
def test_sat_numbers(case: str) -> None:
    """Every recorded step of the official loop: the velocity is the one its guided x0 came from."""
    golden = load(f"repvideo/{case}")
    x, x0s = golden["in.x0"], golden["out.denoised_steps"]
    now, then, quantised = sat_schedule(len(x0s))
    draws = iter([0, *range(2, 2 * len(x0s), 2)])
    previous, before = None, None
    for k, x0 in enumerate(x0s):
        a = quantised[k]
        v = (a * x.double() - x0) / math.sqrt(1 - a**2)
        if "in.noise" not in golden:
            x = ddim_step(x, v, now[k], then[k], denoiser_sqrt_alpha=a)
        else:
            z = golden["in.noise"][next(draws)] if then[k] < 1 else None
            x, previous = dpm_step(
                x, v, now[k], then[k], noise=z, previous=previous, sqrt_alpha_previous=before,
                denoiser_sqrt_alpha=a,
            )  # fmt: skip
            torch.testing.assert_close(previous, x0, atol=1e-5, rtol=1e-5)
        before = now[k]
        torch.testing.assert_close(x, golden["out.x_steps"][k], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(x, golden["out.final"], atol=2e-4, rtol=2e-4)


def sat_schedule(n: int) -> tuple[list[float], list[float], list[float]]:
    """sqrt(alpha_bar) of each step, of the one after it, and as the denoiser quantises it."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - beta).cumprod(0)
    alpha_bar = alpha_bar / (3 - 2 * alpha_bar)

    def zero_snr(u: Tensor) -> Tensor:
        return (u - u[-1]) * u[0] / (u[0] - u[-1])

    table = zero_snr(alpha_bar.sqrt())
    timesteps = [math.floor(999 - k * 999 / n) for k in range(n)]
    chosen = zero_snr(alpha_bar.sqrt()[sorted(timesteps)]).flip(0).tolist()
    quantised = [table[(table - a).abs().argmin()].item() for a in chosen]
    return chosen, [*chosen[1:], 1.0], quantised


def test_sat_schedule_of_this_file() -> None:
    golden = load("repvideo/sat_schedule_a")
    for n in (6, 10, 50):
        now, then, quantised = sat_schedule(n)
        for name, actual in (("alpha_sqrt", [now[0], *then]), ("alpha_quant", quantised)):
            expected = golden[f"out.n{n}.{name}"].double()
            torch.testing.assert_close(torch.tensor(actual).double(), expected, atol=1e-6, rtol=0)


def load(case: str) -> dict[str, Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load_file(GOLDEN / f"{case}.safetensors")


@every_step
def test_registration(kind: str) -> None:
    step, return_x0 = sampler.LinearStep(0.9, 0.1, 0.2, 0.3, 0.4, 0.5), kind == "dpm"
    given = tensors("x v u p z") if return_x0 else tensors("x v")
    five = [*given.values(), *[None] * (5 - len(given))]
    coefficients = torch.tensor([2.0, *step]).double()
    is_update = kind == "euler"
    torch.library.opcheck(sampler.forward_op.overload, (*five, coefficients, is_update, return_x0))
    dtypes = [None if x is None else torch.float32 for x in five]
    dout = torch.randn(2, 3, 5)
    for upstream in ((dout, dout if return_x0 else None), (dout.mT.contiguous().mT, None)):
        torch.library.opcheck(sampler.backward_op.overload, (*upstream, coefficients, *dtypes))


@pytest.mark.parametrize("needs_grad", [False, True])
@every_step
def test_new_numbers_hardly_ever_recompile(kind: str, needs_grad: bool) -> None:
    """Eight steps: two compilations, and for dpm more for the first two steps and the last one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = STEPS[kind][0]
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    given = {k: v for k, v in inputs(kind).items() if isinstance(v, Tensor)}
    given = {k: v.detach().requires_grad_(needs_grad) for k, v in given.items()}
    n = 8
    for k in range(n):
        if kind == "euler":
            numbers = {"step": -1 / (k + 1)}
        else:
            numbers = {"sqrt_alpha": k / n, "sqrt_alpha_next": (k + 1) / n}
        numbers["guidance"] = 1.5 + k
        tensors_of_step = dict(given)
        if kind == "dpm" and k == 0:
            del tensors_of_step["previous"]
        elif kind == "dpm":
            numbers["sqrt_alpha_previous"] = (k - 1) / n
        results = []
        for f in (compiled, call):
            out = f(**tensors_of_step, **numbers)
            outs = out if isinstance(out, tuple) else (out,)
            results.append(list(outs))
            if needs_grad:
                leaves = list(tensors_of_step.values())
                grads = torch.autograd.grad(sum(o.sum() for o in outs), leaves, allow_unused=True)
                results[-1] += [g for g in grads if g is not None]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert counter.frame_count <= (5 if kind == "dpm" else 2)


# PyTorch imports formulas for forward mode that use TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_step
def test_no_double_backward_and_no_tangents(kind: str) -> None:
    given = inputs(kind)
    call = STEPS[kind][0]
    out = call(**given)
    out = out[0] if isinstance(out, tuple) else out
    seed = torch.ones_like(out).requires_grad_()
    (grad,) = torch.autograd.grad(out, given["velocity"], seed, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_step_bwd"):
        torch.autograd.grad(grad.sum(), seed)
    with torch.autograd.forward_ad.dual_level():
        x = given["x"].detach()
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(**given | {"x": dual})


@every_step
def test_inputs_are_never_written(kind: str) -> None:
    given = inputs(kind)
    held = [x for x in given.values() if isinstance(x, Tensor)]
    before = [(x.detach().clone(), x._version) for x in held]
    out = STEPS[kind][0](**given)
    out = out[0] if isinstance(out, tuple) else out
    torch.autograd.grad(out.sum(), held)
    for x, (value, version) in zip(held, before, strict=True):
        assert torch.equal(x, value) and x._version == version


def test_nothing_is_saved_for_the_backward() -> None:
    """A step is linear: what autograd keeps are its seven coefficients."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        dpm_step(**inputs("dpm"))
    assert [x.shape for x in saved] == [(7,)]


X = torch.zeros(2, 3)
BAD = {
    "x: expected a tensor, got list": (euler_step, {"x": [1.0], "velocity": X, "step": 1.0}),
    r"x: expected dtype one of .*, got torch.int64": (
        euler_step, {"x": X.long(), "velocity": X, "step": 1.0},
    ),
    r"velocity: expected shape \[2, 3\] as x has, got \[3\]": (
        euler_step, {"x": X, "velocity": X[0], "step": 1.0},
    ),
    "velocity: expected device cpu as x has, got meta": (
        euler_step, {"x": X, "velocity": X.to("meta"), "step": 1.0},
    ),
    r"uncond: expected shape \[2, 3\] as x has, got \[1, 3\]": (
        euler_step, {"x": X, "velocity": X, "step": 1.0, "uncond": X[:1]},
    ),
    "guidance: expected 1 without uncond, got 2": (
        euler_step, {"x": X, "velocity": X, "step": 1.0, "guidance": 2.0},
    ),
    "guidance: expected a finite number, got a tensor": (
        euler_step, {"x": X, "velocity": X, "step": 1.0, "uncond": X, "guidance": torch.ones(())},
    ),
    "step: expected a finite number, got a tensor": (
        euler_step, {"x": X, "velocity": X, "step": torch.ones(())},
    ),
    "step: expected a finite number, got nan": (
        euler_step, {"x": X, "velocity": X, "step": math.nan},
    ),
    "guidance: expected a finite number, got inf": (
        euler_step, {"x": X, "velocity": X, "step": 1.0, "uncond": X, "guidance": math.inf},
    ),
    "sqrt_alpha: expected a number from 0 to 1, got 1.5": (
        ddim_step, {"x": X, "velocity": X, "sqrt_alpha": 1.5, "sqrt_alpha_next": 1.0},
    ),
    "sqrt_alpha: expected a number below 1, got 1": (
        ddim_step, {"x": X, "velocity": X, "sqrt_alpha": 1.0, "sqrt_alpha_next": 1.0},
    ),
    "sqrt_alpha_next: expected a number from 0 to 1, got nan": (
        ddim_step, {"x": X, "velocity": X, "sqrt_alpha": 0.5, "sqrt_alpha_next": math.nan},
    ),
    "denoiser_sqrt_alpha: expected a number from 0 to 1, got -1": (
        ddim_step, {"x": X, "velocity": X, **DDIM, "denoiser_sqrt_alpha": -1},
    ),
    "sqrt_alpha_next: expected above 0, at least 0.5, got 0.4": (
        dpm_step, {"x": X, "velocity": X, "sqrt_alpha": 0.5, "sqrt_alpha_next": 0.4},
    ),
    "sqrt_alpha_next: expected above 0, at least 0.0, got 0.0": (
        dpm_step, {"x": X, "velocity": X, "sqrt_alpha": 0.0, "sqrt_alpha_next": 0.0},
    ),
    "sqrt_alpha: expected a number below 1, got 1.0": (
        dpm_step, {"x": X, "velocity": X, "sqrt_alpha": 1.0, "sqrt_alpha_next": 1.0},
    ),
    "noise: expected a tensor for a step to 0.5, got None": (
        dpm_step, {"x": X, "velocity": X, **DDIM},
    ),
    "previous, sqrt_alpha_previous: expected both or neither, got one": (
        dpm_step, {"x": X, "velocity": X, **DDIM, "noise": X, "previous": X},
    ),
    "sqrt_alpha_previous: expected below 0.3, got 0.3": (
        dpm_step,
        {"x": X, "velocity": X, **DDIM, "noise": X, "previous": X, "sqrt_alpha_previous": 0.3},
    ),
    r"noise: expected shape \[2, 3\] as x has, got \[3, 2\]": (
        dpm_step, {"x": X, "velocity": X, **DDIM, "noise": X.T},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    call, given = BAD[message]
    with pytest.raises(ValueError, match=message):
        call(**given)
