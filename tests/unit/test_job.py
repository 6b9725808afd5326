"""A sweep's job and its folder: who may train in it, and what is kept of how it ended."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from efficap.commands.entry import CONF
from efficap.commands.faults import of_disk
from efficap.commands.job import recorded
from efficap.commands.train import train
from efficap.errors import InputError
from efficap.evaluation.compare.jobs import read_jobs
from efficap.training.progress import begun
from efficap.training.resume_point import Stopped

Begin = Callable[..., Path]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Makes this process a job of a sweep, in a folder, with what the sweep sets for it; returns the folder."""

    def begin(*overrides: str, folder: str = "0_job") -> Path:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", list(overrides), return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.mode = "MULTIRUN"
            cfg.hydra.runtime.output_dir = str(tmp_path / folder)
            cfg.hydra.overrides.task = list(overrides)
        HydraConfig.instance().set_config(cfg)
        return tmp_path / folder

    before = HydraConfig.instance().cfg
    yield begin
    HydraConfig.instance().cfg = before


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "job.json").read_text()))


def test_what_becomes_of_a_job_is_kept(begin: Begin) -> None:
    folder = begin("seed=1")
    with recorded(folder):
        assert (record(folder)["state"], record(folder)["pid"]) == ("running", os.getpid())
    done = record(folder)
    assert (done["state"], done["overrides"]) == ("done", ["seed=1"])
    with recorded(folder):  # the same command again
        pass
    assert record(folder) == done


def test_a_job_that_is_done_is_not_begun_again_whatever_has_become_of_its_run(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begin("seed=1")
    with recorded(folder):
        pass
    (folder / "config.yaml").write_text("name: of another training\n")
    assert train(compose("train", "name=job", f"output_dir={folder}", "seed=1")) == folder
    assert capsys.readouterr().out == f"finished already: {folder}\n"


@pytest.mark.parametrize(
    ("end", "state", "error"),
    [
        (ValueError("bad\nluck"), "failed", "bad luck"),
        (MemoryError(), "failed", "MemoryError"),
        (Stopped(15), "interrupted", None),
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(1), "interrupted", None),
    ],
)
def test_a_job_that_ended_early_is_tried_again(
    begin: Begin, end: BaseException, state: str, error: str | None
) -> None:
    folder = begin("seed=1")
    with pytest.raises(type(end)), recorded(folder):
        raise end
    assert (record(folder)["state"], record(folder)["error"]) == (state, error)
    with recorded(folder):
        assert record(folder)["state"] == "running"
    assert record(folder)["state"] == "done"


@pytest.mark.parametrize("ended", [True, False])
def test_two_jobs_cannot_have_one_folder(begin: Begin, ended: bool) -> None:
    folder = begin("seed=1")
    if ended:
        with recorded(folder):
            pass
    else:
        with pytest.raises(ValueError, match="bad"), recorded(folder):
            raise ValueError("bad")
    first = record(folder)
    begin("seed=2")
    with (
        pytest.raises(InputError, match=r"0_job is another job's already; hydra.sweep.dir=DIR"),
        recorded(folder),
    ):
        pytest.fail("it began")
    assert record(folder) == first


def test_an_output_dir_for_all_jobs_is_refused(begin: Begin, tmp_path: Path) -> None:
    folder = begin("seed=1", f"output_dir={tmp_path}/run")
    with (
        pytest.raises(InputError, match=r"output_dir=.*/run would be that of several jobs"),
        recorded(tmp_path / "run"),
    ):
        pytest.fail("it began")
    assert record(folder)["state"] == "failed", "the sweep's end tells it"


def test_a_job_that_another_process_runs_is_not_begun_again(begin: Begin) -> None:
    folder = begin("seed=1")
    with recorded(folder):
        running = record(folder)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (folder / "job.json").write_text(json.dumps({**running, "pid": other.pid}))
        with (
            pytest.raises(InputError, match=rf"process {other.pid} of \S+ is training in it"),
            recorded(folder),
        ):
            pytest.fail("it began")
        other.communicate(b"\n")
    (folder / "job.json").write_text(json.dumps({**running, "pid": other.pid}))  # killed
    with recorded(folder):
        assert record(folder)["pid"] == os.getpid()


def test_a_job_whose_process_was_gone_before_it_could_write_is_begun(begin: Begin, tmp_path: Path) -> None:
    folder = begin("seed=1")
    folder.mkdir()
    (folder / "job.json").touch()
    assert [job.state for job in read_jobs(tmp_path)] == ["not started"]
    with pytest.raises(InputError, match="another process begins this job"), recorded(folder):
        pytest.fail("it began, and another was about to write its record")
    long_ago = time.time() - 3600
    os.utime(folder / "job.json", (long_ago, long_ago))
    with recorded(folder):
        assert record(folder)["state"] == "running"
    assert record(folder)["state"] == "done"


def test_of_another_machines_job_the_lock_of_its_training_tells_whether_it_runs(begin: Begin) -> None:
    folder = begin("seed=1")
    with recorded(folder):
        running = record(folder)
    elsewhere = {**running, "host": f"not-{running['host']}", "pid": 1}
    (folder / "job.json").write_text(json.dumps(elsewhere))
    with (
        begun(folder),
        pytest.raises(InputError, match=r"process 1 of not-\S+ is training in it"),
        recorded(folder),
    ):
        pytest.fail("it began")
    with recorded(folder):  # that machine is gone
        assert record(folder)["host"] == running["host"]


def test_a_process_with_the_number_of_one_that_is_gone_is_not_taken_for_it(begin: Begin) -> None:
    folder = begin("seed=1")
    with recorded(folder):
        running = record(folder)
    earlier = {**running, "pid": os.getppid(), "started": "2001-01-01T00:00:00+00:00"}
    (folder / "job.json").write_text(json.dumps(earlier))
    with recorded(folder):
        assert record(folder)["pid"] == os.getpid()


def test_the_same_words_in_another_order_are_the_same_job(begin: Begin) -> None:
    folder = begin("seed=1", "data.batch_size=2")
    with pytest.raises(ValueError, match="bad"), recorded(folder):
        raise ValueError("bad")
    begin("data.batch_size=2", "seed=1")
    with recorded(folder):
        pass
    assert record(folder)["state"] == "done"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/config.yaml"),
            "out/config.yaml cannot be written",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "/root/x cannot be read or written"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), None),
    ],
)
def test_what_a_disk_refuses_is_told_in_a_line(error: OSError, said: str | None) -> None:
    told = of_disk(error)
    assert told is None if said is None else str(told).startswith(said)
