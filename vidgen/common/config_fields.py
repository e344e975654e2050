"""Checks the types of a config's fields before a model is built: a config.json may say anything."""

import math
from collections.abc import Collection
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_fields(config: Any, signed: Collection[str] = ()) -> None:
    """Raises ValueError unless each field of a dataclass has its declared type.

    Numbers have to be finite, and integers not negative, except in the fields ``signed``.
    """
    for name, hint in get_type_hints(type(config)).items():
        x = getattr(config, name)
        if not _fits(x, hint, name in signed):
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ValueError(f"{name}: expected {expected}, got {x!r}")


def _fits(x: Any, hint: Any, is_signed: bool) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(x, arg, is_signed) for arg in args)
    if origin is tuple:
        if not isinstance(x, tuple):
            return False
        wanted = args[:1] * len(x) if args[1:] == (...,) else args
        pairs = zip(x, wanted, strict=False)
        return len(x) == len(wanted) and all(_fits(y, arg, is_signed) for y, arg in pairs)
    if hint in (int, float):
        is_number = isinstance(x, (int, hint)) and not isinstance(x, bool)
        return is_number and math.isfinite(x) and (hint is float or is_signed or x >= 0)
    return isinstance(x, hint)
