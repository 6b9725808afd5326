"""Two processes, joined by gloo, train and evaluate as one does; none is left behind.

Torchrun starts them where it has a part in what is shown; elsewhere they are forked, with what it would tell them, as
each process that it starts takes Python more time to import torch than to train.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import compose, going_on, tiny_overrides, write_colour_table
from safetensors.torch import load_file
from started import started_together
from test_resume import assert_equal_runs, die_at, terminate

from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.training.checkpoints import LAST
from efficap.training.progress import begun

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOGETHER = 8  # pictures of a step
ALIKE = [  # what one process and two can do alike: BatchNorm on a CPU takes a process's own pictures
    "model.encoder.frozen=true",
    "data.captions_per_image=1",  # so that the shares of a step have different numbers of tokens
    "trainer.max_epochs=4",  # of 3 steps
    "trainer.check_val_every_n_epoch=2",
    "checkpoint.every_steps=2",
]
# Notes what each rank trains on, and lets one of them send itself a signal in a step.
NOTED = """
import os
from efficap.commands.entry import run

def main(cfg):
    from efficap.commands.train import best_score, train
    from efficap.training.module import CaptionModule
    step = CaptionModule.training_step
    number, rank, at = map(int, os.environ.get("SIGNAL", "0 0 -1").split())

    def noted(self, batch, place):
        with open(f"{os.environ['SEEN']}/{self.global_rank}.txt", "a") as file:
            print(self.global_step, *batch.image_ids, file=file)
        if self.global_rank == rank and self.global_step == at:
            os.kill(os.getpid(), number)
        return step(self, batch, place)

    CaptionModule.training_step = noted
    return best_score(train(cfg))

if __name__ == "__main__":
    run("train", main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("ranks") / "colours", train=24, val=7, test=7)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A training by one process."""
    run = folder.parent / "alone"
    return train(compose("train", *tiny_overrides(folder, run), *ALIKE, f"data.batch_size={TOGETHER}"))


@dataclass(frozen=True)
class Ended:
    """What became of the processes.

    Attributes:
        statuses: of each process, or torchrun's alone.
        printed, errors: what all said on stdout and stderr.
    """

    statuses: list[int]
    printed: str
    errors: str


def together(script: Path, *overrides: str, cwd: Path, **environment: str) -> Ended:
    """Two processes of a script, to the end of both."""
    with started_together(2, str(script), *overrides, cwd=cwd, **environment) as ranks:
        statuses = [rank.wait(300) for rank in ranks]
    printed, errors = ("".join(getattr(rank, name) for rank in ranks) for name in ("printed", "errors"))
    return Ended(statuses, printed, errors)


def torchrun(script: Path, *overrides: str, cwd: Path, **environment: str) -> Ended:
    """The same by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), *overrides],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ended([done.returncode], done.stdout, done.stderr)


def two_train(
    folder: Path,
    run: Path,
    *overrides: str,
    by: Callable[..., Ended] = together,
    strategy: str = "ddp",
    **environment: str,
) -> Ended:
    run.parent.mkdir(exist_ok=True)
    (run.parent / "noted.py").write_text(NOTED)
    arguments = [argument for argument in tiny_overrides(folder, run) if argument != "trainer=cpu"]
    both = [f"trainer={strategy}", "trainer.accelerator=cpu", f"data.batch_size={TOGETHER // 2}"]
    return by(
        *(run.parent / "noted.py", *arguments, *both, *ALIKE, *overrides),
        cwd=run.parent,
        SEEN=str(run.parent),
        **environment,
    )


def seen(folder: Path, rank: int) -> list[list[str]]:
    """The pictures of each step that a rank took, behind the step's number."""
    return [line.split() for line in (folder / f"{rank}.txt").read_text().splitlines()]


