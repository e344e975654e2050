"""A lost GPU context, and messages of errors; kept apart so that it imports fast."""

LOST = "lost the GPU's context"  # the reason of a provider that caused it begins so


class ContextLost(Exception):
    """Nothing runs on the GPU in this process any more, as after an illegal address."""


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
