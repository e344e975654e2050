"""Masks said in intervals are the masks of the definition, on both sides, for every constructor."""

import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.contracts import peak_bytes
from vidgen_kernels import IntervalMask, reference
from vidgen_kernels.attention import intervals, runs
from vidgen_kernels.testing import build_mask, dense_mask, intervals_needed, random_layout

pytestmark = pytest.mark.portable_only  # pure torch: the interpreter has no part in it


def dense_of(begin: Tensor, end: Tensor, n_others: int) -> Tensor:
    """Bool [B or 1, rows, others] of per-token intervals [I, B or 1, rows]."""
    other = torch.arange(n_others)
    return ((other >= begin[..., None]) & (other < end[..., None])).any(dim=0)


def check(mask: IntervalMask, dense: Tensor) -> None:
    """The mask is ``dense``, read by queries, by keys, and by `to_dense`."""
    _, n_queries, n_keys = dense.shape
    q_begin, q_end, k_begin, k_end = mask.intervals(n_queries, n_keys)
    for x in (q_begin, q_end, k_begin, k_end):
        assert x.dtype == torch.int32 and x.is_contiguous()
    assert len(q_begin) <= runs.MAX_INTERVALS and len(k_begin) <= runs.MAX_INTERVALS
    by_query = dense_of(q_begin, q_end, n_keys)
    by_key = dense_of(k_begin, k_end, n_queries).mT
    for seen in (by_query, by_key, mask.to_dense()):
        n_batch = max(len(seen), len(dense))
        assert seen.shape[1:] == dense.shape[1:]
        assert torch.equal(seen.expand(n_batch, -1, -1), dense.expand(n_batch, -1, -1))


def as_tensor(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64)


LENGTHS = [[3, 4, 0, 2, 5], [1, 1, 1, 1], [7], [0, 0], [], [0, 3, 0], [16, 1, 17, 15]]
WINDOWS = [(None, 0), (1, 0), (2, 0), (1, 1), (2, 1), (2, 3), (99, 99), (None, 2)]


@pytest.mark.parametrize("lengths_as", [list, tuple, as_tensor])
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks(lengths, window, sinks, lengths_as) -> None:
    rule = {"window": window, "sink_blocks": sinks}
    given = lengths_as(lengths)
    check(
        IntervalMask.block_causal(given, **rule), reference.block_causal_mask(lengths, None, **rule)
    )
    check(
        IntervalMask.teacher_forcing(given, **rule),
        reference.teacher_forcing_mask(lengths, **rule),
    )
    for start in range(len(lengths) + 1):
        for blocks in (range(start, len(lengths)), range(start, start), range(0, start)):
            mask = IntervalMask.block_causal(given, query_blocks=blocks, **rule)
            check(mask, reference.block_causal_mask(lengths, blocks, **rule))


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_teacher_forcing_of_conditions(lengths, window, sinks) -> None:
    rule = {"window": window, "sink_blocks": sinks}
    full = reference.teacher_forcing_mask(lengths, **rule)
    for first in range(len(lengths) + 1):
        noisy = torch.arange(full.shape[1]) - sum(lengths)
        kept = ((noisy < 0) | (noisy >= sum(lengths[:first]))).nonzero()[:, 0]
        for given in (lengths, as_tensor(lengths)):
            mask = IntervalMask.teacher_forcing(given, **rule, first_noisy=first)
            check(mask, full[:, kept][:, :, kept])
    for first in (-1, len(lengths) + 1):
        with pytest.raises(ValueError, match="first_noisy: expected a block in"):
            IntervalMask.teacher_forcing(lengths, first_noisy=first)


def test_full() -> None:
    for q, k in (([3, 2], [1, 4]), ([3], [0]), ([0, 2], [5, 5]), ([], []), ([4, 4], [4, 4])):
        check(IntervalMask.full(q, k), reference.full_mask(q, k))
        check(IntervalMask.full(as_tensor(q), as_tensor(k)), reference.full_mask(q, k))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ranks(dtype: torch.dtype) -> None:
    rank = torch.tensor([0, 0, 3, 3, 3, 7], dtype=dtype)
    other = torch.tensor([[0, 1, 2, 3], [3, 3, 8, 9], [0, 0, 0, 0]], dtype=dtype)
    for pair in ((rank, None), (rank, other), (other, rank), (other, None), (rank[:0], rank)):
        check(IntervalMask.from_ranks(*pair), reference.rank_mask(*pair))


