"""A table of captions: which pictures there are, in which split, and what was said of each."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image, ImageOps
from rich.progress import track

from efficap.errors import InputError

NAMED = 10  # how many broken pictures an error names


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """The pictures of one split, each once, in the table's order.

    Attributes:
        split: its name in the table.
        image_ids: what the table calls each picture; unique.
        files: where each picture lies.
        references: every caption of each picture, white space collapsed.
    """

    split: str
    image_ids: list[str]
    files: list[Path]
    references: list[list[str]]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def captions(self) -> list[str]:
        """All captions, picture after picture."""
        return [caption for references in self.references for caption in references]


def read_table(
    table: Path, image_dir: Path, *, image_column: str, caption_column: str, split_column: str
) -> dict[str, CaptionTable]:
    """Read a CSV with a row for each caption into one `CaptionTable` a split.

    Args:
        table: the CSV, with a header.
        image_dir: what the picture names are relative to.
        image_column, caption_column, split_column: the columns' names.

    Raises:
        InputError: no such file, folder or column, no row, an empty cell, or a picture in two splits.
    """
    if not image_dir.is_dir():
        raise InputError(f"data.image_dir={image_dir} is no directory")
    columns = {"image": image_column, "caption": caption_column, "split": split_column}
    rows = _read_csv(table, columns)
    # Broken lines and odd white space inside a caption would otherwise reach tokenizer and scorer.
    rows["caption"] = rows["caption"].str.split().str.join(" ")
    for role in columns:
        empty = rows.index[rows[role] == ""]
        if len(empty):
            raise InputError(
                f"data.table={table}: {len(empty)} of {len(rows)} rows have an empty {columns[role]}, "
                f"the first in row {empty[0] + 2}; fill or delete them"
            )
    splits = rows.groupby("image", sort=False)["split"].nunique()
    twice = splits.index[splits > 1]
    if len(twice):
        raise InputError(f"data.table={table}: {twice[0]} is in two splits ({len(twice)} such pictures)")
    return {
        str(split): _group(str(split), part, image_dir) for split, part in rows.groupby("split", sort=False)
    }


def _read_csv(table: Path, columns: dict[str, str]) -> pd.DataFrame:
    if not table.is_file():
        raise InputError(f"data.table={table} does not exist")
    try:
        rows = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.table={table} cannot be read as a CSV in UTF-8: {error}") from error
    for role, column in columns.items():
        if column not in rows.columns:
            raise InputError(
                f"data.table={table} has no column {column!r}, only {', '.join(map(repr, rows.columns))}; "
                f"name it with data.{role}_column=NAME"
            )
    if rows.empty:
        raise InputError(f"data.table={table} has a header but no rows")
    return pd.DataFrame({role: rows[column].str.strip() for role, column in columns.items()})


def _group(split: str, rows: pd.DataFrame, image_dir: Path) -> CaptionTable:
    captions = rows.groupby("image", sort=False)["caption"].agg(list)
    image_ids = [str(image_id) for image_id in captions.index]
    return CaptionTable(split, image_ids, [image_dir / image_id for image_id in image_ids], captions.tolist())


def check_images(files: list[Path]) -> None:
    """Decode every picture, JPEGs at an eighth of their size, so that a broken one is known before training.

    Raises:
        InputError: names the first ten that are missing or unreadable, and their number.
    """
    reasons = [reason for reason in _in_threads(_why_unreadable, files, "Checking pictures") if reason]
    if reasons:
        more = f" and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        raise InputError(
            f"{len(reasons)} of {len(files)} pictures are missing or unreadable: "
            f"{'; '.join(reasons[:NAMED])}{more}. Mend them or delete their rows"
        )


def _why_unreadable(file: Path) -> str | None:
    if not file.is_file():
        return f"{file} (missing)"
    try:
        with Image.open(file) as image:
            image.draft("RGB", (image.width // 8, image.height // 8))
            ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # of many kinds, by format and damage
        return f"{file} ({error})"
    return None


def _in_threads(
    function: Callable[[Path], str | None], files: list[Path], description: str
) -> Iterator[str | None]:
    with ThreadPoolExecutor() as threads:
        yield from track(threads.map(function, files), description, total=len(files), transient=True)
