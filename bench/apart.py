"""A rival in a process of its own, in which nothing is set of what efficap sets in its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SET_BY_EFFICAP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


class Apart:
    """Calls a function in another process and waits for what it returns.

    Args:
        make: makes the function there, from `arguments`; both have to be picklable, and what the function returns.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, end = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(make, arguments, end), daemon=True)
        settings = {name: os.environ.pop(name) for name in SET_BY_EFFICAP if name in os.environ}
        self.process.start()
        os.environ |= settings

    def __call__(self) -> Any:
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()


def _serve(make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], pipe: Connection) -> None:
    run = make(*arguments)
    while pipe.recv():
        pipe.send(run())
