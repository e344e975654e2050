"""Runs jobs in processes of their own: when one dies, it is reported and the others go on.

A compiler or a GPU may kill a process. `concurrent.futures` then drops all jobs that are left, and
it cannot stop a job that runs too long. `bench/gpu/` compiles with these workers.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from bench.measure.failures import ContextLost, first_line

CONTEXT = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
LONGEST_WAIT = 24 * 3600.0  # seconds; a wait cannot be infinite

Job = tuple[Any, ...]  # arguments


class _Worker:
    def __init__(self, function: Callable[..., str]) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_work, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()  # so that reading fails when the process ends

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(pipe: connection.Connection, function: Callable[..., str]) -> None:
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the parent process is gone
            return
        try:
            pipe.send((function(*job), True))
        except ContextLost as problem:
            pipe.send((str(problem), False))
            return
        except Exception as problem:
            pipe.send((f"{type(problem).__name__}: {first_line(problem)}", True))


def in_parallel(
    function: Callable[..., str], jobs: Sequence[Job], n_workers: int, seconds: float = math.inf
) -> Iterator[tuple[Job, str]]:
    """Yields ``(job, function(*job))`` as jobs end; stops those still running after ``seconds``.

    ``function`` is defined in a module and returns a line of text. Where it raises or its process
    dies, the line says so.
    """
    stop = time.monotonic() + seconds
    waiting = deque(jobs)
    idle = [_Worker(function) for _ in range(min(n_workers, len(jobs)))]
    busy: dict[Any, tuple[_Worker, Job]] = {}  # by our end of the pipe
    try:
        while waiting or busy:
            while idle and waiting:
                worker, job = idle.pop(), waiting.popleft()
                busy[worker.connection] = worker, job
                worker.connection.send(job)
            left = min(stop - time.monotonic(), LONGEST_WAIT)
            ready = connection.wait(list(busy), timeout=max(0.0, left))
            if not ready:
                return
            for pipe in ready:
                worker, job = busy.pop(pipe)
                try:
                    said, goes_on = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    said, goes_on = f"the process died: {worker.process.exitcode}", False
                if not goes_on:
                    worker.stop()
                    worker = _Worker(function) if waiting else None
                if worker:
                    idle.append(worker)
                yield job, said
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.stop()
