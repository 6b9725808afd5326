"""The end of a sweep: what became of its jobs, whichever processes and machines they ran in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from efficap.errors import InputError

_begun: list[Path] = []  # folders of this process's sweeps: one, or none


class NoteSweep(Callback):
    """Hydra tells it of a sweep that begins; conf/train.yaml names it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _begun.append(Path(config.hydra.sweep.dir))


def is_sweep_job() -> bool:
    """Whether this is a job of ``-m``."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_recorded_job() -> bool:
    """Whether it also leaves a job.json, as those of train.py do, so that the sweep learns from it how it ended."""
    return is_sweep_job() and "note_sweep" in HydraConfig.get().callbacks


def end_sweep() -> bool:
    """Say what became of the jobs of the sweep that this process led; whether all are done, or there was no sweep."""
    if not _begun:
        return True
    from efficap.evaluation.compare.jobs import count_states, read_jobs

    folder = _begun.pop()
    # No job began, and each has told why; this process need not know, where they had processes of their own.
    if not any(folder.glob("*/job.json")):
        return False
    try:
        jobs = read_jobs(folder)
    except InputError as error:  # a job's record is damaged
        print(f"error: {error}", file=sys.stderr)
        return False
    undone = [job for job in jobs if job.state != "done"]
    print(f"sweep: {count_states(jobs)}: {folder}")
    for job in undone:
        if job.folder and job.error:
            print(f"  {job.folder.name} failed: {job.error}", file=sys.stderr)
    if undone:
        print("The same command again does what is not done, and only that.", file=sys.stderr)
    return not undone
