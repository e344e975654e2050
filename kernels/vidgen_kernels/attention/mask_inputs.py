"""Checks of the arguments that masks are built from: block lengths, windows, ranks, devices.

`intervals.py` calls these before it builds a mask. They raise ValueError with the name of the
argument, and most return the argument in the form that the rest of the code expects. No check waits
for a GPU: if the values are on one, a wrong value fails an assertion there (`require`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.front_door import is_int, is_traced

MAX_TOKENS = 2**31 - 1  # positions are int32

BlockLengths = Sequence[int] | Tensor
Device = torch.device | str | None


def on_host(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read: it is on a CPU and not traced."""
    return x.device.type == "cpu" and not is_traced()


def require(condition: Tensor, message: str) -> None:
    """ValueError if a condition on the host is false; elsewhere an assertion on its device."""
    if not on_host(condition):
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def resolve_device(device: torch.device | str) -> torch.device:
    """Adds the index of the current GPU to ``cuda``: a mask may outlive that choice of GPU."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def count_lengths(name: str, lengths: BlockLengths) -> int:
    """The number of lengths; their values are not checked."""
    if isinstance(lengths, Tensor) and lengths.ndim != 1:
        raise ValueError(f"{name}: expected shape [N], got {list(lengths.shape)}")
    if not hasattr(lengths, "__len__"):
        raise ValueError(f"{name}: expected a sequence of ints or a tensor, got {lengths!r}")
    return len(lengths)


def lengths_list(name: str, lengths: Sequence[int]) -> list[int]:
    """Lengths as ints of 0 or more. NumPy integers are accepted, bools and floats are not."""
    if torch.compiler.is_compiling():  # they may be symbolic
        return [*lengths]
    for n in lengths:
        if not is_int(n):
            raise ValueError(f"{name}: expected integers, got {n!r}")
        if n < 0:
            raise ValueError(f"{name}: expected no negative number, got {n}")
        if n > MAX_TOKENS:
            raise ValueError(f"{name}: expected at most {MAX_TOKENS} tokens, got {n}")
    return [int(n) for n in lengths]


def lengths_tensor(name: str, lengths: BlockLengths, device: torch.device) -> Tensor:
    """Lengths as int64 ``[N]`` on ``device``; values of a tensor are not checked."""
    if not isinstance(lengths, Tensor):
        values = torch.tensor(lengths_list(name, lengths), dtype=torch.int64, device="cpu")
        return values.to(device, non_blocking=True)
    if not _is_integral(lengths.dtype):
        raise ValueError(f"{name}: expected integers, got {lengths.dtype}")
    if lengths.device != device:
        raise ValueError(f"{name}: expected device {device}, got {lengths.device}")
    return lengths.to(torch.int64)


def block_edges(name: str, lengths: BlockLengths, device: torch.device) -> Tensor:
    """First token of every block, then the end of the last block: int32 ``[N + 1]``."""
    lengths = lengths_tensor(name, lengths, device)
    require((lengths >= 0).all(), f"{name}: expected no negative number, got one")
    edges = pad(lengths.cumsum(0), (1, 0))
    require(edges[-1] <= MAX_TOKENS, f"{name}: expected at most {MAX_TOKENS} tokens, got more")
    return edges.to(torch.int32)


def are_same_lengths(q_lengths: BlockLengths, k_lengths: BlockLengths) -> bool:
    """Whether both are equal; GPU tensors, which are not read, only if they are one object."""
    if q_lengths is k_lengths:
        return True
    if any(isinstance(x, Tensor) and not on_host(x) for x in (q_lengths, k_lengths)):
        return False
    return [int(n) for n in q_lengths] == [int(n) for n in k_lengths]


def check_window(window: int | None, sink_blocks: int) -> None:
    if torch.compiler.is_compiling():
        return
    if window is not None and (not is_int(window) or window < 1):
        raise ValueError(f"window: expected None or at least 1 block, got {window!r}")
    if not is_int(sink_blocks) or sink_blocks < 0:
        raise ValueError(f"sink_blocks: expected 0 or more, got {sink_blocks!r}")


def query_block_range(query_blocks: range | None, n_blocks: int) -> tuple[int, int]:
    """First query block and one past the last; None means all blocks."""
    if query_blocks is None:
        return 0, n_blocks
    if not isinstance(query_blocks, range) or query_blocks.step != 1:
        raise ValueError(f"query_blocks: expected a range of step 1, got {query_blocks!r}")
    if not 0 <= query_blocks.start <= query_blocks.stop <= n_blocks:
        raise ValueError(f"query_blocks: expected blocks in 0..{n_blocks}, got {query_blocks}")
    return query_blocks.start, query_blocks.stop


def check_first_noisy(first_noisy: int, n_blocks: int) -> None:
    if not is_int(first_noisy) or not 0 <= first_noisy <= n_blocks:
        raise ValueError(f"first_noisy: expected a block in 0..{n_blocks}, got {first_noisy!r}")


def check_ranks(name: str, rank: Tensor) -> Tensor:
    """``rank`` as int64 ``[B or 1, T]``."""
    if not isinstance(rank, Tensor):
        raise ValueError(f"{name}: expected an integer tensor, got {type(rank).__name__}")
    if not _is_integral(rank.dtype):
        raise ValueError(f"{name}: expected integers, got {rank.dtype}")
    if rank.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [T] or [B, T], got {list(rank.shape)}")
    return torch.atleast_2d(rank).to(torch.int64)


def require_sorted(name: str, rank: Tensor) -> None:
    is_sorted = (rank[:, 1:] >= rank[:, :-1]).all()
    require(is_sorted, f"{name}: expected sorted ranks, got some in another order")


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
