"""``prepare flickr8k`` and ``prepare flickr30k``: Flickr's pictures with five captions each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from efficap.data.formats import TOKEN_LISTS
from efficap.data.prepare import coco
from efficap.data.prepare.archives import unpack
from efficap.data.prepare.download import Remote, fetch
from efficap.data.prepare.writing import extract, lacking_pictures, read_captions, write_captions
from efficap.errors import InputError

# The authors' server is gone; this is the mirror of Jason Brownlee's tutorial on machinelearningmastery.com. MD5: R's
# torchvision (mlverse/torchvision, R/dataset-flickr.R) and several CMake files, which agree. Nobody gives a SHA-256 or
# exact sizes: the server is asked for those, and what comes out is an estimate.
_MIRROR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"

REMOTES = {
    "images": Remote(
        f"{_MIRROR}/Flickr8k_Dataset.zip",
        "Flickr8k_Dataset.zip",
        md5="f18a1e2920de5bd84dae7cf08ec78978",
        unpacked=1_100_000_000,
    ),
    "text": Remote(
        f"{_MIRROR}/Flickr8k_text.zip",
        "Flickr8k_text.zip",
        md5="bf6c1abcb8e4a833b7f922104de18627",
        unpacked=20_000_000,
    ),
    "karpathy": coco.REMOTES["karpathy"],
}

_FORM = "https://forms.illinois.edu/sec/229675"  # the set's page: https://shannon.cs.illinois.edu/DenotationGraph/


def prepare_flickr8k(folder: Path, *, remotes: Mapping[str, Remote] = REMOTES) -> Path:
    """Have Flickr8k in a folder: ``images/*.jpg`` and ``captions.parquet``. Prints how to train on it.

    Its authors' split: 6,000, 1,000 and 1,000 pictures; about a hundred more are in no split and get no captions.
    Zips, texts and pictures that are there already serve, the latter in ``images`` or ``Flicker8k_Dataset``.

    Returns:
        The path of ``captions.parquet``.

    Raises:
        InputError: see `fetch` and `unpack`.
    """
    own = folder / "Flicker8k_Dataset"  # spelt so in the zip
    image_dir = own if own.is_dir() else folder / "images"
    lists = [names[0] for names in TOKEN_LISTS.values()]
    table, *_ = extract(remotes["text"], folder, ["Flickr8k.token.txt", *lists])
    rows = read_captions(table, image_dir)
    if lacking_pictures(rows, image_dir):
        [archive] = fetch([remotes["images"]], folder)
        unpack(archive, image_dir, _picture)
    return write_captions(rows, folder, image_dir)


def _picture(member: str) -> str | None:
    folder, _, name = member.rpartition("/")
    return name if folder == "Flicker8k_Dataset" and name.endswith(".jpg") else None


def prepare_flickr30k(folder: Path, *, remotes: Mapping[str, Remote] = REMOTES) -> Path:
    """Make a data set of Flickr30k's pictures in a folder, with Karpathy's split. Prints how to train on it.

    The pictures are given on request only. They serve in ``images``, ``flickr30k-images`` or ``flickr30k_images``.

    Returns:
        The path of ``captions.parquet``.

    Raises:
        InputError: there are no pictures (the message says where to ask for them); see `fetch` and `unpack` too.
    """
    names = ("images", "flickr30k-images", "flickr30k_images")
    found = [folder / name for name in names if any((folder / name).glob("*.jpg"))]
    if not found:
        raise InputError(
            f"{folder / 'images'} holds no pictures: those of Flickr30k are given on request, at {_FORM}; "
            "unpack them there and run the same command again"
        )
    [table] = extract(remotes["karpathy"], folder, ["dataset_flickr30k.json"])
    return write_captions(read_captions(table, found[0]), folder, found[0])
