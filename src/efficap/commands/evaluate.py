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

from efficap.commands.checks import checks_of, loss_probe, own_and_other_cider
from efficap.commands.faults import check_writable
from efficap.commands.kinds import check_form
from efficap.commands.schema import EVAL
from efficap.commands.subject import Subject, open_ensemble, open_run
from efficap.data.caption_data import CaptionData
from efficap.decoding import Decoding, deciding
from efficap.errors import InputError
from efficap.evaluation.bootstrap import score_intervals
from efficap.evaluation.grounding import checks_line, verdict_line
from efficap.evaluation.groups import check_groups, groups_table, score_groups
from efficap.evaluation.objects import read_instances
from efficap.evaluation.page.page import PAGE, write_page
from efficap.evaluation.pictures import PICTURES_FILE, PictureRecord, write_pictures
from efficap.evaluation.report import GalleryItem, contact_sheet, scores_table
from efficap.evaluation.results import write_coco_results, write_predictions, write_scores
from efficap.evaluation.scores import (
    PictureScores,
    Scores,
    check_java,
    check_metrics,
    distinct_share,
    picture_scores,
    score_split,
)
from efficap.evaluation.signature import signature
from efficap.evaluation.sums import Parts
from efficap.ranks import is_first, join, to_first

SHEET = 12  # pictures of sheet.png


def evaluate(cfg: dict[str, Any]) -> dict[str, Any]:
    """Evaluate as the plain values of conf/eval.yaml say; returns what scores.json holds.

    Writes RUN/eval/SPLIT/captions.json and results.json (COCO's results format, with COCO's numbers where the table has
    them), scores.json, pictures.parquet (what `python -m efficap.evaluation.compare` reads), report.html and sheet.png;
    of an ensemble the same below its own folder. Of several processes each captions its share of the pictures, and the
    first does all else: the others return nothing.

    Raises:
        InputError: no such run, split or column, no Java, a GPU that is not there, runs that make no ensemble.
    """
    check_form(cfg, EVAL)
    join(gpu=cfg["accelerator"] != "cpu" and torch.cuda.is_available())
    check_metrics(cfg["metrics"])
    if cfg["metrics"] and is_first():
        check_java()
    given = cfg["checks"]["instances"]
    instances = read_instances(Path(given).expanduser()) if given is not None else None
    subject = open_ensemble(cfg) if cfg["ensemble"] else open_run(cfg)
    split, data, writer = cfg["split"], subject.data, subject.writer
    group_of = _groups(data, cfg)

    out = subject.out / split
    if is_first():
        check_writable(
            out, "results lie with their run: copy that to where you may write, and evaluate the copy"
        )
    probe = loss_probe(subject, cfg["checks"]["loss_pictures"])
    predictions, references = _captioned(subject, split)
    if probe:
        probe.gather()
    if not is_first():
        return {}
    _write_captions(out, predictions, data.coco_ids())

    scores: Scores = {"split": split, "images": len(predictions), "decoding": _described(writer.decoding)}
    scores |= {"ensemble": ", ".join(subject.runs)} if subject.runs else {}
    scores["precision"] = subject.precision
    found, parts = _scored(predictions, references, cfg["metrics"])
    scores |= found
    cider = own_and_other_cider(predictions, references, scores, parts)
    if cider:
        scores["CIDEr-shuffled"] = sum(other for _, other in cider) / len(cider)
    scores["distinct"] = distinct_share(list(predictions.values()))
    if group_of:
        scores |= score_groups(predictions, references, group_of, metrics=cfg["metrics"])
    intervals = _intervals(scores, parts, cfg["intervals"])
    losses = probe.losses(references) if probe else None
    checks, missing = checks_of(subject, cfg, predictions, references, losses, cider, instances)
    line = _signature(subject, cfg, references)
    result = {**scores, "intervals": intervals, "checks": checks, "signature": line}
    write_scores(out / "scores.json", result)

    pictures = functools.partial(data.picture, split)
    records = _records(picture_scores(list(predictions), parts), predictions, references, pictures)
    write_pictures(out / PICTURES_FILE, records)
    _write_pages(subject, split, result, records, pictures, cfg["gallery"])
    console = Console()
    console.print(scores_table(scores, intervals))
    if group_of:
        console.print(groups_table(scores, cfg["by"]))
    lines = [line, checks_line(checks), verdict_line(checks), *data.notes(), *missing]
    for text in filter(None, [*lines, f"captions, scores and pictures: {_shown(out)}"]):
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    return result


