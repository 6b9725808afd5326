"""The formats in which captions come: CSV, TSV, Parquet, COCO's JSON, Karpathy's JSON, Flickr's token files.

Each becomes the same rows, one a caption: the picture's path under the image directory, the caption, the split.
"""

from __future__ import annotations

import ast
import csv
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from efficap.data.coco import CaptionRow, read_json
from efficap.errors import InputError
from efficap.picture_files import SUFFIXES

KNOWN = (
    ".csv, .tsv, .parquet, COCO's or Karpathy's .json, and Flickr's .token.txt or .token with its lists of "
    "splits beside it"
)

# Flickr8k, its devImages being what others call val, and Flickr30k.
TOKEN_LISTS = {
    "train": ("Flickr_8k.trainImages.txt", "train.txt"),
    "val": ("Flickr_8k.devImages.txt", "val.txt"),
    "test": ("Flickr_8k.testImages.txt", "test.txt"),
}

_FILE_FOR_EACH = "data.table={train: FILE, val: FILE}"


def read_rows(
    table: Path | Mapping[str, Path],
    *,
    image_dir: Path,
    image_column: str,
    caption_column: str | None,
    split_column: str,
) -> pd.DataFrame:
    """Read the captions of a file, or of a file for each split, known by suffix and content.

    Args:
        table: a file with its own splits; or split -> file, and then a file's key is the split of all its rows.
            Karpathy's JSON has splits that say more than a key could, and is refused as part of a mapping.
        image_dir: what the pictures' paths are relative to; COCO's depend on the folders in it.
        image_column, caption_column, split_column: names of the columns in a CSV, TSV or Parquet file. A cell
            with a list holds several captions; None for a table without captions, whose rows have empty ones.

    Returns:
        The str columns ``image``, ``caption`` and ``split``, one row a caption, in the order of the files.
        Captions are as they stand in the file: neither stripped nor checked for being empty.

    Raises:
        InputError: names the file and what it lacks, or why it cannot be read.
    """
    columns = {"image": image_column, "split": split_column}
    if caption_column is not None:
        columns = {"image": image_column, "caption": caption_column, "split": split_column}
    files = table if isinstance(table, Mapping) else {None: table}
    if not files:
        raise InputError(f"data.table={{}} names no file; give one, or one for each split: {_FILE_FOR_EACH}")
    parts = [_read(Path(file), split, image_dir, columns) for split, file in files.items()]
    return pd.concat(parts, ignore_index=True)


def _read(file: Path, split: str | None, image_dir: Path, columns: dict[str, str]) -> pd.DataFrame:
    setting = f"data.table={file}" if split is None else f"data.table.{split}={file}"
    if not file.is_file():
        raise InputError(f"{setting} does not exist")
    if split is not None:
        columns = {role: column for role, column in columns.items() if role != "split"}
    name = file.name.lower()
    if name.endswith((".csv", ".tsv")):
        rows = _read_text_table(setting, file, columns)
    elif name.endswith(".parquet"):
        rows = _read_parquet(setting, file, columns)
    elif name.endswith(".json"):
        rows = _frame(setting, read_json(setting, file, split, image_dir))
    elif name.endswith((".token.txt", ".token")):
        rows = _frame(setting, _read_tokens(setting, file, split))
    else:
        raise InputError(f"{setting} is of no known format; known are {KNOWN}")
    return rows if split is None else rows.assign(split=split)


def _frame(setting: str, rows: list[CaptionRow]) -> pd.DataFrame:
    try:
        return pd.DataFrame(rows, columns=["image", "caption", "split"], dtype="str")
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, which is no character
        raise InputError(f"{setting} has text that is no Unicode: {error}") from None


def _read_text_table(setting: str, file: Path, columns: dict[str, str]) -> pd.DataFrame:
    separator, kind = ("\t", "TSV") if file.suffix.lower() == ".tsv" else (",", "CSV")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            rows = read_text_columns(file)
    except pd.errors.ParserWarning as error:
        raise InputError(
            f"{setting}: rows have more fields than the header; put captions with a {separator!r} in quotes"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, csv.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{setting} cannot be read as a {kind} in UTF-8: {reason}") from error
    _check_columns(setting, columns, list(map(str, rows.columns)))
    if rows.empty:
        raise InputError(f"{setting} has a header but no rows")
    rows = pd.DataFrame({role: rows[column] for role, column in columns.items()})
    _check_quotes(setting, rows, separator)
    if "caption" not in columns:
        return _without_captions(rows)
    lists = {row: _listed(setting, row, cell) for row, cell in _list_like(rows["caption"])}
    if not lists:
        return rows
    captions = [lists.get(row, [cell]) for row, cell in enumerate(rows["caption"])]
    return _exploded(rows, captions)


def read_text_columns(file: Path) -> pd.DataFrame:
    """All columns of a CSV or TSV, as text; raises what pandas does."""
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    # Without index_col=False, rows with one field more than the header shift by a column, silently.
    return pd.read_csv(
        file, sep=separator, dtype="str", keep_default_na=False, encoding="utf-8-sig", index_col=False
    )


def _check_quotes(setting: str, rows: pd.DataFrame, separator: str) -> None:
    """Refuse a table of which a quote that begins a cell takes rows below it into it, up to another quote.

    A caption may well have lines, and commas; a tab, or a picture's name as a field of a later line, is a row's.
    """
    name = rf"[^\n,]*\.(?:{'|'.join(suffix[1:] for suffixes in SUFFIXES.values() for suffix in suffixes)})\s*"
    rows_inside = r"\t[^\n]*\n|\n[^\n]*\t" if separator == "\t" else rf"(?is)\n(?:[^\n]*,)?{name}(?:,|\n|$)"
    for column in rows:
        swallowed = rows[column].str.contains(rows_inside).to_numpy().nonzero()[0]
        if len(swallowed):
            row = int(swallowed[0])
            raise InputError(
                f"{setting}: a quote at the start of a cell in row {row + 1} takes the rows after it into that cell, "
                f"{rows[column].iloc[row][:60]!r} …; put cells that have quotes in quotes, and double those within"
            )


def _check_columns(setting: str, columns: dict[str, str], present: list[str]) -> None:
    for role, column in columns.items():
        if column not in present:
            other = f", or give a file for each split: {_FILE_FOR_EACH}" if role == "split" else ""
            raise InputError(
                f"{setting} has no column {column!r}, only {', '.join(map(repr, present))}; "
                f"name it with data.{role}_column=NAME{other}"
            )


def _list_like(cells: pd.Series[str]) -> Iterator[tuple[int, str]]:
    for row, cell in enumerate(cells):
        text = cell.strip()
        is_empty = text[:1] == "[" and text[1:].strip() == "]"  # as pandas writes a picture without captions
        if is_empty or (text.startswith(("['", '["')) and text.endswith(("']", '"]'))):
            yield row, text


def _listed(setting: str, row: int, text: str) -> list[str]:
    """The captions of a cell that holds a list as JSON or as Python prints it."""
    for read in (json.loads, _python_list):
        try:
            value = read(text)
        # the last two of what is nested too deeply
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(caption, str) for caption in value):
            return value
    raise InputError(
        f"{setting}, row {row + 2}: the caption {text[:60]!r} looks like a list but is neither JSON's nor Python's; "
        "write a row for each caption"
    )


