"""Progress of long work: samplers report their loops, commands decide how to show them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What samplers call: ``for step in progress.track(steps, "steps")``. Loops may be nested."""

    def track(self, steps: Iterable[T], description: str) -> Iterable[T]: ...


class Silent:
    """Shows nothing."""

    def track(self, steps: Iterable[T], description: str) -> Iterable[T]:
        return steps

    def note(self, text: str) -> None:
        pass


SILENT = Silent()


class Bars:
    """A bar on stderr for each running loop, with the time left; a context manager.

    Nothing is shown if stderr is not a terminal.
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
                self._rich.remove_task(task)  # the outer loop will start an inner one again

    def note(self, text: str) -> None:
        """Shows a few words beside the innermost bar."""
        self._rich.update(self._rich.task_ids[-1], note=text)
