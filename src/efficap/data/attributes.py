"""What a table says of its pictures besides captions and splits: a domain to score by, COCO's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from efficap.data.coco import read_pictures
from efficap.data.formats import read_text_columns
from efficap.data.table import image_id_of
from efficap.errors import InputError

Table = Path | Mapping[str, Path]


def read_attribute(table: Table, image_dir: Path, name: str, image_column: str) -> dict[str, str]:
    """The value of a column for each picture of a table, or in JSON of that key of the pictures' entries.

    Args:
        table: a CSV, TSV, Parquet or JSON file that `formats.read_rows` reads, or one for each split.
        image_dir: what the picture names are relative to.
        name: of the column or key, such as nocaps' ``domain``.
        image_column: the column of the picture names.

    Returns:
        Image id -> the value as text, stripped; "" where there is none.

    Raises:
        InputError: no such column or key, a list in it, or two values for one picture.
    """
    values: dict[str, str] = {}
    for file in _files(table):
        for image_id, value in _pairs(file, image_dir, name, image_column):
            if not pd.api.types.is_scalar(value):
                raise InputError(
                    f"data.table={file}: {name} of {image_id} is a list or an object; by= takes what has one value for "
                    "each picture"
                )
            text = "" if pd.isna(value) else str(value).strip()
            if values.setdefault(image_id, text) != text:
                raise InputError(
                    f"data.table={file}: {image_id} has two values of {name}, {values[image_id]!r} and {text!r}; "
                    "give a picture one"
                )
    return values


def coco_ids(table: Table, image_dir: Path) -> dict[str, int]:
    """The numbers that COCO, or a set in its format, gives its pictures; of other tables nothing.

    They stand in COCO's JSON as ``id`` and in Karpathy's as ``cocoid``.
    """
    numbers: dict[str, int] = {}
    for file in _files(table):
        if file.suffix.lower() != ".json":
            continue
        for path, entry in read_pictures(f"data.table={file}", file, image_dir):
            number = entry.get("cocoid", entry.get("id") if "file_name" in entry else None)
            if isinstance(number, int):
                numbers[image_id_of(path)] = number
    return numbers


def _files(table: Table) -> list[Path]:
    return list(table.values()) if isinstance(table, Mapping) else [table]


def _pairs(file: Path, image_dir: Path, name: str, image_column: str) -> list[tuple[str, Any]]:
    setting = f"data.table={file}"
    if file.suffix.lower() == ".json":
        entries = read_pictures(setting, file, image_dir)
        known = sorted({key for _, entry in entries for key in entry})
        if name not in known:
            raise InputError(f"{setting}: no picture has a key {name!r}; there are {', '.join(known)}")
        return [(image_id_of(path), entry.get(name)) for path, entry in entries]
    if file.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        raise InputError(f"{setting} has no columns, and so no {name!r}; CSV, TSV, Parquet and JSON have")
    rows = pd.read_parquet(file) if file.suffix.lower() == ".parquet" else read_text_columns(file)
    if name not in rows:
        raise InputError(
            f"{setting} has no column {name!r}, only {', '.join(map(repr, map(str, rows.columns)))}"
        )
    return list(zip(map(image_id_of, rows[image_column].astype(str)), rows[name], strict=True))
