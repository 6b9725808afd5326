"""Work spread over processes, with a bar on stderr."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from efficap.errors import InputError
from efficap.launch import launch

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """How many cores this process may use: in a container, or under SLURM, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_each() -> int:
    """How many of them are there for each of the processes that were started on this machine."""
    own = launch()
    return cores() if own.by == "srun" else max(1, cores() // own.local_world)  # srun has shared them out


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, way_out: str
) -> Iterator[Result]:
    """The result of each job, in order; one worker is this process itself.

    Raises:
        InputError: a process died; ends with `way_out`.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    context = get_context("forkserver")  # a fork of this process could inherit a lock that a thread holds
    context.set_forkserver_preload([function.__module__])  # torch is imported once, not in every worker
    with ProcessPoolExecutor(max(1, min(workers, len(jobs))), context) as pool:
        try:
            yield from pool.map(function, jobs)
        except BrokenProcessPool as error:
            raise InputError(
                f"a worker process died, most likely for lack of main memory; {way_out}"
            ) from error
        except BaseException:  # an interruption, or a full disk: the pool would do all other jobs first
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fewer_workers(workers: int) -> str:
    """What helps against a lack of memory."""
    return f"fewer than --workers {workers} need less"


def tracked(results: Iterable[Result], description: str, total: int) -> Iterable[Result]:
    """The same results, with a bar where stderr is a terminal; of several processes the first's."""
    console = Console(stderr=True)
    hidden = not console.is_terminal or launch().rank > 0
    return track(results, description, total=total, console=console, transient=True, disable=hidden)
