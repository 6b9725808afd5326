"""What is known of each picture of an evaluated split: its caption, its references and its part in the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from efficap.errors import InputError
from efficap.evaluation.scores import PictureScores
from efficap.evaluation.sums import BLEU_COUNTS
from efficap.files import replacing

PICTURES_FILE = "pictures.parquet"
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


def read_pictures(path: Path) -> list[PictureRecord]:
    """Read what `write_pictures` wrote.

    Raises:
        InputError: no such file, or a damaged one.
    """
    try:
        return [_record(row) for row in pq.read_table(path).to_pylist()]
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # Arrow's own, of a damaged file, have none
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} is damaged ({why}); run eval.py again") from error


def _record(row: dict[str, Any]) -> PictureRecord:
    scores = None
    if row["CIDEr"] is not None:
        counts = tuple(int(count) for count in row["BLEU"])
        if len(counts) != BLEU_COUNTS:
            raise ValueError(f"{len(counts)} counts in place of {BLEU_COUNTS}")
        scores = PictureScores(float(row["CIDEr"]), counts, row.get("METEOR"), row.get("ROUGE-L"))
    image = None if row["image"] is None else Path(row["image"])
    return PictureRecord(str(row["image_id"]), str(row["caption"]), list(row["references"]), image, scores)
