"""Captions in JSON: COCO's annotations and lists of pictures, and Karpathy's split in two forms."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efficap.errors import InputError

CaptionRow = tuple[str, str, str]  # picture, caption, split

# Pictures of train, val and test. Karpathy & Fei-Fei, https://arxiv.org/abs/1412.2306, train on COCO's train2014;
# the papers since add the 30,504 pictures of val2014 that they left over, which their JSON calls restval.
_VARIANTS = {
    (113_287, 5_000, 5_000): "Karpathy's split of COCO with restval in train, which most papers train on",
    (
        82_783,
        5_000,
        5_000,
    ): "Karpathy's split of COCO without restval: scores are below those of the full train",
}


def karpathy_variant(counts: Mapping[str, int]) -> str:
    """Which variant of Karpathy's split of COCO has these numbers of pictures, in one line.

    Args:
        counts: split -> pictures; others than ``train``, ``val`` and ``test`` count for nothing.
    """
    train, val, test = (counts.get(split, 0) for split in ("train", "val", "test"))
    found = f"{train:,} / {val:,} / {test:,} pictures in train / val / test"
    name = _VARIANTS.get((train, val, test))
    if name is not None:
        return f"{found}: {name}"
    known = " nor ".join(f"{a:,} / {b:,} / {c:,}" for a, b, c in _VARIANTS)
    return f"{found}: neither {known}, so no variant of Karpathy's split of COCO; its scores compare with no paper's"


def read_json(setting: str, file: Path, split: str | None, image_dir: Path) -> list[CaptionRow]:
    """Read a JSON file of captions: a row for each, in the file's order; of a picture without any, one that is empty.

    Args:
        setting: the setting that named the file, for messages: ``data.table=captions.json``.
        file: COCO's ``captions_train2017.json`` or ``image_info_test2014.json``, Karpathy's ``dataset_coco.json``,
            ``dataset_flickr8k.json`` or ``dataset_flickr30k.json``, or a list of ``{"image": …, "caption": …}``.
        split: the split of all its rows; None where the file's content or name says it.
        image_dir: where a folder such as ``train2017`` may hold the pictures.

    Raises:
        InputError: no JSON of a known kind, without pictures, or with a split that cannot be told.
    """
    content = _load(setting, file)
    try:
        if isinstance(content, list):
            rows = _list_rows(content, split, functools.partial(_split_of, setting, file))
        elif _is_coco(content):
            rows = _coco_rows(content, file, split or _split_of(setting, file), image_dir)
        elif isinstance(content, dict) and isinstance(content.get("images"), list):
            rows = _karpathy_rows(content["images"], image_dir)
        else:
            raise InputError(f"{setting} is JSON of no known kind; {_KINDS}")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{setting} has an entry without what it should hold ({error!r}); {_KINDS}"
        ) from error
    if not rows:
        raise InputError(f"{setting} holds no captions")
    if split is not None and len({row[2] for row in rows} | {split}) > 1:
        splits = ", ".join(sorted({row[2] for row in rows}))
        raise InputError(
            f"{setting} has splits of its own ({splits}); give the file alone: data.table={file}"
        )
    return rows


def read_pictures(setting: str, file: Path, image_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each picture of a JSON file that `read_json` reads, under the same path, with what the file says of it.

    Raises:
        InputError: no JSON of a known kind.
    """
    content = _load(setting, file)
    try:
        if isinstance(content, list):
            return [(_text(entry["image"]), entry) for entry in content]
        if _is_coco(content):
            return _coco_pictures(content, file, image_dir)
        return _karpathy_pictures(content["images"], image_dir)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{setting} has an entry without what it should hold ({error!r}); {_KINDS}"
        ) from error


def _load(setting: str, file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{setting} cannot be read as JSON in UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"{setting} cannot be read: {error.strerror}") from error


def _is_coco(content: object) -> bool:
    """Whether it is COCO's annotations, or its list of the pictures of a split whose captions are kept back."""
    if not isinstance(content, dict) or "images" not in content:
        return False
    images = content["images"]
    first = images[0] if isinstance(images, list) and images else None
    return "annotations" in content or (isinstance(first, dict) and "file_name" in first)


_KINDS = (
    "known are COCO's captions_*.json ('images' and 'annotations' with 'caption') and image_info_*.json, "
    "Karpathy's dataset_*.json ('images' with 'filename', 'split' and 'sentences') and a list of objects with 'image' "
    "and 'caption', perhaps 'split'"
)


def _split_of(setting: str, file: Path) -> str:
    found = set(re.findall(r"(?<![a-z])(train|val|test)(?![a-z])", file.stem.lower()))
    if len(found) != 1:
        raise InputError(
            f"{setting}: its name does not tell which of train, val and test it is; "
            f"say so with data.table={{train: {file.name}, val: FILE}}"
        )
    return str(found.pop())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value


def _coco_pictures(content: dict[str, Any], file: Path, image_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    named = re.search(r"(train|val|test)\d{4}", file.stem)
    folder = named.group() if named else None
    inside = image_dir / folder if folder else None
    listed = {path.name for path in inside.iterdir()} if inside and inside.is_dir() else None

    def place(name: str) -> str:
        """COCO's zips unpack into a folder of their own, which its annotations do not mention."""
        if listed is None or (name not in listed and (image_dir / name).exists()):
            return name
        return f"{folder}/{name}"

    return [(place(_text(image["file_name"])), image) for image in content["images"]]


def _coco_rows(content: dict[str, Any], file: Path, split: str, image_dir: Path) -> list[CaptionRow]:
    paths: dict[Any, str] = {}
    for path, image in _coco_pictures(content, file, image_dir):
        if (other := paths.setdefault(image["id"], path)) != path:
            raise InputError(f"data.table={file}: {other} and {path} have the same id, {image['id']}")
    rows = [
        (paths[annotation["image_id"]], _text(annotation["caption"]), split)
        for annotation in content.get("annotations", [])
    ]
    captioned = {path for path, *_ in rows}
    return rows + [(path, "", split) for path in paths.values() if path not in captioned]


def _karpathy_pictures(images: list[dict[str, Any]], image_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    pictures = []
    folders: dict[str, bool] = {}
    for image in images:
        name, folder = _text(image["filename"]), _text(image.get("filepath", ""))
        if folder not in folders:
            folders[folder] = (image_dir / folder).is_dir() or not (image_dir / name).exists()
        pictures.append((f"{folder}/{name}" if folder and folders[folder] else name, image))
    return pictures


def _karpathy_rows(images: list[dict[str, Any]], image_dir: Path) -> list[CaptionRow]:
    rows = []
    for path, image in _karpathy_pictures(images, image_dir):
        split = _split(_text(image["split"]))
        captions = [_text(sentence["raw"]) for sentence in image["sentences"]]
        rows += [(path, caption, split) for caption in captions or [""]]
    return rows


def _list_rows(
    entries: list[dict[str, Any]], split: str | None, split_of_file: Callable[[], str]
) -> list[CaptionRow]:
    """The split is the one that is given, or the entry's own, or what the file's name tells."""
    rows = []
    for entry in entries:
        captions = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        own = split or _split(_text(entry.get("split") or split_of_file()))
        rows += [(_text(entry["image"]), _text(caption), own) for caption in captions or [""]]
    return rows


def _split(name: str) -> str:
    return "train" if name == "restval" else name
