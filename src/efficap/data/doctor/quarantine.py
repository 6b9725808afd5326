"""The list of pictures that training leaves out, beside their table."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from efficap.data.doctor.examination import Examination
from efficap.data.doctor.files import write_text
from efficap.data.quarantine import quarantine_file


def write_quarantine(table: Path, rows: list[tuple[str, str]]) -> Path | None:
    """Write the pictures (as the table calls them) and why; without any, an older list is removed.

    Returns:
        The file, or None where there is nothing to leave out.

    Raises:
        InputError: the file cannot be written.
    """
    file = quarantine_file(table)
    if not rows:
        file.unlink(missing_ok=True)
        return None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "reason"))
    writer.writerows(rows)
    write_text(
        file, text.getvalue(), "it lies beside its table: copy the table to a folder that can be written"
    )
    return file


def crossing_rows(seen: Examination, crossing: list[list[int]], train_split: str) -> list[tuple[str, str]]:
    """The pictures of the training split that occur in another one, and which picture each is there."""
    rows = []
    for group in crossing:
        splits = [seen.parts[part].name for part in seen.part_of[group]]
        elsewhere = next((n for n, split in zip(group, splits, strict=True) if split != train_split), None)
        if elsewhere is None:
            continue
        reason = f"the same as {seen.name(elsewhere)} in {seen.parts[seen.part_of[elsewhere]].name}"
        rows += [
            (seen.name(n), reason) for n, split in zip(group, splits, strict=True) if split == train_split
        ]
    return rows
