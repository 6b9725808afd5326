"""What a training lets others see while it is at work: files of its run directory, and a lock that ends with it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

METRICS_FILE = "metrics.json"
SAMPLES_FILE = "samples/last.parquet"  # of the last validation
LOCK_FILE = "training.lock"


@contextlib.contextmanager
def begun(run_dir: Path) -> Iterator[None]:
    """Let others see, for so long, that a training writes into a run directory; several processes may."""
    with (run_dir / LOCK_FILE).open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def at_work(run_dir: Path) -> bool:
    """Whether a process trains in a run directory, on this machine or where a shared disk has locks."""
    try:
        file = (run_dir / LOCK_FILE).open("r+")
    except OSError:  # there is none yet, or another user's
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
