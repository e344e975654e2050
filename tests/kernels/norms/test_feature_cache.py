"""The feature cache: `mix` and `segment` against their definitions, and passes through a model.

The same tests run on the portable path and, with TRITON_INTERPRET=1, on the Triton kernels.
"""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.kernels.contracts import living_tensors
from vidgen.ops import EAGER, FUSED
from vidgen_kernels import CacheWindow, FeatureCache, Modulation, reference
from vidgen_kernels.feature_cache import mix, n_entries, segment
from vidgen_kernels.testing import check_op

B, T, D = 2, 13, 24

not_interpreted = pytest.mark.portable_only  # the interpreter computes bf16 wrongly
LOW_PRECISION = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=not_interpreted)]
COUNTS = [2, 3, 4, 5, 6]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def entries(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [leaf(B, T, D, dtype=dtype) for _ in range(n - 1)]


def sum_of(older: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A leaf of its own: gradients go through it, not to what it is the sum of."""
    total = older[0].detach().to(dtype)
    for entry in older[1:]:
        total = total + entry.detach()
    return total.requires_grad_()


def gate_of(dtype: torch.dtype) -> Tensor:
    """Its gradient is one number, that eager code may hit by chance: low precision has none."""
    gate = torch.full((1,), 0.7, dtype=torch.float64).to(dtype)
    return gate.requires_grad_(dtype == torch.float64)


def sources(n: int, dtype: torch.dtype, sum_dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """The three ways to say what the n - 1 older entries are."""
    older = entries(n, dtype)
    total = sum_of(older, torch.promote_types(dtype, sum_dtype) if n > 2 else dtype)
    return {
        "sum": {"total": total},
        "entries": {"total": None, "older": older},
        "both": {"total": total, "older": [entry.detach() for entry in older]},
    }


@pytest.mark.parametrize("source", ["sum", "entries", "both"])
@pytest.mark.parametrize("keep_sum", [True, False])
@pytest.mark.parametrize("n", COUNTS)
def test_mix(n: int, keep_sum: bool, source: str) -> None:
    found = sources(n, torch.float64, torch.float32)[source]
    inputs = {"y": leaf(B, T, D), "gate": gate_of(torch.float64), "n": n, "keep_sum": keep_sum}
    check_op(mix, reference.mix, inputs | found)


@pytest.mark.parametrize("source", ["sum", "entries", "both"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mix_in_low_precision(dtype: torch.dtype, sum_dtype: torch.dtype, source: str) -> None:
    """A bf16 sum of fp16 entries is an fp32 one."""
    found = sources(5, dtype, sum_dtype)[source]
    inputs = {"y": leaf(B, T, D, dtype=dtype), "gate": gate_of(dtype), "n": 5}
    check_op(mix, reference.mix, {**inputs, **found, "sum_dtype": sum_dtype})


def test_each_entry_gets_a_gradient_of_its_own_precision() -> None:
    older = [leaf(B, T, D, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    inputs = {"y": leaf(B, T, D, dtype=torch.float32), "gate": gate_of(torch.float32), "n": 3}
    check_op(mix, reference.mix, {**inputs, "total": None, "older": older})


def modulations(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    def own(*shape: int) -> dict[str, Tensor]:
        return {name: leaf(*shape, dtype=dtype) for name in Modulation._fields}

    affine = {"weight": leaf(D, dtype=dtype), "bias": leaf(D, dtype=dtype)}
    return {
        "plain": lambda: {},
        "per sample": lambda: {**affine, **own(B, D)},
        "per token": lambda: {**affine, **own(B, T, D)},
        "text": lambda: {
            **affine,
            **own(B, D),
            "text": Modulation(*own(B, D).values()),
            "text_length": 5,
        },
    }[kind]()


@pytest.mark.parametrize("source", ["sum", "entries", "both"])
@pytest.mark.parametrize("kind", ["plain", "per sample", "per token", "text"])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_segment(n: int, kind: str, source: str) -> None:
    found = sources(n, torch.float64, torch.float32)[source]
    rows = {"x": leaf(B, T, D), "f": leaf(B, T, D), "cache_gate": gate_of(torch.float64), "n": n}
    norm = {"norm": "rms"} if kind == "per sample" else {}
    check_op(segment, reference.segment, {**rows, **found, **modulations(kind), **norm})


@pytest.mark.parametrize("source", ["sum", "both"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("kind", ["plain", "text", "per token"])
def test_segment_in_low_precision(kind: str, dtype: torch.dtype, source: str) -> None:
    found = sources(4, dtype, torch.float32)[source]
    rows = {name: leaf(B, T, D, dtype=dtype) for name in "xf"}
    rows |= {"cache_gate": gate_of(dtype), "n": 4, "keep_sum": False}
    check_op(segment, reference.segment, {**rows, **found, **modulations(kind, dtype)})


@pytest.mark.parametrize("text_length", [0, 1, 6, 12, 13])
def test_segment_splits_text_anywhere(text_length: int) -> None:
    found = sources(3, torch.float64, torch.float32)["both"]
    rows = {"x": leaf(B, T, D), "f": leaf(B, T, D), "cache_gate": gate_of(torch.float64), "n": 3}
    parts = {**modulations("text"), "text_length": text_length}
    check_op(segment, reference.segment, {**rows, **found, **parts})


def test_segment_without_f() -> None:
    found = sources(3, torch.float64, torch.float32)["both"]
    rows = {"x": leaf(B, T, D), "f": None, "cache_gate": gate_of(torch.float64), "n": 3}
    check_op(segment, reference.segment, {**rows, **found, "weight": leaf(D)})


def test_one_entry_is_the_plain_residual() -> None:
    y, gate = leaf(B, T, D), gate_of(torch.float64)
    h, total = mix(y, None, gate, 1)
    assert h is y and total is y
    assert mix(y, None, gate, 1, keep_sum=False) == (y, None)
    rows = {"x": leaf(B, T, D), "f": leaf(B, T, D), "cache_gate": gate, "n": 1, "total": None}
    check_op(segment, reference.segment, {**rows, **modulations("text")})


@pytest.mark.parametrize("call", ["mix", "segment"])
def test_gradcheck(call: str) -> None:
    y, f, total, older = (leaf(1, 2, 3) for _ in range(4))
    gate = gate_of(torch.float64)
    if call == "mix":
        torch.autograd.gradcheck(lambda *x: mix(*x, 4), (y, total, gate), fast_mode=True)
        torch.autograd.gradcheck(
            lambda y, a, b, gate: mix(y, None, gate, 3, older=[a, b]),
            (y, total, older, gate),
            fast_mode=True,
        )
    else:
        torch.autograd.gradcheck(
            lambda x, f, total, gate, weight: segment(x, f, total, gate, 3, weight=weight),
            (y, f, total, gate, leaf(3)),
            fast_mode=True,
        )


def test_laws_of_the_mix() -> None:
    older, y = [x.detach() for x in entries(4)], leaf(B, T, D).detach()
    total = older[0] + older[1] + older[2]

    def h(gate: float, y: Tensor = y, total: Tensor = total) -> Tensor:
        return mix(y, total, torch.tensor([gate], dtype=torch.float64), 4)[0]

    def assert_close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)

    assert_close(h(0.0), y)
    assert_close(h(1.0), torch.stack([*older, y]).mean(dim=0))
    assert_close(h(0.3, 2 * y, 2 * total), 2 * h(0.3))
    assert_close(h(0.3, y + 1, total + 3), h(0.3) + 1)  # all entries and y plus 1
    assert_close(h(0.3), 0.7 * h(0.0) + 0.3 * h(1.0))


def test_strided_rows() -> None:
    wide = torch.randn(B, T, 3, D + 1, dtype=torch.float64)[..., 1:]
    y, total, older = wide.unbind(2)
    gate = torch.tensor(0.4, dtype=torch.float64)
    expected = mix(*(x.contiguous() for x in (y, total)), gate, 2)
    for a, b in zip(mix(y, total, gate, 2, older=[older]), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_do(shape) -> None:
    y, total, f = leaf(*shape, D), leaf(*shape, D), leaf(*shape, D)
    gate = gate_of(torch.float64)
    results = segment(y, f, total, gate, 2)
    assert all(r.shape == y.shape for r in results)
    grads = torch.autograd.grad(results.a.sum() + results.h.sum(), [y, total, f, gate])
    assert [g.shape for g in grads] == [x.shape for x in (y, total, f, gate)]
    assert not any(g.any() for g in grads)


def test_inference_keeps_nothing() -> None:
    x, f, total = (leaf(B, T, D) for _ in range(3))
    with torch.no_grad():
        found = segment(x, f, total, gate_of(torch.float64), 3, keep_sum=False)
    assert found.y is None and found.total is None


def test_gradients_are_repeatable() -> None:
    found = sources(4, torch.float32, torch.float32)["both"]
    x, f = (leaf(B, T, D, dtype=torch.float32) for _ in range(2))
    gate = torch.tensor([0.3], requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        h, a, total, _ = segment(x, f, cache_gate=gate, n=4, **found)
        leaves = [x, f, gate, found["total"]]
        return torch.autograd.grad((h, a, total), leaves, (h.cos(), a.cos(), total.cos()))

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


y = torch.zeros(B, T, D)
g = torch.zeros(1)
BAD = {
    "n of 0": (lambda: mix(y, y, g, 0), "n: .*at least 1.*0"),
    "n of 2.5": (lambda: mix(y, y, g, 2.5), "n: .*at least 1.*2.5"),
    "no sum": (lambda: mix(y, None, g, 3), "total: .*2 older.*None"),
    "too few entries": (lambda: mix(y, y, g, 4, older=[y]), "older: .*3.*n = 4.*1"),
    "another sum": (lambda: mix(y, y[:1], g, 2), r"total: .*\[2, 13, 24\].*\[1, 13, 24\]"),
    "another entry": (lambda: mix(y, y, g, 2, older=[y[1:]]), r"older\[0\]: .*\[1, 13, 24\]"),
    "sum elsewhere": (lambda: mix(y, y.to("meta"), g, 2), "total: .*cpu.*meta"),
    "gate elsewhere": (lambda: mix(y, y, g.to("meta"), 2), "gate: .*cpu.*meta"),
    "many gates": (lambda: mix(y, y, torch.zeros(2), 2), r"gate: .*one element.*\[2\]"),
    "gate is a number": (lambda: mix(y, y, 0.5, 2), "gate: .*tensor.*float"),
    "integer sum": (lambda: mix(y, y, g, 2, sum_dtype=torch.int32), "sum_dtype: .*int32"),
    "no dtype of the sum": (lambda: mix(y, y, g, 2, sum_dtype=None), "sum_dtype: .*None"),
    "integers": (lambda: mix(y.long(), y, g, 2), "y: .*int64"),
    "no norm": (lambda: segment(y, y, y, g, 2, norm=""), "norm: .*layer.*rms"),
    "another f": (lambda: segment(y, y[1:], y, g, 2), r"f: .*\[1, 13, 24\]"),
    "no gates": (lambda: CacheWindow(torch.zeros(0)), r"gates: .*\[0\]"),
    "list of gates": (lambda: CacheWindow([0.5]), "gates: .*tensor.*list"),
    "gate of NaN": (lambda: FeatureCache(2, gate=float("nan")), "gate: .*finite.*nan"),
    "no window": (lambda: CacheWindow(g, 0), "window: .*0"),
    "half a layer": (lambda: FeatureCache(2.5), "num_layers: .*2.5"),
    "no layers": (lambda: FeatureCache(0), "num_layers: .*0"),
    "layer 1 first": (lambda: FeatureCache(3)(1, y), "layer: .*expected 0.*got 1"),
    "no such layer": (lambda: FeatureCache(3)(3, y), "layer: .*0 to 2.*3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call()


# Passes through a model


class Toy(nn.Module):
    """Layers ``y = h + w tanh(h)``, the cache before each of them."""

    def __init__(self, make_cache: Callable[[], Any], n_layers: int, is_checkpointed: bool = False):
        super().__init__()
        self.weights = nn.ParameterList(
            torch.randn(D, dtype=torch.float64) for _ in range(n_layers)
        )
        self.make_cache, self.is_checkpointed = make_cache, is_checkpointed

    def forward(self, y: Tensor) -> Tensor:
        cache = self.make_cache()
        for i, weight in enumerate(self.weights):

            def layer(y: Tensor, i: int = i, weight: Tensor = weight) -> Tensor:
                h = cache(i, y)
                return h + weight * torch.tanh(h)

            y = checkpoint(layer, y, use_reentrant=False) if self.is_checkpointed else layer(y)
        return y


def by_definition(gates: Tensor, weights: nn.ParameterList, y: Tensor, window: int = 6) -> Tensor:
    """RepVideo's loop: a list of outputs that restarts after layers 0, 6, 12, ..."""
    outputs = [y]
    for i, (gate, weight) in enumerate(zip(gates, weights, strict=True)):
        h = gate * torch.stack(outputs).mean(dim=0) + (1 - gate) * y
        y = h + weight * torch.tanh(h)
        outputs = [y] if i % window == 0 else [*outputs, y]
    return y


def random_gates(n_layers: int) -> Tensor:
    return (1.6 * torch.rand(n_layers, dtype=torch.float64) - 0.3).requires_grad_()


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves, materialize_grads=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor], atol: float = 1e-11) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("ops", [FUSED, EAGER], ids=["fused", "eager"])
@pytest.mark.parametrize(("n_layers", "window"), [(1, 6), (2, 6), (14, 6), (7, 3), (4, 1)])
def test_a_model(n_layers: int, window: int, ops, is_checkpointed: bool) -> None:
    gates = random_gates(n_layers)
    model = Toy(lambda: ops.feature_cache(gates, window), n_layers, is_checkpointed)
    x = leaf(1, 5, D)
    leaves = [x, gates, *model.parameters()]
    expected = gradients(by_definition(gates, model.weights, x, window), leaves)
    y, dx, dgates, *rest = gradients(model(x), leaves)
    assert_same([y, dx, dgates, *rest], expected)
    dead = [i for i in range(n_layers) if i == 0 or (i - 1) % window == 0]
    assert not dgates[dead].any()


