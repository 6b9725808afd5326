"""The weights file of a run directory."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from efficap.errors import InputError
from efficap.files import unfinished

WEIGHTS_FILE = "model.safetensors"


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights of a safetensors file.

    Raises:
        InputError: it does not exist or is damaged.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    try:
        return dict(load_file(file))
    except Exception as error:  # kinds of its own, and torch's
        raise InputError(f"{file} is damaged or no safetensors file ({error})") from error


def save_weights(weights: dict[str, Tensor], run_dir: Path) -> None:
    """Write a captioner's weights to its run directory; a reader sees the old file or the new one, whole."""
    for leftover in run_dir.glob(f".{WEIGHTS_FILE}.*.tmp"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    with unfinished(run_dir / WEIGHTS_FILE) as file:
        save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, file)
        umask = os.umask(0)
        os.umask(umask)
        file.chmod(0o666 & ~umask)  # safetensors writes it for its owner alone
