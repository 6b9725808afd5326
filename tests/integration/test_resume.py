"""A training that is stopped anywhere goes on as if nothing had happened, to the last bit of losses and weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import yaml
from conftest import compose, going_on, tiny_overrides, write_colour_table
from lightning.pytorch.callbacks import Timer
from safetensors.torch import load_file
from started import Started

from efficap.commands.resume import same_run
from efficap.commands.run_dir import RunDirectory
from efficap.commands.settings import resolved_settings
from efficap.commands.train import train
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import read_table
from efficap.errors import InputError
from efficap.training.callbacks import BestCheckpoint
from efficap.training.checkpoints import LAST, PREVIOUS, Checkpoint, checkpoint_of, damage
from efficap.training.module import CaptionModule
from efficap.training.progress import begun, is_finished
from efficap.training.self_critical import SelfCriticalModule
from efficap.training.trainer_data import TrainerData

pytestmark = pytest.mark.slow
CHANCE = [  # all that draws random numbers in a step
    "model.decoder.dropout=0.1",
    "model.bridge.dropout=0.1",
    "model.encoder.drop_path_rate=0.1",
    "training.token_dropout=0.1",
    "training.hidden_captions=0.3",
    "training.ema_decay=0.9",
    "data.crop_scale=[0.5,1.0]",
    "data.captions_per_image=2",
    "checkpoint.every_steps=2",
    "data.batch_size=2",  # 4 steps an epoch
    "trainer.max_epochs=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("resume") / "colours")


class KilledError(RuntimeError):
    """Stands for a process that is gone at once."""


def die_at(monkeypatch: pytest.MonkeyPatch, where: str, after: int, do: Callable[[], Any]) -> None:
    """Let `do` happen as `where` begins for the time after `after` times."""
    for module in (CaptionModule, SelfCriticalModule):
        if where not in vars(module):
            continue
        real, calls = getattr(module, where), []

        def hook(self: Any, *args: Any, _real: Any = real, _calls: list[int] = calls, **kwargs: Any) -> Any:
            _calls.append(1)
            if len(_calls) == after + 1:
                do()
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(module, where, hook)


def kill() -> None:
    raise KilledError


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def log_of(run: Path) -> pd.DataFrame:
    """The logged values that do not depend on the clock, a row for each step."""
    table = pd.read_csv(run / "metrics.csv").drop(columns=["train/pairs_per_second", "train/memory_gib"])
    return table.groupby("step").first().dropna(axis=1, how="all")


def assert_equal_runs(run: Path, expected: Path) -> None:
    ours, theirs = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    pd.testing.assert_frame_equal(log_of(run), log_of(expected), check_exact=True, check_like=True)
    metrics, wanted = (json.loads((path / "metrics.json").read_text()) for path in (run, expected))
    for key in ("finished", "steps", "epochs", "pairs", "best", "last"):
        assert metrics[key] == wanted[key], key


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return train(compose("train", *tiny_overrides(folder, folder.parent / "whole"), *CHANCE))


@pytest.mark.parametrize(
    ("where", "after", "status"),
    [
        ("training_step", 3, None),
        ("training_step", 6, 143),
        ("validation_step", 0, None),
        ("validation_step", 1, 143),
        ("on_validation_epoch_end", 1, None),
    ],
)
def test_a_training_stopped_anywhere_ends_as_one_that_was_not(
    folder: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    after: int,
    status: int | None,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, where, after, terminate if status else kill)
        with pytest.raises(SystemExit if status else KilledError) as stopped:
            train(compose("train", *tiny_overrides(folder, run), *CHANCE))
        if status:
            assert stopped.value.code == status
    again = train(going_on(run))
    assert again == run
    assert_equal_runs(run, undisturbed)


def test_a_training_by_muon_goes_on_exactly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*CHANCE, "optimizer=muon"]
    expected = train(compose("train", *tiny_overrides(folder, tmp_path / "expected"), *command))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 5, kill)
        with pytest.raises(KilledError):
            train(compose("train", *tiny_overrides(folder, run), *command))
    train(going_on(run))
    assert_equal_runs(run, expected)


@pytest.mark.parametrize(
    ("overrides", "after", "step"),
    [
        (["data.batch_size=1", "trainer.accumulate_grad_batches=2"], 10, 6),  # in the middle of a step
        (["trainer.check_val_every_n_epoch=3"], 3, 5),  # in the last step of an epoch that is not validated
    ],
)
def test_a_signal_is_answered_with_a_checkpoint_as_soon_as_there_can_be_one(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    after: int,
    step: int,
) -> None:
    settings = [*CHANCE, "checkpoint.every_steps=null", *overrides]
    whole = train(compose("train", *tiny_overrides(folder, tmp_path / "whole"), *settings))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", after, terminate)
        with pytest.raises(SystemExit):
            train(compose("train", *tiny_overrides(folder, run), *settings))
    assert Checkpoint.read(run / "checkpoints" / LAST).global_step == step
    train(going_on(run))
    assert_equal_runs(run, whole)


def test_a_training_by_the_clock_that_is_stopped_in_its_last_validation_comes_to_an_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", CaptionModule.validation_step

    def stopped_once_time_is_up(self: CaptionModule, batch: Any, place: int) -> None:
        timer = next(callback for callback in self.trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
        if (timer.time_remaining() or 1) < 0:
            terminate()
        real(self, batch, place)

    limits = ["trainer.max_time=00:00:00:02", "trainer.max_epochs=1000", "trainer.limit_val_batches=2"]
    limits += ["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=1000"]
    with monkeypatch.context() as patch:
        patch.setattr(CaptionModule, "validation_step", stopped_once_time_is_up)
        with pytest.raises(SystemExit) as stopped:
            train(compose("train", *tiny_overrides(folder, run), *CHANCE, *limits))
        assert stopped.value.code == 143
    assert not (run / "model.safetensors").exists()
    steps = Checkpoint.read(run / "checkpoints" / LAST).global_step
    train(going_on(run))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["steps"] == steps + 1
    assert (run / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "interval", [[], ["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=00:01:00:00"]]
)
def test_a_training_by_steps_that_is_stopped_in_its_last_validation_has_that_alone_left_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: list[str]
) -> None:
    limits = ["trainer.max_steps=6", "trainer.limit_val_batches=2", *interval]  # in the midst of an epoch
    whole = train(compose("train", *tiny_overrides(folder, tmp_path / "whole"), *CHANCE, *limits))
    run, real = tmp_path / "run", CaptionModule.validation_step

    def stopped_after_all_steps(self: CaptionModule, batch: Any, place: int) -> None:
        if self.global_step == 6:
            terminate()
        real(self, batch, place)

    with monkeypatch.context() as patch:
        patch.setattr(CaptionModule, "validation_step", stopped_after_all_steps)
        with pytest.raises(SystemExit):
            train(compose("train", *tiny_overrides(folder, run), *CHANCE, *limits))
    assert Checkpoint.read(run / "checkpoints" / LAST).global_step == 6
    with monkeypatch.context() as patch:
        patch.setattr(CaptionModule, "training_step", lambda *_: pytest.fail("a step too many"))
        train(going_on(run))
    assert_equal_runs(run, whole)


MID_EPOCH = [
    "trainer.check_val_every_n_epoch=null",
    "trainer.val_check_interval=3",
    "checkpoint.every_steps=1",
]


def test_a_training_stopped_twice_in_a_validation_amid_an_epoch_goes_on_where_that_came(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(compose("train", *tiny_overrides(folder, tmp_path / "whole"), *CHANCE, *MID_EPOCH))
    run = tmp_path / "run"
    for after, command in (
        (2, compose("train", *tiny_overrides(folder, run), *CHANCE, *MID_EPOCH)),
        (0, None),
    ):
        with monkeypatch.context() as patch:
            die_at(patch, "validation_step", after, terminate)
            with pytest.raises(SystemExit):
                train(command or going_on(run))
        assert Checkpoint.read(run / "checkpoints" / LAST).global_step == 6
    train(going_on(run))
    assert_equal_runs(run, whole)


@pytest.fixture(scope="module")
def of_two_batches(folder: Path) -> tuple[list[str], Path]:
    """A training of which a step adds up two batches, and every other validation comes between them."""
    command = [
        *CHANCE,
        *MID_EPOCH,
        "data.batch_size=1",
        "trainer.accumulate_grad_batches=2",
        "trainer.max_epochs=1",
    ]
    return command, train(compose("train", *tiny_overrides(folder, folder.parent / "two_batches"), *command))


@pytest.mark.parametrize(("every", "how", "step"), [(1, kill, 1), (1, terminate, 1), (9, terminate, 2)])
def test_a_validation_amid_the_batches_of_a_step_keeps_no_half_of_it(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_two_batches: tuple[list[str], Path],
    every: int,
    how: Callable[[], None],
    step: int,
) -> None:
    command, whole = of_two_batches
    command = [*command, f"checkpoint.every_steps={every}"]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "validation_step", 1, how)  # after three batches
        with pytest.raises(KilledError if how is kill else SystemExit):
            train(compose("train", *tiny_overrides(folder, run), *command))
    assert Checkpoint.read(run / "checkpoints" / LAST).global_step == step
    train(going_on(run))
    assert_equal_runs(run, whole)


def test_a_validation_by_the_clock_that_was_broken_off_is_made_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", CaptionModule.training_step
    clock = ["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=00:01:00:00"]

    def one_that_takes_an_hour(self: CaptionModule, *args: Any) -> Any:
        if self.global_step == 5:
            self.trainer._last_val_time = -math.inf  # type: ignore[attr-defined]
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CaptionModule, "training_step", one_that_takes_an_hour)
        die_at(patch, "validation_step", 0, kill)
        with pytest.raises(KilledError):
            train(compose("train", *tiny_overrides(folder, run), *CHANCE, *clock))
    steps = Checkpoint.read(run / "checkpoints" / LAST).global_step
    train(going_on(run))
    scored = pd.read_csv(run / "metrics.csv").dropna(subset="val/loss")
    assert steps - 1 in scored["step"].tolist()


def test_a_training_that_begins_where_another_lies_is_refused_and_changes_nothing(
    folder: Path, undisturbed: Path
) -> None:
    run = undisturbed
    config = (run / "config.yaml").read_bytes()
    for resume in ("null", "auto"):
        with pytest.raises(InputError, match=r"holds another training; resume=.* goes on with it"):
            train(compose("train", *tiny_overrides(folder, run), "seed=1", f"resume={resume}"))
    assert (run / "config.yaml").read_bytes() == config
    assert checkpoint_of(run)


def test_a_link_to_the_latest_run_is_no_start_where_the_training_would_move_it(
    folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    latest = tmp_path / "outputs/latest"
    latest.parent.mkdir()
    latest.symlink_to(undisturbed)
    beside = [*tiny_overrides(folder, tmp_path / "outputs/x"), f"init_from={latest}"]
    with pytest.raises(InputError, match=f"leads to the latest run.*: init_from={undisturbed}"):
        resolved_settings(compose("train", *beside, "resume=auto"))
    assert resolved_settings(compose("train", *beside))[0]["init_from"] == str(undisturbed)


def test_a_training_whose_weights_could_not_be_written_is_not_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(BestCheckpoint, "_export", refuse)
        with (
            pytest.warns(UserWarning, match="the best weights could not be written"),
            pytest.raises(InputError, match="the weights could not be written at the end"),
        ):
            train(compose("train", *tiny_overrides(folder, run), *CHANCE))
    assert not json.loads((run / "metrics.json").read_text())["finished"]
    train(going_on(run))
    assert json.loads((run / "metrics.json").read_text())["finished"]
    assert (run / "model.safetensors").is_file()


def stop_and_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, *overrides: str
) -> tuple[Path, Path]:
    """A training killed in the step after `after` and gone on with, and the same one undisturbed."""
    whole = train(compose("train", *tiny_overrides(folder, tmp_path / "whole"), *CHANCE, *overrides))
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", after, kill)
        with pytest.raises(KilledError):
            train(compose("train", *tiny_overrides(folder, tmp_path / "run"), *CHANCE, *overrides))
    return train(going_on(tmp_path / "run")), whole


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_steps=9", "data.steps_per_epoch=5"],
        ["model.encoder.frozen=true", "data.feature_cache=true", "data.feature_cache_dir={tmp}"],
    ],
)
def test_whatever_makes_an_epoch_or_a_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    changes = [override.replace("{tmp}", str(tmp_path / "maps")) for override in overrides]
    assert_equal_runs(*stop_and_go_on(folder, tmp_path, monkeypatch, 6, *changes))


def test_self_critical_training(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [o for o in CHANCE if not o.startswith(("model", "training.token", "training.hidden"))]
    data = [o for o in tiny_overrides(folder, tmp_path) if not o.startswith(("model", "output_dir"))]
    begun_from = shutil.copytree(undisturbed, tmp_path / "begun_from")
    overrides = [*data, *changes, "training=scst", f"init_from={begun_from}"]
    whole = train(compose("train", *overrides, f"output_dir={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 6, kill)
        with pytest.raises(KilledError):
            train(compose("train", *overrides, f"output_dir={tmp_path / 'run'}"))
    shutil.rmtree(begun_from)  # nothing of it is needed any more
    assert_equal_runs(train(going_on(tmp_path / "run")), whole)


def test_features_of_a_frozen_encoder_are_not_made_again(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights come from elsewhere than the seed: those of the checkpoint must be there first."""
    data = [o for o in tiny_overrides(folder, tmp_path) if not o.startswith(("model", "output_dir"))]
    cache = [
        "model.encoder.frozen=true",
        "data.feature_cache=true",
        f"data.feature_cache_dir={tmp_path}/maps",
    ]
    overrides = [*data, *cache, "checkpoint.every_steps=1", f"init_from={undisturbed}"]
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 3, kill)
        with pytest.raises(KilledError):
            train(compose("train", *overrides, f"output_dir={tmp_path / 'run'}"))
    with monkeypatch.context() as patch:
        patch.setattr("efficap.training.feature_cache._fill", lambda *_: pytest.fail("encoded again"))
        train(going_on(tmp_path / "run"))
    assert len(list((tmp_path / "maps").iterdir())) == 1


