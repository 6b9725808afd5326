"""``prepare coco``: COCO's pictures and captions, in Karpathy's split or COCO's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from efficap.data.coco import karpathy_variant
from efficap.data.prepare.archives import unpack
from efficap.data.prepare.download import Remote, fetch
from efficap.data.prepare.writing import extract, lacking_pictures, read_captions, write_captions

_COCO = "http://images.cocodataset.org"  # its certificate is not its own, hence no https; checksums protect instead

# Sizes in bytes and SHA-256: TensorFlow Datasets 4, url_checksums/coco_captions.txt. JPEGs do not get smaller in a
# zip; of the annotations only captions are unpacked, 100 MB of 800. caption_datasets.zip holds 9,035,673 + 38,318,553 +
# 144,186,139 bytes.
REMOTES = {
    "karpathy": Remote(
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        "caption_datasets.zip",
        size=36_745_453,
        sha256="4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
        unpacked=191_540_365,
    ),
    "annotations2014": Remote(
        f"{_COCO}/annotations/annotations_trainval2014.zip",
        "annotations_trainval2014.zip",
        size=252_872_794,
        sha256="031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
        unpacked=100_000_000,
    ),
    "annotations2017": Remote(
        f"{_COCO}/annotations/annotations_trainval2017.zip",
        "annotations_trainval2017.zip",
        size=252_907_541,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        unpacked=100_000_000,
    ),
    "train2014": Remote(
        f"{_COCO}/zips/train2014.zip",
        "train2014.zip",
        size=13_510_573_713,
        sha256="ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        unpacked=13_510_573_713,
    ),
    "val2014": Remote(
        f"{_COCO}/zips/val2014.zip",
        "val2014.zip",
        size=6_645_013_297,
        sha256="fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        unpacked=6_645_013_297,
    ),
    "train2017": Remote(
        f"{_COCO}/zips/train2017.zip",
        "train2017.zip",
        size=19_336_861_798,
        sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        unpacked=19_336_861_798,
    ),
    "val2017": Remote(
        f"{_COCO}/zips/val2017.zip",
        "val2017.zip",
        size=815_585_330,
        sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        unpacked=815_585_330,
    ),
}

SPLITS = ("karpathy", "2014", "2017")


def prepare_coco(folder: Path, *, split: str = "karpathy", remotes: Mapping[str, Remote] = REMOTES) -> Path:
    """Have COCO in a folder: ``images/train2014/…`` and so on, and ``captions.parquet``. Prints how to train on it.

    What is in the folder already serves: the zips, ``dataset_coco.json``, ``annotations/captions_*.json``, or the
    folders of pictures, in ``images`` or directly in it.

    Args:
        split: ``karpathy`` (train, val, test of the pictures of 2014, as in papers), ``2014`` or ``2017`` (COCO's own
            train and val).
        remotes: where the files come from.

    Returns:
        The path of ``captions.parquet``.

    Raises:
        InputError: see `fetch` and `unpack`.
    """
    year = "2017" if split == "2017" else "2014"
    parts = [f"train{year}", f"val{year}"]
    image_dir = max(folder / "images", folder, key=lambda place: _parts_in(place, parts))
    for part in parts:
        (image_dir / part).mkdir(parents=True, exist_ok=True)
    if split == "karpathy":
        [table] = extract(remotes["karpathy"], folder, ["dataset_coco.json"])
        rows = read_captions(table, image_dir)
    else:
        rows = read_captions(_annotations(folder, year, remotes), image_dir)
    _have_pictures(rows, folder, image_dir, parts, remotes)
    written = write_captions(rows, folder, image_dir)
    if split == "karpathy":
        counts = rows.groupby("split")["image"].nunique()
        print(karpathy_variant({str(name): int(count) for name, count in counts.items()}))
    return written


def _parts_in(place: Path, parts: list[str]) -> int:
    """How many of the folders are there with pictures; an earlier call that failed has left empty ones."""
    return sum(any((place / part).glob("*.jpg")) for part in parts)


def _annotations(folder: Path, year: str, remotes: Mapping[str, Remote]) -> dict[str, Path]:
    names = {split: f"captions_{split}{year}.json" for split in ("train", "val")}
    unzipped = {split: folder / "annotations" / name for split, name in names.items()}
    if all(file.is_file() for file in unzipped.values()):
        return unzipped
    files = extract(remotes[f"annotations{year}"], folder, list(names.values()))
    return dict(zip(names, files, strict=True))


def _have_pictures(
    rows: pd.DataFrame, folder: Path, image_dir: Path, parts: list[str], remotes: Mapping[str, Remote]
) -> None:
    lacking = {name.partition("/")[0] for name in lacking_pictures(rows, image_dir)}
    wanted = [part for part in parts if part in lacking]
    # All are downloaded before any is unpacked, so that the space for all is asked for at once.
    for part, archive in zip(wanted, fetch([remotes[part] for part in wanted], folder), strict=True):
        unpack(archive, image_dir, _inside(f"{part}/"))


def _inside(folder: str) -> Callable[[str], str | None]:
    return lambda member: member if member.startswith(folder) else None
