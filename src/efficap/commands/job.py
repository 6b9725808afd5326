"""What became of each training of a sweep: job.json in its run directory, which `compare --status` reads."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from efficap.commands.sweep import is_sweep_job
from efficap.errors import InputError
from efficap.evaluation.compare.jobs import JOB_FILE, is_running
from efficap.files import replacing
from efficap.training.progress import at_work
from efficap.training.resume_point import Stopped

_IN_WRITING = 60  # seconds, after which a record that is still empty is that of a process that is gone


@contextlib.contextmanager
def recorded(run_dir: Path) -> Iterator[bool]:
    """Keep the state of a sweep's job: ``running``, ``done``, ``failed`` or ``interrupted``. What is done stays so.

    Gives whether it is done already. A training that is killed stays ``running``, of a process that is gone.

    Raises:
        InputError: the directory is not this job's alone.
    """
    if not is_sweep_job():
        yield False
        return
    hydra = HydraConfig.get()
    own = Path(hydra.runtime.output_dir)
    job: dict[str, Any] = {
        "state": "running",
        "overrides": list(hydra.overrides.task),
        "error": None,
        "started": _now(),
        "ended": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    if _is_done(own, job):
        yield True
        return
    try:
        if run_dir.resolve() != own.resolve():
            raise InputError(
                f"output_dir={run_dir} would be that of several jobs; leave it out of a sweep, whose folder "
                "hydra.sweep.dir=DIR names"
            )
        yield False
    except (Stopped, KeyboardInterrupt, SystemExit):
        _write(own, {**job, "state": "interrupted", "ended": _now()})
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        _write(own, {**job, "state": "failed", "error": reason, "ended": _now()})
        raise
    _write(own, {**job, "state": "done", "ended": _now()})


def _is_done(folder: Path, job: dict[str, Any]) -> bool:
    """Whether the job was done before; where it was not, its folder is this process's from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JOB_FILE
    try:
        with file.open("x") as new:  # of two jobs that begin together, one
            new.write(_text(job))
        return False
    except FileExistsError:
        text = file.read_text()
    if not text:
        if time.time() - file.stat().st_mtime <= _IN_WRITING:
            raise InputError(
                f"{file} is empty: another process begins this job, or was ended as it did; give the same command "
                "again in a minute"
            )
        _write(folder, job)
        return False
    try:
        earlier = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file} is damaged; remove it") from error
    # in any order, as the folder's name has them
    if sorted(earlier["overrides"]) != sorted(job["overrides"]):
        raise InputError(
            f"{folder} is another job's already; hydra.sweep.dir=DIR gives this sweep a folder of its own, and "
            "hydra.sweep.subdir, left as it is, each job"
        )
    if earlier["pid"] != os.getpid() and is_running(earlier) and (_is_here(earlier) or at_work(folder)):
        raise InputError(
            f"{folder}: process {earlier['pid']} of {earlier['host']} is training in it; wait for its end, or end it"
        )
    if earlier["state"] == "done":
        return True
    _write(folder, job)
    return False


def _is_here(job: dict[str, Any]) -> bool:
    """Whether a job's process is, or was, one of this machine's. Of another's that is gone only the lock tells."""
    return bool(job["host"] == socket.gethostname())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _text(job: dict[str, Any]) -> str:
    return json.dumps(job, indent=2) + "\n"


def _write(folder: Path, job: dict[str, Any]) -> None:
    with replacing(folder / JOB_FILE) as file:
        file.write(_text(job).encode())
