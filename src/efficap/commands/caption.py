"""Caption pictures: a file, a folder or a glob in; captions.csv, captions.jsonl and a gallery out. Or shards."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from efficap.commands.caption_shards import caption_shards, names_shards
from efficap.commands.run_dir import RunDirectory, choose_device
from efficap.data.module import default_workers
from efficap.data.pictures import Picture, PictureError
from efficap.data.shards.tar import IMAGE_SUFFIXES
from efficap.data.transforms import EvaluationTransform
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.evaluation.report import GalleryItem, write_gallery
from efficap.models.pretrained import preprocessing
from efficap.training.writer import CaptionWriter, WrittenCaption


@dataclass(frozen=True, slots=True)
class CaptionedFile:
    """What became of one file: its captions, the best first, or the reason why there is none."""

    file: Path
    captions: list[WrittenCaption] = field(default_factory=list)
    error: str = ""

    @property
    def caption(self) -> str:
        return self.captions[0].text if self.captions else ""


def caption(cfg: dict[str, Any]) -> list[CaptionedFile]:
    """Caption as the plain values of conf/caption.yaml say; returns what became of each file, in order.

    Shards are captioned by `caption_shards`, whose results lie on disk; the list is then empty.

    Raises:
        InputError: no such run, nothing to caption, or not one picture that can be read.
    """
    run = RunDirectory(cfg["run"])
    device = choose_device(cfg["accelerator"])
    settings = cfg.get("decoding") or run.config["decoding"]
    decoding = build_decoding(settings)
    in_shards = names_shards(cfg["images"])
    files = [] if in_shards else find_pictures(cfg["images"])
    tokenizer = run.tokenizer()
    captioner = run.captioner(tokenizer, device)
    transform = EvaluationTransform(**preprocessing(run.config["model"]))
    writer = CaptionWriter(captioner, tokenizer, decoding)
    workers = default_workers() if cfg["num_workers"] is None else cfg["num_workers"]
    if in_shards:
        caption_shards(
            writer,
            transform,
            cfg["images"],
            Path(cfg["out"]) if cfg["out"] else None,
            run.path,
            batch_size=cfg["batch_size"],
            num_workers=workers,
            device=device,
            settings=settings,
        )
        return []
    out = Path(cfg["out"] or run.path / "captions" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    loader = DataLoader(
        Pictures(files, transform), batch_size=cfg["batch_size"], num_workers=workers, collate_fn=list
    )
    ordered = list(_captioned(loader, writer, device, len(files)))
    _write(out, ordered, run)
    if not any(result.captions for result in ordered):
        raise InputError(
            f"images={cfg['images']}: none of {len(files)} files is a picture; reasons: {out}/captions.csv"
        )
    return ordered


def _captioned(
    loader: Iterable[list[tuple[str, Tensor | None, str]]],
    writer: CaptionWriter,
    device: torch.device,
    total: int,
) -> Iterator[CaptionedFile]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Captioning", total=total)
        for loaded in loader:
            for name, captions, error in writer.write_loaded(loaded, device):
                yield CaptionedFile(Path(name), captions, error)
            progress.advance(bar, len(loaded))


def find_pictures(images: str) -> list[Path]:
    """The files that `images` means: itself, all pictures below a folder, or what a glob matches, sorted.

    Raises:
        InputError: there is no such file, or no picture.
    """
    path = Path(images).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    else:
        found = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    if not found:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        what = (
            "holds no picture"
            if path.is_dir()
            else "is neither a file, nor a folder, nor a glob that matches one"
        )
        raise InputError(f"images={images} {what} ({kinds})")
    return sorted(found)


class Pictures(Dataset[tuple[str, Tensor | None, str]]):
    """Each file as (name, (3, H, W) uint8, ""), or (name, None, reason)."""

    def __init__(self, files: list[Path], transform: EvaluationTransform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        file = self.files[index]
        try:
            return str(file), self.transform(Picture(file)), ""
        except PictureError as error:
            return str(file), None, str(error)


def _write(out: Path, results: list[CaptionedFile], run: RunDirectory) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"file": str(result.file), "caption": result.caption, "error": result.error} for result in results
    ]
    with open(out / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "caption", "error"])
        writer.writeheader()
        writer.writerows(rows)
    lines = (
        json.dumps({**row, "captions": [written.as_row() for written in result.captions]}, ensure_ascii=False)
        + "\n"
        for row, result in zip(rows, results, strict=True)
    )
    (out / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    failed = [result for result in results if result.error]
    write_gallery(
        out / "index.html",
        _items(results),
        title="Captions",
        subtitle=f"{len(results) - len(failed):,} pictures, by {run.config['name']}",
    )
    console = Console()
    for result in failed:
        console.print(
            f"no picture: {result.file} ({result.error})",
            style="yellow",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    console.print(
        f"{len(results) - len(failed):,} captioned, {len(failed):,} left out; "
        f"in {out}: index.html, captions.csv, captions.jsonl",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _items(results: list[CaptionedFile]) -> Iterator[GalleryItem]:
    return (GalleryItem(result.file, result.caption) for result in results if not result.error)
