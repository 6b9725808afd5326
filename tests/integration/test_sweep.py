"""A sweep of which jobs fail and are killed: the same command again finishes the rest, and only that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_overrides, write_colour_table

from efficap.commands.entry import _command

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def jobs(sweep: Path) -> dict[str, Any]:
    return {file.parent.name[0]: json.loads(file.read_text()) for file in sorted(sweep.glob("*/job.json"))}


def test_the_same_command_finishes_what_is_not_done(tmp_path: Path) -> None:
    folder, sweep = write_colour_table(tmp_path / "colours"), tmp_path / "sweep"
    changes = ("output_dir", "hydra.", "name", "logger")
    overrides = [o for o in tiny_overrides(folder, tmp_path) if not o.startswith(changes)]
    # Jobs 0 and 2 are good, 1 and 3 have a number of heads that does not divide the width.
    swept = [
        "seed=0,1",
        "model.bridge.n_heads=4,5",
        "trainer.max_epochs=2",
        "name=job",
        f"hydra.sweep.dir={sweep}",
    ]
    command = [sys.executable, "train.py", "-m", *overrides, *swept, "logger=wandb"]
    # Without W&B's service of this process, which would outlive the one that is killed.
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SERVICE")}
    environment = {**own, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "WANDB_MODE": "offline"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start()
    while first.poll() is None and not (sweep / "2_job" / "checkpoints" / "last.ckpt").is_file():
        time.sleep(0.01)
    first.kill()
    first.communicate()
    states = {number: job["state"] for number, job in jobs(sweep).items()}
    assert states == {"0": "done", "1": "failed", "2": "running"}
    before = jobs(sweep)
    weights = (sweep / "0_job" / "model.safetensors").stat().st_mtime_ns

    second = start()
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 1
    assert "Traceback" not in errors
    after = jobs(sweep)
    assert {number: job["state"] for number, job in after.items()} == {
        "0": "done",
        "1": "failed",
        "2": "done",
        "3": "failed",
    }
    assert after["0"] == before["0"]
    assert (sweep / "0_job" / "model.safetensors").stat().st_mtime_ns == weights
    assert f"finished already: {sweep}/0_job" in printed
    assert "model.bridge.n_heads=5 must divide" in after["3"]["error"]
    assert "seed=1" in after["2"]["overrides"]
    runs = {job: set((sweep / job / "wandb").glob("offline-run-*/run-*.wandb")) for job in ("0_job", "2_job")}
    assert len({file.name for file in runs["0_job"]}) == 1
    assert len({file.name for file in runs["2_job"]}) == 1, "two processes, one run"
    assert {file.name for file in runs["0_job"]}.isdisjoint({file.name for file in runs["2_job"]})


def test_a_sweeps_folder_is_named_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return _command()

    one = name("-m", "model=small,medium", "data=csv", "data.table=/a b/captions.csv")
    assert one == "data.table=_a_b_captions.csv_data=csv_model=small,medium"
    assert one == name("data.table=/a b/captions.csv", "data=csv", "model=small,medium", "--multirun")
    assert one == name(
        "-m", "model=small,medium", "data=csv", "data.table=/a b/captions.csv", "hydra.verbose=true"
    )
    long = [f"setting_{place}=1" for place in range(40)]
    assert len(name(*long)) < 100
    assert name(*long) != name(*long[:-1])
    assert name("-m") == "sweep"
