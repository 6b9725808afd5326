"""What a machine does to a training: it goes on, or ends with one line that tells the way out; it never hangs."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import compose, going_on, tiny_overrides, write_colour_table, write_random_run
from test_resume import CHANCE, assert_equal_runs, die_at
from torch.utils.data import DataLoader
from wandb_files import OfflineRun, finished_run

from efficap.commands import entry
from efficap.commands.caption import caption
from efficap.commands.evaluate import evaluate
from efficap.commands.faults import dead_loader
from efficap.commands.metrics_csv import MetricsLogger
from efficap.commands.placement import used_precision
from efficap.commands.resume import with_settings_of
from efficap.commands.run_dir import RunDirectory
from efficap.commands.stopped import explained
from efficap.commands.train import train
from efficap.data import pictures
from efficap.data.pictures import MAX_PIXELS
from efficap.data.shards.index import ensure_indexes
from efficap.errors import InputError
from efficap.training.checkpoints import LAST
from efficap.training.writer import CaptionWriter

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("faults") / "colours")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return train(compose("train", *tiny_overrides(folder, folder.parent / "whole"), *CHANCE))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of main memory; the test skips where that is not allowed."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def run_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[int, str]:
    """`python train.py OVERRIDES` in this process: its exit status, and what it says on stderr."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return int(end.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("setting", ["output_dir", "hydra.run.dir"])
