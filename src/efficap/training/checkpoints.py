"""Checkpoints to go on from, as files: which is whole, and what is in it."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficap.data.caption_data import CaptionData
from efficap.errors import InputError
from efficap.training.stage import Stage
from efficap.training.trainer_data import TrainerData

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def checkpoint_of(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run; a damaged one is passed over with a warning.

    Raises:
        InputError: there is none.
    """
    for name in (LAST, PREVIOUS):
        file = run_dir / "checkpoints" / name
        if file.is_file():
            reason = damage(file)
            if not reason:
                return file
            warnings.warn(f"{file} is {reason}; going on from the one before", stacklevel=1)
    raise InputError(
        f"resume={run_dir} holds no whole checkpoint to go on from; "
        f"init_from={run_dir} starts a new training from its weights"
    )


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint's content. It may come from anywhere: of a pickle that is a program, nothing is run.

    Raises:
        InputError: it is damaged, holds more than plain values and tensors, or is no checkpoint of a training.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and more
        raise InputError(
            f"{file} is damaged, or holds more than plain values and tensors and is not trusted; init_from=RUN starts "
            "a new training from a run's weights"
        ) from error
    for name in ("state_dict", "callbacks", "loops", "optimizer_states", "lr_schedulers"):
        if not isinstance(content, dict) or not isinstance(content.get(name), dict | list):
            raise InputError(f"{file} is no checkpoint of a training: it has no {name}")
    if not isinstance(content["callbacks"].get("RunMetrics"), dict):
        raise InputError(f"{file} is no checkpoint of efficap: it has no RunMetrics")
    return content


def stage_of(checkpoint: Path) -> Stage:
    """The stage that a checkpoint was written in."""
    # from before there were stages
    found = read_checkpoint(checkpoint)["callbacks"]["RunMetrics"].get("stage", {})
    try:
        return Stage(**found)
    except TypeError as error:
        raise InputError(f"{checkpoint} was written by another version: {error}") from error


def data_state(checkpoint: Path, data: CaptionData) -> dict[str, Any] | None:
    """`CaptionData.state_dict` as it was; None where it was not kept yet.

    Lightning itself restores it after the loaders are made, where weights are in shards.
    """
    content = read_checkpoint(checkpoint)
    found: dict[str, Any] | None = content.get(TrainerData.__qualname__)
    return found or content.get(type(data).__qualname__)  # where earlier versions kept it


def captioners_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The captioner's weights in a checkpoint; where there is an average, the averaged ones."""
    weights: dict[str, Tensor] = read_checkpoint(checkpoint)["state_dict"]
    return {name.removeprefix("captioner."): value for name, value in weights.items()}


def damage(file: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch's format is a zip, with a checksum for each tensor
    except (OSError, zipfile.BadZipFile) as error:
        return f"no whole file ({error})"
    return f"damaged at {damaged}" if damaged else ""
