"""The faults: each is thrown at a process, and tells whether what it came to is what is promised."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from efficap.data.shards.tar import read_contents
from soak.training import Life, whole


class NotSurvivedError(RuntimeError):
    """A fault came to something else than is promised."""


def _check(life: Life, is_so: bool, wanted: str) -> None:
    if not is_so or "Traceback" in life.errors:
        status = life.process.status
        raise NotSurvivedError(f"{wanted} was wanted; status {status}, and it said:\n{life.errors}")


# What ends a process. Each returns False where the training was at its end before it could.


def _signal(number: signal.Signals, status: int) -> Callable[[Life, Random], bool]:
    def throw(life: Life, random: Random) -> bool:
        life.process.send(number)
        ended = life.end()
        if ended == 0 or life.training.is_finished():
            return False
        _check(life, ended == status, f"exit status {status}")
        if status > 0:
            _check(
                life, f"stopped by {number.name}; python train.py resume=" in life.errors, "the way to go on"
            )
        return True

    return throw


def _kill_loader(life: Life, random: Random) -> bool:
    for process in life.children("pt_data_worker"):
        os.kill(process, signal.SIGKILL)
    if life.end() == 0:
        return False
    told = "that loads pictures" in life.errors and ("resume=" in life.errors or "start anew" in life.errors)
    _check(life, life.process.status == 1 and told, "its name and how to go on")
    return True


def _corrupt(life: Life, random: Random) -> bool:
    data = life.training.data
    if life.training.kind == "csv":
        file = random.choice(sorted(data.images.glob("train_*.jpg")))
        offset, name = 0, file.name
    else:
        file = random.choice(sorted((data.shards / "train").glob("*.tar")))
        sample = random.choice(read_contents(file).samples)
        assert sample.image is not None
        offset, name = sample.image.offset, sample.key
    with _damaged(file, offset):
        if life.end() == 0:
            return False
    _check(
        life,
        life.process.status == 1 and "error: " in life.errors and name in life.errors,
        f"{name}, named",
    )
    return True


@contextmanager
def _damaged(file: Path, offset: int) -> Iterator[None]:
    """A file whose bytes from `offset` on are zeros for a while; then it is mended, its time included."""
    content, times = file.read_bytes(), file.stat()
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(bytes(400))
    try:
        yield
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


# What a process lives through.


def _kill_wandb(life: Life, random: Random) -> bool:
    processes = life.children("wandb-core")
    for process in processes:
        os.kill(process, signal.SIGKILL)
    return bool(processes) and life.wait_for(lambda: "W&B has failed and is told no more" in life.errors)


def _fill_disk(life: Life, random: Random) -> bool:
    """No file may grow above 256 KiB: there is no room for checkpoints and weights, as on a full disk, but for others.

    Less would stop what is no file on a disk: semaphores and the batches that loader processes share.
    """
    said, pid = life.errors.count("training goes on"), life.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    noticed = life.wait_for(lambda: life.errors.count("training goes on") > said)
    time.sleep(random.uniform(0, 1))
    if life.is_alive():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    return noticed


def truncate(checkpoint: Path, random: Random) -> None:
    """Cut a checkpoint somewhere."""
    os.truncate(checkpoint, random.randrange(checkpoint.stat().st_size))


def can_be_truncated(life: Life) -> bool:
    """Whether there is another checkpoint to go on from."""
    return whole(life.training.last) and whole(life.training.previous)


TRUNCATED = "truncated checkpoint"  # between two processes; the next one tells whether it was survived
ENDING = {
    "SIGKILL": _signal(signal.SIGKILL, -9),
    "SIGTERM": _signal(signal.SIGTERM, 143),
    "Ctrl-C": _signal(signal.SIGINT, 130),
    "corrupted sample": _corrupt,
    "loader process killed": _kill_loader,
}
PASSING = {"W&B gone": _kill_wandb, "full disk": _fill_disk}