def test_numbers_of_entries() -> None:
    counts = [n_entries(layer) for layer in range(15)]
    assert counts == [1, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_module(is_checkpointed: bool) -> None:
    cache = FeatureCache(9).double()
    assert [(k, p.shape) for k, p in cache.named_parameters()] == [("gates", (9,))]
    assert (cache.gates == 0.5).all()
    model = Toy(lambda: cache, 9, is_checkpointed)
    x = leaf(1, 5, D)
    leaves = [x, cache.gates, *model.parameters()]
    expected = gradients(by_definition(cache.gates, model.weights, x), leaves)
    assert_same(gradients(model(x), leaves), expected)
    assert_same(gradients(model(x), leaves), expected)  # layer 0 begins anew


def test_a_fixed_gate_is_no_parameter() -> None:
    cache = FeatureCache(5, gate=0.25)
    assert not list(cache.parameters()) and not cache.state_dict()
    assert cache.double().gates.dtype == torch.float64 and (cache.gates == 0.25).all()
    cache, x = FeatureCache(3, gate=1), torch.randn(1, 5, D)
    cache(0, x), cache(1, x)
    torch.testing.assert_close(cache(2, 3 * x), 2 * x)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_two_passes_before_backward(is_checkpointed: bool) -> None:
    cache = FeatureCache(9).double()
    model = Toy(lambda: cache, 9, is_checkpointed)
    inputs = [leaf(1, 5, D), leaf(1, 5, D)]
    leaves = [cache.gates, *model.parameters()]
    expected = [
        gradients(by_definition(cache.gates, model.weights, x), [x, *leaves]) for x in inputs
    ]
    outputs = [model(x) for x in inputs]
    for x, y, e in zip(inputs, outputs, expected, strict=True):
        assert_same(gradients(y, [x, *leaves]), e)


def test_the_same_input_twice() -> None:
    cache = FeatureCache(5).double()
    model = Toy(lambda: cache, 5, is_checkpointed=True)
    x = leaf(1, 5, D)
    both = model(x).sin().sum() + model(x).cos().sum()
    y = by_definition(cache.gates, model.weights, x)
    leaves = [x, cache.gates]
    expected = torch.autograd.grad(y.sin().sum() + y.cos().sum(), leaves)
    assert_same(list(torch.autograd.grad(both, leaves)), list(expected))


def test_several_layers_in_one_checkpoint() -> None:
    gates = random_gates(9)
    model = Toy(lambda: CacheWindow(gates), 9)
    x = leaf(1, 5, D)
    leaves = [x, gates, *model.parameters()]
    expected = gradients(by_definition(gates, model.weights, x), leaves)
    cache = CacheWindow(gates)

    def layers(y: Tensor, first: int) -> Tensor:
        for i in range(first, min(first + 4, 9)):
            h = cache(i, y)
            y = h + model.weights[i] * torch.tanh(h)
        return y

    y = x
    for first in range(0, 9, 4):
        y = checkpoint(layers, y, first, use_reentrant=False)
    assert_same(gradients(y, leaves), expected)
    assert_same(gradients(checkpoint(model, x + 0, use_reentrant=False), leaves), expected)


def test_reentrant_checkpoints_are_refused() -> None:
    cache = FeatureCache(4).double()
    y = leaf(1, 5, D)
    for i in range(4):
        y = checkpoint(lambda y, i=i: cache(i, y).tanh(), y, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


def test_layers_that_need_no_gradient() -> None:
    """The first layers run without gradients: the sum has them, the list of outputs has not."""
    for is_checkpointed in (False, True):
        cache = FeatureCache(6).double()
        model = Toy(lambda cache=cache: cache, 6, is_checkpointed)
        x = leaf(1, 5, D)

        def forward(cache: FeatureCache, model: Toy, run: Callable, x: Tensor = x) -> Tensor:
            y = x
            for i, weight in enumerate(model.weights):
                with torch.set_grad_enabled(i > 2):
                    y = run(lambda y, i=i, w=weight: (h := cache(i, y)) + w * torch.tanh(h), y)
            return y

        def again(call: Callable, y: Tensor) -> Tensor:
            return checkpoint(call, y, use_reentrant=False)

        leaves = [cache.gates, *model.parameters()]
        plain = gradients(forward(cache, model, lambda call, y: call(y)), leaves)
        assert_same(gradients(forward(cache, model, again), leaves), plain)
        assert plain[1][3:].all() and not plain[1][:3].any()


def test_segments_are_mixes() -> None:
    """A pass by `segment` gives h and a of one by calls; also in a checkpoint."""
    n_layers = 9
    gates, gate = random_gates(n_layers), leaf(B, D)
    x = leaf(B, T, D)
    weights = [leaf(D) for _ in range(n_layers)]
    leaves = [x, gates, gate, *weights]

    def fused(run: Callable) -> Tensor:
        cache = CacheWindow(gates)

        def boundary(layer: int, x: Tensor, f: Tensor | None) -> tuple[Tensor, Tensor]:
            h, a = cache.segment(layer, x, f, gate=None if f is None else gate)
            return h, weights[layer] * torch.tanh(a)

        h, f = boundary(0, x, None)
        for layer in range(1, n_layers):
            h, f = run(boundary, layer, h, f)
        return h + f

    def plain() -> Tensor:
        cache = CacheWindow(gates)
        h, f = x, torch.zeros_like(x)
        for layer in range(n_layers):
            h = cache(layer, h + gate[:, None] * f if layer else x)
            _, a = reference.residual_norm(h)
            f = weights[layer] * torch.tanh(a)
        return h + f

    expected = gradients(plain(), leaves)
    assert_same(gradients(fused(lambda call, *x: call(*x)), leaves), expected)
    again = gradients(fused(lambda call, *x: checkpoint(call, *x, use_reentrant=False)), leaves)
    assert_same(again, expected)


def held_bytes(run: Callable[[], object]) -> int:
    """What is held while the result of ``run`` is, beyond what was held before."""
    gc.collect()  # what earlier tests left would be freed in between
    with torch.profiler.profile(profile_memory=True) as profiler:
        _kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(event.nbytes() for event in events)


def python_bytes() -> int:
    """What the tensors that Python knows hold."""
    storages = [x.untyped_storage() for x in living_tensors()]
    storages = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(storages.values())


@pytest.mark.portable_only  # the interpreter's own arrays are not PyTorch's
@pytest.mark.parametrize("n_layers", [8, 12, 14])
def test_memory_of_checkpointed_training(n_layers: int) -> None:
    """Checkpoints keep the inputs of the layers; a cache before each of them keeps no more."""
    x = leaf(1, 500, D)
    caches = [FeatureCache(n_layers).double(), lambda i, y: y]
    models = [Toy(lambda cache=cache: cache, n_layers, is_checkpointed=True) for cache in caches]
    models[0](x)  # what is made once
    cached, plain = (held_bytes(lambda model=model: model(x)) for model in models)
    assert plain >= (n_layers - 1) * x.nbytes
    assert cached < plain + x.nbytes / 2


def test_saved_tensors_of_plain_training() -> None:
    """The cache saves the outputs of layers, which are alive anyway, and nothing else of a size."""
    gates = random_gates(14)
    model = Toy(lambda: CacheWindow(gates), 14)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cache = CacheWindow(gates)
        y, outputs = leaf(1, 5, D), []
        for i, weight in enumerate(model.weights):
            outputs.append(y)
            first = len(saved)
            h = cache(i, y)
            rows = {x.data_ptr() for x in saved[first:] if x.shape == y.shape}
            assert rows <= {x.data_ptr() for x in outputs}
            y = h + weight * torch.tanh(h)


@pytest.mark.portable_only
@pytest.mark.parametrize(("n_layers", "n_kept"), [(2, 1), (3, 1), (5, 1), (7, 0), (8, 1), (13, 0)])
def test_inference_keeps_the_sum_alone(n_layers: int, n_kept: int) -> None:
    """And that only until the last layer of a window."""
    x = torch.randn(1, 500, D, dtype=torch.float64)
    cache = FeatureCache(20).double()

    before = python_bytes()
    y = x
    with torch.no_grad():
        for i in range(n_layers):
            y = cache(i, y).tanh()
    del y
    assert round((python_bytes() - before) / x.nbytes) == n_kept


@pytest.mark.portable_only
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_nothing_is_kept_after_backward(is_checkpointed: bool) -> None:
    x, cache = leaf(1, 500, D), FeatureCache(9).double()
    model = Toy(lambda: cache, 9, is_checkpointed)

    def run() -> None:
        torch.autograd.grad(model(x).sum(), list(model.parameters()))
        cache.reset()

    run()
    assert held_bytes(run) < x.nbytes / 2


def test_order_and_reset() -> None:
    cache, y = FeatureCache(5), torch.randn(B, 5, D)
    cache(0, y), cache(1, y)
    with pytest.raises(ValueError, match="expected 2, or 0 to begin anew, got 3"):
        cache(3, y)
    cache(2, y)
    cache.reset()
    with pytest.raises(ValueError, match=r"expected 0, .*got 3"):
        cache(3, y)
    cache(0, y)


def test_copies_and_pickles_begin_anew() -> None:
    cache = FeatureCache(5)
    y = torch.randn(B, 5, D)
    for i in range(4):
        y = cache(i, y) + 1
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(other.gates, cache.gates) and other.gates is not cache.gates
        other(0, y)
        assert other._window.gates is other.gates
    cache(4, y)


@pytest.mark.parametrize("ops", [FUSED, EAGER], ids=["fused", "eager"])
def test_a_pass_compiles_as_one_graph(ops) -> None:
    torch._dynamo.reset()
    gates, x = random_gates(4), leaf(1, 5, D)

    def forward(gates: Tensor, x: Tensor) -> Tensor:
        cache, y = ops.feature_cache(gates, 6), x
        for i in range(4):
            h = cache(i, y)
            y = h + torch.tanh(h)
        return y

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    leaves = [x, gates]
    assert_same(gradients(compiled(gates, x), leaves), gradients(forward(gates, x), leaves))
