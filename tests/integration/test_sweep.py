"""A sweep of which jobs fail and are killed: the same command again finishes the rest, and only that."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_overrides, write_colour_table
from hydra.core.override_parser.overrides_parser import OverridesParser
from started import Started
from wandb_files import OfflineRun, finished_run

from efficap.commands import sweep as sweeps
from efficap.commands.entry import _command
from efficap.evaluation.compare.jobs import read_jobs

pytestmark = pytest.mark.slow


class Sweep:
    """A sweep of tiny trainings, each on a folder of the same pictures of its own.

    Args:
        path: of what it needs and leaves.
        without: the numbers of the jobs whose folder is missing, so that they fail.
        settings: of the command line.
    """

    def __init__(self, path: Path, *settings: str, jobs: int, without: tuple[int, ...] = ()) -> None:
        table = write_colour_table(path / "colours")
        self.folder, self.pictures = path / "sweep", [path / f"pictures{number}" for number in range(jobs)]
        self.images = table / "images"
        for number, pictures in enumerate(self.pictures):
            if number not in without:
                pictures.symlink_to(self.images)
        own = ("output_dir", "name", "logger", "data.image_dir")
        shared = [o for o in tiny_overrides(table, path) if not o.startswith(own)]
        swept = f"data.image_dir={','.join(map(str, self.pictures))}"
        self.settings = ["-m", *shared, swept, "name=job", "logger=wandb", *settings]
        self.settings.append(f"hydra.sweep.dir={self.folder}")

    def start(self, *more: str) -> Started:
        # Without W&B's service of this process, which would outlive the one that is killed.
        without = dict.fromkeys(name for name in os.environ if name.startswith("WANDB_SERVICE"))
        own = {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
        return Started("train.py", *self.settings, *more, **without, **own)

    def mend(self) -> None:
        for pictures in self.pictures:
            if not pictures.exists():
                pictures.symlink_to(self.images)

    def record(self, number: int) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"{number}_job" / "job.json").read_text()))

    def states(self) -> list[str]:
        return [job.state for job in read_jobs(self.folder)]

    def wandb(self, number: int) -> list[OfflineRun]:
        """A job's runs in W&B, one for each process that it had, in their order; all but the last may be unfinished."""
        *earlier, last = sorted((self.folder / f"{number}_job" / "wandb").glob("offline-run-*/run-*.wandb"))
        return [*map(OfflineRun, earlier), finished_run(last)]

    def wait_for_checkpoint(self, number: int, process: Started) -> None:
        while not (self.folder / f"{number}_job" / "checkpoints" / "last.ckpt").is_file():
            assert process.is_alive(), process.errors
            time.sleep(0.01)


def test_a_job_of_submitit_that_was_killed_is_finished_by_the_same_command(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "hydra/launcher=processes", "trainer.max_epochs=3", jobs=1)
    first = sweep.start()
    sweep.wait_for_checkpoint(0, first)
    os.kill(sweep.record(0)["pid"], signal.SIGKILL)
    assert first.wait(600) == 1
    assert "sweep: 1 interrupted: " in first.printed
    assert "Traceback" not in first.errors
    assert sweep.states() == ["interrupted"]

    second = sweep.start()
    assert second.wait(600) == 0, second.errors
    assert sweep.states() == ["done"]
    killed, last = sweep.wandb(0)
    assert (killed.exit_codes, last.exit_codes) == ([], [0])
    assert killed.run_id == last.run_id == last.run.run_id
    assert (last.run.display_name, last.run.run_group) == ("0_job", "sweep")
    assert set(last.run.tags) == {"tiny", "csv"}
    assert last.config["data"]["image_dir"] == str(sweep.pictures[0])
    assert last.config["provenance"]["packages"]["torch"]
    logged = set().union(*last.history)
    wanted = {"train/loss", "train/grad_norm", "train/memory_gib", "train/pairs_per_second", "val/CIDEr"}
    assert wanted | {"val/loss", "lr-AdamW/encoder", "val/samples/nrows"} <= logged


