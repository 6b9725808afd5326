"""Work spread over processes, with a bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from efficap.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, description: str
) -> Iterator[Result]:
    """The result of each job, in order; one worker is this process itself.

    Raises:
        InputError: a process died.
    """
    if workers == 1:
        yield from _tracked(map(function, jobs), description, len(jobs))
        return
    context = get_context("forkserver")  # a fork of this process could inherit a lock that a thread holds
    context.set_forkserver_preload([function.__module__])  # torch is imported once, not in every worker
    with ProcessPoolExecutor(max(1, min(workers, len(jobs))), context) as pool:
        try:
            yield from _tracked(pool.map(function, jobs), description, len(jobs))
        except BrokenProcessPool as error:
            raise InputError(
                f"a worker process died, most likely for lack of memory; fewer than --workers {workers} need less"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _tracked(results: Iterable[Result], description: str, total: int) -> Iterable[Result]:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(results, description, total=total, console=console, transient=True, disable=hidden)
