"""What a training lets others see while it is at work: files of its run directory, and a lock that ends with it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from efficap.errors import InputError

METRICS_FILE = "metrics.json"
SAMPLES_FILE = "samples/last.parquet"  # of the last validation
LOCK_FILE = "training.lock"


def metrics_of(run_dir: Path) -> dict[str, Any]:
    """What a run's metrics.json holds: nothing where there is none yet, or where it is damaged."""
    try:
        found = json.loads((run_dir / METRICS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_finished(run_dir: Path) -> bool:
    """Whether a training came to its end."""
    return bool(metrics_of(run_dir).get("finished"))


@contextlib.contextmanager
def begun(run_dir: Path) -> Iterator[None]:
    """Have a run directory, made where it is not there, for one's own for so long, and let others see it.

    Where nothing is put into it, it goes again.

    Raises:
        InputError: another process has it.
    """
    made = list(itertools.takewhile(lambda folder: not folder.exists(), (run_dir, *run_dir.parents)))
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a") as file:
        os.register_at_fork(after_in_child=file.close)  # processes that load pictures may outlive this one
        if not _lock(file):
            raise InputError(_taken(run_dir))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and {child.name for child in run_dir.iterdir()} == {LOCK_FILE}:
                    (run_dir / LOCK_FILE).unlink()
                    for folder in made:
                        folder.rmdir()


def _lock(file: IO[str]) -> bool:
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # who only looks has it for a moment
        except OSError:  # a file system without locks
            return True
        else:
            return True
    return False


def check_free(run_dir: Path) -> None:
    """Raises InputError where a process trains in a run directory."""
    if at_work(run_dir):
        raise InputError(_taken(run_dir))


def _taken(run_dir: Path) -> str:
    return (
        f"{run_dir}: another process trains in it; wait for its end, or end it. Where none does, as after a crash of "
        f"a machine that shares the disk, remove {LOCK_FILE} there"
    )


def at_work(run_dir: Path) -> bool:
    """Whether a process trains in a run directory, on this machine or where a shared disk has locks."""
    try:
        file = (run_dir / LOCK_FILE).open("r+")
    except OSError:  # there is none yet, or another user's
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
        return False