def _python_list(text: str) -> object:
    value = ast.literal_eval(text)
    # numpy prints ['one' 'two'] without commas, which Python would read as a single joined string.
    if repr(value) != text:
        raise ValueError("not as Python prints it")
    return value


def _exploded(rows: pd.DataFrame, captions: list[list[str]]) -> pd.DataFrame:
    # A list without captions keeps its row, with an empty caption: whoever checks for those can then name it.
    rows = rows.assign(caption=pd.Series([found or [""] for found in captions], dtype="object"))
    return rows.explode("caption", ignore_index=True).astype("str")


def _without_captions(rows: pd.DataFrame) -> pd.DataFrame:
    rows.insert(1, "caption", pd.Series("", index=rows.index, dtype="str"))
    return rows


def _read_parquet(setting: str, file: Path, columns: dict[str, str]) -> pd.DataFrame:
    import pyarrow as pa  # a tenth of a second that other formats need not wait for
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
        _check_columns(setting, columns, schema.names)
        table = parquet.read_table(file, columns=list(columns.values()), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{setting} cannot be read as Parquet: {reason}") from error
    if table.num_rows == 0:
        raise InputError(f"{setting} has columns but no rows")
    cells: dict[str, list[object]] = {}
    for role, column in columns.items():
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if role == "caption" and (pa.types.is_list(value) or pa.types.is_large_list(value)):
            value = value.value_type
        if not (
            pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
        ):
            raise InputError(
                f"{setting}: the column {column!r} holds {kind}, not text; name another with data.{role}_column=NAME"
            )
        cells[role] = table[column].to_pylist()
    if "caption" not in columns:
        texts = {role: [cell or "" for cell in column] for role, column in cells.items()}
        return _without_captions(pd.DataFrame(texts, dtype="str"))
    captions = [
        [caption or "" for caption in cell] if isinstance(cell, list) else [str(cell or "")]
        for cell in cells.pop("caption")
    ]
    rows = pd.DataFrame(
        {role: [cell or "" for cell in column] for role, column in cells.items()}, dtype="str"
    )
    return _exploded(rows, captions)[list(columns)]


def _read_tokens(setting: str, file: Path, split: str | None) -> list[CaptionRow]:
    """Flickr's lines ``name.jpg#0<TAB>caption``; a list beside the file says which pictures form a split."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
        split_of = _split_lists(setting, file.parent) if split is None else None
    except UnicodeDecodeError as error:
        raise InputError(f"{setting} or a list beside it is not in UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"{setting} or a list beside it cannot be read: {error}") from error
    find: Callable[[str], str | None] = (lambda _: split) if split_of is None else _finder(split_of)
    rows, pictures = [], set()
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        image, mark, _ = key.rpartition("#")
        if not (tab and mark and image):
            raise InputError(f"{setting}, line {number}: {line[:60]!r} is not NAME#NUMBER<TAB>CAPTION")
        pictures.add(image)
        found = find(image)
        if found is not None:
            rows.append((image, caption, found))
    if not rows:
        raise InputError(f"{setting}: none of its {len(pictures)} pictures is in a list of splits beside it")
    return rows


def _finder(split_of: dict[str, str]) -> Callable[[str], str | None]:
    return lambda image: split_of.get(image, split_of.get(Path(image).stem))  # Flickr30k lists bare numbers


def _split_lists(setting: str, folder: Path) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for split, names in TOKEN_LISTS.items():
        for file in (folder / name for name in names if (folder / name).is_file()):
            for image in file.read_bytes().decode("utf-8-sig").split():
                if split_of.setdefault(image, split) != split:
                    raise InputError(f"{setting}: {image} is in the lists of {split_of[image]} and {split}")
    if not split_of:
        names = " or ".join(", ".join(names) for names in zip(*TOKEN_LISTS.values(), strict=True))
        raise InputError(f"{setting} needs lists of its splits beside it ({names}), or {_FILE_FOR_EACH}")
    return split_of
