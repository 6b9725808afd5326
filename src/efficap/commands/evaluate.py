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
from rich.progress import track

from efficap.commands.run_dir import RunDirectory
from efficap.data.module import CaptionData
from efficap.decoding import Decoding, build_decoding
from efficap.evaluation.pictures import PICTURES_FILE, PictureRecord, write_pictures
from efficap.evaluation.report import GalleryItem, contact_sheet, scores_table, write_gallery
from efficap.evaluation.results import write_predictions, write_scores
from efficap.evaluation.scores import (
    Scores,
    check_java,
    check_metrics,
    distinct_share,
    score_captions,
    score_pictures,
)
from efficap.models.build import preprocessing
from efficap.training.writer import CaptionWriter

SHEET = 12  # pictures of sheet.png


def evaluate(cfg: dict[str, Any]) -> Scores:
    """Evaluate as the plain values of conf/eval.yaml say; returns what scores.json holds.

    Writes RUN/eval/SPLIT/captions.json (COCO's results format), scores.json, pictures.jsonl (what `python -m
    efficap.evaluation.compare` reads), index.html and sheet.png.

    Raises:
        InputError: no such run or split, no Java, a GPU that is not there.
    """
    run = RunDirectory(cfg["run"])
    device, precision = run.placement(cfg["accelerator"], cfg["precision"])
    decoding = build_decoding(run.decoding(cfg["decoding"]))
    check_metrics(cfg["metrics"])
    check_java()
    tokenizer = run.tokenizer()
    writer = CaptionWriter(run.captioner(tokenizer, device, precision), tokenizer, decoding)
    split, data = cfg["split"], _prepared_data(run, cfg, writer, device)

    out = run.path / "eval" / split
    predictions: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    batches = data.evaluation_dataloader(split)
    with torch.inference_mode():
        for batch in track(batches, f"Captioning {split}", console=Console(stderr=True), transient=True):
            captions = (best.text for best, *_ in writer.write(batch.images.to(device), batch.image_ids))
            assert batch.references is not None
            predictions |= dict(zip(batch.image_ids, captions, strict=True))
            references |= dict(zip(batch.image_ids, batch.references, strict=True))
    write_predictions(out / "captions.json", predictions)

    scores: Scores = {"split": split, "images": len(predictions), "decoding": _described(decoding)}
    scores["precision"] = str(precision).removeprefix("torch.")
    scores |= score_captions(predictions, references, metrics=cfg["metrics"])
    if "CIDEr" in cfg["metrics"] and len(predictions) > 1:
        scores["CIDEr-shuffled"] = _shuffled_cider(predictions, references)
    scores["distinct"] = distinct_share(list(predictions.values()))
    write_scores(out / "scores.json", scores)
    pictures = functools.partial(data.picture, split)
    records = _records(scores, predictions, references, pictures)
    write_pictures(out / PICTURES_FILE, records)
    console = Console()
    console.print(scores_table(scores))
    if cfg["gallery"]:
        _write_pages(out, f"{run.config['name']}: {split}", scores, records, pictures, cfg["gallery"])
    for note in data.notes():
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"captions, scores and pictures: {_shown(out)}", soft_wrap=True, highlight=False, markup=False
    )
    return scores


def _prepared_data(
    run: RunDirectory, cfg: dict[str, Any], writer: CaptionWriter, device: torch.device
) -> CaptionData:
    """The split's data, in batches as the writer takes them where the command line does not size them itself."""
    side = run.config["model"]["image_size"]
    picture = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
    data = run.data(_sized(run.config["data"], cfg["data"], writer.find_batch_size(picture)))
    data.prepare_data()
    data.prepare(writer.tokenizer, **preprocessing(run.config["model"]), splits=[cfg["split"]])
    return data


def _sized(settings: dict[str, Any], changes: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """`changes` of a data set's settings, and in a mixture of those of its sources, with a batch size."""
    if "sources" in settings:
        below = changes.get("sources", {})
        sources = {
            name: _sized(source, below.get(name, {}), batch_size)
            for name, source in settings["sources"].items()
        }
        return {**changes, "sources": sources}
    return {"batch_size": batch_size, **changes} if "batch_size" in settings else changes


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