def assert_like(run: Path, expected: Path) -> None:
    """The same losses and scores at each step, and the same weights, but for rounding."""
    ours, theirs = (
        pd.read_csv(path / "metrics.csv")
        .groupby("step")
        .first()
        .filter(regex="loss|CIDEr|BLEU|distinct|pairs$")
        for path in (run, expected)
    )
    assert len(theirs) >= 12
    assert list(ours.index) == list(theirs.index)
    for column in theirs:
        np.testing.assert_allclose(ours[column], theirs[column], atol=1e-5, rtol=0, err_msg=str(column))
    weights, wanted = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(weights[name], value, atol=1e-4, rtol=0, err_msg=name)
    metrics, wanted_metrics = (json.loads((path / "metrics.json").read_text()) for path in (run, expected))
    for key in ("finished", "steps", "epochs", "pairs"):
        assert metrics[key] == wanted_metrics[key], key


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_the_same_pictures_a_step(
    folder: Path, alone: Path, tmp_path: Path, strategy: str
) -> None:
    done = two_train(folder, tmp_path / "two" / "run", strategy=strategy)
    assert set(done.statuses) == {0}, done.errors[-3000:]
    assert_like(tmp_path / "two" / "run", alone)
    assert done.printed.count("run directory: ") == 1, "the first alone prints"
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "run",
        "noted.py",
        "0.txt",
        "1.txt",
        "outputs",
    }
    steps = list(zip(seen(tmp_path / "two", 0), seen(tmp_path / "two", 1), strict=True))
    epoch = [image for first, second in steps[:3] for image in (*first[1:], *second[1:])]
    assert Counter(epoch) == Counter(f"train_{n}.jpg" for n in range(24)), "each picture once an epoch"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_stops_both_after_the_same_step_and_one_goes_on(
    folder: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    run = tmp_path / "two" / "run"
    stopped = two_train(folder, run, strategy=strategy, SIGNAL=f"{int(signal.SIGTERM)} 1 7")
    assert stopped.statuses == [143, 143]
    assert (
        stopped.errors.count(
            f"stopped by SIGTERM; torchrun with as many processes: train.py resume={run} goes on"
        )
        == 1
    )
    first, second = (seen(tmp_path / "two", rank) for rank in range(2))
    assert [step[0] for step in first] == [step[0] for step in second] == [str(n) for n in range(8)]
    train(going_on(run, "trainer.strategy=null"))
    assert_like(run, alone)


def test_what_one_began_two_go_on_with(
    folder: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "one" / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 7, terminate)
        with pytest.raises(SystemExit):
            train(compose("train", *tiny_overrides(folder, run), *ALIKE, f"data.batch_size={TOGETHER}"))
    (tmp_path / "one" / "noted.py").write_text(NOTED)
    done = together(
        *(
            tmp_path / "one" / "noted.py",
            f"resume={run}",
            "trainer.strategy=fsdp",
        ),  # each takes its shards; ddp takes all, as one does
        cwd=tmp_path / "one",
        SEEN=str(tmp_path / "one"),
    )
    assert done.statuses == [0, 0], done.errors[-3000:]
    assert_like(run, alone)
    steps = [seen(tmp_path / "one", rank) for rank in range(2)]
    assert [step[0] for step in steps[0]] == [str(n) for n in range(8, 12)]
    assert all(len(step) == 1 + TOGETHER // 2 for of_rank in steps for step in of_rank), (
        "a step's pictures stay"
    )


def test_one_that_is_killed_ends_the_other_and_is_named(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "two" / "run"
    done = two_train(folder, run, by=torchrun, SIGNAL=f"{int(signal.SIGKILL)} 1 3")
    assert time.time() - (tmp_path / "two" / "1.txt").stat().st_mtime < 60, "since its last step"
    assert done.statuses != [0]
    assert re.search(r"rank *: 1 .*\n *exitcode *: -9", done.errors), done.errors[-3000:]
    own, _, of_torchrun = done.errors.partition("torch/distributed/run.py")
    assert of_torchrun
    assert "efficap" not in own, "no traceback of what is left"
    assert (run / "checkpoints" / LAST).is_file()


def test_a_mistake_that_all_meet_is_told_once(folder: Path, tmp_path: Path) -> None:
    done = two_train(folder, tmp_path / "two" / "run", "data.val_split=nowhere")
    assert done.statuses == [1, 1]
    assert done.errors.count("has no picture in that split") == 1
    assert "efficap/commands" not in done.errors, "and without a traceback"


def test_two_leave_a_run_alone_that_another_process_trains_in(alone: Path, tmp_path: Path) -> None:
    with begun(alone):
        done = together(ROOT / "train.py", f"resume={alone}", "trainer.strategy=ddp", cwd=tmp_path)
    assert done.statuses == [1, 1]
    assert done.errors.count("another process trains in it") == 1, done.errors[-3000:]
    assert "efficap/commands" not in done.errors, "and without a traceback"


def test_two_evaluate_as_one(folder: Path, alone: Path) -> None:
    settings = [f"run={alone}", "metrics=[BLEU,CIDEr]", "intervals.resamples=20", "gallery=0"]
    wanted = evaluate(compose("eval", *settings))
    captions = (alone / "eval" / "test" / "captions.json").read_text()
    done = together(ROOT / "eval.py", *settings, "accelerator=cpu", cwd=ROOT)
    assert done.statuses == [0, 0], done.errors[-3000:]
    found = json.loads((alone / "eval" / "test" / "scores.json").read_text())
    assert (alone / "eval" / "test" / "captions.json").read_text() == captions
    assert found["images"] == wanted["images"] == 7
    for name, value in wanted.items():
        if name == "intervals":
            assert found[name].keys() == value.keys()
            for metric, bounds in value.items():
                assert found[name][metric] == pytest.approx(bounds, abs=1e-6), metric
        elif name != "checks":
            assert found[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), (
                name
            )
    assert found["checks"] == pytest.approx(wanted["checks"], abs=1e-5)
    assert done.printed.count("captions, scores and pictures: ") == 1


def test_slurm_starts_a_job_anew_that_it_warned_and_it_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")

    def command(name: str) -> list[str]:
        return [*tiny_overrides(folder, tmp_path / name), "resume=auto", "checkpoint.every_steps=2"]

    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 7, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(SystemExit) as stopped:
            train(compose("train", *command("first")))
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in capsys.readouterr().err
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert train(compose("train", *command("second"))) == tmp_path / "first"
    (tmp_path / "asked").unlink()
    whole = train(
        compose("train", *tiny_overrides(folder, tmp_path / "other" / "whole"), "checkpoint.every_steps=2")
    )
    assert_equal_runs(tmp_path / "first", whole)
    assert not (tmp_path / "asked").exists()
