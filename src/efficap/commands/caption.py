"""Caption pictures: a file, a folder or a glob in; captions.csv, captions.jsonl and a gallery out. Or shards."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from efficap.commands.caption_folder import (
    CaptionedFile,
    CaptionFolder,
    Pictures,
    find_pictures,
    print_outcome,
)
from efficap.commands.caption_output import CaptioningBar, done_with
from efficap.commands.caption_shards import caption_shards, check_shards_alone, names_shards
from efficap.commands.faults import check_writable
from efficap.commands.kinds import check_form
from efficap.commands.run_dir import RunDirectory
from efficap.commands.schema import CAPTION
from efficap.data.module import default_workers
from efficap.data.transforms import EvaluationTransform
from efficap.decoding import Decoding, build_decoding
from efficap.errors import InputError
from efficap.launch import launch
from efficap.models.build import preprocessing
from efficap.ranks import take_gpu
from efficap.training.writer import CaptionWriter, words_of


def caption(cfg: dict[str, Any]) -> list[CaptionedFile]:
    """Caption as the plain values of conf/caption.yaml say; returns what became of each file, in order.

    Shards are captioned by `caption_shards`, whose results lie on disk; the list is then empty.

    Raises:
        InputError: no such run, nothing to caption, not one picture that can be read, or several processes for files.
    """
    check_form(cfg, CAPTION)
    _check_processes(cfg["images"])
    run = RunDirectory(cfg["run"])
    device, precision = run.placement(cfg["accelerator"], cfg["precision"])
    settings = run.decoding(cfg["decoding"])
    decoding = build_decoding(settings)
    load = functools.partial(_load_writer, run, decoding, device, precision, compile=cfg["compile"])
    looking = _looking(cfg)
    record = done_with(run, settings, precision, looking)
    transform = EvaluationTransform(**preprocessing(run.config["model"]))
    workers = default_workers() if cfg["num_workers"] is None else cfg["num_workers"]
    if names_shards(cfg["images"]):
        check_shards_alone(cfg["images"])
        if looking:
            raise InputError(
                f"attention={cfg['attention']} is for pictures; shards get no page to show it on"
            )
        caption_shards(
            load,
            transform,
            cfg["images"],
            Path(cfg["out"]).expanduser() if cfg["out"] else None,
            run.path,
            num_workers=workers,
            device=device,
            record=record,
        )
        return []
    files = find_pictures(cfg["images"])
    out = Path(cfg["out"]).expanduser() if cfg["out"] else _new_folder(run.path / "captions")
    folder = CaptionFolder(out, record)
    remaining = folder.remaining(files, transform)
    if remaining:
        _announce(out, named=bool(cfg["out"]), done=len(files) - len(remaining), files=len(files))
        try:
            _caption_files(remaining, folder, load, transform, workers, device, looking)
        finally:
            if not cfg["out"]:
                with contextlib.suppress(OSError):  # there is something in it
                    out.rmdir()
    if remaining or not folder.is_finished:
        folder.finish(run.config["name"], crop=transform.image_size / transform.short_side)
    ordered = [folder.results[str(file)] for file in files]
    print_outcome(out, ordered, before=len(files) - len(remaining))
    if not any(result.captions for result in ordered):
        raise InputError(
            f"images={cfg['images']}: none of {len(files)} files is a picture; reasons: {out}/captions.csv"
        )
    return ordered


def _new_folder(among: Path) -> Path:
    """A folder named by the time, this command's alone."""
    check_writable(among, "name another folder with out=DIR")
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = among / (now if number == 1 else f"{now}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def _check_processes(images: str) -> None:
    """Give each of several processes its GPU; by the shards' locks they then share the work."""
    own = launch()
    if own.world > 1 and not names_shards(images):
        raise InputError(
            f"images={images}: {own.world} processes can share shards (*.tar), and not a folder of pictures; start one"
        )
    if own.world > 1 and torch.cuda.is_available():
        take_gpu()


def _looking(cfg: dict[str, Any]) -> dict[str, bool]:
    """What `CaptionWriter.write` is to tell of where the model looked; empty for nothing."""
    attention, rollout = cfg["attention"], cfg["rollout"]
    if not attention and rollout:
        raise InputError("rollout=true changes what attention=true shows; add that")
    return {"attention": True, "by_head": attention == "by_head", "rollout": rollout} if attention else {}


def _load_writer(
    run: RunDirectory, decoding: Decoding, device: torch.device, precision: torch.dtype, *, compile: bool
) -> tuple[CaptionWriter, int]:
    """The writer, and the number of pictures that it takes at a time."""
    tokenizer = run.tokenizer()
    captioner = run.captioner(tokenizer, device, precision, compile=compile, packed=True)
    writer = CaptionWriter(captioner, tokenizer, decoding)
    side = run.config["model"]["image_size"]
    return writer, writer.find_batch_size(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))


def _announce(out: Path, *, named: bool, done: int, files: int) -> None:
    """Say what a later start needs to know, and what an earlier one has done."""
    if not named:
        print(f"captions go to {out}; if they are stopped, the same with out={out} goes on", file=sys.stderr)
    elif done:
        print(f"{done:,} of {files:,} files are done; going on with the others", file=sys.stderr)


def _caption_files(
    files: list[Path],
    folder: CaptionFolder,
    load: Callable[[], tuple[CaptionWriter, int]],
    transform: EvaluationTransform,
    num_workers: int,
    device: torch.device,
    looking: dict[str, bool],
) -> None:
    """Caption batch after batch; the folder has each before the next begins."""
    writer, batch_size = load()
    loader: DataLoader[Any] = DataLoader(
        Pictures(files, transform), batch_size=batch_size, num_workers=num_workers, collate_fn=list
    )
    try:
        with CaptioningBar(f"Captioning {len(files):,} pictures", len(files)) as bar:
            for loaded in loader:
                batch = []
                for name, captions, error in writer.write_loaded(loaded, device, **looking):
                    words = words_of(captions[0], writer.tokenizer) if captions and looking else []
                    captions = [replace(written, attention=None) for written in captions]  # the words have it
                    batch.append(CaptionedFile(Path(name), captions, error, words))
                    bar.count_picture(1)
                folder.add(batch)
    except KeyboardInterrupt:
        print(f"interrupted; the same with out={folder.path} goes on", file=sys.stderr)
        raise
