"""A real training watched from another process, from before its first step to its end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import tiny_overrides, write_colour_table
from rich.console import Console
from started import Started

from efficap.training.progress import at_work
from efficap.training.watch import FINISHED, STOPPED, TRAINING, read_run, watch

pytestmark = pytest.mark.slow


def start(folder: Path, run: Path, *more: str) -> Started:
    process = Started("train.py", *tiny_overrides(folder, run), f"hydra.run.dir={run}", *more)
    deadline = time.monotonic() + 200
    while not (at_work(run) and (run / "config.yaml").is_file()) and time.monotonic() < deadline:
        assert process.is_alive(), process.errors
        time.sleep(0.05)
    return process


def test_watching_ends_when_the_training_has(tmp_path: Path) -> None:
    folder = write_colour_table(tmp_path / "colours")
    process = start(folder, tmp_path / "run")
    assert read_run(tmp_path / "run").state == TRAINING
    with open(os.devnull, "w") as nowhere:
        last = watch(tmp_path / "run", Console(file=nowhere), every=0.1, samples=2)
    assert last.state == FINISHED
    assert process.wait(60) == 0
    progress = pd.read_csv(tmp_path / "run/metrics.csv")["train/progress"].dropna()
    assert progress.is_monotonic_increasing
    assert (progress.iloc[-1], last.seconds_left) == (1.0, 0.0)
    assert {record.image_id for record in last.samples} == {f"val_{number}.jpg" for number in range(4)}


def test_watching_ends_when_the_training_is_killed(tmp_path: Path) -> None:
    folder = write_colour_table(tmp_path / "colours")
    process = start(folder, tmp_path / "run", "trainer.max_epochs=-1", "trainer.max_steps=-1")
    process.send(signal.SIGKILL)
    with open(os.devnull, "w") as nowhere:
        last = watch(tmp_path / "run", Console(file=nowhere), every=0.1, samples=2)
    assert process.wait(30) == -signal.SIGKILL
    assert last.state == STOPPED
