"""The pictures of a table that are left out, in a CSV beside it: the doctor writes it, training and shards go by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from efficap.data.table import image_id_of
from efficap.errors import InputError


def quarantine_file(table: Path) -> Path:
    """Where the list of a table lies: ``captions.csv`` has ``captions.quarantine.csv``."""
    return table.with_name(f"{table.stem}.quarantine.csv")


def own_quarantine(table: Path | Mapping[str, Path], split: str) -> Path | None:
    """The list beside the table that a split comes from; None where there is none."""
    file = quarantine_file(table if isinstance(table, Path) else table[split])
    return file if file.is_file() else None


def read_quarantine(file: Path) -> set[str]:
    """The image ids in a list.

    Raises:
        InputError: it cannot be read, or lacks the column.
    """
    try:
        return set(map(image_id_of, pd.read_csv(file, dtype=str, keep_default_na=False)["image"]))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"data.quarantine={file} is no CSV with a column image: {error}") from error
