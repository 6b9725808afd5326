"""A step whose loss or gradients are not finite leaves no trace but a count; where they do not end, training does."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS, compose, going_on, tiny_overrides, write_colour_table
from lightning.pytorch.plugins.precision import MixedPrecision
from PIL import Image
from test_resume import CHANCE, assert_equal_runs, die_at, kill
from torch import Tensor

from efficap.commands.train import train
from efficap.errors import InputError
from efficap.models.encoder import ImageEncoder
from efficap.training.bad_steps import BatchNormStatistics
from efficap.training.checkpoints import LAST, checkpoint_of
from efficap.training.module import CaptionModule
from efficap.training.self_critical import SelfCriticalModule

pytestmark = pytest.mark.slow
WORDS_IN_CAPTIONS = [*WORDS, "a", "picture", "all", "of", "it", "is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("bad_steps") / "colours")


def spoil(
    monkeypatch: pytest.MonkeyPatch, *steps: int, pictures: bool = True, gradients: float = 1.0
) -> None:
    """Let the pixels of these steps be NaN, which BatchNorm's statistics take up; or their gradients `gradients`."""
    running: list[int] = []
    for module in (CaptionModule, SelfCriticalModule):
        if "training_step" in vars(module):
            monkeypatch.setattr(module, "training_step", _noting(module.training_step, running))
    real_forward, real_backward = ImageEncoder.forward, CaptionModule.backward

    def forward(self: ImageEncoder, images: Tensor) -> Tensor:
        spoiled = pictures and running and running[-1] in steps
        return real_forward(self, images * math.nan if spoiled else images)

    def backward(self: CaptionModule, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        real_backward(self, loss, *args, **kwargs)
        if not pictures and self.global_step in steps:
            next(p for p in self.captioner.decoder.parameters()).grad.fill_(gradients)  # type: ignore[union-attr]

    monkeypatch.setattr(ImageEncoder, "forward", forward)
    monkeypatch.setattr(CaptionModule, "backward", backward)


def _noting(real: Callable[..., Tensor], running: list[int]) -> Callable[..., Tensor]:
    def training_step(self: CaptionModule, *args: Any) -> Tensor:
        is_first = args[1] % self.trainer.accumulate_grad_batches == 0  # of those that make up a step
        running.append(self.global_step if is_first else -1)
        try:
            return real(self, *args)
        finally:
            running.pop()

    return training_step


def take_back(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let these steps be done and undone, by whole copies: what leaving them out must come to."""

    weights: dict[str, Tensor] = {}

    def on_train_batch_start(self: CaptionModule, batch: Any, number: int) -> None:
        if number % self.trainer.accumulate_grad_batches == 0:
            weights.update(copy.deepcopy(self.state_dict()))

    def optimizer_step(self: CaptionModule, epoch: int, batch: int, optimizer: Any, closure: Any) -> None:
        if self.global_step not in steps:
            optimizer.step(closure=closure)
            return
        inner = optimizer.optimizer
        state = copy.deepcopy(inner.state_dict())
        optimizer.step(closure=closure)
        self.load_state_dict(weights)
        for values in inner.state.values():
            values.clear()
        inner.load_state_dict(state)

    monkeypatch.setattr(CaptionModule, "on_train_batch_start", on_train_batch_start)
    monkeypatch.setattr(CaptionModule, "optimizer_step", optimizer_step)


def state_of(run: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint: weights, average, statistics, optimiser."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            for key, below in value.items() if isinstance(value, dict) else enumerate(value):
                walk(below, f"{name}/{key}")

    checkpoint = torch.load(checkpoint_of(run), weights_only=True)
    walk({key: checkpoint[key] for key in checkpoint if key not in ("callbacks", "loops")}, "")
    return found


def assert_equal_states(run: Path, expected: Path) -> None:
    ours, theirs = state_of(run), state_of(expected)
    assert ours.keys() == theirs.keys()
    assert any("running_var" in name for name in ours)
    assert any("exp_avg_sq" in name for name in ours)
    differing = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not differing
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        ({}, ["training.ema_decay=0.9"]),
        ({}, ["trainer.accumulate_grad_batches=2", "training.ema_decay=0.9"]),
        ({"pictures": False, "gradients": math.inf}, ["training.ema_decay=0.9", "optimizer.clip_value=0.1"]),
        (
            {"pictures": False, "gradients": math.nan},
            ["training.ema_decay=0.9", "trainer.gradient_clip_val=null"],
        ),
        ({}, ["training.ema_decay=0.9", "optimizer=muon"]),
    ],
)
def test_a_bad_step_is_as_one_that_was_taken_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], overrides: list[str]
) -> None:
    command = [*CHANCE, "trainer.max_epochs=2", "trainer.max_steps=4", *overrides]
    with monkeypatch.context() as patch:
        spoil(patch, 0, 2, **how)
        with pytest.warns(UserWarning, match="left out so far: 2, the last of them step 2"):
            run = train(compose("train", *tiny_overrides(folder, tmp_path / "run"), *command))
    with monkeypatch.context() as patch:
        take_back(patch, 0, 2)
        expected = train(compose("train", *tiny_overrides(folder, tmp_path / "expected"), *command))
    assert_equal_states(run, expected)
    log = pd.read_csv(run / "metrics.csv")["train/bad_steps"].dropna()
    assert log.iloc[0] == 1
    assert log.iloc[-1] == json.loads((run / "metrics.json").read_text())["bad_steps"] == 2
    assert json.loads((expected / "metrics.json").read_text())["bad_steps"] == 0


def test_self_critical_training_leaves_bad_steps_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(compose("train", *tiny_overrides(folder, tmp_path / "first"), "trainer.max_epochs=1"))
    data = [o for o in tiny_overrides(folder, tmp_path) if not o.startswith(("model", "output_dir"))]
    command = [*data, "training=scst", f"init_from={first}", "trainer.max_epochs=2"]
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        with pytest.warns(UserWarning, match="left out so far: 1"):
            run = train(compose("train", *command, f"output_dir={tmp_path / 'run'}"))
    with monkeypatch.context() as patch:
        take_back(patch, 1)
        expected = train(compose("train", *command, f"output_dir={tmp_path / 'expected'}"))
    assert_equal_states(run, expected)


def test_scaled_losses_leave_bad_steps_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 with loss scaling, which is for GPUs; its parts compute on a CPU, too."""
    real = pl.Trainer

    def in_float16(**settings: Any) -> pl.Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        settings |= {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        return real(**settings)

    monkeypatch.setattr("efficap.commands.trainer.pl.Trainer", in_float16)
    command = [*CHANCE, "trainer.max_epochs=2"]
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        with pytest.warns(UserWarning, match="left out so far: 1"):
            run = train(compose("train", *tiny_overrides(folder, tmp_path / "run"), *command))
    state = state_of(run)
    assert all(value.isfinite().all() for value in state.values())
    counts = {int(value) for name, value in state.items() if name.endswith("/step")}
    assert counts == {7}, "optimiser steps of the eight that were taken"


def test_a_training_with_bad_steps_goes_on_exactly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*CHANCE, "checkpoint.every_steps=1", "training.max_bad_steps=3"]
    with monkeypatch.context() as patch:
        spoil(patch, 4, 5, 7)
        with pytest.warns(UserWarning, match="left out so far: 3"):
            whole = train(compose("train", *tiny_overrides(folder, tmp_path / "whole"), *command))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, 4, 5, 7)
        die_at(patch, "training_step", 6, kill)  # after two of them
        with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="left out so far: 2"):
            train(compose("train", *tiny_overrides(folder, run), *command))
    with monkeypatch.context() as patch:
        spoil(patch, 4, 5, 7)
        with pytest.warns(UserWarning, match="left out so far: 3"):
            train(going_on(run))
    assert_equal_runs(run, whole)
    assert_equal_states(run, whole)


