"""Small pictures as they lie inside a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from efficap.evaluation.gallery import load_picture

SIDE = 224  # pixels, the longer side
QUALITY = 60
AT_ONCE = 64  # pictures of shards held in memory, not decoded


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture as WebP, or why there is none.

    Attributes:
        data: the file's bytes; empty where the picture cannot be read.
        failure: the reason then.
    """

    data: bytes
    failure: str = ""


def thumbnails(
    pictures: Callable[[str], Path | Image.Image], image_ids: Sequence[str]
) -> Iterator[Thumbnail]:
    """The thumbnails of some pictures in their order, a few held at a time; all cores work on them."""
    with ThreadPoolExecutor() as pool:  # Pillow decodes, resizes and encodes without Python's lock
        for start in range(0, len(image_ids), AT_ONCE):
            opened = [_opened(pictures, image_id) for image_id in image_ids[start : start + AT_ONCE]]
            yield from pool.map(_thumbnail, opened)


def _opened(pictures: Callable[[str], Path | Image.Image], image_id: str) -> Path | Image.Image | Exception:
    """In this thread: a shard is read in one place at a time."""
    try:
        return pictures(image_id)
    except Exception as error:  # of many kinds, by format and damage
        return error


def _thumbnail(image: Path | Image.Image | Exception) -> Thumbnail:
    if isinstance(image, Exception):
        return Thumbnail(b"", str(image))
    data = io.BytesIO()
    try:
        if isinstance(image, Path):
            thumbnail = load_picture(image, SIDE)
        else:
            with image:  # decoded only now, a large JPEG at a fraction of its size, and let go
                image.draft("RGB", (SIDE * 2, SIDE * 2))
                thumbnail = load_picture(image, SIDE)
    except OSError as error:
        return Thumbnail(b"", str(error))
    thumbnail.save(data, "WEBP", quality=QUALITY)
    return Thumbnail(data.getvalue())
