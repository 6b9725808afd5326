"""Lightning's Trainer as a training needs it: checked settings, callbacks, and none of its chatter."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import re
import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from efficap.commands.placement import used_precision
from efficap.commands.processes import strategy_settings
from efficap.data.caption_data import CaptionData
from efficap.errors import InputError
from efficap.training.bad_steps import BadSteps
from efficap.training.callbacks import BestCheckpoint, ProgressBar, SampleCaptions
from efficap.training.ema import ExponentialMovingAverage
from efficap.training.resume_point import ResumePoint
from efficap.training.run_metrics import RunMetrics

_PRECISIONS = (None, "32-true", "bf16-mixed", "16-mixed")  # the weights stay float32
# What the Trainer can be told, but for what a training tells it itself.
_SETTINGS = signature(pl.Trainer).parameters.keys() - {
    "default_root_dir",
    "logger",
    "callbacks",
    "num_sanity_val_steps",
    "use_distributed_sampler",
    "enable_model_summary",
}


def leave_out_lightnings_chatter() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Hydra's files, a resumed run
    warnings.filterwarnings("ignore", message=".*irectory .* exists and is not empty")
    # Lightning's own, under torch 2.15
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # the data module counts
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start")  # a frozen encoder, SCST
    # what is logged is of all processes already
    warnings.filterwarnings("ignore", message=".*sync_dist=True")
    # no shards
    warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides")
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # data.num_workers chooses


def check_trainer(trainer: dict[str, Any]) -> None:
    """Check what Lightning would only use later, and what it is not asked for.

    Raises:
        InputError: a setting that the Trainer does not have, a time or a number of batches that is none, a precision
            whose weights are not float32, or another way of clipping.
    """
    _check_names(trainer)
    for key, null in (
        ("max_time", "no limit"),
        ("val_check_interval", "the end of each epoch"),
        ("limit_train_batches", "all"),
    ):
        value = trainer.get(key)  # runs from before it was a setting lack it
        if isinstance(value, str) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value):
            raise InputError(f"trainer.{key}={value} must be DD:HH:MM:SS, as 00:08:00:00 for eight hours")
        if value is not None and not re.search("[1-9]", str(value)):
            raise InputError(f"trainer.{key}={value} must be above 0; null: {null}")
    _check_interval(trainer)
    if trainer["precision"] not in _PRECISIONS:
        raise InputError(
            f"trainer.precision={trainer['precision']} must be {', '.join(filter(None, _PRECISIONS))}, or null for "
            "bf16-mixed on a GPU that has it and 32-true elsewhere"
        )
    if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        raise InputError(
            f"trainer.gradient_clip_algorithm={trainer['gradient_clip_algorithm']}: leave it out; "
            "trainer.gradient_clip_val clips the norm, optimizer.clip_value each element"
        )


def _check_names(trainer: dict[str, Any]) -> None:
    for key in trainer.keys() - _SETTINGS:
        near = difflib.get_close_matches(str(key), sorted(_SETTINGS), n=3, cutoff=0.6)
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        raise InputError(f"trainer.{key}={trainer[key]} is no setting of Lightning's Trainer here{nearest}")


def _check_interval(trainer: dict[str, Any]) -> None:
    interval = trainer.get("val_check_interval")
    if not isinstance(interval, float):
        return
    if interval > 1:
        raise InputError(
            f"trainer.val_check_interval={interval} must be a whole number of batches, or a share of an epoch up to 1.0"
        )
    if trainer.get("check_val_every_n_epoch", 1) is None:
        raise InputError(
            f"trainer.val_check_interval={interval} is a share of an epoch, and trainer.check_val_every_n_epoch=null "
            "counts batches over the whole training; give a whole number of them"
        )


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Let settings of the Trainer that do not fit the number of batches, which it learns last, be an `InputError`."""
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        said = " ".join(str(error).split())
        if found := re.search(r"`val_check_interval` \((\d+)\) must be .* training batches \((\d+)\)", said):
            raise InputError(
                f"trainer.val_check_interval={found[1]} must be at most {found[2]}, the batches of an epoch; null: the "
                "end of each epoch; trainer.check_val_every_n_epoch=null counts batches over the whole training"
            ) from error
        if found := re.search(r"to check (\S+) of the `(\w+)_dataloader` but \S+ \* (\d+) < 1", said):
            raise InputError(
                f"trainer.limit_{found[2]}_batches={found[1]} of {found[3]} batches is none; give a larger share, or a "
                "whole number of batches"
            ) from error
        raise


def build_trainer(
    settings: dict[str, Any],
    loggers: list[Logger],
    callbacks: list[Callback],
    run_dir: Path,
    *,
    first_step: int,
    some_rest: bool,
) -> pl.Trainer:
    """The trainer of a stage, which counts its own steps; loggers are told those of the stages before, too.

    Args:
        some_rest: whether some parameters that learn do not do so in each step.
    """
    settings = dict(settings)
    settings["precision"] = used_precision(settings)
    settings |= strategy_settings(settings.get("strategy"), some_rest=some_rest)
    if settings["enable_progress_bar"]:
        callbacks = [*callbacks, ProgressBar()]
    try:
        trainer = pl.Trainer(
            **settings,
            default_root_dir=run_dir,
            logger=loggers,
            callbacks=callbacks,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the loaders share themselves out
            enable_model_summary=False,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise InputError(f"trainer: Lightning does not take these settings: {error}") from error
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = first_step
    # Before each batch Lightning's waits for the device, to tell of a signal that `ResumePoint` hears in its place.
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _callback(name: str, settings: dict[str, Any]) -> Callback:
    callback = instantiate(settings)
    if not isinstance(callback, Callback):
        raise InputError(
            f"callbacks.{name}={settings} is no callback of Lightning's: name its class with callbacks.{name}._target_"
        )
    return callback


def build_callbacks(
    cfg: dict[str, Any], run_dir: Path, data: CaptionData, metrics: RunMetrics
) -> list[Callback]:
    stage, pictures = metrics.stage, functools.partial(data.picture, "val")
    callbacks = [_callback(name, settings) for name, settings in cfg["callbacks"].items() if settings]
    resume_point = ResumePoint(run_dir, stage, seed=cfg["seed"], **cfg["checkpoint"])
    limit = cfg["training"].get("max_bad_steps")  # runs from before it was a setting lack it
    bad_steps = BadSteps(run_dir, metrics, resume_point, max_bad_steps=limit)
    if cfg["training"]["ema_decay"] is not None:
        callbacks.append(ExponentialMovingAverage(cfg["training"]["ema_decay"]))
    return [
        *callbacks,
        bad_steps,
        metrics,
        SampleCaptions(run_dir, pictures, first_step=stage.steps),
        resume_point,  # after what counts the step
        BestCheckpoint(run_dir),
    ]
