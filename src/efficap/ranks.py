"""What the processes that torchrun or srun started do together. A process by itself does it alone."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from efficap.errors import InputError
from efficap.launch import LostProcessError, launch

T = TypeVar("T")

_STEP = datetime.timedelta(minutes=30)  # one that takes longer hangs
_PREPARATION = datetime.timedelta(days=7)
_store: Any = None  # where they leave each other notes; torch's types know no stores
_is_apart = False


def join(*, gpu: bool) -> None:
    """Meet the other processes, where there are some; each takes the GPU of its number.

    What lies on the CPU is exchanged by gloo, what lies on a GPU by nccl.
    """
    global _store
    own = launch()
    if own.by is None or dist.is_initialized():
        return
    if own.by == "srun":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # An instance would ask for --ntasks-per-node, which a job may as well do without.
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
        os.environ.setdefault("MASTER_PORT", str(15_000 + int(os.environ["SLURM_JOB_ID"][-4:])))
        os.environ |= {"RANK": str(own.rank), "WORLD_SIZE": str(own.world)}  # as torchrun has them
        os.environ |= {"LOCAL_RANK": str(own.local_rank), "GROUP_RANK": str(own.rank // own.local_world)}
    if gpu:
        take_gpu()
    _store, rank, world = next(rendezvous("env://", timeout=_STEP))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=_STEP)


def take_gpu() -> None:
    """Have the GPU of this process's number for one's own.

    Raises:
        InputError: there are more processes than GPUs.
    """
    own, gpus = launch(), torch.cuda.device_count()
    if own.local_world > gpus:
        raise InputError(
            f"{own.by} started {own.local_world} processes on this machine, and each sees {gpus} GPUs; start one "
            "for each GPU, and let all see all of them (no --gpus-per-task=1)"
        )
    torch.cuda.set_device(own.local_rank)


def work_apart() -> None:
    """From here on each process works by itself, and tells what it meets."""
    global _is_apart
    _is_apart = True


def leave() -> None:
    """Part from the others; all that came to the same end do."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes, prints and scores."""
    return rank() == 0


@contextlib.contextmanager
def first_alone(work: str) -> Iterator[None]:
    """Within it the first process is alone; the others come when it is done, and find what it left on the disk.

    Args:
        work: its name; where it has been done under that before, nobody waits.
    """
    if _store is not None and not is_first():
        _store.wait([work], _PREPARATION)
    try:
        yield
    finally:
        if _store is not None and is_first():
            _store.set(work, "")


def from_first(function: Callable[[], T], work: str | None = None) -> T:
    """What `function` returns or raises in the first process, which alone calls it, in all of them.

    Args:
        work: its name, for `first_alone`, where it may take longer than a step.
    """
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]  # what it returned, what it raised
    with first_alone(work) if work else contextlib.nullcontext():
        if is_first():
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise answer[1]
    returned: T = answer[0]
    return returned


def agreed(value: T) -> T:
    """The first process's value, in all of them."""
    return from_first(lambda: value)


def gathered(own: T) -> list[T]:
    """What each process has, in the order of their ranks; in all of them."""
    if world_size() == 1:
        return [own]
    parts: list[T] = [own] * world_size()
    dist.all_gather_object(parts, own)
    return parts


def to_first(own: T) -> list[T]:
    """What each process has, in the order of their ranks; but in the others than the first their own alone."""
    if world_size() == 1:
        return [own]
    parts = [own] * world_size() if is_first() else None
    dist.gather_object(own, parts)
    return parts or [own]


def largest(*own: int) -> list[int]:
    """Of each number the largest that a process has."""
    if world_size() == 1:
        return list(own)
    numbers = torch.tensor(own)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def summed(own: Tensor) -> Tensor:
    """The sum of a tensor over all processes, where it lies."""
    if world_size() == 1:
        return own
    total = own.clone()
    dist.all_reduce(total)
    return total


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Let what gloo and nccl say of another process that is gone be a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and re.search(r"by peer|Broken pipe|remote process exited", str(error)):
            raise LostProcessError(
                f"another of {world_size()} processes is gone; {launch().by} says which, and why"
            ) from error
        raise


def is_first_to_say(text: str) -> bool:
    """Whether no other process has said this: of a mistake that all meet, one tells."""
    if _store is None:
        return _is_apart or launch().rank == 0
    try:
        return _store.add(hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except RuntimeError:  # the process that kept it is gone
        return True
