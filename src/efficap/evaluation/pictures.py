"""What is known of each picture of an evaluated split: its caption, its references and its part in the scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from efficap.errors import InputError
from efficap.evaluation.results import replacing
from efficap.evaluation.scores import PictureScores
from efficap.evaluation.sums import BLEU_COUNTS

PICTURES_FILE = "pictures.parquet"
LINES_FILE = (
    "pictures.jsonl"  # of evaluations before there was Parquet: the same columns, a line of JSON for each
)
_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("references", pa.list_(pa.string())),
        ("image", pa.string()),
        ("CIDEr", pa.float64()),
        ("METEOR", pa.float64()),
        ("ROUGE-L", pa.float64()),
        ("BLEU", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, slots=True)
class PictureRecord:
    """One picture of a split.

    Attributes:
        image_id: unique in the split.
        caption: what the model wrote.
        references: what people wrote.
        image: its file; None where it has none of its own, as in a shard.
        scores: its part in the scores; None where neither CIDEr nor BLEU was computed.
    """

    image_id: str
    caption: str
    references: Sequence[str]
    image: Path | None = None
    scores: PictureScores | None = None


def write_pictures(path: Path, records: Sequence[PictureRecord]) -> None:
    """Write a Parquet file with a row for each picture, its scores under their names.

    ``BLEU`` holds the counts of `PictureScores.bleu`.
    """
    rows = [
        {
            "image_id": record.image_id,
            "caption": record.caption,
            "references": list(record.references),
            "image": None if record.image is None else str(record.image),
            "CIDEr": record.scores and record.scores.cider,
            "METEOR": record.scores and record.scores.meteor,
            "ROUGE-L": record.scores and record.scores.rouge_l,
            "BLEU": record.scores and list(record.scores.bleu),
        }
        for record in records
    ]
    with replacing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)


def find_pictures(folder: Path) -> Path | None:
    """The file of an evaluation's folder that `read_pictures` reads; None where there is none."""
    files = (folder / name for name in (PICTURES_FILE, LINES_FILE))
    return next((file for file in files if file.is_file()), None)


def read_pictures(path: Path) -> list[PictureRecord]:
    """Read what `write_pictures` wrote, or the lines of JSON of an earlier version.

    Raises:
        InputError: no such file, or a damaged one; of lines, the message names the one.
    """
    number = 0
    try:
        if path.suffix == ".jsonl":
            records = []
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):  # noqa: B007
                    records.append(_record(json.loads(line)))
            return records
        return [_record(row) for row in pq.read_table(path).to_pylist()]
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # Arrow's own, of a damaged file, have none
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        where = f"line {number} is damaged" if number else "is damaged"
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: {where} ({why}); run eval.py again") from error


def _record(row: dict[str, Any]) -> PictureRecord:
    scores = None
    if row["CIDEr"] is not None:
        counts = tuple(int(count) for count in row["BLEU"])
        if len(counts) != BLEU_COUNTS:
            raise ValueError(f"{len(counts)} counts in place of {BLEU_COUNTS}")
        scores = PictureScores(float(row["CIDEr"]), counts, row.get("METEOR"), row.get("ROUGE-L"))
    image = None if row["image"] is None else Path(row["image"])
    return PictureRecord(str(row["image_id"]), str(row["caption"]), list(row["references"]), image, scores)
