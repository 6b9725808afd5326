"""Pictures, captions and shards that the data benchmarks make for themselves, the same every time.

N pictures.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from efficap.data.pictures import MAX_PIXELS
from efficap.data.shards.index import ensure_indexes
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import read_table
from efficap.tokenizer import CaptionTokenizer

WIDTH, HEIGHT, QUALITY = 640, 480, 90
SHARDS = 8  # divides evenly among the loader processes of a usual benchmark
CAPTIONS = 5  # of a picture
COLUMNS = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}

_WORDS = (
    *(
        "a",
        "the",
        "man",
        "woman",
        "dog",
        "cat",
        "bicycle",
        "street",
        "table",
        "red",
        "green",
        "small",
        "large",
    ),
    *(
        "two",
        "people",
        "sitting",
        "standing",
        "next",
        "to",
        "on",
        "of",
        "with",
        "in",
        "front",
        "holding",
        "riding",
    ),
    *(
        "near",
        "water",
        "field",
        "plate",
        "food",
        "bus",
        "train",
        "kitchen",
        "young",
        "group",
        "white",
        "black",
    ),
)


def write_all(folder: Path, pictures: int, processes: int) -> float:
    """Write ``images/``, ``captions.csv``, ``shards/`` with their indexes, and a tokenizer; the mean size in bytes."""
    (folder / "images").mkdir(parents=True)
    files = [folder / "images" / f"{number:06d}.jpg" for number in range(pictures)]
    with ProcessPoolExecutor(processes) as pool:
        sizes = list(pool.map(write_photograph, files, range(pictures), chunksize=8))
    captions = write_captions(folder / "captions.csv", [file.name for file in files])
    CaptionTokenizer.learn(captions, 400).save(folder / "tokenizer")
    write_tars(folder, -(-pictures // SHARDS), processes)
    return float(np.mean(sizes))


def write_photograph(file: Path, seed: int) -> int:
    """A JPEG with the spectrum of a photograph, edges and a little noise of a sensor; its size in bytes."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(_clouds(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = int(rng.integers(WIDTH)), int(rng.integers(HEIGHT))
        box = (left, top, left + int(rng.integers(20, 200)), top + int(rng.integers(20, 200)))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    pixels = np.asarray(image) + rng.normal(0, 4, (HEIGHT, WIDTH, 1))  # (H, W, 3)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.stat().st_size


def _clouds(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Noise whose amplitude falls as its frequency rises, as in photographs (Field, 1987)."""
    total = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for octave in range(1, 8):
        shape = (HEIGHT >> (8 - octave)) + 2, (WIDTH >> (8 - octave)) + 2
        coarse = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        total += (fine - 128) * 1.4 / octave**1.7
    return total.clip(0, 255).astype(np.uint8)


def _tiny_jpeg(seed: int, side: int) -> bytes:
    """A JPEG of a few hundred bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(data, "JPEG", quality=50)
    return data.getvalue()


def write_captions(file: Path, names: list[str]) -> list[str]:
    """A CSV with `CAPTIONS` captions of 9 to 13 words of each picture, all for training; returns the captions."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 14, len(names) * CAPTIONS)
    words = rng.integers(len(_WORDS), size=(len(lengths), 13))
    captions = [
        " ".join(_WORDS[word] for word in row[:length]) for row, length in zip(words, lengths, strict=True)
    ]
    rows = {"file_name": np.repeat(names, CAPTIONS), "caption": captions, "split": "train"}
    pd.DataFrame(rows).to_csv(file, index=False)
    return captions


def write_tars(folder: Path, samples_per_shard: int, processes: int) -> list[Path]:
    """The table in `folder` as indexed tars in ``shards/``."""
    tables, _ = read_table(folder / "captions.csv", folder / "images", **COLUMNS)
    settings = ShardSettings(samples_per_shard, None, max_pixels=MAX_PIXELS)
    write_shards(tables["train"], folder / "shards", settings, processes)
    tars = sorted((folder / "shards").glob("*.tar"))
    ensure_indexes(tars, index_dir=None, max_pixels=MAX_PIXELS, workers=processes)
    return tars


def write_table(folder: Path, pictures: int, side: int) -> None:
    """``captions.csv``, a tokenizer, and ``images/`` of `side` pixels, whose many names stand for a few files."""
    (folder / "images").mkdir(parents=True)
    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(pictures)]
    for start in range(0, pictures, 30_000):  # a file system has a limit of links to a file, 65,000 or so
        first = folder / "images" / names[start]
        first.write_bytes(_tiny_jpeg(start, side))
        for name in names[start + 1 : start + 30_000]:
            os.link(first, folder / "images" / name)
    captions = write_captions(folder / "captions.csv", names)
    CaptionTokenizer.learn(captions[:10_000], 400).save(folder / "tokenizer")


def write_tar(folder: Path, samples: int, side: int) -> None:
    """One indexed tar of such pictures in ``shards/``."""
    write_table(folder, samples, side)
    write_tars(folder, samples, 1)
    (folder / "sizes.json").write_text(json.dumps({"samples": samples}))


def multiply(folder: Path, count: int) -> None:
    """The first tar and its index under `count` names in all: one inode, so that size, time and digest still fit."""
    first = folder / "shards" / "00000.tar"
    files = [file for file in first.parent.iterdir() if file.name.startswith(first.name)]
    for number, file in itertools.product(range(1, count), files):
        os.link(file, file.with_name(file.name.replace("00000", f"{number:05d}", 1)))