def _captioned(subject: Subject, split: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The caption and the references of each picture, by image id; in the first process of all."""
    own: dict[str, tuple[str, list[str]]] = {}
    with torch.inference_mode():
        for images, image_ids, texts in subject.batches(split):
            captions = (best.text for best, *_ in subject.writer.write(images, image_ids))
            own |= dict(zip(image_ids, zip(captions, texts, strict=True), strict=True))
    every = {image_id: both for part in to_first(own) for image_id, both in part.items()}
    return {i: caption for i, (caption, _) in every.items()}, {i: texts for i, (_, texts) in every.items()}


def _signature(subject: Subject, cfg: dict[str, Any], references: dict[str, list[str]]) -> str:
    return signature(
        cfg["split"],
        references,
        decoding=_described(subject.writer.decoding),
        precision=subject.precision,
        seed=subject.run.config.get("seed") if subject.run else None,
        resamples=cfg["intervals"]["resamples"],
        resample_seed=cfg["intervals"]["seed"],
    )


def _scored(
    predictions: dict[str, str], references: dict[str, list[str]], metrics: list[str]
) -> tuple[Scores, Parts]:
    """The scores asked for and what each picture adds to them, and to both CIDEr and BLEU where either is asked for."""
    if not metrics:
        return {}, {}
    both = ["CIDEr", "BLEU"] if {"CIDEr", "BLEU"} & set(metrics) else []
    scores, parts = score_split(predictions, references, metrics=list(dict.fromkeys([*metrics, *both])))
    unasked = [metric for metric in both if metric not in metrics]
    return {name: value for name, value in scores.items() if not name.startswith(tuple(unasked))}, parts


def _intervals(scores: Scores, parts: Parts, settings: dict[str, int]) -> dict[str, list[float]]:
    """Of the scores asked for, of more than one picture."""
    if not settings["resamples"] or not parts or len(next(iter(parts.values()))) < 2:
        return {}
    found = score_intervals(parts, resamples=settings["resamples"], seed=settings["seed"])
    return {name: list(bounds) for name, bounds in found.items() if name in scores}


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


def _records(
    parts: dict[str, PictureScores],
    predictions: dict[str, str],
    references: dict[str, list[str]],
    pictures: Callable[[str], Path | Image.Image],
) -> list[PictureRecord]:
    try:
        files = isinstance(pictures(next(iter(predictions))), Path)
    except OSError:
        files = False  # it is in a shard, as all of them, which would be read one by one
    return [
        PictureRecord(
            image_id,
            caption,
            references[image_id],
            image=Path(str(pictures(image_id))).absolute() if files else None,
            scores=parts.get(image_id),
        )
        for image_id, caption in predictions.items()
    ]


def _write_pages(
    subject: Subject,
    split: str,
    scores: dict[str, Any],
    records: list[PictureRecord],
    pictures: Callable[[str], Path | Image.Image],
    limit: int,
) -> None:
    """report.html and sheet.png; where they are not asked for, those of an earlier evaluation go."""
    page, sheet = subject.out / split / PAGE, subject.out / split / "sheet.png"
    if not limit:
        page.unlink(missing_ok=True)
        sheet.unlink(missing_ok=True)
        return
    write_page(
        page,
        title=f"{subject.name}: {split}",
        scores=scores,
        records=records,
        pictures=pictures,
        limit=limit,
        metrics_csv=None if subject.runs else subject.out.parent / "metrics.csv",
    )
    few = records[: min(SHEET, limit)]
    contact_sheet(
        sheet,
        [
            GalleryItem(_shown_picture(pictures, record.image_id), record.caption, record.references)
            for record in few
        ],
    )


def _shown_picture(pictures: Callable[[str], Path | Image.Image], image_id: str) -> Path | Image.Image:
    try:
        return pictures(image_id)
    except OSError:  # of a shard that has changed since
        return Path(image_id)  # not there: what shows it says so


def _described(decoding: Decoding) -> str:
    options = (f"{name}={value}" for name, value in deciding(dataclasses.asdict(decoding)).items())
    return f"{decoding.method}: {', '.join(options)}"


def _shown(path: Path) -> Path:
    """Relative to the current folder where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
