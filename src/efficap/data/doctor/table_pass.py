"""Every picture of a caption table, decoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficap.data.doctor.captions import CaptionLimit, CaptionTally
from efficap.data.doctor.examination import Examination, Part
from efficap.data.doctor.findings import Findings
from efficap.data.doctor.fingerprint import LOOK, Looks, look_at
from efficap.data.pictures import Picture, PictureError
from efficap.data.pool import fewer_workers, in_processes, tracked
from efficap.data.table import CaptionTable, EmptyCaption, read_table

CHUNK = 64  # pictures that go to a process at once
# such a picture may be there tomorrow, when the quarantine would still leave it out
_PASSING = ("missing", "too slow", "no access")

_Job = tuple[int, int, list[str], int]  # split, first row, files, max_pixels
_Bad = tuple[int, str, str]  # row, reason, reason with details
_Seen = tuple[int, Looks, NDArray[np.int32], list[_Bad]]  # split, looks, rows, pictures that cannot be read


class TablePlace:
    """The pictures of the splits of a table."""

    def __init__(self, tables: list[CaptionTable]) -> None:
        self._rows = [table.rows for table in tables]

    def name(self, part: int, row: int) -> str:
        return str(self._rows[part]["image_id"][row].as_py())

    def caption(self, part: int, row: int) -> str:
        return str(self._rows[part]["references"][row].as_py()[0])

    def picture(self, part: int, row: int) -> Picture:
        return Picture(Path(self._rows[part]["file"][row].as_py()))


def examine_table(
    table: Path,
    image_dir: Path,
    *,
    columns: dict[str, str],
    allow_absolute: bool,
    limit: CaptionLimit,
    max_pixels: int,
    workers: int,
) -> Examination:
    """Decode all pictures of a table and count its captions.

    Args:
        columns: ``image_column``, ``caption_column`` and ``split_column``.
        allow_absolute: whether pictures may lie outside of `image_dir`.
        max_pixels: larger pictures are refused.

    Raises:
        InputError: the table cannot be used at all.
    """
    splits, empty = read_table(
        table,
        image_dir,
        image_column=columns["image_column"],
        caption_column=columns["caption_column"],
        split_column=columns["split_column"],
        allow_absolute=allow_absolute,
    )
    tables = list(splits.values())
    seen = Examination(
        "table", TablePlace(tables), [Part(table.split) for table in tables], CaptionTally(limit), Findings()
    )
    _count_captions(seen, tables, empty)
    jobs = [
        (split, start, table.rows["file"].slice(start, CHUNK).to_pylist(), max_pixels)
        for split, table in enumerate(tables)
        for start in range(0, len(table), CHUNK)
    ]
    looks, numbers, rows = [], [], []
    results = in_processes(_look_at_files, jobs, workers=workers, way_out=fewer_workers(workers))
    for split, chunk, chunk_rows, bad in tracked(results, "Looking at pictures", len(jobs)):
        looks.append(chunk)
        numbers.append(split)
        rows.append(chunk_rows)
        seen.parts[split].pictures += len(chunk)
        seen.parts[split].bad += len(bad)
        for row, reason, detail in bad:
            name = seen.place.name(split, row)
            seen.findings.of(f"pictures that cannot be read ({reason})").add(f"{name}: {detail}")
            if reason not in _PASSING:
                seen.unreadable.append((name, reason))
    seen.gather(looks, numbers, rows)
    return seen


def _count_captions(seen: Examination, tables: list[CaptionTable], empty: list[EmptyCaption]) -> None:
    for part, table in zip(seen.parts, tables, strict=True):
        for batch in table.rows.select(["image_id", "references"]).to_batches(max_chunksize=10_000):
            for row in batch.to_pylist():
                seen.captions.add(row["image_id"], row["references"])
                part.captions += len(row["references"])
    captioned = {image_id for table in tables for image_id in table.image_ids} if empty else set()
    rows = seen.findings.of("empty captions", "training leaves them out")
    pictures = seen.findings.of("pictures without any caption", "training leaves them out")
    bare: dict[str, None] = {}
    for caption in empty:
        rows.add(f"{caption.image_id} (row {caption.row:,})")
        if caption.image_id not in captioned:
            bare[caption.image_id] = None
    for image_id in bare:
        pictures.add(image_id)


def _look_at_files(job: _Job) -> _Seen:
    split, start, files, max_pixels = job
    looks = np.zeros(len(files), LOOK)
    rows: list[int] = []
    bad: list[_Bad] = []
    for row, file in enumerate(files, start):
        try:
            looks[len(rows)] = look_at(Picture(Path(file), max_pixels))
        except PictureError as error:
            bad.append((row, error.reason, str(error)))
        else:
            rows.append(row)
    return split, looks[: len(rows)], np.array(rows, np.int32), bad
