"""Checkpoints to go on from, as files: which is whole, and what is in it."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of its training; the tensors stay in the file.

    Attributes:
        file: it.
        stage: that it was written in.
        epoch, global_step: how far that had come.
        validation_due: whether a validation was about to begin, which is still to come.
        data_state: `CaptionData.state_dict` as it was, to be loaded before there are loaders.
    """

    file: Path
    stage: Stage
    epoch: int
    global_step: int
    validation_due: bool
    data_state: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """All but the tensors of a file.

        Raises:
            InputError: it is damaged, holds more than plain values and tensors, or is no checkpoint of a training.
        """
        content = _content(file)
        callbacks = content["callbacks"]
        for name in ("RunMetrics", "ResumePoint"):
            if not isinstance(callbacks.get(name), dict):
                raise InputError(f"{file} is no checkpoint of efficap: it has no {name}")
        try:
            return cls(
                file,
                Stage(**callbacks["RunMetrics"]["stage"]),
                int(content["epoch"]),
                int(content["global_step"]),
                bool(callbacks["ResumePoint"]["validation_due"]),
                dict(content[TrainerData.__qualname__]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file} was written by another version: {error}") from error

    def captioners_weights(self) -> dict[str, Tensor]:
        """The captioner's weights; where there is an average, the averaged ones."""
        weights: dict[str, Tensor] = _content(self.file)["state_dict"]
        return {name.removeprefix("captioner."): value for name, value in weights.items()}


def _content(file: Path) -> dict[str, Any]:
    """All of it. It may come from anywhere: of a pickle that is a program, nothing is run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and more
        raise InputError(
            f"{file} is damaged, or holds more than plain values and tensors and is not trusted; init_from=RUN starts "
            "a new training from a run's weights"
        ) from error
    kinds = {
        "state_dict": dict,
        "callbacks": dict,
        "loops": dict,
        "optimizer_states": list,
        "lr_schedulers": list,
    }
    for name, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise InputError(f"{file} is no checkpoint of a training: it has no {name}")
    return content


def damage(file: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch's format is a zip, with a checksum for each tensor
    except (OSError, zipfile.BadZipFile) as error:
        return f"no whole file ({error})"
    return f"damaged at {damaged}" if damaged else ""
