"""Reading that is given up after a time: a dead network mount never answers, and no signal ends a read from it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_Job = tuple[Callable[..., Any], tuple[Any, ...]]
_Outcome = tuple[Any, BaseException | None]

_idle = threading.local()  # a thread of its own for each that reads


class TooSlowError(TimeoutError):
    """What was asked for did not come in time."""


def within(seconds: float | None, function: Callable[..., Result], *arguments: Any) -> Result:
    """What `function` returns or raises, if it does so within `seconds`; None: however long it takes.

    It is called in another thread, which is left to itself where it is too late, and does not keep the process alive.

    Raises:
        TooSlowError: it was too late.
    """
    if seconds is None:
        return function(*arguments)
    reader: _Reader | None = getattr(_idle, "reader", None)
    if reader is None or not reader.thread.is_alive():  # as in a process that was forked
        reader = _idle.reader = _Reader()
    reader.jobs.put((function, arguments))
    try:
        result, error = reader.results.get(timeout=seconds)
    except queue.Empty:
        _idle.reader = None
        raise TooSlowError(f"not read within {seconds:g} s") from None
    except BaseException:  # an interruption: what comes yet is no answer to the next question
        _idle.reader = None
        raise
    if error is not None:
        raise error
    return result


class _Reader:
    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: no more of them
        self.results: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        # It holds the queues, and not this object, which goes with the thread that reads: then its own ends, too.
        self.thread = threading.Thread(
            target=_work, args=(self.jobs, self.results), name="efficap-reader", daemon=True
        )
        self.thread.start()

    def __del__(self) -> None:
        self.jobs.put(None)


def _work(jobs: queue.SimpleQueue[_Job | None], results: queue.SimpleQueue[_Outcome]) -> None:
    while (job := jobs.get()) is not None:
        function, arguments = job
        try:
            results.put((function(*arguments), None))
        except BaseException as error:
            results.put((None, error))
