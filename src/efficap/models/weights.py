"""The weights file of a run directory."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from efficap.errors import InputError

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
    file = run_dir / WEIGHTS_FILE
    temporary = file.with_suffix(".tmp")
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, temporary)
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # safetensors writes it for its owner alone
    os.replace(temporary, file)
