"""What may go wrong on a GPU, told without importing anything that takes long to import."""

LOST = "lost the GPU's context"  # begins the reason of the provider that did it


class ContextLost(Exception):
    """After an illegal address and the like nothing runs on the GPU in this process any more."""


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