def test_jobs_of_joblib_tell_how_they_ended(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "hydra/launcher=parallel", "trainer.max_epochs=1", jobs=2, without=(0,))
    first = sweep.start()
    assert (first.wait(600), sweep.states()) == (1, ["failed", "done"]), first.errors
    assert re.search(r"0_job failed: data.image_dir=\S+pictures0", first.errors)
    assert "Traceback" not in first.errors
    assert first.pid not in {sweep.record(number)["pid"] for number in range(2)}
    done = sweep.record(1)
    sweep.mend()
    second = sweep.start("hydra.launcher.n_jobs=1")  # in a process less
    assert (second.wait(600), sweep.states()) == (0, 2 * ["done"]), second.errors
    assert sweep.record(1) == done, "it was not begun again"
    assert second.printed.count("finished already: ") == 1
    assert len({run.run.run_id for number in range(2) for run in sweep.wandb(number)}) == 2


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "trainer.max_epochs=3", "logger.artifact=true", jobs=3, without=(0,))
    first = sweep.start()
    sweep.wait_for_checkpoint(1, first)
    first.send(signal.SIGKILL)
    first.wait(60)
    assert sweep.states() == ["failed", "interrupted", "not started"]
    second = sweep.start()
    assert (second.wait(600), sweep.states()) == (1, ["failed", "done", "done"]), second.errors
    assert "Traceback" not in second.errors
    assert "sweep: 1 failed, 2 done: " in second.printed
    killed, gone_on = sweep.wandb(1)
    assert killed.run_id == gone_on.run_id
    artifacts = [a.artifact for a in gone_on.records if a.WhichOneof("record_type") == "artifact"]
    [model] = [artifact for artifact in artifacts if artifact.type == "model"]
    files = {entry.path for entry in model.manifest.contents}
    assert {"config.yaml", "model.safetensors", "metrics.json", "tokenizer/tokenizer.json"} <= files


def test_optunas_search_takes_the_same_trials_again(tmp_path: Path) -> None:
    settings = ("sweep=learning_rate", "hydra.sweeper.n_trials=2", "trainer.max_epochs=1", "logger=csv")
    sweep = Sweep(tmp_path, *settings, jobs=1)
    first = sweep.start()
    assert (first.wait(600), sweep.states()) == (0, ["done", "done"]), first.errors
    found = (sweep.folder / "optimization_results.yaml").read_text()
    scores = [
        json.loads((sweep.folder / f"{n}_job" / "metrics.json").read_text())["best"]["val/CIDEr"]
        for n in (0, 1)
    ]
    assert yaml.safe_load(found)["best_value"] == max(scores)
    rates = [
        yaml.safe_load((sweep.folder / f"{n}_job/config.yaml").read_text())["optimizer"]["lr"] for n in (0, 1)
    ]
    assert rates[0] != rates[1]
    second = sweep.start()
    assert second.wait(600) == 0, second.errors
    assert second.printed.count("finished already: ") == 2
    assert (sweep.folder / "optimization_results.yaml").read_text() == found


def test_a_sweep_of_which_no_job_began_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_begun", [tmp_path])  # as where a value of all of them is none
    assert not sweeps.end_sweep()
    assert sweeps.end_sweep(), "there is no other"


def test_a_damaged_record_is_told_at_a_sweeps_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0_job").mkdir()
    (tmp_path / "0_job" / "job.json").write_text('{"state": "do')
    monkeypatch.setattr(sweeps, "_begun", [tmp_path])
    assert not sweeps.end_sweep()
    assert re.fullmatch(r"error: \S+/0_job/job.json is damaged .*\n", capsys.readouterr().err)


def test_a_sweeps_folder_is_named_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return _command()

    one = name("-m", "model=small,medium", "data=csv", "data.table=/a b/captions.csv")
    assert one == "data.table-_a_b_captions.csv_data-csv_model-small+medium"
    assert one == name("data.table=/a b/captions.csv", "data=csv", "model=small,medium", "--multirun")
    assert one == name(
        "-m", "model=small,medium", "data=csv", "data.table=/a b/captions.csv", "hydra.verbose=true"
    )
    long = [f"setting_{place}=1" for place in range(40)]
    assert len(name(*long)) < 100
    assert name(*long) != name(*long[:-1])
    assert name("-m") == "sweep"


def test_hydra_takes_a_sweeps_folder_as_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train.py", "-m", "model=small,medium", "+stages.a={x: [1,2]}", "seed=1,2"]
    )
    override = OverridesParser.create().parse_override(f"run=outputs/sweeps/{_command()}/0_small-csv")
    assert override.value() == f"outputs/sweeps/{_command()}/0_small-csv"
    assert not override.is_sweep_override()
