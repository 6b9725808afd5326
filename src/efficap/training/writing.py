"""What a training writes to a disk that may be full: later once more, or, at its end, not at all."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from efficap.errors import InputError


@contextlib.contextmanager
def only_warning(what: str) -> Iterator[None]:
    """What is there to look at, or is written again after the next validation, must not end a training."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} could not be written, training goes on: {error}", stacklevel=3)


@contextlib.contextmanager
def or_the_end(what: str, run_dir: Path) -> Iterator[None]:
    """Raises InputError where there is no later time to write something."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{what} could not be written at the end: {error}; make room, and resume={run_dir} goes on from the last "
            "checkpoint"
        ) from error
