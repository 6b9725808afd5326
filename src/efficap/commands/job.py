"""What became of each training of a sweep: job.json in its run directory, which `compare --status` reads."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from efficap.training.checkpoints import Stopped

JOB_FILE = "job.json"


def is_sweep_job() -> bool:
    """Whether this training is one of ``train.py -m``."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextlib.contextmanager
def recorded(run_dir: Path) -> Iterator[None]:
    """Keep the state of a sweep's job: ``running``, ``done`` or ``failed``. What is done stays so.

    A training that is stopped or killed stays ``running``, of a process that is gone.
    """
    if not is_sweep_job() or _is_done(run_dir):
        yield
        return
    job: dict[str, Any] = {
        "state": "running",
        "overrides": list(HydraConfig.get().overrides.task),
        "error": None,
        "started": _now(),
        "ended": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    _write(run_dir, job)
    try:
        yield
    except (Stopped, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        _write(run_dir, {**job, "state": "failed", "error": reason, "ended": _now()})
        raise
    _write(run_dir, {**job, "state": "done", "ended": _now()})


def _is_done(run_dir: Path) -> bool:
    file = run_dir / JOB_FILE
    return file.is_file() and json.loads(file.read_text())["state"] == "done"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write(run_dir: Path, job: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"{JOB_FILE}.tmp"
    temporary.write_text(json.dumps(job, indent=2) + "\n")
    os.replace(temporary, run_dir / JOB_FILE)