@pytest.mark.parametrize(
    ("amounts", "after"),  # stopped in the first set, and in the pattern's middle in the second epoch
    [("epochs={first: 1, second: 1}", 3), ("weights={first: 2, second: 1}", 11)],
)
def test_shards_and_tables_mixed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amounts: str, after: int
) -> None:
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
    tables, _ = read_table(folder / "captions.csv", folder / "images", **columns)
    write_shards(tables["train"], tmp_path / "shards", ShardSettings(3, None, 10**6), workers=1)
    other = "epochs" if amounts.startswith("weights") else "weights"
    mixture = [
        "data=mix",
        f"data.{amounts}",
        f"data.{other}=null",
        f"data.sources.first.shards={tmp_path / 'shards'}",
        f"data.sources.second.table={folder}/captions.csv",
        f"data.sources.second.image_dir={folder}/images",
        *(
            f"data.sources.{name}.{setting}"
            for name in ("first", "second")
            for setting in ("batch_size=2", "num_workers=1", "max_tokens=12", "captions_per_image=2")
        ),
    ]
    overrides = [
        o for o in (*tiny_overrides(folder, tmp_path), *CHANCE) if not o.startswith(("data", "output_dir"))
    ]
    overrides += [*mixture, "trainer.max_epochs=2"]
    whole = train(compose("train", *overrides, f"output_dir={tmp_path / 'whole'}"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", after, kill)
        with pytest.raises(KilledError):
            train(compose("train", *overrides, f"output_dir={run}"))
    with pytest.raises(
        InputError, match=r"here it is \+\+data.sources.first.num_workers=0, .*second.num_workers=0$"
    ):
        train(going_on(run, "data.num_workers=0"))
    change = "++data.sources.second.num_workers=0"
    assert_equal_runs(train(going_on(run, change)), whole)
    sources = RunDirectory(run).config["data"]["sources"]
    assert [sources[name]["num_workers"] for name in ("first", "second")] == [1, 0]
    settings, _, _ = resolved_settings(going_on(run, f"++data.sources.first.index_dir={tmp_path}/indexes"))
    assert settings["data"]["sources"]["first"]["index_dir"] == f"{tmp_path}/indexes"


def stopped_run(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 7, kill)
        with pytest.raises(KilledError):
            train(compose("train", *tiny_overrides(folder, run), *CHANCE, *overrides))
    return run


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """What was `undisturbed`, killed in its eighth step; to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        return stopped_run(folder, folder.parent / "stopped", patch)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    stopped: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    file = run / "checkpoints" / LAST
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"last.ckpt is no whole file .*; going on from the one before"):
        assert checkpoint_of(run).name == PREVIOUS
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged at .*; going on from the one before"):
        train(going_on(run))
    assert_equal_runs(run, undisturbed)
    assert not damage(run / "checkpoints" / PREVIOUS), (
        "a damaged one does not take the place of the one before"
    )
    for name in (LAST, PREVIOUS):
        (run / "checkpoints" / name).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="no whole file"),
        pytest.raises(InputError, match=r"holds no whole checkpoint to go on from; init_from=\S+ starts"),
    ):
        checkpoint_of(run)


def test_a_disk_that_is_full_for_a_while_does_not_end_training(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = pl.Trainer.save_checkpoint, []

    def full_at_first(self: pl.Trainer, path: Path, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) in (2, 3, 4):  # last.ckpt, and best.ckpt after the first validation
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full_at_first)
    with pytest.warns(
        UserWarning, match="no checkpoint at step .*, training goes on: .*No space left on device"
    ):
        run = train(compose("train", *tiny_overrides(folder, tmp_path / "run"), *CHANCE))
    assert_equal_runs(run, undisturbed)
    assert checkpoint_of(run).name == LAST
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_a_training_stopped_before_it_has_a_checkpoint_does_not_say_that_it_can_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", is_full)
    die_at(monkeypatch, "training_step", 1, terminate)
    with pytest.warns(UserWarning, match="no checkpoint at step"), pytest.raises(SystemExit) as stopped:
        train(compose("train", *tiny_overrides(folder, tmp_path / "run"), *CHANCE))
    assert stopped.value.code == 143
    assert "stopped by SIGTERM; there is no checkpoint yet: start anew\n" in capsys.readouterr().err


def test_the_same_command_again_goes_on_by_itself(
    folder: Path, undisturbed: Path, stopped: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(stopped, tmp_path / "first")
    command = [*CHANCE, "resume=auto"]
    (tmp_path / "second" / ".hydra").mkdir(parents=True)
    assert (
        train(compose("train", *tiny_overrides(folder, tmp_path / "second"), *command)) == tmp_path / "first"
    )
    assert not (tmp_path / "second").exists()
    assert_equal_runs(tmp_path / "first", undisturbed)
    capsys.readouterr()
    assert (
        train(compose("train", *tiny_overrides(folder, tmp_path / "third"), *command)) == tmp_path / "first"
    )
    assert "finished already" in capsys.readouterr().out
    other = train(compose("train", *tiny_overrides(folder, tmp_path / "fourth"), *command, "seed=1"))
    assert other == tmp_path / "fourth", "another seed is another training"
    assert f"no training of these settings in {tmp_path}; a new one begins" in capsys.readouterr().out


def test_a_run_that_was_gone_on_with_in_less_memory_is_found_by_the_command_that_began_it(
    folder: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    train(going_on(run, "gradient_checkpointing=true"))
    same = [*tiny_overrides(folder, tmp_path / "other"), *CHANCE, "resume=auto"]
    for said, wanted in (([], True), (["gradient_checkpointing=false"], False)):
        settings, _, found = resolved_settings(compose("train", *same, *said))
        assert found is not None
        assert found.path == run
        assert settings["gradient_checkpointing"] is wanted
    _, _, found = resolved_settings(compose("train", *same, "training.ema_decay=0.8"))
    assert found is None


def test_what_changes_nothing_that_is_learned_may_have_changed_since(
    folder: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    changes = ["data.num_workers=1", "data.max_bad_fraction=0.5", f"data.feature_cache_dir={tmp_path}"]
    changes += ["training.max_bad_steps=3", "trainer.precision=bf16-mixed"]
    changed, _, _ = resolved_settings(going_on(run, *changes))
    (run / "config.yaml").write_text(yaml.safe_dump({**changed, "resume": None}))
    same = [o for o in tiny_overrides(folder, tmp_path / "other") if not o.startswith("data.num_workers")]
    same += [*CHANCE, "resume=auto"]
    settings, _, found = resolved_settings(compose("train", *same))
    assert found is not None
    assert settings == changed
    settings, _, found = resolved_settings(compose("train", *same, "data.num_workers=2"))
    assert found is not None
    assert settings == {**changed, "data": {**changed["data"], "num_workers": 2}}
    for other in ("trainer.precision=32-true", "trainer.max_epochs=5", "data.image_dir=elsewhere"):
        assert resolved_settings(compose("train", *same, other))[2] is None
    before = shutil.copytree(stopped, tmp_path / "before")
    _, _, found = resolved_settings(compose("train", *same))
    assert found is not None
    assert found.path == before, "the precision that is not named is the default first of all"


@pytest.mark.parametrize("content", ["", "[]", '{"finished": tr'])
def test_a_run_with_damaged_metrics_is_one_that_has_not_finished(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text('{"finished": true}')
    assert is_finished(tmp_path)
    (tmp_path / "metrics.json").write_text(content)
    assert not is_finished(tmp_path)


def test_runs_of_a_folder_that_is_not_in_ascii_are_told_to_be_of_one_training(
    folder: Path, tmp_path: Path
) -> None:
    data = [o for o in tiny_overrides(folder, tmp_path) if not o.startswith(("output_dir", "logger"))]
    cfgs = [
        resolved_settings(compose("train", *data, "logger=wandb", f"output_dir='{tmp_path}/größe/{run}'"))[0]
        for run in ("first", "second")
    ]
    assert cfgs[1]["logger"]["save_dir"] == f"{tmp_path}/größe/second"
    (tmp_path / "größe/first/checkpoints").mkdir(parents=True)
    (tmp_path / "größe/first/checkpoints" / LAST).touch()
    (tmp_path / "größe/first/config.yaml").write_text(yaml.safe_dump(cfgs[0]))
    found = same_run({**cfgs[1], "resume": "auto"})
    assert found is not None
    assert found.path == tmp_path / "größe/first"
    moved = found.path.rename(tmp_path / "größe/moved")
    second = f"output_dir='{tmp_path}/größe/second'"
    settings, _, _ = resolved_settings(compose("train", *data, "logger=wandb", second, "resume=auto"))
    assert settings["logger"]["save_dir"] == settings["output_dir"] == str(moved)


def test_a_run_takes_callbacks_and_another_logger_that_it_had_not(undisturbed: Path) -> None:
    run = undisturbed
    early = "+callbacks.early"
    stopping = [f"{early}._target_=lightning.pytorch.callbacks.EarlyStopping", f"{early}.monitor=val/loss"]
    settings, _, _ = resolved_settings(going_on(run, *stopping, "logger=wandb"))
    assert settings["callbacks"]["early"]["monitor"] == "val/loss"
    assert settings["logger"]["name"] == RunDirectory(run).config["name"]
    assert settings["logger"]["save_dir"] == str(run)
    settings, _, _ = resolved_settings(
        going_on(run, "logger=wandb", "logger.name=other", "logger.save_dir=there")
    )
    assert (settings["logger"]["name"], settings["logger"]["save_dir"]) == ("other", "there")


@pytest.mark.parametrize("is_named", [True, False])
def test_a_run_that_a_process_trains_in_is_left_alone(
    folder: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    same = [*tiny_overrides(folder, tmp_path / "other"), *CHANCE, "resume=auto"]
    cfg = going_on(run) if is_named else compose("train", *same)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with begun(run), monkeypatch.context() as patch:
        patch.setattr("efficap.data.csv.read_table", lambda *_, **__: pytest.fail("data were prepared"))
        with pytest.raises(InputError, match=rf"^{run}: another process trains in it; wait for its end"):
            train(cfg)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert train(cfg) == run, "the other one is gone"


def test_a_signal_while_the_loaders_are_made_stops_the_training_too(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        made = TrainerData.val_dataloader
        patch.setattr(TrainerData, "val_dataloader", lambda data: (terminate(), made(data))[1])
        with pytest.raises(SystemExit) as stopped:
            train(compose("train", *tiny_overrides(folder, run), *CHANCE))
    assert stopped.value.code == 143
    assert_equal_runs(train(going_on(run)), undisturbed)


def test_pictures_that_came_since_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(folder, tmp_path / "colours")
    table = own / "captions.csv"
    whole = table.read_text()
    table.write_text("".join(line for line in whole.splitlines(True) if not line.startswith("train_7.jpg")))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 3, kill)
        with pytest.raises(KilledError):
            train(compose("train", *tiny_overrides(own, run), *CHANCE))
    table.write_text(whole)
    with pytest.warns(
        UserWarning, match=r"has 8 pictures and had 7 when this training was stopped: the rest"
    ):
        train(going_on(run))


def test_another_programs_folder_among_the_runs_is_passed_over(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("learning_rate: 1\n")
    (other / "metrics.json").write_text("{}")
    same = [*tiny_overrides(folder, tmp_path / "run"), "resume=auto"]
    config, _, resumed = resolved_settings(compose("train", *same))
    assert resumed is None
    assert config["output_dir"] == str(tmp_path / "run")


def test_a_run_goes_on_with_its_own_settings(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(
        InputError, match=r"optimizer.lr.encoder=1: resume=\S+ goes on with that run's own settings"
    ):
        train(going_on(run, "optimizer.lr.encoder=1"))
    with pytest.raises(InputError, match=r"trainer=gpu: .*; here it is trainer.accelerator=gpu$"):
        train(going_on(run, "trainer=gpu"))
    train(going_on(run, "trainer.max_epochs=5"))
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 5
    with pytest.raises(InputError, match=r"resume=nowhere does not exist"):
        train(going_on("nowhere"))


def test_a_run_goes_on_with_pictures_that_have_moved(
    folder: Path, stopped: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    moved = shutil.copytree(folder / "images", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train(going_on(run, "data.image_dir=moved"))
    assert RunDirectory(run).config["data"]["image_dir"] == str(moved)
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            ["+trainer.gradient_clip=1"],
            r"trainer.gradient_clip=1 is no setting of Lightning's Trainer here; nearest: gradient_clip_",
        ),
        (["checkpoint.every_steps=-1"], "checkpoint.every_steps=-1 must be above 0"),
        (["trainer.val_check_interval=500"], "trainer.val_check_interval=500 must be at most 4, the batches"),
        (["+callbacks.mine._target_=collections.OrderedDict"], "is no callback of Lightning's"),
        (["logger=csv", "+logger._target_=collections.OrderedDict"], "is no logger of Lightning's"),
    ],
)
def test_a_mistake_beside_resume_leaves_the_runs_settings_alone(
    stopped: Path, tmp_path: Path, mistake: list[str], message: str
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(InputError, match=message):
        train(going_on(run, *mistake))
    assert (run / "config.yaml").read_bytes() == (stopped / "config.yaml").read_bytes()


def test_a_finished_run_that_is_prolonged_is_not_finished_meanwhile(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    before = json.loads((run / "metrics.json").read_text())
    assert before["finished"]
    with monkeypatch.context() as patch:
        die_at(patch, "validation_step", 0, kill)
        with pytest.raises(KilledError):
            train(going_on(run, "trainer.max_epochs=3"))
    assert json.loads((run / "metrics.json").read_text()) == {**before, "finished": False}


def test_a_limit_below_what_a_run_has_come_to_is_refused_and_leaves_the_run_alone(undisturbed: Path) -> None:
    run = undisturbed
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    # Its last checkpoint is of before the second epoch's validation, after 8 steps.
    for below, least in (("trainer.max_epochs=1", 2), ("trainer.max_steps=7", 8)):
        with pytest.raises(
            InputError, match=rf"{below} must be at least {least}, as the training has come that far"
        ):
            train(going_on(run, below))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_wandb_goes_on_with_its_run_and_says_how_to_send_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = stopped_run(folder, tmp_path / "run", monkeypatch, "logger=wandb")
    before = set((run / "wandb").glob("offline-run-*/run-*.wandb"))
    train(going_on(run))
    after = set((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(before) == 1
    assert len(after) == 2, "offline, each process writes a file of its own"
    assert {file.name for file in after} == {file.name for file in before}, "of the same run"
    assert re.search(rf"wandb sync {run}/wandb/offline-run-", capsys.readouterr().out)


@pytest.mark.parametrize(("setting", "value"), [("every_minutes", "0"), ("every_steps", "-1")])
def test_an_interval_that_is_none_is_refused(folder: Path, tmp_path: Path, setting: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"checkpoint.{setting}={value} must be above 0"):
        train(compose("train", *tiny_overrides(folder, tmp_path / "run"), f"checkpoint.{setting}={value}"))


def test_processes_that_are_killed_or_asked_to_end(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The real thing: kill -9, then Ctrl-C, then to the end."""
    run = tmp_path / "run"

    def wait_for_checkpoint(process: Started, newer_than: float) -> None:
        file = run / "checkpoints" / LAST
        newest = 0.0
        while process.is_alive() and newest <= newer_than:
            time.sleep(0.002)
            with contextlib.suppress(FileNotFoundError):  # it has another name for a moment
                newest = file.stat().st_mtime

    first = Started("train.py", *tiny_overrides(folder, run), *CHANCE, f"hydra.run.dir={tmp_path / 'h'}")
    wait_for_checkpoint(first, 0)
    first.send(signal.SIGKILL)
    first.wait(120)
    before = max(file.stat().st_mtime for file in (run / "checkpoints").glob("*.ckpt"))
    again = ["train.py", f"resume={run}", f"hydra.run.dir={tmp_path / 'h2'}"]
    second = Started(*again)
    wait_for_checkpoint(second, before)
    second.send(signal.SIGINT)
    if second.wait(120) != 0:  # it may have been at its end
        assert second.status == 130
        assert f"stopped by SIGINT; python train.py resume={run} goes on" in second.errors
        assert "Traceback" not in second.errors
        assert Started(*again).wait(120) == 0
    assert_equal_runs(run, undisturbed)
