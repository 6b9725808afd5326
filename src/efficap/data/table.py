"""A table of captions: which pictures there are, in which split, and what was said of each."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa

from efficap.data.formats import read_rows
from efficap.data.text import CaptionText, cleaned
from efficap.errors import InputError


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """The pictures of one split, each once, in the table's order.

    The rows are an Arrow table: a few flat arrays however many captions there are, which loader processes share.

    Attributes:
        split: its name in the table.
        rows: ``image_id`` (what the table calls a picture; unique), ``file`` (where it lies) and ``references`` (all
            its captions, cleaned).
    """

    split: str
    rows: pa.Table

    @classmethod
    def of(
        cls, split: str, image_ids: list[str], files: list[Path], references: list[list[str]]
    ) -> CaptionTable:
        columns = {
            "image_id": pa.array(image_ids, pa.large_string()),
            "file": pa.array([str(file) for file in files], pa.large_string()),
            "references": pa.array(references, pa.large_list(pa.large_string())),
        }
        return cls(split, pa.table(columns))

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def image_ids(self) -> list[str]:
        return self.rows["image_id"].to_pylist()

    @property
    def files(self) -> list[Path]:
        return [Path(file) for file in self.rows["file"].to_pylist()]

    @property
    def references(self) -> list[list[str]]:
        return self.rows["references"].to_pylist()

    @property
    def captions(self) -> list[str]:
        """All captions, picture after picture."""
        return self.rows["references"].combine_chunks().flatten().to_pylist()

    def without(self, image_ids: set[str]) -> CaptionTable:
        """The same table without some of its pictures."""
        keep = [image_id not in image_ids for image_id in self.image_ids]
        return CaptionTable(self.split, self.rows.filter(pa.array(keep)).combine_chunks())


@dataclass(frozen=True, slots=True)
class EmptyCaption:
    """A row without a caption: which picture of which split, and which of the table's rows (the first is 1)."""

    image_id: str
    split: str
    row: int


def read_table(
    table: Path | Mapping[str, Path],
    image_dir: Path,
    *,
    image_column: str,
    caption_column: str | None,
    split_column: str,
    text: CaptionText | None = None,
    allow_absolute: bool = False,
    require_captions: bool = True,
) -> tuple[dict[str, CaptionTable], list[EmptyCaption]]:
    """Read a table of any known form into one `CaptionTable` a split.

    Args:
        table: what `formats.read_rows` knows, or a file for each split.
        image_dir: what the picture names are relative to.
        image_column, caption_column, split_column: the columns' names, where the form has columns.
        text: cleans the captions; None: white space alone is collapsed, of captions that are not empty once cleaned.
        allow_absolute: whether pictures may lie outside `image_dir`, by their names or by links.
        require_captions: False: a picture without captions stays, with no references.

    Returns:
        The tables by split, and the rows whose caption is empty, which they leave out where captions are required.

    Raises:
        InputError: no such file, folder or column, no row, not one caption, an empty name or split, a picture outside
            `image_dir`, in two splits, or named like another but for its case.
    """
    if not image_dir.is_dir():
        raise InputError(f"data.image_dir={image_dir} is no directory")
    rows = read_rows(
        table,
        image_dir=image_dir,
        image_column=image_column,
        caption_column=caption_column,
        split_column=split_column,
    )
    rows["image"], rows["split"] = rows["image"].str.strip(), rows["split"].str.strip()
    for role, column in (("image", image_column), ("split", split_column)):
        if (rows[role] == "").any():
            empty = rows.index[rows[role] == ""]
            raise InputError(
                f"data.table={table}: {len(empty)} of {len(rows)} rows have an empty {column}, "
                f"the first is row {empty[0] + 1}; fill or delete them"
            )
    clean = text.clean if text is not None else _collapse
    rows["caption"] = [clean(caption) for caption in rows["caption"]]
    names = {name: _checked_name(name, table, allow_absolute) for name in rows["image"].unique()}
    rows["image"] = rows["image"].map(names)
    _check_names(rows, table)
    if not allow_absolute:
        _check_links(rows["image"].unique(), image_dir, table)
    if not require_captions:
        return _by_split(rows, image_dir), []
    full = rows[rows["caption"] != ""]
    if full.empty:
        raise InputError(
            f"data.table={table} has {rows['image'].nunique():,} pictures and not one caption; eval.py captions such a "
            "table without scores: metrics=[]"
        )
    bare = rows[rows["caption"] == ""]
    numbers = (bare.index + 1).tolist()
    return _by_split(full, image_dir), list(map(EmptyCaption, bare["image"], bare["split"], numbers))


def _by_split(rows: pd.DataFrame, image_dir: Path) -> dict[str, CaptionTable]:
    return {
        str(split): _group(str(split), part, image_dir) for split, part in rows.groupby("split", sort=False)
    }


def _collapse(caption: str) -> str:
    # Shards keep what comes of it and are cleaned as they are read: twice, "&amp;lt;" would become "<".
    return " ".join(caption.split()) if cleaned(caption) else ""


def image_id_of(name: str) -> str:
    """The id of the picture that a table calls `name`."""
    return posixpath.normpath(name.strip().replace(os.sep, "/"))


def _checked_name(name: str, table: object, allow_absolute: bool) -> str:
    normal = image_id_of(name)
    if "\0" in normal:
        raise InputError(f"data.table={table}: {name!r:.100} has a NUL, which no file's name has")
    if not allow_absolute and normal.partition("/")[0] in ("", ".."):
        raise InputError(
            f"data.table={table}: {name} lies outside data.image_dir; data.allow_absolute=true reads it all the same"
        )
    return normal


def _check_links(names: Iterable[str], image_dir: Path, table: object) -> None:
    """Raises InputError where a link leads a picture out of its folder, which an unpacked archive may have brought."""
    root = os.path.realpath(image_dir)
    inside: dict[str, bool] = {}  # folders
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in inside:
            inside[folder] = _is_inside(os.path.realpath(os.path.join(root, folder)), root)
        path = os.path.join(root, folder, file)
        if not inside[folder] or (os.path.islink(path) and not _is_inside(os.path.realpath(path), root)):
            raise InputError(
                f"data.table={table}: {name} is a link out of data.image_dir={image_dir}; data.allow_absolute=true "
                "reads it all the same"
            )


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


def _check_names(rows: pd.DataFrame, table: object) -> None:
    splits = rows.groupby("image", sort=False)["split"].nunique()
    twice = splits.index[splits > 1]
    if len(twice):
        raise InputError(
            f"data.table={table}: {twice[0]} is in two splits ({len(twice)} such pictures); delete one of the two"
        )
    folded = pd.Series(splits.index).str.normalize("NFC").str.casefold()
    alike = folded.index[folded.duplicated(keep=False)]
    if len(alike):
        first, other = splits.index[alike[folded[alike] == folded[alike[0]]][:2]]
        raise InputError(
            f"data.table={table}: {first} and {other} differ only in case, or in how an accent is written, and on many "
            "disks are one file; rename one"
        )


def _group(split: str, rows: pd.DataFrame, image_dir: Path) -> CaptionTable:
    captions = rows.groupby("image", sort=False)["caption"].agg(
        lambda texts: [text for text in texts if text]
    )
    image_ids = [str(image_id) for image_id in captions.index]
    return CaptionTable.of(split, image_ids, [image_dir / name for name in image_ids], captions.tolist())
