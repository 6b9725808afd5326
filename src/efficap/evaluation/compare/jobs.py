"""The jobs of a sweep and how far each has come, from what lies in their run directories."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficap.errors import InputError
from efficap.evaluation.compare.runs import CONFIG_FILE
from efficap.yaml_files import read_yaml

if TYPE_CHECKING:
    from rich.table import Table

JOB_FILE = "job.json"
WEIGHTS_FILE = "model.safetensors"
MULTIRUN_FILE = "multirun.yaml"  # Hydra's own record of a sweep
_CLOCKS_DIFFER = 600  # seconds, at most: a clock may have been set since
STATES = ("running", "done", "failed", "interrupted")
_STYLES = {"done": "green", "failed": "red", "interrupted": "yellow"}


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        folder: its run directory; None where it has none yet.
        state: ``done``, ``failed``, ``running``, ``interrupted`` (by a signal; or it says running, but its process is
            gone), ``not started``, or ``unknown`` (weights without a record).
        overrides: what the sweep sets for it.
        error: of a failed one.
        started, ended: in the time of this machine's zone, to the second; empty where unknown.
    """

    folder: Path | None
    state: str
    overrides: tuple[str, ...] = ()
    error: str = ""
    started: str = ""
    ended: str = ""


def read_jobs(sweep: Path) -> list[Job]:
    """All jobs of a sweep folder, in their order; at the end those that Hydra's record has and no folder yet.

    Raises:
        InputError: no such folder, no job in it, or a damaged record.
    """
    if not sweep.is_dir():
        raise InputError(f"{sweep} is no folder; give a sweep's, such as outputs/sweeps/model-small+medium")
    folders = sorted(
        (folder for folder in sweep.iterdir() if folder.is_dir() and _is_job(folder)), key=_natural
    )
    jobs = [_job(folder) for folder in folders]
    begun = {frozenset(job.overrides) for job in jobs}
    jobs += [
        Job(None, "not started", o) for o in _planned(sweep / MULTIRUN_FILE) if frozenset(o) not in begun
    ]
    if not jobs:
        raise InputError(f"{sweep} holds no job; give the folder of a sweep, such as outputs/sweeps/*")
    return jobs


def _is_job(folder: Path) -> bool:
    names = (JOB_FILE, CONFIG_FILE, WEIGHTS_FILE, ".hydra")
    return any((folder / name).exists() for name in names)


def _natural(folder: Path) -> tuple[int, str]:
    number = re.match(r"\d+", folder.name)
    return (int(number[0]) if number else 0, folder.name)


def _job(folder: Path) -> Job:
    file = folder / JOB_FILE
    if not file.is_file() or not file.stat().st_size:  # empty: its process was gone before it could write
        state = "unknown" if (folder / WEIGHTS_FILE).is_file() else "not started"
        return Job(folder, state, _hydras_overrides(folder))
    try:
        record = json.loads(file.read_bytes())
        state = record["state"]
        if state not in STATES:
            raise ValueError(f"state {state!r} is none of {', '.join(STATES)}")
        if state == "running" and not is_running(record):
            state = "interrupted"
        return Job(
            folder,
            state,
            tuple(map(str, record.get("overrides") or ())),
            str(record.get("error") or ""),
            _local(record.get("started")),
            _local(record.get("ended")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({type(error).__name__}: {error}); remove it and run the job again"
        ) from (error)


def _local(iso: str | None) -> str:
    """An ISO time, which names its zone, as a clock here shows it."""
    return f"{datetime.fromisoformat(iso).astimezone():%Y-%m-%d %H:%M:%S}" if iso else ""


def is_running(record: dict[str, Any]) -> bool:
    """Whether the process of a job's record is still at it; of another machine's, what the record says."""
    if record["state"] != "running" or record["host"] != socket.gethostname():
        return bool(record["state"] == "running")
    pid = int(record["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    # A later process has the number of one that is gone, after a restart of the machine above all.
    begun = _begun(pid)
    return begun is None or begun <= datetime.fromisoformat(record["started"]).timestamp() + _CLOCKS_DIFFER


def _begun(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None on a system without /proc."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    except (OSError, ValueError, IndexError):
        return None
    return int(boot[1]) + ticks / os.sysconf("SC_CLK_TCK") if boot else None


def _hydras_overrides(folder: Path) -> tuple[str, ...]:
    file = folder / ".hydra" / "overrides.yaml"
    found = read_yaml(file) if file.is_file() else None
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _planned(file: Path) -> list[tuple[str, ...]]:
    """The overrides of each job that Hydra's sweeper made of its settings and the command line: in multirun.yaml."""
    if not file.is_file():
        return []
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        hydra = read_yaml(file)["hydra"]
        swept = [f"{key}={values}" for key, values in (hydra["sweeper"].get("params") or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*swept, *hydra["overrides"]["task"]])
        [batch] = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    # no record of a grid: what is planned is not known
    except (KeyError, TypeError, ValueError, HydraException):
        return []
    return [tuple(job) for job in batch]


def count_states(jobs: Sequence[Job]) -> str:
    """How many jobs are in each state, such as ``2 done, 1 failed``."""
    states = [job.state for job in jobs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def jobs_table(sweep: Path, jobs: Sequence[Job]) -> Table:
    """The jobs for the screen, with the number of each state above, and of the overrides those that not all have."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{sweep}: {count_states(jobs)}"))
    for name in ("job", "state", "overrides", "started", "ended", "error"):
        table.add_column(name, overflow="fold", no_wrap=name == "state")
    of_all = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        own = " ".join(override for override in job.overrides if override not in of_all)
        texts = (own, job.started, job.ended, job.error)
        name = job.folder.name if job.folder else ""
        table.add_row(Text(name), Text(job.state, style=_STYLES.get(job.state, "")), *map(Text, texts))
    return table
