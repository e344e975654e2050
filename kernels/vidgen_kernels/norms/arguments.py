"""What the public functions on rows of tokens do with their arguments, before an operator runs.

Each check raises ValueError with the expected and the actual value. `modulation_vectors` brings
gate, scale and shift, which may be given in several shapes, to the one that operators take.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..common.front_door import check_number, check_tensor, contiguous_rows, is_int_or_symbol

NORMS = ("layer", "rms")


class Modulation(NamedTuple):
    """Gate, scale and shift of the text tokens: each [D], [B, D], [B, 1, D], or
    [B, text_length, D] for a vector per token; any floating dtype, any strides. None leaves one
    out."""

    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


def check_rows(x: Tensor, max_cols: int, *, batch_is_optional: bool = False) -> None:
    check_tensor("x", x)
    if x.ndim not in ((2, 3) if batch_is_optional else (3,)) or not 1 <= x.shape[-1] <= max_cols:
        shape = "[B, T, D] or [T, D]" if batch_is_optional else "[B, T, D]"
        expected = f"{shape} with D of 1 to {max_cols}"
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """``tensor`` has the shape and device of ``x``."""
    check_tensor(name, tensor, ("x", x))
    if tensor.shape != x.shape:
        raise ValueError(
            f"{name}: expected shape {list(x.shape)} as x has, got {list(tensor.shape)}"
        )


def check_affine(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
    """``weight`` and ``bias`` are None or [D]."""
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(name, vector, ("x", x))
            if vector.shape != x.shape[-1:]:
                expected = f"[{x.shape[-1]}]"
                raise ValueError(f"{name}: expected shape {expected}, got {list(vector.shape)}")


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")


def check_eps(eps: float, name: str = "eps") -> None:
    check_number(name, eps)
    if eps <= 0:
        raise ValueError(f"{name}: expected a finite number above 0, got {eps}")


def check_text(text: Modulation | None, text_length: int, n_tokens: int) -> None:
    if not is_int_or_symbol(text_length) or not 0 <= text_length <= n_tokens:
        raise ValueError(f"text_length: expected 0 to {n_tokens} tokens, got {text_length}")
    if text is None and text_length != 0:
        raise ValueError(f"text: expected a Modulation for {text_length} text tokens, got None")


def modulation_vectors(
    own: Modulation, text: Modulation | None, text_length: int, x: Tensor
) -> list[list[Tensor]]:
    """The vectors of gate, of scale and of shift, each as [], [own] or [own, text's].

    All have shape [B or 1, 1, D]; if one of them has a vector per token, all are [B, tokens, D].
    """
    n_tokens = x.shape[1]
    kinds: list[list[Tensor]] = []
    is_per_token = False
    for name, vector, of_text in zip(Modulation._fields, own, text or own, strict=True):
        if (vector is None) != (of_text is None):
            expected = "None" if vector is None else "a tensor"
            raise ValueError(f"text.{name}: expected {expected} as {name} is, got the other")
        vectors: list[Tensor] = []
        if vector is not None:
            vectors.append(as_vectors(name, vector, x, n_tokens - text_length))
            if text is not None and of_text is not None:
                vectors.append(as_vectors(f"text.{name}", of_text, x, text_length))
            is_per_token = is_per_token or has_vector_per_token(vectors)
        kinds.append(vectors)
    if is_per_token:
        sizes = n_tokens - text_length, text_length
        kinds = [
            [expand_vectors(v, x.shape[0], n) for v, n in zip(vectors, sizes, strict=False)]
            for vectors in kinds
        ]
    return kinds


def as_vectors(name: str, v: Tensor, x: Tensor, n_tokens: int) -> Tensor:
    """``v`` as [B or 1, n_tokens or 1, D], its last dim contiguous."""
    check_tensor(name, v, ("x", x))
    n_batch, _, n_cols = x.shape
    given_shape = v.shape
    v = v[None, None] if v.ndim == 1 else v[:, None] if v.ndim == 2 else v
    if (
        v.ndim != 3
        or v.shape[0] not in (1, n_batch)
        or v.shape[1] not in (1, n_tokens)
        or v.shape[2] != n_cols
    ):
        expected = f"[{n_cols}], [{n_batch}, {n_cols}] or [{n_batch}, 1 or {n_tokens}, {n_cols}]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(given_shape)}")
    return contiguous_rows(v)


def expand_vectors(v: Tensor, n_batch: int, n_tokens: int) -> Tensor:
    """``v`` as a view [n_batch, n_tokens, D], without a call of PyTorch if it is that already."""
    if v.shape[0] == n_batch and v.shape[1] == n_tokens:
        return v
    return v.expand(n_batch, n_tokens, -1)


def has_vector_per_token(vectors: Sequence[Tensor]) -> bool:
    return any(v.shape[1] != 1 for v in vectors)
