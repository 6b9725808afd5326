"""Writes the data set: a folder of JPEGs and a CSV of captions, whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random

from efficap.data.demo.captions import write_references
from efficap.data.demo.drawing import bounding_box, draw_scene
from efficap.data.demo.splits import SPLIT_SIZES, sample_splits
from efficap.data.pool import tracked
from efficap.errors import InputError
from efficap.files import unfinished

MIN_IMAGE_SIZE = 64  # pixels; below it stripes and spots blur

_VERSION = 1  # raise it when the same seed gives other pictures or captions
_RECORD = "demo.json"
BOXES_FILE = "boxes.csv"


def write_demo(
    out_dir: Path, *, seed: int = 0, sizes: Mapping[str, int] = SPLIT_SIZES, image_size: int = 128
) -> Path:
    """Draw the demo data set into a folder, unless it is already there.

    The folder gets ``images/*.jpg``, ``captions.csv`` with the columns ``file_name`` (in ``images``),
    ``caption`` and ``split``, one row a caption and five captions a picture, ``boxes.csv``, one row an object: where it
    lies, as fractions of the picture's side; and ``demo.json``, which records what was asked for. It appears by a
    rename, when it is complete. The same arguments give the same CSVs, byte for byte, and with the same Pillow the
    same JPEGs.

    Args:
        out_dir: the folder to write; it must be new, empty, or hold this very data set.
        seed: another seed gives other scenes and other captions.
        sizes: split -> number of pictures, for some or all of ``train``, ``val``, ``test``, ``irregular``.
            The pictures of ``irregular`` show combinations that no other split has.
        image_size: pixels a side.

    Returns:
        The path of the CSV.

    Raises:
        InputError: for an unknown split, a number that is too small, or a folder that holds something else.
    """
    _check(sizes, image_size)
    sizes = {split: sizes.get(split, 0) for split in SPLIT_SIZES}
    record = {"version": _VERSION, "seed": seed, "sizes": sizes, "image_size": image_size}
    folder = Path(out_dir).resolve()
    if not _is_written(folder, record, pictures=sum(sizes.values())):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write(partial, seed, sizes, image_size)
            _write_boxes(partial, seed, sizes)
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            partial.rename(folder)
        except OSError:
            # Another process may have written the same in the meantime: then its copy serves.
            if not _is_written(folder, record, pictures=sum(sizes.values())):
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if not (folder / BOXES_FILE).is_file():  # drawn before there were any
        with contextlib.suppress(OSError):  # training needs none
            _write_boxes(folder, seed, sizes)
    return Path(out_dir) / "captions.csv"


def _check(sizes: Mapping[str, int], image_size: int) -> None:
    unknown = sorted(set(sizes) - set(SPLIT_SIZES))
    if unknown:
        raise InputError(f"sizes names the split {unknown[0]!r}; the splits are {', '.join(SPLIT_SIZES)}")
    for split, size in sizes.items():
        if size < 0:
            raise InputError(f"sizes[{split!r}]={size} must be at least 0; leave the split out to skip it")
    if not any(sizes.values()):
        raise InputError("sizes asks for no picture; give at least one split a size above 0")
    if image_size < MIN_IMAGE_SIZE:
        raise InputError(f"image_size={image_size} must be at least {MIN_IMAGE_SIZE} for textures to be seen")


def _is_written(folder: Path, record: Mapping[str, object], pictures: int) -> bool:
    """Whether the folder holds this data set already; raises InputError where it holds anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder that is new or empty")
    if not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{folder} holds files that are not a demo data set and will not be overwritten; "
            "name a folder that is new or empty"
        ) from None
    if found != record:
        raise InputError(
            f"{folder} holds a demo data set written with {json.dumps(found)}, and {json.dumps(record)} was "
            "asked for; name another folder, or delete this one"
        )
    found_pictures = sum(1 for _ in folder.glob("images/*.jpg"))
    has_table = (folder / "captions.csv").is_file()
    if found_pictures != pictures or not has_table:
        raise InputError(
            f"{folder} lacks part of its data set: {found_pictures} of {pictures} pictures are there, captions.csv "
            f"is {'there' if has_table else 'missing'}; delete the folder to draw it anew"
        )
    return True


def _write(folder: Path, seed: int, sizes: Mapping[str, int], image_size: int) -> None:
    images = folder / "images"
    images.mkdir(parents=True)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file_name", "caption", "split"))
        scenes = sample_splits(seed, sizes)
        for split, name, scene in tracked(scenes, "Drawing the demo data set", sum(sizes.values())):
            file_name = f"{name}.jpg"
            draw_scene(scene, image_size).save(images / file_name, quality=90)
            references = write_references(scene, Random(f"{seed} {name} captions"))
            table.writerows((file_name, caption, split) for caption in references)


def _write_boxes(folder: Path, seed: int, sizes: Mapping[str, int]) -> None:
    with (
        unfinished(folder / BOXES_FILE) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file_name", "colour", "shape", "left", "top", "right", "bottom"))
        for _, name, scene in sample_splits(seed, sizes):
            for part in scene.parts:
                for spot in part.spots:
                    edges = (f"{edge:.4f}" for edge in bounding_box(part.look, spot))
                    table.writerow((f"{name}.jpg", part.look.colour, part.look.shape, *edges))
