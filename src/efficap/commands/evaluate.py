"""Score a run on a split: captions first, to a file; then the metrics; then a page to look at."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from efficap.commands.subject import open_ensemble, open_run
from efficap.data.module import CaptionData
from efficap.decoding import Decoding
from efficap.errors import InputError
from efficap.evaluation.groups import check_groups, groups_table, score_groups
from efficap.evaluation.pictures import PICTURES_FILE, PictureRecord, write_pictures
from efficap.evaluation.report import GalleryItem, contact_sheet, scores_table, write_gallery
from efficap.evaluation.results import write_coco_results, write_predictions, write_scores
from efficap.evaluation.scores import (
    Scores,
    check_java,
    check_metrics,
    distinct_share,
    score_captions,
    score_pictures,
)

SHEET = 12  # pictures of sheet.png


def evaluate(cfg: dict[str, Any]) -> Scores:
    """Evaluate as the plain values of conf/eval.yaml say; returns what scores.json holds.

    Writes RUN/eval/SPLIT/captions.json and results.json (COCO's results format, with COCO's numbers where the table has
    them), scores.json, pictures.jsonl (what `python -m efficap.evaluation.compare` reads), index.html and sheet.png; of
    an ensemble the same below its own folder.

    Raises:
        InputError: no such run, split or column, no Java, a GPU that is not there, runs that make no ensemble.
    """
    check_metrics(cfg["metrics"])
    if cfg["metrics"]:
        check_java()
    subject = open_ensemble(cfg) if cfg["ensemble"] else open_run(cfg)
    split, data, writer = cfg["split"], subject.data, subject.writer
    group_of = _groups(data, cfg)

    out = subject.out / split
    predictions: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    with torch.inference_mode():
        for images, image_ids, texts in subject.batches(split):
            captions = (best.text for best, *_ in writer.write(images, image_ids))
            predictions |= dict(zip(image_ids, captions, strict=True))
            references |= dict(zip(image_ids, texts, strict=True))
    _write_captions(out, predictions, data.coco_ids())

    scores: Scores = {"split": split, "images": len(predictions), "decoding": _described(writer.decoding)}
    scores |= {"ensemble": ", ".join(subject.runs)} if subject.runs else {}
    scores["precision"] = subject.precision
    if cfg["metrics"]:
        scores |= score_captions(predictions, references, metrics=cfg["metrics"])
    if "CIDEr" in cfg["metrics"] and len(predictions) > 1:
        scores["CIDEr-shuffled"] = _shuffled_cider(predictions, references)
    scores["distinct"] = distinct_share(list(predictions.values()))
    if group_of:
        scores |= score_groups(predictions, references, group_of, metrics=cfg["metrics"])
    write_scores(out / "scores.json", scores)
    pictures = functools.partial(data.picture, split)
    records = _records(scores, predictions, references, pictures)
    write_pictures(out / PICTURES_FILE, records)
    console = Console()
    console.print(scores_table(scores))
    if group_of:
        console.print(groups_table(scores, cfg["by"]))
    if cfg["gallery"]:
        _write_pages(out, f"{subject.name}: {split}", scores, records, pictures, cfg["gallery"])
    for note in data.notes():
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"captions, scores and pictures: {_shown(out)}", soft_wrap=True, highlight=False, markup=False
    )
    return scores


def _write_captions(out: Path, predictions: dict[str, str], coco_ids: dict[str, int]) -> None:
    """captions.json, and where the table gives every picture a number, results.json for COCO's evaluation server."""
    write_predictions(out / "captions.json", predictions)
    if coco_ids.keys() >= predictions.keys():
        write_coco_results(out / "results.json", predictions, coco_ids)
    else:
        (out / "results.json").unlink(missing_ok=True)  # of another table


def _groups(data: CaptionData, cfg: dict[str, Any]) -> dict[str, str]:
    """The group of each picture of the split, where the scores of groups are asked for."""
    column, split = cfg["by"], cfg["split"]
    if column is None:
        return {}
    if not cfg["metrics"]:
        raise InputError(f"by={column} asks for scores, and metrics=[] for none; leave out one of the two")
    group_of = data.attribute(split, column)
    check_groups(group_of, list(group_of), column)
    return group_of


def _shuffled_cider(
    predictions: dict[str, str], references: dict[str, list[str]]
) -> float | int | str | None:
    """CIDEr against the references of other pictures: what a model scores that does not look at the picture.

    Each picture takes the references of the one that comes half a split later.
    """
    ids = list(predictions)
    half = len(ids) // 2
    others = {
        image_id: references[other] for image_id, other in zip(ids, ids[half:] + ids[:half], strict=True)
    }
    return score_captions(predictions, others, metrics=["CIDEr"])["CIDEr"]


def _records(
    scores: Scores,
    predictions: dict[str, str],
    references: dict[str, list[str]],
    pictures: Callable[[str], Path | Image.Image],
) -> list[PictureRecord]:
    """Each picture with its part in CIDEr and BLEU, unless neither was asked for or what was asked for has failed."""
    asked = [scores[name] for name in ("CIDEr", "BLEU-4") if name in scores]
    computed = bool(asked) and all(isinstance(value, float) for value in asked)
    parts = score_pictures(predictions, references) if computed else {}
    files = isinstance(pictures(next(iter(predictions))), Path)  # else each would be read from its shard
    return [
        PictureRecord(
            image_id,
            caption,
            references[image_id],
            image=Path(str(pictures(image_id))) if files else None,
            scores=parts.get(image_id),
        )
        for image_id, caption in predictions.items()
    ]


def _write_pages(
    out: Path,
    title: str,
    scores: Scores,
    records: list[PictureRecord],
    pictures: Callable[[str], Path | Image.Image],
    count: int,
) -> None:
    items = [
        GalleryItem(
            pictures(record.image_id),
            record.caption,
            record.references,
            note=f"CIDEr {record.scores.cider:.2f}" if record.scores and "CIDEr" in scores else "",
        )
        for record in records[:count]
    ]
    corpus = scores.get("CIDEr")
    subtitle = f"CIDEr {corpus:.3f} on {len(records):,} pictures" if isinstance(corpus, float) else ""
    write_gallery(out / "index.html", items, title=title, subtitle=subtitle)
    contact_sheet(out / "sheet.png", items[:SHEET])


def _described(decoding: Decoding) -> str:
    settings = dataclasses.asdict(decoding)
    del settings["batch_size"]  # changes no caption
    options = (f"{name}={value}" for name, value in settings.items())
    return f"{decoding.method}: {', '.join(options)}"


def _shown(path: Path) -> Path:
    """Relative to the current folder where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