def test_bad_steps_at_the_very_end_fail_the_training_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    last = ["trainer.max_steps=6", "trainer.log_every_n_steps=100", "trainer.limit_val_batches=0"]
    with monkeypatch.context() as patch:
        spoil(patch, 4, 5)
        with (
            pytest.warns(UserWarning, match="so far: 2"),
            pytest.raises(InputError, match="2 steps in a row"),
        ):
            train(compose("train", *tiny_overrides(folder, run), *CHANCE, "training.max_bad_steps=2", *last))
    metrics = run / "metrics.json"
    assert not (metrics.is_file() and json.loads(metrics.read_text())["finished"])


@pytest.mark.parametrize("first", [1, 3])  # in mid-epoch, and across its end
def test_bad_steps_that_do_not_end_stop_the_training_and_leave_the_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    run, last = tmp_path / "run", first + 1
    command = [
        *CHANCE,
        "training.max_bad_steps=2",
        "checkpoint.every_steps=null",
        "trainer.log_every_n_steps=4",
    ]
    given: dict[int, Any] = {}
    with monkeypatch.context() as patch:
        spoil(patch, first, last)
        noted = CaptionModule.on_train_batch_start

        def note(self: CaptionModule, batch: Any, number: int) -> None:
            given[self.global_step] = batch
            noted(self, batch, number)

        patch.setattr(CaptionModule, "on_train_batch_start", note)
        with (
            pytest.warns(UserWarning, match="left out so far: "),
            pytest.raises(
                InputError, match=rf"2 steps in a row, the last of them step {last}, had no finite"
            ) as error,
        ):
            train(compose("train", *tiny_overrides(folder, run), *command))
    assert f"resume={run}" in str(error.value)
    samples = json.loads((run / "bad_batch" / "batch_0.json").read_text())
    batch = given[last]
    assert [sample["image_id"] for sample in samples] == batch.image_ids
    for place, sample in enumerate(samples):
        pixels = np.asarray(Image.open(run / "bad_batch" / sample["picture"]))
        assert np.array_equal(pixels, batch.images[place].permute(1, 2, 0).numpy())
        assert sample["tokens"] == [
            ids[:length]
            for ids, length in zip(batch.tokens[place].tolist(), batch.lengths[place].tolist(), strict=True)
        ]
        assert all(word in WORDS_IN_CAPTIONS for word in sample["captions"][0].split())
    assert (run / "checkpoints" / LAST).is_file()
    assert all(value.isfinite().all() for value in state_of(run).values())
    train(going_on(run))
    assert json.loads((run / "metrics.json").read_text())["finished"]


def test_too_many_bad_steps_is_a_count(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training.max_bad_steps=0 must be at least 1; null: no limit"):
        train(compose("train", *tiny_overrides(folder, tmp_path / "run"), "training.max_bad_steps=0"))


def test_statistics_are_put_back_only_where_asked() -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    for bad in (True, False):
        before = copy.deepcopy(layer.state_dict())
        statistics = BatchNormStatistics(layer)
        layer(torch.randn(2, 3, 5, 5))
        after = copy.deepcopy(layer.state_dict())
        statistics.put_back_where(torch.tensor(bad))
        expected = before if bad else after
        assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())
        assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
