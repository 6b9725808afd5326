"""What is known of each picture of an evaluated split: its caption, its references and its part in the scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficap.errors import InputError
from efficap.evaluation.results import replacing
from efficap.evaluation.scores import BLEU_COUNTS, PictureScores

PICTURES_FILE = "pictures.jsonl"


@dataclass(frozen=True, slots=True)
class PictureRecord:
    """One picture of a split.

    Attributes:
        image_id: unique in the split.
        caption: what the model wrote.
        references: what people wrote.
        image: its file; None where it has none of its own, as in a shard.
        scores: its part in CIDEr and BLEU; None where neither was computed.
    """

    image_id: str
    caption: str
    references: Sequence[str]
    image: Path | None = None
    scores: PictureScores | None = None


def write_pictures(path: Path, records: Iterable[PictureRecord]) -> None:
    """Write a line of JSON for each picture: ``image_id``, ``caption``, ``references``, ``image``, ``CIDEr``, ``BLEU``.

    ``BLEU`` holds the counts of `PictureScores.bleu`.
    """
    with replacing(path) as file:
        for record in records:
            row = {
                "image_id": record.image_id,
                "caption": record.caption,
                "references": list(record.references),
                "image": None if record.image is None else str(record.image),
                "CIDEr": record.scores and record.scores.cider,
                "BLEU": record.scores and list(record.scores.bleu),
            }
            file.write((json.dumps(row) + "\n").encode())


def read_pictures(path: Path) -> list[PictureRecord]:
    """Read what `write_pictures` wrote.

    Raises:
        InputError: no such file, or a line that is no such record; the message names the line.
    """
    records = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    records.append(_record(json.loads(line)))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{path}: line {number} is damaged ({type(error).__name__}: {error}); run eval.py again"
                    ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return records


def _record(row: dict[str, Any]) -> PictureRecord:
    scores = None
    if row["CIDEr"] is not None:
        counts = tuple(int(count) for count in row["BLEU"])
        if len(counts) != BLEU_COUNTS:
            raise ValueError(f"{len(counts)} counts in place of {BLEU_COUNTS}")
        scores = PictureScores(float(row["CIDEr"]), counts)
    image = None if row["image"] is None else Path(row["image"])
    return PictureRecord(str(row["image_id"]), str(row["caption"]), list(row["references"]), image, scores)
