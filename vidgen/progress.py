"""Progress of long work: samplers report steps, whoever runs them decides how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What a sampler asks for; loops may nest."""

    def track(self, steps: Iterable[T], description: str) -> Iterable[T]: ...


class Silent:
    """Shows nothing."""

    def track(self, steps: Iterable[T], description: str) -> Iterable[T]:
        return steps


SILENT = Silent()


class Bars:
    """A bar on stderr for each loop that runs, with the time left; use as a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Rich

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._rich = Rich(*columns, console=Console(stderr=True))

    def __enter__(self) -> Bars:
        self._rich.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._rich.stop()

    def track(self, steps: Iterable[T], description: str) -> Iterator[T]:
        total = len(steps) if isinstance(steps, Sized) else None
        task = self._rich.add_task(description, total=total)
        outermost = len(self._rich.tasks) == 1
        try:
            for step in steps:
                yield step
                self._rich.advance(task)
        finally:
            if outermost:
                self._rich.refresh()
            else:
                self._rich.remove_task(task)  # a loop inside another begins anew each time