def test_a_folder_that_cannot_be_written_is_told_at_the_start(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("efficap.data.csv.read_table", lambda *_, **__: pytest.fail("data were prepared"))
    overrides = [o for o in tiny_overrides(folder, tmp_path) if not o.startswith("output_dir=")]
    elsewhere = [] if setting == "hydra.run.dir" else [f"hydra.run.dir={tmp_path / 'hydra'}"]
    place = tmp_path / "file" / "run"
    status, errors = run_script(monkeypatch, capsys, *overrides, *elsewhere, f"{setting}={place}")
    assert status == 1
    assert errors == (
        f"error: {place} cannot be written (Not a directory); hydra.run.dir=DIR takes another folder for the run\n"
    )


def test_a_place_for_captions_that_cannot_be_written_is_told_before_the_model_is_loaded(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_random_run(folder.parent / "for_pictures")
    monkeypatch.setattr(RunDirectory, "captioner", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file.csv").touch()
    for place in ("file.csv", "file.csv/below"):
        settings = [f"run={run}", f"images={folder}/images", f"out={tmp_path / place}"]
        with pytest.raises(
            InputError, match=r"cannot be written \(Not a directory\); name another folder with out"
        ):
            caption(compose("caption", *settings))


def test_results_that_cannot_be_written_beside_their_run_are_told_before_it_captions(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_random_run(folder.parent / "for_scores")
    (run / "eval").touch()
    monkeypatch.setattr(CaptionWriter, "write", lambda *_, **__: pytest.fail("it captioned"))
    with pytest.raises(InputError, match=r"cannot be written .*: copy that to where you may write"):
        evaluate(compose("eval", f"run={run}", "metrics=[]"))


def test_a_link_to_the_latest_run_that_cannot_be_made_costs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs"
    (outputs / "latest/a folder of that name").mkdir(parents=True)
    run = write_random_run(outputs / "run")
    assert (run / "config.yaml").is_file()
    assert f"{outputs}/latest cannot lead to {run}: " in capsys.readouterr().err
    assert sorted(part.name for part in outputs.iterdir()) == ["latest", "run"]


def test_a_read_only_disk_is_told_at_the_start(
    folder: Path,
    mounted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = mounted("ro")
    overrides = [o for o in tiny_overrides(folder, place) if not o.startswith("output_dir=")]
    status, errors = run_script(monkeypatch, capsys, *overrides, f"hydra.run.dir={place / 'run'}")
    assert status == 1
    assert errors.startswith(f"error: {place / 'run'} cannot be written (Read-only file system); ")
    assert errors.count("\n") == 1


def test_a_loader_process_that_is_killed_ends_the_training_with_its_name(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    others = multiprocessing.active_children()  # of tests before

    def kill_loaders() -> None:
        for process in multiprocessing.active_children():
            if process not in others:
                killed.append(process.pid or 0)
                os.kill(killed[-1], signal.SIGKILL)
                break  # of a second one torch would tell in the middle of what the first comes to
        time.sleep(1)  # in which torch learns of it; later it would cut short anything

    run = tmp_path / "run"
    started = time.monotonic()
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 6, kill_loaders)
        with pytest.raises(InputError) as error:
            train(compose("train", *tiny_overrides(folder, run), *CHANCE, "data.num_workers=1"))
    assert killed
    assert re.search(
        rf"process ({'|'.join(map(str, killed))}) that loads pictures was killed \(Killed\)", str(error.value)
    )
    assert f"python train.py resume={run} goes on from the latest checkpoint" in str(error.value)
    assert time.monotonic() - started < 120, "it does not wait for ever"
    train(going_on(run))
    assert_equal_runs(run, undisturbed)


def test_memory_that_runs_out_is_told_with_what_helps(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")

    monkeypatch.setattr("efficap.commands.placement.bfloat16_is_slow", lambda: False)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 6, run_out)
        with pytest.raises(InputError) as error:
            train(compose("train", *tiny_overrides(folder, run), *CHANCE))
    assert str(error.value) == (
        f"out of memory; python train.py resume={run} goes on from the latest checkpoint, with "
        "gradient_checkpointing=true trainer.precision=bf16-mixed in less memory; for a new training, which takes the "
        f"weights by init_from={run}: data.batch_size=1 trainer.accumulate_grad_batches=2, or a model.image_size "
        "below 64"
    )
    advice = ["gradient_checkpointing=true", "trainer.precision=bf16-mixed"]
    settings = with_settings_of(RunDirectory(run), going_on(run, *advice))
    assert (settings["gradient_checkpointing"], settings["trainer"]["precision"]) == (True, "bf16-mixed")
    train(going_on(run))
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize(
    ("function", "value"),
    [
        ("stopped.used_precision", lambda _: "bf16-mixed"),  # as null is on a GPU
        ("placement.bfloat16_is_slow", lambda: True),  # where bf16-mixed is float32
    ],
)
def test_memory_that_runs_out_before_there_is_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, value: Callable[..., Any]
) -> None:
    def run_out() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    die_at(monkeypatch, "training_step", 0, run_out)
    monkeypatch.setattr(f"efficap.commands.{function}", value)
    with pytest.raises(InputError) as error:
        train(compose("train", *tiny_overrides(folder, tmp_path / "run")))
    assert str(error.value) == (
        "out of memory; there is no checkpoint yet: start anew; what helps: gradient_checkpointing=true, "
        "data.batch_size=2 trainer.accumulate_grad_batches=2, a model.image_size below 64"
    )


def test_null_is_the_precision_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = compose("train", "name=x", "output_dir=x")["trainer"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert used_precision(auto) == "bf16-mixed"
    assert used_precision({**auto, "accelerator": "cpu"}) == "32-true"
    assert used_precision({**auto, "precision": "16-mixed"}) == "16-mixed"


def children(of: int, name: str | None = None) -> list[int]:
    """The processes that one has started, of this name or of any."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            command, fields = file.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:  # it has just ended
            continue
        if name in (command, None) and int(fields.split()[1]) == of:
            found.append(int(file.parent.name))
    return found


def test_a_training_survives_weights_and_biases(
    folder: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its process is killed in mid-run, and the next run, as of a sweep, has another one."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = tmp_path / "run"
    killed: list[int] = []

    def kill_wandb() -> None:
        for process in children(os.getpid(), "wandb-core"):
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 5, kill_wandb)
        train(
            compose(
                "train", *tiny_overrides(folder, run), *CHANCE, "logger=wandb", "trainer.log_every_n_steps=1"
            )
        )
    assert killed
    assert_equal_runs(run, undisturbed)
    printed = capfd.readouterr()
    assert printed.err.count("W&B has failed and is told no more, training goes on") == 1
    assert "Traceback" not in printed.err
    [file] = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert f"wandb sync {file.parent}" in printed.out
    assert OfflineRun(file).exit_codes == []
    command = [*CHANCE, "logger=wandb", "trainer.max_epochs=1"]
    after = train(compose("train", *tiny_overrides(folder, tmp_path / "next"), *command))
    [file] = (after / "wandb").glob("offline-run-*/run-*.wandb")
    assert finished_run(file).exit_codes == [0]


def test_weights_and_biases_that_does_not_end_leaves_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    from efficap.commands.loggers import build_loggers, finish_wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run").mkdir()
    cfg = compose("train", f"output_dir={tmp_path / 'run'}", "name=job", "logger.mode=offline")
    build_loggers(cfg, tmp_path / "run", None)
    assert wandb.run is not None
    assert wandb.run.settings.finish_timeout == 300
    real = wandb.finish

    def too_late(exit_code: int) -> None:
        real(exit_code=exit_code)
        raise TimeoutError("Timed out after 300 seconds waiting for data to upload.")

    monkeypatch.setattr(wandb, "finish", too_late)
    finish_wandb(exit_code=0)
    printed = capsys.readouterr()
    assert "W&B could not end its run: Timed out after 300 seconds" in printed.err
    assert re.search(rf"wandb sync {tmp_path}/run/wandb/offline-run-", printed.out)
    assert wandb.run is None


def test_an_artifact_that_cannot_be_made_does_not_end_a_finished_training_badly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))

    def is_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb.Artifact, "add_file", is_full)
    asked = ["logger=wandb", "logger.artifact=true", "trainer.max_epochs=1"]
    run = train(compose("train", *tiny_overrides(folder, tmp_path / "run"), *asked))
    told = f"W&B takes no artifact of {run}: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err.count(told) == 1
    [file] = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert finished_run(file).exit_codes == [0]


def test_a_training_without_a_logger_comes_to_its_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = compose("train", *tiny_overrides(folder, tmp_path / "run"), "trainer.max_epochs=1")
    run = train({**cfg, "logger": None})
    assert f"run directory: {run}" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_never_comes_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    real = pictures.read_picture_file

    def slowly(file: Path, *arguments: Any) -> bytes:
        if file.name == "train_3.jpg":
            time.sleep(600)
        return real(file, *arguments)

    monkeypatch.setattr(pictures, "read_picture_file", slowly)
    slow = [
        "data.read_timeout=2",
        "data.check_images=false",
        "data.max_bad_fraction=0.1",
        "trainer.max_epochs=1",
    ]
    run = train(
        compose("train", *tiny_overrides(folder, tmp_path / "run"), *slow, f"data.num_workers={workers}")
    )
    assert json.loads((run / "metrics.json").read_text())["left_out"] == {"too slow": 1}


def test_a_pipe_among_the_pictures_is_named_before_training(folder: Path, tmp_path: Path) -> None:
    table = write_colour_table(tmp_path / "colours")
    file = table / "images" / "train_3.jpg"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(
        InputError, match=r"1 \(unreadable 1\) of 12 samples .*train_3.jpg \(unreadable: no regular file"
    ):
        train(compose("train", *tiny_overrides(table, tmp_path / "run")))


def fill(filler: Path) -> None:
    """Leave no byte of a disk free."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))


def test_a_disk_that_fills_up_and_is_emptied_again_costs_nothing(
    folder: Path, undisturbed: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mounted("size=64m") / "run"
    filler = run / "filler"
    with monkeypatch.context() as patch:
        die_at(
            patch, "training_step", 2, lambda: fill(filler)
        )  # before a checkpoint and the first validation
        die_at(patch, "on_validation_epoch_start", 1, filler.unlink)
        with pytest.warns(UserWarning, match=r"training goes on: .*No space left on device") as told:
            train(compose("train", *tiny_overrides(folder, run), *CHANCE))
    said = "\n".join(str(warning.message) for warning in told)
    for what in (
        "no checkpoint at step",
        "metrics.csv cannot be written",
        "metrics.json could not be written",
    ):
        assert what in said
    assert_equal_runs(run, undisturbed)
    assert (run / "checkpoints" / LAST).is_file()
    assert not [file for file in run.rglob("*") if file.name.endswith(".tmp")]


def test_a_disk_that_stays_full_ends_the_training_with_what_to_do(
    folder: Path,
    undisturbed: Path,
    mounted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = mounted("size=64m") / "run"
    filler = run / "filler"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 6, lambda: fill(filler))
        with (
            pytest.warns(UserWarning, match="No space left on device"),
            pytest.raises(InputError, match=rf"at the end: .*; make room, and resume={run} goes on"),
        ):
            train(compose("train", *tiny_overrides(folder, run), *CHANCE))
    filler.unlink()
    train(going_on(run))
    assert_equal_runs(run, undisturbed)


def test_a_clock_that_jumps_changes_nothing(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the checkpoints by minutes nor the limit of time go by the time of day."""
    real, leaps = time.time, itertools.cycle([10**6, -(10**6)])
    monkeypatch.setattr(time, "time", lambda: real() + next(leaps))
    save, kept = pl.Trainer.save_checkpoint, list[str]()

    def noted(self: pl.Trainer, path: Path, *args: Any, **kwargs: Any) -> None:
        kept.append(Path(path).name)
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", noted)
    command = [*tiny_overrides(folder, tmp_path / "run"), *CHANCE, "checkpoint.every_steps=null"]
    assert_equal_runs(train(compose("train", *command, "checkpoint.every_minutes=600")), undisturbed)
    assert kept.count(f"{LAST}.tmp") == 2, "one before each validation"
    limited = train(
        compose("train", *tiny_overrides(folder, tmp_path / "limited"), "trainer.max_time=00:10:00:00")
    )
    assert json.loads((limited / "metrics.json").read_text())["epochs"] == 3, "to the end"


def test_no_row_of_the_log_is_lost_or_cut_by_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own, whose files may then be so long and no longer."""
    code = f"""
import resource, sys, warnings
from pathlib import Path
from efficap.commands.metrics_csv import MetricsLogger

file, limits = Path({str(tmp_path)!r}) / "metrics.csv", resource.getrlimit(resource.RLIMIT_FSIZE)
logger = MetricsLogger(file.parent, None)
logger.log_metrics({{"loss": 1.5}}, step=0)
for place, row in enumerate([{{"loss": 2.5}}, {{"score": 3.5}}], start=1):
    before = file.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        logger.log_metrics(row, step=10 * place)
        logger.log_metrics(row, step=10 * place + 1)
    assert len(told) == 1, told
    assert file.read_bytes() == before
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    logger.log_metrics(row, step=10 * place + 2)
print(file.read_text())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split()
    assert lines[0] == "loss,score,step"
    assert lines[1:] == ["1.5,,0", "2.5,,10", "2.5,,11", "2.5,,12", ",3.5,20", ",3.5,21", ",3.5,22"]


def test_a_log_that_is_gone_on_with_is_there_at_all_times(tmp_path: Path) -> None:
    import pandas as pd

    rows = pd.DataFrame({"step": [0, 1], "train/loss": [2.0, 1.0]})
    (tmp_path / "metrics.csv").write_text("train/loss,step\n2.0,0\n1.0,1\n0.5,2\n")
    logger = MetricsLogger(tmp_path, rows)
    logger.log_metrics({"train/loss": 0.25}, step=2)
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,train/loss", "0,2.0", "1,1.0", "2,0.25"]
    logger.log_metrics({"val/loss": 0.5}, step=2)
    lines = (tmp_path / "metrics.csv").read_text().split()
    assert lines == ["step,train/loss,val/loss", "0,2.0,", "1,1.0,", "2,0.25,", "2,,0.5"]


@pytest.mark.parametrize("script", ["eval", "caption"])
def test_a_loader_process_that_is_killed_is_named_by_all_commands(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if no test before had a loader, whose handler Lightning may have put away.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)

    def captioning(cfg: dict[str, Any]) -> None:
        loader: DataLoader[Any] = DataLoader(range(100), num_workers=1, collate_fn=_pause)  # type: ignore[arg-type]
        batches = iter(loader)
        next(batches)
        batches._workers[0].kill()  # type: ignore[attr-defined]
        time.sleep(1)  # as above
        next(batches)

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(
        sys, "argv", [f"{script}.py", "run=x", *(["images=x"] if script == "caption" else [])]
    )
    with pytest.raises(SystemExit) as end:
        entry.run(script, captioning)
    assert end.value.code == 1
    errors = capsys.readouterr().err
    assert re.match(
        r"error: the process \d+ that loads pictures was killed \(Killed\), most likely for", errors
    )
    assert errors.count("\n") == 1


def test_a_loader_process_that_ends_by_itself_is_told_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if no test before had a loader, whose handler Lightning may have put away.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    loader: DataLoader[Any] = DataLoader([3], num_workers=1, collate_fn=_end)  # type: ignore[arg-type]

    def training(cfg: dict[str, Any]) -> None:
        with explained(cfg):
            next(iter(loader))

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit):
        entry.run("train", training)
    errors = capsys.readouterr().err
    assert re.fullmatch(
        r"error: the process \d+ that loads pictures ended with exit code 3; what it said stands above; there is no "
        r"checkpoint yet: start anew\n",
        errors,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Killed", r"was killed \(Killed\), most likely for lack of main memory: fewer num_workers"),
        (
            "Bus error",
            r"was killed \(Bus error\), most likely for lack of memory shared by processes \(/dev/shm\): fewer",
        ),
        ("Segmentation fault", r"was killed \(Segmentation fault\)$"),
    ],
)
def test_what_killed_a_loader_process_says_what_helps(name: str, expected: str) -> None:
    told = dead_loader(RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {name}. "))
    assert re.match(f"the process 7 that loads pictures {expected}", told or "")


def _end(statuses: list[int]) -> None:
    os._exit(statuses[0])


def _pause(items: list[int]) -> list[int]:
    time.sleep(0.1)
    return items


def test_a_process_that_is_killed_while_shards_are_indexed_is_told(tmp_path: Path) -> None:
    tars = [tmp_path / "one.tar", tmp_path / "other.tar"]
    for tar in tars:
        os.mkfifo(tar)  # on which its process waits

    def kill_workers() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until:
            for server in children(os.getpid()):
                for worker in children(server):
                    time.sleep(0.5)
                    os.kill(worker, signal.SIGKILL)
                    return
            time.sleep(0.1)
        for tar in tars:  # none came: let them read nothing, and the test fail
            os.close(os.open(tar, os.O_WRONLY))

    threading.Thread(target=kill_workers, daemon=True).start()
    with pytest.raises(InputError, match=r"a worker process died, .*the same command again goes on"):
        ensure_indexes(tars, index_dir=None, max_pixels=MAX_PIXELS, workers=2)
