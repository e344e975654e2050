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

    def note(self, text: str) -> None:
        pass


SILENT = Silent()


class Bars:
    """A bar on stderr for each loop that runs, with the time left; use as a context manager.

    Nothing is shown where stderr is not a terminal: a file or a pipe.
    """

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
            TextColumn("{task.fields[note]}"),
        )
        console = Console(stderr=True)
        self._rich = Rich(*columns, console=console, disable=not console.is_terminal)
        self._depth = 0

    def __enter__(self) -> Bars:
        self._rich.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._rich.stop()

    def track(self, steps: Iterable[T], description: str) -> Iterator[T]:
        total = len(steps) if isinstance(steps, Sized) else None
        task = self._rich.add_task(description, total=total, note="")
        self._depth += 1
        try:
            for step in steps:
                yield step
                self._rich.advance(task)
        finally:
            self._depth -= 1
            if not self._depth:
                self._rich.refresh()
            else:
                self._rich.remove_task(task)  # a loop inside another begins anew each time

    def note(self, text: str) -> None:
        """Shows a few words beside the innermost bar."""
        self._rich.update(self._rich.task_ids[-1], note=text)