def test_pack_and_padded_text() -> None:
    parts = [([5, 3], None), ([2, 2, 2], 1), ([4], None)]
    masks = [IntervalMask.block_causal(x, window=w) for x, w in parts]
    dense = [reference.block_causal_mask(x, None, w) for x, w in parts]
    packed, dense_packed = IntervalMask.pack(masks), reference.pack_masks(dense)
    check(packed, dense_packed)
    assert packed.parts == tuple(masks) and masks[0].parts == ()

    valid = [0, 3, 5]
    padded = IntervalMask.pad_text(masks[0], 5, valid)
    dense_padded = reference.pad_text_mask(dense[0], 5, valid, text_queries=True)
    check(padded, dense_padded)
    check(IntervalMask.pad_text(masks[0], 5, as_tensor(valid)), dense_padded)
    check(IntervalMask.pack([packed, padded]), reference.pack_masks([dense_packed, dense_padded]))
    assert padded.batch_size == 3 and packed.batch_size == 1

    step = IntervalMask.block_causal([5, 3], query_blocks=range(1, 2))
    dense_step = reference.block_causal_mask([5, 3], range(1, 2))
    check(
        IntervalMask.pad_text(step, 5, valid),
        reference.pad_text_mask(dense_step, 5, valid, text_queries=False),
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_layouts(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        layout = random_layout(rng, max_tokens=rng.choice([8, 64]), as_tensors=rng.random() < 0.5)
        check(layout.mask, layout.dense)


def test_random_layouts_cover_what_they_should() -> None:
    rng = random.Random(0)
    layouts = [random_layout(rng, 64) for _ in range(500)]
    text = "\n".join(repr(x.recipe) for x in layouts)
    for kind in ("block_causal", "teacher_forcing", "full", "from_ranks", "pack", "pad_text"):
        assert text.count(f"('{kind}'") >= 50
    for n in (1, 2, 3):
        assert sum(intervals_needed(x.dense) == n for x in layouts) >= 5
    assert {0, 1, 64} <= {x.dense.shape[1] for x in layouts} & {x.dense.shape[2] for x in layouts}
    assert max(len(x.dense) for x in layouts) > 1


def test_more_than_three_intervals_are_refused() -> None:
    """Sinks cut by padding, the window, and the noisy block itself: four intervals."""
    recipe = ("teacher_forcing", {"block_lengths": [6, 2, 2, 2, 2], "window": 2, "sink_blocks": 1})
    assert intervals_needed(dense_mask(recipe)) == 3
    padded = ("pad_text", {"mask": recipe, "text_length": 4, "valid_lengths": [2]})
    assert intervals_needed(dense_mask(padded)) == 4
    with pytest.raises(ValueError, match="at most 3 intervals"):
        build_mask(padded)


def causal(lengths, **options) -> IntervalMask:
    return IntervalMask.block_causal(lengths, **options)


BAD = {
    "negative length": (lambda: causal([3, -1]), "-1"),
    "negative length in a tensor": (lambda: causal(as_tensor([3, -1])), "negative"),
    "float length": (lambda: causal([1.5]), "1.5"),
    "bool length": (lambda: causal([True]), "True"),
    "float tensor": (lambda: causal(torch.ones(2)), "float32"),
    "complex tensor": (lambda: causal(torch.ones(2, dtype=torch.complex64)), "complex64"),
    "tensor of two dims": (lambda: causal(torch.ones(2, 2, dtype=torch.int64)), r"\[2, 2\]"),
    "window 0": (lambda: causal([3], window=0), "window.*0"),
    "negative sinks": (lambda: causal([3], sink_blocks=-1), "sink_blocks.*-1"),
    "query blocks outside": (lambda: causal([3], query_blocks=range(0, 2)), "0..1"),
    "query blocks negative": (lambda: causal([3], query_blocks=range(-1, 1)), "0..1"),
    "query blocks with a step": (lambda: causal([1, 1], query_blocks=range(0, 2, 2)), "step"),
    "query blocks as a list": (lambda: causal([1, 1], query_blocks=[0]), r"\[0\]"),
    "teacher forcing window": (lambda: IntervalMask.teacher_forcing([3], window=-2), "-2"),
    "full, other count": (lambda: IntervalMask.full([1, 2], [3]), "2.*1"),
    "unsorted ranks": (lambda: IntervalMask.from_ranks(as_tensor([1, 0])), "sorted"),
    "unsorted key ranks": (
        lambda: IntervalMask.from_ranks(as_tensor([0, 1]), as_tensor([1, 0])),
        "rank_k.*sorted",
    ),
    "float ranks": (lambda: IntervalMask.from_ranks(torch.zeros(3)), "float32"),
    "ranks of three dims": (
        lambda: IntervalMask.from_ranks(torch.zeros(1, 1, 3, dtype=torch.int64)),
        r"\[1, 1, 3\]",
    ),
    "rank batches": (
        lambda: IntervalMask.from_ranks(*(torch.zeros(n, 3, dtype=torch.int64) for n in (2, 3))),
        "2.*3",
    ),
    "pack of nothing": (lambda: IntervalMask.pack([]), "none"),
    "pack of batches": (
        lambda: IntervalMask.pack([IntervalMask.pad_text(causal([3]), 1, [1] * n) for n in (2, 3)]),
        r"\[2, 3\]",
    ),
    "text too long": (lambda: IntervalMask.pad_text(causal([3]), 4, [2]), "3.*4"),
    "no valid lengths": (lambda: IntervalMask.pad_text(causal([3]), 2, []), "1 values.*0"),
    "valid is no sequence": (lambda: IntervalMask.pad_text(causal([3]), 2, 2), "sequence.*2"),
    "no sequence": (lambda: causal(5), "sequence.*5"),
    "tensor of no dims": (lambda: causal(torch.tensor(5)), r"\[N\].*\[\]"),
    "past int32": (lambda: causal([2**31]), "at most 2147483647.*2147483648"),
    "sum past int32": (lambda: causal([2**31 - 1, 5]), "at most 2147483647"),
    "tensor past int32": (lambda: causal(as_tensor([2**31])), "at most 2147483647"),
    "window of 1.5": (lambda: causal([3], window=1.5), "window.*1.5"),
    "window True": (lambda: causal([3], window=True), "window.*True"),
    "no number of sinks": (lambda: causal([3], sink_blocks=None), "sink_blocks.*None"),
    "bad q_lengths": (lambda: IntervalMask.full([1.5], [3]), "q_lengths.*1.5"),
    "ranks as a list": (lambda: IntervalMask.from_ranks([0, 1]), "tensor.*list"),
    "valid above text": (lambda: IntervalMask.pad_text(causal([3]), 2, [3]), "0..2"),
    "valid below zero": (lambda: IntervalMask.pad_text(causal([3]), 2, as_tensor([-1])), "0..2"),
    "valid of another batch": (
        lambda: IntervalMask.pad_text(IntervalMask.pad_text(causal([3]), 2, [1, 1]), 2, [1] * 3),
        "2.*3",
    ),
    "mask for other queries": (lambda: causal([3]).intervals(4, 3), "3.*4"),
    "mask for other keys": (lambda: causal([3]).intervals(3, 4), "3.*4"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_expected_and_actual(name: str) -> None:
    build, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        build()


def test_ints_are_cached_by_content() -> None:
    mask = causal([5, 6, 7], window=2)
    assert causal((5, 6, 7), window=2) is mask
    assert causal([5, 6, 7]) is not mask
    assert mask.intervals(18, 18) is mask.intervals(18, 18)


def test_a_tensor_is_never_cached_nor_kept() -> None:
    lengths = as_tensor([2, 3])
    mask = causal(lengths)
    assert causal(lengths) is not mask
    lengths.copy_(as_tensor([1, 4]))
    check(mask, reference.block_causal_mask([2, 3]))
    check(causal(lengths), reference.block_causal_mask([1, 4]))

    lengths = torch.tensor([2, 3], dtype=torch.int32)  # needs no conversion, so might be aliased
    mask = causal(lengths)
    lengths.zero_()
    check(mask, reference.block_causal_mask([2, 3]))

    ranks = as_tensor([0, 1, 2])
    mask = IntervalMask.from_ranks(ranks)
    ranks.zero_()
    check(mask, reference.rank_mask(as_tensor([0, 1, 2])))


LENGTHS_100K = [1560] * 63 + [1720]
RANKS_100K = torch.arange(64).repeat_interleave(torch.tensor(LENGTHS_100K))
TEXT = LENGTHS_100K[0] // 2


@pytest.mark.parametrize(
    ("most_calls", "build"),
    [
        (100, lambda: causal(LENGTHS_100K)),
        (100, lambda: causal(LENGTHS_100K, window=8)),
        (100, lambda: causal(LENGTHS_100K, query_blocks=range(60, 64))),
        (100, lambda: IntervalMask.full(LENGTHS_100K, LENGTHS_100K)),
        (100, lambda: IntervalMask.from_ranks(RANKS_100K)),
        (130, lambda: causal(LENGTHS_100K, window=8, sink_blocks=1)),
        (180, lambda: IntervalMask.teacher_forcing([x // 2 for x in LENGTHS_100K])),
        (180, lambda: IntervalMask.teacher_forcing([x // 2 for x in LENGTHS_100K], window=8)),
        (230, lambda: IntervalMask.pad_text(causal(LENGTHS_100K), TEXT, [TEXT // 2])),
    ],
    ids=["causal", "window", "step", "full", "ranks", "sinks", "teacher", "teacher 8", "text"],
)
def test_metadata_takes_few_calls_and_the_memory_of_its_tables(most_calls: int, build) -> None:
    """100k tokens in 64 blocks, from ints to the tables that kernels read, nothing cached.

    Neither grows with the number of tokens but the tables themselves. `make bench` has the times.
    """

    def metadata() -> list[Tensor]:
        intervals._build_on_host.cache_clear()
        mask = build()
        return list(mask.intervals(mask.n_queries, mask.n_keys))

    with CountedCalls() as counted:
        table_bytes = sum(x.nbytes for x in metadata())
    assert counted.n_calls <= most_calls
    assert peak_bytes(metadata) <= 1.01 * table_bytes


class CountedCalls(TorchDispatchMode):
    """How many operators were called."""

    n_calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n_calls += 1
        return op(*args, **(kwargs or {}))


def test_text_past_the_queries() -> None:
    """Text is the first keys; queries are text as far as they go, and only from block 0 on."""
    dense = reference.block_causal_mask([3, 4, 5], query_blocks=range(0, 1))
    step = causal([3, 4, 5], query_blocks=range(0, 1))
    check(
        IntervalMask.pad_text(step, 5, [4, 1]),
        reference.pad_text_mask(dense, 5, [4, 1], text_queries=True),
    )
    nothing = IntervalMask.pad_text(causal([3, 4, 5], query_blocks=range(0, 0)), 3, [1])
    check(nothing, torch.zeros(1, 0, 12, dtype=torch.bool))


def test_text_of_self_attention_does_not_depend_on_how_lengths_are_given() -> None:
    lengths, rank = as_tensor([9]), torch.arange(9)
    for mask, same in (
        (IntervalMask.full([9], [9]), IntervalMask.full(lengths, lengths.clone())),
        (IntervalMask.from_ranks(rank), IntervalMask.from_ranks(rank, rank)),
    ):
        a, b = (IntervalMask.pad_text(m, 9, [3, 4]).to_dense() for m in (mask, same))
        assert torch.equal(a, b)


def test_pack_takes_any_iterable() -> None:
    packed = IntervalMask.pack(causal([n]) for n in (2, 3))
    assert torch.equal(packed.to_dense(), IntervalMask.full([2, 3], [2, 3]).to_dense())


def test_default_device_does_not_matter() -> None:
    intervals._build_on_host.cache_clear()
    with torch.device("meta"):
        assert causal([6, 7]).intervals(13, 13).q_end.device.type == "cpu"


def test_to_the_same_device_is_the_same_mask() -> None:
    assert (mask := causal([3, 4])).to("cpu") is mask
