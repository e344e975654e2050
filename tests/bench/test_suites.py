"""What is measured: shapes follow the models, floors are what a call reads and writes."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.attention import curves
from bench.attention.providers import natten_refuses, near_square
from bench.memory.registry import CASES, MemoryCase
from bench.suites import ATTENTION, SUITES
from vidgen.ops import FUSED
from vidgen.shapes import REAL, TOY, nova_sets, pyramid_blocks

pytestmark = pytest.mark.portable_only


def test_shapes_follow_the_models_formulas() -> None:
    assert pyramid_blocks(240, 15, 2) == (128 + 240, *[240] * 12, 960, 3840, 3840)
    assert (sum(nova_sets(1440)), len(nova_sets(1440)), max(nova_sets(1440))) == (1440, 63, 36)
    assert (len(nova_sets(4096)), max(nova_sets(4096))) == (64, 101)
    density = {s.name: round(s.density, 3) for s in REAL}
    assert density["pyramid_768p_u15_s2_h30"] == 0.611
    assert density["nova_temporal_train"] == 0.558


def test_shape_names_are_unique() -> None:
    names = [name for suite in SUITES.values() for name in suite.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("shape", TOY, ids=lambda s: s.name)
def test_visible_pairs_are_those_of_the_mask(shape) -> None:
    case = ATTENTION.make(shape, torch.float32, torch.device("cpu"))
    assert int(case.dense_mask().sum()) == shape.visible_pairs


@pytest.mark.parametrize("case", CASES["reduced"], ids=lambda c: c.name)
def test_floors_are_the_tensors_that_a_call_reads_and_writes(case: MemoryCase) -> None:
    """Counts what a forward reads and writes. Floors leave out vectors and positions."""
    with FakeTensorMode(), torch.no_grad():
        inputs = case.inputs(torch.bfloat16, "cpu")
        outputs = case.call(FUSED, inputs)
    # the backward reads older entries, the forward only their sum
    read = [x for name, x in inputs.items() if not (name.startswith("older") and "total" in inputs)]
    n_bytes = sum(x.nbytes for x in read)
    for x in outputs:  # v of a single stream is a view
        is_view = any(x.untyped_storage()._cdata == y.untyped_storage()._cdata for y in read)
        n_bytes += -x.nbytes if is_view else x.nbytes
    assert n_bytes == pytest.approx(case.floor(torch.bfloat16).fwd, rel=0.01)


def test_points_of_the_curves() -> None:
    points = curves.POINTS["real"]
    assert [p.x for p in points if p.curve == curves.TOKENS][-1] == 131072
    for point in points:
        if point.curve == curves.CACHED:
            assert point.shape.is_full and point.shape.n_keys == point.x * point.shape.n_queries


def test_natten_takes_equal_frames_only() -> None:
    shapes = {shape.name: shape for shape in ATTENTION.sets["real"]}
    device = torch.device("meta")

    def refuses(name: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
        case = SimpleNamespace(shape=shapes[name], dtype=dtype, device=device)
        return natten_refuses(case, True)

    assert refuses("wan_14b_block_causal") is None
    assert "float16" in refuses("wan_14b_block_causal", torch.float32)
    for name in ("wan_14b_teacher_forcing", "nova_cache_step8", "nova_temporal_train"):
        assert "frames of one size" in refuses(name)
    assert near_square(1560) == (39, 40)
    assert near_square(7) == (1, 7)
