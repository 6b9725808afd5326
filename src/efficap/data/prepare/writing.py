"""What every prepared data set ends with: ``captions.parquet``, its counts, and the line to train with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from efficap.data.command_line import training_command
from efficap.data.formats import read_rows
from efficap.data.prepare.archives import unpack
from efficap.data.prepare.download import Remote, fetch
from efficap.data.text import cleaned
from efficap.errors import InputError
from efficap.files import unfinished


def extract(archive: Remote, folder: Path, members: Sequence[str]) -> list[Path]:
    """Have files of an archive in a folder, by their last names; it is only downloaded for those that are lacking."""
    files = [folder / member for member in members]
    lacking = [file.name for file in files if not file.is_file()]
    if lacking:
        [file] = fetch([archive], folder)
        unpack(file, folder, _by_name(set(lacking)))
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{folder / archive.name} holds no {file.name}; put that file into {folder} yourself"
            )
    return files


def _by_name(names: set[str]) -> Callable[[str], str | None]:
    def place(member: str) -> str | None:
        name = member.rpartition("/")[2]
        return name if name in names and not member.startswith("__MACOSX/") else None

    return place


def read_captions(table: Path | dict[str, Path], image_dir: Path) -> pd.DataFrame:
    """The rows of annotations as published: columns ``image``, ``caption``, ``split``, white space collapsed.

    Captions without a word, of which published sets have a few, are left out.
    """
    columns = {"image_column": "image", "caption_column": "caption", "split_column": "split"}
    rows = read_rows(table, image_dir=image_dir, **columns)
    rows["caption"] = rows["caption"].str.split().str.join(" ")
    return rows[rows["caption"].map(cleaned) != ""]


def lacking_pictures(rows: pd.DataFrame, image_dir: Path) -> list[str]:
    """Which of the pictures named in rows are not there; looks into each folder once, for there are 100,000s."""
    names = [str(name) for name in rows["image"].unique()]
    present: set[str] = set()
    for folder in {name.rpartition("/")[0] for name in names}:
        if (image_dir / folder).is_dir():
            prefix = f"{folder}/" if folder else ""
            present.update(f"{prefix}{entry.name}" for entry in os.scandir(image_dir / folder))
    return [name for name in names if name not in present]


def write_captions(rows: pd.DataFrame, folder: Path, image_dir: Path) -> Path:
    """Write ``captions.parquet`` with the columns ``file_name``, ``caption`` and ``split``; print counts and command.

    Raises:
        InputError: a picture is not there, or the table is, with other captions.
    """
    lacking = lacking_pictures(rows, image_dir)
    if lacking:
        raise InputError(
            f"{image_dir}: {len(lacking):,} of {rows['image'].nunique():,} pictures are not there, the first "
            f"is {lacking[0]}"
        )
    table = folder / "captions.parquet"
    rows = rows.rename(columns={"image": "file_name"}).reset_index(drop=True)
    if table.is_file() and pd.read_parquet(table).to_dict("list") != rows.to_dict("list"):
        raise InputError(
            f"{table} is there with other captions; rename it, or name another folder with --dir"
        )
    with unfinished(table) as temporary:
        rows.to_parquet(temporary, index=False)
    for split, part in rows.groupby("split", sort=False):
        print(f"{split:<6}{part['file_name'].nunique():>9,} pictures {len(part):>10,} captions")
    print(f"Train with:\n{training_command('csv', table=table, image_dir=image_dir)}")
    return table
