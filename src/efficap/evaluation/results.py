"""The files that an evaluation leaves, written atomically: scores, and predictions as COCO's results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficap.errors import InputError, first_of
from efficap.files import replacing


def write_predictions(path: Path, predictions: Mapping[str, str]) -> None:
    """Write captions as ``[{"image_id": …, "caption": …}, …]``, the results format of the COCO evaluation.

    The ids stay the string keys of the table. Write the predictions before they are scored.

    Args:
        path: the JSON file; its folder is made.
        predictions: image id -> caption.
    """
    rows = [{"image_id": image_id, "caption": caption} for image_id, caption in predictions.items()]
    with replacing(path) as file:
        file.write(("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode())


def write_coco_results(path: Path, predictions: Mapping[str, str], coco_ids: Mapping[str, int]) -> None:
    """Write captions as `write_predictions` does, with COCO's numbers of the pictures, as its evaluation server wants.

    Args:
        path: the JSON file; its folder is made.
        predictions: image id -> caption.
        coco_ids: image id -> number, of every picture.
    """
    rows = [{"image_id": coco_ids[image_id], "caption": caption} for image_id, caption in predictions.items()]
    with replacing(path) as file:
        file.write((json.dumps(rows) + "\n").encode())


def read_predictions(path: Path) -> dict[str, str]:
    """Read what `write_predictions` wrote, or COCO's own results file; number ids become strings.

    Raises:
        InputError: no such file, not such a list, or an id that occurs twice.
    """
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: a list of {{image_id, caption}} is needed, not a {type(rows).__name__}")
    pairs: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str) or "image_id" not in row:
            raise InputError(f"{path}: entry {number} is not an object with image_id and a caption of text")
        pairs.append((str(row["image_id"]), row["caption"]))
    _refuse_duplicates([image_id for image_id, _ in pairs], path)
    return dict(pairs)


def write_scores(path: Path, scores: Mapping[str, Any]) -> None:
    """Write scores and what belongs to them as one JSON object; failed metrics are null and keep their reason.

    Raises:
        ValueError: a score is not a finite number, which JSON cannot hold.
    """
    with replacing(path) as file:
        file.write((json.dumps(scores, indent=2, allow_nan=False) + "\n").encode())


def read_scores(path: Path) -> dict[str, Any]:
    """Read what `write_scores` wrote.

    Raises:
        InputError: no such file, or not a JSON object.
    """
    scores = _read_json(path)
    if not isinstance(scores, dict):
        raise InputError(f"{path}: an object of scores is needed, not a {type(scores).__name__}")
    return scores


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def _refuse_duplicates(image_ids: list[str], path: Path) -> None:
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for image_id in image_ids:
        if image_id in seen:
            twice[image_id] = None
        seen.add(image_id)
    if twice:
        raise InputError(
            f"{path}: {len(twice)} image ids occur more than once: {first_of(map(repr, twice))}; give each image one "
            "caption"
        )
